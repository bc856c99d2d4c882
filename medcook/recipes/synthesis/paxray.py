"""PAXRay (Seibold, Reiss, Sarfraz, Fink, Mayer, Sellner, Kim, Maier-Hein, Kleesiek and Stiefelhagen, BMVC 2022; arXiv
2210.03416).

Idea: nobody draws anatomy on X-rays, since structures lie behind each other and have no borders there. In CT they have.
So CT is projected together with its structures, along the same rays: an X-ray with one mask a structure, which overlap.
With m_s the voxels of structure s and r the ray of a pixel,

    mask of s at the pixel = 1 where the ray passes more than `THICK` of s:   sum of m_s along r > THICK

A network that learns these masks finds the region that a phrase of a report is about, by the name of the structure
in the phrase. Region proposals, which know no anatomy, have to be matched with phrases instead.

The data set has a reader (`medcook data show paxray`), but is not at hand: the recipe projects head-and-neck CT, where
structures were drawn by hand. X-rays, masks and proposals of four training patients were looked at.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Method, Moment
from medcook.networks import build_network
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._overlapping import OverlappingTask, masks_of
from medcook.recipes.synthesis._phrases import meant, phrases
from medcook.recipes.synthesis._regions import box_iou, boxes_of, described, proposals, region
from medcook.recipes.synthesis._settings import CHANNELS, NECKS, XRAY_BUDGET, scales

SMALLEST = 9
"""Pixels of a structure from which on a view is asked for it: less got into the picture by chance."""

AUGMENT = Augment(rotate=10, scale=0.1, shift=0.1)
"""Without a mirror: left and right matter."""


def dice_loss(found: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
    """One minus the mean soft Dice of the structures (B, K, H, W), each over the images where it was drawn (B, K)."""
    found, masks = found * drawn[..., None, None], masks * drawn[..., None, None]
    axes = (0, 2, 3)
    return 1 - ((2 * (found * masks).sum(axes) + 1) / (found.sum(axes) + masks.sum(axes) + 1)).mean()


def overlapping_loss(logits: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
    """Each structure by itself: binary cross-entropy and Dice; logits (B, 1 + K, H, W), the first: nothing is here."""
    known = drawn[..., None, None].expand_as(masks)
    nothing = 1 - masks.amax(1, keepdim=True)
    sure = drawn.all(1)[:, None, None, None] | (nothing == 0)
    truth, known = torch.cat([nothing, masks], 1), torch.cat([sure, known], 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, known.float(), reduction="sum") / known[:, :1].numel()
    return entropy + dice_loss(logits[:, 1:].sigmoid(), masks, drawn)


def one_label_loss(logits: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
    """One label a pixel: cross-entropy and Dice. What was not drawn may be where the label says that nothing is."""
    logs = logits.log_softmax(1)
    hidden = F.pad(~drawn, (1, 0), value=True)[..., None, None]
    either = logs.masked_fill(~hidden, -torch.inf).logsumexp(1)
    known = labels != IGNORE
    target = torch.where(known, labels, 0).long()
    entropy = -torch.where(target == 0, either, logs.gather(1, target[:, None])[:, 0])[known].sum() / known.numel()
    masks = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    return entropy + dice_loss(logs[:, 1:].exp(), masks, drawn)


@dataclass
class Anatomy(Method):
    """Finds structures on X-rays.

    overlapping  whether a pixel may be of several structures; else it is of the one that lies in front
    """

    channels: tuple[int, ...] = CHANNELS
    augmentation: Augment = AUGMENT
    overlapping: bool = True

    axes = 2
    trial = OverlappingTask("embedded", labelled=2)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        masks, drawn = masks_of(labelled, logits.shape[1])
        if self.overlapping:
            return overlapping_loss(logits, masks, drawn)
        return one_label_loss(logits, labelled.labels, drawn)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 1 + K, H, W): above a half where a structure is."""
        logits = nets["average"](images).float()
        if self.overlapping:
            return logits.sigmoid()
        return F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()


class Matcher(nn.Module):
    """Images (B, 1, H, W) and boxes (B, R, 4) of them to logits (B, R, K): how well each would be a structure's box.

    network  images to feature maps (B, maps, H, W)
    """

    def __init__(self, network: nn.Module, maps: int, structures: int, width: int = 64):
        super().__init__()
        sizes = (4 + 2 * maps, width, width)
        layers = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), nn.ReLU())]
        self.network, self.structures = network, structures
        self.layers = nn.Sequential(*layers, nn.Linear(width, structures))

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        maps = self.network(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.layers(described(maps.float(), boxes))


@dataclass
class Proposals(Method):
    """Proposes regions of any kind, and takes the one that matches best, by the features of a network in it.

    tries  random boxes an image from which a step learns how well boxes match, and as many near each structure
    maps   features of a pixel
    """

    channels: tuple[int, ...] = CHANNELS
    tries: int = 16
    maps: int = 8
    augmentation: Augment = AUGMENT

    axes = 2
    trial = OverlappingTask("embedded", labelled=2)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        network = build_network(self.network, inputs=inputs, classes=self.maps, channels=self.channels, dims=dims)
        model = Matcher(network, self.maps, classes - 1)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Cross-entropy of the overlap that each box has with each structure's."""
        masks, drawn = masks_of(labelled, nets["model"].structures + 1)
        truth = boxes_of(masks)
        boxes = self.examples(truth, masks.shape[2:])
        wanted = box_iou(boxes[:, :, None], truth[:, None])
        logits = nets["model"](labelled.images, boxes)
        known = drawn[:, None].expand_as(wanted).float()
        return F.binary_cross_entropy_with_logits(logits, wanted, known, reduction="sum") / known.sum().clamp_min(1)

    def examples(self, truth: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, R, 4) boxes of whole pixels: some near those of structures (B, K, 4), the others anywhere."""
        size = torch.tensor(size, device=truth.device)
        sides = (truth[..., 2:] - truth[..., :2]).repeat(1, 1, 2)
        near = truth[:, :, None] + 0.2 * sides[:, :, None] * torch.randn(*truth.shape[:2], self.tries, 4).to(truth)
        middle, half = torch.rand(2, len(truth), self.tries, 2).to(truth).unbind(0)
        half = 0.03 * 12**half * size
        boxes = torch.cat([near.flatten(1, 2), torch.cat([middle * size - half, middle * size + half], -1)], 1)
        corner = torch.minimum(boxes[..., :2].round().clamp_min(0), size - 2)
        return torch.cat([corner, torch.minimum(torch.maximum(boxes[..., 2:].round(), corner + 2), size)], -1)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 1 + K, H, W): 1 in the proposal that matches a structure best."""
        found = torch.zeros(len(images), nets["average"].structures, *images.shape[2:], device=images.device)
        for image, answer in zip(images, found, strict=True):
            boxes = proposals(image[0].float().cpu().numpy()).to(image.device)
            best = nets["average"](image[None], boxes[None])[0].argmax(0)
            for mask, (top, left, bottom, right) in zip(answer, boxes[best].int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
        return torch.cat([1 - found.amax(1, keepdim=True), found], 1)


def grounding_rows(fitted, case: Case) -> list[dict]:
    """A row a structure that was drawn, means over the views in which it is seen and the phrases about it.

    iou       of the boxes of the region that was found and of the structure; 0 where nothing was found
    hit       whether this is above a half
    pointing  whether the middle of the box that was found is in the structure's
    dice      of the region itself and the structure
    ceiling   of region proposals: iou of the best of them
    """
    task, method = fitted.task, fitted.method
    masks, images = task.preparation.masks(case), task.preparation.images(case)
    answers = fitted.answer(images)
    regions = torch.from_numpy(np.stack([[region(m) for m in view] for view in (answers[:, 1:] > 0.5).numpy()]))
    offered = [proposals(image[0].numpy()) for image in images] if isinstance(method, Proposals) else []
    rows = []
    for number, (value, name) in enumerate(task.structures.items()):
        seen = ((masks[:, number] == 1).flatten(1).sum(1) >= SMALLEST).nonzero().flatten().tolist()
        if (masks[:, number] == IGNORE).any() or not seen:
            continue
        about = [meant(phrase, task.structures) for phrase in phrases(name)]
        values = [
            grounded(regions[view, answer - 1] if answer else torch.zeros_like(regions[0, 0]), masks[view, number] == 1)
            for answer in about
            for view in seen
        ]
        truth = boxes_of(masks[:, number] == 1)
        best = [float(box_iou(offered[view], truth[view]).max()) for view in seen] if offered else [float("nan")]
        means = {key: float(np.mean([one[key] for one in values])) for key in values[0]}
        missed = not regions[seen, value - 1].any()
        rows.append(evaluation.row(case, name, **means, ceiling=float(np.mean(best))) | {"missed": missed})
    return rows


def grounded(found: Tensor, truth: Tensor) -> dict[str, float]:
    """The measures of `grounding_rows` of a region and the structure, (H, W) bool."""
    mine, theirs = boxes_of(found), boxes_of(truth)
    middle, iou = (mine[:2] + mine[2:]) / 2, float(box_iou(mine, theirs))
    inside = bool(found.any()) and bool(((middle >= theirs[:2]) & (middle < theirs[2:])).all())
    dice = 2 * int((found & truth).sum()) / max(int(found.sum() + truth.sum()), 1)
    return {"iou": iou, "hit": float(iou > 0.5), "pointing": float(inside), "dice": dice}


recipe = Recipe(
    paper="paxray",
    title="Anatomy projected from CT grounds phrases",
    claim="The regions of a network that learnt projected anatomy lie closer to the structure a phrase is about than "
    "region proposals that are matched with it.",
    arms={
        "proposals": Arm(Proposals()),
        "anatomy": Arm(Anatomy()),
        "one label a pixel": Arm(Anatomy(overlapping=False)),
    },
    compare=("anatomy", "proposals"),
    ablation=("anatomy", "one label a pixel"),
    replicate="fold",
    metric="iou",
    score=grounding_rows,
    scales=scales(
        OverlappingTask("embedded", fold=0, angles=(-20.0, 0.0, 20.0)),
        OverlappingTask(NECKS.dataset, fold=0, folds=NECKS.folds),
        budget=XRAY_BUDGET,
    ),
    published={
        "OpenI, grounding, anatomy over region proposals, up to": 0.5,
        "PAXRay, 166 structures, U-Net, mean IoU": 0.606,
    },
    source="the abstract; the official code, github.com/ConstantinSeibold/multilabel_segmentation_paxray, and the data "
    "set's card",
    components=(
        Component(
            "masks projected from CT",
            "implemented",
            "on the rays of the X-ray, one mask a structure, 1 from 2 mm of it on. Seven organs of the head and neck, "
            "drawn by hand, from nine sides within 40 degrees of the front; there 166 structures of the chest, frontal "
            "and lateral. What nobody drew for a patient is unknown",
        ),
        Component(
            "multi-label segmentation of X-rays",
            "implemented",
            "a sigmoid a structure, binary cross-entropy and Dice, as in the official code; there a U-Net on a "
            "ResNet-50 at 480 pixels, here the chapter's at 64. The ablation knows one label a pixel, that of the "
            "structure in front",
        ),
        Component(
            "grounding of phrases by anatomy",
            "implemented",
            "the box of the region of the structure that a phrase names, which is compared with the true one. Two of "
            "the training patients of fold 0, four trained: iou 0.48, one label a pixel 0.37, proposals 0.41 (their "
            "ceiling 0.62). Nothing was tuned but the proposals",
        ),
        Component(
            "region proposals",
            "simplified",
            "segments of Felzenszwalb and Huttenlocher at five scales and all pairs of neighbours, several hundred "
            "boxes an X-ray, in place of a trained network of proposals. Five finer scales and not three coarse ones, "
            "since the best box overlaps more: 0.58 to 0.46 on four training patients",
        ),
        Component(
            "matching of regions and phrases",
            "simplified",
            "learnt from the same masks, with the same network in as many steps: its features in a box and around it, "
            "and where the box is, tell its overlap with each structure. With brightness in place of features the iou "
            "was 0.22. How the paper matches them was not to be read in its abstract and code",
        ),
        Component(
            "phrases of reports",
            "simplified",
            "three made-up sentences, with synonyms and sides; the same parser serves all arms, so that phrases decide "
            "nothing between them",
        ),
        Component(
            "PAXRay",
            "simplified",
            "`medcook data show paxray` says where it is, and a reader takes its files; they could not be opened",
        ),
        Component(
            "pipeline of CT segmentation",
            "absent",
            "models of CT found the structures there; here people drew them, in training and in the truth of the score",
        ),
        Component("grounding on OpenI", "absent", "neither its reports nor the boxes drawn for the paper are at hand"),
    ),
)
