"""The Sphinx extension of docs/: references generated from the product, and docstrings as this project writes them.

A line `<!-- generated: NAME -->` in a page is replaced by the Markdown of one generator before the page is parsed, so
generated headings, links and definitions are those of any other page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sphinx.application import Sphinx

from docs_site import command_line, docstrings, errors, proto, recipe, settings

__all__ = ["GENERATORS", "MARKER", "replace_markers", "setup"]

MARKER = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
GENERATORS: Mapping[str, Callable[[], str]] = {
    "rpcs": lambda: proto.rpcs(proto.load()),
    "messages": lambda: proto.messages(proto.load()),
    "recipe-fields": recipe.fields_markdown,
    "presets": recipe.presets_markdown,
    "limits": settings.limits_markdown,
    "settings": settings.settings_markdown,
    "exceptions": errors.exceptions_markdown,
}


def replace_markers(text: str) -> str:
    """The page with its generated parts. Raises KeyError for a marker without a generator."""
    return MARKER.sub(lambda marker: GENERATORS[marker[1]](), text)


def _on_source_read(app: Sphinx, document: str, source: list[str]) -> None:
    if MARKER.search(source[0]):
        source[0] = replace_markers(source[0])
        app.env.note_reread()  # what it is generated from may change without the page


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _on_source_read)
    command_line.connect(app)
    docstrings.connect(app)
    return {"parallel_read_safe": True}
