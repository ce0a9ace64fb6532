"""Which real images the classifier and the generator may see: patient-safe, nested, seeded.

Input: the ingest artifact's table (image_id, split, patient_id, label_*); output: image ids of the train
split. Does not know pixels, plans or models.

Patients are put in one seeded order and their images follow one another in it, so that a subset is made of
whole patients. An exact count a class comes before that: the last patient of a class may be cut, and a
patient with images of several classes may be in for one of them. The images that such a patient has left are
used by nobody: they are not in the subset, and `donor` leaves out every patient of the subset.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment, TrainingSet
from raysynth.core.schemas import label_names
from raysynth.data.strata import primary_label, seeded_hash, used_labels


def train_split(table: pa.Table) -> pa.Table:
    """Rows of the train split.

    Raises:
        DataError: a patient is in two splits, or there is no row to train on.
    """
    spread = _with_patients(table).group_by("patient_id").aggregate([("split", "count_distinct")])
    leaked = spread.filter(pc.field("split_count_distinct") > 1)["patient_id"].to_pylist()
    if leaked:
        raise DataError(
            "data.split", f"{len(leaked)} patients in two splits, such as {min(leaked)}",
            "patients in one split", "Run ingest again with data.split.patients set.",
        )  # fmt: skip
    train = _with_patients(table).filter(pc.field("split") == "train")
    if not train.num_rows:
        raise DataError("data.split", "no train image", "at least one train image", "Lower val and test.")
    return train


def _with_patients(table: pa.Table) -> pa.Table:
    """An image without a patient is its own patient."""
    at = table.schema.get_field_index("patient_id")
    return table.set_column(at, "patient_id", pc.coalesce(table["patient_id"], table["image_id"]))


def real_subset(
    table: pa.Table, training_set: TrainingSet, policy: Mapping[str, str] | None = None
) -> list[str]:
    """Image ids of the classifier's real images, sorted.

    `n_per_class`: the first n images of every class in the seeded patient order; for findings the first n
    positives of every finding and, as far as there are, n images known to have none (a common finding then has
    more than n, beside the rarer ones). `fraction`: that share of every class (multi-label: of every rarest
    finding), at least one image. Neither: the whole train split. A larger n or fraction contains the smaller
    one of the same seed.

    Args:
        policy: `data.labels.policy`: what an uncertain or missing annotation counts as.

    Raises:
        DataError: a class has fewer than n train images; a patient is in two splits.
    """
    train = train_split(table)
    ids = train["image_id"].to_pylist()
    if training_set.n_per_class is None and training_set.fraction is None:
        return sorted(ids)
    order = patient_order(train, training_set.seed)
    chosen = np.zeros(len(ids), dtype=bool)
    if training_set.n_per_class is not None:
        n = training_set.n_per_class
        labels = used_labels(train, policy)
        names = label_names(train.schema)
        have = (labels == 1).sum(axis=0)
        if len(names) and have.min() < n:
            few = ", ".join(f"{names[i]} {have[i]}" for i in np.argsort(have, kind="stable") if have[i] < n)
            raise DataError(
                "training_set.n_per_class", n,
                f"at most {have.min()}, the train images of {names[have.argmin()]}",
                f"Too few: {few}. Lower it, use training_set.fraction, or drop the class from data.labels.",
            )  # fmt: skip
        ordered = labels[order]
        for member in [*(ordered == 1).T, (ordered == 0).all(axis=1)]:
            chosen[order[np.flatnonzero(member)[:n]]] = True
    else:
        strata, names = primary_label(train, policy)
        for s in range(len(names)):
            members = order[strata[order] == s]
            if len(members):
                chosen[members[: max(1, round((training_set.fraction or 1) * len(members)))]] = True
    return sorted(ids[i] for i in np.flatnonzero(chosen))


def patient_order(rows: pa.Table, seed: int) -> np.ndarray:
    """Positions (N,) in seeded order of patients, each patient's images together."""
    patients, images = _with_patients(rows)["patient_id"].to_pylist(), rows["image_id"].to_pylist()
    by_patient = seeded_hash("subset patient", seed, patients)
    by_image = seeded_hash("subset image", seed, images)
    return np.lexsort((np.asarray(images, np.str_), by_image, np.asarray(patients, np.str_), by_patient))


def generator_rows(table: pa.Table, experiment: Experiment) -> list[str]:
    """Image ids that the generator trains on, sorted; never a val or test image, nor one of their patients.

    `classifier_subset`: the classifier's real subset; `train`: the whole train split; `donor`: the train
    split without any patient of the subset, nor one who has a picture identical to one of theirs.

    Raises:
        DataError: nothing is left for `donor`; a patient is in two splits; a class has too few images.
    """
    train = train_split(table)
    if experiment.generator.train_on == "train":
        return sorted(train["image_id"].to_pylist())
    subset = real_subset(table, experiment.training_set, experiment.data.labels.policy)
    if experiment.generator.train_on == "classifier_subset":
        return subset
    inside = pc.is_in(train["image_id"], value_set=pa.array(subset, pa.string()))
    seen = train.filter(inside)["patient_id"].unique()
    if "pixel_sha256" in train.column_names:
        # One person may have two ids.
        shown = train.filter(pc.is_in(train["patient_id"], value_set=seen))["pixel_sha256"].unique().drop_null()
        same = pc.is_in(train["pixel_sha256"], value_set=shown)
        seen = train.filter(pc.or_(same, pc.is_in(train["patient_id"], value_set=seen)))["patient_id"].unique()
    donors = train.filter(pc.invert(pc.is_in(train["patient_id"], value_set=seen)))["image_id"].to_pylist()
    if not donors:
        raise DataError(
            "generator.train_on", "donor",
            "train or classifier_subset where the subset has every train patient",
            "Set training_set.n_per_class or training_set.fraction to leave patients for the generator.",
        )  # fmt: skip
    return sorted(donors)
