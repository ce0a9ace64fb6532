"""What would end a run after hours is told before its first image is read: by `run` and by `--dry-run`, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from raysynth.cli import app
from raysynth.core.config import build_experiment
from raysynth.core.errors import ConfigError, DataError
from raysynth.core.storage import open_storage
from raysynth.models.classifier_net import build_classifier, check_classifier
from raysynth.stages import cluster
from raysynth.stages.pipeline import stages_of
from raysynth.stages.preflight import check_setup
from tests.classifiers import tiny


def content(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "digits", "root": str(root), "data": {"kind": "digits"}, "plan": {"replicas": 2},
        "classifier": {"architecture": "resnet10t"},
        "sweep": {"arms": {"real": {"training_set.strategy": "real"}, "mix": {}}}, **changes,
    }  # fmt: skip


def checked(root: Path, **changes: Any) -> None:
    e = build_experiment(content(root, **changes))
    check_setup(e, open_storage(e.root), stages_of(e))


def arm(**settings: Any) -> dict[str, Any]:
    return {"arms": {"real": {"training_set.strategy": "real"}, "other": settings}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier": {"architecture": "resnet10tt"}}, r"architecture: got 'resnet10tt'.*Did you mean resnet10t"),
        ({"classifier": {"architecture": "resnet18.a9_in1k"}}, r"architecture.*resnet18\.a1_in1k"),
        ({"classifier": {"arguments": {"depths": 3}}}, r"classifier\.arguments: got .*resnet18.*depths"),
        ({"classifier": {"architecture": "convnext_atto", "size": 2}}, r"classifier\.size: got 2, .*convnext_atto"),
        ({"classifier": {"init": "/no/weights.safetensors"}}, r"classifier\.init.*a weights file that exists"),
        ({"classifier": {"init": "pretrain"}}, r"classifier\.init.*Did you mean pretrained"),
        ({"classifier": {"init": "hf-hub:one"}}, r"classifier\.init: got 'hf-hub:one', must be hf-hub:OWNER/NAME"),
        ({"classifier": {"architecture": "botnet50ts_256", "init": "pretrained"}},
         r"classifier\.init: got 'pretrained'.*timm has no weights for it"),
        ({"sweep": arm(**{"classifier.architecture": "densnet121"})}, r"got 'densnet121'.*Did you mean densenet121"),
        ({"generator": {"path": "/no/generator"}}, r"generator\.path: got '/no/generator'.*no condition\.json"),
        ({"sweep": arm(**{"generator.path": "/no/other"})}, r"generator\.path: got '/no/other'"),
        ({"evaluation": {"fidelity": {"extractor": "timm:resnet10tt"}}}, r"extractor.*Did you mean resnet10t"),
        ({"evaluation": {"fidelity": {"extractor": "timm:resnet18@/no/file"}}}, r"extractor.*/no/file"),
        ({"evaluation": {"test_sets": {"mars": {"kind": "class_folders", "path": "/no/folder"}}}},
         r"evaluation\.test_sets\.mars\.path: got '/no/folder'"),
    ],
)  # fmt: skip
def test_it_is_told_with_its_key_before_anything_is_made(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        checked(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_what_no_arm_uses_is_not_asked_for(tmp_path: Path) -> None:
    checked(tmp_path, generator={"path": "/no/generator"}, sweep=arm(**{"training_set.strategy": "duplicate"}))
    checked(tmp_path, classifier=None, sweep={}, evaluation={"fidelity": {"extractor": "timm:nothing"}})


def test_every_network_is_drawn_once_whatever_its_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysynth.models import classifier_net

    drawn: list[str] = []
    monkeypatch.setattr(classifier_net, "check_classifier", lambda c, channels: drawn.append(c.architecture))
    arms = {"real": {}, "wide": {"classifier.architecture": "resnet18"}}
    checked(tmp_path, sweep={"arms": arms, "seeds": [0, 1, 2]})
    assert sorted(drawn) == ["resnet10t", "resnet18"]


def test_drawing_takes_no_memory_and_changes_no_weights() -> None:
    before = torch.get_rng_state()
    check_classifier(tiny(architecture="vit_large_patch14_224", arguments={}, size=224), 3)
    assert torch.equal(torch.get_rng_state(), before)
    network = build_classifier(tiny(), 2, 1)
    assert {p.device.type for p in network.parameters()} == {"cpu"}


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_the_command_tells_it_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: list[str]) -> None:
    connected: list[object] = []
    monkeypatch.setattr(cluster, "connect", lambda *given: connected.append(given))
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(content(tmp_path / "runs", classifier={"architecture": "resnet10tt"})))
    done = CliRunner().invoke(app, ["run", str(file), *dry])
    assert isinstance(done.exception, ConfigError), done.output
    assert not (tmp_path / "runs").exists()
    assert not connected
