"""Renders the plan's selected rows into the synthetic set and proves that they are all there.

Input: the plan and the exported generator. Output: a synthetic set that may serve many plans, and an artifact that
says which of its images this plan's rows are and which failed (`stages.generated`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from raysynth.core.artifacts import Artifact
from raysynth.core.cache import local_folder
from raysynth.core.errors import EnvironmentFault, GateFailed
from raysynth.core.experiment import Compute, Experiment
from raysynth.core.identity import content_digest
from raysynth.core.lease import Lease
from raysynth.core.progress import duration, say
from raysynth.core.schemas import label_names
from raysynth.core.storage import Storage
from raysynth.data.plans import selection
from raysynth.stages.cluster import Resources
from raysynth.stages.external import by_location, listing_data, reading, set_identity
from raysynth.stages.generated import put_rows
from raysynth.stages.live import Rendering, RenderView, gpus_of_worker
from raysynth.stages.plan import wanted_rows
from raysynth.stages.render import RenderJob, require_room, run_rounds, settle_first, worker_shape
from raysynth.stages.telemetry import RenderMetrics
from raysynth.synth.growth import growth, unwanted
from raysynth.synth.importing import ImportRenderer
from raysynth.synth.ledger import ABSENT, STATUSES, Ledger
from raysynth.synth.renderer import RENDER_VERSION, Renderer
from raysynth.synth.sets import SyntheticSet, Wave
from raysynth.synth.settle import read_settled
from raysynth.synth.wanted import Wanted, unpack
from raysynth.synth.waves import extend, missing, rows_a_shard

STAGE_VERSION = 2
SHARE_OF_MEMORY = 0.95  # of its part of the GPU, for renderers that share one


def make_renderer(
    storage: Storage, generator: str, version: str, e: Experiment, gpu: bool, threads: int, compiled: bool = False
) -> Renderer:
    """The generator's renderer, made inside the process that holds the device.

    Args:
        generator: folder of the train-generator artifact.
        version: its `generator_id`: a cached copy of other weights is never used.
    """
    path = local_folder(storage, f"{generator}/export", e.compute.cache, version)
    import torch

    from raysynth.synth.ddpm import DDPMRenderer

    share = e.compute.gpus_per_renderer
    if gpu and 0 < share < 1:
        # Or a micro-batch measured alone would take the whole GPU. A CUDA context's own memory counts to nobody.
        torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY * share)
    return DDPMRenderer(str(path), e.sampling, "cuda" if gpu else "cpu", threads, compiled)


def generator_id(generator: Artifact) -> str:
    """Content digest of the exported weights, schedule and condition layout: what the generator is."""
    generator.digest()  # says what to run, where it is not complete
    run = generator.run_info()
    if "generator_id" in run:  # the listing of a set that was rendered elsewhere
        return run["generator_id"]
    outputs = run["outputs"]
    made_of = ("export/unet/", "export/scheduler/", "export/condition.json")
    return content_digest((n, d) for n, d in outputs.items() if n.startswith(made_of))[:24]


def pixel_identity(experiment: Experiment, generator: Artifact) -> dict[str, Any]:
    """What makes the pixels of a set: the generator under this sampling configuration."""
    s = experiment.sampling
    if experiment.generator.kind == "external":
        return set_identity(generator)
    return {
        "render_version": RENDER_VERSION, "generator_id": generator_id(generator), "sampler": s.sampler,
        "steps": s.steps, "guidance_scale": s.guidance_scale, "guidance_rescale": s.guidance_rescale,
        "guidance_interval": s.guidance_interval, "eta": s.eta, "precision": s.precision, "seed": experiment.plan.seed,
    }  # fmt: skip


def synthetic_set(experiment: Experiment, storage: Storage, generator: Artifact) -> SyntheticSet:
    """The set that the plan's images are in, whether or not it exists yet."""
    return SyntheticSet.at(storage, experiment.name, pixel_identity(experiment, generator))


def generate_artifact(experiment: Experiment, storage: Storage, generator: Artifact, plan: Artifact) -> Artifact:
    """The artifact that says which images of the set the plan's selected rows are."""
    p = selection(experiment)
    config = {"ratio": p.ratio, "n_synth": p.n_synth, "quota": p.quota,
              "set": pixel_identity(experiment, generator)}  # fmt: skip
    return Artifact.at(storage, "generate", experiment.name, STAGE_VERSION, config, {"plan": plan.digest()})


def generate(
    experiment: Experiment,
    storage: Storage,
    generator: Artifact,
    plan: Artifact,
    resources: Resources | Callable[[], Resources],
    retry_failed: bool = False,
    factory: Callable[[], Renderer] | None = None,
) -> Artifact:
    """Renders whatever of the plan is missing, and writes the artifact anew.

    Args:
        resources: what the cluster has, or what connects to it: called only where something is to be rendered.
        retry_failed: render rows recorded as failed once more, with the same noise.
        factory: another renderer than the generator's own; for benchmarks and chaos tests.

    Raises:
        GateFailed: more rows failed than `compute.max_failed_fraction`.
        EnvironmentFault: storage, device or render.json; nothing is lost and the command may be repeated.
    """
    artifact = generate_artifact(experiment, storage, generator, plan)
    storage.probe()
    store = synthetic_set(experiment, storage, generator)
    wanted = wanted_rows(experiment, storage, plan)
    # From here on the artifact is unfinished: its rows may change, and the sheet with them.
    for name in ("_SUCCESS", "contact_sheet.png"):
        storage.delete(artifact.file(name))
    ledger, compute = Ledger(store), experiment.compute
    if others := unwanted(ledger, wanted):
        say(f"generate: the set holds {others:,} rows that this plan does not want; they stay")
    if not missing(ledger, wanted, retry_failed).any() and not ledger.pending(wanted):
        say(f"generate: nothing to render, {store.path} holds all {len(wanted):,} rows")
        return conclude(artifact, ledger, wanted, generator, compute, {})
    found = resources() if callable(resources) else resources
    if experiment.generator.kind == "external":
        found, compute, wanted = replace(found, gpus=0), reading(compute), by_location(wanted)
        classes = label_names(next(iter(wanted.read())).schema)
        factory = factory or partial(ImportRenderer, listing_data(experiment, classes))
    factory = factory or partial(
        make_renderer, storage, generator.path, store.identity["generator_id"], experiment,
        gpu=bool(found.gpus), **fixed(store, compute),
    )  # fmt: skip
    sums = render(store, wanted, factory, compute, found, retry_failed, ledger)
    wanted = wanted_rows(experiment, storage, plan)
    return conclude(artifact, ledger, wanted, generator, compute, sums)


def fixed(store: SyntheticSet, compute: Compute) -> dict[str, Any]:
    """Keys of `compute` that decide bytes, as the set's render.json has them where there is one."""
    settled = read_settled(store)
    facts = settled.facts if settled else {}
    return {
        "threads": facts.get("threads") or compute.render_threads, "compiled": facts.get("compile", compute.compile)
    }  # fmt: skip


def render(
    store: SyntheticSet,
    wanted: Wanted,
    factory: Callable[[], Renderer],
    compute: Compute,
    resources: Resources,
    retry_failed: bool = False,
    ledger: Ledger | None = None,
) -> dict[str, float]:
    """Brings `store` to hold every wanted row, committed or recorded as failed. Returns sums over this run.

    Args:
        ledger: an earlier reading of the set, to save time.
    """
    require_room(compute, resources)
    job = RenderJob(store, factory, compute.micro_batch, compute.accept_render_change)
    store.announce()
    with Lease(store.storage, store.file("lock.json")) as lease:
        if lease.others:
            joins = compute.other_driver == "join"
            say(f"generate: {lease.others} renders this set too; "
                f"{'joining from the other end' if joins else 'waiting until it has finished'}")  # fmt: skip
            if not joins:
                lease.wait()
        ledger = ledger.refresh() if ledger else Ledger(store)
        absent = missing(ledger, wanted, retry_failed)
        new = int(absent.sum())
        if new:
            workers, _, _ = worker_shape(compute, resources)
            if compute.micro_batch and compute.shard_rows:
                micro_batch, rate = compute.micro_batch, None
            else:
                settled = settle_first(job, compute, resources)
                micro_batch, rate = settled.micro_batch, settled.rows_per_s
            size = rows_a_shard(new, workers, micro_batch, rate, compute.shard_seconds, compute.shard_rows)
            why = growth(ledger, wanted, absent).words()
            wave = extend(ledger, wanted, size, why, retry_failed)
            if wave is not None:
                say(f"generate: wave {wave.number} of {store.path}: {sum(wave.shard_rows):,} rows in "
                    f"{len(wave.shard_rows):,} shards of up to {size:,}: {why}")  # fmt: skip

        def left() -> list[tuple[Wave, int]]:
            store.fold()
            return ledger.refresh().pending(wanted)

        todo = sum(wave.shard_rows[shard - wave.first_shard] for wave, shard in ledger.pending(wanted))
        _, _, gpus_each = worker_shape(compute, resources)
        rendering = Rendering(
            f"generate {store.name}", len(wanted), max(0, len(wanted) - todo), gpus_each, compute.price_per_gpu_hour
        )
        metrics = RenderMetrics(store.path.rpartition("/")[2], len(wanted), gpus_each)
        with RenderView(rendering, metrics) as view:
            return run_rounds(job, left, compute, resources, view, backwards=bool(lease.others))


def conclude(
    artifact: Artifact,
    ledger: Ledger,
    wanted: Wanted,
    generator: Artifact,
    compute: Compute,
    sums: dict[str, float],
) -> Artifact:
    """Checks counts against the plan, writes the artifact, holds the gate.

    Args:
        ledger: of the set, however old. sums: what this run did, for run.json.

    Raises:
        EnvironmentFault: the set does not hold every wanted row.
        GateFailed: more rows failed than `compute.max_failed_fraction`.
    """
    store = ledger.store
    store.fold()
    ledger.refresh()
    markers = store.markers(ledger.done)
    places = ledger.find(wanted.keys, ledger.statuses(markers))
    lost = np.flatnonzero(places.status == ABSENT)
    if len(lost):
        raise EnvironmentFault(
            f"{store.path} misses {len(lost)} wanted rows after rendering, first "
            f"{unpack(wanted.keys[lost[:1]])[0]}. Run `raysynth verify` and then the same command again."
        )
    put_rows(artifact, wanted, places, markers)
    counts = {"wanted": len(wanted)} | {n: int((places.status == STATUSES.index(n)).sum())
                                        for n in ("ok", "failed", "rejected")}  # fmt: skip
    fraction = counts["failed"] / max(1, counts["wanted"])
    if fraction > compute.max_failed_fraction:
        raise GateFailed(
            f"compute.max_failed_fraction: {counts['failed']:,} of {counts['wanted']:,} rows failed, allowed "
            f"{compute.max_failed_fraction:.2%}. See {artifact.file('failed.parquet')}; `--retry-failed` renders "
            "them once more."
        )
    # Of a shard that holds rows of other plans too, its share.
    seconds = sum(markers[s]["render_seconds"] * rows / markers[s]["rows"] for s, rows in places.shards().items())
    gpu_seconds = seconds * gpus_of_worker(read_settled(store), compute)
    price = compute.price_per_gpu_hour
    cost = round(gpu_seconds / 3600 * price, 4) if price is not None else None
    artifact.commit(
        counts, gpu_seconds=gpu_seconds, cost=cost, synthetic_set=store.path, generator=generator.path,
        render=store.get_json("render.json"), render_seconds=round(seconds, 3),
        this_run={k: round(v, 3) for k, v in sums.items()},
    )  # fmt: skip
    rate = f", {len(wanted) / seconds:.1f} images/s a worker" if seconds else ""
    say(f"generate: {counts['ok']:,} ok, {counts['failed']:,} failed in {duration(seconds)} of rendering{rate}; "
        f"{artifact.path}")  # fmt: skip
    if counts["failed"]:
        say(f"generate: the failed rows, with reasons: {artifact.storage.url(artifact.file('failed.parquet'))}")
    return artifact
