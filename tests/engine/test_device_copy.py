"""Copies of pictures to the host. The tests of streams and pinned memory, which need a GPU, are in tests/gpu."""

import torch

from gramophone_server.engine.device_copy import DeviceToHostCopier


def test_a_copy_is_of_the_image_at_the_time_of_the_call() -> None:
    image = torch.rand(3, 5, 7)
    expected = image.mul(255).round().to(torch.uint8).permute(1, 2, 0)
    wait = DeviceToHostCopier(torch.device("cpu")).take(image)
    image.zero_()
    assert torch.equal(wait(), expected)
    assert wait().is_contiguous()
