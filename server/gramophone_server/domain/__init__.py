"""Plain values and protocols that every other room shares: jobs, job states, events, commands, the engine's protocol."""
