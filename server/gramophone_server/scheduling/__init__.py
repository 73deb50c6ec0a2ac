"""Which job runs next, in which batch, on the one compute thread. Knows the engine by its protocol alone."""
