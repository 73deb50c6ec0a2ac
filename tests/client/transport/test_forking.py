"""What works in a forked process, and that nothing hangs there.

Each test runs a program that forks many times. Its children return through the whole end of the interpreter, in which
objects are deleted, and the program prints how each of them ended.
"""

import os
import subprocess
import sys
import threading
from collections import Counter

import pytest

from gramophone_client import GramophoneClient
from gramophone_client.transport.forking import POLLER
from tests.support.fake_service import HANG, accepted, progress, result

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

FORKS = 12
PROGRAM = """
import gc, os, sys, threading, time, traceback, warnings
from gramophone_client import ClientUsageError, GramophoneClient

target, forks = sys.argv[1], int(sys.argv[2])
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # of Python 3.12 and later

def ended(pid):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"

def in_children(use):
    for number in range(forks):
        pid = os.fork()
        if pid == 0:
            use(number)
            sys.exit(0)
        print(ended(pid))

def refused(call, message):
    try:
        call()
    except ClientUsageError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError("was not refused")

def works(number=0):
    with GramophoneClient(target) as client:
        assert client.server_info(timeout=60).version == "1.2.3"
        assert len(list(client.stream(b"photo", b"painting", timeout=60))) == 3
"""


def children(target, program):
    """How the children ended, by their number."""
    path = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM + program, target, str(FORKS)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return Counter(ran.stdout.split()), ran.stderr


@pytest.fixture
def forked(service):
    """Runs a program that prints how its children ended; each must end well."""
    service.scripts = [[accepted(), progress(1), result()]]

    def run(program):
        ends, stderr = children(service.target, program)
        assert ends == {"0": FORKS}, stderr

    return run


def test_a_client_works_in_a_fork_of_a_process_without_one(forked):
    forked("in_children(works)")


def test_a_client_works_in_a_fork_after_all_clients_were_closed(forked):
    forked("""
def use(number):
    works()
for number in range(forks):
    works()
    pid = os.fork()
    if pid == 0:
        works()
        sys.exit(0)
    print(ended(pid))
""")


def test_a_client_is_refused_in_a_fork_of_a_process_with_one(forked, service):
    service.scripts = [[accepted(), progress(1), result()]]
    forked("""
client = GramophoneClient(target)
running, jobs = True, 0
def load():
    global jobs
    while running:
        jobs += len(list(client.stream(b"photo", b"painting"))) == 3
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads:
    thread.start()
client.server_info()
updates = client.stream(b"photo", b"painting")
next(updates)
job = client.control_job("j1")
job.__enter__()

def use(number):
    global client, updates, job
    refused(lambda: GramophoneClient(target), "was forked while its parent had an open client")
    refused(lambda: client.server_info(timeout=60), "of which this process")
    refused(lambda: client.stylize(b"photo", b"painting"), "is a fork; make a client in each process")
    refused(lambda: next(client.stream(b"photo", b"painting")), "'spawn' or 'forkserver'")
    refused(lambda: next(client.watch("j1")), "is a fork")
    refused(lambda: client.control(b"photo", b"painting").__enter__(), "is a fork")
    refused(lambda: next(updates), "is a fork")
    refused(job.pause, "is a fork")
    if number % 3 == 1:
        updates.close(), job.close(), client.close()
    if number % 3 == 2:
        client = updates = job = None
        gc.collect()

in_children(use)
before = jobs
end = time.monotonic() + 30
while jobs < before + 5 and time.monotonic() < end:
    time.sleep(0.01)
assert jobs >= before + 5, "the parent's client does not work any more"
running = False
for thread in threads:
    thread.join(10)
assert job.result().iterations == 300
client.close()
works()
""")


def test_an_asynchronous_client_is_refused_in_a_fork(forked):
    forked("""
import asyncio
from gramophone_client import AsyncGramophoneClient

async def use(client, updates):
    try:
        for call in (client.server_info(), anext(updates), client.stylize(b"photo", b"painting")):
            try:
                await call
            except ClientUsageError as error:
                assert "is a fork" in str(error)
            else:
                raise AssertionError("was not refused")
        await updates.close()
        await client.close()
        refused(lambda: AsyncGramophoneClient(target), "was forked while its parent")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1

async def main():
    async with AsyncGramophoneClient(target) as client, client.stream(b"photo", b"painting") as updates:
        for number in range(forks):
            pid = os.fork()
            if pid == 0:
                os._exit(await use(client, updates))  # as multiprocessing does; the loop is the parent's
            print(await asyncio.to_thread(ended, pid))
        assert len([update async for update in updates]) == 3

asyncio.run(main())
""")


def test_forks_during_the_start_and_the_end_of_clients(forked):
    forked("""
running = True
def load():
    while running:
        works()
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads:
    thread.start()

def use(number):
    try:
        works()
    except ClientUsageError:
        pass

in_children(use)
running = False
for thread in threads:
    thread.join(10)
""")


def test_grpcs_thread_is_known_by_its_name(service):
    service.scripts = [[accepted(), HANG]]

    def runs():
        return any(thread.name.endswith(POLLER) for thread in threading.enumerate())

    with GramophoneClient(service.target) as client:
        client.server_info()
        assert runs()
        assert runs() and next(client.stream(b"photo", b"painting"))
