"""A folder with all that a GPU machine without a network needs for `make gpu-check`, and its use there.

    make gpu-bundle                     # here: fills gpu-bundle/; needs nvcc, Python 3.12 and a network
    make gpu-rehearsal                  # here: all calls of the check on the CPU, with the bundle and without a network
    make gpu-check CALL=a               # on the GPU machine: one call of the check
    PYTHONPATH=tools python3 -m gpu_bundle run --call a       # the same without make

GPU time is scarce, so nothing is compiled or installed there that can be compiled or installed before. The folder has

    ops/             the extension `_C` for sm_90, and for the Python and the torch of machine.txt
    site/            Python packages that the machine lacks, with the network's weights
    manifest.json    what they were made from and for, and checksums

`run` compares the manifest with the machine and the sources. If the ops do not fit, it states why and compiles them.
"""

from __future__ import annotations

import argparse
import sys

from gpu_bundle import making, rehearsal, use


def main() -> int:
    """Runs one of the commands and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="fill the folder")
    rehearse = commands.add_parser("rehearse", help="run the calls on the CPU, from a copy of what would travel")
    rehearse.add_argument("--calls", default="a,b,c", help="which calls, with commas")
    commands.add_parser("fits", help="state whether the folder fits this machine; exit code 1 if not")
    commands.add_parser("run", help="run the GPU check; all further arguments are those of the check", add_help=False)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "run":
        return use.run(rest)
    if rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    match arguments.command:
        case "make":
            making.make()
            return 0
        case "rehearse":
            return rehearsal.rehearse(arguments.calls.split(","))
        case _:
            reason = use.misfit()
            print(reason or "the bundle fits this machine")
            return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
