"""The tasks of chapter 12: what is learnt from is imperfect in the way that is said, and nothing else is touched."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medcook import imperfect
from medcook.cohorts import first_attributes
from medcook.data import IGNORE
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.imperfect import NoisyTask, PartlyLabelled, ShiftTask, UnpairedTask
from medcook.methods import Batch, Supervised
from medcook.tasks import Task


def disc(radius: float, side: int = 65) -> np.ndarray:
    """(1, side, side) uint8: a disc of ones."""
    y, x = np.indices((side, side)) - side // 2
    return (np.hypot(y, x) <= radius).astype(np.uint8)[None]


@pytest.mark.parametrize("width", [-6.0, -2.5, 0.2, 3.0, 7.5])
def test_a_moved_border_makes_a_disc_of_another_radius(width):
    moved = imperfect.moved_border(disc(20), disc(20) > 0, 1, width)
    assert np.sqrt((moved == 1).sum() / np.pi) == pytest.approx(20 + round(width), abs=0.75)


def test_a_border_that_grows_covers_the_neighbour_and_one_that_shrinks_leaves_background():
    labels = disc(20)
    labels[:, :, 40:][labels[:, :, 40:] == 1] = 2
    grown = imperfect.moved_border(labels, labels == 1, 1, 3)
    assert ((grown == 1) & (labels == 2)).any()
    shrunk = imperfect.moved_border(labels, labels == 1, 1, -3)
    assert ((labels == 1) & (shrunk == 0)).any() and (shrunk[labels == 2] == 2).all()


def test_borders_move_by_no_more_than_the_amount_and_gaps_stay_gaps():
    labels = disc(20)
    labels[:, :5] = IGNORE
    noisy = imperfect.noisy_borders(labels, 4, np.random.default_rng(0))
    assert (noisy[:, :5] == IGNORE).all() and (noisy != labels).any()
    assert (noisy[disc(15) > 0] == 1).all() and (noisy[:, 5:][disc(25)[:, 5:] == 0] == 0).all()


@pytest.mark.parametrize("amount", [0.1, 0.3])
def test_regions_make_the_share_of_pixels_wrong_that_is_asked_for(amount):
    labels = np.random.default_rng(1).integers(0, 4, (3, 64, 64)).astype(np.uint8)
    noisy = imperfect.noisy_regions(labels, 4, amount, 5, np.random.default_rng(2))
    assert (noisy != labels).mean((1, 2)) == pytest.approx([amount] * 3, abs=0.005)
    assert noisy.max() < 4


def test_mistakes_in_regions_lie_together_and_without_a_length_they_do_not():
    clean = np.zeros((1, 64, 64), np.uint8)
    together, alone = (imperfect.noisy_regions(clean, 2, 0.2, n, np.random.default_rng(3))[0] for n in (5, 0))
    neighbours = [np.mean(wrong[1:][wrong[:-1] == 1]) for wrong in (together, alone)]
    assert neighbours[0] > 0.8 and neighbours[1] == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("kind", ["borders", "regions"])
def test_mistakes_follow_from_the_case_and_the_draw_alone(kind):
    task = NoisyTask("embedded", kind=kind, amount=3.0 if kind == "borders" else 0.2)
    labels = torch.from_numpy(disc(20))
    assert torch.equal(task.spoilt("brain01", labels), task.spoilt("brain01", labels))
    assert not torch.equal(task.spoilt("brain01", labels), task.spoilt("brain02", labels))
    assert not torch.equal(task.spoilt("brain01", labels), replace(task, draw=1).spoilt("brain01", labels))


def test_only_training_labels_are_spoilt():
    noisy, clean = NoisyTask("embedded"), Task("embedded")
    assert not torch.equal(noisy.samples("labelled").labels, clean.samples("labelled").labels)
    assert torch.equal(noisy.samples("labelled").images, clean.samples("labelled").images)
    assert torch.equal(noisy.samples("val").labels, clean.samples("val").labels)
    kept = NoisyTask("embedded", kind="none").samples("labelled")
    assert torch.equal(kept.labels, clean.samples("labelled").labels)


def test_masks_are_of_patients_whose_images_are_not_used():
    task, whole = UnpairedTask("embedded", own="nothing"), Task("embedded")
    assert not set(task.labelled_patients) & set(task.mask_patients)
    assert set(task.labelled_patients) | set(task.mask_patients) == set(whole.labelled_patients)
    samples, others = task.samples("labelled"), replace(task, own="labels").samples("labelled")
    assert (samples.labels == IGNORE).all()
    own = {mask.numpy().tobytes() for mask in others.labels}
    assert not any(mask.numpy().tobytes() in own for mask in samples.raters[:, 0] if mask.any())
    assert samples.raters.shape == (len(samples), 1, *samples.labels.shape[1:])


def test_scribbles_are_few_and_right():
    task = UnpairedTask("embedded", own="scribbles")
    scribbles, truth = task.samples("labelled").labels, replace(task, own="labels").samples("labelled").labels
    drawn = scribbles != IGNORE
    assert torch.equal(scribbles[drawn], truth[drawn])
    assert 0.005 < drawn.float().mean() < 0.2
    assert set(scribbles[drawn].unique().tolist()) == set(truth.unique().tolist())


def test_the_data_sets_own_scribbles_are_taken_and_end_with_the_image():
    task = UnpairedTask("embedded")
    case = next(task.cases("labelled"))
    own = np.full_like(case.label, IGNORE)
    own[:, 40:50, 40:50] = 2
    narrow = replace(
        case, image=case.image[..., :80], label=case.label[..., :80], extras={"scribble": own[..., :80].copy()}
    )
    drawn = task.scribbles(narrow)
    assert (drawn == 2).sum() == 800 and (drawn != IGNORE).sum() == 800


def test_target_labels_are_with_the_oracle_alone():
    task = ShiftTask("embedded", source="north", target="island")
    samples = task.samples("labelled")
    target = samples.groups == 1
    assert (samples.labels[target] == IGNORE).all() and (samples.labels[~target] != IGNORE).all()
    assert torch.equal(samples.raters[~target, 0], samples.labels[~target])
    assert (samples.raters[target] != IGNORE).all() and samples.raters[target].any()
    assert {first_attributes(task.data, patient)["site"] for patient in task.val_patients} == {"island"}


@pytest.mark.parametrize(
    "task",
    [NoisyTask("embedded", kind="nonsense"), UnpairedTask("embedded", own="nonsense"), ShiftTask("embedded")],
)
def test_what_is_not_known_gets_one_sentence(task):
    with pytest.raises(MedcookError, match=r"nonsense|Montgomery"):
        task.samples("labelled")


def test_what_augmentation_moves_in_is_unlabelled():
    images, labels = torch.randn(4, 1, 32, 32), torch.full((4, 32, 32), 2, dtype=torch.uint8)
    labels[:, 10] = IGNORE
    batch = Batch(images, labels, raters=labels[:, None] // 2)
    shift = Augment(shift=0.8)
    mine, plain = (
        method(augmentation=shift).augment(batch, torch.Generator().manual_seed(0))
        for method in (PartlyLabelled, Supervised)
    )
    assert torch.equal(mine.images, plain.images) and torch.equal(mine.raters, plain.raters)
    outside = plain.labels == 0
    assert outside.any() and (mine.labels[outside] == IGNORE).all()
    assert torch.equal(mine.labels[~outside], plain.labels[~outside])
