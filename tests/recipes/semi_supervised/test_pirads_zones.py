"""Dual-path co-training: who knows what, who must agree, and how two paths give one answer."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.semi_supervised.pirads_zones import (
    DualPath,
    DualPathCoTraining,
    co_training,
    disagreement,
    fuse,
    own_labels,
    recipe,
    signed_distance,
)

GROUPS = ((1, 2), (2, 3))
TINY = dict(channels=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch() -> Batch:
    return Batch(torch.randn(2, 1, 16, 16), torch.randint(0, 4, (2, 16, 16)).byte())


def logits_of(*classes: float) -> Tensor:
    return torch.tensor(classes).view(1, -1, 1, 1)


@pytest.mark.component("a path for each group of connected zones")
class TestPaths:
    def test_a_path_knows_its_own_structures_and_the_rest(self):
        labels = torch.tensor([[0, 1, 2, 3, IGNORE]]).byte()
        assert own_labels(labels, (1, 2)).tolist() == [[0, 1, 2, 0, IGNORE]]
        assert own_labels(labels, (2, 3)).tolist() == [[0, 0, 1, 2, IGNORE]]

    def test_each_path_is_a_unet_on_the_shared_encoder(self):
        paths = [UNet(channels=(4, 8, 8), classes=classes).eval() for classes in (5, 3)]
        paths[1].down.load_state_dict(paths[0].down.state_dict())
        dual = DualPath(inputs=1, outputs=[5, 3], channels=(4, 8, 8), dims=2).eval()
        dual.encoder.load_state_dict(paths[0].down.state_dict())
        for number, path in enumerate(paths):
            dual.decoders[number].load_state_dict(path.up.state_dict())
            dual.heads[number].load_state_dict(path.head.state_dict())
        image = torch.randn(1, 1, 16, 16)
        for mine, path in zip(dual(image), paths, strict=True):
            assert torch.allclose(mine, path(image), atol=1e-5)

    def test_each_path_learns_its_own_labels(self):
        method, labels = DualPathCoTraining(distance=0.0), batch().labels
        logits, distances = [torch.randn(2, 3, 16, 16) for _ in GROUPS], [torch.randn(2, 2, 16, 16) for _ in GROUPS]
        without = torch.where(labels == 1, 0, labels)  # the second path never hears of structure 1
        loss = method.supervised(logits, distances, labels).item()
        expected = cross_entropy_and_dice(logits[0], torch.where(labels == 3, 0, labels))
        expected = expected + cross_entropy_and_dice(logits[1], (without.int() - 1).clamp_min(0).byte())
        assert loss == pytest.approx(expected.item(), abs=1e-5)

    def test_groups_must_name_every_structure(self):
        with pytest.raises(MedcookError, match="groups"):
            DualPathCoTraining(**TINY).build(inputs=1, classes=5, dims=2)


@pytest.mark.component("unsupervised fine-tuning on disagreement")
class TestDisagreement:
    def test_it_is_nothing_when_equal_and_all_when_apart(self):
        one = torch.rand(2, 16, 16)
        left = torch.zeros(2, 16, 16)
        left[:, :, :8] = 1
        assert disagreement(one, one) == 0
        assert disagreement(left, 1 - left).item() == pytest.approx(1)
        assert disagreement(left, left / 2).item() == pytest.approx(0.25 / 1.25)

    def test_the_shared_structure_is_compared_and_nothing_else(self):
        first, second = torch.rand(2, 3, 8, 8).softmax(1), torch.rand(2, 3, 8, 8).softmax(1)
        expected = disagreement(first[:, 2], second[:, 1])
        assert torch.allclose(co_training([first.log(), second.log()], GROUPS), expected, atol=1e-6)

    def test_it_comes_in_the_second_stage_on_all_images(self):
        method, labelled, unlabelled = DualPathCoTraining(**TINY, weight=0.7), batch(), batch()
        nets = method.build(inputs=1, classes=4, dims=2)
        early, late = (method.training_step(nets, labelled, unlabelled, now).item() for now in (EARLY, LATE))
        known, distances = method.split(nets["model"](labelled.images))
        assert early == pytest.approx(method.supervised(known, distances, labelled.labels).item(), abs=1e-5)
        unknown, _ = method.split(nets["model"](unlabelled.images))
        everything = [torch.cat(pair) for pair in zip(known, unknown, strict=True)]
        assert late - early == pytest.approx(0.7 * co_training(everything, GROUPS).item(), abs=1e-5)

    def test_it_teaches_both_paths(self):
        logits = [torch.randn(1, 3, 8, 8, requires_grad=True) for _ in GROUPS]
        before = co_training(logits, GROUPS)
        gradients = torch.autograd.grad(before, logits)
        assert all(one.abs().max() > 0 for one in gradients)
        moved = [one - 5 * step for one, step in zip(logits, gradients, strict=True)]
        assert co_training(moved, GROUPS) < before

    def test_both_paths_are_moved_by_its_gradient(self):
        one, other = (torch.rand(2, 8, 8, requires_grad=True) for _ in range(2))
        share = disagreement(one, other)
        squares = (one.square() + other.square()).sum()
        for mine, found in zip((one, other), torch.autograd.grad(share, (one, other)), strict=True):
            apart = 2 * mine - (one + other)  # mine minus the other
            assert torch.allclose(found, 2 * (apart - share * mine) / squares, atol=1e-6)

    def test_it_needs_no_unlabelled_images(self):
        method, labelled = DualPathCoTraining(**TINY), batch()
        nets = method.build(inputs=1, classes=4, dims=2)
        early, late = (method.training_step(nets, labelled, None, now) for now in (EARLY, LATE))
        assert late > early


@pytest.mark.component("one prediction from both paths")
class TestFusion:
    @pytest.mark.parametrize(
        ("first", "second", "answer"),
        [((9, 0, 0), (9, 0, 0), 0), ((0, 9, 0), (9, 0, 0), 1), ((0, 0, 9), (0, 9, 0), 2), ((9, 0, 0), (0, 0, 9), 3)],
    )
    def test_every_structure_is_found(self, first, second, answer):
        fused = fuse([logits_of(*map(float, path)) for path in (first, second)], GROUPS, 4)
        assert fused.argmax(1).item() == answer

    def test_log_odds_of_the_shared_structure_are_averaged(self):
        fused = fuse([logits_of(1.0, 2.0, 4.0), logits_of(-1.0, 1.0, 3.0)], GROUPS, 4)
        assert fused.flatten().tolist() == [0.0, 1.0, 2.5, 4.0]

    def test_the_fused_average_predicts(self):
        method, images = DualPathCoTraining(**TINY), batch().images
        nets = method.build(inputs=1, classes=4, dims=2).eval()
        logits = method.split(nets["average"](images))[0]
        assert torch.allclose(method.predict(nets, images), fuse(logits, GROUPS, 4).softmax(1), atol=1e-6)


@pytest.mark.component("multi-task learning")
class TestDistances:
    @pytest.mark.parametrize("size", [(16, 16), (10, 9, 8)])
    def test_they_are_those_of_scipy(self, size):
        labels = torch.from_numpy(ndimage.zoom(np.random.default_rng(0).integers(0, 3, (4,) * len(size)), 4, order=0))
        labels = labels[tuple(slice(side) for side in size)]
        found = signed_distance(labels[None].byte(), 3, reach=5)[0].numpy()
        for value in (1, 2):
            mask = labels.numpy() == value
            inside, outside = (ndimage.distance_transform_cdt(part, "chessboard") for part in (mask, ~mask))
            expected = (np.minimum(inside, 5) - np.minimum(outside, 5)) / 5
            assert np.allclose(found[value - 1], expected)

    def test_each_path_regresses_its_own(self):
        method, labels = DualPathCoTraining(distance=2.0), batch().labels
        logits = [torch.randn(2, 3, 16, 16) for _ in GROUPS]
        truth = signed_distance(labels, 4, method.reach)
        right, none = [truth[:, :2], truth[:, 1:]], DualPathCoTraining(distance=0.0)
        plain = none.supervised(logits, right, labels).item()
        assert method.supervised(logits, right, labels).item() == pytest.approx(plain, abs=1e-5)
        wrong = [right[0], right[1] + 0.5]
        assert method.supervised(logits, wrong, labels).item() == pytest.approx(plain + 2 * 0.25, abs=1e-5)

    def test_unlabelled_voxels_have_no_distance(self):
        method, labels = DualPathCoTraining(), batch().labels
        labels[:, :8] = IGNORE
        logits, distances = [torch.randn(2, 3, 16, 16) for _ in GROUPS], [torch.randn(2, 2, 16, 16) for _ in GROUPS]
        loss = method.supervised(logits, distances, labels)
        for one in (*logits, *distances):
            one[:, :, :8] += 1
        assert torch.allclose(method.supervised(logits, distances, labels), loss, atol=1e-5)


def test_the_ablation_takes_the_second_stage_away_and_nothing_else():
    settings, without = (recipe.arms[arm].method.settings() for arm in recipe.ablation)
    assert {name for name in settings if settings[name] != without[name]} == {"weight"} and without["weight"] == 0
