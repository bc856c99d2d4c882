"""What chapter 14 looks at: tables of looks, matched brightness, and pictures that can be drawn."""

import ipywidgets
import numpy as np
import pytest
import torch
from skimage.exposure import match_histograms

from medcook import domain_figures, widgets
from medcook.data.manifests import load_manifest
from medcook.domains import LOOKS, PLAIN, DomainTask, Look
from medcook.evaluation import evaluate, summary
from medcook.methods import Supervised
from medcook.tasks import Budget
from medcook.training import fit

MANIFEST = load_manifest("embedded")
TASK = DomainTask("embedded", look="negative")


@pytest.fixture(scope="module")
def network():
    return fit(Supervised(channels=(4, 8)), TASK, Budget(steps=15, batch=4, checks=0), cache=False, progress=False)


@pytest.fixture(scope="module")
def slice_and_label():
    samples = TASK.samples("labelled")
    number = int((samples.labels > 0).flatten(1).sum(1).argmax())
    return samples.images[number, 0], samples.labels[number].numpy()


def test_a_table_has_the_dice_of_the_look_that_the_column_says(network):
    patients = TASK.val_patients[:3]
    table = domain_figures.across_looks({"one": network}, (PLAIN, "negative"), patients)
    own = summary(evaluate(network.predict, TASK.data, patients)).loc["all", "dice"]
    assert table.loc["one", "negative"] == pytest.approx(own, abs=0.01)
    assert table.loc["one", PLAIN] != table.loc["one", "negative"]


def test_matched_brightness_is_the_references_and_keeps_the_order():
    rng = torch.Generator().manual_seed(0)
    images, other = torch.randn(2, 1, 16, 16, generator=rng), torch.rand(512, generator=rng).numpy()
    found = domain_figures.matched(images, other)
    assert np.allclose(np.sort(found.flatten().numpy()), np.sort(other), atol=1e-6)
    assert torch.equal(found.flatten().argsort(), images.flatten().argsort())
    theirs = match_histograms(images.numpy().ravel(), other)
    assert np.allclose(found.flatten().numpy(), theirs, atol=1e-5)


def test_a_network_that_is_shown_its_own_images_says_what_it_always_says(network):
    case = TASK.data.load(TASK.data.patients[TASK.val_patients[0]][0])
    images = TASK.preparation.images(case)
    assert np.array_equal(domain_figures.with_images(network, case, images), network.predict(case))
    assert not np.array_equal(domain_figures.with_images(network, case, -images), network.predict(case))


def test_looks_are_drawn_over_the_brightness_of_each_structure(slice_and_label):
    looks = {name: LOOKS[name] for name in (PLAIN, "negative")}
    figure = domain_figures.looks_figure(*slice_and_label, looks, MANIFEST)
    assert [axes.get_title() for axes in figure.axes[:2]] == list(looks)
    assert [len(axes.patches) for axes in figure.axes[2:]] == [len(np.unique(slice_and_label[1]))] * 2
    assert "Simulated" in figure.get_supxlabel()


def test_a_matrix_says_every_number(network):
    table = domain_figures.across_looks({"one": network}, (PLAIN, "negative"), TASK.val_patients[:1])
    figure = domain_figures.matrix_figure(table, "embedded")
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{value:.2f}" for value in table.to_numpy().flat]


def test_remedies_have_their_means_and_intervals(network):
    frame = evaluate(network.predict, TASK.data, TASK.val_patients[:3])
    figure = domain_figures.remedies_figure({"nothing": frame, "again": frame}, "embedded")
    line = summary(frame).loc["all"]
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([line["low"], line["high"]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["nothing", "again"]


def test_distances_are_of_as_many_images_as_is_said():
    a, b = np.zeros((10, 1)), np.arange(10.0)[:, None]
    found = domain_figures.by_size(a, b, lambda x, y: len(x) + len(y) + y.mean(), (2, 10), draws=3)
    assert found.shape == (3, 2) and found[:, 1] == pytest.approx(20 + 4.5)
    assert (found[:, 0] >= 4.5).all() and len(set(found[:, 0])) > 1, "drawn anew, without repeats"


def test_distances_are_drawn_in_units_of_the_largest_sets():
    found = np.array([[3.0, 2.0], [5.0, 2.0]])
    figure = domain_figures.distance_figure({"one": ((5, 50), found)}, "embedded")
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([2.0, 1.0])


def test_a_scanner_can_be_built_and_the_answer_follows(network, slice_and_label):
    image, label = slice_and_label
    plain = domain_figures.scanner_view(network, image, label, Look(), 1.0, MANIFEST)
    turned = domain_figures.scanner_view(network, image, label, Look(), -1.0, MANIFEST)
    assert plain.axes[1].get_title() != turned.axes[1].get_title()
    box = widgets.scanner_explorer(network, image, label, MANIFEST)
    picture, sliders = box.children[1], box.children[0].children
    assert isinstance(picture, ipywidgets.Image) and len(sliders) == 4
    for slider in sliders:
        before = picture.value
        slider.value = slider.min if slider.value != slider.min else slider.max
        assert picture.value != before
