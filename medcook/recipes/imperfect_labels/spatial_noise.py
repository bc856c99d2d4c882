"""Bayesian segmentation from labels with spatially correlated errors (Tadokoro, Takagi and Maeda, TMLR 2026).

Idea: whether a pixel's label is wrong is a hidden variable, and so is its logit: a Gaussian field over the image, whose
neighbours are correlated. Network and field take turns: the network learns the labels that the field leaves likely, the
field follows where the network disagrees. Alone a pixel's label is believed; a connected region's is given up.

    wrong       r = sigmoid(e); the true class is the label with 1 - r, each other class with r / (C - 1)
    prior       e ~ N(mu, sigma^2 R), R = R_y x R_x (Kronecker), R_y[i, j] = rho^|i - j|: Kac, Murdock and Szego's
    posterior   q(e) = N(m, diag(g) R diag(g)), m and g of every pixel of every training image
    ELBO        E_q[sum_k q(k | label, e) log p(k | image)] - KL(q(e) || prior)

The inverse of a KMS matrix is tridiagonal and its determinant (1 - rho^2)^(n - 1), so the divergence is a few shifts.
The letters are those of the authors' code.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from medcook.data import IGNORE
from medcook.data.transforms import warp
from medcook.errors import MedcookError
from medcook.imperfect import NoisyTask
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.imperfect_labels._settings import BASELINE, CHANNELS, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def tridiagonal(field: Tensor, dim: int, rho: float, beside: float) -> Tensor:
    """Along one axis, the product with a tridiagonal matrix: (1, 1 + rho^2, ..., 1) / (1 - rho^2) on its diagonal and
    -beside / (1 - rho^2) next to it. `beside` = rho: the inverse of a KMS matrix R; rho^2: R times it, entry by entry.
    """
    last = field.shape[dim] - 1
    product = field * (1 + rho**2)
    for end in (0, last):
        product.select(dim, end).sub_(rho**2 * field.select(dim, end))
    product.narrow(dim, 1, last).sub_(beside * field.narrow(dim, 0, last))
    product.narrow(dim, 0, last).sub_(beside * field.narrow(dim, 1, last))
    return product / (1 - rho**2)


def squared(field: Tensor, rho: float, beside: float) -> Tensor:
    """x' (K_y x K_x) x of every field (B, H, W) with the matrices of `tridiagonal`: (B,)."""
    return (field * tridiagonal(tridiagonal(field, 1, rho, beside), 2, rho, beside)).sum((1, 2))


def divergence(mean: Tensor, spread: Tensor, mu: float, sigma: float, rho: float) -> Tensor:
    """KL(N(m, diag(g) R diag(g)) || N(mu, sigma^2 R)) of means and standard deviations (B, H, W): (B,)."""
    distance = squared(mean - mu, rho, rho) / sigma**2
    trace = squared(spread, rho, rho**2) / sigma**2
    volumes = 2 * (math.log(sigma) - spread.log()).sum((1, 2))  # the determinants of R cancel
    return (distance + trace - mean[0].numel() + volumes) / 2


def evidence(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """What an error would explain: mean log-probability of the other classes, less the label's, from (B, C, H, W).

    Nothing, 0, where no label is. A probability counts as 1e-8 at least, as in the authors' code.
    """
    found = log_probabilities.clamp_min(math.log(1e-8))
    own = found.gather(1, torch.where(labels == IGNORE, 0, labels).long()[:, None])[:, 0]
    others = (found.sum(1) - own) / (found.shape[1] - 1)
    return torch.where(labels == IGNORE, 0, others - own)


def expected_labels(labels: Tensor, wrong: Tensor, classes: int) -> Tensor:
    """Distribution (B, C, H, W) of the true class: labels (B, H, W) are wrong with a probability (B, H, W).

    All zeros where no label is.
    """
    known = labels != IGNORE
    observed = F.one_hot(torch.where(known, labels, 0).long(), classes).movedim(-1, 1)
    return torch.where(observed == 1, 1 - wrong[:, None], wrong[:, None] / (classes - 1)) * known[:, None]


def expected_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """The book's cross-entropy plus soft Dice, for distributions (B, C, H, W) in place of labels."""
    known = targets.sum(1)
    cross_entropy = -(targets * logits.log_softmax(1)).sum() / known.sum().clamp_min(1)
    soft, truth = (logits.softmax(1) * known[:, None])[:, 1:], targets[:, 1:]
    overlap, size = (soft * truth).sum((0, 2, 3)), (soft + truth).sum((0, 2, 3))
    return cross_entropy + 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def seen_back(values: Tensor, grid: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """What a view (B, C, H, W) shows, on a square of `cells` in the frame of the image that it was taken from.

    grid  (B, H, W, 2) affine: where the view looks in that frame
    Returns (B, C, cells, cells), and (B, cells, cells) bool: what the view shows at all.
    """
    height, width = grid.shape[1:3]
    across = (grid[:, 0, -1] - grid[:, 0, 0]) * width / (2 * (width - 1))
    down = (grid[:, -1, 0] - grid[:, 0, 0]) * height / (2 * (height - 1))
    back = torch.linalg.inv(torch.stack([across, down], dim=2).float())
    offset = -back @ grid.mean((1, 2))[:, :, None]
    places = F.affine_grid(torch.cat([back, offset], dim=2), [len(grid), 1, cells, cells], align_corners=False)
    found = F.grid_sample(values, places, padding_mode="border", align_corners=False)
    return found, (places.abs() <= 1).all(-1)


class ErrorFields(nn.Module):
    """The posterior of every training image's errors, in the image's own frame: m, and g before its softplus.

    value (slots, 2, cells, cells), of little precision so that it is small
    """

    def __init__(self, slots: int, cells: int, mean: float, spread: float):
        super().__init__()
        start = torch.tensor([mean, spread], dtype=torch.float16).view(1, 2, 1, 1)
        self.register_buffer("value", start.expand(slots, 2, cells, cells).clone())
        self.register_buffer("start", start.expand(1, 2, cells, cells).clone())

    def recall(self, index: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """m and raw g (B, cells, cells) float32 of these samples; the start's for samples without a number."""
        if index is not None and index.max() >= len(self.value):
            raise MedcookError(f"There are more than {len(self.value)} training samples.", "Raise `slots`.")
        found = self.start.expand(count, -1, -1, -1) if index is None else self.value[index]
        return found.float().unbind(1)

    def keep(self, index: Tensor | None, mean: Tensor, raw: Tensor, seen: Tensor) -> None:
        """Remember m and raw g of what was seen (B, cells, cells) bool."""
        if index is not None:
            found = torch.stack([mean, raw], dim=1).to(self.value.dtype)
            self.value[index] = torch.where(seen[:, None], found, self.value[index])


@dataclass
class SpatialNoise(Supervised):
    """The ELBO of the module's docstring, by turns: a step of the network, then `turns` steps of the batch's fields.

    rho         correlation of neighbours, of prior and posterior; 0: every pixel errs on its own
    mu, sigma   of the prior, sigma before its softplus; `mean` and `spread`: where m and g start, g likewise
    turns, pace  steps of Adam on a batch's fields, begun afresh at each visit, and their learning rate
    cells       side of the square on which the fields live, whatever the image's size
    slots       the most training samples that the memory holds
    The loss is always cross-entropy plus soft Dice.
    """

    channels: tuple[int, ...] = CHANNELS
    rho: float = 0.75
    mu: float = -2.0
    sigma: float = 1.0
    mean: float = -5.0
    spread: float = 1.0
    turns: int = 20
    pace: float = 0.1
    cells: int = 128
    slots: int = 256

    axes: ClassVar[int | None] = 2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The networks, and `errors`, which is not trained with them."""
        nets = super().build(inputs, classes, dims)
        nets["errors"] = ErrorFields(self.slots, self.cells, self.mean, self.spread)
        return nets

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """As ever; the batch also says where each pixel came from, and `raters` holds the labels of the image itself"""
        grid = self.augmentation.grid(batch.images, rng)
        images, labels = warp(batch.images, batch.labels, grid)
        images = self.augmentation.intensity(images, rng)
        return batch._replace(images=images, labels=labels, grid=grid, raters=batch.labels[:, None])

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the network at a sample of the errors; the fields then move towards what the network sees."""
        logits = nets["model"](labelled.images).float()
        mean, raw = nets["errors"].recall(labelled.index, len(logits))
        wrong = sampled(mean, F.softplus(raw))[:, None]
        wrong = F.grid_sample(wrong, labelled.grid, mode="nearest", align_corners=False)[:, 0]
        loss = expected_loss(logits, expected_labels(labelled.labels, wrong, logits.shape[1]))

        labels = F.interpolate(labelled.raters.float(), size=(self.cells, self.cells))[:, 0].to(torch.uint8)
        with torch.autocast(logits.device.type, enabled=False):
            found, seen = seen_back(logits.detach().log_softmax(1), labelled.grid, self.cells)
            mean, raw = self.follow(mean, raw, torch.where(seen, evidence(found, labels), 0))
        nets["errors"].keep(labelled.index, mean, raw, seen & (labels != IGNORE))
        return loss

    def follow(self, mean: Tensor, raw: Tensor, explained: Tensor) -> tuple[Tensor, Tensor]:
        """m and raw g (B, cells, cells) after `turns` steps up the ELBO, for the evidence (B, cells, cells)."""
        mean, raw = mean.clone().requires_grad_(), raw.clone().requires_grad_()
        adam = Adam([mean, raw], lr=self.pace)
        sigma = math.log1p(math.exp(self.sigma))
        for _ in range(self.turns):
            spread = F.softplus(raw) + 1e-8
            gain = (sampled(mean, spread) * explained).sum((1, 2))
            bound = gain - divergence(mean, spread, self.mu, sigma, self.rho)
            adam.zero_grad()
            (-bound.mean() / mean[0].numel()).backward()
            adam.step()
        return mean.detach(), raw.detach()


def sampled(mean: Tensor, spread: Tensor) -> Tensor:
    """Probabilities of an error at one draw of every pixel's e; their correlation does not matter to a mean."""
    return torch.sigmoid(mean + spread * torch.randn_like(mean))


FULL = NoisyTask("chest_xray", keep=(("site", "Montgomery"),), kind="regions", amount=0.3)
"""The smaller site alone: about 90 training patients, so that 400 steps see each of them some 35 times. An image's
errors are found out visit by visit (the authors: 200 epochs of JSRT, a set of that order)."""

recipe = Recipe(
    paper="spatial-noise",
    title="Segmentation with noisy labels via spatially correlated distributions",
    claim="Modelling label errors as spatially correlated raises Dice above training on the noisy labels as they are.",
    arms={
        "unet": Arm(BASELINE),
        "spatial noise": Arm(SpatialNoise()),
        "without spatial correlation": Arm(SpatialNoise(rho=0.0)),
        "clean labels": Arm(BASELINE, {"kind": "none"}),
    },
    compare=("spatial noise", "unet"),
    ablation=("spatial noise", "without spatial correlation"),
    replicate="fold",
    scales=scales(replace(FULL, dataset="embedded", keep=(("site", "north"),)), FULL),
    components=(
        Component(
            "label errors as hidden variables",
            "implemented",
            "the network learns the expected true label at one draw of the errors. The ELBO's cross-entropy has soft "
            "Dice of the same expected labels beside it, as in all arms; without errors it is the baseline's loss",
        ),
        Component(
            "KMS covariance",
            "implemented",
            "prior and posterior, by shifts along both axes. The correlation, 0.75, and mean and width of the prior "
            "are those of the authors' scripts for lungs, and fixed as there. Their code draws errors with the square "
            "root of g and takes g as standard deviation elsewhere; here it is the standard deviation throughout",
        ),
        Component(
            "approximate Bayesian inference",
            "implemented",
            "m and g of every pixel, by Adam at the official rate: twenty steps at each of some 35 visits, where the "
            "official scripts take ten at each of 200 and pass the image anew for each; here the logits of the "
            "network's own step serve. Augmentation turns and scales images, so what the network sees is carried back "
            "to the image's own frame; what a view does not show stays put",
        ),
        Component(
            "label noise of connected regions",
            "simplified",
            "blobs of a thresholded Gaussian field anywhere in the image, 30% of its pixels; the authors shift, grow "
            "and shrink the masks of JSRT, whose lungs are not at hand: these are of Montgomery County",
        ),
        Component("remote sensing", "absent", "buildings from the air are no medical images"),
    ),
    source="authors' code, github.com/pfnet-research/Bayesian_SpatialCorr; arXiv 2504.14795",
)
