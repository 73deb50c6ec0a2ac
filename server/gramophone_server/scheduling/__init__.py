"""Which job runs next, and in which batch, on the one compute thread. Knows the engine only by its protocol."""
