"""Latent diffusion of X-rays without bones: codebook, offset noise and thresholds."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.synthesis import bs_ldm
from medcook.recipes.synthesis._bones import DIFFUSION, hybrid_loss, noise_like
from medcook.recipes.synthesis._denoiser import folded, unfolded
from medcook.recipes.synthesis.bs_ldm import (
    BSLDM,
    CODES,
    LATENTS,
    OFFSET,
    Codebook,
    Coder,
    limited,
    offset_noise,
    recipe,
    threshold,
)

FIRST, SECOND = Moment(0, 10), Moment(5, 10)


def pairs(size: tuple[int, int] = (32, 32), many: int = 2) -> Batch:
    """Smooth images, to which a bright bar is added for the X-ray."""
    rng = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.randn(many, 1, 4, 4, generator=rng), size, mode="bilinear")
    labels = torch.zeros(many, *size).byte()
    labels[:, 8:16] = 1
    return Batch(torch.cat([soft + 0.5 * labels[:, None], soft], dim=1), labels)


def built(method: BSLDM) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 2, 2).train()


def shaken(nets: nn.ModuleDict) -> nn.ModuleDict:
    """The same networks with nothing at exactly 0, where some layers begin."""
    for weight in nets.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return nets


def step(method: BSLDM, nets: nn.ModuleDict, now: Moment) -> torch.Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, pairs(), None, now)


def moved(nets: nn.Module) -> set[str]:
    return {name for name, weight in nets.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}


@pytest.mark.component("vector quantisation")
class TestCodebook:
    def test_it_is_monais(self):
        """Where every vector is taken: MONAI has no second start, and a small number in place of no positions."""
        torch.manual_seed(0)
        ours, theirs = Codebook(6, 4, least=0.0), EMAQuantizer(2, 6, 4, decay=0.5)
        theirs.embedding.weight.data.copy_(ours.codes), theirs.ema_w.copy_(ours.codes)
        for _ in range(3):
            latents = torch.randn(2, 4, 16, 16, requires_grad=True)
            (found, loss), (wanted, cost, number) = ours(latents), theirs(latents)
            torch.testing.assert_close(found, wanted), torch.testing.assert_close(loss, cost)
            torch.testing.assert_close(ours.codes, theirs.embedding.weight.data, rtol=1e-4, atol=1e-4)
            assert number.unique().numel() == 6
            loss.backward()
            assert latents.grad.abs().max() > 0

    def test_a_vector_that_nobody_takes_starts_anew_from_some_position(self):
        torch.manual_seed(0)
        book = Codebook(5, 4)
        book.codes[3] = book.total[3] = 100.0
        latents = torch.randn(1, 4, 8, 8)
        book(latents)
        apart = (latents.movedim(1, -1).reshape(-1, 4) - book.codes[3]).abs().sum(1)
        assert apart.min() == 0 and book.taken[3] == 1

    def test_the_nearest_vector_is_found(self):
        torch.manual_seed(0)
        book, latents = Codebook(12, 4).eval(), torch.randn(2, 4, 5, 6)
        apart = torch.cdist(latents.movedim(1, -1).reshape(-1, 4), book.codes)
        assert torch.equal(book.nearest(latents).flatten(), apart.argmin(1))
        torch.testing.assert_close(book(latents)[0].movedim(1, -1).reshape(-1, 4), book.codes[apart.argmin(1)])

    def test_gradients_pass_as_if_nothing_were_between(self):
        latents = torch.randn(1, 4, 3, 3, requires_grad=True)
        weight = torch.randn(1, 4, 3, 3)
        (Codebook(8, 4)(latents)[0] * weight).sum().backward()
        assert torch.equal(latents.grad, weight)

    def test_it_stands_still_when_nothing_is_to_be_learnt(self):
        book = Codebook(8, 4).eval()
        before = deepcopy(book.state_dict())
        book(torch.randn(1, 4, 3, 3))
        assert all(torch.equal(before[name], value) for name, value in book.state_dict().items())


@pytest.mark.component("perceptual compression")
class TestCoder:
    def test_half_as_many_positions_and_back_for_any_size(self):
        coder = Coder().eval()
        for size in ((32, 32), (64, 64), (16, 24)):
            latents = coder.encode(torch.randn(2, 1, *size))
            assert latents.shape == (2, LATENTS, size[0] // 2, size[1] // 2)
            assert coder.decode(latents).shape == (2, 1, *size)

    def test_latents_are_vectors_of_the_codebook_less_the_mean_and_over_the_spread(self):
        torch.manual_seed(0)
        coder, images = Coder().eval(), torch.randn(2, 1, 16, 16)
        coder.mean.copy_(torch.randn(4)), coder.spread.copy_(torch.rand(4) + 0.5)
        plain = coder.encode(images) * coder.spread[:, None, None] + coder.mean[:, None, None]
        torch.testing.assert_close(plain, coder.book(coder.inward(folded(images, 2)))[0])
        torch.testing.assert_close(coder.decode(coder.encode(images)), coder.reconstruct(images)[0])

    def test_mean_and_spread_are_those_of_what_is_coded(self):
        torch.manual_seed(0)
        coder, images = Coder().train(), torch.randn(4, 1, 32, 32)
        for _ in range(80):
            coder.reconstruct(images)
        latents = coder.encode(images)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.01, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.01, rtol=0)

    def test_what_diffusion_makes_is_not_quantised_again(self):
        torch.manual_seed(0)
        coder = Coder().eval()
        latents = torch.randn(1, LATENTS, 8, 8)
        torch.testing.assert_close(coder.decode(latents), unfolded(coder.outward(latents), 2))

    def test_it_begins_by_losing_nothing_but_what_the_codebook_lacks(self):
        coder, images = Coder(), torch.randn(2, 1, 16, 16)
        torch.testing.assert_close(unfolded(coder.outward(coder.inward(folded(images, 2))), 2), images)

    def test_it_stands_still_while_diffusion_learns(self):
        nets = built(BSLDM())
        before = deepcopy(nets["pretext"].state_dict())
        step(BSLDM(), nets, SECOND).backward()
        assert all(torch.equal(before[name], value) for name, value in nets["pretext"].state_dict().items())
        assert {name.split(".")[0] for name in moved(nets)} == {"model"}


@pytest.mark.component("multi-level hybrid loss")
def test_the_coder_learns_from_both_kinds_of_x_ray_by_the_hybrid_loss_and_commitment():
    method, batch = BSLDM(), pairs()
    nets = shaken(built(method))
    again = deepcopy(nets)
    both = torch.cat([batch.images[:, :1], batch.images[:, 1:]])
    given, commitment = again["pretext"]["coder"].reconstruct(both)
    wanted = hybrid_loss(given, both, again["pretext"]["judge"]) + commitment
    loss = step(method, nets, FIRST)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    names = {name for name, weight in nets["pretext"].named_parameters() if weight.requires_grad}
    assert moved(nets["pretext"]) == names and not moved(nets["model"])


@pytest.mark.component("offset noise")
class TestOffset:
    def test_a_channel_has_one_number_beside_the_noise_of_its_pixels(self):
        torch.manual_seed(0)
        found = offset_noise(torch.zeros(3, 2, 8, 8), 0.7)
        torch.manual_seed(0)
        plain, one = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 1, 1)
        torch.testing.assert_close(found, plain + 0.7 * one)

    def test_means_vary_as_they_should(self):
        torch.manual_seed(0)
        like = torch.zeros(400, 4, 16, 16)
        for strength in (0.0, 0.1, 0.5):
            spread = offset_noise(like, strength).mean((2, 3)).std().item()
            assert spread == pytest.approx((strength**2 + 1 / 256) ** 0.5, rel=0.06)

    def test_diffusion_is_trained_with_it(self, monkeypatch):
        given = []
        real = DIFFUSION.loss
        monkeypatch.setattr(
            type(DIFFUSION),
            "loss",
            lambda self, net, clean, noise: given.append(noise) or real(net, clean, noise=noise),
        )
        for strength in (3.0, 0.0):
            method = BSLDM(offset=strength)
            step(method, built(method), SECOND)
        with_it, without = (noise.mean((2, 3)).abs().mean() for noise in given)
        assert with_it > 1 and without < 0.1


@pytest.mark.component("temporal adaptive thresholding")
class TestThreshold:
    def test_it_grows_from_noise_to_image(self):
        assert threshold(999) == 1.4 and threshold(0) == pytest.approx(1.4 + 0.003 * 999)
        found = [threshold(t) for t in DIFFUSION.steps(20)]
        assert found == sorted(found) and found[0] < found[-1]

    def test_clean_latents_are_held_within_it(self):
        clean = torch.tensor([-9.0, -2.0, 0.5, 2.0, 9.0])
        assert limited(clean, 999).tolist() == pytest.approx([-1.4, -1.4, 0.5, 1.4, 1.4])
        assert limited(clean, 499).tolist() == pytest.approx([-2.9, -2.0, 0.5, 2.0, 2.9])

    def test_every_step_back_is(self, monkeypatch):
        """A network that says 10 everywhere: what it is shown next is that less what is above the limit."""
        shown = []

        def net(x, t, maps):
            shown.append((int(t[0]), x))
            return 10 - maps

        coder = Coder().eval()
        method = BSLDM(calls=3)
        nets = {"average": net, "pretext": {"coder": coder}}
        decoded = []
        monkeypatch.setattr(Coder, "decode", lambda self, latents: decoded.append(latents) or latents)
        method.suppress(nets, torch.zeros(1, 1, 16, 16))
        (first, start), (then, second), _ = shown
        _, noise = DIFFUSION.seen(torch.full_like(start, 10.0), start, torch.tensor([first]))
        held = torch.full_like(start, threshold(first))
        torch.testing.assert_close(second, DIFFUSION.noised(held, noise, torch.tensor([then])))
        torch.testing.assert_close(decoded[0], torch.full_like(start, threshold(0)))
        shown.clear()
        BSLDM(calls=3, adaptive=False).suppress(nets, torch.zeros(1, 1, 16, 16))
        second = shown[1][1]
        torch.testing.assert_close(
            second, DIFFUSION.noised(torch.full_like(start, threshold(0)), noise, torch.tensor([then]))
        )


@pytest.mark.component("conditional latent diffusion")
class TestDiffusion:
    def test_the_loss_is_that_of_latents_told_the_x_rays(self):
        method, batch = BSLDM(), pairs()
        nets = built(method)
        nn.init.normal_(nets["model"].leave[-1].weight)
        found = step(method, nets, SECOND)
        xrays, soft = (nets["pretext"]["coder"].encode(batch.images[:, k : k + 1]) for k in (0, 1))
        torch.manual_seed(1)
        noise = offset_noise(soft, OFFSET)
        t = torch.randint(1000, (2,))
        said = xrays + nets["model"](DIFFUSION.noised(soft, noise, t), t, maps=xrays)
        assert found.item() == pytest.approx((said - soft).square().mean().item(), rel=1e-4)

    def test_an_image_is_decoded_from_what_diffusion_made(self):
        method, xrays = BSLDM(calls=2), pairs().images[:, :1]
        nets = built(method).eval()
        nn.init.zeros_(nets["average"].leave[-1].weight), nn.init.zeros_(nets["average"].leave[-1].bias)
        coder = nets["pretext"]["coder"]
        with torch.no_grad():
            found = method.suppress(nets, xrays)
            assert torch.equal(found, method.suppress(nets, xrays)) and found.shape == xrays.shape
            torch.testing.assert_close(found, coder.decode(limited(coder.encode(xrays), 0)))

    def test_every_parameter_learns(self):
        nets = shaken(built(BSLDM()))
        for now in (FIRST, SECOND):
            step(BSLDM(), nets, now).backward()
        assert moved(nets) == {name for name, weight in nets.named_parameters() if weight.requires_grad}


@pytest.mark.component("SZCH-X-Rays and JSRT as negatives")
def test_x_rays_are_projected_from_ct_and_dense_is_bright():
    task = recipe.scales["full"].task
    assert task.dataset == "openkbp" and task.data_kind == "real-anatomy-simulated"
    batch = pairs()
    assert (batch.images[:, 0] - batch.images[:, 1])[batch.labels == 1].min() > 0


def test_the_ablation_differs_in_offset_and_threshold():
    arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
    full, cut = (arms[name] for name in recipe.ablation)
    assert {key for key in full if full[key] != cut[key]} == {"offset", "adaptive"}
    assert cut["offset"] == 0 and cut["adaptive"] is False and full["offset"] == OFFSET
    assert CODES == 256 and noise_like is bs_ldm.noise_like


def test_bfloat16():
    nets = built(BSLDM(calls=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for now in (FIRST, SECOND):
            assert torch.isfinite(step(BSLDM(), nets, now))
        assert BSLDM(calls=2).suppress(nets.eval(), pairs().images[:, :1]).dtype == torch.float32
