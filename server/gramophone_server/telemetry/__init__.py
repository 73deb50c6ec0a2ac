"""What an operator sees: metrics, the access log, health and the HTTP probes."""
