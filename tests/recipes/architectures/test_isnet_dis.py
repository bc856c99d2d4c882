"""IS-Net: targets that an encoder of the label map gives, side outputs, and what Dice does not see."""

import copy

import numpy as np
import pytest
import torch

from medcook.data.case import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.measures.correction import correction_effort
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.architectures.isnet_dis import ISNet, SideUNet, feature_distance, masks

EARLY, LATE = Moment(0, 300), Moment(100, 300)


@pytest.fixture
def method() -> ISNet:
    return ISNet(channels=(4, 8, 8))


def batch(classes: int = 3) -> Batch:
    """Blocks of labels, so that there is something to give back."""
    labels = torch.randint(0, classes, (2, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Batch(torch.randn(2, 1, 16, 16), labels.byte())


def by_masks(outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([cross_entropy_and_dice(logits, labels) for logits in outputs]).mean()


@pytest.mark.component("ground-truth encoder")
def test_it_learns_to_give_the_labels_back_at_every_stage(method):
    """In the first third of a run; after 60 steps of plain gradient descent on it, most pixels are right at each."""
    nets, data = method.build(1, 3, 2), batch()
    for _ in range(60):
        nets.zero_grad()
        method.training_step(nets, data, None, EARLY).backward()
        with torch.no_grad():
            for weight in nets["truth"].parameters():
                weight -= 0.5 * weight.grad
    outputs = nets["truth"].outputs(masks(data.labels, 3))
    right = [(logits.argmax(1) == data.labels).float().mean() for logits in outputs]
    assert right[0] > 0.98 and right[1] > 0.95 and right[2] > 0.7


@pytest.mark.component("ground-truth encoder")
def test_it_is_frozen_afterwards(method):
    nets, data = method.build(1, 3, 2), batch()
    for now, learns in ((EARLY, True), (Moment(99, 300), True), (LATE, False)):
        nets.zero_grad(), nets.train()
        before = copy.deepcopy(nets["truth"].state_dict())
        method.training_step(nets, data, None, now).backward()
        given = [weight.grad is not None for weight in nets["truth"].parameters()]
        assert all(given) if learns else not any(given)
        moved = [not torch.equal(old, nets["truth"].state_dict()[name]) for name, old in before.items()]
        assert learns == any(moved)  # the running means


@pytest.mark.component("ground-truth encoder")
def test_it_sees_one_mask_for_each_class():
    labels = torch.tensor([[[0, 1], [2, IGNORE]]], dtype=torch.uint8)
    assert masks(labels, 3).argmax(1).flatten().tolist()[:3] == [0, 1, 2]
    assert masks(labels, 3).sum(1).tolist() == [[[1, 1], [1, 0]]]


@pytest.mark.component("feature-level guidance")
def test_the_loss_grows_by_the_distance_of_the_features(method):
    nets, data = method.build(1, 3, 2), batch()
    nets["truth"].eval()
    stages, wanted = nets["model"].stages(data.images), nets["truth"].stages(masks(data.labels, 3))
    assert [found.shape for found in stages] == [target.shape for target in wanted]
    distances = [((a - b) ** 2).sum() / a.numel() for a, b in zip(stages, wanted, strict=True)]
    found = method.training_step(nets, data, None, LATE)
    assert torch.allclose(found, by_masks(nets["model"].outputs(data.images), data.labels) + sum(distances) / 3)


@pytest.mark.component("feature-level guidance")
def test_every_stage_is_drawn_to_its_target():
    found, wanted = ([torch.randn(2, 4, size, size) for size in (8, 4)] for _ in range(2))
    assert feature_distance(wanted, wanted) == 0
    for stage in found:
        stage.requires_grad_()
    feature_distance(found, wanted).backward()
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine.grad, (mine - theirs) / mine.numel())


@pytest.mark.component("mask-level guidance")
def test_every_stage_has_an_output_of_full_size(method):
    network = method.model(1, 3).eval()
    outputs = network.outputs(torch.randn(2, 1, 16, 16))
    assert [logits.shape for logits in outputs] == 3 * [(2, 3, 16, 16)]
    for number in range(3):
        network.zero_grad()
        network.outputs(torch.randn(1, 1, 16, 16))[number].square().mean().backward()
        used = [head.weight.grad is not None for head in (network.head, *network.sides)]
        assert used == [each == number for each in range(3)]


@pytest.mark.component("mask-level guidance")
@pytest.mark.parametrize("deep", [True, False])
def test_all_outputs_count_alike(deep):
    method, data = ISNet(channels=(4, 8, 8), guided=False, deep=deep), batch()
    nets = method.build(1, 3, 2)
    outputs = nets["model"].outputs(data.images)
    assert len(outputs) == (3 if deep else 1)
    assert torch.allclose(method.training_step(nets, data, None, LATE), by_masks(outputs, data.labels))


def test_the_first_output_is_the_book_s_unet():
    ours, book = SideUNet(inputs=1, classes=3, channels=(4, 8, 8)), UNet(inputs=1, classes=3, channels=(4, 8, 8))
    book.load_state_dict({name: weight for name, weight in ours.state_dict().items() if "sides" not in name})
    image = torch.randn(2, 1, 33, 47)
    assert torch.allclose(ours.eval()(image), book.eval()(image), atol=1e-6)
    assert torch.equal(ours(image), ours.outputs(image)[0])


@pytest.mark.component("human correction efforts")
def test_clicks_tell_masks_of_equal_dice_apart():
    """A disc that is shifted a little, and one in its place with holes and crumbs of as many pixels."""
    rows, columns = np.mgrid[:96, :96]
    truth = (rows - 48) ** 2 + (columns - 48) ** 2 < 30**2
    shifted = np.roll(truth, 3, axis=1)
    wrong = int((shifted & ~truth).sum())
    inside = (rows - 48) ** 2 + (columns - 48) ** 2 < 22**2
    lattice = (rows % 3 == 0) & (columns % 2 == 0)
    outside = (rows - 48) ** 2 + (columns - 48) ** 2 > 34**2
    crumbled = truth.copy()
    crumbled.flat[np.flatnonzero(lattice & inside)[:wrong]] = False
    crumbled.flat[np.flatnonzero(lattice & outside)[:wrong]] = True

    def dice(guess: np.ndarray) -> float:
        return 2 * (truth & guess).sum() / (truth.sum() + guess.sum())

    assert dice(shifted) == dice(crumbled) > 0.9
    smooth, crumbs = (correction_effort(truth, guess) for guess in (shifted, crumbled))
    assert smooth.clicks == 0 and crumbs.missing_parts == wrong
    smooth, crumbs = (correction_effort(truth, guess, relax=0) for guess in (shifted, crumbled))
    assert 0 < smooth.clicks < 20 and crumbs.clicks == 2 * wrong > 300


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(method, size):
    labels = torch.randint(0, 3, (2, *size)).byte()
    nets = method.build(1, 3, 2)
    assert nets["model"](torch.randn(2, 1, *size)).shape == (2, 3, *size)
    assert torch.isfinite(method.training_step(nets, Batch(torch.randn(2, 1, *size), labels), None, LATE))


@pytest.mark.parametrize("changes", [{}, {"guided": False}, {"deep": False}])
def test_every_weight_is_used(changes):
    method = ISNet(channels=(4, 8, 8), **changes)
    nets = method.build(1, 3, 2)
    method.training_step(nets, batch(), None, EARLY).backward()
    assert all(weight.grad is not None for weight in nets.parameters() if weight.requires_grad)


def test_the_ablation_has_no_targets():
    """The same network with the same side outputs; the encoder of labels is not even built."""
    whole, bare = (ISNet(channels=(4, 8), guided=guided).build(1, 3, 2) for guided in (True, False))
    assert set(whole) - set(bare) == {"truth"}
    assert [weight.shape for weight in whole["model"].parameters()] == [w.shape for w in bare["model"].parameters()]
    data, method = batch(), ISNet(channels=(4, 8), guided=False)
    early, late = (method.training_step(bare, data, None, now) for now in (EARLY, LATE))
    assert early == late
