"""A server for one job: started on a free port of this machine, and stopped at the end, whatever happens.

The client does not import the server; it starts `python -m gramophone_server.main` with its own Python. The server
stops at the end of its standard input (`--stop-at-eof`), which this process holds, so that it does not outlive a client
that is killed.
"""

from __future__ import annotations

import importlib.util
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from gramophone_client.console.outputs import UsageError
from gramophone_client.errors import ConnectionFailedError

__all__ = ["INSTALL_HINT", "LocalServerError", "local_server", "server_is_installed"]

SERVER = "gramophone_server"
INSTALL_HINT = "the server is not installed in this Python; install it with `make install` in a clone of gramophone"
COMMAND = (sys.executable, "-m", f"{SERVER}.main", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "-1")
REFRESH_S = 0.2
ENDED_WITHIN_S = 2.0  # a server whose connection was lost, if it has ended
STOP_WITHIN_S = 40.0  # longer than the server's own drain
LOG_LINES = 10  # that are printed of a server that failed


class LocalServerError(Exception):
    """The server could not start, or ended before its job; the message has the end of its log."""


def server_is_installed() -> bool:
    """Whether this Python can start a server."""
    return importlib.util.find_spec(SERVER) is not None


@contextmanager
def local_server(report: Callable[[str], None]) -> Iterator[str]:
    """Starts a server, yields its address when it is ready, and stops it at the end of the block.

    `report` gets what it waits for, several times a second. Raises `UsageError` if there is no server to start, and
    `LocalServerError` if it fails, also if it ends during the block.
    """
    if not server_is_installed():
        raise UsageError(f"--local: {INSTALL_HINT}")
    with tempfile.TemporaryFile() as log:
        # In a session of its own, so that Ctrl-C reaches only the client, which cancels its job and then stops it.
        process = subprocess.Popen(
            [*COMMAND, "--stop-at-eof"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield _address(process, log, report)
        except ConnectionFailedError as error:
            with suppress(subprocess.TimeoutExpired):  # the connection may end a little before the process
                process.wait(ENDED_WITHIN_S)
            if process.returncode is None:
                raise
            raise LocalServerError(_failure(process, log)) from error
        finally:
            _stop(process)


def _address(process: subprocess.Popen[bytes], log: IO[bytes], report: Callable[[str], None]) -> str:
    """The address of the server, once it is ready."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:  # to its end, so that the server never waits for a full pipe
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.put(line.decode(errors="replace").strip())
        lines.put("")

    threading.Thread(target=read, name="local-server", daemon=True).start()
    start_time, address = time.monotonic(), ""
    while True:
        report(f"starting a server for this job: loading the network, {time.monotonic() - start_time:.0f} s")
        try:
            line = lines.get(timeout=REFRESH_S)
        except queue.Empty:
            continue
        if line.startswith("listening on "):
            address = line.removeprefix("listening on ")
        elif line.startswith("ready in "):
            return address
        elif not line:
            process.wait(STOP_WITHIN_S)
            raise LocalServerError(_failure(process, log))


def _failure(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """What the server has printed about its end: its own message, else the end of its log."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    own = [line.removeprefix("gramophone-server: ") for line in lines if line.startswith("gramophone-server: ")]
    message = "\n".join(own or lines[-LOG_LINES:])
    return f"the server for this job ended with exit code {process.returncode}:\n{message}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server; returns when it has ended."""
    process.terminate()
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
    except BaseException:  # a second Ctrl-C
        process.kill()
        raise
    finally:
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
