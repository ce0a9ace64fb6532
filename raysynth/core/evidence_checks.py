"""What can be known to be wrong with the sections of `core.evidence` before any data is read.

As `core.checks`, which calls this: input is an `Experiment`, output nothing or a ConfigError.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from typing import Any

from raysynth.core.errors import require
from raysynth.core.evidence import Sweep
from raysynth.core.experiment import Experiment
from raysynth.core.keys import taken_apart

JUDGING = ("sweep", "evaluation", "compute", "root", "name")
"""What every arm shares whole."""
ARM_DATA = ("data.labels.policy", "data.age_bins")
"""Keys of `data` that an arm may change: how annotations are read, not which images there are, whose, how stored."""


def check_evidence(e: Experiment) -> None:
    """Raises ConfigError for the first value that cannot be used."""
    _check_training_set(e)
    if e.classifier is not None:
        _check_classifier(e)
    _check_evaluation(e)
    _check_sweep(e)


def _check_training_set(e: Experiment) -> None:
    t, p = e.training_set, e.plan
    typed = [k for k in ("ratio", "n_synth") if getattr(t, k) is not None] + (["quota"] if t.quota else [])
    require(len(typed) <= 1, "training_set", typed, "at most one of ratio, n_synth, quota")
    require(
        t.ratio is None or t.ratio > 0, "training_set.ratio", t.ratio, "> 0",
        "Use strategy: real for no synthetic images.",
    )  # fmt: skip
    # How many there are is then known from the data only.
    free = t.strategy == "duplicate" or p.kind == "balanced" or e.generator.kind == "external"
    require(
        free or t.ratio is None or t.ratio <= (p.ratio or p.replicas),
        "training_set.ratio", t.ratio, f"at most the ratio that is rendered ({p.ratio or p.replicas:g})",
        f"Set plan.replicas={math.ceil(t.ratio or 0)} and leave plan.ratio out.",
    )  # fmt: skip
    require(t.n_synth is None or t.n_synth > 0, "training_set.n_synth", t.n_synth, "> 0")
    for name, most in t.quota.items():
        require(most >= 0, f"training_set.quota.{name}", most, ">= 0")
    if t.real_fraction is not None:
        require(0 < t.real_fraction < 1, "training_set.real_fraction", t.real_fraction, "between 0 and 1")
        require(
            t.strategy in ("mix", "permuted"), "training_set.real_fraction", t.real_fraction,
            "null unless the strategy mixes real and synthetic images", f"strategy is {t.strategy}.",
        )  # fmt: skip
        batch = e.classifier.batch_size if e.classifier else 0
        real = round(t.real_fraction * batch)
        require(
            0 < real < batch or not batch, "training_set.real_fraction", t.real_fraction,
            "a fraction that leaves real and synthetic images a place",
            f"It makes {real} of classifier.batch_size ({batch}) images real.",
        )  # fmt: skip
    share = t.pretrain.step_share
    require(0 < share < 1, "training_set.pretrain.step_share", share, "between 0 and 1")
    lr = t.pretrain.lr
    require(lr is None or lr > 0, "training_set.pretrain.lr", lr, "> 0")


def _check_classifier(e: Experiment) -> None:
    c = e.classifier
    assert c is not None
    for key, least in (
        ("steps", 1), ("batch_size", 2), ("warmup_steps", 0), ("weight_decay", 0), ("momentum", 0), ("mixup", 0),
        ("cutmix", 0), ("label_smoothing", 0), ("dropout", 0), ("drop_path", 0), ("mix_probability", 0), ("seed", 0),
    ):  # fmt: skip
        require(getattr(c, key) >= least, f"classifier.{key}", getattr(c, key), f">= {least}")
    for key in ("lr", "grad_clip"):
        require(getattr(c, key) > 0, f"classifier.{key}", getattr(c, key), "> 0")
    for key in ("label_smoothing", "dropout", "drop_path"):
        require(getattr(c, key) < 1, f"classifier.{key}", getattr(c, key), "in [0, 1)")
    require(c.mix_probability <= 1, "classifier.mix_probability", c.mix_probability, "in [0, 1]")
    require(
        c.ema_decay is None or 0 <= c.ema_decay < 1, "classifier.ema_decay", c.ema_decay, "in [0, 1), or null"
    )
    for key in ("size", "validate_every", "early_stopping"):
        value = getattr(c, key)
        require(value is None or value >= 1, f"classifier.{key}", value, ">= 1")
    for width in c.head:
        require(width >= 1, "classifier.head", c.head, "widths >= 1")
    require(
        not (c.mixup or c.cutmix) or c.batch_size % 2 == 0, "classifier.batch_size", c.batch_size,
        "even with mixup or cutmix", "Images are mixed in pairs.",
    )  # fmt: skip
    workers = e.compute.classifier_workers or 1
    pair = 2 if c.mixup or c.cutmix else 1
    require(
        c.batch_size % (workers * pair) == 0, "classifier.batch_size", c.batch_size,
        f"divisible by compute.classifier_workers ({workers})" + (" x 2" if pair == 2 else ""),
    )  # fmt: skip
    for key in ("trial_cpus", "trial_gpus"):
        require(getattr(e.compute, key) > 0, f"compute.{key}", getattr(e.compute, key), "> 0")
    require(workers >= 1, "compute.classifier_workers", workers, ">= 1")
    if e.training_set.stages == 2:
        first = round(e.training_set.pretrain.step_share * c.steps)
        require(
            0 < first < c.steps, "training_set.pretrain.step_share", e.training_set.pretrain.step_share,
            f"a share that leaves each stage a step of classifier.steps ({c.steps})",
        )  # fmt: skip


def _check_evaluation(e: Experiment) -> None:
    v = e.evaluation
    require(v.min_positives >= 1, "evaluation.min_positives", v.min_positives, ">= 1")
    require(v.bootstraps >= 100, "evaluation.bootstraps", v.bootstraps, ">= 100")
    require(0.5 <= v.confidence < 1, "evaluation.confidence", v.confidence, "in [0.5, 1)")
    require(v.seed >= 0, "evaluation.seed", v.seed, ">= 0")
    classes = e.data.labels.classes
    for name in v.findings:
        require(
            not classes or name in classes, "evaluation.findings", name,
            f"one of data.labels.classes ({', '.join(classes)})",
        )  # fmt: skip
    for name, section in v.test_sets.items():
        key = f"evaluation.test_sets.{name}"
        require(re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None, key, name, "letters, digits, dash, underscore",
                "It names folders.")  # fmt: skip
        require(name not in ("test", "val", "train"), key, name, "another name", "It names the split of `data`.")
        require(isinstance(section, dict), key, section, "a section of keys like `data`")
    known = ("test", *v.test_sets)
    require(
        v.primary.test_set in known, "evaluation.primary.test_set", v.primary.test_set, f"one of {', '.join(known)}"
    )
    n = v.fidelity.images
    require(n is None or n >= 2, "evaluation.fidelity.images", n, ">= 2")
    kind = v.fidelity.extractor
    require(
        kind in ("pixels", "inception", "none") or kind.startswith("timm:"), "evaluation.fidelity.extractor", kind,
        "pixels, inception, timm:NAME, timm:NAME@WEIGHTS_FILE, or none",
    )  # fmt: skip


def _check_sweep(e: Experiment) -> None:
    s = e.sweep
    require(bool(s.seeds), "sweep.seeds", s.seeds, "at least one seed")
    require(len(set(s.seeds)) == len(s.seeds), "sweep.seeds", s.seeds, "different seeds")
    require(all(0 <= seed < 2**63 for seed in s.seeds), "sweep.seeds", s.seeds, "each 0 to 2^63 - 1")
    require(
        len(s.seeds) == 1 or e.classifier is None or "classifier.seed" in s.seed_keys, "sweep.seed_keys", s.seed_keys,
        "a list with classifier.seed where there are several seeds",
        "An arm that the other keys leave alone would be one classifier, counted as several. To vary another seed "
        "alone, make it an arm: `mix x3 b: {generator.seed: 1}`.",
    )  # fmt: skip
    for name, changes in s.arms.items():
        require(
            changes is None or isinstance(changes, dict), f"sweep.arms[{name}]", changes, "a mapping of keys to values",
            f"Example: {name}: {{training_set.ratio: 3}}",
        )  # fmt: skip
    for name in s.only:
        require(name in s.arms, "sweep.only", name, f"an arm of the sweep ({', '.join(s.arms)})")
    for key, values in s.factors.items():
        require(
            isinstance(values, list) and bool(values), f"sweep.factors.{key}", values, "a list of values",
            f"Write [{values}].",
        )  # fmt: skip
        require(
            not any(a == b or f"{a}" == f"{b}" for a, b in itertools.combinations(values, 2)), f"sweep.factors.{key}",
            values, "different values", "Each makes an arm; one that is there twice would count its seeds twice.",
        )  # fmt: skip
    _check_changes(s)
    if (s.arms or s.factors) and e.classifier is None:
        require(False, "classifier", None, "a section where there is a sweep", "Add `classifier: {}` for defaults.")
    p = e.evaluation.primary
    if p.arm or p.against:
        known = [name for _, _, name in s.crossed(e.training_set.strategy)]
        for key, arm in (("arm", p.arm), ("against", p.against)):
            require(
                arm in known, f"evaluation.primary.{key}", arm, f"an arm of the sweep ({', '.join(known)})",
                f"Did you mean {near[0]}?" if (near := difflib.get_close_matches(arm, known, n=1)) else "",
            )  # fmt: skip
        require(p.arm != p.against, "evaluation.primary.against", p.against, "another arm than evaluation.primary.arm")


def _check_changes(s: Sweep) -> None:
    """Refuses keys of arms, factors and seeds in which arms may not differ, and those that two of them set."""
    typed = [(f"sweep.arms[{name}].", changes or {}) for name, changes in s.arms.items()]
    typed += [("sweep.factors.", {key: value}) for key, values in s.factors.items() for value in values]
    changed = [(prefix + key, key, value) for prefix, changes in typed for key, value in taken_apart(changes)]
    for where, key, got in [*changed, *(("sweep.seed_keys", key, key) for key in s.seed_keys)]:
        section = key.split(".")[0]
        require(
            section not in JUDGING, where, got, "a key that an arm may change",
            "Arms differ in what is made and trained, not judged.",
        )  # fmt: skip
        require(
            section != "data" or any(key == k or key.startswith(f"{k}.") for k in ARM_DATA), where, got,
            f"of `data` one of {', '.join(ARM_DATA)}",
            "Arms share images, patients and splits: none trains on what the others are tested on, all are tested on "
            "images read as theirs were. Write one experiment a split; images from elsewhere go under "
            "evaluation.test_sets, other sizes into classifier.size and generator.size.",
        )  # fmt: skip
    _check_overwritten(s, changed)


def _check_overwritten(s: Sweep, changed: list[tuple[str, str, Any]]) -> None:
    """Refuses values that the sweep itself would replace: several arms, told apart by them, would be one classifier.

    Args:
        changed: of arms and factors: the key as typed, the key that it sets, its value.
    """
    for where, key, got in changed:
        if key in s.seed_keys:
            # With several seeds classifier.seed must stay among the seed keys.
            free = key != "classifier.seed" or len(s.seeds) == 1
            require(
                False, where, got, "left out: every arm takes sweep.seeds there",
                "List its values under sweep.seeds" + (f", or take {key} out of sweep.seed_keys." if free else "."),
            )  # fmt: skip
    set_by = {name: {name, *(key for v in values for key, _ in taken_apart({name: v}))}
              for name, values in s.factors.items()}  # fmt: skip
    for arm, changes in s.arms.items():
        own = changes or {}
        for key, got in [*own.items(), *taken_apart(own)]:
            factor = next((name for name, keys in set_by.items() if key in keys), None)
            require(
                factor is None, f"sweep.arms[{arm}].{key}", got, f"left out: sweep.factors.{factor} sets it",
                "Write one arm a value instead of the factor, or leave it to the factor.",
            )  # fmt: skip
