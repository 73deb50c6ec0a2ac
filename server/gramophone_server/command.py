"""The command `gramophone-server`: reads the command line before anything that takes long to import.

So `--help`, `--version`, `--print-config` and an invalid setting answer within 0.1 s, instead of after the 2 s that
torch takes to load. `python -m gramophone_server.main` does the same, without that.
"""

from __future__ import annotations

from gramophone_server import command_line

__all__ = ["main"]


def main() -> None:
    """Runs a server until it has drained."""
    settings = command_line.from_command_line()
    from gramophone_server.main import run  # imports torch

    run(settings)


if __name__ == "__main__":
    main()
