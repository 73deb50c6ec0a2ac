"""Input and output on a terminal: progress, keys, files, exit codes."""
