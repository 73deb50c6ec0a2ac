"""Registers RPCs with a gRPC server: the service's own, health checks and reflection.

Every method is registered as one whose client streams bytes, which is the same on the wire. So its handler starts with
the headers of a call and reads the messages itself, when there is room for them; see `receiving`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from operator import attrgetter
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from gramophone_server.rpc.receiving import Context
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.rpc.standard_calls import StandardCalls
from gramophone_server.telemetry.metrics import SERVICE

__all__ = ["add_health", "add_reflection", "add_to_server"]

# What a handler is called with: gRPC's iterator of the client's messages, which is not used, and the context.
Handler = Callable[[object, Context], Any]


def add_to_server(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Adds the service."""
    # All handlers stream their responses: one response looks the same on the wire, and a client that does not read it
    # is noticed; see `RpcCall.sending`.
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        method.name: grpc.stream_stream_rpc_method_handler(
            getattr(servicer, method.name),
            response_serializer=attrgetter("data"),  # of `Outgoing`
        )
        for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))


def add_health(checks: health.aio.HealthServicer, calls: StandardCalls, server: grpc.aio.Server) -> None:
    """Adds grpc.health.v1."""

    async def check(_: object, context: Context) -> health_pb2.HealthCheckResponse:
        async with calls.call(context) as call:
            return await checks.Check(await call.receive(health_pb2.HealthCheckRequest), context)

    async def watch(_: object, context: Context) -> None:
        async with calls.call(context) as call:
            await checks.Watch(await call.receive(health_pb2.HealthCheckRequest), context)

    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    # Registered methods have queues of their own for calls that arrive, so a check does not wait behind a flood.
    server.add_registered_method_handlers(service.full_name, _handlers(service, {"Check": check, "Watch": watch}))


def add_reflection(calls: StandardCalls, server: grpc.aio.Server) -> None:
    """Adds grpc.reflection.v1alpha."""
    # Optional, because only some servers need it.
    from grpc_reflection.v1alpha import reflection, reflection_pb2  # type: ignore[import-untyped]

    service = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
    names = (SERVICE.full_name, health.SERVICE_NAME, service.full_name)
    answers = reflection.aio.ReflectionServicer(names)

    async def info(_: object, context: Context) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async with calls.call(context) as call:
            requests = call.messages(reflection_pb2.ServerReflectionRequest)
            async for answer in answers.ServerReflectionInfo(requests, context):
                yield answer

    handlers = _handlers(service, {"ServerReflectionInfo": info})
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handlers(service: ServiceDescriptor, methods: Mapping[str, Handler]) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """gRPC's handlers of these methods of a service, without a deserializer: they read bytes."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for name, method in methods.items():
        descriptor = service.methods_by_name[name]
        kind = (
            grpc.stream_stream_rpc_method_handler
            if descriptor.server_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        serializer = GetMessageClass(descriptor.output_type).SerializeToString
        handlers[name] = kind(method, response_serializer=serializer)
    return handlers
