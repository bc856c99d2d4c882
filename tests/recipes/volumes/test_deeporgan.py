"""DeepOrgan: what a patch sees, what a superpixel is, which boxes are cut around it, and how maps follow from maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from skimage.measure import label as connected
from skimage.measure import regionprops
from torch import nn

from medcook.data import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.volumes import deeporgan
from medcook.recipes.volumes.deeporgan import (
    SIDE,
    Organ,
    Patches,
    Regions,
    labels_of,
    mean_over,
    regions_of,
    smoothed,
    some_slices,
    superpixels,
    zoom_out,
)

EARLY, LATE = Moment(0, 10), Moment(9, 10)
SMALL = dict(slices=4, boxes=63, floor=0.0)


def slices(count: int = 3, height: int = 24, width: int = 20) -> torch.Tensor:
    return F.avg_pool2d(torch.randn(count, 1, height + 4, width + 4), 5, 1) * 4


def batch(size: tuple[int, ...] = (8, 24, 20)) -> Batch:
    return Batch(torch.randn(2, 1, *size), torch.randint(0, 3, (2, *size)).byte())


@pytest.mark.component("dense patch labelling")
def test_a_pixel_is_labelled_from_the_patch_around_it():
    """Running the network on the slice is running it on every patch of 17 x 17."""
    network, image = Patches(3).eval().double(), torch.randn(2, 1, 40, 40).double().requires_grad_()
    dense = network(image)
    (gradient,) = torch.autograd.grad(dense[0, :, 20, 22].square().sum(), image, retain_graph=True)
    rows, columns = gradient[0, 0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 28, 14, 30)
    assert not gradient[1].any()
    for row, column in ((8, 8), (20, 22), (31, 9)):
        patch = image[:, :, row - 8 : row + 9, column - 8 : column + 9]
        assert torch.allclose(network(patch)[:, :, 8, 8], dense[:, :, row, column])


@pytest.mark.component("superpixels")
def test_superpixels_are_connected_parts_of_one_slice():
    images = slices()
    ids = superpixels(images[:, 0], 12)
    count = int(ids.max()) + 1
    assert torch.equal(ids.unique(), torch.arange(count)) and count == pytest.approx(3 * 24 * 20 / 12, rel=0.4)
    for number in range(count):
        where = (ids == number).numpy()
        assert where.any((1, 2)).sum() == 1 and connected(where).max() == 1
    assert torch.equal(ids, superpixels(images[:, 0], 12))


@pytest.mark.component("superpixels")
def test_they_follow_edges():
    image = torch.zeros(1, 24, 24)
    image[:, :, 11:] = 3
    ids = superpixels(image, 16)
    assert not set(ids[..., :11].unique().tolist()) & set(ids[..., 11:].unique().tolist())


@pytest.mark.component("superpixels")
def test_bounding_boxes_means_and_majorities():
    """Against scikit-image and loops."""
    images = slices()
    ids, labels = superpixels(images[:, 0], 12), torch.randint(0, 3, (3, 24, 20)).byte()
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    labels[ids == 4] = IGNORE
    regions, truth, means = regions_of(ids), labels_of(ids, labels, 3), mean_over(ids, images)
    for part in regionprops(ids.numpy() + 1):
        k, box = part.label - 1, part.bbox
        middle = [(box[axis] + box[axis + 3] - 1) / 2 for axis in range(3)]
        assert regions.middle[k].tolist() == middle
        assert regions.extent[k].tolist() == [box[4] - box[1], box[5] - box[2]]
        assert means[k].item() == pytest.approx(images[:, 0][ids == k].mean().item(), abs=1e-5)
        votes = np.bincount(labels[(ids == k) & (labels != IGNORE)].numpy(), minlength=3)
        assert truth[k] == (votes.argmax() if votes.any() else IGNORE)
    assert truth[4] == IGNORE


@pytest.mark.component("superpixels")
def test_what_the_map_calls_background_is_not_looked_at():
    method, images = Organ(floor=0.5), slices()
    density = torch.zeros(3, 3, 24, 20)
    density[:, 0], density[:, 0, :12], density[:, 2, :12] = 1, 0.3, 0.7
    regions, candidates = method.find(images, density)
    share = (regions.ids[..., None] == candidates).any(-1)[:, :12].float().mean()
    assert share > 0.8 and not (regions.ids[..., None] == candidates).any(-1)[:, 20:].any()


@pytest.mark.component("zoom-out boxes")
def test_a_box_is_cut_out_around_the_middle_of_its_own_slice():
    channels = torch.randn(3, 2, 48, 40)
    regions = Regions(
        torch.empty(0), torch.tensor([[1, 20.5, 17.5], [2, 23.5, 23.5]]), torch.tensor([[16.0, 16], [8, 4]])
    )
    whole, half = (zoom_out(channels, regions, torch.tensor([0]), scale) for scale in (1, 2))
    assert torch.allclose(whole[0], channels[1, :, 13:29, 10:26], atol=1e-4)
    assert torch.allclose(half[0, :, 4:12, 4:12], F.avg_pool2d(channels[1, :, 13:29, 10:26], 2), atol=1e-4)
    tall = zoom_out(channels, regions, torch.tensor([1]), 4)
    rows, columns = 23.5 + torch.arange(-7.5, 8) * 2, 23.5 + torch.arange(-7.5, 8)
    wanted = (channels[2][:, rows.floor().long()] + channels[2][:, rows.ceil().long()]) / 2
    assert torch.allclose(tall[0], wanted[:, :, columns.long()], atol=1e-4)


@pytest.mark.component("zoom-out boxes")
def test_answers_are_averaged_over_the_scales():
    method = Organ(floor=0.0, scales=(1.0, 4.0), sigma=0)
    model, volume = method.build(1, 3, 3).eval()["average"], torch.randn(1, 6, 24, 20)
    images = volume[0][:, None]
    density = model["patches"](images).softmax(1)
    regions, chosen = method.find(images, density)
    both = torch.cat([images, density[:, 1:]], dim=1)
    each = [model["boxes"](zoom_out(both, regions, chosen, scale)).softmax(1) for scale in (1, 4)]
    assert len(chosen) == int(regions.ids.max()) + 1
    wanted = ((each[0] + each[1]) / 2)[regions.ids].movedim(-1, 0)
    assert torch.allclose(method.segment(model, volume)[0], wanted, atol=1e-5)


@pytest.mark.component("zoom-out boxes")
def test_many_regions_are_judged_as_few_are(monkeypatch):
    method = Organ(floor=0.0)
    nets, images = method.build(1, 3, 3).eval(), torch.randn(1, 1, 6, 24, 20)
    at_once = method.predict(nets, images)
    monkeypatch.setattr(deeporgan, "CHUNK", 50)
    assert torch.allclose(method.predict(nets, images), at_once, atol=1e-5)


@pytest.mark.component("stacking on the map")
def test_the_map_is_an_input_of_r2_alone():
    for stacked in (True, False):
        method = Organ(stacked=stacked, floor=0.0)
        model, images = method.build(1, 3, 3).eval()["average"], slices()
        density = torch.rand(3, 3, 24, 20, requires_grad=True)
        regions, chosen = method.find(images, density.detach())
        seen = []
        model["boxes"].register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        assert method.answers(model["boxes"], images, density, regions, chosen[:5]).shape == (3, 5, 3)
        assert len(seen) == 1 and seen[0].shape == (15, 3 if stacked else 1, SIDE, SIDE)
        assert torch.allclose(seen[0][5:10, :1], zoom_out(images, regions, chosen[:5], 2))
        if stacked:
            assert torch.allclose(seen[0][5:10, 1:], zoom_out(density[:, 1:], regions, chosen[:5], 2))


@pytest.mark.component("stacking on the map")
def test_regions_are_learnt_after_the_map_and_do_not_change_it():
    method, given = Organ(**SMALL), batch()
    nets = method.build(1, 3, 3)
    method.training_step(nets, given, None, EARLY).backward()
    assert all(p.grad is None for p in nets["model"]["boxes"].parameters())
    gradients = []
    for regions in (True, False):
        method.regions = regions
        nets.zero_grad()
        torch.manual_seed(1)
        method.training_step(nets, given, None, LATE).backward()
        gradients.append([p.grad.clone() for p in nets["model"]["patches"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.component("stacking on the map")
def test_boxes_learn_the_majority_of_their_superpixel():
    method, given = Organ(**SMALL | {"boxes": 3 * 10**6, "slices": 8}), batch()
    given.labels[:, :, :5] = IGNORE
    nets = method.build(1, 3, 3)
    nets["model"]["boxes"][-1].register_forward_hook(lambda _, __, output: output * 0 + torch.tensor([0.0, 1, 2]))
    whole = method.training_step(nets, given, None, LATE)
    method.regions = False
    alone = method.training_step(nets, given, None, LATE)
    images = given.images[:, 0].flatten(0, 1)
    truth = labels_of(superpixels(images, method.area), given.labels.flatten(0, 1), 3)
    truth = truth[truth != IGNORE]
    wanted = cross_entropy_and_dice(torch.tensor([0.0, 1, 2]).expand(3 * len(truth), 3), truth.repeat(3).byte())
    assert torch.allclose(whole - alone, wanted, atol=1e-3)


@pytest.mark.component("3D Gaussian smoothing")
@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_smoothing_is_that_of_scipy(sigma):
    volume = torch.rand(2, 3, 9, 12, 10).softmax(1)
    wanted = gaussian_filter(volume.numpy(), sigma, mode="nearest", radius=round(3 * sigma), axes=(2, 3, 4))
    found = smoothed(volume, sigma)
    assert np.allclose(found, wanted, atol=1e-5) and torch.allclose(found.sum(1), torch.ones(2, 9, 12, 10))
    assert smoothed(volume, 0) is volume


@pytest.mark.component("3D Gaussian smoothing")
def test_every_map_is_smoothed():
    for regions in (True, False):
        rough, smooth = (Organ(regions=regions, floor=0.0, sigma=sigma) for sigma in (0, 0.7))
        nets, images = rough.build(1, 3, 3).eval(), torch.randn(1, 1, 6, 24, 20)
        assert torch.allclose(smooth.predict(nets, images), smoothed(rough.predict(nets, images), 0.7), atol=1e-6)


def test_slices_with_a_structure_are_preferred_and_none_comes_twice():
    labels = torch.zeros(2, 12, 8, 8).byte()
    labels[:, 3:6, 2, 2], labels[:, 9] = 1, IGNORE
    images = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(2, 1, 12, 8, 8)
    count = torch.zeros(12)
    for _ in range(200):
        chosen, truth = some_slices(images, labels, 2)
        numbers = chosen[:, 0, 0, 0].long().view(2, 2)
        assert (numbers[:, 0] != numbers[:, 1]).all()
        assert torch.equal(truth, labels[0, numbers.flatten()])
        count += numbers.flatten().bincount(minlength=12)
    assert count[3:6].min() > 1.8 * count[[0, 1, 2, 6, 7, 8, 9, 10, 11]].max()
    assert some_slices(images, labels, 50)[0].shape == (24, 1, 8, 8)


def test_the_loss_of_the_patches_is_the_book_s():
    method, given = Organ(regions=False, slices=8), batch()
    nets = method.build(1, 3, 3)
    logits = nets["model"]["patches"](given.images.transpose(1, 2).flatten(0, 1))
    wanted = cross_entropy_and_dice(logits, given.labels.flatten(0, 1))
    assert torch.allclose(method.training_step(nets, given, None, LATE), wanted, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 20), (3, 33, 17)])
@pytest.mark.parametrize("regions", [True, False])
def test_any_size_comes_back(size, regions):
    method = Organ(regions=regions)
    found = method.predict(method.build(1, 3, 3).eval(), torch.randn(2, 1, *size))
    assert found.shape == (2, 3, *size) and torch.allclose(found.sum(1), torch.ones(2, *size), atol=1e-5)


def test_where_nothing_is_a_candidate_all_is_background():
    method = Organ(floor=1.1)
    found = method.predict(method.build(1, 3, 3).eval(), torch.randn(1, 1, 4, 16, 16))
    assert torch.allclose(found[:, 0], torch.ones(1, 4, 16, 16))
    nets = method.build(1, 3, 3)
    assert torch.isfinite(method.training_step(nets, batch(), None, LATE))


def test_the_ablation_zooms_out_no_more_and_is_otherwise_the_same():
    method, bare = Organ(**SMALL), Organ(**SMALL, scales=(1.0,))
    full, alone = (m.model(1, 3).state_dict() for m in (method, bare))
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in alone.items()}
    seen = {}
    for name, m in (("full", method), ("alone", bare)):
        nets = m.build(1, 3, 3)
        boxes = []
        nets["model"]["boxes"].register_forward_hook(lambda _, i, __, boxes=boxes: boxes.append(len(i[0])))
        m.training_step(nets, batch(), None, LATE)
        seen[name] = sum(boxes)
    assert seen["full"] == seen["alone"] == 63


@pytest.mark.parametrize("settings", [{}, {"stacked": False}, {"regions": False}, {"scales": (1.0,)}])
def test_every_parameter_is_trained(settings):
    method = Organ(**SMALL | settings)
    nets: nn.ModuleDict = method.build(1, 3, 3)
    method.training_step(nets, batch(), None, LATE).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
