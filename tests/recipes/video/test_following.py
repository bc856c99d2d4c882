"""Flights as training sees them, what is asked for, and how following is scored."""

import pytest
import torch

from medcook.data import IGNORE
from medcook.data.transforms import NONE, Augment
from medcook.methods import Batch
from medcook.recipes.video import _following as following
from medcook.recipes.video._tracker import Answer


def test_all_frames_of_a_flight_are_moved_alike_with_their_labels():
    labels = torch.zeros(2, 5, 20, 20, dtype=torch.uint8)
    labels[:, :, 6:14, 4:12] = 2
    images = (labels > 0)[:, None].float()
    turned = following.augmented(Batch(images, labels), Augment(rotate=90, shift=0.2), torch.Generator().manual_seed(0))
    assert turned.images.shape == images.shape and set(turned.labels.unique().tolist()) == {0, 2}
    assert (turned.labels == turned.labels[:, :1]).all() and not torch.equal(turned.labels[0], turned.labels[1])
    assert not torch.equal(turned.labels, labels)
    moved = following.augmented(
        Batch(images, labels), Augment(90, 0, 0.2, 0, 0, 0, 0), torch.Generator().manual_seed(0)
    )
    assert ((moved.images[:, 0] > 0.5) == (moved.labels == 2)).float().mean() > 0.98
    same = following.augmented(Batch(images, labels), NONE, torch.Generator())
    torch.testing.assert_close(same.images, images, atol=1e-4, rtol=0)
    assert torch.equal(same.labels, labels)


def test_what_is_asked_for_is_somewhere_in_the_flight():
    labels = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    labels[:, 1, 0], labels[:20, 2, 1], labels[:, 0, 3] = 3, 1, IGNORE
    values = following.asked_values(labels, 4)
    assert set(values[20:].tolist()) == {3} and set(values[:20].tolist()) == {1, 3}
    assert set(following.asked_values(torch.zeros_like(labels), 4).tolist()) == {1, 2, 3}
    masks = following.truths(labels, values)
    assert torch.equal(masks == 1, labels == values[:, None, None, None]) and (masks[:, 0, 3] == IGNORE).all()


def test_frames_are_taken_by_their_numbers():
    flights = torch.arange(12.0).view(2, 6)
    assert following.taken(flights, torch.tensor([[5, 0, 0], [1, 2, 3]])).tolist() == [[5, 0, 0], [7, 8, 9]]
    assert following.repeated(("a", "b"), 2) == ("a", "a", "b", "b")


def test_claims_become_probabilities():
    answers = [Answer(torch.full((1, 2, 2), 3.0), torch.tensor([sign]), torch.ones(1)) for sign in (1.0, -1.0)]
    claims = following.claimed(following.joined(answers))
    assert claims[0].min() > 0.9 and claims[1].max() < 0.5
    everything = following.one_of_all(torch.stack([claims, 0.3 * claims], dim=0)[None])
    assert everything.shape == (1, 3, 2, 2, 2)
    torch.testing.assert_close(everything.sum(1), torch.ones(1, 2, 2, 2))
    assert everything[0, :, 0].argmax(0).eq(1).all() and everything[0, :, 1].argmax(0).eq(0).all()


def test_following_is_scored_in_all_frames():
    truth = torch.zeros(4, 12, 12, dtype=torch.bool)
    truth[1:3, 3:9, 3:9] = True
    assert following.followed(truth, truth) == dict.fromkeys(("j", "f", "present", "jf", "dice"), 1.0)
    nothing = following.followed(truth & False, truth)
    assert nothing == {"j": 0.5, "f": 0.5, "present": 0.5, "jf": 0.5, "dice": 0.0}
    alarm = truth.clone()
    alarm[0, 0, 0] = True
    assert following.followed(alarm, truth)["jf"] == pytest.approx(0.75)
    half = truth.clone()
    half[1:3, 3:6] = False
    found = following.followed(half, truth)
    assert found["j"] == pytest.approx(0.75) and found["dice"] == pytest.approx(2 / 3) and found["present"] == 1
