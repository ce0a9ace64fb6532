"""The page: whole, self-contained, accessible, and still a page when parts are missing."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import raysynth.report
from raysynth.core.errors import DataError
from raysynth.report import ReportData, figures, render_page, write_tables
from raysynth.report.drawing import SERIES
from raysynth.report.page import sections
from raysynth.report.panels import DARKEST, confusion
from raysynth.report.tables import confusion_tables
from tests.report_data import ARMS, arms, report_data

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements in order, with their attributes and text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.words.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag]

    @property
    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if "id" in a]


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report_data()


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render_page(data)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def changed(data: ReportData, **fields: object) -> ReportData:
    return ReportData(**{**{f: getattr(data, f) for f in data.__dataclass_fields__}, **fields})  # type: ignore[arg-type]


def test_nothing_comes_from_elsewhere(html: str, page: Page) -> None:
    without_data = re.sub(r"data:[a-z/-]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"(?:https?:)?//\w", without_data)
    assert "@import" not in html
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert len(html) < 5_000_000


def test_every_part_is_there(page: Page) -> None:
    for key in ("answer", "sheets", "result", "metrics", "subgroups", "training", "fidelity", "generator", "cost",
                "provenance", "files"):  # fmt: skip
        assert key in page.ids, key
    for key in ("ratio-curve", "forest-0", "forest-1", "curves-metric", "curves-loss", "reliability", "fidelity-0",
                *(f"confusion-{i}" for i in range(len(ARMS)))):  # fmt: skip
        assert key in page.ids, key


def test_headings_are_in_order_and_landmarks_are_there(page: Page) -> None:
    levels = [int(t[1]) for t, _ in page.elements if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.all(landmark)) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert page.words["title"]


def test_ids_are_unique_and_every_reference_has_one(html: str, page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    asked = {a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")}
    asked |= {i for _, a in page.elements for k in ("aria-labelledby",) for i in a.get(k, "").split()}
    asked |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert asked <= set(page.ids)


def test_every_picture_has_words(page: Page) -> None:
    drawings = list(page.all("svg"))
    assert len(drawings) == len(page.all("figure")) - 1
    for a in drawings:
        assert a["role"] == "img"
        assert re.search(r"\d", a["aria-label"]), "an alternative text says what was found"
    assert all(a["alt"] for a in page.all("img"))
    assert len(page.words["figcaption"]) == len(page.all("figure"))


def test_tables_have_captions_scopes_and_can_be_reached_by_keyboard(page: Page) -> None:
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables) > 5
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len([a for a in page.all("div") if a.get("class") == "scroll" and a.get("tabindex") == "0"]) >= len(tables)
    assert len(page.all("details")) == len(page.all("summary")) > 1


def test_colours_can_be_told_from_the_ground_in_both_schemes() -> None:
    css = (Path(raysynth.report.__file__).parent / "style.css").read_text(encoding="utf-8")

    def luminance(rgb: np.ndarray) -> float:
        c = rgb / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    def contrast(a: np.ndarray, b: np.ndarray) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    schemes = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = {k: np.array([int(v[i : i + 2], 16) for i in (0, 2, 4)])
                  for k, v in re.findall(r"--([\w-]+): #(\w{6})", scheme)}  # fmt: skip
        accent = np.array([int(v) for v in re.search(r"--accent-rgb: ([\d ]+)", scheme)[1].split()])  # type: ignore[index]
        for ground in ("paper", "panel"):
            for name in ("ink", "muted", "link"):
                assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
        for i in range(1, len(SERIES) + 1):
            assert contrast(colour[f"c{i}"], colour["paper"]) >= 3
        for over in (accent, colour["c1"]):
            cell = DARKEST * over + (1 - DARKEST) * colour["paper"]
            assert contrast(colour["ink"], cell) >= 4.5


def test_drawn_colours_all_follow_the_scheme(html: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that no scheme changes"
        assert "font-family" not in svg


def test_the_answer_and_its_numbers_are_on_the_page(data: ReportData, html: str) -> None:
    row = data.comparisons[data.comparisons["primary"]].iloc[0]
    assert f"+{row['difference']:.3f}" in html
    assert "the generator saw 400 real images that the classifier" in html
    mean = data.metrics.query("arm == 'mix x3' and test_set == 'test' and finding == 'macro' and subgroup == ''"
                              " and metric == 'auroc'")["value"]  # fmt: skip
    assert f"<td>{mean.mean():.3f}</td><td>{mean.std(ddof=1):.3f}</td>" in html
    assert "withheld" in html


def test_tables_are_whole_as_files_and_on_the_page(data: ReportData, page: Page) -> None:
    files = write_tables(data)
    assert {f"{n}.csv" for n in data.tables()} | {"summary.csv", "confusion.csv"} == set(files)
    pd.testing.assert_frame_equal(
        pd.read_csv(io.BytesIO(files["comparisons.csv"])).fillna({"subgroup": ""}), data.comparisons, check_dtype=False
    )
    assert len(pd.read_csv(io.BytesIO(files["metrics.csv"]))) == len(data.metrics)
    counts = pd.read_csv(io.BytesIO(files["confusion.csv"]))
    assert counts["count"].sum() == sum(c.sum() for c, _ in data.confusion.values())
    links = {a["download"]: a["href"] for a in page.all("a") if "download" in a}
    for name, csv in files.items():
        packed = name not in links
        carried = base64.b64decode(links[f"{name}.gz" if packed else name].partition("base64,")[2])
        assert (gzip.decompress(carried) if packed else carried) == csv


def test_names_cannot_break_the_page(data: ReportData) -> None:
    bad = '<b>&"x'
    without = dict.fromkeys(("metrics", "comparisons", "curves", "fidelity", "reliability"), pd.DataFrame())
    plain = {**without, "sheets": [(bad, data.sheets[0][1])], "name": bad}
    counts = {bad: (np.eye(3), [bad, "b", "c"])}
    shown = Page(render_page(changed(data, **plain, confusion=counts, notes=[bad], experiment_yaml=bad)))
    assert not shown.all("b")
    assert shown.words["h1"] == [bad]


def test_an_empty_report_is_a_page() -> None:
    shown = Page(render_page(ReportData("nothing yet", "2026-11-22")))
    assert not shown.all("svg")
    assert not shown.all("table")
    assert {"answer", "files"} <= set(shown.ids)


def test_one_arm_without_comparisons_or_fidelity(data: ReportData) -> None:
    one = changed(
        data, metrics=data.metrics[data.metrics["arm"] == "real"], arms=arms()[:1], comparisons=pd.DataFrame(),
        fidelity=pd.DataFrame(), curves=pd.DataFrame(), reliability=pd.DataFrame(), cost=pd.DataFrame(), confusion={},
        sheets=[], primary=None, notes=[],
    )  # fmt: skip
    shown = Page(render_page(one))
    assert not {"ratio-curve", "forest-0", "fidelity", "training", "generator", "cost", "sheets"} & set(shown.ids)
    assert "caption-arms" in shown.ids


def test_several_labels_an_image(data: ReportData) -> None:
    findings = ["Edema", "Pneumonia", "No Finding"]
    counts = np.array([[[90, 5], [2, 23]], [[80, 10], [6, 24]], [[50, 20], [10, 40]]])
    for stacked in (counts, counts.reshape(6, 2)):
        (table,) = confusion_tables(changed(data, confusion={"real": (stacked, findings)}))
        assert [c.text for c in table.rows[0]] == ["Edema", "23", "2", "5", "90", "0.920", "0.947"]
    without = dict.fromkeys(("curves", "reliability", "fidelity"), pd.DataFrame())
    shown = Page(render_page(changed(data, confusion={"real": (counts, findings)}, **without)))
    assert "caption-confusion-0" in shown.ids
    assert "confusion-0" not in shown.ids
    single = write_tables(changed(data, confusion={"real": (counts, findings)}))["confusion.csv"]
    assert len(pd.read_csv(io.BytesIO(single))) == 12


def test_twenty_arms_with_long_names(data: ReportData) -> None:
    names = [f"mix of real and synthetic images at ratio {i}, guidance 1.{i}, DenseNet-121 from scratch"
             for i in range(20)]  # fmt: skip
    metrics = data.metrics.query("arm == 'mix x3' and finding == 'macro' and subgroup == ''")
    rows = pd.concat([metrics.assign(arm=n, run=metrics["run"] + n, guidance_scale=1 + i / 10)
                      for i, n in enumerate(names)])  # fmt: skip
    table = pd.concat([arms().iloc[[3]].assign(arm=n, ratio=1 + i % 5) for i, n in enumerate(names)])
    pairs = pd.concat([data.comparisons.iloc[:1].assign(arm=n, against=names[0]) for n in names[1:]])
    curve = data.curves.query("arm == 'real' and step % 60 == 0").assign(loss=np.nan, val_loss=np.nan)
    curves = pd.concat([curve.assign(arm=n) for n in names])
    many = changed(data, metrics=rows, arms=table, comparisons=pairs, curves=curves, primary=None, confusion={},
                   reliability=pd.DataFrame())  # fmt: skip
    html = render_page(many)
    shown = Page(html)
    assert len(html) < 5_000_000
    assert {"ratio-curve", "forest-0", "curves-metric"} <= set(shown.ids)
    forest = next(d for d in sections(many)[0].drawings if d.key == "forest-0")
    assert all(re.search(rf"ratio {i}, guidance", forest.svg) for i in range(1, 20)), "names can be told apart"


def test_a_report_does_not_change_from_one_drawing_to_the_next(data: ReportData) -> None:
    few = changed(
        data, curves=pd.DataFrame(), reliability=pd.DataFrame(), fidelity=pd.DataFrame(), confusion={},
        comparisons=pd.DataFrame(), metrics=data.metrics.query("finding == 'macro' and subgroup == ''"),
    )  # fmt: skip
    assert render_page(few) == render_page(few)


def test_ratio_curves_are_told_apart_by_what_differs(data: ReportData) -> None:
    drawing = figures.ratio_curve(data)
    assert drawing
    assert re.search(r"mix: 0\.\d+ at 1, 0\.\d+ at 3, 0\.\d+ at 10", drawing.alt)
    strong = data.metrics["arm"] == "mix x10"
    crossed = changed(data, metrics=data.metrics.assign(guidance_scale=np.where(strong, 4.0, 1.0)))
    words = figures.ratio_curve(crossed).alt  # type: ignore[union-attr]
    assert re.search(r"mix, guidance 1: 0\.\d+ at 1, 0\.\d+ at 3;", words)
    assert re.search(r"mix, guidance 4: 0\.\d+ at 10", words)
    saw = changed(data, metrics=data.metrics.assign(n_real_generator=np.where(strong, 100.0, 978.0)))
    assert "mix, generator of 100 real images: " in figures.ratio_curve(saw).alt  # type: ignore[union-attr]


def test_the_forest_fills_what_differs_after_correction(data: ReportData) -> None:
    rows = data.comparisons.assign(p=0.01, p_holm=0.2, difference=0.03, ci_low=0.01, ci_high=0.05)
    alt = figures.forest(changed(data, comparisons=rows), "test").alt  # type: ignore[union-attr]
    assert alt.count("differs from 0") == 1
    assert alt.startswith("Differences in AUROC against “real”: mix x3 +0.030, primary, differs from 0")


def test_a_confusion_matrix_names_its_most_frequent_mistake(data: ReportData) -> None:
    counts = np.array([[8, 2, 0], [0, 9, 1], [5, 0, 5]])
    (drawing,) = confusion(changed(data, confusion={"real": (counts, ["cat", "dog", "fox"])}))
    assert "73.3 % on the diagonal" in drawing.alt
    assert "fox taken for cat, 5 times" in drawing.alt


def test_a_table_without_its_columns_is_refused() -> None:
    with pytest.raises(DataError, match=r"report\.metrics"):
        ReportData("x", "2026-11-22", metrics=pd.DataFrame({"arm": ["real"]}))
