"""tools/gpu_bundle: when the bundle fits a machine, what runs there, and what travels. Compiles nothing."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import check
from gpu_bundle import making, manifest, rehearsal, use

ROOT = Path(__file__).parent.parent.parent
EXTENSION = ROOT / "server" / "gramophone_server" / use.extension_name()  # of these tests


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for this Python and this torch, with the extension of these tests and a package of one file."""
    folder = tmp_path / "gpu-bundle"
    (folder / "ops").mkdir(parents=True)
    (folder / "site" / "grpc").mkdir(parents=True)
    ops = folder / "ops" / use.extension_name()
    ops.symlink_to(EXTENSION)
    write_manifest(folder)
    monkeypatch.setattr(use, "BUNDLE", folder)
    monkeypatch.setattr(use, "read", lambda: manifest.read(folder))
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    ops = folder / "ops" / use.extension_name()
    values = {
        "commit": "abc1234",
        "python": manifest.running_python(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": ["9.0"],
        "sources": manifest.sources_digest(),
        "files": {f"ops/{ops.name}": {"bytes": ops.stat().st_size, "sha256": manifest.digest(ops)}},
    }
    (folder / "manifest.json").write_text(json.dumps(values | changes))


def test_a_bundle_of_this_machine_fits(bundle: Path) -> None:
    assert use.misfit() is None
    assert use.search_path()[0] == str(bundle / "site")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "Linux aarch64"}, "the bundle is for Linux aarch64, and this is"),
        ({"python": "3.9"}, "the bundle is for Python 3.9, and this is"),
        ({"sources": "0"}, "csrc or setup.py has changed since the bundle was made, from abc1234"),
        ({"files": {"site/gone.so": {"sha256": ""}}}, "gpu-bundle/site/gone.so is missing or damaged"),
    ],
)
def test_a_bundle_of_another_machine_does_not_fit(bundle: Path, changes: dict[str, Any], reason: str) -> None:
    write_manifest(bundle, **changes)
    assert str(use.misfit()).startswith(reason)


def test_a_damaged_extension_does_not_fit(bundle: Path) -> None:
    ops = bundle / "ops" / use.extension_name()
    whole = ops.read_bytes()
    ops.unlink()
    ops.write_bytes(whole[: len(whole) // 2])
    assert use.misfit() == f"gpu-bundle/ops/{ops.name} is missing or damaged"
    ops.write_bytes(b"no extension")
    write_manifest(bundle)  # as if it was damaged before it was packed
    assert str(use.misfit()).startswith("the bundle's ops cannot be loaded: ImportError: ")


def test_a_python_without_torch_does_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "PROBE", "import no_such_torch")
    assert use.misfit() == "torch cannot be imported: ModuleNotFoundError: No module named 'no_such_torch'"


def test_an_extension_that_ends_its_process_does_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "PROBE", use.PROBE.split("spec =")[0] + "import os; os.abort()")
    assert use.misfit() == "the bundle's ops cannot be loaded: its process ended with -6"


MADE_FOR = {"torch": "2.11.0+cu130", "cuda": "13.0", "architectures": ["9.0"]}
HERE = {"torch": "2.11.0+cu130", "cuda": "13.0", "capability": None, "failure": ""}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"torch": "2.11.0"}, None),
        ({"torch": "2.14.1+cu130"}, "the bundle is for torch 2.11.0+cu130, and this is 2.14.1+cu130"),
        ({"cuda": "12.8"}, "the bundle is for a torch of CUDA 13.0, and this one is of CUDA 12.8"),
        ({"capability": (9, 0)}, None),
        ({"capability": (8, 9)}, "the bundle is for 9.0, and the GPU has 8.9"),
        ({"capability": (10, 0)}, "the bundle is for 9.0, and the GPU has 10.0"),
        ({"failure": "ImportError: no"}, "the bundle's ops cannot be loaded: ImportError: no"),
    ],
)
def test_the_ops_need_their_torch_and_their_gpu(changes: dict[str, Any], reason: str | None) -> None:
    assert use.torch_misfit(MADE_FOR, HERE | changes) == reason


def test_an_incomplete_bundle_does_not_fit(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])  # `make gpu-bundle` was interrupted
    assert use.misfit() == "gpu-bundle has no complete manifest.json"
    assert str(bundle / "site") not in use.search_path()


def test_no_bundle_does_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "BUNDLE", bundle / "no" / "gpu-bundle")
    assert use.misfit() == "there is no gpu-bundle, which `make gpu-bundle` makes"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that would run, with their environments; each ends with 0."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    return seen


def test_a_bundle_that_fits_is_used(
    bundle: Path, tmp_path: Path, commands: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(use, "PACKAGE", tmp_path)
    monkeypatch.setattr(use, "misfit", lambda: None)
    assert use.run(["--call", "a"]) == 0
    ((command, environment),) = commands
    assert command[:4] == [sys.executable, "-m", "benchmarks.gpu.check", "--began"] and command[5:] == ["--call", "a"]
    assert 0 <= time.monotonic() - float(command[4]) < 60  # the limit counts from the start of `run`
    assert environment["PYTHONPATH"].split(":")[0] == str(bundle / "site")
    assert (tmp_path / use.extension_name()).read_bytes() == EXTENSION.read_bytes()
    assert "the bundle fits, nothing is compiled: " in capsys.readouterr().out


def test_ops_are_compiled_where_the_bundle_does_not_fit(
    bundle: Path, commands: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(use, "misfit", lambda: "a reason")
    assert use.run([]) == 0
    (compiled, build), (checked, environment) = commands
    assert compiled[1:] == ["setup.py", "build_ext", "--inplace"] and build["GRAMOPHONE_CUDA"] == "1"
    assert checked[1:3] == ["-m", "benchmarks.gpu.check"]
    assert environment["PYTHONPATH"].split(":")[0] == str(bundle / "site")  # the packages are for this Python
    assert "the ops are compiled here: a reason" in capsys.readouterr().out


def test_the_check_does_not_run_without_ops(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "misfit", lambda: "a reason")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    assert use.run([]) == 3


def test_the_digest_of_the_sources_depends_on_contents_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("")
    seen = set()
    for name, content in (("a.cu", "1"), ("a.cu", "2"), ("b.cu", "2")):
        file = tmp_path / "csrc" / name
        file.write_text(content)
        seen.add(manifest.sources_digest())
        file.unlink()
    assert len(seen) == 3


def test_too_much_does_not_travel(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "BUNDLE", bundle)
    making.require_size()
    monkeypatch.setattr(making, "MAX_BYTES", 2**20)
    with pytest.raises(SystemExit, match=r"together at most 1 MiB can travel. Large files in the checkout: .+MiB"):
        making.require_size()


def test_only_what_git_does_not_ignore_travels_and_the_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "BUNDLE", ROOT / "gpu-bundle")
    copy = tmp_path / "copy"
    rehearsal.copy_what_travels(copy)
    assert (copy / "Makefile").read_bytes() == (ROOT / "Makefile").read_bytes()
    assert (copy / "server" / "gramophone_server" / "main.py").exists()
    assert not (copy / ".venv").exists() and not list(copy.glob("server/gramophone_server/*.so"))


def test_a_python_of_the_machines_version_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(version: str) -> Callable[[list[str]], str]:
        return lambda command: version

    monkeypatch.setenv("PYTHON312", "/opt/python/bin/python")
    monkeypatch.setattr(making, "output", answer(f"{making.PYTHON}\n"))
    assert making.find_python() == "/opt/python/bin/python"
    monkeypatch.setattr(making, "output", answer("3.99\n"))
    with pytest.raises(SystemExit, match=r"the GPU machine has Python 3\.12, and there is none here; install it, or"):
        making.find_python()


def test_the_bundles_packages_are_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(making.PACKAGES) <= pinned


def test_a_command_runs_without_a_network() -> None:
    if sys.version_info < (3, 12):
        pytest.skip("os.unshare is of Python 3.12")
    probe = "import socket; socket.create_connection(('192.0.2.1', 9), 5)"  # TEST-NET-1, RFC 5737
    command = [sys.executable, "-m", "gpu_bundle.offline", sys.executable, "-c", probe]
    ran = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True, timeout=60, check=False)
    assert "unreachable" in ran.stderr or "THE NETWORK IS NOT CUT OFF" in ran.stdout


# The plan -------------------------------------------------------------------------------------------------------------

PLAN = (ROOT / "docs" / "gpu.md").read_text()
MERGED = "benchmarks/results/GPU.json"  # GPU stands for its name; exists after the first measurement


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (gpu-[a-z-]+)", PLAN))))
def test_the_plans_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_plans_calls_and_sections_exist() -> None:
    calls = set(re.findall(r"CALL=(\w+)|--call (\w+)", PLAN))
    assert {one or other for one, other in calls} == check.CALLS.keys()
    sections = {name for names in re.findall(r"--only ([\w,]+)", PLAN) for name in names.split(",")}
    assert sections and sections <= check.SECTIONS.keys()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:benchmarks|network|tests|tools)/[\w./]+)`", PLAN)) - {MERGED})
)
def test_the_plans_paths_exist(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "server" / "gramophone_server" / path).exists()
