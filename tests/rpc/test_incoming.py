"""The places that calls share, and the share of one call's messages."""

import pytest

from gramophone_server.config import Limits
from gramophone_server.errors import ServerBusy
from gramophone_server.rpc.incoming import CallPlaces


def test_places_are_limited_by_connection_and_in_total():
    places = CallPlaces(Limits(max_calls=3, max_calls_per_connection=2))
    places.take("a")
    places.take("a")
    with pytest.raises(ServerBusy, match=r"this connection has 2 calls, .* GRAMOPHONE_MAX_CALLS_PER_CONNECTION"):
        places.take("a")
    places.take("b")
    with pytest.raises(ServerBusy, match=r"it has 3 calls, which is the most .server setting GRAMOPHONE_MAX_CALLS.;"):
        places.take("b")
    places.take("c")  # the first call of a connection is not shut out by those of others
    for connection in ("a", "b", "c"):
        places.give_back(connection)
    places.take("a")
