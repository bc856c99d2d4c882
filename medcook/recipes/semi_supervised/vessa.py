"""VESSA: Vision-Language Enhanced Semi-supervised Segmentation Assistant (Guo, Li, Su et al., arXiv 2511.19759, 2025).

An assistant that segments by reference stands beside the student. Stage 1: given an image and templates with their
gold-standard masks, it matches features, turns the matches into prompts (how much a place looks like each class, and
where the templates have it), and decodes a mask. Stage 2: it also takes the student's prediction as a prompt, and its
mask joins the teacher's in the pseudo-label; the student gets better, so do its prompts, and so does the assistant.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, MeanTeacher, Moment
from medcook.methods.mean_teacher import squared_difference
from medcook.methods.semi_supervised import forgetful
from medcook.networks.unet import DoubleConv, UNet
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import scales


class Assistant(Protocol):
    """Whatever segments by reference and takes prompts: the template matcher below, or a promptable model."""

    classes: int

    def __call__(self, query: Tensor, templates: Tensor, masks: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Logits (B, classes, *size) of `query` (B, C, *size).

        templates, masks  (M, C, *size) and (M, *size) uint8, with `IGNORE` where a template says nothing
        prompt            (B, classes, *size) probabilities that somebody else suggests; 0 everywhere, or None: nobody
        """


class TemplateMatcher(nn.Module):
    """A small assistant: half the resolution of the image inside, a quarter where features are matched.

    channels  of the U-Net that makes features
    width     of a feature vector
    pixels    how many template pixels stand for a class, drawn anew every time
    """

    def __init__(
        self, *, inputs: int, classes: int, channels: tuple[int, ...], dims: int, width: int = 16, pixels: int = 64
    ):
        super().__init__()
        self.classes, self.pixels = classes, pixels
        self.encoder = UNet(inputs=inputs, classes=width, channels=channels, dims=dims)
        self.mode = self.encoder.mode
        self.decoder = nn.Sequential(
            DoubleConv(width + 4 * classes, width, dims), (nn.Conv2d if dims == 2 else nn.Conv3d)(width, classes, 1)
        )

    def forward(self, query: Tensor, templates: Tensor, masks: Tensor, prompt: Tensor | None = None) -> Tensor:
        """See `Assistant`."""
        encoded = self.encoder(halved(torch.cat([query, templates]))).float()
        mine, theirs = encoded.split([len(query), len(templates)])
        small, bank = halved(mine), halved(theirs)
        masks = F.interpolate(masks[:, None].float(), size=bank.shape[2:], mode="nearest")
        cues = torch.cat([self.semantic(small, bank, masks), self.spatial(small, bank, masks)], dim=1)
        cues = F.interpolate(cues, size=mine.shape[2:], mode=self.mode, align_corners=False)
        prompt = mine.new_zeros(len(mine), self.classes, *mine.shape[2:]) if prompt is None else halved(prompt)
        logits = self.decoder(torch.cat([mine, cues, prompt], dim=1)).float()
        return F.interpolate(logits, size=query.shape[2:], mode=self.mode, align_corners=False)

    def semantic(self, query: Tensor, templates: Tensor, masks: Tensor) -> Tensor:
        """Best and mean cosine similarity to the template pixels of every class: (B, 2 * classes, *size).

        query, templates  feature maps (B or M, width, *size); masks (M, 1, *size) labels on the same grid
        """
        pixels, bank = (F.normalize(part, dim=1).movedim(1, -1) for part in (query, templates))
        maps = []
        for value in range(self.classes):
            chosen = bank[masks[:, 0] == value]
            if not len(chosen):
                maps += [torch.zeros_like(query[:, 0])] * 2
                continue
            chosen = chosen[torch.randint(len(chosen), (self.pixels,)).to(chosen.device)]
            similarity = (pixels @ chosen.T).float()
            maps += [similarity.amax(-1), similarity.mean(-1)]
        return torch.stack(maps, dim=1)

    def spatial(self, query: Tensor, templates: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
        """Where templates that look alike as a whole have every class: (B, classes, *size), 0 to 1."""
        mine, theirs = (F.normalize(part.flatten(2).mean(2), dim=1) for part in (query, templates))
        weight = ((mine @ theirs.T).float() / temperature).softmax(1)
        value = torch.arange(self.classes, device=masks.device).view(-1, *[1] * (masks.ndim - 2))
        return torch.einsum("bm,mc...->bc...", weight, (masks == value).float())


@dataclass
class Vessa(MeanTeacher):
    """Mean teacher with an assistant, which trains on labelled pairs throughout and teaches from `start` on.

    sure       the assistant is heard where its largest probability reaches this
    templates  False: the templates say nothing, all else equal
    feedback   False: the assistant is not prompted by the student's moving average
    """

    sure: float = 0.8
    templates: bool = True
    feedback: bool = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """As always, and `assistant`, one level less deep; any trainable `Assistant` will do."""
        nets = super().build(inputs, classes, dims)
        nets["assistant"] = TemplateMatcher(inputs=inputs, classes=classes, channels=self.channels[:-1], dims=dims)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Stage 1: the assistant and the student learn the labels, side by side. Stage 2: the former also teaches."""
        bank = self.bank(labelled)
        supervised = super().training_step(nets, labelled, None, now) + self.rehearse(nets["assistant"], labelled, bank)
        if unlabelled is None or now.fraction < self.start:
            return supervised
        target = self.teach_together(nets, unlabelled.images, bank)
        with forgetful(nets["model"]):
            logits = nets["model"](self.view(unlabelled.images)).float()
        return supervised + self.rising(now) * squared_difference(logits, target).mean()

    def bank(self, labelled: Batch) -> tuple[Tensor, Tensor]:
        """Templates and their masks: the labelled images of the step."""
        masks = labelled.labels if self.templates else torch.full_like(labelled.labels, IGNORE)
        return labelled.images, masks

    def rehearse(self, assistant: Assistant, labelled: Batch, bank: tuple[Tensor, Tensor]) -> Tensor:
        """Stage 1: one half of the labelled images are templates of the other, and the other way round.

        A degraded ground truth stands in for the student's prediction; half of the images get no such prompt.
        """
        images, masks = bank
        losses = []
        for query, template in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            labels = labelled.labels[query]
            prompt = degraded(labels, assistant.classes)
            kept = (torch.rand(len(labels)) < 0.5).to(prompt).view(-1, *[1] * labels.ndim)
            logits = assistant(labelled.images[query], images[template], masks[template], prompt * kept).float()
            losses.append(find_loss(self.loss)(logits, labels))
        return sum(losses) / 2

    @torch.no_grad()
    def teach_together(self, nets: nn.ModuleDict, images: Tensor, bank: tuple[Tensor, Tensor]) -> Tensor:
        """Stage 2: the pseudo-label, to which the assistant adds what it is sure of, prompted by the teacher's own."""
        teacher = self.teach(nets, images)
        assistant = nets["assistant"](images, *bank, teacher if self.feedback else None).float().softmax(1)
        return fuse(teacher, assistant, self.sure)


def fuse(teacher: Tensor, assistant: Tensor, sure: float) -> Tensor:
    """The mean of both probability maps (B, classes, *size) where the assistant is sure, elsewhere the teacher's."""
    return torch.where(assistant.amax(1, keepdim=True) >= sure, (teacher + assistant) / 2, teacher)


def degraded(labels: Tensor, classes: int, clarity: float = 4.0, blobs: float = 3.0) -> Tensor:
    """Labels (B, *size) as probabilities of somebody who errs in patches of about eight voxels."""
    sides = [max(1, side // 8) for side in labels.shape[1:]]
    level = torch.rand(len(labels), 1, *[1] * len(sides)) * blobs
    noise = (torch.randn(len(labels), classes, *sides) * level).to(labels.device)
    noise = F.interpolate(noise, size=labels.shape[1:], mode="bilinear" if len(sides) == 2 else "trilinear")
    value = torch.arange(classes, device=labels.device).view(-1, *[1] * len(sides))
    return (clarity * (labels[:, None] == value) + noise).softmax(1)


def halved(maps: Tensor) -> Tensor:
    """Maps (B, C, *size) at half the resolution."""
    return F.interpolate(maps, scale_factor=0.5, mode="area")


recipe = Recipe(
    paper="vessa",
    title="A segmentation assistant that student and templates prompt",
    claim="With three labelled patients, an assistant guided by templates raises mean teacher's Dice.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "vessa": Arm(Vessa()),
        "without templates": Arm(Vessa(templates=False)),
        "without feedback": Arm(Vessa(feedback=False)),
    },
    compare=("vessa", "mean teacher"),
    ablation=("vessa", "without templates"),
    replicate="draw",
    scales=scales("mean teacher", "vessa", "without templates"),
    components=(
        Component(
            "visual feature matching",
            "implemented",
            "best and mean cosine similarity to template pixels of each class, and where templates that look alike "
            "have it; our reading of semantic and spatial cues, without the paper's equations at hand",
        ),
        Component(
            "template bank",
            "implemented",
            "the labelled images of the step are the bank; stage 1 matches one half of them with the other",
        ),
        Component(
            "dynamic interaction",
            "implemented",
            "the moving average's prediction prompts the assistant, whose mask joins the pseudo-label where it is sure",
        ),
        Component(
            "mask decoder",
            "simplified",
            "two convolutions over features and prompts at half resolution, for a decoder in the manner of SAM2",
        ),
        Component(
            "two stages",
            "simplified",
            "stage 1 is the first half of the steps, on this task's few labels, in place of seven data sets; the "
            "assistant goes on learning from labels in stage 2",
        ),
        Component(
            "semi-supervised framework",
            "simplified",
            "mean teacher, the book's baseline, in place of UniMatch V2",
        ),
        Component(
            "vision-language foundation model",
            "absent",
            "there is no pre-trained image and text encoder among the book's data, and text prompts come with it",
        ),
    ),
)
