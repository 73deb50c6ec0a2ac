"""The command `gramophone-server`."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from gramophone_server import command
from tests.support.processes import Process, Server, environment


def run(monkeypatch, *arguments):
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["gramophone-server", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    return caught.value.code or 0


def test_print_config_prints_settings_as_environment_variables(monkeypatch, capsys):
    assert run(monkeypatch, "--print-config", "--max-size", "1000") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GRAMOPHONE_MAX_SIZE=1000" in lines and "GRAMOPHONE_HOST=127.0.0.1" in lines
    for name, value in (line.split("=") for line in lines if not line.startswith("#")):
        monkeypatch.setenv(name, value)
    run(monkeypatch, "--print-config")
    assert capsys.readouterr().out.splitlines() == lines


def test_print_config_prints_the_bound_of_the_memory_as_comments(monkeypatch, capsys):
    run(monkeypatch, "--print-config")
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    total = re.search(r"at most (\d+) MiB, the sum of", comments[0])
    terms = [int(re.match(r"# +(\d+) MiB [a-z ]+: \w", line)[1]) for line in comments[1:]]
    assert abs(int(total[1]) - sum(terms)) <= len(terms) and len(terms) > 10


def test_an_invalid_setting_is_exit_code_2(monkeypatch, capsys):
    assert run(monkeypatch, "--port", "x") == 2
    assert capsys.readouterr().err == "gramophone-server: --port must be a whole number from 0 to 65535, got 'x'\n"


def test_a_port_in_use_is_exit_code_2(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        Process("-m", "gramophone_server.command", "--port", str(taken.getsockname()[1]), cwd=tmp_path) as server,
    ):
        assert server.code() == 2
    assert "Address already in use" in server.output


def test_the_version_is_printed_without_loading_torch():
    program = (
        "import sys; sys.argv = ['gramophone-server', sys.argv[1]]\n"
        "from gramophone_server import command\n"
        "try: command.main()\n"
        "finally: print(sorted({'torch', 'grpc'} & sys.modules.keys()))"
    )
    for flag, words in (("--version", "gramophone-server "), ("--help", "usage: gramophone-server ")):
        ran = subprocess.run(
            [sys.executable, "-c", program, flag], capture_output=True, text=True, timeout=60, check=True
        )
        assert ran.stdout.startswith(words)
        assert ran.stdout.endswith("\n[]\n")


def test_a_server_stops_at_the_end_of_standard_input_if_set(tmp_path):
    # `Server` has /dev/null as its standard input.
    with Server("--engine", "fake", "--stop-at-eof", cwd=tmp_path) as server:
        assert server.code() == 0, server.output
    assert "SIGTERM: draining" in server.output
    with Server("--engine", "fake", cwd=tmp_path) as server:
        server.line("ready in ")
        os.kill(server.pid, signal.SIGTERM)
        assert server.code() == 0, server.output


def test_standard_input_is_a_pipe_from_the_program_that_started_the_server(tmp_path):
    words = [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--engine", "fake", "--stop-at-eof"]
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout.readline().startswith("listening on ")
        assert server.stdout.readline().startswith("ready in ")
        server.stdin.close()
        assert server.wait(60) == 0


def test_a_server_works_without_a_reader_of_its_output(tmp_path):
    words = [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--engine", "fake", "--stop-at-eof"]
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        server.stdout.close()
        for line in server.stderr:
            if "standard output cannot be written" in line:
                break
        server.stdin.close()
        assert server.wait(60) == 0
    assert "(Broken pipe); it lacks this line: listening on 127.0.0.1:" in line


def test_python_m_runs_a_server_too(tmp_path):
    with Process("-m", "gramophone_server.main", "--port", "x", cwd=tmp_path) as wrong:
        assert wrong.code() == 2
    assert wrong.output == "gramophone-server: --port must be a whole number from 0 to 65535, got 'x'\n"
