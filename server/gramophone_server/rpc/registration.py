"""The service's RPCs as gRPC takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from gramophone_server.rpc.calls import Malformed
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.telemetry.metrics import SERVICE

__all__ = ["add_to_server"]

KINDS = {  # by whether the client streams, and the server
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_to_server(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Has `server` answer with `servicer`.

    As the generated function of this purpose does, but for bytes that are no message: gRPC ends their call with UNKNOWN, a
    stream with whatever its handler makes of the exception, and logs a traceback each. Here they are refused as what they
    are, a request that breaks a rule; see `RpcCall.received`.
    """
    handlers = {
        method.name: KINDS[method.client_streaming, method.server_streaming](
            getattr(servicer, method.name),
            request_deserializer=_reader(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(SERVICE.full_name, handlers)


def _reader(kind: type[Message]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Message | Malformed:
        try:
            return kind.FromString(data)
        except DecodeError:
            return Malformed(kind.DESCRIPTOR.full_name, len(data))

    return read
