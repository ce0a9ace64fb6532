"""The engine on real Ray processes: the same images as one process gives, whatever is killed (invariants 3 and 4)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages.cluster import Resources
from raysynth.stages.generate import render
from raysynth.stages.render import require_room
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import rows_of
from raysynth.synth.settle import read_settled
from raysynth.synth.verify import verify
from tests.engine import images, keys_of, render_all, rendered, synthetic_set, wanted_rows
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

TWO = Compute(render_workers=2, micro_batch=4, shard_rows=8)
CLUSTER = Resources(cpus=4, gpus=0, nodes=1)
WANTED = wanted_rows()
KEYS = keys_of(WANTED)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of 60 rows rendered by one process without Ray."""
    store = synthetic_set(str(tmp_path_factory.mktemp("reference")))
    render_all(store, wanted_rows(replicas=5), FakeRenderer())
    return images(store)


def of(reference: dict[str, str], keys: list[str]) -> dict[str, str]:
    return {k: reference[k] for k in keys}


def start(root: str, how: dict) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.ray.driver", root, json.dumps(how)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2]
    )


def test_a_pool_gives_the_images_of_one_process(ray_session: None, any_root: str, reference: dict) -> None:
    store = synthetic_set(any_root)
    sums = render(store, WANTED, FakeRenderer, TWO, CLUSTER)
    assert sums["ok"] == 36
    assert images(store) == of(reference, KEYS)
    verdict = verify(store, WANTED)
    assert verdict.clean
    assert verdict.extra == []
    again = render(store, WANTED, FakeRenderer, TWO, CLUSTER)
    assert again["ok"] == 0


def test_render_json_is_measured_once_then_obeyed_or_refused(
    ray_session: None, tmp_path: Path, reference: dict, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("raysynth.stages.render.PATIENCE_S", 0.0)
    store = synthetic_set(str(tmp_path))
    factory = partial(FakeRenderer, seconds_a_row=0.002, largest=16)
    render(store, WANTED, factory, Compute(render_workers=1), CLUSTER)
    assert "no node with 1 CPUs and 0 GPUs is free; `ray status` tells" in "".join(capsys.readouterr())
    settled = read_settled(store)
    assert settled is not None
    assert 1 <= settled.micro_batch <= 16
    assert settled.rows_per_s > 0
    assert images(store) == of(reference, KEYS)
    more = wanted_rows(replicas=4)
    other = partial(FakeRenderer, flavour=1)
    with pytest.raises(EnvironmentFault, match=r"flavour: 0 there, 1 here.*accept_render_change"):
        render(store, more, other, TWO, CLUSTER)
    render(store, more, FakeRenderer, Compute(render_workers=1, micro_batch=3), CLUSTER)
    assert {m["micro_batch"] for m in store.markers(store.done()).values()} == {settled.micro_batch}
    assert verify(store, more).ok == 48


def test_a_deadly_row_and_a_broken_row(ray_session: None, tmp_path: Path, reference: dict) -> None:
    """One ends its process whenever it is rendered, one is NaN: the run ends, they alone are recorded."""
    store = synthetic_set(str(tmp_path))
    renderer = partial(FakeRenderer, deadly=(KEYS[9],), broken=(KEYS[30],))
    sums = render(store, WANTED, renderer, TWO, CLUSTER)
    assert sums["failed"] == 2
    index = rows_of(store).set_index("row_key")
    assert "died twice" in index.loc[KEYS[9], "reason"]
    assert "not finite" in index.loc[KEYS[30], "reason"]
    assert images(store) == of(reference, [k for k in KEYS if k not in (KEYS[9], KEYS[30])])


def test_a_sick_actor_fails_no_row(ray_session: None, tmp_path: Path, reference: dict) -> None:
    """The first worker returns NaN within a millisecond and would take every shard; one row is really broken."""
    store = synthetic_set(str(tmp_path / "set"))
    renderer = partial(FakeRenderer, sick_file=str(tmp_path / "sick"), broken=(KEYS[3],), seconds_a_row=0.01)
    render(store, WANTED, renderer, TWO, CLUSTER)
    index = rows_of(store)
    assert index.loc[index["status"] != "ok", "row_key"].tolist() == [KEYS[3]]
    assert images(store) == of(reference, [k for k in KEYS if k != KEYS[3]])


def test_a_sick_device_among_healthy_ones(ray_session: None, tmp_path: Path, reference: dict) -> None:
    """Whatever process runs on it is sick, restarted or not; the last shard must find the healthy one."""
    store = synthetic_set(str(tmp_path / "set"))
    renderer = partial(FakeRenderer, sick_device=str(tmp_path / "device"))
    render(store, WANTED, renderer, TWO, CLUSTER)
    assert images(store) == of(reference, KEYS)
    assert rows_of(store)["status"].eq("ok").all()


def test_a_row_that_breaks_its_device(ray_session: None, tmp_path: Path, reference: dict) -> None:
    """After it the process lives, but renders nothing any more: it is found and the run ends."""
    store = synthetic_set(str(tmp_path))
    render(store, wanted_rows(replicas=1), partial(FakeRenderer, breaking=(KEYS[9],)), TWO, CLUSTER)
    index = rows_of(store)
    assert index.loc[index["status"] != "ok", "row_key"].tolist() == [KEYS[9]]


def test_a_renderer_that_cannot_start_ends_with_words(ray_session: None, tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path))
    broken = partial(FakeRenderer, sick_file=str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(EnvironmentFault, match=r"FileNotFoundError.*no/such/folder"):
        render(store, wanted_rows(n=3, replicas=1), broken, Compute(render_workers=1, micro_batch=4, shard_rows=8),
               CLUSTER)  # fmt: skip


def test_sick_everywhere_ends_with_words(ray_session: None, tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path))
    broken = partial(FakeRenderer, broken=("canary",))
    with pytest.raises(EnvironmentFault, match=r"canary .*pixels are not finite.*nothing is lost"):
        render(store, wanted_rows(n=3, replicas=1), broken, Compute(render_workers=1, micro_batch=4, shard_rows=8),
               CLUSTER)  # fmt: skip
    assert store.done() == set()


def test_storage_that_refuses_ends_with_words_and_resumes(
    ray_session: None, tmp_path: Path, reference: dict
) -> None:
    store = synthetic_set(str(tmp_path))
    blocked = Path(store.storage.url(store.file("parts")))
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    with pytest.raises(EnvironmentFault, match=r"parts.*Nothing is lost"):
        render(store, WANTED, FakeRenderer, TWO, CLUSTER)
    assert store.done() == set()
    blocked.unlink()
    render(store, WANTED, FakeRenderer, TWO, CLUSTER)
    assert images(store) == of(reference, KEYS)


def held(tmp_path: Path) -> dict:
    """Arguments of renderers that commit one shard, and stop in the middle of the next one until the gate opens."""
    return {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate"), "gate_after": 12}


def rows_by_process(log: Path) -> Counter[int]:
    return Counter(int(line.split()[1]) for line in log.read_text().splitlines()) if log.exists() else Counter()


def test_sigkill_of_an_actor(ray_session: None, tmp_path: Path, reference: dict) -> None:
    root, log = str(tmp_path / "set"), tmp_path / "log"
    import ray

    how = {"address": ray.get_runtime_context().gcs_address, "replicas": 5, "renderer": held(tmp_path)}
    driver = start(root, how)
    wait_for(lambda: 12 in rows_by_process(log).values())
    killed = next(pid for pid, rows in rows_by_process(log).items() if rows == 12)
    os.kill(killed, signal.SIGKILL)
    (tmp_path / "gate").touch()
    out, _ = driver.communicate(timeout=120)
    assert "done" in out, out
    assert rows_by_process(log)[killed] == 12
    assert images(synthetic_set(root)) == reference
    assert verify(synthetic_set(root), wanted_rows(replicas=5)).clean


def test_sigkill_of_the_driver_then_resume(ray_session: None, tmp_path: Path, reference: dict) -> None:
    root, log = str(tmp_path / "set"), tmp_path / "log"
    import ray

    how = {"address": ray.get_runtime_context().gcs_address, "replicas": 5, "renderer": held(tmp_path)}
    driver = start(root, how)
    wait_for(lambda: 12 in rows_by_process(log).values() and synthetic_set(root).done())
    driver.kill()
    driver.wait()
    before = synthetic_set(root).done()
    assert len(before) in (1, 2)
    (tmp_path / "gate").touch()
    # Actors of a dead driver end by themselves, perhaps after committing a shard late.
    log2 = tmp_path / "log2"
    renderer = partial(FakeRenderer, log=str(log2))
    render(synthetic_set(root), wanted_rows(replicas=5), renderer, TWO, CLUSTER)
    assert images(synthetic_set(root)) == reference
    verdict = verify(synthetic_set(root), wanted_rows(replicas=5))
    assert verdict.clean
    assert verdict.ok == 60
    # Only shards that were not done are rendered: at most those in flight were lost.
    assert len(rendered(log2)) <= 60 - 8 * len(before)


def test_kill_of_a_node(tmp_path: Path, reference: dict) -> None:
    root = str(tmp_path / "set")
    how = {"nodes": 2, "kill_node_after": 2, "replicas": 5, "renderer": held(tmp_path)}
    driver = start(root, how)
    out, _ = driver.communicate(timeout=200)
    assert "killed a node" in out, out
    assert "done" in out, out
    assert images(synthetic_set(root)) == reference
    assert verify(synthetic_set(root), wanted_rows(replicas=5)).clean


def test_no_deadlock_on_two_cpus_whatever_the_pool_asks_for(tmp_path: Path, reference: dict) -> None:
    root = str(tmp_path)
    driver = start(root, {"cpus": 2, "compute": {"render_workers": 8, "shard_rows": 4}})
    out, _ = driver.communicate(timeout=150)
    assert "done" in out, out
    assert images(synthetic_set(root)) == of(reference, KEYS)


@pytest.mark.parametrize("typed", [{}, {"micro_batch": 4, "shard_rows": 8}])
def test_a_renderer_that_fits_no_node_is_refused(ray_session: None, tmp_path: Path, typed: dict) -> None:
    store = synthetic_set(str(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"cpus_per_renderer.*got 99 CPU for one renderer.*a node has \(4 CPU\)"):
        render(store, WANTED, FakeRenderer, Compute(cpus_per_renderer=99, **typed), CLUSTER)
    require_room(Compute(cpus_per_renderer=99, max_render_workers=2), CLUSTER)  # a larger node may come
