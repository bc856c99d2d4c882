"""Figures and the widget of chapter 18."""

import ipywidgets
import numpy as np
import pandas as pd
import pytest

from medcook import statistics
from medcook import video_figures as figures
from medcook.data.manifests import load_manifest
from medcook.video_figures import Followed

MANIFEST = load_manifest("embedded")


@pytest.fixture
def shown():
    """A square that moves to the right, which `good` follows and `lost` loses after frame 4; it is gone in frame 9."""
    rng, truth = np.random.default_rng(0), np.zeros((10, 24, 24), bool)
    for number in range(9):
        truth[number, 8:14, 4 + number : 10 + number] = True
    lost = truth.copy()
    lost[5:] = False
    disturbed = np.arange(10) // 3 == 1
    return Followed(rng.normal(size=truth.shape), truth, {"good": truth, "lost, alas": lost}, disturbed)


def test_overlap_of_every_frame(shown):
    assert (figures.overlaps(shown.truth, shown.truth) == 1).all()
    assert figures.overlaps(shown.answers["lost, alas"], shown.truth).tolist() == [1] * 5 + [0] * 4 + [1]
    moved = np.roll(shown.truth, 3, 2)
    assert figures.overlaps(moved, shown.truth)[0] == pytest.approx(1 / 3)


def test_a_strip_has_a_row_for_everybody(shown):
    figure = figures.strip_figure(shown, [0, 4, 7, 9], MANIFEST)
    grid = np.array(figure.axes).reshape(2, 4)
    assert [axes.get_title() for axes in grid[0]] == ["frame 0", "frame 4 *", "frame 7", "frame 9"]
    assert [axes.get_title() for axes in grid[1]] == [""] * 4
    assert [row[0].texts[0].get_text() for row in grid] == ["good", "lost,\nalas"]
    for row, found in zip(grid, shown.answers.values(), strict=True):
        for axes, number in zip(row, [0, 4, 7, 9], strict=True):
            assert np.array_equal(axes.images[0].get_array(), shown.frames[number])
            assert np.array_equal(axes.images[1].get_array()[..., 3] > 0, found[number])
            assert bool(axes.collections) == (number != 9)  # the outline of the truth
    assert "Simulated" in figure.get_supxlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["truth", "found", "* disturbed"]
    assert len(figures.strip_figure(shown, [0, 9], MANIFEST).legends[0].get_texts()) == 2


def test_overlaps_over_time_have_a_line_each_and_their_mean(shown):
    figure = figures.overlap_figure(shown, MANIFEST, marks={"lost, alas": 2})
    (axes,) = figure.axes
    good, lost, mark = axes.lines
    assert good.get_ydata().tolist() == [1] * 10 and lost.get_ydata()[6] == 0
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (2, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["good: 1.00", "lost, alas: 0.60"]


def test_disturbed_frames_are_shaded(shown):
    (axes,) = figures.overlap_figure(shown, MANIFEST).axes
    spans = [patch for patch in axes.patches if patch.get_facecolor()[:3] == (0.88,) * 3]
    assert [(span.get_x(), span.get_x() + span.get_width()) for span in spans] == [(2.5, 5.5)]


def test_ribbons_show_stages_and_how_many_are_right():
    truth = np.array([0, 1, 1, 2, 3, 3, 0, 0])
    answers = {"mine": np.array([0, 1, 1, 2, 3, 0, 0, 0])}
    stages = {0: "outside", 1: "insertion", 2: "far end", 3: "something"}
    figure = figures.ribbon_figure(truth, answers, stages, np.arange(8), truth == 2, MANIFEST)
    path, true, mine = figure.axes
    assert path.lines[0].get_ydata().tolist() == list(range(8))
    assert [axes.images[0].get_array()[0].tolist() for axes in (true, mine)] == [
        truth.tolist(),
        answers["mine"].tolist(),
    ]
    assert (true.get_ylabel(), mine.get_ylabel()) == ("truth", "mine 88%")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(stages.values())
    colours = true.images[0].cmap(true.images[0].norm(np.arange(4)))
    assert len({tuple(shade) for shade in colours}) == 4


def test_severity_costs_are_means_with_their_intervals():
    rng = np.random.default_rng(0)
    rows = [
        {"arm": arm, "patient_id": f"p{k}", "replicate": r, "clean": 0.8, "hard": 0.5 + 0.1 * rng.random()}
        for arm in ("a", "b")
        for k in range(6)
        for r in range(2)
    ]
    frame, columns = pd.DataFrame(rows), {0: "clean", 5: "hard"}
    (axes,) = figures.severity_figure(frame, {"one": ("a", columns), "other": ("b", columns)}, "embedded").axes
    wanted = statistics.interval(frame[frame["arm"] == "b"], "hard")
    line, _, (bars,) = axes.containers[1].lines
    assert line.get_ydata().tolist() == pytest.approx([0.8, wanted.mean])
    assert bars.get_segments()[1][:, 1].tolist() == pytest.approx([wanted.low, wanted.high])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]
    assert axes.get_xticks().tolist() == [0, 5]


def test_the_widget_draws_what_the_sliders_say(shown, monkeypatch):
    asked, plain = [], figures.frame_view
    monkeypatch.setattr(figures, "frame_view", lambda *given: asked.append(given[1:3]) or plain(*given))
    box = figures.flight_explorer({"one": shown, "two": shown}, MANIFEST)
    (which, who, number), picture = box.children[0].children, box.children[1]
    assert asked == [("good", 2)] and isinstance(picture, ipywidgets.Image) and number.max == 9
    before = picture.value
    who.value, number.value = "lost, alas", 7
    assert asked[-1] == ("lost, alas", 7) and picture.value != before and which.options == ("one", "two")


def test_a_view_tells_the_overlap_of_its_frame(shown):
    left, right = figures.frame_view(shown, "lost, alas", 6, MANIFEST).axes
    assert left.get_title() == "frame 6: Jaccard index 0.00" and right.get_title() == "lost, alas"
    assert right.lines[1].get_xdata() == [6, 6]
