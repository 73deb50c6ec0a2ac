"""The server that a command talks to: from its options, the environment, or the file of named targets.

default = "studio"

[targets.studio]
address = "gpu-1.example:50051"
timeout = 600                      # seconds for a job

[targets.studio.metadata]          # sent with every call
authorization = "Bearer ..."
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gramophone.values import did_you_mean, shown
from gramophone_client.console.display import print_errors
from gramophone_client.console.outputs import UsageError

__all__ = [
    "BUILT_IN_ADDRESS",
    "LOCAL",
    "MAX_BYTES",
    "VARIABLES",
    "Target",
    "TargetsFile",
    "chosen_target",
    "metadata_entry",
    "targets_path",
]

BUILT_IN_ADDRESS = "127.0.0.1:50051"
BUILT_IN, LOCAL = "built in", "--local"  # sources of a target, beside options, variables and files
VARIABLES = ("GRAMOPHONE_TARGET", "GRAMOPHONE_SERVER")  # the first that is set wins
MAX_BYTES = 2**20  # of the file of targets
NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a target; an address has a colon or a dot


@dataclass(frozen=True)
class Target:
    """A server, and what is sent to it with every call."""

    address: str  # as gRPC takes it
    source: str  # what chose it: "--target", "$GRAMOPHONE_TARGET", the path of the file, BUILT_IN or LOCAL
    name: str = ""  # in the file of targets; "" if it is an address
    timeout: float | None = None  # seconds for a job, unless --timeout is given
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # its values are secrets

    @property
    def is_built_in(self) -> bool:
        """Whether no target was chosen."""
        return self.source == BUILT_IN


@dataclass(frozen=True)
class TargetsFile:
    """The file of named targets; without such a file, there are none."""

    path: Path
    exists: bool = False
    default: str = ""  # the name of a target, or ""
    targets: Mapping[str, Target] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> TargetsFile:
        """Reads and checks the file. Raises `UsageError` with everything that is wrong with it, and OSError.

        Prints a warning if the file has metadata and others can read it.
        """
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
                mode = os.fstat(file.fileno()).st_mode
        except FileNotFoundError:
            if os.environ.get("GRAMOPHONE_CONFIG"):
                raise UsageError(f"{path}: there is no such file; $GRAMOPHONE_CONFIG names it") from None
            return cls(path)
        if len(text) > MAX_BYTES:
            raise UsageError(f"{path}: is larger than {MAX_BYTES // 2**20} MiB, so it is another file")
        try:
            data = tomllib.loads(text.decode("utf-8-sig"))  # editors on Windows may write a byte order mark
        except UnicodeDecodeError:
            raise UsageError(f"{path}: is not UTF-8") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UsageError(f"{path}: is not TOML: {error}") from None
        if problems := list(_problems(data)):
            raise UsageError("\n".join(f"{path}: {problem}" for problem in problems))
        targets = {
            name: Target(
                table["address"],
                source=str(path),
                name=name,
                timeout=table.get("timeout"),
                metadata=tuple(table.get("metadata", {}).items()),
            )
            for name, table in data.get("targets", {}).items()
        }
        if os.name == "posix" and mode & 0o044 and any(target.metadata for target in targets.values()):
            print_errors(f"warning: {path} has metadata and other users can read it; chmod 600 {path}")
        return cls(path, True, data.get("default", ""), targets)

    def find(self, name: str, source: str) -> Target:
        """The target of this name, which `source` gave. Raises `UsageError` with the nearest name."""
        if name not in self.targets:
            known = ", ".join(self.targets) or "none"
            raise UsageError(
                f"{source}: there is no target {name!r} in {self.path} (it has {known})"
                f"{did_you_mean(name, self.targets, {}) or '; an address is HOST:PORT'}"
            )
        return replace(self.targets[name], source=source)


def targets_path() -> Path:
    """The path of the file of targets, whether it exists or not."""
    if path := os.environ.get("GRAMOPHONE_CONFIG"):
        return Path(path)
    # The same on every system, as git does it.
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gramophone" / "config.toml"


def chosen_target(args: argparse.Namespace, file: TargetsFile | None = None) -> Target:
    """The target of a command. --target wins over the variables, these over the default of the file, which is read only
    if it is needed and not given. Raises `UsageError` and OSError if it cannot be used then.
    """
    options = {"--target": args.target} | {f"${name}": os.environ.get(name) for name in VARIABLES}
    for source, text in options.items():
        if text:
            if NAME.fullmatch(text):
                target = (file or TargetsFile.read(targets_path())).find(text, source)
            else:
                target = Target(text, source)
            break
    else:
        file = file or TargetsFile.read(targets_path())
        target = file.targets[file.default] if file.default else Target(BUILT_IN_ADDRESS, BUILT_IN)
    if not args.metadata:
        return target
    given = {key for key, _ in args.metadata}
    kept = [(key, value) for key, value in target.metadata if key not in given]
    return replace(target, metadata=(*kept, *args.metadata))


def metadata_entry(text: str) -> tuple[str, str]:
    """An argument type: KEY=VALUE. Its errors do not contain the value, which may be a secret."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("expected KEY=VALUE, got a text without '='")
    for problem in (_key_problem(key), _value_problem(value)):
        if problem:
            raise argparse.ArgumentTypeError(f"{key}: {problem}")
    return key, value


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the file, each with the path of its key."""
    yield from _unknown_keys("", data, ("default", "targets"))
    targets = data.get("targets", {})
    if not isinstance(targets, dict):
        yield "targets: must be a table, like [targets.studio]"
        targets = {}
    for name, table in targets.items():
        path = f"targets.{name}"
        if not NAME.fullmatch(name):
            yield f"{path}: must be named with letters, digits, - and _"
        if not isinstance(table, dict):
            yield f"{path}: must be a table, like [{path}]"  # the value may be a secret in a wrong place
            continue
        yield from _unknown_keys(f"{path}.", table, ("address", "timeout", "metadata"))
        address = table.get("address")
        if not isinstance(address, str) or NAME.fullmatch(address) or not re.fullmatch(r"[!-~]+", address):
            got = "nothing" if address is None else shown(address)
            yield f'{path}.address: must be an address, like "gpu-1:50051", got {got}'
        timeout = table.get("timeout", 1)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            yield f"{path}.timeout: must be a number of seconds above 0, got {shown(timeout)}"
        metadata = table.get("metadata", {})
        if not isinstance(metadata, dict):
            yield f"{path}.metadata: must be a table of texts"
            metadata = {}
        for key, value in metadata.items():
            for problem in (_key_problem(key), _value_problem(value)):
                if problem:
                    yield f"{path}.metadata.{key}: {problem}"
    default = data.get("default")
    if default is not None and (not isinstance(default, str) or default not in targets):
        hint = did_you_mean(default, targets, {}) if isinstance(default, str) else ""
        yield f"default: must be one of the targets ({', '.join(targets) or 'none'}), got {shown(default)}{hint}"


def _unknown_keys(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    others = {"url": "address", "server": "address", "host": "address", "headers": "metadata"}
    for key in (key for key in table if key not in known):
        yield f"{path}{key}: is not known; the keys are {', '.join(known)}{did_you_mean(key, known, others)}"


def _key_problem(key: str) -> str:
    """gRPC's rules for the keys of metadata."""
    if not re.fullmatch(r"[0-9a-z_.-]+", key):
        return "must be named with a-z, 0-9, -, _ and ."
    if key.startswith("grpc-"):
        return "must not start with grpc-, which gRPC uses itself"
    return "must not end in -bin, because its values would be bytes" if key.endswith("-bin") else ""


def _value_problem(value: Any) -> str:
    if not isinstance(value, str):
        return "must be a text"
    fits = value.strip(" ") == value and re.fullmatch(r"[ -~]*", value)  # gRPC drops spaces at the ends
    return "" if fits else "must be printable ASCII without spaces at the ends"
