"""Anatomically-aware uncertainty: an autoencoder of masks, what it finds implausible, and what that weighs."""

import math

import pytest
import torch
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.methods import Batch, MeanTeacher, Moment, UncertaintyAwareMeanTeacher
from medcook.recipes.semi_supervised.anatomy_aware_uncertainty import (
    AnatomyAware,
    MaskAutoencoder,
    corrupt,
    neighbours,
    one_hot,
    reconstruction_loss,
)

TINY = dict(channels=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)


def batches() -> tuple[Batch, Batch]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 16), generator=rng).byte()
    images = torch.randn(2, 2, 1, 16, 16, generator=rng)
    return Batch(images[0], labels), Batch(images[1], torch.full_like(labels, IGNORE))


def built(method: MeanTeacher) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(inputs=1, classes=3, dims=2).train()


def step(method: MeanTeacher, nets: nn.ModuleDict, now: Moment) -> Tensor:
    torch.manual_seed(1)
    loss = method.training_step(nets, *batches(), now)
    loss.backward()
    return loss


def discs(count: int, seed: int) -> Tensor:
    """(count, 16, 16) uint8: a disc of radius 4 to 6 near the middle."""
    rng = torch.Generator().manual_seed(seed)
    radius = 4 + 2 * torch.rand(count, 1, 1, generator=rng)
    centre = 6.5 + 2 * torch.rand(2, count, 1, 1, generator=rng)
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    return ((row - centre[0]).square() + (column - centre[1]).square() < radius.square()).byte()


class Says(nn.Module):
    """Stands in for the autoencoder: answers with the logits it was given, and keeps what it was asked."""

    def __init__(self, probabilities: Tensor):
        super().__init__()
        self.answer, self.asked = probabilities.clamp_min(1e-20).log(), []

    def forward(self, masks: Tensor) -> Tensor:
        self.asked.append((masks, self.training))
        return self.answer


@pytest.mark.component("anatomical representation")
def test_the_labels_of_every_step_teach_it():
    for now in (EARLY, LATE):
        nets, asked = built(method := AnatomyAware(views=3, **TINY)), []
        nets["anatomy"].register_forward_pre_hook(lambda net, masks, asked=asked: asked.append(masks[0]))
        step(method, nets, now)
        assert asked[0].shape == (6, 3, 64, 64) and (asked[0] - asked[0].round()).abs().max() > 0.1  # corrupted
        assert all(p.grad is not None for p in nets["anatomy"].parameters())
        assert nets["anatomy"].encode[0].weight.grad.abs().max() > 0


@pytest.mark.component("anatomical representation")
def test_nothing_but_the_code_passes(monkeypatch):
    net = MaskAutoencoder(classes=3, dims=2, code=5).eval()
    masks = torch.rand(2, 3, 16, 16)
    assert net.encode(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    monkeypatch.setattr(net.encode, "forward", lambda masks: torch.ones(2, 5))
    answer = net(masks)
    assert answer.shape == masks.shape and torch.allclose(answer[0], answer[1], atol=1e-6)


def test_it_takes_volumes_of_any_size():
    assert MaskAutoencoder(classes=3, dims=3)(torch.rand(2, 3, 9, 16, 20)).shape == (2, 3, 9, 16, 20)


@pytest.mark.component("anatomical representation")
def test_borders_fray_within_reach():
    places = torch.arange(256).view(1, 16, 16).expand(4, 16, 16)
    found = neighbours(places, 2)
    assert (found // 16 - places // 16).abs().max() == 2 and (found % 16 - places % 16).abs().max() == 2
    assert (found != places).float().mean() > 0.8


@pytest.mark.component("anatomical representation")
def test_corruption_frays_borders_and_paints_boxes():
    torch.manual_seed(0)
    labels = torch.zeros(64, 16, 16, dtype=torch.uint8)
    labels[:, :, 8:] = 1
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[:, 6:10] = True
    frayed = corrupt(labels, 3, share=1.0, reach=2, side=0.0).argmax(1) != labels
    assert 0.2 < frayed[:, near].any(1).float().mean() < 0.8 and frayed[:, ~near].sum() <= 64  # a box is one voxel
    painted = (corrupt(labels, 3, share=0.0, side=0.5).argmax(1) != labels).flatten(1).sum(1)
    assert painted.max() == 64 and (painted == 0).float().mean() > 0.3
    soft = corrupt(labels, 3)
    assert 0.1 < (soft - soft.round()).abs().max() <= 0.2 + 1e-6


def test_unlabelled_voxels_teach_nothing():
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)).byte()
    labels[:, :4] = IGNORE
    other = logits.clone()
    other[:, :, :4] += torch.randn(2, 3, 4, 8) * 3
    assert torch.allclose(reconstruction_loss(logits, labels), reconstruction_loss(other, labels))
    other[:, :, 4:] += torch.randn(2, 3, 4, 8)
    assert not torch.allclose(reconstruction_loss(logits, labels), reconstruction_loss(other, labels))


@pytest.mark.component("plausible segmentation")
def test_the_label_map_of_the_prediction_is_made_plausible():
    predicted = torch.rand(2, 3, 16, 16).softmax(1)
    says = Says(predicted)
    AnatomyAware(**TINY).certainty({"anatomy": says}, predicted)
    (asked, training), *more = says.asked
    assert not more and not training
    assert torch.equal(asked, one_hot(predicted.argmax(1), 3))


@pytest.mark.component("uncertainty-guided consistency")
def test_what_is_plausible_is_certain():
    predicted = torch.rand(2, 3, 16, 16).softmax(1)
    weight = AnatomyAware(**TINY).certainty({"anatomy": Says(predicted)}, predicted)
    assert weight.shape == (2, 1, 16, 16) and torch.allclose(weight, torch.ones_like(weight), atol=1e-6)


@pytest.mark.component("uncertainty-guided consistency")
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_weight_falls_with_the_squared_distance(gamma):
    predicted, plausible = one_hot(torch.tensor([[0, 1, 2, 0]]), 3), one_hot(torch.tensor([[0, 1, 0, 0]]), 3)
    plausible[0, :, 3] = torch.tensor([0.5, 0.5, 0.0])
    weight = AnatomyAware(gamma=gamma, **TINY).certainty({"anatomy": Says(plausible)}, predicted)[0, 0]
    expected = [1, 1, math.exp(-2 * gamma), math.exp(-0.5 * gamma)]
    assert weight.tolist() == pytest.approx(expected, abs=1e-6)
    assert (weight > 0).all() and (weight <= 1).all()


@pytest.mark.component("uncertainty-guided consistency")
def test_implausible_voxels_count_less(monkeypatch):
    taught, logits = torch.rand(2, 2, 3, 16, 16).unbind()
    taught, plausible = taught.softmax(1), torch.rand(2, 3, 16, 16).softmax(1)
    monkeypatch.setattr(AnatomyAware, "teach", lambda self, nets, images: taught)
    nets, unlabelled = {"anatomy": Says(plausible)}, batches()[1]
    loss = AnatomyAware(gamma=4.0, **TINY).unsupervised(nets, logits, unlabelled, LATE)
    weight = torch.exp(-4 * (plausible - taught).square().sum(1))
    difference = (logits.softmax(1) - taught).square()
    assert loss.item() == pytest.approx(((weight * difference.mean(1)).sum() / weight.sum()).item(), rel=1e-5)
    plain = AnatomyAware(weighted=False, **TINY).unsupervised(nets, logits, unlabelled, LATE)
    assert plain.item() == pytest.approx(difference.mean().item(), rel=1e-5)
    assert abs(loss - plain) > 1e-5 * plain


@pytest.mark.component("uncertainty-guided consistency")
def test_autoencoder_and_network_share_no_gradient():
    ours, teacher = AnatomyAware(**TINY), MeanTeacher(**TINY)
    nets, others = built(ours), built(teacher)
    nets["model"].load_state_dict(others["model"].state_dict())
    step(ours, nets, EARLY), step(teacher, others, EARLY)
    for mine, theirs in zip(nets["model"].parameters(), others["model"].parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
    nets.zero_grad()
    unlabelled = batches()[1]
    ours.unsupervised(nets, nets["model"](unlabelled.images), unlabelled, LATE).backward()
    assert all(p.grad is None for p in nets["anatomy"].parameters())
    assert all(p.grad is not None for p in nets["model"].parameters())


@pytest.mark.component("single inference")
def test_one_pass_tells_the_uncertainty():
    def passes(method: MeanTeacher) -> tuple[int, int]:
        nets, calls = built(method), []
        for name in {"average", "anatomy"} & set(nets):
            nets[name].register_forward_hook(lambda *_, name=name: calls.append(name))
        step(method, nets, LATE)
        return calls.count("average"), calls.count("anatomy")

    assert passes(AnatomyAware(**TINY)) == (1, 2)  # the other one is the autoencoder's own lesson
    assert passes(UncertaintyAwareMeanTeacher(**TINY)) == (5, 0)


@pytest.mark.component("global information")
def test_every_voxel_depends_on_the_whole_mask():
    torch.manual_seed(0)
    net = MaskAutoencoder(classes=3, dims=2).eval()
    mask = torch.rand(1, 3, 64, 64, requires_grad=True)
    net(mask)[0, 1, 0, 0].backward()
    assert (mask.grad.abs().sum(1) > 0).float().mean() > 0.99


@pytest.mark.component("anatomical representation")
def test_it_learns_to_undo_corruption():
    torch.manual_seed(0)
    net = MaskAutoencoder(classes=2, dims=2, code=4, channels=(8, 8, 16, 16))
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-2)
    for number in range(40):
        labels = discs(8, number)
        with torch.set_grad_enabled(number < 25):  # then normalisation settles
            loss = reconstruction_loss(net(corrupt(labels, 2)), labels)
        if number < 25:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    labels = discs(16, 99)
    island = labels.clone()
    island[:, :4, :4] = 1
    with torch.no_grad():
        from_clean, from_corrupted = (net.eval()(one_hot(part, 2)).softmax(1) for part in (labels, island))
    truth, wrong = one_hot(labels, 2), one_hot(island, 2)
    distance = (from_corrupted - truth).square().mean()
    assert (from_clean - truth).square().mean() < distance < (wrong - truth).square().mean()
    assert (from_corrupted[:, 1, :4, :4] < 0.5).float().mean() > 0.9  # no disc has an island in its corner
