"""The reference of the command line, as sphinx-argparse-cli makes it: the format of its descriptions."""

from __future__ import annotations

import re

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.application import Sphinx

__all__ = ["connect", "described"]


def connect(app: Sphinx) -> None:
    """Connects the handler below."""
    app.connect("doctree-read", _on_doctree)


def _on_doctree(app: Sphinx, document: nodes.document) -> None:
    """Formats the descriptions, which sphinx-argparse-cli takes as one text.

    An indented part stays as it is, and `name` is code.
    """
    for paragraph in list(document.findall(nodes.paragraph)):
        text = paragraph.astext()
        is_plain = all(isinstance(child, nodes.Text) or type(child) is nodes.inline for child in paragraph.children)
        if is_plain and re.search(r"`[^`]+`|\n\n|\n ", text):
            paragraph.parent.replace(paragraph, described(text))


def described(text: str) -> list[nodes.Node]:
    """The paragraphs of a description: those with indented lines as they are, the others as prose."""
    parts = []
    for part in text.strip("\n").split("\n\n"):
        if re.search(r"^ ", part, re.MULTILINE):
            parts.append(nodes.literal_block(part, part, language="text"))
            continue
        pieces = enumerate(re.split(r"`([^`]+)`", part))
        parts.append(nodes.paragraph("", "", *(nodes.literal(text=p) if i % 2 else nodes.Text(p) for i, p in pieces)))
    return parts
