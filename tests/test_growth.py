"""What benchmarks/growth.py reports of its measurements, and where it puts it."""

import pytest

from benchmarks.growth import BEGIN, END, PARTS, Grown, added, cost_of, ratios, report
from benchmarks.marks import between_marks
from medcook.data import open_dataset
from medcook.errors import MedcookError


def row(patients: int) -> dict:
    prepared = {
        "seconds": patients / 10,
        "peak_mb": 500 + 0.75 * patients,
        "tensors_mb": 0.5 * patients,
        "step_ms": 9.0,
    }
    evaluated = {"seconds": patients / 5, "peak_mb": 520.0}
    costs = {"preparing": prepared, "evaluating": evaluated}
    first = {"preparing": {"seconds": 4, "peak_mb": 530}, "evaluating": {"seconds": 8, "peak_mb": 520}}
    found = {part: ratios(costs[part], first[part]) for part in PARTS}
    return {"times": patients // 40, "patients": patients, **costs, "ratios": found}


ROWS = [row(40), row(160), row(640)]


def test_a_grown_cohort_begins_like_the_committed_one():
    grown, committed = Grown(160), open_dataset("embedded")
    assert len(grown.split.train) == len(set(grown.patients)) == 160
    case = committed.split.train[0]
    assert (grown.load(case).image == committed.load(case).image).all()
    assert grown.load("brain160").patient_id == "brain160"


def test_ratios_and_what_a_patient_adds():
    assert ROWS[2]["ratios"]["preparing"] == {"seconds": 16.0, "peak_mb": 1.85}
    assert added(ROWS, "preparing", "peak_mb") == 0.75 and added(ROWS, "preparing", "tensors_mb") == 0.5
    assert added(ROWS, "evaluating", "peak_mb") == 0


def test_the_report_shows_a_line_a_size():
    said = report({"machine": {"cores": 2, "cpu": "some", "load_before": 0.1}, "rows": ROWS})
    assert "| 640 | 16 | 64.0 | 16.0 | 980 | 128.0 | 16.0 | 520 | 9.0 |" in said
    assert "A further patient adds 0.75 MB to preparing" in said and "and 0.00 MB\nto evaluating" in said


def test_the_report_goes_between_its_marks():
    text = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert between_marks(text, "new\n", BEGIN, END) == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"


@pytest.mark.parametrize("text", ["no marks", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_missing_marks_are_named(text):
    with pytest.raises(MedcookError, match="lacks the marks") as raised:
        between_marks(text, "new", BEGIN, END)
    assert BEGIN in str(raised.value) and END in str(raised.value)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_measured(part, monkeypatch):
    monkeypatch.setattr("benchmarks.growth.STEPS", 1)
    cost = cost_of(part, 2)
    assert cost["seconds"] > 0 and cost["wall"] > 0 and cost["peak_mb"] > 50
