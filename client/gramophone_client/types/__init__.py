"""Values that a caller of the client passes in and gets back."""
