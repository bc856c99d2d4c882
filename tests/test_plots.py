"""Figures show the slice, the place and the answers that they say they show."""

from types import SimpleNamespace

import numpy as np
import pytest

from medcook import plots
from medcook.data.manifests import load_manifest

RNG = np.random.default_rng(0)


@pytest.fixture
def case():
    """Four slices of noise with a square in each."""
    label = np.zeros((4, 64, 64), np.uint8)
    label[:, 20:30, 24:34] = 1
    return SimpleNamespace(case_id="one", image=RNG.normal(size=(1, 4, 64, 64)).astype(np.float32), label=label)


def test_methods_are_compared_where_they_disagree_most_with_the_label_together(case):
    first, second = case.label.copy(), case.label.copy()
    first[1, 20:25] = 0
    first[2, 20:23] = second[2, 20:23] = 0
    figure = plots.compare_methods(case, {"first": first, "second": second}, load_manifest("acdc"))
    window = plots.around(case.label[2])
    shown = figure.axes
    assert [axes.get_title() for axes in shown] == ["reference", "first", "second"]
    for axes in shown:
        assert np.array_equal(axes.images[0].get_array(), case.image[0, 2][window])


def test_the_window_is_square_and_holds_all_structures_with_a_margin():
    label = np.zeros((100, 120), np.uint8)
    label[40:50, 30:60] = 2
    rows, columns = plots.around(label, margin=10)
    assert rows.stop - rows.start == columns.stop - columns.start == 48
    assert rows.start <= 30 and rows.stop >= 60 and columns.start <= 21 and columns.stop >= 68
    assert plots.around(np.zeros((9, 9), np.uint8)) == (slice(None), slice(None))


def test_learning_curves_have_one_panel_where_nobody_was_held_out():
    run = {"loss": [3.0, 2.0, 1.0], "val_step": [], "val_dice": []}
    alone = plots.learning_curves({"a": [run], "b": [run]})
    both = plots.learning_curves({"a": [run | {"val_step": [2, 3], "val_dice": [0.1, 0.4]}]})
    assert [axes.get_ylabel() for axes in alone.axes] == ["training loss"]
    assert [axes.get_ylabel() for axes in both.axes] == ["training loss", "Dice, held-out patients"]
    assert both.axes[1].get_lines()[0].get_ydata().tolist() == [0.1, 0.4]
    assert [text.get_text() for text in alone.axes[0].get_legend().get_texts()] == ["a", "b"]
