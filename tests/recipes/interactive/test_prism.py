"""Turns of prompts in volumes: what a person marks, which head answers, and what is corrected afterwards."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from medcook.data import IGNORE, Case
from medcook.interactive import BESIDE, MEANT, click_rows, gaussians, no_marks, session
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.interactive import prism
from medcook.recipes.interactive._drawn import (
    box_around,
    click_and_box,
    points_or_scribbles,
    prompt_rows,
    scribble,
    whole_scribble,
)
from medcook.recipes.interactive.prism import (
    Attended,
    Corrector,
    HybridEncoder,
    Patches,
    Prism,
    positions,
    soft_overlap,
    surest,
    two,
)

SMALL, SIDE = (4, 4, 8, 8), 16


def method(**settings) -> Prism:
    return Prism(channels=SMALL, **{"width": 4} | settings)


def balls(*radii: int) -> torch.Tensor:
    """(B, SIDE, SIDE, SIDE) bool: a ball each."""
    z, y, x = np.indices((SIDE, SIDE, SIDE)) - SIDE // 2
    return torch.from_numpy(np.stack([np.sqrt(z**2 + y**2 + x**2) <= radius for radius in radii]))


def batch(*radii: int) -> Batch:
    torch.manual_seed(1)
    labels = balls(*radii).to(torch.uint8)
    return Batch(torch.randn(len(radii), 1, SIDE, SIDE, SIDE) + labels[:, None], labels)


def seen_by(part: nn.Module) -> list:
    """What a part of a network is given from now on."""
    seen = []
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    return seen


def test_a_box_is_a_shell_of_marks_beside_the_structure():
    truth = balls(3, 0, 9)
    truth[1] = False
    shell = box_around(truth)
    around = np.zeros((SIDE, SIDE, SIDE), bool)
    around[5:12, 5:12, 5:12] = True
    assert np.array_equal(shell[0], ndimage.binary_dilation(around, np.ones((3, 3, 3))) & ~around)
    assert not shell[1:].any()  # an empty mask has no box, and one that fills the image has no outside
    marks = click_and_box(no_marks(truth[:1]), truth[:1] & False, truth[:1])
    assert marks[:, MEANT].sum() == 1 and torch.equal(marks[:, BESIDE], shell[:1])


def test_a_scribble_is_a_thin_line_inside_and_random_pieces_of_it():
    mask = np.zeros((9, 9, 30), bool)
    mask[2:7, 2:7, 2:28] = True
    line = scribble(mask, broken=False)
    assert not (line & ~mask).any() and 10 < line.sum() < 40
    torch.manual_seed(0)
    pieces = np.stack([scribble(mask) for _ in range(10)])
    assert not (pieces & ~line).any() and pieces.any((1, 2, 3)).all() and (pieces.sum((1, 2, 3)) < line.sum()).any()
    assert len(np.unique(pieces.reshape(10, -1), axis=0)) > 5
    assert not scribble(mask & False).any()
    dot = np.zeros_like(mask)
    dot[4, 4, 4] = True
    assert np.array_equal(scribble(dot), dot)
    missing = torch.from_numpy(mask)[None]
    marks = whole_scribble(no_marks(missing), missing & False, missing)
    assert np.array_equal(marks[0, MEANT], line) and not marks[:, BESIDE].any()


def test_a_person_makes_points_and_scribbles_equally_often():
    torch.manual_seed(0)
    mask = torch.zeros(200, 6, 6, 14, dtype=torch.bool)
    mask[:, 1:4, 1:4, 1:13] = True
    drawn = points_or_scribbles(mask)
    counts = drawn.flatten(1).sum(1)
    assert not (drawn & ~mask).any() and counts.min() == 1
    assert 60 < (counts > 1).sum() < 120  # a scribble may be broken down to one voxel
    boxed = method(box=0.25).first(balls(4).expand(200, -1, -1, -1))
    shells = boxed[:, BESIDE].flatten(1).any(1)
    assert 30 < shells.sum() < 70 and torch.equal(boxed[shells][:1, BESIDE], box_around(balls(4)))
    assert (boxed[:, MEANT] & ~balls(4)).sum() == 0 and boxed[:, MEANT].flatten(1).any(1).all()


@pytest.mark.component("iterative learning")
def test_every_turn_sees_the_marks_so_far_and_the_answer_before(monkeypatch):
    """The image is encoded once; marks of a later turn lie on what is wrong with the answer; no gradient in between."""
    turns = []

    class Watched(Prism):
        def attempt(self, net, state, marks, before):
            found = super().attempt(net, state, marks, before)
            turns.append((marks.clone(), before, found[2]))
            return found

    torch.manual_seed(0)
    one, data = Watched(channels=SMALL, width=4, rounds=3, box=0.0), batch(5, 4)
    nets = one.build(1, 2, 3).train()
    encoded = seen_by(nets["model"].encoder)
    loss = one.training_step(nets, data, None, Moment(0, 10))
    assert len(encoded) == 1 and torch.isfinite(loss)
    (first, nothing, answer), *later = turns
    assert nothing is None and not first[:, BESIDE].any() and len(later) == 2
    truth = data.labels == 1
    for marks, before, found in later:
        assert torch.equal(before, answer.detach()) and not before.requires_grad
        added, wrong = marks & ~first, (before.argmax(1) == 1) != truth
        assert not (first & ~marks).any() and added.any()
        assert not (added.any(1) & ~wrong).any() and not (added[:, MEANT] & ~truth).any()
        first, answer = marks, found


@pytest.mark.component("iterative learning")
def test_the_loss_is_that_of_all_turns():
    torch.manual_seed(0)
    data, one = batch(5, 4), method(rounds=2)
    nets = one.build(1, 2, 3).eval()
    torch.manual_seed(3)
    loss = one.training_step(nets, data, None, Moment(0, 10))
    torch.manual_seed(3)
    torch.randint(1, ()), torch.randint(1, ())  # the structures that are asked for
    target, total, answer = data.labels, 0, None
    truth = target == 1
    state, marks, score = one.start(nets["model"], data.images), one.first(truth), find_loss("both")
    for turn in range(2):
        if turn:
            marks = one.correct(marks, answer.argmax(1) == 1, truth, torch.ones_like(truth))
        masks, sure, answer = one.attempt(nets["model"], state, marks, answer)
        heads = [score(two(masks[:, [head]]), target) for head in range(3)]
        total = total + sum(heads) / 3 + F.mse_loss(sure, soft_overlap(masks, target)) + score(answer, target)
    assert loss.item() == pytest.approx(total.item() / 2, abs=1e-5)


@pytest.mark.component("mask of the turn before as a dense prompt")
def test_marks_and_the_logits_before_are_embedded_and_meet_the_deepest_features():
    torch.manual_seed(0)
    one, data = method(), batch(5)
    net = one.build(1, 2, 3)["model"].eval()
    said, met = seen_by(net.decoder.said), seen_by(net.decoder.attended)
    marks = one.first(data.labels == 1)
    before = torch.randn(1, 2, SIDE, SIDE, SIDE)
    with torch.no_grad():
        state = one.start(net, data.images)
        answers = [one.respond(net, state, marks, one_before) for one_before in (None, before)]
        deep = state[1][-1] + net.decoder.said(said[1][0], state[1][-1].shape[2:])
    assert torch.equal(said[1][0][:, :2], gaussians(marks, one.sigma)) and not said[0][0][:, 2].any()
    assert torch.allclose(said[1][0][:, 2], before[:, 1] - before[:, 0])
    assert torch.equal(met[1][0], deep) and (answers[0] - answers[1]).abs().max() > 1e-4


@pytest.mark.component("confidence learning")
def test_the_head_that_is_surest_answers_for_each_image():
    torch.manual_seed(0)
    masks, confidence = torch.randn(5, 3, 4, 5, 6), torch.rand(5, 3)
    wanted = [mask[max(range(3), key=sure.tolist().__getitem__)] for mask, sure in zip(masks, confidence, strict=True)]
    assert torch.equal(surest(masks, confidence), torch.stack(wanted)[:, None])
    one, data = method(width=0), batch(5, 4)
    net = one.build(1, 2, 3)["model"].eval()
    with torch.no_grad():
        net.decoder.confidence[-2].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
        masks, sure, answer = one.attempt(net, one.start(net, data.images), one.first(data.labels == 1), None)
    assert sure.argmax(1).tolist() == [1, 1] and torch.equal(answer, two(masks[:, [1]]))
    assert torch.allclose(answer.softmax(1)[:, 1], masks[:, 1].sigmoid(), atol=1e-6)
    assert (masks[:, 0] - masks[:, 1]).abs().max() > 1e-3  # each head has a mask of its own


@pytest.mark.component("confidence learning")
def test_confidence_learns_each_heads_dice_and_leads_no_gradient_to_the_masks():
    torch.manual_seed(0)
    target = balls(5, 3).to(torch.uint8)
    hard = torch.where(torch.stack([balls(5, 3), balls(3, 5), balls(0, 6)], dim=1), 50.0, -50.0)
    dice = [[2 * (a & t).sum() / (a.sum() + t.sum()) for a in (h > 0)] for h, t in zip(hard, target == 1, strict=True)]
    assert soft_overlap(hard, target).numpy() == pytest.approx(np.array(dice), abs=1e-4)
    target[0, :, :, :8] = IGNORE
    cut = hard.clone()
    cut[0, ..., :8] = 50.0  # nobody knows, so nothing changes
    assert torch.allclose(soft_overlap(cut, target), soft_overlap(hard, target))
    sure = torch.rand(2, 3, requires_grad=True)
    loose = torch.randn(2, 3, SIDE, SIDE, SIDE, requires_grad=True)
    grads = []
    for confidence in (sure, soft_overlap(loose, target).detach()):
        loss = method().turn_loss(loose, confidence, target)
        grads.append(torch.autograd.grad(loss, loose)[0])
    assert torch.equal(*grads)
    (slope,) = torch.autograd.grad(method().turn_loss(loose, sure, target), sure)
    assert torch.allclose(slope, (sure - soft_overlap(loose, target)) / 3, atol=1e-6)


@pytest.mark.component("corrective learning")
def test_the_corrector_adds_a_product_of_two_maps_at_half_size():
    torch.manual_seed(0)
    corrector = Corrector(1, 4).eval()
    seen = seen_by(corrector.enter)
    logits, image, dots = torch.randn(2, 1, 8, 10, 12), torch.randn(2, 1, 8, 10, 12), torch.rand(2, 2, 8, 10, 12)
    found = corrector(logits, image, dots)
    half = F.avg_pool3d(torch.cat([image, (logits > 0).float(), dots], dim=1), 2)
    assert torch.allclose(seen[0][0], half, atol=1e-6)
    x = corrector.enter(half)
    for block in corrector.blocks:
        x = x + block(x)
    change = nn.Upsample(size=(8, 10, 12), mode="trilinear")(corrector.error(x) * corrector.correction(x))
    assert torch.allclose(found, logits + change, atol=1e-5) and change.abs().max() > 1e-4


@pytest.mark.component("corrective learning")
def test_the_corrector_alone_is_trained_by_what_it_corrects():
    torch.manual_seed(0)
    one, data = method(), batch(5)
    net = one.build(1, 2, 3)["model"]
    marks = one.first(data.labels == 1)
    masks, _, answer = one.attempt(net, one.start(net, data.images), marks, None)
    find_loss("both")(answer, data.labels).backward()
    assert all(p.grad is not None for p in net.corrector.parameters())
    assert all(p.grad is None for part in (net.encoder, net.decoder) for p in part.parameters())


def test_the_corrector_can_move_mislabelled_voxels_that_a_mark_points_at():
    """Trained alone on answers with a hole or a bump, it learns to put them right where somebody clicked."""
    torch.manual_seed(0)
    corrector, truth = Corrector(1, 4), balls(5)
    optimiser = torch.optim.Adam(corrector.parameters(), lr=0.03)
    answer = truth.clone()
    answer[:, :, :, :6] = False
    logits = torch.where(answer, 1.0, -1.0)[:, None]
    marks = no_marks(truth)
    marks[0, MEANT, 8, 8, 4] = True
    dots, image = gaussians(marks, 3.0), torch.zeros(1, 1, SIDE, SIDE, SIDE)
    for _ in range(40):
        optimiser.zero_grad()
        loss = find_loss("both")(two(corrector(logits, image, dots)), truth.to(torch.uint8))
        loss.backward()
        optimiser.step()
    wrong = [int(((one > 0)[:, 0] != truth).sum()) for one in (logits, corrector(logits, image, dots))]
    assert wrong[1] < wrong[0] / 2


def test_attention_among_patches_is_added_to_convolutional_features_and_reaches_everywhere():
    torch.manual_seed(0)
    encoder = HybridEncoder(1, SMALL).eval()
    image = torch.randn(1, 1, 32, 32, 32)
    moved = image.clone()
    moved[..., :8, :8, :8] += 1
    with torch.no_grad():
        *_, deep = encoder(image)
        cells = encoder.patches(image, deep.shape[2:])
        wanted = encoder.attended(cells, cells.new_zeros(1, 0, 8))[0]
        change = (encoder.attended(encoder.patches(moved, deep.shape[2:]), cells.new_zeros(1, 0, 8))[0] - wanted).abs()
        encoder.attended.forward = lambda cells, tokens: (torch.zeros_like(cells), tokens)
        *_, local = encoder(image)
    assert torch.allclose(deep - local, wanted, atol=1e-5)
    assert (change.amax((0, 1)) > 1e-6).all()


def test_tokens_and_cells_attend_to_each_other_and_cells_know_where_they_are():
    torch.manual_seed(0)
    part = Attended(8, 1).eval()
    cells, tokens = torch.randn(1, 8, 2, 3, 4), torch.randn(1, 2, 8)
    with torch.no_grad():
        x, y = part(cells, tokens)
        moved_x, _ = part(cells, torch.randn(1, 2, 8))
        _, moved_y = part(torch.randn(1, 8, 2, 3, 4), tokens)
        alike, _ = part(torch.ones_like(cells), tokens)
    assert x.shape == cells.shape and y.shape == tokens.shape
    assert (moved_x - x).abs().amax(1).min() > 1e-5 and (moved_y - y).abs().max() > 1e-5
    assert len(alike[0].flatten(1).T.round(decimals=4).unique(dim=0)) == 24
    assert len(positions(torch.Size((4, 7, 5))).unique(dim=0)) == 140


def test_a_patch_is_a_linear_map_of_its_voxels():
    torch.manual_seed(0)
    patches, x = Patches(2, 5), torch.randn(1, 2, 16, 8, 24)
    found = patches(x, torch.Size((2, 1, 3)))
    one = x[:, :, 8:, :, 16:].flatten(1) @ patches.embed.weight.flatten(1).T + patches.embed.bias
    assert torch.allclose(found[:, :, 1, 0, 2], one, atol=1e-5)


def test_answers_to_a_box_and_a_scribble_stand_beside_those_to_clicks():
    torch.manual_seed(0)
    one, asked = method(), []
    nets = one.build(1, 3, 3).eval()
    task = SimpleNamespace(preparation=Preparation(size=(16, 16, 16)), targets={1: "head", 2: "tail"})
    weights, cost = {"last": nets.state_dict()}, {"precision": "float32"}
    fitted = SimpleNamespace(method=one, task=task, nets=nets, weights=weights, cost=cost)
    label = balls(5)[0].numpy().astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, SIDE)).astype(np.float32)
    case = Case(image=image, label=label, spacing=(1.0, 1.0, 1.0), case_id="a", patient_id="a")
    (plain,) = click_rows(fitted, case)
    respond = one.respond
    one.respond = lambda net, state, marks, before: asked.append(marks.clone()) or respond(net, state, marks, before)
    (row,) = prompt_rows(fitted, case)
    assert plain.items() <= row.items() and set(row) - set(plain) == {"dice_box", "dice_scribble"}
    assert len(asked) == 7 and asked[5][:, BESIDE].any() and asked[5][:, MEANT].sum() == 1
    assert not asked[6][:, BESIDE].any() and asked[6][:, MEANT].any()
    images, truth = task.preparation.images(case), task.preparation.labels(case) == 1
    answer = session(fitted, images, truth, counts=(1,), click=click_and_box)[1]
    assert row["dice_box"] == pytest.approx((2 * (answer & truth).sum() / (answer.sum() + truth.sum())).item())


def test_arms_differ_in_heads_and_corrector_alone():
    arms = {name: arm.method for name, arm in prism.recipe.arms.items()}
    assert arms["without corrector"] == replace(arms["prism"], width=0)
    assert arms["one head"] == replace(arms["prism"], heads=1)
    nets = [arms[name].build(1, 3, 3)["model"] for name in ("prism", "without corrector")]
    whole, bare = ({n: p.shape for n, p in net.named_parameters() if "corrector" not in n} for net in nets)
    assert whole == bare and nets[1].corrector is None and nets[0].corrector is not None


@pytest.mark.parametrize("settings", [{}, {"width": 0}, {"heads": 1}])
@pytest.mark.parametrize("size", [(8, 16, 24), (17, 9, 11)])
def test_every_parameter_is_trained_at_any_size(settings, size):
    torch.manual_seed(0)
    one = method(**settings)
    nets = one.build(1, 3, 3)
    data = Batch(torch.randn(3, 1, *size), torch.randint(0, 3, (3, *size)).byte())
    one.training_step(nets, data, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
    assert one.predict(nets.eval(), data.images).shape == (3, 3, *size)
    nothing = no_marks(data.images[:, 0])
    assert torch.equal(one.first(nothing[:, 0]), nothing)


def test_a_step_in_bfloat16_has_finite_gradients():
    torch.manual_seed(0)
    one = method()
    nets = one.build(1, 2, 3)
    data = Batch(torch.randn(2, 1, 32, 16, 16), torch.randint(0, 2, (2, 32, 16, 16)).byte())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = one.training_step(nets, data, None, Moment(0, 10))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in nets["model"].parameters())
