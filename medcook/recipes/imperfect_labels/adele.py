"""ADELE, adaptive early-learning correction (Liu, Liu, Zhu, Shen and Fernandez-Granda, CVPR 2022, arXiv 2110.03740).

Idea: a network learns what is right in noisy labels first and their mistakes later, some classes sooner than others.
How well its output fits the labels is followed class by class; where a class's curve flattens, its labels are corrected
from then on by what the network is sure of. Outputs at three scales of the image must agree, which steadies them.

    curve        IoU of output and labels, f(t) = a (1 - exp(-t^b / c)), fitted anew after every period t = 1, 2, ...
    moment       of a class: the first t with 1 - f'(t) / f'(1) >= 0.9
    correction   label <- argmax of the output where its probability is above 0.7, label and argmax each are background
                 or a class whose moment has come, and the image has labels of the argmax
    consistency  sum_k KL(p_k || q), q the mean of p_1 .. p_3, in images where q is above 0.8 somewhere
    loss         1/3 [sum_k L(p_k, labels) + weight * consistency]
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import curve_fit
from torch import Tensor, nn

from medcook.imperfect import NoisyTask
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.methods.semi_supervised import forgetful
from medcook.recipes.imperfect_labels._settings import BASELINE, CHANNELS, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def rising(time: np.ndarray, height: float, power: float, slowness: float) -> np.ndarray:
    """a (1 - exp(-t^b / c))."""
    return height * (1 - np.exp(-(time**power) / slowness))


def slope(time: float, height: float, power: float, slowness: float) -> float:
    """The derivative of `rising`."""
    return height * power / slowness * math.exp(-(time**power) / slowness) * time ** (power - 1)


def has_flattened(curve: np.ndarray, fall: float, least: float = 0.1) -> bool:
    """Whether the slope of the fitted curve (periods,) has now fallen by `fall` since its first period.

    Periods before the class is learnt at all are left out: up to the first rise by `least`, or to where it reaches it.
    Later periods weigh more: the standard deviation in the fit falls from 1 to 0.1. Less than three say nothing.
    """
    learnt = np.flatnonzero((np.diff(curve, append=0) >= least) | (curve >= least))
    curve = curve[learnt[0] :] if len(learnt) else curve[:0]
    if len(curve) < 3:
        return False
    time = np.arange(1, len(curve) + 1)
    doubt, bounds = np.geomspace(1, 0.1, len(curve)), ([0, 0, 1e-6], [1, 1, np.inf])
    try:
        (height, power, slowness), _ = curve_fit(rising, time, curve, (0.9, 0.9, 1), doubt, True, bounds=bounds)
    except RuntimeError:  # no fit in as many steps as scipy allows
        return False
    first = slope(1, height, power, slowness)
    return first > 0 and 1 - slope(len(curve), height, power, slowness) / first >= fall


class LearningCurves(nn.Module):
    """How well the network's output has fitted the labels, class by class and period by period.

    overlap, union  (classes,) pixels of the period that is under way
    iou             (periods, classes), of which `past` are over
    begun           (classes,) bool: whether a class's moment has come
    """

    def __init__(self, periods: int, classes: int):
        super().__init__()
        self.register_buffer("overlap", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("union", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("iou", torch.zeros(periods, classes))
        self.register_buffer("past", torch.zeros((), dtype=torch.int64))
        self.register_buffer("begun", torch.zeros(classes, dtype=torch.bool))

    def watch(self, predicted: Tensor, labels: Tensor) -> None:
        """Count class numbers (B, *size) against labels; pixels without a label do not count."""
        classes = len(self.overlap)
        known = labels < classes
        predicted, labels = predicted[known], labels[known].long()
        overlap = torch.bincount(labels[predicted == labels], minlength=classes)
        self.overlap += overlap
        self.union += torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes) - overlap

    def close(self, fall: float, per_class: bool) -> None:
        """End a period: note each class's IoU and whose moment it is; all at once by their mean if not `per_class`."""
        self.iou[self.past] = self.overlap / self.union.clamp_min(1)
        self.past += 1
        self.overlap.zero_(), self.union.zero_()
        curves = self.iou[: int(self.past), 1:].double().cpu().numpy()
        if not per_class:
            curves = np.repeat(curves.mean(1, keepdims=True), curves.shape[1], axis=1)
        for value, curve in enumerate(curves.T, start=1):
            if not self.begun[value] and has_flattened(curve, fall):
                self.begun[value] = True


def corrected(labels: Tensor, probabilities: Tensor, begun: Tensor, sure: float) -> Tensor:
    """Labels (B, *size) after correction by probabilities (B, classes, *size); `begun` (classes,) bool.

    Nothing changes between two classes of which one's moment has not come, nor into a class that the image lacks.
    """
    peak, found = probabilities.max(1)
    open_to = begun.clone()
    open_to[0] = True
    classes = len(begun)
    present = torch.stack([(labels == value).flatten(1).any(1) for value in range(classes)], dim=1)
    present[:, 0] = True
    from_open = open_to[labels.long().clamp_max(classes - 1)] & (labels < classes)
    into = (present & open_to).gather(1, found.flatten(1)).view_as(found)
    return torch.where((peak > sure) & from_open & into, found.to(labels.dtype), labels)


def disagreement(outputs: list[Tensor], agreed: float) -> Tensor:
    """Mean over pixels of sum_k KL(p_k || mean of p) for logits (B, classes, *size); 0 for images never surer than
    `agreed` of anything."""
    logs = torch.stack([logits.log_softmax(1) for logits in outputs])
    mean = logs.logsumexp(0) - math.log(len(outputs))
    divergence = (logs.exp() * (logs - mean)).sum((0, 2))
    used = mean.flatten(1).amax(1).exp() >= agreed
    return (divergence.flatten(1).mean(1) * used).mean()


@dataclass
class ADELE(Supervised):
    """Labels corrected class by class once memorisation begins, and outputs that agree across scales.

    correct    whether labels are corrected at all; `per_class`: each class at its own moment, or all at one
    weight     of the consistency across scales; 0: the image is seen at its own scale alone
    scales     the other scales; `share` of a batch, two images or more, is seen at these as well
    sure, agreed, fall   thresholds of correction, consistency and moment
    periods    of a training, after each of which the curves are fitted
    """

    channels: tuple[int, ...] = CHANNELS
    correct: bool = True
    per_class: bool = True
    weight: float = 1.0
    scales: tuple[float, ...] = (0.7, 1.5)
    share: float = 0.25
    sure: float = 0.7
    agreed: float = 0.8
    fall: float = 0.9
    periods: int = 20

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The networks, and `curves`, which are not trained."""
        nets = super().build(inputs, classes, dims)
        nets["curves"] = LearningCurves(self.periods, classes)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the module's docstring; the curves follow the output at the image's own scale."""
        images, labels, loss = labelled.images, labelled.labels, find_loss(self.loss)
        logits = nets["model"](images).float()
        nets["curves"].watch(logits.detach().argmax(1), labels)
        if self.correct and nets["curves"].begun.any():
            labels = corrected(labels, self.teach(nets, images), nets["curves"].begun, self.sure)
        if not self.weight:
            return loss(logits, labels)
        some = max(2, math.ceil(self.share * len(images)))
        with forgetful(nets["model"]):
            others = [self.rescaled(nets["model"], images[:some], scale) for scale in self.scales]
        total = loss(logits, labels) + sum(loss(other, labels[:some]) for other in others)
        consistency = disagreement([logits[:some], *others], self.agreed)
        return (total + self.weight * consistency) / (1 + len(others))

    @torch.no_grad()
    def teach(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Probabilities (B, classes, *size) that correct labels: those of the averaged network."""
        return nets["average"](images).float().softmax(1)

    def rescaled(self, model: nn.Module, images: Tensor, scale: float) -> Tensor:
        """Logits (B, classes, *size) of the images at another scale, brought back to their size."""
        size, least = images.shape[2:], 2 ** (len(self.channels) - 1)
        mode = "bilinear" if len(size) == 2 else "trilinear"
        other = F.interpolate(images, size=[max(round(side * scale), least) for side in size], mode=mode)
        return F.interpolate(model(other).float(), size=size, mode=mode)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        """The average follows; at the end of a period the curves are fitted."""
        super().after_step(nets, now)
        if (now.step + 1) * self.periods // now.steps > now.step * self.periods // now.steps:
            nets["curves"].close(self.fall, self.per_class)


FULL = NoisyTask("acdc", kind="borders")

recipe = Recipe(
    paper="adele",
    title="ADELE: adaptive early-learning correction of noisy annotations",
    claim="Correcting labels class by class when memorisation begins raises Dice above training on the noisy labels.",
    arms={
        "unet": Arm(BASELINE),
        "adele": Arm(ADELE()),
        "without correction": Arm(ADELE(correct=False)),
        "clean labels": Arm(BASELINE, {"kind": "none"}),
        "one moment for all classes": Arm(ADELE(per_class=False)),
        "without consistency": Arm(ADELE(weight=0.0)),
    },
    compare=("adele", "unet"),
    ablation=("adele", "without correction"),
    replicate="fold",
    # memorisation comes late: half as many steps again as the chapter's other recipes, in all arms
    scales=scales(
        replace(FULL, dataset="embedded"), FULL, "unet", "adele", "without correction", "clean labels", steps=600
    ),
    components=(
        Component(
            "memorisation detected per category",
            "implemented",
            "the authors' curve, fit and threshold. A period is a twentieth of the training, where theirs is one of "
            "100 passes over the data: 600 steps see every slice about four times. The k-th period stands at t = k; "
            "their code spreads n of them evenly from 0 to n. As periods are short, a curve also counts as begun where "
            "it reaches 0.1, and not only where it rises by 0.1 at once",
        ),
        Component(
            "adaptive label correction",
            "implemented",
            "the rule of the authors' code for SegTHOR, with its thresholds. They store corrected labels and renew "
            "them from outputs of the pass before, every ten passes; here they are told anew at each visit by the "
            "averaged network, from the labels as given, so that nothing is stored by slice",
        ),
        Component(
            "consistency across scales",
            "simplified",
            "scales 0.7, 1 and 1.5 as theirs, the other two for a quarter of each batch, to save time; they leave "
            "no mark on the normalisation's statistics. The mask of sure images is that of their code. Their code "
            "divides logits by three in the cross-entropy; here they are not",
        ),
        Component(
            "annotation noise that mimics humans",
            "simplified",
            "each structure of a patient grown or shrunk by up to 4 pixels, on ACDC; theirs grows or shrinks all "
            "structures of a slice of SegTHOR by 2 to 4 pixels, at a size of 1000 pixels a structure",
        ),
        Component("early learning and memorisation observed", "absent", "a finding about long trainings, no mechanism"),
        Component("weakly supervised PASCAL VOC", "absent", "photographs are no medical images"),
    ),
    source="authors' code, github.com/Kangningthu/ADELE; arXiv 2110.03740",
)
