from gramophone_server.config import Limits


def test_message_sizes_follow_from_the_limits():
    assert Limits(max_size=1000, max_checkpoint_bytes=65536).response_bytes == 3_000_000 + 2**20
    assert Limits(max_size=1000, max_checkpoint_bytes=2**26).response_bytes == 2**26 + 2**20
