"""The layout of csrc: what a file may include, and the names by which an op is found."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
EMULATOR = "emulator.h"  # of tests/emulator, in place of CUDA's headers

# Where the implementations of each device are. The CPU needs no kernels for what oneDNN has in its convolutions.
DEVICES = ("cpu", "cuda")
CUDA_ONLY = {"first_layer", "first_layer_bwd", "bias_relu_", "bias_relu_pool", "pool_codes_bwd"}


def read(*paths: Path) -> str:
    return "\n".join(path.read_text() for path in paths)


def under(folder: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(CSRC).parts[0] == folder]


def ops(text: str, call: str) -> list[str]:
    return re.findall(rf'\bm\.{call}\(\s*"(\w+)', text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_are_paths_in_csrc_and_never_of_the_other_device(path: Path) -> None:
    own = path.relative_to(CSRC).parts[0]
    for include in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
        if include == EMULATOR:
            assert own == "cuda"
            continue
        assert (CSRC / include).is_file(), include
        device = Path(include).parts[0]
        assert device not in DEVICES or device == own, include


def test_every_op_has_a_schema_and_a_kernel_on_each_device() -> None:
    schemas = ops(read(CSRC / "schemas.cpp"), "def")
    assert len(schemas) == len(set(schemas)) > 0
    for device, expected in (("cpu", set(schemas) - CUDA_ONLY), ("cuda", set(schemas))):
        implementations = ops(read(*under(device)), "impl")
        assert Counter(implementations) == Counter(expected), (
            f"m.impl of csrc/{device} and m.def of csrc/schemas.cpp differ; an op for CUDA alone is in CUDA_ONLY"
        )


def test_kernels_are_named_as_kernels_and_each_has_one_name() -> None:
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", read(*under("cuda")))
    assert len(names) == len(set(names)) > 0
    assert [name for name in names if not name.endswith("_kernel")] == []
    assert len(names) == sum(path.read_text().count("__global__ ") for path in under("cuda"))


def test_names_of_constants_and_types_that_headers_share_are_unique() -> None:
    """All headers are in one namespace, so any two of them may be included together."""
    names: list[str] = []
    for path in SOURCES:
        if path.suffix in {".h", ".cuh"}:
            names += re.findall(r"^constexpr [\w:]+ (k\w+)|^struct (\w+) \{", path.read_text(), re.MULTILINE)
    found = Counter(name for pair in names for name in pair if name)
    found.pop("DeviceContext")  # once for CUDA and once for the emulator
    assert {name: count for name, count in found.items() if count > 1} == {}


def test_no_two_sources_of_a_folder_have_the_same_stem() -> None:
    """Their objects would have the same path."""
    objects = Counter(path.with_suffix("") for path in SOURCES if path.suffix in {".cpp", ".cu"})
    assert max(objects.values()) == 1
