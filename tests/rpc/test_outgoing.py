"""Serialised messages."""

import contextlib

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.rpc.byte_budget import ByteBudget
from gramophone_server.rpc.outgoing import Outgoing, nested

RESPONSES = (pb.StylizeStreamResponse, pb.StylizeInteractiveResponse, pb.WatchJobResponse)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000, 3_000_000])
def test_a_nested_message_is_what_protobuf_writes(size):
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    frame = pb.Frame(iteration=70_000, dropped=3)
    image = pb.Image(format=pb.IMAGE_FORMAT_PNG, width=640, height=480)
    wanted = pb.WatchJobResponse(event=pb.JobEvent(sequence=2**40, frame=frame))
    wanted.event.frame.image.CopyFrom(image)
    wanted.event.frame.image.data = body
    levels = [(pb.WatchJobResponse(), 1), (pb.JobEvent(sequence=2**40), 4), (frame, 2), (image, 4)]
    parts = nested(levels, body)
    for kind in RESPONSES:  # all of them have the event in the same field
        assert kind.FromString(b"".join(parts)).event == wanted.event
    inner = b"".join(parts[3:])
    assert pb.Image.FromString(inner) == wanted.event.frame.image
    assert pb.WatchJobResponse.FromString(b"".join(nested(levels[:3], memoryview(inner)))) == wanted


async def test_a_message_gives_back_its_bytes_and_what_it_holds_once():
    budget, closed = ByteBudget(100), []
    holds = contextlib.ExitStack()
    holds.callback(closed.append, "encoding")
    message = Outgoing(b"x" * 20, share=budget.try_take(40), holds=holds)
    message.abandon()  # gRPC still has its copy
    assert (budget.used, message.data, closed) == (20, b"", ["encoding"])
    message.close()
    message.close()
    assert (budget.used, closed) == (0, ["encoding"])
