"""Registers the service's RPCs with a gRPC server."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from gramophone_server.rpc.calls import Malformed
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.telemetry.metrics import SERVICE

__all__ = ["add_to_server"]

# By whether the client streams. All handlers stream their responses: one response looks the same on the wire, and a
# client that does not read it is noticed; see `RpcCall.sending`.
HANDLERS = {False: grpc.unary_stream_rpc_method_handler, True: grpc.stream_stream_rpc_method_handler}


def add_to_server(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Adds `servicer` to `server`.

    Differs from the generated function in one way. If bytes cannot be parsed as a message, gRPC ends a unary call with
    UNKNOWN and a stream with its handler's error, and logs a traceback for each. Here they are an invalid request; see
    `RpcCall.received`.
    """
    handlers = {
        method.name: HANDLERS[method.client_streaming](
            getattr(servicer, method.name),
            request_deserializer=_parser(GetMessageClass(method.input_type)),
            response_serializer=attrgetter("data"),  # of `Outgoing`
        )
        for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(SERVICE.full_name, handlers)


def _parser(kind: type[Message]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return kind.FromString(data)
        except DecodeError:
            return Malformed(kind.DESCRIPTOR.full_name, len(data))

    return parse
