"""The ramp, the perturbed views, and what holds for every semi-supervised method."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

from medcook.data.transforms import Augment
from medcook.losses import cross_entropy_and_dice
from medcook.methods import (
    Batch,
    CrossPseudoSupervision,
    FixMatch,
    MeanTeacher,
    Moment,
    Supervised,
    UncertaintyAwareMeanTeacher,
)
from medcook.methods.semi_supervised import SemiSupervised, boxes, forgetful, noisy, ramp_up, strong

TINY = dict(channels=(4, 8))
METHODS = [
    MeanTeacher(**TINY),
    UncertaintyAwareMeanTeacher(**TINY),
    CrossPseudoSupervision(**TINY),
    FixMatch(**TINY, threshold=0.0),
]
BEFORE, AFTER = Moment(49, 100), Moment(75, 100)


@pytest.fixture(params=METHODS, ids=lambda method: type(method).__name__)
def method(request) -> SemiSupervised:
    return request.param


@pytest.fixture
def nets(method) -> nn.ModuleDict:
    """Networks that are surer of what they say than untrained ones, so that no method is silent."""
    nets = method.build(inputs=1, classes=3, dims=2)
    with torch.no_grad():
        for net in nets.values():
            net.head.weight *= 8
    return nets


def loss_of(
    method: SemiSupervised, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment = AFTER
) -> torch.Tensor:
    """The loss of a step, by default one after the ramp; the same random numbers at every call."""
    torch.manual_seed(0)
    return method.training_step(nets, labelled, unlabelled, now)


def trained(nets: nn.ModuleDict) -> list[nn.Module]:
    return [net for name, net in nets.items() if name != "average"]


class TestEveryMethod:
    def test_the_labels_of_unlabelled_images_are_not_used(self, method, nets, labelled, unlabelled):
        told = unlabelled._replace(labels=labelled.labels)
        assert loss_of(method, nets, labelled, told) == loss_of(method, nets, labelled, unlabelled)

    def test_the_unlabelled_images_are_used(self, method, nets, labelled, unlabelled):
        silent = loss_of(replace(method, weight=0), nets, labelled, unlabelled)
        assert (loss_of(method, nets, labelled, unlabelled) - silent).abs() > 1e-3

    def test_every_trained_parameter_gets_a_gradient_and_the_average_none(self, method, nets, labelled, unlabelled):
        nets.requires_grad_(True)
        loss_of(method, nets, labelled, unlabelled).backward()
        for net in trained(nets):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(p.grad is None for p in nets["average"].parameters())

    def test_without_weight_it_is_the_loss_of_the_labels(self, method, nets, labelled, unlabelled):
        silent = loss_of(replace(method, weight=0), nets, labelled, unlabelled)
        assert silent == loss_of(method, nets, labelled, None)

    def test_the_labelled_images_are_seen_as_they_are_and_by_themselves(self, method, nets, labelled, unlabelled):
        seen = []
        nets["model"].register_forward_pre_hook(lambda net, images: seen.append(images[0]))
        loss_of(method, nets, labelled, unlabelled)
        assert torch.equal(seen[0], labelled.images)

    def test_normalisation_remembers_the_labelled_images_alone(self, method, nets, labelled, unlabelled):
        alone = deepcopy(nets)
        loss_of(method, alone, labelled, None)
        loss_of(method, nets, labelled, unlabelled)
        for one, other in zip(trained(nets), trained(alone), strict=True):
            assert torch.equal(one.down[0][1].running_mean, other.down[0][1].running_mean)
            assert torch.equal(one.up[0][4].running_var, other.up[0][4].running_var)
            assert not torch.equal(one.up[0][4].running_var, torch.ones(4))

    def test_the_unsupervised_part_goes_by_weight_and_ramp(self, method, nets, labelled, unlabelled):
        """A quarter of the training after the start: the end of a ramp of a quarter, halfway up one of a half."""
        full, silent, double, half_way = (
            loss_of(replace(method, **settings), nets, labelled, unlabelled).item()
            for settings in (dict(ramp=0.25), dict(weight=0), dict(ramp=0.25, weight=2), dict(ramp=0.5))
        )
        assert double - silent == pytest.approx(2 * (full - silent), abs=1e-5)
        assert half_way - silent == pytest.approx(math.exp(-5 / 4) * (full - silent), abs=1e-5)

    @pytest.mark.parametrize("now", [BEFORE, AFTER])
    def test_without_unlabelled_images_it_is_supervised_training(self, method, nets, labelled, now):
        wanted = sum(supervised(net(labelled.images), labelled) for net in trained(nets))
        assert loss_of(method, nets, labelled, None, now).item() == pytest.approx(wanted, abs=1e-6)

    def test_before_the_start_labels_alone_teach(self, method, nets, labelled, unlabelled):
        """And the unlabelled images are not even looked at."""
        alone, seen = loss_of(method, nets, labelled, None), []
        for net in nets.values():
            net.register_forward_pre_hook(lambda net, images: seen.append(images[0]))
        assert loss_of(method, nets, labelled, unlabelled, BEFORE) == alone
        assert len(seen) == len(trained(nets)) and all(torch.equal(images, labelled.images) for images in seen)

    @pytest.mark.parametrize(("start", "now"), [(0.5, Moment(50, 100)), (0.2, Moment(20, 100)), (0.0, Moment(0, 9))])
    def test_from_the_start_on_unlabelled_images_do(self, method, nets, labelled, unlabelled, start, now):
        alone = loss_of(method, nets, labelled, None)
        assert loss_of(replace(method, start=start), nets, labelled, unlabelled, now) != alone

    def test_the_loop_is_told_to_load_unlabelled_images(self, method):
        assert method.uses_unlabelled and not Supervised.uses_unlabelled


def supervised(logits: torch.Tensor, labelled: Batch) -> float:
    return cross_entropy_and_dice(logits, labelled.labels).item()


class TestForgetful:
    """Batch normalisation that goes by the batch and does not remember it."""

    @pytest.fixture
    def norm(self) -> nn.Module:
        """A layer that remembers a mean of 0.3."""
        norm = nn.BatchNorm2d(1, momentum=0.3)
        norm(torch.ones(2, 1, 4, 4))
        return norm

    def test_it_normalises_by_the_batch(self, norm):
        with forgetful(nn.Sequential(norm)):
            assert norm(torch.randn(2, 1, 16, 16) + 5).mean().item() == pytest.approx(0, abs=1e-6)
        assert norm.running_mean.item() == pytest.approx(0.3)

    def test_afterwards_it_remembers_as_before_also_after_an_error(self, norm):
        with pytest.raises(KeyError), forgetful(nn.Sequential(norm)):
            raise KeyError
        norm(torch.ones(2, 1, 4, 4))
        assert norm.running_mean.item() == pytest.approx(0.3 * 0.7 + 0.3)


class TestRampUp:
    @pytest.mark.parametrize("length", [0.4, 1.0])
    @pytest.mark.parametrize(("share", "wanted"), [(0.0, -5.0), (0.25, -2.8125), (0.5, -1.25), (1.0, 0.0), (2.0, 0.0)])
    def test_closed_form(self, length, share, wanted):
        assert ramp_up(share * length, length) == pytest.approx(math.exp(wanted))

    def test_it_rises_and_stays(self):
        heights = [ramp_up(step / 100, 0.4) for step in range(100)]
        assert (np.diff(heights[:41]) > 0).all() and set(heights[40:]) == {1.0}

    def test_before_its_start_it_is_0(self):
        assert ramp_up(-0.01, 0.4) == ramp_up(-0.01, 0.0) == 0

    def test_no_ramp_is_the_full_height_at_once(self):
        assert ramp_up(0.0, 0.0) == 1


def test_noise_is_gaussian_and_cut_off_at_two_standard_deviations():
    added = noisy(torch.full((4, 1, 100, 100), 7.0), level=0.1) - 7
    assert added.abs().max().item() == pytest.approx(0.2, abs=1e-5)
    cut = stats.norm.cdf(-2)
    assert (added.abs() > 0.1999).float().mean().item() == pytest.approx(2 * cut, abs=3e-3)
    assert added.mean().item() == pytest.approx(0, abs=2e-3)
    inside = added[added.abs() < 0.1999]
    assert inside.std().item() == pytest.approx(0.1 * stats.truncnorm.std(-2, 2), abs=1e-3)


class TestBoxes:
    @pytest.mark.parametrize(
        ("size", "side", "extent"), [((16, 12), 0.3, (5, 4)), ((8, 9, 10), 0.5, (4, 4, 5)), ((9, 9), 0.01, (1, 1))]
    )
    def test_one_box_of_the_right_size_in_every_image(self, size, side, extent):
        masks = boxes(20, size, side).numpy()
        assert masks.shape == (20, *size) and masks.dtype == bool
        for mask in masks:
            labels, count = ndimage.label(mask)
            assert count == 1 and mask.sum() == math.prod(extent)
            found = ndimage.find_objects(labels)[0]
            assert tuple(along.stop - along.start for along in found) == extent

    def test_every_place_is_as_likely_on_each_axis_by_itself(self):
        """16 pixels and a box of 5 leave 12 places on either axis, the borders among them."""
        places = [np.argwhere(mask).min(0) for mask in boxes(1440, (16, 16), 0.3).numpy()]
        counts = np.zeros((12, 12))
        np.add.at(counts, tuple(np.transpose(places)), 1)
        assert stats.chisquare(counts.ravel()).pvalue > 0.01

    def test_the_whole_image(self):
        assert boxes(2, (6, 7), 1.0).all()


class TestStrong:
    def test_grey_values_change_and_one_box_of_each_image_is_blank(self):
        images = torch.randn(8, 2, 16, 16)
        changed = strong(images)
        assert changed.shape == images.shape
        blank = (changed == 0).numpy()
        assert (blank[:, 0] == blank[:, 1]).all() and (blank[:, 0].sum((1, 2)) == 25).all()
        assert all(ndimage.label(mask)[1] == 1 for mask in blank[:, 0])
        assert len({mask.tobytes() for mask in blank[:, 0]}) > 1
        assert ((changed != images) | (changed == 0)).all()

    def test_the_grid_stays(self):
        """Outside the blank box what was brighter stays brighter, up to the noise."""
        images = torch.linspace(-2, 2, 256).view(1, 1, 16, 16).repeat(8, 1, 1, 1)
        for image, changed in zip(images, strong(images), strict=True):
            kept = changed != 0
            assert stats.spearmanr(image[kept], changed[kept]).statistic > 0.9

    def test_it_changes_more_than_plain_augmentation(self):
        images = torch.randn(64, 1, 16, 16)
        changed = strong(images)
        plain = Augment().intensity(images, torch.Generator().manual_seed(0))
        assert (changed - images)[changed != 0].abs().mean() > 1.5 * (plain - images).abs().mean()

    def test_the_seed_decides(self):
        images, views = torch.randn(2, 1, 16, 16), []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            views.append(strong(images))
        assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
        assert not torch.equal(strong(images), strong(images))

    def test_volumes(self):
        assert strong(torch.randn(2, 1, 8, 8, 8)).shape == (2, 1, 8, 8, 8)
