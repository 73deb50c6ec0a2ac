"""The programs on the pages run: whole blocks of Python, against a server with an engine that makes patterns."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import PAINTING, PHOTO, ROOT, Process, Server

# A program, and what it leaves.
PROGRAMS = {
    "README.md": ["out.png", "frame-*.jpg"],
    "docs/tutorial.md": ["glass.png", "frame-*.jpg"],
    "docs/reference/python/index.md": ["out.png"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    with Server("--engine", "fake", "--iter-ms", "1", cwd=tmp_path_factory.mktemp("server")) as server:
        yield server.address


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page: str, server: str, tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    program = re.sub(r'GramophoneClient\((?:"127.0.0.1:50051")?\)', f'GramophoneClient("{server}")', program)
    for name in ("photo.jpg", "coffee.jpg"):
        shutil.copy(PHOTO, tmp_path / name)
    for name in ("painting.jpg", "stained_glass.jpg"):
        shutil.copy(PAINTING, tmp_path / name)
    with Process("-W", "error", "-c", program, cwd=tmp_path) as process:
        assert process.code() == 0, process.output
    for name in PROGRAMS[page]:
        assert list(tmp_path.glob(name)), f"{page}: no {name}"
