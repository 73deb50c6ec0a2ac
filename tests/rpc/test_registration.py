import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from tests.support.engines import FakeEngine
from tests.support.serving import refused, serving
from tests.support.specs import spec

SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"]
KINDS = {(False, False): "unary_unary", (False, True): "unary_stream", (True, False): "stream_unary"}
KINDS |= {(True, True): "stream_stream"}


def called(channel, method, *messages):
    """A call that sends and receives bytes instead of messages."""
    open_call = getattr(channel, KINDS[method.client_streaming, method.server_streaming])
    call = open_call(f"/{SERVICE.full_name}/{method.name}", request_serializer=None, response_deserializer=None)
    return call(iter(messages) if method.client_streaming else messages[0])


@pytest.mark.parametrize("method", list(SERVICE.methods), ids=lambda method: method.name)
@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", b"\x0a\x7fcut", b"\x0b" * 200], ids=["no tag", "cut off", "a tower of groups"]
)
async def test_bytes_that_cannot_be_parsed_are_an_invalid_request(method, data, caplog):
    async with serving(FakeEngine(), list_jobs=True) as s:
        got = await refused(called(s.channel, method, data))
    assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    (violation,) = got.BadRequest.field_violations
    assert violation.field == "request"
    assert violation.description == (
        f"must be a {method.input_type.full_name}, got {len(data)} bytes that cannot be parsed as one; "
        "generate the client's stubs from this server's proto"
    )
    assert "Traceback" not in caplog.text


async def test_an_unparsable_command_ends_its_stream_and_no_other_job():
    method = SERVICE.methods_by_name["StylizeInteractive"]
    engine = FakeEngine(iteration_s=0.002)
    async with serving(engine) as s:
        start = pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec(iterations=200))).SerializeToString()
        got = await refused(called(s.channel, method, start, b"\xff\xff\xff"))
        assert got.code is grpc.StatusCode.INVALID_ARGUMENT
        assert got.message.startswith("request: must be a gramophone.v1.StylizeInteractiveRequest, got 3 bytes")
        response = await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        assert response.result.image.data


async def test_a_message_with_fields_of_a_later_version_is_accepted():
    async with serving(FakeEngine()) as s:
        unknown = b"\xfa\x3f\x03new"  # field 1023
        data = pb.StylizeRequest(spec=spec()).SerializeToString() + unknown
        response = await called(s.channel, SERVICE.methods_by_name["Stylize"], data)
    assert pb.StylizeResponse.FromString(response).result.image.data
