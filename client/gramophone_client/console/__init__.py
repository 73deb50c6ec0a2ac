"""What a person at a terminal sees and types: progress, keys, files, exit codes."""
