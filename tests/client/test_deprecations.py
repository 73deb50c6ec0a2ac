"""Each old name still works for one release, and warns with the new one at the caller's line."""

import contextlib

import pytest

from gramophone_client import AsyncGramophoneClient, GramophoneClient
from tests.support.fake_service import NOWHERE, PAINTING, PHOTO


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
