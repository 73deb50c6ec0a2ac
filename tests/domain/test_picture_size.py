import pytest

from gramophone_server.domain.picture_size import fit


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [((640, 480), 64, (64, 48)), ((480, 640), 64, (48, 64)), ((2_000_000, 16), 2048, (2048, 1)), ((3, 3), 7, (7, 7))],
)
def test_fit_keeps_the_proportions_and_at_least_one_pixel(size, longest, expected):
    assert fit(*size, longest) == expected
