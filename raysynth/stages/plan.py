"""Stage `plan`: the ingest artifact's table -> `plan/<name>-<fp12>/rows.parquet` and `joint.csv`. Needs no
ray.

The rows of a set that was rendered elsewhere come from its listing instead (stages.external).

The artifact holds every row of the plan. `plan.ratio`, `plan.n_synth` and `plan.quota` only select from it
and are no part of its identity, so that a larger ratio is the same plan and its earlier rows stay rendered.
`joint.csv` is about every row; what is printed, about the selected ones.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.table import Table

from raysynth.core.artifacts import Artifact
from raysynth.core.experiment import Experiment
from raysynth.core.progress import console, say
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.balance import joint_table
from raysynth.data.plans import (
    keys_of_selection,
    plan_rows,
    plan_sources,
    select,
    selected_by,
    selected_count,
    selection,
)
from raysynth.stages.external import external_plan, import_artifact, per_class
from raysynth.synth.wanted import Wanted, pack

STAGE_VERSION = 3
SELECTION = ("ratio", "n_synth", "quota")
ROW_GROUP = 65_536
"""Rows a parquet row group: a reader of one shard's rows need not load a million."""
SHOWN_CELLS = 30


def plan_artifact(experiment: Experiment, storage: Storage, ingest_artifact: Artifact) -> Artifact:
    """The plan's artifact, whether or not it exists yet. Raises EnvironmentFault if ingest is not
    complete."""
    section = {k: v for k, v in dataclasses.asdict(experiment.plan).items() if k not in SELECTION}
    config: dict[str, Any] = {"plan": section, "training_set": experiment.training_set.subset}
    labels = experiment.data.labels
    policy = {k: v for k, v in labels.policy.items() if v != "ignore"}
    if policy and labels.kind == "multi":  # it then decides strata, subsets and cells
        config["policy"] = policy
    inputs = {"images": ingest_artifact.digest()}
    if experiment.generator.kind == "external":
        config["plan"] = {"seed": experiment.plan.seed}
        inputs["listing"] = import_artifact(experiment, storage, ingest_artifact)[0].fp  # known before it is taken
    return Artifact.at(storage, "plan", experiment.name, STAGE_VERSION, config, inputs)


def plan(experiment: Experiment, storage: Storage, ingest_artifact: Artifact) -> Artifact:
    """Builds the plan if it is not there, and shows the selected rows against the real images.

    Raises:
        DataError: targets or selection contradict the real images; see `data.plans`.
    """
    artifact = plan_artifact(experiment, storage, ingest_artifact)
    external = experiment.generator.kind == "external"
    over, labels = experiment.plan.over, experiment.data.labels
    sources = plan_sources(from_parquet(storage.get(ingest_artifact.file("table.parquet"))), experiment)
    if not artifact.complete:
        if external:
            import_artifact(experiment, storage, ingest_artifact)[0].digest()
            rows, joint = external_plan(experiment, storage, ingest_artifact), None
        else:
            rows = plan_rows(sources, experiment)
            joint = joint_table(rows, sources, over, labels)
        groups = [min(ROW_GROUP, rows.num_rows - at) for at in range(0, rows.num_rows, ROW_GROUP)]
        artifact.put("rows.parquet", to_parquet(rows, groups))
        if joint is not None:
            text = io.BytesIO()
            pyarrow.csv.write_csv(joint, text)
            artifact.put("joint.csv", text.getvalue())
        cells = joint.num_rows if joint is not None else 0
        artifact.commit({"rows": rows.num_rows, "n_real": sources.num_rows, "cells": cells})
    counts = artifact.run_info()["counts"]
    wanted = wanted_rows(experiment, storage, artifact)
    if external and len(wanted):  # its rows need no source, so there is no joint table with the real images
        say(f"plan: {per_class(pa.concat_tables(wanted.read()))}")
    elif len(wanted):
        used = pa.concat_tables(t.select(["source_image_id"]) for t in wanted.read())
        show_joint(joint_table(used, sources, over, labels), over)
    say(f"plan: {len(wanted):,} of {counts['rows']:,} rows wanted, from {counts['n_real']:,} real images")
    return artifact


def load_plan(storage: Storage, artifact: Artifact, columns: list[str] | None = None) -> pa.Table:
    """Every row of the plan by rank (core.schemas.plan_schema)."""
    return from_parquet(storage.get(artifact.file("rows.parquet")), columns)


def wanted_rows(experiment: Experiment, storage: Storage, artifact: Artifact) -> Wanted:
    """Rows that are to be rendered (`data.plans.selection`), by rank; holds their keys only and streams the rest.

    Raises:
        DataError: more rows than the plan has, or an unknown class in `plan.quota`.
    """
    chosen = selection(experiment)
    path, info = artifact.file("rows.parquet"), artifact.run_info()["counts"]

    def groups(columns: list[str] | None = None) -> Iterator[pa.Table]:
        with storage.open(path) as f:
            file = pq.ParquetFile(f)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns)

    with keys_of_selection(selected_by(experiment)):
        if chosen.quota:
            rows = load_plan(storage, artifact)
            mask = select(rows, info["n_real"], chosen, experiment.data.labels.policy)
            ranks, stop = np.flatnonzero(mask).astype(np.int32), rows.num_rows
            del rows
        else:  # a plan is stored by rank: its first rows
            stop = selected_count(info["rows"], info["n_real"], chosen)
            ranks, mask = np.arange(stop, dtype=np.int32), None

    def read(columns: list[str] | None = None) -> Iterator[pa.Table]:
        at = 0
        for table in groups(columns):
            if at >= stop:
                return
            yield table.slice(0, stop - at) if mask is None else table.filter(
                pa.array(mask[at : at + table.num_rows])
            )
            at += table.num_rows

    keys, at = np.empty(len(ranks), "S16"), 0
    for table in read(["row_key"]):
        keys[at : at + table.num_rows] = pack(table["row_key"])
        at += table.num_rows
    return Wanted(keys, ranks, read)


def show_joint(joint: pa.Table, over: list[str]) -> None:
    """Prints the joint table: share of each cell among real and synthetic images, and the most replicas of
    one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in over:
        table.add_column(name)
    for name in ("real", "%", "synthetic", "%", "sources", "max replicas"):
        table.add_column(name, justify="right")
    for row in joint.slice(0, SHOWN_CELLS).to_pylist():
        table.add_row(
            *(row[n] for n in over), f"{row['real']:,}", f"{100 * row['real_share']:.1f}",
            f"{row['synthetic']:,}", f"{100 * row['synthetic_share']:.1f}", f"{row['sources']:,}",
            f"{row['max_replicas']:,}",
        )  # fmt: skip
    console.print(table)
    if joint.num_rows > SHOWN_CELLS:
        say(f"... {joint.num_rows - SHOWN_CELLS} more cells; joint.csv has those of the whole plan")
