"""From predictions to a table: one row per case and structure. The only place that opens the test set."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from medcook import metrics, statistics
from medcook.data.case import Case
from medcook.data.splits import open_test
from medcook.errors import MedcookError

Predict = Callable[[Case], np.ndarray]
"""Case -> (*spatial) uint8 label map on the case's own grid."""

Score = Callable[[object, Case], list[dict]]
"""(What a recipe scores, mostly a `Fitted`; Case) -> rows for the table, made with `row`; none to leave a case out."""

MEASURES = ("dice", "iou", "hd95", "assd", "volume_difference", "volume_ratio")


def score_case(prediction: np.ndarray, case: Case, structures: Mapping[int, str]) -> list[dict]:
    """One row per annotated structure: case_id, patient_id, structure and every field of `metrics.Score`.

    prediction  (*spatial) label map on the grid of `case.label`
    structures  {label value: name}; values missing from `case.attributes["annotated"]` (where it is there) are skipped
    """
    if prediction.shape != case.label.shape:
        raise MedcookError(
            f"{case.case_id}: the prediction has shape {prediction.shape}, the label {case.label.shape}.",
            "A predictor returns a label map on the case's own grid.",
        )
    annotated = case.attributes.get("annotated", structures)
    prediction, label = metrics.without_ignored(prediction, case.label)
    rows = []
    for value, name in structures.items():
        if value in annotated:
            found = metrics.score(prediction == value, label == value, case.spacing)
            rows.append({"case_id": case.case_id, "patient_id": case.patient_id, "structure": name, **asdict(found)})
    return rows


def evaluate(predict: Predict, dataset, patients: Iterable[str]) -> pd.DataFrame:
    """Score one predictor on all cases of the given patients (never test patients: the data set refuses them)."""
    return evaluate_many({"predictor": predict}, dataset, patients)["predictor"]


def evaluate_many(
    predictors: Mapping[str, Predict], dataset, patients: Iterable[str], score: Score | None = None
) -> dict[str, pd.DataFrame]:
    """Score several predictors while reading every case once: {name: table}.

    score  what makes rows of (predictor, case) where it is not `score_case`; the predictor is then handed over as it is
    """
    rows: dict[str, list[dict]] = {name: [] for name in predictors}
    structures = dataset.manifest.structures
    for case in dataset.cases(patients):
        for name, predict in predictors.items():
            rows[name] += score(predict, case) if score else score_case(predict(case), case, structures)
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def row(case: Case, structure: str, **values) -> dict:
    """A row of an own score: what every table needs, nothing missed unless said, and the given values."""
    identity = {"case_id": case.case_id, "patient_id": case.patient_id, "structure": structure}
    return identity | {"missed": False, "false_alarm": False} | values


def evaluate_test(predict: Predict, dataset, reason: str) -> pd.DataFrame:
    """Score a finished predictor on the test patients; `.attrs["reads"]` holds the count of reads and the reason."""
    return evaluate_test_many({"predictor": predict}, dataset, reason)["predictor"]


def evaluate_test_many(
    predictors: Mapping[str, Predict], dataset, reason: str, score: Score | None = None
) -> dict[str, pd.DataFrame]:
    """Score several finished predictors on the test patients, each case read (and logged) once."""
    with open_test(reason) as log:
        before = len(log)
        tables = evaluate_many(predictors, dataset, dataset.split.test, score)
        count = len(log) - before
    for table in tables.values():
        table.attrs["reads"] = {"count": count, "reason": reason}
    return tables


def summary(frame: pd.DataFrame, metric: str = "dice") -> pd.DataFrame:
    """One line per structure and one for all: mean of `metric` with its 95% interval, misses, false alarms, n."""
    groups = [("all", frame), *frame.groupby("structure", sort=False)]
    return pd.DataFrame([_summary_line(name, rows, metric) for name, rows in groups]).set_index("structure")


def _summary_line(name: str, rows: pd.DataFrame, metric: str) -> dict:
    estimate = statistics.interval(rows, metric)
    return {
        "structure": name,
        metric: estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "missed": int(rows.missed.sum()),
        "false_alarms": int(rows.false_alarm.sum()),
        "patients": estimate.n_patients,
        "n": len(rows),
    }
