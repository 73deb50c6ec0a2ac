"""The service's RPCs: validate a request, admit its job, send what happens to it. The wire (grpc, protobuf) is known here."""
