"""What can be known to be wrong with an experiment before any data is read.

Types and key names are the loader's business (core.config); this module knows which values contradict each
other or the science. Input: an `Experiment`; output: nothing, or a ConfigError with key, got, allowed and
remedy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from raysynth.core.errors import require
from raysynth.core.evidence_checks import check_evidence
from raysynth.core.experiment import Experiment, Generator
from raysynth.core.presets import resolve_generator


def check(e: Experiment) -> None:
    """Everything that can be known to be wrong before any data is read. Raises ConfigError."""
    check_images(e)
    _check_generator(e)
    _check_plan(e)
    _check_compute(e)
    check_evidence(e)


def check_images(e: Experiment) -> None:
    """What concerns the real images alone, which are all there is to an external test set. Raises ConfigError."""
    require(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", e.name) is not None, "name", e.name,
            "letters, digits, dash, underscore", "It names folders.")  # fmt: skip
    _check_finite(e, "")
    _check_data(e)


def _check_finite(value: Any, key: str) -> None:
    """No number anywhere is .nan or .inf: comparisons let them through."""
    if isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_finite(item, f"{key}.{name}")


def _check_seed(key: str, seed: int) -> None:
    # What numpy's and torch's generators both take.
    require(0 <= seed < 2**63, key, seed, "0 to 2^63 - 1")


def _check_data(e: Experiment) -> None:
    d = e.data
    require(d.kind == "digits" or bool(d.path), "data.path", d.path, "set", "Where are the real images?")
    require(d.kind != "class_folders" or not d.images, "data.images", d.images, "left out with kind: class_folders",
            "data.path is the folder of class folders.")  # fmt: skip
    if d.kind in ("csv", "parquet"):
        c = d.columns
        require(
            bool(c.label) != bool(c.findings), "data.columns", {"label": c.label, "findings": c.findings},
            "either `label` or `findings`",
            "label: one column of class names; findings: one column a finding.",
        )  # fmt: skip
        require(
            not (c.findings and d.labels.kind == "single"), "data.labels.kind", "single",
            "multi where data.columns.findings is used",
        )  # fmt: skip
        require(
            d.split.patients != "column" or c.patient is not None, "data.split.patients", "column",
            "hash or none without data.columns.patient", "Map data.columns.patient.",
        )  # fmt: skip
    for name in d.columns.attributes:
        require(
            re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and name not in ("label", "age_bin"),
            f"data.columns.attributes.{name}", name, "a lower-case word other than label and age_bin",
        )  # fmt: skip
    classes = d.labels.classes
    require(len(set(classes)) == len(classes), "data.labels.classes", classes, "unique")
    # OmegaConf 2.4 refuses every value of a dict[str, Literal], so the values are checked here.
    for name, policy in d.labels.policy.items():
        require(
            policy in ("ignore", "zeros", "ones"), f"data.labels.policy.{name}", policy,
            "one of ignore, zeros, ones",
        )  # fmt: skip
        require(
            not classes or name in classes, f"data.labels.policy.{name}", name,
            f"one of data.labels.classes ({', '.join(classes)})",
        )  # fmt: skip
    s = d.split
    for key, share in (("val", s.val), ("test", s.test)):
        require(0 <= share < 1, f"data.split.{key}", share, "a fraction in [0, 1)")
    _check_seed("data.split.seed", s.seed)
    both = s.val + s.test
    require(both < 1, "data.split", both, "val + test < 1", "Nothing is left to train on.")
    require(0 <= s.hash_distance <= 10, "data.split.hash_distance", s.hash_distance, "0 to 10 bits of 64")
    require(4 <= d.image.size <= 4096, "data.image.size", d.image.size, "4 to 4096 pixels")
    require(d.age_bins == sorted(set(d.age_bins)), "data.age_bins", d.age_bins, "increasing years")
    t = e.training_set
    require(
        t.n_per_class is None or t.fraction is None, "training_set.fraction", t.fraction,
        "null together with n_per_class",
    )  # fmt: skip
    require(t.n_per_class is None or t.n_per_class >= 1, "training_set.n_per_class", t.n_per_class, ">= 1")
    require(t.fraction is None or 0 < t.fraction <= 1, "training_set.fraction", t.fraction, "in (0, 1]")
    _check_seed("training_set.seed", t.seed)


def _check_generator(e: Experiment) -> None:
    g = resolve_generator(e.generator, e.data.image)
    _check_conditions(g, e)
    if g.kind == "external":
        _check_external(e)
        return
    for key in ("images", "columns"):
        require(getattr(g, key) == getattr(Generator(), key), f"generator.{key}", getattr(g, key),
                "left out unless generator.kind is external")  # fmt: skip
    if not g.path:  # of a generator that is trained already these say nothing
        _check_architecture(g, e)
    require(
        not (g.flip and e.data.image.preset == "chest"), "generator.flip", True, "false for chest films",
        "A mirrored chest film shows situs inversus.",
    )  # fmt: skip
    t = e.training_set
    require(
        g.path != "" or g.train_on != "donor" or t.n_per_class is not None or (t.fraction or 1) < 1,
        "generator.train_on", "donor", "train or classifier_subset where the classifier has all of train",
        "Set training_set.n_per_class or training_set.fraction to leave patients for the generator.",
    )  # fmt: skip


def _check_external(e: Experiment) -> None:
    """A set that was rendered elsewhere: what its listing must say, and what cannot be asked of it."""
    g, p, t = e.generator, e.plan, e.training_set
    c = g.columns
    require(bool(g.path), "generator.path", g.path, "set with kind: external", "Where is the listing of the images?")
    require(
        bool(c.label) != bool(c.findings), "generator.columns", {"label": c.label, "findings": c.findings},
        "either `label` or `findings`", "label: one column of class names; findings: one column a finding.",
    )  # fmt: skip
    require(
        not (c.findings and e.data.labels.kind == "single"), "generator.columns.findings", c.findings,
        "empty with data.labels.kind: single",
    )  # fmt: skip
    for name in c.attributes:
        require(name in e.data.columns.attributes, f"generator.columns.attributes.{name}", name,
                f"one of data.columns.attributes ({', '.join(e.data.columns.attributes)})")  # fmt: skip
    require(
        p.kind == "replicate", "plan.kind", p.kind, "replicate with generator.kind: external",
        "The plan is the listing; choose from it by ratio, n_synth or quota.",
    )  # fmt: skip
    require(
        t.strategy != "upper_bound", "training_set.strategy", t.strategy, "another with generator.kind: external",
        "Which real images its generator saw is not known.",
    )  # fmt: skip
    require(
        t.strategy != "duplicate" or t.ratio is not None or t.n_synth is not None, "training_set.strategy", t.strategy,
        "used with training_set.ratio or n_synth where generator.kind is external",
        "How often would each image be repeated?",
    )  # fmt: skip


def _check_architecture(g: Generator, e: Experiment) -> None:
    size, multipliers = g.size or 0, g.channel_multipliers or []
    require(bool(multipliers), "generator.channel_multipliers", multipliers, "at least one level")
    require(min(multipliers) >= 1, "generator.channel_multipliers", multipliers, ">= 1 each")
    for key, least in (("size", 1), ("res_blocks", 1), ("heads", 1), ("base_channels", 8)):
        require(getattr(g, key) >= least, f"generator.{key}", getattr(g, key), f">= {least}")
    _check_numbers(g)
    shrink = 2 ** (len(multipliers) - 1)
    require(
        size % shrink == 0, "generator.size", size, f"a multiple of {shrink} for {len(multipliers)} levels",
        f"Use {max(1, round(size / shrink)) * shrink}, or fewer generator.channel_multipliers.",
    )  # fmt: skip
    sides = [size // 2**i for i in range(len(multipliers))]
    for side in g.attention_resolutions or []:
        # A preset's list serves several sizes; only a typed one must fit.
        require(
            e.generator.attention_resolutions is None or side in sides,
            "generator.attention_resolutions", side, f"among the feature-map sides {sides}",
        )  # fmt: skip
    channels = g.base_channels or 0
    require(channels % 8 == 0, "generator.base_channels", channels, "a multiple of 8 (group norm)")
    heads = g.heads or 1
    require(
        all(channels * m % heads == 0 for m in multipliers), "generator.heads", heads,
        "a divisor of every level's channels",
    )  # fmt: skip
    require(
        not (g.prediction == "epsilon" and g.zero_terminal_snr), "generator.prediction", "epsilon",
        "v where generator.zero_terminal_snr is true",
        "At pure noise epsilon says nothing of the image: use prediction: v, or zero_terminal_snr: false.",
    )  # fmt: skip


def _check_conditions(g: Generator, e: Experiment) -> None:
    allowed = {"label", "age_bin", *e.data.columns.attributes, *(["site"] if e.data.columns.site else [])}
    for i, name in enumerate(g.conditions):
        require(
            name in allowed, f"generator.conditions[{i}]", name, f"one of {', '.join(sorted(allowed))}",
            "Map the attribute under data.columns.attributes.",
        )  # fmt: skip


def _check_numbers(g: Generator) -> None:
    """Values that train nothing, or that torch would refuse much later."""
    for key, least in (("timesteps", 2), ("batch_size", 1), ("steps", 1), ("warmup_steps", 0), ("weight_decay", 0)):
        require(getattr(g, key) >= least, f"generator.{key}", getattr(g, key), f">= {least}")
    for key in ("lr", "grad_clip", "min_snr_gamma"):
        value = getattr(g, key)
        require(value is None or value > 0, f"generator.{key}", value, "> 0")
    for key in ("ema_decay", "condition_dropout", "dropout"):
        require(0 <= getattr(g, key) < 1, f"generator.{key}", getattr(g, key), "in [0, 1)")
    _check_seed("generator.seed", g.seed)


def _check_plan(e: Experiment) -> None:
    p, s, external = e.plan, e.sampling, e.generator.kind == "external"
    typed = [k for k in ("ratio", "n_synth") if getattr(p, k) is not None] + (["quota"] if p.quota else [])
    require(len(typed) <= 1, "plan", typed, "at most one of ratio, n_synth, quota")
    require(p.replicas >= 1, "plan.replicas", p.replicas, ">= 1")
    require(
        p.kind == "balanced" or external or p.ratio is None or p.ratio <= p.replicas, "plan.ratio", p.ratio,
        f"at most plan.replicas ({p.replicas})", f"Set plan.replicas={math.ceil(p.ratio or 0)}.",
    )  # fmt: skip
    _check_seed("plan.seed", p.seed)
    for name, most in p.quota.items():
        require(most >= 0, f"plan.quota.{name}", most, ">= 0")
    require(
        p.ratio is None or p.ratio >= 0, "plan.ratio", p.ratio, ">= 0", "Leave it out to render every row."
    )
    require(p.n_synth is None or p.n_synth >= 0, "plan.n_synth", p.n_synth, ">= 0")
    if p.kind == "balanced":
        require(p.n is not None and p.n >= 1, "plan.n", p.n, ">= 1 for a balanced plan")
        require(bool(p.over), "plan.over", p.over, "at least one column to balance")
    else:
        require(not p.targets, "plan.targets", p.targets, "empty for kind: replicate", "Use kind: balanced.")
    require(
        s.guidance_scale >= 1, "sampling.guidance_scale", s.guidance_scale, ">= 1",
        "CFG 0 in Mediffusion and w = 0 in Ho & Salimans are 1 here: guidance_scale 1 is the conditional "
        "model alone.",
    )  # fmt: skip
    require(
        s.guidance_scale == 1 or e.generator.condition_dropout > 0 or e.generator.path != "",
        "sampling.guidance_scale", s.guidance_scale, "1 with generator.condition_dropout 0",
        "The generator never learned the unconditional model.",
    )  # fmt: skip
    require(0 <= s.guidance_rescale <= 1, "sampling.guidance_rescale", s.guidance_rescale, "in [0, 1]")
    interval = s.guidance_interval
    require(
        interval is None or (len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1),
        "sampling.guidance_interval", interval, "[start, stop] with 0 <= start < stop <= 1",
    )  # fmt: skip
    require(
        interval is None or int(interval[0] * s.steps) < int(interval[1] * s.steps),
        "sampling.guidance_interval", interval, f"wide enough to hold one of {s.steps} steps",
    )  # fmt: skip
    require(
        interval is None or s.guidance_scale > 1, "sampling.guidance_interval", interval,
        "null with sampling.guidance_scale 1",
    )  # fmt: skip
    require(0 <= s.eta <= 1, "sampling.eta", s.eta, "in [0, 1]")
    require(s.eta == 0 or s.sampler == "ddim", "sampling.eta", s.eta, "0 unless sampler is ddim")
    require(
        s.steps >= 1 and (s.steps <= e.generator.timesteps or e.generator.path != ""), "sampling.steps", s.steps,
        f"1 to generator.timesteps ({e.generator.timesteps})",
    )  # fmt: skip


def _check_compute(e: Experiment) -> None:
    c, g = e.compute, e.generator
    for key in (
        "render_workers", "max_render_workers", "micro_batch", "shard_rows", "render_threads", "ingest_rows",
        "train_threads", "checkpoint_every", "sample_every", "train_accumulation",
    ):  # fmt: skip
        value = getattr(c, key)
        require(value is None or value >= 1, f"compute.{key}", value, ">= 1")
    require(
        not c.compile or c.micro_batch is not None, "compute.compile", True, "false while compute.micro_batch is null",
        "Every size that is tried would be compiled anew: type compute.micro_batch.",
    )  # fmt: skip
    require(c.cpus_per_renderer >= 0, "compute.cpus_per_renderer", c.cpus_per_renderer, ">= 0")
    gpus = c.gpus_per_renderer
    require(
        0 <= gpus <= 1 or (gpus > 1 and gpus.is_integer()), "compute.gpus_per_renderer", gpus,
        "a share in [0, 1] or a whole number", "Ray gives a process a part of one GPU, or whole ones.",
    )  # fmt: skip
    require(c.shard_seconds > 0, "compute.shard_seconds", c.shard_seconds, "> 0")
    lost = c.max_failed_fraction
    require(0 <= lost <= 1, "compute.max_failed_fraction", lost, "in [0, 1]")
    pieces = max(1, c.train_workers or 1) * c.train_accumulation
    require(
        g.batch_size % pieces == 0, "generator.batch_size", g.batch_size,
        f"divisible by train_workers x train_accumulation ({pieces})",
        "The global batch is science: change the workers or the batch knowingly.",
    )  # fmt: skip
