"""tools/release_check: what it finds, and its whole way with the client. The wheel of the server takes minutes."""

from __future__ import annotations

import io
import tarfile
import zipfile
from datetime import date
from pathlib import Path

import pytest

from release_check import building, changelog, contents, environment, metadata, trial
from tests.support.processes import Server

TODAY = date(2026, 11, 28)
FILES = building.listed()
RELEASED = changelog.released((building.ROOT / "CHANGELOG.md").read_text())[0].version


# The change log -------------------------------------------------------------------------------------------------------


def test_a_change_log_with_dated_releases_is_right() -> None:
    text = (
        "# Changelog\n\n## [Unreleased]\n\n- a\n- b\n  c\n\n## [0.2.0] - 2026-11-28\n\n- d\n\n## [0.1.0] - 2026-11-23\n"
    )
    assert changelog.problems(text, TODAY) == []
    assert changelog.unreleased(text) == 2
    assert changelog.released(text)[0] == ("0.2.0", "2026-11-28")


@pytest.mark.parametrize(
    ("headings", "problem"),
    [
        ("## [0.1.0]", "release 0.1.0 needs a date such as 2026-11-23, got ''"),
        ("## [0.1.0] - Friday", "release 0.1.0 needs a date such as 2026-11-23, got 'Friday'"),
        ("## [0.1.0] - 2026-11-29", "release 0.1.0 is dated 2026-11-29, and today is 2026-11-28"),
        ("## [0.1.0] - 2026-11-01\n## 0.0.1", "'## 0.0.1' is neither '## [Unreleased]' nor like"),
        ("## [0.9.0] - 2026-11-02\n## [0.10.0] - 2026-11-01", "0.9.0 of 2026-11-02 is above 0.10.0 of 2026-11-01"),
        ("## [0.2.0] - 2026-11-01\n## [0.1.0] - 2026-11-02", "0.2.0 of 2026-11-01 is above 0.1.0 of 2026-11-02"),
    ],
)
def test_wrong_headings_are_named(headings: str, problem: str) -> None:
    (found,) = changelog.problems(headings + "\n", TODAY)
    assert problem in found


def test_a_change_log_without_a_release_ends_the_check() -> None:
    with pytest.raises(SystemExit, match="has no release, a heading such as"):
        changelog.released("## [Unreleased]\n")


# Files ----------------------------------------------------------------------------------------------------------------


def make_wheel(path: Path, *names: str, without: str = "", metadata: str = "") -> Path:
    """A wheel with the files of the client, without one and with others."""
    modules = contents.modules_of(FILES, contents.CLIENT)
    info = {f"gramophone-1.0.dist-info/{name}" for name in contents.DIST_INFO}
    with zipfile.ZipFile(path, "w") as wheel:
        for name in modules | info | set(names):
            if name != without:
                wheel.writestr(name, metadata if name.endswith("/METADATA") else "")
    return path


@pytest.mark.parametrize(
    ("name", "more", "without", "problem"),
    [
        ("a-py3-none-any.whl", [], "gramophone_client/py.typed", "has no gramophone_client/py.typed"),
        ("a-py3-none-any.whl", ["tests/test_a.py"], "", "has tests/test_a.py, which does not belong there"),
        ("a-py3-none-any.whl", ["csrc/schemas.cpp"], "", "has csrc/schemas.cpp, which does not belong there"),
        ("a-py3-none-any.whl", ["gramophone_server/_C.so"], "", "['gramophone_server/_C.so'], expected none"),
        ("a-cp311-cp311-linux_x86_64.whl", [], "", "a wheel of pure Python ends in -py3-none-any.whl"),
        ("a-py3-none-any.whl", [], "", None),
    ],
)
def test_files_of_a_wheel_that_do_not_belong_there_are_named(
    tmp_path: Path, name: str, more: list[str], without: str, problem: str | None
) -> None:
    found = contents.wheel_problems(make_wheel(tmp_path / name, *more, without=without), FILES, server=False)
    assert not found if problem is None else [each for each in found if problem in each] == found != []


def test_tests_in_an_sdist_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in {"proto/a.py", "csrc/a.h", *building.ROOT_FILES, "PKG-INFO", "tests/test_a.py"}:
            archive.addfile(tarfile.TarInfo(f"gramophone-1.0/{name}"), io.BytesIO())
    files = ["proto/a.py", "csrc/a.h", "tools/a.py"]
    assert contents.sdist_problems(tmp_path / "a.tar.gz", files) == ["has tests/test_a.py, which does not belong there"]


# Metadata -------------------------------------------------------------------------------------------------------------


def test_what_an_index_cannot_show_is_named(tmp_path: Path) -> None:
    headers = "Name: gramophone\nVersion: 0.9\nSummary: s\nKeywords: k\nLicense-Expression: MIT\nRequires-Python: 3\n"
    headers += "Classifier: Topic :: Games\nProject-URL: a, b\nDescription-Content-Type: text/plain\n\n"
    text = "[a](https://a.example) [b](#b) ![c](c.png) [d](d.md)"
    wheel = make_wheel(tmp_path / "a.whl", metadata=headers + text)
    assert metadata.problems([wheel], "1.0") == [
        "a.whl has the version 0.9, and CHANGELOG.md 1.0",
        "a.whl has no classifier 'Typing :: Typed'",
        "a.whl: its long description is not text/markdown",
        "a.whl: [c](c.png) works in the repository alone",
        "a.whl: [d](d.md) works in the repository alone",
    ]


# Environments ---------------------------------------------------------------------------------------------------------


def test_the_packages_of_an_environment_are_those_that_are_required() -> None:
    light = environment.closure(["rich>=14", "pytest; extra == 'dev'", "pywin32; sys_platform == 'win32'"], [])
    assert light == {"rich", "markdown-it-py", "mdurl", "pygments"}
    assert "pytest" in environment.closure(["rich>=14", "pytest; extra == 'dev'"], ["dev"])
    with pytest.raises(SystemExit, match=r"no-such-package is required and is not in .venv: make install"):
        environment.closure(["no-such-package"], [])


def test_a_build_that_fails_ends_the_check_with_its_output() -> None:
    with pytest.raises(SystemExit, match=r"building: exit code 3\n.*no compiler"):
        building.run("building", ["sh", "-c", "echo no compiler; exit 3"])


# The whole way with the client ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return building.sdist(FILES, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return building.wheel(sdist, tmp_path_factory.mktemp("wheel"), client_only=True)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment.make(tmp_path_factory.mktemp("client") / "env", wheel, extras=())


def test_the_sdist_and_the_wheel_of_the_client_have_their_files(sdist: Path, wheel: Path) -> None:
    assert contents.sdist_problems(sdist, FILES) == []
    assert contents.wheel_problems(wheel, FILES, server=False) == []


def test_the_metadata_of_the_client_can_be_shown(wheel: Path) -> None:
    assert metadata.problems([wheel], RELEASED) == []
    assert "# Gramophone" in str(metadata.read(wheel).get_payload())


def test_the_client_needs_neither_torch_nor_the_server(python: Path, tmp_path: Path) -> None:
    assert environment.problems(python) == []
    program = "import gramophone_client.cli, importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))"
    assert trial.output([python, "-c", program], tmp_path) == (0, "None None")
    code, _ = trial.output([python, "-c", "import gramophone_server"], tmp_path)
    assert code == 1


def test_a_user_of_the_installed_client_sees_its_types(python: Path, tmp_path: Path) -> None:
    assert trial.type_problems(python, tmp_path / "types") == []


def test_without_its_marker_the_client_has_no_types(wheel: Path, tmp_path: Path) -> None:
    untyped = environment.make(tmp_path / "env", wheel, extras=())
    (marker,) = untyped.parent.parent.glob("lib/*/site-packages/gramophone_client/py.typed")
    marker.unlink()
    (problem,) = trial.type_problems(untyped, tmp_path / "types")
    assert problem.startswith("mypy does not see the types of the installed client")


def test_the_installed_client_has_the_released_version(python: Path, tmp_path: Path) -> None:
    assert trial.output([python.parent / "gramophone", "--version"], tmp_path) == (0, f"gramophone {RELEASED}")


def test_the_installed_client_paints_a_picture(python: Path, tmp_path: Path) -> None:
    with Server("--engine", "fake", cwd=tmp_path) as server:
        assert trial.stylize_problems(python, server.address, tmp_path) == []
    (problem,) = trial.stylize_problems(python, "127.0.0.1:1", tmp_path)
    assert problem.startswith("the client ended with 3: ")
