"""The synchronous side of the client: an event loop in a thread, and what iterates on it."""
