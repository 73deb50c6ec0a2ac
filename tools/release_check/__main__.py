"""Checks that this checkout can be released: `make release-check`, or `PYTHONPATH=tools python -m release_check`.

It builds the sdist, and from the sdist the wheel of the client and the wheel of the server with its ops. Each wheel is
installed in an environment of its own, and a job runs from one to the other. Nothing is uploaded, and nothing stays.

An environment has the wheel and the packages that its metadata requires, and no others. These are links to the packages
of `.venv`, so that 5 GB of torch are not installed again. twine comes from the package index, so a network is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from release_check import building, changelog, contents, environment, metadata, trial

ROOT = Path(__file__).parent.parent.parent


def main() -> int:
    """Runs all checks and returns 0 if none found a problem."""
    argparse.ArgumentParser(
        prog="release_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="release-check-") as folder:
        found = check(Path(folder))
    if found:
        print("\nthis must not be released:", *found, sep="\n  ", file=sys.stderr)
        return 1
    print("\nno problems")
    return 0


def check(folder: Path) -> list[str]:
    """All problems, each with the name of its check. Files are written to `folder` alone."""
    found: list[str] = []

    def run(name: str, problems: Callable[[], Sequence[str]]) -> None:
        print(f"{name} ... ", end="", flush=True)
        began = time.monotonic()
        new = problems()
        found.extend(f"{name}: {problem}" for problem in new)
        print(f"{'WRONG' if new else 'ok'}, {time.monotonic() - began:.0f} s", flush=True)

    text = (ROOT / "CHANGELOG.md").read_text()
    run("change log", lambda: changelog.problems(text, date.today()))
    version = changelog.released(text)[0].version
    print(f"  version {version}; [Unreleased] has {changelog.unreleased(text)} entries, which are not in it")

    files = building.listed()
    sdist = building.sdist(files, folder / "sdist")
    run("files of the sdist", lambda: contents.sdist_problems(sdist, files))
    client = building.wheel(sdist, folder / "client", client_only=True)
    run("files of the client's wheel", lambda: contents.wheel_problems(client, files, server=False))
    server = building.wheel(sdist, folder / "server", client_only=False)
    run("files of the server's wheel", lambda: contents.wheel_problems(server, files, server=True))

    run("metadata", lambda: metadata.problems([client, server], version))
    run("twine check", lambda: metadata.twine_problems([sdist, client, server], folder / "twine"))
    client_python = environment.make(folder / "client-env", client, extras=())
    server_python = environment.make(folder / "server-env", server, extras=("server",))
    run("the client's environment", lambda: environment.problems(client_python))
    run("the server's environment", lambda: environment.problems(server_python))
    run("types of the client", lambda: trial.type_problems(client_python, folder / "types"))
    run("versions", lambda: trial.version_problems(client_python, server_python, version))
    run("a job", lambda: trial.job_problems(client_python, server_python, folder / "job"))
    return found


if __name__ == "__main__":
    sys.exit(main())
