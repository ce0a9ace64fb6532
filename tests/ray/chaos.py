"""`python -m tests.ray.chaos --kills 100 --seed 0`: kills actors, workers, nodes, drivers at random; nothing is lost.

Many short runs of one small set each (`FakeRenderer` on real Ray: a head without CPUs and two nodes of one). In every
run some processes are killed, chosen by the seed: who, by which signal, when, how many. A killed driver is started
again, a killed node replaced, until the run is done. Then

* the images are those of an uninterrupted run, byte for byte, and `verify` is clean;
* a micro-batch that was finished is rendered again only if SIGKILL hit its process before it could commit, and no
  more shards than a killed process may have had in work;
* SIGTERM costs no finished micro-batch: what is done is kept, and a driver ends with exit 4 and words.

Prints a table at the end; exit code 1 and the run's number where anything of this is not so. Every second run of a
pair has what is left of a shuffled deck of all six kinds, so that two runs see each kind once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raysynth.synth.fake import FakeRenderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.verify import verify
from tests.engine import images, render_all, synthetic_set, wanted_rows
from tests.ray.playground import Driver, Playground, title

KINDS = ("actor SIGKILL", "actor SIGTERM", "worker SIGKILL", "node SIGKILL", "driver SIGKILL", "driver SIGTERM")
HOW: dict[str, Any] = {"n": 16, "replicas": 20, "compute": {"render_workers": 2, "micro_batch": 2, "shard_rows": 8}}
SECONDS_A_ROW = 0.02
WANTED = wanted_rows(HOW["n"], HOW["replicas"])
SHARDS = len(WANTED) // HOW["compute"]["shard_rows"]
MORE = 10  # rows that an actor may finish after SIGTERM: a shard that killed two processes is not left half-way
IN_WORK = 3  # shards of one actor that may be rendered and not yet committed: one rendering, two being committed
LIMIT_S = 240.0


@dataclass(frozen=True)
class Kill:
    """One planned kill: `kind` once `markers` shards are done and `after_s` seconds went by since the one before."""

    kind: str
    markers: int
    after_s: float


@dataclass
class Outcome:
    """What one run came to."""

    run: int
    kills: list[str] = field(default_factory=list)
    seconds: float = 0.0
    drivers: int = 0
    again: int = 0
    """Rows rendered more than once."""
    kept: int = 0
    """Rows that a stopped process kept for the next one."""
    faults: list[str] = field(default_factory=list)


def plan(seed: int, run: int) -> list[Kill]:
    """The kills of one run, in order."""
    pair = random.Random(f"{seed}/pair {run // 2}")
    deck = pair.sample(KINDS, len(KINDS))
    cut = pair.randint(1, len(KINDS) - 1)
    mine = deck[cut:] if run % 2 else deck[:cut]
    chance = random.Random(f"{seed}/run {run}")
    # Some by progress, some by time, some at once with the one before.
    markers = sorted(max(0, chance.randrange(-SHARDS // 4, SHARDS * 3 // 4)) for _ in mine)
    return [Kill(k, m, chance.choice([0.0, chance.uniform(0, 2)])) for k, m in zip(mine, markers)]


class Run:
    """One set, rendered while processes die."""

    def __init__(self, ground: Playground, place: Path, number: int, kills: list[Kill]) -> None:
        self.ground, self.place, self.kills = ground, place, kills
        self.chance = random.Random(f"victims {number}")
        self.outcome = Outcome(number)
        self.dead: set[int] = set()
        """Processes ended by SIGKILL, at once or with their driver."""
        self.deaths = 0
        """Render actors among them."""
        self.told: dict[int, int] = {}
        """Actors that got SIGTERM, and the rows that each had rendered by then."""
        self.store = synthetic_set(str(place / "set"))

    def play(self) -> Outcome:
        """Starts drivers until one is done."""
        try:
            return self._play()
        finally:
            self.driver.process.kill()

    def _play(self) -> Outcome:
        began = self.last = time.monotonic()
        while True:
            self.outcome.drivers += 1
            renderer = {"seconds_a_row": SECONDS_A_ROW, "log": str(self.place / "log")}
            how = HOW | {"address": self.ground.cluster.address, "renderer": renderer}
            self.driver = Driver(self.place, self.outcome.drivers, how)
            while self.driver.process.poll() is None and time.monotonic() < began + LIMIT_S:
                if self.kills and self._due(self.kills[0]) and self._strike(self.kills[0].kind):
                    self.outcome.kills.append(self.kills.pop(0).kind)
                    self.last = time.monotonic()
                time.sleep(0.02)
            if time.monotonic() > began + LIMIT_S:
                self.driver.process.kill()
                self.outcome.faults.append(f"not done after {LIMIT_S:.0f} s: {self.driver.said()[-600:]}")
                break
            code = self.driver.process.wait()
            self.outcome.faults += filter(None, [self.driver.fault(code)])
            if self.outcome.faults or code == 0:
                break
        self.outcome.seconds = round(time.monotonic() - began, 1)
        return self.outcome

    def _due(self, kill: Kill) -> bool:
        return time.monotonic() >= self.last + kill.after_s and len(self.store.done()) >= kill.markers

    def _strike(self, kind: str) -> bool:
        """Kills; False if there is nobody to kill yet."""
        who, name = kind.split()
        number = signal.Signals[name]
        if who == "driver":
            # Before that it is not ours yet: Python itself is starting.
            if "driver is up" not in self.driver.said() or self.driver.killed or self.driver.stopped:
                return False
            if number == signal.SIGKILL:
                self.driver.killed = True
                self._count(self.ground.workers())
            else:
                self.driver.stopped = True
            self.driver.process.send_signal(number)
            return True
        if who == "node":
            node = self.chance.choice(self.ground.nodes)
            self._count(self.ground.workers([node]))
            self.ground.lose_a_node(node)
            self.ground.add_a_node()
            return True
        victims = self.ground.actors() if who == "actor" else list(self.ground.workers())
        if not victims:
            return False
        victim = self.chance.choice(victims)
        if number == signal.SIGKILL:
            self._count([victim])
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return False
        if number != signal.SIGKILL:
            self.told[victim.pid] = self._log()[1][victim.pid]
        return True

    def _count(self, victims: Any) -> None:
        for process in victims:
            self.deaths += "Render" in title(process)
            self.dead.add(process.pid)

    def _log(self) -> tuple[list[tuple[str, int]], Counter[int]]:
        """(row key, process) of every rendered row, and the rows of each process."""
        log = self.place / "log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [(key, int(pid)) for key, pid in lines], Counter(int(pid) for _, pid in lines)

    def judge(self, reference: dict[str, str]) -> None:
        """Fills in what the run cost and what is wrong with its end."""
        out = self.outcome
        verdict = verify(self.store, WANTED)
        if not verdict.clean or verdict.ok != len(WANTED):
            out.faults += verdict.lines()
        if images(self.store) != reference:
            out.faults.append("images differ from those of an uninterrupted run")
        lines, rendered = self._log()
        times = Counter(key for key, _ in lines)
        alive = Counter(key for key, pid in lines if pid not in self.dead)
        deaf = [pid for pid, before in self.told.items() if rendered[pid] > before + MORE]
        if deaf:
            out.faults.append(f"actors {deaf} went on rendering after SIGTERM")
        twice = [key for key, n in alive.items() if n > 1]
        if twice:
            out.faults.append(f"{len(twice)} rows rendered more than once by processes that nobody killed by SIGKILL")
        again = {key for key, n in times.items() if n > 1}
        out.again = sum(times.values()) - len(times)
        shards = {s for s, keys in enumerate(shard_keys(self.store)) if again & set(keys)}
        if len(shards) > IN_WORK * self.deaths:
            out.faults.append(f"{len(shards)} shards rendered again after {self.deaths} deaths of actors")
        out.kept = kept_rows(self.store)


def shard_keys(store: SyntheticSet) -> Iterator[list[str]]:
    """Row keys of each shard."""
    for wave in store.waves():
        for shard in wave.shards:
            yield store.shard_rows(wave, shard).column("row_key").to_pylist()


def kept_rows(store: SyntheticSet) -> int:
    """Rows that processes which were told to stop handed on."""
    kept, size = 0, HOW["compute"]["shard_rows"]
    for entry in store.storage.list(store.file("attempts")):
        if entry.path.endswith(".end.json"):
            record = json.loads(store.storage.get(entry.path))
            kept += size - len(record["again"]) if record["why"] == "stopped" and record.get("part") else 0
    return kept


def table(outcomes: list[Outcome]) -> list[str]:
    """For a person."""
    kinds = Counter(kind for o in outcomes for kind in o.kills)
    numbers = {kind: kinds[kind] for kind in KINDS} | {
        "kills": sum(kinds.values()), f"runs of {len(WANTED)} rows in {SHARDS} shards": len(outcomes),
        "drivers": sum(o.drivers for o in outcomes), "rows": len(outcomes) * len(WANTED),
        "rows rendered again": sum(o.again for o in outcomes), "rows handed on": sum(o.kept for o in outcomes),
        "seconds": round(sum(o.seconds for o in outcomes)), "violations": sum(bool(o.faults) for o in outcomes),
    }  # fmt: skip
    return [f"{name:<32}{n:>7,}" for name, n in numbers.items()]


def main(kills: int, seed: int, only: int | None, out: str | None) -> int:
    """Runs until so many kills were made. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the cluster too
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    uninterrupted = synthetic_set(str(place / "reference"))
    render_all(uninterrupted, WANTED, FakeRenderer(), micro_batch=2)
    reference = images(uninterrupted)
    outcomes: list[Outcome] = []
    ground = Playground()
    try:
        while only is None or not outcomes:
            if sum(len(o.kills) for o in outcomes) >= kills:
                break
            number = only if only is not None else len(outcomes)
            folder = place / f"run-{number}"
            folder.mkdir()
            run = Run(ground, folder, number, plan(seed, number))
            outcomes.append(run.play())
            run.judge(reference)
            o = run.outcome
            print(f"run {number}: {', '.join(o.kills) or 'no kill'}; {o.drivers} drivers, {o.again} rows again, "
                  f"{o.seconds} s{'; VIOLATED' if o.faults else ''}", flush=True)  # fmt: skip
            for fault in o.faults:
                print(f"  {fault}\n  again with: --seed {seed} --only {number}; files in {folder}", flush=True)
            if not o.faults:
                shutil.rmtree(folder)
    finally:
        ground.close()
    print("\n".join(table(outcomes)))
    if out:
        record = {"command": f"python -m tests.ray.chaos --kills {kills} --seed {seed}", "cores": os.cpu_count(),
                  "table": table(outcomes), "runs": [vars(o) for o in outcomes]}  # fmt: skip
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
    if any(o.faults for o in outcomes):
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kills", type=int, default=100)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", type=int, help="this run of the seed alone")
    words.add_argument("--out", help="JSON file for the outcome")
    given = words.parse_args()
    sys.exit(main(given.kills, given.seed, given.only, given.out))
