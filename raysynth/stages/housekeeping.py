"""What lies under a root: artifacts and who uses them, and files that nothing names. Starts no Ray."""

from __future__ import annotations

import json
from collections import defaultdict

from rich.table import Table

from raysynth.core.progress import console, say
from raysynth.core.storage import Storage
from raysynth.synth.sets import FOLDER, SyntheticSet
from raysynth.synth.verify import orphans


def _artifacts(storage: Storage) -> list[tuple[str, dict | None]]:
    """(folder, run.json or None if not complete) of every artifact."""
    found = []
    for stage in storage.folders():
        if stage == FOLDER or stage.startswith("."):
            continue
        for name in storage.folders(stage):
            folder = f"{stage}/{name}"
            complete = storage.exists(f"{folder}/_SUCCESS")
            found.append((folder, json.loads(storage.get(f"{folder}/run.json")) if complete else None))
    return found


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
        if "synthetic_set" in run:
            users[run["synthetic_set"]].append(folder)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("folder", "state", "MiB", "used by"):
        table.add_column(column, justify="right" if column == "MiB" else "left", no_wrap=column != "used by")
    rows = [(folder, "done" if run else "incomplete") for folder, run in artifacts]
    for name in storage.folders(FOLDER):
        store = SyntheticSet.open(storage, name)
        shards = sum(len(w.shards) for w in store.waves()) - len(store.void())
        rows.append((f"{FOLDER}/{name}", f"{len(store.done()):,} of {shards:,} shards"))
    for folder, state in rows:
        size = sum(e.size for e in storage.list(folder)) / 2**20
        table.add_row(folder, state, f"{size:,.1f}", "\n".join(users[folder]))
    console.print(table)


def collect_garbage(storage: Storage, delete: bool) -> list[str]:
    """Orphan parts and rows files of every synthetic set, at least an hour old; deletes them if told."""
    found = []
    for name in storage.folders(FOLDER):
        store = SyntheticSet.open(storage, name)
        found += [store.file(o) for o in orphans(store)]
    for path in found:
        say(path)
        if delete:
            storage.delete(path)
    say(f"gc: {len(found):,} orphan files" + (" deleted" if delete else "; --delete removes them" if found else ""))
    return found
