"""tools/check_spills.py on output of ptxas 13.0; needs no nvcc."""

from __future__ import annotations

import pytest

import check_spills
from check_spills import Kernel, Occupancy

# A kernel in an anonymous namespace that spills, and one outside that does not.
SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN40_GLOBAL__N__287874cb_8_spill_cu_b3635d075hoardILi96EEEvPfPKi' for 'sm_80'
ptxas info    : Function properties for _ZN40_GLOBAL__N__287874cb_8_spill_cu_b3635d075hoardILi96EEEvPfPKi
    376 bytes stack frame, 752 bytes spill stores, 944 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 376 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 39.753 ms
ptxas info    : Compiling entry function '_Z6modestPf' for 'sm_80'
ptxas info    : Function properties for _Z6modestPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1.613 ms
"""
# For sm_90 ptxas reports no cmem, because parameters are passed in another way. This kernel has shared memory.
SHARING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10gramophone4gramINS_4Fp16ELi128EEEvPKT_Pfii' for 'sm_90'
ptxas info    : Function properties for _ZN10gramophone4gramINS_4Fp16ELi128EEEvPKT_Pfii
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 100 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 24.347 ms
"""
HOARD = "_ZN40_GLOBAL__N__287874cb_8_spill_cu_b3635d075hoardILi96EEEvPfPKi"


def test_the_output_of_ptxas_is_parsed() -> None:
    assert check_spills.kernels(SPILLING, "80") == [
        Kernel(HOARD, "80", registers=64, shared=0, stack=376, spilled=752 + 944),
        Kernel("_Z6modestPf", "80", registers=8, shared=0, stack=0, spilled=0),
    ]
    assert check_spills.kernels(SHARING, "90") == [
        Kernel("_ZN10gramophone4gramINS_4Fp16ELi128EEEvPKT_Pfii", "90", registers=100, shared=1024, stack=0, spilled=0)
    ]
    assert check_spills.kernels("", "75") == []


def test_a_spilling_kernel_is_rejected() -> None:
    hoard, modest = check_spills.kernels(SPILLING, "80")
    (fault,) = hoard.faults()
    assert HOARD in fault and "sm_80" in fault and "1696 bytes" in fault and "limit is 0" in fault
    assert list(modest.faults()) == []


def test_a_stack_frame_is_rejected() -> None:
    (fault,) = Kernel("gram", "90", registers=40, shared=0, stack=48, spilled=0).faults()
    assert "gram for sm_90" in fault and "48 bytes" in fault and "limit is 0" in fault


def test_registers_are_limited_by_the_first_matching_occupancy() -> None:
    required = (
        Occupancy("gram<*, 64>", 256, 2, "so"),
        Occupancy("gram*", 256, 4, "one loads"),
        Occupancy("*", 256, 8, "full"),
    )
    kernel = Kernel("gram<Bf16, 128>", "86", registers=64, shared=0, stack=0, spilled=0)
    assert list(kernel.faults(required)) == []
    (fault,) = Kernel("gram<Bf16, 128>", "86", registers=65, shared=0, stack=0, spilled=0).faults(required)
    for part in ("gram<Bf16, 128>", "sm_86", "65", "64", "4 blocks of 256 threads", "one loads"):
        assert part in fault


@pytest.mark.parametrize(
    ("threads", "blocks", "registers"), [(256, 1, 255), (256, 2, 128), (256, 3, 80), (128, 4, 128), (1024, 2, 32)]
)
def test_the_limit_leaves_registers_for_every_block(threads: int, blocks: int, registers: int) -> None:
    assert Occupancy("any", threads, blocks, "").registers == registers


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void (anonymous namespace)::hoard<96>(float*, int const*)", "hoard<96>"),
        ("void gramophone::gram<gramophone::Fp16, (int)128>(gramophone::Fp16 const*, float*)", "gram<Fp16, 128>"),
        ("void gramophone::(anonymous namespace)::map<(bool)1>(float (*)(float), float*)", "map<1>"),
        ("modest(float*)", "modest"),
        ("extern_c", "extern_c"),
    ],
)
def test_names_are_short(demangled: str, name: str) -> None:
    assert check_spills.short(demangled) == name


def test_the_table_has_a_line_for_each_kernel() -> None:
    on = [Kernel("gram", target, 30 + at, 64 * at, 0, 0) for at, target in enumerate(check_spills.TARGETS)]
    head, *lines = check_spills.table([*on, Kernel("late", "90", 8, 0, 0, 12)])
    assert [f"sm_{target}" in head for target in check_spills.TARGETS] == [True] * len(check_spills.TARGETS)
    assert [line.split() for line in lines] == [
        ["gram", "30", "31", "32", "33", "34", "256", "0"],
        ["late", "-", "-", "-", "-", "8", "0", "12"],
    ]
