"""Reliable tuberculosis detection using chest X-ray with deep learning, segmentation and visualization.

Rahman, Khandakar, Kadir, Islam, Islam, Mazhar, Hamid, Islam, Mahbub, Ayari and Chowdhury, IEEE Access 2020. A network
that sees a whole X-ray may learn from what is not lung. So a U-Net segments the lungs first, and a network that knows
photographs learns to tell tuberculosis from these alone; where it looks is checked with its class activation.

  lungs       m = [U-Net(x) finds lung], a network trained on lungs that people drew, which are not needed any more then
  seen        (x - mean of x over m) / standard deviation of x over m   inside of m, and 0 elsewhere
  activation  A(p) = sum over k of (w_k of tuberculosis - w_k of none) f_k(p),   f_k the last feature maps

The network ends in the mean over the maps and a linear layer w, so the mean of A is what decides. Measured is the share
of its positive part that lies in the lungs, as people drew them. Looked at once, on validation patients with a seed
that is not scored: AUC 0.90 of segmented lungs, 0.89 of whole X-rays and 0.73 without lungs; Dice of the lungs 0.94.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import metrics
from medcook.cohorts import outcome_rows
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.networks import build_network
from medcook.precision import autocast
from medcook.pretraining import Pretrained
from medcook.recipes.fairness.mask_of_truth import MaskedClassifier, apart, hide
from medcook.recipes.findings._settings import AUGMENT, BRAINS, XRAYS, scales
from medcook.recipes.language._reading import Reader, Start
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

BUDGET = Budget(steps=360, batch=12, checks=0)
"""A third of the steps train the U-Net; 240 are left for the classifier."""

Sees = Literal["whole", "lungs", "elsewhere"]


class LungsFirst(nn.Module):
    """A U-Net that segments lungs, at half the resolution, and a classifier with its own weights."""

    def __init__(self, reader: Reader, network: str, channels: tuple[int, ...]):
        super().__init__()
        self.reader = reader
        self.unet = build_network(network, inputs=1, classes=2, channels=channels, dims=2)

    def lungs(self, images: Tensor) -> Tensor:
        """Logits (B, 2, H, W), no lung and lung, of images (B, 1, H, W)."""
        found = self.unet(F.avg_pool2d(images, 2)).float()
        return F.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)


def elsewhere(masks: Tensor) -> Tensor:
    """Masks (B, 1, H, W) bool, each moved to where it covers the least of itself; borders wrap around.

    Shape and area stay. Of several such places the first is taken, row by row.
    """
    spectrum = torch.fft.rfft2(masks[:, 0].double())
    overlap = torch.fft.irfft2(spectrum.abs().square(), s=masks.shape[2:]).round()
    least = overlap.flatten(1).argmin(1).tolist()
    width = masks.shape[3]
    moved = [torch.roll(mask, divmod(place, width), (1, 2)) for mask, place in zip(masks, least, strict=True)]
    return torch.stack(moved)


def activation(reader: Reader, view: Tensor) -> Tensor:
    """The class activation map (B, h, w) of class 1 against class 0; its mean and the biases make the logits apart."""
    weights = reader.head.weight[1] - reader.head.weight[0]
    return torch.einsum("bchw,c->bhw", reader.maps(view).float(), weights)


def share_inside(found: Tensor, region: Tensor) -> float:
    """The share of the positive part of maps (B, h, w), enlarged, in a region (B, 1, H, W); NaN where none is."""
    enlarged = F.interpolate(found[:, None], region.shape[2:], mode="bilinear", align_corners=False).clamp_min(0)
    total = float(enlarged.sum())
    return float((enlarged * region).sum()) / total if total else float("nan")


@dataclass
class SegmentedLungs(Pretrained):
    """First a U-Net learns the lungs, then a classifier learns the outcome from what it sees of them.

    Images come with the drawn lungs as their last channel, of which the U-Net learns, and nothing else.

    sees   `whole`: everything; `lungs`: those that the U-Net finds; `elsewhere`: as much of the image, not there.
           Where nothing is found, the image is seen whole
    lungs  the U-Net's channels
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 5e-4
    share: float = 1 / 3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    start: Start = "imagenet"
    sees: Sees = "lungs"
    lungs: tuple[int, ...] = (8, 16, 32, 64)

    axes = 2
    trial = replace(BRAINS, fold=0)
    uses_unlabelled = False

    augment = MaskedClassifier.augment

    def model(self, inputs: int, classes: int, dims: int) -> LungsFirst:
        if dims != 2:
            raise MedcookError("These networks see images, not volumes.", "Take a task of slices.")
        return LungsFirst(Reader(self.start, 1, classes, self.channels), self.network, self.lungs)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """The U-Net's loss on the drawn lungs."""
        image, drawn = apart(images.images)
        return find_loss(self.loss)(nets["model"].lungs(image), (drawn[:, 0] > 0.5).byte())

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        logits = nets["model"].reader(self.view(nets, labelled.images)).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    @torch.no_grad()
    def found(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The lungs (B, 1, H, W) bool that the U-Net finds in images (B, C, H, W)."""
        average = nets["average"].eval()
        return average.lungs(apart(images)[0]).argmax(1, keepdim=True) == 1

    def view(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """What the classifier gets (B, 1, H, W) of images with the drawn lungs, or without them."""
        image = apart(images)[0]
        if self.sees == "whole":
            return hide(image, torch.ones_like(image, dtype=torch.bool))
        shown = self.found(nets, images)
        if self.sees == "elsewhere":
            shown = elsewhere(shown)
        return hide(image, shown | ~shown.flatten(1).any(1)[:, None, None, None])

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W), constant over each image."""
        found = nets["average"].reader(self.view(nets, images)).float().softmax(1)
        return found[:, :, None, None].expand(*found.shape, *images.shape[2:])


@torch.no_grad()
def detection_rows(fitted, case: Case) -> list[dict]:
    """score and outcome, the hospital as group, and

    correct       whether tuberculosis is told at a probability above one half exactly where it is
    inside, area  the share of the class activation in the drawn lungs, and the lungs' share of the image
    lungs         Dice of the lungs that the U-Net finds with the drawn ones, on the network's grid
    """
    rows = outcome_rows(fitted, case, group="site")
    if not rows:
        return []
    nets, method, images = trained(fitted), fitted.method, fitted.task.preparation.images(case)
    drawn = apart(images)[1]
    with autocast(fitted.cost):
        found = activation(nets["average"].reader, method.view(nets, images))
        lungs = method.found(nets, images)
    values = {
        "inside": share_inside(found, drawn),
        "area": float(drawn.mean()),
        "lungs": metrics.dice(lungs.numpy(), drawn.numpy() > 0.5),
    }
    return [row | values | {"correct": float((row["score"] > 0.5) == row["outcome"])} for row in rows]


def arms(start: Start, suffix: str = "") -> dict[str, Arm]:
    """The arms whose classifier starts from `imagenet` or `random`."""
    seen: dict[str, Sees] = {"segmented lungs": "lungs", "whole X-rays": "whole", "without lungs": "elsewhere"}
    return {name + suffix: Arm(SegmentedLungs(start=start, sees=sees)) for name, sees in seen.items()}


LARGE, SMALL = arms("imagenet"), arms("random", ", small encoder")

recipe = Recipe(
    paper="tb-cxr",
    title="Lungs first, then tuberculosis",
    claim="SqueezeNet tells tuberculosis from the lungs alone, as a U-Net segments them, better than from whole "
    "X-rays, by AUC.",
    arms=LARGE | SMALL,
    compare=("segmented lungs", "whole X-rays"),
    ablation=("segmented lungs", "without lungs"),
    metric="auc",
    score=detection_rows,
    scales=scales(BRAINS, XRAYS, *LARGE, budget=BUDGET, quick_arms=tuple(SMALL)),
    published={"segmented lungs, accuracy": 0.999, "whole X-rays, accuracy": 0.9707},
    source="abstract; Rahman et al., 2020 (arXiv 2007.14895)",
    components=(
        Component(
            "segmentation of X-rays by U-nets",
            "implemented",
            "one U-Net, narrow and at half the resolution, for the paper's two; it learns from the drawn lungs of the "
            "training patients and segments everybody's, also in the classifier's training. All arms train it alike. "
            "Column `lungs` is its Dice",
        ),
        Component(
            "classification of segmented lungs and of whole X-rays",
            "implemented",
            "arms that differ in what they see alone; AUC decides, where the paper counts accuracy (column `correct`). "
            "Outside of the lungs there is mean grey, and only what is seen sets the scale. The ablation sees as large "
            "a piece of the same shape, moved to where it covers the least of the lungs",
        ),
        Component(
            "transfer learning from initial weights",
            "simplified",
            "SqueezeNet, one of the paper's nine networks, with ImageNet weights, for 240 steps at 128 x 128",
        ),
        Component(
            "visualization of what the network learns from",
            "implemented",
            "the class activation map of Zhou et al. (2016), exact for a network that ends in a mean and a linear "
            "layer; columns `inside` and `area`. Its 7 x 7 cells are coarser than the lungs' outline",
        ),
        Component(
            "pre-processing and augmentation",
            "simplified",
            "the chapter's: resized, z-scored, moved, other grey values",
        ),
        Component(
            "database of 700 X-rays with tuberculosis and 3500 normal ones",
            "simplified",
            "448 training patients of Montgomery and Shenzhen. In both hospitals there are healthy and ill patients",
        ),
        Component("nine networks", "absent", "one of them"),
    ),
)
