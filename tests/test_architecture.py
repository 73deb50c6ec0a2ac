"""docs/architecture.md is true: the paths and names in it exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SERVER = ROOT / "server" / "gramophone_server"
CLIENT = ROOT / "client" / "gramophone_client"
PATHS = sorted(set(re.findall(r"(?<![\w./])(?:[\w-]+/)+(?:[\w-]+\.(?:py|cpp|toml)|(?![\w<.]))", PAGE)))
MEMBERS = sorted(set(re.findall(r"\b([A-Z]\w+)\.([A-Za-z_]\w*)", PAGE)))
WORDS = sorted(set(re.findall(r"`([A-Za-z_]\w+)`", PAGE)))

PLACED = [line for line in PAGE.splitlines() if re.search(r"^    .*[a-z]\w+\(?.*  +.*\b\w+/\w+\.py", line)]


def definitions() -> tuple[dict[str, set[str]], set[str]]:
    """The members of each class of the server and the client, and all names that their modules define."""
    members: dict[str, set[str]] = defaultdict(set)
    names: set[str] = set()
    for path in (*SERVER.rglob("*.py"), *CLIENT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ClassDef():
                    names.add(node.name)
                    members[node.name] |= {
                        item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                    }
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    names.add(node.name)
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
    return members, names


CLASSES, NAMES = definitions()


def test_the_page_is_read() -> None:
    assert len(PATHS) > 30 and len(MEMBERS) > 30 and len(WORDS) > 20


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists() or (SERVER / path).exists(), f"docs/architecture.md names {path}"


@pytest.mark.parametrize(("owner", "member"), MEMBERS)
def test_members_exist(owner: str, member: str) -> None:
    assert member in CLASSES[owner], f"docs/architecture.md names {owner}.{member}"


@pytest.mark.parametrize("line", PLACED)
def test_what_stands_beside_a_path_is_defined_there(line: str) -> None:
    paths = [SERVER / path for path in re.findall(r"\b\w+/\w+\.py", line)]
    defined = {
        node.name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert defined & set(re.findall(r"[A-Za-z_]\w+", line)), f"docs/architecture.md: {line.strip()}"


@pytest.mark.parametrize("word", WORDS)
def test_names_exist(word: str) -> None:
    others = {"main", "detach_grace", "gramophone", *(path.name for path in SERVER.iterdir())}
    assert word in NAMES | CLASSES["Servicer"] | others, word


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_rooms_are_those_of_the_contract(side: str) -> None:
    layers = re.search(
        rf'containers = \["gramophone_{side}"\]\s*layers = \[(.*?)\]', (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert layers is not None
    contract = [room for layer in re.findall(r'"([^"]+)"', layers[1]) for room in layer.split(" | ")]
    rooms = next(part for part in PAGE.split(f"## The {side}'s rooms")[1].split("\n\n") if part.startswith("    "))
    assert re.findall(r"^    (?:  \| )?(\w+)  ", rooms, re.MULTILINE) == contract
