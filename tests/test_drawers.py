"""Evidence figures of recipes with a score of their own, from made-up rows."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from medcook import drawers, figures, statistics
from medcook.drawers import MEASURES, Panel, landmarks_figure, measures_figure

ARMS = ("baseline", "method")


def summary(paper: str, dataset: str = "embedded") -> SimpleNamespace:
    compared = SimpleNamespace(a="method", b="baseline")
    arms = dict.fromkeys(ARMS)
    return SimpleNamespace(paper=paper, title="Tiny", verdict="untold", dataset=dataset, arms=arms, comparison=compared)


def rows(columns, structures=("all",)) -> pd.DataFrame:
    rng, found = np.random.default_rng(0), []
    for arm in ARMS:
        for replicate in range(2):
            for number in range(6):
                for structure in structures:
                    identity = {"arm": arm, "replicate": replicate, "patient_id": f"p{number}", "structure": structure}
                    found.append(identity | {name: rng.random() for name in columns} | {"outcome": float(number % 2)})
    return pd.DataFrame(found)


def estimates(axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "s"]


def test_every_panel_shows_the_mean_of_its_measure():
    frame = rows(["dice", "uncertainty", "error"], ("left", "right"))
    panels = [Panel("dice", "Dice"), Panel("dice", "Dice, left", structure="left"), Panel("rank_correlation", "ranks")]
    figure = measures_figure(summary("tiny"), frame, panels)
    for axes, panel in zip(figure.axes, panels, strict=True):
        part = frame[frame["structure"] == "left"] if panel.structure else frame
        wanted = [statistics.interval(part[part["arm"] == name], panel.metric).mean for name in ARMS]
        assert estimates(axes) == pytest.approx(wanted)
    assert "Simulated data" in figure.texts[-1].get_text() or "Simulated" in str(figure._supxlabel.get_text())


def test_a_measure_that_an_arm_lacks_leaves_a_gap():
    frame = rows(["dice", "far"])
    frame.loc[frame["arm"] == "baseline", "far"] = np.nan
    figure = measures_figure(summary("tiny"), frame, [Panel("far", "far"), Panel("nowhere", "nowhere", less=True)])
    assert [len(estimates(axes)) for axes in figure.axes] == [1, 0]
    assert "less is better" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize("paper", MEASURES)
def test_each_recipe_is_drawn(paper):
    from medcook.recipes import find_recipe

    assert figures._DRAWERS[paper] is drawers._by_measures
    measured = {panel.metric for panel in MEASURES[paper]}
    metric = find_recipe(paper).metric
    assert metric in measured, "the judged measure is shown"


def test_landmarks_show_handing_over_and_damage():
    columns = ["error", "uncertainty", *(f"uncertainty_{level}" for level in range(4))]
    frame = rows([*columns, *(f"uncertainty_covered_{level}" for level in range(1, 4))])
    left, right = landmarks_figure(summary("chexmask-u"), frame).axes
    solid = [line for line in right.lines if line.get_linestyle() == "-"]
    for line, arm in zip(solid, ("method", "baseline"), strict=False):
        mine = frame[frame["arm"] == arm]
        noisy = [mine[f"uncertainty_{level}"].mean() / mine["uncertainty_0"].mean() for level in range(4)]
        assert line.get_ydata().tolist() == pytest.approx(noisy)
        beside = next(one for one in left.get_legend().legend_handles if one.get_label() == arm)
        assert line.get_color() == beside.get_color()  # an arm has one colour
    assert [text.get_text() for text in left.get_legend().get_texts()][:2] == ["method", "baseline"]


def test_fairness_figures_show_groups_views_and_probes():
    frame = rows(["dice"]).assign(group=lambda table: np.where(table["outcome"] == 1, "north", "south"))
    left, right = drawers.fairseg_figure(summary("fairseg"), frame).axes
    assert len(left.containers) == 4 and len(right.containers) == 4, "two groups, two formulas, of two arms"
    frame = rows(["score", "score_full", "score_without", "score_only"])
    left, right = drawers.masking_figure(summary("mask-of-truth"), frame).axes
    assert len(left.containers) == 2 and len(right.texts) == 6
    names = ["score", "age_score", "site_score", "finding_score", "drained_score"]
    outcomes = {f"{name}_outcome": lambda table: table["outcome"] for name in ("age", "site", "finding")}
    left, right = drawers.audit_figure(summary("cxr-clip-fairness"), rows(names).assign(**outcomes)).axes
    assert len(left.containers) == 6 and len(right.containers) == 4


def test_the_survey_has_a_line_a_target_and_a_mean_an_arm():
    parts = [
        rows(["box", "click_1"], ("left", "right")).assign(group="acdc"),
        rows(["box", "click_1"], ("cell",)).assign(group="bubil"),
    ]
    frame = pd.concat(parts)
    left, right = drawers.survey_figure(summary("sam4mis"), frame).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["left, acdc", "right, acdc", "cell, bubil"]
    for axes, column in ((left, "box"), (right, "click_1")):
        shown = [bar.lines[0].get_xdata() for bar in axes.containers]
        wanted = frame.groupby(["arm", "group", "structure"])[column].mean()
        assert np.concatenate(shown) == pytest.approx(wanted[list(ARMS)].to_numpy())
