"""UniT: what queries mean, how each group starts from the one above, the assembly, and what is reported."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import IGNORE
from medcook.language import mask_loss
from medcook.methods import Batch, Moment
from medcook.recipes.findings import unit
from medcook.recipes.findings._settings import FINDINGS_QUICK
from medcook.recipes.findings.unit import (
    LUNGS,
    SIDES,
    HierarchicalUNet,
    UniT,
    asked,
    masks_of,
    query_loss,
    recipe,
    reported,
    unit_rows,
)
from medcook.recipes.language._findings import FINDINGS, KINDS, fields_of, matching

SMALL = (4, 8, 8)
ARMS = {name: arm.method for name, arm in recipe.arms.items()}


def labels_with(count: int = 2, size: int = 32) -> torch.Tensor:
    """Label maps with both lungs, a nodule on the right and a cavity and a patch on the left."""
    labels = torch.zeros(count, size, size, dtype=torch.uint8)
    labels[:, 4:28, 3:14], labels[:, 4:28, 18:30] = LUNGS["right"], LUNGS["left"]
    labels[:, 6:11, 5:10] = matching(kind="nodule", side="right")[0]
    labels[:, 6:12, 20:26] = matching(kind="cavity", side="left")[3]
    labels[:, 18:23, 22:27] = matching(kind="patch", side="left")[5]
    return labels


def network(hierarchy: bool = True, lungs: int = 2) -> HierarchicalUNet:
    torch.manual_seed(0)
    return HierarchicalUNet(1, SMALL, 16, lungs, hierarchy).eval()


@pytest.mark.component("organs beside findings")
def test_lungs_are_painted_around_the_same_findings_in_the_same_images():
    case = next(iter(unit.QUICK.cases("val")))
    images, labels = unit.QUICK.preparation.both(case)
    same, findings = FINDINGS_QUICK.preparation.both(case)
    assert torch.equal(images, same)
    assert torch.equal(torch.where(labels > len(FINDINGS), 0, labels), findings)
    organs = super(unit.Painted, unit.QUICK.preparation).labels(case)
    for label, finding, organ in zip(labels, findings, organs, strict=True):
        for (side, _), place in fields_of(organ.numpy() > 0).items():
            assert (label.numpy()[place & (finding.numpy() == 0)] == LUNGS[side]).all()
    names = unit.QUICK.structures
    assert unit.QUICK.classes == 39 and [*names] == [*range(1, 39)]
    assert names[LUNGS["right"]] == "right lung" and names[1] == FINDINGS_QUICK.structures[1]


@pytest.mark.component("queries for organs, detection and diagnosis")
def test_masks_are_what_queries_mean():
    labels = labels_with(1)
    labels[0, :2] = IGNORE
    masks = masks_of(labels, asked(SIDES))[0]
    assert masks.shape[0] == 10 and (masks[:, :2] == IGNORE).all()
    masks, label = masks[:, 2:], labels[0, 2:]
    side, kind = ({v: getattr(f, name) for v, f in enumerate(FINDINGS, 1)} for name in ("side", "kind"))
    for number, values in enumerate(v for group in asked(SIDES) for v in group):
        assert torch.equal(masks[number] == 1, sum(label == value for value in values).bool())
    organs, detection, diagnosis = asked(SIDES)
    for k, name in enumerate(SIDES):
        assert set(organs[k]) == {LUNGS[name], *detection[k]} and {side[v] for v in detection[k]} == {name}
        assert set(detection[k]) == set().union(*diagnosis[3 * k : 3 * k + 3])
        assert [{kind[v] for v in values} for values in diagnosis[3 * k : 3 * k + 3]] == [{each} for each in KINDS]


@pytest.mark.component("queries for organs, detection and diagnosis")
def test_each_group_counts_alike_and_each_mask_has_its_own_dice():
    torch.manual_seed(0)
    labels, logits = labels_with(), torch.randn(2, 10, 32, 32)
    masks, total = masks_of(labels, asked(SIDES)), 0.0
    for first, last in ((0, 2), (2, 4), (4, 10)):
        for number in range(first, last):
            total += mask_loss(logits[:, number], masks[:, number], each=True) / (last - first) / 3
    assert torch.isclose(query_loss(logits, labels, SIDES), total, atol=1e-5)
    sure = torch.where(masks == 1, 20.0, -20.0)
    assert query_loss(sure, labels, SIDES) < 1e-3


@pytest.mark.component("hierarchy of queries")
@pytest.mark.parametrize("hierarchy", [True, False])
def test_a_group_starts_from_what_the_group_above_has_found(hierarchy):
    net, images = network(hierarchy), torch.randn(2, 1, 32, 32)
    maps, nobody = net.encode(images), lambda count: torch.zeros(2, count, dtype=torch.bool)
    organ, detection, diagnosis = (queries.expand(2, -1, -1) for queries in net.queries)
    o = net.ask(maps, organ, nobody(2))
    d = net.ask(maps, detection + hierarchy * o, nobody(2))
    parents = torch.stack([d[:, 0]] * 3 + [d[:, 1]] * 3, 1)
    c = net.ask(maps, diagnosis + hierarchy * parents, nobody(6))
    weights, pixels = net.mask(torch.cat([o, d, c], 1)), net.pixels(maps)
    true = torch.stack(
        [
            (pixels * weights[:, s, :-1, None, None]).sum(1) / SMALL[0] ** 0.5 + weights[:, s, -1, None, None]
            for s in range(10)
        ],
        1,
    )
    assert torch.allclose(net(images), true, atol=1e-4)


@pytest.mark.component("hierarchy of queries")
def test_what_is_found_of_a_lung_reaches_its_own_findings_and_only_with_the_hierarchy():
    images = torch.randn(1, 1, 32, 32)
    for hierarchy in (True, False):
        net = network(hierarchy)
        before = net(images)
        with torch.no_grad():
            net.queries[0].add_(torch.randn(2, 16))
        moved = (net(images) - before).abs().amax((0, 2, 3)) > 1e-4
        assert moved[:2].all() and moved[2:].all() == hierarchy and moved[2:].any() == hierarchy
    plain = network(False)
    assert [p.shape for p in plain.parameters()] == [p.shape for p in network().parameters()]
    assert ARMS["flat queries"] == replace(ARMS["unit"], hierarchy=False)


@pytest.mark.component("assembly of single-organ experts")
def test_experts_take_turns_and_each_is_told_of_its_own_lung():
    torch.manual_seed(0)
    method = UniT(channels=SMALL, width=16, assembled=True)
    nets, data = method.build(1, 39, 2).train(), Batch(torch.randn(2, 1, 32, 32), labels_with())
    for step in range(4):
        nets.zero_grad(set_to_none=True)
        method.training_step(nets, data, None, Moment(step, 10)).backward()
        learns = [any(p.grad is not None for p in expert.parameters()) for expert in nets["model"].experts]
        assert learns == [step % 2 == 0, step % 2 == 1]
    other = data.labels.clone()
    other[:, :, 16:] = 0
    for turn, is_same in ((0, True), (1, False)):
        told = [data, data._replace(labels=other)]
        losses = [method.training_step(nets, each, None, Moment(turn, 10)) for each in told]
        assert torch.equal(*losses) == is_same
    nets.eval()
    apart = [expert(data.images) for expert in nets["model"].experts]
    order = [(0, 0), (1, 0), (0, 1), (1, 1), *((k, n) for k in (0, 1) for n in (2, 3, 4))]
    together = nets["model"](data.images)
    assert together.shape[1] == 10
    assert all(torch.equal(together[:, s], apart[k][:, n]) for s, (k, n) in enumerate(order))
    assert ARMS["experts"] == replace(ARMS["unit"], assembled=True)


@pytest.mark.component("fewer false positives")
def test_reports_are_connected_parts_that_overlap_a_finding_of_their_lung():
    label, probability = labels_with(1)[0].numpy(), np.zeros((32, 32))
    probability[6:11, 5:9], probability[20:22, 4:6], probability[25, 8] = 0.9, 0.6, 0.4
    assert reported(probability, label, "right") == [1, 1, 0]
    assert reported(probability, label, "left") == [0, 2, 2]
    probability[6:11, 5:9] = 0
    assert reported(probability, label, "right") == [0, 1, 1]
    probability[6:11, 5:10], probability[8, 5:10] = 0.9, 0  # two reports of one finding: one is right at most
    assert reported(probability, label, "right") == [1, 2, 0]


@pytest.mark.component("fewer false positives")
@pytest.mark.component("queries for organs, detection and diagnosis")
def test_rows_count_what_is_reported_over_both_lungs_of_all_images():
    labels = labels_with()
    masks = (masks_of(labels, asked(SIDES)) == 1).float()
    organs, detected, diagnosed = masks[:, :2].clone(), masks[:, 2:4].clone(), masks[:, 4:].unflatten(1, (2, 3)).clone()
    detected[0, 0, 20:24, 5:9] = 0.8  # a false positive
    detected[1, 1, :16] = 0  # the cavity is missed
    diagnosed[1, 1, 0, 18:23, 22:27] = 1.1  # the patch is taken for a nodule
    nets = nn.ModuleDict()
    task = SimpleNamespace(preparation=SimpleNamespace(both=lambda case: (torch.zeros(2, 1, 32, 32), labels)))
    method = SimpleNamespace(answer=lambda nets, images: (organs, detected, diagnosed))
    fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, task=task, method=method)
    case = SimpleNamespace(case_id="a", patient_id="a")
    (row,) = unit_rows(fitted, case)
    assert row["f1"] == pytest.approx(10 / 12) and row["precision"] == pytest.approx(5 / 6)
    assert row["sensitivity"] == pytest.approx(5 / 6) and row["false_positives"] == 0.5
    assert row["diagnosed"] == pytest.approx(5 / 6) and row["dice_lungs"] == 1
    dice = [2 * 25 / (2 * 25 + 16), 1, 1, 2 * 25 / (2 * 25 + 36)]
    assert row["dice"] == pytest.approx(np.mean(dice))
    labels[:], detected[:] = 0, 0
    (empty,) = unit_rows(fitted, case)
    assert empty.keys() == row.keys() and np.isnan(empty["f1"]) and empty["false_positives"] == 0


@pytest.mark.component("masks as products of queries and pixels")
def test_probabilities_follow_the_three_groups():
    torch.manual_seed(0)
    method, images = UniT(channels=SMALL, width=16), torch.randn(2, 1, 32, 32)
    nets = method.build(1, 39, 2).eval()
    found = method.predict(nets, images)
    organs, detected, diagnosed = method.answer(nets, images)
    raw = nets["average"](images).sigmoid()
    assert torch.equal(torch.cat([organs, detected, diagnosed.flatten(1, 2)], 1), raw)
    assert torch.allclose(found.sum(1), torch.ones(2, 32, 32), atol=1e-5) and found.min() >= 0
    ratio = found[:, list(matching(side="left", kind="patch"))].sum(1) / found[:, list(matching(side="left"))].sum(1)
    assert torch.allclose(ratio, diagnosed[:, 1, 2] / diagnosed[:, 1].sum(1), atol=1e-5)
    sides = [found[:, list(matching(side=side))].sum(1) for side in SIDES]
    assert torch.allclose(sides[0] / sides[1], detected[:, 0] / detected[:, 1], atol=1e-4)
    lungs = found[:, LUNGS["left"]] / found[:, LUNGS["right"]]
    assert torch.allclose(lungs, (organs * (1 - detected))[:, 1] / (organs * (1 - detected))[:, 0], atol=1e-4)


@pytest.mark.parametrize("hierarchy", [True, False])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(hierarchy, size):
    assert_every_parameter_is_trained(UniT(channels=SMALL, width=16, hierarchy=hierarchy), size)
