"""A generator trained before or elsewhere: found, copied, checked; what it saw. No Ray, no training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import ConfigError, DataError, EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.stages.adoption import SEEN, adopt, check_given, given_artifact, seen_by, seen_by_generator, seen_table
from raysynth.stages.generate import generator_id
from raysynth.stages.pipeline import Pipeline
from tests.digits import digit_artifact
from tests.generators import exported


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported generator of digits that says it saw 8 images, not which."""
    folder = tmp_path_factory.mktemp("export") / "generator"
    exported(folder)
    return folder


def experiment(root: str, path: str, **sections: Any) -> Experiment:
    content: dict[str, Any] = {
        "name": "d", "root": root, "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "generator": {"path": path}, "sampling": {"steps": 3},
    }  # fmt: skip
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    return build_experiment(content)


def trained(storage: Storage, export: Path, seen: pa.Table | None = None) -> Artifact:
    """A train-generator artifact around the export."""
    artifact = Artifact.at(storage, "train-generator", "digits", 1, {"steps": 3}, {"images": "x"})
    for file in sorted(p for p in export.rglob("*") if p.is_file()):
        artifact.put(f"export/{file.relative_to(export).as_posix()}", file.read_bytes())
    if seen is not None:
        artifact.put(SEEN, to_parquet(seen_table(seen)))
    artifact.commit({"n_real_generator": 8, "steps": 3})
    return artifact


def table_of(images: Artifact) -> pa.Table:
    return from_parquet(images.storage.get(images.file("table.parquet")))


def test_an_exported_folder_is_copied_once_and_is_what_it_was(any_root: str, export: Path, tmp_path: Path) -> None:
    storage, elsewhere = open_storage(any_root), open_storage(str(tmp_path / "elsewhere"))
    original = trained(elsewhere, export)
    for path in (str(export), elsewhere.url(original.path), elsewhere.url(f"{original.path}/export")):
        e = experiment(any_root, path)
        with pytest.raises(EnvironmentFault, match="raysynth train-generator"):
            check_given(e, storage, digit_artifact(storage), given_artifact(e, storage))
        found = adopt(e, storage)
        assert found.complete
        assert found.path == given_artifact(e, storage).path
        # The synthetic set is named by this: wherever a generator lies, its images are the same set.
        assert generator_id(found) == generator_id(original)
        before = storage.list(found.path)
        adopt(e, storage)
        assert storage.list(found.path) == before
        for entry in before:
            storage.delete(entry.path)


def test_an_artifact_of_this_root_is_used_where_it_lies(any_root: str, export: Path) -> None:
    storage = open_storage(any_root)
    original = trained(storage, export)
    for path in (original.path, storage.url(original.path), storage.url(f"{original.path}/export/")):
        found = adopt(experiment(any_root, path), storage)
        assert found.path == original.path
    assert storage.folders("train-generator") == [original.path.partition("/")[2]]


def test_what_is_no_generator_is_refused(tmp_path: Path, export: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(export, broken)
    (broken / "condition.json").unlink()
    for path in (str(tmp_path / "none"), str(broken)):
        with pytest.raises(DataError, match=r"generator.path: .*must be a train-generator artifact.*condition.json"):
            given_artifact(experiment(str(tmp_path), path), open_storage(str(tmp_path)))


WRONG = [
    ({"data": {"image": {"size": 16, "channels": "grey"}}}, "generator.size: got 16, must be 8"),
    ({"data": {"image": {"size": 8, "channels": "rgb"}}}, "data.image.channels: got 'rgb', must be grey"),
    ({"sampling": {"steps": 2000}}, "sampling.steps: got 2000, must be 1 to 1000"),
    ({"generator": {"conditions": ["label", "sex"]}}, r"generator.conditions: .*must be \['label'\]"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_it_cannot_render_is_refused_before_rendering(
    tmp_path: Path, export: Path, change: dict[str, Any], message: str
) -> None:
    storage = open_storage(str(tmp_path))
    original = trained(storage, export)
    sections = {"data": {"columns": {"attributes": {"sex": "sex"}}} | change.pop("data", {}), **change}
    sections["generator"] = {"path": original.path} | sections.get("generator", {})
    e = experiment(str(tmp_path), original.path, **sections)
    with pytest.raises(ConfigError, match=message):
        check_given(e, storage, digit_artifact(storage), original)


def test_a_class_it_never_learned_is_refused(tmp_path: Path, export: Path) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(export, narrow)
    spec = json.loads((narrow / "condition.json").read_text())
    spec["classes"].remove("9")
    (narrow / "condition.json").write_text(json.dumps(spec))
    storage = open_storage(str(tmp_path / "runs"))
    original = trained(storage, narrow)
    with pytest.raises(DataError, match=r"generator.path: got '9', must be a generator that knows every class"):
        check_given(experiment(storage.root, original.path), storage, digit_artifact(storage), original)


def test_a_generator_that_saw_a_held_out_image_is_refused(tmp_path: Path, export: Path) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage)
    table = table_of(images)
    for column, value in (("image_id", "digit-0003"), ("patient_id", "p3")):
        row = table.slice(0, 1)
        row = row.set_column(row.schema.get_field_index(column), column, pa.array([value]))
        original = trained(open_storage(str(tmp_path / column)), export, row)
        e = experiment(str(tmp_path), original.storage.url(original.path))
        with pytest.raises(DataError, match=r"generator.path: .*1 images .*such as digit-0003.*data.split.keep"):
            check_given(e, storage, images, adopt(e, storage))


def test_what_it_saw_is_told_by_id_counted_or_unknown(
    tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage)
    table = table_of(images)
    anonymous = trained(storage, export)
    e = experiment(str(tmp_path), anonymous.path)
    seen = seen_by_generator(e, storage, table)
    assert (seen.count, seen.ids, seen.train_on) == (8, None, "train")
    check_given(e, storage, images, anonymous)
    assert "which real images" in capsys.readouterr().out
    known = trained(open_storage(str(tmp_path / "known")), export, table.slice(0, 3))
    assert seen_by(known, table).ids == {"digit-0000", "digit-0001", "digit-0002"}
    # An image of the same name in another data set is another image.
    at = table.schema.get_field_index("dataset")
    other = table.set_column(at, "dataset", pa.array(["elsewhere"] * table.num_rows))
    assert seen_by(known, other).ids == set()


def test_the_pipeline_trains_nothing(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline(experiment(str(tmp_path), str(export)))
    pipeline.images = digit_artifact(pipeline.storage)
    found = pipeline.do("train-generator")
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing to train" in said
    assert "it was trained on 8 real images (train)" in said
    pipeline.generator = given_artifact(pipeline.experiment, pipeline.storage)
    assert pipeline.generator.complete
    assert pipeline.synthetic_set.identity["generator_id"] == generator_id(found)
