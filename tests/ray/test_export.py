"""Groups of an export written by Ray tasks: the files of one process, and errors with their own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.stages.cluster import Resources
from raysynth.stages.export import export, write_group, write_side_by_side
from tests.exported import Made, cut_small, tree

pytestmark = pytest.mark.ray
CLUSTER = Resources(cpus=4, gpus=0, nodes=1)


def test_tasks_write_what_one_process_writes(ray_session: None, tmp_path: Path) -> None:
    made = Made(str(tmp_path / "runs"))
    alone, _ = made.begin("webdataset", str(tmp_path / "alone"))
    together, _ = made.begin("webdataset", str(tmp_path / "together"))
    groups = cut_small(made, alone)
    books = {g.number: write_group(alone, g) for g in groups}
    assert {b["group"]: b for b in write_side_by_side(together, groups, CLUSTER)} == books
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")

    asked = []
    out = str(tmp_path / "whole")
    for _ in range(2):
        export(made.generated, made.images, "webdataset", out, lambda: asked.append(1) or CLUSTER)
    assert asked == [1]  # the second run had nothing to write
    assert (tmp_path / "whole/README.md").exists()

    made.storage.put(made.store.file(groups[0].parts[0][0]), b"flipped")
    with pytest.raises(EnvironmentFault, match=r"is not what was committed. `raysynth verify --repair`"):
        export(made.generated, made.images, "folders", str(tmp_path / "folders"), lambda: CLUSTER)
