"""Real servers that are killed while a job runs, and a real job that is controlled from the command line."""

from __future__ import annotations

import signal
from pathlib import Path

from PIL import Image

from gramophone_client import Accepted, Changed, Checkpoint, CheckpointOptions, GramophoneClient, Result, Update
from tests.support.processes import PAINTING, PHOTO, WITHIN_S, Server


def test_a_job_of_a_killed_server_has_the_same_result(tmp_path: Path) -> None:
    with Server(cwd=tmp_path) as first, Server(cwd=tmp_path) as second:
        for server in (first, second):
            server.line("ready in ")
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


def test_a_job_of_a_killed_server_keeps_the_changes_of_its_controller(tmp_path: Path) -> None:
    with Server(cwd=tmp_path) as first, Server(cwd=tmp_path) as second:
        for server in (first, second):
            server.line("ready in ")
        updates: list[Update] = []
        killed = False
        with (
            GramophoneClient(f"ipv4:{first.address},{second.address}", timeout=WITHIN_S) as client,
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


def test_a_job_is_controlled_from_the_command_line(tmp_path: Path) -> None:
    long = ("--size", "96", "--iterations", "1000", "--smallest-size", "0", "--seed", "1")
    with Server(cwd=tmp_path) as server:
        server.line("ready in ")
        with server.client("stylize", PHOTO, PAINTING, "-o", "out.png", *long, cwd=tmp_path) as client:
            job = client.line("job ").split(":")[0]
            output = server.run_client(
                "control", job, "--pause", "--save", "now.png", "--checkpoint", "state", cwd=tmp_path
            )
            paused, *files = output.splitlines()
            assert paused.startswith("paused before iteration ") and files == ["now.png", "state"]
            output = server.run_client("control", job, "--resume", "--set", "beta=9", "--finish", cwd=tmp_path)
            assert output.splitlines()[-1].startswith("finished after ")
            assert client.code() == 0, client.output
            assert "beta 9" in client.output
        before = int(paused.split()[-1]) - 1
        resumed = ("stylize", PHOTO, PAINTING, "-o", "resumed.png", "--resume", "state", "--timeout", "1000")
        with server.client(*resumed, cwd=tmp_path) as client:
            assert client.line("job ").endswith(f"1000 iterations, seed 1, from iteration {before}")
    for name in ("now.png", "out.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (96, 64)
