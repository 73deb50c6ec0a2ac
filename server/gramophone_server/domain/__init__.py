"""Plain values and protocols that all rooms share: jobs, job states, events, commands, the protocol of an engine."""
