"""The experiment: one frozen dataclass per section of the YAML file.

A field whose default is `null` takes its value from the section's `preset` (see `core.presets`). Everything here is
hashed into artifact names except `compute`, which may change freely. Where synthetic images come from is in
`core.generator`, what asks whether they help in `core.evidence`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from raysynth.core.evidence import Classifier, Evaluation, Sweep, TrainingSet
from raysynth.core.generator import Generator


@dataclass(frozen=True)
class Columns:
    """Which column of the metadata holds what. Only used with `kind: csv` and `kind: parquet`."""

    file: str = "file"
    """Image path relative to `data.images`, or an `image` struct / bytes column for parquet."""
    id: str | None = None
    """Unique image id; null: the file path."""
    label: str | None = None
    """Class names (single-label), or several names joined by `data.labels.separator` (multi-label)."""
    findings: dict[str, str] = field(default_factory=dict)
    """Multi-label alternative to `label`: finding name -> column holding 1, 0, -1 (uncertain) or nothing."""
    patient: str | None = None
    """Patient (or lesion) id: no patient is ever in two splits."""
    split: str | None = None
    """Fixed splits: train, val or test. Honoured and checked."""
    site: str | None = None
    """Hospital or data set of origin."""
    report: str | None = None
    """Free text of the report or impression."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Attribute name -> column, such as `sex: Sex`. `age` is read in years."""


@dataclass(frozen=True)
class Labels:
    """The label vocabulary. Raw annotations are kept as they are; `policy` applies at use."""

    kind: Literal["single", "multi"] = "single"
    """single: one class an image; multi: any number of findings."""
    classes: list[str] = field(default_factory=list)
    """The vocabulary, in order; empty: the sorted class names found."""
    separator: str = "|"
    """Between several names in one `label` column (multi)."""
    policy: dict[str, str] = field(default_factory=dict)
    """Finding -> what an uncertain (-1) or missing annotation means at use: ignore (default), zeros or ones."""


@dataclass(frozen=True)
class ImageSpec:
    """How every image, real or synthetic, becomes pixels. Null fields follow `preset`."""

    preset: Literal["general", "chest", "skin"] = "general"
    """chest: grey, percentile value range, padded; skin: sRGB, centre crop; general: as stored, padded."""
    size: int = 256
    """Side of the square stored image, pixels."""
    channels: Literal["grey", "rgb"] | None = None
    fit: Literal["pad", "crop"] | None = None
    """pad: longest side to `size`, black borders; crop: shortest side to `size`, centre crop."""
    value_range: Literal["full", "percentile"] | None = None
    """full: the stored range; percentile: 0.5 to 99.5 percentile of each image to 0..255."""
    max_megapixels: float = 200.0
    """Larger images are quarantined as decompression bombs."""


@dataclass(frozen=True)
class Split:
    """Patient-safe stratified splits."""

    val: float = 0.15
    """Fraction of patients' images for validation (where the data fixes no split)."""
    test: float = 0.25
    """Fraction for test."""
    seed: int = 0
    patients: Literal["column", "hash", "none"] | None = None
    """column: `data.columns.patient`; hash: images alike by exact or perceptual hash are one patient; none:
    every image is its own patient. Null: column if mapped, else hash."""
    hash_distance: int = 2
    """Largest Hamming distance of 64-bit perceptual hashes that makes two images one patient."""
    on_conflict: Literal["refuse", "quarantine"] = "refuse"
    """A patient in two fixed splits: refuse the data, or keep the most held-out split and quarantine the
    rest."""
    keep: str | None = None
    """Ingest artifact of the data before they grew (its folder or its table.parquet): whoever was in train, val or
    test there stays in it, and new patients are dealt so that the fractions are approached."""


@dataclass(frozen=True)
class Data:
    """The real images."""

    kind: Literal["csv", "class_folders", "parquet", "digits"] = "csv"
    """csv: a table and a folder of images; class_folders: one folder a class; parquet: images in the table;
    digits: scikit-learn's 1,797 real 8 x 8 digits."""
    path: str = ""
    """The CSV file, the folder of class folders, or the parquet file or folder; local or s3://."""
    images: str = ""
    """Folder the CSV's file column is relative to; empty: the CSV's own folder."""
    dataset: str = ""
    """Name written in every row; empty: the experiment's name."""
    licence: str = ""
    """Licence of the images, copied into every artifact."""
    columns: Columns = field(default_factory=Columns)
    labels: Labels = field(default_factory=Labels)
    image: ImageSpec = field(default_factory=ImageSpec)
    split: Split = field(default_factory=Split)
    age_bins: list[int] = field(default_factory=lambda: [18, 40, 60, 80])
    """Cut points in years; adds the attribute `age_bin`."""
    max_quarantined_fraction: float = 0.05
    """More quarantined images than this end ingest with exit code 3."""


@dataclass(frozen=True)
class Plan:
    """Which synthetic images are wanted. Says what, never how."""

    kind: Literal["replicate", "balanced"] = "replicate"
    """replicate: every source image N times with its labels and attributes; balanced: a table of targets."""
    replicas: int = 10
    """Synthetic images a source image (replicate)."""
    n: int | None = None
    """Images in all (balanced)."""
    over: list[str] = field(default_factory=lambda: ["label"])
    """Columns whose combinations are balanced: `label`, finding names, attribute names."""
    targets: dict[str, float] = field(default_factory=dict)
    """Shares or counts for cells, such as `label=pneumonia,sex=F: 0.3`; cells not named share the rest
    equally."""
    ratio: float | None = None
    """Render only rows with rank < ratio * n_real. With no selection here, what `training_set` selects is rendered."""
    n_synth: int | None = None
    """Render only the first n_synth rows by rank."""
    quota: dict[str, int] = field(default_factory=dict)
    """Render at most this many of each class or finding."""
    seed: int = 0
    """Orders ranks and draws the noise of every image."""


@dataclass(frozen=True)
class Sampling:
    """How the generator is sampled; part of a synthetic set's identity."""

    sampler: Literal["ddim", "dpm++", "ddpm"] = "dpm++"
    """ddim (Song 2021), DPM-Solver++ 2M (Lu 2022), ancestral DDPM (Ho 2020)."""
    steps: int = 25
    guidance_scale: float = 1.0
    """diffusers' convention: 1 is the conditional model alone, one pass a step."""
    guidance_rescale: float = 0.0
    """Per-image rescale of the guided prediction (Lin 2024, eq. 15-16); the Mediffusion recipe uses 0.7."""
    guidance_interval: list[float] | None = None
    """[start, stop] in fractions of the steps, 0 at pure noise: guided inside, the conditional model alone, one
    pass, outside (Kynkaanniemi 2024). Null: guided at every step."""
    eta: float = 0.0
    """Noise of DDIM steps, 0 is deterministic."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True)
class Compute:
    """Where and how fast. Never part of an identity."""

    address: str | None = None
    """Ray address; null: RAY_ADDRESS, a Ray started on this machine, or a private local one; `local`:
    private."""
    use_gpu: bool | None = None
    """Null: GPUs if the cluster has any."""
    render_workers: int | None = None
    """Render actors to begin with; null: as many as the cluster has GPUs for, or CPUs."""
    max_render_workers: int | None = None
    """The pool grows up to this while nodes join; null: it does not grow. It always outlives nodes that leave."""
    gpus_per_renderer: float = 1.0
    """GPUs of one render actor; .5 puts two on one GPU."""
    cpus_per_renderer: float = 1.0
    accelerator: str | None = None
    """Ray's accelerator type that renderers need, such as `H100`; one synthetic set is rendered on one type."""
    render_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may render, as Ray's label selectors: `market-type: spot`, `region: in(us-west-1)`."""
    render_threads: int = 1
    """torch threads of a CPU renderer; fixed in render.json."""
    compile: bool = False
    """Compile the network (torch.compile) for the typed micro-batch; fixed in render.json. Costs tens of seconds
    at the start of a renderer, most of it once a machine."""
    micro_batch: int | None = None
    """Images rendered at once; null: measured on the first actor. Fixed in render.json."""
    shard_seconds: float = 60.0
    """Aimed length of one shard on one renderer."""
    shard_rows: int | None = None
    """Rows a shard; null: from `shard_seconds`."""
    max_failed_fraction: float = 0.01
    """More failed rows than this end generate with exit code 3."""
    other_driver: Literal["join", "wait"] = "join"
    """Where another driver renders the same set: take shards from the other end, or wait for it to finish."""
    accept_render_change: bool = False
    """Go on with a synthetic set on another device or library version than its render.json names."""
    train_workers: int | None = None
    """Data-parallel training processes; null: one a GPU, or one. 0: in the driver's own process."""
    train_threads: int | None = None
    """torch threads of a CPU training process; null: its share of the cores."""
    train_accumulation: int = 1
    """Gradient accumulation steps, for a batch that takes more memory than the GPUs have; the global batch stays the
    same."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints."""
    sample_every: int = 500
    """Optimizer steps between sample grids."""
    ingest_rows: int = 256
    """Images a Ray Data task decodes."""
    cache: str = "~/.cache/raysynth"
    """Local disk for training views and downloaded weights."""
    trial_cpus: float = 1.0
    """CPUs of one trial of a sweep."""
    trial_gpus: float = 1.0
    """GPUs of one trial, where there are any; .5 puts two trials on one."""
    classifier_workers: int | None = None
    """Data-parallel processes of one classifier; null or 1: the trial's own process."""
    price_per_gpu_hour: float | None = None
    """Currency units; adds cost to status and run.json."""


@dataclass(frozen=True)
class Experiment:
    """One YAML file."""

    name: str = MISSING
    """Names artifacts; letters, digits, dash, underscore."""
    root: str = "runs"
    """Where artifacts go: a folder or s3://bucket/prefix."""
    data: Data = field(default_factory=Data)
    training_set: TrainingSet = field(default_factory=TrainingSet)
    generator: Generator = field(default_factory=Generator)
    plan: Plan = field(default_factory=Plan)
    sampling: Sampling = field(default_factory=Sampling)
    classifier: Classifier | None = None
    """Without this section a run ends with the synthetic set; with it, with an answer."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    sweep: Sweep = field(default_factory=Sweep)
    compute: Compute = field(default_factory=Compute)
