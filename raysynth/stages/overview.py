"""What a person asks of an experiment without running it: dry run and verify. Starts no Ray."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import GateFailed, NotReady
from raysynth.core.identity import plain
from raysynth.core.progress import Progress, console, say
from raysynth.stages.generated import index_tables
from raysynth.stages.housekeeping import artifacts_of_set
from raysynth.stages.live import gpus_of_worker
from raysynth.stages.pipeline import Pipeline, is_sweep, stages_of
from raysynth.stages.plan import wanted_rows
from raysynth.stages.status import artifacts_table
from raysynth.stages.sweep import is_planned, rendering
from raysynth.stages.sweep_plan import plan_of_sweep
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.settle import read_settled
from raysynth.synth.verify import Verdict, verify
from raysynth.synth.verify import repair as give_up
from raysynth.synth.waves import missing, rows_a_shard


def show_dry_run(pipeline: Pipeline) -> None:
    """The resolved experiment, its artifacts, and what rendering is left with its price where a rate is known."""
    from raysynth.core.config import resolved

    e = pipeline.experiment
    say(yaml.safe_dump(plain(resolved(e), "experiment"), sort_keys=False).rstrip())
    console.print(artifacts_table(pipeline))
    if is_sweep(e):
        for line in plan_of_sweep(pipeline, e).lines():
            say(line)
        return
    if "generate" not in stages_of(e):
        return
    found = pipeline.found()
    if found["plan"] is None or found["generate"] is None or not found["plan"].complete:
        say("generate: rows are known once ingest, train-generator and plan are done")
        return
    wanted = wanted_rows(e, pipeline.storage, pipeline.plan)
    store, c = pipeline.synthetic_set, e.compute
    ledger = Ledger(store)
    left = len(wanted) - int(ledger.committed(wanted.keys).sum())
    frozen, new = len(ledger.pending(wanted)), int(missing(ledger, wanted).sum())
    settled = read_settled(store)
    shards = f"{frozen:,} frozen shards"
    if new and (settled or c.shard_rows):
        size = rows_a_shard(
            new, c.render_workers or 1, settled.micro_batch if settled else 1, settled.rows_per_s if settled else None,
            c.shard_seconds, c.shard_rows,
        )  # fmt: skip
        shards += f" and about {-(-new // size):,} new ones"
    elif new:
        shards += " and new ones, cut when a worker has been measured"
    gpus = f"{c.render_workers * c.gpus_per_renderer:g} GPUs" if c.render_workers else "every GPU (or CPU) there is"
    say(f"generate: {left:,} of {len(wanted):,} rows to render in {shards}, on {gpus}")
    if settled is None:
        say("generate: no rate is known before the first worker has measured one")
        return
    hours = left / settled.rows_per_s / 3600
    price, gpus_each = c.price_per_gpu_hour, gpus_of_worker(settled, c)
    cost = f", cost {hours * gpus_each * price:,.2f}" if price is not None and gpus_each else ""
    say(f"generate: {hours:.2f} worker hours at {settled.rows_per_s:.2f} images/s a worker{cost}")


def verify_set(pipeline: Pipeline, repair: bool) -> None:
    """Prints what `verify` found of every synthetic set that the experiment's images are in.

    Args:
        repair: give up corrupt shards, and unmake artifacts that list images which a set does not hold.

    Raises:
        GateFailed: a set does not hold exactly what is wanted of it.
        NotReady: every set does, but images are wanted that have no generator or plan yet.
    """
    again = "`raysynth run`" if is_sweep(pipeline.experiment) else "`raysynth generate`"
    pipelines, waiting = _rendering(pipeline)
    sets: dict[str, list[Pipeline]] = {}
    for p in pipelines:
        sets.setdefault(p.synthetic_set.path, []).append(p)
    if not sets and not waiting:
        say("verify: no arm trains on synthetic images")
    unclean, repairable = [], False
    for path, members in sets.items():
        store, wanted = members[0].synthetic_set, [wanted_rows(p.experiment, p.storage, p.plan) for p in members]
        with Progress("verify", len(store.done()), "shards") as progress:
            verdict = verify(store, *wanted, advance=progress.advance)
        for line in verdict.lines():
            say(f"{path}: {line}")
        if verdict.clean:
            say(f"verify: clean, {path}")
            continue
        stale = _stale(store, verdict)
        if repair and (stale or verdict.corrupt):
            _repair(store, verdict, stale, again)
            continue
        unclean.append(path)
        repairable |= bool(stale or verdict.corrupt)
    words = [f"{path} is not what the plan wants." for path in unclean]
    words += [f"{'`--repair`, then ' * repairable}{again} mends it."] if unclean else []
    words += [f"Images of {'; '.join(waiting)} have no generator or plan yet: {again}."] if waiting else []
    if words:
        raise (GateFailed if unclean else NotReady)(f"verify: {' '.join(words)}")


def _rendering(pipeline: Pipeline) -> tuple[list[Pipeline], list[str]]:
    """The pipelines that together want all of the experiment's images; the arms whose images have no name yet."""
    if not is_sweep(pipeline.experiment):
        return [pipeline], []
    ready, waiting = [], []
    for arm, p in pipeline.arm_pipelines:
        if p.experiment.training_set.needs_synthetic:
            (ready if is_planned(p) else waiting).append((arm, p))
    # The experiment's own selection is made by `raysynth generate` only, and need not be any arm's.
    own = [pipeline] if pipeline.is_complete("generate") else []
    return [*rendering(ready), *own], list(dict.fromkeys(arm.name for arm, _ in waiting))


def _repair(store: SyntheticSet, verdict: Verdict, stale: Sequence[str], again: str) -> None:
    # Artifacts first: where this is killed, the shards are still corrupt and the same command goes on.
    for folder in stale:
        store.storage.delete(f"{folder}/_SUCCESS")
        say(f"verify: {folder} lists images that are gone, and is no longer complete")
    given_up = give_up(store, verdict)
    say(f"verify: {given_up} corrupt shards of {store.path} given up; {again} renders them again")


def _stale(store: SyntheticSet, verdict: Verdict) -> list[str]:
    """Complete artifacts of the set that list a part which is corrupt or which no marker names: `generate` would say
    that they are done."""
    intact = store.done() - verdict.corrupt.keys()
    parts = {marker["part"] for marker in store.markers(intact).values()}
    return [
        folder for folder in artifacts_of_set(store.storage, store.path)
        if any(not parts.issuperset(rows["part"].unique().to_pylist())
               for rows in index_tables(Artifact.open(store.storage, folder), ["part"]))
    ]  # fmt: skip
