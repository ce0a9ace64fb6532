"""What lies under a root: artifacts and who uses them, and files that nothing names. Starts no Ray."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

from rich.filesize import decimal
from rich.table import Table

from raysynth.core.artifacts import STAGES
from raysynth.core.lease import holder_of
from raysynth.core.progress import console, say
from raysynth.core.storage import Storage
from raysynth.synth.sets import FOLDER, SyntheticSet
from raysynth.synth.verify import ORPHAN_AGE_S, orphans

NAMED = 3
"""Users of one stage that are named one by one."""
LOOK_EVERY = 1000
"""Orphans deleted between two looks at what the set names; a look reads its markers."""


def _artifacts(storage: Storage) -> list[tuple[str, dict | None]]:
    """(folder, run.json or None if not complete) of every artifact."""
    found = []
    for stage in STAGES:
        for name in storage.folders(stage):
            folder = f"{stage}/{name}"
            complete = storage.exists(f"{folder}/_SUCCESS")
            found.append((folder, json.loads(storage.get(f"{folder}/run.json")) if complete else None))
    return found


def _sets(storage: Storage) -> Iterator[SyntheticSet]:
    for name in storage.folders(FOLDER):
        if storage.exists(f"{FOLDER}/{name}/set.json"):
            yield SyntheticSet.open(storage, name)


def artifacts_of_set(storage: Storage, path: str) -> list[str]:
    """Folders of the complete artifacts whose images live in the synthetic set at `path`."""
    return [folder for folder, run in _artifacts(storage) if run is not None and run.get("synthetic_set") == path]


def show_artifacts(storage: Storage) -> None:
    """A table of artifacts and synthetic sets: state, size, and which artifacts were built on each."""
    artifacts = _artifacts(storage)
    users: dict[str, list[str]] = defaultdict(list)
    for folder, run in artifacts:
        if run is None:
            continue
        for other, there in artifacts:
            if there is not None and there["digest"] in run["inputs"].values():
                users[other].append(folder)
        for name in ("synthetic_set", "generator"):
            if isinstance(run.get(name), str):
                users[run[name]].append(folder)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("folder", "state", "size", "used by"):
        table.add_column(column, justify="right" if column == "size" else "left", no_wrap=column != "used by")
    rows = [(folder, "done" if run else "incomplete") for folder, run in artifacts]
    for store in _sets(storage):
        shards = sum(len(w.shards) for w in store.waves()) - len(store.void())
        rows.append((store.path, f"{len(store.done()):,} of {shards:,} shards"))
    for folder, state in rows:
        size = sum(e.size for e in storage.list(folder))
        table.add_row(folder, state, decimal(size), "\n".join(_shortened(users[folder])))
    console.print(table)


def _shortened(users: list[str]) -> list[str]:
    """The folders, or how many there are where a stage has many."""
    stages = Counter(folder.partition("/")[0] for folder in users)
    few = [folder for folder in users if stages[folder.partition("/")[0]] <= NAMED]
    return few + [f"{n:,} {stage}" for stage, n in stages.items() if n > NAMED]


def collect_garbage(storage: Storage, delete: bool) -> list[str]:
    """Orphan parts and rows files of every synthetic set, and files of artifacts and sets whose writer died before they
    were whole; at least an hour old. Deletes them if told.

    Returns:
        Those found, or those deleted.
    """
    found, young, busy = [], 0, []

    def take(path: str) -> None:
        if delete:
            storage.delete(path)
        say(path)
        found.append(path)

    for store in _sets(storage):
        # A writer may be about to name an old orphan: equal content has an equal name.
        if _rendering(store):
            say(f"gc: {store.path} is being rendered, left alone")
            busy.append(f"{store.path}/")
            continue
        if not delete:
            young += len(orphans(store, older_than_s=0)) - len(orphans(store))
        for path in _unused(store) if delete else map(store.file, orphans(store)):
            take(path)
    limit = time.time() - ORPHAN_AGE_S
    for entry in (e for folder in (*STAGES, FOLDER) for e in storage.staged(folder)):
        if entry.path.startswith(tuple(busy)):
            continue
        if entry.modified <= limit:
            take(entry.path)
        elif not delete:
            young += 1
    then = " deleted" if delete else "; --delete removes them" if found else ""
    say(f"gc: {len(found):,} orphan files{then}" + (f"; {young:,} younger than an hour left alone" if young else ""))
    return found


def _rendering(store: SyntheticSet) -> bool:
    return holder_of(store.storage, store.file("lock.json")) is not None


def _unused(store: SyntheticSet) -> Iterator[str]:
    """Orphans, each as soon as it is known to be one still; ends when somebody begins to render the set."""
    found = orphans(store)
    for at in range(0, len(found), LOOK_EVERY):
        # What was written or named since the last look is an orphan no more.
        still = set(orphans(store))
        for name in found[at : at + LOOK_EVERY]:
            if _rendering(store):
                say(f"gc: {store.path} is being rendered, the rest is left alone")
                return
            if name in still:
                yield store.file(name)
