"""A user's script and the examples are clean for mypy and pyright in their strict modes; wrong uses are errors.

Every type of the client is known.

basedpyright is pyright as a package that brings its own Node.js, so that it runs without a network. Its mode "strict"
is pyright's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [str(ROOT / "proto"), str(ROOT / "client")]
WRONG = ROOT / "tests" / "typing" / "wrong_uses.py"
RIGHT = [ROOT / "tests" / "typing" / "user_script.py", *sorted((ROOT / "examples" / "python").glob("*.py"))]
EXPECTED = {
    number: tuple(codes.groups())
    for number, line in enumerate(WRONG.read_text().splitlines(), 1)
    if (codes := re.search(r"# ([\w-]+), (report\w+)$", line))
}

Found = set[tuple[Path, int, str]]  # file, line, code


def run(command: list[str], **settings: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # 1: it found errors
    return ran.stdout


@pytest.fixture(scope="module")
def mypy() -> Found:
    """The errors that mypy finds."""
    flags = ["--strict", "--config-file=", "--follow-imports=silent", "--python-version=3.11", "--output=json"]
    out = run(["mypy", *flags, *map(str, [*RIGHT, WRONG])], MYPYPATH=os.pathsep.join(SOURCES))
    errors = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    paths = {*RIGHT, WRONG}
    # `silent` does not hold for the generated stubs, because they are .pyi files.
    found = ((ROOT / error["file"], error["line"], error["code"]) for error in errors if error["severity"] == "error")
    return {error for error in found if error[0] in paths}


@pytest.fixture(scope="module")
def pyright(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The errors and warnings that pyright finds."""
    config = tmp_path_factory.mktemp("pyright") / "pyrightconfig.json"
    settings: dict[str, Any] = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": SOURCES}
    config.write_text(json.dumps(settings | {"include": [str(path) for path in (*RIGHT, WRONG)]}))
    out = run(["basedpyright", "--project", str(config), "--pythonpath", sys.executable, "--outputjson"])
    errors = json.loads(out)["generalDiagnostics"]
    return {(Path(error["file"]), error["range"]["start"]["line"] + 1, error.get("rule", "")) for error in errors}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_script_and_the_examples_have_no_errors(checker: str, request: pytest.FixtureRequest) -> None:
    errors: Found = request.getfixturevalue(checker)
    assert not {error for error in errors if error[0] != WRONG}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_wrong_uses_are_errors_and_nothing_else_is(checker: str, request: pytest.FixtureRequest) -> None:
    assert len(EXPECTED) > 20
    errors: Found = request.getfixturevalue(checker)
    found = {(line, code) for path, line, code in errors if path == WRONG}
    expected = {(line, codes[checker == "pyright"]) for line, codes in EXPECTED.items()}
    assert expected <= found
    assert {line for line, _ in found} == EXPECTED.keys()


@pytest.mark.parametrize("package", ["gramophone_client", "gramophone"])
def test_every_type_is_known(package: str) -> None:
    path = os.pathsep.join([*SOURCES, sysconfig.get_path("purelib")])
    flags = ["--verifytypes", package, "--ignoreexternal", "--outputjson"]
    symbols = json.loads(run(["basedpyright", *flags], PYTHONPATH=path))["typeCompleteness"]["symbols"]
    generated = ("gramophone.v1.", "gramophone.wire.")  # and what has generated types
    own = [symbol for symbol in symbols if symbol["isExported"] and not symbol["name"].startswith(generated)]
    assert len(own) > 100
    assert not [symbol["name"] for symbol in own if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
