"""The channel, and the messages on it."""
