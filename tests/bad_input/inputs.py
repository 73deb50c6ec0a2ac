"""Invalid calls. Each is a function of a seed, and can be saved to a file to repeat it."""

from __future__ import annotations

import json
import lzma
import math
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gramophone.recipe import Recipe, Start
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_server.config import Limits
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.fake import FakeEngine
from gramophone_server.images import codec
from gramophone_server.telemetry.metrics import SERVICE
from tests.support.bad_pictures import BOMBS, damaged, in_jpeg, in_png, valid_pictures

JOB_ID = "00000000-0000-4000-8000-000000000000"  # in inputs; replaced by the id of an existing job when sent
RECIPE: dict[str, Any] = {"size": 32, "smallest_size": 0, "iterations": 6}
REQUESTS = {method.name: GetMessageClass(method.input_type) for method in SERVICE.methods}


class Input(NamedTuple):
    """One call."""

    kind: str  # kind of damage
    method: str
    messages: tuple[bytes, ...]
    images: int = 1  # number of images to decode; scales the time limit

    def to_file(self) -> bytes:
        head = json.dumps({
            "kind": self.kind, "method": self.method, "images": self.images, "sizes": [len(m) for m in self.messages]
        })  # fmt: skip
        return lzma.compress(head.encode() + b"\n" + b"".join(self.messages))

    @classmethod
    def from_file(cls, path: Path) -> Input:
        head, _, body = lzma.decompress(path.read_bytes()).partition(b"\n")
        fields, messages = json.loads(head), []
        for size in fields["sizes"]:
            messages.append(body[:size])
            body = body[size:]
        return cls(fields["kind"], fields["method"], tuple(messages), fields["images"])


def corpus() -> list[Path]:
    """The files of inputs that failed once."""
    return sorted((Path(__file__).parent / "corpus").glob("*.input"))


def bombs() -> Iterator[Input]:
    """Inputs that are much larger or more expensive than they seem: each bomb of `bad_pictures`, as the content of a
    job and as an upload, and messages with extreme sizes, counts or nesting."""
    for name, make in BOMBS.items():
        data = make()
        yield Input(f"bomb {name}", "Stylize", (request(content=data),))
        yield Input(f"bomb {name}", "UploadImage", tuple(_pieces(data, 2**20)))
    thin = BOMBS["png-of-32-megapixels-of-16-bits"]()
    spec = job(content=thin, styles=[thin] * 4)
    yield Input("bomb five pictures", "Stylize", (pb.StylizeRequest(spec=spec).SerializeToString(),), images=5)
    empty = pb.UploadImageRequest().SerializeToString()
    yield Input("bomb empty pieces", "UploadImage", (empty,) * 3000)
    yield Input("bomb pieces of a byte", "UploadImage", tuple(_pieces(in_png(), 1)))
    yield Input("bomb large piece", "UploadImage", (pb.UploadImageRequest(chunk=bytes(2**20 + 1)).SerializeToString(),))
    yield Input("bomb resume", "Stylize", (request(resume=b"GRAMCKP\x01" + b"\xff" * (64 * 2**20)),))
    yield Input(
        "bomb resume header", "Stylize", (request(resume=b"GRAMCKP\x01" + struct.pack("<I", 60_000) + b"[" * 60_000),)
    )
    many = pb.JobSpec(content=job().content, styles=[pb.StyleSource()] * 200_000)
    yield Input("bomb styles", "Stylize", (pb.StylizeRequest(spec=many).SerializeToString(),))
    layers = pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1" * 99, weight=math.nan)] * 20_000)
    recipe = pb.Recipe(content_layers=layers, style_layers=layers)
    yield Input("bomb layers", "Stylize", (request(recipe=recipe),))
    yield Input("bomb text", "GetJob", (pb.GetJobRequest(job_id="\N{SNOWMAN}" * 2**20).SerializeToString(),))
    for depth in (50, 200, 100_000):  # nested groups of an unknown field
        yield Input("bomb groups", "GetServerInfo", (b"\x7b" * depth + b"\x7c" * depth,))
        yield Input("bomb open groups", "GetJob", (b"\x7b" * depth,))
    yield Input("bomb unknown fields", "GetJob", (b"\x78\x01" * 2_000_000,))
    again = pb.StylizeRequest(spec=job(seed=1)).SerializeToString()
    yield Input("bomb repeated field", "Stylize", (again * 300,))


def prepare() -> None:
    """Fills the caches of this module, which takes a second the first time."""
    valid_pictures(), _valid_messages(), make_checkpoint(light=True), make_checkpoint(light=False)


def inputs(seed: int) -> Iterator[Input]:
    """Yields random inputs without end. The same seed yields the same inputs."""
    rng = random.Random(seed)
    makers: tuple[Callable[[random.Random], Input], ...] = (
        *[_picture] * 6, *[_message] * 3, *[_wire] * 4, *[_checkpoint] * 2, *[_commands] * 2, _foreign,
    )  # fmt: skip
    while True:
        yield rng.choice(makers)(rng)


def job(*, content: bytes | None = None, styles: list[bytes] | None = None, **fields: Any) -> pb.JobSpec:
    """A valid job with changed fields."""
    recipe = fields.pop("recipe", None)
    if recipe is None and "resume" not in fields:
        recipe = overrides_to_message(RECIPE)
    return pb.JobSpec(
        content=pb.ImageSource(data=in_png() if content is None else content),
        styles=[pb.StyleSource(image=pb.ImageSource(data=data)) for data in styles or [in_jpeg()]],
        recipe=recipe, **fields,
    )  # fmt: skip


def request(**fields: Any) -> bytes:
    return pb.StylizeRequest(spec=job(**fields)).SerializeToString()


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield pb.UploadImageRequest(chunk=data[at : at + size]).SerializeToString()


def _picture(rng: random.Random) -> Input:
    data = damaged(rng.choice(valid_pictures()), rng, rng.choice(valid_pictures()))
    match rng.randrange(5):
        case 0:
            return Input("picture", "UploadImage", tuple(_pieces(data, rng.choice((1, 7, 100, 10_000)))))
        case 1:
            return Input("picture", "Stylize", (request(styles=[data, in_png()]),))
        case 2:
            spec = job(
                start_image=pb.ImageSource(data=data), recipe=overrides_to_message({**RECIPE, "start": Start.IMAGE})
            )
            return Input("picture", "StylizeStream", (pb.StylizeStreamRequest(spec=spec).SerializeToString(),))
        case _:
            return Input("picture", "Stylize", (request(content=data),))


def _message(rng: random.Random) -> Input:
    """A message whose fields have valid types but arbitrary values."""
    method = rng.choice(list(REQUESTS))
    count = rng.choice((0, 1, 1, 2, 5)) if method in ("StylizeInteractive", "UploadImage") else 1
    return Input(
        "message", method, tuple(_randomize(REQUESTS[method](), rng).SerializeToString() for _ in range(count))
    )


def _randomize(message: Message, rng: random.Random) -> Message:
    """Sets some fields to arbitrary values. A job's images are often valid, so that the server reaches other fields."""
    if isinstance(message, pb.JobSpec) and rng.random() < 0.7:
        message.CopyFrom(job())
    if isinstance(message, pb.ImageSource) and rng.random() < 0.5:
        message.data = in_png()
        return message
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.6:
            continue
        if field.message_type is not None:
            for _ in range(rng.choice((0, 1, 2, 9)) if field.is_repeated else 1):
                target = getattr(message, field.name)
                _randomize(target.add() if field.is_repeated else target, rng)
                if not field.is_repeated:
                    target.SetInParent()
        else:
            setattr(message, field.name, _value(field, rng))
    return message


def _value(field: Any, rng: random.Random) -> Any:
    largest_values = {
        field.CPPTYPE_INT32: 2**31 - 1,
        field.CPPTYPE_INT64: 2**63 - 1,
        field.CPPTYPE_ENUM: 2**31 - 1,
        field.CPPTYPE_UINT64: 2**64 - 1,
        field.CPPTYPE_UINT32: 2**32 - 1,
    }
    if field.cpp_type in largest_values:
        largest = largest_values[field.cpp_type]
        least = 0 if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32) else -largest - 1
        return rng.choice((0, 1, 2, 7, 64, 4096, largest, least, rng.randint(least, largest)))
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice((0.0, -0.0, 1.0, 0.5, -1.0, 1e-320, 1e15, 1e300, math.nan, math.inf, -math.inf))
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"x", in_png(), make_checkpoint(light=True), rng.randbytes(50)))
    texts = (
        "",
        "x",
        JOB_ID,
        "relu1_1",
        "relu5_1",
        "\0",
        "\U0001f3a8" * 50,
        "9" * 18,
        "9" * 19,
        "sha256:" + "0" * 64,
        "x" * 9000,
    )
    return rng.choice(texts)


@cache
def _valid_messages() -> tuple[tuple[str, bytes], ...]:
    """Valid messages by method, whose bytes can then be damaged."""
    full = job(
        frames=pb.FrameOptions(every_iterations=1, max_side=16, quality=50), seed=7, result_quality=90,
        checkpoints=pb.CheckpointOptions(light=True),
    )  # fmt: skip
    full.detach_grace.seconds = 1
    messages: list[tuple[str, Message]] = [
        ("Stylize", pb.StylizeRequest(spec=full, request_id=JOB_ID)),
        ("StylizeStream", pb.StylizeStreamRequest(spec=full)),
        ("StylizeInteractive", pb.StylizeInteractiveRequest(command_id=1, start=pb.StartCommand(spec=full))),
        ("StylizeInteractive", pb.StylizeInteractiveRequest(attach=pb.AttachCommand(job_id=JOB_ID))),
        ("WatchJob", pb.WatchJobRequest(job_id=JOB_ID, after_sequence=3, frames=full.frames)),
        ("GetJob", pb.GetJobRequest(job_id=JOB_ID)),
        ("CancelJob", pb.CancelJobRequest(job_id=JOB_ID)),
        ("ListJobs", pb.ListJobsRequest(page_size=3, page_token="7")),
        ("UploadImage", pb.UploadImageRequest(chunk=in_png())),
    ]
    return tuple((method, message.SerializeToString()) for method, message in messages)


def _wire(rng: random.Random) -> Input:
    """A damaged message: wrong lengths or wire types, text that is not UTF-8, fields of another message."""
    method, data = rng.choice(_valid_messages())
    other = rng.choice(_valid_messages())[1]
    return Input("wire", method, (damaged(data, rng, other),))


def _foreign(rng: random.Random) -> Input:
    """The bytes of a request of another method, or random bytes."""
    method = rng.choice(list(REQUESTS))
    data = rng.choice((rng.randbytes(rng.randrange(200)), rng.choice(_valid_messages())[1]))
    return Input("foreign", method, (data,))


@cache
def make_checkpoint(*, light: bool) -> bytes:
    """A checkpoint of the valid job."""
    limits = Limits()
    pictures = [codec.decode(data, limits, 32) for data in (in_png(), in_jpeg())]
    engine = FakeEngine(0)
    state = engine.admit(
        StyleJob(
            recipe=Recipe(**RECIPE),
            content=pictures[0],
            styles=(pictures[1],),
            style_weights=(1.0,),
            start=None,
            seed=5,
        )
    )
    batch = engine.batch(state.shape, 1)
    slot = batch.join(state)
    batch.advance(3)
    picture = batch.snapshot(slot)() if light else None
    return engine.checkpoints.write(batch.leave(slot), picture=picture, max_bytes=limits.max_checkpoint_bytes)


def _checkpoint(rng: random.Random) -> Input:
    light = rng.random() < 0.8
    data = make_checkpoint(light=light)
    if rng.random() < 0.4:
        return Input("checkpoint", "Stylize", (request(resume=damaged(data, rng, make_checkpoint(light=not light))),))
    length = int.from_bytes(data[8:12], "little")
    head = json.loads(data[12 : 12 + length])
    at = head["recipe"] if rng.random() < 0.5 else head
    anything = (
        0,
        -1,
        1,
        10**400,
        1e308,
        math.nan,
        math.inf,
        None,
        True,
        "",
        "x",
        [],
        {},
        [[["relu1_1", 1]]],
        2**31,
        2**63,
    )
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(at) or ["x"])
        if rng.random() < 0.1:
            del at[key]
        else:
            at[key] = rng.choice(anything)
    text = json.dumps(head).encode()
    checkpoint = data[:8] + struct.pack("<I", len(text)) + text + data[12 + length :]
    return Input("checkpoint", "Stylize", (request(resume=checkpoint),))


def _commands(rng: random.Random) -> Input:
    """Commands of an interactive call: in any order, repeated, for another job, or damaged."""
    start = pb.StylizeInteractiveRequest(
        start=pb.StartCommand(spec=job(recipe=overrides_to_message({**RECIPE, "iterations": 200})))
    )
    attach = pb.StylizeInteractiveRequest(attach=pb.AttachCommand(job_id=JOB_ID))
    messages = [rng.choice((start, start, start, attach))]
    for _ in range(rng.choice((0, 1, 3, 10, 40))):
        command = pb.StylizeInteractiveRequest(command_id=rng.randrange(2**64))
        name = rng.choice(("start", "attach", "pause", "resume", "update", "frame", "checkpoint", "finish", "ack", ""))
        if name:
            getattr(command, name).SetInParent()
            _randomize(getattr(command, name), rng)
        messages.append(command)
    if rng.random() < 0.1:
        rng.shuffle(messages)
    encoded = [message.SerializeToString() for message in messages]
    if rng.random() < 0.3:
        at = rng.randrange(len(encoded))
        encoded[at] = damaged(encoded[at], rng, start.SerializeToString())
    return Input("commands", "StylizeInteractive", tuple(encoded))
