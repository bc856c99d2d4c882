"""Scribbles that nobody drew, superpixels as targets, prompts in any combination, and scribbles that people drew."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import assert_every_parameter_is_trained
from obedient import Obedient
from scipy import ndimage
from skimage.morphology import skeletonize
from skimage.segmentation import felzenszwalb
from torch import nn

from medcook.data import IGNORE, Case
from medcook.interactive import BESIDE, MEANT, Guided, InteractiveTask, gaussians, no_marks
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.interactive import scribbleprompt
from medcook.recipes.interactive._asking import BOX, boxes, complete, first_then, pieces, some_kinds
from medcook.recipes.interactive.scribbleprompt import (
    ScribblePrompt,
    broken,
    centreline,
    contour,
    interaction_rows,
    lines,
    peoples_scribbles,
    scribble,
    smooth_noise,
    warped,
)

SMALL = (4, 4, 4, 4, 4)


def method(**settings) -> ScribblePrompt:
    return ScribblePrompt(channels=SMALL, **settings)


def discs(*radii: int, side: int = 65) -> torch.Tensor:
    """(B, side, side) bool: a disc each."""
    y, x = np.indices((side, side)) - side // 2
    return torch.from_numpy(np.stack([np.hypot(y, x) <= radius for radius in radii]))


def bar() -> np.ndarray:
    """(64, 80) bool: a broad bar."""
    mask = np.zeros((64, 80), bool)
    mask[20:45, 10:70] = True
    return mask


def parts(drawn: np.ndarray) -> int:
    return ndimage.label(drawn, np.ones((3, 3)))[1]


@pytest.mark.component("simulated scribbles")
def test_lines_join_random_pixels_of_the_mask():
    """Of two far discs every line runs inside one of them or straight from one to the other."""
    torch.manual_seed(0)
    mask = np.zeros((40, 100), bool)
    mask[18:23, 5:10] = mask[18:23, 90:95] = True
    one = [lines(mask, 1) for _ in range(40)]
    assert all(parts(drawn) == 1 and not drawn[[*range(18), *range(23, 40)]].any() for drawn in one)
    across = np.array([drawn.sum() > 75 for drawn in one])
    assert 5 < across.sum() < 35 and all(drawn.sum() <= 5 for drawn in np.array(one)[~across])
    assert np.mean([lines(mask, 3).sum() for _ in range(40)]) > 1.5 * np.mean([drawn.sum() for drawn in one])


@pytest.mark.component("simulated scribbles")
def test_a_centreline_is_the_skeleton_and_a_contour_lies_at_one_depth():
    assert np.array_equal(centreline(bar()), skeletonize(bar()))
    torch.manual_seed(0)
    disc = discs(20)[0].numpy()
    depth = ndimage.distance_transform_edt(disc)
    found = [contour(disc) for _ in range(30)]
    spread = [np.ptp(depth[drawn]) for drawn in found]
    assert all(drawn.any() and not (drawn & ~disc).any() for drawn in found) and max(spread) < 2.5
    means = [depth[drawn].mean() for drawn in found]
    assert min(means) < 4 and max(means) > 8, "anywhere from the rim to the middle"


@pytest.mark.component("simulated scribbles")
def test_noise_is_smooth_and_breaks_scribbles():
    torch.manual_seed(0)
    for smoothing in (4, 16):
        noise = smooth_noise((96, 128), smoothing)
        assert noise.shape == (96, 128) and noise.std() == pytest.approx(1, abs=1e-3)
        lag = lambda by, noise=noise: np.corrcoef(noise[:, :-by].ravel(), noise[:, by:].ravel())[0, 1]  # noqa: E731
        assert lag(1) > 0.8 and abs(lag(3 * smoothing)) < 0.45
    drawn = np.zeros((64, 80), bool)
    drawn[32] = True
    found = [broken(drawn) for _ in range(50)]
    assert not any((kept & ~drawn).any() for kept in found) and all(kept.any() for kept in found)
    assert np.mean([kept.sum() for kept in found]) == pytest.approx(40, abs=8)
    assert max(map(parts, found)) > 3
    point = np.zeros((64, 80), bool)
    point[32, 40] = True
    assert all(np.array_equal(broken(point), point) for _ in range(10))


@pytest.mark.component("simulated scribbles")
def test_warping_moves_a_line_smoothly_and_not_far():
    torch.manual_seed(0)
    drawn = np.zeros((80, 80), bool)
    drawn[40] = True
    found = [warped(drawn) for _ in range(20)]
    away = [np.abs(np.argwhere(each)[:, 0] - 40).max() for each in found]
    assert np.median(away) >= 3 and max(away) < 30
    assert all(each.any(0).mean() > 0.7 for each in found), "a line remains"


@pytest.mark.component("simulated scribbles")
def test_scribbles_lie_in_the_mask_are_never_missing_and_of_three_sorts(monkeypatch):
    torch.manual_seed(0)
    used = []
    for name in ("lines", "centreline", "contour", "broken", "warped"):
        real = getattr(scribbleprompt, name)
        noted = lambda *given, name=name, real=real: used.append(name) or real(*given)  # noqa: E731
        monkeypatch.setattr(scribbleprompt, name, noted)
    thin = np.zeros((64, 80), bool)
    thin[30] = True
    for mask in (bar(), thin, ~bar(), np.ones((64, 80), bool), np.eye(64, 80) > 0, thin & (np.arange(80) == 4)):
        for _ in range(30):
            found = scribble(mask, 2)
            assert found.any() and not (found & ~mask).any() and found.dtype == bool
    counts = {name: used.count(name) for name in sorted(set(used))}
    assert all(40 < counts[name] < 80 for name in ("lines", "centreline", "contour")), counts
    assert counts["warped"] == 180 and counts["broken"] == counts["centreline"] + counts["contour"]
    assert not scribble(bar() & False, 2).any() and not scribble(bar(), 0).any()
    assert len({scribble(bar(), 1).tobytes() for _ in range(20)}) == 20


@pytest.mark.component("scribbles, clicks and bounding boxes")
def test_boxes_hold_the_mask_and_are_too_wide_by_at_most_the_jitter():
    torch.manual_seed(0)
    masks = torch.zeros(400, 30, 40, dtype=torch.bool)
    masks[:399, 12:15, 20] = masks[:399, 13, 18:25] = True
    tight = boxes(masks)
    wanted = torch.zeros(30, 40, dtype=torch.bool)
    wanted[12:15, 18:25] = True
    assert (tight[:399] == wanted).all() and not tight[399].any()
    wide = boxes(masks, 0, 5)[:399]
    assert (wide & wanted).sum() == 399 * wanted.sum()
    rows, columns = wide.any(2), wide.any(1)
    assert (rows.sum(1)[:, None, None] * columns.sum(1)[:, None, None] == wide.sum((1, 2), keepdim=True)).all()
    assert rows.any(0).nonzero().flatten().tolist() == list(range(7, 20))
    assert columns.any(0).nonzero().flatten().tolist() == list(range(13, 30))
    assert rows[:, 7].float().mean().item() == pytest.approx(1 / 6, abs=0.07)
    assert boxes(masks[:1], 100, 100).all()
    assert boxes(masks[:50], -9, -9).flatten(1).any(1).all(), "never turned inside out"


@pytest.mark.component("scribbles, clicks and bounding boxes")
def test_all_combinations_begin_equally_often():
    torch.manual_seed(0)
    found = [some_kinds(("click", "scribble", "box")) for _ in range(1400)]
    assert len(set(found)) == 7 and all(120 < found.count(one) < 280 for one in set(found))
    assert all(len(set(one)) == len(one) for one in found)


@pytest.mark.component("scribbles, clicks and bounding boxes")
def test_each_kind_of_prompt_begins_as_it_should():
    torch.manual_seed(0)
    truth = discs(9).expand(200, -1, -1)
    known = ~discs(20).expand_as(truth) | truth
    clicks = method(kinds=("click",)).opening(truth, known, [1] * 200)
    counts = clicks.flatten(2).sum(2)
    assert counts[:, MEANT].unique().tolist() == [1, 2, 3] and counts[:, BESIDE].unique().tolist() == [0, 1, 2, 3]
    drawn = method(kinds=("scribble",)).opening(truth[:40], known[:40], [1] * 40)
    counts = drawn.flatten(2).sum(2)
    assert counts[:, MEANT].min() >= 1 and counts[:, MEANT].max() > 20
    assert (counts[:, BESIDE] > 0).float().mean().item() == pytest.approx(0.75, abs=0.2)
    for marks in (clicks, drawn):
        number = len(marks)
        assert marks.shape[1] == 3 and not marks[:, BOX].any()
        assert not (marks[:, MEANT] & ~truth[:number]).any()
        assert not (marks[:, BESIDE] & (truth[:number] | ~known[:number])).any()
    only = method(kinds=("box",)).opening(truth, known, [1] * 200)
    assert not only[:, :BOX].any() and not (truth & ~only[:, BOX]).any()
    assert only[:, BOX].any(0).any(0).sum() == 19 + 2 * 19
    nothing = method().opening(truth[:9] & False, known[:9], [0] * 9)
    assert not nothing[:, MEANT].any() and not nothing[:, BOX].any()


@pytest.mark.component("scribbles, clicks and bounding boxes")
@pytest.mark.parametrize("kinds", [("click", "box"), ("scribble", "click", "box")])
def test_corrections_lie_on_errors_and_say_of_which_kind_they_are(kinds):
    torch.manual_seed(0)
    truth, answer = discs(12).repeat(120, 1, 1), torch.roll(discs(12), 10, 2).repeat(120, 1, 1)
    known = torch.ones_like(truth)
    known[60:] = truth[60:]
    before = method(kinds=kinds).opening(truth, known, [1] * 120)
    marks = method(kinds=kinds).correct(before, answer, truth, known)
    new = marks & ~before
    assert not (before & ~marks).any() and torch.equal(marks[:, BOX], before[:, BOX])
    assert not (new[:, MEANT] & ~(truth & ~answer)).any()
    assert not (new[:, BESIDE] & ~(answer & ~truth & known)).any() and new[:60, BESIDE].any()
    counts = new.flatten(1).sum(1)
    assert (counts.max() > 3) == ("scribble" in kinds)
    assert torch.equal(method(kinds=kinds).correct(before, truth, truth, known), before)


@pytest.mark.component("scribbles, clicks and bounding boxes")
def test_the_network_sees_image_marks_last_answer_and_the_inside_of_the_box():
    torch.manual_seed(0)
    one, truth = method(), discs(9)
    marks, before, image = one.opening(truth, truth | True, [1]), torch.randn(1, 2, 65, 65), torch.randn(1, 1, 65, 65)
    marks[:, BOX] = boxes(truth, 3, 3)
    seen, nets = [], one.build(1, 4, 2)
    nets["model"].network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    one.respond(nets["model"], image, marks, before)
    (given,) = seen
    assert given.shape[1] == 5 and torch.equal(given[:, :1], image)
    assert torch.equal(given[:, 1:3], gaussians(marks[:, :2], one.sigma))
    assert torch.allclose(given[:, 3], before.softmax(1)[:, 1]) and torch.equal(given[:, 4] == 1, marks[:, BOX])
    plain = one.guidance(marks[:, :2], None)
    assert not plain[:, 2:].any() and torch.equal(plain[:, :2], given[:, 1:3])


@pytest.mark.component("synthetic labels")
def test_pieces_are_felzenszwalbs_of_the_image_scaled_to_one():
    torch.manual_seed(0)
    image = torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 64)), 4)).float()
    unit = ((image - image.min()) / (image.max() - image.min())).double().numpy()
    for scale in (1, 300):
        assert np.array_equal(pieces(image, scale), felzenszwalb(unit, scale=scale, sigma=0.5, min_size=32))
    assert pieces(7 * image - 3, 1).max() == pieces(image, 1).max() > pieces(image, 300).max()
    one = [method().piece(image) for _ in range(40)]
    assert all(piece.sum() >= 32 and piece.dtype == torch.bool for piece in one)
    assert len({piece.numpy().tobytes() for piece in one}) > 10
    assert pieces(image * 0, 1).max() == 0


@pytest.mark.component("synthetic labels")
def test_a_share_of_the_targets_is_made_of_the_image_alone():
    class Halves(ScribblePrompt):
        def piece(self, image):
            return image > 0

    torch.manual_seed(0)
    labels = (2 * discs(9)[0] + discs(3)[0]).byte()[16:49, 16:49].repeat(400, 1, 1)
    labels[:, :4] = IGNORE
    images = torch.randn(400, 2, 33, 33)
    data = Batch(images, labels)
    for share in (0.0, 0.5, 1.0):
        target, values = Halves(invented=share).targets(data)
        made = torch.tensor([torch.equal(one == 1, image[0] > 0) for one, image in zip(target, images, strict=True)])
        assert made.float().mean().item() == pytest.approx(share, abs=0.08)
        assert [value == 0 for value in values] == made.tolist()
        assert (target[made] <= 1).all() and (target[~made][:, :4] == IGNORE).all()
        for one, value, own in zip(target, values, made, strict=True):
            assert own or torch.equal(one == 1, labels[0] == value)
    assert set(values) == {0} and {2, 3} == set(Halves(invented=0.0).targets(data)[1])
    assert method().invented == 0.5 and not (labels == 1).any()


def test_every_answer_of_a_step_is_trained_and_the_second_knows_the_first():
    seen = []

    class Watched(ScribblePrompt):
        def respond(self, net, state, marks, before):
            seen.append((marks.clone(), before))
            return super().respond(net, state, marks, before)

    torch.manual_seed(0)
    one = Watched(channels=SMALL, invented=0.0)
    nets, data = one.build(1, 2, 2), Batch(torch.randn(8, 1, 65, 65), discs(*[9] * 8).byte())
    loss = one.training_step(nets, data, None, Moment(0, 10))
    (marks, before), (more, answer) = seen
    assert before is None and not answer.requires_grad and not (marks & ~more).any()
    wrong = (answer.argmax(1) == 1) != discs(9)
    assert (more & ~marks).any() and not ((more & ~marks).any(1) & ~wrong).any()
    logits = [one.respond(nets["model"], data.images, *each) for each in seen[:2]]
    wanted = sum(one.answer_loss(each, data.labels) for each in logits) / 2
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-4)


def fitted(one: Guided, seen: list) -> SimpleNamespace:
    task = SimpleNamespace(preparation=Preparation(size=(65, 65)), targets={3: "disc"}, structures={3: "disc"})
    nets = nn.ModuleDict({"average": Obedient(seen, 3)})
    return SimpleNamespace(
        method=one, task=task, cost={"precision": "float32"}, nets=nets, weights={"last": nets.state_dict()}
    )


def case(**extras) -> Case:
    labels = 3 * discs(9, 9, 0).numpy().astype(np.uint8)
    labels[2] = 0
    image = np.random.default_rng(0).normal(size=(1, 3, 65, 65)).astype(np.float32)
    return Case(image=image, label=labels, spacing=(1.0,) * 3, case_id="a", patient_id="a", extras=extras)


@pytest.mark.component("manually collected scribbles")
def test_people_say_what_is_meant_and_everything_else_they_drew_is_beside():
    drawn = np.full((3, 65, 65), IGNORE, np.uint8)
    drawn[0, 30:34, 30], drawn[0, 3, 3:9], drawn[0, 50, 50] = 3, 0, 1
    drawn[2, 5, 5] = 3
    seen = []
    (row,) = interaction_rows(fitted(ScribblePrompt(), seen), case(scribble=drawn))
    guidance = seen[-1]
    assert len(guidance) == 1, "slices without a scribble on the structure are left out"
    assert torch.equal(guidance[0, MEANT] == 1, torch.from_numpy(drawn[0] == 3))
    assert torch.equal(guidance[0, BESIDE] == 1, torch.from_numpy((drawn[0] == 0) | (drawn[0] == 1)))
    answer = torch.from_numpy(ndimage.distance_transform_edt(drawn[0] != 3) < 3)
    truth = discs(9)[0]
    assert row["dice_scribble"] == pytest.approx(
        2 * (answer & truth).sum().item() / (answer.sum() + truth.sum()).item()
    )
    assert row["dice"] == pytest.approx((row["dice_scribble"] + row["dice_5"]) / 2)
    also = []
    assert interaction_rows(fitted(Guided(), also), case(scribble=drawn)) == [row]
    assert torch.equal(also[-1][:, :2], guidance[:, :2]), "the same for both arms"


@pytest.mark.component("manually collected scribbles")
def test_outside_the_image_and_where_nobody_drew_nothing_is_said():
    task = SimpleNamespace(preparation=Preparation(size=(75, 75)))
    drawn = np.full((3, 65, 65), IGNORE, np.uint8)
    drawn[:, 20], drawn[:, 40] = 0, 3
    found = peoples_scribbles(task, case(scribble=drawn))
    assert torch.equal(found[0, :, 37], torch.tensor([1 if k == 25 else 4 if k == 45 else 0 for k in range(75)]).byte())
    assert not found[:, :5].any() and not found[..., :5].any()
    skeletons = peoples_scribbles(task, case())
    assert set(skeletons.unique().tolist()) == {0, 1, 4} and (skeletons == 4).sum() < 100


@pytest.mark.component("simulated interactions")
def test_five_clicks_are_asked_one_by_one():
    seen = []
    drawn = np.full((3, 65, 65), 3, np.uint8)
    (row,) = interaction_rows(fitted(ScribblePrompt(), seen), case(scribble=drawn))
    assert [len(guidance) for guidance in seen] == [2] * 6
    assert [(guidance[0, :2] == 1).sum().item() for guidance in seen[:5]] == [1, 2, 3, 4, 5]
    assert seen[0][0, MEANT, 32, 32] == 1 and 0 < row["dice_1"] < row["dice_5"] < 1


@pytest.mark.component("unseen structures")
def test_training_never_shows_what_is_asked_for():
    full = scribbleprompt.recipe.scales["full"].task
    assert (full.dataset, full.hidden, full.asked) == ("acdc", (3,), "hidden")
    assert InteractiveTask("acdc").structures[3].startswith("left ventric")
    task = scribbleprompt.recipe.scales["quick"].task
    assert list(task.targets) == [3] and not (task.samples("labelled").labels == 3).any()


def test_arms_differ_in_prompts_and_targets_of_training_alone():
    arms = {name: arm.method for name, arm in scribbleprompt.recipe.arms.items()}
    full = arms["scribbleprompt"]
    assert arms["without synthetic labels"] == replace(full, invented=0.0)
    assert arms["without scribbles"] == replace(full, kinds=("click", "box"))
    assert not any(arm.changes for arm in scribbleprompt.recipe.arms.values())


def test_the_first_thing_said_stays_said():
    truth, answer = discs(9), discs(3)
    opening = complete(no_marks(truth), 4)
    opening[:, BOX] = boxes(truth)
    says = first_then(opening, lambda marks, answer, truth: marks | (truth & ~answer)[:, None])
    assert torch.equal(says(no_marks(truth), answer, truth), opening)
    later = says(opening, answer, truth)
    assert torch.equal(later[:, BOX:], opening[:, BOX:]) and torch.equal(later[:, MEANT], truth & ~answer)


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(size):
    assert_every_parameter_is_trained(method(), size)
