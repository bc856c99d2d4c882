"""One click an object and those of its neighbours: guiding signals, the maps, the network, the loss and the score."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from monai.apps.nuclick.transforms import AddPointGuidanceSignald
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import nn

from medcook.data import IGNORE, Case
from medcook.interactive import BESIDE, MEANT, Guided, distances, gaussians
from medcook.losses import soft_dice
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.interactive import nuclick
from medcook.recipes.interactive.nuclick import (
    MIDDLE,
    MultiScale,
    NuClick,
    Residual,
    inner,
    middles,
    neighbours_clicks,
    one_click_rows,
    squiggle,
    weights,
)

SMALL = (4, 4, 4, 4, 4)


def method(**settings) -> NuClick:
    return NuClick(channels=SMALL, **settings)


def discs(*radii: int, side: int = 41) -> torch.Tensor:
    """(B, side, side) bool: a disc each."""
    y, x = np.indices((side, side)) - side // 2
    return torch.from_numpy(np.stack([np.hypot(y, x) <= radius for radius in radii]))


def heart(count: int = 2) -> torch.Tensor:
    """(B, 41, 41) uint8: a disc of 3 in a ring of 2, and a square of 1 beside them."""
    labels = torch.zeros(count, 41, 41, dtype=torch.uint8)
    labels[:, 2:10, 2:10] = 1
    labels[discs(*[12] * count)] = 2
    labels[discs(*[6] * count)] = 3
    return labels


def batch(count: int = 2) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(count, 1, 41, 41), heart(count))


@pytest.mark.component("one click inside each object")
def test_the_inner_part_is_what_lies_deeper_than_the_mean_and_never_empty():
    mask = np.zeros((30, 40), bool)
    mask[5:24, 4:31] = True
    depth = ndimage.distance_transform_edt(mask)
    values = depth[mask]
    for share in (-1, -0.3, 0, 0.8):
        assert np.array_equal(inner(mask, share), depth > values.mean() + share * values.std())
    assert np.array_equal(inner(mask, 50), depth > depth.max() - 1) and inner(mask, 50).any()
    assert np.array_equal(inner(mask, -50), mask)
    assert inner(np.ones((1, 1), bool), 1).all()


@pytest.mark.component("one click inside each object")
def test_a_training_click_is_one_pixel_of_the_inner_part():
    torch.manual_seed(0)
    truth = discs(12, 6, 0).repeat(200, 1, 1)
    marks = method().first(truth)
    assert (marks[:, MEANT].flatten(1).sum(1) == 1).all() and not marks[:, BESIDE].any()
    large = marks[::3, MEANT].any(0)
    assert not (large & ~torch.from_numpy(inner(truth[0].numpy(), -1))).any() and large.sum() > 60
    assert not method().first(truth & False).any()


@pytest.mark.component("clicks of neighbouring objects as exclusion map")
def test_every_other_structure_has_a_click_in_its_middle():
    labels = heart(3)
    labels[0, :, 30:] = IGNORE
    truth = torch.stack([labels[0] == 1, labels[1] == 2, labels[2] == 3])
    clicks = neighbours_clicks(labels, truth, by=0, most=0.0)
    assert [sorted(labels[clicks & (torch.arange(3) == k).view(-1, 1, 1)].tolist()) for k in range(3)] == [
        [2, 3],
        [1, 3],
        [1, 2],
    ]
    depth = distances(torch.stack([labels[1] != 1, labels[1] != 3])[None])[0]
    assert all(depth[k][clicks[1]].max() == depth[k].max() for k in range(2))


@pytest.mark.component("clicks of neighbouring objects as exclusion map")
def test_a_convex_neighbour_is_clicked_where_monai_clicks():
    """MONAI clicks the centroid; that of a convex structure is its middle."""
    labels = torch.zeros(1, 41, 41, dtype=torch.uint8)
    labels[:, 3:10, 5:12], labels[:, 20:31, 22:33], labels[:, 3:8, 30:35] = 1, 2, 3
    truth = labels == 1
    others = torch.where(truth, 0, labels)
    theirs = AddPointGuidanceSignald().exclusion_map(others[0], torch.float32, jitter_range=0, drop_rate=0)
    assert torch.equal(neighbours_clicks(labels, truth, by=0, most=0.0)[0], theirs == 1)


@pytest.mark.component("clicks of neighbouring objects as exclusion map")
def test_neighbours_clicks_are_moved_and_left_out_in_training():
    torch.manual_seed(0)
    labels = torch.zeros(600, 25, 25, dtype=torch.uint8)
    labels[:, 18:23, 18:23], labels[:, 2:7, 2:7] = 1, 2
    truth = labels == 2
    clicks = neighbours_clicks(labels, truth, by=3, most=0.5)
    there = clicks.flatten(1).sum(1)
    assert there.max() == 1 and there.float().mean().item() == pytest.approx(0.75, abs=0.05)
    places = clicks.nonzero()[:, 1:]
    assert places.amin(0).tolist() == [17, 17] and places.amax(0).tolist() == [23, 23]
    corner = neighbours_clicks((labels == 2).byte(), truth & False, by=6, most=0.0)
    assert (corner.flatten(1).sum(1) == 1).all() and corner[:, 0].any()


@pytest.mark.component("clicks of neighbouring objects as exclusion map")
def test_the_network_sees_the_image_the_click_and_those_of_the_neighbours_but_for_the_ablation():
    data = batch()
    for exclusion in (True, False):
        one, seen = method(exclusion=exclusion, jitter=0, drop=0.0), []
        torch.manual_seed(2)
        nets = one.build(1, 4, 2)
        nets["model"].network.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        torch.manual_seed(4)
        one.training_step(nets, data, None, Moment(0, 10))
        (inputs,) = seen
        assert inputs.shape[1] == 3 and torch.equal(inputs[:, :1], data.images)
        dots = inputs[:, 1:] == 1
        asked = data.labels[dots[:, 0]]
        assert len(asked) == 2 and (asked > 0).all()
        for number, value in enumerate(asked):
            beside = sorted(data.labels[number][dots[number, 1]].tolist())
            assert beside == ([v for v in (1, 2, 3) if v != value] if exclusion else [])
        assert torch.allclose(inputs[:, 1:], gaussians(dots, one.sigma))
    arms = {name: arm.method for name, arm in nuclick.recipe.arms.items()}
    assert arms["without exclusion map"] == replace(arms["nuclick"], exclusion=False)
    nets = [arms[name].build(1, 4, 2) for name in ("nuclick", "without exclusion map")]
    nets[1].load_state_dict(nets[0].state_dict())


@pytest.mark.component("squiggle as a guiding signal")
def test_a_squiggle_is_the_skeleton_of_the_inner_part():
    mask = np.zeros((40, 60), bool)
    mask[8:30, 5:30] = mask[14:24, 30:45] = mask[17:22, 45:57] = True
    line = squiggle(mask, 0.5)
    assert np.array_equal(line, skeletonize(inner(mask, 0.5)))
    assert (line <= inner(mask, 0.5)).all() and line.sum() > 10
    assert ndimage.label(line, np.ones((3, 3)))[1] == 1
    torch.manual_seed(0)
    truth = torch.from_numpy(mask).expand(30, -1, -1)
    marks = method(guide="squiggle").first(truth)
    counts = marks[:, MEANT].flatten(1).sum(1)
    assert counts.min() > 5 and len(counts.unique()) > 3 and not (marks[:, MEANT] & ~truth).any()
    squiggles = nuclick.recipe.arms["squiggles"].method
    assert squiggles == replace(nuclick.recipe.arms["nuclick"].method, guide="squiggle")


@pytest.mark.component("weighted loss")
def test_the_object_and_its_neighbours_weigh_more():
    labels = heart(1)
    target, others = (labels == 3).byte(), (labels == 1) | (labels == 2)
    found = weights(target, others)[0]
    share = others.sum() / (labels == 3).sum()
    assert found[labels[0] == 3].unique().item() == pytest.approx(2 + share.item())
    assert (found[others[0]] == 2).all() and (found[labels[0] == 0] == 1).all()
    assert torch.equal(weights(target & 0, others), torch.where(others, 2.0, 1.0))


@pytest.mark.component("weighted loss")
def test_the_loss_is_dice_and_weighted_cross_entropy_of_what_is_known():
    class Fixed(NuClick):
        def respond(self, net, state, marks, before):
            return logits

    data = batch(1)
    data.labels[:, :, 35:] = IGNORE
    labels = torch.where(data.labels == 3, 1, torch.where(data.labels == 1, 2, data.labels))
    labels[labels == 2] = 0
    labels[data.labels == 2] = 2
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 41, 41)
    values = set()
    for seed in range(8):
        torch.manual_seed(seed)
        values.add(
            round(
                Fixed(channels=SMALL)
                .training_step({"model": None}, data._replace(labels=labels), None, Moment(0, 1))
                .item(),
                4,
            )
        )
    wanted = set()
    for value in (1, 2):
        target = torch.where(labels == IGNORE, labels, (labels == value).byte())
        known, mine = labels != IGNORE, labels == value
        others = known & (labels != 0) & ~mine
        chance = logits.softmax(1)[0]
        entropy = -torch.where(mine[0], chance[1], chance[0]).log()
        weight = 1 + others[0].float() + mine[0] * (1 + others.sum() / mine.sum())
        wanted.add(round((soft_dice(logits, target) + (weight * entropy)[known[0]].mean()).item(), 4))
    assert values == wanted


@pytest.mark.component("robustness against variations of the input")
def test_clicks_in_the_middle_are_the_deepest_and_moved_ones_near_and_inside():
    ring = (discs(15) & ~discs(11)).expand(300, -1, -1)
    still = middles(ring[:1])
    depth = distances(~ring[:1, None])[:, 0]
    assert still.sum() == 1 and depth[still] == depth.max()
    moved = middles(ring, np.random.default_rng(0))
    assert (moved.flatten(1).sum(1) == 1).all() and not (moved & ~ring).any()
    far = (moved.nonzero()[:, 1:] - still.nonzero()[0, 1:]).abs().amax(1)
    assert far.max() == 3 and far.min() == 0 and len(moved.any(0).nonzero()) > 10
    assert not middles(ring[:2] & False).any()


def fitted(one: Guided, seen: list) -> SimpleNamespace:
    """What the score needs of a trained method that answers with what lies within 7 pixels of the click."""

    class Net(nn.Module):
        classes = 4

        def forward(self, images, guidance):
            seen.append(guidance)
            yes = (guidance[:, MEANT] > np.exp(-(7**2) / (2 * 4.0**2))).float()
            return torch.stack([1 - yes, yes], dim=1)

    nets = nn.ModuleDict({"average": Net()})
    structures = {1: "square", 2: "ring", 3: "disc"}
    task = SimpleNamespace(preparation=Preparation(size=(41, 41)), structures=structures, targets=structures)
    cost = {"precision": "float32"}
    return SimpleNamespace(method=one, task=task, cost=cost, nets=nets, weights={"last": nets.state_dict()})


def case(name: str = "a") -> Case:
    labels = heart(3)
    labels[2] = 0
    image = np.random.default_rng(0).normal(size=(1, 3, 41, 41)).astype(np.float32)
    return Case(image=image, label=labels.numpy(), spacing=(1.0, 1.0, 1.0), case_id=name, patient_id=name)


@pytest.mark.component("robustness against variations of the input")
def test_every_arm_is_scored_with_the_same_clicks():
    tables, inclusions, exclusions = {}, {}, {}
    for name, one in (("unet", Guided()), ("nuclick", NuClick()), ("bare", NuClick(exclusion=False))):
        seen = []
        tables[name] = one_click_rows(fitted(one, seen), case())
        assert len(seen) == 6 and all(len(guidance) == 2 for guidance in seen)
        inclusions[name] = torch.stack([guidance[:, MEANT] for guidance in seen])
        exclusions[name] = torch.stack([guidance[:, BESIDE] == 1 for guidance in seen])
    assert torch.equal(inclusions["unet"], inclusions["nuclick"])
    assert torch.equal(inclusions["bare"], inclusions["nuclick"])
    assert tables["unet"] == tables["nuclick"] == tables["bare"]
    assert not exclusions["unet"].any() and not exclusions["bare"].any()
    clicks = (inclusions["nuclick"] == 1).view(3, 2, 2, 41, 41)
    around = exclusions["nuclick"].view(3, 2, 2, 41, 41)
    for value in range(3):
        others = [other for other in range(3) if other != value]
        assert torch.equal(around[value], clicks[others].any(0))
    assert not torch.equal(clicks[:, 0], clicks[:, 1])
    row = tables["unet"][2]
    assert row["structure"] == "disc" and row["dice"] > row["dice_moved"] > 0.5
    other = []
    one_click_rows(fitted(NuClick(), other), case("b"))
    assert torch.equal(other[0][:, MEANT], inclusions["nuclick"][0])
    assert not torch.equal(torch.stack([g[:, MEANT] for g in other]), inclusions["nuclick"])


@pytest.mark.component("squiggle as a guiding signal")
def test_squiggles_are_scored_with_squiggles():
    seen = []
    one_click_rows(fitted(NuClick(guide="squiggle"), seen), case())
    wanted = torch.from_numpy(squiggle((heart(1)[0] == 2).numpy(), 0))
    assert torch.equal(seen[2][0, MEANT] == 1, wanted) and wanted.sum() > 10


def test_blocks_are_what_they_say():
    torch.manual_seed(0)
    wide, x = MultiScale(8, MIDDLE).eval(), torch.randn(1, 8, 41, 41, requires_grad=True)
    found = wide(x)
    assert found.shape == x.shape
    for number, (kernel, dilation) in enumerate(zip(*MIDDLE, strict=True)):
        (gradient,) = torch.autograd.grad(found[0, 2 * number : 2 * number + 2, 20, 20].sum(), x, retain_graph=True)
        reached = gradient.abs().sum((0, 1)).nonzero()
        if len(reached):
            half = dilation * (kernel // 2)
            assert reached.amin().item() == 20 - half and reached.amax().item() == 20 + half
    block = Residual(8, 4).eval()
    first = block.first(x)
    assert torch.allclose(block(x), F.relu(first + block.second(first)))


@pytest.mark.parametrize("guide", ["click", "squiggle"])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(guide, size):
    one = method(guide=guide)
    assert_every_parameter_is_trained(one, size)
    nothing = torch.zeros(3, *size, dtype=torch.bool)
    assert not one.first(nothing).any()
