"""Figures and the widget of chapter 19."""

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch

from medcook import findings_figures as figures
from medcook import widgets
from medcook.data.manifests import load_manifest
from medcook.findings_figures import Diagnosed

MANIFEST = load_manifest("embedded")


@pytest.fixture
def spot():
    """(image, mask): a bright square whose middle is at row 30.5, column 9.5."""
    mask = np.zeros((40, 40), bool)
    mask[29:33, 8:12] = True
    return mask * 2.0 + np.linspace(0, 1, 40), mask


def test_a_square_is_cut_around_the_mask_and_stays_inside(spot):
    image, mask = spot
    assert np.array_equal(figures.cut_around(image, mask, 8), image[26:34, 6:14])
    assert np.array_equal(figures.cut_around(image, mask, 24), image[16:40, 0:24])
    assert np.array_equal(figures.cut_around(image, mask & False, 8), image[16:24, 16:24])
    assert figures.cut_around(image, mask, 64).shape == (40, 40)


def test_bars_are_as_long_as_probabilities(spot):
    shown = [Diagnosed(*spot, "benign", {"a": 0.2, "b": 0.9}), Diagnosed(*spot, "malignant", {"a": 0.7, "b": 1.0})]
    figure = figures.diagnosed_figure(shown, MANIFEST)
    axes = np.array(figure.axes).reshape(3, 2)
    assert [[bar.get_width() for bar in panel.patches] for panel in axes[2]] == [[0.2, 0.9], [0.7, 1.0]]
    assert [panel.get_title() for panel in axes[0]] == ["benign", "malignant"]
    assert [text.get_text() for text in axes[2, 0].get_yticklabels()] == ["a", "b"]
    assert axes[1, 0].images[0].get_array().shape == (32, 32)
    assert "Simulated" in figure.get_supxlabel()


def test_the_curve_of_a_perfect_score_goes_through_the_corner():
    outcome = np.array([0, 0, 1, 1])
    frames = {
        "perfect": pd.DataFrame({"score": [0.1, 0.2, 0.8, 0.9], "outcome": outcome}),
        "guess": pd.DataFrame({"score": [0.5] * 4, "outcome": outcome}),
    }
    (axes,) = figures.roc_figure(frames, "embedded").axes
    _, perfect, guess = axes.lines
    assert (0.0, 1.0) in set(zip(*perfect.get_data(), strict=True))
    assert list(guess.get_xdata()) == list(guess.get_ydata()) == [0, 1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["perfect: 1.00", "guess: 0.50"]


def test_each_question_has_a_line_with_the_mean_of_every_arm():
    rows = [("b", "x", 0.5), ("b", "x", 0.7), ("a", "x", 0.1), ("b", "y", -1.0), ("a", "y", 0.3)]
    frame = pd.DataFrame(rows, columns=["structure", "arm", "skill"])
    (axes,) = figures.questions_figure(frame, "skill", "skill", "embedded").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "a"]
    drawn = {line.get_label(): line.get_xdata().tolist() for line in axes.lines if line.get_linestyle() == "None"}
    assert drawn == {"x": pytest.approx([0.6, 0.1]), "y": pytest.approx([-1.0, 0.3])}
    low, high = axes.get_ylim()
    assert low > high, "the first question is on top"


def test_maps_lie_over_their_images(spot):
    image, mask = spot
    figure = figures.maps_figure({"one": [(image, mask * 1.0, mask)] * 2, "two": [(image, mask * 0.5, mask)]}, MANIFEST)
    first, second, third, empty = figure.axes[:4]
    assert all(len(axes.images) == 2 for axes in (first, second, third)) and not empty.images
    assert float(third.images[1].get_array().max()) == 0.5 and not empty.axison
    assert {text.get_text() for axes in (first, third) for text in axes.texts} == {"one", "two"}


def test_the_widget_draws_what_the_sliders_say():
    asked = []

    def paint(number, degree, radius):
        asked.append((number, degree, radius))
        label = torch.zeros(40, 40, dtype=torch.uint8)
        label[10:20, 10:20] = 1
        return torch.rand(1, 40, 40), label

    scores = {"half": lambda images, labels: torch.full((len(images),), 0.5)}
    box = widgets.nodule_explorer(scores, paint, 3, MANIFEST)
    (number, degree, radius), picture = box.children[0].children, box.children[1]
    assert asked == [(0, 0.5, 4.5)] and isinstance(picture, ipywidgets.Image)
    before = picture.value
    degree.value, number.value = 1.0, 2
    assert asked[-1] == (2, 1.0, 4.5) and picture.value != before
    radius.value = 6.0
    assert asked[-1] == (2, 1.0, 6.0) and number.max == 2
