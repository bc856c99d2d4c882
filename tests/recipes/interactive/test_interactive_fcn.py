"""Clicks as channels: what the network sees, where a simulated person clicks, and which answer is trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.apps.deepgrow.transforms import AddGuidanceSignald
from scipy import ndimage

from medcook.data import IGNORE
from medcook.interactive import BESIDE, COUNTS, MEANT, InteractiveTask, chosen_structure, no_marks
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.interactive import interactive_fcn
from medcook.recipes.interactive.interactive_fcn import ClickFcn, blind_clicks, deep_pixels, depths, error_clicks

SMALL = (4, 4, 4, 4, 4)


def method(**settings) -> ClickFcn:
    return ClickFcn(channels=SMALL, **settings)


def discs(*radii: int, side: int = 33) -> torch.Tensor:
    """(B, side, side) bool: a disc each."""
    y, x = np.indices((side, side)) - side // 2
    return torch.from_numpy(np.stack([np.hypot(y, x) <= radius for radius in radii]))


def batch(*radii: int) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(len(radii), 1, 33, 33), discs(*radii).to(torch.uint8))


@pytest.mark.component("clicks as channels")
def test_the_network_sees_the_image_and_a_gaussian_of_each_kind_of_click():
    """One click of a kind is what MONAI makes of it, up to where MONAI cuts its kernel off."""
    marks, sigma = no_marks(discs(5)), 3.0
    marks[0, MEANT, 14, 15] = marks[0, BESIDE, 20, 18] = True
    found = method(sigma=sigma).guidance(marks, torch.randn(1, 2, 33, 33))
    clicks = [[[1, 14, 15]], [[1, 20, 18]]]
    wanted = AddGuidanceSignald(sigma=sigma)._get_signal(np.zeros((1, 33, 33)), clicks)
    assert found[0].numpy() == pytest.approx(wanted, abs=0.01)
    seen = []
    nets = method().build(1, 4, 2)
    nets["model"].network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 1, 33, 33)
    method().respond(nets["model"], image, marks, None)
    assert seen[0].shape[1] == 3 and torch.equal(seen[0][:, :1], image)
    assert torch.equal(seen[0][:, 1:], method().guidance(marks, None))


@pytest.mark.component("clicks as channels")
def test_its_own_answer_is_not_seen():
    nets, marks = method().build(1, 4, 2).eval(), no_marks(discs(5))
    image, before = torch.randn(1, 1, 33, 33), torch.randn(1, 2, 33, 33)
    with torch.no_grad():
        answers = [method().respond(nets["model"], image, marks, one) for one in (None, before)]
    assert torch.equal(*answers)


@pytest.mark.component("clicks on errors")
@pytest.mark.parametrize("size", [(9, 7), (7, 5, 6)])
def test_depth_is_how_often_a_mask_can_be_eroded(size):
    masks = torch.from_numpy(ndimage.binary_dilation(np.random.default_rng(0).random((2, *size)) > 0.9, iterations=2))
    square, left, wanted = np.ones([3] * len(size)), masks.numpy(), 0
    while left.any():
        wanted = wanted + left
        left = np.stack([ndimage.binary_erosion(one, square) for one in left])
    assert np.array_equal(depths(masks), wanted)


@pytest.mark.component("clicks on errors")
def test_deep_pixels_are_chosen_by_the_exponential_of_their_depth():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 1:6, 2:7] = True
    torch.manual_seed(0)
    count = 20_000
    often = deep_pixels(mask.expand(count, 9, 9)).double().mean(0)
    chance = depths(mask)[0].exp() - 1
    assert (often - chance / chance.sum()).abs().max() < 0.01
    assert often[3, 4] == often.max() and often[~mask[0]].sum() == 0


@pytest.mark.component("clicks on errors")
def test_an_empty_mask_gets_no_click_and_a_large_one_does_not_overflow():
    chosen = deep_pixels(torch.stack([torch.zeros(2001, 5), torch.ones(2001, 5)]).bool())
    assert chosen.flatten(1).sum(1).tolist() == [0, 1]
    assert deep_pixels(torch.ones(1, 1601, 1601, dtype=torch.bool)).sum() == 1
    assert not deep_pixels(torch.zeros(2, 5, 5, dtype=torch.bool)).any()


@pytest.mark.component("clicks on errors")
def test_a_correction_lies_in_the_larger_error_and_says_of_which_kind_it_is():
    truth, answer = discs(9, 3, 5, 5), discs(3, 9, 5, 9)
    known = torch.ones_like(truth)
    known[3] = truth[3]
    marks = error_clicks(no_marks(truth), answer, truth, known)
    assert marks.flatten(2).sum(2).tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert not (marks[0, MEANT] & ~(truth & ~answer)[0]).any()
    assert not (marks[1, BESIDE] & ~(answer & ~truth)[1]).any()
    again = error_clicks(marks, answer, truth, known)
    assert not (marks & ~again).any()


@pytest.mark.component("clicks on errors")
def test_each_click_is_an_answer_to_the_answer_before(monkeypatch):
    """The network is asked with the clicks so far, in evaluation mode; its answer decides about the next click."""
    asked, given = [], []

    class Watched(ClickFcn):
        def answer(self, net, images, marks):
            asked.append((images.clone(), marks.clone(), super().answer(net, images, marks)))
            return asked[-1][2]

    def noted(marks, answer, truth, known):
        given.append((marks.clone(), answer))
        return error_clicks(marks, answer, truth, known)

    monkeypatch.setattr(interactive_fcn, "error_clicks", noted)
    torch.manual_seed(0)
    one, data = Watched(channels=SMALL), batch(*[6] * 40)
    truth, net = data.labels == 1, method().build(1, 2, 2)["model"].train()
    statistics = [buffer.clone() for buffer in net.buffers()]
    marks = one.session(net, data.images, truth, torch.ones_like(truth))
    assert net.training and all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))
    assert [len(images) for images, *_ in asked] == sorted((len(images) for images, *_ in asked), reverse=True)
    assert len(asked) == 4 and 20 < len(asked[0][0]) < 40
    for (_, mine, answer), (before, seen) in zip(asked, given, strict=True):
        assert torch.equal(mine, before) and answer is seen
    counts = [mine.flatten(1).sum(1).max().item() for _, mine, _ in asked]
    assert counts == [1, 2, 3, 4]
    with torch.no_grad():
        alone = net.eval()(asked[1][0], one.guidance(asked[1][1], None)).argmax(1) == 1
    assert torch.equal(alone, asked[1][2])
    assert marks.flatten(1).sum(1).unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.component("clicks on errors")
def test_all_numbers_of_clicks_are_equally_frequent_and_the_last_answer_alone_is_trained():
    torch.manual_seed(0)
    truth = discs(6).expand(2000, -1, -1)
    blind = method(errors=False, corrections=2)
    marks = blind.session(None, torch.zeros(2000, 1, 33, 33), truth, torch.ones_like(truth))
    counts = marks.flatten(1).sum(1)
    assert counts.min() == 1 and counts.max() == 3
    assert counts.float().mean().item() == pytest.approx(2, abs=0.1)  # a click twice in a place is rare
    one, data = method(corrections=0), batch(6, 9)
    nets = one.build(1, 2, 2)
    torch.manual_seed(3)
    loss = one.training_step(nets, data, None, Moment(0, 10))
    torch.manual_seed(3)
    torch.randint(1, ()), torch.randint(1, ())  # the structures that are asked for
    logits = nets["model"](data.images, one.guidance(one.first(data.labels == 1), None))
    assert loss.item() == pytest.approx(find_loss("both")(logits, data.labels).item(), abs=1e-5)


@pytest.mark.component("clicks on errors")
def test_the_average_answers_on_the_way_and_the_model_is_trained():
    asked = []

    class Watched(ClickFcn):
        def answer(self, net, images, marks):
            asked.append(net)
            return super().answer(net, images, marks)

    torch.manual_seed(0)
    one = Watched(channels=SMALL)
    nets = one.build(1, 2, 2).train()
    one.training_step(nets, batch(*[6] * 8), None, Moment(0, 10)).backward()
    assert asked and all(net is nets["average"] for net in asked)
    assert all(p.grad is None for p in nets["average"].parameters())
    assert all(p.grad is not None for p in nets["model"].parameters())


def test_blind_clicks_are_as_many_of_either_kind_and_not_far():
    torch.manual_seed(0)
    truth = discs(4).expand(1000, -1, -1)
    known = torch.ones_like(truth)
    known[:, :, :16] = False
    marks = blind_clicks(no_marks(truth), truth, known, 5)
    assert (marks.flatten(1).sum(1) == 1).all()
    assert marks[:, MEANT].sum() == pytest.approx(500, abs=60)
    places = marks[:, BESIDE].any(0)
    assert not (places & (truth[0] | ~known[0])).any()
    assert not (places & ~discs(9)[0]).any() and (places & ~discs(8)[0]).any()
    assert not blind_clicks(no_marks(truth), truth & False, known, 5).any()


@pytest.mark.component("previously unseen structures")
def test_training_never_shows_what_is_asked_for():
    task = interactive_fcn.recipe.scales["quick"].task
    assert list(task.targets) == [3] and not (task.samples("labelled").labels == 3).any()
    full = interactive_fcn.recipe.scales["full"].task
    assert (full.dataset, full.hidden, full.asked) == ("acdc", (3,), "hidden")
    assert InteractiveTask("acdc").structures[3].startswith("left ventric")


@pytest.mark.component("previously unseen structures")
def test_what_is_hidden_is_no_error_and_not_trained():
    class Greedy(ClickFcn):
        def answer(self, net, images, marks):
            return torch.ones_like(images[:, 0], dtype=torch.bool)

    torch.manual_seed(0)
    data = batch(*[4] * 60)
    labels = data.labels.clone()
    labels[discs(12).expand_as(labels) & (labels == 0)] = IGNORE
    truth, known = labels == 1, labels != IGNORE
    for errors in (True, False):
        marks = Greedy(channels=SMALL, errors=errors).session(None, data.images, truth, known)
        assert marks[:, BESIDE].any() and not (marks.any(1) & ~known).any()
    logits = torch.randn(60, 2, 33, 33, requires_grad=True)
    method().answer_loss(logits, chosen_structure(labels)).backward()
    trained = logits.grad.abs().sum(1) > 0
    assert trained[known].all() and not trained[~known].any()


@pytest.mark.component("one to a few clicks")
def test_dice_is_measured_after_one_three_and_five_clicks():
    recipe = interactive_fcn.recipe
    assert COUNTS == (1, 3, 5) and recipe.metric == "dice_5"
    task = recipe.scales["quick"].task
    case = next(task.cases("val"))

    class Fitted:
        pass

    fitted = Fitted()
    fitted.method, fitted.task, fitted.cost = method(), task, {"precision": "float32"}
    fitted.nets = fitted.method.build(1, 4, 2)
    fitted.weights = {"last": fitted.nets.state_dict()}
    (row,) = recipe.score(fitted, case)
    assert row["structure"] == task.structures[3]
    assert all(0 <= row[name] <= 1 for name in ("dice", "dice_3", "dice_5"))


def test_arms_differ_in_the_clicks_of_training_alone():
    arms = {name: arm.method for name, arm in interactive_fcn.recipe.arms.items()}
    full = arms["clicks on errors"]
    assert arms["clicks that know no errors"] == replace(full, errors=False)
    assert arms["first click alone"] == replace(full, corrections=0)
    assert not any(arm.changes for arm in interactive_fcn.recipe.arms.values())


@pytest.mark.parametrize("settings", [{}, {"errors": False}, {"corrections": 0}])
@pytest.mark.parametrize("size", [(33, 47), (16, 16, 18)])
def test_every_parameter_is_trained_at_any_size(settings, size):
    torch.manual_seed(0)
    one = replace(method(**settings), channels=(4, 4, 4))
    nets = one.build(1, 4, len(size))
    data = Batch(torch.randn(3, 1, *size), torch.randint(0, 4, (3, *size)).byte())
    one.training_step(nets, data, None, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())
    assert one.predict(nets.eval(), data.images).shape == (3, 4, *size)
