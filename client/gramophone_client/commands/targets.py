"""`gramophone targets`: the named targets, and which one is used."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gramophone_client.console.targets import Target, TargetsFile, chosen_target, targets_path

__all__ = ["targets"]

EXAMPLE = """\
no such file; with one, `--target studio` would name a server:

  default = "studio"

  [targets.studio]
  address = "gpu-1.example:50051"
  timeout = 600

  [targets.studio.metadata]
  authorization = "Bearer ..."
"""


def targets(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError` and OSError."""
    file = TargetsFile.read(targets_path())
    if args.names:
        for name in file.targets:
            print(name)
        return
    used = chosen_target(args, file)
    if args.json:
        named = {name: _properties(target) for name, target in file.targets.items()}
        used_now = {"source": used.source, "name": used.name or None} | _properties(used)
        report = {"file": str(file.path), "exists": file.exists, "default": file.default or None, "targets": named}
        print(json.dumps(report | {"used": used_now}, indent=2))
        return
    print(f"file  {file.path}")
    if not file.exists:
        print(EXAMPLE)
    for name, target in file.targets.items():
        print(f"{'*' if name == file.default else ' '} {name}  {_line(target)}")
    print(f"used  {used.name or used.address}, {_source(used, file)}")


def _properties(target: Target) -> dict[str, Any]:
    """The values of metadata are secrets, so only its keys are shown."""
    return {
        "address": target.address,
        "timeout": target.timeout,
        "metadata": [key for key, _ in target.metadata],
    }


def _line(target: Target) -> str:
    words = [target.address]
    if target.timeout is not None:
        words.append(f"timeout {target.timeout:g} s")
    if target.metadata:
        words.append(f"metadata {' '.join(key for key, _ in target.metadata)}")
    return ", ".join(words)


def _source(used: Target, file: TargetsFile) -> str:
    if used.is_built_in:
        return "because nothing else is set"
    return "the default of the file" if used.source == str(file.path) else f"from {used.source}"
