"""AutoPaint (Astaraki, De Benetti, Yeganeh, Toma-Dasu, Smedby, Wang, Navab and Wendler, 2023).

An inpainting network learns on healthy images alone how what is hidden follows from what surrounds it. At test the
image is painted over without anybody saying where: what differs most from its painted version is found, taken out,
and painted healthy; with x the image, P(x, M) the image with the pixels of mask M painted, and R(x) the image with
every pixel painted once, in turns:

    loss = 6 |P(x, M) - x| in M + |net(x, M) - x| outside, M random holes       training, healthy images
    M_0 = {},  M_k = largest differences |x - R(P(x, M_k-1))|                   find, k = 1 .. rounds
    anomaly = |x - R(P(x, M_rounds))|                                           segment

With rounds = 0 what is abnormal may paint itself: its own surroundings are abnormal too.

Here the images are chest X-rays, the network learns from those without tuberculosis, and what counts is whether the
mean anomaly of the lungs tells the patients who have it. Where the lungs are is given, at test too, and to every arm
alike: the experts' masks. Besides, patches that look like opacities are planted into the lungs of healthy patients
(columns `simulated`), to see whether they are found where they are.
"""

import zlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.cohorts import CohortTask, meets
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.measures.detection import auroc
from medcook.methods import Batch, Method, Moment
from medcook.networks import UNet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples


def holes(region: Tensor, count: int, sizes: tuple[float, float]) -> Tensor:
    """(B, 1, H, W) bool: `count` random ellipses and boxes around random pixels of each region (B, H, W).

    sizes  least and largest half axis in pixels
    """
    batch, height, width = region.shape
    chances = region.flatten(1).float() + 1e-6  # an empty region: anywhere
    centre = torch.multinomial(chances, count, replacement=True)
    rows, columns = torch.arange(height, device=region.device), torch.arange(width, device=region.device)
    down = rows.view(1, 1, -1, 1) - (centre // width).view(batch, count, 1, 1)
    right = columns.view(1, 1, 1, -1) - (centre % width).view(batch, count, 1, 1)
    low, high = sizes
    axes = low + (high - low) * torch.rand(2, batch, count, 1, 1, device=region.device)
    box = torch.rand(batch, count, 1, 1, device=region.device) < 0.5
    down, right = (down / axes[0]).abs(), (right / axes[1]).abs()
    distance = torch.where(box, torch.maximum(down, right), (down**2 + right**2).sqrt())
    return (distance <= 1).any(1, keepdim=True)


def paint(net: nn.Module, image: Tensor, hidden: Tensor) -> Tensor:
    """P: the image (B, 1, H, W) with its hidden pixels (bool, same shape) painted by a network that sees the others."""
    return torch.where(hidden, net(covered(image, hidden)).float(), image)


def covered(image: Tensor, hidden: Tensor) -> Tensor:
    """(B, 2, H, W): the image with its hidden pixels set to the mean (0), and the mask of what is hidden."""
    return torch.cat([image.masked_fill(hidden, 0), hidden.to(image.dtype)], dim=1)


def repaint(net: nn.Module, image: Tensor, region: Tensor, cell: int) -> Tensor:
    """R: every pixel of the region (B, 1, H, W) painted once, in four turns that each hide every fourth cell."""
    painted = image
    rows = torch.arange(image.shape[2], device=image.device).view(-1, 1) // cell % 2
    columns = torch.arange(image.shape[3], device=image.device).view(1, -1) // cell % 2
    for turn in range(4):
        hidden = region & (rows * 2 + columns == turn)
        painted = torch.where(hidden, paint(net, image, hidden), painted)
    return painted


def find(difference: Tensor, region: Tensor, share: float) -> Tensor:
    """(B, 1, H, W) bool: the largest `share` of the differences in each image's region, and their neighbours."""
    inside = difference.masked_fill(~region, -1).flatten(1)
    rank = (region.flatten(1).sum(1, keepdim=True) * share).long().clamp_min(1)
    level = inside.sort(dim=1, descending=True).values.gather(1, rank - 1)
    found = (inside >= level).view_as(region) & region
    return F.max_pool2d(found.float(), 5, stride=1, padding=2).bool() & region


def smooth(values: Tensor, region: Tensor, width: int) -> Tensor:
    """Mean over a square of `width` pixels, of what lies in the region alone."""
    weight = F.avg_pool2d(region.to(values.dtype), width, stride=1, padding=width // 2)
    return F.avg_pool2d(values * region, width, stride=1, padding=width // 2) / weight.clamp_min(1e-6) * region


class Autoencoder(UNet):
    """The U-Net with nothing passed across: all that it draws has gone through its coarsest map."""

    def features(self, image: Tensor) -> Tensor:
        maps = [self.down[0](image)]
        for block in self.down[1:]:
            maps.append(block(self.pool(maps[-1], 2)))
        x = maps.pop()
        for block, lost in zip(reversed(self.up), reversed(maps), strict=True):
            x = F.interpolate(x, size=lost.shape[2:], mode=self.mode, align_corners=False)
            x = block(torch.cat([torch.zeros_like(lost), x], dim=1))
        return x


GENTLE = Augment(rotate=8, scale=0.1, shift=0.05, gamma=0.2, contrast=0.1, brightness=0.1, noise=0, flip=True)


@dataclass
class Reconstruction(Method):
    """An autoencoder of healthy images: what it cannot redraw is abnormal.

    window  side in pixels of the square over which differences are averaged
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    rate: float = 3e-3
    window: int = 5
    augmentation: Augment = field(default_factory=lambda: GENTLE)

    inputs = 1
    """How many channels the network sees; a class attribute."""

    def network_of(self, **settings) -> nn.Module:
        return Autoencoder(**settings)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        settings = dict(inputs=inputs * self.inputs, classes=inputs, channels=self.channels, dims=dims)
        model = self.network_of(**settings)
        average = self.network_of(**settings).requires_grad_(False)
        average.load_state_dict(model.state_dict())
        return nn.ModuleDict({"model": model, "average": average})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return (nets["model"](labelled.images).float() - labelled.images).abs().mean()

    def healthy(self, nets: nn.ModuleDict, images: Tensor, region: Tensor) -> Tensor:
        """How the images (B, 1, H, W) would look in health; region (B, 1, H, W) bool is what is of interest."""
        return nets["average"](images).float()

    def anomaly(self, nets: nn.ModuleDict, images: Tensor, region: Tensor) -> Tensor:
        """(B, H, W) in 0 to 1: how far a pixel is from healthy; 0 outside the region (B, H, W)."""
        region = region[:, None]
        return 1 - torch.exp(-self.difference(images, self.healthy(nets, images, region), region))[:, 0]

    def difference(self, images: Tensor, others: Tensor, region: Tensor) -> Tensor:
        return smooth((images - others).abs(), region, self.window)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 2, H, W): normal, abnormal; the whole image is of interest."""
        abnormal = self.anomaly(nets, images, torch.ones_like(images[:, 0], dtype=torch.bool))
        return torch.stack([1 - abnormal, abnormal], dim=1)


@dataclass
class AutoPaint(Reconstruction):
    """Inpainting that finds by itself what to paint over.

    count, sizes  of the random holes in training
    cell          side in pixels of the cells that are painted in turns
    share         the part of a region that is found in each round; rounds 0 finds nothing
    """

    count: int = 8
    sizes: tuple[float, float] = (3.0, 12.0)
    cell: int = 12
    share: float = 0.2
    rounds: int = 2

    inputs = 2

    def network_of(self, **settings) -> nn.Module:
        return UNet(**settings)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        hidden = holes(inside(labelled.labels), self.count, self.sizes)
        error = (nets["model"](covered(labelled.images, hidden)).float() - labelled.images).abs()
        return 6 * error[hidden].mean() + error[~hidden].mean()

    def healthy(self, nets: nn.ModuleDict, images: Tensor, region: Tensor) -> Tensor:
        net, clean = nets["average"], images
        for _ in range(self.rounds):
            difference = self.difference(images, repaint(net, clean, region, self.cell), region)
            clean = paint(net, images, find(difference, region, self.share))
        return repaint(net, clean, region, self.cell)


def inside(labels: Tensor) -> Tensor:
    """Where a label map shows a structure: the region of interest."""
    return (labels != 0) & (labels != IGNORE)


@dataclass(frozen=True)
class HealthyTask(CohortTask):
    """Only those who meet `keep` train, and everybody is scored; any structure of a label is the region of interest."""

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return super(CohortTask, self).val_patients

    @property
    def classes(self) -> int:
        return 2

    @property
    def structures(self) -> dict[int, str]:
        return {1: "region"}

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        return Samples(found.images, inside(found.labels).to(torch.uint8), found.case_of)


@torch.no_grad()
def anomaly_of(fitted, case: Case) -> list[dict]:
    """Mean anomaly of a case's region, and whether the patient is ill, that is, does not meet the task's `keep`.

    simulated  AUROC of the pixels of a planted opacity among those of the region, healthy patients only (else NaN)
    """
    task, method, nets = fitted.task, fitted.method, fitted.nets
    nets.load_state_dict(fitted.weights["last"])
    nets.eval()
    images, region = task.preparation.images(case), inside(task.preparation.labels(case))
    ill = not meets(case.attributes, task.keep)
    values = {"score": float(method.anomaly(nets, images, region)[region].mean()), "outcome": float(ill)}
    values["simulated"] = float("nan")
    if not ill:
        planted, opacity = plant(images, region, torch.Generator().manual_seed(zlib.crc32(case.case_id.encode())))
        found = method.anomaly(nets, planted, region)
        values["simulated"] = auroc(found[region].numpy(), opacity[region].numpy())
    return [evaluation.row(case, task.data.manifest.classes[1], **values)]


def plant(images: Tensor, region: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A cloudy disc of radius 6 to 10 pixels, one standard deviation bright, in each region: (images, where it is)."""
    batch, _, height, width = images.shape
    centre = torch.multinomial(region.flatten(1).float() + 1e-9, 1, generator=rng)
    radius = 6 + 4 * torch.rand(batch, 1, 1, generator=rng)
    down = torch.arange(height).view(1, -1, 1) - (centre // width).view(-1, 1, 1)
    right = torch.arange(width).view(1, 1, -1) - (centre % width).view(-1, 1, 1)
    distance = (down**2 + right**2).sqrt() / radius
    cloud = F.avg_pool2d(torch.randn(batch, 1, height, width, generator=rng), 5, stride=1, padding=2)[:, 0]
    opacity = (distance <= 1) & region
    return images + (opacity * (1 - distance**2).clamp_min(0) * (1 + 2 * cloud))[:, None], opacity


HEALTHY = (("tuberculosis", False),)
CONTROL = (("group", "control"),)

recipe = Recipe(
    paper="autopaint",
    title="Painting over what looks abnormal",
    claim="The difference to an X-ray in which what looks abnormal was found and painted over tells tuberculosis from "
    "healthy lungs better than an autoencoder's reconstruction error.",
    arms={
        "reconstruction": Arm(Reconstruction()),
        "autopaint": Arm(AutoPaint()),
        "without finding": Arm(AutoPaint(rounds=0)),
    },
    compare=("autopaint", "reconstruction"),
    ablation=("autopaint", "without finding"),
    scales={
        "quick": Scale(HealthyTask("embedded", keep=CONTROL), Budget(steps=40, batch=8, checks=0), replicates=1),
        "full": Scale(HealthyTask("chest_xray", keep=HEALTHY, evaluation="test"), Budget(steps=300, batch=8, checks=0)),
    },
    metric="auc",
    score=anomaly_of,
    components=(
        Component(
            "inpainting of healthy anatomy", "implemented", "random ellipses and boxes around pixels of the lungs"
        ),
        Component(
            "finding and painting over",
            "implemented",
            "no code was found; our reading: the fifth of the lungs that differs most from its painted version is "
            "painted over, twice",
        ),
        Component("segmenting the difference", "implemented", "a map from 0 to 1, averaged over a case; no threshold"),
        Component(
            "the inpainting generator",
            "simplified",
            "a small U-Net that sees the mask as a second channel and learns by the L1 losses inside and outside of "
            "holes; the paper: partial convolutions with perceptual, style and smoothness losses",
        ),
        Component(
            "PET and CT of tumours",
            "absent",
            "no such images are at hand; chest X-rays with tuberculosis, known for a patient and not for a pixel",
        ),
    ),
)
