"""Compiles every kernel for every target and refuses the ones that do not fit into a multiprocessor as planned.

    python3 csrc/cuda/gate.py csrc/cuda/*.cu        # `make cuda-build`; the cubins go to build/cuda

Needs nvcc and no GPU. A kernel that spills registers, or keeps an array in a stack frame because it is indexed by a run-time
value, is correct and slow, and nothing but ptxas says so; so what ptxas says is checked here.
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

TARGETS = ("75", "80", "86", "89", "90")  # those of setup.py
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v")  # the oldest C++ that a torch asks for
OUT = Path("build/cuda")

REGISTERS = 65536  # of a multiprocessor, on every target
MOST = 255  # that one thread can have
UNIT = 8  # a warp gets them in lots of 256


@dataclass(frozen=True)
class Plan:
    """The blocks of so many threads that are to run on one multiprocessor at once, of the kernels that match a name."""

    name: str
    threads: int
    blocks: int
    why: str

    @property
    def registers(self) -> int:
        """What leaves room for all of them."""
        return min(MOST, REGISTERS // (self.threads * self.blocks) // UNIT * UNIT)


# The first that matches a kernel's name counts.
PLANS = (
    Plan("add_style<*, 64>", 256, 3, "it has one chunk to load, so other blocks have to hide the wait for it"),
    Plan("add_style<*, 128>", 256, 2, "one multiplies while the other loads its first chunk or writes"),
    Plan("first_layer_*kernel<*>", 256, 2, "one multiplies while the other fills its planes"),
    Plan("multiply<*>", 256, 1, "a tile of sums in registers; its own stages of copies hide the loads"),
    Plan("dots_kernel<*>", 320, 2, "one sums while the other fills its tile"),
    # 24 warps with two loads of 16 bytes per thread are 24 KB on the way; an H200's 4.8 TB/s times some 0.6 us of latency, over
    # 132 multiprocessors, ask for 22 KB.
    Plan("*", 256, 3, "it waits for memory, so enough warps have to ask"),
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel, or of a function that it did not inline into one, for one target."""

    name: str
    target: str
    registers: int
    shared: int  # bytes that are known when compiling; the launch may ask for more
    stack: int  # bytes
    spilled: int  # bytes, stored and loaded

    def faults(self, plans: Iterable[Plan] = PLANS) -> Iterator[str]:
        """Why the gate does not let it through, one sentence each."""
        who = f"{self.name} for sm_{self.target}"
        plan = next((plan for plan in plans if fnmatch.fnmatchcase(self.name, plan.name)), None)
        if plan and self.registers > plan.registers:
            yield (
                f"{who} uses {self.registers} registers a thread; the limit is {plan.registers}, for blocks of "
                f"{plan.threads} threads, {plan.blocks} on a multiprocessor ({plan.why}): use fewer, or plan anew in gate.py"
            )
        if self.spilled:
            yield f"{who} spills {self.spilled} bytes of registers; the limit is 0: keep less alive, or loosen its bounds"
        elif self.stack:
            yield f"{who} has a stack frame of {self.stack} bytes; the limit is 0: index arrays by constants alone"


def kernels(told: str, target: str) -> list[Kernel]:
    """What `ptxas -v` said. Names are as ptxas wrote them."""
    found = []
    for part in told.split("Function properties for ")[1:]:

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
    """A name to read: `gram<Bf16, 64>` of `void gramophone::gram<gramophone::Bf16, (int)64>(float*, int)`."""
    name = re.sub(r"\((?:unsigned )?(?:int|bool|long|char)\)", "", demangled)
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void ")
    depth = 0
    for at in range(len(name) - 1, 0, -1) if name.endswith(")") else ():
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return name[:at]
    return name


def readable(names: list[str]) -> dict[str, str]:
    """The names of the source for those of the assembler, which stay as they are where there is no c++filt."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(demangled) for name, demangled in zip(names, said.splitlines(), strict=True)}


def compile_for(source: Path, target: str) -> str:
    """Leaves a cubin and returns what nvcc and ptxas said."""
    cubin = OUT / f"{source.stem}.sm_{target}.cubin"
    command = ["nvcc", "-cubin", f"-arch=sm_{target}", *FLAGS, "-o", str(cubin), str(source)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"gate: {source} does not compile for sm_{target}: {' '.join(command)}\n{ran.stdout}")
    return ran.stdout


def table(all_kernels: list[Kernel]) -> Iterator[str]:
    """One line for each kernel: registers on every target, and the most of the rest."""
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in all_kernels:
        by_name.setdefault(kernel.name, {})[kernel.target] = kernel
    head = "registers a thread"
    width = max(map(len, [head, *by_name]))
    yield f"{head:{width}}" + "".join(f"{'sm_' + target:>7}" for target in TARGETS) + "  shared spills"
    for name, on in by_name.items():
        registers = "".join(f"{on[target].registers if target in on else '-':>7}" for target in TARGETS)
        shared, spilled = (max(getattr(one, field) for one in on.values()) for field in ("shared", "spilled"))
        yield f"{name:{width}}{registers} {shared:7} {spilled:6}"


def progress(line: str) -> None:
    """One line that stays where it is, for people."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """The verb."""
    if not shutil.which("nvcc"):
        raise SystemExit("gate: there is no nvcc on the PATH; install the CUDA toolkit, or put its bin folder there")
    if len(sys.argv) < 2:
        raise SystemExit("gate: no kernels; name the .cu files to compile")
    sources = [Path(name) for name in sys.argv[1:]]
    jobs = [(source, target) for source in sources for target in TARGETS]
    OUT.mkdir(parents=True, exist_ok=True)
    found: list[Kernel] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = pool.map(lambda job: compile_for(*job), jobs)
        for done, ((source, target), told) in enumerate(zip(jobs, outputs, strict=True), 1):
            found += kernels(told, target)
            progress(f"{done} of {len(jobs)}: {source} for sm_{target}")
            if warnings := re.sub(r"^(ptxas info| {4}\d+ bytes stack).*\n", "", told, flags=re.MULTILINE).strip():
                print(f"gate: {source} for sm_{target}:\n{warnings}", file=sys.stderr)
    progress("")
    names = readable([kernel.name for kernel in found])
    found = [replace(kernel, name=names[kernel.name]) for kernel in found]
    print(*table(found), sep="\n")
    faults = [fault for kernel in found for fault in kernel.faults()]
    if faults:
        raise SystemExit("\n".join(f"gate: {fault}" for fault in faults))


if __name__ == "__main__":
    main()
