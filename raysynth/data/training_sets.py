"""What a classifier is trained on: real and synthetic images by strategy, and the real images it is validated on.

Inputs: the experiment, ingest's table and the synthetic rows that were rendered; output: lists of ids (`Chosen`).
Knows no pixels, batches or models: `real_fraction` and balanced sampling are the feed's business (data.feed).

Synthetic rows are selected by rank in the plan, before it is asked which of them were rendered: a row that failed is
missing and counted, never replaced by the next one. Duplicates follow the same plan, each synthetic image replaced by
its source, so that the control differs from the mix in nothing but the pixels being new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import ConfigError, DataError
from raysynth.core.evidence import TrainingSet
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import LABEL, label_names, members_schema
from raysynth.data.plans import keys_of_selection, plan_rows, select
from raysynth.data.strata import primary_label, seeded_order, used_labels
from raysynth.data.subsets import generator_rows, patient_order, real_subset


@dataclass(frozen=True)
class Chosen:
    """A training set and its validation set."""

    members: pa.Table
    """`core.schemas.members_schema`: phase 0, and 1 where there are two stages."""
    phase_steps: list[int]
    """Optimizer steps of each phase; they sum to classifier.steps whatever the strategy."""
    validation: list[str]
    """Real images of the val split, by image id."""
    n_real: int
    """Distinct real training images."""
    n_synth: int
    """Distinct synthetic training images."""
    n_missing: int
    """Synthetic images that were selected but not rendered."""
    ids_digest: str
    """Content digest of members and validation."""
    notes: list[str]
    """What a reader of the results should know, in words."""


@dataclass(frozen=True)
class _Part:
    """Members of one phase and source."""

    source: str
    ids: list[str]
    labels: pa.Table
    """`label_*` columns in the order of `ids`."""
    labels_from: list[str] | None = None
    """Ids whose labels are used; null: their own."""


def choose(
    e: Experiment, table: pa.Table, synthetic: pa.Table | None,
    seen: Collection[str] | None = None, listed: pa.Table | None = None,
) -> Chosen:
    """The training set of one experiment without a sweep.

    Args:
        table: ingest's table: image_id, split, patient_id, label_*, attr_*.
        synthetic: the plan's rows that were rendered, in any order; null where the strategy needs none.
        seen, listed: ids that a generator trained elsewhere saw, for `upper_bound`; the plan of a set that was rendered
            elsewhere, by rank. Null: as the experiment says.

    Raises:
        ConfigError: no `classifier` section.
        DataError: more synthetic images asked for than were planned; none rendered; a row that rests on anything but
            the classifier's real subset; a class or finding with no training image; a validation split on which
            nothing can be judged; a patient in two splits.
    """
    if e.classifier is None:
        raise ConfigError("classifier", None, "a section", "Add `classifier: {}` for defaults.")
    t, policy = e.training_set, e.data.labels.policy
    subset = real_subset(table, t, policy)
    sources = _rows(table, subset)
    real, notes, missing = _real(sources), [], 0
    if t.strategy == "upper_bound":
        seen = sorted({*subset, *(generator_rows(table, e) if seen is None else seen)})
        if len(seen) == len(subset):
            notes.append("the generator saw no real image that the classifier did not: the upper bound is `real`")
        phases = [[_real(_rows(table, seen))]]
    elif t.strategy == "duplicate":
        phases = [[_real(_rows(table, subset + _duplicates(e, sources)))]]
    elif t.needs_synthetic:
        part, missing = _synthetic(e, sources, synthetic, listed)
        if missing:
            notes.append(f"{missing} of {len(part.ids) + missing} selected synthetic images were not rendered")
        phases = {
            "synthetic": [[part]], "mix": [[real, part]], "permuted": [[real, part]], "pretrain": [[part], [real]],
        }[t.strategy]  # fmt: skip
    else:
        phases = [[real]] * t.stages
    notes += _check_classes(phases, e)
    validation = validation_ids(table, t, subset, policy)
    notes += check_validation(table, validation, policy)
    members = pa.concat_tables([_members(k, part) for k, parts in enumerate(phases) for part in parts])
    return Chosen(
        members, _phase_steps(t, e.classifier.steps), validation, n_real=_distinct(members, "real"),
        n_synth=_distinct(members, "synthetic"), n_missing=missing, notes=notes,
        ids_digest=_digest(members, validation),
    )  # fmt: skip


def validation_ids(
    table: pa.Table, training_set: TrainingSet, subset: Sequence[str], policy: Mapping[str, str] | None = None
) -> list[str]:
    """Real images that a classifier is validated on, sorted image ids of the val split.

    `scaled`: of each class (multi-label: of each rarest finding) the share that the subset is of the train split, by a
    seeded order of patients; with them the first image that has each finding and the first that has it not, so that
    every finding can be judged. A larger subset of the same seed contains the smaller one's.

    Args:
        subset: the classifier's real training images, as `data.subsets.real_subset`.
        policy: `data.labels.policy`.
    """
    val = table.filter(pc.field("split") == "val")
    ids = val["image_id"].to_pylist()
    if training_set.validation == "all":
        return sorted(ids)
    train = table.filter(pc.field("split") == "train")
    # Strata of both splits together: a finding's place among the rarest must not differ between them.
    strata, names = primary_label(pa.concat_tables([train, val]), policy)
    inside = pc.is_in(train["image_id"], value_set=pa.array(subset, pa.string())).to_numpy(zero_copy_only=False)
    of_train, of_val = np.split(strata, [train.num_rows])
    whole, kept = (np.bincount(of_train[m], minlength=len(names)) for m in (slice(None), inside))
    order = patient_order(val, training_set.seed)
    chosen: set[int] = set()
    for s in range(len(names)):
        members = order[of_val[order] == s]
        chosen.update(members[: round(len(members) * kept[s] / max(1, whole[s]))].tolist())
    labels = used_labels(val, policy)[order]
    for value in (1, 0):
        has = labels == value
        chosen.update(order[has.argmax(axis=0)[has.any(axis=0)]].tolist())
    return sorted(ids[i] for i in chosen)


def _label_table(rows: pa.Table) -> pa.Table:
    return rows.select([LABEL + n for n in label_names(rows.schema)])


def _rows(table: pa.Table, ids: list[str]) -> pa.Table:
    at = pc.index_in(pa.array(ids, pa.string()), value_set=table["image_id"].combine_chunks())
    return table.take(at).combine_chunks()


def _real(rows: pa.Table) -> _Part:
    return _Part("real", rows["image_id"].to_pylist(), _label_table(rows))


def _wanted(e: Experiment, plan: pa.Table, n_real: int) -> np.ndarray:
    """Rows of the plan that `training_set` selects, (N,) bool."""
    t, policy = e.training_set, e.data.labels.policy
    asked = dataclasses.replace(e.plan, ratio=t.ratio, n_synth=t.n_synth, quota=t.quota)
    with keys_of_selection("training_set"):
        chosen = select(plan, n_real, asked, policy)
    rendered = select(plan, n_real, e.plan, policy)
    for key in ("ratio", "n_synth"):
        if getattr(t, key) is not None and (chosen & ~rendered).any():
            raise DataError(
                f"training_set.{key}", getattr(t, key), f"at most the {rendered.sum()} rows that plan selects",
                "Leave plan.ratio, plan.n_synth and plan.quota out, or raise them.",
            )  # fmt: skip
    return chosen & rendered


def _synthetic(e: Experiment, sources: pa.Table, synthetic: pa.Table | None, listed: pa.Table | None) -> tuple:
    """The selected synthetic rows that were rendered (`_Part`), and how many were not."""
    if synthetic is None:
        raise DataError("training_set.strategy", e.training_set.strategy, "real without synthetic images")
    plan = plan_rows(sources, e) if listed is None else listed
    _check_sources(plan, synthetic, sources if listed is None else None)  # a listing was judged when it was taken in
    wanted = _wanted(e, plan, sources.num_rows)
    there = pc.is_in(plan["row_key"], value_set=synthetic["row_key"].combine_chunks())
    rows = plan.filter(pa.array(wanted & there.to_numpy(zero_copy_only=False)))
    if not rows.num_rows:
        raise DataError(
            "training_set", f"none of {wanted.sum()} selected synthetic images", "at least one that was rendered",
            "`raysynth status` says what generate has done; see also training_set.ratio, n_synth and quota.",
        )  # fmt: skip
    keys, labels = rows["row_key"].to_pylist(), _label_table(rows)
    missing = int(wanted.sum()) - len(keys)
    if e.training_set.strategy != "permuted":
        return _Part("synthetic", keys, labels), missing
    at = seeded_order("permuted labels", e.training_set.seed, keys)
    return _Part("synthetic", keys, labels.take(at), [keys[i] for i in at]), missing


def _check_sources(plan: pa.Table, synthetic: pa.Table, subset: pa.Table | None) -> None:
    """Raises DataError if a row rests on an image outside the real subset, or is none of the plan's."""
    bad = pc.not_equal(synthetic["split"], "train")
    if subset is not None:
        bad = pc.or_(bad, pc.invert(pc.is_in(synthetic["source_image_id"], subset["image_id"].combine_chunks())))
    other = pc.invert(pc.is_in(synthetic["row_key"], value_set=plan["row_key"].combine_chunks()))
    for wrong, allowed in (
        (bad, "made from a train image of the classifier's real subset"), (other, "a row of this experiment's plan"),
    ):  # fmt: skip
        wrong = pc.fill_null(wrong, True)
        if pc.any(wrong).as_py():
            row = synthetic.filter(wrong).slice(0, 1).to_pylist()[0]
            got = f"row {row['row_key']} from {row['source_image_id']} ({row['split']})"
            raise DataError(
                "synthetic set", got, allowed, "Render for this training_set and plan: `raysynth generate`."
            )


def _duplicates(e: Experiment, sources: pa.Table) -> list[str]:
    """Real images repeated: the sources of the plan rows that a mix would have, however many the plan renders."""
    t, p, n_real = e.training_set, e.plan, sources.num_rows
    if t.ratio is not None or t.n_synth is not None:
        times = math.ceil(t.ratio if t.ratio is not None else (t.n_synth or 0) / n_real)
        p = dataclasses.replace(p, ratio=None, n_synth=None, quota={}, replicas=max(p.replicas, times))
    enough = dataclasses.replace(e, plan=p)
    plan = plan_rows(sources, enough)
    return plan["source_image_id"].filter(pa.array(_wanted(enough, plan, n_real))).to_pylist()


def _phase_steps(t: TrainingSet, steps: int) -> list[int]:
    if t.stages == 1:
        return [steps]
    first = round(t.pretrain.step_share * steps)
    return [first, steps - first]


def _known(tables: Sequence[pa.Table], policy: Mapping[str, str]) -> np.ndarray:
    """Images (2, L) that have each finding, and that are known not to."""
    labels = [used_labels(rows, policy) for rows in tables]
    return np.stack([sum((rows == value).sum(axis=0) for rows in labels) for value in (1, 0)])


def _check_classes(phases: list[list[_Part]], e: Experiment) -> list[str]:
    """Raises DataError where the last phase cannot teach a class; notes where an earlier one lacks it."""
    notes = []
    names = label_names(phases[0][0].labels.schema)
    for phase, parts in enumerate(phases):
        for j, word in enumerate(("positive", "negative")):
            lacking = [n for n, k in zip(names, _known([p.labels for p in parts], e.data.labels.policy)[j]) if k == 0]
            if lacking and phase == len(phases) - 1:
                raise DataError(
                    "training_set", f"no {word} image of {', '.join(lacking)}",
                    "at least one positive and one negative image of every class",
                    "Raise training_set.n_per_class, fraction or ratio, see data.labels.policy, or leave it out of "
                    "data.labels.classes.",
                )  # fmt: skip
            if lacking:
                notes.append(f"training stage {phase + 1} has no {word} image of {', '.join(lacking)}")
    return notes


def check_validation(table: pa.Table, ids: list[str], policy: Mapping[str, str]) -> list[str]:
    """Raises DataError if no finding has both a positive and a negative image; notes those that have not."""
    rows = table.filter(pc.is_in(table["image_id"], value_set=pa.array(ids, pa.string())))
    names, known = label_names(table.schema), _known([rows], policy)
    lacking = [n for n, has, has_not in zip(names, *known) if not (has and has_not)]
    if len(lacking) == len(names):
        found = ", ".join(f"{n} {k}" for n, k in zip(names, known[0]) if k)
        raise DataError(
            "data.split.val", f"{len(ids)} validation images ({found or 'no positive one'})",
            "enough for one class with positive and negative images",
            "AUROC and thresholds need both. Raise data.split.val, or move images into the val split.",
        )  # fmt: skip
    if not lacking:
        return []
    return [f"validation lacks positive or negative images of {', '.join(lacking)}: no AUROC or threshold of its own"]


def _members(phase: int, part: _Part) -> pa.Table:
    n = len(part.ids)
    columns = [
        pa.array(np.full(n, phase, np.int8)), pa.repeat(pa.scalar(part.source), n), pa.array(part.ids, pa.string()),
        pa.array(part.labels_from or part.ids, pa.string()),
    ]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=members_schema())


def _distinct(members: pa.Table, source: str) -> int:
    return int(pc.count_distinct(members.filter(pc.field("source") == source)["id"]).as_py())


def _digest(members: pa.Table, validation: list[str]) -> str:
    # In the members' own order, which decides the batches.
    content = [*(column.to_pylist() for column in members.columns), validation]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
