"""Values that a caller of the client gives and gets."""
