"""How long the self-test of the kernels takes when an engine is loaded.

    python -m benchmarks.self_test --device cpu --precision bf16

`first_ms` is the first one of a process, as when a server starts; `again_ms` is the median of the next nine.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.measure import machine, print_table
from gramophone_server.network.precision import choose_precision
from gramophone_server.ops.self_test import choose_kernels

AGAIN = 9


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="auto", help="as of the server")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    mode = choose_precision(arguments.precision, device)
    first, *again = (choose_kernels(device, mode.forward, mode.backward).seconds * 1e3 for _ in range(1 + AGAIN))
    row = {"precision": mode.name, "first_ms": first, "again_ms": statistics.median(again)}
    print_table(f"the self-test of the kernels\n{machine(arguments.device)}", [row])


if __name__ == "__main__":
    main()
