"""Whatever dies or refuses, the same command goes on: random kills, a full disk, lost weights, a second driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.core.lease import holder_of
from raysynth.stages.cluster import Resources
from raysynth.stages.generate import make_renderer, render
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.renderer import Renderer
from raysynth.synth.verify import verify
from tests.engine import images, keys_of, render_all, rendered, synthetic_set, wanted_rows
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
ONE = Compute(render_workers=1, micro_batch=4, shard_rows=8)
CLUSTER = Resources(cpus=4, gpus=0, nodes=1)
WANTED = wanted_rows(replicas=5)


def output(*words: str, before: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*before, sys.executable, "-m", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def test_six_random_kills_cost_no_row() -> None:
    """One of each kind; a hundred are in jobs/bench/results."""
    out = output("tests.ray.chaos", "--kills", "6", "--seed", "3")
    found = {line[:32].strip(): line[32:].strip() for line in out.splitlines()}
    assert found["violations"] == "0", out
    assert int(found["kills"]) >= 6


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mount namespaces need root")
def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=200k none "$0" && exec "$@"'
    out = output("tests.ray.small_disk", str(tmp_path), before=("unshare", "--mount", "sh", "-c", shell, str(tmp_path)))
    found = {r["what"]: r for r in map(json.loads, filter(lambda line: line.startswith("{"), out.splitlines()))}
    assert len(found) == 6, out
    for what, words in {
        "full": "No space left on device", "read-only": "Read-only file system",
        "read-only meanwhile": "Read-only file system",
    }.items():  # fmt: skip
        assert found[what]["code"] == 4, found[what]
        assert words in found[what]["words"], found[what]
        assert ("free space" if what == "full" else "mount it writable") in found[what]["words"]
    for what in ("room again", "writable again", "writable at last"):
        assert found[what]["code"] == 0, found[what]
        assert found[what]["whole"], found[what]
    assert all(r["right"] and r["corrupt"] == 0 for r in found.values())
    assert 0 < found["full"]["rows"] < 36
    assert 48 < found["read-only meanwhile"]["rows"] < 72


def test_lost_weights_end_with_words_and_come_back(ray_session: None, tmp_path: Path) -> None:
    e = build_experiment({"name": "t", "data": {"kind": "digits"}})
    store = synthetic_set(str(tmp_path))
    lost = partial(make_renderer, store.storage, "train-generator/t-0", "1", e, False, 1)
    with pytest.raises(EnvironmentFault, match=r"train-generator/t-0/export.*restore it, or run the stage.*nothing is"):
        render(store, WANTED, lost, ONE, CLUSTER)
    assert store.done() == set()
    render(store, WANTED, FakeRenderer, ONE, CLUSTER)
    assert verify(store, WANTED).ok == 60


def test_an_actor_that_dies_while_it_starts_ends_with_words(ray_session: None, tmp_path: Path) -> None:
    def dies() -> Renderer:
        os._exit(1)

    store = synthetic_set(str(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"ended 3 times while it loaded the renderer.*nothing is lost"):
        render(store, WANTED, dies, ONE, CLUSTER)
    render(store, WANTED, FakeRenderer, ONE, CLUSTER)
    assert verify(store, WANTED).clean


@pytest.mark.parametrize(
    ("how", "words"), [("wait", "waiting until it has finished"), ("join", "joining from the other end")]
)
def test_two_drivers_at_once(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture, how: str, words: str
) -> None:
    reference = synthetic_set(str(tmp_path / "reference"))
    render_all(reference, WANTED, FakeRenderer())
    root, logs, gate = str(tmp_path / "set"), [tmp_path / "first", tmp_path / "second"], tmp_path / "gate"
    store, out = synthetic_set(root), ""

    def heard() -> bool:
        nonlocal out
        out += capsys.readouterr().out
        return words in out

    # The first commits one shard and stops in the middle of the next, until the second one is where it should be.
    held = partial(FakeRenderer, log=str(logs[0]), gate=str(gate), gate_after=12)
    free = partial(FakeRenderer, log=str(logs[1]))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(render, synthetic_set(root), WANTED, held, ONE, CLUSTER)
        wait_for(lambda: len(store.done()) == 1 or first.done())
        assert holder_of(store.storage, store.file("lock.json"))
        second = pool.submit(render, store, WANTED, free, replace(ONE, other_driver=how), CLUSTER)
        wait_for(lambda: heard() or second.done())
        wait_for(lambda: how == "wait" or len(store.done()) > 1 or second.done())
        gate.touch()
        sums = second.result(120)
        first.result(120)
    assert words in out
    mine, theirs = rendered(logs[1]), rendered(logs[0])
    if how == "wait":
        assert sums["ok"] == 0
        assert mine == set()
    else:
        # They met somewhere: at most the shards that one of them had in work when the other took them.
        assert 0 < sums["ok"] < 60
        assert len(mine & theirs) <= 24
    assert mine | theirs == set(keys_of(WANTED))
    assert images(store) == images(reference)
    verdict = verify(store, WANTED)
    assert verdict.clean
    assert holder_of(store.storage, store.file("lock.json")) is None
