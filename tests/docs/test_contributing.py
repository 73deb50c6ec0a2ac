"""CONTRIBUTING.md: the files, the tests and the names in its walks exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
# Capitals stand for what a contributor chooses: tests/ROOM/test_NAME.py.
FIXED = [text for text in QUOTED if not re.search(r"ROOM|NAME|FAMILY|\.\.\.", text)]
PATHS = [text for text in FIXED if re.fullmatch(r"[\w./-]+(/|\.(py|cpp|toml|md))|[\w.-]+(/[\w.-]+)+", text)]
NAMES = [text for text in FIXED if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", text) and text not in PATHS]
# Short paths in the walks are in one of these.
PLACES = ["", "server/gramophone_server", "server/gramophone_server/ops", "client/gramophone_client", "tests/support"]
SOURCES = "\n".join(
    path.read_text()
    for folder in ("proto", "server", "client", "csrc", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".proto", ".h", ".cpp", ".cu"} and path != Path(__file__)
)
FILES = {path.name for path in (ROOT / "csrc").rglob("*")} | {path.name for path in (ROOT / "tests").rglob("*.py")}


def test_the_page_is_read() -> None:
    assert len(PATHS) > 20 and len(NAMES) > 20


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert path in FILES or any((ROOT / place / path).exists() for place in PLACES), f"CONTRIBUTING.md names {path}"


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    for part in re.findall(r"\w{2,}", name.partition("(")[0]):
        assert re.search(rf"\b{part}\b", SOURCES), f"CONTRIBUTING.md names {name}"


def test_the_tests_that_walks_run_exist() -> None:
    named = re.findall(r"(?<![\w/])tests/[\w/]+(?:\.py)?", "\n".join(re.findall(r"^ +.*pytest .*", PAGE, re.MULTILINE)))
    assert len(named) > 10
    assert [path for path in named if not re.search(r"[A-Z]{2}", path) and not (ROOT / path).exists()] == []
