"""The report: one self-contained HTML page that asks the question, answers it, and shows what the answer rests on.

Nothing is loaded from anywhere: figures are inline SVG, sheets and tables are data. The page follows the reader's
colour scheme, fits a phone, and prints. Does not know how its numbers were made or where artifacts are.

Input: `ReportData`; output: HTML, which carries the tables as CSV (see `downloads`).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raysynth.report import figures, origins, panels, tables
from raysynth.report.answer import answer
from raysynth.report.data import ReportData
from raysynth.report.downloads import downloads
from raysynth.report.drawing import Drawing
from raysynth.report.tables import Table
from raysynth.report.words import plural

MOST_SHEETS = 3_000_000
"""Bytes of contact sheets; those beyond are named, not shown, so that the page can be mailed."""

Folded = tuple[str, list[Drawing], list[Table]]
"""Title, figures and tables."""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    short: str
    """In the list of sections."""
    title: str
    words: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    """Parts that are opened by those who want them."""


def render_page(data: ReportData) -> str:
    """The page.

    Args:
        data: what to show. Parts that are missing leave their section out.

    Returns:
        HTML with every picture and table inside.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sheets, left_out = _sheets(data)
    return environment.get_template("template.html.j2").render(
        data=data, answer=answer(data), sheets=sheets, sheets_left_out=left_out, sections=sections(data),
        downloads=downloads(data), subtitle=_subtitle(data), style=(here / "style.css").read_text(encoding="utf-8"),
    )  # fmt: skip


def _subtitle(data: ReportData) -> str:
    runs = data.metrics["run"].nunique()
    parts = [plural(len(data.arm_names), "arm"), *([plural(runs, "trained classifier")] if runs else [])]
    parts += [plural(len(data.test_sets), "test set")] if data.test_sets else []
    return f"{data.created} · {', '.join(parts)}"


def _sheets(data: ReportData) -> tuple[list[tuple[str, str]], list[str]]:
    """Caption and data URI of the sheets that fit, and captions of the others."""
    shown, left_out, used = [], [], 0
    for caption, png in data.sheets:
        used += len(png)
        if used <= MOST_SHEETS:
            shown.append((caption, "data:image/png;base64," + base64.b64encode(png).decode()))
        else:
            left_out.append(caption)
    return shown, left_out


def sections(data: ReportData) -> list[Section]:
    """Every part of the page below the answer that has something to show."""
    found = [_result(data), _details(data), _subgroups(data), _training(data), _fidelity(data), _generator(data),
             _cost(data), _provenance(data)]  # fmt: skip
    return [s for s in found if s.words or s.drawings or s.tables or s.folded]


def _there(*items: Table | None) -> list[Table]:
    return [i for i in items if i]


def _result(data: ReportData) -> Section:
    drawings = [figures.ratio_curve(data), *(figures.forest(data, t) for t in _primary_first(data))]
    contrasts = _there(*(tables.contrasts(data, t) for t in _primary_first(data)))
    folded = [("How every arm was trained", _there(tables.recipes(data))), ("All paired differences", contrasts)]
    return Section(
        "result", "Arms", "Every arm", [], [d for d in drawings if d], _there(tables.arms(data)),
        [(title, [], found) for title, found in folded if found],
    )  # fmt: skip


def _primary_first(data: ReportData) -> list[str]:
    """Test sets, the primary one first; also those of comparisons alone."""
    return list(dict.fromkeys([data.test_set, *data.test_sets])) if data.test_sets else []


def _details(data: ReportData) -> Section:
    confusions = panels.confusion(data)
    curve = panels.reliability(data)
    heat = [tables.metrics_by_arm(data, t) for t in _primary_first(data)]
    matrices = tables.confusion_tables(data)
    folded: list[Folded] = [("Confusion matrices", confusions, matrices)] if confusions or matrices else []
    folded += [("Reliability", [curve], [])] if curve else []
    heat.append(tables.findings_by_arm(data))
    return Section("metrics", "Metrics", "All metrics, by arm and by finding", [], [], _there(*heat), folded)


def _subgroups(data: ReportData) -> Section:
    found = tables.subgroups(data)
    drawing = figures.subgroup_forest(data)
    words = ["Subgroups are exploratory. A difference that is shown in one and not in another is not a difference "
             "between them."] if found else []  # fmt: skip
    return Section("subgroups", "Subgroups", "Whom it helps: subgroups", words, [drawing] if drawing else [], found)


def _training(data: ReportData) -> Section:
    return Section("training", "Training", "Training", [], panels.training_curves(data))


def _fidelity(data: ReportData) -> Section:
    drawings, table = figures.fidelity(data), origins.fidelity(data)
    words = ["Close to real is not the same as useful for training: the arms above answer that."] if table else []
    folded: list[Folded] = [("Numbers", [], _there(table))] if drawings else []
    return Section(
        "fidelity", "Fidelity", "How close the synthetic images are", words, drawings,
        [] if drawings else _there(table), folded,
    )  # fmt: skip


def _generator(data: ReportData) -> Section:
    table = origins.generator_saw(data)
    words = []
    if table:
        unseen = data.arms["n_unseen"].dropna()
        most = int(unseen.max()) if len(unseen) else 0
        words = [
            f"The generator saw {plural(most, 'real image')} that the classifier did not."
            if most > 0 else "The generator saw no real image that the classifier did not."
        ]  # fmt: skip
        if data.arms.loc[data.arms["n_synth"] > 0, "n_unseen"].isna().any():
            words = ["Which real images the generator saw is not known."]
    return Section("generator", "Generator", "What the generator saw", words, [], _there(table))


def _cost(data: ReportData) -> Section:
    return Section("cost", "Cost", "What it cost", [], [], _there(origins.cost(data)))


def _provenance(data: ReportData) -> Section:
    table = origins.provenance(data)
    folded: list[Folded] = [("Artifacts", [], [table])] if table else []
    return Section("provenance", "Provenance", "Where the numbers come from", list(data.notes), [], [], folded)
