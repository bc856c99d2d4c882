"""Prompts of all kinds and their combinations, masks without a name, and Dice by kind and number of interactions."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import assert_every_parameter_is_trained
from obedient import Obedient
from skimage.measure import label as labelled_parts
from skimage.morphology import closing, diamond, opening, remove_small_objects
from torch import nn

from medcook.data import IGNORE, Case
from medcook.interactive import BESIDE, MEANT, Guided, click_rows, gaussians, no_marks
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.interactive import imis_bench
from medcook.recipes.interactive._asking import BOX, boxes, complete
from medcook.recipes.interactive.imis_bench import Imis, cleaned, protocol_rows, said

SMALL = (4, 4, 4, 4, 4)
NAMES = {1: "square", 2: "ring", 3: "disc"}


def method(**settings) -> Imis:
    return Imis(channels=SMALL, **settings)


def heart(count: int = 2) -> torch.Tensor:
    """(B, 41, 41) uint8: a disc of 3 in a ring of 2, and a square of 1 beside them."""
    y, x = np.indices((41, 41)) - 20
    labels = np.zeros((count, 41, 41), np.uint8)
    labels[:, 2:10, 2:10] = 1
    labels[:, np.hypot(y, x) <= 12] = 2
    labels[:, np.hypot(y, x) <= 6] = 3
    return torch.from_numpy(labels)


def test_every_combination_of_prompts_begins_and_says_the_truth():
    torch.manual_seed(0)
    labels = heart(900)
    values = [2, 3, 0] * 300
    truth = torch.stack([one == (value or 1) for one, value in zip(labels, values, strict=True)])
    marks = method().opening(truth, truth | True, values)
    clicks = marks[:, MEANT].flatten(1).sum(1)
    boxed, named = marks[:, BOX].flatten(1).any(1), marks[:, BOX + 1 :].flatten(2).all(2)
    assert marks.shape[1] == BOX + 1 + 3 and clicks.max() == 1 and not marks[:, BESIDE].any()
    assert not (marks[:, MEANT] & ~truth).any()
    assert torch.equal(named, marks[:, BOX + 1 :].flatten(2).any(2)), "a name is said of all pixels"
    assert all(named[number].nonzero().flatten().tolist() in ([], [value - 1]) for number, value in enumerate(values))
    nameless = torch.tensor(values) == 0
    assert not named[nameless].any()
    for which, count, each in ((nameless, 3, 100), (~nameless, 7, 86)):
        kinds = list(
            zip((clicks > 0)[which].tolist(), boxed[which].tolist(), named[which].any(1).tolist(), strict=True)
        )
        assert len(set(kinds)) == count and (False, False, False) not in kinds
        assert all(0.6 * each < kinds.count(one) < 1.4 * each for one in set(kinds))
    tight, drawn = boxes(truth[boxed]), marks[boxed, BOX]
    ends = lambda which, axis: which.any(axis).float().argmax(1)  # noqa: E731
    off = torch.cat([ends(drawn, axis) - ends(tight, axis) for axis in (1, 2)])
    assert off.unique().tolist() == [-2, -1, 0, 1, 2]
    only = method(kinds=("click", "box")).opening(truth, truth | True, values)
    assert not only[:, BOX + 1 :].any() and only[:, MEANT].any() and only[:, BOX].any()


def test_the_network_sees_clicks_its_answer_the_box_and_the_name():
    torch.manual_seed(0)
    one, truth = method(), heart(1) == 3
    seen, nets = [], one.build(1, 4, 2)
    nets["model"].network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image, before, marks = torch.randn(1, 1, 41, 41), torch.randn(1, 2, 41, 41), said(imis_bench.KINDS, truth, 2)
    one.respond(nets["model"], image, marks, before)
    one.respond(nets["model"], image, marks[:, :2], None)
    full, click = seen
    assert full.shape == click.shape == (1, 1 + 2 + 1 + 1 + 3, 41, 41)
    assert torch.equal(full[:, 1:3], gaussians(marks[:, :2], one.sigma)) and torch.equal(click[:, :3], full[:, :3])
    assert torch.allclose(full[:, 3], before.softmax(1)[:, 1]) and torch.equal(full[:, 4] == 1, marks[:, BOX])
    assert full[0, 5:].flatten(1).mean(1).tolist() == [0, 1, 0] and not click[:, 3:].any()


def test_what_is_said_when_scored():
    truth = heart(2) == 3
    click = said(("click",), truth, 3)
    assert click.shape[1] == 2 and click.sum() == 2 and click[:, MEANT, 20, 20].all()
    everything = said(imis_bench.KINDS, truth, 3)
    assert torch.equal(everything[:, :BOX], click) and torch.equal(everything[:, BOX], boxes(truth))
    assert everything[:, BOX + 3].all() and not everything[:, BOX + 1 : BOX + 3].any()
    name = said(("name",), truth, 1)
    assert not name[:, : BOX + 1].any() and name[:, BOX + 1].all()


def test_corrections_are_clicks_and_leave_the_rest_as_it_was():
    torch.manual_seed(0)
    truth = (heart(60) == 2) | (heart(60) == 3)
    answer, known = heart(60) == 3, torch.ones_like(truth)
    answer[30:] = True
    known[45:] = truth[45:]
    marks = said(imis_bench.KINDS, truth, 2)
    after = method().correct(marks, answer, truth, known)
    new = after & ~marks
    assert torch.equal(after[:, BOX:], marks[:, BOX:]) and not (marks & ~after).any()
    counts = new.flatten(2).sum(2)
    assert (counts[:30, MEANT] == 1).all() and (counts[30:45, BESIDE] == 1).all() and not counts[45:].any()
    assert not (new[:, MEANT] & ~(truth & ~answer)).any() and not (new[:, BESIDE] & ~(answer & ~truth)).any()


@pytest.mark.component("quality control and granularity")
def test_masks_are_opened_closed_and_lose_their_small_parts():
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = np.zeros((120, 120), bool)
        mask[20:70, 20:90] = rng.random((50, 70)) > 0.1
        mask[90:95, 90:95] = mask[80, 5:60] = mask[100:103, 5:7] = mask[110:113, 20:23] = True
        padded = np.pad(mask, 2)
        smooth = closing(opening(padded, diamond(1)), diamond(1))[2:-2, 2:-2]
        wanted = remove_small_objects(labelled_parts(smooth, connectivity=1), max_size=7) > 0
        assert np.array_equal(cleaned(mask), wanted) and wanted.any()
        assert not wanted[80, 5:18].any(), "what is thin goes"
        assert smooth[111, 21] and not wanted[111, 21], "and what is small: a cross of five pixels, of 120 * 120 / 2000"
    assert not cleaned(mask & False).any() and not cleaned(np.eye(40) > 0).any()


@pytest.mark.component("quality control and granularity")
def test_pieces_are_clean_from_fine_to_coarse_and_many():
    torch.manual_seed(0)
    y, x = np.indices((64, 64))
    image = torch.from_numpy(
        np.sin(x / 5) + np.sin(y / 7) + 0.1 * np.random.default_rng(0).normal(size=(64, 64))
    ).float()
    found = [method().piece(image) for _ in range(60)]
    assert all(piece.any() and piece.dtype == torch.bool and piece.shape == (64, 64) for piece in found)
    sizes = np.array([piece.sum().item() for piece in found])
    assert len({piece.numpy().tobytes() for piece in found}) > 10 and sizes.max() > 5 * sizes.min()


def test_masks_without_a_name_are_a_share_of_the_targets():
    asked = []

    class Watched(Imis):
        def piece(self, image):
            return image > 0

        def opening(self, truth, known, values):
            asked.append((truth, known, values))
            return super().opening(truth, known, values)

    torch.manual_seed(0)
    labels = heart(80)
    labels[:, :, 39:] = IGNORE
    data = Batch(torch.randn(80, 1, 41, 41), labels)
    one = Watched(channels=SMALL)
    one.training_step(one.build(1, 4, 2), data, None, Moment(0, 10))
    ((truth, known, values),) = asked
    made = torch.tensor(values) == 0
    assert made.float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert torch.equal(truth[made], data.images[made, 0] > 0) and known[made].all()
    assert all(torch.equal(truth[k], labels[k] == values[k]) for k in (~made).nonzero().flatten().tolist())
    assert torch.equal(known[~made], labels[~made] != IGNORE) and set(values) == {0, 1, 2, 3}
    none = Imis(channels=SMALL, invented=0.0).targets(data)
    assert 0 not in none[1]


def fitted(one: Guided, seen: list) -> SimpleNamespace:
    task = SimpleNamespace(preparation=Preparation(size=(41, 41)), targets=NAMES, structures=NAMES)
    nets = nn.ModuleDict({"average": Obedient(seen, 2)})
    return SimpleNamespace(
        method=one, task=task, cost={"precision": "float32"}, nets=nets, weights={"last": nets.state_dict()}
    )


def case() -> Case:
    labels = heart(3).numpy()
    labels[2] = 0
    image = np.random.default_rng(0).normal(size=(1, 3, 41, 41)).astype(np.float32)
    return Case(image=image, label=labels, spacing=(1.0,) * 3, case_id="a", patient_id="a")


def what(guidance: torch.Tensor) -> tuple[int, int, int]:
    """Clicks, whether there is a box, and the value that is named, of the first image."""
    names = guidance[0, 4:].flatten(1).all(1).nonzero().flatten().tolist() if guidance.shape[1] > 3 else []
    boxed = guidance.shape[1] > 3 and bool(guidance[0, 3].any())
    return int((guidance[0, :2] == 1).sum()), int(boxed), names[0] + 1 if names else 0


@pytest.mark.component("evaluation from multiple perspectives")
def test_an_interaction_is_a_prompt_of_any_kind():
    """Three interactions: a click, a box and a name; or a click, a box and one more click; or three clicks."""
    arms = {"imis": Imis(), "nameless": Imis(kinds=("click", "box")), "unet": Guided()}
    seen = {name: [] for name in arms}
    tables = {name: protocol_rows(fitted(one, seen[name]), case()) for name, one in arms.items()}
    asked = {name: [what(guidance) for guidance in each] for name, each in seen.items()}
    assert all(len(guidance) == 2 for each in seen.values() for guidance in each)
    assert asked["unet"][:5] == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0)]
    assert asked["nameless"][:4] == [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0)]
    each = len(asked["imis"]) // 3
    for value in (1, 2, 3):
        mine = asked["imis"][(value - 1) * each : value * each]
        assert mine[:3] == [(1, 1, value), (2, 1, value), (3, 1, value)]
        assert mine[3:] == [(1, 0, 0), (0, 1, 0), (0, 0, value), (1, 1, 0), (1, 0, value), (0, 1, value)]
    ring = {name: table[1] for name, table in tables.items()}
    assert ring["imis"]["dice_3"] == ring["unet"]["dice"] == ring["imis"]["dice"], "this network listens to clicks"
    assert ring["imis"]["dice_5"] == ring["unet"]["dice_3"] > ring["unet"]["dice"]
    assert ring["nameless"]["dice_3"] < ring["unet"]["dice_3"] and ring["imis"]["dice_box"] == 0
    others = ["_".join(some) for count in (1, 2) for some in combinations(("click", "box", "name"), count)]
    assert {f"dice_{some}" for some in others} - {"dice_click"} == {key for key in ring["imis"] if key[5:] in others}


@pytest.mark.component("evaluation from multiple perspectives")
def test_clicks_alone_are_scored_as_everywhere_in_the_chapter():
    mine, theirs = (score(fitted(Guided(), []), case()) for score in (protocol_rows, click_rows))
    assert mine == theirs and len(mine) == 3
    (row,) = (one for one in protocol_rows(fitted(Imis(), []), case()) if one["structure"] == "square")
    assert row["dice"] == theirs[0]["dice"]


def test_arms_differ_in_one_thing_each():
    recipe = imis_bench.recipe
    arms = {name: arm.method for name, arm in recipe.arms.items()}
    assert arms["without names"] == replace(arms["imis"], kinds=("click", "box"))
    assert arms["without dense masks"] == replace(arms["imis"], invented=0.0)
    assert set(recipe.arms_at("full")) == set(arms) and len(arms) > 3, "a benchmark runs several methods"
    assert recipe.metric == "dice_3" and not any(arm.changes for arm in recipe.arms.values())


def test_marks_without_any_structure():
    truth = torch.zeros(2, 16, 16, dtype=torch.bool)
    marks = method().opening(truth, ~truth, [0, 0])
    assert not marks.any() and torch.equal(complete(no_marks(truth), 3), marks)
    assert not method().correct(marks, truth, truth, ~truth).any()


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(size):
    assert_every_parameter_is_trained(method(), size)
