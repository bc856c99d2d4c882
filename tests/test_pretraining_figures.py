"""What chapter 13 looks at: puzzles as they are, neighbours by what a network finds alike, and pictures of both."""

import ipywidgets
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from medcook import pretraining_figures as figures
from medcook import widgets
from medcook.data.manifests import load_manifest
from medcook.networks import UNet
from medcook.tasks import Samples

MANIFEST = load_manifest("embedded")


@pytest.fixture
def vectors():
    return torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def images():
    return torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))


CASES = torch.arange(12) // 3


def test_hidden_patches_are_grey_and_as_many_as_is_said():
    image = torch.randn(10, 12)
    seen, mask = figures.hidden(image, 0.5, 2, torch.Generator().manual_seed(0))
    assert mask.shape == image.shape and mask.float().mean() == 0.5
    assert (mask.view(5, 2, 6, 2).float().mean((1, 3)) % 1 == 0).all(), "whole patches"
    assert torch.equal(seen[~mask], image[~mask]) and (seen[mask] == image.mean()).all()
    assert not figures.hidden(image, 0.0, 2, torch.Generator())[1].any()


def test_embeddings_are_unit_vectors_without_what_all_share(images):
    net = UNet(channels=(4, 8, 8))
    found, plain = figures.embedded(net, images), figures.embedded(net, images, centre=False)
    assert found.shape == (12, 8) and torch.allclose(found.norm(dim=1), torch.ones(12))
    deepest = net.eval().down[1](net.pool(net.down[0](images), 2))
    wanted = net.down[2](net.pool(deepest, 2)).mean((2, 3))
    assert torch.allclose(plain, torch.nn.functional.normalize(wanted, dim=1), atol=1e-5)
    centred = torch.nn.functional.normalize(wanted - wanted.mean(0), dim=1)
    assert torch.allclose(found, centred, atol=1e-4)


def test_neighbours_are_the_nearest_of_each_other_case(vectors):
    found = figures.neighbours(vectors, CASES, 4, 3)
    order = NearestNeighbors(n_neighbors=12).fit(vectors.numpy()).kneighbors(vectors[4:5].numpy())[1][0]
    wanted = []
    for number in order.tolist():
        if int(CASES[number]) not in {1, *CASES[wanted].tolist()}:
            wanted.append(number)
    assert found == wanted and sorted(CASES[found].tolist()) == [0, 2, 3]


def test_misplaced_is_the_mean_distance_of_places():
    place = torch.tensor([0.0, 0.3, 0.6] * 4)
    perfect = torch.eye(3).repeat(4, 1)
    assert figures.misplaced(perfect, CASES, place) == 0
    turned = torch.cat([torch.eye(3), torch.eye(3).roll(1, 0)])
    assert figures.misplaced(turned, CASES[:6], place[:6]) == pytest.approx((0.6 + 0.3 + 0.3) / 3)


def test_slices_and_their_neighbours_are_drawn(vectors, images):
    figure = figures.alike_figure({"one": vectors, "two": vectors.roll(5, 0)}, images, CASES, 4, MANIFEST, count=2)
    panels = figure.axes
    assert len(panels) == 6
    shown = [axes.images[0].get_array().data for axes in panels]
    assert np.array_equal(shown[0], images[4, 0]) and np.array_equal(shown[3], images[4, 0])
    assert np.array_equal(shown[1], images[figures.neighbours(vectors, CASES, 4, 1)[0], 0])
    assert not np.array_equal(shown[1], shown[4])


def test_puzzles_are_rows_of_images_and_maps():
    grey, classes = np.random.default_rng(0).random((8, 8)), np.arange(64).reshape(8, 8) % 4
    figure = figures.puzzles_figure({"a": {"shown": grey, "asked": classes}, "b": {"shown": grey}}, MANIFEST)
    assert [axes.get_title() for axes in figure.axes] == ["shown", "asked", "shown", ""]
    assert figure.axes[1].images[0].norm.boundaries.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert figure.axes[0].texts[0].get_text() == "a" and "Simulated" in figure.get_supxlabel()


def test_dice_is_drawn_against_the_number_of_labels():
    scores = {"scratch": {1: [0.4, 0.6], 3: [0.7, 0.7]}, "prepared": {1: [0.6, 0.8], 3: [0.7, 0.8]}}
    axes = figures.labels_figure(scores, "embedded").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([0.5, 0.7]) and axes.lines[1].get_ydata()[0] == pytest.approx(0.7)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "3"]


def test_neighbours_can_be_explored(vectors, images):
    box = widgets.neighbour_explorer({"one": vectors, "two": vectors.roll(5, 0)}, images, CASES, MANIFEST)
    picture, controls = box.children[1], box.children[0].children
    assert isinstance(picture, ipywidgets.Image)
    for control, value in zip(controls, ("two", 0), strict=True):
        before = picture.value
        control.value = value
        assert picture.value != before


class Deaf(torch.nn.Module):
    """Its features are the label itself and some noise; its head only ever says background."""

    def features(self, images):
        return torch.cat([images, torch.randn(images.shape, generator=torch.Generator().manual_seed(3))], dim=1)

    def head(self, maps):
        return torch.stack([torch.ones_like(maps[:, 0]), *[torch.zeros_like(maps[:, 0])] * 2], dim=1)


def test_what_the_features_hold_is_told_from_what_the_head_says():
    labels = torch.randint(0, 3, (6, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = Samples(labels[:, None].float(), labels, torch.arange(6))
    found = figures.recalls(Deaf(), samples)
    assert [found[value][0] for value in range(3)] == [1, 0, 0]
    assert all(found[value][1] > 0.98 for value in range(3))
    nothing = figures.recalls(Deaf(), Samples(torch.zeros(6, 1, 16, 16), labels, torch.arange(6)))
    assert sum(nothing[value][1] for value in range(3)) < 1.3, "noise tells nothing apart"
