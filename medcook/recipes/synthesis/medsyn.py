"""MedSyn (Xu, Sun, Peng, Jia, Morrison, Perer, Zandifar, Visweswaran, Eslami and Batmanghelich, IEEE TMI 2024).

Volumes from text by diffusion, in which there is anatomy and not just texture: a low-resolution volume is made first,
from the text, and a second diffusion adds the detail; both make masks of structures as further channels of the volume.

  volume       x = (image, one mask a structure, -1 outside and 1 inside);   x_low = means over blocks of 4 x 4 x 4
  low stage    E |f(noised x_low, t, text) - x_low|^2,  the text is left out in a tenth of the cases
  super-res.   E |g(noised x, t, u) - x|^2,  u = enlarged (1 - a) x_low + a e,  a uniform below 0.4, e normal
  sampling     f(none) + w (f(text) - f(none)), w = 2, in steps of DDIM; then g, with what the first stage made as u

Here sentences say how large a hippocampus is, and how large its first part. A segmenter that has only ever seen real
volumes looks for the anatomy in those that were made: X_1, ... X_k is what it finds where the sentence is that of a
held-out patient, Y the patient's own mask.

  anatomy      mean Dice(X_i, Y);     alike = mean Dice(X_i, X_j), i < j:  1 where one shape is made for all

Neither reaches 1 with real volumes: of the same sentence, the anatomy of other patients has a Dice of about 0.6.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Moment, own_generator
from medcook.preparation import zscore
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._denoiser import Denoiser, guided
from medcook.recipes.synthesis._diffusion import Diffusion
from medcook.recipes.synthesis._painting import painted, shares
from medcook.recipes.synthesis._sentences import EMPTY, SENTENCES, Facts, Text
from medcook.recipes.synthesis._settings import scales
from medcook.recipes.volumes._settings import CHANNELS
from medcook.synthesis import Synthesising
from medcook.tasks import Budget, VolumeTask

FACTOR = 4
"""How much longer each side is after the second stage; from 64 to 256 in the paper."""
SPOILT = 0.4
"""Most of the noise that the second stage gets to see in a low-resolution volume, as in the official code."""
DIFFUSION = Diffusion(target="image")
STEPS, FINE_STEPS = 10, 6
"""Steps of DDIM where there is a text, and in the second stage; 50 and 20 in the official code."""


def reduced(volumes: Tensor) -> Tensor:
    """(B, C, *size) to (B, C, *size / 4): means over blocks."""
    return F.avg_pool3d(volumes, FACTOR)


def enlarged(volumes: Tensor) -> Tensor:
    """(B, C, *size) to (B, C, *size * 4): each voxel becomes a block."""
    return F.interpolate(volumes, scale_factor=FACTOR, mode="nearest")


def spoilt(low: Tensor) -> Tensor:
    """Volumes (B, C, *size) with some noise, each its own share: the second stage learns to mend the first's errors."""
    share = SPOILT * torch.rand(len(low), 1, 1, 1, 1, device=low.device)
    return (1 - share) * low + share * torch.randn_like(low)


def keeping(known: Tensor, where: slice) -> Callable[[Tensor, int], Tensor]:
    """For the sampler: the channels `where` are always those of `known` (B, C, *size)."""

    def change(clean: Tensor, t: int) -> Tensor:
        clean = clean.clone()
        clean[:, where] = known[:, where]
        return clean

    return change


class Cascade(nn.Module):
    """Diffusion of volumes (B, images + structures, *size) from text: at once, or at low resolution (widths `low`) and
    then in detail (widths `fine`)."""

    def __init__(self, images: int, structures: int, low: tuple[int, ...], fine: tuple[int, ...], width: int = 32):
        super().__init__()
        self.images, self.structures = images, structures
        self.facts, self.text = Facts(), Text(width)
        both = images + structures
        self.low = Denoiser(both, both, low, tokens=width, fold=1, dims=3) if low else None
        inputs, tokens = (2 * both, 0) if low else (both, width)
        self.fine = Denoiser(inputs, both, fine, tokens=tokens, fold=2, dims=3)

    def volumes(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, images + structures, *size) of images (B, C, *size) and labels (B, *size)."""
        return torch.cat([images, painted(labels, self.structures + 1)], dim=1) if self.structures else images

    def loss(self, volumes: Tensor, numbers: Tensor) -> Tensor:
        """Of all stages, with the sentences (B,) of volumes."""
        tokens = self.text(numbers)
        if self.low is None:
            return DIFFUSION.loss(lambda x, t: self.fine(x, t, tokens=tokens), volumes)
        low = reduced(volumes)
        maps = enlarged(spoilt(low))
        first = DIFFUSION.loss(lambda x, t: self.low(x, t, tokens=tokens), low)
        return first + DIFFUSION.loss(lambda x, t: self.fine(x, t, maps=maps), volumes)

    def paint(self, numbers: Tensor, size: tuple[int, ...], guidance: float, known: Tensor | None = None) -> Tensor:
        """Volumes (B, images + structures, *size) for sentences (B,), with noise from torch's own generator.

        known  (B, images + structures, *size): its masks stand, and an image is made to them
        """
        empty = torch.full_like(numbers, EMPTY)
        tokens = self.text(torch.cat([empty, numbers]))
        start = torch.randn(len(numbers), self.images + self.structures, *size, device=numbers.device)
        masks = slice(self.images, None)
        change = None if known is None else keeping(known, masks)
        if self.low is None:
            return DIFFUSION.sample(lambda x, t: guided(self.fine, x, t, tokens, guidance), start, STEPS, change)
        small = torch.randn_like(reduced(start))
        change_small = None if known is None else keeping(reduced(known), masks)
        low = DIFFUSION.sample(lambda x, t: guided(self.low, x, t, tokens, guidance), small, STEPS, change_small)
        maps = enlarged(low)
        return DIFFUSION.sample(lambda x, t: self.fine(x, t, maps=maps), start, FINE_STEPS, change)


@dataclass
class MedSyn(Synthesising):
    """A generator of volumes from sentences, and a segmenter that sees real volumes alone, to look at what was made.

    making     in how many steps volumes are made, `volumes` in each, for one sentence after the other
    joint      masks are made along with the image; False: the image alone
    low, fine  widths of the two stages' networks; without `low` there is one stage, which gets the text
    guidance   w
    left_out   how often a volume's text is left out in training, which guidance needs
    """

    channels: tuple[int, ...] = CHANNELS
    making: int = 6
    mixed: float = 0.0
    pretext_rate: float = 4e-3
    augmentation: Augment = field(default_factory=lambda: MILD)
    volumes: int = 6
    joint: bool = True
    low: tuple[int, ...] = (32, 64)
    fine: tuple[int, ...] = (16, 32, 64)
    guidance: float = 2.0
    left_out: float = 0.1

    axes = 3
    uses_unlabelled = False

    def generator(self, inputs: int, classes: int) -> nn.Module:
        return Cascade(inputs, (classes - 1) * self.joint, self.low, self.fine)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """None: sentences are about true sizes. What the segmenter sees is moved in `supervised`."""
        return batch

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """Real volumes, moved and with another brightness: the same in every arm."""
        rng = own_generator()
        images, labels = self.augmentation(labelled.images, labelled.labels, rng)
        images = images.contiguous(memory_format=torch.channels_last_3d)
        return super(Synthesising, self).supervised(nets, labelled._replace(images=images, labels=labels), now)

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        generator = nets["generator"]
        generator.facts.see(labelled.labels)
        numbers = self.told(generator.facts.number(labelled.labels))
        return generator.loss(generator.volumes(labelled.images, labelled.labels), numbers)

    def told(self, numbers: Tensor) -> Tensor:
        """The sentences (B,) that a step of training tells of volumes with these sentences."""
        left_out = torch.rand(len(numbers), device=numbers.device) < self.left_out
        return torch.where(left_out, EMPTY, numbers)

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        """Volumes for the sentences whose turn it is, prepared as any scan is, and the labels that their masks give."""
        generator, device = nets["sampler"], labelled.images.device
        numbers = (len(nets["made"]) + torch.arange(self.volumes, device=device)) % len(SENTENCES)
        volumes = generator.paint(numbers, labelled.images.shape[2:], self.guidance)
        images, masks = volumes[:, : generator.images], volumes[:, generator.images :]
        return torch.stack([zscore(image) for image in images]), shares(masks).argmax(1)


def likeness(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`anatomy` and `alike` of the module, of masks found (k, *size) and a patient's own; one mask is like itself."""
    pairs = [metrics.dice(one, other) for one, other in combinations(found, 2)]
    return {
        "anatomy": float(np.mean([metrics.dice(mask, truth) for mask in found])),
        "alike": float(np.mean(pairs)) if pairs else 1.0,
    }


@torch.no_grad()
def anatomy_rows(fitted, case: Case) -> list[dict]:
    """One row a structure, on the grid that the networks see: of the volumes made for the sentence that is true of a
    case's labels.

    anatomy, alike  of what the segmenter finds, see the module
    agreement       mean Dice of what it finds with the masks that were made along; none where no masks are made
    obeyed          share of a sentence's two sizes that are true of what it finds; by chance a third
    """
    task, method = fitted.task, fitted.method
    truth = task.preparation.labels(case)
    fitted.nets.load_state_dict(fitted.weights["last"])
    facts, made = fitted.nets["sampler"].facts, fitted.nets["made"]
    number = facts.number(truth)
    mine = torch.arange(int(number), len(made), len(SENTENCES))
    found, own = fitted.answer(made.images[mine]).argmax(1), made.labels[mine]
    obeyed = float((facts.levels(found) == facts.levels(truth)).float().mean())
    rows = []
    for value, name in task.structures.items():
        masks = (found == value).numpy()
        agree = [metrics.dice(mask, made) for mask, made in zip(masks, (own == value).numpy(), strict=True)]
        agreement = float(np.mean(agree)) if method.joint else float("nan")
        measures = likeness(masks, (truth[0] == value).numpy())
        rows.append(evaluation.row(case, name, **measures, agreement=agreement, obeyed=obeyed))
    return rows


ONE_STAGE = (16, 48, 96)
"""Widths of a single stage: as many parameters as two stages have, and a step costs nearly as much."""
BUDGET = Budget(steps=220, batch=4, checks=2)
"""126 steps of a generator, 6 of making and 88 of the segmenter."""

recipe = Recipe(
    paper="medsyn",
    title="Volumes from text, in two stages and with their anatomy",
    claim="In volumes made in two stages and along with masks, a segmenter of real volumes finds anatomy more like "
    "that of the patients described than in those of a single text-guided diffusion of the image.",
    arms={
        "one stage": Arm(MedSyn(joint=False, low=(), fine=ONE_STAGE)),
        "medsyn": Arm(MedSyn()),
        "without joint anatomy": Arm(MedSyn(joint=False)),
        "one stage, joint": Arm(MedSyn(low=(), fine=ONE_STAGE)),
    },
    compare=("medsyn", "one stage"),
    ablation=("medsyn", "without joint anatomy"),
    replicate="fold",
    metric="anatomy",
    score=anatomy_rows,
    scales=scales(
        VolumeTask("embedded"),
        VolumeTask("hippocampus"),
        "one stage",
        "medsyn",
        "without joint anatomy",
        budget=BUDGET,
    ),
    source="official code, github.com/batmanlab/MedSyn (src/train_low_res.py, train_super_res.py, eval_super_res.py, "
    "conditional_generalization.py); abstract, arXiv 2310.03559",
    components=(
        Component(
            "text guidance",
            "implemented",
            "the low stage's deepest map attends to words, which a tenth of the volumes go without, and guidance is 2: "
            "as in the official code. There a language model tuned on reports gives 768 numbers a word; here words "
            "have 32 each, learnt along",
        ),
        Component(
            "radiology reports",
            "simplified",
            "a sentence of two facts, each small, medium or large: how much is labelled, and the first structure's "
            "share. Bounds are thirds of the training patients. Hippocampi come without reports",
        ),
        Component(
            "low resolution first",
            "implemented",
            "8 x 14 x 10, then 32 x 56 x 40: the paper's factor of 4. Both learn in the same steps, each from real "
            "volumes; the second sees all of a volume, where the official code takes crops, and no text, as in its "
            "sampler. Low resolution is a mean over blocks, there every fourth voxel. Steps of DDIM are 10 and 6, "
            "there 50 and 20. A single stage has as many parameters and 10 steps; an arm that `full` does not run "
            "makes masks in it",
        ),
        Component(
            "masks along with the image",
            "implemented",
            "in both stages, one channel a structure. There masks come from three networks for lobes, airways and "
            "vessels, here from experts. The loss is a mean over channels, so an image alone counts three times "
            "as much",
        ),
        Component(
            "images for given anatomy",
            "implemented",
            "masks stand in each step of both samplers, as in the official code for the low stage; no arm uses it",
        ),
        Component(
            "modified U-Net",
            "absent",
            "the chapter's small network with convolutions along all axes, which gives the clean volume as there. It "
            "folds pixels in the full volume, and leaves a fine grid in what is made",
        ),
        Component(
            "anatomical features retained",
            "simplified",
            "two parts of the hippocampus in place of fissures, airways and vessels, found by a network that learnt "
            "from real volumes. All was looked at on fold 4, which is not scored, one run each. An energy score was "
            "tried first, and gave noise nearly as much as real volumes; so the mean Dice was taken, with `alike` to "
            "tell a generator that always makes the same. It was 0.58 for real volumes of the same sentence, 0.47 for "
            "two stages with masks, 0.30 for one stage; alike 0.65, 0.47 and 0.26. In a trial of 250 steps two stages "
            "did no worse without masks than with them (a Jaccard index of 0.39 and 0.36). What two stages make is "
            "blurred, but hippocampi can be seen in it; one stage makes texture. Masks made along are too small, and "
            "at times missing. A low stage that predicts the velocity left noise, and no anatomy, after 140 steps",
        ),
        Component("GANs and other diffusion models", "simplified", "a diffusion in one stage, of the image alone"),
        Component("high-resolution CT of lungs", "absent", "hippocampi in MR, with 167 training patients a fold"),
        Component("downstream tasks", "absent", "made volumes are looked at and train nobody"),
    ),
)
