"""`gramophone bench`: how much a server carries, measured through the project's own client."""
