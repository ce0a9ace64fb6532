"""What a person asks of an experiment without running it: dry run, status, verify. Starts no Ray."""

from __future__ import annotations

import time

import numpy as np
import yaml
from rich.table import Table

from raysynth.core.errors import EnvironmentFault, GateFailed
from raysynth.core.experiment import Compute
from raysynth.core.identity import plain
from raysynth.core.lease import holder_of
from raysynth.core.progress import Progress, console, duration, say
from raysynth.stages.housekeeping import artifacts_of_set
from raysynth.stages.pipeline import Pipeline, is_sweep, stages_of
from raysynth.stages.plan import wanted_rows
from raysynth.stages.sweep import find_trials
from raysynth.stages.sweep_plan import plan_of_sweep
from raysynth.synth.ledger import ABSENT, FAILED, Ledger
from raysynth.synth.settle import Settled, read_settled
from raysynth.synth.verify import repair as give_up
from raysynth.synth.verify import verify
from raysynth.synth.wanted import held_by
from raysynth.synth.waves import missing, rows_a_shard


def show_artifacts_of(pipeline: Pipeline) -> None:
    """One line a stage: done, begun or missing, and its folder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state", "folder"):
        table.add_column(column)
    for stage, artifact in pipeline.found().items():
        if artifact is None:
            table.add_row(stage, "waits", "named when the stages before it are done")
        else:
            begun = not artifact.complete and bool(pipeline.storage.list(artifact.path))
            state = "done" if artifact.complete else "begun" if begun else "missing"
            table.add_row(stage, state, pipeline.storage.url(artifact.path))
    console.print(table)


def show_dry_run(pipeline: Pipeline) -> None:
    """The resolved experiment, its artifacts, and what rendering is left with its price where a rate is known."""
    from raysynth.core.config import resolved

    e = pipeline.experiment
    say(yaml.safe_dump(plain(resolved(e), "experiment"), sort_keys=False).rstrip())
    show_artifacts_of(pipeline)
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
    left = len(wanted) - int(held_by(wanted.keys, ledger.committed()).sum())
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
    price = gpu_price(settled, c)
    cost = f", cost {hours * price:,.2f}" if price is not None else ""
    say(f"generate: {hours:.2f} worker hours at {settled.rows_per_s:.2f} images/s a worker{cost}")


def gpu_price(settled: Settled | None, compute: Compute) -> float | None:
    """Price of one worker's hour, or None where no GPU is used or no price is known."""
    if settled is None or settled.facts.get("device") == "cpu" or compute.price_per_gpu_hour is None:
        return None
    return compute.price_per_gpu_hour * compute.gpus_per_renderer


def show_status(pipeline: Pipeline) -> None:
    """Artifacts, the progress of rendering from markers alone, and how many trials of a sweep are trained."""
    show_artifacts_of(pipeline)
    if not is_sweep(pipeline.experiment):
        _show_rendering(pipeline)
        return
    shown = set()
    for _, p in pipeline.arm_pipelines:
        try:
            key = (p.synthetic_set.path, p.generated.path) if p.experiment.training_set.needs_synthetic else None
        except EnvironmentFault:
            continue
        if key and key not in shown:
            shown.add(key)
            say(f"{key[1]}:")
            _show_rendering(p)
    try:
        trials = find_trials(pipeline, pipeline.experiment)
    except EnvironmentFault:
        return
    distinct = {t.classifier.path: t.classifier.complete for t in trials}
    say(f"trials: {sum(distinct.values()):,}/{len(distinct):,} trained")


def _show_rendering(pipeline: Pipeline) -> None:
    """One synthetic set: committed, failed, rate and cost."""
    try:
        store = pipeline.synthetic_set
        wanted = wanted_rows(pipeline.experiment, pipeline.storage, pipeline.plan)
    except EnvironmentFault:
        return
    ledger = Ledger(store)
    markers = store.markers(ledger.done)
    places = ledger.find(wanted.keys, ledger.statuses(markers))
    done, failed = int((places.status > ABSENT).sum()), int((places.status == FAILED).sum())
    markers = {s: markers[s] for s in np.unique(places.shard[places.status > ABSENT]).tolist()}
    seconds = sum(m["render_seconds"] for m in markers.values())
    say(f"images: {done:,}/{len(wanted):,} committed, {failed:,} failed, {duration(seconds)} of rendering")
    # Rate of the last five minutes: an average over nights and restarts would promise too little.
    recent = [m for m in markers.values() if m["finished"] > time.time() - 300]
    holder = holder_of(store.storage, store.file("lock.json"))
    if holder:
        say(f"running: process {holder['pid']} on {holder['host']}")
    if recent and done < len(wanted):
        first = min(m["finished"] - m["render_seconds"] for m in recent)
        rate = sum(m["rows"] for m in recent) / max(time.time() - first, 1e-9)
        say(f"rate: {rate:.1f} images/s now, {duration((len(wanted) - done) / rate)} left")
    price = gpu_price(read_settled(store), pipeline.experiment.compute)
    ok = sum(m["ok"] for m in markers.values())
    if price is not None and ok:
        cost = seconds / 3600 * price
        say(f"cost: {cost:,.2f} so far, {1000 * cost / ok:,.3f} per thousand images")


def verify_set(pipeline: Pipeline, repair: bool) -> None:
    """Prints what `verify` found.

    Raises:
        GateFailed: the set does not hold exactly what is wanted.
    """
    store = pipeline.synthetic_set
    wanted = wanted_rows(pipeline.experiment, pipeline.storage, pipeline.plan)
    with Progress("verify", len(store.done()), "shards") as progress:
        verdict = verify(store, wanted, progress.advance)
    for line in verdict.lines():
        say(line)
    if verdict.clean:
        say(f"verify: clean, {store.path}")
        return
    if repair and verdict.corrupt:
        given_up = give_up(store, verdict)
        say(f"verify: {given_up} corrupt shards given up; `raysynth generate` renders their rows again, for each of:")
        # These vouched for rows that are gone; without its marker `generate` renders and writes an artifact again.
        for folder in artifacts_of_set(pipeline.storage, store.path):
            pipeline.storage.delete(f"{folder}/_SUCCESS")
            say(f"  {folder}")
        return
    remedy = "`--repair`, then `raysynth generate`" if verdict.corrupt else "`raysynth generate`"
    raise GateFailed(f"verify: {store.path} is not what the plan wants. {remedy} mends it.")
