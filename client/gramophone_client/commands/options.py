"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

from gramophone_client.async_client import DEFAULT_TIMEOUT_S
from gramophone_client.console.arguments import complete, path_with, seconds, seconds_above_0, whole_number
from gramophone_client.console.targets import BUILT_IN_ADDRESS, metadata_entry
from gramophone_client.console.timelapse import film_format
from gramophone_client.types.picture import format_of

__all__ = ["add_detach", "add_display", "add_job", "add_out", "add_server", "add_timeout", "add_watching"]

SERVER_HELP = f"""\
TARGET is HOST:PORT or a name of `gramophone targets`; without it $GRAMOPHONE_TARGET, else $GRAMOPHONE_SERVER, else the
default of `gramophone targets`, else {BUILT_IN_ADDRESS}."""
# shtab's own text for zsh runs the command for each option that uses it, at each TAB, 0.2 s each; _arguments runs the
# text in these braces only to complete this option.
PRINT_NAMES = "gramophone targets --names 2>/dev/null"
TARGET_NAMES = {**shtab.cmd(PRINT_NAMES), "zsh": rf"{{compadd -- \$({PRINT_NAMES})}}"}


def add_job(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the group "job" with JOB_ID."""
    group = parser.add_argument_group("job")
    group.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    return group


def add_out(group: argparse._ActionsContainer) -> None:
    """Adds -o."""
    out = group.add_argument(
        "-o",
        "--out",
        type=path_with(format_of),
        required=True,
        help="picture to write: .png, .jpg or .webp; replaces an existing file",
    )
    complete(out, shtab.FILE)


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Adds the group "watching" with files of frames, the film, and the display."""
    group = parser.add_argument_group("watching")
    frames = group.add_argument(
        "--frames", type=Path, metavar="DIR", help="write every frame as DIR/frame-0001.jpg ..."
    )
    complete(frames, shtab.DIRECTORY)
    group.add_argument(
        "--frame-every", type=whole_number, default=0, metavar="N", help="a frame every N iterations (default: by time)"
    )
    group.add_argument(
        "--frame-size", type=whole_number, default=0, metavar="N", help="longest side of frames (default: full size)"
    )
    film = group.add_argument(
        "--timelapse", type=path_with(film_format), metavar="FILE", help="film of the frames, .gif or .webp"
    )
    complete(film, shtab.FILE)
    add_display(group)


def add_display(group: argparse._ActionsContainer, when: str = "") -> None:
    """Adds --preview and --quiet, which exclude each other. `when` begins their help."""
    display = group.add_mutually_exclusive_group()
    display.add_argument("--preview", action="store_true", help=f"{when}draw the picture in the terminal as it forms")
    display.add_argument("--quiet", action="store_true", help=f"{when}no progress, only errors")


def add_server(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the group "server" with --target, --metadata and --wait."""
    group = parser.add_argument_group("server", SERVER_HELP)
    target = group.add_argument(
        "--target", "--server", dest="target", metavar="TARGET", help="the server; both spellings are the same option"
    )
    complete(target, TARGET_NAMES)
    group.add_argument(
        "--metadata",
        type=metadata_entry,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="send this with every call; may be repeated. Others on this machine can see it in the list of processes, "
        "so tokens belong in the file of targets",
    )
    group.add_argument(
        "--wait", type=seconds, default=0.0, metavar="SECONDS", help="wait this long until it is ready (default 0)"
    )
    return group


def add_timeout(group: argparse._ArgumentGroup) -> None:
    """Adds --timeout."""
    group.add_argument(
        "--timeout",
        type=seconds_above_0,
        metavar="SECONDS",
        help=f"give up after this long (default {DEFAULT_TIMEOUT_S:g}, or the target's)",
    )


def add_detach(
    group: argparse._ArgumentGroup, help: str = "look for the job this long after the connection is lost (default 0)"
) -> None:
    """Adds --detach."""
    group.add_argument("--detach", type=seconds, default=0.0, metavar="SECONDS", help=help)
