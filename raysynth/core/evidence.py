"""Sections of the experiment that ask whether the synthetic images help: what a classifier is trained on and how, how
it is judged, and which arms are compared.

A field whose default is `null` takes its value from the images (see `core.presets.resolve_classifier`).
"""

from __future__ import annotations

import difflib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raysynth.core.errors import ConfigError


@dataclass(frozen=True)
class Pretrain:
    """The second stage of the strategies `pretrain` and `real_real`: what is kept of the first."""

    step_share: float = 0.5
    """Share of `classifier.steps` spent on the first stage; the rest fine-tunes on real images."""
    head: Literal["keep", "reset"] = "keep"
    """The classification head at the start of fine-tuning."""
    reset_optimizer: bool = True
    """Fine-tuning starts with fresh optimizer moments, and the learning-rate schedule starts again."""
    reset_ema: bool = True
    """The moving average starts again from the fine-tuned weights."""
    lr: float | None = None
    """Learning rate of fine-tuning; null: classifier.lr."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: fine-tuning trains the head alone (a linear probe)."""


@dataclass(frozen=True)
class TrainingSet:
    """What the classifier is trained on: a patient-safe, nested, seeded subset of the real train split, and synthetic
    images by strategy."""

    n_per_class: int | None = None
    """Real images a class (single-label) or positives a finding (multi-label); null: all."""
    fraction: float | None = None
    """Fraction of the train split; not together with `n_per_class`."""
    seed: int = 0
    """Another subset of the same size."""
    strategy: Literal[
        "real", "synthetic", "mix", "pretrain", "duplicate", "upper_bound", "real_real", "permuted"
    ] = "mix"
    """real; synthetic; mix of both; pretrain on synthetic, then fine-tune on real. Controls: duplicate (real images
    repeated instead of synthetic ones); upper_bound (also the real images that the generator saw); real_real (two
    stages, both real); permuted (mix with the synthetic images' labels shuffled)."""
    ratio: float | None = None
    """Synthetic (or duplicated) images per real image: those with rank < ratio * n_real; null: all rendered."""
    n_synth: int | None = None
    """The first n_synth synthetic images by rank, instead of `ratio`."""
    quota: dict[str, int] = field(default_factory=dict)
    """At most this many synthetic images of each class or finding, instead of `ratio`."""
    real_fraction: float | None = None
    """Share of real images in every batch of a mix; null: as in the union of both."""
    validation: Literal["all", "scaled"] = "all"
    """all: the whole real validation split, counted as real data used; scaled: the same share of each class as the
    training subset is of the train split."""
    pretrain: Pretrain = field(default_factory=Pretrain)

    @property
    def subset(self) -> dict[str, Any]:
        """What decides which real images these are; all of this section that generator and plan depend on."""
        return {"n_per_class": self.n_per_class, "fraction": self.fraction, "seed": self.seed}

    @property
    def needs_synthetic(self) -> bool:
        """Whether the strategy trains on synthetic images at all."""
        return self.strategy in ("synthetic", "mix", "pretrain", "permuted")

    @property
    def stages(self) -> int:
        """Training stages: two where one set is fine-tuned on after another."""
        return 2 if self.strategy in ("pretrain", "real_real") else 1


@dataclass(frozen=True)
class Classifier:
    """A timm classifier trained for a fixed budget of optimizer steps, the same for every arm."""

    architecture: str = "resnet18"
    """Any timm model by name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as `depth: 2` for a small ViT."""
    init: str = "scratch"
    """scratch; pretrained (the weights timm has under that name); a hub id `hf-hub:...`; or a local weights file."""
    size: int | None = None
    """Side of the images, pixels; null: data.image.size."""
    head: list[int] = field(default_factory=list)
    """Widths of hidden layers between features and classes, each with ReLU; [512] is the Synthetic-XRay article's."""
    dropout: float = 0.0
    """Before the last layer."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone, where the architecture has it."""
    augmentation: Literal["none", "standard", "heavy"] = "standard"
    """By modality: chest films are never flipped, skin keeps its hue."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of each class (or positives of each finding) weighs n / (classes * n_class)."""
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    """balanced: classes (or findings) equally often."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """alpha of mixup (Zhang 2018); 0: off."""
    cutmix: float = 0.0
    """alpha of CutMix (Yun 2019); 0: off. With both, each pair takes one of them."""
    mix_probability: float = 1.0
    """Probability that a pair is mixed at all."""
    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    """Of sgd."""
    warmup_steps: int = 20
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float = 1.0
    ema_decay: float | None = None
    """Moving average of the weights, warmed up; validated and exported in place of them. Null: none."""
    batch_size: int = 64
    """Global batch, over all workers."""
    steps: int = 1000
    """Optimizer steps of every arm, over both stages where there are two: equal compute."""
    validate_every: int | None = None
    """Optimizer steps between validations; null: a tenth of `steps`."""
    monitor: Literal["auroc", "balanced_accuracy", "accuracy", "loss"] = "auroc"
    """Metric on real validation images whose best checkpoint is kept. Ties keep the earlier one."""
    early_stopping: int | None = None
    """Validations without improvement that end training; null: the whole budget is spent."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of training on a GPU, where fp32 lets convolutions round their factors to TF32; a CPU trains in float32.
    Validation and test predictions are in full float32, whatever this says."""
    seed: int = 0
    """Initial weights, order, augmentation."""

    @property
    def weights_file(self) -> Path | None:
        """The local file of `init`, absolute; null where `init` is a name. Raises ConfigError if it is not there."""
        if self.init in ("scratch", "pretrained") or self.init.startswith("hf-hub:"):
            return None
        file = Path(os.path.abspath(os.path.expanduser(self.init)))
        if not file.is_file():
            near = difflib.get_close_matches(self.init, ["scratch", "pretrained"], n=1)
            raise ConfigError(
                "classifier.init", self.init, "scratch, pretrained, hf-hub:ID, or a weights file that exists",
                f"Did you mean {near[0]}?" if near else "It must be at this path on every node.",
            )  # fmt: skip
        return file


@dataclass(frozen=True)
class Primary:
    """The one confirmatory contrast; everything else is exploratory and says so."""

    arm: str = ""
    """Arm of the sweep that is expected to be better; empty: no contrast is confirmatory."""
    against: str = ""
    """Arm it is compared with."""
    metric: Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "f1"] = "auroc"
    """Macro over the findings, averaged over the seeds."""
    test_set: str = "test"


@dataclass(frozen=True)
class Fidelity:
    """How close synthetic images are to held-out real ones."""

    extractor: str = "pixels"
    """Features compared: `pixels` (grey or RGB at 16 px at most), `inception` (clean-fid's, which makes it FID), or a
    timm model `timm:NAME`, `timm:NAME@/weights.safetensors` with weights of one's own. Named in every result."""
    images: int | None = None
    """Images of each side; null: as many as there are held-out real ones."""
    classes: bool = True
    """Also for each class."""


@dataclass(frozen=True)
class Evaluation:
    """How a trained classifier is judged. Thresholds come from real validation images and are frozen."""

    primary: Primary = field(default_factory=Primary)
    findings: list[str] = field(default_factory=list)
    """Findings of the macro averages, the same for every arm; empty: every class."""
    subgroups: list[str] = field(default_factory=lambda: ["*"])
    """Attributes whose groups are judged one by one; `*`: every attribute (age by its bins), and the site."""
    threshold_rule: Literal["youden", "f1", "half"] = "youden"
    """Chosen per finding on validation: Youden's J, best F1, or 0.5 untouched."""
    min_positives: int = 10
    """A finding with fewer positives (or negatives) in a test set or subgroup is withheld, and counted as withheld."""
    bootstraps: int = 1000
    """Resamplings of test patients behind every interval."""
    confidence: float = 0.95
    seed: int = 0
    test_sets: dict[str, Any] = field(default_factory=dict)
    """Name -> a `data` section of its own: an external test set, every image of which is tested. Keys left out are
    those of `data`, but for its splits, and for images and licence where `path` or `kind` is typed; null takes out a
    column, attribute, finding or policy that the set has not."""
    fidelity: Fidelity = field(default_factory=Fidelity)


@dataclass(frozen=True)
class Sweep:
    """The arms compared: every arm, crossed with every factor and every seed, is one trial of Ray Tune."""

    arms: dict[str, Any] = field(default_factory=dict)
    """Name -> keys that differ in this arm, such as `mix x3: {training_set.strategy: mix, training_set.ratio: 3}`."""
    only: list[str] = field(default_factory=list)
    """Train and compare these arms alone; empty: all. The others' classifiers stay and count again later."""
    factors: dict[str, Any] = field(default_factory=dict)
    """Key -> list of values, crossed with every arm: `sampling.guidance_scale: [1, 2, 4]`."""
    seeds: list[int] = field(default_factory=lambda: [0])
    seed_keys: list[str] = field(default_factory=lambda: ["classifier.seed"])
    """Keys that take each seed; classifier.seed is one of them, so that every seed of every arm is a training of its
    own. Adding training_set.seed also varies the real subset (and with it the generator)."""

    @property
    def chosen(self) -> dict[str, Any]:
        """The arms that are compared."""
        return {name: keys for name, keys in self.arms.items() if not self.only or name in self.only}

    def crossed(self, strategy: str) -> list[tuple[str, dict[str, Any], str]]:
        """The arms that are compared, for any seed: name in `arms` (empty without), factor -> value, and what each is
        called.

        Args:
            strategy: `training_set.strategy`, after which an experiment without arms and factors is called.
        """
        found = []
        for name, values in itertools.product(self.chosen or [""], itertools.product(*self.factors.values())):
            factors = dict(zip(self.factors, values, strict=True))
            words = [name, *(f"{key.rpartition('.')[2]} {value}" for key, value in factors.items())]
            found.append((name, factors, ", ".join(w for w in words if w) or strategy))
        return found
