"""Arms of a sweep, and what is refused in the sections that ask whether the images help."""

from __future__ import annotations

from typing import Any

import pytest

from raysynth.core.config import arms, build_experiment, load_experiment, vary
from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Experiment
from raysynth.core.presets import resolve_classifier


def experiment(**sections: Any) -> Experiment:
    content = {"name": "lungs", "data": {"kind": "digits"}, "training_set": {"n_per_class": 10}, "classifier": {}}
    return build_experiment({**content, **sections})


def test_arms_factors_and_seeds_are_crossed() -> None:
    sweep = {
        "arms": {"real": {"training_set.strategy": "real"}, "mix x3": {"training_set": {"ratio": 3}}},
        "factors": {"sampling.guidance_scale": [1, 2]}, "seeds": [4, 5],
        "seed_keys": ["classifier.seed", "training_set.seed"],
    }  # fmt: skip
    found = arms(experiment(sweep=sweep))
    assert len(found) == len({(a.name, a.seed) for a in found}) == 8
    assert [a.name for a in found[::2]] == [
        "real, guidance_scale 1", "real, guidance_scale 2", "mix x3, guidance_scale 1", "mix x3, guidance_scale 2",
    ]  # fmt: skip
    last = found[-1]
    assert last.settings == {"training_set": {"ratio": 3}, "sampling.guidance_scale": 2}
    e = last.experiment
    assert (e.training_set.ratio, e.sampling.guidance_scale, e.training_set.seed) == (3, 2, 5)
    assert e.classifier is not None
    assert e.classifier.seed == 5
    assert e.training_set.n_per_class == 10, "what an arm does not name stays"
    assert not e.sweep.arms, "an arm has no arms"


def test_one_seed_or_no_classifier_may_vary_any_key() -> None:
    keys = {"seed_keys": ["generator.seed"]}
    assert arms(experiment(sweep={**keys, "seeds": [3]}))[0].experiment.generator.seed == 3
    assert len(arms(experiment(sweep={**keys, "seeds": [0, 1]}, classifier=None))) == 2


def test_only_some_arms() -> None:
    sweep = {"arms": {"real": {"training_set.strategy": "real"}, "mix x3": {"training_set.ratio": 3}}}
    assert [a.name for a in arms(experiment(sweep={**sweep, "only": ["mix x3"]}))] == ["mix x3"]
    with pytest.raises(ConfigError, match=r"sweep.only: got 'mix x2', must be an arm of the sweep \(real, mix x3\)"):
        experiment(sweep={**sweep, "only": ["mix x2"]})
    primary = {"primary": {"arm": "mix x3", "against": "real", "metric": "auroc"}}
    with pytest.raises(ConfigError, match=r"evaluation.primary.against: got 'real', must be an arm .* \(mix x3\)"):
        experiment(sweep={**sweep, "only": ["mix x3"]}, evaluation=primary)


def test_the_primary_contrast_names_arms_with_their_factors() -> None:
    def contrast(arm: str, against: str) -> Experiment:
        named = {"real": {"training_set.strategy": "real"}, "mix": {}}
        sweep = {"arms": named, "factors": {"sampling.steps": [5, 9]}}
        return experiment(sweep=sweep, evaluation={"primary": {"arm": arm, "against": against}})

    for arm in ("mix", "mix, steps 5, steps 9", ""):
        with pytest.raises(ConfigError, match=r"primary.arm: got .* an arm of the sweep \(real, steps 5, .*steps 9\)"):
            contrast(arm, "real, steps 5")
    with pytest.raises(ConfigError, match=r"primary.against: got 'rael, steps 5'.*Did you mean real, steps 5"):
        contrast("mix, steps 5", "rael, steps 5")
    e = contrast("mix, steps 9", "real, steps 9")
    assert {"mix, steps 9", "real, steps 9"} < {a.name for a in arms(e)}


def test_an_experiment_without_a_sweep_is_one_arm() -> None:
    assert [(a.name, a.seed, a.settings) for a in arms(experiment())] == [("mix", 0, {})]


@pytest.mark.parametrize(("changes", "text"), [
    ({"training_set.strategi": "real"}, r"sweep.arms\[x\].training_set.strategi: .*Did you mean training_set.strategy"),
    ({"training_set.ratio": -1}, r"sweep.arms\[x\].training_set.ratio: got -1.0, must be > 0.*strategy: real"),
    ({"training_set.real_fraction": 0.2, "classifier.batch_size": 2},
     r"sweep.arms\[x\].training_set.real_fraction: got 0.2, .*It makes 0 of classifier.batch_size \(2\) images real"),
    ({"training_set.ratio": 99}, r"at most the ratio that is rendered \(10\).*plan.replicas=99"),
    ({"evaluation.seed": 3}, "Arms differ in what is made and trained, not judged"),
    ("real", "a mapping of keys to values"),
])  # fmt: skip
def test_a_wrong_arm_is_named(changes: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        experiment(sweep={"arms": {"x": changes}})


@pytest.mark.parametrize("key", [
    "data.split.seed", "data.split.test", "data.split.keep", "data.path", "data.images", "data.kind", "data.dataset",
    "data.columns.patient", "data.columns.split", "data.columns.id", "data.labels.classes", "data.labels.kind",
    "data.image.size", "data.image.value_range",
])  # fmt: skip
def test_arms_share_images_patients_and_splits(key: str) -> None:
    """Else an arm trains on what the others are tested on."""
    section, _, rest = key.partition(".")
    inner, _, leaf = rest.partition(".")
    nested = {section: {inner: {leaf: 1} if leaf else 1}}
    refused = r"must be of `data` one of data.labels.policy, data.age_bins. .* one experiment a split; "
    for sweep, where in (
        ({"arms": {"x": {key: 1}}}, rf"sweep.arms\[x\].{key}: got 1, "),
        ({"arms": {"x": nested}}, rf"sweep.arms\[x\].{key}: got 1, "),
        ({"factors": {key: [1]}}, f"sweep.factors.{key}: got 1, "),
        ({"factors": {section: [nested[section]]}}, f"sweep.factors.{key}: got 1, "),
        ({"seeds": [0, 1], "seed_keys": ["classifier.seed", key]}, f"sweep.seed_keys: got '{key}', "),
    ):
        with pytest.raises(ConfigError, match=f"{where}{refused}"):
            experiment(sweep=sweep)


@pytest.mark.parametrize(("sweep", "text"), [
    ({"factors": {"classifier.seed": [1, 2, 3]}},
     r"sweep.factors.classifier.seed: got 1, must be left out: .*, or take classifier.seed out of sweep.seed_keys"),
    ({"factors": {"classifier.seed": [1, 2]}, "seeds": [0, 1]}, r"got 1, .*List its values under sweep.seeds\.$"),
    ({"arms": {"a": {}, "b": {"classifier": {"seed": 1}}}}, r"sweep.arms\[b\].classifier.seed: got 1, "),
    ({"arms": {"b": {"training_set.seed": 7}}, "seed_keys": ["classifier.seed", "training_set.seed"]},
     r"sweep.arms\[b\].training_set.seed: got 7, .* take training_set.seed out of"),
    ({"arms": {"x3": {"training_set.ratio": 3}}, "factors": {"training_set.ratio": [1, 2]}},
     r"sweep.arms\[x3\].training_set.ratio: got 3, .*left out: sweep.factors.training_set.ratio sets it"),
    ({"arms": {"x3": {"training_set": {"ratio": 3}}}, "factors": {"training_set.ratio": [1, 2]}},
     r"sweep.arms\[x3\].training_set.ratio: got 3, "),
    ({"arms": {"x3": {"training_set": {"ratio": 3}}}, "factors": {"training_set": [{"strategy": "real"}]}},
     r"sweep.arms\[x3\].training_set: got {'ratio': 3}, "),
])  # fmt: skip
def test_no_arm_types_what_the_sweep_overwrites(sweep: dict[str, Any], text: str) -> None:
    """Else one classifier would count as several arms."""
    with pytest.raises(ConfigError, match=text):
        experiment(sweep=sweep)


@pytest.mark.parametrize(("sweep", "seeds"), [
    ({"seeds": [1, 2, 3]}, [1, 2, 3]),
    ({"factors": {"classifier.seed": [1, 2, 3]}, "seed_keys": []}, [1, 2, 3]),
    ({"factors": {"generator.seed": [1, 2]}}, [0, 0]),
    ({"arms": {"a": {"training_set.seed": 1}, "b": {"training_set.seed": 2}}, "seeds": [4]}, [4, 4]),
])  # fmt: skip
def test_seeds_are_swept_as_the_refusal_says(sweep: dict[str, Any], seeds: list[int]) -> None:
    found = [a.experiment for a in arms(experiment(sweep=sweep))]
    assert [e.classifier.seed for e in found if e.classifier] == seeds
    drawn = {(e.classifier.seed, e.generator.seed, e.training_set.seed) for e in found if e.classifier}
    assert len(drawn) == len(seeds)


@pytest.mark.parametrize(("base", "sweep", "text"), [
    ({"training_set": {"real_fraction": 0.2}}, {"arms": {"small": {"classifier.batch_size": 2}}},
     r"^training_set.real_fraction: got 0.2, .* images real. Found in the arm small\.$"),
    ({"training_set": {"n_synth": 5}}, {"arms": {"x3": {"training_set": {"ratio": 3}}}},
     r"^sweep.arms\[x3\].training_set: got \['ratio', 'n_synth'\], must be at most one"),
    ({}, {"arms": {"a": {"training_set": {"fraction": 0.5, "n_per_class": None}}},
          "factors": {"training_set.ratio": [1, -1]}}, r"^sweep.factors.training_set.ratio: got -1.0"),
    ({}, {"arms": {"a": {"generator.conditions": ["label", "sex"]}}}, r"^sweep.arms\[a\].generator.conditions\[1\]: "),
])  # fmt: skip
def test_an_error_stands_where_its_key_was_typed(base: dict[str, Any], sweep: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        experiment(sweep=sweep, **base)


def test_arms_may_read_annotations_otherwise() -> None:
    arms_ = {"a": {"data": {"labels": {"policy": {"1": "ones"}}}}, "b": {"data.age_bins": [50]}}
    found = [a.experiment.data for a in arms(experiment(sweep={"arms": arms_}))]
    assert found[0].labels.policy == {"1": "ones"}
    assert found[1].age_bins == [50]


@pytest.mark.parametrize("key", ["evaluation.seed", "compute.trial_cpus", "root", "name", "sweep.seeds"])
def test_factors_and_seeds_judge_alike(key: str) -> None:
    for sweep in ({"factors": {key: [1]}}, {"seeds": [0, 1], "seed_keys": ["classifier.seed", key]}):
        with pytest.raises(ConfigError, match=r"sweep.(factors|seed_keys).*Arms differ in what is made and trained"):
            experiment(sweep=sweep)


@pytest.mark.parametrize(("sections", "text"), [
    ({"sweep": {"factors": {"sampling.steps": 5}}}, "sweep.factors.sampling.steps: .*a list of values"),
    ({"sweep": {"factors": {"sampling.steps": [5, 0]}}}, "sweep.factors.sampling.steps: got 0, must be"),
    ({"sweep": {"factors": {"training_set.ratio": [1, 1.0]}}},
     r"sweep.factors.training_set.ratio: got \[1, 1.0\], must be different values.*count its seeds twice"),
    ({"sweep": {"factors": {"generator.preset": ["small", "large", "small"]}}}, "must be different values"),
    ({"sweep": {"seeds": [1, 1]}}, "sweep.seeds"),
    ({"sweep": {"seeds": [-1, 1]}}, r"^sweep.seeds: got \[-1, 1\], must be each 0 to"),
    ({"sweep": {"seeds": [0, 1], "seed_keys": ["generator.seed"]}},
     r"sweep.seed_keys: got \['generator.seed'\], must be a list with classifier.seed .* one classifier, counted"),
    ({"sweep": {"arms": {"a": {}}}, "classifier": None}, "classifier: got None.*Add `classifier: {}`"),
    ({"sweep": {"arms": {"a": {}, "b": {}}}, "evaluation": {"primary": {"arm": "a", "against": "c"}}},
     "evaluation.primary.against: got 'c', must be an arm"),
    ({"sweep": {"arms": {"a": {}, "b": {}}}, "evaluation": {"primary": {"arm": "b", "against": "b"}}},
     "evaluation.primary.against: got 'b', must be another arm than evaluation.primary.arm"),
    ({"evaluation": {"primary": {"test_set": "mars"}}}, "evaluation.primary.test_set.*one of test"),
    ({"evaluation": {"test_sets": {"val": {}}}}, "another name"),
    ({"evaluation": {"test_sets": {"st. mary": {}}}}, "evaluation.test_sets.st. mary: .*letters, digits, dash"),
    ({"evaluation": {"test_sets": {"mars": {"kind": "cvs"}}}}, "evaluation.test_sets.mars.kind.*Did you mean csv"),
    ({"evaluation": {"bootstraps": 10}}, "evaluation.bootstraps"),
    ({"evaluation": {"fidelity": {"extractor": "vgg"}}}, "pixels, inception, timm:NAME"),
    ({"classifier": {"mixup": 0.2, "batch_size": 9}}, "even with mixup"),
    ({"classifier": {"lr": 0}}, "classifier.lr: got 0.0, must be > 0"),
    ({"classifier": {"batch_size": 9}, "compute": {"classifier_workers": 2}}, "divisible by compute.classif"),
    ({"classifier": {"architectur": "x"}}, "Did you mean classifier.architecture"),
    ({"training_set": {"ratio": 1, "n_synth": 5}}, "at most one of ratio, n_synth, quota"),
    ({"training_set": {"strategy": "real", "real_fraction": 0.5}}, "null unless the strategy mixes"),
    ({"training_set": {"real_fraction": 0.001}}, r"real_fraction: got 0.001, .*It makes 0 of classifier.batch_size"),
    ({"training_set": {"real_fraction": 0.999}}, "real_fraction: got 0.999, .*It makes 64 of classifier.batch_size"),
    ({"training_set": {"strategy": "pretrain"}, "classifier": {"steps": 1}}, "pretrain.step_share"),
])  # fmt: skip
def test_what_is_refused(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        experiment(**sections)


def test_vary_changes_only_what_is_said() -> None:
    e = experiment()
    other = vary(e, {"classifier.head": [512], "data.labels.policy": {"edema": "ones"}})
    assert other.classifier is not None
    assert other.classifier.head == [512]
    assert other.data.labels.policy == {"edema": "ones"}
    assert vary(other, {"classifier.head": [], "data.labels.policy": {"edema": "ignore"}}).plan == e.plan


def test_nulls_of_the_classifier_follow_the_images() -> None:
    e = experiment(classifier={"steps": 55}, data={"kind": "digits", "image": {"size": 8}})
    assert e.classifier is not None
    found = resolve_classifier(e.classifier, e.data.image)
    assert (found.size, found.validate_every) == (8, 5)


def test_the_quickstart_is_what_its_page_promises() -> None:
    from pathlib import Path

    import raysynth

    e = load_experiment(str(Path(raysynth.__file__).parent / "quickstart.yaml"))
    found = arms(e)
    assert {a.seed for a in found} == {0, 1, 2}
    strategies = {a.experiment.training_set.strategy for a in found}
    assert {"real", "duplicate", "mix", "pretrain", "upper_bound"} == strategies
    ratios = {a.experiment.training_set.ratio for a in found if a.experiment.training_set.strategy == "mix"}
    assert ratios == {1, 3, 10}
    assert {a.experiment.generator.train_on for a in found} == {"donor", "classifier_subset"}
    assert e.training_set.n_per_class == 10
