"""The demonstration: starts a server, sends a photo and a painting, and leaves a picture and a timelapse.

    python examples/demo.py            # or `make demo`

Everything it starts it also stops, after Ctrl-C and after a failure too.
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
STOP_WITHIN_S = 40  # the server's drain time and some


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server of its own on a free loopback port; yields its address once it listens."""
    OUT.mkdir(exist_ok=True)
    log_path = OUT / "server.log"
    with log_path.open("w") as log:
        # A session of its own: Ctrl-C reaches the client alone, which tells the server by cancelling its call.
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
                raise SystemExit(f"the server did not start; {log_path} says why:\n{log_path.read_text()[-2000:]}")
            yield line.split()[-1]
        finally:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    """Exit code of the client."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the server is stopped then, too
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
            except KeyboardInterrupt:  # the client has had it too: it stops its job and keeps what has arrived
                client.wait(STOP_WITHIN_S)
                raise
    except KeyboardInterrupt:
        return 130
    if code == 0:
        print(f"picture    {picture}{os.linesep}timelapse  {timelapse}")
    return code


if __name__ == "__main__":
    sys.exit(main())
