"""Reads an experiment file: YAML and `key=value` words -> a checked, frozen `Experiment`.

Nothing below this module sees a DictConfig. Every refusal names the full key, what was got, what is allowed
and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysynth.core.checks import check
from raysynth.core.errors import ConfigError
from raysynth.core.evidence import Evaluation, Primary, Sweep
from raysynth.core.experiment import Experiment, Split
from raysynth.core.keys import check_keys, explain_value
from raysynth.core.presets import resolve_classifier, resolve_generator, resolve_image


def load_experiment(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Reads `path` and applies `key=value` overrides.

    Raises:
        ConfigError: missing file, bad YAML, unknown or ill-typed key, or values that contradict each other.
    """
    file = Path(path)
    if not file.is_file():
        near = [str(p) for p in sorted(Path("jobs").glob("**/*.yaml"))]
        hint = difflib.get_close_matches(path, near, n=1, cutoff=0.5)
        remedy = f"Did you mean {hint[0]}?" if hint else "See jobs/."
        raise ConfigError("EXPERIMENT", path, "a YAML file that exists", remedy)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError("EXPERIMENT", path, "valid YAML in UTF-8", where) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError("EXPERIMENT", kind, "a mapping of sections", "See jobs/ for examples.")
    content.setdefault("name", file.stem)
    return build_experiment(content, overrides)


def build_experiment(content: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """An `Experiment` from a nested mapping and `key=value` words. Raises ConfigError."""
    merged = _merge(OmegaConf.structured(Experiment), content)
    for word in overrides:
        key, sign, _ = word.partition("=")
        if not sign or not key:
            raise ConfigError(word, word, "key=value", "Example: sampling.steps=50")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(key, word, "key=value", str(error).splitlines()[0]) from error
        merged = _merge(merged, parsed)
    experiment = _built(merged)
    arms(experiment)
    for name in experiment.evaluation.test_sets:
        external_data(experiment, name)
    return experiment


def _built(merged: Any) -> Experiment:
    try:
        experiment: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, merged) from error
    check(experiment)
    return experiment


def vary(e: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """`e` with some keys changed: dotted keys, or sections as nested mappings. Raises ConfigError."""
    return _varied(_merge(OmegaConf.structured(Experiment), dataclasses.asdict(e)), changes)


def _varied(merged: Any, changes: Mapping[str, Any]) -> Experiment:
    together: dict[str, Any] = {}
    for key, value in changes.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        # Merging into a structured config copies all of it, which takes 20 ms; so the changes are put together first.
        together = OmegaConf.to_container(OmegaConf.merge(together, value))  # type: ignore[assignment]
    return _built(_merge(merged, together))


@dataclass(frozen=True)
class Arm:
    """One trial of a sweep."""

    name: str
    """The arm's name, followed by its factors: the same for every seed."""
    seed: int
    settings: dict[str, Any]
    """Factor -> value of this arm, and the arm's own changes."""
    experiment: Experiment
    """The experiment with the arm's keys and seed, and no sweep."""
    of: str = ""
    """Its name in `sweep.arms`; empty where there are none."""
    factors: tuple[str, ...] = ()
    """Keys of `sweep.factors`."""


def arms(e: Experiment) -> list[Arm]:
    """Every arm of the sweep crossed with its factors and seeds; an experiment without a sweep is one arm.

    Raises:
        ConfigError: a key or value that the experiment does not have, named with its arm.
    """
    s = e.sweep
    alone = dataclasses.replace(e.evaluation, primary=Primary())
    base = dataclasses.replace(e, sweep=Sweep(), evaluation=alone)
    merged = _merge(OmegaConf.structured(Experiment), dataclasses.asdict(base))
    found = []
    for name, factors, label in s.crossed(e.training_set.strategy):
        settings = {**(s.arms.get(name) or {}), **factors}
        for seed in s.seeds:
            with keys_of_arm(name, s.factors):
                arm = _varied(merged, {**settings, **dict.fromkeys(s.seed_keys, seed)})
            found.append(Arm(label, seed, settings, arm, name, tuple(s.factors)))
    return found


@contextmanager
def keys_of_arm(of: str, factors: Collection[str]) -> Iterator[None]:
    """Errors of an arm are told with the key where it differs from the others: `sweep.factors.KEY` or
    `sweep.arms[NAME].KEY`.

    Args:
        of, factors: as `Arm` has them.
    """
    try:
        yield
    except ConfigError as error:
        if any(f"{error.key}.".startswith(f"{key}.") for key in factors):
            where = f"sweep.factors.{error.key}"
        elif of and not error.key.startswith("data.split"):  # no arm has splits of its own
            where = f"sweep.arms[{of}].{error.key}"
        else:
            raise
        raise type(error)(where, error.got, error.allowed, error.remedy) from error


def external_data(e: Experiment, name: str) -> Experiment:
    """The experiment of an external test set: `evaluation.test_sets[name]` laid over `data`. Raises ConfigError."""
    section = e.evaluation.test_sets[name]
    # Every image of it is tested: however this experiment's own are split, it is the same set, and nobody asks that
    # its rarest class has patients for three splits.
    data = dataclasses.replace(
        e.data, split=Split(val=0, test=0), columns=dataclasses.replace(e.data.columns, split=None)
    )
    alone = dataclasses.replace(e, data=data, sweep=Sweep(), evaluation=Evaluation())
    with keys_of_test_set(name):
        return vary(alone, {"data": section, "name": f"{e.name}-{name}"})


@contextmanager
def keys_of_test_set(name: str) -> Iterator[None]:
    """Errors of an external test set's `data` section are told with the key where it stands."""
    try:
        yield
    except ConfigError as error:
        if not error.key.startswith("data"):
            raise
        key = f"evaluation.test_sets.{name}{error.key.removeprefix('data')}"
        raise type(error)(key, error.got, error.allowed, error.remedy) from error


def _merge(base: Any, content: dict[str, Any]) -> Any:
    check_keys(content)
    added = OmegaConf.create(content)
    try:
        return OmegaConf.merge(base, added)
    except OmegaConfBaseException as error:
        raise _explain(error, added) from error


def _explain(error: OmegaConfBaseException, content: DictConfig) -> ConfigError:
    key = str(error.full_key or error.key)
    text = str(error.msg or error).splitlines()[0]
    if "Missing mandatory" in text:
        return ConfigError(key, None, "set", f"Add `{key}:` to the file.")
    if "nterpolation" in text or "Environment variable" in text:
        return ConfigError(key, None, "something that resolves", text)
    return explain_value(key, OmegaConf.select(content, key))


def resolved(e: Experiment) -> Experiment:
    """`e` with every preset written out; what `--dry-run` prints."""
    image = resolve_image(e.data.image)
    return dataclasses.replace(
        e, data=dataclasses.replace(e.data, image=image), generator=resolve_generator(e.generator, image),
        classifier=resolve_classifier(e.classifier, image) if e.classifier else None,
    )  # fmt: skip
