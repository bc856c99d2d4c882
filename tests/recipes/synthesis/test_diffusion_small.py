"""The diffusion of chapter 15 against MONAI's schedulers, and in closed form."""

import pytest
import torch
import torch.nn.functional as F
from monai.networks.schedulers import DDIMScheduler
from torch import nn

from medcook.recipes.synthesis._denoiser import Denoiser, folded, unfolded
from medcook.recipes.synthesis._diffusion import Diffusion

MONAI = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheduler(target: str) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=100,
        schedule="linear_beta",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type=MONAI[target],
    )


def test_noise_is_added_as_in_monai():
    ours, theirs = Diffusion(times=100, schedule="linear"), scheduler("noise")
    x, e, t = images(4, 1, 8, 8), images(4, 1, 8, 8, seed=1), torch.tensor([0, 3, 50, 99])
    torch.testing.assert_close(ours.noised(x, e, t), theirs.add_noise(x, e, t), rtol=1e-5, atol=1e-5)
    velocity = Diffusion(times=100, schedule="linear", target="velocity").wanted(x, e, t)
    torch.testing.assert_close(velocity, theirs.get_velocity(x, e, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", MONAI)
def test_a_step_back_is_that_of_monai(target):
    """From t = 60 to t = 40, with whatever a network says."""
    ours, theirs = Diffusion(times=100, schedule="linear", target=target), scheduler(target)
    theirs.set_timesteps(5)
    noisy, said = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1)
    t = torch.full((2,), 60)
    mine = ours.noised(*ours.seen(said, noisy, t), torch.full((2,), 40))
    torch.testing.assert_close(mine, theirs.step(said, 60, noisy)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", MONAI)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_what_is_wanted_leads_back_to_the_image(target, schedule):
    diffusion = Diffusion(target=target, schedule=schedule)
    x, e, t = images(3, 1, 4, 4), images(3, 1, 4, 4, seed=1), torch.tensor([1, 400, 900])
    clean, noise = diffusion.seen(diffusion.wanted(x, e, t), diffusion.noised(x, e, t), t)
    torch.testing.assert_close(clean, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, e, rtol=1e-3, atol=2e-2)


def test_noise_has_unit_variance_and_hides_the_image_at_the_end():
    signal = Diffusion().signal
    assert signal[0] > 0.99 and signal[-1] < 1e-4 and (signal.diff() < 0).all()


@pytest.mark.parametrize("target", MONAI)
def test_who_knows_the_image_finds_it(target):
    """A network that knows the answer: the sampler ends there, from any noise."""
    diffusion, x, at = Diffusion(target=target), images(2, 1, 8, 8).clamp(-3, 3), []

    def net(noisy, t):
        at.append(int(t[0]))
        a, b = diffusion.parts(t, noisy)
        return diffusion.wanted(x, (noisy - a * x) / b, t)

    found = diffusion.sample(net, images(2, 1, 8, 8, seed=2), 7)
    torch.testing.assert_close(found, x, rtol=1e-2, atol=1e-2)
    assert at == diffusion.steps(7) and at[0] == 999 and at[-1] == 0


def test_a_sampler_is_told_what_is_known():
    diffusion, known = Diffusion(), images(1, 1, 4, 4)
    found = diffusion.sample(lambda x, t: torch.zeros_like(x), images(1, 1, 4, 4, seed=3), 4, change=lambda x, t: known)
    assert torch.equal(found, known)


def test_the_loss_asks_only_where_it_has_weight():
    diffusion, x = Diffusion(target="image"), images(4, 1, 4, 4)
    here = torch.zeros(1, 1, 4, 4)
    here[..., :2] = 1
    net = lambda noisy, t: torch.where(here > 0, x, 100.0)  # noqa: E731
    assert diffusion.loss(net, x, here) == 0
    assert diffusion.loss(net, x) > 1


def test_folding_is_that_of_torch():
    x = images(2, 3, 8, 12)
    assert torch.equal(folded(x, 2), F.pixel_unshuffle(x, 2)) and torch.equal(unfolded(folded(x, 2), 2), x)
    volume = images(2, 1, 4, 8, 4)
    assert torch.equal(unfolded(folded(volume, 2), 2), volume)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_denoiser_listens_to_all_that_it_is_told(dims):
    side = 16
    torch.manual_seed(0)
    net = Denoiser(3, 1, channels=(8, 16), told=5, tokens=6, dims=dims)
    for block in net.modules():  # what starts at zero would be deaf until it has learnt
        for name in ("second", "attention"):
            if hasattr(block, name):
                part = getattr(block, name)
                nn.init.normal_(part.out_proj.weight if name == "attention" else part[-1].weight, std=0.1)
    x, maps = images(2, 1, *[side] * dims), images(2, 2, *[side] * dims, seed=1)
    told, tokens, t = images(2, 5, seed=2), images(2, 7, 6, seed=3), torch.tensor([10, 500])
    out = net(x, t, maps=maps, told=told, tokens=tokens)
    assert out.shape == x.shape
    changed = [dict(maps=-maps), dict(told=-told), dict(tokens=-tokens), {}]
    for number, change in enumerate(changed):
        other = net(x, t + 200 * (number == 3), **{"maps": maps, "told": told, "tokens": tokens} | change)
        assert (other - out).abs().max() > 1e-4
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
