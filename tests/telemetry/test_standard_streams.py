"""Processes whose standard error is a full pipe, a socket, a terminal, or nothing: they go on, and they end."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading

import pytest

from gramophone_server.telemetry import standard_streams
from tests.support.processes import ROOT, WITHIN_S, environment

LINES = 20_000  # more than a pipe and the queue take

# Writes as Python and as C code do, reports on standard output, and ends.
PROGRAM = f"""
import contextlib, logging, os, sys, threading, warnings
from gramophone_server.telemetry import standard_streams
if "nobody" in sys.argv:
    os.setuid(65534)
standard_streams.make_non_blocking()
logging.basicConfig(stream=sys.stderr, level="INFO", format="%(message)s")
logging.captureWarnings(True)
def from_c():
    for _ in range(2000):
        with contextlib.suppress(OSError):
            os.write(2, b"from C code, which knows no queue; two thousand of these lines fill a pipe " + bytes([10]))
def failing():
    raise ValueError("of a thread")
if "silent" not in sys.argv:
    from_c()
    for number in range({LINES}):
        logging.info("line %d %s", number, "x" * 100)
    from_c()
    warnings.warn("a warning")
    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()
    print("printed", file=sys.stderr)
print("done", os.get_blocking(2), sum(standard_streams.dropped_lines().values()), flush=True)
sys.stdin.readline()
logging.critical("last words")
if "crash" in sys.argv:
    import faulthandler
    faulthandler._sigsegv()
"""


@contextlib.contextmanager
def running(stderr, *arguments, before=()):
    """The program. Yields it after it has written everything but its last words."""
    child = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, *arguments],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def end(child):
    """Lets it end. Returns the exit code."""
    child.stdin.write(b"\n")
    child.stdin.flush()
    return child.wait(WITHIN_S)


def done(child):
    """(Whether descriptor 2 is blocking, the lines that were dropped), when it has written everything."""
    with timeout(child):
        words = child.stdout.readline().split()
    assert words and words[0] == b"done"
    return words[1] == b"True", int(words[2])


@contextlib.contextmanager
def timeout(child):
    timer = threading.Timer(WITHIN_S, child.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


@contextlib.contextmanager
def sockets():
    ours, theirs = socket.socketpair()
    with ours:
        yield ours.fileno(), theirs.detach()


@contextlib.contextmanager
def terminal():
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


@contextlib.contextmanager
def another_users_pipe():
    if os.getuid() != 0:
        pytest.skip("needs root")
    with pipe() as ends:
        yield ends


KINDS = {"pipe": pipe, "socket": sockets, "terminal": terminal, "another user's pipe": another_users_pipe}


def flags(kind):
    return ["nobody"] if kind == "another user's pipe" else []


def read_all(descriptor):
    """Everything up to the end, which is an error of a terminal."""
    text = b""
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 1 << 16):
            text += part
    return text.replace(b"\r\n", b"\n").decode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_nobody_reads_blocks_neither_the_process_nor_its_end(kind):
    with KINDS[kind]() as (_, writing), running(writing, *flags(kind)) as child:
        os.close(writing)
        is_blocking, dropped = done(child)
        assert not is_blocking and dropped > LINES / 4
        assert end(child) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_that_comes_late_gets_the_newest_lines_whole(kind):
    with KINDS[kind]() as (reading, writing), running(writing, *flags(kind)) as child:
        os.close(writing)
        done(child)
        reader = threading.Thread(target=lambda: texts.append(read_all(reading)))
        texts = []
        reader.start()
        assert end(child) == 0
        reader.join(WITHIN_S)
        lines = texts[0].splitlines()
    assert lines[-1] == "last words"
    assert any(line.endswith("lines of this log are missing here: nobody has read it in time") for line in lines)
    assert "printed" in lines and "ValueError: of a thread" in lines
    assert any(line.endswith("UserWarning: a warning") for line in lines)
    numbered = [line.split() for line in lines if line.startswith("line ")]
    assert all(words[2] == "x" * 100 for words in numbered)
    assert [int(words[1]) for words in numbered][-1] == LINES - 1
    assert [int(words[1]) for words in numbered] == sorted(int(words[1]) for words in numbered)


def test_a_pipe_that_is_read_has_every_line_in_order():
    with pipe() as (reading, writing), running(writing) as child:
        os.close(writing)
        texts = []
        reader = threading.Thread(target=lambda: texts.append(read_all(reading)))
        reader.start()
        done(child)
        assert end(child) == 0
        reader.join(WITHIN_S)
    numbers = [int(line.split()[1]) for line in texts[0].splitlines() if line.startswith("line ")]
    assert numbers == sorted(numbers) and numbers[-1] == LINES - 1


def test_the_flags_of_a_shared_pipe_stay():
    with pipe() as (_, writing), running(writing, "silent") as child:
        assert done(child) == (False, 0)
        assert os.get_blocking(writing)
        os.close(writing)
        assert end(child) == 0


def test_a_stopped_reader_goes_on_later():
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with reader:
        reader.send_signal(signal.SIGSTOP)
        with running(reader.stdin) as child:
            reader.stdin.close()
            assert done(child)[1] > 0
            reader.send_signal(signal.SIGCONT)
            texts = []
            thread = threading.Thread(target=lambda: texts.append(reader.stdout.read()))
            thread.start()
            assert end(child) == 0
            thread.join(WITHIN_S)
    assert texts[0].endswith(b"last words\n")


@pytest.mark.parametrize("path", [os.devnull, "/dev/full"])
def test_devices_take_or_refuse_at_once(path):
    if not os.path.exists(path):
        pytest.skip("no such device")
    with open(path, "wb") as device, running(device) as child:
        is_blocking, dropped = done(child)
        assert is_blocking and bool(dropped) == (path == "/dev/full")
        assert end(child) == 0


def test_a_closed_standard_error_is_no_defect():
    with running(None, before=["sh", "-c", 'exec "$@" 2>&-', "sh"]) as child:
        done(child)
        assert end(child) == 0


def test_a_reader_that_has_gone_is_no_defect():
    with pipe() as (_, writing):
        pass
    with running(writing) as child:
        os.close(writing)
        assert done(child)[1] > 0
        assert end(child) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_in_c_leaves_its_trace(kind):
    with KINDS[kind]() as (reading, writing), running(writing, "silent", "crash", *flags(kind)) as child:
        os.close(writing)
        done(child)
        texts = []
        reader = threading.Thread(target=lambda: texts.append(read_all(reading)))
        reader.start()
        assert end(child) == -signal.SIGSEGV
        reader.join(WITHIN_S)
    assert "Fatal Python error: Segmentation fault" in texts[0]


def test_a_line_without_an_end_is_not_kept_for_ever(tmp_path):
    program = (
        "import sys, time\n"
        "from gramophone_server.telemetry import standard_streams\n"
        "standard_streams.make_non_blocking()\n"
        "for _ in range(10): sys.stderr.write('x' * 20_000)\n"
        "standard_streams.drain()\n"
        "print('written', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=file,
    ) as child:  # fmt: skip
        assert child.stdout.readline() == b"written\n"
        assert 200_000 - standard_streams.MAX_LINE_BYTES <= log.stat().st_size <= 200_000
        child.stdin.close()
