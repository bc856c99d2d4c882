"""MRSegmentator: sequences and their scores, whose label a slice has at which time, and what the expert drew."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.data.transforms import NONE
from medcook.domains import LOOKS, as_shown
from medcook.errors import MedcookError
from medcook.evaluation import score_case
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.domain_shift.mrsegmentator import (
    CT,
    Annotations,
    InTheLoop,
    SequencesTask,
    corrected,
    over_sequences,
    recipe,
    structure_dice,
    with_label,
)

TINY = dict(channels=(4, 8), slots=64)
FIRST, SECOND, THIRD, LAST = (Moment(step, 100) for step in (0, 30, 50, 70))
TASK = SequencesTask("embedded")


def batch(size: tuple[int, int] = (24, 20)) -> Batch:
    """Two slices of the first sequence; then four of others, of which the last two wait for the second round."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (6, size[0] // 4, size[1] // 4), generator=rng).byte()
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = labels[:, None] + 0.3 * torch.randn(6, 1, *labels.shape[1:], generator=rng)
    return Batch(images, labels, torch.tensor([0, 41, 3, 30, 10, 45]), groups=torch.tensor([0, 0, 1, 3, 2, 1]))


def built(method: InTheLoop) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: InTheLoop, nets: nn.ModuleDict, now: Moment, given: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, given or batch(), None, now)


class Says(nn.Module):
    """A network that says these labels, (B, H, W), of the images that it knows; it keeps what it was shown."""

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__()
        self.images, self.labels, self.shown = images, labels, None

    def forward(self, images: Tensor) -> Tensor:
        self.shown = images
        place = [int((self.images == image).flatten(1).all(1).nonzero()[0]) for image in images]
        return nn.functional.one_hot(self.labels[place].long(), 3).movedim(-1, 1).float()


def proposing(wrong: dict[int, int]) -> tuple[InTheLoop, nn.ModuleDict, Tensor]:
    """A network that labels well, but for `wrong`: {place: from which row on it says background}."""
    method, given = InTheLoop(**TINY), batch()
    nets, proposed = built(method), given.labels.clone()
    for place, row in wrong.items():
        proposed[place, row:] = 0
    nets["annotator"] = Says(given.images, proposed)
    return method, nets, proposed


@pytest.mark.component("one network for many sequences")
class TestSequences:
    def test_patients_take_turns_and_samples_are_marked(self):
        samples = TASK.samples("labelled")
        cases = [case for patient in TASK.labelled_patients for case in TASK.data.patients[patient]]
        for number, case in enumerate(cases):
            group = samples.groups[samples.case_of == number].unique().tolist()
            assert group == [(0, 1, 0, 2, 0, 3)[TASK.labelled_patients.index(TASK.data.index()[case]) % 6]]
            if group != [0] and number < 12:
                shown = as_shown(TASK.data.load(case), list(LOOKS)[group[0]])
                assert torch.equal(TASK.preparation.images(shown), samples.images[samples.case_of == number])
        assert TASK.samples("val").groups is None

    def test_one_sequence_is_the_first_of_as_many_patients(self):
        one = replace(TASK, **recipe.arms["one sequence"].changes)
        assert one.labelled_patients == TASK.labelled_patients
        assert set(one.samples("labelled").groups.tolist()) == {0} and one.looks == TASK.looks[:1] == (CT,)
        assert torch.equal(one.samples("labelled").labels, TASK.samples("labelled").labels)

    def test_everyone_is_scored_under_every_sequence(self):
        """Also by a network that was trained on one, and against the same truth."""
        case, seen = next(iter(TASK.cases("val"))), []

        def predict(shown: Case) -> np.ndarray:
            seen.append(shown.attributes["look"])
            return np.roll(shown.label, len(seen), axis=-1)

        rows = over_sequences(SimpleNamespace(predict=predict, task=TASK, nets={}), case)
        assert seen == list(LOOKS) and len(rows) == 4 * len(TASK.structures)
        assert len({row["structure"] for row in rows}) == len(rows) and {row["drawn"] for row in rows} == {1.0}
        expected = metrics.score(np.roll(case.label, 2, axis=-1) == 1, case.label == 1, case.spacing)
        row = next(row for row in rows if row["structure"] == f"{TASK.structures[1]}, {list(LOOKS)[1]}")
        assert row["dice"] == pytest.approx(expected.dice)

    def test_arms_share_all_but_the_ingredient(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        for other, name in (("without corrections", "corrects"), ("without transfer", "transfers")):
            assert {key for key in arms["mrsegmentator"] if arms["mrsegmentator"][key] != arms[other][key]} == {name}
        assert arms["one sequence"] == arms["all drawn by hand"]


@pytest.mark.component("Dice and Hausdorff distance of each structure")
def test_rows_are_those_of_every_table():
    case = next(iter(TASK.cases("val")))
    guess = np.roll(case.label, 3, axis=-1)
    fitted = SimpleNamespace(predict=lambda _: guess, task=TASK, nets={})
    expected = score_case(guess, case, TASK.structures)
    for number, row in enumerate(over_sequences(fitted, case)):
        same = expected[number % len(expected)]
        assert row["structure"].startswith(f"{same['structure']}, ")
        assert all(row[name] == same[name] for name in ("dice", "hd95", "missed", "false_alarm"))


class TestTransfer:
    def test_the_first_sequence_alone_teaches_at_first(self):
        given = batch()
        found = InTheLoop(**TINY).labels(built(InTheLoop(**TINY)), given, FIRST)
        assert torch.equal(found[:2], given.labels[:2]) and (found[2:] == IGNORE).all()

    def test_labels_that_nobody_has_given_yet_have_no_say(self):
        method, given, nets = InTheLoop(**TINY), batch(), built(InTheLoop(**TINY))
        other = given._replace(labels=torch.cat([given.labels[:2], 2 - given.labels[2:]]))
        assert step(method, nets, FIRST, given).item() == step(method, built(method), FIRST, other).item()

    def test_the_loss_is_that_of_labelled_slices_over_and_over(self):
        method, given = InTheLoop(**TINY, augmentation=NONE), batch()
        found = step(method, built(method), FIRST)
        again = torch.tensor([0, 1, 0, 1, 0, 1])
        expected = cross_entropy_and_dice(built(method)["model"](given.images[again]), given.labels[again])
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_a_batch_is_filled_with_what_has_a_label(self):
        labels = torch.full((5, 4, 4), IGNORE).byte()
        assert with_label(labels).tolist() == [0, 1, 2, 3, 4]
        labels[1], labels[4, 0, 0] = 0, 2
        assert with_label(labels).tolist() == [1, 4, 1, 4, 1]

    def test_slices_without_a_label_stay_without_where_augmentation_moves_something_in(self):
        method, nobody = InTheLoop(**TINY), batch()._replace(groups=torch.ones(6).long())
        assert step(method, built(method), FIRST, nobody).item() == 0

    def test_the_first_labels_are_made_by_what_learnt_from_the_first_sequence(self):
        method = InTheLoop(**TINY)
        nets = built(method)
        for at, same in ((28, False), (29, True), (40, False), (49, True), (69, True), (80, False)):
            nn.init.normal_(nets["model"].head.weight)
            method.after_step(nets, Moment(at, 100))
            assert torch.equal(nets["annotator"].head.weight, nets["average"].head.weight) is same

    def test_without_transfer_the_first_sequence_waits_too(self):
        method, given = InTheLoop(**TINY, transfers=False), batch()
        assert (method.labels(built(method), given, FIRST) == IGNORE).all()
        known = (method.labels(built(method), given, SECOND) != IGNORE).flatten(1).any(1)
        assert known.tolist() == [True, False, True, True, False, False]


class TestLoop:
    def test_dice_of_structures(self):
        """Against the metric; 1 where neither shows it."""
        torch.manual_seed(0)
        found, truth = torch.randint(0, 3, (2, 4, 6, 7)).byte()
        found[1], truth[1] = 0, 0
        truth[2] = 0
        dice, shown = structure_dice(found, truth, 3)
        for place, k in np.ndindex(4, 2):
            one, other = (labels[place].numpy() == k + 1 for labels in (found, truth))
            assert shown[place, k] == (one.any() or other.any())
            expected = metrics.score(one, other, None).dice if shown[place, k] else 1.0
            assert dice[place, k].item() == pytest.approx(expected)

    def test_a_correction_pixel_by_pixel(self):
        torch.manual_seed(0)
        proposed, truth = torch.randint(0, 4, (2, 3, 5, 6)).byte()
        wrong = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
        found = corrected(proposed, truth, wrong)
        for b, y, x in np.ndindex(3, 5, 6):
            bad = [k + 1 for k in range(3) if wrong[b, k]]
            anew = proposed[b, y, x] in bad or truth[b, y, x] in bad
            assert found[b, y, x] == (truth if anew else proposed)[b, y, x]
        assert torch.equal(found[1], proposed[1]) and torch.equal(found[2], truth[2])

    def test_rounds_add_blocks_of_slices(self):
        method = InTheLoop(**TINY)
        assert method.round_of(torch.arange(60)).tolist() == 2 * ([0] * 10 + [1] * 10 + [2] * 10)
        assert [method.begun(now) for now in (FIRST, SECOND, THIRD, LAST)] == [0, 1, 2, 3]
        for now, known in ((SECOND, [1, 1, 1, 1, 0, 0]), (THIRD, [1] * 6)):
            found = method.labels(built(method), batch(), now)
            assert (found != IGNORE).flatten(1).any(1).tolist() == [bool(k) for k in known]

    def test_good_structures_are_accepted_and_bad_ones_drawn(self):
        method, nets, proposed = proposing({2: 22, 3: 4})
        given = batch()
        dice = structure_dice(proposed, given.labels, 3)[0]
        assert dice[2].min() > 0.7 > dice[3].max()
        found = method.labels(nets, given, SECOND)
        assert torch.equal(found[2], proposed[2]) and not torch.equal(found[2], given.labels[2])
        assert torch.equal(found[3], given.labels[3])
        assert nets["annotations"].seen.nonzero().tolist() == [[3, 0], [3, 1], [30, 0], [30, 1]]
        assert nets["annotations"].drawn.nonzero().tolist() == [[30, 0], [30, 1]]
        assert nets["annotations"].share() == 0.5
        assert torch.equal(nets["annotator"].shown, given.images[2:4])  # as they are, and only those in question

    def test_one_structure_may_be_good_and_another_bad(self):
        method, nets, proposed = proposing({})
        nets["annotator"].labels = proposed = torch.where(proposed == 1, 0, proposed)
        found = method.labels(nets, batch(), SECOND)
        assert torch.equal(found[2:4], batch().labels[2:4]) and not torch.equal(found[2:4], proposed[2:4])
        assert nets["annotations"].drawn.nonzero().tolist() == [[3, 0], [30, 0]]

    def test_what_was_drawn_stays_and_what_was_accepted_is_looked_at_again(self):
        method, nets, _ = proposing({3: 4})
        given = batch()
        method.labels(nets, given, SECOND)
        nets["annotator"] = proposing({2: 4, 3: 22})[1]["annotator"]  # better at one slice now, and worse at the other
        found = method.labels(nets, given, SECOND)
        assert torch.equal(found[2:4], given.labels[2:4])
        assert nets["annotations"].drawn.nonzero().tolist() == [[3, 0], [3, 1], [30, 0], [30, 1]]

    def test_without_corrections_the_truth_of_other_sequences_has_no_say(self):
        given = batch()
        other = given._replace(labels=torch.cat([given.labels[:2], 2 - given.labels[2:]]))
        method = InTheLoop(**TINY, corrects=False)
        losses = [step(method, built(method), LAST, one).item() for one in (given, other)]
        assert losses[0] == losses[1]
        assert step(InTheLoop(**TINY), built(InTheLoop(**TINY)), LAST, other).item() != losses[0]
        nets = built(method)
        step(method, nets, LAST)
        assert nets["annotations"].share() == 0 and nets["annotations"].seen.any(1).sum() == 4

    def test_the_annotator_is_not_trained_and_keeps_its_statistics(self):
        method = InTheLoop(**TINY)
        nets = built(method)
        before = {name: value.clone() for name, value in nets["annotator"].state_dict().items()}
        step(method, nets, LAST).backward()
        assert all(torch.equal(value, before[name]) for name, value in nets["annotator"].state_dict().items())
        assert all(weight.grad is None for weight in nets["annotator"].parameters())

    def test_the_share_is_told_with_every_row_and_kept_in_checkpoints(self):
        nets, shown = nn.ModuleDict({"annotations": Annotations(8, 2)}), torch.tensor([[True, True], [True, True]])
        nets["annotations"].note(torch.tensor([1, 4]), shown, torch.tensor([[False, True], [False, False]]))
        case = next(iter(TASK.cases("val")))
        rows = over_sequences(SimpleNamespace(predict=lambda _: case.label, task=TASK, nets=nets), case)
        assert {row["drawn"] for row in rows} == {0.25}
        assert {"annotations.drawn", "annotations.seen"} <= set(nets.state_dict())
        with pytest.raises(MedcookError, match="slots"):
            nets["annotations"].known(torch.tensor([8]))


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_any_size_and_precision(size):
    method = InTheLoop()
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, *size), generator=rng).byte()
    given = Batch(labels[:, None].float(), labels, torch.arange(4), groups=torch.tensor([0, 1, 2, 3]))
    for bfloat16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = step(method, built(method), LAST, given)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert method.predict(built(method).eval(), given.images).shape == (4, 3, *size)


def test_all_of_the_network_learns():
    method = InTheLoop(**TINY)
    nets = built(method)
    step(method, nets, LAST).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
