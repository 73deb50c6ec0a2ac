"""Builds a release, installs it in empty environments and runs a job there; see `__main__`."""
