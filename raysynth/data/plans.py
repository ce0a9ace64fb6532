"""The plan: the table of synthetic images wanted, one row an image (core.schemas.plan_schema).

It says what, never how: conditions, source image, replica and rank. It does not know generators, guidance,
steps, shards or storage. Sources are the classifier's real subset (data.subsets), so no row rests on a
held-out image, and a row inherits its source's split.

A row's key is a 128-bit hash of what it shows (source image, mode, labels, attributes, prompt, replica): more
replicas, one more source image, another seed or a balanced instead of a replicated plan leave the other keys
as they are. A row's rank is its place in a fixed order whose every prefix keeps the shares of the classes
(data.strata), so that `rank < ratio * n_real` is nested by construction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment, Plan
from raysynth.core.identity import canonical_json
from raysynth.core.schemas import ATTRIBUTE, LABEL, attribute_names, label_names, plan_schema
from raysynth.data.balance import cells_of, did_you_mean, target_counts
from raysynth.data.strata import interleave, seeded_order, stratified_order, used_labels
from raysynth.data.subsets import real_subset

MODE = "conditional"
"""Rendered from noise under labels and attributes, without a prompt or a source's pixels."""


def plan_sources(table: pa.Table, experiment: Experiment) -> pa.Table:
    """The real images that plan rows are made from: the classifier's real subset, by image id.

    Raises:
        DataError: see `real_subset`.
    """
    ids = pa.array(real_subset(table, experiment.training_set, experiment.data.labels.policy), pa.string())
    return table.take(pc.index_in(ids, value_set=table["image_id"])).combine_chunks()


def build_plan(table: pa.Table, experiment: Experiment) -> pa.Table:
    """Every row of the plan, by rank. What of it is rendered, `select` says.

    replicate: each source `plan.replicas` times with its labels and attributes; one replica of all sources
    before the next, each in the same order stratified by class (with findings: by the image's rarest one).
    balanced: `plan.n` rows, cells of `plan.over` as `plan.targets` say, each cell going round its real images in seeded
    order; the n-th use of an image is its replica n - 1, so keys are shared with a replicated plan. The order
    is stratified by cell.

    Args:
        table: the ingest artifact's table: image_id, split, patient_id, label_*, attr_*.

    Returns:
        `plan_schema` rows with rank 0, 1, ...

    Raises:
        DataError: the targets contradict the real images or each other; see also `real_subset`.
    """
    return plan_rows(plan_sources(table, experiment), experiment)


def plan_rows(sources: pa.Table, experiment: Experiment) -> pa.Table:
    """`build_plan` over the images of `plan_sources`."""
    p = experiment.plan
    order = seeded_order("plan", p.seed, sources["image_id"].to_pylist())
    if p.kind == "replicate":
        once = stratified_order(sources, order, experiment.data.labels.policy)
        source, replica = np.tile(once, p.replicas), np.repeat(np.arange(p.replicas), len(once))
    else:
        source, replica = _balanced(sources, experiment, order)
    return _rows(sources, source, replica, experiment.data.labels.kind == "single")


def _balanced(sources: pa.Table, experiment: Experiment, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, labels = experiment.plan, experiment.data.labels
    cells = cells_of(sources, p.over, labels)
    counts = target_counts(cells, p.n or 0, p.targets, labels.kind)
    places = interleave(counts.tolist())
    source, replica = np.empty_like(places), np.empty_like(places)
    for cell in np.flatnonzero(counts):
        members = order[cells.of_image[order] == cell]
        replica[places == cell], at = np.divmod(np.arange(counts[cell]), len(members))
        source[places == cell] = members[at]
    return source, replica


def _rows(sources: pa.Table, source: np.ndarray, replica: np.ndarray, single: bool) -> pa.Table:
    labels, attributes = label_names(sources.schema), attribute_names(sources.schema)
    schema = plan_schema(labels, attributes)
    n = len(source)
    at = pa.array(source)
    columns = {
        "row_key": pa.array(_row_keys(sources, source, replica, single), pa.string(), size=n),
        "rank": np.arange(n),
        "source_image_id": sources["image_id"].take(at),
        "replica": replica.astype(np.int32),
        "split": sources["split"].take(at),
        "mode": pa.repeat(pa.scalar(MODE), n),
        "prompt": pa.nulls(n, pa.string()),
    }
    for name in schema.names[len(columns) :]:
        columns[name] = sources[name].take(at)
    return pa.table(columns, schema=schema)


def _row_keys(sources: pa.Table, source: np.ndarray, replica: np.ndarray, single: bool) -> Iterator[str]:
    # A source's hash is made once and copied for each replica: 1 microsecond a row instead of 10.
    hashes = list(_source_hashes(sources, single))
    suffix = [str(r).encode() for r in range(int(replica.max(initial=0)) + 1)]
    for s, r in zip(source.tolist(), replica.tolist()):
        h = hashes[s].copy()
        h.update(suffix[r])
        yield h.hexdigest()


def _source_hashes(sources: pa.Table, single: bool) -> Iterator[hashlib.blake2b]:
    """Hash of canonical condition, NUL, source id, NUL, to be ended by the replica. JSON has no NUL, so it is
    injective."""
    labels, attributes = label_names(sources.schema), attribute_names(sources.schema)
    columns = [sources[LABEL + n].to_pylist() for n in labels]
    columns += [sources[ATTRIBUTE + n].to_pylist() for n in attributes]
    conditions: dict[tuple, bytes] = {}
    values = zip(*columns) if columns else iter([()] * sources.num_rows)
    for image_id, condition in zip(sources["image_id"].to_pylist(), values):
        text = conditions.get(condition)
        if text is None:
            # Unknowns are left out: a column that is added later changes only the rows it describes. Of one class an
            # image only that class counts, so that a new class leaves the others' rows as they are.
            known = {
                "mode": MODE,
                "labels": {n: v for n, v in zip(labels, condition) if v is not None and (v == 1 or not single)},
                "attributes": {n: v for n, v in zip(attributes, condition[len(labels) :]) if v is not None},
                "prompt": None,
            }
            text = conditions[condition] = canonical_json(known).encode() + b"\0"
        yield hashlib.blake2b(text + json.dumps(image_id).encode() + b"\0", digest_size=16)


def selected_by(e: Experiment) -> str:
    """The section that selects what is rendered: `plan`; where that selects nothing, a `training_set` that trains on
    any."""
    p, t = e.plan, e.training_set
    typed = p.ratio is not None or p.n_synth is not None or p.quota
    return "plan" if typed or e.classifier is None or not t.needs_synthetic else "training_set"


def selection(e: Experiment) -> Plan:
    """What is rendered, by the section of `selected_by`."""
    t = e.training_set
    if selected_by(e) == "plan":
        return e.plan
    return dataclasses.replace(e.plan, ratio=t.ratio, n_synth=t.n_synth, quota=t.quota)


@contextmanager
def keys_of_selection(section: str) -> Iterator[None]:
    """Errors of `select` and `selected_count`, which speak of `plan`, are told of the section that selects."""
    try:
        yield
    except DataError as error:
        key = error.key.replace("plan.", f"{section}.", 1)
        raise DataError(key, error.got, error.allowed, error.remedy) from error


def selected_count(rows: int, n_real: int, wanted: Plan) -> int:
    """How many of a plan's first rows `ratio` or `n_synth` selects; all of them with neither.

    Raises:
        DataError: more than the plan has.
    """
    enough = "plan.n" if wanted.kind == "balanced" else "plan.replicas"
    if wanted.ratio is not None:
        # 0.1 * 30 is 3.0000000000000004: a fourth row would come from rounding alone.
        count = math.ceil(round(wanted.ratio * n_real, 6))
        if count > rows:
            most = f"at most {rows / max(1, n_real):g} ({rows} rows over {n_real} real images)"
            raise DataError("plan.ratio", wanted.ratio, most, f"Raise {enough}.")
        return count
    if wanted.n_synth is not None and wanted.n_synth > rows:
        raise DataError("plan.n_synth", wanted.n_synth, f"at most {rows}, the plan's rows", f"Raise {enough}.")
    return rows if wanted.n_synth is None else wanted.n_synth


def select(
    plan: pa.Table, n_real: int, wanted: Plan, policy: Mapping[str, str] | None = None
) -> np.ndarray:
    """Which rows of the plan are to be rendered, (N,) bool. Nested: a larger ratio, n_synth or quota only
    adds rows.

    Args:
        plan: rows by rank. n_real: real images of the plan (its sources). wanted: `ratio`, `n_synth` or
        `quota` of the plan's section; with none of them, every row. Classes that
            `quota` does not name are not limited; a row with several findings counts for each of them.
        policy: `data.labels.policy`, for `quota`.

    Raises:
        DataError: more rows than the plan has, or an unknown class in `quota`.
    """
    rank = plan["rank"].to_numpy()
    if not wanted.quota:
        return rank < selected_count(len(rank), n_real, wanted)
    chosen = np.ones(len(rank), dtype=bool)
    names, labels = label_names(plan.schema), used_labels(plan, policy)
    for name, most_rows in wanted.quota.items():
        if name not in names or most_rows < 0:
            key, remedy = f"plan.quota.{name}", did_you_mean(name, names) if name not in names else ""
            raise DataError(key, most_rows, f">= 0 and about one of {', '.join(names)}", remedy)
        has = labels[:, names.index(name)] == 1
        chosen &= ~has | (np.cumsum(has) <= most_rows)
    return chosen
