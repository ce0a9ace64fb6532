"""Exit codes and words of the command line; no traceback for what a user can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysynth.cli import environment_fault
from raysynth.stages.noise import without_ray_noise

QUICKSTART = str(Path(__file__).parents[2] / "raysynth" / "quickstart.yaml")


def raysynth(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "raysynth", *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=120
    )


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["run", QUICKSTART, "sampling.step=5"], 2, "sampling.step: got 5.*Did you mean sampling.steps?"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["run", QUICKSTART, "sampling.guidance_scale=0"], 2, "w = 0 in Ho & Salimans are 1 here"),
        (["generate", QUICKSTART, "root=ROOT"], 2, "is not complete. Run `raysynth ingest`"),
        (["export", QUICKSTART, "--to", "tars", "--out", "x"], 2, "--to: got 'tars', must be one of huggingface"),
        (["export", QUICKSTART, "root=ROOT", "--out", "x"], 2, "is not complete. Run `raysynth ingest`"),
        (["run", QUICKSTART, "root=/dev/null/runs", "compute.address=local"], 4, "/dev/null/runs"),
        (["run", QUICKSTART, "compute.address=127.0.0.1:9", "root=ROOT"], 4, "no Ray cluster answers"),
    ],
)
def test_errors_have_words_and_codes(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    import re

    done = raysynth(*[w.replace("ROOT", str(tmp_path)) for w in words], cwd=tmp_path)
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == code, output
    assert "Traceback" not in output
    assert re.search(text, output), output


def test_help_answers_at_once() -> None:
    took = []
    for _ in range(3):
        start = time.monotonic()
        done = raysynth("--help")
        took.append(time.monotonic() - start)
        assert done.returncode == 0
        assert "quickstart" in done.stdout
    assert min(took) < 5, took  # a second, on a machine at rest


def test_dry_run_and_status_before_anything_exists(tmp_path: Path) -> None:
    for verb in (["run", "--dry-run"], ["status"]):
        done = raysynth(verb[0], QUICKSTART, f"root={tmp_path}", *verb[1:])
        assert done.returncode == 0, done.stderr
        assert "missing" in done.stdout
        assert "named when the stages before it are done" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_ls_and_gc_of_an_empty_root(tmp_path: Path) -> None:
    assert raysynth("ls", str(tmp_path)).returncode == 0
    assert "0 orphan files" in raysynth("gc", str(tmp_path)).stdout


def test_what_counts_as_environment() -> None:
    import ray.exceptions
    from botocore.exceptions import NoCredentialsError

    class RayTaskError(ray.exceptions.RayTaskError):
        def __init__(self, text: str) -> None:
            self.text = text

        def __str__(self) -> str:
            return f"ray::decode() (pid=1)\n  File x, line 1\n{self.text}"

    assert environment_fault(RayTaskError("OSError: [Errno 28] No space left on device"))
    assert environment_fault(RayTaskError("botocore.exceptions.EndpointConnectionError: Could not connect"))
    assert environment_fault(NoCredentialsError())
    assert environment_fault(ConnectionResetError("reset"))
    assert environment_fault(ray.exceptions.ActorDiedError())
    assert environment_fault(RayTaskError("KeyError: 'rank'")) is None
    assert environment_fault(KeyError("rank")) is None


def test_noise_filter_drops_known_lines_only(capfd: pytest.CaptureFixture) -> None:
    with without_ray_noise():
        os.write(2, b"one\n[E] Actor ... See https://github.com/ray-project/ray/issues/53727 for more\ntwo\nthr")
        os.write(2, b"ee\n")
    assert capfd.readouterr().err == "one\ntwo\nthree\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.mark.parametrize("swallowed", [False, True], ids=["plain", "inside a library that makes its own error of it"])
def test_sigterm_ends_with_words(swallowed: bool) -> None:
    code = """
import os, signal
from raysynth.cli import guarded

def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        if SWALLOWED:
            raise AttributeError("garbled") from None
        raise

guarded(work)
""".replace("SWALLOWED", str(swallowed))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "stopped by SIGTERM. Nothing is lost" in done.stdout
