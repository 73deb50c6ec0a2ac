"""Gramophone's contract: the recipe of a picture (`recipe`), the wire format (`v1`), and their conversion (`wire`)."""
