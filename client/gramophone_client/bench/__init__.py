"""`gramophone bench`: measures the throughput and latency of a server through the project's own client."""
