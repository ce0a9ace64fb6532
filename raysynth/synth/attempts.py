"""Who began to render a shard, and how it ended: how the engine tells a deadly row from a dead machine.

    attempts/00012/0.json        an actor took the shard; created if absent, so attempts are numbered
    attempts/00012/0.start.json  its device began with it: written beside the rendering, which does not wait for it
    attempts/00012/0.step.json   careful mode only: the places being rendered right now
    attempts/00012/0.end.json    it ended without committing and without dying: rows failed, the process was told to
                                 stop (what it had rendered is in a part that the next attempt keeps), or was sick

An attempt that started, with neither end nor marker, died with its process, or left its device unfit (a row that
breaks the CUDA context). One that never started died waiting for its turn and convicts nobody; the next one
waits for its own note, for a row may kill faster than a note is written.

After two deaths the shard is rendered carefully: the places of the last death are bisected, the others masked so that
shapes and places stay as they were. A row that was alone in two deaths, and present in a third, is quarantined: two
machines that die by chance while they render the same row convict nobody.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from raysynth.synth.sets import SyntheticSet

DEATHS_BEFORE_CARE = 2
UNSTARTED_BEFORE_CAUTION = 1
STOPPED = "stopped"
DEATHS_ALONE = 2
DEATHS_PRESENT = 3


@dataclass(frozen=True)
class History:
    """What earlier attempts on a shard left behind."""

    attempts: int = 0
    deaths: int = 0
    """Started, and neither ended nor committed."""
    unstarted: int = 0
    """Taken, and ended before they started."""
    steps: tuple[tuple[int, ...], ...] = ()
    """Places being rendered at each death in careful mode, oldest first."""
    ends: tuple[dict[str, Any], ...] = field(default=())

    @property
    def careful(self) -> bool:
        """Whether places must be announced before they are rendered."""
        return self.deaths >= DEATHS_BEFORE_CARE

    @property
    def cautious(self) -> bool:
        """Whether the start must be on record before rendering begins."""
        return self.careful or self.unstarted >= UNSTARTED_BEFORE_CAUTION

    @property
    def quarantined(self) -> set[int]:
        """Places that died alone often enough to be given up."""
        alone = [s[0] for s in self.steps if len(s) == 1]
        return {
            p for p in alone
            if alone.count(p) >= DEATHS_ALONE and sum(p in s for s in self.steps) >= DEATHS_PRESENT
        }  # fmt: skip

    @property
    def carried(self) -> dict[str, Any] | None:
        """The newest record that keeps images: rows failed on one actor and wait for a second one, or it stopped."""
        records = [e for e in self.ends if e.get("part")]
        return records[-1] if records else None

    def groups(self, places: list[int]) -> list[list[int]]:
        """Order in which one micro-batch's places are rendered: the halves of the last death first, then the rest.

        The halves come first so that every further death narrows the search, also with several deadly rows.
        """
        left = [p for p in places if p not in self.quarantined]
        if not self.careful:
            return [left] if left else []
        last = self.steps[-1] if self.steps else ()
        suspects = [p for p in last if p in left]
        rest = [p for p in left if p not in suspects]
        middle = len(suspects) // 2
        halves = [suspects[:middle], suspects[middle:]]
        return [g for g in (*halves, rest) if g]


class Attempt:
    """One actor's attempt on one shard."""

    def __init__(self, store: SyntheticSet, shard: int, actor: str) -> None:
        self.store, self.folder = store, f"attempts/{shard:05d}"
        self.actor = actor
        self.history = self._read()
        self.number = self.history.attempts

    def _read(self) -> History:
        names = [e.path.rpartition("/")[2] for e in self.store.storage.list(self.store.file(self.folder))]
        numbers = sorted(int(n.split(".")[0]) for n in names if n.count(".") == 1)
        ends, steps, deaths, unstarted = [], [], 0, 0
        for n in numbers:
            if f"{n}.end.json" in names:
                ends.append(self.store.get_json(f"{self.folder}/{n}.end.json"))
                continue
            if f"{n}.start.json" not in names:
                unstarted += 1
                continue
            deaths += 1
            if f"{n}.step.json" in names:
                step = self.store.get_json(f"{self.folder}/{n}.step.json")
                if step and step["places"]:
                    steps.append(tuple(step["places"]))
        attempts = numbers[-1] + 1 if numbers else 0
        return History(attempts, deaths, unstarted, tuple(steps), tuple(e for e in ends if e))

    def begin(self) -> None:
        """Records that this actor has the shard."""
        while not self.store.create_json(f"{self.folder}/{self.number}.json", {"actor": self.actor}):
            self.number += 1

    def start(self) -> None:
        """Records that its device is about to render it."""
        self.store.create_json(f"{self.folder}/{self.number}.start.json", {"actor": self.actor})

    def step(self, places: list[int]) -> None:
        """Careful mode: records that these places are being rendered; an empty list when none is."""
        record = json.dumps({"places": places}).encode()
        self.store.storage.put(self.store.file(f"{self.folder}/{self.number}.step.json"), record)

    def end(self, why: str, **more: Any) -> None:
        """Records a graceful end without a commit: not a death."""
        self.store.create_json(f"{self.folder}/{self.number}.end.json", {"why": why, "actor": self.actor, **more})
