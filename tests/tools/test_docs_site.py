"""tools/docs_site: docstrings, comments and generated references."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypedDict

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from docs_site import GENERATORS, replace_markers
from docs_site.command_line import described
from docs_site.docstrings import described_fields, examples_marked, field_comments, linked, written_signature
from docs_site.proto import Proto, messages, rpcs
from docs_site.settings import limits_markdown, number, prose, size
from gramophone.recipe import Recipe
from gramophone_client.types.options import FrameOptions, ImageInput, JobOptions


@dataclass
class Values:
    """A value."""

    size: int  # pixels
    # Above it,
    # in two lines.
    depth: int = 3
    plain: str = "# no comment"


class Options(TypedDict, total=False):
    """Options."""

    seed: int  # of the noise.


class Kind(StrEnum):
    """Kinds."""

    FAST = "fast"  # the default
    SLOW = "slow"


class Pair(NamedTuple):
    """A pair."""

    left: int  # first


def test_comments_describe_the_fields_of_values() -> None:
    assert field_comments(Values) == {"size": "Pixels.", "depth": "Above it, in two lines.", "plain": ""}
    assert field_comments(Options) == {"seed": "Of the noise."}
    assert field_comments(Pair) == {"left": "First."}


def test_fields_have_their_types_and_members_their_values() -> None:
    assert described_fields(Pair) == {"left": ("int", "First.")}
    assert described_fields(Kind) == {"FAST": ("'fast'", "The default."), "SLOW": ("'slow'", "")}
    assert described_fields(str) == {}
    assert described_fields(JobOptions)["detach_grace"][1].startswith("Seconds for which the job continues")
    assert described_fields(JobOptions).keys() == JobOptions.__annotations__.keys()
    assert described_fields(Recipe)["beta"] == ("float", "Weight of the style: the strength of the painting.")


def test_signatures_are_as_written() -> None:
    def method(
        self: object,
        image: ImageInput,
        *,
        frames: FrameOptions | None = FrameOptions(max_side=64),  # noqa: B008  (frozen)
        size: int = 3,
    ) -> Pair:
        """A method."""

    @functools.wraps(method)
    def wrapper(*arguments: object) -> None:
        """Does something before."""

    wrapper.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    shown = "(image: ImageInput, *, frames: FrameOptions | None = FrameOptions(max_side=64), size: int = 3)"
    assert written_signature(wrapper) == (shown, "Pair")


def test_examples_become_code_and_prose_does_not() -> None:
    docstring = ["Does it.", "", "with client() as c:", "    c.go()", "", "Returns a `Frame`s list.", "", "None."]
    assert "\n".join(examples_marked(docstring)).split("\n") == [
        "Does it.",
        "",
        ".. code-block:: python",
        "",
        "   with client() as c:",
        "       c.go()",
        "",
        "Returns a :py:obj:`Frame`\\ s list.",
        "",
        "None.",
        "",
    ]


def test_names_become_links_and_other_code_stays_code() -> None:
    assert linked("`stream`") == ":py:obj:`stream`\\ "
    assert linked("`timeout=3`, ``kept``, :py:obj:`kept`") == "``timeout=3``\\ , ``kept``, :py:obj:`kept`"
    assert linked("`.frame`") == "``.frame``\\ "


FILE = """
name: "a.proto" package: "a.v1"
message_type {
  name: "JobSpec"
  field { name: "size" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "kind" number: 2 type: TYPE_ENUM type_name: ".a.v1.Kind" label: LABEL_REPEATED }
}
enum_type { name: "Kind" value { name: "KIND_FAST" number: 0 } }
service {
  name: "S"
  method { name: "RunJob" input_type: ".a.v1.JobSpec" output_type: ".a.v1.JobSpec" server_streaming: true }
}
source_code_info {
  location { path: [4, 0] leading_comments: " A JobSpec for RunJob.\\n" }
  location {
    path: [4, 0, 2, 0]
    leading_comments: " In max_size * 2,\\n at most. See JobSpec.kind.\\n\\n Or KIND_FAST.\\n"
  }
  location { path: [6, 0, 2, 0] leading_comments: " Runs a JobSpec.\\n" }
}
"""
PROTO = Proto(text_format.Parse(FILE, FileDescriptorProto()))


def test_the_reference_of_a_proto_has_types_comments_and_links() -> None:
    assert messages(PROTO) == (
        "## Messages\n\n"
        "(proto-jobspec)=\n### JobSpec\n\n"
        "A `JobSpec` for [`RunJob`](#proto-runjob-rpc).\n\n"
        "`size` · `int32` · 1\n"
        ": In `max_size` \\* 2, at most. See `JobSpec.kind`.\n\n  Or [`KIND_FAST`](#proto-kind).\n\n"
        "`kind` · repeated [`Kind`](#proto-kind) · 2\n: <!-- -->\n\n"
        "## Enums\n\n"
        "(proto-kind)=\n### Kind\n\n\n\n"
        "`KIND_FAST` · 0\n: <!-- -->\n"
    )


def test_the_reference_of_a_service_has_its_rpcs() -> None:
    described = rpcs(PROTO)
    assert "(proto-runjob-rpc)=\n## RunJob\n" in described
    assert "rpc RunJob(JobSpec) returns (stream JobSpec)" in described
    assert "Runs a [`JobSpec`](#proto-jobspec)." in described


def test_descriptions_of_commands_keep_indented_parts() -> None:
    prose, codes, last = described("Follow `gramophone stylize --detach`\nto its end.\n\ncodes:\n  0  done\n\nMore.")
    assert [type(child).__name__ for child in prose.children] == ["Text", "literal", "Text"]
    assert codes.astext() == "codes:\n  0  done" and codes.tagname == "literal_block"
    assert last.astext() == "More."


def test_markers_are_replaced_and_unknown_ones_are_errors() -> None:
    page = replace_markers("# Presets\n\n<!-- generated: presets -->\n")
    assert page.startswith("# Presets\n\n| field | `fast` |") and "<!--" not in page
    with pytest.raises(KeyError, match="prezets"):
        replace_markers("<!-- generated: prezets -->")
    assert all(generate() for generate in GENERATORS.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2**28, "268435456"),
        (32_000_000, "32000000"),
        (50051, "50051"),
        (0.02, "0.02"),
        (1e15, "1e+15"),
    ],
)
def test_numbers_can_be_typed(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1024, "1024"),
        (2**20 + 1, "1048577"),
        (64 * 2**20, "67108864 (64 MiB)"),
        (2**36, "68719476736 (64 GiB)"),
    ],
)
def test_sizes_can_be_typed_and_read(value: int, text: str) -> None:
    assert size(value) == text


def test_only_bytes_are_shown_as_sizes() -> None:
    limits = limits_markdown()
    assert "(10 MiB)" in limits
    assert "Largest decoded image in pixels. Default 32000000, allowed 256 to 268435456." in limits


def test_help_texts_become_sentences() -> None:
    assert prose("longest detach_grace with --engine fake") == "Longest `detach_grace` with `--engine` fake."
