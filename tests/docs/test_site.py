"""The site as `make docs` builds it: without warnings, complete, and without requests to a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from sphinx.util.inventory import InventoryFile

import gramophone_client
from gramophone.recipe import PRESETS, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.commands.parser import command_line
from gramophone_server.config import Limits, Settings, env_variable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", str(out)],
        cwd=ROOT,
        # A proxy where nothing listens: a build that asks a network fails.
        env=os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return out


class Page(HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev"):
            self.loaded.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values and tag != "a"]


def pages(site: Path) -> Iterator[tuple[Path, Page]]:
    for path in sorted(site.rglob("*.html")):
        yield path, Page(path)


def text(site: Path, page: str) -> str:
    """The text of a page, without tags. Parts of one line are not separated, unlike a term and its definition."""
    html = (site / page).read_text()
    article = html[html.index("<article") : html.index("</article>")]
    apart = re.sub(r"</?(dt|dd|dl|p|li|ul|tr|td|th|h\d|pre|section)\b", r" <\1", article)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", apart)).split())


def test_pages_load_nothing_from_a_network(site: Path) -> None:
    loaded = [(path.name, name) for path, page in pages(site) for name in page.loaded]
    assert len(loaded) > 100
    assert not [entry for entry in loaded if re.match(r"(https?:)?//", entry[1])]
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"""(url\(|@import\s*)["']?(https?:)?//""", path.read_text()), path


def test_links_inside_the_site_lead_somewhere(site: Path) -> None:
    known = {path.resolve(): page for path, page in pages(site)}
    for path, page in known.items():
        for link in page.links:
            if re.match(r"(https?|mailto):", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.relative_to(site)} links to {link}"
            if anchor and target in known:
                assert anchor in known[target].anchors, f"{path.relative_to(site)} links to {link}"


def test_every_public_name_of_the_client_is_in_the_reference(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, target: target)
    documented = {
        name.removeprefix("gramophone_client.")
        for kind, entries in inventory.items()
        if kind.startswith("py:")
        for name in entries
    }
    public = {name for name in gramophone_client.__all__ if not name.startswith("__")}
    assert public <= documented
    for kind in ("GramophoneClient", "AsyncGramophoneClient"):
        methods = [name for name in vars(getattr(gramophone_client, kind)) if not name.startswith("_")]
        assert {f"{kind}.{name}" for name in methods} <= documented


def test_every_message_and_rpc_is_in_the_reference(site: Path) -> None:
    described = text(site, "reference/messages.html")
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert re.search(rf" {field.name} · [^·]+ · {field.number}\b", described), f"{message.name}.{field.name}"
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        for value in enum.values:
            assert f"{value.name} · {value.number}" in described
    for method in pb.DESCRIPTOR.services_by_name["StyleTransferService"].methods:
        assert f"rpc {method.name}(" in text(site, "reference/rpcs.html")


def test_every_limit_and_setting_is_in_the_reference_with_its_default(site: Path) -> None:
    described = text(site, "reference/limits.html")
    for setting in fields(Settings):
        entry = described.partition(f" {env_variable(setting.name)} ")[2].partition(" · GRAMOPHONE_")[0]
        assert entry, setting.name
        if setting.metadata["range"] is not None:
            assert f"Default {setting.default:.10g}" in entry, setting.name
    assert {limit.name for limit in fields(Limits)} <= {setting.name for setting in fields(Settings)}


def test_every_field_of_a_recipe_is_in_the_reference_with_its_range(site: Path) -> None:
    described = text(site, "reference/recipe.html")
    for field in fields(Recipe):
        entry = described.partition(f" {field.name} · --")[2].partition(" · --")[0]
        allowed = field.metadata["range"]
        if allowed is not None:
            assert f"{allowed.low:.10g} to " in entry and f"Default: {field.default:g}" in entry, field.name
    assert all(name in described for name in PRESETS)


def test_every_command_and_flag_is_in_the_reference(site: Path) -> None:
    described = text(site, "reference/command-line.html")
    parser = command_line()
    help_texts = [parser.format_help()]
    (commands,) = [action.choices for action in vars(parser)["_actions"] if isinstance(action.choices, dict)]
    for name, command in commands.items():
        assert f"gramophone {name}" in described
        help_texts.append(command.format_help())
    flags = set(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[\w-]+)", "\n".join(help_texts), re.MULTILINE))
    assert len(flags) > 40
    assert all(flag in described for flag in flags)
