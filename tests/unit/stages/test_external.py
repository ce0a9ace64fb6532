"""A set rendered elsewhere: its listing judged, its images through the engine, in one process without Ray."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysynth.core.errors import ConfigError, DataError, EnvironmentFault, GateFailed
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, synthetic_schema
from raysynth.core.storage import Storage, open_storage
from raysynth.data.images import decode_png, encode_png
from raysynth.stages import external
from raysynth.stages.external import by_location, external_plan, import_artifact, listing_data, take_listing
from raysynth.stages.generate import synthetic_set
from raysynth.stages.overview import show_dry_run
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import load_plan, plan, wanted_rows
from raysynth.synth.importing import ImportRenderer
from raysynth.synth.ledger import rows_of
from raysynth.synth.verify import verify
from tests.digits import CLASSES, digit_artifact
from tests.engine import render_all
from tests.rendered_elsewhere import (
    COLUMNS,
    IMAGES,
    N,
    as_csv,
    as_parquet,
    experiment,
    listing,
    rows_by_key,
    taken,
    to_csv,
)


@pytest.mark.parametrize("make", [as_csv, as_parquet])
def test_an_imported_set_is_a_synthetic_set(any_root: str, make: Any) -> None:
    e = experiment(any_root, make(any_root))
    listed, store, wanted, _ = taken(e)
    assert listed.run_info()["counts"]["images"] == len(wanted) == N
    assert verify(store, wanted).clean
    rows = rows_by_key(store)
    assert {r["status"] for r in rows.values()} == {"ok"}
    by_prompt = {(r["prompt"], r["seed"]): r for r in rows.values()}
    for i, given in enumerate(listing()):
        row = by_prompt[given["text"], given["noise"]]
        assert (row["attr_sex"], row["source_image_id"]) == (given["sex"], given["made_from"])
        assert [row[f"label_{c}"] for c in CLASSES] == [int(c == given["digit"]) for c in CLASSES]
        assert (row["mode"], row["split"], row["guidance_scale"]) == ("external", "train", 1.5)
        assert (row["sampler"], row["steps"], row["derived_from_real"]) == (None, None, None)
        pixels = decode_png(row["image"]["bytes"])
        if make is as_parquet:
            assert (pixels == IMAGES[200 + i]).all()
        assert pixels.shape == (8, 8, 1)
    part = from_parquet(store.part(rows_of(store)["part"][0]))
    assert part.schema.names == synthetic_schema(CLASSES, ["sex"]).names


def test_a_prefix_of_the_ranks_keeps_the_classes(tmp_path: Path) -> None:
    e = experiment(str(tmp_path), as_csv(str(tmp_path)), plan={"n_synth": 20})
    storage = open_storage(e.root)
    images = digit_artifact(storage)
    take_listing(e, storage, images)
    rows = load_plan(storage, plan(e, storage, images)).to_pylist()
    whole = np.array([[r[f"label_{c}"] for c in CLASSES] for r in rows]).sum(axis=0)
    half = np.array([[r[f"label_{c}"] for c in CLASSES] for r in rows[:20]]).sum(axis=0)
    assert np.abs(half - whole / 2).max() <= 1
    assert len(wanted_rows(e, storage, plan(e, storage, images))) == 20


def test_bad_files_are_failed_rows_with_a_reason(tmp_path: Path) -> None:
    path = as_csv(str(tmp_path))
    storage = open_storage(str(tmp_path))
    storage.put("pics/03.png", b"no image")
    storage.put("pics/11.png", encode_png(np.zeros((8, 8, 1), np.uint8)))
    storage.put("pics/20.png", storage.get("pics/20.png")[:60])
    _, store, wanted, _ = taken(experiment(str(tmp_path), path))
    failed = rows_of(store).query("status == 'failed'")
    assert sorted(r.split(":")[1].strip() for r in failed["reason"]) == ["blank", "truncated", "undecodable"]
    verdict = verify(store, wanted)
    assert (verdict.ok, verdict.failed, verdict.clean) == (N - 3, 3, True)


def test_rows_that_name_no_image_or_class_are_left_out_and_listed(tmp_path: Path) -> None:
    path = as_csv(str(tmp_path))
    rows = listing()
    rows[0]["digit"], rows[1]["file"], rows[2]["noise"] = "eleven", "pics/gone.png", "many"
    open_storage(str(tmp_path)).put("made.csv", to_csv(rows))
    with pytest.raises(GateFailed, match=r"7.5% of 40 rows"):
        taken(experiment(str(tmp_path), path))
    e = experiment(str(tmp_path), path, data={"max_quarantined_fraction": 0.1})
    storage = open_storage(e.root)
    assert external_plan(e, storage, digit_artifact(storage)).num_rows == N - 3  # known before it is taken
    listed, _, wanted, _ = taken(e)
    assert len(wanted) == N - 3
    left_out = from_parquet(listed.storage.get(listed.file("quarantine.parquet"))).to_pylist()
    reasons = {r["image_id"]: r["reason"] for r in left_out}
    assert reasons["pics/00.png"] == "label 'eleven' is not in data.labels.classes"
    assert reasons["pics/gone.png"] == "row without file"
    assert reasons["pics/02.png"] == "seed 'many' is no number"


def test_a_file_that_no_row_names_is_listed_and_makes_no_other_listing(tmp_path: Path) -> None:
    e = experiment(str(tmp_path), as_csv(str(tmp_path)))
    found = []
    for name in ("before", "after"):
        storage = open_storage(str(tmp_path / name))
        listed = take_listing(e, storage, digit_artifact(storage))
        found.append((listed.path, listed.digest()))
        open_storage(str(tmp_path)).put("pics/more/stray.png", b"no row names this")
        external._list_once.cache_clear()
    assert listed.run_info()["counts"]["quarantined"] == {"file without row": 1}
    assert found[0] == found[1]


def test_seeds_and_guidance_that_cannot_be_stored_are_left_out_and_listed(tmp_path: Path) -> None:
    rows = listing()
    fine = ["12.0", str(2**63 - 1), str(-(2**63)), "2.5e3", ""]
    bad = [str(2**63), "1.5", "inf", "1e999999999", "-170141183460469231731687303715884105729"]
    for row, seed in zip(rows, fine + bad):
        row["noise"] = seed
    for row, cfg in zip(rows[20:], ["7", "", "1e38", "inf", "-inf", "+nan", "1e39", "w"]):
        row["cfg"] = cfg
    e = experiment(str(tmp_path), as_csv(str(tmp_path), rows), data={"max_quarantined_fraction": 0.5})
    listed, store, wanted, _ = taken(e)
    taken_rows = from_parquet(listed.storage.get(listed.file("rows.parquet"))).to_pylist()
    at = {r["location"]: (r["seed"], r["guidance_scale"]) for r in taken_rows}
    assert [at[f"pics/{i:02d}.png"][0] for i in range(5)] == [12, 2**63 - 1, -(2**63), 2500, None]
    assert [at[f"pics/{i}.png"][1] for i in (20, 21)] == [7, None]
    assert at["pics/22.png"][1] == pytest.approx(1e38)
    left_out = from_parquet(listed.storage.get(listed.file("quarantine.parquet"))).to_pylist()
    assert [r["reason"] for r in left_out] == [
        f"seed '{2**63}' is too large", "seed '1.5' is no whole number", "seed 'inf' is no number",
        "seed '1e999999999' is too large", f"seed '{-(2**127) - 1}' is too large",
        "guidance 'inf' is no number", "guidance '-inf' is no number", "guidance '+nan' is no number",
        "guidance '1e39' is too large", "guidance 'w' is no number",
    ]  # fmt: skip
    assert (len(wanted), verify(store, wanted).clean) == (N - 10, True)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("made_from", "digit-0003", "source 'digit-0003' is a test image"),
        ("made_from", "digit-9999", "source 'digit-9999' is no image of the real data"),
        ("who", "p7", "patient 'p7' is a test patient"),
    ],
)
def test_rows_made_from_held_out_images_are_refused_or_left_out(
    tmp_path: Path, column: str, value: str, why: str
) -> None:
    rows = [r | {"who": "somebody else"} for r in listing()]
    rows[5][column] = value
    path = as_csv(str(tmp_path), rows)
    columns = COLUMNS | {"patient": "who"}
    with pytest.raises(DataError, match=f"generator.path: .*{why}.*on_held_out: quarantine"):
        taken(experiment(str(tmp_path), path, columns))
    e = experiment(str(tmp_path), path, columns, generator={"on_held_out": "quarantine"})
    listed, store, wanted, _ = taken(e)
    assert len(wanted) == N - 1
    assert verify(store, wanted).clean
    assert listed.run_info()["counts"]["quarantined"] == {why.replace(repr(value), "..."): 1}


def changed(e: Experiment, storage: Storage) -> tuple[str, str]:
    external._list_once.cache_clear()  # as in another process
    images = digit_artifact(storage)
    return import_artifact(e, storage, images)[0].fp, synthetic_set(e, storage, take_listing(e, storage, images)).fp


def test_the_set_is_named_by_files_listing_and_size_only(tmp_path: Path) -> None:
    e = experiment(str(tmp_path), as_csv(str(tmp_path)))
    storage = open_storage(e.root)
    first = changed(e, storage)
    for same in (
        {"plan": {"seed": 3}}, {"sampling": {"steps": 7}}, {"training_set": {"n_per_class": 3}},
        {"compute": {"micro_batch": 3}},
    ):  # fmt: skip
        assert changed(experiment(str(tmp_path), e.generator.path, **same), storage) == first, same
    larger = experiment(str(tmp_path), e.generator.path)
    larger = dataclasses.replace(
        larger, data=dataclasses.replace(larger.data, image=dataclasses.replace(larger.data.image, size=16))
    )
    assert changed(larger, storage)[1] != first[1]
    # Real data that grew are judged again, and the images stay what they are.
    more = take_listing(e, storage, digit_artifact(storage, n=160))
    assert (more.fp != first[0], synthetic_set(e, storage, more).fp == first[1]) == (True, True)
    open_storage(str(tmp_path)).put("pics/00.png", encode_png(IMAGES[0]))
    assert changed(e, storage)[1] != first[1]


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = experiment(str(tmp_path / "a"), as_csv(str(tmp_path)))
    half = experiment(str(tmp_path / "b"), whole.generator.path)
    _, store, wanted, _ = taken(whole)
    storage = open_storage(half.root)
    images = digit_artifact(storage)
    other = synthetic_set(half, storage, take_listing(half, storage, images))
    rows = by_location(wanted_rows(half, storage, plan(half, storage, images)))
    reader = ImportRenderer(listing_data(half, CLASSES))
    assert len(render_all(other, rows, reader, 4, 8, rounds=0)) == 0  # the wave is frozen, nothing is read
    stats = render_all(other, rows, reader, 4, 8)
    assert sum(s["ok"] for s in stats) == N
    assert {k: r["sha256"] for k, r in rows_by_key(other).items()} == {
        k: r["sha256"] for k, r in rows_by_key(store).items()
    }
    assert verify(other, wanted).clean


BAD = [
    ({"generator": {"path": ""}}, "generator.path: got '', must be set"),
    ({"generator": {"columns": {"file": "file"}}}, "generator.columns: .*either `label` or `findings`"),
    ({"generator": {"columns": COLUMNS | {"attributes": {"age": "a"}}}}, "generator.columns.attributes.age: "),
    ({"plan": {"kind": "balanced", "n": 5}}, "plan.kind: got 'balanced'"),
    ({"training_set": {"strategy": "upper_bound"}}, "training_set.strategy: got 'upper_bound'"),
    ({"training_set": {"strategy": "duplicate"}}, "training_set.strategy: .*ratio or n_synth"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_asked_of_an_import(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment("/nowhere", "x.csv", **change)


def test_wrong_columns_are_named_by_their_own_keys(tmp_path: Path) -> None:
    path = as_csv(str(tmp_path))
    for columns, key in ((COLUMNS | {"label": "digt"}, "label"), (COLUMNS | {"source": "made"}, "source")):
        e = experiment(str(tmp_path), path, columns)
        with pytest.raises(DataError, match=rf"generator.columns.{key}: .*Did you mean (digit|made_from)"):
            taken(e)
    with pytest.raises(DataError, match=r"generator.path: .*must be a CSV file that exists"):
        taken(experiment(str(tmp_path), f"{tmp_path}/none.csv"))


def test_the_pipeline_knows_it(tmp_path: Path) -> None:
    e = experiment(str(tmp_path), as_csv(str(tmp_path)))
    pipeline = Pipeline(e)
    pipeline.images = digit_artifact(pipeline.storage)
    assert not pipeline.generator.complete
    pipeline.do("train-generator")
    pipeline.do("plan")
    assert pipeline.synthetic_set.identity["sampler"] is None
    assert json.dumps(pipeline.generated.identity["config"]["set"])
    assert Image.open(io.BytesIO(open_storage(str(tmp_path)).get("pics/00.png"))).size == (16, 16)


def test_a_dry_run_knows_the_rows_before_they_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"arms": {"real": {"training_set.strategy": "real"}, "mix": {"training_set.n_synth": 25}}}
    e = experiment(str(tmp_path), as_csv(str(tmp_path)), classifier={}, sweep=arms)
    pipeline = Pipeline(e)
    pipeline.images = digit_artifact(pipeline.storage, val=True)
    show_dry_run(pipeline)
    assert "generate: 25 of 25 rows to render" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(EnvironmentFault, match=r"is not complete. Run `raysynth train-generator`"):
        pipeline.do("plan")


def test_row_groups_are_read_in_order(tmp_path: Path) -> None:
    e = experiment(str(tmp_path), as_parquet(str(tmp_path)))
    storage = open_storage(e.root)
    images = digit_artifact(storage)
    take_listing(e, storage, images)
    rows = by_location(wanted_rows(e, storage, plan(e, storage, images)))
    assert [r["location"] for t in rows.read() for r in t.to_pylist()] == [f"made.parquet#{i}" for i in range(N)]
