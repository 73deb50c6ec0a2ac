"""The switches of an iteration: parts that can be computed in more than one way, and the way that is used.

Every way computes the same objective. Which one is fastest depends on the GPU, so `benchmarks.gpu.switches`
measures them against each other, next to the ratios that were predicted (benchmarks/gpu/predictions.py). If another way
turns out to be faster, its value becomes the default here. Users and operators have no switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BACKWARD_FORMS", "DEFAULT_TUNING", "FORWARD_FORMS", "MEASURED", "Tuning"]

MEASURED = "measured"  # `Autotuner` chooses the form when the network is built
FORWARD_FORMS = ("split", "biased", "fused")  # of `convolutions.CuDnn`
BACKWARD_FORMS = ("flipped", "dgrad")


@dataclass(frozen=True)
class Tuning:
    """A way for each part of an iteration. They make a difference on a GPU only."""

    # The forms of cuDNN's convolutions, or `MEASURED`: of all of them, and exceptions by name ("3_1"). The forward form
    # does not apply to a convolution before a max-pooling, which is computed together with it.
    forward: str = "split"
    forward_of: Mapping[str, str] = field(default_factory=dict)
    backward: str = MEASURED
    backward_of: Mapping[str, str] = field(default_factory=dict)
    # conv1_1 by cuDNN, with image and weights padded to 8 channels, instead of our own kernel.
    padded_forward: bool = False
    padded_backward: bool = False
    persistent_style: bool = False  # see `ops.style_fwd`
    fused_check: bool = False  # `ops.tv_check_finite_` instead of `ops.tv_` and `ops.check_finite_`
    # Launching a graph costs the host about 5 to 10 us (an estimate; `make gpu-check` measures it): a twentieth of an
    # iteration at 256 px, nothing at 1024 px. Ten iterations per graph make this small; more would only make the graph
    # longer to build. `max_long_graph_pixels` are those of the whole batch; above this a graph has one iteration.
    iterations_per_graph: int = 10
    max_long_graph_pixels: int = 512 * 512
    copy_stream: bool = True  # pictures are copied to the host on a stream of their own, beside the iterations

    def __post_init__(self) -> None:
        """Raises `ValueError` for a form that does not exist."""
        known = {"forward": (*FORWARD_FORMS, MEASURED), "backward": (*BACKWARD_FORMS, MEASURED)}
        for way, forms in known.items():
            for form in (getattr(self, way), *getattr(self, f"{way}_of").values()):
                if form not in forms:
                    raise ValueError(f"a {way} form is {', '.join(forms)}, got {form!r}")
        if self.iterations_per_graph < 1:
            raise ValueError(f"a graph has at least one iteration, got {self.iterations_per_graph}")

    def forward_form(self, convolution: str) -> str:
        """The form of the forward pass of ``convolution``, such as "3_1"."""
        return self.forward_of.get(convolution, self.forward)

    def backward_form(self, convolution: str) -> str:
        """The form of the backward pass of ``convolution``, such as "3_1"."""
        return self.backward_of.get(convolution, self.backward)


DEFAULT_TUNING = Tuning()
