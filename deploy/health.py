"""Exit code 0 if the server on this machine serves: the image's HEALTHCHECK, for where no gRPC probe is at hand.

Asks the standard health service, which says NOT_SERVING until the network is warm and from the first SIGTERM on.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

WITHIN_S = 5

address = f"127.0.0.1:{os.environ.get('GRAMOPHONE_PORT', '50051')}"
with grpc.insecure_channel(address) as channel:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WITHIN_S)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name}")
if answer.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
