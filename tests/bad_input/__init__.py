"""What nobody should send, sent to a server: see `campaign`."""
