"""Rules of this repository.

What is committed twice agrees, imports follow the layers, tests mirror the product, and packages hold what they should.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from google.protobuf import descriptor_pb2

import gramophone
import gramophone_client
import gramophone_server
from check_spills import TARGETS
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.job_state import RecipeUpdate

ROOT = Path(__file__).parent.parent
PROTO = "gramophone/v1/style_transfer.proto"
MAX_MODULE_LINES = 400  # a longer module has more than one reason to change
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
    """A folder with the output of `make proto` and the descriptor of the proto."""
    out = tmp_path_factory.mktemp("stubs")
    outputs = (f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", f"-o{out / 'descriptor'}")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, PROTO]
    subprocess.run(command, check=True, timeout=60)
    return out


def test_stubs_match_the_proto(compiled: Path) -> None:
    (current,) = descriptor_pb2.FileDescriptorSet.FromString((compiled / "descriptor").read_bytes()).file
    for message in _messages(current.message_type):
        for field in message.field:
            field.ClearField("json_name")  # protoc derives it, and the stubs omit it
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert committed == current, "the proto has changed: run `make proto` and commit the stubs"


def _messages(messages: Iterable[descriptor_pb2.DescriptorProto]) -> Iterator[descriptor_pb2.DescriptorProto]:
    for message in messages:
        yield message
        yield from _messages(message.nested_type)


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_stubs_are_generated(compiled: Path, suffix: str) -> None:
    # The descriptor has neither the proto's comments nor Python types. Versions of the tools may differ.
    name = PROTO.replace(".proto", suffix)
    committed, fresh = (
        re.sub(r"\d+(\.|, )\d+(\.|, )\d+", "VERSION", (folder / name).read_text())
        for folder in (ROOT / "proto", compiled)
    )
    assert committed == fresh, "run `make proto` and commit the stubs"


def test_the_fields_that_a_controller_can_change_are_the_same_in_proto_server_and_client() -> None:
    (changes,) = get_args(get_type_hints(gramophone_client.AsyncJobControl.update)["changes"])
    assert set(pb.UpdateCommand.DESCRIPTOR.fields_by_name) == RecipeUpdate.__annotations__.keys()
    assert changes.__annotations__.keys() == RecipeUpdate.__annotations__.keys()


# Names, lines and imports ---------------------------------------------------------------------------------------------


def _sort_key(name: str) -> tuple[bool, bool, str]:
    """Ruff's order: CONSTANTS, Classes, functions."""
    return not name.isupper(), not name[0].isupper(), name


def test_the_client_exports_all_that_it_imports() -> None:
    public = [
        name
        for name, value in vars(gramophone_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert gramophone_client.__all__ == sorted(public, key=_sort_key)


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_is_sorted_and_lists_own_names(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__), key=_sort_key)
    for member in module.__all__:
        value = getattr(module, member)
        if isinstance(value, type | types.FunctionType):
            assert value.__module__ == name


def test_modules_import_only_exported_names() -> None:
    exported = {name: set(importlib.import_module(name).__all__) for name in WITH_ALL}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in exported:
                taken = {alias.name for alias in node.names}
                assert taken <= exported[node.module], f"{path}: {taken - exported[node.module]} of {node.module}"


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("client/**/*.py")]),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MAX_MODULE_LINES, "divide it by its reasons to change"


def _sources() -> list[Path]:
    return [path for root in ("proto", "server", "client") for path in (ROOT / root).rglob("*.py")]


def test_imports_follow_the_layers() -> None:
    # In a process of its own, as import-linter changes sys.path and the logging. The contracts are in pyproject.toml.
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
    assert "0 broken" in checked.stdout  # it has read the contracts


# Tests ----------------------------------------------------------------------------------------------------------------

TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
WINGS = {"gramophone": "tests/proto", "gramophone_server": "tests", "gramophone_client": "tests/client"}
# What has no wing of the product: campaigns, devices, whole programs, tools, and what tests share.
OTHER_FOLDERS = {
    "bad_input",
    "benchmarks",
    "chaos",
    "cuda",
    "docs",
    "emulator",
    "end_to_end",
    "examples",
    "gpu",
    "soak",
    "support",
    "tools",
    "typing",
}
# Modules without a test module of their own, by what tests them: values and parts that only matter in what uses them.
TESTED_THROUGH = {
    "tests/proto/test_recipe.py": ["gramophone.wire"],
    "tests/rpc/test_validation.py": ["gramophone.options"],
    "tests/engine/test_engine.py": ["gramophone_server.domain.engine_api"],
    "tests/scheduling/test_worker.py": ["gramophone_server.domain.commands", "gramophone_server.domain.events"],
    "tests/scheduling/test_scheduler.py": ["gramophone_server.scheduling.*"],
    "tests/jobs/test_job.py": ["gramophone_server.jobs.event_log"],
    "tests/cuda/test_features.py": ["gramophone_server.network.first_layer"],
    "tests/engine/test_batch.py": ["gramophone_server.engine.objective", "gramophone_server.engine.scales"],
    "tests/network/test_features.py": ["gramophone_server.engine.losses"],
    "tests/rpc/test_status.py": ["gramophone_server.errors"],
    "tests/rpc/test_receiving.py": ["gramophone_server.rpc.incoming"],
    "tests/images/test_decoders.py": [
        "gramophone_server.images.decoder_client",
        "gramophone_server.images.decoder_process",
    ],
    "tests/ops": ["gramophone_server.ops.*"],  # by family of ops, as csrc
    "tests/client/test_cli.py": [
        "gramophone_client.__main__",
        "gramophone_client.commands.options",
        "gramophone_client.commands.parser",
        "gramophone_client.console.exit_codes",
    ],
    "tests/client/commands/test_stylize.py": [
        "gramophone_client.commands.clients",
        "gramophone_client.console.outputs",
    ],
    "tests/client/commands/test_control.py": ["gramophone_client.console.keyboard"],
    "tests/client/commands/test_info.py": ["gramophone_client.types.recipe_metadata"],
    "tests/client/transport/test_job_spec.py": [
        "gramophone_client.transport.problems",
        "gramophone_client.types.options",
    ],
    "tests/client/test_client.py": ["gramophone_client.blocking.*", "gramophone_client.types.server_info"],
    "tests/client/streams/test_job_control.py": ["gramophone_client.streams.job_commands"],
    "tests/client/streams/test_job_stream.py": ["gramophone_client.streams.submission"],
    "tests/client/bench": ["gramophone_client.bench.*"],
}
# Public names of named tuples, `os`, `torch.cuda` and notebooks.
NOT_PRIVATE = {
    "_asdict",
    "_exit",
    "_fields",
    "_replace",
    "_repr_jpeg_",
    "_repr_png_",
    "_sleep",
}


def _own_test(module: str) -> Path:
    package, *folders, name = module.split(".")
    return ROOT.joinpath(WINGS[package], *folders, f"test_{name}.py")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_test_module(module: str) -> None:
    through = [test for test, names in TESTED_THROUGH.items() if any(fnmatch(module, name) for name in names)]
    assert _own_test(module).exists() or through, f"add {_own_test(module).relative_to(ROOT)}"


def test_the_list_of_modules_that_are_tested_through_others_is_true() -> None:
    without = [module for module in MODULES if not _own_test(module).exists()]
    for test, names in TESTED_THROUGH.items():
        assert (ROOT / test).exists(), test
        for name in names:
            assert any(fnmatch(module, name) for module in without), f"{name} has its own test module"


def test_tests_are_in_the_wing_of_what_they_test() -> None:
    wings = {folder.name for folder in (ROOT / "server" / "gramophone_server").iterdir() if any(folder.glob("*.py"))}
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in TEST_FILES if path.parent != ROOT / "tests"}
    unknown = folders - OTHER_FOLDERS - wings - {"client", "proto"}
    assert not unknown, "use the folder of what is tested; a new one for something else is listed in OTHER_FOLDERS"


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_tests_use_no_private_names_and_no_other_tests(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not list(_private_names(tree)), "use or add a public name"
    imported = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in _names(node)]
    imported += [
        f"{node.module}.{name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in _names(node)
    ]
    shared = [name for name in imported if re.search(r"(^|\.)test_", name)]
    assert not shared, "move what tests share to tests/support"


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names]


def _private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of other objects and modules, with their lines.

    These are attributes, except those of `self`, `cls` and `super()`, imports, and strings for `setattr` and the like.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = _names(node)
        elif isinstance(node, ast.Call) and re.search(r"(^|\.)(set|get|del|has)attr$", ast.unparse(node.func)):
            values = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = [value.rpartition(".")[2] for value in values if isinstance(value, str)]
        for name in names:
            if re.match(r"_(?!_)", name) and name not in NOT_PRIVATE:
                yield f"line {node.lineno}: {name}"


def test_the_tests_of_the_kernels_need_no_grpc() -> None:
    """Machines with a GPU may have only torch and pytest."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['grpc', 'google', 'PIL', 'prometheus_client']))\n"
        "import pytest; sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, "tests/gpu", "tests/cuda"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert collected.returncode == 0, collected.stdout


# Packages -------------------------------------------------------------------------------------------------------------


def test_the_installed_version_is_that_of_the_changelog() -> None:
    # The first heading with a number, after "Unreleased".
    top = re.search(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert top is not None
    assert importlib.metadata.version("gramophone") == top[1], (
        "`touch setup.py; make install` installs the present version"
    )


# With CUDA or without -------------------------------------------------------------------------------------------------

NVCC = """#!/bin/sh
case $1 in
  --dryrun) echo '#$ TOP=/opt/cuda/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 89 90 100 103 ;;
esac
"""
Configure = Callable[..., subprocess.CompletedProcess[str]]
# The part of torch that setup.py uses. Prints the kind of extension that is built, and for what.
TORCH = """
import os, sys, types
from setuptools import Extension
__version__, version = "2.99", types.SimpleNamespace(cuda=os.environ.get("OF_TORCH"))
here = [tuple(map(int, one.split("."))) for one in os.environ.get("HERE", "").split()]
cuda = types.SimpleNamespace(device_count=lambda: len(here), get_device_capability=here.__getitem__)
def extension(kind):
    def make(name, sources, **rest):
        env = os.environ
        print(kind, env.get("TORCH_CUDA_ARCH_LIST"), env.get("CUDA_HOME"), len(rest["extra_compile_args"]))
        return Extension(name, sources, include_dirs=rest.get("include_dirs"))
    return make
sys.modules["torch.utils"] = types.ModuleType("torch.utils")
helper = sys.modules["torch.utils.cpp_extension"] = types.ModuleType("torch.utils.cpp_extension")
helper.CppExtension, helper.CUDAExtension, helper.BuildExtension = extension("cpp"), extension("cuda"), object
"""


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Runs `setup.py --version` with or without a CUDA toolkit, and with a torch of a CUDA version or of none."""
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
        (True, {"GRAMOPHONE_CUDA": "yes"}, "GRAMOPHONE_CUDA must be auto, 0 or 1, got 'yes'"),
        (False, {"GRAMOPHONE_CUDA": "1", "OF_TORCH": "13.0"}, "there is no nvcc; install"),
        (True, {"GRAMOPHONE_CUDA": "1"}, "torch 2.99 is not a CUDA build; install"),
        (True, {"GRAMOPHONE_CUDA": "1", "OF_TORCH": "12.8"}, "nvcc is of CUDA 13.0 and torch of CUDA 12.8; make"),
    ],
)
def test_cuda_that_is_required_but_cannot_be_built_is_an_error(
    configure: Configure, toolkit: bool, settings: dict[str, str], reason: str
) -> None:
    ran = configure(toolkit, **settings)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()  # no traceback
    assert line.startswith("setup.py: GRAMOPHONE_CUDA") and reason in line


@pytest.mark.parametrize(
    ("toolkit", "settings", "reason"),
    [(False, {"OF_TORCH": "13.0"}, "no nvcc"), (True, {}, "not a CUDA build"), (True, {"OF_TORCH": "12.8"}, "12.8")],
)
def test_without_a_usable_toolkit_only_the_cpu_ops_are_built(
    configure: Configure, toolkit: bool, settings: dict[str, str], reason: str
) -> None:
    ran = configure(toolkit, **settings)
    assert ran.returncode == 0 and ran.stdout.startswith("cpp ")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("setup.py: the ops are built for the CPU alone: ") and reason in line


def test_cuda_can_be_disabled(configure: Configure) -> None:
    ran = configure(True, OF_TORCH="13.0", GRAMOPHONE_CUDA="0")
    assert ran.stdout.startswith("cpp ") and not ran.stderr


@pytest.mark.parametrize(
    ("settings", "architectures"),
    [
        ({}, "7.5;8.0;8.6;8.9;9.0+PTX"),
        ({"HERE": "9.0 8.6 9.0"}, "8.6;9.0"),  # the devices of this machine
        ({"HERE": "7.0"}, "7.5;8.0;8.6;8.9;9.0+PTX"),  # not supported by this compiler
        ({"HERE": "9.0", "TORCH_CUDA_ARCH_LIST": "8.0 8.6+PTX"}, "8.0;8.6+PTX"),
    ],
)
def test_cuda_is_built_for_the_devices_of_this_machine_or_for_all_supported(
    configure: Configure, settings: dict[str, str], architectures: str
) -> None:
    ran = configure(True, OF_TORCH="13.0", **settings)
    assert ran.stdout.splitlines()[0] == f"cuda {architectures} /opt/cuda 2", ran.stderr


def test_check_spills_compiles_for_the_same_targets(configure: Configure) -> None:
    _, architectures, *_ = configure(True, OF_TORCH="13.0").stdout.split()
    assert re.sub(r"\.|\+PTX", "", architectures).split(";") == list(TARGETS)


# Documents ------------------------------------------------------------------------------------------------------------


def test_make_help_lists_the_targets() -> None:
    makefile = read("Makefile")
    documented = dict(re.findall(r"^([\w-]+):.*?## (.+)$", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == documented.keys()
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    assert dict(re.findall(r"^ +make ([\w-]+) +(.+)$", helped.stdout, re.MULTILINE)) == documented


PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", ["Dockerfile", ".ci/run", "README.md", "CONTRIBUTING.md", *PAGES])
def test_documents_name_existing_make_targets(page: str) -> None:
    targets = re.findall(r"^([\w-]+):.*?## ", read("Makefile"), re.MULTILINE)
    # Commands are at the start of a line, in backticks, or in a RUN line of the Dockerfile; elsewhere "make" is a word.
    named = re.findall(r"(?:^ *|`|^RUN (?:--\S+ )*)make ([a-z][a-z-]*)", read(page), re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_image_has_all_that_the_build_reads() -> None:
    kept = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert {"Makefile", "constraints.txt", "setup.py", "pyproject.toml", "MANIFEST.in"} <= kept
    assert {"CHANGELOG.md", "README.md", "LICENSE", "proto", "server", "client", "csrc"} <= kept
    copied = re.search(r"^COPY (LICENSE .*) /opt", read("Dockerfile"), re.MULTILINE)
    assert copied is not None
    assert set(copied[1].split()) <= kept
    assert all((ROOT / name).exists() for name in kept)
