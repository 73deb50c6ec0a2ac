"""Each old name still works for one release, and warns with the new one at the caller's line."""

import asyncio
import contextlib
import importlib.metadata
import threading

import pytest

import gramophone_client
from gramophone import recipe
from gramophone_client import AsyncGramophoneClient, GramophoneClient, errors
from gramophone_client.deprecations import CLASSES
from tests.support.clock import WITHIN_S
from tests.support.fake_service import HANG, NOWHERE, PAINTING, PHOTO, accepted

# --- keywords


@contextlib.contextmanager
def warns(message: str):
    with pytest.warns(DeprecationWarning) as warned:
        yield
    assert [str(one.message) for one in warned] == [message]
    assert [one.filename for one in warned] == [__file__]


async def test_old_keywords_of_the_asynchronous_client(service):
    with warns("timeout_s= is deprecated; write timeout=5"):
        client = AsyncGramophoneClient(service.target, timeout_s=5)
    async with client:
        assert client.timeout == 5
        with warns("timeout_s= is deprecated; write timeout=4"):
            await client.get_job("j1", timeout_s=4)
        with warns("patience_s= is deprecated; write patience=0.5"):
            client.stream(PHOTO, PAINTING, patience_s=0.5)
        with warns("timeout_s= is deprecated; write timeout=1"):
            client.control_job("j1", timeout_s=1)


def test_old_keywords_of_the_synchronous_client(service):
    with warns("timeout_s= is deprecated; write timeout=5"):
        client = GramophoneClient(service.target, timeout_s=5)
    with client:
        with warns("timeout_s= is deprecated; write timeout=4"):
            client.stylize(PHOTO, PAINTING, timeout_s=4)
        with warns("patience_s= is deprecated; write patience=0.5"):
            client.stream(PHOTO, PAINTING, patience_s=0.5)


@pytest.mark.parametrize(("retries", "advice"), [(False, 0), (True, 3)])
async def test_retries_were_on_or_off(retries, advice):
    with warns(f"retries= is deprecated; write max_retries={advice}"):
        await AsyncGramophoneClient(NOWHERE, retries=retries).close()


async def test_an_old_and_a_new_keyword_exclude_each_other():
    with pytest.raises(TypeError, match=r"__init__\(\) got timeout_s=1 and timeout=2; timeout_s is the old name of"):
        AsyncGramophoneClient(NOWHERE, timeout_s=1, timeout=2)


async def test_an_old_keyword_of_another_function_is_unknown(client):
    with pytest.raises(TypeError, match="patience_s"):
        await client.get_job("j1", patience_s=1)


# --- names


@pytest.mark.parametrize(("old", "new"), CLASSES.items())
def test_old_names_are_the_new_classes(old, new):
    is_error = new.endswith("Error")
    for module in (gramophone_client, errors) if is_error else (gramophone_client,):
        with warns(f"{old} is deprecated; write {new}"):
            found = getattr(module, old)
        assert found is getattr(gramophone_client, new)
        assert old not in dir(module) and old not in module.__all__


def test_every_error_of_the_last_release_has_its_old_name():
    new = {name for name in errors.__all__ if name.endswith("Error")}
    new -= {"GramophoneError"}  # kept its name
    new -= {"AccessDeniedError", "ClientClosedError", "ClientUsageError"}  # are new
    new -= {"ServerBusyError", "SlowSenderError"}  # are new, too
    assert {name for name in CLASSES.values() if name.endswith("Error")} == new


def test_importing_an_old_name_warns_at_the_import():
    with pytest.warns(DeprecationWarning, match="QueueFull is deprecated; write QueueFullError") as warned:
        from gramophone_client import QueueFull
    assert QueueFull is errors.QueueFullError
    assert {one.filename for one in warned} == {__file__}  # Python looks the name up twice


def test_the_old_name_of_a_wrong_recipe():
    with warns("InvalidRecipe is deprecated; write InvalidRecipeError"):
        assert recipe.InvalidRecipe is recipe.InvalidRecipeError


@pytest.mark.parametrize("module", [gramophone_client, errors, recipe])
def test_other_names_do_not_exist(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Nonsense'"):
        _ = module.Nonsense


def test_a_star_import_gives_the_public_names_alone():
    names = {}
    exec("from gramophone_client import *", names)  # noqa: S102 - with a warning it would fail
    assert names.keys() - {"__builtins__"} == set(gramophone_client.__all__)


def test_the_version_is_that_of_the_package():
    assert gramophone_client.__version__ == importlib.metadata.version("gramophone")


# --- what old code does with the present names


async def test_the_synchronous_client_in_an_asynchronous_context_is_the_asynchronous_one(service):
    with warns("GramophoneClient is synchronous; write `async with AsyncGramophoneClient(...)`"):
        async with GramophoneClient(service.target, timeout=7, metadata={"x": "y"}) as client:
            assert isinstance(client, AsyncGramophoneClient)
            assert (await client.get_job("j1")).job_id == "j1"
            assert (client.target, client.timeout) == (service.target, 7)
    assert ("x", "y") in service.metadata[-1][1]
    with pytest.raises(errors.ClientClosedError):
        await client.get_job("j1")
    assert "gramophone-client" not in [thread.name for thread in threading.enumerate()]


async def test_aclose_was_the_name_of_close(client, service):
    service.scripts = [[accepted(), HANG]]
    updates = client.stream(PHOTO, PAINTING)
    await anext(updates)
    with warns("aclose() is deprecated; write close(), or `async with` without contextlib.aclosing"):
        async with contextlib.aclosing(updates):
            pass
    assert await asyncio.to_thread(service.call_ended.wait, WITHIN_S)
