"""Mean teacher: who teaches and how. Its uncertainty-aware variant: which voxels count."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from medcook.methods import Batch, MeanTeacher, Moment, UncertaintyAwareMeanTeacher
from medcook.methods.mean_teacher import dropout, squared_difference
from medcook.networks import UNet

TINY = dict(channels=(4, 8))
START, END = Moment(50, 100), Moment(100, 100)


@pytest.fixture
def nets() -> nn.ModuleDict:
    """A student, and a teacher that says something else."""
    nets = MeanTeacher(**TINY).build(inputs=1, classes=3, dims=2)
    with torch.no_grad():
        nets["average"].head.weight *= 8
    return nets


def test_the_squared_difference_of_probabilities():
    logits, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4).softmax(1)
    wanted = (special.softmax(logits.numpy(), axis=1) - target.numpy()) ** 2
    assert squared_difference(logits, target).numpy() == pytest.approx(wanted, abs=1e-6)


class TestMeanTeacher:
    def test_it_costs_nothing_to_agree(self, nets, unlabelled, silence):
        """The same network, the same images, no noise: nothing to learn. Another teacher: something."""
        nets["average"].load_state_dict(nets["model"].state_dict())
        assert cost(nets, unlabelled) == pytest.approx(0, abs=1e-10)
        with torch.no_grad():
            nets["average"].head.bias[0] += 1
        assert cost(nets, unlabelled) > 1e-2

    def test_a_whole_step_costs_the_labels_alone_where_they_agree(self, nets, labelled, unlabelled, silence):
        nets["average"].load_state_dict(nets["model"].state_dict())
        both, alone = (MeanTeacher(**TINY).training_step(nets, labelled, free, END) for free in (unlabelled, None))
        assert both.item() == pytest.approx(alone.item(), abs=1e-6)

    def test_the_loss_is_the_mean_over_voxels_and_classes(self, nets, unlabelled, silence):
        said, taught = nets["model"](unlabelled.images).softmax(1), nets["average"](unlabelled.images).softmax(1)
        assert cost(nets, unlabelled) == pytest.approx(torch.nn.functional.mse_loss(said, taught).item(), abs=1e-7)

    def test_student_and_teacher_each_have_their_own_noise(self, nets, labelled, unlabelled):
        seen = {}
        for name, net in nets.items():
            net.register_forward_pre_hook(lambda net, images, name=name: seen.update({name: images[0]}))
        MeanTeacher(**TINY).training_step(nets, labelled, unlabelled, START)
        mine, theirs = seen["model"] - unlabelled.images, seen["average"] - unlabelled.images
        for noise in (mine, theirs):
            assert 0.05 < noise.std() < 0.15
        assert abs(np.corrcoef(mine.ravel(), theirs.ravel())[0, 1]) < 0.2

    def test_the_teacher_only_teaches(self, nets, unlabelled):
        nets.requires_grad_(True)
        taught = MeanTeacher(**TINY).teach(nets, unlabelled.images)
        assert not taught.requires_grad
        assert torch.allclose(taught.sum(1), torch.ones(2, 16, 16), atol=1e-5)


def cost(nets: nn.ModuleDict, unlabelled: Batch) -> float:
    logits = nets["model"](unlabelled.images)
    return MeanTeacher(**TINY).unsupervised(nets, logits, unlabelled, END).item()


class TestVotes:
    def test_the_entropy_is_that_of_the_mean(self, nets, unlabelled):
        mean, entropy = UncertaintyAwareMeanTeacher(**TINY).vote(nets, unlabelled.images)
        assert mean.shape == (2, 3, 16, 16)
        assert entropy.numpy() == pytest.approx(stats.entropy(mean.numpy(), axis=1), abs=1e-5)

    def test_a_certain_vote_has_no_entropy(self, nets, unlabelled):
        with torch.no_grad():
            nets["average"].head.bias[1] += 1000
        _, entropy = UncertaintyAwareMeanTeacher(**TINY).vote(nets, unlabelled.images)
        assert (entropy == 0).all()

    def test_the_mean_is_over_votes(self, nets, unlabelled):
        one, two = UncertaintyAwareMeanTeacher(**TINY, votes=1), UncertaintyAwareMeanTeacher(**TINY, votes=2)
        torch.manual_seed(1)
        first, second = (one.vote(nets, unlabelled.images)[0] for _ in range(2))
        torch.manual_seed(1)
        mean, _ = two.vote(nets, unlabelled.images)
        assert torch.allclose(mean, (first + second) / 2, atol=1e-6)

    def test_votes_differ_by_dropout(self, nets, unlabelled, silence):
        """Without noise two votes still differ; without dropout as well they do not."""
        for rate, alike in [(0.5, False), (0.0, True)]:
            method = UncertaintyAwareMeanTeacher(**TINY, votes=1, dropout=rate)
            votes = [method.vote(nets, unlabelled.images)[0] for _ in range(2)]
            assert torch.allclose(*votes) == alike

    def test_the_voters_get_no_gradient(self, nets, unlabelled):
        nets.requires_grad_(True)
        mean, entropy = UncertaintyAwareMeanTeacher(**TINY).vote(nets, unlabelled.images)
        assert not mean.requires_grad and not entropy.requires_grad


class TestThreshold:
    @pytest.fixture
    def unsure(self, monkeypatch) -> torch.Tensor:
        """(2, 16, 16) entropies that the votes are said to have, to be filled in."""
        entropy = torch.zeros(2, 16, 16)
        mean = torch.full((2, 3, 16, 16), 1 / 3)
        monkeypatch.setattr(UncertaintyAwareMeanTeacher, "vote", lambda self, nets, images: (mean, entropy))
        return entropy

    @pytest.mark.parametrize(("now", "height"), [(START, -5.0), (Moment(75, 100), -1.25), (END, 0.0)])
    def test_voxels_above_it_do_not_count(self, nets, unlabelled, unsure, now, height):
        """It rises from 3/4 of the largest entropy to the whole, from the first unlabelled image to the end."""
        limit = math.log(3) * (0.75 + 0.25 * math.exp(height))
        unsure[:, :8], unsure[:, 8:] = limit - 0.01, limit + 0.01
        logits = torch.randn(2, 3, 16, 16, requires_grad=True)
        loss_of(nets, unlabelled, logits, now).backward()
        touched = logits.grad.abs().sum(1) > 0
        assert touched[:, :8].all() and not touched[:, 8:].any()

    def test_the_loss_is_the_mean_over_sure_voxels(self, nets, unlabelled, unsure, silence):
        unsure[:, 4:] = 10.0
        logits = torch.randn(2, 3, 16, 16)
        difference = logits.softmax(1) - nets["average"](unlabelled.images).softmax(1)
        wanted = difference.square()[:, :, :4].mean().item()
        assert loss_of(nets, unlabelled, logits, START).item() == pytest.approx(wanted, abs=1e-7)

    def test_nowhere_sure_is_no_loss(self, nets, unlabelled, unsure):
        unsure[:] = 10.0
        assert loss_of(nets, unlabelled, torch.randn(2, 3, 16, 16), START) == 0

    def test_at_its_maximum_it_is_mean_teacher(self, nets, unlabelled, silence):
        logits = torch.randn(2, 3, 16, 16)
        wanted = MeanTeacher(**TINY).unsupervised(nets, logits, unlabelled, END).item()
        assert loss_of(nets, unlabelled, logits, END).item() == pytest.approx(wanted, abs=1e-7)


def loss_of(nets: nn.ModuleDict, unlabelled: Batch, logits: torch.Tensor, now: Moment) -> torch.Tensor:
    return UncertaintyAwareMeanTeacher(**TINY).unsupervised(nets, logits, unlabelled, now)


@pytest.mark.parametrize("dims", [2, 3])
class TestDropout:
    def test_it_drops_whole_maps_of_the_deepest_level(self, dims):
        net, image = settled(dims)
        before = deepest(net, image)
        with dropout(net, 0.5):
            during = deepest(net, image)
        alive = before.flatten(2).amax(2) > 0
        share = (during / before.clamp_min(1e-9)).flatten(2).amax(2)[alive]
        assert set(share.round(decimals=3).tolist()) == {0.0, 2.0}
        assert (torch.isclose(during, before * 2, atol=1e-5) | (during == 0)).all()

    def test_nothing_is_left_behind(self, dims):
        net, image = settled(dims)
        weights, before = {name: value.clone() for name, value in net.state_dict().items()}, net(image)
        with dropout(net, 0.5):
            assert not torch.equal(net(image), before)
        assert torch.equal(net(image), before)
        assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
        assert not any(module._forward_hooks for module in net.modules())

    def test_nor_after_an_error(self, dims):
        net, _ = settled(dims)
        with pytest.raises(KeyError), dropout(net, 0.5):
            raise KeyError
        assert not any(module._forward_hooks for module in net.modules())


def settled(dims: int) -> tuple[UNet, torch.Tensor]:
    """A tiny network that does not change as it is used, and four images."""
    return UNet(channels=(4, 8), dims=dims).eval(), torch.randn(4, 1, *[8] * dims)


def deepest(net: UNet, image: torch.Tensor) -> torch.Tensor:
    """What the level above gets of the deepest one."""
    seen = []
    handle = net.down[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(image)
    handle.remove()
    return seen[0]
