"""A job as a stream of updates: reading, control, recovery after a lost server."""
