"""That gRPC's own handlers of a fork are off, and how a program can have them."""

import os
import subprocess
import sys

import pytest

from gramophone_client.transport.grpc_import import VARIABLE

# A channel with nothing to do is where gRPC's handlers run, or write that they are skipped.
PROGRAM = """
import os, sys
from gramophone_client import GramophoneClient
with GramophoneClient("127.0.0.1:1"):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print(os.environ.get(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("given", "logged"), [(None, False), ("1", True)])
def test_a_fork_leaves_grpc_alone_unless_the_program_wants_otherwise(given, logged):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {} if given is None else {VARIABLE: given}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, VARIABLE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout == f"{given}\n", "a program that this one starts would inherit the setting"
    assert ("fork" in ran.stderr) == logged, ran.stderr
