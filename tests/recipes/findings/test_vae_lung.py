"""VAEs of nodules: divergences against torch's, components against PCA, what is frozen, clusters and traversals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples
from torch.distributions import Dirichlet, Normal, kl_divergence

from medcook.methods import Batch, Moment
from medcook.recipes.findings import _latent
from medcook.recipes.findings._latent import SIDE, Moments, Principal, Space, concentrations, dirichlet_kl, gaussian_kl
from medcook.recipes.findings._lesions import lesions
from medcook.recipes.findings._nodules import NoduleTask
from medcook.recipes.findings.vae_lung import ARMS, LesionVAE, latent_rows, recipe, space_of
from medcook.tasks import Budget
from medcook.training import Loop

TINY = LesionVAE(channels=(8, 8), latent=6)
KINDS = pytest.mark.parametrize("kind", ["gaussian", "dirichlet"])
PRETEXT, LABELS = Moment(0, 10), Moment(9, 10)


def built(method: LesionVAE = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2)


def batch(count: int = 6, side: int = 96, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 1, side, side, generator=rng), torch.zeros(count, side, side, dtype=torch.uint8)
    for number, label in enumerate(labels):
        at = side // 4 + 5 * number
        label[at : at + 6, at + 3 : at + 9] = 1 + number % 2
    return Batch(images, labels)


class Flat(torch.nn.Module):
    """An encoder or a decoder that knows one answer."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        self.seen = x
        return self.answer


@pytest.mark.component("Gaussian VAE")
class TestGaussian:
    def test_the_divergence_is_torchs(self):
        mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
        wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
        torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted)

    def test_samples_have_the_posteriors_mean_and_spread(self):
        encoded = torch.tensor([[0.5, -1.0, np.log(0.25), np.log(4.0)]]).repeat(20000, 1)
        mean, sample, _ = replace(TINY, latent=2).posterior(encoded)
        torch.testing.assert_close(sample.mean(0), torch.tensor([0.5, -1.0]), atol=0.05, rtol=0)
        torch.testing.assert_close(sample.std(0), torch.tensor([0.5, 2.0]), atol=0.05, rtol=0)
        assert torch.equal(mean[0], torch.tensor([0.5, -1.0]))


@pytest.mark.component("Dirichlet VAE")
class TestDirichlet:
    def test_the_divergence_is_torchs_from_posterior_to_prior(self):
        alpha = concentrations(2 * torch.randn(5, 7))
        prior = Dirichlet(torch.full((5, 7), _latent.PRIOR))
        torch.testing.assert_close(dirichlet_kl(alpha), kl_divergence(Dirichlet(alpha), prior), atol=1e-4, rtol=1e-4)
        assert dirichlet_kl(torch.full((1, 7), _latent.PRIOR)).item() == pytest.approx(0, abs=1e-5)

    def test_samples_lie_on_the_simplex_around_the_mean(self):
        logits = torch.tensor([[2.0, 0.0, -3.0]]).repeat(20000, 1)
        mean, sample, _ = replace(TINY, latent=3, kind="dirichlet").posterior(logits)
        alpha = torch.log1p(logits.exp())
        torch.testing.assert_close(sample.sum(1), torch.full((20000,), 3.0))
        torch.testing.assert_close(sample.mean(0), mean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(mean, 3 * alpha / alpha.sum(1, keepdim=True))
        assert sample.min() >= 0

    def test_a_sample_passes_gradients_on_even_where_hardly_anything_is_left_of_an_entry(self):
        logits = torch.tensor([[5.0, -30.0, 0.0]], requires_grad=True)
        _, sample, divergence = replace(TINY, latent=3, kind="dirichlet").posterior(logits)
        (sample[:, 0].sum() + divergence.sum()).backward()
        assert torch.isfinite(logits.grad).all() and logits.grad[0, 0] != 0


@KINDS
class TestPretext:
    def test_the_loss_is_error_and_weighted_divergence(self, kind):
        method, data, nets = replace(TINY, kind=kind, beta=0.7), batch(), built(replace(TINY, kind=kind))
        encoded = torch.randn(6, 12 if kind == "gaussian" else 6)
        nets["model"].encoder, nets["pretext"] = Flat(encoded), Flat(torch.randn(6, 1, SIDE, SIDE))
        torch.manual_seed(1)
        loss = method.training_step(nets, data, None, PRETEXT)
        torch.manual_seed(1)
        _, sample, divergence = method.posterior(encoded)
        patches = lesions(data.images, data.labels)
        assert torch.equal(nets["model"].encoder.seen, patches) and torch.equal(nets["pretext"].seen, sample)
        wanted = (nets["pretext"].answer - patches).abs().mean() + 0.7 * divergence.mean() / SIDE**2
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_the_vae_learns_first_and_not_from_kinds_and_then_the_mlp_alone(self, kind, mixed):
        method, data = replace(TINY, kind=kind), batch()
        swapped = data._replace(labels=torch.where(data.labels > 0, 3 - data.labels, data.labels))
        for now, learning in ((PRETEXT, ("encoder", "decoder")), (LABELS, ("head",))):
            nets, losses = built(method), []
            for each in (swapped, data):
                nets.zero_grad()
                torch.manual_seed(2)
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    losses.append(method.training_step(nets, each, None, now))
                losses[-1].backward()
            parts = {"encoder": nets["model"].encoder, "decoder": nets["pretext"], "head": nets["model"].head}
            for name, part in parts.items():
                moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters()]
                assert all(moved) if name in learning else not any(moved), name
            assert torch.isfinite(losses[1]) and (losses[0] == losses[1]) == (now == PRETEXT)

    def test_it_comes_to_show_what_it_saw(self, kind):
        method, data = replace(TINY, kind=kind, beta=0.01, channels=(16, 16)), batch()
        smooth = torch.nn.functional.interpolate(data.images[..., ::24, ::24], (96, 96), mode="bilinear")
        nets, data = built(method), data._replace(images=smooth)
        optimiser, losses = torch.optim.Adam(nets.parameters(), 3e-3), []
        for _ in range(60):
            loss = method.training_step(nets, data, None, PRETEXT)
            loss.backward()
            optimiser.step(), optimiser.zero_grad()
            losses.append(loss.item())
        assert np.mean(losses[-10:]) < 0.7 * losses[0]

    @pytest.mark.parametrize("side", [32, 48, 96])
    def test_any_size(self, kind, side):
        method, data = replace(TINY, kind=kind), batch(2, side)
        nets = built(method).eval()
        assert torch.isfinite(method.training_step(nets, data, None, PRETEXT))
        answer = method.predict(nets, data.images)
        assert answer.shape == (2, 3, side, side) and torch.allclose(answer.sum(1), torch.ones(()))


@pytest.mark.component("MLP on latent vectors")
class TestReading:
    @pytest.mark.parametrize("kind", ["gaussian", "dirichlet", "principal"])
    def test_it_reads_means_logits_or_components(self, kind):
        method, patches = replace(TINY, kind=kind), torch.randn(4, 1, SIDE, SIDE)
        net = built(method)["model"].eval()
        found, whole = net.encoded(patches), net.encoder(patches)
        assert torch.equal(found, whole[:, :6]) and whole.shape[1] == (12 if kind == "gaussian" else 6)
        torch.testing.assert_close(net(patches), net.head(found))

    def test_the_encoder_stays_as_it_is_with_its_statistics(self):
        nets, data = built().train(), batch()
        before = {name: value.clone() for name, value in nets["model"].encoder.state_dict().items()}
        TINY.training_step(nets, data, None, LABELS)
        assert all(torch.equal(value, before[name]) for name, value in nets["model"].encoder.state_dict().items())
        TINY.training_step(nets.train(), data, None, PRETEXT)
        assert not torch.equal(nets["model"].encoder[1][1].running_mean, before["1.1.running_mean"])

    def test_the_scale_of_a_number_does_not_matter(self):
        head, vectors = built()["model"].head.train(), torch.randn(16, 6)
        torch.manual_seed(0)
        once = head(vectors)
        torch.manual_seed(0)
        torch.testing.assert_close(head(vectors * torch.arange(1, 7) - 5), once, atol=1e-3, rtol=1e-3)

    def test_components_are_those_of_pca_over_all_batches(self):
        method = replace(TINY, kind="principal", share=0.7)
        nets, seen = built(method), []
        for step in range(7):
            data, now = batch(seed=step), Moment(step, 10)
            seen.append(lesions(data.images, data.labels))
            method.training_step(nets, data, None, now)
            method.after_step(nets, now)
        method.after_step(nets, Moment(7, 10))
        patches = torch.cat(seen)
        flat = patches.flatten(1).numpy()
        pca = PCA(6, svd_solver="full").fit(flat)
        found, wanted = nets["average"].encoder(patches).numpy(), pca.transform(flat)
        np.testing.assert_allclose(abs(found), abs(wanted), atol=1e-3, rtol=1e-3)
        restored, divergence = method.decoded(nets, patches)
        np.testing.assert_allclose(restored.flatten(1).numpy(), pca.inverse_transform(wanted), atol=1e-3)
        assert divergence.isnan().all()

    def test_axes_have_a_sign(self):
        moments, principal = Moments(1), Principal(1, 3)
        moments.add(torch.randn(9, 1, SIDE, SIDE))
        moments.settle(principal)
        assert (principal.axes.amax(1) > -principal.axes.amin(1)).all()

    def test_arms_differ_by_latent_space_or_pretext_alone(self):
        method, *others = (arm.method for arm in ARMS.values())
        assert [replace(other, kind="gaussian", waits=False) == method for other in others] == [True] * 3
        untrained = recipe.arms[recipe.ablation[1]].method
        assert untrained.waits and untrained.kind == "gaussian" and not method.waits
        tiny = replace(TINY, waits=True)
        nets = built(tiny)
        assert "pretext" not in nets and torch.equal(
            nets["model"].encoder[1][0].weight, built()["model"].encoder[1][0].weight
        )
        assert tiny.training_step(nets, batch(), None, PRETEXT).item() == 0


def space(count: int = 60, seed: int = 0) -> Space:
    rng = np.random.default_rng(seed)
    ill, radius = rng.random(count) < 0.5, rng.uniform(3, 5, count)
    vectors = rng.standard_normal((count, 4))
    vectors[:, 1] += 2 * ill
    vectors[:, 3] -= radius
    return Space((np.zeros(4), np.ones(4)), vectors, ill, radius, KMeans(5, n_init=2, random_state=0).fit(vectors))


@pytest.fixture(scope="module")
def runs():
    """{arm: a short run}, on tiny networks."""
    task, budget = (
        NoduleTask("embedded", side=48, versions=1, fold=0),
        Budget(10, batch=6, precision="float32", checks=0),
    )
    samples, found = task.samples("labelled"), {}
    for name, arm in ARMS.items():
        method = replace(arm.method, channels=TINY.channels, latent=TINY.latent)
        found[name] = Loop(method, task, budget, "float32", 0, samples, None, None, False, accelerator="cpu").run()
    return found


@pytest.mark.component("clusters in the latent space")
class TestClusters:
    def test_the_silhouette_is_scikits_for_a_nodule_put_to_the_others(self):
        known, new, ill = space(), np.array([[0.0, 2.0, 0.0, -4.0], [0.0, -1.0, 0.0, -4.0]]), np.array([True, True])
        for vector, kind, found in zip(new, ill, known.silhouette(new, ill), strict=True):
            vectors, kinds = np.vstack([known.vectors, vector]), np.append(known.malignant, kind)
            assert found == pytest.approx(silhouette_samples(vectors, kinds)[-1])
        assert known.silhouette(new, ill)[0] > 0 > known.silhouette(new, ill)[1]
        assert known.silhouette(new, ~ill) == pytest.approx(-known.silhouette(new, ill))

    def test_neighbours_are_those_of_the_nearest_centre(self):
        known, new = space(), np.random.default_rng(1).standard_normal((7, 4))
        for vector, share, radius in zip(new, *known.neighbours(new), strict=True):
            mine = np.linalg.norm(known.clusters.cluster_centers_ - vector, axis=1).argmin() == known.clusters.labels_
            assert (share, radius) == pytest.approx((known.malignant[mine].mean(), known.radius[mine].mean()))

    def test_rows_say_it_of_every_nodule_and_training_nodules_alone_are_known(self, runs):
        fitted = runs["Gaussian VAE"]
        known = space_of(fitted)
        assert len(known.vectors) == int((fitted.task.samples("labelled").labels > 0).flatten(1).any(1).sum())
        np.testing.assert_allclose((known.vectors.mean(0), known.vectors.std(0)), (np.zeros(6), np.ones(6)), atol=1e-5)
        case = next(iter(fitted.task.cases("val")))
        images, labels = fitted.task.preparation.both(case)
        vectors = fitted.nets["average"].encoded(lesions(images, labels, SIDE)).detach().double().numpy()
        ill = (labels == 2).flatten(1).any(1).numpy()
        rows = latent_rows(fitted, case)
        wanted = known.silhouette(known.placed(vectors), ill)
        assert [row["silhouette"] for row in rows] == pytest.approx(wanted, abs=1e-4)
        share = known.neighbours(known.placed(vectors))[0]
        assert [row["purity"] for row in rows] == pytest.approx(np.where(ill, share, 1 - share))


@pytest.mark.component("comparison of Gaussian and Dirichlet")
def test_both_are_measured_in_the_same_columns(runs):
    rows = {name: latent_rows(fitted, next(iter(fitted.task.cases("val")))) for name, fitted in runs.items()}
    columns = {name: {tuple(row) for row in found} for name, found in rows.items()}
    assert len(set.union(*columns.values())) == 1
    known = {name: [not np.isnan(found[0][column]) for column in ("score", "error", "kl", "silhouette", "purity")]
             for name, found in rows.items()}  # fmt: skip
    assert known == {
        "Gaussian VAE": [True] * 5,
        "Dirichlet VAE": [True] * 5,
        "principal components": [True, True, False, True, True],
        "untrained encoder": [True, False, False, True, True],
    }
    for name in ("Gaussian VAE", "Dirichlet VAE"):
        fitted = runs[name]
        images, labels = fitted.task.preparation.both(next(iter(fitted.task.cases("val"))))
        patches = lesions(images, labels, SIDE)
        with torch.no_grad():
            mean, _, divergence = fitted.method.posterior(fitted.nets["average"].encoder(patches))
            error = (fitted.nets["pretext"](mean) - patches).abs().mean((1, 2, 3))
        assert [row["error"] for row in rows[name]] == pytest.approx(error.tolist(), abs=1e-5)
        assert [row["kl"] for row in rows[name]] == pytest.approx(divergence.tolist(), abs=1e-3)


@pytest.mark.component("latent space traversals")
class TestTraversals:
    def test_one_number_changes(self):
        z, values = torch.randn(6), torch.tensor([-2.0, 0.0, 2.0])
        found = TINY.traversed(z, 3, values)
        assert torch.equal(found[:, 3], values)
        assert torch.equal(found[:, [0, 1, 2, 4, 5]], z[[0, 1, 2, 4, 5]].repeat(3, 1))

    def test_on_the_simplex_the_others_give_way_in_proportion(self):
        z, values = 6 * torch.rand(6).softmax(0), torch.tensor([0.0, 1.0, 5.0])
        found = replace(TINY, kind="dirichlet").traversed(z, 3, values)
        torch.testing.assert_close(found.sum(1), torch.full((3,), 6.0))
        assert torch.equal(found[:, 3], values)
        others = [0, 1, 2, 4, 5]
        for line in found:
            torch.testing.assert_close(line[others] / line[others].sum(), z[others] / z[others].sum())

    def test_it_is_shown_by_the_decoder(self, runs):
        for name in ("Gaussian VAE", "principal components", "Dirichlet VAE"):
            method, nets = runs[name].method, runs[name].nets
            z = torch.ones(6)
            shown = method.shown(nets, method.traversed(z, 0, torch.tensor([0.5, 1.0])))
            assert shown.shape == (2, 1, SIDE, SIDE) and not torch.equal(shown[0], shown[1])
            if name == "principal components":
                axis = nets["average"].encoder.axes[0].view(1, SIDE, SIDE)
                torch.testing.assert_close(shown[1] - shown[0], 0.5 * axis, atol=1e-5, rtol=1e-4)
            else:
                torch.testing.assert_close(shown[1], nets["pretext"](z[None])[0])

    def test_directions_are_named_after_what_they_go_with(self):
        found = space().meaning()
        assert found["radius"][0] == 3 and found["radius"][1] < -0.3
        assert found["malignant"][0] == 1 and found["malignant"][1] > 0.5
