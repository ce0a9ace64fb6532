"""Architectures by name at tiny size, heads, initial weights from files, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from raysynth.core.errors import ConfigError, EnvironmentFault
from raysynth.models.classifier import ClassifierTraining
from raysynth.models.classifier_export import export_classifier, load_classifier
from raysynth.models.classifier_net import build_classifier
from tests.classifiers import BATCH, batch, tiny

SMALL_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(("architecture", "arguments", "channels", "drop_path"), [
    ("densenet121", {}, 1, 0.0), ("convnext_atto", {}, 3, 0.1), ("tf_efficientnetv2_b0", {}, 3, 0.1),
    ("resnet10t", {}, 1, 0.0), ("vit_tiny_patch16_224", SMALL_VIT, 3, 0.1),
])  # fmt: skip
def test_a_tiny_size_trains_and_is_exported(
    tmp_path: Path, architecture: str, arguments: dict[str, Any], channels: int, drop_path: float
) -> None:
    classifier = tiny(
        architecture=architecture, arguments=arguments, size=32, head=[12], dropout=0.5, drop_path=drop_path,
        batch_size=4, mixup=0.2,
    )  # fmt: skip
    training = ClassifierTraining(classifier, 3, channels, "multi", "chest")
    training.begin(0, 2)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, channels), np.uint8)
    labels = np.array([[0, 1, np.nan], [1, 0, 0], [np.nan, 1, 0], [1, 1, 0]], np.float32)
    assert [bool(training.update(images, labels, np.arange(4)).isfinite()) for _ in range(2)] == [True, True]
    probabilities = training.predict(images)
    assert probabilities.shape == (4, 3)
    export_classifier(tmp_path, training, {})
    np.testing.assert_allclose(load_classifier(tmp_path).predict(images), probabilities, rtol=1e-5, atol=1e-6)


def test_head_has_the_widths_asked_for_and_fresh_weights_depend_on_the_seed() -> None:
    network = build_classifier(tiny(head=[12, 6]), 3, 1)
    assert [str(m) for m in network.head] == [
        str(m) for m in (
            torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
        )
    ]  # fmt: skip
    torch.manual_seed(5)
    again, other = build_classifier(tiny(head=[12, 6]), 3, 1), build_classifier(tiny(head=[12, 6], seed=1), 3, 1)
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(network.head[0].weight, other.head[0].weight)
    assert not torch.equal(network.state_dict()["backbone.conv1.weight"], other.state_dict()["backbone.conv1.weight"])


def test_from_scratch_pixels_become_minus_one_to_one() -> None:
    network = build_classifier(tiny(), 3, 1)
    seen: list[torch.Tensor] = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8))
    assert seen[0][:, 0, 0, 0].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_local_file_starts_the_backbone_whatever_its_classes(tmp_path: Path, channels: int, suffix: str) -> None:
    source = timm.create_model("resnet10t", num_classes=7).eval()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, file)
    else:
        safetensors.torch.save_file(source.state_dict(), file)
    network = build_classifier(tiny(architecture="resnet10t", arguments={}, size=32, init=str(file)), 3, channels)
    # The normalisation is the architecture's; a grey image is one whose three channels are equal.
    mean, std = (torch.tensor(source.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    images = torch.rand(2, channels, 32, 32)
    with torch.no_grad():
        features = source.forward_head(
            source.forward_features(((images - mean) / std).expand(2, 3, 32, 32)), pre_logits=True
        )
        torch.testing.assert_close(
            network.eval().backbone((images - network.mean) / network.std), features, rtol=1e-4, atol=1e-5
        )


def test_an_export_starts_another_training_with_its_normalisation(tmp_path: Path) -> None:
    training = ClassifierTraining(tiny(), 10, 1, "single", "general")
    training.begin(0, 1)
    training.update(*batch(0), np.arange(BATCH))
    export_classifier(tmp_path, training, {})
    started = build_classifier(tiny(init=str(tmp_path / "model.safetensors"), seed=3), 2, 1).state_dict()
    for name, value in training.network.state_dict().items():
        assert name.startswith("head.") or torch.equal(started[name], value), name
    rgb = build_classifier(tiny(init=str(tmp_path / "model.safetensors")), 2, 3).state_dict()
    torch.testing.assert_close(
        rgb["backbone.conv1.weight"].sum(1, keepdim=True), started["backbone.conv1.weight"]
    )


@pytest.mark.parametrize(("changes", "key", "words"), [
    ({"architecture": "densnet121"}, "classifier.architecture", ["densenet121"]),
    ({"architecture": "resnet18.nothing"}, "classifier.architecture", ["resnet18.a1_in1k"]),
    ({"arguments": {"dephts": [1]}}, "classifier.arguments", ["dephts", "resnet18"]),
    ({"architecture": "densenet121", "arguments": {}, "size": 8}, "classifier.size", ["8", "densenet121"]),
    ({"init": "scrach"}, "classifier.init", ["Did you mean scratch?"]),
    ({"init": "/nowhere/weights.pth"}, "classifier.init", ["/nowhere/weights.pth", "exists"]),
    ({"init": "hf-hub:resnet18"}, "classifier.init", ["hf-hub:OWNER/NAME"]),
    ({"architecture": "convnextv2_small", "arguments": {}, "init": "pretrained"}, "classifier.init", ["no weights"]),
])  # fmt: skip
def test_what_cannot_be_built_is_named(changes: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build_classifier(tiny(**changes), 3, 1)
    assert error.value.key == key
    assert all(word in str(error.value) for word in words), str(error.value)


def test_weights_of_another_model_or_with_layers_missing_are_refused(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t", num_classes=7)
    state = source.state_dict()
    file = tmp_path / "w.safetensors"
    for broken in (
        timm.create_model("resnet14t", num_classes=7).state_dict(),
        {k: v for k, v in state.items() if k != "layer3.0.conv1.weight"},
    ):
        safetensors.torch.save_file(broken, file)
        with pytest.raises(ConfigError, match=r"classifier\.init.*in every layer"):
            build_classifier(tiny(architecture="resnet10t", arguments={}, size=32, init=str(file)), 3, 1)
    (tmp_path / "text.pth").write_text("not tensors")
    with pytest.raises(ConfigError, match="tensors saved by torch"):
        build_classifier(tiny(init=str(tmp_path / "text.pth")), 3, 1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's client looks, and nowhere else."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in(hub: Path, name: str, source: torch.nn.Module, mean: tuple[float, ...] = (0.5, 0.5, 0.5)) -> Path:
    """A model of the hub, as its client keeps it. Returns its folder."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    folder = place / "snapshots" / "c0ffee"
    save_for_hf(source, str(folder), safe_serialization=True, data_config={"mean": mean, "std": (0.2, 0.3, 0.4)})
    return folder


HUB_MODEL: dict[str, Any] = {"architecture": "test_resnet", "arguments": {}, "size": 32, "init": "hf-hub:clinic/films"}


def test_weights_of_the_hub_start_the_backbone_with_their_normalisation(hub: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=7).eval()
    put_in(hub, "clinic/films", source, (0.1, 0.2, 0.3))
    network = build_classifier(tiny(**HUB_MODEL), 3, 3).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4)))
    assert torch.equal(network.mean, mean)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = source.forward_head(source.forward_features((images - mean) / std), pre_logits=True)
        torch.testing.assert_close(network(images), network.head(features))


def test_pretrained_is_the_hubs_model_of_that_name(hub: Path) -> None:
    source = timm.create_model("test_resnet")
    put_in(hub, "timm/test_resnet.r160_in1k", source)
    network = build_classifier(tiny(**{**HUB_MODEL, "init": "pretrained"}), 3, 3)
    expected = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    found = network.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_hub_model_of_another_architecture_or_with_layers_missing_is_refused(hub: Path) -> None:
    folder = put_in(hub, "clinic/films", timm.create_model("test_resnet", num_classes=7))
    with pytest.raises(ConfigError, match=r"architecture: got 'resnet18'.* Set classifier.architecture=test_resnet\."):
        build_classifier(tiny(**{**HUB_MODEL, "architecture": "resnet18"}), 3, 3)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "bn1.weight"}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"init: got 'hf-hub:clinic/films', .*test_resnet in every layer"):
        build_classifier(tiny(**HUB_MODEL), 3, 3)


@pytest.mark.parametrize("init", ["pretrained", "hf-hub:timm/resnet10t.c3_in1k"])
def test_a_hub_out_of_reach_is_the_environments_fault(init: str, hub: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"classifier\.init.*could not be fetched"):
        build_classifier(tiny(architecture="resnet10t", arguments={}, size=32, init=init), 3, 1)


def test_an_altered_export_is_refused(tmp_path: Path) -> None:
    training = ClassifierTraining(tiny(), 10, 1, "single", "general")
    files = export_classifier(tmp_path, training, {"classes": list("abcdefghij")})
    assert sorted(files) == ["classifier.json", "model.safetensors"]
    assert load_classifier(tmp_path).facts["classes"] == list("abcdefghij")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + b"x")
    with pytest.raises(ConfigError, match="not whole"):
        load_classifier(tmp_path)
