import ast
import inspect
import pydoc
from typing import Unpack, get_type_hints

import pytest

from gramophone.recipe import FIELD_TYPES, PRESETS, RecipeOverrides
from gramophone_client import AsyncGramophoneClient, AsyncJobControl, GramophoneClient, JobControl
from gramophone_client.types.options import OPTIONS, Changes, JobOptions
from gramophone_client.types.signatures import shows_options


class Client:
    @shows_options
    async def stylize(self, content: str, *, timeout: float | None = None, **job: Unpack[JobOptions]) -> int:
        """Paints.

        More.
        """
        return sum(len(name) for name in job)

    @shows_options
    def update(self, **changes: Unpack[Changes]) -> dict:
        """Changes."""
        return dict(changes)


def parameters(function):
    return inspect.signature(function).parameters


def test_every_option_is_a_keyword_only_parameter():
    assert list(parameters(Client().stylize)) == ["content", "timeout", *OPTIONS, *RecipeOverrides.__annotations__]
    assert list(parameters(Client.update)) == ["self", *Changes.__annotations__]
    for function in (Client.stylize, Client.update):
        options = [p for name, p in parameters(function).items() if name not in ("self", "content")]
        assert {p.kind for p in options} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_default_is_the_value_of_all_presets_or_says_that_they_differ():
    shown = parameters(Client.stylize)
    for name in FIELD_TYPES:
        values = [getattr(recipe, name) for recipe in PRESETS.values()]
        if all(value == values[0] for value in values):
            expected = {layer: weight for layer, weight in values[0]} if name.endswith("layers") else values[0]
            assert shown[name].default == expected
        else:
            assert repr(shown[name].default) == "<of the preset>"
    assert {name: shown[name].default for name in OPTIONS} == {name: o.default for name, o in OPTIONS.items()}
    assert all(repr(p.default) == "<unchanged>" for name, p in parameters(Client.update).items() if name != "self")


def test_help_shows_types_as_they_are_written_and_a_line_for_each_option():
    text = pydoc.render_doc(Client.stylize, renderer=pydoc.plaintext)
    assert "(\n    self,\n    content: str,\n    *,\n    timeout: float | None = None,\n    preset: " in text
    assert ",\n) -> int\n" in text
    assert "size: int | SupportsIndex = 512" in text
    assert "pooling: Pooling | Literal['max', 'average'] = 'max'" in text
    assert "beta: float | SupportsFloat = <of the preset>" in text
    assert "- `size`: longest side of the result in pixels; 16 to 16384 (default 512)" in text
    assert "- `seed`: seed of the noise, 0 to 2**64-1" in text
    for name in JobOptions.__annotations__:
        assert f"- `{name}`: " in text
    assert max(map(len, inspect.getdoc(Client.stylize).splitlines())) <= 100
    assert inspect.getdoc(Client.stylize).startswith("Paints.\n\nMore.\n\nOptions:\n\n- `preset`: ")


async def test_calls_and_the_types_of_checkers_stay_as_they_are():
    assert await Client().stylize("photo", size=3, beta=2) == 8
    assert Client().update(beta=2) == {"beta": 2}
    assert inspect.iscoroutinefunction(Client.stylize)
    assert get_type_hints(Client.stylize)["job"] == Unpack[JobOptions]


@pytest.mark.parametrize("client", [GramophoneClient, AsyncGramophoneClient])
@pytest.mark.parametrize("method", ["stylize", "stream", "control"])
def test_the_methods_of_the_clients_show_all_options(client, method):
    function = getattr(client, method)
    assert JobOptions.__annotations__.keys() <= parameters(function).keys()
    assert "job" not in parameters(function)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert "\n    content: ImageInput,\n    styles: Styles,\n    *,\n" in text
    assert "\n    - `size`: longest side of the result in pixels; 16 to 16384 (default 512)\n" in text
    assert get_type_hints(function)["job"] == Unpack[JobOptions]


@pytest.mark.parametrize("control", [JobControl, AsyncJobControl])
def test_the_changes_of_a_controller_are_shown(control):
    assert list(parameters(control.update)) == ["self", *Changes.__annotations__]


def test_the_signature_is_one_of_python():
    (definition,) = ast.parse(f"def stylize{inspect.signature(Client.update)}: ...".replace("<unchanged>", "...")).body
    assert [argument.arg for argument in definition.args.kwonlyargs] == list(Changes.__annotations__)
    bound = inspect.signature(Client().stylize).bind("photo.jpg", size=64)
    assert bound.arguments == {"content": "photo.jpg", "size": 64}


def test_a_function_without_options_is_refused():
    with pytest.raises(TypeError, match=r"upload has no \*\*image: Unpack"):

        @shows_options
        def upload(image: str) -> None:
            """Uploads."""
