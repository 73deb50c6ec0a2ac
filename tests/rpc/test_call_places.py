"""The places of calls."""

import pytest

from gramophone_server.config import Limits
from gramophone_server.errors import ServerBusy
from gramophone_server.rpc.call_places import CallPlaces


def test_places_are_limited_by_connection_and_in_total():
    full = []
    places = CallPlaces.of_service(Limits(max_calls=3, max_calls_per_connection=2), lambda: full.append(places.taken))
    places.take("a")
    places.take("a")
    with pytest.raises(ServerBusy, match=r"this connection has 2 calls, .* GRAMOPHONE_MAX_CALLS_PER_CONNECTION"):
        places.take("a")
    places.take("b")
    with pytest.raises(ServerBusy, match=r"it has 3 calls, which is the most .server setting GRAMOPHONE_MAX_CALLS.;"):
        places.take("b")
    assert full == [3]
    places.take("c")  # the first call of a connection is not shut out by those of others
    for connection in ("a", "b", "c"):
        places.give_back(connection)
    assert places.taken == 1
    places.take("a")


def test_places_without_settings():
    places = CallPlaces(10, 1, "health checks")
    places.take("a")
    with pytest.raises(ServerBusy, match=r"this connection has 1 health checks, which is the most;"):
        places.take("a")
