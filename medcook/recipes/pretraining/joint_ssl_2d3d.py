"""Joint self-supervision of images and volumes (Nguyen, Nguyen, Truong, Cao, Nguyen, Ho, Swoboda, Albarqouni, Xie and
Sonntag, AAAI 2023; arXiv 2212.01893).

Idea: a network for slices is prepared by clustering slices: two views of one must be of the same cluster. A transformer
reads a volume's slices in a row and says what the whole is, and volumes are clustered in the same way. So the slices'
encoder learns what matters in 3D. The transformer also says what slices that it is not shown are like.

    z, Z         embedding of a slice, and of a volume: the mean over slices of what the transformer makes of all z
    q            clusters of a batch by Sinkhorn: each sample is of 1 in all, each prototype has as many samples
    swap         -mean of q_s . log softmax(C z_t / heat) over both views s, t the other one, C the prototypes
    loss         first swap over slices, then squared error of hidden slices' z, then swap over slices + over volumes
    attention    slice i asks N / 4 places p_k = r_k + reach tanh(offset_k), between slices; offsets follow from the
                 queries around r_k, and a learnt bias from the distance of i and p_k
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.pretraining import OptionalPretext
from medcook.recipes.pretraining._settings import BRAIN_VOLUMES, HIPPOCAMPI, scales
from medcook.recipes.pretraining._stages import Staged
from medcook.recipes.pretraining._volumes import PretrainedOnVolumes
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._slices import SliceUNet
from medcook.tasks import Budget

HEAT, SHARPNESS, ROUNDS = 0.1, 0.05, 3
"""Temperature of the prediction, entropy's weight in Sinkhorn and how often it normalises, as in the official code."""

HIDDEN = 0.1
"""The share of a volume's slices that are hidden, as in the official code."""

STEP, REACH = 4, 2
"""Slices for each place that attention looks at, and how far it moves, in these; as in the official code."""

WIDTH, HEADS, LAYERS, CELLS = 64, 4, 2, 4


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    """q (N, K) of scores (N, K): its rows sum to 1, its columns nearly to N / K."""
    q = ((scores - scores.max()) / SHARPNESS).exp()
    for _ in range(ROUNDS):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def swapped(first: Tensor, second: Tensor, prototypes: Tensor) -> Tensor:
    """swap of two views' vectors (N, D) by prototypes (K, D), all of them normalised here."""
    prototypes = F.normalize(prototypes, dim=1)
    scores = [F.normalize(view, dim=1) @ prototypes.T for view in (first, second)]
    found = [-(sinkhorn(one) * F.log_softmax(other / HEAT, dim=1)).sum(1) for one, other in (scores, scores[::-1])]
    return torch.cat(found).mean()


def at(slices: Tensor, places: Tensor) -> Tensor:
    """Slices (B, N, C) at fractional places (B, n), between the two next to each; beyond the ends the last one."""
    last = slices.shape[1] - 1
    places = places.clamp(0, last)
    low = places.floor()
    beside = [near.long()[..., None].expand(-1, -1, slices.shape[2]) for near in (low, (low + 1).clamp(max=last))]
    before, after = (slices.gather(1, index) for index in beside)
    return torch.lerp(before, after, (places - low)[..., None])


class DeformableAttention(nn.Module):
    """Self-attention along slices (B, N, WIDTH), to places that move: see the equations above."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.answer = nn.Linear(WIDTH, WIDTH)
        around = nn.Conv1d(WIDTH, WIDTH, STEP + 2, stride=STEP, padding=1, groups=WIDTH)
        self.offset = nn.Sequential(around, nn.GELU(), nn.Conv1d(WIDTH, 1, 1, bias=False), nn.Tanh())
        self.bias = nn.Sequential(nn.Linear(1, 16), nn.ReLU(inplace=True), nn.Linear(16, HEADS, bias=False))

    def places(self, queries: Tensor) -> Tensor:
        """p (B, n) of queries (B, N, WIDTH), in slices."""
        moves = self.offset(queries.transpose(1, 2))[:, 0]
        apart = queries.shape[1] / moves.shape[1]
        rest = (torch.arange(moves.shape[1], device=moves.device) + 0.5) * apart - 0.5
        return rest + REACH * apart * moves

    def forward(self, slices: Tensor) -> Tensor:
        queries = self.query(slices)
        places = self.places(queries)
        distance = torch.arange(slices.shape[1], device=places.device)[:, None] - places[:, None]
        bias = self.bias((distance.sign() * distance.abs().log1p())[..., None]).movedim(3, 1)
        there = at(slices, places)
        parts = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (queries, self.key(there), self.value(there))
        )
        return self.answer(F.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer of the transformer: (B, N, WIDTH) to the same; normalised after each part."""

    def __init__(self):
        super().__init__()
        self.attention, self.after = DeformableAttention(), nn.LayerNorm(WIDTH)
        self.each = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, slices: Tensor) -> Tensor:
        slices = self.after(slices + self.attention(slices))
        return self.last(slices + self.each(slices))


def slice_features(net: SliceUNet, volumes: Tensor) -> Tensor:
    """(B, N, numbers) float32 of volumes (B, C, N, H, W): the mean of each level's map, of the last one of its cells.

    Each level's part is of unit length.
    """
    x, found = net.down[0](volumes), []
    for block in net.down[1:]:
        found.append(x.float().mean((3, 4)).transpose(1, 2))
        x = block(net.pool(x, 2))
    cells = F.adaptive_avg_pool3d(x.float(), (x.shape[2], CELLS, CELLS))
    found.append(cells.transpose(1, 2).flatten(2))
    return torch.cat([F.normalize(part, dim=2) for part in found], dim=2)


class SliceClusters(nn.Module):
    """What embeds slices, from features of an encoder of so many channels, and clusters them.

    Batch normalisation sets slices apart from the start: of slices that all look alike, Sinkhorn finds no clusters.
    """

    def __init__(self, channels: tuple[int, ...], clusters: int):
        super().__init__()
        self.linear = nn.Linear(sum(channels[:-1]) + CELLS**2 * channels[-1], WIDTH, bias=False)
        self.apart = nn.BatchNorm1d(WIDTH)
        first, last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.project = nn.Sequential(first, nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), last)
        self.prototypes = nn.Parameter(torch.randn(clusters, WIDTH))

    def embed(self, features: Tensor) -> Tensor:
        """z (B, N, WIDTH) of features (B, N, numbers)."""
        return self.apart(self.linear(features).flatten(0, 1)).unflatten(0, features.shape[:2])

    def loss(self, slices: Tensor) -> Tensor:
        """swap of embedded slices (2 B, N, WIDTH), first all in one view: every slice of every volume is a sample."""
        return swapped(*self.project(slices.flatten(0, 1)).chunk(2), self.prototypes)


class VolumeClusters(nn.Module):
    """What clusters volumes: the transformer, and what it learns from."""

    def __init__(self, clusters: int):
        super().__init__()
        self.transformer = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.apart = nn.BatchNorm1d(WIDTH)
        self.prototypes = nn.Parameter(torch.randn(clusters, WIDTH))
        self.token, self.guess = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def loss(self, slices: Tensor) -> Tensor:
        """swap of the volumes that embedded slices (2 B, N, WIDTH) make up, first all in one view."""
        return swapped(*self.apart(self.transformer(slices).mean(1)).chunk(2), self.prototypes)

    def hidden_error(self, slices: Tensor, where: Tensor) -> Tensor:
        """Mean squared error of slices (B, N, WIDTH) `where` (B, N) these are hidden."""
        shown = torch.where(where[..., None], self.token, slices)
        return F.mse_loss(self.guess(self.transformer(shown))[where], slices[where])


def hidden(batch: int, slices: int) -> Tensor:
    """(batch, slices) bool: as many of each volume, at random."""
    chosen = torch.rand(batch, slices).topk(math.ceil(HIDDEN * slices), dim=1).indices
    return torch.zeros(batch, slices, dtype=torch.bool).scatter_(1, chosen, True)


@dataclass
class JointClustering(OptionalPretext, Staged, PretrainedOnVolumes):
    """A 2D U-Net on the slices of volumes, whose encoder learns from clustering slices and volumes.

    shares    of the pretext: slices alone; what hidden slices are like, with the encoder as it is; slices and volumes
    clusters  prototypes of slices and of volumes
    """

    share: float = 0.375
    shares: tuple[float, float, float] = (1 / 2, 1 / 6, 1 / 3)
    clusters: tuple[int, int] = (32, 8)

    def stages(self) -> tuple[float, ...]:
        return self.shares

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return SliceUNet(inputs=inputs, classes=classes, channels=self.channels)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        parts = {"slices": SliceClusters(self.channels, self.clusters[0])}
        if self.shares[2]:
            parts["volumes"] = VolumeClusters(self.clusters[1])
        return nn.ModuleDict(parts)

    def in_plane(self, volumes: Tensor) -> Tensor:
        """A view of volumes (B, C, N, H, W) in which every slice is where it was."""
        return self.view(volumes.flatten(1, 2)).view_as(volumes)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        parts, number = nets["pretext"], self.stage(now)[0]
        views = torch.cat([self.in_plane(images.images) for _ in range(2)])
        with torch.set_grad_enabled(number != 1):
            features = slice_features(nets["model"], views)
        with torch.autocast(features.device.type, enabled=False):
            slices = parts["slices"].embed(features)
            if number == 1:
                return parts["volumes"].hidden_error(slices.detach(), hidden(*slices.shape[:2]).to(slices.device))
            loss = parts["slices"].loss(slices)
            return loss + parts["volumes"].loss(slices) if number == 2 else loss


BUDGET = Budget(steps=320, batch=4, checks=2)
"""A third more than for the chapter's 3D networks, as steps cost a third less: with 120 on labels it has not learnt."""

ARMS = {
    "scratch": Arm(JointClustering(waits=True)),
    "scratch, all steps": Arm(JointClustering(waits=True, share=0.0)),
    "joint": Arm(JointClustering()),
    "slices alone": Arm(JointClustering(shares=(1.0, 0.0, 0.0))),
    "nothing hidden": Arm(JointClustering(shares=(2 / 3, 0.0, 1 / 3))),
}

recipe = Recipe(
    paper="joint-ssl-2d3d",
    title="Slices clustered, and volumes by what a transformer makes of their slices",
    claim="Before a slice network trains on volumes of three labelled patients, clustering slices and volumes without "
    "labels raises Dice above that of as many steps on the labels from random weights.",
    arms=ARMS,
    compare=("joint", "scratch"),
    ablation=("joint", "slices alone"),
    replicate="draw",
    scales=scales(
        replace(BRAIN_VOLUMES, pool=("embedded", "embedded, negative")),
        replace(HIPPOCAMPI, pool=("hippocampus", "openkbp")),
        *list(ARMS)[:4],
        budget=BUDGET,
    ),
    source="official code, github.com/duyhominhnguyen/Self-supervised-Image-Volume-Intra-Inter-Contrastive (3D with "
    "SwAV), and lucidrains/deformable-attention, which it imports; attention: Xia et al., CVPR 2022; abstract",
    components=(
        Component(
            "contrastive clustering of 2D slices",
            "implemented",
            "SwAV: two views, 32 prototypes, Sinkhorn over the 128 slices of a step. A slice is embedded by the means "
            "of each level of the encoder, as in the official code, but the last level is kept as 4 x 4 cells, and "
            "batch normalisation sets slices apart. Without both, with stronger views or with all losses at once, the "
            "loss on unlabelled images stayed at that of chance; no score was looked at. Two views, no smaller crops; "
            "prototypes learn from the first step. Validation patients of one draw were looked at once, after 120 "
            "steps on labels: Dice 0.25, from scratch 0.66. Losses were still 1.4 and 1.3, so that all arms got 200",
        ),
        Component(
            "deformable self-attention over slices",
            "implemented",
            "offsets, a place for every four slices, reach and position bias as in the official code; two layers of "
            "four heads for four of eight, one group of offsets, no dropout, and keys are read off what enters the "
            "layer. It runs along the slices, as the text has it; the code gives the module slices as channels",
        ),
        Component(
            "clustering agreement of 3D volumes",
            "implemented",
            "the mean over slices, 8 prototypes, Sinkhorn over the four volumes of a step without a queue, as in the "
            "official code, which has 3000. Slices are clustered, too; the code's last stage has the loss of volumes "
            "alone. In a trial on unlabelled images this was still near chance at the end, 1.95 against log 8 = 2.08",
        ),
        Component(
            "masked embedding prediction",
            "implemented",
            "a tenth of the slices, the encoder as it is, a stage of its own before that of volumes, as in the "
            "official code. The error counts at hidden slices; there at all",
        ),
        Component(
            "several sources, 2D and 3D",
            "simplified",
            "slices of volumes are the 2D images; there are no 2D data sets beside them. Volumes are hippocampi of "
            "the patients without labels and blocks of head-and-neck CTs, in place of brain, lung, liver and heart",
        ),
        Component(
            "weights for 2D and for 3D tasks",
            "simplified",
            "the 2D encoder goes into a U-Net for slices, as in the code for hearts; the transformer is not used "
            "after the pretext, and no 2D task is tried",
        ),
        Component("Deep-ClusterV2", "absent", "SwAV alone; both are extended in the same way there"),
        Component("four tasks, other self-supervision", "absent", "hippocampi; other pretexts are recipes, too"),
    ),
)
