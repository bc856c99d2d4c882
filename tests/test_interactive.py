"""People who click, simulated: clicks lie where they should, hidden structures stay hidden, sessions correct."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from medcook import interactive
from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.interactive import BESIDE, MEANT, Guided, InteractiveTask
from medcook.methods import Batch, Moment
from medcook.tasks import Budget
from medcook.training import fit


def discs(*radii: int, side: int = 33) -> torch.Tensor:
    """(B, side, side) bool: a disc each."""
    y, x = np.indices((side, side)) - side // 2
    return torch.from_numpy(np.stack([np.hypot(y, x) <= radius for radius in radii]))


def test_random_pixels_lie_inside_and_are_as_many_as_there_can_be():
    masks = torch.stack([discs(5)[0], discs(0)[0], torch.zeros(33, 33, dtype=torch.bool)])
    chosen = interactive.random_pixels(masks, 3)
    assert not (chosen & ~masks).any()
    assert chosen.flatten(1).sum(1).tolist() == [3, 1, 0]
    many = sum(interactive.random_pixels(masks[:1], 1).float() for _ in range(2000))[0]
    assert (many[masks[0]] > 0).float().mean() > 0.99


@pytest.mark.parametrize("dims", [2, 3])
def test_a_careful_person_clicks_in_the_middle_of_the_largest_error(dims):
    truth = torch.zeros((1, *[21] * dims), dtype=torch.bool)
    truth[(0, *[slice(4, 11)] * dims)] = True
    answer = torch.zeros_like(truth)
    answer[(0, *[slice(15, 20)] * dims)] = True
    marks = interactive.careful_click(interactive.no_marks(truth), answer, truth)
    assert marks.sum() == 1 and marks[(0, MEANT, *[7] * dims)]
    again = interactive.careful_click(marks, truth | answer, truth)
    assert again.sum() == 2 and again[(0, BESIDE, *[17] * dims)] and marks.sum() == 1
    assert torch.equal(interactive.careful_click(again, truth, truth), again)


def test_a_training_click_is_on_the_larger_error_and_never_where_nothing_is_known():
    truth, answer = discs(6, 3), discs(3, 6)
    marks = interactive.with_click(interactive.no_marks(truth), answer, truth)
    assert marks.flatten(2).sum(2).tolist() == [[1, 0], [0, 1]]
    assert (marks[0, MEANT] <= (truth & ~answer)[0]).all() and (marks[1, BESIDE] <= (answer & ~truth)[1]).all()
    unknown = interactive.with_click(interactive.no_marks(truth), answer, truth, known=truth)
    assert unknown[1].sum() == 0
    right = interactive.with_click(interactive.no_marks(truth), truth, truth)
    assert not right.any()


@pytest.mark.parametrize("dims", [2, 3])
def test_dots_are_the_gaussian_of_the_distance(dims):
    marks = torch.zeros((1, 2, *[12] * dims), dtype=torch.bool)
    marks[(0, 0, *[3] * dims)], marks[(0, 0, *[9] * dims)] = True, True
    places = np.stack(np.indices([12] * dims), -1)
    nearest = np.minimum(*(np.linalg.norm(places - at, axis=-1) for at in (3, 9)))
    dots = interactive.gaussians(marks, 2.0)
    assert dots[0, 0].numpy() == pytest.approx(np.exp(-(nearest**2) / 8), abs=1e-6)
    assert (dots[0, 1] == 0).all()


def test_hidden_structures_are_unlabelled_in_training_and_asked_for_when_scored():
    plain, task = InteractiveTask("embedded"), InteractiveTask("embedded", hidden=(3,), asked="hidden")
    whole, seen = plain.samples("labelled").labels, task.samples("labelled").labels
    assert (seen[whole == 3] == IGNORE).all() and torch.equal(seen[whole != 3], whole[whole != 3])
    assert task.targets == {3: plain.structures[3]} and len(plain.targets) == 3
    assert set(InteractiveTask("embedded", hidden=(3,), asked="known").targets) == {1, 2}
    with pytest.raises(MedcookError, match="hidden"):
        _ = InteractiveTask("embedded", asked="hidden").targets


def test_one_structure_is_chosen_all_in_turn():
    labels = torch.tensor([[0, 1, 2, 3, IGNORE]] * 300, dtype=torch.uint8)
    target = interactive.chosen_structure(labels)
    assert (target[:, 4] == IGNORE).all() and (target[:, 0] == 0).all()
    assert (target[:, 1:4].sum(1) == 1).all()
    assert (target[:, 1:4].float().mean(0) - 1 / 3).abs().max() < 0.1
    empty = torch.tensor([[0, IGNORE]], dtype=torch.uint8)
    assert torch.equal(interactive.chosen_structure(empty), empty)


class Listening(nn.Module):
    """Answers with a disc of 6 around every mark of what is meant, but for one around what is not."""

    classes = 2

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, images, guidance):
        self.told.append(guidance[:, 2])
        near, far = (guidance[:, k] > np.exp(-(6**2) / (2 * 4.0**2)) for k in (MEANT, BESIDE))
        return torch.stack([torch.zeros(near.shape), (near & ~far) * 2.0 - 1], dim=1)


@dataclass
class Fitted:
    method: Guided
    nets: nn.ModuleDict
    cost: dict


def test_a_session_corrects_click_by_click():
    fitted = Fitted(Guided(), nn.ModuleDict({"average": Listening()}), {"precision": "float32"})
    truth = torch.zeros(1, 40, 40, dtype=torch.bool)
    truth[0, 4:15, 4:15] = truth[0, 24:35, 24:35] = True
    answers = interactive.session(fitted, torch.zeros(1, 1, 40, 40), truth, counts=(1, 2))
    first, second = fitted.nets["average"].told
    assert not first.any() and torch.equal(second > 0.5, answers[1]), "the second answer knows the first"
    parts = [ndimage.label(answers[count][0])[1] for count in (1, 2)]
    assert parts == [1, 2]
    assert interactive.overlap(answers[2], truth) > interactive.overlap(answers[1], truth)


def test_overlap_is_dice_of_everything_together():
    a, b = discs(5, 0), discs(5, 3)
    wanted = 2 * int((a & b).sum()) / int(a.sum() + b.sum())
    assert interactive.overlap(a, b) == pytest.approx(wanted)
    assert interactive.overlap(a & False, b & False) == 1


@pytest.mark.parametrize("volumes", [False, True])
def test_a_trained_network_is_scored_by_its_clicks(volumes):
    task = InteractiveTask("embedded", volumes=volumes)
    channels = (4, 8, 8) if volumes else (4, 8, 8, 8, 8)
    budget = Budget(steps=2, batch=2, precision="float32", checks=0)
    fitted = fit(Guided(channels=channels), task, budget, cache=False, progress=False)
    case = next(task.cases("val"))
    rows = interactive.click_rows(fitted, case)
    assert [one["structure"] for one in rows] == list(task.structures.values())
    assert all(0 <= one[name] <= 1 for one in rows for name in ("dice", "dice_3", "dice_5"))
    images = task.preparation.images(case)
    probabilities = fitted.method.predict(fitted.nets, images)
    assert probabilities.sum(1).numpy() == pytest.approx(1, abs=1e-5)
    assert torch.equal(probabilities[:, 1], probabilities[:, 3])


def test_the_second_round_sees_the_first_answer_and_a_click_on_its_error():
    seen = []

    class Watched(Guided):
        def respond(self, net, state, marks, before):
            seen.append((marks.clone(), before))
            return super().respond(net, state, marks, before)

    torch.manual_seed(0)
    method = Watched(channels=(4, 4, 4, 4, 4))
    labels = discs(6, 9).to(torch.uint8)
    batch = Batch(torch.randn(2, 1, 33, 33), labels)
    loss = method.training_step(method.build(1, 2, 2), batch, None, Moment(0, 10))
    assert torch.isfinite(loss) and len(seen) == 2
    (marks, before), (more, answer) = seen
    assert before is None and answer is not None and not answer.requires_grad
    assert marks.flatten(2).sum(2).tolist() == [[1, 0], [1, 0]]
    wrong = (answer.argmax(1) == 1) != (labels == 1)
    added = (more & ~marks).any(1)
    assert added.any() and not (added & ~wrong).any()
