"""Clicks in volumes: where they fall, how they are drawn, how an interaction goes on, what is scored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation._volumes import (
    ClickedVolumes,
    Mixed,
    PositionCode,
    asked_in,
    click_rows,
    correction,
    deepest,
    drawn,
    random_clicks,
    random_correction,
)
from medcook.sam.prompts import middle_of


class Ball(nn.Module):
    """Answers a click with a ball around it, and a background click with nothing near that."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(3.0))

    def encode(self, volumes):
        return (volumes,)

    def answer(self, embedding, points, marks, earlier):
        (volumes,) = embedding
        axes = [torch.arange(count).float() for count in volumes.shape[2:]]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        far = (grid[None, None] - points[:, :, None, None, None]).norm(dim=-1)
        shown = torch.where((marks == 1)[..., None, None, None], self.size - far, -9.0).amax(1)
        return shown if earlier is None else torch.maximum(shown, earlier)


class Balls(ClickedVolumes):
    def make(self):
        return Ball()


def ball(centre, radius, size=(8, 12, 12)) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), axis=-1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) < radius


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_random_clicks_lie_inside():
    masks = torch.stack([torch.from_numpy(ball((4, 5, 6), r)) for r in (1.5, 3.0)])
    for _ in range(20):
        z, y, x = random_clicks(masks)[:, 0].long().unbind(1)
        assert masks[[0, 1], z, y, x].all()


def test_structures_are_asked_for_with_their_volume():
    labels = torch.zeros(2, 8, 12, 12, dtype=torch.uint8)
    labels[1][torch.from_numpy(ball((4, 6, 6), 3))], labels[1, 0, 0, :3] = 2, 1
    masks, owner = asked_in(labels, 2)
    assert owner.tolist() == [1] and torch.equal(masks[0], labels[1] == 2)
    assert len(asked_in(labels[:1], 2)[0]) == 0


def test_clicks_are_drawn_where_they_are():
    points = torch.tensor([[[2.0, 9.0, 4.0], [6.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
    full = drawn(points, torch.tensor([[1.0, 0.0, -1.0]]), (8, 12, 12), (8, 12, 12))[0, 0]
    assert full[2, 9, 4] == pytest.approx(1, abs=1e-3) and full[6, 1, 1] == pytest.approx(-1, abs=1e-3)
    assert full[0, 0, 0].abs() < 0.01
    half = drawn(points[:, :1], torch.ones(1, 1), (4, 6, 6), (8, 12, 12))[0, 0]
    assert np.unravel_index(half.argmax(), half.shape) == (1, 4, 2)


def test_a_careful_person_clicks_in_the_middle():
    big, small = ball((3, 4, 4), 3), ball((6, 10, 10), 1.5)
    assert deepest(big | small) == (3, 4, 4)
    flat = ball((4, 6, 6), 4)[4]
    x, y = middle_of(flat)
    assert deepest(flat) == (y - 0.5, x - 0.5)


def test_a_correction_lies_in_the_largest_error():
    truth, answer = ball((3, 4, 4), 3), ball((6, 10, 10), 1.5)
    assert correction(answer, truth) == ((3, 4, 4), True)
    assert correction(truth, answer)[1] is False
    point, mark = random_correction(*(torch.from_numpy(mask)[None] for mask in (answer, truth)))
    z, y, x = point[0, 0].long()
    assert (truth ^ answer)[z, y, x] and mark.item() == truth[z, y, x]
    assert random_correction(torch.from_numpy(truth)[None], torch.from_numpy(truth)[None])[1].item() == -1


def test_an_interaction_goes_on_until_nothing_is_wrong():
    method = Balls(clicks=4)
    nets = method.build(1, 3, 3)
    two = ball((3, 3, 3), 3) | ball((4, 9, 8), 3)
    found = list(method.answers(nets, torch.zeros(1, 1, 8, 12, 12), two))
    assert [count for count, _ in found] == [1, 2] and (found[-1][1] == two).all()
    assert (found[0][1] & two).sum() < two.sum()


def test_it_learns_from_every_answer():
    method = Balls(clicks=2)
    nets = method.build(1, 3, 3)
    labels = torch.from_numpy(ball((4, 6, 6), 4)).byte()[None]
    batch = Batch(labels[:, None].float(), labels)
    method.training_step(nets, batch, None, Moment(0, 2)).backward()
    assert nets["model"].size.grad.abs() > 0
    nothing = method.training_step(nets, batch._replace(labels=0 * labels), None, Moment(0, 2))
    assert nothing.item() == 0 and nothing.requires_grad
    assert method.predict(nets, batch.images).shape == (1, 3, 8, 12, 12)
    assert method.predict(nets, torch.zeros(2, 1, 12, 12)).shape == (2, 3, 12, 12)


def test_what_is_scored():
    truth = ball((4, 6, 6), 3)
    label = truth.astype(np.uint8)
    case = Case(np.zeros((1, *truth.shape), np.float32), label, "c", "p")
    prepared = SimpleNamespace(
        images=lambda case: torch.zeros(1, 1, 8, 12, 12), labels=lambda c: torch.tensor(label)[None]
    )
    task = SimpleNamespace(preparation=prepared, structures={1: "ball", 2: "not there"})
    method = Balls()
    nets = method.build(1, 3, 3)
    (found,) = click_rows(
        SimpleNamespace(method=method, task=task, nets=nets, weights={"last": nets.state_dict()}), case
    )
    assert found["structure"] == "ball" and found["dice"] == 1 and found["prompts"] == 1
    classes = torch.stack([torch.from_numpy(~truth), torch.from_numpy(truth)])[None].float()
    plain = SimpleNamespace(predict=lambda nets, volume: classes)
    (found,) = click_rows(
        SimpleNamespace(method=plain, task=task, nets=nets, weights={"last": nets.state_dict()}), case
    )
    assert found["dice"] == 1 and found["prompts"] == 0


def test_position_codes_tell_cells_apart():
    codes = PositionCode(32)
    grid = codes.grid((2, 3, 4))
    assert grid.shape == (2, 3, 4, 32)
    torch.testing.assert_close(grid[1, 2, 3], codes(torch.tensor([0.75, 2.5 / 3, 3.5 / 4])))
    assert torch.cdist(grid.flatten(0, 2), grid.flatten(0, 2)).fill_diagonal_(9).min() > 0.1


def test_networks_of_two_and_three_dimensions_keep_their_memory_format():
    nets = Mixed({"flat": nn.Conv2d(1, 1, 3), "deep": nn.Conv3d(1, 1, 3)})
    for layout in (torch.channels_last, torch.channels_last_3d):
        assert nets.to(memory_format=layout) is nets
    assert nets.to("cpu", torch.float64)["deep"].weight.dtype == torch.float64
