"""SFDA: the source leaves no trace once it is gone; entropy, prior and divergence against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from medcook.data import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.domain_shift.sfda import (
    SourceFree,
    UsualShares,
    divergence,
    recipe,
    shares,
    weighted_entropy,
)

TINY = dict(channels=(4, 8))
SOURCE, LAST, TARGET = Moment(2, 10), Moment(74, 100), Moment(75, 100)
PIXEL = 1 / (24 * 20)


def batch(seed: int = 0, size: tuple[int, int] = (24, 20), known: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (4, *size), generator=rng).byte()
    images = labels[:, None] + torch.randn(4, 1, *size, generator=rng)
    return Batch(images, labels if known else torch.full_like(labels, IGNORE))


def target(size: tuple[int, int] = (24, 20)) -> Batch:
    return batch(9, size, known=False)


def built(method: SourceFree) -> nn.ModuleDict:
    torch.manual_seed(0)
    nets = method.build(1, 3, 2).train()
    nets["usual"].see(batch(5).labels)
    return nets


def probabilities(shape: tuple[int, ...] = (3, 4, 6, 5)) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).softmax(1)


class Says(nn.Module):
    """A network whose logits are given."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@pytest.mark.component("source-free adaptation")
class TestPhases:
    def trace(self, method: SourceFree, now: Moment, labelled: Batch, unlabelled: Batch | None) -> tuple:
        """Loss, gradients and buffers after a step."""
        nets = built(method)
        loss = method.training_step(nets, labelled, unlabelled, now)
        loss.backward()
        method.after_step(nets, now)
        gradients = [p.grad for p in nets["model"].parameters()]
        return loss.detach(), *gradients, *[value.clone() for value in nets.state_dict().values()]

    def same(self, one: tuple, other: tuple) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_adaptation_sees_no_source(self, prior):
        """Other labels, other images, images of nothing but NaN: the same loss, gradients and statistics."""
        method, found = SourceFree(**TINY, prior=prior), []
        nothing = Batch(torch.full((4, 1, 24, 20), math.nan), torch.full((4, 24, 20), IGNORE).byte())
        for labelled in (batch(1), batch(2), nothing):
            found.append(self.trace(method, TARGET, labelled, target()))
        assert torch.isfinite(found[0][0]) and self.same(found[0], found[1]) and self.same(found[0], found[2])

    def test_what_keeps_the_source_sees_both(self):
        """Its loss is the sum, and the statistics that normalise are the target's in both arms."""
        method = SourceFree(**TINY, keeps=True)
        nets = built(method)
        free = SourceFree(**TINY).training_step(nets, batch(), target(), TARGET)
        statistics = [value.clone() for value in nets["model"].buffers() if value.is_floating_point()]
        nets = built(method)
        both = method.training_step(nets, batch(), target(), TARGET)
        source = cross_entropy_and_dice(nets["model"](batch().images), batch().labels)
        assert both.item() == pytest.approx((free + source).item(), rel=1e-5)
        nets = built(method)
        method.training_step(nets, batch(), target(), TARGET)
        after = [value for value in nets["model"].buffers() if value.is_floating_point()]
        assert all(torch.allclose(a, b) for a, b in zip(statistics, after, strict=True))

    def test_the_source_phase_is_supervised_and_sees_no_target(self):
        method = SourceFree(**TINY)
        found = [self.trace(method, LAST, batch(), other) for other in (target(), batch(3, known=False), None)]
        expected = cross_entropy_and_dice(built(method)["model"](batch().images), batch().labels)
        assert found[0][0] == pytest.approx(expected.item(), rel=1e-6)
        assert self.same(found[0], found[1]) and self.same(found[0], found[2])

    def test_phases_change_once(self):
        found = [SourceFree().adapts(Moment(step, 400)) for step in range(400)]
        assert sum(found) == 100 and found == sorted(found)

    def test_target_statistics_take_over(self):
        method = SourceFree(**TINY)
        nets = built(method)
        before = nets["average"].down[0][1].running_mean.clone()
        method.training_step(nets, batch(), target(), TARGET)
        method.after_step(nets, TARGET)
        assert not torch.allclose(before, nets["average"].down[0][1].running_mean)

    def test_the_ablation_and_the_comparator_differ_in_one_setting(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        for other, name in (("without the prior", "prior"), ("with the source", "keeps")):
            assert {key for key in arms["source-free"] if arms["source-free"][key] != arms[other][key]} == {name}


@pytest.mark.component("entropy minimisation")
class TestEntropy:
    def test_it_is_the_mean_over_pixels(self):
        """With equal weights of 1, that of torch; with weights, written out."""
        p = probabilities()
        expected = Categorical(probs=p.movedim(1, -1)).entropy().mean().item()
        assert weighted_entropy(p, torch.ones(4)).item() == pytest.approx(expected, rel=1e-5)
        weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
        loops = [-w * v * math.log(v) for pixel in p.movedim(1, -1).reshape(-1, 4).tolist()
                 for v, w in zip(pixel, weights.tolist(), strict=True)]  # fmt: skip
        assert weighted_entropy(p, weights).item() == pytest.approx(sum(loops) / (3 * 6 * 5), rel=1e-5)

    def test_certainty_costs_nothing_and_has_a_gradient(self):
        logits = torch.full((1, 3, 4, 4), -200.0).requires_grad_()
        certain = F.pad(torch.full((1, 1, 4, 4), 200.0), (0, 0, 0, 0, 0, 2)) + logits
        found = weighted_entropy(certain.softmax(1), torch.ones(3))
        found.backward()
        assert found.item() == 0 and torch.isfinite(logits.grad).all()

    def test_small_structures_weigh_more(self):
        usual = UsualShares(3)
        labels = torch.zeros(1, 10, 10).byte()
        labels[0, 0, :4], labels[0, 5] = 1, 2  # 4, 10 and 86 of 100 pixels
        usual.see(labels)
        inverse = np.array([1 / 0.86, 1 / 0.04, 1 / 0.1])
        assert usual.weights(1e-4).tolist() == pytest.approx(inverse / inverse.sum(), rel=1e-5)

    def test_a_step_without_prior_is_the_entropy(self):
        method = SourceFree(prior=0.0)
        nets = nn.ModuleDict({"model": Says(torch.randn(4, 3, 24, 20)), "usual": built(method)["usual"]})
        found = method.training_step(nets, batch(), target(), TARGET)
        expected = weighted_entropy(nets["model"].logits.softmax(1), nets["usual"].weights(PIXEL))
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


class TestPrior:
    def usual(self) -> UsualShares:
        """Class 1 takes 20 or 10 of 100 pixels where it is, class 2 takes 30 in the one slice that shows it."""
        labels = torch.zeros(3, 10, 10).byte()
        labels[0, :2], labels[1, :1], labels[1, 5:8] = 1, 1, 2
        usual = UsualShares(3)
        usual.see(labels[:2]), usual.see(labels[2:])
        return usual

    def test_usual_shares_are_means_over_slices_that_show_it(self):
        assert self.usual().usual(0.0).tolist() == pytest.approx([(0.8 + 0.6 + 1) / 3, 0.15, 0.3])
        assert UsualShares(3).usual(0.01).tolist() == pytest.approx([0.01] * 3)

    def test_expected_shares_follow_the_tags(self):
        there = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
        found = self.usual().expected(there, 0.01)
        assert found.sum(1).tolist() == pytest.approx([1, 1, 1])
        assert found.tolist() == [
            pytest.approx([0.55, 0.15, 0.3]),
            pytest.approx([0.69, 0.01, 0.3]),
            pytest.approx([0.98, 0.01, 0.01]),
        ]

    def test_more_structures_than_pixels_are_still_shares(self):
        usual = UsualShares(3)
        usual.see(torch.ones(1, 4, 4).byte()), usual.see(torch.full((1, 4, 4), 2).byte())
        found = usual.expected(torch.ones(1, 3, dtype=torch.bool), 0.01)
        assert found.sum().item() == pytest.approx(1) and found.min() > 0

    def tagged(self, method: SourceFree, pixels: tuple[int, int]) -> list[bool]:
        """Tags of a slice of 100 pixels in which the source's network sees so many of class 1 and class 2."""
        logits = torch.zeros(1, 3, 10, 10)
        logits[:, 0] = 1
        logits.view(1, 3, 100)[0, 1, : pixels[0]] = logits.view(1, 3, 100)[0, 2, 50 : 50 + pixels[1]] = 5
        nets = nn.ModuleDict({"ended": Says(logits), "usual": self.usual()})
        return method.tags(nets, torch.zeros(1, 1, 10, 10))[0].tolist()

    def test_tags_come_from_the_sources_network(self):
        assert self.tagged(SourceFree(), (4, 4)) == [True, True, False]  # 4 > 15 / 4 and 4 < 30 / 4 pixels
        assert self.tagged(SourceFree(), (3, 8)) == [True, False, True]
        assert self.tagged(SourceFree(believes=0.0), (0, 0)) == [True, True, True]

    def test_tags_are_normalised_by_the_batch_and_leave_nothing_behind(self):
        """A scanner that shifts and stretches brightness changes no tag, and no statistic of the source's network."""
        torch.manual_seed(0)
        ended = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1)).eval()
        nets, images = nn.ModuleDict({"ended": ended, "usual": built(SourceFree(**TINY))["usual"]}), batch(3).images
        found = [SourceFree(believes=0.9).tags(nets, seen).tolist() for seen in (images, 5 * images + 40)]
        assert found[0] == found[1] and len({tag for tags in found[0] for tag in tags}) == 2
        assert ended[0].running_mean.item() == 0 and ended[0].running_var.item() == 1

    def test_the_network_that_tags_is_the_average_as_the_source_phase_ended(self):
        method = SourceFree(**TINY)
        nets = built(method)
        for now, same in ((SOURCE, True), (LAST, True), (TARGET, False)):
            nn.init.normal_(nets["model"].head.weight)
            method.after_step(nets, now)
            assert torch.equal(nets["ended"].head.weight, nets["average"].head.weight) is same

    def test_only_the_source_teaches_what_is_usual(self):
        method = SourceFree(**TINY, keeps=True)
        nets = built(method)
        before = nets["usual"].total.clone()
        method.training_step(nets, batch(), target(), TARGET)
        assert torch.equal(nets["usual"].total, before)
        method.training_step(nets, batch(), target(), SOURCE)
        assert torch.allclose(nets["usual"].total.sum() - before.sum(), torch.tensor(4.0))


class TestDivergence:
    def test_it_is_that_of_torch_from_found_to_expected(self):
        found, expected = torch.rand(2, 5, 4).softmax(-1) ** 2
        found, expected = found / found.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True)
        reference = kl_divergence(Categorical(probs=found), Categorical(probs=expected)).mean()
        assert divergence(found, expected).item() == pytest.approx(reference.item(), rel=1e-4)
        assert divergence(expected, expected).abs().item() < 1e-6

    def test_a_class_that_is_not_found_costs_nothing(self):
        assert divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])).item() == pytest.approx(math.log(2))

    @pytest.mark.parametrize("slicewise", [False, True])
    def test_a_step_adds_it(self, slicewise):
        """Of the mean over slices, or slice by slice; with tags that differ from slice to slice."""
        logits, ended = torch.randn(2, 4, 3, 24, 20)
        ended[2, 1] = -9  # here the source's network sees no class 1
        nets = nn.ModuleDict({"model": Says(logits), "ended": Says(ended), "usual": built(SourceFree(**TINY))["usual"]})
        methods = [SourceFree(prior=a, slicewise=slicewise) for a in (0.0, 1.0, 3.0)]
        losses = [method.training_step(nets, batch(), target(), TARGET).item() for method in methods]
        usual, found, wanted = nets["usual"].usual(PIXEL), [], []
        for p, there in zip(logits.softmax(1), ([1, 1], [1, 1], [0, 1], [1, 1]), strict=True):
            structures = [u.item() if t else PIXEL for u, t in zip(usual[1:], there, strict=True)]
            found.append(p.mean((1, 2)).numpy()), wanted.append([1 - sum(structures), *structures])
        q, t = np.array(found), np.array(wanted)
        if not slicewise:
            q, t = q.mean(0, keepdims=True), t.mean(0, keepdims=True)
        expected = (q * np.log(q / t)).sum(1).mean()
        assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)
        assert losses[2] - losses[0] == pytest.approx(3 * expected, rel=1e-4)

    def test_it_pulls_a_slice_of_background_towards_its_structures(self):
        """Entropy alone leaves a network that says background as it is; the prior does not."""
        logits = torch.zeros(4, 3, 24, 20)
        logits[:, 0] = 4
        pulls = []
        for prior in (0.0, 1.0):
            nets = built(SourceFree(**TINY))
            nets["model"], nets["ended"] = Says(logits.clone()), Says(torch.randn(4, 3, 24, 20))
            SourceFree(prior=prior).training_step(nets, batch(), target(), TARGET).backward()
            pulls.append(nets["model"].logits.grad[:, 1:].mean().item())
        assert pulls[0] > 0 > pulls[1]


@pytest.mark.component("link to mutual information")
def test_with_a_flat_prior_the_loss_is_log_classes_minus_mutual_information():
    """Of one slice: the information of label and pixel is KL of their joint distribution from independence."""
    p = probabilities((1, 4, 6, 5))
    joint = p.flatten(2)[0] / 30
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint / independent).log()).sum().item()
    loss = weighted_entropy(p, torch.ones(4)) + divergence(shares(p), torch.full((1, 4), 0.25))
    assert loss.item() == pytest.approx(math.log(4) - information, rel=1e-5)


@pytest.mark.component("only one network")
def test_one_network_is_trained():
    nets = built(SourceFree())
    trained = [name for name, weight in nets.named_parameters() if weight.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"model"}
    alone = UNet(inputs=1, classes=3, channels=SourceFree().channels)
    assert sum(p.numel() for p in nets["model"].parameters()) == sum(p.numel() for p in alone.parameters())


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_any_size_and_precision(size):
    method = SourceFree()
    for bfloat16 in (False, True):
        nets = built(method)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = method.training_step(nets, batch(0, size), target(size), TARGET)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert method.predict(nets.eval(), target(size).images).shape == (4, 3, *size)


@pytest.mark.parametrize("now", [SOURCE, TARGET])
@pytest.mark.parametrize("settings", [{}, {"keeps": True}, {"prior": 0.0}])
def test_all_of_the_network_learns(settings, now):
    method = SourceFree(**TINY, **settings)
    nets = built(method)
    method.training_step(nets, batch(), target(), now).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
