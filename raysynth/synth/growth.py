"""What a new wave adds to a synthetic set, in words: more replicas, new source images, a new class, rows lost.

Input: the set's ledger and the rows a plan wants. Output: counts. Reads the plan's rows once and, only where a plan has
sources that none of its older rows has, the source column of the set's waves. Knows no images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.schemas import LABEL, from_parquet
from raysynth.synth.ledger import Ledger
from raysynth.synth.wanted import Wanted

SOURCE = "source_image_id"


@dataclass
class Growth:
    """Rows to be rendered, by reason."""

    first: bool = False
    """The set has no rows yet."""
    replicas: int = 0
    """Of sources that other wanted rows of the set have too."""
    new: int = 0
    new_sources: int = 0
    """Of so many source images that the set has no row of."""
    changed: int = 0
    changed_sources: int = 0
    """Of so many source images whose labels, attributes or prompt are others now."""
    listed: int = 0
    """Without a source image."""
    again: int = 0
    """In the set before: failed, or their images were lost."""
    classes: list[str] = field(default_factory=list)
    """Classes or findings that no wanted row of the set had."""

    def words(self) -> str:
        """For a person, and for the wave's record."""
        if self.first:
            return "first rows"
        parts = [
            (self.replicas, f"{self.replicas:,} more replicas"),
            (self.new, f"{self.new:,} of {self.new_sources:,} new source images"),
            (self.changed, f"{self.changed:,} of {self.changed_sources:,} source images whose annotation changed"),
            (self.listed, f"{self.listed:,} newly listed"),
            (self.again, f"{self.again:,} again that failed or were lost"),
        ]
        text = ", ".join(words for n, words in parts if n)
        return text + (f"; new: {', '.join(self.classes)}" if self.classes else "")


def growth(ledger: Ledger, wanted: Wanted, absent: np.ndarray) -> Growth:
    """Why the rows `absent` (N,) bool of `wanted` are missing."""
    if not len(ledger.keys):
        return Growth(first=True)
    again = absent & ledger.known(wanted.keys)
    fresh = absent & ~again
    present: set[str] = set()
    count: Counter[str | None] = Counter()
    positive: dict[str, set[str]] = {"present": set(), "fresh": set()}
    at = 0
    for table in wanted.read():
        here = slice(at, at + table.num_rows)
        for name, mask in (("present", ~fresh[here]), ("fresh", fresh[here])):
            rows = table.filter(pa.array(mask))
            positive[name].update(_classes(rows))
            if name == "present":
                present.update(rows[SOURCE].unique().drop_null().to_pylist())
            else:
                values = pc.value_counts(rows[SOURCE])
                count.update(dict(zip(values.field("values").to_pylist(), values.field("counts").to_pylist())))
        at += table.num_rows
    found = Growth(again=int(again.sum()), listed=count.pop(None, 0))
    found.classes = sorted(positive["fresh"] - positive["present"])
    unknown = {s for s in count if s not in present}
    before = unknown & set(_sources(ledger)) if unknown else set()
    for source, n in count.items():
        if source not in unknown:
            found.replicas += n
        elif source in before:
            found.changed, found.changed_sources = found.changed + n, found.changed_sources + 1
        else:
            found.new, found.new_sources = found.new + n, found.new_sources + 1
    return found


def unwanted(ledger: Ledger, wanted: Wanted) -> int:
    """Rows of the set, committed or frozen, that this plan does not want."""
    return ledger.rows() - int(ledger.frozen(wanted.keys).sum())


def _classes(rows: pa.Table) -> Iterator[str]:
    for name in rows.column_names:
        if name.startswith(LABEL) and pc.any(pc.equal(rows[name], 1)).as_py():
            yield name.removeprefix(LABEL)


def _sources(ledger: Ledger) -> Iterator[str]:
    for wave in ledger.waves:
        for name, _ in wave.files:
            data = ledger.store.storage.get(ledger.store.file(name))
            yield from from_parquet(data, [SOURCE])[SOURCE].unique().drop_null().to_pylist()
