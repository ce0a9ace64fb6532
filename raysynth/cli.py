"""The `raysynth` command: each verb loads the experiment and calls one stage. Heavy imports wait for the verb.

Exit codes: 0 done; 2 the file or the data is wrong; 3 finished, but a gate failed; 4 an environment fault, the
only one worth retrying.
"""

from __future__ import annotations

import builtins
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysynth.core.errors import RaysynthError
from raysynth.core.progress import console, say

if TYPE_CHECKING:
    from raysynth.core.experiment import Experiment
    from raysynth.stages.pipeline import Pipeline

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Real medical images in; a synthetic set that survives any crash, and an answer whether it helped, out.",
    epilog="Exit codes: 0 done, 2 the file or the data is wrong, 3 a gate failed, 4 environment fault (retry).",
)  # fmt: skip

SHORT = ["name=quickstart-short", "generator.steps=150", "classifier.steps=60", "sweep.seeds=[0,1]"]
"""Overrides of `quickstart --short`."""

File = Annotated[str, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file; see jobs/.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Overrides, as in root=/data/runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print config, artifacts and cost; do nothing.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Render rows recorded as failed once more.")]
Root = Annotated[str, typer.Argument(metavar="ROOT", help="Where artifacts are: a folder or s3://bucket/prefix.")]


def _load(file: str, words: list[str] | None) -> Experiment:
    from raysynth.core.config import load_experiment

    return load_experiment(file, words or [])


def _stages(experiment: Experiment, stages: list[str], dry_run: bool, retry_failed: bool = False) -> None:
    """Runs the stages in order; after `generate` draws the contact sheet, after `evaluate` writes the report."""
    from raysynth.stages.pipeline import Pipeline

    pipeline = Pipeline(experiment)
    if not pipeline.is_complete(stages[-1]):
        from raysynth.stages.preflight import check_setup

        check_setup(experiment, pipeline.storage, stages)
    if dry_run:
        from raysynth.stages.overview import show_dry_run

        show_dry_run(pipeline)
        return
    from raysynth.stages.noise import without_ray_noise

    with without_ray_noise():
        pipeline.run(stages, retry_failed)
    if stages[-1] == "generate":
        from raysynth.report import write_contact_sheet

        sheet = write_contact_sheet(pipeline)
        say(f"contact sheet: {pipeline.storage.url(sheet)}")
    if stages[-1] == "evaluate":
        _report(pipeline)


def _report(pipeline: Pipeline) -> None:
    from raysynth.report import show_answer, write_report

    folder = write_report(pipeline)
    show_answer(pipeline, folder)


@app.command()
def run(file: File, words: Words = None, dry_run: DryRun = False, retry_failed: Retry = False) -> None:
    """Every stage that is missing, in order."""
    from raysynth.stages.pipeline import stages_of

    experiment = _load(file, words)
    _stages(experiment, stages_of(experiment), dry_run, retry_failed)


@app.command()
def ingest(file: File, words: Words = None, dry_run: DryRun = False) -> None:
    """Real images -> a checked image table with patient-safe splits."""
    _stages(_load(file, words), ["ingest"], dry_run)


@app.command("train-generator")
def train_generator(file: File, words: Words = None, dry_run: DryRun = False) -> None:
    """Train the diffusion model; resumes exactly after any kill."""
    _stages(_load(file, words), ["train-generator"], dry_run)


@app.command()
def plan(file: File, words: Words = None, dry_run: DryRun = False) -> None:
    """The table of synthetic images wanted."""
    _stages(_load(file, words), ["plan"], dry_run)


@app.command()
def generate(file: File, words: Words = None, dry_run: DryRun = False, retry_failed: Retry = False) -> None:
    """Render whatever of the plan is missing with a pool of actors."""
    _stages(_load(file, words), ["generate"], dry_run, retry_failed)


@app.command("train-classifier")
def train_classifier(file: File, words: Words = None, dry_run: DryRun = False) -> None:
    """Train one classifier on real and synthetic images by strategy; a sweep trains many."""
    _stages(_load(file, words), ["train-classifier"], dry_run)


@app.command()
def sweep(file: File, words: Words = None, dry_run: DryRun = False, retry_failed: Retry = False) -> None:
    """Render what the arms need, then train every missing arm with Ray Tune."""
    _stages(_load(file, words), ["sweep"], dry_run, retry_failed)


@app.command()
def evaluate(file: File, words: Words = None, dry_run: DryRun = False) -> None:
    """Predict the test sets once; metrics, intervals, subgroups, paired differences, fidelity; then the report."""
    _stages(_load(file, words), ["evaluate"], dry_run)


@app.command()
def report(file: File, words: Words = None) -> None:
    """One self-contained HTML page, with every table as CSV, from what `evaluate` left."""
    from raysynth.stages.pipeline import Pipeline

    _report(Pipeline(_load(file, words)))


@app.command()
def status(
    file: File,
    words: Words = None,
    watch: Annotated[float | None, typer.Option("--watch", min=0.1, help="Look again every so many seconds.")] = None,
) -> None:
    """What is done and running, images/s, time left and cost so far; from any machine that sees the root."""
    from raysynth.stages.pipeline import Pipeline
    from raysynth.stages.status import show_status

    with suppress(KeyboardInterrupt):  # the way to end a watch
        show_status(Pipeline(_load(file, words)), watch)


@app.command()
def verify(
    file: File,
    words: Words = None,
    repair: Annotated[bool, typer.Option("--repair", help="Give up corrupt shards; `generate` redoes them.")] = False,
) -> None:
    """Wanted rows against stored images: missing, duplicate, extra, corrupt."""
    from raysynth.stages.overview import verify_set
    from raysynth.stages.pipeline import Pipeline

    verify_set(Pipeline(_load(file, words)), repair)


@app.command()
def export(
    file: File,
    words: Words = None,
    to: Annotated[str, typer.Option("--to", help="huggingface, webdataset or folders.")] = "huggingface",
    out: Annotated[str, typer.Option("--out", help="An empty folder or s3://bucket/prefix.")] = "",
    file_mb: Annotated[int, typer.Option("--file-mb", help="Megabytes a file, about.")] = 500,
    arm: Annotated[str | None, typer.Option("--arm", help="Whose images, where a sweep has several.")] = None,
) -> None:
    """The generated images as a data set with a data card, for datasets, webdataset or torchvision."""
    from raysynth.stages.export import check_options, export, rendered_by
    from raysynth.stages.noise import without_ray_noise
    from raysynth.stages.pipeline import Pipeline

    check_options(to, out, file_mb)
    pipeline = Pipeline(_load(file, words))
    source = rendered_by(pipeline, arm)
    with without_ray_noise():
        export(source.generated, source.images, to, out, lambda: pipeline.resources, file_mb)


@app.command()
def ls(root: Root = "runs") -> None:
    """Artifacts under a root, their state, and who uses them."""
    from raysynth.core.storage import open_storage
    from raysynth.stages.housekeeping import show_artifacts

    show_artifacts(open_storage(root))


@app.command()
def gc(
    root: Root = "runs",
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it, only list.")] = False,
) -> None:
    """Files that no marker, wave or artifact names. Lists them; deletes only when told."""
    from raysynth.core.storage import open_storage
    from raysynth.stages.housekeeping import collect_garbage

    collect_garbage(open_storage(root), delete)


@app.command()
def quickstart(
    root: Annotated[str, typer.Option("--root", help="Where artifacts go.")] = "runs",
    short: Annotated[bool, typer.Option("--short", help="Fewer steps and images; what CI runs.")] = False,
) -> None:
    """Real digits, CPU, minutes: train a generator, render images, train classifiers with and without, report."""
    from raysynth.core.config import load_experiment

    words = [f"root={root}"]
    if short:
        words += SHORT
    experiment = load_experiment(str(Path(__file__).parent / "quickstart.yaml"), words)
    from raysynth.stages.pipeline import stages_of

    _stages(experiment, stages_of(experiment), dry_run=False)


def environment_fault(error: BaseException) -> str | None:
    """What of storage or cluster broke, in a line; None if `error` is the program's own."""
    from raysynth.core.faults import is_storage_fault, storage_words

    kinds = {c.__name__: c.__module__ for c in type(error).__mro__}
    if "RayTaskError" in kinds:
        # The worker's exception arrives as text; its last line names it. Ray Data wraps it in one of its own.
        chain = str(error).split("The above exception was the direct cause of the following exception:")
        while len(chain) > 1 and "ray.exceptions.UserCodeException" in chain[-1]:
            chain.pop()
        last = chain[-1].strip().splitlines()[-1]
        named = last.split(":")[0].rpartition(".")[2]
        kind = getattr(builtins, named, None)
        return last if "botocore" in last or (isinstance(kind, type) and issubclass(kind, OSError)) else None
    if is_storage_fault(error):
        return storage_words(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}" if kinds.get("RayError") else None


KEPT = "Nothing is lost but what was trained since the last checkpoint; the same command goes on from here."


def _stopped() -> None:
    say(f"error: stopped by SIGTERM. {KEPT}")
    sys.exit(4)


def guarded(work: Callable[[], object]) -> None:
    """Does the work; errors of raysynth, SIGTERM and faults of storage or cluster become one message and an exit code,
    everything else is a bug's traceback."""
    told = threading.Event()

    def stop(*_: object) -> None:
        told.set()
        sys.exit(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)  # rendering has a handler of its own
    try:
        work()
    except SystemExit as done:
        if done.code == 130:  # typer's answer to Ctrl-C
            say(f"interrupted. {KEPT}")
        if told.is_set() or done.code == signal.SIGTERM:  # so says Ray's handler, while Ray starts
            _stopped()
        raise
    except KeyboardInterrupt:
        say(f"interrupted. {KEPT}")
        sys.exit(130)
    except RaysynthError as error:
        console.print("[bold red]error[/] ", end="")
        say(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if told.is_set():  # it came inside a library that made an error of its own of it
            _stopped()
        fault = environment_fault(error)
        if fault is None:
            raise
        say(f"error: storage or cluster: {fault}. Nothing is lost; the same command goes on from here.")
        sys.exit(4)


def main() -> None:
    """Entry point."""
    guarded(app)
