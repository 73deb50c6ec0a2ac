"""What each switch of `network.tuning` is predicted to gain on a GPU, before any was measured.

A prediction is the ratio of the time of an iteration to that with the defaults: below 1, the switch is faster. It is
computed from the bytes, operations and launches that the switch saves or adds, at the rates below.
`benchmarks.gpu.switches` measures the same ratios, and `benchmarks.gpu.lessons` puts both into one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.network import Shape, shapes
from gramophone_server.network.tuning import MEASURED, Tuning

__all__ = [
    "ALONE",
    "FRAME_EVERY",
    "SWITCHES",
    "WIDTHS",
    "Case",
    "Switch",
    "frame_ratio",
    "largest_effect",
    "largest_gain",
]

COPY = 3.0e6  # bytes per us: H100, measured with torch's copy; an H200 has 4.3e6
L2_COPY = 6.0e6  # bytes per us, of maps that are in the L2: twice the memory's rate is assumed
L2_BYTES = 25e6  # half of an H100's L2, which is what one map can count on
LAUNCH = 1.75  # us per small kernel within a graph: 1.5 to 2 assumed
PCIE = 50e3  # bytes per us, from the device to pinned memory: assumed, for PCIe 5.0 with 16 lanes
MATRIX = 790e6  # operations per us in 16 bits: H100, measured
Case = tuple[int, int]  # side in pixels, and jobs in the batch

# ms of an iteration with the defaults: predicted, from the operations of the convolutions at 75 to 82 % of MATRIX and
# the bytes of everything else. They were computed for an H200; an H100 should take a tenth more.
ITERATION = {(256, 1): 0.44, (512, 1): 0.97, (1024, 1): 3.4, (256, 16): 3.36, (512, 4): 3.4}
ALONE: tuple[Case, ...] = ((256, 1), (512, 1), (1024, 1))
SMALL_AND_LARGE: tuple[Case, ...] = ((256, 1), (1024, 1))
FRAME_EVERY = 10  # iterations

# Time of a job's iteration in a batch, over that in a batch of one: predicted, from how well the tiles of the
# convolutions fill 132 multiprocessors. conv5_1 has 32 tiles of 128 x 128 at 512 px and 8 at 256 px.
WIDTHS: Mapping[int, Mapping[int, float]] = {
    256: {2: 0.72, 4: 0.58, 8: 0.51, 16: 0.48},
    512: {2: 0.93, 4: 0.88, 8: 0.86, 16: 0.85},
}


@dataclass(frozen=True)
class Switch:
    """A way to run an iteration, and what it is predicted to gain."""

    name: str
    tuning: Tuning
    reasoning: str
    change: Callable[[int, int], float]  # us that it adds to an iteration, of a side in pixels and a number of jobs
    cases: Sequence[Case] = ALONE
    same_bits: bool = False  # the pictures are those of the defaults to the bit
    needs_cudnn: bool = False
    frames: bool = False  # a picture is copied to the host after every `FRAME_EVERY` iterations

    def predicted(self, case: Case) -> float:
        """The predicted ratio to the time with the defaults."""
        return 1 + self.change(*case) / (ITERATION[case] * 1e3)


def largest_gain(switch: Switch) -> float:
    """The smallest of the predicted ratios."""
    return min(map(switch.predicted, switch.cases))


def largest_effect(switch: Switch) -> float:
    """The largest predicted distance of a ratio from 1."""
    return max(abs(switch.predicted(case) - 1) for case in switch.cases)


def pass_us(count: float, size: float) -> float:
    """Time of a kernel that reads and writes ``count`` bytes of maps of ``size`` bytes each."""
    return LAUNCH + count / (L2_COPY if size <= L2_BYTES else COPY)


def bias_relu_us(side: int, jobs: int) -> float:
    """A pass over the output of each of the 8 convolutions that are not followed by a pooling, without conv1_1."""
    return sum(pass_us(2 * _map_bytes(shape, jobs), _map_bytes(shape, jobs)) for shape in _kept(side))


def _kept(side: int) -> list[Shape]:
    network = list(shapes(side, side))
    following = [*(shape.height for shape in network[1:]), network[-1].height]
    return [s for s, height in zip(network, following, strict=True) if height == s.height and s.name != "1_1"]


def _map_bytes(shape: Shape, jobs: int) -> int:
    return 2 * jobs * shape.channels_out * shape.height * shape.width


def padded_forward_us(side: int, jobs: int) -> float:
    """What conv1_1 in 8 channels does beyond our kernel: it fills and packs the padded image (16 + 28 bytes per pixel),
    and the convolution reads that (16), not the image (12); bias and ReLU pass over its output once more (256)."""
    pixels = jobs * side * side
    return 2 * LAUNCH + pixels * 48 / COPY + pass_us(256 * pixels, 128 * pixels)


def padded_backward_us(side: int, jobs: int) -> float:
    """A tile of a convolution is at least 64 channels wide, so 8 take as long as 64: memory-bound before, bound by
    arithmetic now. The result is written and read once more (32 bytes per pixel)."""
    pixels = jobs * side * side
    arithmetic, memory = 18 * 64 * 64 * pixels / MATRIX, 140 * pixels / COPY
    return max(0.0, arithmetic - memory) + pass_us(32 * pixels, 16 * pixels)


def fused_check_us(side: int, jobs: int) -> float:
    """A launch less, and the gradient (12 bytes per pixel) is not read again; it is in the L2."""
    return -pass_us(12 * jobs * side * side, 12 * jobs * side * side)


def frame_stall_us(side: int, jobs: int) -> float:
    """Per iteration: the iterations wait for the copy of each frame, 3 bytes per pixel."""
    return 3 * side * side / PCIE / FRAME_EVERY


def frame_us(side: int, jobs: int) -> float:
    """Per iteration: a frame is scaled, rounded, and converted (63 bytes per pixel in three launches)."""
    return (3 * LAUNCH + 63 * side * side / L2_COPY) / FRAME_EVERY


def frame_ratio(side: int) -> float:
    """The predicted time of an iteration with a frame after every `FRAME_EVERY`, over that without frames."""
    return 1 + frame_us(side, 1) / (ITERATION[side, 1] * 1e3)


def nothing(side: int, jobs: int) -> float:
    return 0.0


SWITCHES: tuple[Switch, ...] = (
    Switch(
        "forward fused",
        Tuning(forward="fused"),
        "Saves the pass for bias and ReLU in 8 layers: a launch, a read and a write of each map. cuDNN may choose "
        "slower kernels, and must neither hide NaN nor give other bits in every run.",
        lambda side, jobs: -bias_relu_us(side, jobs),
        needs_cudnn=True,
    ),
    Switch(
        "forward measured",
        Tuning(forward=MEASURED),
        "The fastest form of each layer that is right. cuDNN's ReLU is believed to hide NaN, so `fused` drops out, and "
        "`split` is the fastest of the others.",
        nothing,
        needs_cudnn=True,
    ),
    Switch(
        "forward biased",
        Tuning(forward="biased"),
        "torch adds the bias in a pass of its own and the ReLU in another one: one pass more than ours in 8 layers.",
        bias_relu_us,
        cases=SMALL_AND_LARGE,
        needs_cudnn=True,
    ),
    Switch(
        "backward flipped",
        Tuning(backward="flipped"),
        "The default takes the faster form of each layer; this one should be the faster in most, and cost 1 % of all "
        "in the others.",
        lambda side, jobs: 0.01 * ITERATION[side, jobs] * 1e3,
        cases=SMALL_AND_LARGE,
        needs_cudnn=True,
    ),
    Switch(
        "backward dgrad",
        Tuning(backward="dgrad"),
        "As above, but should be the slower form in most layers: 3 % of all.",
        lambda side, jobs: 0.03 * ITERATION[side, jobs] * 1e3,
        cases=SMALL_AND_LARGE,
        needs_cudnn=True,
    ),
    Switch(
        "conv1_1 padded, forward",
        Tuning(padded_forward=True),
        "304 bytes per pixel more than our kernel, mostly the pass for bias and ReLU over the largest map, and 3 "
        "launches. Faster only if our kernel is far from the memory's rate.",
        padded_forward_us,
        cases=SMALL_AND_LARGE,
        needs_cudnn=True,
    ),
    Switch(
        "conv1_1 padded, backward",
        Tuning(padded_backward=True),
        "8 output channels take a tile of 64, so it is bound by arithmetic; 32 bytes per pixel and a launch more.",
        padded_backward_us,
        cases=SMALL_AND_LARGE,
        needs_cudnn=True,
    ),
    Switch(
        "persistent style_fwd",
        Tuning(persistent_style=True),
        "One job is one round of blocks already. In a batch of 16, 16 starts of blocks of 0.3 us are saved, but each "
        "block must then end its share, however slow its items are.",
        lambda side, jobs: -0.3 * jobs if jobs > 1 else 0.0,
        cases=((256, 1), (1024, 1), (256, 16)),
        same_bits=True,
    ),
    Switch(
        "fused check",
        Tuning(fused_check=True),
        "59 launches instead of 60, and the gradient, 12 bytes per pixel, is not read again.",
        fused_check_us,
        cases=(*ALONE, (256, 16)),
        same_bits=True,
    ),
    Switch(
        "20 iterations per graph",
        Tuning(iterations_per_graph=20),
        "The device needs about 1.5 us between two graphs in its queue; half of that is saved, 0.08 us per iteration. "
        "The host's 5 to 10 us per launch are hidden.",
        lambda side, jobs: -1.5 / 20,
        cases=((256, 1), (512, 1)),
        same_bits=True,
    ),
    Switch(
        "1 iteration per graph",
        Tuning(iterations_per_graph=1),
        "1.5 us between graphs in every iteration, not in every tenth. The host's 5 to 10 us are still less than an "
        "iteration, so they stay hidden.",
        lambda side, jobs: 1.5 * 9 / 10,
        cases=((256, 1), (512, 1)),
        same_bits=True,
    ),
    Switch(
        "10 per graph at 1024 px",
        Tuning(max_long_graph_pixels=1024 * 1024),
        "1.5 us in 3,400.",
        lambda side, jobs: -1.5 * 9 / 10,
        cases=((1024, 1), (512, 4)),
        same_bits=True,
    ),
    Switch(
        "frames on the compute stream",
        Tuning(copy_stream=False),
        f"A frame after every {FRAME_EVERY} iterations: they wait for its 3 bytes per pixel on PCIe (50 GB/s), which "
        "the stream of its own hides.",
        frame_stall_us,
        cases=SMALL_AND_LARGE,
        same_bits=True,
        frames=True,
    ),
)
