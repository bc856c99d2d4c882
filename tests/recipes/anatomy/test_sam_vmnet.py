"""SAM-VMNet: angiograms with known vessels, the network of scans, what the small SAM adds, and what is scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained

from medcook.data import Case
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.anatomy import _angiograms, _stenoses, _trees, _vmunet, sam_vmnet
from medcook.recipes.anatomy._angiograms import angiogram, coronary
from medcook.recipes.anatomy._centrelines import parsed
from medcook.recipes.anatomy._vmunet import Expand, GatedScan, Merge, VMUNet
from medcook.recipes.anatomy.sam_vmnet import SamVM, diameter_error, recipe, vessel_rows
from medcook.sam.adapting import fitted_in, start

ARMS = {name: arm.method for name, arm in recipe.arms.items()}
TINY = dict(widths=(4, 8, 8), patch=2, states=2)


def net(**settings) -> VMUNet:
    torch.manual_seed(0)
    return VMUNet(**dict(inputs=1, classes=2) | TINY | settings).eval()


def test_a_stenosed_vessel_is_narrow_where_it_is_said_to_be():
    trees = [coronary((96, 96), np.random.default_rng(seed)) for seed in range(12)]
    counts = [sum(len(branch.stenoses) for branch in tree) for tree in trees]
    assert min(counts) == 0 and max(counts) == _angiograms.MOST
    for tree in trees:
        for branch in tree:
            wide = branch.radius.max()
            for at, degree in branch.stenoses:
                low, high = _angiograms.DEGREES
                assert low <= degree <= high and branch.radius[at] == pytest.approx((1 - degree) * wide, rel=0.11)
                assert branch.length >= 0.75 * _angiograms.LONG and wide >= 0.75 * _angiograms.WIDE
            if not branch.stenoses:
                assert branch.radius.min() >= 0.89 * wide


def test_an_angiogram_is_dark_where_contrast_is_deep_and_unchanged_elsewhere():
    rng = np.random.default_rng(3)
    image = rng.standard_normal((96, 96))
    planted = angiogram(image, np.random.default_rng(1))
    drawn = _trees.rendered(planted.trees["vessels"], (96, 96))
    darker = -image - planted.image[0]
    assert (darker[drawn.edge >= _trees.REACH] < 0.05).all() and darker.min() > -1e-9
    deep, shallow = drawn.thickness > 5, (drawn.thickness > 1) & (drawn.thickness < 2)
    assert darker[deep].min() > 1.5 * darker[shallow].mean() > 0
    assert (planted.label[drawn.mask] == 1).all() and planted.label.mean() < 0.15


def test_the_task_shows_the_middle_of_the_image():
    task = sam_vmnet.ANGIOGRAMS
    assert task.preparation.size == (96, 96) and task.preparation.long_side == 192 and task.classes == 2
    case = next(iter(sam_vmnet.ANGIOGRAMS_QUICK.cases("val")))
    images = sam_vmnet.ANGIOGRAMS_QUICK.preparation.images(case)
    assert images.shape[1:] == (1, 48, 48)


@pytest.mark.component("VM-UNet")
def test_a_gated_scan_is_its_formula():
    torch.manual_seed(0)
    block, x = GatedScan(4, 2), torch.randn(2, 3, 5, 4)
    inner, gate = (x @ block.enter.weight.T).chunk(2, -1)
    near = F.silu(block.near(inner.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    rows = near.reshape(2, 15, 8)
    columns = near.transpose(1, 2).reshape(2, 15, 8)
    heard = block.scans[0](rows) + block.scans[1](rows.flip(1)).flip(1)
    across = block.scans[2](columns) + block.scans[3](columns.flip(1)).flip(1)
    heard = heard + across.reshape(2, 5, 3, 8).transpose(1, 2).reshape(2, 15, 8)
    wanted = (block.norm(heard).reshape(2, 3, 5, 8) * F.silu(gate)) @ block.leave.weight.T
    assert torch.allclose(block(x), wanted, atol=1e-5)


@pytest.mark.component("VM-UNet")
def test_every_token_hears_of_every_other():
    block, x = _vmunet.Block(4, 1), torch.randn(1, 4, 6, 4)
    changed = x.clone()
    changed[0, 0, 5, 0] += 1.0
    assert ((block(changed) - block(x)).abs().amax(-1) > 1e-7).all()


@pytest.mark.component("VM-UNet")
def test_squares_of_tokens_become_one_and_one_becomes_a_square():
    merge, expand = Merge(3, 5), Expand(5, 3)
    x = torch.randn(2, 6, 4, 3)
    square = merge(x)
    corner = torch.stack([x[:, 0:2, 0:2, c].flatten(1) for c in range(3)], 1).flatten(1)
    assert torch.allclose(square[:, 0, 0], merge.join(merge.norm(corner)), atol=1e-5)
    assert square.shape == (2, 3, 2, 5) and merge(torch.randn(1, 7, 5, 3)).shape == (1, 3, 2, 5)
    grown = expand(square)
    assert grown.shape == x.shape
    changed = square.clone()
    changed[:, 1, 0] += 1
    moved = ((expand(changed) - grown).abs().amax(-1) > 1e-7).nonzero()[:, 1:]
    assert {tuple(place) for place in moved.tolist()} == {(2, 0), (2, 1), (3, 0), (3, 1)}


@pytest.mark.component("VM-UNet")
def test_skips_are_added_on_the_way_up():
    vmunet, image = net(), torch.randn(2, 1, 16, 16)
    fine = vmunet.norm(vmunet.embed(image).movedim(1, -1))
    middle = vmunet.merge[0](vmunet.down[0](fine))
    deep = vmunet.up[2](vmunet.down[2](vmunet.merge[1](vmunet.down[1](middle))))
    x = vmunet.up[1](vmunet.expand[1](deep) + middle)
    x = vmunet.up[0](vmunet.expand[0](x) + fine)
    assert torch.allclose(vmunet(image), vmunet.head(vmunet.last(x).movedim(-1, 1)), atol=1e-5)
    assert vmunet(torch.randn(1, 1, 19, 23)).shape == (1, 2, 19, 23)


@pytest.mark.component("MedSAM features")
def test_the_deepest_tokens_are_told_the_largest_features_of_their_place():
    vmunet, image, told = net(told=3), torch.randn(1, 1, 16, 16), torch.randn(1, 3, 10, 10)
    seen = []
    vmunet.up[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vmunet(image, told)
    vmunet(image, told - 100.0)
    difference = (seen[0] - seen[1]).movedim(-1, 1)
    assert torch.allclose(difference, F.conv2d(torch.full((1, 3, 2, 2), 100.0), vmunet.told.weight), rtol=1e-3)
    spot = torch.zeros(1, 3, 10, 10)
    spot[0, 1, 7, 2] = 5.0
    vmunet(image, spot)
    vmunet(image, torch.zeros(1, 3, 10, 10))
    moved = (seen[2] - seen[3])[0]
    assert torch.allclose(moved[1, 0], 5 * vmunet.told.weight[:, 1, 0, 0], atol=1e-4)
    assert moved.abs().sum(-1).count_nonzero() == 1, "one token of the deepest grid"


@pytest.mark.component("MedSAM features")
def test_the_encoder_is_the_small_sams_and_frozen():
    encoder, images = sam_vmnet.Encoder(), torch.randn(1, 1, 32, 32)
    sam = start().sam.vision_encoder.eval()
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(images), sam(fitted_in(images)).last_hidden_state, atol=1e-5)
    assert encoder(images).shape == (1, encoder.width, 10, 10)
    assert not any(weight.requires_grad for weight in encoder.parameters())
    nets = ARMS["sam-vmnet"].build(1, 2, 2)
    mine, average = (dict(nets[name].named_parameters()) for name in ("model", "average"))
    shared = [name for name in mine if mine[name] is average[name]]
    assert shared and all(name.startswith("encoder") for name in shared)
    assert not any(weight.requires_grad for weight in nets["average"].parameters())


@pytest.mark.component("ablation")
def test_arms_differ_by_what_their_names_say():
    method = ARMS["sam-vmnet"]
    assert ARMS["without sam"] == replace(method, sam=False) and ARMS["without scans"] == replace(method, scans=False)
    nets = {name: arm.build(1, 2, 2)["model"] for name, arm in ARMS.items()}
    assert isinstance(nets["unet"], UNet) and nets["without sam"].encoder is None
    assert isinstance(nets["without scans"].segmenter, UNet) and nets["without scans"].encoder is not None
    shape = lambda each: {n: p.shape for n, p in each.segmenter.named_parameters() if not n.startswith("told")}  # noqa: E731
    assert shape(nets["sam-vmnet"]) == shape(nets["without sam"])
    plain = {n: p.shape for n, p in nets["unet"].named_parameters()}
    assert shape(nets["without scans"]) == plain
    assert not hasattr(nets["without sam"].segmenter.told, "weight")


@pytest.mark.component("ablation")
def test_the_unet_is_told_at_its_deepest_map():
    torch.manual_seed(0)
    told = sam_vmnet.UNetTold(told=3, inputs=1, classes=2, channels=(4, 4, 8)).eval()
    image, features = torch.randn(1, 1, 16, 16), torch.randn(1, 3, 10, 10)
    maps = told.descend(image)
    maps[-1] = maps[-1] + told.told(F.adaptive_max_pool2d(features, 4))
    assert torch.allclose(told(image, features), told.head(told.ascend(maps)[0]), atol=1e-6)
    assert not torch.allclose(told(image, features), UNet.forward(told, image))


@pytest.mark.parametrize("sam", [True, False])
@pytest.mark.parametrize("scans", [True, False])
def test_a_step_trains_all_that_is_not_frozen(sam, scans):
    method = SamVM(**TINY, sam=sam, scans=scans)
    torch.manual_seed(0)
    nets = method.build(1, 2, 2).train()
    data = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 2, (2, 32, 32)).byte())
    loss = method.training_step(nets, data, None, Moment(0, 10))
    loss.backward()
    free = [p for p in nets["model"].parameters() if p.requires_grad]
    assert free and all(p.grad is not None and p.grad.abs().max() > 0 for p in free)
    assert torch.isclose(loss, find_loss("both")(nets["model"](data.images).float(), data.labels), rtol=1e-3)
    if not sam:
        assert_every_parameter_is_trained(method, (32, 32))


@pytest.mark.component("vessel diameter")
def test_the_diameter_of_a_tube_that_is_known():
    steps = np.arange(8, 40, 0.5)
    branch = _trees.Branch(np.stack([np.full_like(steps, 20.0), steps], 1), np.full_like(steps, 4.0))
    soft = np.clip(0.5 - _trees.rendered((branch,), (48, 48)).edge, 0, 1)
    assert diameter_error(soft, (branch,)) < 0.3
    wider = replace(branch, radius=branch.radius + 1)
    assert diameter_error(soft, (wider,)) == pytest.approx(2, abs=0.3), "a radius that is 1 off"
    assert np.isnan(diameter_error(np.zeros((48, 48)), (branch,)))


class Answering:
    """Stands for a trained run that answers with the truth, or with nothing."""

    def __init__(self, case: Case, knows: bool):
        self.task = sam_vmnet.ANGIOGRAMS_QUICK
        self.planted, self.knows = self.task.preparation.planted(case), knows

    def answer(self, images):
        truth = torch.from_numpy(np.stack([one.label for one in self.planted])).float() * self.knows
        return torch.stack([1 - truth, truth], 1)


@pytest.mark.component("centreline extraction")
@pytest.mark.component("degree of stenosis")
@pytest.mark.component("dynamic cohort")
def test_rows_compare_what_was_found_with_what_was_drawn():
    case = next(iter(sam_vmnet.ANGIOGRAMS_QUICK.cases("val")))
    images = sam_vmnet.ANGIOGRAMS_QUICK.preparation.images(case)
    rows = vessel_rows(Answering(case, True), case)
    assert len(rows) == len(images)
    for row in rows:
        assert row["iou"] == row["sensitivity"] == row["specificity"] == 1 and row["dice"] == 1
        for name in ("tpr", "ppv", "degree_error", "extra"):
            assert row[name] == row[f"{name}_truth"] or np.isnan(row[name])
    missed = vessel_rows(Answering(case, False), case)
    assert {row["iou"] for row in missed} == {0} and {row["specificity"] for row in missed} == {1}
    assert all(row["tpr"] == 0 or np.isnan(row["tpr"]) for row in missed)
    assert all(row.keys() == rows[0].keys() for row in missed)


@pytest.mark.component("degree of stenosis")
@pytest.mark.component("dynamic cohort")
@pytest.mark.component("centreline extraction")
def test_most_stenoses_of_true_masks_are_found_with_their_degree():
    found = []
    for seed in range(6):
        tree = coronary((96, 96), np.random.default_rng(seed))
        mask = _trees.solid(tree, _trees.rendered(tree, (96, 96)))
        found.append(_stenoses.agreement(_stenoses.stenoses_of(parsed(mask)), _stenoses.true_stenoses(tree)))
    mean = lambda name: np.nanmean([one[name] for one in found])  # noqa: E731
    assert mean("tpr") > 0.7 and mean("ppv") > 0.6 and mean("degree_error") < 0.1
