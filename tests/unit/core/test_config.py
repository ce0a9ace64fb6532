"""Experiment files: a typo names the full key and the likely word; contradictions name the way out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from raysynth.core.config import build_experiment, load_experiment, resolved
from raysynth.core.errors import ConfigError
from raysynth.core.keys import all_keys

MINIMAL: dict[str, Any] = {"name": "t", "data": {"kind": "digits"}}


def refused(content: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build_experiment({**MINIMAL, **content}, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"genrator": {}}, "genrator: got {}, must be one of classifier, compute, data, evaluation, generator,"),
        ({"genrator": {}}, "Did you mean generator?"),
        ({"generator": {"step": 5}}, "generator.step: got 5, must be one of attention_resolutions,"),
        ({"generator": {"step": 5}}, "Did you mean generator.steps?"),
        ({"data": {"image": {"sise": 32}}}, "Did you mean data.image.size?"),
        # The word is right and the section is wrong.
        ({"guidance_scale": 3}, "Did you mean sampling.guidance_scale?"),
        ({"data": {"split": {"patient": "hash"}}}, "Did you mean data.split.patients?"),
        ({"data": {"image": {"preset": "chst"}}},
         "data.image.preset: got 'chst', must be one of general, chest, skin. Did you mean chest?"),
        ({"data": {"kind": "digits", "labels": {"policy": {"a": "zero"}}}},
         "data.labels.policy.a: got 'zero', must be one of ignore, zeros, ones."),
        ({"generator": {"steps": "many"}}, "generator.steps: got 'many', must be a whole number."),
        ({"sampling": {"steps": 2.5}}, "sampling.steps: got 2.5, must be a whole number."),
        ({"plan": {"targets": {"label=a": "x"}}}, "plan.targets.label=a: got 'x', must be a number."),
        ({"generator": {"channel_multipliers": [1, "b"]}}, "generator.channel_multipliers[1]: got 'b'"),
        ({"generator": {"flip": "maybe"}}, "must be true or false."),
        ({"generator": {"conditions": "label"}}, "got 'label', must be a list. Write [label]."),
        ({"plan": {"quota": [1]}}, "got [1], must be a mapping whose values are each a whole number."),
        ({"generator": None}, "Leave the section out for its defaults."),
        ({"data": 5}, "data: got 5, must be a section of keys."),
        ({"data": {"labels": {"classes": ["a", False]}}}, "labels.classes[1]: got False, must be text. YAML"),
        ({"data": {"labels": {"policy": {True: "zeros"}}}}, "labels.policy: got True, must be text. YAML"),
        ({"root": "${oc.env:NOT_SET_ANYWHERE}"}, "root: got None, must be something that resolves."),
    ],
)  # fmt: skip
def test_wrong_keys_and_types(content: dict[str, Any], text: str) -> None:
    assert text in refused(content)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("sampling.step=5", "Did you mean sampling.steps?"),
        ("sampling", "sampling: got 'sampling', must be key=value. Example: sampling.steps=50"),
        ("sampling.steps=a", "sampling.steps: got 'a', must be a whole number."),
        ("generator.channel_multipliers=[1", "generator.channel_multipliers: got"),
        ("name=a/b", "name: got 'a/b', must be letters"),
    ],
)
def test_wrong_overrides(word: str, text: str) -> None:
    assert text in refused({}, word)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"data": {"kind": "csv"}}, "data.path: got '', must be set."),
        ({"data": {"kind": "csv", "path": "x.csv"}}, "data.columns: got"),
        ({"data": {"kind": "digits", "split": {"val": 0.6, "test": 0.5}}}, "Nothing is left to train on."),
        ({"data": {"kind": "digits", "labels": {"classes": ["a"], "policy": {"b": "ones"}}}},
         "data.labels.policy.b: got 'b', must be one of data.labels.classes (a)."),
        ({"training_set": {"n_per_class": 5, "fraction": 0.1}}, "fraction: got 0.1, must be null together"),
        ({"generator": {"train_on": "donor"}}, "train_on: got 'donor', must be train or classifier_subset"),
        ({"generator": {"prediction": "epsilon"}}, "use prediction: v, or zero_terminal_snr: false."),
        ({"generator": {"conditions": ["sex"]}}, "conditions[0]: got 'sex', must be one of age_bin, label."),
        ({"generator": {"size": 30}}, "generator.size: got 30, must be a multiple of 4 for 3 levels. Use 32"),
        ({"data": {"kind": "digits", "image": {"preset": "chest"}}, "generator": {"flip": True}}, "situs"),
        ({"plan": {"ratio": 1, "n_synth": 5}}, "plan: got ['ratio', 'n_synth'], must be at most one of"),
        ({"plan": {"ratio": -1}}, "plan.ratio: got -1.0, must be >= 0."),
        ({"plan": {"ratio": 12}}, "got 12.0, must be at most plan.replicas (10). Set plan.replicas=12."),
        ({"plan": {"targets": {"label=a": 1}}}, "Use kind: balanced."),
        ({"plan": {"kind": "balanced"}}, "plan.n: got None, must be >= 1 for a balanced plan."),
        ({"sampling": {"guidance_scale": 0}}, "w = 0 in Ho & Salimans are 1 here"),
        ({"sampling": {"steps": 2000}}, "sampling.steps: got 2000, must be 1 to generator.timesteps (1000)."),
        ({"sampling": {"guidance_scale": 2, "guidance_interval": [0.8, 0.2]}}, "[start, stop] with 0 <= start < stop"),
        ({"sampling": {"guidance_scale": 2, "guidance_interval": [0.5]}}, "sampling.guidance_interval: got [0.5]"),
        ({"sampling": {"guidance_scale": 2, "steps": 4, "guidance_interval": [0.3, 0.4]}}, "to hold one of 4 steps"),
        ({"sampling": {"guidance_interval": [0.2, 0.8]}}, "must be null with sampling.guidance_scale 1"),
        ({"compute": {"compile": True}}, "Every size that is tried would be compiled anew: type compute.micro_batch."),
        ({"sampling": {"eta": 0.5}}, "sampling.eta: got 0.5, must be 0 unless sampler is ddim."),
        ({"generator": {"batch_size": 10}, "compute": {"train_workers": 4}}, "generator.batch_size: got 10"),
    ],
)  # fmt: skip
def test_contradictions(content: dict[str, Any], text: str) -> None:
    assert text in refused(content)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("generator", "grad_clip", 0.0), ("generator", "grad_clip", -1.0), ("generator", "min_snr_gamma", 0.0),
        ("generator", "lr", math.inf), ("generator", "lr", math.nan), ("generator", "lr", 0.0),
        ("generator", "dropout", 1.0), ("generator", "dropout", -0.1), ("generator", "res_blocks", 0),
        ("generator", "base_channels", 0), ("generator", "base_channels", -8), ("generator", "heads", 0),
        ("generator", "size", 0), ("generator", "channel_multipliers", [1, 0]), ("generator", "weight_decay", -1.0),
        ("generator", "warmup_steps", -1), ("generator", "timesteps", 1), ("generator", "seed", -1),
        ("generator", "seed", 2**63), ("training_set", "seed", -1), ("plan", "seed", -1),
        ("plan", "targets.label=a", math.inf), ("data.split", "seed", -1), ("sampling", "eta", math.nan),
        ("compute", "shard_seconds", math.inf), ("compute", "price_per_gpu_hour", math.nan),
        ("compute", "cpus_per_renderer", -1.0), ("compute", "gpus_per_renderer", -1.0),
        ("compute", "gpus_per_renderer", 1.5),
    ],
)  # fmt: skip
def test_values_that_train_nothing_or_end_in_a_traceback(section: str, key: str, value: Any) -> None:
    content: dict[str, Any] = {key: value}
    if "." in key:
        content = {key.partition(".")[0]: {key.partition(".")[2]: value}}
    for name in reversed(section.split(".")):
        content = {name: content}
    if "data" in content:
        content["data"] |= MINIMAL["data"]
    assert f"{section}.{key}: got {value!r}, must be " in refused(content)


def test_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "study-1.yaml"
    file.write_text("data: {kind: digits}\nplan: {replicas: 3}\ngenerator: {channel_multipliers: null}\n")
    e = load_experiment(str(file), ["plan.replicas=4", "generator.channel_multipliers=[1,2]"])
    assert (e.name, e.plan.replicas, e.generator.channel_multipliers) == ("study-1", 4, [1, 2])
    assert load_experiment(str(file)).generator.channel_multipliers is None
    policies = {"data": {"kind": "digits", "labels": {"policy": {"a": "zeros"}}}}
    assert build_experiment({**MINIMAL, **policies}).data.labels.policy == {"a": "zeros"}
    assert resolved(e).data.image.channels == "rgb"
    assert resolved(e).generator.base_channels == 32


@pytest.mark.parametrize(
    ("content", "text"),
    [("a: [", "must be valid YAML"), ("- a", "must be a mapping of sections"), (None, "a YAML file that exists")],
)
def test_files_that_are_no_experiment(tmp_path: Path, content: str | None, text: str) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_experiment(str(file))


def test_a_mistyped_file_name_finds_the_likely_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ConfigError, match=r"Did you mean jobs/skin/mini.yaml\?"):
        load_experiment("jobs/skin/mimi.yaml")


def test_every_key_can_be_typed() -> None:
    keys = all_keys()
    assert "data.columns.attributes" in keys
    assert "sampling.guidance_rescale" in keys
    assert len(keys) == len(set(keys)) > 80
