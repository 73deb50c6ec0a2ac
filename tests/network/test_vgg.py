"""Networks and their weights: the real ones load, and a file that is wrong is refused with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gramophone_server.errors import StartupError
from gramophone_server.network import vgg as vgg_module
from gramophone_server.network.vgg import BACKBONES, CHANNELS, EMBEDDED_SHA256, load_vgg


def torchvision_state(backbone: str) -> dict[str, Tensor]:
    """Zeros with the shapes and names of torchvision's models."""
    state, index, channels = {}, 0, 3
    for block, count in enumerate(BACKBONES[backbone]):
        for _ in range(count):
            state[f"features.{index}.weight"] = torch.zeros(CHANNELS[block], channels, 3, 3)
            state[f"features.{index}.bias"] = torch.zeros(CHANNELS[block])
            channels = CHANNELS[block]
            index += 2
        index += 1
    return state


def test_embedded_weights_are_the_oxford_vgg19() -> None:
    vgg = load_vgg("embedded")
    assert [c.name for c in vgg.convolutions][:4] == ["1_1", "1_2", "2_1", "2_2"]
    assert len(vgg.convolutions) == 16
    assert vgg.layers[:4] == ("conv1_1", "relu1_1", "conv1_2", "relu1_2") and vgg.layers[-1] == "relu5_4"
    assert [c.name for c in vgg.convolutions if c.pooled] == ["2_1", "3_1", "4_1", "5_1"]
    assert vgg.convolutions[0].weight.shape == (64, 3, 3, 3) and vgg.convolutions[-1].weight.shape == (512, 512, 3, 3)
    assert "University of Oxford (CC BY 4.0)" in vgg.source and EMBEDDED_SHA256 in vgg.source
    assert vgg.preprocessing.channels == (2, 1, 0) and vgg.preprocessing.mean == (103.939, 116.779, 123.68)
    # The weights are not all zero.
    assert vgg.convolutions[0].weight.abs().sum() > 1


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_state_dict_loads(tmp_path: Path, backbone: str, suffix: str) -> None:
    state = torchvision_state(backbone)
    state["classifier.0.weight"] = torch.zeros(1)  # a full model has these, too
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    vgg = load_vgg(str(path), backbone)
    assert len(vgg.convolutions) == sum(BACKBONES[backbone])
    assert vgg.preprocessing.std == (0.229, 0.224, 0.225)
    assert path.name in vgg.source


def test_the_names_are_those_of_torchvision() -> None:
    from torchvision.models import vgg16

    with torch.device("meta"):
        model = vgg16()
    names = {key for key in model.state_dict() if key.startswith("features")}
    assert names == set(torchvision_state("vgg16"))


def damaged(path: Path) -> None:
    path.write_bytes(b"not a pickle at all")


def cut_off(path: Path) -> None:
    torch.save(torchvision_state("vgg19"), path)
    path.write_bytes(path.read_bytes()[:1000])


def wrong_backbone(path: Path) -> None:
    torch.save(torchvision_state("vgg16"), path)


def wrong_shape(path: Path) -> None:
    torch.save({**torchvision_state("vgg19"), "features.2.weight": torch.zeros(64, 64, 5, 5)}, path)


def a_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def unsafe(path: Path) -> None:
    torch.save({"features.0.weight": Path("x")}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged, "is not a weights file that can be read safely, or it is damaged"),
        (cut_off, "is not a weights file that can be read safely, or it is damaged"),
        (unsafe, "is not a weights file that can be read safely, or it is damaged"),
        (a_list, "must hold a state dict, got list"),
        (
            wrong_shape,
            r"features.2.weight must be \[64, 64, 3, 3\] with a bias, got \[64, 64, 5, 5\]; check --backbone",
        ),
        (wrong_backbone, "weights do not fit vgg19: features.* check --backbone"),
        (lambda path: None, "no weights file at .*; give a path, or --weights embedded or imagenet"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(StartupError, match=message):
        load_vgg(str(path))


def test_vgg19_weights_as_vgg16_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision_state("vgg19"), tmp_path / "weights.pth")
    with pytest.raises(StartupError, match=r"weights do not fit vgg16.*check --backbone"):
        load_vgg(str(tmp_path / "weights.pth"), "vgg16")


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(StartupError, match="is not a safetensors file, or it is damaged"):
        load_vgg(str(tmp_path / "w.safetensors"))


def test_embedded_weights_that_are_damaged_or_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgg_module, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(StartupError, match=r"the embedded weights are damaged: sha256 .* expected 0{64}; install"):
        load_vgg("embedded")
    monkeypatch.setattr(vgg_module, "EMBEDDED_PACKAGE", "no-such-package")
    with pytest.raises(StartupError, match=r"the embedded weights are missing: install no-such-package==1.6.0"):
        load_vgg("embedded")


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(StartupError, match="backbone must be one of vgg16, vgg19, got 'resnet'"):
        load_vgg("embedded", "resnet")
    with pytest.raises(StartupError, match="the embedded weights are of vgg19; for vgg16 give"):
        load_vgg("embedded", "vgg16")
