"""Masks from captions: an image-text model of whole images, its saliency, the small SAM, weak supervision.

The X-rays have one finding each, drawn as in `_findings.py`, and its description is the image's caption. Nobody shows a
mask. An image-text model learns which caption belongs to which image; where a sentence comes from in an image is its
saliency; the saliency becomes a box, with which the book's small SAM is asked. Its masks of training images, in turn,
train a U-Net. See medclip_sam.py and medclip_samv2.py.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medcook import evaluation
from medcook.data import Case
from medcook.data.transforms import Augment, warp
from medcook.errors import MedcookError
from medcook.language import TextEncoder, one_of, shown_in
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.methods.method import follow, own_generator
from medcook.networks import UNet
from medcook.networks.unet import DoubleConv
from medcook.pretraining import Pretrained, Projector, TwoPhases, fresh, nothing
from medcook.recipes.language._findings import (
    FIELDS,
    FINDINGS,
    KINDS,
    SIDES,
    Finding,
    FindingsTask,
    Painted,
    Spoken,
    fields_of,
    measures,
    shape_of,
    value_of,
)
from medcook.recipes.language._settings import CHANNELS, MILD
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.sampling import trained
from medcook.synthesis import Bank
from medcook.tasks import Budget

BRIGHT = (1.2, 1.8)
"""Of a finding, in standard deviations of the image."""
NOTHING = "no finding"
"""The caption of an image without a finding."""


def one_drawn(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) with a large finding in its lungs (H, W), if there are any, and its label map (H, W)."""
    image, label, places = image.copy(), np.zeros(image.shape, np.uint8), fields_of(lungs)
    kind, side, place = (part[rng.integers(len(part))] for part in (KINDS, SIDES, FIELDS))
    finding = Finding(kind, "large", side, place)
    cells = np.argwhere(places[finding.side, finding.field])
    if len(cells):
        bright, mask = shape_of(finding, tuple(cells[rng.integers(len(cells))]), image.shape, rng)
        image += rng.uniform(*BRIGHT) * bright
        label[mask] = value_of(finding)
    return image, label


@dataclass(frozen=True)
class OnePainted(Painted):
    """A preparation after which one finding is drawn into every image, in several ways."""

    def both(self, case: Case) -> tuple[Tensor, Tensor]:
        images, organs = super(Painted, self).images(case), super(Painted, self).labels(case)
        rng = np.random.default_rng(crc32(f"one finding of {case.case_id}".encode()))
        pairs = [
            one_drawn(image[0].numpy(), organ.numpy() > 0, rng)
            for image, organ in zip(images, organs, strict=True)
            for _ in range(self.versions)
        ]
        painted, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return painted[:, None].float(), labels


@dataclass(frozen=True)
class OneFindingTask(FindingsTask):
    """X-rays with one finding each, which is what their captions speak of."""

    @cached_property
    def preparation(self) -> OnePainted:
        plain = super().preparation
        return OnePainted(**{part.name: getattr(plain, part.name) for part in fields(Painted)})


class ImageText(nn.Module):
    """Images (B, C, H, W) and sentences to vectors (B, width) of one space.

    The image's vector is linear in the highest values of its cells: a finding is small. Batch normalisation before it
    keeps images apart, as in projection heads: without it, both encoders stayed where all vectors are the same.
    """

    def __init__(self, inputs: int, channels: tuple[int, int, int] = (12, 24, 48), cells: int = 96, width: int = 64):
        super().__init__()
        first = nn.Conv2d(inputs, channels[0], 5, stride=2, padding=2, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(channels[0]), nn.ReLU())
        self.near = DoubleConv(channels[0], channels[1], 2)
        last = nn.Conv2d(channels[1], channels[2], 1, bias=False)
        self.last = nn.Sequential(last, nn.BatchNorm2d(channels[2]), nn.ReLU())
        self.wide = nn.Conv2d(channels[-1], cells, 1)
        self.places = nn.Parameter(0.02 * torch.randn(1, cells, 16, 16))
        self.mix = nn.Sequential(nn.ReLU(), nn.Conv2d(cells, cells, 1), nn.ReLU())
        self.spread, self.see = nn.BatchNorm1d(cells), nn.Linear(cells, width)
        self.text, self.hear = TextEncoder(width), Projector(width, width, width)

    def maps(self, images: Tensor) -> Tensor:
        """(B, channels[-1], H / 4, W / 4): features that do not know their place yet, each of 15 x 15 pixels."""
        return self.last(F.max_pool2d(self.near(self.stem(images)), 2))

    def cells(self, maps: Tensor) -> Tensor:
        """(B, cells, H / 4, W / 4): features that know it."""
        places = F.interpolate(self.places, maps.shape[2:], mode="bilinear", align_corners=False)
        return self.mix(self.wide(maps) + places)

    def pooled(self, cells: Tensor) -> Tensor:
        """Unit vectors (B, width) float32."""
        return F.normalize(self.see(self.spread(cells.flatten(2).float().amax(2))).float(), dim=1)

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, width) of images."""
        return self.pooled(self.cells(self.maps(images)))

    def texts(self, sentences: tuple[str, ...]) -> Tensor:
        """Unit vectors (B, width) of sentences."""
        return F.normalize(self.hear(self.text(sentences)).float(), dim=1)


def same_captions(captions: tuple[str, ...]) -> Tensor:
    """(B, B) bool: where two images have the very same caption; none is the other's negative."""
    return torch.tensor([[one == other for other in captions] for one in captions])


def info_nce(similarity: Tensor, same: Tensor) -> Tensor:
    """The two-way contrastive loss of similarities (B, B), divided by a temperature; row b's partner is column b.

    CLIP's loss: each is to be found among all of the batch, the partner included. `same` (B, B) are no negatives.
    """
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    found = [each.masked_fill(others, -torch.inf).log_softmax(1).diag() for each in (similarity, similarity.T)]
    return -torch.cat(found).mean()


def dhn_nce(similarity: Tensor, same: Tensor, hard: float) -> Tensor:
    """Decoupled hard negative NCE of similarities (B, B), divided by a temperature; row b's partner is column b.

    Decoupled: the partner is not among those that it is told from. Hard: negative j of row b weighs
    N exp(hard s_bj) / sum_k exp(hard s_bk), N their number, so that what looks alike counts more. The mean over both
    ways; rows without negatives are left out.
    """
    losses = []
    for each in (similarity, similarity.T):
        some = (~same).any(1)
        if some.any():
            weight = (hard * each[some]).masked_fill(same[some], -torch.inf).log_softmax(1)
            many = (~same)[some].sum(1, keepdim=True).log()
            losses.append((each[some] + weight + many).logsumexp(1) - each.diag()[some])
    return torch.cat(losses).mean() if losses else 0.0 * similarity.sum()


def unit(maps: Tensor) -> Tensor:
    """Maps (..., H, W), scaled to 0 .. 1 each; a flat one becomes zeros."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-6)


def larger(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) on a finer grid."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask (H, W) bool; an empty one stays so."""
    parts, count = ndimage.label(mask)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1 if count else mask


@lru_cache(maxsize=1)
def small_sam() -> Predictor:
    """The book's small SAM, frozen, the same in every run; loading it leaves no trace in the random numbers."""
    with torch.random.fork_rng():
        return Predictor(load_small(), zoom=False)


def asked_with_box(image: np.ndarray, rough: np.ndarray) -> np.ndarray:
    """(H, W) bool: SAM's answer to the box of a rough mask (H, W); the box of the whole image where it is empty."""
    box = box_of(rough if rough.any() else np.ones_like(rough))
    return small_sam()(image.astype(np.float32), Prompt(box=box)).mask


@dataclass
class FromCaptions(Pretrained):
    """An image-text model learns from captions for `share` of the steps. A subclass says what saliency is (`saliency`)
    and how it becomes a rough mask (`rough`); SAM answers to the box of that.

    weak        a U-Net learns from SAM's masks of training images, made in the last `making` steps of captions, in the
                steps that are left, and answers. Else nothing happens in these, which then come first
    refined     False: the rough mask is the answer, and SAM is not asked
    contrast    the loss: `dhn-nce` or `info-nce`;   hard: of DHN-NCE, beta;   heat: the temperature
    together    images of each batch for which masks are made, and that the U-Net sees
    """

    channels: tuple[int, ...] = CHANNELS
    share: float = 0.7
    pretext_rate: float = 2e-3
    augmentation: Augment = field(default_factory=lambda: MILD)
    language: Spoken = Spoken()
    weak: bool = False
    refined: bool = True
    contrast: str = "dhn-nce"
    hard: float = 0.15
    heat: float = 0.1
    making: int = 16
    together: int = 12

    uses_unlabelled = False
    axes = 2
    trial = OneFindingTask("embedded", labelled=2, versions=1)

    def saliency(self, net: ImageText, image: Tensor, sentence: str) -> Tensor:
        """(H, W), 0 to 1: how much of what the sentence says comes from each pixel of an image (1, C, H, W)."""
        raise NotImplementedError

    def rough(self, image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
        """(H, W) bool of an image and its saliency, both (H, W)."""
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`captions` learns from captions, `average` is its average; with a U-Net there are `model` and `mean`, too."""
        if dims != 2:
            raise MedcookError("Captions are of images, not of volumes.", "Take a task of slices.")
        net = ImageText(inputs)
        nets = nn.ModuleDict({"captions": net, "average": fresh(net)})
        if self.weak:
            nets["model"] = UNet(inputs=inputs, classes=2, channels=self.channels)
            nets["mean"], nets["made"] = fresh(nets["model"]), Bank()
        nets.classes = classes
        return nets

    def phase(self, now: Moment) -> tuple[bool, Moment]:
        """Without a U-Net, the steps without captions come first."""
        if self.weak:
            return super().phase(now)
        first = self.first(now.steps)
        waits = now.steps - first
        return now.step >= waits, Moment(max(now.step - waits, 0), first)

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """As ever; the optimiser forgets where the second phase begins, whichever that is."""
        optimiser, first = AdamW(trained, lr=1.0, weight_decay=self.decay, fused=True), self.first(steps)
        change = first if self.weak else steps - first
        return optimiser, TwoPhases(optimiser, lambda step: self.rate_at(Moment(step, steps)), change)

    def captions(self, labels: Tensor) -> tuple[str, ...]:
        """One sentence for each of label maps (B, H, W), of which nothing but the values that they show is used."""
        there = [shown_in(label) for label in labels]
        forms = tuple(range(len(self.language.forms)))
        return tuple(self.language.full(FINDINGS[one_of(v) - 1], one_of(forms)) if v else NOTHING for v in there)

    def learning(self, now: Moment) -> bool:
        """Whether captions are learnt in a step of their phase; afterwards masks are made."""
        return not self.weak or now.step < max(1, now.steps - self.making)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        is_captions, then = self.phase(now)
        if is_captions and self.learning(then):
            return self.match(nets["captions"], labelled.images, self.captions(labelled.labels))
        if is_captions:
            self.make(nets, labelled)
        return nothing() if is_captions or not self.weak else self.supervised(nets, labelled, then)

    def match(self, net: ImageText, images: Tensor, captions: tuple[str, ...]) -> Tensor:
        """The contrastive loss of images (B, C, H, W) and their captions."""
        similarity = net.images(images) @ net.texts(captions).T / self.heat
        same = same_captions(captions).to(similarity.device)
        with torch.autocast(similarity.device.type, enabled=False):
            similarity = similarity.float()
            return info_nce(similarity, same) if self.contrast == "info-nce" else dhn_nce(similarity, same, self.hard)

    def make(self, nets: nn.ModuleDict, batch: Batch) -> None:
        """Keep SAM's masks of some images of a batch, each asked for with its own caption."""
        images, captions = batch.images[: self.together], self.captions(batch.labels[: self.together])
        asked = [number for number, caption in enumerate(captions) if caption != NOTHING]
        masks = [self.mask(nets, images[number : number + 1], captions[number]) for number in asked]
        if asked:
            nets["made"].put(images[asked], torch.stack(masks).to(images.device))
        nets.train()

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """The U-Net's loss on pairs of the bank, moved anew."""
        if not len(nets["made"]):
            self.make(nets, labelled)
        images, masks = nets["made"].draw(self.together)
        images, masks = warp(images, masks, self.augmentation.grid(images, own_generator()))
        images = images.contiguous(memory_format=torch.channels_last)
        return find_loss(self.loss)(nets["model"](images).float(), masks)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        is_captions, then = self.phase(now)
        if is_captions and self.learning(then):
            follow(nets["average"], nets["captions"], then.decay(self.average))
        if not is_captions and self.weak:
            follow(nets["mean"], nets["model"], then.decay(self.average))

    def mask(self, nets: nn.ModuleDict, image: Tensor, sentence: str) -> Tensor:
        """(H, W) uint8: the zero-shot mask of a sentence in an image (1, C, H, W)."""
        with torch.autocast(image.device.type, enabled=False):
            found = self.saliency(nets["average"].eval(), image.float(), sentence).cpu().numpy()
        picture = image[0, 0].float().cpu().numpy()
        rough = self.rough(picture, found)
        return torch.from_numpy(asked_with_box(picture, rough) if self.refined else rough).to(torch.uint8)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        """Probabilities (B, S, H, W) float32 of sentences. The U-Net knows none: it finds what is there."""
        if self.weak:
            found = self.unet(nets, images)[:, None]
            return found.expand(-1, len(sentences), -1, -1)
        rows = [[self.mask(nets, image[None], sentence) for sentence in sentences] for image in images]
        return torch.stack([torch.stack(row) for row in rows]).float()

    def unet(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, H, W) float32: the probability of a finding that the U-Net sees."""
        return nets["mean"](images).float().softmax(1)[:, 1]

    def uncertainty(self, nets: nn.ModuleDict, images: Tensor) -> float:
        """How unsure the answer about an image (1, C, H, W) is, where somebody can tell."""
        return float("nan")

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, H, W): of the findings' descriptions the one that fits an image best is asked for."""
        names = tuple(self.language.name(value) for value in range(1, nets.classes))
        best = (nets["average"].images(images) @ nets["average"].texts(names).T).argmax(1).tolist()
        found = images.new_zeros(len(images), nets.classes, *images.shape[2:])
        for number, value in enumerate(best):
            found[number, 1 + value] = self.answer(nets, images[number : number + 1], (names[value],))[0, 0]
        found[:, 0] = 1 - found[:, 1:].sum(1)
        return found


@torch.no_grad()
def described_rows(fitted, case: Case) -> list[dict]:
    """A row for each kind of finding that a case shows, means over its images: each is asked for its finding.

    dice, iou, hit  of the answer, see `measures`
    tied            the similarity of image and description, -1 to 1;   uncertainty: see the method's
    """
    nets, method = trained(fitted), fitted.method
    images, labels = fitted.task.preparation.both(case)
    found: dict[str, list[dict]] = {}
    for image, label in zip(images, labels, strict=True):
        for value in shown_in(label):
            name, net = method.language.name(value), nets["average"]
            tied = float((net.images(image[None]) * net.texts((name,))).sum())
            answer = method.answer(nets, image[None], (name,))[0, 0]
            values = measures(answer.float().cpu().numpy(), (label == value).numpy()) | {"tied": tied}
            values["uncertainty"] = method.uncertainty(nets, image[None])
            found.setdefault(FINDINGS[value - 1].kind, []).append(values)
    kept = ("dice", "iou", "hit", "tied", "uncertainty")
    return [
        evaluation.row(case, kind, **{key: float(np.mean([one[key] for one in many])) for key in kept})
        for kind, many in found.items()
    ]


ONE = OneFindingTask("chest_xray", evaluation="test")
ONE_QUICK = OneFindingTask("embedded", versions=1)
BUDGET = Budget(steps=900, batch=24, checks=0)
