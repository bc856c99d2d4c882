"""Masks from captions: an image-text model of whole images, its saliency, the small SAM, weak supervision.

The X-rays have one finding each, drawn as in `_findings.py`, and its description is the image's caption. Nobody shows a
mask. An image-text model learns which caption belongs to which image; where a sentence comes from in an image is its
saliency; the saliency becomes a box, with which the book's small SAM is asked. Its masks of training images, in turn,
train a U-Net. See medclip_sam.py and medclip_samv2.py.
"""

from dataclasses import dataclass, field
from functools import lru_cache

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
from medcook.language import one_of, shown_in
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.methods.method import follow, own_generator
from medcook.networks import UNet
from medcook.pretraining import Pretrained, TwoPhases, fresh, nothing
from medcook.recipes.language._captions import NOTHING, CaptionNet, OneFindingTask, clip_loss, dhn_nce, same_captions
from medcook.recipes.language._findings import FINDINGS, Spoken, measures
from medcook.recipes.language._settings import CHANNELS, MILD
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.sampling import trained
from medcook.synthesis import Bank


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

    def saliency(self, net: CaptionNet, image: Tensor, sentence: str) -> Tensor:
        """(H, W), 0 to 1: how much of what the sentence says comes from each pixel of an image (1, C, H, W)."""
        raise NotImplementedError

    def rough(self, image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
        """(H, W) bool of an image and its saliency, both (H, W)."""
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`captions` learns from captions, `average` is its average; with a U-Net there are `model` and `mean`, too."""
        if dims != 2:
            raise MedcookError("Captions are of images, not of volumes.", "Take a task of slices.")
        net = CaptionNet(inputs)
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

    def match(self, net: CaptionNet, images: Tensor, captions: tuple[str, ...]) -> Tensor:
        """The contrastive loss of images (B, C, H, W) and their captions."""
        similarity = net.images(images) @ net.texts(captions).T / self.heat
        same = same_captions(captions).to(similarity.device)
        with torch.autocast(similarity.device.type, enabled=False):
            similarity = similarity.float()
            return clip_loss(similarity, same) if self.contrast == "info-nce" else dhn_nce(similarity, same, self.hard)

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
