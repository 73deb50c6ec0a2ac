"""Runs a mixed load on one server for a long time, and checks whether its memory grows: `make soak MINUTES=n`."""
