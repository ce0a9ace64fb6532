"""Training views of synthetic images on real Ray: what they hold, and that no damaged part enters one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import Damaged
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import open_storage
from raysynth.data.images import decode_png
from raysynth.stages import generate
from raysynth.stages.cluster import Resources
from raysynth.stages.generated import load_index, read_images
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.views import build_synthetic_view, open_view
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.digits import digit_artifact
from tests.engine import render_all

pytestmark = pytest.mark.ray


@pytest.fixture
def rendered(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """20 real digits and 60 images of them, rendered in this process in shards of 8 rows."""

    def render(store: SyntheticSet, wanted: Wanted, *_: Any) -> dict[str, float]:
        render_all(store, wanted, FakeRenderer())
        return {}

    monkeypatch.setattr(generate, "render", render)
    monkeypatch.setattr(Pipeline, "resources", Resources(cpus=1, gpus=0, nodes=1))
    e = build_experiment({
        "name": "digits", "root": str(tmp_path), "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 2}, "plan": {"replicas": 3},
    })  # fmt: skip
    found = Pipeline(e)
    found.images = digit_artifact(open_storage(e.root))
    found.generator.put("export/condition.json", b"{}")
    found.generator.commit({})
    for stage in ("plan", "generate"):
        found.do(stage)
    return found


def test_a_view_holds_the_images_that_are_listed(rendered: Pipeline, tmp_path: Path) -> None:
    p = rendered
    view = open_view(build_synthetic_view(p.experiment, p.storage, p.generated, 8), str(tmp_path / "cache"))
    stored = [row for table in read_images(p.generated, load_index(p.generated)) for row in table.to_pylist()]
    pixels = view.images(view.positions([row["row_key"] for row in stored]))
    for row, image in zip(stored, pixels, strict=True):
        np.testing.assert_array_equal(np.squeeze(image), np.squeeze(decode_png(row["image"]["bytes"])))
    index = {row["image_id"]: row for row in view.index.to_pylist()}
    assert len(index) == 60
    names = ["source_image_id", "split", *(n for n in stored[0] if n.startswith(("label_", "attr_")))]
    assert len(names) > 2
    for row in stored:
        assert [index[row["row_key"]][n] for n in names] == [row[n] for n in names]


@pytest.mark.parametrize("damage", ["rot", "other rows", "gone"])
def test_a_damaged_part_enters_no_view(rendered: Pipeline, damage: str) -> None:
    p, store = rendered, rendered.synthetic_set
    marker = store.marker(2)
    assert marker
    part = store.file(marker["part"])
    table = from_parquet(p.storage.get(part))
    if damage == "gone":
        p.storage.delete(part)
    else:
        swapped = table.set_column(table.column_names.index("source_image_id"), "source_image_id",
                                   table["source_image_id"].take(list(range(table.num_rows))[::-1]))  # fmt: skip
        p.storage.put(part, b"rot" if damage == "rot" else to_parquet(swapped))
    with pytest.raises(Damaged, match=rf"^{part} is not what was committed. .*--repair`, then `raysynth run`"):
        build_synthetic_view(p.experiment, p.storage, p.generated, 8)
    assert not [f for f in p.storage.folders("view") if p.storage.exists(f"view/{f}/_SUCCESS")]
