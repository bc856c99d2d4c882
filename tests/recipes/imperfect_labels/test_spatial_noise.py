"""Label errors as a correlated Gaussian field: its divergence, what moves it, and what the network learns from it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels.spatial_noise import (
    ErrorFields,
    SpatialNoise,
    divergence,
    evidence,
    expected_labels,
    expected_loss,
    recipe,
    sampled,
    seen_back,
    squared,
)

TINY = dict(channels=(4, 8), cells=16, slots=6)
NOW = Moment(5, 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(side: int = 16, classes: int = 3) -> Batch:
    labels = torch.randint(0, classes, (2, 4, 4), generator=generator()).byte()
    labels = labels.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    images = labels[:, None] + 0.1 * torch.randn(2, 1, side, side, generator=generator())
    return Batch(images, labels, torch.tensor([4, 1]))


def correlations(count: int, rho: float) -> Tensor:
    """The Kac-Murdock-Szego matrix, by its definition."""
    place = torch.arange(count)
    return rho ** (place[:, None] - place).abs().double()


def fields(shape=(2, 4, 5)) -> tuple[Tensor, Tensor]:
    rng = generator(1)
    mean, spread = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    return mean, spread.abs() + 0.3


@pytest.mark.component("KMS covariance")
class TestCovariance:
    @pytest.mark.parametrize("rho", [0.3, 0.75, 0.95])
    def test_shifts_are_the_dense_inverse(self, rho):
        mean, _ = fields()
        down, across = (torch.linalg.inv(correlations(n, rho)) for n in mean.shape[1:])
        flat = mean.flatten(1)
        dense = (flat @ torch.kron(down, across) * flat).sum(1)
        assert torch.allclose(squared(mean, rho, rho), dense)
        down, across = down * correlations(4, rho), across * correlations(5, rho)
        dense = (flat @ torch.kron(down, across) * flat).sum(1)
        assert torch.allclose(squared(mean, rho, rho**2), dense)

    @pytest.mark.parametrize("rho", [0.3, 0.75, 0.95])
    def test_the_divergence_is_that_of_two_correlated_gaussians(self, rho):
        mean, spread = fields()
        dense = torch.kron(correlations(4, rho), correlations(5, rho))
        width = spread.flatten(1)
        posterior = MultivariateNormal(mean.flatten(1), width[:, :, None] * dense * width[:, None])
        prior = MultivariateNormal(torch.full((20,), -2.0).double(), 1.3**2 * dense)
        assert torch.allclose(divergence(mean, spread, -2.0, 1.3, rho), kl_divergence(posterior, prior))

    def test_without_correlation_every_pixel_is_its_own(self):
        mean, spread = fields()
        alone = kl_divergence(Normal(mean, spread), Normal(torch.tensor(-2.0).double(), 1.3))
        assert torch.allclose(divergence(mean, spread, -2.0, 1.3, 0.0), alone.sum((1, 2)))

    def test_the_field_that_equals_the_prior_costs_nothing(self):
        shape = (1, 6, 6)
        found = divergence(torch.full(shape, -2.0), torch.full(shape, 1.3), -2.0, 1.3, 0.75)
        assert found.item() == pytest.approx(0, abs=1e-3)

    def test_a_region_is_cheaper_than_as_many_single_pixels(self):
        region, single = torch.zeros(2, 1, 16, 16)
        region[:, 4:8, 4:8] = 4.0
        single[:, ::4, ::4] = 4.0
        spread = torch.ones_like(region)
        costs = [divergence(field, spread, 0.0, 1.0, 0.75).item() for field in (region, single)]
        assert costs[0] < costs[1] / 5
        costs = [divergence(field, spread, 0.0, 1.0, 0.0).item() for field in (region, single)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-4)


@pytest.mark.component("label errors as hidden variables")
class TestHiddenErrors:
    def test_the_true_class_is_the_label_unless_that_is_wrong(self):
        labels = torch.tensor([[[0, 2, IGNORE]]], dtype=torch.uint8)
        wrong = torch.tensor([[[0.25, 0.5, 0.5]]])
        found = expected_labels(labels, wrong, 3)[0, :, 0].T
        assert found.tolist() == [[0.75, 0.125, 0.125], [0.25, 0.25, 0.5], [0, 0, 0]]

    def test_without_errors_the_loss_is_the_baselines(self):
        logits = torch.randn(2, 3, 8, 8, generator=generator())
        labels = torch.randint(0, 3, (2, 8, 8), generator=generator()).byte()
        labels[0, :3] = IGNORE
        found = expected_loss(logits, expected_labels(labels, torch.zeros(2, 8, 8), 3))
        assert torch.allclose(found, find_loss("both")(logits, labels))

    def test_the_cross_entropy_is_that_of_the_mixture(self):
        logits = torch.randn(2, 2, 8, 8, generator=generator())
        labels = torch.randint(0, 2, (2, 8, 8), generator=generator()).byte()
        wrong = torch.rand(2, 8, 8, generator=generator())
        right, other = (F.cross_entropy(logits, part.long(), reduction="none") for part in (labels, 1 - labels))
        mixture = ((1 - wrong) * right + wrong * other).mean()
        p, q = logits.softmax(1)[:, 1].double(), torch.where(labels == 1, 1 - wrong, wrong).double()
        dice = (2 * (p * q).sum() + 1) / (p.sum() + q.sum() + 1)
        found = expected_loss(logits, expected_labels(labels, wrong, 2))
        assert found.item() == pytest.approx(mixture.item() + 1 - dice.item(), rel=1e-4)

    def test_an_error_explains_as_much_as_the_other_classes_are_likelier(self):
        log = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2]]).log().T[None, :, None]
        found = evidence(log, torch.tensor([[[1, 0, IGNORE]]], dtype=torch.uint8))[0, 0].numpy()
        lowest = math.log(1e-8)
        assert found == pytest.approx([math.log(0.7 * 0.1) / 2 - math.log(0.2), lowest / 2 - lowest, 0], abs=1e-5)

    def test_errors_are_drawn_from_the_posterior(self):
        torch.manual_seed(0)
        drawn = sampled(torch.full((200, 200), -1.0), torch.full((200, 200), 0.5)).logit()
        assert drawn.mean().item() == pytest.approx(-1, abs=0.02) and drawn.std().item() == pytest.approx(0.5, abs=0.02)

    def test_the_network_learns_the_class_behind_a_wrong_label(self):
        labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
        for wrong, sign in ((0.05, -1), (0.95, 1)):
            logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
            expected_loss(logits, expected_labels(labels, torch.full((1, 4, 4), wrong), 2)).backward()
            assert (-logits.grad[:, 1].sign() == sign).all()

    def test_its_step_goes_by_the_fields(self):
        method = SpatialNoise(**TINY, turns=1)
        view = SpatialNoise(**TINY, augmentation=NONE).augment(batch(), generator())
        losses = []
        for mean in (-9.0, 9.0):
            torch.manual_seed(0)
            nets = method.build(1, 3, 2)
            nets["errors"].value[:, 0] = mean
            nets["errors"].value[:, 1] = -9.0
            losses.append(method.training_step(nets, view, None, NOW).item())
            logits = nets["model"](view.images)
            clean = expected_loss(logits, expected_labels(view.labels, torch.full((2, 16, 16), float(mean > 0)), 3))
            assert losses[-1] == pytest.approx(clean.item(), rel=1e-2)
        assert abs(losses[0] - losses[1]) > 0.05


def blob(value: float) -> Tensor:
    """(1, 16, 16) evidence: against the label in a square and in one pixel, for it elsewhere."""
    explained = torch.full((1, 16, 16), -value)
    explained[:, 3:9, 3:9] = explained[:, 12, 12] = value
    return explained


@pytest.mark.component("approximate Bayesian inference")
class TestInference:
    def field(self, rho: float, explained: Tensor, visits: int = 12) -> Tensor:
        method, (mean, raw) = SpatialNoise(rho=rho, **TINY), ErrorFields(1, 16, -5.0, 1.0).recall(None, 1)
        torch.manual_seed(0)
        for _ in range(visits):
            mean, raw = method.follow(mean, raw, explained)
        return mean[0]

    def test_a_region_is_given_up_and_a_pixel_is_believed(self):
        mean = self.field(0.75, blob(4.0))
        assert mean[4:8, 4:8].min() > 0.5 and mean[12, 12] < -4
        assert mean[:, 11:].max() < -3

    def test_without_correlation_both_are_alike(self):
        mean = self.field(0.0, blob(4.0))
        assert abs(mean[4:8, 4:8].mean() - mean[12, 12]) < 1

    def test_turns_climb_the_bound(self):
        torch.manual_seed(0)
        method, explained = SpatialNoise(**TINY, turns=200), blob(4.0)
        sigma, (mean, raw) = F.softplus(torch.tensor(1.0)).item(), ErrorFields(1, 16, -5.0, 1.0).recall(None, 1)

        def bound(mean: Tensor, raw: Tensor) -> float:
            nodes, weights = np.polynomial.hermite_e.hermegauss(20)
            spread = F.softplus(raw)
            wrong = sum(w * torch.sigmoid(mean + spread * x) for x, w in zip(nodes, weights, strict=True))
            gain = (wrong * explained).sum() / math.sqrt(2 * math.pi)
            return (gain - divergence(mean, spread, -2.0, sigma, 0.75).sum()).item()

        after = method.follow(mean, raw, explained)
        assert bound(*after) > bound(mean, raw) + 40
        assert all((x - y).abs().mean() > 0.1 for x, y in zip(after, (mean, raw), strict=True))

    def test_fields_are_remembered_by_sample(self):
        method = SpatialNoise(**TINY)
        nets, view = method.build(1, 3, 2), method.augment(batch(), generator())
        start = nets["errors"].value.clone()
        method.training_step(nets, view, None, NOW)
        moved = (nets["errors"].value != start).flatten(1).any(1)
        assert moved.tolist() == [False, True, False, False, True, False]
        assert "errors.value" in nets.state_dict()
        mean, raw = nets["errors"].recall(view.index, 2)
        assert torch.equal(torch.stack([mean, raw], 1).half(), nets["errors"].value[[4, 1]])
        with pytest.raises(MedcookError, match="slots"):
            nets["errors"].recall(torch.tensor([6]), 1)

    def test_what_is_not_seen_stays(self):
        errors = ErrorFields(3, 4, -5.0, 1.0)
        seen = torch.zeros(1, 4, 4, dtype=torch.bool)
        seen[:, :2] = True
        errors.keep(torch.tensor([2]), torch.ones(1, 4, 4), torch.zeros(1, 4, 4), seen)
        assert (errors.value[2, :, :2] == torch.tensor([1, 0]).view(2, 1, 1)).all()
        assert (errors.value[2, :, 2:] == errors.value[0, :, 2:]).all()

    @pytest.mark.parametrize("size", [(24, 24), (20, 32)])
    def test_what_a_view_shows_is_carried_back(self, size):
        y, x = torch.meshgrid(*(torch.arange(n) / n for n in size), indexing="ij")
        smooth = torch.stack([y + 2 * x, torch.sin(3 * y * x)]).expand(3, -1, -1, -1)
        grid = SpatialNoise().augmentation.grid(smooth, generator())
        view = F.grid_sample(smooth, grid, padding_mode="border", align_corners=False)
        found, seen = seen_back(view, grid, 20)
        expected = F.interpolate(smooth, size=(20, 20), mode="bilinear", align_corners=False)
        inner = torch.zeros_like(seen)
        inner[:, 2:-2, 2:-2] = seen[:, 2:-2, 2:-2]
        assert inner.float().mean() > 0.3 and not seen.all()
        assert (found - expected).abs().amax(1)[inner].max() < 0.1

    def test_the_network_is_asked_in_the_images_own_frame(self, monkeypatch):
        """Where the network contradicts the label, the field rises, wherever augmentation has put that place."""
        method = SpatialNoise(**{**TINY, "turns": 30, "rho": 0.0, "mean": -2.0})
        labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
        labels[:, 2:7, 3:12] = 1
        spoilt = torch.where(torch.arange(16) > 7, 1 - labels, labels)  # wrong in the right half
        sample = Batch(labels[:, None] * 40.0 - 20, spoilt, torch.tensor([0, 1]))
        view = SpatialNoise(**TINY).augment(sample, generator(3))
        truth = F.grid_sample(sample.images, view.grid, mode="nearest", align_corners=False)
        nets = method.build(1, 2, 2)
        nets["model"] = Told(torch.cat([-truth, truth], dim=1) / 4)
        method.training_step(nets, view, None, NOW)
        mean = nets["errors"].value[:2, 0].float()
        rose = mean > -2
        agree = rose == (torch.arange(16) > 7)
        kept = mean != -2
        assert kept.float().mean() > 0.5 and agree[kept].float().mean() > 0.85


class Told(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("side", [16, 20, 32])
def test_any_size_any_precision_and_every_gradient(side):
    method = SpatialNoise(**TINY)
    nets, view = method.build(1, 3, 2), method.augment(batch(side), generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.training_step(nets, view, None, NOW)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(nets["errors"].value).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
    assert method.predict(nets.eval(), view.images).shape == (2, 3, side, side)


def test_the_ablation_takes_the_correlation_alone():
    method, without = (recipe.arms[name].method.settings() for name in recipe.ablation)
    assert {name for name in method if method[name] != without[name]} == {"rho"} and without["rho"] == 0
