"""Training on pairs that a generator made, see medcook/synthesis.py."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from medcook.methods import Batch, Moment
from medcook.preparation import PREPARATIONS
from medcook.synthesis import Bank, RealOnly, SmallPoolTask, SmallTask, Synthesising, small
from medcook.tasks import Budget
from medcook.training import fit

MADE = 7.0
"""Brightness of what `Painter` paints: so it is seen who is made."""


@dataclass
class Painter(Synthesising):
    """A generator that learns one number, and paints all of an image with it."""

    def generator(self, inputs, classes):
        return nn.Linear(1, 1)

    def learn(self, nets, labelled, unlabelled, now):
        return (nets["generator"](torch.ones(1, 1)) - MADE).square().mean()

    def make(self, nets, labelled, unlabelled):
        assert not torch.is_grad_enabled() and not nets.training
        return torch.full_like(labelled.images, MADE), torch.ones_like(labelled.labels)


def batch(side: int = 32, count: int = 4) -> Batch:
    return Batch(torch.randn(count, 1, side, side), torch.zeros(count, side, side, dtype=torch.uint8))


def trained(method: Synthesising, steps: int = 20) -> tuple[nn.ModuleDict, list[float]]:
    torch.manual_seed(0)
    nets = method.build(1, 2, 2)
    losses = []
    for step in range(steps):
        now = Moment(step, steps)
        loss = method.training_step(nets, batch(), None, now)
        if loss.grad_fn is not None:
            loss.backward()
        losses.append(loss.item())
        method.after_step(nets, now)
    return nets, losses


def test_it_learns_then_makes_then_segments():
    nets, losses = trained(Painter(share=0.5, making=3, channels=(8, 8)))
    assert all(loss > 1 for loss in losses[:7]) and losses[7:10] == [0, 0, 0] and all(loss > 0 for loss in losses[10:])
    assert len(nets["made"]) == 3 * 4
    assert (nets["made"].images == MADE).all() and (nets["made"].labels == 1).all()


def test_the_segmenter_sees_the_share_that_is_made(monkeypatch):
    method, seen = Painter(share=0.5, making=2, mixed=0.25, channels=(8, 8)), []
    monkeypatch.setattr(
        "medcook.pretraining.Pretrained.supervised", lambda self, nets, real, now: seen.append(real) or torch.zeros(())
    )
    trained(method)
    assert len(seen) == 10
    for one in seen:
        made = one.labels.flatten(1).float().mean(1) > 0.3
        assert made.sum() == 1 and len(one.images) == 4


def test_who_makes_nothing_has_as_many_steps_on_real_pairs(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "medcook.pretraining.Pretrained.supervised", lambda self, nets, real, now: seen.append(real) or torch.zeros(())
    )
    nets, _ = trained(RealOnly(share=0.5, channels=(8, 8)))
    assert len(seen) == 10 and all((one.labels == 0).all() for one in seen) and "made" not in nets


def test_the_sampler_is_the_moving_average_of_the_generator_and_stands_while_pairs_are_made():
    method = Painter(share=0.5, making=3, channels=(8, 8))
    torch.manual_seed(0)
    nets = method.build(1, 2, 2)
    expected = nets["sampler"].weight.clone()
    for step in range(20):
        with torch.no_grad():
            nets["generator"].weight.fill_(float(step))
        method.after_step(nets, Moment(step, 20))
        if step < 7:
            decay = (step + 1) / (step + 10)
            expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(nets["sampler"].weight, expected)


def test_a_bank_is_found_again_as_it_was():
    bank, other = Bank(), Bank()
    for number in range(3):
        bank.put(torch.full((2, 1, 4, 4), float(number)), torch.full((2, 4, 4), number))
    other.load_state_dict(bank.state_dict())
    assert len(other) == 6 and torch.equal(other.images, bank.images) and torch.equal(other.labels, bank.labels)
    images, labels = other.draw(50)
    assert images.shape == (50, 1, 4, 4) and torch.equal(images[:, 0, 0, 0], labels[:, 0, 0].float())


def test_an_interrupted_run_ends_like_one_that_was_not(monkeypatch, tmp_path):
    """Interrupted while there are pairs already."""
    from medcook import training
    from medcook.errors import Paused

    method, task = Painter(share=0.5, making=3, channels=(8, 8)), SmallTask("embedded", labelled=2, side=32)
    budget = Budget(steps=16, batch=4, precision="float32", checks=0)
    whole = fit(method, task, budget, cache=False, progress=False)
    monkeypatch.setattr("medcook.training.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    calls = iter([False] * 6 + [True] + [False] * 100)
    monkeypatch.setattr(training.Loop, "is_late", lambda self: next(calls))
    with pytest.raises(Paused):
        fit(method, task, budget, progress=False)
    again = fit(method, task, budget, progress=False)
    assert all(torch.equal(again.weights["last"][name], value) for name, value in whole.weights["last"].items())


def test_a_small_task_shows_what_the_large_one_shows():
    plain = PREPARATIONS["acdc"]
    little = small(plain, 64)
    assert little.size == (64, 64) and little.long_side == 128 and little.centre == plain.centre
    assert SmallTask("embedded", side=48).preparation.long_side == 48
    samples = SmallPoolTask("embedded", labelled=2, side=48, pool=("embedded",)).samples("unlabelled")
    assert samples.images.shape[2:] == (48, 48) and samples.groups is not None
