"""MedShapeNet: a large-scale dataset of 3D medical shapes for computer vision (Li et al., arXiv 2308.16139, 2023).

Anatomy as shapes and not as images: more than 100,000, as voxels, meshes and points. One of its use cases completes
anatomies from what is left of them and from their neighbours (Li et al., A multi-class completion framework for 3D
anatomy reconstruction, arXiv 2309.04956, 2023): a 3D U-Net maps partial labels to full ones.

In miniature, the shapes are those of the book's own masks; _shapes.py gives them in the three forms. In the benchmark
a part of one structure is cut away: what lies beyond a plane, in a ball, or all of it. Each structure v has two
channels, no image is seen, and only what was cut away is asked for:

    seen_v = shape_v outside what is unknown_v,    unknown_v = the cut where v was cut, nothing elsewhere
"""

from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.evaluation import row
from medcook.interactive import overlap
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks.unet import UNet
from medcook.precision import autocast
from medcook.recipes.anatomy._shapes import Shape, chamfer
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.volumes._settings import VolumeNetwork
from medcook.sampling import once, trained
from medcook.tasks import Budget, VolumeTask

CUTS = ("half-space", "ball", "whole")
SHARE = (0.3, 0.7)
"""The least and the largest part of a structure that a half-space or a ball takes away."""
POINTS = 1000
"""Points on a surface from which a distance is measured."""


def draw_cut(mask: Tensor, kind: str, rng: torch.Generator | None = None) -> Tensor:
    """(*size) bool: what is cut away of a volume, so that it takes a random `SHARE` of the mask (*size), or the whole.

    half-space  beyond a plane of random direction;  ball  around a random voxel of the mask;  whole  everywhere
    """
    if kind == "whole":
        return torch.ones_like(mask)
    places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in mask.shape], indexing="ij"), dim=-1).float()
    if kind == "half-space":
        far = places @ F.normalize(torch.randn(3, generator=rng), dim=0)
    else:
        inside = mask.cpu().nonzero()
        far = (places - inside[torch.randint(len(inside), (), generator=rng)]).norm(dim=-1)
    far = far.to(mask.device)
    share = SHARE[0] + (SHARE[1] - SHARE[0]) * float(torch.rand((), generator=rng))
    return far <= far[mask].quantile(share)


@dataclass
class Completion(VolumeNetwork):
    """A U-Net that completes a structure, given what is left of it and the structures beside it.

    neighbours  False: of the other structures nothing is known
    """

    neighbours: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return UNet(inputs=2 * (classes - 1), classes=classes, channels=self.channels, dims=3)

    def partial(self, label: Tensor, value: int, cut: Tensor, classes: int) -> Tensor:
        """(2 S, *size): what is seen of S structures of a label (*size), then where each is unknown."""
        shapes = torch.stack([label == number for number in range(1, classes)])
        unknown = torch.full_like(shapes, not self.neighbours)
        unknown[value - 1] = cut
        return torch.cat([shapes & ~unknown, unknown]).float()

    def example(self, label: Tensor, classes: int) -> tuple[Tensor, Tensor, int]:
        """A partial label (2 S, *size), what completes it (*size; 1, 0, and `IGNORE` outside the cut), the structure.

        A random structure of the label is cut in a random way; one that shows none asks nothing.
        """
        values = label[(label > 0) & (label != IGNORE)].unique()
        value = int(values[torch.randint(len(values), ())]) if len(values) else 1
        truth = label == value
        cut = draw_cut(truth, CUTS[int(torch.randint(len(CUTS), ()))]) if len(values) else truth
        answer = torch.where(cut & (label != IGNORE), truth.to(label.dtype), IGNORE)
        return self.partial(label, value, cut, classes), answer, value

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean over a batch of the loss where something was cut away; images are not looked at."""
        classes = nets["model"].head.out_channels
        inputs, answers, values = zip(*[self.example(label, classes) for label in labelled.labels], strict=True)
        logits = nets["model"](torch.stack(inputs)).float()
        losses = [
            find_loss(self.loss)(logit[None, [0, value]], answer[None])
            for logit, answer, value in zip(logits, answers, values, strict=True)
        ]
        return sum(losses) / len(losses)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size) where nothing is known of any structure: the same for every image."""
        channels = nets["average"].head.out_channels - 1
        nothing = torch.zeros(len(images), channels, *images.shape[2:], device=images.device)
        return nets["average"](torch.cat([nothing, 1 - nothing], dim=1)).float().softmax(1)

    def complete(self, fitted, partial: Tensor, value: int) -> Tensor:
        """(B, *size) bool: where partial labels (B, 2 S, *size) have a structure, as a trained method has it."""
        with autocast(fitted.cost):
            logits = fitted.nets["average"](partial).float()
        return logits[:, value] > logits[:, 0]


@dataclass
class NearestShapes(Completion):
    """The prior that needs no network: the training shapes that fit best to what is seen, shifted, by their majority.

    count  how many; None: all of them, the mean shape. A network is trained, as small as can be, and not asked.
    """

    channels: tuple[int, ...] = (2, 2, 2, 2)
    count: int | None = 10

    def complete(self, fitted, partial: Tensor, value: int) -> Tensor:
        shapes, spectra = once(fitted, "shapes", lambda: training_shapes(fitted.task))
        found = []
        for seen, unknown in (part.chunk(2) for part in partial):
            differ, shifts = fit(spectra, seen, unknown)
            best = differ.argsort(stable=True)[: self.count]
            moved = [shifted(shapes[i, value - 1], shifts[i].tolist()) for i in best]
            others = torch.cat([seen[: value - 1], seen[value:]]).any(0)
            found.append((torch.stack(moved).float().mean(0) > 0.5) & ~others)
        return torch.stack(found)


def training_shapes(task) -> tuple[Tensor, Tensor]:
    """(N, S, *size) bool: the S structures of the N training volumes, and their `spectrum`."""
    labels = torch.as_tensor(task.samples("labelled").labels)
    shapes = torch.stack([labels == number for number in range(1, task.classes)], dim=1)
    return shapes, torch.cat([spectrum(part) for part in shapes.split(16)])


def spectrum(volumes: Tensor) -> Tensor:
    """The Fourier transform of volumes (..., *size) over their last three axes."""
    return torch.fft.rfftn(volumes.float(), dim=(-3, -2, -1))


def fit(spectra: Tensor, seen: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """How N shapes (spectra of (N, S, *size)) differ from what is seen (S, *size): (N,) voxels, (N, 3) the best shift.

    Counted are voxels of all structures where they are known, at shifts up to an eighth of each side:

        |seen - shape| = |seen| - sum of (2 seen - known) shape,    a correlation, for all shifts by one transform

    What is shifted out of the volume comes back in on the other side, and counts there.
    """
    size, told = seen.shape[1:], spectrum(2 * seen - (1 - unknown))
    parts = [(told * part.conj()).sum(1) for part in spectra.split(16)]
    differ = seen.sum() - torch.cat([torch.fft.irfftn(part, s=size, dim=(-3, -2, -1)) for part in parts])
    reach = torch.tensor([side // 8 for side in size])
    differ = differ.roll(reach.tolist(), (1, 2, 3))[(slice(None), *[slice(2 * n + 1) for n in reach.tolist()])]
    least, places = differ.flatten(1).round().min(1)
    return least, torch.stack(torch.unravel_index(places, differ.shape[1:]), dim=1) - reach


def shifted(volume: Tensor, shift: list[int]) -> Tensor:
    """A volume (*size) moved by whole voxels; what comes in from outside is empty."""
    pads = [amount for step in reversed(shift) for amount in (step, -step)]
    return F.pad(volume, pads)


@torch.no_grad()
def completion_rows(fitted, case: Case) -> list[dict]:
    """A row for every structure of a case: how well its missing part is found, on the network's grid.

    dice                  of the part that is missing, mean of a half-space and a ball
    dice_half-space, dice_ball, dice_whole    of each kind of cut; whole: the structure is guessed from its neighbours
    chamfer               distance of points on the completed and on the true surface, mean of half-space and ball
    The cuts follow from the names of case and structure: every method is asked the same.
    """
    trained(fitted)
    (label,), rows = fitted.task.preparation.labels(case), []
    for value, name in fitted.task.structures.items():
        truth = label == value
        if truth.any():
            seed = int(sha256(f"{case.case_id} {name}".encode()).hexdigest()[:8], 16)
            cuts = [draw_cut(truth, kind, torch.Generator().manual_seed(seed)) for kind in CUTS]
            partial = torch.stack([fitted.method.partial(label, value, cut, fitted.task.classes) for cut in cuts])
            found = [
                answer & cut for answer, cut in zip(fitted.method.complete(fitted, partial, value), cuts, strict=True)
            ]
            scores = [overlap(mask, truth & cut) for mask, cut in zip(found, cuts, strict=True)]
            apart = [distance(found[k] | (truth & ~cuts[k]), truth, case.spacing) for k in (0, 1)]
            values = {f"dice_{kind}": score for kind, score in zip(CUTS, scores, strict=True)}
            values |= {"dice": sum(scores[:2]) / 2, "chamfer": sum(apart) / 2, "unit": metrics.unit(case.spacing)}
            rows.append(row(case, name, missed=not (found[0].any() or found[1].any()), **values))
    return rows


def distance(found: Tensor, truth: Tensor, spacing: tuple[float, ...] | None) -> float:
    """The chamfer distance of the surfaces of two masks; the volume's diagonal where nothing was found."""
    if not found.any():
        return metrics.diagonal(truth.shape, spacing)
    return chamfer(*(Shape(mask.numpy(), spacing).points(POINTS) for mask in (found, truth)))


BUDGET = Budget(steps=300, batch=4, checks=0)
"""Two minutes on one core. Validation Dice of images of which nothing is seen would say nothing: there is none."""

recipe = Recipe(
    paper="medshapenet",
    title="Shapes in three forms, and how well a missing part is completed",
    claim="A 3D U-Net that is trained on partial labels completes a part that was cut away from a structure of the "
    "hippocampus with a higher Dice than the training shapes that fit best to what is left.",
    arms={
        "nearest shapes": Arm(NearestShapes()),
        "completed": Arm(Completion()),
        "without neighbours": Arm(Completion(neighbours=False)),
        "mean shape": Arm(NearestShapes(count=None)),
    },
    compare=("completed", "nearest shapes"),
    ablation=("completed", "without neighbours"),
    replicate="fold",
    score=completion_rows,
    scales={
        "quick": Scale(VolumeTask("embedded"), Budget(steps=30, batch=4, precision="float32", checks=0), replicates=1),
        "full": Scale(VolumeTask("hippocampus"), BUDGET, arms=("nearest shapes", "completed", "without neighbours")),
    },
    source="the abstracts; the authors' code of the anatomy completor, github.com/Jianningli/medshapenet-feedback",
    components=(
        Component(
            "dataset of 100,000 shapes",
            "simplified",
            "`medcook data show medshapenet` says where it is, and a reader takes its STL files as volumes. None of "
            "it is at hand: the benchmark's shapes are made from the book's own masks",
        ),
        Component("voxels", "implemented", "a structure's mask with spacing, from any case that is a volume"),
        Component(
            "mesh",
            "implemented",
            "marching cubes of the mask, in mm, closed, not smoothed: the steps of the voxels make its area 8 to 10% "
            "larger than that of a ball. Volume and area are all that is known of a shape",
        ),
        Component("point cloud", "implemented", "random points, equally dense by area, without normals or labels"),
        Component(
            "multi-class anatomy completion",
            "simplified",
            "one structure is cut and the others are shown. There 12 anatomies of a body, of which some are left out "
            "as a whole: here a third of the cuts in training, and the column dice_whole",
        ),
        Component(
            "shape completion",
            "implemented",
            "beyond a plane or in a ball. Every method is told where, which the authors' networks are not; the size of "
            "the cut says that 30 to 70% are missing. Planes and balls are in voxels, which are cubes at full alone",
        ),
        Component(
            "3D U-Net on partial labels",
            "simplified",
            "the book's, 8 to 64 channels, two channels a structure in, one logit a structure out; there an "
            "encoder-decoder of 64 to 512 channels at 128 voxels a side, which sees label numbers and has a Dice loss. "
            "Dice after 150 steps on 12 patients of fold 4: 0.75, with and without augmentation, the loss still "
            "falling; so there are 300. That the prior was ahead there was seen before the claim was written",
        ),
        Component(
            "shape prior",
            "implemented",
            "not theirs but the book's comparator: the 10 training shapes that differ least from what is seen, each "
            "shifted by whole voxels, by their majority; neither turned nor scaled. On 8 patients of fold 4, which is "
            "not scored, 5 to 40 shapes were as good as each other (Dice 0.82 to 0.83, the mean shape 0.70). Its cost "
            "is that of a tiny network that is not asked",
        ),
        Component(
            "completion benchmark",
            "implemented",
            "Dice of the missing part, and the chamfer distance of 1000 points on each surface",
        ),
        Component("skull and face reconstruction", "absent", "no skulls at hand; a ball out of a hippocampus instead"),
        Component("classification of brain tumours", "absent", "no shapes of tumours at hand"),
        Component(
            "web interface and Python API", "absent", "their package is used as it is, `pip install MedShapeNet`"
        ),
        Component("surgical instruments, augmented reality, education, 3D printing", "absent", "no part of a recipe"),
    ),
)
