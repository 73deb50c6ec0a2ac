"""Jobs with images and checkpoints that are too large for one request, at real servers with small limits."""

from __future__ import annotations

import hashlib
import random
import signal
from pathlib import Path

import grpc
import pytest

from gramophone.options import INLINE_BYTES, MESSAGE_BYTES
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    Checkpoint,
    CheckpointOptions,
    GramophoneClient,
    InvalidRequestError,
    errors,
)
from gramophone_client.transport import uploads
from tests.support.processes import PAINTING, PHOTO, WITHIN_S, Server

MIB = 2**20
FLAGS = ("--engine", "fake", "--iter-ms", "1", "--max-message-bytes", str(int(MESSAGE_BYTES.low)))
SMALL = {"size": 48, "smallest_size": 0, "iterations": 5}


def large(path: Path, size: int, seed: int = 0) -> bytes:
    """A JPEG file of a photo with so many bytes behind its end, which differ by the seed."""
    data = path.read_bytes()
    return data + random.Random(seed).randbytes(size - len(data))


LARGE, OTHER, STYLE = (large(path, 6 * MIB, i) for i, path in enumerate((PHOTO, PHOTO, PAINTING)))


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def kept_bytes(client: GramophoneClient) -> int:
    return client.server_info().uploads.bytes


def test_large_jobs_run_at_a_server_with_the_smallest_messages(tmp_path: Path) -> None:
    with Server(*FLAGS, cwd=tmp_path) as server, GramophoneClient(server.address, timeout=WITHIN_S) as client:
        client.wait_until_ready()
        plain = client.stylize(PHOTO, PAINTING, seed=1, **SMALL)
        done = client.stylize(LARGE, [STYLE, PAINTING, LARGE], seed=1, **SMALL)
        assert done.picture.width == plain.picture.width and kept_bytes(client) == 12 * MIB
        with client.control(LARGE, STYLE, start_image=OTHER, **SMALL) as job:
            assert job.result().iterations == 5
        hits = client.server_info().uploads.hits
        # The state of L-BFGS has 276 bytes per pixel: 4.8 MB at 160 px.
        options = {"size": 160, "smallest_size": 0, "iterations": 400, "optimiser": "lbfgs", "average": 0.0}
        checkpoints = CheckpointOptions(every_s=1, light=False)
        with client.stream(LARGE, PAINTING, checkpoints=checkpoints, **options) as updates:
            state = next(update for update in updates if isinstance(update, Checkpoint))
        assert len(state.data) > INLINE_BYTES and not state.light
        with client.stream(LARGE, PAINTING, resume=state) as updates:
            accepted = next(iter(updates))
        assert isinstance(accepted, Accepted) and accepted.resumed_at == state.iteration
        assert client.server_info().uploads.hits > hits


def test_a_job_moves_to_another_server_with_its_images_and_its_checkpoint(tmp_path: Path) -> None:
    options = {"size": 160, "smallest_size": 0, "iterations": 3000, "optimiser": "lbfgs", "average": 0.0}
    with Server(*FLAGS, cwd=tmp_path) as first, Server(*FLAGS, cwd=tmp_path) as second:
        for server in (first, second):
            server.line("ready in ")
        target = f"ipv4:{first.address},{second.address}"
        jobs = []
        with (
            GramophoneClient(target, timeout=WITHIN_S) as client,
            client.stream(
                LARGE, STYLE, checkpoints=CheckpointOptions(every_s=1, light=False), frames=None, **options
            ) as updates,
        ):
            for update in updates:
                if isinstance(update, Accepted):
                    jobs.append(update)
                    if len(jobs) == 2:
                        break
                if isinstance(update, Checkpoint):
                    first.signal(signal.SIGKILL)
                    state = update
        assert jobs[1].resumed_at == state.iteration > 0
        with GramophoneClient(second.address, timeout=WITHIN_S) as client:
            assert kept_bytes(client) == 12 * MIB + len(state.data)


async def test_an_upload_that_loses_its_server_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def killing(*args: object, **options: object) -> object:
        first.signal(signal.SIGKILL)
        monkeypatch.setattr(uploads, "upload", upload)
        return await upload(*args, **options)  # type: ignore[arg-type]

    upload = uploads.upload
    monkeypatch.setattr(uploads, "upload", killing)
    with Server(*FLAGS, cwd=tmp_path) as first, Server(*FLAGS, cwd=tmp_path) as second:
        for server in (first, second):
            server.line("ready in ")
        async with AsyncGramophoneClient(f"ipv4:{first.address},{second.address}", timeout=WITHIN_S) as client:
            done = await client.stylize(LARGE, STYLE, **SMALL)
        assert done.iterations == 5


async def test_a_job_whose_images_are_evicted_before_it_arrives_uploads_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_store = ("--max-image-bytes", str(7 * MIB), "--max-checkpoint-bytes", str(7 * MIB))

    async def evicted(*args: object, **options: object) -> object:
        """Another client of this host uploads more than the store can hold, before the job is sent again."""
        done = await upload(*args, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(uploads, "upload", upload)
        async with AsyncGramophoneClient(server.address, timeout=WITHIN_S) as other:
            await other.upload(OTHER)
        return done

    upload = uploads.upload
    monkeypatch.setattr(uploads, "upload", evicted)
    with Server(*FLAGS, *small_store, "--max-uploads-bytes", str(7 * MIB), cwd=tmp_path) as server:
        server.line("ready in ")
        async with AsyncGramophoneClient(server.address, timeout=WITHIN_S) as client:
            assert (await client.stylize(LARGE, PAINTING, **SMALL)).iterations == 5
            with pytest.raises(errors.ImageNotFoundError) as raised:  # two images of 6 MiB
                await client.stylize(LARGE, STYLE, **SMALL)
            assert "uploaded before each of 3 attempts: the server keeps too few bytes" in str(raised.value)
            assert "for the 12.0 MiB of this job" in str(raised.value)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with (
        Server(*FLAGS, "--max-uploads-bytes", "0", cwd=tmp_path) as server,
        GramophoneClient(server.address, timeout=WITHIN_S) as client,
    ):
        client.wait_until_ready()
        assert client.stylize(PHOTO, PAINTING, **SMALL).iterations == 5
        with pytest.raises(InvalidRequestError) as raised:
            client.stylize(LARGE, PAINTING, **SMALL)
        assert str(raised.value) == (
            "spec.content.data: cannot be kept: this server keeps no uploads (server setting "
            "GRAMOPHONE_MAX_UPLOADS_BYTES is 0); send the images and the checkpoint with the job, as `data` and "
            "`resume` (uploaded, because images and checkpoints of more than 4 MiB are)"
        )
    with (
        Server(*FLAGS, "--max-image-bytes", str(5 * MIB), cwd=tmp_path) as server,
        GramophoneClient(server.address, timeout=WITHIN_S) as client,
    ):
        client.wait_until_ready()
        with pytest.raises(InvalidRequestError, match=r"spec\.styles\[0\]\.image\.data: makes an image of .*smaller"):
            client.stylize(PHOTO, STYLE, **SMALL)


def test_stubs_made_from_the_proto_upload_and_name(tmp_path: Path) -> None:
    """The way that the proto describes, with gRPC's default limits."""
    with Server(*FLAGS, cwd=tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        server.line("ready in ")
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        spec = pb.JobSpec(content=pb.ImageSource(data=LARGE), recipe=pb.Recipe(size=48, iterations=5, smallest_size=0))
        spec.styles.add().image.data = PAINTING.read_bytes()
        with pytest.raises(grpc.RpcError) as raised:
            stub.Stylize(pb.StylizeRequest(spec=spec))
        error = raised.value  # gRPC's own, before the message has arrived
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.details()
        spec.content.digest = digest(LARGE)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Stylize(pb.StylizeRequest(spec=spec))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        chunks = (pb.UploadImageRequest(chunk=LARGE[at : at + MIB]) for at in range(0, len(LARGE), MIB))
        assert stub.UploadImage(chunks).digest == spec.content.digest
        assert stub.Stylize(pb.StylizeRequest(spec=spec)).result.iterations == 5
