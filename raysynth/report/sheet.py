"""The contact sheet: real images beside synthetic ones, a row a class or a class and condition, and what the generator
may have copied.

Beside the first synthetic images of each row stands the nearest image that the generator was trained on
(pixel L2 at 32 px or less), so that a copied patient is seen at a glance. It is a look, not a test: a
memorised image that was shifted or rescaled escapes it.

Input: the artifacts of `ingest`, `plan` and `generate`; output: PNG bytes. Does not know how images were
rendered.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from raysynth.core.artifacts import Artifact
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import ATTRIBUTE, attribute_names, from_parquet, label_names
from raysynth.core.storage import Storage
from raysynth.data.attributes import categories
from raysynth.data.images import decode_png
from raysynth.data.pictures import StoredPictures
from raysynth.data.strata import NONE, UNKNOWN, seeded_order, used_labels
from raysynth.data.subsets import train_split
from raysynth.stages.adoption import seen_by_generator

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline

REAL, SYNTHETIC, NEAREST = 4, 8, 3
"""Columns of each block."""
MOST_ROWS = 30
"""Two to three screens."""
NEAREST_AMONG = {64: 20_000, 4096: 2_000}
"""Side of the images, pixels -> how many training images are searched, so that a sheet takes seconds. More than
these are drawn by whole parquet row groups, which is what a reader must load."""
COMPARE_SIDE = 32

INK, GREY, PALE, PAPER = "#1a1a1a", "#6f6f6f", "#ececec", "#ffffff"


@dataclass
class Row:
    """One row of the sheet; images are (H, W, C) uint8."""

    name: str
    detail: str
    block: str = ""
    """Rows of one block stand together."""
    real: list[np.ndarray] = field(default_factory=list)
    synthetic: list[np.ndarray] = field(default_factory=list)
    nearest: list[np.ndarray] = field(default_factory=list)


def write_contact_sheet(pipeline: Pipeline) -> str:
    """Draws the sheet of the pipeline's generated images unless it is there. Returns its path below the
    root."""
    from raysynth.stages.generated import load_index, read_images
    from raysynth.stages.plan import wanted_rows
    from raysynth.synth.wanted import held_by, pack

    generated, experiment, storage = pipeline.generated, pipeline.experiment, pipeline.storage
    path = generated.file("contact_sheet.png")
    if storage.exists(path):
        return path
    index = load_index(generated)
    index = index[index["status"] == "ok"]
    wanted = wanted_rows(experiment, storage, pipeline.plan)
    ok = held_by(wanted.keys, np.sort(pack(pa.array(index["row_key"], pa.string()))))
    rows = pa.concat_tables([next(iter(wanted.read())).slice(0, 0), *wanted.tables(ok)])

    def read(keys: Sequence[str]) -> dict[str, bytes]:
        found = read_images(generated, index[index["row_key"].isin(list(keys))])
        return {r["row_key"]: r["image"]["bytes"] for t in found for r in t.to_pylist()}

    png = contact_sheet(experiment, storage, pipeline.images, rows, read, generated.path)
    storage.put(path, png)
    return path


def contact_sheet(
    experiment: Experiment,
    storage: Storage,
    images: Artifact,
    rows: pa.Table,
    read: Callable[[Sequence[str]], Mapping[str, bytes]],
    source: str = "",
) -> bytes:
    """PNG of real beside synthetic images by class, and by the first conditioned attribute for which that is at most
    `MOST_ROWS` rows.

    Args:
        images: the ingest artifact.
        rows: synthetic rows to choose from, without pictures: row_key, rank, label_*, attr_*.
        read: encoded pictures of some row keys.
        source: where the synthetic images are, for the caption.
    """
    table = from_parquet(storage.get(images.file("table.parquet")))
    train = train_split(table)
    cells = _Cells.of(train, rows, experiment)
    real_cell, synthetic_cell = cells.names(train), cells.names(rows)
    ids, keys = train["image_id"].to_pylist(), rows["row_key"].to_pylist()
    order = seeded_order("contact sheet", 0, ids)
    by_rank = np.argsort(rows["rank"].to_numpy(), kind="stable")
    shown = cells.order[:MOST_ROWS]
    real = {c: [ids[i] for i in order if real_cell[i] == c][:REAL] for c in shown}
    synthetic = {c: [keys[i] for i in by_rank if synthetic_cell[i] == c][:SYNTHETIC] for c in shown}

    pictures = {k: decode_png(v) for k, v in read([k for c in shown for k in synthetic[c]]).items()}
    known = seen_by_generator(experiment, storage, table).ids
    # Where nobody knows what the generator saw, copies are looked for among all that it may have seen.
    seen = sorted(known if known is not None else train["image_id"].to_pylist())
    most = next(n for side, n in NEAREST_AMONG.items() if experiment.data.image.size <= side)
    pictures_of = StoredPictures(storage, images.file("images"), table["image_id"].to_pylist())
    pool = pictures_of.sample(seen, most)
    stored = pictures_of.read({*pool, *(i for c in shown for i in real[c])})
    queries = [k for c in shown for k in synthetic[c][:NEAREST]]
    nearest = _nearest([pictures[k] for k in queries], pool, stored)
    neighbour = dict(zip(queries, nearest))

    sheet = [
        Row(
            *cells.words(c, real_cell.count(c), synthetic_cell.count(c)), c[0] if cells.attribute else "",
            [decode_png(stored[i]) for i in real[c]], [pictures[k] for k in synthetic[c]],
            [decode_png(stored[neighbour[k]]) for k in synthetic[c][:NEAREST]],
        )
        for c in shown
    ]  # fmt: skip
    e, g, s = experiment, experiment.generator, experiment.sampling
    hidden = len(cells.order) - len(shown)
    subtitle = f"{len(ids):,} real images in the train split, {len(keys):,} synthetic images"
    subtitle += f"; {hidden} more rows not shown" if hidden > 0 else ""
    among = f"{len(pool):,} of the {len(seen):,}" if len(pool) < len(seen) else f"the {len(seen):,}"
    made = (
        f"Generator: {g.preset} {g.kind}, {g.steps:,} steps on {len(seen):,} real images ({g.train_on}). "
        if not g.path else f"Images listed at {g.path}. " if g.kind == "external" else f"Generator: {g.path}. "
    )
    if g.kind != "external":
        made += f"Sampling: {s.sampler}, {s.steps} steps, guidance {s.guidance_scale:g}, plan seed {e.plan.seed}. "
    trained = "the generator was trained on" if known is not None else "of the train split"
    caption = (
        f"{made}Nearest: by pixel distance among {among} images {trained}. "
        f"Real images are the train split's, drawn at random; synthetic ones are the first by rank. {source}"
    )  # fmt: skip
    return draw_sheet(f"{experiment.name}: real and synthetic", subtitle, sheet, caption)


@dataclass(frozen=True)
class _Cells:
    """What the sheet's rows are: a class (or an image's rarest finding), with a category of one attribute
    or not."""

    rarest_first: list[str]
    attribute: str | None
    policy: Mapping[str, str]
    order: list[tuple[str, str]] = field(default_factory=list)
    """Every cell that an image is in; its category is empty where the image's is not known."""

    @classmethod
    def of(cls, train: pa.Table, rows: pa.Table, experiment: Experiment) -> _Cells:
        """Cells of the real images of the train split and of the synthetic rows."""
        names, policy = label_names(train.schema), experiment.data.labels.policy
        positive = (used_labels(train, policy) == 1).sum(axis=0)
        rarest_first = [names[i] for i in np.argsort(positive, kind="stable")]
        place = [*names, NONE, UNKNOWN].index
        asked = ["age_bin" if n == "age" else n for n in experiment.generator.conditions]
        for name in (n for n in asked if n in attribute_names(train.schema)):
            values = categories(name, train[ATTRIBUTE + name], experiment.data.age_bins)
            cells = cls(rarest_first, name, policy)
            held = {*cells.names(train), *cells.names(rows)}
            if len(values) > 1 and len(held) <= MOST_ROWS:
                others = sorted({v for _, v in held}.difference(values), key=lambda v: (not v, v))
                column = [*values, *others].index
                return replace(cells, order=sorted(held, key=lambda c: (place(c[0]), column(c[1]))))
        cells = cls(rarest_first, None, policy)
        return replace(cells, order=sorted({*cells.names(train), *cells.names(rows)}, key=lambda c: place(c[0])))

    def names(self, table: pa.Table) -> list[tuple[str, str]]:
        """The cell of each row of `table`."""
        columns = label_names(table.schema)
        labels = used_labels(table, self.policy)[:, [columns.index(n) for n in self.rarest_first]]
        positive, rest = labels == 1, len(self.rarest_first) + (labels < 0).any(axis=1)
        first = np.where(positive.any(axis=1), positive.argmax(axis=1), rest)
        known = [*self.rarest_first, NONE, UNKNOWN]
        values = table[ATTRIBUTE + self.attribute].to_pylist() if self.attribute else [""] * len(first)
        return [(known[i], v or "") for i, v in zip(first, values)]

    def words(self, cell: tuple[str, str], real: int, synthetic: int) -> tuple[str, str]:
        """Name and counts of a row."""
        name = f"{cell[0]}, {self.attribute} {cell[1] or 'unknown'}" if self.attribute else cell[0]
        return name, f"{real:,} real, {synthetic:,} synthetic"


def _nearest(queries: Sequence[np.ndarray], pool: Sequence[str], stored: Mapping[str, bytes]) -> list[str]:
    """Of each query, the image of the pool with the least pixel distance."""
    if not queries:
        return []
    # The generator's size may differ from the stored images'.
    side = min(COMPARE_SIDE, queries[0].shape[0], decode_png(stored[pool[0]]).shape[0])
    small = np.stack([_small(decode_png(stored[i]), side) for i in pool])
    norms = (small**2).sum(axis=1)
    return [pool[int((norms - 2 * small @ _small(q, side)).argmin())] for q in queries]


def _small(image: np.ndarray, side: int) -> np.ndarray:
    picture = _picture(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32).ravel() / 255


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")


def _thumbnail(image: np.ndarray, side: int) -> Image.Image:
    picture = _picture(image)
    # Blocks for small images: smoothing would show detail that is not there.
    whole = side % max(picture.size) == 0
    return picture.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    # matplotlib carries this font with accents and Greek; Pillow's own has ASCII only.
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def draw_sheet(title: str, subtitle: str, rows: Sequence[Row], caption: str) -> bytes:
    """Lays out the rows and returns PNG bytes. Small images are enlarged by whole factors."""
    largest = max(max(i.shape[:2]) for r in rows for i in (*r.real, *r.synthetic))
    side = largest * -(-80 // largest) if largest <= 128 else 128
    gap, block, margin, top = 4, 28, 36, 132
    fonts = {"title": _font(24, bold=True), "head": _font(15, bold=True), "text": _font(15), "small": _font(12)}
    names = int(max(
        [fonts["text"].getlength(r.name) for r in rows] + [fonts["small"].getlength(r.detail) for r in rows]
    )) + 24  # fmt: skip
    starts, x = [], margin + names
    for columns in (REAL, SYNTHETIC, NEAREST):
        starts.append(x)
        x += columns * (side + gap) - gap + block
    width = x - block + margin
    lines = _wrapped(caption, fonts["small"], width - 2 * margin)
    blocks_before = list(accumulate((a.block != b.block for a, b in pairwise(rows)), initial=0))
    tops = [top + i * (side + gap) + n * 3 * gap for i, n in enumerate(blocks_before)]
    height = tops[-1] + side + gap + 24 + 18 * len(lines) + margin // 2
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((margin, 28), title, INK, fonts["title"])
    pen.text((margin, 62), subtitle, GREY, fonts["text"])
    heads = ("Real", "Synthetic", "Nearest training images")
    for start, head, numbers in zip(starts, heads, (0, NEAREST, NEAREST)):
        pen.text((start, top - 42), head, INK, fonts["head"])
        for n in range(numbers):
            pen.text((start + n * (side + gap) + side // 2, top - 7), str(n + 1), GREY, fonts["small"], "ms")
    for y, row in zip(tops, rows):
        pen.text((margin, y + side // 2 - 2), row.name, INK, fonts["text"], "ls")
        pen.text((margin, y + side // 2 + 16), row.detail, GREY, fonts["small"], "ls")
        blocks = ((row.real, REAL), (row.synthetic, SYNTHETIC), (row.nearest, NEAREST))
        for start, (pictures, columns) in zip(starts, blocks):
            for n in range(columns):
                corner = (start + n * (side + gap), y)
                if n < len(pictures):
                    page.paste(_thumbnail(pictures[n], side), corner)
                else:
                    pen.rectangle((*corner, corner[0] + side - 1, y + side - 1), PALE)
    for n, line in enumerate(lines):
        pen.text((margin, height - margin // 2 - 18 * (len(lines) - n)), line, GREY, fonts["small"])
    sink = io.BytesIO()
    page.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
