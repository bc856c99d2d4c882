"""BS-LDM, bone suppression by latent diffusion (Sun, Chen, Zheng, Deng, Liu, Min, Elazab, Wan, Wang and Ge, IEEE JBHI
2025).

Idea: large X-rays are too much for diffusion, so it happens in the small space of an autoencoder. Noise in every pixel
hides the mean of an image last, so brightness is what diffusion learns worst: it gets noise of its own in training, and
on the way back what the network sees is held within limits.

  first       z = Q(E(x)), one of 256 vectors at each position, x about D(z), for X-rays with bones and without:
              |D(z) - x| + (1 - SSIM) + a J(D(z)) + b |E(x) - z|^2
  offset      z_t = sqrt(s_t) z + sqrt(1 - s_t) (e + 0.1 o),   o one normal number a channel; the network is asked for
              this noise, told the latents of the X-ray
  threshold   on the way back clean latents are held within 1.4 + 0.003 (T - 1 - t): closely at first, loosely at last
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.projections import suppression_rows
from medcook.recipes.imperfect_labels._adversarial import PatchJudge
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._bones import (
    CALLS,
    DIFFUSION,
    PhasedSuppression,
    PixelDiffusion,
    UNetSuppression,
    hybrid_loss,
    noise_like,
    seeing,
)
from medcook.recipes.synthesis._denoiser import Denoiser, folded, unfolded
from medcook.recipes.synthesis._settings import HEADS, NECKS, XRAY_BUDGET, scales

CODES, LATENTS, FOLD = 256, 4, 2
"""Vectors of the codebook, how many numbers each has, and how many pixels share one on each side; 8 is official."""
OFFSET = 0.1
"""Strength of the offset noise; the official one."""
FIRST, RATE = 1.4, 0.003
"""The limit of latents where the way back begins, and how much it grows with each time; the official ones."""


class Codebook(nn.Module):
    """Each position takes the nearest of `count` vectors, which are running means of what takes them.

    As MONAI's EMAQuantizer (van den Oord et al., NeurIPS 2017, appendix A.1), in a fifth of the time. A vector that
    fewer than `least` positions take starts anew from one of them (Dhariwal et al., Jukebox, 2020).
    """

    def __init__(self, count: int = CODES, size: int = LATENTS, commitment: float = 0.25, least: float = 1.0):
        super().__init__()
        self.commitment, self.least = commitment, least
        self.register_buffer("codes", torch.randn(count, size))
        self.register_buffer("taken", torch.zeros(count))
        self.register_buffer("total", self.codes.clone())

    def nearest(self, latents: Tensor) -> Tensor:
        """Numbers (B, H, W) of the vectors nearest to latents (B, C, H, W)."""
        flat = latents.movedim(1, -1)
        return (self.codes.square().sum(1) - 2 * flat @ self.codes.T).argmin(-1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest vectors, through which gradients pass unchanged, and the commitment loss."""
        number = self.nearest(latents)
        found = self.codes[number].movedim(-1, 1)
        if self.training:
            self.follow(latents.detach().movedim(1, -1).flatten(0, 2), number.flatten())
        return latents + (found - latents).detach(), self.commitment * F.mse_loss(latents, found)

    def follow(self, latents: Tensor, number: Tensor, decay: float = 0.5) -> None:
        """Move the vectors to the means of latents (N, C) that took them, now and lately."""
        count = torch.bincount(number, minlength=len(self.codes)).float()
        self.taken.lerp_(count, 1 - decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, number, latents), 1 - decay)
        rare = self.taken < self.least
        self.total[rare] = latents[torch.randint(len(latents), (int(rare.sum()),), device=latents.device)]
        self.taken[rare] = 1.0
        self.codes.copy_(self.total / self.taken[:, None])


class Way(nn.Module):
    """Maps to maps, inwards or outwards: a straight way that loses nothing to begin with, and a bent one."""

    def __init__(self, inputs: int, outputs: int, width: int = 32):
        super().__init__()
        self.straight = nn.Conv2d(inputs, outputs, 1)
        self.bent = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, outputs, 1),
        )
        nn.init.zeros_(self.bent[-1].weight), nn.init.zeros_(self.bent[-1].bias), nn.init.zeros_(self.straight.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.straight(x) + self.bent(x)


class Coder(nn.Module):
    """Images (B, 1, H, W) to latents (B, 4, H / 2, W / 2) of zero mean and unit variance, and back.

    Always in float32: which vector is nearest is a matter of small differences.
    """

    def __init__(self):
        super().__init__()
        self.inward, self.outward, self.book = Way(FOLD**2, LATENTS), Way(LATENTS, FOLD**2), Codebook()
        nn.init.orthogonal_(self.inward.straight.weight)
        self.outward.straight.weight.data = self.inward.straight.weight.data.transpose(0, 1).clone()
        self.register_buffer("mean", torch.zeros(LATENTS))
        self.register_buffer("spread", torch.ones(LATENTS))

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """D(z) and b |E(x) - z|^2 of images; in training the codebook follows, and so do mean and spread."""
        with torch.autocast(images.device.type, enabled=False):
            latents, commitment = self.book(self.inward(folded(images.float(), FOLD)))
            if self.training:
                spread, mean = torch.std_mean(latents.detach(), dim=(0, 2, 3))
                self.mean.lerp_(mean, 0.1), self.spread.lerp_(spread, 0.1)
            return unfolded(self.outward(latents), FOLD), commitment

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Quantised latents; nothing is learnt from the images."""
        with torch.autocast(images.device.type, enabled=False):
            number = self.book.nearest(self.inward(folded(images.float(), FOLD)))
            return (self.book.codes[number].movedim(-1, 1) - shaped(self.mean)) / shaped(self.spread)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; these are not quantised again."""
        with torch.autocast(latents.device.type, enabled=False):
            return unfolded(self.outward(latents.float() * shaped(self.spread) + shaped(self.mean)), FOLD)


def shaped(numbers: Tensor) -> Tensor:
    """One number a channel (C,) for maps (B, C, H, W)."""
    return numbers[:, None, None]


def offset_noise(like: Tensor, strength: float) -> Tensor:
    """Normal noise of the shape (B, C, H, W), and `strength` times one normal number for each image and channel."""
    return torch.randn_like(like) + strength * torch.randn(*like.shape[:2], 1, 1, device=like.device)


def threshold(t: int) -> float:
    """The limit of clean latents as the network sees them at time t: from 1.4 where there is only noise up to 4.4."""
    return FIRST + RATE * (DIFFUSION.times - 1 - t)


def limited(clean: Tensor, t: int) -> Tensor:
    """Clean latents, held within the limit of their time."""
    return clean.clamp(-threshold(t), threshold(t))


@dataclass
class BSLDM(PhasedSuppression):
    """An autoencoder for `share` of the steps, then conditional diffusion of its latents.

    offset    strength of the offset noise; 0: none
    adaptive  the limit of clean latents follows the time; False: it is the last one all the time
    calls     of the denoiser, in a row, for an image
    """

    share: float = 0.25
    pretext_rate: float = 3e-3
    offset: float = OFFSET
    adaptive: bool = True
    calls: int = CALLS

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return Denoiser(inputs=2 * LATENTS, outputs=LATENTS, fold=1)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return nn.ModuleDict({"coder": Coder(), "judge": PatchJudge(1)})

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """The autoencoder learns from X-rays with bones and without."""
        both = torch.cat(self.pair(images.images))
        given, commitment = nets["pretext"]["coder"].reconstruct(both)
        return hybrid_loss(given, both, nets["pretext"]["judge"]) + commitment

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        xrays, soft = (nets["pretext"]["coder"].encode(part) for part in self.pair(labelled.images))
        return DIFFUSION.loss(seeing(nets["model"], xrays), soft, noise=offset_noise(soft, self.offset))

    def suppress(self, nets: nn.ModuleDict, xrays: Tensor) -> Tensor:
        coder = nets["pretext"]["coder"]
        seen = coder.encode(xrays)
        change, limit = (limited, math.inf) if self.adaptive else (None, threshold(0))
        net = seeing(nets["average"], seen)
        return coder.decode(DIFFUSION.sample(net, noise_like(seen), self.calls, change=change, limit=limit))


recipe = Recipe(
    paper="bs-ldm",
    title="Bones taken out of X-rays by diffusion in a small space",
    claim="Diffusion of an autoencoder's latents, with offset noise and adaptive thresholds, takes more of the bones "
    "out of X-rays than diffusion of their pixels that has as many steps.",
    arms={
        "pixel diffusion": Arm(PixelDiffusion()),
        "bs-ldm": Arm(BSLDM()),
        "without offset and thresholds": Arm(BSLDM(offset=0.0, adaptive=False)),
        "u-net": Arm(UNetSuppression()),
    },
    compare=("bs-ldm", "pixel diffusion"),
    ablation=("bs-ldm", "without offset and thresholds"),
    replicate="fold",
    metric="suppression",
    score=suppression_rows,
    scales=scales(HEADS, NECKS, "pixel diffusion", "bs-ldm", "without offset and thresholds", budget=XRAY_BUDGET),
    published={"bone suppression ratio, SZCH-X-Rays": 0.94159, "bone suppression ratio, JSRT": 0.89322},
    source="official code, github.com/diaoquesang/BS-LDM (config.py, model.py, vq-gan_train.py, ldm_train.py, "
    "ldm_eval.py, metrics.py); figures as measured again by its authors, github.com/diaoquesang/GL-LCM; abstract",
    components=(
        Component(
            "conditional latent diffusion",
            "implemented",
            "the latents of the X-ray stand beside the noised ones of what is to be made, as there. The network gives "
            "the clean latents, as a change of the X-ray's, and not the noise; 20 calls of DDIM, not 1000 of DDPM. It "
            "is compared with diffusion of pixels by the same network: BS-Diff without its enhancement, which is among "
            "the methods that the authors measured",
        ),
        Component(
            "vector quantisation",
            "implemented",
            "256 vectors of four numbers, as there; MONAI's running means, written anew without its one-hot vectors, "
            "and a second start for vectors that nobody takes",
        ),
        Component(
            "perceptual compression",
            "implemented",
            "sides are halved once; there three times, from 1024 x 1024. Images of 64 x 64 need none: this shows what "
            "it costs. Three convolutions each way beside a straight way that begins without loss. Errors of what it "
            "gave back were 0.04 of what bones are after 120 steps, on two training patients who were held back; those "
            "of MONAI's VQ-VAE, the authors' network, 0.10 after 300. Latents are scaled to unit variance, so that "
            "limits mean what they say; what diffusion made is decoded as it is, as there",
        ),
        Component(
            "multi-level hybrid loss",
            "implemented",
            "distance, structural similarity, a judge of patches and commitment, in the weights of the official codes "
            "(this one has the similarity, on five scales, commented out; that of GL-LCM has it). The distance of VGG "
            "features, of weight 0.001, is left out: no such network is at hand",
        ),
        Component(
            "offset noise", "implemented", "in training, of strength 0.1; none where the way back begins, as there"
        ),
        Component(
            "temporal adaptive thresholding",
            "implemented",
            "by the official numbers, which belong to 1000 times; the limit follows the time, not the number of calls. "
            "The ablation has the last limit all the time. On the two patients one network, trained with offset noise, "
            "took 0.842 of the bones away with either limit: latents go up to 2.4, and a third of the way back the "
            "limit is above that. What was made looked right but grainy",
        ),
        Component(
            "high-resolution X-rays",
            "absent",
            "64 x 64 where there are 1024 x 1024: there is no need for latents that the others would have, too",
        ),
        Component(
            "SZCH-X-Rays and JSRT as negatives",
            "simplified",
            "X-rays projected from CT of nine patients, of whom what bones add is known exactly; parallel rays of one "
            "energy, nine sides",
        ),
        Component("clinical evaluation", "absent", "nobody is asked"),
    ),
)
