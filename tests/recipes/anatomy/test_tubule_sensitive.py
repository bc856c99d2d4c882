"""Tubule-sensitive networks: trees in lungs, recalibration, distillation, priors, and what is measured of branches."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medcook.data import Case
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.anatomy import _lung_trees, _trees
from medcook.recipes.anatomy import tubule_sensitive as tubule
from medcook.recipes.anatomy._lung_trees import context, lung_trees, with_lung_trees
from medcook.recipes.anatomy._trees import Branch
from medcook.recipes.anatomy.tubule_sensitive import Recalibration, TubuleNet, TubuleSensitive, attention, recipe

ARMS = {name: arm.method for name, arm in recipe.arms.items()}
SIZE = (128, 128)


def lungs() -> np.ndarray:
    rows, columns = np.indices(SIZE)
    return sum(((rows - 64) / 52) ** 2 + ((columns - middle) / 24) ** 2 < 1 for middle in (32, 96)) > 0


def net(**settings) -> TubuleNet:
    torch.manual_seed(0)
    return TubuleNet(**dict(inputs=3, classes=4, channels=(4, 4, 8), recalibrate=True, prior=True) | settings).eval()


@pytest.mark.component("airway, artery and vein")
def test_arteries_lie_beside_airways_and_veins_apart():
    trees = lung_trees(lungs(), np.random.default_rng(0))
    assert all(len(tree) > 5 for tree in trees.values()) and len(trees["artery"]) == len(trees["airway"])
    for tree in trees.values():
        for number, branch in enumerate(tree):
            assert branch.parent < number
    for airway, artery in zip(trees["airway"], trees["artery"], strict=True):
        own = artery.points[-len(airway.points) :]
        apart = np.linalg.norm(own - airway.points, axis=1) - airway.radius - artery.radius[-len(airway.points) :]
        assert apart == pytest.approx(_lung_trees.BESIDE, abs=0.01)
        assert artery.radius[-1] == pytest.approx(_lung_trees.THIN * airway.radius[-1])
        if airway.parent >= 0:
            assert np.allclose(artery.points[0], trees["artery"][airway.parent].points[-1])
    wide = np.concatenate([b.points for b in (*trees["airway"], *trees["artery"]) if b.generation < 2])
    for vein in trees["vein"]:
        if vein.parent < 0:
            away = np.linalg.norm(vein.points[:, None] - wide, axis=-1).min(1)
            assert away.min() > vein.radius[0]
    first = [branch.points[0, 1] for branch in trees["airway"] if branch.parent < 0]
    last = [branch.points[-1, 1] for branch in trees["airway"] if branch.parent < 0]
    assert all((b < a) if a < 64 else (b > a) for a, b in zip(first, last, strict=True)), "outwards"
    assert not any(lung_trees(np.zeros(SIZE, bool), np.random.default_rng(0)).values())


@pytest.mark.component("airway, artery and vein")
def test_vessels_look_alike_and_airways_are_dark():
    planted = with_lung_trees(np.zeros(SIZE), lungs(), np.random.default_rng(0))
    grey = planted.image[0]
    bright = [grey[planted.label == value].mean() for value in (1, 2, 3)]
    assert bright[0] < -0.2 < 0.2 < min(bright[1:]) and abs(bright[1] - bright[2]) < 0.25
    assert set(np.unique(planted.label)) == {0, 1, 2, 3} and planted.image.shape == (3, *SIZE)
    airways = _trees.rendered(planted.trees["airway"], SIZE).mask
    assert (planted.label[airways] == 1).all(), "an airway is before the others"
    thick = _trees.rendered(planted.trees["vein"], SIZE).thickness
    alone = (planted.label == 3) & (_trees.rendered(planted.trees["artery"], SIZE).edge > 1)
    assert np.corrcoef(grey[alone], thick[alone])[0, 1] > 0.5


@pytest.mark.component("anatomy prior")
def test_context_says_where_lungs_are_and_how_deep_one_is_in_them():
    place, depth = context(lungs())
    assert set(np.unique(place)) == {-1, 0, 1} and (place[lungs()] == 1).all()
    assert place[64, 64] == -1 and place[64, 2] == 0 and place[2, 64] == 0
    assert depth[64, 32] == pytest.approx(4 * 24 / 128, abs=0.06) and depth[64, 64] < 0 and depth[0, 0] < -0.8
    assert (depth[lungs()] > 0).all() and np.abs(depth).max() <= 1
    assert context(np.zeros((8, 8), bool)).max() == 0


@pytest.mark.component("feature recalibration")
def test_recalibration_is_its_formula():
    torch.manual_seed(0)
    layer, x = Recalibration(4, 6), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        layer.rows.normal_()
        layer.columns.normal_()
    z = torch.zeros(2, 4, 6, 6)
    for h in range(6):
        for w in range(6):
            z[:, :, h, w] = (x[:, :, :, w] * layer.rows).sum(-1) + (x[:, :, h, :] * layer.columns).sum(-1)
    first, second = layer.weigh[0], layer.weigh[2]
    inner = torch.relu(torch.einsum("oc,bchw->bohw", first.weight[:, :, 0, 0], z) + first.bias[:, None, None])
    outer = torch.einsum("oc,bchw->bohw", second.weight[:, :, 0, 0], inner) + second.bias[:, None, None]
    assert torch.allclose(layer(x), x * torch.sigmoid(outer), atol=1e-5)
    assert first.weight.shape[0] == 2, "half of the channels in between"


@pytest.mark.component("feature recalibration")
def test_weights_begin_as_means_and_are_resampled_for_other_sizes():
    layer = Recalibration(2, 8)
    x = torch.ones(1, 2, 4, 16)
    seen = []
    layer.weigh[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layer(x)
    assert torch.allclose(seen[0], torch.full((1, 2, 4, 16), 2.0)), "a mean over rows and one over columns"
    ramp = torch.arange(8.0)
    assert tubule.resampled(ramp, 8) is ramp
    assert tubule.resampled(ramp, 4) == pytest.approx(2 * np.array([0.5, 2.5, 4.5, 6.5]))
    place = torch.zeros(1, 2, 8, 8)
    place[0, 0, 3, 5] = 1.0
    layer(place)
    z = seen[1][0, 0].detach()
    assert z[3, 5] == pytest.approx(2 / 8) and z[3, 0] == z[0, 5] == pytest.approx(1 / 8) and z[0, 0] == 0


@pytest.mark.component("feature recalibration")
@pytest.mark.component("deep supervision")
def test_every_block_is_recalibrated_and_every_level_has_a_head():
    model, image = net(), torch.randn(2, 3, 16, 16)
    maps = []
    for level, block in enumerate(model.down):
        x = F.max_pool2d(maps[-1], 2) if maps else image
        maps.append(model.after_down[level](block(x)))
    x, found, energies = maps[-1], [], []
    for level in (1, 0):
        larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = model.up[level](torch.cat([maps[level], larger], 1))
        energies.append(x.square().sum(1, keepdim=True))
        x = model.after_up[level](x)
        found.append(x)
    logits, given = model.everything(image)
    assert torch.allclose(logits[0], model.head(found[1]), atol=1e-5)
    side = F.interpolate(model.sides[0](found[0]), size=(16, 16), mode="bilinear")
    assert torch.allclose(logits[1], side, atol=1e-5) and len(logits) == 2
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(given, energies[::-1], strict=True))
    assert torch.equal(model(image), logits[0])
    assert [len(each.rows) for each in model.after_down] == [128, 64, 32]
    plain = net(recalibrate=False)
    assert not any(isinstance(layer, Recalibration) for layer in plain.modules())


@pytest.mark.component("attention distillation")
def test_attention_is_a_softmax_of_standard_scores():
    torch.manual_seed(0)
    energy = torch.rand(2, 1, 4, 4) ** 2
    scores = (energy.flatten(1) - energy.flatten(1).mean(1, keepdim=True)) / energy.flatten(1).std(1, keepdim=True)
    assert torch.allclose(attention(energy, (4, 4)), scores.clamp(max=3).softmax(1), atol=1e-5)
    assert torch.allclose(attention(7 * energy + 3, (4, 4)), attention(energy, (4, 4)), atol=1e-5)
    peak = torch.zeros(1, 1, 16, 16)
    peak[0, 0, 5, 5] = 1000.0
    found = attention(peak, (16, 16))
    assert found.argmax() == 5 * 16 + 5 and found.max() < 0.2 and torch.isclose(found.sum(), torch.tensor(1.0))
    assert attention(energy, (8, 8)).shape == (2, 64)
    assert torch.allclose(attention(torch.ones(1, 1, 2, 2), (2, 2)), torch.full((1, 4), 0.25))


@pytest.mark.component("attention distillation")
def test_coarser_layers_learn_from_finer_ones_and_not_the_other_way_round():
    torch.manual_seed(0)
    energies = [torch.rand(2, 1, side, side, requires_grad=True) for side in (16, 8, 4)]
    loss = tubule.distillation(energies)
    pairs = []
    for fine, coarse in ((0, 1), (1, 2)):
        wanted = attention(energies[fine], energies[fine].shape[2:])
        given = attention(energies[coarse], energies[fine].shape[2:])
        pairs.append((((given - wanted) ** 2).sum(1) / (wanted**2).sum(1)).mean())
    assert torch.isclose(loss, sum(pairs))
    loss.backward()
    assert energies[0].grad is None and energies[1].grad.abs().max() > 0 and energies[2].grad.abs().max() > 0
    same = torch.rand(1, 1, 4, 4)
    assert tubule.distillation([same, same]) < 1e-10


@pytest.mark.component("attention distillation")
def test_a_step_of_distillation_makes_attention_agree():
    torch.manual_seed(0)
    fine, coarse = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 4, 4, requires_grad=True)
    before = tubule.distillation([fine, coarse])
    (slope,) = torch.autograd.grad(before, coarse)
    assert tubule.distillation([fine, coarse - 0.05 * slope / slope.norm()]) < before


@pytest.mark.component("anatomy prior")
def test_without_prior_only_the_image_is_seen_and_only_it_changes_intensities():
    image = torch.randn(2, 3, 16, 16)
    other = torch.cat([image[:, :1], torch.randn(2, 2, 16, 16)], 1)
    blind = net(prior=False)
    assert torch.equal(blind(image), blind(other)) and blind.down[0][0].in_channels == 1
    assert not torch.allclose(net()(image), net()(other))
    told = torch.from_numpy(context(lungs())).float()
    data = Batch(torch.cat([torch.randn(1, *SIZE), told])[None], torch.ones(1, *SIZE).byte())
    moved = TubuleSensitive().augment(data, torch.Generator().manual_seed(0))
    assert moved.images.shape == data.images.shape and not torch.allclose(moved.images[:, 1], data.images[:, 1])
    assert moved.images[:, 1].min() >= -1 and moved.images[:, 1].max() <= 1
    grid = TubuleSensitive().augmentation.grid(data.images, torch.Generator().manual_seed(0))
    carried = F.grid_sample(data.images, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(moved.images[:, 1:], carried[:, 1:]) and not torch.allclose(moved.images[:, 0], carried[:, 0])


@pytest.mark.component("deep supervision")
@pytest.mark.component("attention distillation")
def test_the_loss_of_a_step_is_of_all_heads_and_of_attention():
    torch.manual_seed(0)
    method = TubuleSensitive(channels=(4, 4, 8), distil=0.3)
    nets = method.build(3, 4, 2).train()
    data = Batch(torch.randn(2, 3, 16, 16), torch.randint(0, 4, (2, 16, 16)).byte())
    loss = method.training_step(nets, data, None, Moment(0, 10))
    logits, energies = nets["model"].everything(data.images)
    wanted = sum(find_loss("both")(each, data.labels) for each in logits) / len(logits)
    assert torch.isclose(loss, wanted + 0.3 * tubule.distillation(energies), rtol=1e-3)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
    without = replace(method, distil=0.0).training_step(nets, data, None, Moment(0, 10))
    assert torch.isclose(without, wanted, rtol=1e-3)


def test_arms_differ_by_what_their_names_say():
    method = ARMS["tubule-sensitive"]
    assert ARMS["unet"] == replace(method, recalibrate=False, distil=0.0, prior=False)
    assert ARMS["without recalibration"] == replace(method, recalibrate=False)
    assert ARMS["without distillation"] == replace(method, distil=0.0) and method.distil > 0
    assert ARMS["without prior"] == replace(method, prior=False)


def tube(start, end, radius: float = 1.5, parent: int = -1, generation: int = 0) -> Branch:
    points = np.linspace(start, end, 60)
    return Branch(points, np.full(60, radius), parent, generation)


@pytest.mark.component("branches and tree length detected")
def test_branches_count_that_are_found_by_four_fifths():
    tree = (tube((10, 5), (10, 24)), tube((10, 25), (10, 44), parent=0, generation=2))
    truth = _trees.solid(tree, _trees.rendered(tree, (32, 64)))
    whole = tubule.measured(truth, truth, tree)
    assert whole == {"branches": 1, "length": 1, "peripheral": 1, "dice": 1, "precision": 1, "leakage": 0}
    cut = truth.copy()
    cut[:, 34:] = False
    part = tubule.measured(cut, truth, tree)
    assert part["branches"] == 0.5 and part["length"] == pytest.approx(29 / 40, abs=0.02)
    assert part["peripheral"] == pytest.approx(0.45, abs=0.06) and part["precision"] == 1 and part["leakage"] == 0
    leaking = truth.copy()
    leaking[20:23, 5:45] = True
    found = tubule.measured(leaking, truth, tree)
    assert found["branches"] == 1 and found["leakage"] == pytest.approx(0.5, abs=0.06) and found["precision"] < 0.65
    none = tubule.measured(np.zeros_like(truth), truth, tree)
    assert none["branches"] == none["length"] == none["dice"] == 0 and np.isnan(none["precision"])
    assert np.isnan(none["leakage"]) and tubule.mean_of([{"a": np.nan}, {"a": 2.0}], "a") == 2
    assert np.isnan(tubule.mean_of([{"a": np.nan}], "a"))


@pytest.mark.component("branches and tree length detected")
def test_rows_are_of_each_structure():
    task = replace(tubule.TREES_QUICK, side=64)
    label = np.zeros((64, 64), np.uint8)
    label[8:56, 6:28] = label[8:56, 36:58] = 1
    case = Case(np.random.default_rng(0).random((1, 64, 64), np.float32), label, "one", "one")
    truth = task.preparation.labels(case)
    answer = lambda images: F.one_hot(truth.long(), 4).movedim(-1, 1).float()  # noqa: E731
    rows = tubule.tree_rows(SimpleNamespace(task=task, answer=answer), case)
    there = {task.structures[value] for value in truth.unique().tolist() if value}
    assert {row["structure"] for row in rows} == there and "airway" in there
    assert all(row["dice"] == row["branches"] == row["length"] == row["precision"] == 1 for row in rows)
    assert all(row["leakage"] == 0 for row in rows)
