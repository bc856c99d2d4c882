"""PULASki: statistical distances to learn inter-rater variability (Chatterjee et al., Medical Image Analysis 2025).

A probabilistic U-Net is trained with cross-entropy, one annotation at a time: nothing says that its samples, taken
together, are spread like the annotations are. PULASki draws a set of samples S of an image and compares it with the
set of all raters' annotations Y, by a distance D between the two distributions:

    loss = D(S, Y) + beta KL(q || p)                             S: decoded from latents drawn from q(z | x, y), y in Y
    energy distance     D = E|s - y| - E|s - s'| / 2 - E|y - y'| / 2
    Sinkhorn divergence D = OT(S, Y) - OT(S, S) / 2 - OT(Y, Y) / 2,  OT = min_P <P, C> + eps KL(P || uniform),
                        C = |s - y|^2 / 2

Segmentations are points here, one coordinate for each pixel and structure; |.| is the Euclidean distance of these.

The paper compares Frechet inception distance, Sinkhorn divergence and a "Hausdorff divergence", the default of
the official code. There it is `hausdorff` of geomloss with the kernel -|s - y|: that is the energy distance above, to
the letter. It is the arm `pulaski` and carries the claim; the Sinkhorn divergence is an arm beside it.

All arms see the same annotations of an image in a step. Cross-entropy is the paper's baseline; with Dice, as everywhere
in this book, it is the stronger one here, so that is what the claim is tested against. `single rater` measures by the
same distance, but each annotation against the one sample of its own posterior: one against one, not set against set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.cohorts import RaterTask
from medcook.data import IGNORE, Case
from medcook.measures import disagreement
from medcook.methods import Batch, Moment
from medcook.methods.probabilistic_unet import ProbabilisticUNet, draw_annotations, pixels
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import case_samples
from medcook.tasks import Budget

RATERS, SAMPLES = 5, 16
"""Annotations of an image that every arm sees in a step; samples that are scored."""


@dataclass
class Pulaski(ProbabilisticUNet):
    """The distance between a set of samples and a set of annotations in place of cross-entropy.

    distance  `energy` or `sinkhorn`; `blur` is the latter's eps, as a share of the largest cost in an image
    alone     True: each annotation against the sample of its own posterior, set against set no more (the ablation)
    """

    distance: str = "energy"
    blur: float = 0.05
    raters: int = RATERS
    alone: bool = False

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """As many samples as annotations, all from the posterior of one of them: of which one must not matter."""
        model, annotations = nets["model"], draw_annotations(labelled, self.raters)
        posterior = model.posterior(labelled.images, annotations if self.alone else annotations[:1])
        noise = torch.randn(len(annotations), len(labelled.images), self.latent, device=labelled.images.device)
        samples = model.combine(model.unet(labelled.images), posterior.at(noise)).float().softmax(2)
        drawn, given = points(samples, annotations)
        if self.alone:
            drawn, given = (each.flatten(0, 1)[:, None] for each in (drawn, given))
        scale = math.sqrt(pixels(annotations))
        information = self.information(model, labelled.images, posterior)
        return self.find_distance()(drawn, given).mean() / scale + self.beta * information / scale

    def find_distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        return {"energy": energy_distance, "sinkhorn": partial(sinkhorn_divergence, blur=self.blur)}[self.distance]


def points(samples: Tensor, annotations: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (K, B, classes, H, W) and label maps (R, B, H, W) as points (B, K, D) and (B, R, D).

    A coordinate for each pixel and structure; pixels that one of the annotations leaves open are 0 in all of them.
    """
    classes = samples.shape[2]
    known = (annotations != IGNORE).all(0)
    labels = F.one_hot(torch.where(known, annotations, 0).long(), classes).movedim(-1, 2)
    flat = [(each[:, :, 1:] * known[:, None]).float().flatten(2).transpose(0, 1) for each in (samples, labels)]
    return flat[0], flat[1]


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """(B,) of point sets (B, K, D) and (B, R, D): 0 where they are the same, else positive (Szekely and Rizzo)."""
    apart, within, among = (torch.cdist(a, b).mean((1, 2)) for a, b in ((x, y), (x, x), (y, y)))
    return apart - within / 2 - among / 2


def sinkhorn_divergence(x: Tensor, y: Tensor, blur: float = 0.05, steps: int = 50) -> Tensor:
    """(B,) of point sets (B, K, D) and (B, R, D); debiased, so that a set is at distance 0 from itself."""
    apart, within, among = (torch.cdist(a, b) ** 2 / 2 for a, b in ((x, y), (x, x), (y, y)))
    epsilon = blur * apart.detach().amax((1, 2)).clamp_min(1e-8)
    return (
        transport(apart, epsilon, steps) - transport(within, epsilon, steps) / 2 - transport(among, epsilon, steps) / 2
    )


def transport(cost: Tensor, epsilon: Tensor, steps: int) -> Tensor:
    """(B,) cost of moving one uniform set onto another along the best blurred plan, by Sinkhorn's iterations.

    cost  (B, K, R); epsilon (B,), reached from above by halving. The gradient is that of the cost under the plan found
    (envelope theorem), so that nothing is remembered of the iterations.
    """
    plan, penalty = sinkhorn_plan(cost.detach(), epsilon, steps)
    return (plan * cost).sum((1, 2)) + epsilon * penalty


def sinkhorn_plan(cost: Tensor, epsilon: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The plan (B, K, R), and its divergence (B,) from moving everything everywhere; all in logarithms."""
    rows, columns = (math.log(count) for count in cost.shape[1:])
    mine, theirs = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    for step in range(steps):
        eps = epsilon[:, None] * max(1.0, 2.0 ** (6 - step))
        theirs = eps * (rows - ((mine[:, :, None] - cost) / eps[..., None]).logsumexp(1))
        mine = eps * (columns - ((theirs[:, None] - cost) / eps[..., None]).logsumexp(2))
    log_ratio = (mine[:, :, None] + theirs[:, None] - cost) / epsilon[:, None, None]
    plan = (log_ratio - rows - columns).exp()
    return plan, (plan * log_ratio).sum((1, 2))


def score(fitted, case: Case) -> list[dict]:
    """One row: generalised energy distance of 16 samples to all raters (lower is better), and what it is made of.

    raters_apart, samples_apart  mean 1 - IoU of two raters, and of two samples: equal where disagreement was learned
    dice                         of the mean prediction with the raters' majority, mean over structures
    """
    raters = np.stack([rater for rater in case.raters if (rater != IGNORE).any()])
    samples = case_samples(fitted, case, SAMPLES).argmax(1).to(torch.uint8).numpy()
    guess, wanted = fitted.predict(case), disagreement.consensus(raters)
    distances = disagreement.jaccard_distances(*[np.concatenate([samples, raters])] * 2)
    among_samples, to_raters = np.split(distances[: len(samples)], [len(samples)], axis=1)
    among_raters = distances[len(samples) :, len(samples) :]
    known = wanted != IGNORE
    overlaps = [metrics.dice((guess == value) & known, wanted == value) for value in fitted.task.structures]
    values = {
        "energy_distance": 2 * to_raters.mean() - among_samples.mean() - among_raters.mean(),
        "samples_to_raters": to_raters.mean(),
        "samples_apart": apart(among_samples),
        "raters_apart": apart(among_raters),
        "dice": np.mean(overlaps),
    }
    return [evaluation.row(case, "all", **{name: float(value) for name, value in values.items()})]


def apart(distances: np.ndarray) -> float:
    """The mean distance of two different maps, from the matrix of all."""
    return distances.sum() / max(1, len(distances) * (len(distances) - 1))


recipe = Recipe(
    paper="pulaski",
    title="Statistical distances for probabilistic segmentation",
    claim="A statistical distance between samples and annotations lowers the generalised energy distance of a "
    "probabilistic U-Net to the raters, also against cross-entropy with Dice, which copes with small structures.",
    arms={
        "cross-entropy": Arm(ProbabilisticUNet(raters=RATERS)),
        "cross-entropy and Dice": Arm(ProbabilisticUNet(raters=RATERS, loss="both")),
        "pulaski": Arm(Pulaski()),
        "sinkhorn": Arm(Pulaski(distance="sinkhorn")),
        "single rater": Arm(Pulaski(alone=True)),
    },
    compare=("pulaski", "cross-entropy and Dice"),
    ablation=("pulaski", "single rater"),
    replicate="fold",
    metric="energy_distance",
    score=score,
    scales={
        "quick": Scale(RaterTask("embedded"), Budget(steps=20, batch=4, checks=1), replicates=1),
        "full": Scale(
            RaterTask("bubil", folds=5),
            Budget(steps=300, batch=4, checks=3),
            arms=("cross-entropy and Dice", "pulaski", "single rater"),
        ),
    },
    source="loss and settings: github.com/soumickmj/PULASki, pipeline.py",
    components=(
        Component(
            "statistical distance",
            "implemented",
            "energy distance (the official code's default, called Hausdorff there) between as many samples as "
            f"annotations; {RATERS} of the annotations are drawn at every step, where the official code takes all",
        ),
        Component(
            "Sinkhorn divergence", "implemented", "a second arm; eps is 5% of the largest cost in an image (our choice)"
        ),
        Component(
            "conditional variational autoencoder",
            "simplified",
            "a probabilistic U-Net with 6 latents and small prior and posterior nets that look at half the resolution; "
            "samples are drawn from the posterior of one random annotation, as in the official code",
        ),
        Component(
            "Frechet inception distance", "absent", "needs an Inception network; the paper's other distances do without"
        ),
        Component("3D patches", "absent", "our images with several annotations are two-dimensional"),
    ),
)
