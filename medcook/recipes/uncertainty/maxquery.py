"""MaxQuery (Yuan, Xia, Dong and others, "Devil is in the Queries", CVPR 2023).

A mask transformer sorts pixels by object queries. In training the queries become the centres of what is known, so at
test a pixel that resembles none of them is out of distribution (OOD). With pixel embeddings P (D, pixels), N queries
Q (N, D) and a class score for each query, K (N, classes):

    R = Q P / sqrt(D)            responses (N, pixels)
    A = softmax of R over N      soft assignment of every pixel to the queries
    Z = K^T A                    logits (classes, pixels), trained with an ordinary segmentation loss
    strangeness = -max over N of R

Queries drift to the background, which has most pixels. So the query-distribution loss gives each class queries of its
own, G(c), and asks that the pixels of a class be assigned to these: mean over c of -log sum_{n in G(c)} mean_{c} A_n.

What is unknown here is real: one structure of the heart, the right ventricle, is unlabelled in training, so that no
loss ever says what it is; at test its pixels are what must be found. It is in the images all the same, as a structure
that nobody annotated is, and the network may learn of it as surroundings of what is labelled.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import IGNORE, Case
from medcook.losses import find_loss
from medcook.measures.detection import auroc, average_precision, fpr_at_95
from medcook.methods import Batch, Method, Moment
from medcook.metrics import dice
from medcook.networks import UNet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples, Task

CHANNELS = (8, 16, 32, 64, 64)


class MaskTransformer(UNet):
    """A U-Net whose last features are pixel embeddings, and queries that read its coarser maps.

    queries  how many; `width` the dimension D that pixels and queries share
    layers   decoder layers (attention among queries, attention to a map, perceptron); the first reads the coarsest
             map of the way up, every further one the next finer
    """

    def __init__(self, *, classes: int, queries: int, width: int, layers: int, **unet):
        super().__init__(classes=width, **unet)
        channels = unet["channels"][::-1]
        layer = dict(d_model=width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.start = nn.Parameter(torch.randn(queries, width))
        self.read = nn.ModuleList(nn.Linear(channels[k], width) for k in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def maps(self, image: Tensor) -> list[Tensor]:
        """The feature maps of the way up, the coarsest first."""
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        found = [skips.pop()]
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            wider = nn.functional.interpolate(found[-1], size=skip.shape[2:], mode=self.mode, align_corners=False)
            found.append(block(torch.cat([skip, wider], dim=1)))
        return found

    def respond(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Responses (B, N, *size) of all queries to all pixels, and the class scores (B, N, classes) of the queries."""
        maps = self.maps(image)
        queries = self.start.expand(len(image), -1, -1)
        for layer, read, seen in zip(self.decoder, self.read, maps, strict=False):
            queries = layer(queries, read(seen.flatten(2).transpose(1, 2)))
        queries = self.norm(queries)
        return responses(queries, self.head(maps[-1])), self.classify(queries)

    def forward(self, image: Tensor) -> Tensor:
        return combine(*self.respond(image))


def responses(queries: Tensor, pixels: Tensor) -> Tensor:
    """R (B, N, *size): scaled products of queries (B, N, D) and pixel embeddings (B, D, *size)."""
    return torch.einsum("bnd,bd...->bn...", queries, pixels) / math.sqrt(queries.shape[-1])


def combine(response: Tensor, scores: Tensor) -> Tensor:
    """Z (B, classes, *size): the class scores (B, N, classes) of the queries that a pixel is assigned to."""
    return torch.einsum("bnc,bn...->bc...", scores, response.softmax(1))


def owners(queries: int, classes: int) -> Tensor:
    """(N,) the class that each query belongs to: half of them the background, the rest the structures in turn."""
    background = queries // 2
    return torch.tensor([0] * background + sorted(1 + k % (classes - 1) for k in range(queries - background)))


def distribution_loss(response: Tensor, labels: Tensor, owner: Tensor) -> Tensor:
    """-log of the share of a class's pixels that is assigned to the class's queries, mean over the classes present.

    response (B, N, *size), labels (B, *size) with `IGNORE`, owner (N,). Every class weighs the same, however small.
    """
    assigned = response.softmax(1).movedim(1, -1)
    losses = [response.new_zeros(())]
    for value in labels.unique():
        if value != IGNORE:
            share = assigned[labels == value].mean(0)
            losses.append(-share[owner.to(share.device) == value].sum().clamp_min(1e-6).log())
    return sum(losses) / max(1, len(losses) - 1)


def strangeness(response: Tensor) -> Tensor:
    """MaxQuery: minus the largest response (B, N, *size) at a pixel."""
    return -response.amax(1)


def doubt(logits: Tensor) -> Tensor:
    """One minus the largest softmax probability (Hendrycks and Gimpel, ICLR 2017)."""
    return 1 - logits.softmax(1).amax(1)


@dataclass
class Doubting(Method):
    """The U-Net, and how strange it finds a pixel.

    by  `softmax`: one minus the largest probability; `logit`: minus the largest logit (Hendrycks et al., ICML 2022)
    """

    channels: tuple[int, ...] = CHANNELS
    by: str = "softmax"

    def strange(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, *size): higher where a pixel looks less like anything that training explained."""
        logits = nets["average"](images).float()
        return doubt(logits) if self.by == "softmax" else -logits.amax(1)


@dataclass
class MaxQuery(Doubting):
    """The mask transformer; by `query` a pixel is as strange as its best query finds it.

    queries, width, layers   see `MaskTransformer`
    distribution             weight of the query-distribution loss; 0 takes it away
    """

    by: str = "query"
    queries: int = 16
    width: int = 32
    layers: int = 2
    distribution: float = 1.0

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        unet = dict(inputs=inputs, channels=self.channels, dims=dims)
        model = MaskTransformer(classes=classes, queries=self.queries, width=self.width, layers=self.layers, **unet)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        response, scores = (each.float() for each in nets["model"].respond(labelled.images))
        loss = find_loss(self.loss)(combine(response, scores), labelled.labels)
        if self.distribution:
            owner = owners(self.queries, scores.shape[-1])
            loss = loss + self.distribution * distribution_loss(response, labelled.labels, owner)
        return loss

    def strange(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        if self.by != "query":
            return super().strange(nets, images)
        return strangeness(nets["average"].respond(images)[0].float())


@dataclass(frozen=True)
class UnknownStructureTask(Task):
    """One structure of the data set is unlabelled in training; the labels of the others close ranks.

    unknown  its label value
    """

    unknown: int = 1

    @property
    def known(self) -> list[int]:
        """The label values that training knows, background first; their places are the network's classes."""
        return [value for value in sorted(self.data.manifest.classes) if value != self.unknown]

    @property
    def classes(self) -> int:
        return len(self.known)

    @property
    def structures(self) -> dict[int, str]:
        return {place: self.data.manifest.classes[value] for place, value in enumerate(self.known) if place}

    def relabel(self, labels: Tensor) -> Tensor:
        """Label values to classes of the network, anything else (and the unknown structure) to `IGNORE`."""
        table = torch.full((256,), IGNORE, dtype=torch.uint8)
        table[self.known] = torch.arange(self.classes, dtype=torch.uint8)
        return table[labels.long()]

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        return Samples(found.images, self.relabel(found.labels), found.case_of)


@torch.no_grad()
def localisation(fitted, case: Case) -> list[dict]:
    """How well strangeness finds the unknown structure among all pixels of a case, on the network's grid.

    auroc, average_precision, fpr95   of the arm's own strangeness; auroc_softmax of its softmax doubt
    dice                              of the known structures, pixels of the unknown one left out
    """
    task, method, nets = fitted.task, fitted.method, fitted.nets
    truth = task.preparation.labels(case)
    there = (truth == task.unknown).numpy()
    if not there.any():
        return []
    nets.load_state_dict(fitted.weights["last"])
    nets.eval()
    parts = task.preparation.images(case).split(16)
    scores = torch.cat([method.strange(nets, part) for part in parts]).numpy()
    probabilities = torch.cat([method.predict(nets, part) for part in parts])
    values = {
        "auroc": auroc(scores, there),
        "average_precision": average_precision(scores, there),
        "fpr95": fpr_at_95(scores, there),
        "auroc_softmax": auroc(1 - probabilities.amax(1).numpy(), there),
        "dice": inlier_dice(probabilities.argmax(1), task.relabel(truth), task.classes),
    }
    return [evaluation.row(case, task.data.manifest.classes[task.unknown], **values)]


def inlier_dice(guess: Tensor, truth: Tensor, classes: int) -> float:
    """Mean Dice of the known structures where something known is labelled."""
    guess, truth = guess[truth != IGNORE].numpy(), truth[truth != IGNORE].numpy()
    return float(np.mean([dice(guess == value, truth == value) for value in range(1, classes)]))


recipe = Recipe(
    paper="maxquery",
    title="Queries as centres of what is known",
    claim="The largest query response finds the pixels of a heart structure that training never labelled better than "
    "the U-Net's largest logit does.",
    arms={
        "softmax": Arm(Doubting()),
        "max logit": Arm(Doubting(by="logit")),
        "maxquery": Arm(MaxQuery()),
        "without distribution": Arm(MaxQuery(distribution=0.0)),
    },
    compare=("maxquery", "max logit"),
    ablation=("maxquery", "without distribution"),
    scales={
        "quick": Scale(
            UnknownStructureTask("embedded", labelled=3, unknown=3), Budget(steps=30, batch=8, checks=1), replicates=1
        ),
        "full": Scale(
            UnknownStructureTask("acdc", labelled=14, evaluation="test"),
            Budget(steps=250, batch=8, checks=3),
            arms=("max logit", "maxquery", "without distribution"),
        ),
    },
    metric="auroc",
    score=localisation,
    components=(
        Component(
            "queries as cluster centres",
            "implemented",
            "assignment by a softmax over queries, classes by a learned score of each query, trained by a segmentation "
            "loss alone, so no matching of queries to objects is needed",
        ),
        Component("MaxQuery", "implemented", "minus the largest raw response; a monotone rescaling changes no rank"),
        Component(
            "query-distribution loss",
            "implemented",
            "no code was found; our reading: half of the queries are the background's, the others are shared out "
            "among the structures, and the mean assignment over a class's pixels must lie on its own queries",
        ),
        Component(
            "transformer decoder",
            "simplified",
            "two layers of plain cross-attention to two coarse maps of a small U-Net, no positions, no loss on the "
            "layers between; the paper: nnU-Net in 3D with a decoder in the way of k-means mask transformers",
        ),
        Component(
            "unseen lesions",
            "simplified",
            "a structure that training does not label stands for the rare lesions that the paper's training lacks",
        ),
    ),
)
