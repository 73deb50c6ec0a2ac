"""Gramophone's server: neural style transfer over gRPC. Start it with `gramophone-server`, or see `main.py`."""
