"""The demonstration: starts a server, sends a photo and a painting, and writes a picture and a timelapse.

    python examples/demo.py            # or `make demo`

It stops everything that it has started, also after Ctrl-C or a failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = Path(__file__).parent
OUT = Path("out")
STOP_WITHIN_S = 40  # longer than the server's drain time


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts a server on a free port of the loopback; yields its address when it listens."""
    OUT.mkdir(exist_ok=True)
    log_path = OUT / "server.log"
    with log_path.open("w") as log:
        # In its own session, so that Ctrl-C reaches only the client, which then cancels its call.
        process = subprocess.Popen(
            [sys.executable, "-m", "gramophone_server.main", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise SystemExit(f"the server did not start; the end of {log_path}:\n{log_path.read_text()[-2000:]}")
            yield line.split()[-1]
        finally:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    """Runs the demonstration and returns the exit code of the client."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the server, too
    picture, timelapse = OUT / "demo.png", OUT / "demo.gif"
    try:
        with server() as address:
            command = [
                *(sys.executable, "-m", "gramophone_client.cli", "stylize"),
                *(str(EXAMPLES / "photos" / "cat.jpg"), str(EXAMPLES / "styles" / "brushwork.jpg")),
                *("-o", str(picture), "--timelapse", str(timelapse)),
                *("--server", address, "--wait", "120", "--size", "512", "--seed", "1"),
            ]
            client = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                code = client.wait()
            except KeyboardInterrupt:  # the client gets it, too: it stops its job and writes what has arrived
                client.wait(STOP_WITHIN_S)
                raise
    except KeyboardInterrupt:
        return 130
    if code == 0:
        print(f"picture    {picture}{os.linesep}timelapse  {timelapse}")
    return code


if __name__ == "__main__":
    sys.exit(main())
