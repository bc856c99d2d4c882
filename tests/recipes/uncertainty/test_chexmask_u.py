"""CheXmask-U: graph convolution against its spectral form, the VAE, both uncertainties, and controlled damage."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chest import chest
from numpy.polynomial import chebyshev
from scipy.sparse.csgraph import laplacian
from torch.distributions import Normal, kl_divergence

from medcook.data import Case
from medcook.data.landmarks import landmarks
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.uncertainty import chexmask_u
from medcook.recipes.uncertainty.chexmask_u import (
    ChebConv,
    GraphVAE,
    PixelEntropy,
    kl_from_prior,
    look_up,
    reliability,
    scaled_laplacian,
    with_box,
    with_noise,
)

TINY = dict(channels=(4, 8, 8), latents=6, nodes=12, width=8, order=3, draws=8, skips=(1, 2))
LATE = Moment(9, 10)


def batch(count: int = 2) -> Batch:
    labels = chest().expand(count, -1, -1)
    return Batch(labels[:, None] + 0.3 * torch.randn(count, 1, 32, 32), labels)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def method() -> GraphVAE:
    return GraphVAE(**TINY)


@pytest.fixture
def nets(method):
    return method.build(inputs=1, classes=2, dims=2).eval()


@pytest.mark.component("image encoder and graph decoder")
class TestGraph:
    def test_laplacian_is_the_scaled_one_of_two_rings(self):
        step = np.roll(np.eye(6), 1, 0)
        graph = np.kron(np.eye(2), step + step.T)
        wanted = laplacian(graph, normed=True) - np.eye(12)  # 2 L / lambda_max - 1 with lambda_max = 2
        assert np.allclose(scaled_laplacian(6).numpy(), wanted, atol=1e-6)

    @pytest.mark.parametrize("order", [1, 2, 4])
    def test_convolution_is_a_chebyshev_polynomial_of_the_laplacian(self, order):
        layer = ChebConv(3, 2, order, scaled_laplacian(6))
        x = torch.randn(1, 12, 3)
        values, vectors = np.linalg.eigh(scaled_laplacian(6).double().numpy())
        weights = layer.mix.weight.detach().double().numpy().reshape(2, order, 3)
        wanted = layer.mix.bias.detach().double().numpy() + np.zeros((12, 2))
        for k in range(order):
            filtered = vectors @ np.diag(chebyshev.chebval(values, np.eye(order)[k])) @ vectors.T
            wanted += filtered @ x[0].double().numpy() @ weights[:, k].T
        assert np.allclose(layer(x)[0].detach().numpy(), wanted, atol=1e-5)

    def test_a_landmark_hears_its_neighbours_and_never_the_other_lung(self):
        layer = ChebConv(1, 1, 3, scaled_laplacian(8))
        x = torch.zeros(1, 16, 1)
        x[0, 0] = 1
        heard = (layer(x) - layer(torch.zeros_like(x)))[0, :, 0].abs() > 1e-7
        assert heard.nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7]

    def test_features_are_looked_up_where_landmarks_are(self):
        features = torch.randn(1, 5, 4, 8)
        rows, columns = torch.tensor([0, 3, 2]), torch.tensor([7, 0, 5])
        places = torch.stack([(2 * columns + 1) / 8 - 1, (2 * rows + 1) / 4 - 1], dim=1)[None]
        assert torch.allclose(look_up(features, places)[0], features[0][:, rows, columns].T, atol=1e-5)
        assert look_up(features, places.expand(3, -1, -1)).shape == (3, 3, 5)

    def test_every_stage_corrects_the_one_before(self, nets):
        model = nets["model"]
        mean, _, maps = model.encode(batch().images)
        stages = model.decode(mean, maps)
        assert len(stages) == 3 and stages[-1].shape == (2, 24, 2)
        for head in model.heads[1:]:
            torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        stages = model.decode(mean, maps)
        assert torch.equal(stages[0], stages[2])
        assert len(GraphVAE(**TINY | {"skips": ()}).build(1, 2, 2)["model"].decode(mean, maps)) == 1

    def test_image_features_at_the_landmarks_matter_to_later_stages_alone(self, nets):
        model = nets["model"]
        mean, _, maps = model.encode(batch().images)
        other = [maps[0], maps[1] + 1, maps[2]]
        before, after = model.decode(mean, maps), model.decode(mean, other)
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, False]
        first = model.decode(mean, [maps[0] + 1, maps[1], maps[2]])
        assert [torch.equal(*pair) for pair in zip(before, first, strict=True)] == [True, True, False]

    def test_it_learns_where_lungs_are(self):
        method = GraphVAE(**TINY, beta=0.0)
        nets, seen = method.build(1, 2, 2), batch(4)
        optimiser = torch.optim.Adam(nets["model"].parameters(), 3e-3)
        losses = []
        for _ in range(40):
            optimiser.zero_grad()
            losses.append(method.training_step(nets, seen, None, LATE))
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < 0.2 * losses[0]

    def test_prediction_is_the_inside_of_the_contours(self, method, nets, monkeypatch):
        points, _ = landmarks(chest().expand(2, -1, -1), 60)
        monkeypatch.setattr(nets["average"], "decode", lambda z, maps: [points])
        found = method.predict(nets, batch().images)
        assert torch.allclose(found.sum(1), torch.ones(2, 32, 32))
        inside, truth = found[0, 1] > 0.5, chest()[0] > 0
        assert 2 * (inside & truth).sum() / (inside.sum() + truth.sum()) > 0.9
        wide = GraphVAE(**TINY).build(1, 4, 2).eval()
        found = method.predict(wide, batch().images)
        assert found.shape == (2, 4, 32, 32) and (found[:, 2:] == 0).all()

    def test_volumes_are_refused(self, method):
        with pytest.raises(MedcookError, match="slices"):
            method.build(1, 2, 3)


@pytest.mark.component("variational latent space")
class TestLatentSpace:
    def test_divergence_is_that_of_normal_distributions(self):
        mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
        wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
        assert kl_from_prior(mean, log_variance).item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_what_is_decoded_is_drawn(self, method, nets, monkeypatch):
        """Many draws have the mean and the variance that the encoder says."""
        seen = []
        decode = nets["model"].decode
        monkeypatch.setattr(nets["model"], "decode", lambda z, maps: seen.append(z) or decode(z, maps))
        one = batch(1)
        many = Batch(one.images.expand(300, -1, -1, -1), one.labels.expand(300, -1, -1))
        with torch.no_grad():
            mean, log_variance, _ = nets["model"].encode(one.images)
            method.training_step(nets, many, None, LATE)
        assert torch.allclose(seen[0].mean(0), mean[0], atol=0.2)
        assert torch.allclose(seen[0].std(0), (log_variance[0] / 2).exp(), rtol=0.15)

    def test_loss_is_error_of_all_stages_plus_divergence_that_rises(self, nets, monkeypatch):
        seen = batch()
        truth, _ = landmarks(seen.labels, 12)
        monkeypatch.setattr(nets["model"], "decode", lambda z, maps: [truth, truth + 0.1, truth - 0.2])
        mean, log_variance, _ = nets["model"].encode(seen.images)
        for step, share in [(0, 0.0), (2, 0.4), (9, 1.0)]:
            loss = GraphVAE(**TINY, beta=0.7).training_step(nets, seen, None, Moment(step, 10))
            wanted = 0.01 + 0.04 + share * 0.7 * kl_from_prior(mean, log_variance)
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_an_image_without_two_lungs_adds_to_the_divergence_alone(self, nets):
        seen = batch()
        half = seen._replace(labels=torch.stack([seen.labels[0], torch.zeros_like(seen.labels[0])]))
        losses = []
        for labels in (half.labels, torch.stack([half.labels[0], chest()[0].roll(3, 0) * 0])):
            torch.manual_seed(1)
            losses.append(GraphVAE(**TINY).training_step(nets, half._replace(labels=labels), None, LATE).item())
        assert losses[0] == losses[1]
        nothing = seen._replace(labels=torch.zeros_like(seen.labels))
        loss = GraphVAE(**TINY, beta=0.5).training_step(nets, nothing, None, LATE)
        mean, log_variance, _ = nets["model"].encode(seen.images)
        assert loss.item() == pytest.approx(0.5 * kl_from_prior(mean, log_variance).item(), rel=1e-4)


def set_spread(nets, sigma: float) -> None:
    """The same latent standard deviation for every image and dimension."""
    layer = nets["average"].distribution
    with torch.no_grad():
        layer.weight[6:] = 0
        layer.bias[6:] = 2 * np.log(sigma)


@pytest.mark.component("latent uncertainty")
class TestLatentUncertainty:
    def test_it_is_the_mean_standard_deviation(self, method, nets):
        images = batch().images
        _, log_variance, _ = nets["average"].encode(images)
        found = method.doubts(nets, images, draws())["latent"]
        assert torch.allclose(found, (log_variance / 2).exp().mean(1))
        set_spread(nets, 0.3)
        assert torch.allclose(method.doubts(nets, images, draws())["latent"], torch.tensor(0.3))

    def test_the_ablation_has_the_same_for_all(self, nets):
        method = GraphVAE(**TINY, learned=False)
        assert (method.doubts(nets, batch().images, draws())["latent"] == 1).all()


@pytest.mark.component("predictive uncertainty")
class TestPredictiveUncertainty:
    def test_it_is_the_spread_of_landmarks_over_draws_in_pixels(self, method, nets):
        images = batch(1).images
        mean, log_variance, maps = nets["average"].encode(images)
        z = mean + torch.randn(8, 6, generator=draws()) * (log_variance / 2).exp()
        places = nets["average"].decode(z, maps)[-1].detach().numpy() * 16
        wanted = np.sqrt(places.var(0, ddof=1).sum(1))
        found = method.doubts(nets, images, draws())
        assert np.allclose(found["nodes"][0].numpy(), wanted, rtol=1e-3)
        assert found["predictive"].item() == pytest.approx(wanted.mean(), rel=1e-3)
        assert np.allclose(found["places"][0].numpy() * 16, places.mean(0), atol=1e-4)

    def test_it_grows_with_the_latent_spread_and_is_nothing_without(self, method, nets):
        sizes = []
        for sigma in (0.01, 0.3, 2.0):
            set_spread(nets, sigma)
            sizes.append(method.doubts(nets, batch().images, draws())["predictive"].mean().item())
        assert sizes[0] < 0.1 * sizes[1] < sizes[1] < sizes[2]

    def test_the_baseline_is_entropy(self):
        method = PixelEntropy(channels=(4, 8))
        method.predict = lambda nets, images: images
        half, sure = torch.full((2, 3, 3), 0.5), torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])
        found = method.doubts(None, torch.stack([half, sure]), draws())["predictive"]
        assert found.tolist() == pytest.approx([np.log(2), 0])


@pytest.mark.component("controlled corruption")
class TestDamage:
    def test_noise_has_the_level_it_says_and_level_zero_none(self):
        images = torch.randn(2, 1, 64, 64)
        assert torch.equal(with_noise(images, 0, draws()), images)
        found = [(with_noise(images, level, draws()) - images).std().item() for level in (1, 2, 3)]
        assert found == pytest.approx([0.5, 1.0, 2.0], rel=0.05)

    def test_boxes_are_nested_and_hide_what_is_there(self):
        images = torch.rand(2, 1, 64, 64)
        covered, boxes = zip(*(with_box(images, level, draws()) for level in (1, 2, 3)), strict=True)
        assert [int(box.sum()) for box in boxes] == [8 * 8, 16 * 16, 24 * 24]
        assert (boxes[1][boxes[0]]).all() and (boxes[2][boxes[1]]).all()
        assert (covered[2][..., boxes[2]] == images.min()).all()
        assert torch.equal(covered[2][..., ~boxes[2]], images[..., ~boxes[2]])

    def fitted(self, method, size: int = 32):
        nets, label = method.build(1, 2, 2).eval(), chest(size)[0].numpy()
        task = SimpleNamespace(preparation=Preparation(size=(size, size)))
        case = Case(
            np.random.default_rng(0).random((1, size, size), np.float32), label, "c", "p", attributes={"site": "S"}
        )
        return SimpleNamespace(method=method, nets=nets, task=task, predict=lambda case: case.label), case

    def test_a_row_has_every_level_and_is_the_same_again(self, method):
        fitted, case = self.fitted(method)
        (row,), (again,) = reliability(fitted, case), reliability(fitted, case)
        assert row == again
        assert row["dice"] == 1 and row["error"] == 0 and row["group"] == "S"
        assert row["uncertainty"] == row["uncertainty_0"] and row["latent_0"] > 0
        names = [f"{kind}_{level}" for kind in ("uncertainty", "latent", "error") for level in range(4)]
        names += [f"{kind}_covered_{level}" for kind in ("uncertainty", "latent") for level in (1, 2, 3)]
        assert set(names) <= set(row)

    def test_near_and_far_are_landmarks_inside_and_outside_the_box(self, method, monkeypatch):
        fitted, case = self.fitted(method)
        box = with_box(fitted.task.preparation.images(case), 3, chexmask_u.rng_of(case))[1]
        column, row = (float((2 * each.float().mean() + 1) / 32 - 1) for each in box.nonzero().flip(1).T)
        places = torch.tensor([[column, row], [-0.99, -0.99]])[None]
        seen = {"nodes": torch.tensor([[5.0, 2.0]]), "places": places, "predictive": torch.ones(1)}
        monkeypatch.setattr(method, "doubts", lambda *given: seen)
        (row,) = reliability(fitted, case)
        assert (row["near"], row["far"]) == (5, 2)

    def test_the_baseline_has_a_row_too(self):
        fitted, case = self.fitted(PixelEntropy(channels=(4, 8)))
        (row,) = reliability(fitted, case)
        assert row["uncertainty"] > 0 and "latent_0" not in row and "near" not in row
