"""Latent vectors of patches: the networks of a VAE, principal components to compare with, and what lies where."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from torch import Tensor, nn

SIDE = 32
"""Pixels of a patch's side."""
HIDDEN = 256
PRIOR = 0.99
"""The Dirichlet prior's b, one of four that the official code of `vae-lung` tries."""


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) of the normal distributions (B, L) to the standard one."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)


def dirichlet_kl(alpha: Tensor, prior: float = PRIOR) -> Tensor:
    """(B,) of the Dirichlet distributions with alpha (B, L) to the symmetric one."""
    beta = torch.full_like(alpha, prior)
    total = alpha.sum(1, keepdim=True)
    sizes = total[:, 0].lgamma() - beta.sum(1).lgamma() + (beta.lgamma() - alpha.lgamma()).sum(1)
    return sizes + ((alpha - beta) * (alpha.digamma() - total.digamma())).sum(1)


def concentrations(logits: Tensor) -> Tensor:
    """The Dirichlet's alpha; the smallest is kept where sampling is still differentiable in float32."""
    return F.softplus(logits).clamp_min(0.02)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.GELU())


class LesionEncoder(nn.Sequential):
    """Patches (B, inputs, 32, 32) to (B, outputs); four pixels become one with more channels first."""

    def __init__(self, inputs: int, channels: tuple[int, ...], outputs: int):
        last = channels[-1] * (SIDE // 2 ** len(channels)) ** 2
        down = [block(i, o, 2) for i, o in zip(channels, channels[1:], strict=False)]
        flat = [nn.Flatten(), nn.Linear(last, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs)]
        super().__init__(nn.PixelUnshuffle(2), block(4 * inputs, channels[0]), *down, *flat)


class LesionDecoder(nn.Sequential):
    """Latent vectors (B, latent) to patches (B, outputs, 32, 32)."""

    def __init__(self, latent: int, channels: tuple[int, ...], outputs: int):
        side, up = SIDE // 2 ** len(channels), []
        for i, o in zip(channels[:0:-1], channels[-2::-1], strict=True):
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), block(i, o)]
        flat = [nn.Linear(latent, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, channels[-1] * side**2), nn.GELU()]
        last = [nn.Conv2d(channels[0], 4 * outputs, 3, padding=1), nn.PixelShuffle(2)]
        super().__init__(*flat, nn.Unflatten(1, (channels[-1], side, side)), *up, *last)


class Principal(nn.Module):
    """Patches (B, C, 32, 32) to their first principal components (B, latent)."""

    def __init__(self, inputs: int, latent: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs * SIDE**2))
        self.register_buffer("axes", torch.zeros(latent, inputs * SIDE**2))

    def forward(self, patches: Tensor) -> Tensor:
        return (patches.flatten(1).float() - self.mean) @ self.axes.T

    def restored(self, vectors: Tensor) -> Tensor:
        """Patches (B, C, 32, 32) of components (B, latent)."""
        return (vectors @ self.axes + self.mean).unflatten(1, (-1, SIDE, SIDE))


class Moments(nn.Module):
    """Count, sum and products of all patches seen, of which principal components are made."""

    def __init__(self, inputs: int):
        super().__init__()
        size = inputs * SIDE**2
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(size, size, dtype=torch.float64))

    def add(self, patches: Tensor) -> None:
        flat = patches.flatten(1).double()
        self.count += len(flat)
        self.total += flat.sum(0)
        self.products += flat.T @ flat

    def settle(self, principal: Principal) -> None:
        """Hand mean and axes over; the largest entry of an axis is positive."""
        mean = self.total / self.count
        axes = torch.linalg.eigh(self.products / self.count - mean.outer(mean))[1].T.flip(0)[: len(principal.axes)]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        principal.mean.copy_(mean), principal.axes.copy_(axes * largest.sign())


class LatentReader(nn.Module):
    """An encoder, and an MLP from `latent` numbers of each patch, on one scale over a batch, to two logits."""

    def __init__(self, encoder: nn.Module, latent: int, dropout: float):
        super().__init__()
        self.encoder, self.latent = encoder, latent
        hidden = [nn.Linear(latent, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 32), nn.GELU()]
        self.head = nn.Sequential(nn.BatchNorm1d(latent, affine=False), *hidden, nn.Linear(32, 2))

    def encoded(self, patches: Tensor) -> Tensor:
        """(B, latent) float32: means, the Dirichlet's logits, or components."""
        return self.encoder(patches).float()[:, : self.latent]

    def forward(self, patches: Tensor) -> Tensor:
        """The encoder stays as it is, with the statistics of its batch normalisation."""
        self.encoder.eval()
        with torch.no_grad():
            vectors = self.encoded(patches)
        return self.head(vectors)


class Space(NamedTuple):
    """The training nodules in the latent space, on one scale: vectors (N, L) and what is known of each (N,)."""

    scale: tuple[np.ndarray, np.ndarray]
    vectors: np.ndarray
    malignant: np.ndarray
    radius: np.ndarray
    clusters: KMeans

    def placed(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (M, L) on the scale of the training nodules."""
        return (vectors - self.scale[0]) / self.scale[1]

    def silhouette(self, vectors: np.ndarray, malignant: np.ndarray) -> np.ndarray:
        """(M,) from -1 to 1: how much nearer vectors (M, L) are to nodules of their own kind than to the other's."""
        apart = cdist(vectors, self.vectors)
        other, own = (
            np.array([line[self.malignant == kind].mean() for line, kind in zip(apart, kinds, strict=True)])
            for kinds in (~malignant, malignant)
        )
        return (other - own) / np.maximum(other, own)

    def neighbours(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M,) share of malignant nodules, and (M,) mean radius, in the cluster of each vector (M, L)."""
        mine = (self.clusters.predict(vectors)[:, None] == self.clusters.labels_).astype(float)
        return (mine @ self.malignant) / mine.sum(1), (mine @ self.radius) / mine.sum(1)

    def meaning(self) -> dict[str, tuple[int, float]]:
        """{fact: (the direction that it goes with most, rank correlation)}, of the radius and of malignancy."""
        found = {}
        for name in ("radius", "malignant"):
            each = [spearmanr(column, getattr(self, name)).statistic for column in self.vectors.T]
            best = int(np.abs(np.nan_to_num(each)).argmax())
            found[name] = (best, float(each[best]))
        return found
