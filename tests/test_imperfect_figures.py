"""What chapter 12 looks at: whom a network believes, how good labels are, and pictures that can be drawn."""

import ipywidgets
import numpy as np
import pytest
import torch

from medcook import imperfect_figures, widgets
from medcook.data import IGNORE
from medcook.data.manifests import load_manifest
from medcook.imperfect import NoisyTask, PartlyLabelled
from medcook.tasks import Budget, Task
from medcook.training import fit

MANIFEST = load_manifest("embedded")


def test_of_wrong_pixels_some_are_seen_through_some_believed():
    truth, given = np.zeros((1, 10), int), np.zeros((1, 10), int)
    given[0, :4] = 1
    given[0, 9] = IGNORE
    answer = np.array([[0, 1, 1, 2, 5, 5, 5, 5, 5, 5]])
    assert list(imperfect_figures.believed(answer, truth, given).values()) == pytest.approx([0.25, 0.5, 0.25])
    nothing = imperfect_figures.believed(answer, truth, truth)
    assert all(np.isnan(share) for share in nothing.values())


def test_the_quality_of_labels_is_their_mean_dice():
    truth = np.array([[[0, 1, 1, 2, 2, 2]]])
    given = np.array([[[0, 0, 1, 2, 2, 2]]])
    assert imperfect_figures.label_quality(given, truth, 3) == pytest.approx((2 / 3 + 1) / 2)


def test_the_fullest_label_has_all_structures_first_then_size():
    labels = torch.zeros(4, 8, 8, dtype=torch.uint8)
    labels[0] = 1
    labels[1, 0, :2] = torch.tensor([1, 2])
    labels[2, :2, :2] = torch.tensor([1, 2])
    labels[3] = IGNORE
    assert imperfect_figures.fullest(labels) == 2


def test_beliefs_are_measured_on_training_images_of_a_trained_network():
    task, budget = NoisyTask("embedded", kind="regions", amount=0.2), Budget(steps=2, batch=2, checks=0)
    one = fit(PartlyLabelled(), task, budget, cache=False, progress=False)
    truth, given = Task("embedded").samples("labelled"), task.samples("labelled")
    some = slice(0, 20)
    arrays = truth.images[some], truth.labels[some], given.labels[some]
    table = imperfect_figures.beliefs_table({"short": one}, *arrays)
    assert table.loc["short", list(imperfect_figures.BELIEFS)].sum() == pytest.approx(1)
    answer = imperfect_figures.answers_on(one, arrays[0])
    wrong = (arrays[1] != arrays[2]).numpy()
    assert table.loc["short", "the mistake"] == pytest.approx((answer == arrays[2].numpy())[wrong].mean())
    figure = imperfect_figures.beliefs_figure(table, "embedded")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(table.iloc[0, :3].tolist())


def test_kinds_of_annotation_are_drawn_with_gaps_as_gaps():
    image, whole = np.random.default_rng(0).random((16, 16)), np.zeros((16, 16), np.uint8)
    whole[4:9, 4:9] = 1
    scribble = np.full_like(whole, IGNORE)
    scribble[6, 4:9], scribble[12, 2:9] = 1, 0
    figure = imperfect_figures.kinds_figure(image, {"experts": whole, "scribbles": scribble}, MANIFEST)
    assert [axes.get_title() for axes in figure.axes] == ["experts", "scribbles"]
    marks = [layer.get_array() for layer in figure.axes[1].get_images()[1:]]
    assert len(marks) == 2 and marks[0][12, 4] and marks[1][6, 4] and np.ma.is_masked(marks[1][12, 4])
    assert "Simulated" in figure.get_supxlabel()


def test_a_dose_is_drawn_against_both_qualities():
    figure = imperfect_figures.dose_figure([0, 2], [1.0, 0.8], [0.7, 0.65], "embedded")
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[0.7, 0.65], [1.0, 0.8]]


def test_the_explorer_draws_anew_when_a_control_moves():
    label = np.zeros((32, 32), np.uint8)
    label[8:20, 8:20] = 1
    box = widgets.noise_explorer(np.random.default_rng(0).random((32, 32)), label, MANIFEST)
    controls, image = box.children
    before = image.value
    for control, value in zip(controls.children, ("regions", 0.6, 3), strict=True):
        control.value = value
        assert image.value != before, control.description
        before = image.value
    assert isinstance(image, ipywidgets.Image)


@pytest.mark.parametrize(("kind", "said"), [("borders", "up to 2.0 pixels"), ("regions", "20% of the pixels")])
def test_the_title_says_how_much_and_how_good(kind, said):
    label = np.zeros((32, 32), np.uint8)
    label[8:20, 8:20] = 1
    figure = imperfect_figures.noise_view(np.zeros((32, 32)), label, kind, 0.2, 0, MANIFEST)
    title = figure.axes[1].get_title()
    assert said in title and "Dice" in title
    untouched = imperfect_figures.noise_view(np.zeros((32, 32)), label, kind, 0.0, 0, MANIFEST)
    assert "Dice 1.00" in untouched.axes[1].get_title()
