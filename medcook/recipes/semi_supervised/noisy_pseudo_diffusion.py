"""Robust noisy pseudo-label learning with a diffusion model (Xi, Ma, Wang, Howell, Rinaldi and Rhode, DGM4MICCAI 2025).

Segmentation as denoising: a network restores a label map from a noisy version of it and the image, and a label map is
sampled from pure noise in a few steps. Pseudo-labels of unlabelled images are wrong in places, so the features are
also tied to one prototype a class, an anchor that only true labels move: close to one's own, far from the others'.

Forward process  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e,  e ~ N(0, 1)        (Ho et al., NeurIPS 2020, eq. 4)
Sampling         x_s = sqrt(abar_s) x_0' + sqrt(1 - abar_s) e',  x_0', e' as told  (Song et al., ICLR 2021, eq. 12)
Contrast         -log exp(f.p_y / tau) / sum_c exp(f.p_c / tau)                    (van den Oord et al., 2018, eq. 4)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, MeanTeacher, Moment
from medcook.methods.semi_supervised import SemiSupervised, forgetful
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import scales

TIMESTEPS = 1000


def process():
    """MONAI's scheduler with the schedule of Ho et al.: beta rises in equal steps from 0.0001 to 0.02."""
    from monai.networks.schedulers import DDIMScheduler

    return DDIMScheduler(TIMESTEPS, schedule="linear_beta", prediction_type="sample")


def sample(network: nn.Module, images: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Class probabilities (B, classes, *size) in `steps` (a divisor of 1000) passes from pure noise, without chance."""
    reverse, x = process(), noise
    reverse.set_timesteps(steps)
    for time in range(TIMESTEPS - 1, -1, -(TIMESTEPS // steps)):  # MONAI's `timesteps` are not where its step lands
        probabilities = network(told(images, x, torch.full((len(images),), time))).float().softmax(1)
        x, _ = reverse.step(2 * probabilities - 1, time, x)
    return probabilities


def told(images: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """What the network sees: image, noisy label map and, as a constant channel, the timestep from -1 to 1."""
    clock = (2 * times / (TIMESTEPS - 1) - 1).to(images.device).view(-1, *[1] * (images.ndim - 1))
    return torch.cat([images, x, clock.expand(-1, 1, *images.shape[2:])], dim=1)


def scaled(labels: Tensor, classes: int) -> Tensor:
    """x_0: labels (B, *size) as (B, classes, *size), 1 for the class and -1 for the others, 0 where unlabelled."""
    known = labels != IGNORE
    return (2.0 * F.one_hot(torch.where(known, labels, 0).long(), classes) - 1).movedim(-1, 1) * known[:, None]


class Prototypes(nn.Module):
    """One unit vector a class, the moving average of what labelled voxels of the class look like in feature space."""

    def __init__(self, classes: int, features: int):
        super().__init__()
        self.register_buffer("anchors", torch.zeros(classes, features))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def remember(self, features: Tensor, labels: Tensor, decay: float) -> None:
        """Move the anchors of the classes in `labels` (B, *size) towards their mean of `features` (B, F, *size)."""
        rows = F.normalize(features.float(), dim=1).movedim(1, -1)
        for value in range(len(self.anchors)):
            mine = rows[labels == value]
            if len(mine):
                kept = decay if self.seen[value] else 0.0
                self.anchors[value] = F.normalize(self.anchors[value].lerp(mine.mean(0), 1 - kept), dim=0)
                self.seen[value] = True

    def contrast(self, features: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """InfoNCE of each voxel's features and the anchor of its label; every class in `labels` counts the same."""
        similarity = torch.einsum("bf...,cf->bc...", F.normalize(features.float(), dim=1), self.anchors) / temperature
        voxels = torch.stack([(labels == value).sum() for value in range(len(self.anchors))])
        counts = (voxels > 0) & self.seen
        share = counts / (voxels * counts.sum()).clamp_min(1)
        return F.cross_entropy(similarity, labels.long(), share, ignore_index=IGNORE, reduction="sum")


@dataclass
class LabelDiffusion(SemiSupervised):
    """A denoiser of label maps; its moving average samples the pseudo-labels of unlabelled images, and predicts.

    steps        passes of the network in sampling
    pure         share of the training maps at the last timestep, pure noise, where sampling starts; 1 and one step
                 leave of the diffusion nothing but a meaningless input
    contrast     weight of the contrast with the prototypes; 0 takes them away
    temperature  of the contrast
    momentum     decay per step of the prototypes' moving average
    flip         share of every pseudo-label map that is turned into another class, in blobs, to test robustness
    """

    steps: int = 2
    pure: float = 0.5
    contrast: float = 0.1
    temperature: float = 0.1
    momentum: float = 0.9
    flip: float = 0.0

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The network has input channels for the noisy label map and the timestep; and there are `prototypes`."""
        nets = super().build(inputs + classes + 1, classes, dims)
        nets["prototypes"] = Prototypes(classes, self.channels[0])
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Denoise true labels, which also move the prototypes; later sampled pseudo-labels too."""
        supervised = self.denoise(nets, labelled.images, labelled.labels, anchor=True)
        if unlabelled is None or now.fraction < self.start:
            return supervised
        pseudo = flipped(self.sampled(nets, unlabelled.images), self.flip, len(nets["prototypes"].anchors))
        with forgetful(nets["model"]):
            return supervised + self.rising(now) * self.denoise(nets, self.view(unlabelled.images), pseudo)

    def denoise(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor, anchor: bool = False) -> Tensor:
        """Loss of telling x_0 from x_t and the image, and contrast of the features on the way."""
        model, prototypes = nets["model"], nets["prototypes"]
        x = scaled(labels, len(prototypes.anchors))
        times = torch.randint(TIMESTEPS, (len(x),)).masked_fill(torch.rand(len(x)) < self.pure, TIMESTEPS - 1)
        x = process().add_noise(x, torch.randn_like(x), times)
        features = model.features(told(images, x, times))
        loss = find_loss(self.loss)(model.head(features).float(), labels)
        if anchor:
            prototypes.remember(features, labels, self.momentum)
        return loss + self.contrast * prototypes.contrast(features, labels, self.temperature)

    @torch.no_grad()
    def sampled(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Pseudo-labels (B, *size) uint8 from the moving average, each from noise of its own."""
        noise = torch.randn(len(images), len(nets["prototypes"].anchors), *images.shape[2:], device=images.device)
        return sample(nets["average"], images, noise, self.steps).argmax(1).to(torch.uint8)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Always from the same noise, so that an image has one answer."""
        shape = len(nets["prototypes"].anchors), *images.shape[2:]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(images.device)
        noise = noise.expand(len(images), *shape)
        return sample(nets["average"], images, noise, self.steps)


def flipped(labels: Tensor, share: float, classes: int) -> Tensor:
    """`share` of each label map (B, *size) made wrong: inside random blobs the labels are another class."""
    if not share:
        return labels
    mode = "bilinear" if labels.ndim == 3 else "trilinear"
    field = F.interpolate(torch.rand(len(labels), 1, *[6] * (labels.ndim - 1)), labels.shape[1:], mode=mode)
    limit = field.flatten(1).quantile(1 - share, dim=1).view(-1, *[1] * (labels.ndim - 1))
    turn = torch.randint(1, classes, (len(labels), *[1] * (labels.ndim - 1)))
    inside = (field[:, 0] > limit).to(labels.device)
    return torch.where(inside, (labels + turn.to(labels)) % classes, labels)


recipe = Recipe(
    paper="noisy-pseudo-diffusion",
    title="Diffusion over label maps, with prototypes against noisy pseudo-labels",
    claim="With three labelled patients, a diffusion model of label maps whose features are tied to class prototypes "
    "beats mean teacher in Dice.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "diffusion": Arm(LabelDiffusion()),
        "without prototypes": Arm(LabelDiffusion(contrast=0.0)),
        "without diffusion": Arm(LabelDiffusion(pure=1.0, steps=1)),
        "diffusion, noisy": Arm(LabelDiffusion(flip=0.2)),
        "without prototypes, noisy": Arm(LabelDiffusion(contrast=0.0, flip=0.2)),
    },
    compare=("diffusion", "mean teacher"),
    ablation=("diffusion", "without prototypes"),
    replicate="draw",
    scales=scales("mean teacher", "diffusion", "without prototypes"),
    components=(
        Component(
            "denoising diffusion",
            "implemented",
            "over label maps scaled to -1 and 1, 1000 timesteps, told x_0, two DDIM steps. Half of the training maps "
            "are pure noise, where sampling starts, since steps are few; the timestep is a constant input channel",
        ),
        Component(
            "pseudo-labels", "implemented", "hard, sampled by the moving average; denoised like labels, as we read it"
        ),
        Component(
            "class prototypes",
            "implemented",
            "as we read it: one anchor a class, the moving average of labelled voxels' features in the last layer",
        ),
        Component(
            "prototype-based contrastive consistency",
            "implemented",
            "as we read it: InfoNCE of every labelled and pseudo-labelled voxel with the anchors, at every timestep, "
            "classes balanced; the constants are ours",
        ),
        Component(
            "noisy pseudo-labels",
            "implemented",
            "two arms with a fifth of every pseudo-label map wrong, in blobs; `full` does not run them",
        ),
        Component("MOSXAV", "absent", "the X-ray angiography benchmark is not at hand; cardiac cine MR here"),
        Component("EndoScapes2023", "absent", "not at hand"),
    ),
)
