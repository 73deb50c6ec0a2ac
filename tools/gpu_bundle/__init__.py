"""A folder with all that a GPU machine without a network needs for `make gpu-check`; see `__main__`."""
