"""Real servers that are killed while a job runs, and a real job that is controlled from the command line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from gramophone_client import (
    Accepted,
    Changed,
    Checkpoint,
    CheckpointOptions,
    ConnectionFailedError,
    Frame,
    GramophoneClient,
    Result,
    Update,
)
from tests.support.processes import PAINTING, PHOTO, WITHIN_S, Server


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that no test kills."""
    with Server(cwd=tmp_path_factory.mktemp("second")) as server:
        server.line("ready in ")
        yield server


def test_a_job_of_a_killed_server_has_the_same_result(second: Server, tmp_path: Path) -> None:
    with Server(cwd=tmp_path) as first:
        first.line("ready in ")
        updates = []
        with GramophoneClient(f"ipv4:{first.address},{second.address}", timeout=WITHIN_S) as client:
            painting = client.upload(PAINTING)  # not to the second server
            checkpoints = CheckpointOptions(every_s=1, light=False)
            for update in client.stream(
                PHOTO, painting, size=96, smallest_size=0, iterations=60, seed=1, checkpoints=checkpoints
            ):
                updates.append(update)
                if isinstance(update, Checkpoint):
                    first.signal(signal.SIGKILL)
        resent = next(i for i, update in enumerate(updates) if i and isinstance(update, Accepted))
        state = [update for update in updates[:resent] if isinstance(update, Checkpoint)][-1]
        again, result = updates[resent], updates[-1]
        assert isinstance(again, Accepted) and isinstance(result, Result)
        assert again.resumed_at == state.iteration >= 1
        assert not state.light and result.iterations == 60
        with GramophoneClient(second.address, timeout=WITHIN_S) as client:
            whole = client.stylize(PHOTO, PAINTING, size=96, smallest_size=0, iterations=60, seed=1)
    assert result.image().tobytes() == whole.image().tobytes()


def test_a_job_of_a_killed_server_keeps_the_changes_of_its_controller(second: Server, tmp_path: Path) -> None:
    with Server(cwd=tmp_path) as first:
        first.line("ready in ")
        updates: list[Update] = []
        killed = False
        with (
            # Time for all 900 iterations on a busy machine, or the server refuses the job.
            GramophoneClient(f"ipv4:{first.address},{second.address}", timeout=20 * WITHIN_S) as client,
            client.control(PHOTO, PAINTING, size=96, smallest_size=0, iterations=900, seed=1) as job,
        ):
            for update in job:
                updates.append(update)
                if isinstance(update, Checkpoint) and not killed:
                    job.update(beta=9.0, iterations=100)
                    first.signal(signal.SIGKILL)
                    killed = True
    jobs = [i for i, update in enumerate(updates) if isinstance(update, Accepted)]
    result = updates[-1]
    assert len(jobs) == 2 and isinstance(result, Result) and result.iterations == 100
    changed = [update for update in updates[jobs[1] :] if isinstance(update, Changed)]
    assert [(update.recipe.beta, update.recipe.iterations) for update in changed] == [(9, 100)]


FAKE = ("--engine", "fake", "--iter-ms", "100")


class Killed:
    """A server on one port that `kill` kills and replaces."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.server = Server(*FAKE, cwd=cwd)
        self.server.line("ready in ")
        self.address = self.server.address
        self.killed = 0

    def kill(self) -> None:
        self.server.__exit__(None, None, None)
        self.killed += 1
        self.server = Server(*FAKE, "--port", self.address.rpartition(":")[2], cwd=self.cwd)
        self.server.line("ready in ")


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    servers = Killed(tmp_path)
    yield servers
    servers.server.__exit__(None, None, None)


def test_a_job_that_kills_its_server_at_each_first_iteration_is_given_up(killed: Killed) -> None:
    states, frames = [], []
    with GramophoneClient(killed.address, timeout=2 * WITHIN_S) as client:
        updates = client.stream(PHOTO, PAINTING, size=64, smallest_size=0, iterations=60, seed=1)
        with pytest.raises(ConnectionFailedError, match="the job was lost 4 times without 10 s of running") as raised:
            for update in updates:
                frames += [update] if isinstance(update, Frame) else []
                if isinstance(update, Checkpoint):  # the first one is that of the first iteration
                    states.append(update)
                    killed.kill()
        error = raised.value
        assert killed.killed == 4
        iterations = [state.iteration for state in states]
        assert iterations == sorted(set(iterations))  # each crash leaves a newer one
        assert error.checkpoint == states[-1] and error.frame == frames[-1]
        stylized = client.stylize(PHOTO, PAINTING, resume=error.checkpoint)  # by hand, on a server that lives
    assert stylized.iterations == 60


def test_a_job_is_controlled_from_the_command_line(second: Server, tmp_path: Path) -> None:
    long = ("--size", "96", "--iterations", "1000", "--smallest-size", "0", "--seed", "1")
    with second.client("stylize", PHOTO, PAINTING, "-o", "out.png", *long, cwd=tmp_path) as client:
        job = client.line("job ").split(":")[0]
        output = second.run_client(
            "control", job, "--pause", "--save", "now.png", "--checkpoint", "state", cwd=tmp_path
        )
        paused, *files = output.splitlines()
        assert paused.startswith("paused before iteration ") and files == ["now.png", "state"]
        output = second.run_client("control", job, "--resume", "--set", "beta=9", "--finish", cwd=tmp_path)
        assert output.splitlines()[-1].startswith("finished after ")
        assert client.code() == 0, client.output
        assert "beta 9" in client.output
    before = int(paused.split()[-1]) - 1
    resumed = ("stylize", PHOTO, PAINTING, "-o", "resumed.png", "--resume", "state", "--timeout", "1000")
    with second.client(*resumed, cwd=tmp_path) as client:
        assert client.line("job ").endswith(f"1000 iterations, seed 1, from iteration {before}")
    for name in ("now.png", "out.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (96, 64)
