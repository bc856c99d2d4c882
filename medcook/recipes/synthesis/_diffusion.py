"""Diffusion: from an image to noise in many small steps, and back with a network (chapter 15).

With a signal share s_t that falls from nearly 1 to nearly 0 over t = 0, 1, ... T - 1,

    noised   x_t = sqrt(s_t) x + sqrt(1 - s_t) e,   e normal                       (Ho et al., NeurIPS 2020, eq. 4)
    loss     E |f(x_t, t) - target|^2,              target: the noise e            (eq. 14),
                                                    the image x, or the velocity sqrt(s_t) e - sqrt(1 - s_t) x
    back     x_r = sqrt(s_r) x' + sqrt(1 - s_r) e', r < t, x' and e' as f sees them (DDIM: Song et al., ICLR 2021,
                                                    eq. 12 without noise; velocity: Salimans and Ho, ICLR 2022)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Target = Literal["noise", "image", "velocity"]
Net = Callable[[Tensor, Tensor], Tensor]
"""(noised images (B, C, *size), times (B,) int64) -> what the target says, of the images' shape."""


@dataclass(frozen=True)
class Diffusion:
    """A schedule of noise, what a network is asked for, and the way back.

    times   T; signal falls along a cosine (Nichol and Dhariwal, ICML 2021, eq. 17), or by `linear` betas (Ho et al.)
    target  what the network gives: the `noise`, the clean `image` or the `velocity`
    """

    times: int = 1000
    schedule: Literal["cosine", "linear"] = "cosine"
    target: Target = "velocity"

    @cached_property
    def signal(self) -> Tensor:
        """(T,) float32: s_t, the share of the image in the variance of x_t."""
        if self.schedule == "linear":
            betas = torch.linspace(1e-4, 0.02, self.times, dtype=torch.float64)
        else:
            level = torch.arange(self.times + 1, dtype=torch.float64) / self.times
            level = torch.cos((level + 0.008) / 1.008 * math.pi / 2).square()
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        return torch.cumprod(1 - betas, 0).float()

    def parts(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(s_t) and sqrt(1 - s_t), shaped so that they multiply `like` (B, ...)."""
        signal = self.signal.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
        return signal.sqrt(), (1 - signal).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of images (B, C, *size) at times t (B,)."""
        a, b = self.parts(t, clean)
        return a * clean + b * noise

    def wanted(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for x_t."""
        a, b = self.parts(t, clean)
        return {"noise": noise, "image": clean, "velocity": a * noise - b * clean}[self.target]

    def seen(self, output: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean image and the noise that an output stands for; x_t is made of both."""
        a, b = self.parts(t, noisy)
        if self.target == "velocity":
            return a * noisy - b * output, b * noisy + a * output
        if self.target == "image":
            return output, (noisy - a * output) / b
        return (noisy - b * output) / a, output

    def loss(self, net: Net, clean: Tensor, weight: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Mean squared error at random times and noise, both from torch's own generator.

        weight  broadcasts with the images: where it is 0 nothing is asked; the mean is over what is asked
        noise   in place of independent normal noise
        """
        t = torch.randint(self.times, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean) if noise is None else noise
        error = (net(self.noised(clean, noise, t), t).float() - self.wanted(clean, noise, t)).square()
        if weight is None:
            return error.mean()
        weight = weight.expand_as(error)
        return (weight * error).sum() / weight.sum().clamp_min(1e-6)

    def steps(self, count: int) -> list[int]:
        """`count` times on the way back, from T - 1 down to 0, evenly."""
        return torch.linspace(self.times - 1, 0, count).round().long().tolist()

    @torch.no_grad()
    def sample(
        self,
        net: Net,
        start: Tensor,
        count: int = 20,
        change: Callable[[Tensor, int], Tensor] | None = None,
        limit: float = 4.0,
    ) -> Tensor:
        """Images (B, C, *size) from noise `start` in `count` steps of DDIM.

        change  (clean image as the network sees it, t) -> what to go on with: so a sampler is told what is known
        limit   clean values are held within this many units; images here have unit variance
        """
        x, times = start, self.steps(count)
        for t, following in zip(times, [*times[1:], None], strict=True):
            at = torch.full((len(x),), t, device=x.device)
            clean, noise = self.seen(net(x, at).float(), x, at)
            clean = clean.clamp(-limit, limit)
            if change is not None:
                clean = change(clean, t)
            if following is None:
                return clean
            x = self.noised(clean, noise, torch.full_like(at, following))
        raise AssertionError("a sampler takes at least one step")
