"""Injects faults into real servers and clients on the loopback, and checks that all rules hold: `make chaos`."""
