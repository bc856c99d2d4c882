"""CheXmask-U: how sure is each landmark (Cosarinsky et al., MIDL 2026; HybridGNet: Gaggion et al., TMI 2023).

An image encoder gives a distribution over a latent space, a graph decoder turns a latent vector into the landmarks of
both lungs. The spread of the latent distribution, and that of landmarks decoded from many draws, say how much to trust
the contour; both should grow when an image is degraded, and be largest where the segmentation is worst.

    z ~ N(mu(x), sigma(x)^2),   landmarks = D(z, features of x)                                                     (1)
    latent uncertainty      U_z = mean over latent dimensions of sigma(x)                                           (2)
    predictive uncertainty  U_n = std over draws of z of landmark n;   of the image: its mean over landmarks        (3)
    loss = MSE of the landmarks + beta KL(N(mu, sigma^2) || N(0, 1))                                                (4)

Chebyshev graph convolution over the rings of landmarks (Defferrard et al. 2016), with the scaled Laplacian L~:
    y = sum_k T_k(L~) x W_k,   T_0 = 1, T_1 = L~, T_k = 2 L~ T_(k-1) - T_(k-2)                                      (5)

The landmarks are sampled from the masks of chest_xray, as no expert landmarks are at hand.
"""

import zlib
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.cohorts import CohortTask
from medcook.data import IGNORE, Case
from medcook.data.landmarks import filled, landmarks
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.methods import Batch, Method, Moment, Supervised
from medcook.networks.encoder import Encoder
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

LEVELS = 3
GENTLE = Augment(rotate=10.0, scale=0.15, shift=0.1)


def scaled_laplacian(nodes: int) -> Tensor:
    """L~ = 2 L / lambda_max - 1 of two rings of `nodes`: (2 nodes, 2 nodes); here minus the mean of both neighbours."""
    step = torch.roll(torch.eye(nodes), 1, 0)
    return torch.block_diag(*[-(step + step.T) / 2] * 2)


class ChebConv(nn.Module):
    """Eq. 5: (B, nodes, inputs) to (B, nodes, outputs) with polynomials of degree below `order`."""

    def __init__(self, inputs: int, outputs: int, order: int, laplacian: Tensor):
        super().__init__()
        self.order, self.mix = order, nn.Linear(order * inputs, outputs)
        self.register_buffer("laplacian", laplacian, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        terms = [x, self.laplacian @ x]
        while len(terms) < self.order:
            terms.append(2 * self.laplacian @ terms[-1] - terms[-2])
        return self.mix(torch.cat(terms[: self.order], dim=2))


class HybridGNet(nn.Module):
    """Image (B, inputs, H, W) to a distribution of latents (B, latents), and latents to landmarks (B, 2 nodes, 2).

    skips  which feature maps of the encoder, counted from the deepest, are looked up where a landmark seems to be;
           each lookup is followed by two graph convolutions that correct the landmarks
    """

    def __init__(
        self, *, inputs: int, channels, latents: int, nodes: int, width: int, order: int, skips: tuple[int, ...]
    ):
        super().__init__()
        laplacian = scaled_laplacian(nodes)
        self.encoder, self.skips, self.nodes = Encoder(inputs=inputs, channels=channels), skips, 2 * nodes
        self.distribution = nn.Linear(64 * channels[-1], 2 * latents)
        self.unfold = nn.Linear(latents, 2 * nodes * width)
        widths = [width] + [width + channels[-1 - skip] + 2 for skip in skips]
        self.blocks = nn.ModuleList(
            nn.ModuleList([ChebConv(wide, width, order, laplacian), ChebConv(width, width, order, laplacian)])
            for wide in widths
        )
        self.norms = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]) for _ in widths)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in widths)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean and log variance (B, latents) of the latent distribution, and all feature maps."""
        maps = [self.encoder.down[0](images)]
        for block in self.encoder.down[1:]:
            maps.append(block(self.encoder.pool(maps[-1], 2)))
        mean, log_variance = self.distribution(F.adaptive_avg_pool2d(maps[-1], 8).flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6), maps

    def decode(self, z: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Landmarks after every stage, the last ones best; `maps` may be of one image for many z."""
        x = self.unfold(z).relu().view(len(z), self.nodes, -1)
        places: list[Tensor] = []
        for stage, (block, norm, head) in enumerate(zip(self.blocks, self.norms, self.heads, strict=True)):
            if stage:
                x = torch.cat([x, look_up(maps[-1 - self.skips[stage - 1]], places[-1]), places[-1]], dim=2)
            for convolution, normalise in zip(block, norm, strict=True):
                x = normalise(convolution(x)).relu()
            places.append(head(x) + (places[-1] if stage else 0))
        return places


def look_up(features: Tensor, places: Tensor) -> Tensor:
    """Features (B or 1, C, H, W) at landmarks (B, nodes, 2): (B, nodes, C)."""
    features = features.expand(len(places), *features.shape[1:])
    return F.grid_sample(features, places[:, :, None], padding_mode="border", align_corners=False)[..., 0].mT


def kl_from_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), mean over images and latent dimensions."""
    return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).mean()


@dataclass
class GraphVAE(Method):
    """HybridGNet with its two uncertainties.

    latents, nodes, width, order   dimensions of the latent space; landmarks a lung; graph features; Chebyshev order
    beta     weight of the KL divergence, reached linearly in the first half of the training; 2 s^2 stages latents
             / coordinates makes eq. 4 a likelihood of residuals with standard deviation s, here 0.06
    learned  False: every image has the latent variance 1, so that only the decoder can tell images apart
    draws    how many draws from the latent distribution the predictive uncertainty takes
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    augmentation: Augment = field(default_factory=lambda: GENTLE)
    latents: int = 32
    nodes: int = 40
    width: int = 32
    order: int = 4
    skips: tuple[int, ...] = (1, 2)
    beta: float = 4e-3
    learned: bool = True
    draws: int = 20

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("Landmarks are for slices and X-rays.", "Take a task whose preparation has two axes.")
        sizes = {name: getattr(self, name) for name in ("channels", "latents", "nodes", "width", "order", "skips")}
        model = HybridGNet(inputs=inputs, **sizes)
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def distribution(self, model: HybridGNet, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean and log variance of the latents, and the feature maps."""
        mean, log_variance, maps = model.encode(images)
        return mean, log_variance if self.learned else torch.zeros_like(log_variance), maps

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Eq. 4, the landmarks of every stage; images without two lungs add to the KL divergence alone."""
        truth, known = landmarks(labelled.labels, self.nodes)
        mean, log_variance, maps = self.distribution(nets["model"], labelled.images)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        errors = sum((places.float() - truth).square().mean((1, 2)) for places in nets["model"].decode(z, maps))
        beta = self.beta * min(1.0, 2 * now.fraction)
        return (errors * known).sum() / known.sum().clamp_min(1) + beta * kl_from_prior(mean, log_variance)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The inside of the most likely contours as probability 1 of class 1; other structures have probability 0."""
        mean, _, maps = self.distribution(nets["average"], images)
        inside = filled(nets["average"].decode(mean, maps)[-1].float(), tuple(images.shape[2:])).float()
        rest = torch.zeros_like(inside)
        return torch.stack([1 - inside, inside] + [rest] * (nets["average"].classes - 2), dim=1)

    @torch.no_grad()
    def doubts(self, nets: nn.ModuleDict, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """`latent` (B,), eq. 2; `nodes` (B, 2 nodes), eq. 3 in pixels; `predictive` (B,), its mean; `places`."""
        mean, log_variance, maps = self.distribution(nets["average"], images)
        sigma = (log_variance / 2).exp()
        pixels, drawn = torch.tensor(images.shape[:1:-1]) / 2, []
        for number in range(len(images)):
            noise = torch.randn(self.draws, mean.shape[1], generator=rng)
            one = [features[number : number + 1] for features in maps]
            drawn.append(nets["average"].decode(mean[number] + noise * sigma[number], one)[-1])
        drawn = torch.stack(drawn)
        nodes = (drawn.std(1) * pixels).norm(dim=2)
        return {"latent": sigma.mean(1), "nodes": nodes, "predictive": nodes.mean(1), "places": drawn.mean(1)}


@dataclass
class PixelEntropy(Supervised):
    """The baseline: a U-Net, and the entropy of its probabilities, mean over the image."""

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    augmentation: Augment = field(default_factory=lambda: GENTLE)

    @torch.no_grad()
    def doubts(self, nets: nn.ModuleDict, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """`predictive` (B,): entropy in nats."""
        entropy = -torch.special.xlogy(p := self.predict(nets, images), p).sum(1)
        return {"predictive": entropy.flatten(1).mean(1)}


def reliability(fitted, case: Case) -> list[dict]:
    """error (1 - Dice of everything that is not background) and uncertainty, and both after controlled damage.

    uncertainty_k, latent_k, error_k   with noise of level k, 0 being the image as it is
    uncertainty_covered_k, latent_...  with a box of level k blanked
    near, far                          landmarks' spread inside and outside the largest box; NaN where there are none
    """
    truth = (case.label > 0) & (case.label != IGNORE)
    dice = metrics.dice(fitted.predict(case) > 0, truth)
    values = {"dice": dice, "error": 1 - dice, "group": str(case.attributes.get("site") or "")}
    prepared = fitted.task.preparation
    images, labels = prepared.images(case), prepared.labels(case, truth.astype(np.uint8)) > 0
    for level in range(LEVELS + 1):
        rng = rng_of(case)
        noisy = with_noise(images, level, rng)
        values |= felt(fitted.method.doubts(fitted.nets, noisy, rng), str(level))
        guess = fitted.method.predict(fitted.nets, noisy).argmax(1) > 0
        values[f"error_{level}"] = 1 - metrics.dice(guess.numpy(), labels.numpy())
    for level in range(1, LEVELS + 1):
        rng = rng_of(case)
        covered, box = with_box(images, level, rng)
        seen = fitted.method.doubts(fitted.nets, covered, rng)
        values |= felt(seen, f"covered_{level}")
    if "nodes" in seen:
        there = look_up(box[None, None].float().expand(len(images), 1, *box.shape), seen["places"])[..., 0] > 0.5
        values |= {"near": float(seen["nodes"][there].mean()), "far": float(seen["nodes"][~there].mean())}
    return [evaluation.row(case, "foreground", uncertainty=values["uncertainty_0"], **values)]


def felt(seen: dict[str, Tensor], suffix: str) -> dict[str, float]:
    """The uncertainties of a method, means over a case's images, as columns."""
    columns = {"predictive": "uncertainty", "latent": "latent"}
    return {f"{columns[name]}_{suffix}": float(seen[name].mean()) for name in columns if name in seen}


def rng_of(case: Case) -> torch.Generator:
    """Seeded by the case, so that every arm and level gets the same damage and draws."""
    return torch.Generator().manual_seed(zlib.crc32(case.case_id.encode()))


def with_noise(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    """Gaussian noise of 0, 0.5, 1 and 2 standard deviations of the image at levels 0 to 3."""
    return images + (0.0, 0.5, 1.0, 2.0)[level] * torch.randn(images.shape, generator=rng)


def with_box(images: Tensor, level: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images with one square at a random place set to their minimum, and the square (H, W) bool.

    Its side is 1, 2 and 3 eighths of the image's at levels 1 to 3; the centre is the same at every level.
    """
    centre = torch.rand(2, generator=rng) * 0.5 + 0.25
    axes = [(torch.arange(n) + 0.5) / n for n in images.shape[2:]]
    rows, columns = ((axis - at).abs() < level / 16 for axis, at in zip(axes, centre, strict=True))
    box = rows[:, None] & columns
    return torch.where(box, images.amin(), images), box


recipe = Recipe(
    paper="chexmask-u",
    title="Uncertainty of landmarks from a graph variational autoencoder",
    claim="Trained at one hospital, the spread of a graph VAE's landmarks ranks test X-rays of two hospitals by their "
    "error as well, within 0.1 of rank correlation, as a U-Net's entropy ranks them by its own error.",
    arms={
        "u-net entropy": Arm(PixelEntropy()),
        "graph vae": Arm(GraphVAE()),
        "same variance for all": Arm(GraphVAE(learned=False)),
        "without skips": Arm(GraphVAE(skips=())),
    },
    compare=("graph vae", "u-net entropy"),
    ablation=("graph vae", "same variance for all"),
    scales={
        "quick": Scale(
            CohortTask("embedded", keep=(("site", "north"),)), Budget(steps=40, batch=8, checks=1), replicates=1
        ),
        "full": Scale(
            CohortTask("chest_xray", keep=(("site", "Shenzhen"),), evaluation="test"),
            Budget(steps=600, batch=8, checks=2),
            arms=("u-net entropy", "graph vae", "same variance for all"),
        ),
    },
    metric="rank_correlation",
    expect="non-inferior",
    margin=0.1,
    score=reliability,
    source="settings after the official code, github.com/mcosarinsky/CheXmask-U",
    components=(
        Component(
            "image encoder and graph decoder",
            "implemented",
            "HybridGNet with its lookups of image features; a ring a lung, no heart, one resolution of the graph; each "
            "stage corrects the landmarks of the one before; these are sampled from masks, equal distances apart",
        ),
        Component("variational latent space", "implemented", "the weight of the KL divergence is our own"),
        Component("latent uncertainty", "implemented", "the mean standard deviation; the code keeps each variance"),
        Component("predictive uncertainty", "implemented", "20 draws instead of 50"),
        Component("controlled corruption", "implemented", "noise and one blanked box, at three levels, on test images"),
        Component(
            "out-of-distribution detection",
            "simplified",
            "X-rays of another hospital, and damaged ones; the paper's five public sets are not at hand",
        ),
        Component(
            "data set with uncertainty of each node",
            "simplified",
            "a manifest and a reader, tested on a fixture: data_manifests/chexmask_u.yaml",
        ),
    ),
)
