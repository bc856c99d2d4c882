"""Learning tubule-sensitive CNNs for pulmonary airway and artery-vein segmentation in CT (Qin, Zheng, Gu, Huang, Yang,
Wang, Yao, Zhu and Yang, IEEE Transactions on Medical Imaging 2021; arXiv 2012.05767).

Thin branches are few pixels among many: what says something of them is weak. Three things are to help a U-Net. After
every block its features U are recalibrated: with learnt weights r of rows and s of columns,

    z[h, w] = sum_h' r[h'] U[h', w] + sum_w' s[w'] U[h, w'],    U' = U * sigmoid(K2 relu(K1 z)),

so that where something lies is not averaged away before channels are weighed. On the way up, each layer is to attend
where the next, finer one does: with F(A) = softmax over places of the upsampled sum over channels of A^2,

    loss = segmentation + weight * sum over layers m of |F(A_m) - F(A_(m+1))|^2,    F(A_(m+1)) held fixed.

And the network is told of anatomy: a lung context map and a distance transform map (`_lung_trees.context`).

What was looked at, four times, on patients of train and val after 60 to 120 steps with a seed that is not scored:
losses fell, veins were not found yet. The weight of distillation was set to 0.01 there, since the paper's 0.1, in these
units, gave gradients 10 to 50 times as long as the segmentation's. How many steps there are was not looked at: in 300,
runs of every arm miss a whole structure.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.data.transforms import Augment, warp
from medcook.losses import find_loss
from medcook.measures.trees import branches_detected, tree_length_detected
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.anatomy import _trees
from medcook.recipes.anatomy._lung_trees import LungTreeTask
from medcook.recipes.architectures._settings import DeeplySupervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

TREES = LungTreeTask("chest_xray", evaluation="test")
TREES_QUICK = LungTreeTask("embedded", side=64)
SIDE = 128
"""Rows and columns of images for which weights along axes are made; of others they are resampled."""
GREY = 1
"""Channels of the image itself; those after it are `context`."""

MOST = 3.0
"""Standard score up to which more energy is more attention."""


class Recalibration(nn.Module):
    """Maps (B, channels, H, W) to the same, by the formula above; weights begin as those of a mean."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.full((side,), 1 / side)) for _ in range(2))
        inner = max(1, channels // 2)
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        of_columns = torch.einsum("bchw,h->bcw", x, resampled(self.rows, x.shape[2]))
        of_rows = torch.einsum("bchw,w->bch", x, resampled(self.columns, x.shape[3]))
        return x * self.weigh(of_rows[..., :, None] + of_columns[..., None, :])


def resampled(weights: Tensor, count: int) -> Tensor:
    """Weights (side,) along an axis of `count` pixels, with the same sum if they are all alike."""
    if len(weights) == count:
        return weights
    found = F.interpolate(weights[None, None], count, mode="linear", align_corners=False)[0, 0]
    return found * (len(weights) / count)


class TubuleNet(UNet):
    """The book's U-Net with several heads, (B, inputs, H, W) to logits (B, classes, H, W), and what the paper adds.

    recalibrate  features after each block
    prior        channels after the first `GREY` are looked at
    """

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], recalibrate: bool, prior: bool):
        self.seen = inputs if prior else GREY
        super().__init__(inputs=self.seen, classes=classes, channels=channels)
        sides = [SIDE >> level for level in range(len(channels))]
        make = lambda counts: nn.ModuleList(  # noqa: E731
            Recalibration(count, side) if recalibrate else nn.Identity()
            for count, side in zip(counts, sides, strict=False)
        )
        self.after_down, self.after_up = make(channels), make(channels[:-1])
        self.sides = nn.ModuleList(nn.Conv2d(count, classes, 1) for count in channels[1:-1])

    def descend(self, image: Tensor) -> list[Tensor]:
        maps = []
        for block, after in zip(self.down, self.after_down, strict=True):
            maps.append(after(block(self.pool(maps[-1], 2) if maps else image[:, : self.seen])))
        return maps

    def climb(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of every level on the way up, and their energy (B, 1, h, w), both with the finest first."""
        found, energies = [maps[-1]], []
        for block, after, skip in zip(reversed(self.up), reversed(self.after_up), reversed(maps[:-1]), strict=True):
            x = F.interpolate(found[-1], size=skip.shape[2:], mode=self.mode, align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
            energies.append(x.float().square().sum(1, keepdim=True))
            found.append(after(x))
        return found[::-1], energies[::-1]

    def everything(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of all heads at the size of the image, that which predicts first, and energies, finest first."""
        maps, energies = self.climb(self.descend(image))
        heads = zip((self.head, *self.sides), maps, strict=False)
        logits = [F.interpolate(head(x), size=image.shape[2:], mode="bilinear") for head, x in heads]
        return logits, energies

    def forward(self, image: Tensor) -> Tensor:
        return self.everything(image)[0][0]


def attention(energy: Tensor, size) -> Tensor:
    """F above, (B, N) of energies (B, 1, h, w) at a size: how much of a layer's attention each place has.

    Of standard scores up to `MOST`: of energies themselves the softmax would be all at one pixel.
    """
    larger = F.interpolate(energy, size=tuple(size), mode="bilinear", align_corners=False).flatten(1)
    scores = (larger - larger.mean(1, keepdim=True)) / larger.std(1, keepdim=True).clamp_min(1e-6)
    return scores.clamp(max=MOST).softmax(1)


def distillation(energies: list[Tensor]) -> Tensor:
    """How much each layer attends otherwise than the next finer one, in shares of the latter's |F|^2, over all pairs.

    energies  (B, 1, h, w), the finest first
    """
    loss = energies[0].new_zeros(())
    for fine, coarse in zip(energies, energies[1:], strict=False):
        with torch.no_grad():
            wanted = attention(fine, fine.shape[2:])
        given = attention(coarse, fine.shape[2:])
        loss = loss + ((given - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    return loss


@dataclass
class TubuleSensitive(DeeplySupervised):
    """A deeply supervised U-Net, and the paper's three additions.

    recalibrate, prior  see `TubuleNet`;   distil  weight of `distillation`
    """

    recalibrate: bool = True
    distil: float = 0.01
    prior: bool = True
    augmentation: Augment = field(default_factory=Augment)

    trial = TREES_QUICK

    def model(self, inputs: int, classes: int) -> TubuleNet:
        settings = {"recalibrate": self.recalibrate, "prior": self.prior}
        return TubuleNet(inputs=inputs, classes=classes, channels=self.channels, **settings)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """All channels move; only the image changes its intensities."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        grey = self.augmentation.intensity(images[:, :GREY], rng)
        return batch._replace(images=torch.cat([grey, images[:, GREY:]], 1), labels=labels)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean of the losses of all heads, and the distillation."""
        outputs, energies = nets["model"].everything(labelled.images)
        loss = sum(find_loss(self.loss)(logits.float(), labelled.labels) for logits in outputs) / len(outputs)
        return loss + self.distil * distillation(energies) if self.distil else loss


def leakage(mask: np.ndarray, truth: np.ndarray) -> float:
    """The share of a mask's centre line that is more than a pixel from the true mask, both (H, W) bool; NaN without a
    centre line."""
    line, near = skeletonize(mask), ndimage.binary_dilation(truth, np.ones((3, 3)))
    return float(1 - near[line].mean()) if line.any() else float("nan")


def tree_rows(fitted, case: Case) -> list[dict]:
    """A row for each structure of a case, means over its images that have it.

    branches, length  of the true tree that are found (as ATM'22, but all parts of the mask count: there are two lungs)
    dice, precision   of pixels;   leakage  see above
    peripheral        length found of the thinnest branches alone, those from generation 2 on
    """
    answers = fitted.answer(fitted.task.preparation.images(case)).argmax(1).numpy()
    found: dict[int, list[dict]] = {}
    for planted, answer in zip(fitted.task.preparation.planted(case), answers, strict=True):
        for value, name in fitted.task.structures.items():
            if (planted.label == value).any():
                found.setdefault(value, []).append(
                    measured(answer == value, planted.label == value, planted.trees[name])
                )
    return [
        evaluation.row(case, fitted.task.structures[value], **{name: mean_of(each, name) for name in each[0]})
        for value, each in found.items()
    ]


def mean_of(rows: list[dict], name: str) -> float:
    """The mean of a measure over rows where it is known; NaN where it is in none."""
    known = [row[name] for row in rows if not np.isnan(row[name])]
    return float(np.mean(known)) if known else float("nan")


def measured(mask: np.ndarray, truth: np.ndarray, tree: _trees.Tree) -> dict[str, float]:
    """What `tree_rows` tells of one mask (H, W), of the true one, and of the tree that was drawn."""
    line = _trees.lines(tree, truth.shape) * truth
    outer = np.isin(line, [k for k, branch in enumerate(tree, 1) if branch.generation >= 2])
    return {
        "branches": branches_detected(line, mask),
        "length": tree_length_detected(line > 0, mask),
        "peripheral": tree_length_detected(outer, mask),
        "dice": metrics.dice(mask, truth),
        "precision": float((mask & truth).sum() / mask.sum()) if mask.any() else float("nan"),
        "leakage": leakage(mask, truth),
    }


METHOD = TubuleSensitive()

recipe = Recipe(
    paper="tubule-sensitive",
    title="Tubule-sensitive networks: recalibration, distillation, and what is known of anatomy",
    claim="With features recalibrated along the axes, attention distilled from finer layers and maps of anatomy, a "
    "deeply supervised U-Net finds more branches of airways, arteries and veins than without.",
    arms={
        "unet": Arm(TubuleSensitive(recalibrate=False, distil=0.0, prior=False)),
        "tubule-sensitive": Arm(METHOD),
        "without recalibration": Arm(replace(METHOD, recalibrate=False)),
        "without distillation": Arm(replace(METHOD, distil=0.0)),
        "without prior": Arm(replace(METHOD, prior=False)),
    },
    compare=("tubule-sensitive", "unet"),
    ablation=("tubule-sensitive", "without recalibration"),
    metric="branches",
    score=tree_rows,
    scales={
        "quick": Scale(TREES_QUICK, Budget(steps=20, batch=4, precision="float32", checks=0), replicates=1),
        "full": Scale(
            TREES,
            Budget(steps=300, batch=6, checks=0),
            arms=("unet", "tubule-sensitive", "without recalibration", "without distillation"),
        ),
    },
    source="abstract, arXiv 2012.05767; modules as in the authors' code of the airway network (feature recalibration, "
    "attention mapping, deep supervision)",
    components=(
        Component(
            "feature recalibration",
            "implemented",
            "after every block, before pooling, as in the code, in two axes where there are three; reduction by 2. "
            "Weights are for 128 rows and columns and resampled for other maps; they begin as those of a mean",
        ),
        Component(
            "attention distillation",
            "implemented",
            "on the way up, three pairs of layers, of features before recalibration, as in the code; sum of squares, "
            "the finer map held fixed. The softmax is of energies' standard scores, up to 3, else all attention is at "
            "one pixel; and the distance is in shares of the finer map's square, hence the weight of 0.01, there 0.1",
        ),
        Component(
            "anatomy prior",
            "simplified",
            "lungs, what lies between them, and the distance to their border, from masks drawn by people; what exactly "
            "the paper's two maps hold was not at hand. There for arteries and veins only. `without prior` is an arm "
            "that `full` does not run",
        ),
        Component("deep supervision", "implemented", "four heads, in every arm, as in the code"),
        Component(
            "airway, artery and vein",
            "simplified",
            "one network for all three, of which arteries and veins look alike; there one for airways, one for both "
            "vessels. Trees are drawn into real X-rays, in a plane, and cross",
        ),
        Component(
            "branches and tree length detected",
            "implemented",
            "of the centre line that was drawn, at 80% of a branch; dice, precision and leakage beside",
        ),
        Component("non-contrast CT", "absent", "not at hand with trees; hence drawn ones"),
    ),
)
