"""What a prompt says about looks: where its foreground lies, and that like places are near and others far."""

import pytest
import torch

from medcook.sam.likeness import Mixer, foreground, likeness
from medcook.sam.model import DENSE
from medcook.sam.pretraining import draw_box, draw_points


@pytest.fixture
def boxed():
    dense = torch.zeros(1, 3, DENSE, DENSE)
    draw_box(dense, torch.tensor([[40.0, 60.0, 80.0, 120.0]]))  # cells 10 .. 19 and 15 .. 29
    return dense


def test_foreground_is_the_middle_of_the_box_and_background_what_is_around_it(boxed):
    inside, outside = foreground(boxed)
    assert inside.sum() == pytest.approx(1, abs=1e-4) and outside.sum() == pytest.approx(1, abs=1e-4)
    row, column = divmod(int(inside.argmax()), DENSE)
    assert row in (22, 22) and column in (14, 15)
    box = boxed[:, 1:2] > 0
    assert inside[box].sum() > 0.95 and outside[box].sum() < 0.05
    far = torch.nn.functional.max_pool2d(box.float(), 9, 1, 4) == 0
    assert outside[far].sum() < 0.15


def test_clicks_say_what_is_object_and_what_is_not():
    dense = torch.zeros(1, 3, DENSE, DENSE)
    points = torch.tensor([[[40.0, 40.0], [120.0, 120.0]]])
    draw_points(dense, points, torch.tensor([[1, 0]]))
    inside, outside = foreground(dense)
    assert inside[0, 0, 8:12, 8:12].sum() > 0.9 and outside[0, 0, 28:32, 28:32].sum() > 0.9


def test_without_a_prompt_every_place_counts_the_same():
    for weights in foreground(torch.zeros(2, 3, DENSE, DENSE)):
        assert torch.allclose(weights, torch.full_like(weights, DENSE**-2))


def test_places_like_the_object_are_near_it_and_far_from_the_surroundings(boxed):
    bright = (boxed[:, 1:2] > 0).float()
    features = torch.cat([bright * 2 - 1, torch.ones_like(bright)], dim=1)  # the second tells nothing
    to_object, _, to_rest, _ = likeness(features, boxed)[0]
    inside = bright[0, 0] > 0
    assert to_object[inside].max() < 0.5 < to_object[~inside].min()
    assert to_rest[~inside].max() < 0.5 < to_rest[inside].min()
    assert likeness(features, boxed)[0, 1].abs().max() < 1e-4


def test_a_mixer_starts_by_adding_nothing():
    mixer = Mixer(5, 7)
    found = mixer(torch.randn(2, 2, 9, 9), torch.randn(2, 3, 9, 9))
    assert found.shape == (2, 7, 9, 9) and found.abs().max() == 0
    found.sum().backward()
    assert mixer.leave.weight.grad.abs().max() > 0
