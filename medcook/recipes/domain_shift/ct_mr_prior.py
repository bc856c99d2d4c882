"""Cross-modality prior (Jiang, Hu, Tyagi, Zhang, Rimner, Deasy and Veeraraghavan, Medical Physics 2019).

Many labelled images of one modality, few of the other. A cycle-consistent GAN learns to show the former like the
latter, and a U-Net learns from the few real images and the many translated ones, whose labels are those of their
originals. So that a translation keeps the structures, the segmentation of translated images trains the translator too.
With x, y a source image and its labels, z a target image, G to the target and F back, U the segmentation network:

    adversary  least squares: z against G(x), and x against F(z)
    cycles     |F(G(x)) - x| + |G(F(z)) - z|
    structure  the loss of U(G(x)) against y, which moves G alone: U knows real target images, and G is to be read by it
    prior      afterwards U learns from the few real (z, y) and from (G(x), y)

and, as a measure of the translation, the Kullback-Leibler divergence of the brightness of G(x) from that of z.
The mechanism was developed on the embedded cohort; on ACDC one run of it and one of the few labels alone were looked
at, on fold 4, which is not scored.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.data.transforms import warp
from medcook.domains import DomainTask
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.networks import UNet
from medcook.recipes.domain_shift._settings import BASELINE, CHANNELS, scales
from medcook.recipes.imperfect_labels._adversarial import PatchJudge, frozen, played
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained
from medcook.tasks import Samples, prepare


@dataclass(frozen=True)
class BalancedTask(DomainTask):
    """Labelled samples of the few known target patients are repeated until they are as many as the source's."""

    @cached_property
    def _order(self) -> Tensor:
        """Numbers of the plain task's labelled samples, known target ones several times."""
        groups = super().samples("labelled").groups
        source, target = (groups == 0).nonzero()[:, 0], (groups == 1).nonzero()[:, 0]
        more = len(source) - len(target)
        if not len(target) or more <= 0:
            return torch.arange(len(groups))
        return torch.cat([source, target, target[torch.arange(more) % len(target)]])

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        if role != "labelled":
            return found
        order = self._order
        return Samples(found.images[order], found.labels[order], found.case_of[order], groups=found.groups[order])


class Translator(nn.Module):
    """An image (B, C, H, W) as another modality would show it: a small U-Net says what to add."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        self.net = UNet(inputs=inputs, classes=inputs, channels=channels)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.net(images).float()


def histogram(images: Tensor, bins: int = 64, low: float = -4.0, high: float = 4.0) -> Tensor:
    """Shares (bins,) float64 of an image's brightness, in standard deviations; what lies beyond counts at the ends.

    Half a count more in each bin, so that none is empty.
    """
    counts = torch.histc(images.float().clamp(low, high), bins, low, high).double() + 0.5
    return counts / counts.sum()


def divergence(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence of shares p (bins,) from q (bins,), in nats."""
    return float((p * (p / q).log()).sum())


@dataclass
class CrossModality(Method):
    """Translated source images beside the few real target ones.

    translator  widths of the two translators; none: source images are shown as they are
    game        the translators learn up to this share of the steps, and the segmentation network from them after it
    cycle       weight of the cycles
    structure   weight of the segmentation of translated images, for the translator
    """

    channels: tuple[int, ...] = CHANNELS
    translator: tuple[int, ...] = (8, 16, 32)
    game: float = 0.5
    cycle: float = 0.5
    structure: float = 5.0

    uses_unlabelled = True
    axes = 2
    trial = BalancedTask("embedded", look="dark blood", known=1)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` segment; `there` and `back` translate, and a judge knows each modality."""
        nets = super().build(inputs, classes, dims)
        if self.translator:
            nets["there"], nets["back"] = (Translator(inputs, self.translator) for _ in range(2))
            nets["judge there"], nets["judge back"] = PatchJudge(inputs), PatchJudge(inputs)
        return nets

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Images and labels are moved; intensities change in the step, after the translation."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        return batch._replace(images=images, labels=labels)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Up to `game`: the few real images, and the translators; from then on: real images and translated ones."""
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        groups = torch.zeros(len(labelled.labels)) if labelled.groups is None else labelled.groups
        (real, told), (source, labels) = ((labelled.images[groups == k], labelled.labels[groups == k]) for k in (1, 0))
        loss = torch.zeros((), device=source.device)
        if self.translator and now.fraction < self.game:
            if len(source):
                loss = self.play(nets, source, labels, unlabelled.images[: len(source)])
        elif len(source):
            real, told = torch.cat([real, self.translated(nets, source)]), torch.cat([told, labels])
        if len(real):
            loss = loss + self.segmentation(nets["model"](self.augmentation.intensity(real, rng)), told)
        return loss

    def segmentation(self, logits: Tensor, labels: Tensor) -> Tensor:
        return find_loss(self.loss)(logits.float(), labels)

    def play(self, nets: nn.ModuleDict, source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """What the translators learn from source images (B, C, H, W), their labels, and target images."""
        made, unmade = nets["there"](source), nets["back"](target)
        again = nets["back"](made), nets["there"](unmade)
        cycles = (again[0] - source).abs().mean() + (again[1] - target).abs().mean()
        games = [*played(nets["judge there"], target, made), *played(nets["judge back"], source, unmade)]
        loss = self.cycle * cycles + sum(games)
        if self.structure:
            loss = loss + self.structure * self.segmentation(frozen(nets["model"], made), labels)
        return loss

    @torch.no_grad()
    def translated(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Prepared source images (B, C, H, W) as the segmentation network sees them."""
        return nets["there"](images) if self.translator else images


SHOWN = 8
"""How many patients of each side the brightness is compared on."""


@torch.no_grad()
def brightness(fitted) -> float:
    """Divergence of translated source images from target images; of a method that translates nothing, of the source."""
    task, nets = fitted.task, trained(fitted)
    sides = task.source_patients[:SHOWN], task.target_patients[:SHOWN]
    source, target = (prepare(task.data, task.preparation, patients).images for patients in sides)
    if isinstance(fitted.method, CrossModality):
        source = torch.cat([fitted.method.translated(nets, part) for part in source.split(16)])
    return divergence(histogram(source), histogram(target))


def prior_rows(fitted, case: Case) -> list[dict]:
    """The usual table, and in every row the run's `divergence`, see `brightness`."""
    found = once(fitted, "brightness", lambda: brightness(fitted))
    rows = evaluation.score_case(fitted.predict(case), case, fitted.task.structures)
    return [row | {"divergence": found} for row in rows]


TARGET_ALONE = {"sides": "target"}

recipe = Recipe(
    paper="ct-mr-prior",
    title="Labelled images of one modality, translated into another",
    claim="Where two patients of another contrast have labels, source images that a structure-aware GAN has translated "
    "raise Dice above plain augmentation of the two.",
    arms={
        "few target labels": Arm(BASELINE, TARGET_ALONE),
        "cross-modality prior": Arm(CrossModality()),
        "without structure": Arm(CrossModality(structure=0.0)),
        "untranslated": Arm(CrossModality(translator=())),
    },
    compare=("cross-modality prior", "few target labels"),
    ablation=("cross-modality prior", "without structure"),
    replicate="fold",
    score=prior_rows,
    scales=scales(
        BalancedTask("embedded", look="dark blood", known=1),
        BalancedTask("acdc", look="dark blood", known=2),
        "few target labels",
        "cross-modality prior",
        "without structure",
    ),
    published={"Dice, lung tumours on T2-weighted MR": 0.75, "Kullback-Leibler divergence, pseudo and real MR": 0.069},
    source="the abstract, and that of the same authors' tumour-aware adversarial domain adaptation (MICCAI 2018); "
    "neither the full text nor code was at hand",
    components=(
        Component(
            "GAN from CT to pseudo MR",
            "implemented",
            "cycle-consistent, with two translators (U-Nets of 8 to 32 channels that say what to add to the image) "
            "and two small patch judges. One optimiser: judges learn from constant fakes, translators through judges "
            "with constant weights. It learns in the first half of the steps and stays as it is in the second. The "
            "weight of the cycles is 0.5: at 5 the translators kept to the image that they were given",
        ),
        Component(
            "structure-aware loss",
            "simplified",
            "of the MICCAI paper's abstract we know that a tumour-aware loss keeps tumours on synthesised images: here "
            "the segmentation loss of the translated image against the source's labels, through a segmentation network "
            "with constant weights that meanwhile learns from the few real target images; no loss on features",
        ),
        Component(
            "training data augmented by pseudo MR",
            "implemented",
            "half of each batch are real images, over and over those of two patients, half are translated ones; plain "
            "augmentation is on top, for every arm alike. The paper has 6 real and 377 translated patients",
        ),
        Component("U-Net with batch normalisation", "implemented", "the chapter's, in two dimensions"),
        Component(
            "Kullback-Leibler divergence of intensities",
            "implemented",
            "of translated source images from real target ones, both of training patients, in nats over 64 bins: the "
            "column `divergence`; the paper does not say, in what we read, over which bins",
        ),
        Component(
            "CT and MR of lung tumours",
            "simplified",
            "heart MR, and a simulated scanner shows the target: what is bright becomes dark and what is of middle "
            "brightness bright. Anatomy and resolution are the same on both sides, which makes translation easier",
        ),
        Component(
            "other cross-modality methods and segmentation networks", "absent", "the ablation is a plain cycle GAN"
        ),
        Component("tumour growth over time", "absent", "no repeated scans are at hand"),
    ),
)
