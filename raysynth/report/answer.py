"""The answer in words: what the primary contrast showed, what it did not, and what its interval leaves out.

Not shown is never told as "no effect" (Altman and Bland 1995, "Absence of evidence is not evidence of absence").

Does not know how the numbers were made or how the page looks. Input: `ReportData`; output: plain sentences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from raysynth.report.data import MACRO, ReportData
from raysynth.report.words import (
    count,
    higher_is_better,
    interval,
    is_shown,
    listed,
    metric_words,
    number,
    p_words,
    plural,
    quoted,
)

CONTROLS = {
    "duplicate": "real images repeated instead of synthetic ones",
    "permuted": "synthetic images with shuffled labels",
    "real_real": "two stages, both on real images",
}
CONTROLS_OF = {
    "mix": ("duplicate", "permuted"), "synthetic": ("permuted",), "pretrain": ("duplicate", "real_real", "permuted"),
}  # fmt: skip
"""Strategy -> controls that tell its effect from more steps, more epochs or more noise."""


@dataclass(frozen=True)
class Answer:
    """The top of the page."""

    question: str
    headline: str
    verdict: str
    """better, worse, open (not shown either way) or none (nothing was tested)."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)


def answer(data: ReportData) -> Answer:
    """The question, the verdict and its limits."""
    if data.primary is None:
        return Answer(
            "Do the synthetic images help the classifier?",
            "No contrast was named before the run, so nothing here is confirmatory.", "none",
            not_shown=[
                "Every difference below is exploratory: with many comparisons some will look large by chance. Name "
                "one contrast in evaluation.primary and judge it on data not looked at yet.",
                *_limits(data),
            ],
        )  # fmt: skip
    primary = data.primary
    arm, against, metric = primary["arm"], primary["against"], metric_words(primary["metric"])
    averaged = ", averaged over the findings," if data.is_averaged(primary["metric"]) else ""
    question = (
        f"Does a classifier trained as “{arm}” do better than one trained as “{against}”? Judged by {metric}"
        f"{averaged} on the test set “{primary['test_set']}”, as named before the run."
    )
    rows = data.contrasts(**primary, subgroup="")
    rows = rows[rows["primary"].fillna(False).astype(bool)]
    if not len(rows):
        return Answer(
            question, "The primary contrast could not be computed.", "none",
            not_shown=[f"No paired comparison of “{arm}” with “{against}” is in the results: an arm or its "
                       "predictions are missing."],
        )  # fmt: skip
    row = rows.iloc[0]
    if pd.isna(row["difference"]):
        return Answer(
            question, f"Withheld: the test set has too few cases for {metric}.", "none",
            not_shown=["Below the least number of positives (evaluation.min_positives) a value says more about which "
                       "patients happened to be tested than about the classifiers."],
        )  # fmt: skip
    verdict = _verdict(row, data.confidence)
    return Answer(
        question, _headline(data, row, metric, verdict), verdict, _facts(data, row),
        _shown(data, row, metric, verdict), [*_not_shown(data, row, metric, verdict), *_limits(data, row)],
    )  # fmt: skip


def _verdict(row: Any, confidence: float, p: str = "p") -> str:
    """Whether a comparison shows its first arm better or worse; open where it shows neither."""
    if not is_shown(row, confidence, p):
        return "open"
    return "better" if (row["difference"] > 0) == higher_is_better(row["metric"]) else "worse"


def _headline(data: ReportData, row: Any, metric: str, verdict: str) -> str:
    size = f"{metric} {number(row['difference'], sign=True)}"
    said = {
        "better": f"Yes, on this test set: “{row['arm']}” did better than “{row['against']}” ({size})",
        "worse": f"No: “{row['arm']}” did worse than “{row['against']}” ({size})",
        "open": f"Not shown: the difference between “{row['arm']}” and “{row['against']}” ({size}) could be chance",
    }[verdict]
    ahead = [f"the control “{control}” ({words}; {number(found['difference'], sign=True)})"
             for control, words, found in _controls(data, row)
             if found is not None and control != row["against"]
             and _verdict(found, data.confidence, "p_holm") == "worse"]  # fmt: skip
    if not ahead:
        return f"{said}."
    link = {"better": ", but worse than", "worse": ", and worse than", "open": f"; “{row['arm']}” did worse than"}
    return f"{said}{link[verdict]} {listed(ahead)}."


def _facts(data: ReportData, row: Any) -> list[tuple[str, str]]:
    values = data.averages(metric=row["metric"], test_set=row["test_set"], subgroup="").set_index("arm")["value"]
    percent = f"{100 * data.confidence:g} %"
    detectable = row["minimum_detectable_difference"]
    return [
        *((f"{metric_words(row['metric'])} of “{a}”", number(values[a]))
          for a in (row["arm"], row["against"]) if a in values),
        ("difference", number(row["difference"], sign=True)),
        (f"{percent} interval", interval(row["ci_low"], row["ci_high"], sign=True)),
        ("test", p_words(row["p"]) if not pd.isna(row["p"]) else "none; judged by the interval"),
        ("test images", count(row["n"])), ("test patients", count(row["n_patients"])), ("seeds", count(row["seeds"])),
        ("minimum detectable difference", number(detectable) if not pd.isna(detectable) else "not known"),
    ]  # fmt: skip


def _shown(data: ReportData, row: Any, metric: str, verdict: str) -> list[str]:
    """What holds up."""
    spread = interval(row["ci_low"], row["ci_high"], sign=True)
    if verdict == "open":
        known = not pd.isna(row["ci_low"])
        return [f"Differences of {metric} from {spread} are compatible with these data."] if known else []
    better = "higher" if row["difference"] > 0 else "lower"
    test = f"; {p_words(row['p'])}" if not pd.isna(row["p"]) else ""
    size, percent = number(abs(row["difference"])), f"{100 * data.confidence:g} %"
    return [
        f"On {count(row['n_patients'])} test patients the {metric} of “{row['arm']}” was {better} than that of "
        f"“{row['against']}” by {size} ({percent} interval {spread}, over {_resampled(data, row)}{test})."
    ]


def _resampled(data: ReportData, row: Any) -> str:
    """What the interval covers: patients, and what the two arms repeated with every seed."""
    repeated = list(data.repeated_by([row["arm"], row["against"]]))
    if not repeated or pd.isna(row["seeds"]) or row["seeds"] <= 1:
        return "test patients"
    n = int(row["seeds"])
    return f"test patients and {n} {repeated[0] if len(repeated) == 1 else f'repetitions ({listed(repeated)})'}"


def _not_shown(data: ReportData, row: Any, metric: str, verdict: str) -> list[str]:
    """What the verdict must not be read as."""
    size, least, level = abs(row["difference"]), row["minimum_detectable_difference"], 1 - data.confidence
    said = []
    if verdict == "open":
        said.append("That there is no effect: a result that is not significant cannot tell “no difference” from “too "
                    "few patients to see one”.")  # fmt: skip
        if not pd.isna(least):
            said.append(f"That there is no difference smaller than {number(least)}: a true difference of that size is "
                        "found in four of five such tests, a smaller one less often, so one cannot be "
                        "excluded.")  # fmt: skip
        excluded = row["ci_low"] > 0 or row["ci_high"] < 0
        if not pd.isna(row["p"]) and (row["p"] < level) != excluded:
            said.append(f"A clear result: the interval ({interval(row['ci_low'], row['ci_high'], sign=True)}) and the "
                        f"test ({p_words(row['p'])}) disagree, so the difference counts as not shown.")  # fmt: skip
    elif not pd.isna(least) and size < least:
        said.append(f"How large the difference is: it is below what this test set reliably detects ({number(least)}), "
                    "and differences that are found although they are that small tend to be overstated.")  # fmt: skip
    part = str(row["finding"]).removeprefix(MACRO).strip()
    if part:
        said.append(f"Anything about the findings left out of the average: {part}, for too few cases in the test set.")
    return [*said, *_unseen_words(data, row["arm"]), *_control_words(data, row)]


def _unseen_words(data: ReportData, arm: str) -> list[str]:
    """The real images behind the synthetic ones that the classifier was not given."""
    known = data.arm(arm).get("n_unseen")
    if known is not None and pd.isna(known):
        return ["That the gain is free of further real images: which ones the generator saw is not known."]
    if known is None or known <= 0:
        return []
    said = (
        f"That the gain is free of further real images: the generator saw {plural(int(known), 'real image')} that the "
        f"classifier of “{arm}” did not."
    )
    values = data.averages(metric=data.metric, test_set=data.test_set, subgroup="").set_index("arm")
    bounds = [
        f"{number(values.loc[a, 'value'])} (“{a}”, {interval(values.loc[a, 'ci_low'], values.loc[a, 'ci_high'])})"
        for a in data.with_strategy("upper_bound") if a in values.index
    ]  # fmt: skip
    if bounds:
        return [f"{said} A classifier given those real images themselves reached {metric_words(data.metric)} "
                f"{listed(bounds)}."]  # fmt: skip
    return [f"{said} No arm was trained on those real images themselves, so what they alone are worth is not known."]


def _controls(data: ReportData, row: Any) -> list[tuple[str, str, Any]]:
    """The controls that would explain a gain otherwise: name, words, and the row that compares the arm with it, None
    where there is none."""
    found = []
    for strategy in CONTROLS_OF.get(data.arm(row["arm"]).get("strategy", ""), ()):
        for control in data.with_strategy(strategy):
            rows = data.contrasts(
                arm=row["arm"], against=control, metric=row["metric"], test_set=row["test_set"], subgroup=""
            )
            found.append((control, CONTROLS[strategy], rows.iloc[0] if len(rows) else None))
    return found


def _control_words(data: ReportData, row: Any) -> list[str]:
    """How the arm stands against the controls, unless it is shown to do better."""
    relevant, controls = CONTROLS_OF.get(data.arm(row["arm"]).get("strategy", ""), ()), _controls(data, row)
    if relevant and not controls:
        words = " nor ".join(CONTROLS[s] for s in relevant)
        return [f"That it takes synthetic images: no control ({words}) was trained."]
    values = data.averages(metric=row["metric"], test_set=row["test_set"], subgroup="").set_index("arm")["value"]
    said = []
    for control, words, found in controls:
        claim = f"That it does better than the control “{control}” ({words})"
        if found is None:
            if control in values and row["arm"] in values:
                reached = listed([number(values[a]) for a in (row["arm"], control)])
                said.append(f"{claim}: the two were not tested as a pair; they reached {reached}.")
            continue
        size, spread = number(found["difference"], sign=True), interval(found["ci_low"], found["ci_high"], sign=True)
        measured = f"the difference is {size} ({spread}), {p_words(found['p_holm'])} after Holm’s correction."
        verdict = _verdict(found, data.confidence, "p_holm")
        if verdict == "open":
            said.append(f"{claim}: {measured}")
        elif verdict == "worse":
            said.append(f"That it takes synthetic images: the control “{control}” ({words}) was shown to do better "
                        f"than “{row['arm']}”; {measured}")  # fmt: skip
    return said


def _limits(data: ReportData, row: Any = None) -> list[str]:
    """What no interval here covers."""
    arms = data.arm_names if row is None else [row["arm"], row["against"]]
    repeated = data.repeated_by(arms)
    words = {"real subsets": "another choice of real training images", "generator seeds": "another generator"}
    fixed = [*(words[w] for w in words if w not in repeated), "another split"]
    said = []
    once = [a for a in arms if "training seeds" not in data.repeated_by([a])]
    if once and len(data.metrics):
        where = "an arm" if len(once) == len(arms) else f"of {quoted(once)}"
        said.append(f"What training again would give: there is one training seed {where}, and part of a difference "
                    "between single trainings is the luck of their initial weights and order.")  # fmt: skip
    if len(data.metrics):
        said.append(f"What {listed(fixed)} would give: "
                    + (f"only {listed([f'{n} {w}' for w, n in repeated.items()])} were tried, and " if repeated else "")
                    + "the intervals do not cover it.")  # fmt: skip
    said += _compute_words(data.arms)
    if len(data.test_sets) == 1:
        said.append("What images of other hospitals or devices would give: there is one test set.")
    return said


def _compute_words(arms: pd.DataFrame) -> list[str]:
    """The arms' optimizer steps, where they differ, and which arms stopped early."""
    least, most = arms["gradient_steps"].min(), arms["most_steps"].max()
    if pd.isna(least) or least == most:
        return []
    early = list(arms.loc[arms["gradient_steps"] < arms["step_budget"], "arm"])
    why = f"; early stopping ended {quoted(early)} before all steps were taken" if early else ""
    return [f"That the arms had equal compute: their optimizer steps range from {count(least)} to {count(most)}{why}."]
