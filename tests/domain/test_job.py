"""Jobs as the engine receives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gramophone_server.domain.job import StyleJob, digest
from tests.support.pictures import make_picture


def test_scales_with_a_side_that_is_too_short_are_left_out(make_job: Callable[..., StyleJob]) -> None:
    job = replace(make_job(size=64, smallest_size=16), content=make_picture(1, 20, 60))
    assert [(width, height) for width, height, _ in job.scales] == [(64, 21)]


def test_a_digest_depends_on_pixels_and_shape() -> None:
    picture = make_picture(1, 12, 20)
    assert digest(picture) == digest(picture.clone()) == digest(picture.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert len({digest(p) for p in (picture, picture.view(3, 20, 12), 255 - picture)}) == 3
