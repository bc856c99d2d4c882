"""Figures and the widget of chapter 17."""

import ipywidgets
import numpy as np
import pytest
from matplotlib.colors import to_hex

from medcook import instance_figures as figures
from medcook import plots
from medcook.data.manifests import load_manifest
from medcook.instance_figures import Counted, Election

MANIFEST = load_manifest("embedded")


@pytest.fixture
def light() -> np.ndarray:
    return np.linspace(0, 1, 3 * 30 * 40).reshape(3, 30, 40)


@pytest.fixture
def sections() -> np.ndarray:
    """Two sections, numbers 3 and 7, one of them at the border."""
    found = np.zeros((30, 40), int)
    found[0:10, 5:16], found[15:26, 20:31] = 3, 7
    return found


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_instances_are_outlined_in_colours_of_their_own_and_numbered(light, sections):
    figure, axes = plots.panels(size=(3, 3))
    figures.show_light(axes, light)
    figures.outline(axes, sections)
    assert texts(axes) == ["1", "2"]
    assert [text.get_position() for text in axes.texts] == [(10.0, 4.5), (25.0, 20.0)]
    lines = axes.collections
    assert [to_hex(line.get_edgecolor()[0]).upper() for line in lines] == list(plots.PALETTE[:2])
    boxes = [np.vstack([path.vertices for path in line.get_paths()]) for line in lines]
    assert boxes[0].min(0).tolist() == [4.5, -0.5] and boxes[0].max(0).tolist() == [15.5, 9.5]
    assert axes.get_xlim() == (-0.5, 39.5) and axes.get_ylim() == (29.5, -0.5)
    figures.outline(axes, sections, "black")
    assert to_hex(axes.collections[-1].get_edgecolor()[0]) == "#000000"
    assert np.abs(np.asarray(axes.images[0].get_array())[3, 5] - light[:, 3, 5]).max() < 0.02


def test_titles_tell_who_counts_right(light, sections):
    shown = [Counted(light, sections, {"parts": (sections > 0) * 1, "votes": sections})] * 3
    for across in (False, True):
        figure = figures.counted_figure(shown, MANIFEST, across)
        grid = np.array(figure.axes).reshape((3, 3))
        for panels in grid if across else grid.T:
            assert [axes.get_title() for axes in panels] == ["truth: 2", "parts: 1 (-1)", "votes: 2"]
    assert texts(figure.axes[1]) == ["1"]
    assert figure.get_supxlabel().startswith(figures.COMPOSED) and "Simulated" in figure.get_supxlabel()
    assert figures.count(sections) == 2 and figures.count(0 * sections) == 0


def test_votes_are_lines_from_pixels_and_peaks_are_marked(light, sections):
    pixels = np.argwhere(sections > 0)
    votes, counts = pixels + [2.0, -1.0], np.zeros((8, 8))
    counts[2, 5] = 9.0
    election = Election(votes, counts, np.array([[2, 5], [6, 1]]), sections)
    figure = figures.votes_figure(light, election, MANIFEST)
    left, middle, right, _ = figure.axes
    lines = [line for line in left.lines if len(line.get_xdata()) == 2]
    assert len(lines) == figures.SHOWN
    for line in lines:
        (column, across), (row, up) = line.get_data()
        assert sections[int(row), int(column)] > 0 and (up - row, across - column) == (2, -1)
    assert middle.images[0].get_array()[2, 5] == 3 and middle.get_title() == "votes in bins: 2 peaks"
    assert [list(part) for part in middle.lines[0].get_data()] == [[5, 1], [2, 6]]
    assert texts(right) == ["1", "2"]


def test_segments_are_coloured_by_class_and_outlined_by_instance(light, sections):
    kinds = np.where(sections > 0, 1, 0)
    kinds[0:10, 5:8] = 2
    figure = figures.segments_figure(
        light, {"truth": (kinds, sections), "none": (0 * kinds, 0 * kinds)}, {1: "wall", 2: "cavity"}, MANIFEST
    )
    first, truth, none = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["slide", "truth", "none"]
    assert not first.texts and texts(truth) == ["1", "2"] and not none.texts
    fills = truth.images[1:]
    assert [int((~np.ma.getmaskarray(fill.get_array())).sum()) for fill in fills] == [201, 30]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "cavity"]


def test_the_widget_asks_everyone_again_when_a_slider_moves(light, sections):
    asked = []

    def arrange(gap, near):
        asked.append((gap, near))
        return light * (1 - gap / 20), sections

    box = figures.gap_explorer(arrange, {"nobody": lambda seen: 0 * sections}, MANIFEST)
    (gap, near), picture = box.children[0].children, box.children[1]
    assert asked == [(0, 4)] and isinstance(picture, ipywidgets.Image)
    before = picture.value
    gap.value = 6
    assert asked[-1] == (6, 4) and picture.value != before
    near.value = -2
    assert asked[-1] == (6, -2)
