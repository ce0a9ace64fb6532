"""The section `generator` of an experiment: what makes synthetic images, or where they are taken from.

A field whose default is `null` takes its value from `preset` (see `core.presets`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ImportColumns:
    """Which column of an external set's listing holds what; labels are read as `data.labels` says."""

    file: str = "file"
    """Image path relative to `generator.images`, or an `image` struct / bytes column for parquet."""
    id: str | None = None
    """Unique image id; null: the file path."""
    label: str | None = None
    """As data.columns.label."""
    findings: dict[str, str] = field(default_factory=dict)
    """As data.columns.findings."""
    attributes: dict[str, str] = field(default_factory=dict)
    """As data.columns.attributes; every one must be an attribute of the real data too."""
    source: str | None = None
    """Id of the real image of `data` that an image was made from; nothing where it was made from none."""
    patient: str | None = None
    """Patient of `data` that it was made from."""
    prompt: str | None = None
    """Text that it was made from."""
    seed: str | None = None
    """Noise seed, a whole number."""
    guidance: str | None = None
    """Guidance scale, a number."""


@dataclass(frozen=True)
class Generator:
    """Where synthetic images come from: the pixel-space conditional DDPM (Ho 2020; the Synthetically Enhanced family),
    trained here or before, or a set that was rendered elsewhere."""

    kind: Literal["ddpm", "external"] = "ddpm"
    """external: nothing is trained or rendered; the images listed at `path` are taken in."""
    path: str = ""
    """ddpm: a generator trained before or elsewhere, which is used as it is: a train-generator artifact or its
    exported folder. external: the CSV, or the parquet file or folder. Local or s3://."""
    images: str = ""
    """external: folder the CSV's file column is relative to; empty: the CSV's own folder."""
    columns: ImportColumns = field(default_factory=ImportColumns)
    """external: what the listing's columns mean."""
    on_held_out: Literal["refuse", "quarantine"] = "refuse"
    """external: images made from a validation or test image, or of its patient, end the import or are left out."""
    preset: Literal["tiny", "small", "base", "paper"] = "tiny"
    """tiny 0.7 M parameters (CPU, <= 32 px) ... paper: 128 channels, multipliers 1,1,2,2,4,4, 256 px."""
    train_on: Literal["classifier_subset", "train", "donor"] = "classifier_subset"
    """Which real images the generator sees: the classifier's subset; the whole train split; or the train
    split without the subset's patients. More than the subset must be typed, and reports say so."""
    size: int | None = None
    """Side of generated images, pixels; null: data.image.size."""
    base_channels: int | None = None
    channel_multipliers: list[int] | None = None
    res_blocks: int | None = None
    attention_resolutions: list[int] | None = None
    """Feature-map sides, in pixels, that have self-attention."""
    heads: int | None = None
    dropout: float = 0.0
    conditions: list[str] = field(default_factory=lambda: ["label"])
    """What the generator is told: `label` and any attribute names; `age` enters in decades."""
    condition_dropout: float = 0.1
    """Probability of training a sample without condition, for classifier-free guidance (Ho & Salimans
    2022)."""
    prediction: Literal["v", "epsilon"] = "v"
    schedule: Literal["cosine", "linear", "sigmoid"] = "cosine"
    timesteps: int = 1000
    zero_terminal_snr: bool = True
    """Rescale the schedule so that the last step is pure noise (Lin 2024, 2305.08891)."""
    min_snr_gamma: float | None = None
    """Min-SNR loss weight (Hang 2023, 2303.09556), commonly 5; null: plain MSE."""
    optimizer: Literal["adamw", "lion"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    lr_schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = 1.0
    batch_size: int = 64
    """Global batch, over all workers and accumulation steps."""
    steps: int = 2000
    """Optimizer steps."""
    ema_decay: float = 0.999
    """Exponential moving average of the weights, warmed up as min(decay, (1 + step) / (10 + step))."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of training on a GPU, where fp32 lets convolutions round their factors to TF32; a CPU trains in float32."""
    class_balanced: bool = True
    """Draw classes (or findings) equally often; false: as frequent as in the data."""
    flip: bool = False
    """Random horizontal flips; refused for chest films, whose heart is on the left."""
    seed: int = 0
