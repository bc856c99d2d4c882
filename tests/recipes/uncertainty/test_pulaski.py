"""PULASki: what its two distances are, where their gradients pull, and what a step compares."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from medcook.data import IGNORE, Case
from medcook.measures import disagreement
from medcook.methods import Batch, Moment
from medcook.methods.probabilistic_unet import ProbabilisticUNet
from medcook.recipes.uncertainty import pulaski
from medcook.recipes.uncertainty.pulaski import (
    Pulaski,
    energy_distance,
    points,
    recipe,
    score,
    sinkhorn_divergence,
    sinkhorn_plan,
    transport,
)

TINY = dict(channels=(4, 8, 8), raters=3)
NOW = Moment(0, 10)
DISTANCES = pytest.mark.parametrize("distance", [energy_distance, sinkhorn_divergence])


def clouds(sets: int = 4, mine: int = 5, theirs: int = 5, axes: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(sets, mine, axes, dtype=torch.float64), torch.rand(sets, theirs, axes, dtype=torch.float64)


def batch(count: int = 3) -> Batch:
    raters = torch.randint(0, 2, (2, count, 16, 16)).byte()
    return Batch(torch.randn(2, 1, 16, 16), raters[:, 0], raters=raters)


def descended(distance, x: Tensor, y: Tensor, steps: int = 60, rate: float = 0.1) -> Tensor:
    """Where points x (K, D) end that follow the gradient of the distance to y (R, D)."""
    x = x.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], rate)
    for _ in range(steps):
        optimiser.zero_grad()
        distance(x[None], y[None]).sum().backward()
        optimiser.step()
        optimiser.param_groups[0]["lr"] *= 0.95
    return x.detach()


@DISTANCES
class TestBothDistances:
    def test_a_set_is_at_zero_from_itself_in_any_order_and_at_more_from_another(self, distance):
        x, y = clouds()
        assert distance(x, x.flip(1)).abs().max() < 1e-6
        assert (distance(x, y) > 1e-4).all()

    def test_they_are_symmetric(self, distance):
        x, y = clouds(mine=4, theirs=6)
        assert torch.allclose(distance(x, y), distance(y, x), rtol=2e-2)

    def test_raters_who_disagree_pull_samples_apart(self, distance):
        """Two raters, two samples that are almost one: the mean is no answer, each sample goes to a rater."""
        raters = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        found = descended(distance, torch.tensor([[0.49, 0.51], [0.51, 0.49]]), raters)
        assert torch.allclose(found, raters, atol=0.05)

    def test_raters_who_agree_pull_them_together(self, distance):
        raters = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        found = descended(distance, torch.tensor([[0.3, 0.2], [0.9, 0.1]]), raters)
        assert torch.allclose(found, raters, atol=0.1)

    def test_they_learn_from_samples_that_are_all_the_same(self, distance):
        x = torch.full((1, 3, 4), 0.5, requires_grad=True)
        distance(x, torch.rand(1, 3, 4)).sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.component("statistical distance")
class TestEnergyDistance:
    def test_on_a_line_it_is_that_of_scipy(self):
        x, y = clouds(mine=5, theirs=7, axes=1)
        for k, found in enumerate(energy_distance(x, y)):
            wanted = stats.energy_distance(x[k, :, 0].numpy(), y[k, :, 0].numpy()) ** 2 / 2
            assert found.item() == pytest.approx(wanted, abs=1e-9)

    def test_one_point_against_one_is_their_distance(self):
        x, y = clouds(mine=1, theirs=1)
        assert torch.allclose(energy_distance(x, y), (x - y).norm(dim=2)[:, 0])

    def test_the_gradient_is_that_of_finite_differences(self):
        x, y = clouds(sets=1, mine=3, theirs=4, axes=3)
        assert torch.autograd.gradcheck(energy_distance, (x.requires_grad_(), y))


@pytest.mark.component("Sinkhorn divergence")
class TestSinkhorn:
    def test_with_little_blur_it_is_the_cost_of_the_best_assignment(self):
        x, y = clouds()
        for k, found in enumerate(sinkhorn_divergence(x, y, blur=1e-3, steps=1000)):
            cost = cdist(x[k].numpy(), y[k].numpy(), "sqeuclidean") / 2
            assert found.item() == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-2)

    def test_the_plan_moves_everything(self):
        cost = torch.rand(4, 5, 7, dtype=torch.float64)
        plan, penalty = sinkhorn_plan(cost, torch.full((4,), 0.05, dtype=torch.float64), 200)
        assert torch.allclose(plan.sum(2), torch.full((4, 5), 1 / 5).double(), atol=1e-6)
        assert torch.allclose(plan.sum(1), torch.full((4, 7), 1 / 7).double(), atol=1e-4)
        relative = (plan * (plan * 35).log()).sum((1, 2))
        assert torch.allclose(penalty, relative, atol=1e-6)

    def test_the_plan_is_the_best_blurred_one(self):
        """Sinkhorn's theorem: exp(-cost / eps) scaled by rows and columns; every 2 x 2 minor says so."""
        cost, eps = torch.rand(1, 4, 4, dtype=torch.float64), 0.1
        plan = sinkhorn_plan(cost, torch.tensor([eps]).double(), 300)[0].log() * eps + cost
        assert (plan - plan[:, :1] - plan[:, :, :1] + plan[:, :1, :1]).abs().max() < 1e-6

    def test_with_endless_blur_everything_moves_everywhere(self):
        cost = torch.rand(2, 3, 5, dtype=torch.float64)
        moved = transport(cost, torch.full((2,), 1e4, dtype=torch.float64), 20)
        assert torch.allclose(moved, cost.mean((1, 2)), atol=1e-3)

    def test_the_gradient_is_that_of_finite_differences(self):
        cost = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
        blur = torch.tensor([0.1]).double()
        assert torch.autograd.gradcheck(lambda c: transport(c, blur, 60), (cost,), atol=1e-4)

    def test_without_debiasing_a_set_would_be_away_from_itself(self):
        x, _ = clouds()
        cost = torch.cdist(x, x) ** 2 / 2
        assert (transport(cost, 0.5 * cost.amax((1, 2)), 100) > 1e-3).all()

    def test_an_arm_uses_it(self):
        x, y = clouds()
        assert torch.equal(Pulaski(distance="sinkhorn", blur=0.2).find_distance()(x, y), sinkhorn_divergence(x, y, 0.2))


class TestPoints:
    def test_a_coordinate_for_each_pixel_and_structure(self):
        labels = torch.randint(0, 3, (4, 2, 5, 5)).byte()
        exact = nn.functional.one_hot(labels.long(), 3).movedim(-1, 2).float()
        drawn, given = points(exact, labels)
        assert given.shape == (2, 4, 2 * 25) and torch.equal(drawn, given)
        assert torch.cdist(given, given)[0, 0, 1] ** 2 == pytest.approx(
            sum(((labels[0, 0] == v) ^ (labels[1, 0] == v)).sum().item() for v in (1, 2)), abs=1e-4
        )

    def test_open_pixels_are_the_same_in_all(self):
        labels = torch.randint(0, 3, (4, 2, 5, 5)).byte()
        labels[1, 0, 2] = IGNORE
        drawn, given = points(torch.rand(3, 2, 3, 5, 5), labels)
        there = torch.ones(2, 2, 5, 5, dtype=torch.bool)
        there[0, :, 2] = False
        for each in (drawn, given):
            assert (each[0][:, ~there[0].flatten()] == 0).all() and (each[1] != 0).any()
        assert (drawn[1] != 0).all()


class TestStep:
    def compared(self, monkeypatch, given: Batch, **settings) -> tuple[Tensor, Tensor]:
        """The two point sets that a step hands to the distance."""
        method, seen = Pulaski(**TINY, **settings), []
        nets = method.build(1, 2, 2)
        original = pulaski.energy_distance
        monkeypatch.setattr(pulaski, "energy_distance", lambda x, y: seen.append((x, y)) or original(x, y))
        method.training_step(nets, given, None, NOW)
        return seen[0]

    @pytest.mark.component("statistical distance")
    def test_a_set_of_samples_meets_the_set_of_all_raters(self, monkeypatch):
        given = batch()
        drawn, wanted = self.compared(monkeypatch, given)
        assert drawn.shape == wanted.shape == (2, 3, 256) and drawn.requires_grad
        mine = {tuple(row.tolist()) for row in given.raters[1].flatten(1).float()}
        assert {tuple(row.tolist()) for row in wanted[1]} == mine
        assert (drawn[:, 0] - drawn[:, 1]).abs().max() > 0

    def test_alone_every_rater_meets_one_sample(self, monkeypatch):
        drawn, wanted = self.compared(monkeypatch, batch(), alone=True)
        assert drawn.shape == wanted.shape == (6, 1, 256)

    @pytest.mark.component("conditional variational autoencoder")
    @pytest.mark.parametrize("alone", [False, True])
    def test_samples_come_from_the_posterior_of_an_annotation(self, monkeypatch, alone):
        """All of one annotation's, or each of its own: what the annotations are that the posterior net gets."""
        method, given, seen = Pulaski(**TINY, alone=alone), batch(), []
        nets = method.build(1, 2, 2)
        nets["model"].posterior_net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
        method.training_step(nets, given, None, NOW)
        assert len(seen[0]) == (6 if alone else 2)

    @pytest.mark.component("conditional variational autoencoder")
    def test_the_prior_is_pulled_to_the_posterior(self):
        for beta, learns in ((1.0, True), (0.0, False)):
            method = Pulaski(**TINY, beta=beta)
            nets = method.build(1, 2, 2)
            method.training_step(nets, batch(), None, NOW).backward()
            grad = nets["model"].prior.head.weight.grad
            assert (grad is not None and grad.abs().max().item() > 0) == learns

    @pytest.mark.parametrize("distance", ["energy", "sinkhorn"])
    def test_missing_raters_and_open_pixels_do_no_harm(self, distance):
        given = batch()
        given.raters[0, 1] = IGNORE
        given.raters[1, :, 4] = IGNORE
        method = Pulaski(**TINY, distance=distance)
        nets = method.build(1, 2, 2)
        for each in (given, given._replace(raters=torch.full_like(given.raters, IGNORE))):
            nets.zero_grad()
            loss = method.training_step(nets, each, None, NOW)
            loss.backward()
            gradients = [p.grad for p in nets["model"].parameters() if p.grad is not None]
            assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in gradients)


class TestScore:
    def scored(self, monkeypatch, maps: np.ndarray, raters: np.ndarray, guess: np.ndarray) -> dict:
        case = Case(np.zeros((1, 6, 6), np.float32), raters[0], "a", "a", raters=raters)
        samples = nn.functional.one_hot(torch.from_numpy(maps).long(), 2).movedim(-1, 1).float()
        monkeypatch.setattr(pulaski, "case_samples", lambda fitted, case, count: samples)
        fitted = SimpleNamespace(predict=lambda case: guess, task=SimpleNamespace(structures={1: "cell"}))
        (row,) = score(fitted, case)
        return row

    def maps(self) -> np.ndarray:
        maps = np.zeros((3, 6, 6), np.uint8)
        maps[:, 1:4, 1:4], maps[1, 4], maps[2, 1] = 1, 1, 0
        return maps

    def test_samples_like_the_raters_are_at_distance_zero(self, monkeypatch):
        raters = self.maps()
        row = self.scored(monkeypatch, raters, raters, raters[0])
        assert row["energy_distance"] == pytest.approx(0, abs=1e-6) and row["dice"] == 1
        assert row["samples_apart"] == pytest.approx(row["raters_apart"]) and row["raters_apart"] > 0.3

    def test_it_is_the_generalised_energy_distance(self, monkeypatch):
        samples, raters = np.random.default_rng(0).integers(0, 2, (2, 3, 6, 6)).astype(np.uint8)
        row = self.scored(monkeypatch, samples, raters[:2], raters[0])
        assert row["energy_distance"] == pytest.approx(disagreement.energy_distance(samples, raters[:2]))
        assert row["samples_to_raters"] == pytest.approx(disagreement.jaccard_distances(samples, raters[:2]).mean())
        pairs = disagreement.jaccard_distances(samples, samples)[np.triu_indices(3, 1)]
        assert row["samples_apart"] == pytest.approx(pairs.mean())

    def test_a_missing_rater_is_left_out(self, monkeypatch):
        raters = self.maps()
        more = np.concatenate([raters, np.full_like(raters[:1], IGNORE)])
        rows = [self.scored(monkeypatch, raters[:2], each, raters[0]) for each in (raters, more)]
        assert rows[0] == rows[1]

    def test_it_needs_plain_numbers(self, monkeypatch):
        row = self.scored(monkeypatch, self.maps(), self.maps()[:1], self.maps()[0])
        numbers = [name for name, value in row.items() if type(value) is float]
        assert set(numbers) == {"energy_distance", "samples_to_raters", "samples_apart", "raters_apart", "dice"}


def test_all_arms_see_images_in_the_same_way():
    shared = {"channels", "rate", "decay", "average", "augmentation", "latent", "guesses", "beta"}
    settings = [
        {name: value for name, value in vars(arm.method).items() if name in shared} for arm in recipe.arms.values()
    ]
    assert all(each == settings[0] for each in settings)
    assert {arm.method.raters for arm in recipe.arms.values()} == {pulaski.RATERS}
    assert all(isinstance(arm.method, ProbabilisticUNet) for arm in recipe.arms.values())
    assert dataclasses.asdict(recipe.arms["single rater"].method) == dataclasses.asdict(Pulaski(alone=True))
