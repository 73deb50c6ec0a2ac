"""The README and the pages of docs/ as they are written: links, commands and code."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.rpc import code_pb2

import gramophone_client
from gramophone.recipe import RecipeOverrides
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import GramophoneClient, errors
from gramophone_client.commands.parser import parse
from gramophone_client.types.options import JobOptions
from gramophone_server import command_line

ROOT = Path(__file__).parents[2]
INCLUDING = {
    "results.md",
    "changelog.md",
    "contributing.md",
}  # include a page of another folder, which has links of its own
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name not in INCLUDING
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ *(?:if ! )?(?:\.venv/bin/)?(gramophone(?:-server)?) ([^;>\n]*)", re.MULTILINE)
MAX_README_LINES = 130
CLIENT_METHODS = {name: value for name, value in vars(GramophoneClient).items() if inspect.isfunction(value)}
JOB_OPTIONS = JobOptions.__annotations__.keys() | RecipeOverrides.__annotations__.keys()


def read(name: str) -> str:
    return (ROOT / name).read_text()


def without_code(text: str) -> str:
    """A page without its blocks of code and quoted names."""
    text = re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def blocks(name: str) -> Iterator[tuple[str, str]]:
    """The blocks of code of a page, as (language, code). Indented ones are of a shell."""
    text = read(name)
    for language, code in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield language, code
    for code in re.findall(r"(?:^    .*\n|^\n(?=    ))+", FENCED.sub("", text), re.MULTILINE):
        yield "sh", re.sub(r"^    ", "", code, flags=re.MULTILINE)


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them, and its explicit ones."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^\(([\w-]+)\)=$", read(name), re.MULTILINE))


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))
    if page == "README.md":
        assert len(links) > 20
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            name = target.relative_to(ROOT).as_posix()
            if name == "docs/results.md":
                name = "benchmarks/RESULTS.md"
            assert anchor in anchors(name), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_parser(page: str) -> None:
    for language, code in blocks(page):
        if language not in ("sh", ""):
            continue
        found = re.findall(COMMAND, code.replace("\\\n", " "))
        for program, line in found:
            words = shlex.split(line, comments=True)
            if program == "gramophone" and "--help" not in words:
                parse(words)
            elif program == "gramophone-server" and "--help" not in words:
                command_line.load(words, {})


def test_commands_are_found() -> None:
    found = [
        code
        for page in PAGES
        for _, code in blocks(page)
        if re.search(r"^(\.venv/bin/)?gramophone ", code, re.MULTILINE)
    ]
    assert len(found) > 10


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_use_the_client_as_it_is(page: str) -> None:
    for language, code in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "gramophone_client":
                assert {alias.name for alias in node.names} <= set(gramophone_client.__all__), page
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            if re.fullmatch(r"client\.\w+", call):
                method = CLIENT_METHODS[call.removeprefix("client.")]
                parameters = inspect.signature(method).parameters
                assert keywords <= parameters.keys() | (JOB_OPTIONS if "job" in parameters else set()), (
                    f"{page}: {call}"
                )
            elif call in gramophone_client.__all__ and inspect.isclass(value := getattr(gramophone_client, call)):
                assert keywords <= inspect.signature(value).parameters.keys(), f"{page}: {call}"


# Errors ---------------------------------------------------------------------------------------------------------------


def error_rows() -> list[list[str]]:
    lines = re.findall(r"^\| (`[A-Z_]+` \|.*) \|$", read("docs/reference/errors.md"), re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_error_page_has_every_reason_with_its_code_and_exception() -> None:
    described = {}
    for reason, to_do, names in error_rows():
        code, exception = names.split("<br>")
        described[reason.strip("`")] = (code, exception.strip("`"))
        assert len(to_do) > 20
    # The comment of a reason in the proto starts with its code.
    source = read("proto/gramophone/v1/style_transfer.proto").partition("enum ErrorReason")[2]
    comments = re.findall(r"((?:^  // .*\n)+)  ERROR_REASON_(\w+) =", source, re.MULTILINE)
    codes = {reason: re.sub(r"\s*//\s*", "", comment).partition(":")[0] for comment, reason in comments}
    reasons = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.DESCRIPTOR.values_by_name}
    assert codes.keys() == reasons - {"UNSPECIFIED"}
    assert set(codes.values()) <= set(code_pb2.Code.keys())
    assert described == {reason: (code, errors.REASONS[reason].__name__) for reason, code in codes.items()}


# RPCs -----------------------------------------------------------------------------------------------------------------


def test_the_table_of_rpcs_lists_every_rpc() -> None:
    rows = re.findall(r"^\| (`\w+`.*?) \| \w", read("docs/reference/rpcs.md"), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(pb.DESCRIPTOR.services_by_name["StyleTransferService"].methods_by_name)
