"""The README.md of an exported data set: a Hugging Face data card whose every number comes from the artifacts.

Input: the generate artifact and what it was made of (`Source.read`), and the books of the exported groups. Holds no
time and no host: equal exports have equal cards.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from raysynth.core.artifacts import Artifact
from raysynth.core.identity import content_digest
from raysynth.stages.export_formats import Vocabulary, features_of

CARD_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
              (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
"""The Hub's words for sizes: first limit that is above."""
LICENCES = {"cc0": "cc0-1.0", "cc0-1.0": "cc0-1.0", "cc-by": "cc-by-4.0", "public-domain": "cc0-1.0"} | {
    name: name for name in (
        "cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0", "cc-by-nc-3.0", "cc-by-nc-sa-4.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "apache-2.0", "mit", "bsd", "bsd-3-clause", "odbl",
        "odc-by", "pddl",
    )
}  # fmt: skip
"""Licence as typed, in lower case with dashes -> the Hub's identifier."""
SHOWN_VALUES = 30


@dataclass(frozen=True)
class Source:
    """What the images were made by and of; empty where the set does not say."""

    name: str
    run: Mapping[str, Any]
    """run.json of the generate artifact."""
    identity: Mapping[str, Any]
    """set.json: what makes pixels."""
    generator: Mapping[str, Any]
    """generator.json of the exported generator."""
    taken_from: str
    """Where the generator, or the whole set, was taken from, if it was made elsewhere."""
    images: Mapping[str, Any]
    """run.json of the ingest artifact."""
    paths: Mapping[str, tuple[str, str]]
    """What -> (folder under the root, digest)."""

    @classmethod
    def read(cls, generated: Artifact, images: Artifact) -> Source:
        """Reads the records of a complete generate artifact."""
        storage, run = generated.storage, generated.run_info()

        def record(path: str) -> dict[str, Any]:
            try:
                return json.loads(storage.get(path))
            except FileNotFoundError:
                return {}

        folder = run.get("generator") or ""
        facts = record(f"{folder}/export/generator.json") if folder else {}
        identity = record(f"{run['synthetic_set']}/set.json")
        paths = {
            "generate artifact": (generated.path, run["digest"]),
            "plan": ("", run["inputs"].get("plan", "")),
            "synthetic set": (run["synthetic_set"], identity.get("generator_id", "")),
            "generator weights": (folder, facts.get("weights_sha256", "")),
            "real images": (images.path, images.digest()),
        }
        taken_from = record(f"{folder}/run.json").get("taken_from") or "" if folder else ""
        return cls(generated.name, run, identity, facts, taken_from, images.run_info(), paths)

    @property
    def licence(self) -> str:
        """Licence of the real images, as typed in the experiment."""
        return self.generator.get("licence") or self.images.get("licence") or ""


def data_card(source: Source, to: str, vocabulary: Vocabulary, books: Sequence[Mapping[str, Any]]) -> str:
    """The whole README.md.

    Args:
        to: the format. books: what `export.write_group` returned of every group.
    """
    splits = sum((Counter(b["splits"]) for b in books), Counter())
    total = sum(splits.values())
    head = yaml.safe_dump(_head(source, to, vocabulary, splits, total), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"---\n{head}---", f"# {_pretty(source, total)}", _summary(source, vocabulary, splits),
        "## Use", _use(source), "## How to load", _loading(to, vocabulary, sorted(splits)),
        "## Generator", _generator(source), "## Licence", _licence(source),
        "## Numbers", _numbers(source, vocabulary, books, splits), "## Provenance", _provenance(source, books),
        "## Citation", _citation(source, total),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _head(source: Source, to: str, vocabulary: Vocabulary, splits: Mapping[str, int], total: int) -> dict[str, Any]:
    slug = re.sub(r"[^a-z0-9.]+", "-", source.licence.lower()).strip("-")
    known = LICENCES.get(slug)
    licence = {"license": known} if known else {"license": "other", "license_name": slug} if slug else {
        "license": "unknown"}  # fmt: skip
    where = {"huggingface": "data/{}-*.parquet", "webdataset": "data/{}-*.tar", "folders": "{}/**"}[to]
    files = [{"split": s, "path": where.format(s)} for s in sorted(splits)]
    head: dict[str, Any] = licence | {
        "pretty_name": _pretty(source, total),
        "size_categories": [next((word for limit, word in CARD_SIZES if total < limit), "n>1T")],
        "task_categories": ["image-classification"],
        "annotations_creators": ["machine-generated"],
        "tags": ["medical", "synthetic", "diffusion", "raysynth"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    if to == "webdataset":
        head["dataset_info"] = {"features": features_of(vocabulary)}
    return head


def _dataset(source: Source) -> str:
    return source.generator.get("dataset") or "a data set that is not stated"


def _pretty(source: Source, total: int) -> str:
    return f"{source.name}: {total:,} synthetic medical images"


def _summary(source: Source, vocabulary: Vocabulary, splits: Mapping[str, int]) -> str:
    kind = "one class an image" if vocabulary.single else "any number of findings an image"
    sizes = ", ".join(f"{n:,} {s}" for s, n in sorted(splits.items()))
    behind = (
        "A row's split is that of the real image its labels come from; validation and test patients were shown to "
        "no generator and their labels were not used."
    ) if source.generator else (
        "Which real images lie behind them is not known here: they may rest on images of any of your splits."
    )  # fmt: skip
    return (
        f"Images made by a generative model that learned from real images of {_dataset(source)}. No image shows a "
        f"patient; the labels are what the model was asked for, not what a reader saw.\n\n"
        f"{sizes}; {kind}: {', '.join(vocabulary.classes)}. {behind}"
    )


def _use(source: Source) -> str:
    return (
        "For research: training and pretraining of classifiers beside real images, and study of synthetic data. "
        "Evaluate on real images only.\n\n"
        "**Not for clinical use.** Not for diagnosis, for teaching diagnosis, or as evidence about patients. An image "
        "may lack the finding it is labelled with, show one it is not, repeat artefacts and imbalances of the real "
        "images, or resemble one of them. Whether it helps a given classifier has to be measured for each."
    )


def _loading(to: str, vocabulary: Vocabulary, splits: Sequence[str]) -> str:
    split, label = splits[0] if splits else "train", "label" if vocabulary.single else "labels"
    code = {
        "huggingface": f"""\
from datasets import load_dataset
rows = load_dataset("FOLDER", split="{split}")      # or streaming=True
rows[0]["image"], rows[0]["{label}"], rows.features["{label}"]""",
        "webdataset": f"""\
import glob, webdataset
rows = webdataset.WebDataset(sorted(glob.glob("FOLDER/data/{split}-*.tar")), shardshuffle=False).decode("pil")
for row in rows:
    row["png"], row["json"]["{label}"]
# or: datasets.load_dataset("FOLDER", split="{split}", streaming=True)""",
        "folders": f"""\
from torchvision.datasets import ImageFolder
images = ImageFolder("FOLDER/{split}")
# with every column of metadata.csv: datasets.load_dataset("FOLDER", split="{split}")""",
    }[to]
    return (
        f"```python\n{code}\n```\n\n`{label}` counts into {list(vocabulary.classes)}. `label_<name>` is as annotated "
        "in the source image: 1 present, 0 absent, -1 uncertain, nothing not annotated; `attr_<name>` is what the "
        "model was asked for."
    )


def _generator(source: Source) -> str:
    i, g, trained = source.identity, source.generator, "an unstated number of"
    if "n_real_generator" in g:
        trained = f"{g['n_real_generator']:,}"
    rows = [
        ("generator", f"`{i.get('generator_id', 'unknown')}`"),
        ("trained on", f"{trained} real images of {_dataset(source)}"
                       + (f" (`train_on: {g['train_on']}`)" if "train_on" in g else "")),
        ("training", f"{g['steps']:,} steps of {g['batch_size']}" if "steps" in g and "batch_size" in g else "unknown"),
        *([("made elsewhere", f"taken from {source.taken_from}")] if source.taken_from else []),
        ("image size", f"{g['size']} px, {g.get('channels')} channel(s)" if "size" in g else "see the images"),
    ]  # fmt: skip
    names = {"sampler": "sampler", "steps": "sampling steps", "guidance_scale": "guidance scale",
             "guidance_rescale": "guidance rescale", "guidance_interval": "guidance interval",
             "precision": "precision", "seed": "plan seed"}  # fmt: skip
    rows += [(words, str(i[key])) for key, words in names.items() if i.get(key) is not None]
    return _table(("", ""), rows)


def _licence(source: Source) -> str:
    stated = f"`{source.licence}`" if source.licence else "**not stated in the experiment; ask before you share**"
    return (
        f"Licence of the real images the generator learned from: {stated}. Whether it binds images of a model trained "
        "on them is not settled; it is passed on here so that nothing is claimed that its owners did not grant."
    )


def _numbers(
    source: Source, vocabulary: Vocabulary, books: Sequence[Mapping[str, Any]], splits: Mapping[str, int]
) -> str:
    counts = source.run["counts"]
    wanted = max(1, counts.get("wanted", 0))
    words = {"wanted": "wanted", "ok": "accepted, exported here", "rejected": "rejected by quality checks",
             "failed": "failed to render"}  # fmt: skip
    quality = [(w, f"{counts.get(k, 0):,}", f"{100 * counts.get(k, 0) / wanted:.2f}") for k, w in words.items()]
    text = [_table(("images", "n", "%"), quality)]
    total = max(1, sum(splits.values()))
    for name in ("label", *vocabulary.attributes):
        found = sum((Counter(b["counts"].get(name, {})) for b in books), Counter())
        order = list(vocabulary.classes) if name == "label" else sorted(found, key=lambda v: (-found[v], v))
        rows = [(v, f"{found[v]:,}", f"{100 * found[v] / total:.1f}") for v in order[:SHOWN_VALUES]]
        if len(order) > SHOWN_VALUES:
            rows.append((f"{len(order) - SHOWN_VALUES} more", "", ""))
        title = ("class" if vocabulary.single else "finding") if name == "label" else name
        text.append(_table((title, "n", "%"), rows))
    return "\n\n".join(text)


def _provenance(source: Source, books: Sequence[Mapping[str, Any]]) -> str:
    files = content_digest((name, sha) for b in books for name, (_, sha) in b["files"].items())
    git = source.run.get("git") or {}
    rows = [(what, f"`{path}`" if path else "", f"`{digest}`") for what, (path, digest) in source.paths.items()]
    rows += [("files of this export", "", f"`{files}`")]
    versions = ", ".join(f"{n} {v}" for n, v in sorted((source.run.get("versions") or {}).items()))
    render = (source.run.get("render") or {}).get("facts") or {}
    facts = ", ".join(f"{k} {v}" for k, v in sorted(render.items())) or "unknown"
    return (
        f"{_table(('what', 'folder', 'digest'), rows)}\n\n"
        f"Code: commit `{git.get('commit')}`{', with changes' if git.get('dirty') else ''}; {versions}. Rendered on: "
        f"{facts}. `.export/*.json` has size and sha256 of every file; each row has the sha256 of its PNG and of its "
        "pixels."
    )


def _citation(source: Source, total: int) -> str:
    key = re.sub(r"\W+", "", source.name) or "raysynth"
    return (
        f"```bibtex\n@misc{{{key},\n  title = {{{_pretty(source, total)}}},\n"
        f"  note = {{Rendered by raysynth; synthetic set {source.run['synthetic_set']}, generator "
        f"{source.identity.get('generator_id', 'unknown')}}}\n}}\n```\n\n"
        "Cite the real images behind them as their owners ask."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([str(c).replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
