"""Numbers of the page's tables against pandas and by hand: means over runs, withheld cells, shades, fairness."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from raysynth.report import origins, tables
from raysynth.report.data import COLUMNS, ReportData
from raysynth.report.panels import DARKEST
from raysynth.report.tables import Table
from tests.report_data import report_data


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report_data()


def rows_of(table: Table | None) -> dict[str, list[str]]:
    assert table
    return {r[0].text: [c.text for c in r[1:]] for r in table.rows}


def small(rows: list[dict]) -> ReportData:
    """A metric table of a few rows: arm, seed, finding, subgroup, metric, value."""
    full = [{"run": f"{r['arm']}{r.get('seed', 0)}", "test_set": "test", "subgroup": "", "finding": "macro", "n": 50,
             "n_patients": 40, "metric": "auroc", "ci_low": 0.1, "ci_high": 0.2, **r} for r in rows]  # fmt: skip
    return ReportData("x", "2026-11-22", metrics=pd.DataFrame(full).reindex(columns=list(COLUMNS["metrics"])))


def test_the_summary_is_the_mean_and_spread_over_runs(data: ReportData) -> None:
    summary = data.summary(metric="auroc", test_set="test", subgroup="").set_index(["arm", "finding"])
    runs = data.metrics.query("arm == 'pretrain x10' and metric == 'auroc' and test_set == 'test' and subgroup == ''")
    runs = runs[runs["finding"] == "4"]
    row = summary.loc[("pretrain x10", "4")]
    assert row["value"] == pytest.approx(runs["value"].mean())
    assert row["sd"] == pytest.approx(np.std(runs["value"], ddof=1))
    assert row["ci_low"] == pytest.approx(runs["ci_low"].mean())
    assert row["runs"] == 3
    assert list(dict.fromkeys(data.summary()["arm"])) == list(data.arms["arm"])


def test_a_withheld_average_gives_way_to_the_one_that_says_what_it_leaves_out() -> None:
    data = small([
        {"arm": "real", "value": np.nan}, {"arm": "real", "finding": "macro without Edema", "value": 0.8},
        {"arm": "real", "finding": "Edema", "value": np.nan}, {"arm": "real", "finding": "Mass", "value": 0.8},
    ])  # fmt: skip
    (row,) = data.averages().to_dict("records")
    assert (row["finding"], row["value"]) == ("macro without Edema", 0.8)
    found = tables.arms(data)
    assert rows_of(found)["real"][0] == "0.800"
    assert "without Edema (too few cases)" in found.caption  # type: ignore[union-attr]
    by_finding = rows_of(tables.findings_by_arm(data))
    assert by_finding["Edema (-)"] == ["withheld"]
    assert set(by_finding) == {"Edema (-)", "Mass (-)"}


def test_one_run_has_no_spread() -> None:
    assert rows_of(tables.arms(small([{"arm": "real", "value": 0.8}])))["real"][:2] == ["0.800", "-"]


def test_shades_run_from_worst_to_best() -> None:
    data = small([
        {"arm": a, "metric": m, "value": v}
        for a, auroc, ece in (("a", 0.7, 0.3), ("b", 0.8, 0.1), ("c", 0.9, 0.2))
        for m, v in (("auroc", auroc), ("ece", ece), ("f1", 0.5))
    ])  # fmt: skip
    heat = tables.metrics_by_arm(data, "test")
    assert heat
    assert [[c.shade for c in r[1:]] for r in heat.rows] == [
        [0, 0, 0], [DARKEST / 2, DARKEST, 0], [DARKEST, DARKEST / 2, 0],
    ]  # fmt: skip
    assert "Lower is better for calibration error (ECE)." in heat.caption


def test_subgroups_with_withheld_cells(data: ReportData) -> None:
    (table,) = tables.subgroups(data)
    rows = rows_of(table)
    assert rows["age bin: >=80"] == ["90", "90", *["withheld"] * 7]
    assert "withheld" not in rows["sex: F"]


def test_underdiagnosis_by_group_with_its_gap() -> None:
    rows = [{"arm": "real", "finding": "No Finding", "metric": "underdiagnosis", "subgroup": g, "value": v}
            for g, v in (("", 0.2), ("sex=F", 0.3), ("sex=M", 0.1), ("sex=F & age_bin=18-39", np.nan))]  # fmt: skip
    rows.append({"arm": "real", "finding": "No Finding", "metric": "underdiagnosis_gap", "value": 0.2})
    (table,) = tables.subgroups(small(rows))
    assert table.caption.startswith("Underdiagnosis rate by subgroup")
    assert "lower is better" in table.caption
    found = rows_of(table)
    assert found["everyone"][-1] == "0.200"
    assert found["sex: F & age bin: 18-39"][-1] == "withheld"
    assert found["largest gap between groups"][-1] == "0.200"


def test_contrasts_are_by_test_set_and_the_primary_one_is_first(data: ReportData) -> None:
    found = tables.contrasts(data, "test")
    assert found
    assert found.rows[0][0].text == "mix x3 − real (primary)"
    assert len(found.rows) == 12
    assert not any("(primary)" in r[0].text for r in tables.contrasts(data, "external").rows)  # type: ignore[union-attr]


def test_fidelity_says_once_what_is_everywhere_the_same(data: ReportData) -> None:
    found = origins.fidelity(data)
    assert found
    assert "Generator: tiny ddpm, 3,000 steps." in found.caption
    assert "generator" not in found.head
    assert found.rows[0][0].text == "overall"
    assert found.rows[10][2].text == "withheld"


def test_costs_add_up(data: ReportData) -> None:
    found = origins.cost(data)
    assert found
    seconds = data.cost["seconds"].sum()
    assert [c.text for c in found.rows[-1]][:3] == ["total", "", f"{seconds / 60:.1f} min"]
    assert len(found.rows) == len(data.cost) + 1


def test_the_generator_saw(data: ReportData) -> None:
    found = rows_of(origins.generator_saw(data))
    assert found["mix x3"] == ["100", "180", "500", "400", "donor"]
    assert set(found) == {"mix x1", "mix x3", "mix x10", "pretrain x10", "upper bound"}


def test_versions_are_read_from_json(data: ReportData) -> None:
    assert rows_of(origins.provenance(data))["ingest"][-1] == "ray 2.60.0, torch 2.15.0"
