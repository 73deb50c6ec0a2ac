"""Faults played on real servers and clients, on loopback, and the rules that must hold all the while: `make chaos`."""
