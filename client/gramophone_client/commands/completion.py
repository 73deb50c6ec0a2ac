"""`gramophone completion`: the script that completes commands, options and values in a shell."""

from __future__ import annotations

import argparse

import shtab

__all__ = ["SHELLS", "completion"]

# Where each shell looks for the script.
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/gramophone",
    "zsh": "DIR/_gramophone, for a DIR of $fpath",
    "fish": "~/.config/fish/completions/gramophone.fish",
}


def completion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Prints the script for `parser`, the parser of all commands."""
    print(shtab.complete(parser, args.shell))
