"""Encoded pictures in and out, and the store of uploaded ones."""
