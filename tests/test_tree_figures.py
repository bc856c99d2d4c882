"""What chapter 16 looks at in trees: pictures that show what they are given."""

import numpy as np
import pytest

from medcook import tree_figures
from medcook.data.manifests import load_manifest
from medcook.recipes.anatomy import _trees
from medcook.recipes.anatomy._centrelines import parsed
from medcook.recipes.anatomy._stenoses import Found, stenoses_of
from medcook.recipes.anatomy._trees import Branch

MANIFEST = load_manifest("embedded")
SIZE = (64, 64)


def tube(start, end, radius: float = 4.0, parent: int = -1) -> Branch:
    points = np.linspace(start, end, 100)
    return Branch(points, np.full(100, radius), parent)


def stenosed() -> Branch:
    return _trees.narrowed(tube((20, 5), (20, 58)), 50, 0.6, width=3.0)


def test_a_stenosis_is_drawn_where_it_was_found_with_the_diameter_along_its_branch():
    truth = (stenosed(), tube((50, 5), (50, 58), 2.0))
    tree = parsed(_trees.rendered(truth, SIZE).mask)
    found = stenoses_of(tree)
    figure = tree_figures.diameters_figure(np.zeros(SIZE), tree, found, truth, MANIFEST)
    picture, curve = figure.axes
    assert "drawn" in picture.get_title() and "Simulated" in figure.get_supxlabel()
    marks = [line.get_xydata()[0] for line in picture.lines if line.get_marker() == "o"]
    assert len(marks) == len(found) == 1 and marks[0] == pytest.approx(found[0].place[::-1])
    measured, true = curve.lines[:2]
    assert measured.get_ydata()[20:-20].min() == pytest.approx(2 * 4 * 0.4, abs=0.6)
    assert true.get_ydata().min() == pytest.approx(3.2, abs=0.1) and true.get_ydata().max() == pytest.approx(8)
    assert f"{found[0].degree:.0%} is gone" in [text.get_text() for text in curve.texts]
    assert [text.get_text() for text in curve.get_legend().get_texts()] == ["measured", "true"]


def test_without_a_stenosis_the_longest_branch_is_shown():
    tree = (tube((20, 5), (20, 30)), tube((50, 5), (50, 58), 2.0))
    figure = tree_figures.diameters_figure(np.zeros(SIZE), tree, [], (), MANIFEST)
    assert len(figure.axes) == 2
    assert figure.axes[1].lines[0].get_xdata()[-1] == pytest.approx(53)
    assert np.isnan(figure.axes[1].lines[1].get_ydata()).all(), "nothing is known to be true"


def test_branches_with_stenoses_are_shown_once_the_deepest_first():
    one = _trees.narrowed(_trees.narrowed(tube((20, 5), (20, 58)), 20, 0.4, 1.0), 80, 0.5, 1.0)
    other = _trees.narrowed(tube((50, 5), (50, 58)), 50, 0.7, 1.0)
    chosen = tree_figures.of_interest((one, other), (one, other), 3)
    assert chosen == [other, one] and tree_figures.of_interest((one, other), (one, other), 1) == [other]
    assert tree_figures.of_interest((), (one,), 3) == []


def test_centre_lines_have_edges_at_their_radius():
    figure = tree_figures.diameters_figure(np.zeros(SIZE), (tube((20, 5), (20, 58)),), [], (), MANIFEST)
    rows = sorted({round(line.get_ydata()[10]) for line in figure.axes[0].lines})
    assert rows == [16, 20, 24]


def test_a_stenosis_of_another_branch_is_not_marked_on_this_one():
    branch, other = stenosed(), tube((50, 5), (50, 58))
    found = [Found(other.points[30], 0.5)]
    figure = tree_figures.diameters_figure(np.zeros(SIZE), (branch, other), found, (branch,), MANIFEST)
    assert not figure.axes[1].texts and len(figure.axes) == 2


def test_branches_have_the_colour_of_their_lobe_and_their_name():
    trees = {"one": (tube((5, 5), (30, 30)), tube((30, 30), (60, 60), 1.0, 0)), "two": (tube((5, 5), (9, 9)),)}
    lobes = {4.0: 0, 1.0: 2}
    name = lambda branch: "RB1" if branch.parent >= 0 else ""  # noqa: E731
    figure = tree_figures.names_figure(
        np.zeros(SIZE), trees, lambda branch: lobes[branch.radius[0]], name, ("upper", "lower"), MANIFEST
    )
    picture, one, two = figure.axes
    assert "drawn" in picture.get_title() and [one.get_title(), two.get_title()] == ["one", "two"]
    assert [line.get_color() for line in one.lines] == ["0.5", tree_figures.plots.colour(1)]
    assert one.lines[0].get_linewidth() > one.lines[1].get_linewidth()
    assert [text.get_text() for text in one.texts] == ["RB1"] and not two.texts
    assert one.texts[0].get_position() == (60, 60)
    assert one.get_xlim() == two.get_xlim() == (1, 64) and one.get_ylim() == (64, 1), "one frame, rows downwards"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["upper", "lower"]
