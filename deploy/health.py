"""The image's HEALTHCHECK, for hosts without a gRPC probe. Exits with code 0 if the server on this machine serves.

It calls the standard health service, which answers NOT_SERVING until the network is warm and after the first SIGTERM.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 5

address = f"127.0.0.1:{os.environ.get('GRAMOPHONE_PORT', '50051')}"
with grpc.insecure_channel(address) as channel:
    try:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name}")
if response.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}")
