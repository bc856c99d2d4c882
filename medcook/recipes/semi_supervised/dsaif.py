"""Dual structure-aware image filterings (Gu et al., Medical Image Analysis 2024).

Idea: two networks that see the same image make the same mistakes and then confirm each other. Let one see the image
filtered in its max-tree and the other the image filtered in its min-tree: components that have no siblings there are
removed, so both images keep what branches (the topology) and lose different grey values, and their errors differ.

Max-tree: its nodes are the connected components of the threshold sets {f >= t}, its edges their inclusion. A node
that is the only child of its parent is topologically equivalent to it; it is removed, which gives its pixels the grey
value of the nearest node that stays, on the way to the root. Min-tree: the max-tree of the inverse image.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from skimage.morphology import max_tree
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, CrossPseudoSupervision, MeanTeacher, Moment
from medcook.methods.co_training import cross_supervision
from medcook.methods.semi_supervised import forgetful, noisy
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import SCALES


def max_tree_filter(image: np.ndarray, area: int = 1) -> np.ndarray:
    """The image (*size) uint8 without the nodes of its max-tree that are smaller than `area` pixels or lack siblings.

    All neighbours touch (8 in two dimensions). In skimage's tree every pixel points to another one of its component,
    or of the one below: a component's representative is the pixel whose parent has another grey value.
    """
    parent, order = (part.ravel() for part in max_tree(image, connectivity=image.ndim))
    level, root = image.ravel(), order[0]
    node = level != level[parent]  # representatives, without the root's
    node &= areas(parent, order, node) >= area
    children = np.bincount(parent[node], minlength=level.size)
    stays = node & (children[parent] > 1)  # of an only child, nothing stays
    stays[root] = True
    ancestor = np.where(stays, np.arange(level.size), parent)
    while not stays[ancestor].all():
        ancestor = ancestor[ancestor]
    return level[ancestor].reshape(image.shape)


def areas(parent: np.ndarray, order: np.ndarray, node: np.ndarray) -> np.ndarray:
    """The number of pixels of every node of a max-tree, at its representative; pixels in `order` from the root on."""
    own = np.bincount(np.where(node, np.arange(len(node)), parent), minlength=len(node)).tolist()
    below = parent.tolist()
    for pixel in reversed(order[node[order]].tolist()):
        own[below[pixel]] += own[pixel]
    return np.array(own)


def min_tree_filter(image: np.ndarray, area: int = 1) -> np.ndarray:
    """The dual filter: dark components take the part of bright ones."""
    return 255 - max_tree_filter(255 - image, area)


def dual_views(image: Tensor, area: int) -> tuple[Tensor, Tensor]:
    """An image (C, *size) filtered in the max-trees of its channels, and in their min-trees, at 256 grey values."""
    low, high = image.aminmax()
    span = (high - low).clamp_min(1e-6)
    coarse = ((image - low) / span * 255).round().byte().cpu().numpy()
    views = (np.stack([f(channel, area) for channel in coarse]) for f in (max_tree_filter, min_tree_filter))
    bright, dark = (torch.from_numpy(view).to(image) / 255 * span + low for view in views)
    return bright, dark


@dataclass
class DSAIF(CrossPseudoSupervision):
    """Cross pseudo supervision of two networks, each with its own view of the images, labelled or not.

    views   trees: the max-tree of an image for one network and its min-tree for the other, which for which by chance;
            noise: a noisy view for each
    share   of the images that are filtered; the others are seen as they are, as at prediction
    area    components of fewer pixels are removed before siblings are counted, or noise would be everyone's sibling
    """

    views: Literal["trees", "noise"] = "trees"
    share: float = 0.5
    area: int = 5

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Both networks learn the labels, each from its view, and each learns what the other says of its own view."""
        nets, loss = (nets["model"], nets["second"]), find_loss(self.loss)
        views = self.pair(labelled.images)
        supervised = sum(loss(net(view).float(), labelled.labels) for net, view in zip(nets, views, strict=True))
        if unlabelled is None or now.fraction < self.start:
            return supervised
        with forgetful(nets[0]), forgetful(nets[1]):
            views = self.pair(unlabelled.images)
            first, second = (net(view).float() for net, view in zip(nets, views, strict=True))
            return supervised + self.rising(now) * cross_supervision(first, second)

    def pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What each of the two networks sees of images (B, C, *size)."""
        if self.views == "noise":
            return noisy(images), noisy(images)
        one, two = images.clone(), images.clone()
        chosen, swapped = torch.rand(len(images)) < self.share, torch.rand(len(images)) < 0.5
        for k in chosen.nonzero().flatten().tolist():
            views = dual_views(images[k], self.area)
            one[k], two[k] = views[::-1] if swapped[k] else views
        return one, two


recipe = Recipe(
    paper="dsaif",
    title="Dual structure-aware image filterings",
    claim="Two networks teach each other better when they see max-tree and min-tree filtered images than noisy ones.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "dsaif": Arm(DSAIF()),
        "noise views": Arm(DSAIF(views="noise")),
        "one view": Arm(CrossPseudoSupervision()),
    },
    compare=("dsaif", "noise views"),
    ablation=("dsaif", "one view"),
    replicate="draw",
    scales=SCALES,
    components=(
        Component(
            "max-tree and min-tree",
            "implemented",
            "of slices at 256 grey values, 8 neighbours; the min-tree is the max-tree of the inverse image. As in the "
            "official code, which network sees which is drawn anew for every image, and half of the images are "
            "filtered, labelled ones too",
        ),
        Component(
            "removal of nodes without siblings",
            "implemented",
            "an only child gives its pixels the grey value of its nearest ancestor that stays; the root always stays",
        ),
        Component(
            "removal of small components",
            "implemented",
            "not in the abstract, but in the official code: 50 voxels there in volumes, 5 pixels here in slices",
        ),
        Component(
            "mutually supervised networks",
            "implemented",
            "cross pseudo supervision with hard labels. The first network's average predicts. The official code also "
            "changes the grey values of the two views separately (Bezier curves, gamma); here both views of an image "
            "come from the same augmentation",
        ),
    ),
)
