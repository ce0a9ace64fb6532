"""What a person asks of an experiment without running it: dry run, status, verify. Starts no Ray."""

from __future__ import annotations

import time

import yaml
from rich.table import Table

from raysynth.core.errors import EnvironmentFault, GateFailed
from raysynth.core.identity import _plain
from raysynth.core.lease import holder_of
from raysynth.core.progress import Progress, console, duration, say
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import selected_rows
from raysynth.synth.settle import read_settled
from raysynth.synth.verify import repair as give_up
from raysynth.synth.verify import verify


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
    say(yaml.safe_dump(_plain(resolved(e), "experiment"), sort_keys=False).rstrip())
    show_artifacts_of(pipeline)
    found = pipeline.found()
    if found["plan"] is None or found["generate"] is None or not found["plan"].complete:
        say("generate: rows are known once ingest, train-generator and plan are done")
        return
    wanted = selected_rows(e, pipeline.storage, pipeline.plan, ["row_key"])
    store = pipeline.synthetic_set
    rows = store.rows()
    done = set(rows.loc[rows["done"].astype(bool), "row_key"])
    left = sum(k not in done for k in wanted.column("row_key").to_pylist())
    workers = e.compute.render_workers or "one a GPU"
    say(f"generate: {left:,} of {wanted.num_rows:,} rows to render, workers: {workers}, "
        f"{e.compute.gpus_per_renderer:g} GPU each where there are GPUs")  # fmt: skip
    settled = read_settled(store)
    if settled is None:
        say("generate: no rate is known before the first worker has measured one")
        return
    hours = left / settled.rows_per_s / 3600
    price = e.compute.price_per_gpu_hour
    cost = f", cost {hours * e.compute.gpus_per_renderer * price:,.2f}" if price is not None else ""
    say(f"generate: {hours:.2f} worker hours at {settled.rows_per_s:.2f} images/s a worker{cost}")


def show_status(pipeline: Pipeline) -> None:
    """Artifacts, and the synthetic set's progress from its markers alone."""
    show_artifacts_of(pipeline)
    try:
        store = pipeline.synthetic_set
        wanted = selected_rows(pipeline.experiment, pipeline.storage, pipeline.plan, ["row_key"])
    except EnvironmentFault:
        return
    rows = store.rows()
    mine = rows[rows["row_key"].isin(wanted.column("row_key").to_pandas())]
    markers = store.markers(mine.loc[mine["done"].astype(bool), "shard"].unique())
    done = int(mine["done"].sum())
    failed = sum(len(m["failed"]) for m in markers.values())
    seconds = sum(m["render_seconds"] for m in markers.values())
    say(f"images: {done:,}/{wanted.num_rows:,} committed, {failed:,} failed, {duration(seconds)} of rendering")
    # Rate of the last five minutes: an average over nights and restarts would promise too little.
    recent = [m for m in markers.values() if m["finished"] > time.time() - 300]
    holder = holder_of(store.storage, store.file("lock.json"))
    if holder:
        say(f"running: process {holder['pid']} on {holder['host']}")
    if recent and done < wanted.num_rows:
        first = min(m["finished"] - m["render_seconds"] for m in recent)
        rate = sum(m["rows"] for m in recent) / max(time.time() - first, 1e-9)
        say(f"rate: {rate:.1f} images/s now, {duration((wanted.num_rows - done) / rate)} left")
    price = pipeline.experiment.compute.price_per_gpu_hour
    ok = sum(m["ok"] for m in markers.values())
    if price is not None and ok:
        cost = seconds / 3600 * pipeline.experiment.compute.gpus_per_renderer * price
        say(f"cost: {cost:,.2f} so far, {1000 * cost / ok:,.3f} per thousand images")


def verify_set(pipeline: Pipeline, repair: bool) -> None:
    """Prints what `verify` found.

    Raises:
        GateFailed: the set does not hold exactly what is wanted.
    """
    store = pipeline.synthetic_set
    wanted = selected_rows(pipeline.experiment, pipeline.storage, pipeline.plan, ["row_key"])
    with Progress("verify", len(store.done()), "shards") as progress:
        verdict = verify(store, wanted, progress.advance)
    for line in verdict.lines():
        say(line)
    if verdict.clean:
        say(f"verify: clean, {store.path}")
        return
    if repair and verdict.corrupt:
        given_up = give_up(store, verdict)
        # The artifact vouched for rows that are gone; without its marker `generate` renders and writes it again.
        if pipeline.generated.complete:
            pipeline.storage.delete(pipeline.generated.file("_SUCCESS"))
        say(f"verify: {given_up} corrupt shards given up; `raysynth generate` renders their rows again")
        return
    remedy = "`--repair`, then `raysynth generate`" if verdict.corrupt else "`raysynth generate`"
    raise GateFailed(f"verify: {store.path} is not what the plan wants. {remedy} mends it.")
