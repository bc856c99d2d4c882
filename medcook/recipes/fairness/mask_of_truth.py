"""Mask of truth: sensitivity to unexpected regions (Sourget, Hestbek-Moller, Jimenez-Sanchez, Xu and Cheplygina, 2024).

What does a classifier look at? Train one on images in which the clinically relevant region is hidden, and it should be
no better than chance. Where it is better, something outside of the region gives the answer away: a shortcut.

Here: tuberculosis in chest X-rays, with the lungs hidden, or all but the lungs. For an image x and the pixels V that
may be seen, the network gets

    (x - mean of x over V) / standard deviation of x over V    inside V, and 0 elsewhere,

so that neither the fill nor the normalisation says anything of what is hidden. What still leaks is the outline of the
region: sick lungs have another shape. Three arms say how much: `silhouette` sees nothing but the outline, `without
grown lungs` hides a margin too, and `without the lungs' box` leaves nothing of it but a rectangle. What chance looks
like is measured, not assumed: `shuffled` learns from outcomes dealt out at random.

The masks are the true ones, also at test: this is a study of images, not a method for patients.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from medcook.cohorts import OutcomeTask, outcome_rows
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment, warp
from medcook.errors import MedcookError
from medcook.methods import Batch, Classifier, Moment
from medcook.preparation import Preparation, preparation_for
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples

MASKINGS = ("full", "without", "without grown", "without box", "only", "only box", "silhouette")


@dataclass(frozen=True)
class WithRegion(Preparation):
    """Images come with a second channel: 1 where the case's label has a structure, 0 elsewhere."""

    def images(self, case: Case) -> Tensor:
        """(N, 2, *size) float32."""
        labels = self.labels(case)
        region = (labels > 0) & (labels != IGNORE)
        return torch.cat([super().images(case), region[:, None].float()], dim=1)


@dataclass(frozen=True)
class RegionTask(OutcomeTask):
    """An outcome to predict from images with their region; `shuffled` deals the training outcomes out at random.

    Which outcome a training patient gets then depends on `draw`. Validation and test patients keep their own.
    """

    shuffled: bool = False

    @cached_property
    def preparation(self) -> Preparation:
        return WithRegion(**vars(preparation_for(self.dataset)))

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled" or not self.shuffled:
            return samples
        cases = samples.case_of.unique()
        dealt = cases[torch.randperm(len(cases), generator=torch.Generator().manual_seed(self.draw))]
        first = torch.stack([(samples.case_of == case).nonzero()[0, 0] for case in dealt])
        place = torch.searchsorted(cases, samples.case_of)
        return replace(samples, labels=samples.labels[first][place])


def visible(region: Tensor, masking: str, grow: int) -> Tensor:
    """Which pixels may be seen: bool like region (B, 1, *size), by the name of the masking.

    grow  by how many pixels the region grows before it is hidden, in chessboard steps
    """
    inside = region > 0.5
    shown = {
        "full": lambda: torch.ones_like(inside),
        "silhouette": lambda: torch.ones_like(inside),
        "without": lambda: ~inside,
        "without grown": lambda: ~grown(inside, grow),
        "without box": lambda: ~box(inside),
        "only": lambda: inside,
        "only box": lambda: box(inside),
    }
    if masking not in shown:
        raise MedcookError(f"Unknown masking {masking!r}.", f"Known: {', '.join(MASKINGS)}.")
    return shown[masking]()


def grown(inside: Tensor, steps: int) -> Tensor:
    """The region (B, 1, *size) and all pixels at most `steps` from it."""
    pool = F.max_pool2d if inside.ndim == 4 else F.max_pool3d
    return pool(inside.float(), 2 * steps + 1, stride=1, padding=steps) > 0


def box(inside: Tensor) -> Tensor:
    """The smallest box around each region (B, 1, *size); empty where the region is."""
    filled = torch.ones_like(inside)
    for axis in range(2, inside.ndim):
        others = tuple(other for other in range(2, inside.ndim) if other != axis)
        reached = inside.amax(others, keepdim=True)
        below, above = reached.cumsum(axis) > 0, reached.flip(axis).cumsum(axis).flip(axis) > 0
        filled = filled & below & above
    return filled


def hide(images: Tensor, shown: Tensor) -> Tensor:
    """Zero mean and unit variance over the pixels shown of each image (B, 1, *size), and 0 where nothing is shown."""
    axes = tuple(range(1, images.ndim))
    count = shown.sum(axes, keepdim=True).clamp_min(1)
    centred = (images - (images * shown).sum(axes, keepdim=True) / count) * shown
    spread = (centred.square().sum(axes, keepdim=True) / count).sqrt()
    return centred / spread.clamp_min(1e-6)


@dataclass
class MaskedClassifier(Classifier):
    """A classifier that sees only what its masking shows, in training as in prediction.

    Images come with the region as their last channel (`WithRegion`); without that channel they are shown whole.
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    masking: str = "full"
    grow: int = 8
    augmentation: Augment = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, noise=0.05, flip=True)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """A network for the image alone."""
        return super().build(max(1, inputs - 1), classes, dims)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Image and region move together, the image's grey values alone change; an image-wide label needs no moving."""
        images, region = apart(batch.images)
        grid = self.augmentation.grid(batch.images, rng)
        images, region = (warp(part, None, grid)[0] for part in (images, region))
        images = self.augmentation.intensity(images, rng)
        return batch._replace(images=torch.cat([images, region], dim=1)[:, : batch.images.shape[1]])

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return super().training_step(nets, labelled._replace(images=self.view(labelled.images)), unlabelled, now)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return super().predict(nets, self.view(images))

    def view(self, images: Tensor) -> Tensor:
        """What the network gets (B, 1, *size) of images with their region."""
        images, region = apart(images)
        shown = visible(region, self.masking, self.grow)
        return hide(region if self.masking == "silhouette" else images, shown)


def apart(images: Tensor) -> tuple[Tensor, Tensor]:
    """(image (B, 1, *size), region (B, 1, *size)); the region of an image that comes without one is empty."""
    return (images, torch.zeros_like(images)) if images.shape[1] == 1 else (images[:, :1], images[:, 1:])


TESTED = ("full", "without", "only")
"""The maskings under which every classifier is tried, besides its own."""


def masking_rows(fitted, case: Case) -> list[dict]:
    """The outcome, the score under the classifier's own masking and under the others, and the hospital as group.

    score_full, score_without, score_only  the score where the test image is masked so, whatever the training was
    attribution, area                      of classifiers of full images: see `attribution_inside`
    likeness_without, likeness_only        of the same: see `likeness`
    """
    rows = outcome_rows(fitted, case, group="site")
    if not rows:
        return []
    values = {f"score_{masking}": score_under(fitted, case, masking) for masking in TESTED}
    if fitted.method.masking == "full":
        inside, area = attribution_inside(fitted, case)
        values |= {"attribution": inside, "area": area}
        values |= {f"likeness_{masking}": likeness(fitted, case, masking) for masking in TESTED[1:]}
    return [row | values for row in rows]


def under(fitted, masking: str):
    """The trained classifier, shown images under another masking."""
    return replace(fitted, method=replace(fitted.method, masking=masking))


def score_under(fitted, case: Case, masking: str) -> float:
    """The probability of the outcome, with the test image masked so."""
    return float(under(fitted, masking).probabilities(case)[1].mean())


def attribution_inside(fitted, case: Case, steps: int = 8) -> tuple[float, float]:
    """(share of the absolute attribution that lies in the region, the region's share of the pixels).

    Integrated gradients (Captum) of the outcome's logit against an image of zeros, its own mean grey. A classifier
    that looks everywhere alike has a share equal to the area. (NaN, area) where nothing is attributed.
    """
    net, images = averaged(fitted), fitted.task.preparation.images(case)
    region = apart(images)[1]
    found = IntegratedGradients(net).attribute(fitted.method.view(images), target=1, n_steps=steps).abs()
    total = float(found.sum())
    return float((found * region).sum()) / total if total else float("nan"), float(region.mean())


@torch.no_grad()
def likeness(fitted, case: Case, masking: str) -> float:
    """Cosine similarity of the features of the image as the classifier was trained to see it, and masked otherwise."""
    encoder, images = averaged(fitted)[0], fitted.task.preparation.images(case)
    mine, other = (encoder(method.view(images)) for method in (fitted.method, under(fitted, masking).method))
    return float(F.cosine_similarity(mine, other).mean())


def averaged(fitted) -> nn.Module:
    """The network that predicts, in the state that training ended in."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    return fitted.nets.eval()["average"]


recipe = Recipe(
    paper="mask-of-truth",
    title="Classifiers of images without the region that matters",
    claim="Tuberculosis can be told from chest X-rays in which the lungs are masked out, better than by a classifier "
    "whose outcomes were dealt out at random.",
    arms={
        "full": Arm(MaskedClassifier()),
        "without lungs": Arm(MaskedClassifier(masking="without")),
        "without grown lungs": Arm(MaskedClassifier(masking="without grown")),
        "without lung box": Arm(MaskedClassifier(masking="without box")),
        "lungs only": Arm(MaskedClassifier(masking="only")),
        "lung box only": Arm(MaskedClassifier(masking="only box")),
        "silhouette": Arm(MaskedClassifier(masking="silhouette")),
        "shuffled": Arm(MaskedClassifier(masking="without"), {"shuffled": True}),
    },
    compare=("without lungs", "shuffled"),
    replicate="draw",
    scales={
        "quick": Scale(
            RegionTask("embedded", outcome="group", positive="atrophy"),
            Budget(steps=30, batch=8, checks=2),
            replicates=1,
            arms=("full", "without lungs", "lungs only", "shuffled"),
        ),
        "full": Scale(
            RegionTask("chest_xray", evaluation="test"),
            Budget(steps=400, batch=16),
            arms=("full", "without lungs", "lungs only", "silhouette", "shuffled"),
        ),
    },
    metric="auc",
    score=masking_rows,
    source="official code, github.com/TheoSourget/MMC_Masking",
    components=(
        Component(
            "masking of the region",
            "implemented",
            "region, region grown, its box; hidden or alone. Hidden pixels are 0 in the paper; here they are the mean "
            "of the visible ones, and only these set the scale, so that nothing hidden leaks through it",
        ),
        Component(
            "training on one masking, testing on another",
            "implemented",
            "every classifier is tested under its own masking, full, without lungs and lungs only. Where the test "
            "masking is not the trained one, also a classifier that learned nothing may follow the outline: read such "
            "an AUC beside that of `shuffled`",
        ),
        Component(
            "above random",
            "implemented",
            "against classifiers whose outcomes were dealt out at random, on the same images with the same test "
            "patients; `silhouette` adds what the outline alone gives away",
        ),
        Component(
            "explainability by SHAP",
            "simplified",
            "integrated gradients (Captum), the Shapley value of a game with many small players, against the mean "
            "grey; the share of it inside the lungs beside their share of the image",
        ),
        Component(
            "analysis of embeddings",
            "simplified",
            "how alike the features of an image and of its masked version are, for classifiers of full images; no map",
        ),
        Component("interpretation by a radiologist", "absent", "needs a radiologist"),
        Component(
            "classifiers",
            "simplified",
            "a small network from scratch on one disease, 448 images and true masks; the paper: pre-trained DenseNet "
            "on five findings of PadChest with predicted masks, and on eye fundus images",
        ),
    ),
)
