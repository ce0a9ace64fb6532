"""What ingest leaves out and why: a table of (image id, source, reason), its counts by kind, and the gate on it.

Files that no row names are listed too, but only rows count for the gate: a table of a tenth of a folder is no fault.
"""

from __future__ import annotations

import io
import re
from collections import Counter

import pyarrow as pa
import pyarrow.csv as pa_csv

from raysynth.core.errors import GateFailed
from raysynth.core.schemas import quarantine_schema
from raysynth.core.storage import Storage
from raysynth.data.sources import SourceListing


def reason_kind(reason: str) -> str:
    """The reason without names and numbers: `blank: every pixel is 0` -> `blank`."""
    return re.sub(r"'[^']*'|\b\d+\b", "...", reason).split(":")[0].strip()


class Quarantine:
    """Rows and files left out so far."""

    def __init__(self, listing: SourceListing) -> None:
        self._listing = listing
        self._later: dict[int, str] = {}

    def add(self, reasons: dict[int, str]) -> None:
        """Leaves out rows of the listing, by number."""
        self._later.update(reasons)

    @property
    def fraction(self) -> float:
        """Quarantined rows of all rows of the source."""
        n = self._listing.n_rows
        return (n - self._listing.rows.num_rows + len(self._later)) / n

    def table(self) -> pa.Table:
        """One row a row or file left out: those the listing saw first, then in source order."""
        order = sorted(self._later)
        seen = self._listing.rows.select(["image_id", "source_uri"]).take(pa.array(order, pa.int64()))
        later = seen.append_column("reason", pa.array([self._later[i] for i in order], pa.string()))
        return pa.concat_tables([self._listing.quarantined, later.cast(quarantine_schema())])

    def kinds(self) -> dict[str, int]:
        """Counts by kind of reason, most frequent first."""
        return dict(Counter(reason_kind(r) for r in self.table()["reason"].to_pylist()).most_common())

    def check(self, limit: float, storage: Storage, path: str) -> None:
        """The gate. Writes the whole list to `path` as CSV before it fails.

        Raises:
            GateFailed: more rows are quarantined than the fraction `limit`.
        """
        if self.fraction <= limit:
            return
        sink = io.BytesIO()
        pa_csv.write_csv(self.table(), sink)
        storage.put(path, sink.getvalue())
        why = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds().items())
        raise GateFailed(
            f"ingest: {self.fraction:.1%} of {self._listing.n_rows:,} rows are quarantined, more than "
            f"data.max_quarantined_fraction {limit:g} ({why}). Every one is listed in {storage.url(path)}. "
            "Mend the data, or raise the fraction: nothing decoded so far is done again."
        )
