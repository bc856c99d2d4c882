"""Probabilistic U-Net (Kohl et al., NeurIPS 2018): one network, as many plausible segmentations as you draw.

A conditional variational autoencoder. What raters do differently is a vector z of a few numbers; the U-Net's features
and z together give a segmentation. Of an image x and an annotation y of it, the posterior net says which z it came
from; the prior net, which never sees y, learns to say the same of all annotations of x at once:

    loss = cross-entropy(y, f(x, z)) + beta KL(q(z | x, y) || p(z | x)),    z ~ q        (their eqs. 3 and 4)

To predict, z comes from the prior: every z gives another segmentation of the whole image, not independent noise.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods.method import Batch, Method, Moment
from medcook.networks.encoder import Encoder
from medcook.networks.unet import UNet


class Gaussian(NamedTuple):
    """Independent normal distributions: mean and logarithm of the standard deviation, each (..., latent)."""

    mean: Tensor
    log_sd: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The latent that standard normal `noise` stands for; differentiable in both parameters."""
        return self.mean + self.log_sd.exp() * noise


def divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p), summed over the latent: (...,)."""
    ratio = 2 * (q.log_sd - p.log_sd)
    shift = ((q.mean - p.mean) / p.log_sd.exp()) ** 2
    return 0.5 * (ratio.exp() + shift - 1 - ratio).sum(-1)


class GaussianEncoder(nn.Module):
    """(B, inputs, H, W) to a Gaussian over the latent, (B, latent); looks at half the resolution, which is cheap."""

    def __init__(self, *, inputs: int, channels: tuple[int, ...], latent: int):
        super().__init__()
        self.encoder = Encoder(inputs=inputs, channels=channels)
        self.head = nn.Linear(channels[-1], 2 * latent)

    def forward(self, image: Tensor) -> Gaussian:
        return Gaussian(*self.head(self.encoder(F.avg_pool2d(image, 2))).float().chunk(2, dim=1))


class Combination(nn.Module):
    """Three 1 x 1 convolutions on the features and the latent, the latter repeated at every pixel.

    The first one is linear in both, so that its part of the features is computed once for all latents.
    """

    def __init__(self, *, features: int, latent: int, classes: int):
        super().__init__()
        self.of_features = nn.Conv2d(features, features, 1)
        self.of_latent = nn.Linear(latent, features, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, classes, 1),
        )

    def forward(self, features: Tensor, latent: Tensor) -> Tensor:
        """(B, features, H, W) and (count, B, latent) to logits (count, B, classes, H, W)."""
        joined = self.of_features(features) + self.of_latent(latent)[..., None, None]
        return self.rest(joined.flatten(0, 1)).unflatten(0, joined.shape[:2])


class LatentUNet(nn.Module):
    """U-Net, prior net, posterior net (half as wide, one level fewer) and what combines features with a latent."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], latent: int):
        super().__init__()
        self.classes, self.latent = classes, latent
        half = tuple(width // 2 for width in channels[:-1])
        self.unet = UNet(inputs=inputs, classes=classes, channels=channels)
        self.unet.head = nn.Identity()
        self.prior = GaussianEncoder(inputs=inputs, channels=half, latent=latent)
        self.posterior_net = GaussianEncoder(inputs=inputs + classes, channels=half, latent=latent)
        self.combine = Combination(features=channels[0], latent=latent, classes=classes)

    def posterior(self, images: Tensor, annotations: Tensor) -> Gaussian:
        """Of images (B, C, H, W) and count annotations of each (count, B, H, W): a Gaussian (count, B, latent)."""
        known = F.one_hot(annotations.long().clamp_max(self.classes), self.classes + 1)[..., : self.classes]
        seen = torch.cat([images.expand(len(annotations), *images.shape), known.movedim(-1, 2).to(images)], dim=2)
        found = self.posterior_net(seen.flatten(0, 1))
        return Gaussian(*(each.unflatten(0, annotations.shape[:2]) for each in found))


@dataclass
class ProbabilisticUNet(Method):
    """Cross-entropy of each annotation, decoded from its own posterior, and the divergence from the prior.

    latent  numbers that tell plausible segmentations of an image apart
    beta    weight of the divergence against the cross-entropy summed over an image
    raters  how many annotations of an image are drawn for a step
    guesses how many samples `predict` takes the mean of
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    loss: str = "cross-entropy"
    latent: int = 6
    beta: float = 1.0
    raters: int = 1
    guesses: int = 16

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError(
                "The probabilistic U-Net is for slices here.", "Take a task with a two-axis preparation."
            )
        model = LatentUNet(inputs=inputs, classes=classes, channels=self.channels, latent=self.latent)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model, annotations = nets["model"], draw_annotations(labelled, self.raters)
        posterior = model.posterior(labelled.images, annotations)
        logits = model.combine(model.unet(labelled.images), posterior.at(torch.randn_like(posterior.mean)))
        reconstruction = find_loss(self.loss)(logits.flatten(0, 1).float(), annotations.flatten(0, 1))
        return reconstruction + self.beta * self.information(model, labelled.images, posterior) / pixels(annotations)

    def information(self, model: LatentUNet, images: Tensor, posterior: Gaussian) -> Tensor:
        """How much more the posterior knows than the prior: the mean divergence, in nats."""
        return divergence(posterior, model.prior(images)).mean()

    def samples(self, nets: nn.ModuleDict, images: Tensor, count: int) -> Tensor:
        """(count, B, classes, H, W) probabilities, one plausible segmentation for each latent drawn from the prior."""
        return self.decode(nets, images, torch.randn(count, len(images), self.latent))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The mean of `guesses` samples; always of the same noise, so that a prediction can be repeated."""
        noise = torch.randn(self.guesses, 1, self.latent, generator=torch.Generator().manual_seed(0))
        return self.decode(nets, images, noise).mean(0)

    def decode(self, nets: nn.ModuleDict, images: Tensor, noise: Tensor) -> Tensor:
        """(count, B, classes, H, W) probabilities of prior samples; noise (count, B or 1, latent) says which."""
        model = nets["average"]
        latent = model.prior(images).at(noise.to(images.device))
        return model.combine(model.unet(images), latent).float().softmax(2)


def draw_annotations(batch: Batch, count: int) -> Tensor:
    """(count, B, *size) uint8: `count` of each image's annotations, at random, missing ones left out.

    Without repetition while there are enough, in rounds where there are fewer; the labels where there are no raters.
    """
    if batch.raters is None:
        return batch.labels.expand(count, *batch.labels.shape)
    there = (batch.raters != IGNORE).flatten(2).any(2)
    order = torch.rand(there.shape).to(there.device).masked_fill(~there, 2.0).argsort(1)
    rounds = torch.arange(count, device=order.device) % there.sum(1, keepdim=True).clamp_min(1)
    chosen = order.gather(1, rounds)
    return batch.raters[torch.arange(len(chosen), device=order.device)[:, None], chosen].transpose(0, 1)


def pixels(annotations: Tensor) -> int:
    """How many pixels an image (..., H, W) has."""
    return annotations.shape[-2] * annotations.shape[-1]
