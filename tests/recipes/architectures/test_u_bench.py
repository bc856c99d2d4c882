"""U-Bench: what the score rewards, whom the test tells apart, what the advisor advises."""

import numpy as np
import pandas as pd
import pytest
from tiny import BUDGET

from medcook import statistics
from medcook.evaluation import score_case
from medcook.networks import parameters
from medcook.recipes.architectures import u_bench
from medcook.recipes.architectures._settings import BASELINE
from medcook.tasks import Task
from medcook.training import fit


def test_a_cost_is_placed_between_the_percentiles():
    pool = np.logspace(0, 10, 11)
    assert u_bench.placed(10.0, pool) == pytest.approx(1) and u_bench.placed(1e9, pool) == pytest.approx(0)
    assert u_bench.placed(1e5, pool) == pytest.approx(0.5)
    assert u_bench.placed(0.1, pool) == 1 and u_bench.placed(1e12, pool) == 0


def test_the_score_is_the_harmonic_mean():
    assert u_bench.u_score(0.8, 0.8) == pytest.approx(0.8)
    assert u_bench.u_score(0.5, 1.0) == pytest.approx(2 / 3)
    assert u_bench.u_score(0.9, 0.0) == u_bench.u_score(0.0, 0.0) == 0
    assert u_bench.u_score(0.8, 0.3) > u_bench.u_score(0.8, 0.2) and u_bench.u_score(0.9, 0.3) > u_bench.u_score(
        0.8, 0.3
    )


def test_a_lighter_network_is_more_efficient():
    table = u_bench.costs()
    light, heavy = (u_bench.efficiency(*table.loc[name, list(u_bench.COSTS)]) for name in ("mk-unet", "is-net"))
    assert 0 <= heavy < light <= 1


def test_costs_are_those_of_the_variants():
    table = u_bench.costs()
    assert list(table.index) == list(u_bench.VARIANTS) and len(table) >= 10
    assert table.loc["unet", "parameters"] == parameters(BASELINE.build(1, 4, 2)["model"])


def test_every_row_has_the_score_of_its_own_iou():
    task = Task("embedded", labelled=2)
    fitted = fit(BASELINE, task, BUDGET, cache=False, progress=False)
    case = next(iter(task.cases("val")))
    rows, plain = u_bench.score(fitted, case), score_case(fitted.predict(case), case, task.structures)
    for row, wanted in zip(rows, plain, strict=True):
        assert row["dice"] == wanted["dice"] and row["iou"] == wanted["iou"]
        assert row["u_score"] == pytest.approx(u_bench.u_score(wanted["iou"], row["efficiency"]))
    assert rows[0]["efficiency"] == u_bench.efficiency(*u_bench.costs().loc["unet", list(u_bench.COSTS)])


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"arm": arm, "replicate": fold, "case_id": f"{fold}-{k}", "patient_id": f"{fold}-{k}", "structure": "heart"}
        | {"dice": 0.8 + gain + 0.02 * rng.normal()}
        for arm, gain in (("unet", 0.0), ("better", 0.05), ("same", 0.0))
        for fold in range(3)
        for k in range(10)
    ]
    return pd.DataFrame(rows)


@pytest.mark.component("significance")
def test_variants_are_tested_against_the_u_net_together(frame):
    table = u_bench.significance(frame)
    arms = dict(list(frame.groupby("arm")))
    found = statistics.difference(arms["better"], arms["unet"])
    assert list(table.index) == ["better", "same"]
    assert table.loc["better", ["gain", "low", "high", "p"]].tolist() == [found.effect, found.low, found.high, found.p]
    np.testing.assert_allclose(table["holm"], statistics.holm(table["p"].to_numpy()))
    assert table.loc["better", "holm"] < 0.05 < table.loc["same", "holm"]


def test_the_advisor_keeps_to_the_limits():
    table = pd.DataFrame({"u_score": [0.9, 0.7, 0.8], "parameters": [3e5, 1e5, 2e5]}, index=["a", "b", "c"])
    assert u_bench.advise(table) == "a"
    assert u_bench.advise(table, parameters=2.5e5) == "c"
    assert u_bench.advise(table, parameters=1.5e5) == "b"
