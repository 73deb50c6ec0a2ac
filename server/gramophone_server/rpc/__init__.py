"""The service's RPCs: validate a request, admit its job, send its events. This is where gRPC and protobuf are known."""
