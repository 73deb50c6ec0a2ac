"""Hours of everything at once on one server, and whether its memory grows: `make soak MINUTES=n`."""
