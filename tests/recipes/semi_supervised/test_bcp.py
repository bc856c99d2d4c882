"""Bidirectional copy-paste: one mask mixes images and labels, and what pseudo-labels teach weighs half."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from medcook.data import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, MeanTeacher, Moment, Supervised
from medcook.recipes.semi_supervised.bcp import BCP, copy_paste, largest_parts

TINY = dict(channels=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)


def batch(seed: int, size: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size, 12, 12), generator=rng).byte()
    return Batch(labels[:, None] + torch.randn(size, 1, 12, 12, generator=rng), labels)


def unlabelled(seed: int) -> Batch:
    images, labels = batch(seed)[:2]
    return Batch(images, torch.full_like(labels, IGNORE))


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return BCP(**TINY).build(inputs=1, classes=3, dims=2)


class Recording(nn.Module):
    """A network that keeps the images it is shown and answers with fixed logits."""

    def __init__(self, logits: torch.Tensor | None = None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen: list[torch.Tensor] = []
        self.logits = logits

    def forward(self, images):
        self.seen.append(images)
        plain = torch.zeros(len(images), 3, *images.shape[2:])
        return self.scale * (plain if self.logits is None else self.logits[: len(images)])


@pytest.mark.component("copy-paste")
def test_images_and_labels_are_mixed_by_the_same_mask():
    inside, outside = batch(0), batch(1)
    box = torch.zeros(3, 12, 12, dtype=torch.bool)
    box[:, 2:10, 3:11] = True
    image, label = copy_paste(inside.images, outside.images, box), copy_paste(inside.labels, outside.labels, box)
    assert torch.equal(image[:, 0][box], inside.images[:, 0][box])
    assert torch.equal(image[:, 0][~box], outside.images[:, 0][~box])
    assert torch.equal(label[box], inside.labels[box]) and torch.equal(label[~box], outside.labels[~box])


@pytest.mark.component("copy-paste")
def test_the_student_sees_both_directions_and_nothing_else():
    known, free, student = batch(0), unlabelled(1), Recording()
    torch.manual_seed(3)
    BCP(**TINY).training_step(nn.ModuleDict({"model": student, "average": Recording()}), known, free, LATE)
    (seen,) = student.seen
    inward, outward = seen.chunk(2)
    box = inward == known.images
    assert (inward[~box] == free.images[~box]).all() and (outward[box] == free.images[box]).all()
    assert (outward[~box] == known.images[~box]).all()
    assert box.flatten(1).float().mean(1).allclose(torch.tensor((8 / 12) ** 2), atol=1e-6)


@pytest.mark.component("copy-paste")
def test_without_mixing_the_student_sees_the_images_as_they_are():
    known, free, student = batch(0), unlabelled(1), Recording()
    nets = nn.ModuleDict({"model": student, "average": Recording()})
    BCP(**TINY, mix=False).training_step(nets, known, free, LATE)
    assert all(torch.equal(*pair) for pair in zip(student.seen, (known.images, free.images), strict=True))


@pytest.mark.component("mixed supervision")
def test_what_pseudo_labels_teach_weighs_half():
    logits = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    labels, pseudo = batch(0).labels, batch(1).labels
    box = torch.zeros(3, 12, 12, dtype=torch.bool)
    box[:, :6] = True
    found = BCP(**TINY).mixed_loss(logits, labels, pseudo, box, 0.5)
    known = cross_entropy_and_dice(logits[:, :, :6], labels[:, :6])
    guessed = cross_entropy_and_dice(logits[:, :, 6:], pseudo[:, 6:])
    assert found.item() == pytest.approx((known + 0.5 * guessed).item(), rel=1e-5)


@pytest.mark.component("mixed supervision")
@pytest.mark.parametrize(("now", "weight"), [(Moment(99, 100), 0.5), (Moment(50, 100), 0.5 * math.exp(-5))])
@pytest.mark.parametrize("mix", [True, False])
def test_the_weight_of_pseudo_labels_rises_to_a_half(mix, now, weight):
    given, method = [], BCP(**TINY, mix=mix)
    name = "mixed_loss" if mix else "unmixed_loss"
    setattr(method, name, lambda *arguments: given.append(arguments[-1]) or torch.zeros(()))
    method.training_step(nn.ModuleDict({"model": Recording(), "average": Recording()}), batch(0), unlabelled(1), now)
    assert given and all(one == pytest.approx(weight) for one in given)


@pytest.mark.component("mixed supervision")
def test_each_direction_is_supervised_by_its_own_side():
    """A student that answers with the truth everywhere has no loss; one wrong pixel of either source costs."""
    known, free = batch(0), unlabelled(1)
    pseudo = torch.zeros_like(known.labels)
    pseudo[:, 4:9, 4:9] = 1

    def loss(wrong_label: bool, wrong_pseudo: bool) -> float:
        torch.manual_seed(0)
        box = BCP(**TINY).boxes(known.images)
        labels = (known.labels + 1) % 3 if wrong_label else known.labels
        taught = 1 - pseudo if wrong_pseudo else pseudo
        answers = torch.cat([copy_paste(labels, taught, box), copy_paste(taught, labels, box)])
        student = Recording(20 * nn.functional.one_hot(answers.long(), 3).movedim(-1, 1).float())
        teacher = Recording(20 * nn.functional.one_hot(pseudo.long(), 3).movedim(-1, 1).float())
        method = BCP(**TINY)
        method.boxes = lambda images: box
        nets = nn.ModuleDict({"model": student, "average": teacher})
        return method.training_step(nets, known, free, LATE).item()

    assert loss(False, False) < 0.3
    assert loss(True, False) > loss(False, True) > 5 * loss(False, False)


@pytest.mark.component("mean teacher")
def test_pseudo_labels_are_the_averages_largest_parts():
    labels = np.zeros((2, 9, 9), dtype=np.uint8)
    labels[0, 1:4, 1:4], labels[0, 6, 6], labels[0, 8, 0:2] = 1, 1, 2
    expected = labels.copy()
    expected[0, 6, 6] = 0
    assert np.array_equal(largest_parts(torch.from_numpy(labels)), expected)
    average = Recording(nn.functional.one_hot(torch.from_numpy(labels).long(), 3).movedim(-1, 1).float())
    found = BCP(**TINY).pseudo_labels(nn.ModuleDict({"average": average}), torch.zeros(2, 1, 9, 9))
    assert np.array_equal(found, expected) and found.dtype == torch.uint8


@pytest.mark.component("mean teacher")
def test_the_teacher_is_the_moving_average_and_gets_no_gradient(nets):
    loss = BCP(**TINY).training_step(nets, batch(0), unlabelled(1), LATE)
    loss.backward()
    assert all(p.grad is None for p in nets["average"].parameters())
    assert any(p.grad.abs().sum() > 0 for p in nets["model"].parameters())
    assert BCP.after_step is MeanTeacher.after_step is Supervised.after_step


@pytest.mark.component("pre-training")
def test_first_labelled_images_are_pasted_into_each_other():
    known, student = batch(0), Recording()
    nets = nn.ModuleDict({"model": student, "average": Recording()})
    BCP(**TINY).training_step(nets, known, unlabelled(1), EARLY)
    (seen,) = student.seen
    mine, neighbour = seen == known.images, seen == known.images.roll(1, 0)
    assert (mine | neighbour).all() and 0 < mine.float().mean() < 1
    assert nets["average"].seen == []
    BCP(**TINY, mix=False).training_step(nets, known, unlabelled(1), EARLY)
    assert torch.equal(student.seen[1], known.images)


@pytest.mark.component("pre-training")
def test_in_pre_training_labels_move_with_the_images():
    """Images that are their labels, and a student that reads them off, leave no loss."""

    class Reader(nn.Module):
        def forward(self, images):
            return 20 * nn.functional.one_hot(images[:, 0].long(), 3).movedim(-1, 1).float()

    labels = batch(0).labels
    nets = nn.ModuleDict({"model": Reader(), "average": Reader()})
    assert BCP(**TINY).training_step(nets, Batch(labels[:, None].float(), labels), None, EARLY).item() < 1e-3
