"""Decodes and encodes pictures, and stores uploaded ones."""
