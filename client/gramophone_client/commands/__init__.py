"""One module per command of `gramophone`, and the parser of their flags."""
