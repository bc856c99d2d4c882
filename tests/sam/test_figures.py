"""Chapter 03's figures show what they are given: every set and structure, every arm with its cost."""

import numpy as np
import pytest
from sam.test_card import FRAME

from medcook.evidence import load_summary
from medcook.sam.card import OURS
from medcook.sam.figures import cost_figure, cost_table, zero_shot_figure


def test_every_structure_is_a_line_and_every_method_a_marker():
    figure = zero_shot_figure(FRAME.replace({"dataset": {"one": "acdc", "two": "bubil"}}), ("box", "5 clicks"))
    left, right = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["box", "5 clicks"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["b, acdc", "c, bubil", "a, acdc"], "worst first"
    ours = {line.get_label(): line for line in right.lines}[OURS]
    assert ours.get_xdata() == pytest.approx([0.7, 0.8, 0.9], abs=0.02)
    assert len(left.lines) == 4


@pytest.fixture(scope="module")
def summary():
    return load_summary("curvas", "full")


def test_the_table_tells_what_each_arm_trains(summary):
    table = cost_table(summary)
    assert list(table.index) == [("curvas", name) for name in summary.arms]
    arm = summary.arms["softmax"]
    assert table.loc[("curvas", "softmax"), "parameters trained"] == f"{arm.cost['parameters']:,.0f}"
    assert f"{arm.mean:.3f}" in table.loc[("curvas", "softmax"), summary.metric]


def test_the_figure_has_a_point_an_arm(summary):
    axes = cost_figure(summary).axes[0]
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    wanted = [(arm.cost["parameters"], arm.mean) for arm in summary.arms.values()]
    assert np.allclose(points, wanted)
    assert axes.get_xscale() == "log"
