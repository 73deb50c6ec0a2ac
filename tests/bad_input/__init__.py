"""Sends invalid and malicious requests to a server: see `campaign`."""
