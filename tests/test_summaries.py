"""From records to a summary, on records made by hand: what is counted, which way a gain points, what the data is."""

from types import SimpleNamespace

import pandas as pd
import pytest

from medcook import records, summaries
from medcook.records import Record
from medcook.summaries import Identity, build_summary

PATIENTS = ["a", "b", "c", "d", "e", "f"]


def recipe(**changes) -> SimpleNamespace:
    values = {
        "paper": "toy",
        "title": "Toy",
        "claim": "It helps.",
        "scales": {"full": SimpleNamespace(claim="")},
        "compare": ("method", "base"),
        "ablation": None,
        "replicate": "seed",
        "metric": "dice",
        "expect": "superior",
        "margin": 0.0,
        "published": {},
        "source": "",
        "cost": "seconds",
    }
    return SimpleNamespace(**values | changes)


def record(arm: str, number: int, shift: float = 0.0, missed: int = 0, **changes) -> Record:
    """A run whose Dice and HD95 are `shift` above those of the others; the first `missed` patients were missed."""
    frame = pd.DataFrame({"case_id": PATIENTS, "patient_id": PATIENTS, "structure": "heart", "unit": "mm"})
    frame["dice"] = [0.5 + 0.01 * k + shift for k in range(len(PATIENTS))]
    frame["hd95"] = frame["dice"] * 10
    frame["missed"] = [k < missed for k in range(len(PATIENTS))]
    frame["false_alarm"] = False
    fields = dict.fromkeys(("request", "key", "dataset", "dataset_hash", "split_hash", "date"), "x")
    fields |= dict.fromkeys(("task", "method", "budget", "history", "environment"), {})
    fields |= {"paper": "toy", "arm": arm, "profile": "full", "replicate": number, "seed": number, "data": "real"}
    fields |= {"rows": records.pack(frame), "rows_selected": None, "cost": {"seconds": 10.0}, "test_reads": None}
    return Record(**fields | changes)


def summary(method: list[Record], base: list[Record], **changes):
    runs = {"method": method, "base": base}
    return build_summary(recipe(**changes), "full", runs, dict.fromkeys(runs, Identity("s", {})))


def three(arm: str, **changes) -> list[Record]:
    return [record(arm, number, **changes) for number in range(3)]


def test_one_run_on_simulated_data_makes_the_evidence_simulated():
    method = three("method", shift=0.1)
    method[2] = record("method", 2, shift=0.1, data="simulated")
    assert summary(method, three("base")).data == "simulated"
    assert summary(three("method", shift=0.1), three("base")).data == "real"


def test_misses_are_counted_over_all_runs():
    found = summary(three("method", missed=2), three("base")).arms
    assert (found["method"].missed, found["method"].rows, found["base"].missed) == (6, 18, 0)


def test_the_cost_ratio_is_the_methods_over_the_baselines():
    slow = summary(three("method", cost={"seconds": 30.0}), three("base"))
    assert slow.comparison.cost_ratio == pytest.approx(3)


@pytest.mark.parametrize(("metric", "shift"), [("dice", 0.1), ("hd95", -0.1)])
def test_a_gain_points_the_way_of_the_metric(metric, shift):
    found = summary(three("method", shift=shift), three("base"), metric=metric)
    assert found.verdict == "supported" and found.comparison.effect == pytest.approx(
        shift * (10 if metric == "hd95" else 1)
    )
    assert summary(three("method", shift=-shift), three("base"), metric=metric).verdict == "not supported"


def test_readings_of_the_test_set_add_up():
    read = {"count": 4, "reason": "toy"}
    assert summary(three("method", test_reads=read), three("base")).test_reads == 12
    assert summary(three("method"), three("base")).test_reads == 0


def test_a_structure_without_a_defined_metric_is_left_out():
    rows = {"patient_id": list("abcd"), "structure": ["x", "x", "y", "y"], "score": [0.1, 0.9, 0.3, 0.4]}
    frame = pd.DataFrame(rows | {"outcome": [0.0, 1.0, 1.0, 1.0]})
    assert summaries._of_structures(frame, "auc") == {"x": 1.0}
    assert summaries._of_structures(frame, "score") == {"x": 0.5, "y": pytest.approx(0.35)}
