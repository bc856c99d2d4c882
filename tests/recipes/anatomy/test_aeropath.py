"""AeroPath: patches are of one place; far pixels are heard through the overview alone; what hangs together counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.measures.trees import largest_part
from medcook.methods import Batch, Moment
from medcook.recipes.anatomy import _trees, aeropath
from medcook.recipes.anatomy.aeropath import PATCH, FindAirways, MultiScale, TwoScales, airway_rows, same_patches

TASK = FindAirways("embedded", side=64)
SIZES = {"inputs": 1, "classes": 2, "channels": (4, 8)}


def network(coarse=True, fine=True) -> TwoScales:
    torch.manual_seed(0)
    return TwoScales(**SIZES, coarse=coarse, fine=fine).eval()


def heard(model: TwoScales) -> float:
    """How much the answer in one corner of an image depends on pixels in the other."""
    images = torch.randn(1, 1, 2 * PATCH, 2 * PATCH, generator=torch.Generator().manual_seed(1))
    changed = images.clone()
    changed[..., -8:, -8:] += 3
    with torch.no_grad():
        return float((model(images) - model(changed))[..., :8, :8].abs().max())


@pytest.mark.component("patches at full resolution")
def test_patches_alone_hear_nothing_from_beyond_themselves():
    assert heard(network(coarse=False)) == 0


@pytest.mark.component("patches at full resolution")
def test_patches_are_cut_from_the_same_place_of_every_map():
    rows = torch.arange(70.0)[:, None].expand(70, 60)
    columns = torch.arange(60.0).expand(70, 60)
    maps = torch.stack([rows, columns])[None].expand(5, 2, 70, 60)
    torch.manual_seed(3)
    first, second = same_patches(maps, maps[:, :1] * 2)
    assert first.shape == (5, 2, PATCH, PATCH) and torch.equal(second, first[:, :1] * 2)
    assert (first[:, 0].diff(dim=1) == 1).all() and (first[:, 1].diff(dim=2) == 1).all()
    assert len({tuple(each[:, 0, 0].tolist()) for each in first}) > 1
    (small,) = same_patches(maps[..., :20, :30])
    assert small.shape == (5, 2, 20, 30)


def test_the_answer_is_that_of_the_fine_network_where_the_image_is_one_patch():
    model, images = network(), torch.randn(2, 1, PATCH, PATCH)
    with torch.no_grad():
        assert torch.allclose(model(images), model.fine(model.told(images)), atol=1e-5)


def test_the_overview_sees_the_mean_of_neighbours():
    model, images = network(), torch.randn(1, 1, 32, 32)
    seen = []
    model.coarse.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.overview(images)
    assert torch.allclose(seen[0], images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), atol=1e-6)


def test_patches_are_told_the_overview():
    model, images = network(), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        told = model.told(images)
        assert torch.equal(told[:, :1], images) and torch.allclose(told[:, 1:].sum(1), torch.ones(1, 32, 32))
        assert torch.allclose(told[:, 1:], model.overview(images).softmax(1))
        model.fine.head.weight.zero_()
        blind = model(images)
        assert torch.allclose(blind, model.fine.head.bias[:, None, None].expand_as(blind), atol=1e-6)


def gradients(method: MultiScale, labels) -> dict[str, float]:
    torch.manual_seed(0)
    nets = method.build(1, 2, 2)
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    method.training_step(nets, Batch(images, labels), None, Moment(0, 1)).backward()
    found = {}
    for name in ("coarse", "fine"):
        net = getattr(nets["model"], name)
        if net is not None:
            found[name] = float(net.head.weight.grad.abs().sum())
    return found


def test_both_networks_learn_and_the_fine_one_does_not_teach_the_other():
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 20:40, 20:40] = 1
    both = gradients(MultiScale(channels=(4, 8)), labels)
    assert both["coarse"] > 0 and both["fine"] > 0
    assert gradients(MultiScale(channels=(4, 8), fine=False), labels).keys() == {"coarse"}
    assert gradients(MultiScale(channels=(4, 8), coarse=False), labels).keys() == {"fine"}
    alone = gradients(MultiScale(channels=(4, 8), fine=False), labels)["coarse"]
    assert both["coarse"] == pytest.approx(alone, rel=1e-4)


def answered(guess, planted) -> dict:
    """The row of an answer to one image."""
    preparation = SimpleNamespace(images=lambda case: None, planted=lambda case: [planted])
    logits = torch.from_numpy(np.stack([~guess, guess])[None].astype(np.float32))
    fitted = SimpleNamespace(task=SimpleNamespace(preparation=preparation), answer=lambda images: logits)
    case = SimpleNamespace(case_id="a", patient_id="a")
    return airway_rows(fitted, case)[0]


@pytest.fixture(scope="module")
def planted():
    lungs = np.zeros((128, 128), bool)
    lungs[20:110, 10:55] = lungs[20:110, 73:118] = True
    return aeropath.PlantedTubes((128, 128), 1).plant(np.zeros((128, 128)), lungs, np.random.default_rng(0))


def test_airways_are_one_class(planted):
    assert set(np.unique(planted.label)) == {0, 1} and TASK.classes == 2 and TASK.structures == {1: "airways"}


@pytest.mark.component("measures of ATM'22")
def test_rows_hold_the_measures_of_atm22(planted):
    truth, branches = planted.label > 0, planted.trees["airways"]
    row = answered(truth, planted)
    assert (row["length"], row["branches"], row["precision"], row["dice"]) == (1, 1, 1, 1)
    upper = largest_part(truth & (np.arange(128)[:, None] < 70), corners=True)
    row, lines = answered(upper, planted), _trees.lines(branches, truth.shape)
    line = lines > 0
    assert row["length"] == pytest.approx((upper & line).sum() / line.sum()) and row["precision"] == 1
    numbers = [number for number in range(1, len(branches) + 1) if (lines == number).any()]
    found = [upper[lines == number].mean() >= 0.8 for number in numbers]
    assert 0 < row["branches"] < 1 and row["branches"] == pytest.approx(np.mean(found))
    assert answered(np.ones_like(truth), planted)["precision"] == pytest.approx(truth.mean())


@pytest.mark.component("topologically correct")
def test_a_gap_takes_what_lies_beyond_it(planted):
    truth = planted.label > 0
    broken = truth & ~((np.arange(128)[:, None] >= 50) & (np.arange(128)[:, None] < 53))
    row, line = answered(broken, planted), _trees.lines(planted.trees["airways"], truth.shape) > 0
    assert row["whole"] == 0 and row["parts"] == ndimage.label(broken, np.ones((3, 3)))[1] > 1
    assert row["length"] < (line & broken).sum() / line.sum() - 0.1
    assert answered(truth, planted)["whole"] == 1


def test_parts_may_touch_by_corners():
    mask = np.zeros((6, 6), bool)
    mask[:2, :2] = mask[2:4, 2:4] = mask[5, 5] = True
    assert largest_part(mask).sum() == 4 and largest_part(mask, corners=True).sum() == 8


def test_the_ill_are_marked(planted):
    assert answered(planted.label > 0, planted._replace(state="narrowed"))["ill"] == 1
    assert answered(planted.label > 0, planted._replace(state="healthy"))["ill"] == 0
