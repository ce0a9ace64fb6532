"""Reads an experiment file: YAML and `key=value` words -> a checked, frozen `Experiment`.

Nothing below this module sees a DictConfig. Every refusal names the full key, what was got, what is allowed
and the remedy.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysynth.core.checks import check, check_images
from raysynth.core.errors import ConfigError, require
from raysynth.core.evidence import Evaluation, Primary, Sweep
from raysynth.core.experiment import Columns, Data, Experiment, Split
from raysynth.core.keys import check_keys, explain_value, is_typed, taken_apart
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
    experiment = _object(merged)
    check(experiment)
    return experiment


def _object(merged: Any) -> Experiment:
    try:
        experiment: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, merged) from error
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
            with keys_of_arm(name, settings, s.factors):
                arm = _varied(merged, {**settings, **dict.fromkeys(s.seed_keys, seed)})
            found.append(Arm(label, seed, settings, arm, name, tuple(s.factors)))
    return found


@contextmanager
def keys_of_arm(of: str, settings: Mapping[str, Any], factors: Collection[str]) -> Iterator[None]:
    """Errors of an arm are told with the key where it was typed: `sweep.factors.KEY` or `sweep.arms[NAME].KEY` where
    they differ between arms, else KEY itself.

    Args:
        of, settings, factors: as `Arm` has them.
    """
    try:
        yield
    except ConfigError as error:
        key, remedy = error.key, error.remedy
        by_factor, own = ([k for k, _ in taken_apart({k: v for k, v in settings.items() if (k in factors) is wanted})]
                          for wanted in (True, False))  # fmt: skip
        if is_typed(key, by_factor):
            key = f"sweep.factors.{key}"
        elif is_typed(key, own):
            key = f"sweep.arms[{of}].{key}"
        elif of:
            remedy = f"{remedy} Found in the arm {of}.".lstrip()
        raise type(error)(key, error.got, error.allowed, remedy) from error


OF_THE_IMAGES = ("images", "licence")
"""Keys of `data` that say nothing of images from elsewhere. `dataset` may: its patients may be the same people."""
NAMED = (("columns", "findings"), ("columns", "attributes"), ("labels", "policy"))
"""Mappings of `data`, whose entries a test set may lack."""


def external_data(e: Experiment, name: str) -> Experiment:
    """The experiment of an external test set: `evaluation.test_sets[name]` laid over `data`. Raises ConfigError."""
    with keys_of_test_set(e, name):
        taken, section = _taken_over(e.data, e.evaluation.test_sets[name])
        merged = _merge(OmegaConf.structured(Experiment), {"name": f"{e.name}-{name}", "data": taken})
        own = _object(_merge(merged, {"data": section}))
        found = dataclasses.replace(e, name=own.name, data=own.data, sweep=Sweep(), evaluation=Evaluation())
        check_images(found)
        channels, trained = (str(resolve_image(d.image).channels) for d in (own.data, e.data))
        require(
            channels == trained, "data.image.channels", channels, f"{trained}, as classifiers are trained",
            f"Type {trained}, whatever the preset says: images are converted as they are read.",
        )  # fmt: skip
    return found


def _taken_over(data: Data, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a test set has of `data`, and what is to be laid over it: its section without what that sets to null."""
    # Every image of it is tested: however this experiment's own are split, it is the same set, and nobody asks that
    # its rarest class has patients for three splits.
    columns = dataclasses.replace(data.columns, split=None)
    taken = dataclasses.asdict(dataclasses.replace(data, split=Split(val=0, test=0), columns=columns))
    own: dict[str, Any] = copy.deepcopy(dict(section))
    if "path" in own or "kind" in own:
        taken |= dict.fromkeys(OF_THE_IMAGES, "")
    for part, key in NAMED:
        typed = _mapping(own, part).get(key, ())
        if typed is None or typed == {}:
            taken[part][key] = own[part].pop(key) or {}
        elif isinstance(typed, dict):
            for lacking in [n for n, v in typed.items() if v is None and n in taken[part][key]]:
                del taken[part][key][lacking], typed[lacking]
                if key == "findings":
                    taken["labels"]["classes"] = [c for c in taken["labels"]["classes"] if c != lacking]
                    taken["labels"]["policy"].pop(lacking, None)
    if own.get("kind", data.kind) not in ("csv", "parquet"):  # which have columns: nor is a patient told by one
        taken["columns"] = dataclasses.asdict(Columns())
    if _mapping(own, "columns").get("label"):
        taken["columns"]["findings"] = {}
    elif _mapping(own, "columns").get("findings"):
        taken["columns"]["label"] = None
    if classes := _mapping(own, "labels").get("classes"):
        taken["labels"]["policy"] = {k: v for k, v in taken["labels"]["policy"].items() if k in classes}
    return taken, own


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section as it was typed; empty where it is none, which is refused when it is laid over the others."""
    return found if isinstance(found := content.get(key), dict) else {}


@contextmanager
def keys_of_test_set(e: Experiment, name: str) -> Iterator[None]:
    """Errors of an external test set's `data` section are told with the key where it stands, and what to type there if
    it stands in `data`."""
    try:
        yield
    except ConfigError as error:
        section, _, key = error.key.partition(".")
        if section != "data":
            raise
        at, typed = f"evaluation.test_sets.{name}", (k for k, _ in taken_apart(e.evaluation.test_sets[name]))
        keys = "|".join(f.name for f in dataclasses.fields(Data))
        allowed, remedy = (re.sub(rf"\bdata\.(?=({keys})\b)", f"{at}.", s) for s in (error.allowed, error.remedy))
        key = f"{at}.{key}".rstrip(".")
        may_lack = error.key.startswith(("data.columns.", "data.labels.policy.")) and error.key != "data.columns.file"
        if may_lack and not is_typed(key, (f"{at}.{k}" for k in typed)):
            remedy = f"{remedy} It is taken over from `data`: type {key}: null where the set has none.".lstrip()
        raise type(error)(key, error.got, allowed, remedy) from error


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
