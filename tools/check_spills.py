"""Compiles the CUDA kernels for every target and fails if one of them spills registers or uses too many.

    python3 tools/check_spills.py csrc/cuda/*/*.cu        # `make cuda-build`; the cubins go to build/cuda

Needs nvcc but no GPU. A kernel is correct but slow if it spills registers, or if it keeps an array in a stack frame
because the array is indexed by a run-time value. Only the output of ptxas shows that, so this tool checks that output.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
TARGETS = ("75", "80", "86", "89", "90")  # the same as in setup.py
# C++17 is the oldest standard that a supported torch compiles with.
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}")
OUT = Path("build/cuda")

REGISTERS = 65536  # per multiprocessor, on every target
MAX_PER_THREAD = 255
UNIT = 8  # registers per thread are allocated in units of 8, 256 per warp


@dataclass(frozen=True)
class Occupancy:
    """How many blocks must fit on one multiprocessor at once, for the kernels whose name matches a pattern."""

    name: str
    threads: int
    blocks: int
    why: str

    @property
    def registers(self) -> int:
        """The most registers per thread with which all of the blocks fit."""
        return min(MAX_PER_THREAD, REGISTERS // (self.threads * self.blocks) // UNIT * UNIT)


# The first pattern that matches a kernel's name applies.
REQUIRED = (
    Occupancy("style_bwd_kernel<*, 64>", 256, 3, "a block loads only one stage, so other blocks must hide its latency"),
    Occupancy("style_bwd_kernel<*, 128>", 256, 2, "one multiplies while the other loads its first stage or writes"),
    Occupancy("first_layer_*kernel<*>", 256, 2, "one multiplies while the other fills its planes"),
    Occupancy(
        "style_gram_partials_kernel<*>", 256, 1, "its sums fill the registers; its stages of copies hide the loads"
    ),
    Occupancy("lbfgs_dots_kernel<*>", 320, 2, "one sums while the other fills its tile"),
    # 24 warps with two loads of 16 bytes per thread have 24 KB in flight. An H200 needs 22 KB per multiprocessor:
    # 4.8 TB/s times 0.6 us of latency, over 132 multiprocessors.
    Occupancy("*", 256, 3, "it is bound by memory, so enough warps must have loads in flight"),
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports about one kernel, or a function that it did not inline, for one target."""

    name: str
    target: str
    registers: int
    shared: int  # bytes of static shared memory; a launch may request more
    stack: int  # bytes
    spilled: int  # bytes, stores and loads

    def faults(self, required: Iterable[Occupancy] = REQUIRED) -> Iterator[str]:
        """Why the kernel is rejected, one sentence per reason."""
        kernel = f"{self.name} for sm_{self.target}"
        occupancy = next((one for one in required if fnmatch.fnmatchcase(self.name, one.name)), None)
        if occupancy and self.registers > occupancy.registers:
            yield (
                f"{kernel} uses {self.registers} registers per thread; the limit is {occupancy.registers}, for "
                f"{occupancy.blocks} blocks of {occupancy.threads} threads on a multiprocessor ({occupancy.why}): "
                "use fewer, or change REQUIRED in check_spills.py"
            )
        if self.spilled:
            yield (
                f"{kernel} spills {self.spilled} bytes of registers; the limit is 0: keep fewer values live, or relax "
                "its launch bounds"
            )
        elif self.stack:
            yield f"{kernel} has a stack frame of {self.stack} bytes; the limit is 0: index arrays by constants only"


def kernels(output: str, target: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`. Names are mangled, as ptxas prints them."""
    found = []
    for part in output.split("Function properties for ")[1:]:

        def number(pattern: str, part: str = part) -> int:
            match = re.search(rf"(\d+) {pattern}", part)
            return int(match[1]) if match else 0

        found.append(
            Kernel(
                part.split(maxsplit=1)[0],
                target,
                registers=number("registers"),
                shared=number("bytes smem"),
                stack=number("bytes stack frame"),
                spilled=number("bytes spill stores") + number("bytes spill loads"),
            )
        )
    return found


def short(demangled: str) -> str:
    """A short name: `gram<Bf16, 64>` for `void gramophone::gram<gramophone::Bf16, (int)64>(float*, int)`."""
    name = re.sub(r"\((?:unsigned )?(?:int|bool|long|char)\)", "", demangled)
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void ")
    depth = 0
    for at in range(len(name) - 1, 0, -1) if name.endswith(")") else ():
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return name[:at]
    return name


def readable(names: list[str]) -> dict[str, str]:
    """Maps mangled names to the short names of the source, or to themselves if c++filt is not installed."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(demangled) for name, demangled in zip(names, output.splitlines(), strict=True)}


def compile_for(source: Path, target: str) -> str:
    """Writes a cubin and returns the output of nvcc and ptxas."""
    cubin = OUT / f"{source.parent.name}_{source.stem}.sm_{target}.cubin"
    command = ["nvcc", "-cubin", f"-arch=sm_{target}", *FLAGS, "-o", str(cubin), str(source)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"check_spills: {source} does not compile for sm_{target}: {' '.join(command)}\n{ran.stdout}")
    return ran.stdout


def table(all_kernels: list[Kernel]) -> Iterator[str]:
    """One line per kernel: registers on every target, and the maxima of shared memory and spills."""
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in all_kernels:
        by_name.setdefault(kernel.name, {})[kernel.target] = kernel
    head = "registers per thread"
    width = max(map(len, [head, *by_name]))
    yield f"{head:{width}}" + "".join(f"{'sm_' + target:>7}" for target in TARGETS) + "  shared spills"
    for name, on in by_name.items():
        registers = "".join(f"{on[target].registers if target in on else '-':>7}" for target in TARGETS)
        shared, spilled = (max(getattr(one, field) for one in on.values()) for field in ("shared", "spilled"))
        yield f"{name:{width}}{registers} {shared:7} {spilled:6}"


def progress(line: str) -> None:
    """Shows a line in place of the last one if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Compiles and checks the .cu files that the arguments name."""
    if not shutil.which("nvcc"):
        raise SystemExit(
            "check_spills: there is no nvcc on the PATH; install the CUDA toolkit, or add its bin folder to PATH"
        )
    if len(sys.argv) < 2:
        raise SystemExit("check_spills: no kernels; name the .cu files to compile")
    sources = [Path(name) for name in sys.argv[1:]]
    jobs = [(source, target) for source in sources for target in TARGETS]
    OUT.mkdir(parents=True, exist_ok=True)
    found: list[Kernel] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = pool.map(lambda job: compile_for(*job), jobs)
        for done, ((source, target), output) in enumerate(zip(jobs, outputs, strict=True), 1):
            found += kernels(output, target)
            progress(f"{done} of {len(jobs)}: {source} for sm_{target}")
            if warnings := re.sub(r"^(ptxas info| {4}\d+ bytes stack).*\n", "", output, flags=re.MULTILINE).strip():
                print(f"check_spills: {source} for sm_{target}:\n{warnings}", file=sys.stderr)
    progress("")
    names = readable([kernel.name for kernel in found])
    found = [replace(kernel, name=names[kernel.name]) for kernel in found]
    print(*table(found), sep="\n")
    faults = [fault for kernel in found for fault in kernel.faults()]
    if faults:
        raise SystemExit("\n".join(f"check_spills: {fault}" for fault in faults))


if __name__ == "__main__":
    main()
