"""Interactive segmentation through fully convolutional networks (Sakinis, Milletari, Roth, Korfiatis, Kostandy,
Philbrick, Akkus, Ziyue Xu, Daguang Xu and Erickson, 2019; arXiv 1903.08205).

A network that has nothing to do with any particular organ: it sees the image and two more channels, Gaussians around
the clicks on what is meant and around the clicks on what is not, and answers with what was meant. In training a
simulated person looks at the network's own answer and clicks deep inside its larger error, some times in a row; only
the answer to all of these clicks is trained. So the network learns to obey a correction, and not organs by heart: more
clicks help, also on a structure that it never saw.

Details of the simulated person follow MONAI's deepgrow (monai.apps.deepgrow), an implementation of the paper.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.interactive import (
    MEANT,
    Guided,
    chosen_structure,
    click_rows,
    distances,
    gaussians,
    no_marks,
    random_pixels,
    with_click,
)
from medcook.methods import Batch, Moment
from medcook.recipes.interactive._settings import BASELINE, CHANNELS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe

LEFT_VENTRICLE = 3
"""Label value of the hearts' structure that training never shows."""


def depths(masks: Tensor) -> Tensor:
    """(B, *size) float64: chessboard steps from each pixel of the masks (B, *size) to the nearest one outside."""
    found = [ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard") for mask in masks.cpu().numpy()]
    inner = (slice(None), *[slice(1, -1)] * (masks.ndim - 1))
    return torch.from_numpy(np.stack(found)[inner].astype(np.float64)).to(masks.device)


def deep_pixels(masks: Tensor) -> Tensor:
    """(B, *size) bool: a random pixel of each mask (B, *size), deep ones more often; none where the mask is empty.

    The chance of a pixel is proportional to exp(depth) - 1.
    """
    depth = depths(masks).flatten(1)
    most = depth.amax(1, keepdim=True)
    chance = (depth - most).exp() - (-most).exp()
    chosen = torch.zeros_like(chance, dtype=torch.bool)
    there = (most > 0)[:, 0]
    if there.any():
        chosen[there] = chosen[there].scatter(1, torch.multinomial(chance[there], 1), True)
    return chosen.view(masks.shape)


def error_clicks(marks: Tensor, answer: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Marks (B, 2, *size) and a click deep inside the larger error of each answer (B, *size): missing, or too much.

    known  (B, *size): pixels of which the truth is known; errors elsewhere are none
    """
    return with_click(marks, answer, truth, known, pick=deep_pixels)


def blind_clicks(marks: Tensor, truth: Tensor, known: Tensor, reach: float) -> Tensor:
    """Marks (B, 2, *size) and a random click each, on the structure or, as often, at most `reach` pixels beside it.

    No answer is looked at: as in the training clicks of Xu et al. (CVPR 2016).
    """
    near = distances(truth[:, None])[:, 0] <= reach
    more = (torch.rand(len(truth), device=truth.device) < 0.5).view(-1, *[1] * (truth.ndim - 1))
    clicks = random_pixels(torch.where(more, truth, near & ~truth & known))
    return marks | torch.stack([clicks & more, clicks & ~more], dim=1)


@dataclass
class ClickFcn(Guided):
    """A U-Net that sees Gaussians of the clicks beside the image, and is trained on its answer to the last of them.

    corrections   clicks after the first in a training step: each image gets 0 to this many, all equally often
    errors        False: these clicks know nothing of the network's answers, see `blind_clicks`
    reach         how far beside a structure blind clicks lie, in pixels
    """

    corrections: int = 4
    errors: bool = True
    reach: float = 20.0

    guides = 2

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, 2, *size): soft dots of the clicks; the answer before is not seen."""
        return gaussians(marks, self.sigma)

    def first(self, truth: Tensor) -> Tensor:
        """The first marks (B, 2, *size) on masks (B, *size): a click deep inside each."""
        marks = no_marks(truth)
        marks[:, MEANT] = deep_pixels(truth)
        return marks

    @torch.no_grad()
    def answer(self, net: nn.Module, images: Tensor, marks: Tensor) -> Tensor:
        """(B, *size) bool: what a person would be shown; batch normalisation uses and keeps its running statistics."""
        training = net.training
        net.eval()
        found = self.respond(net, images, marks, None).argmax(1) == 1
        net.train(training)
        return found

    def session(self, net: nn.Module, images: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Marks (B, 2, *size) of a simulated person about masks (B, *size) on images (B, C, *size)."""
        marks = self.first(truth)
        more = torch.randint(self.corrections + 1, (len(truth),), device=truth.device)
        for turn in range(self.corrections):
            asked = more > turn
            if not asked.any():
                break
            mine, right, sure = marks[asked], truth[asked], known[asked]
            if self.errors:
                marks[asked] = error_clicks(mine, self.answer(net, images[asked], mine), right, sure)
            else:
                marks[asked] = blind_clicks(mine, right, sure, self.reach)
        return marks

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the answer to all clicks; what led to them are answers of the average, which also predicts."""
        target = chosen_structure(labelled.labels)
        marks = self.session(nets["average"], labelled.images, target == 1, target != IGNORE)
        return self.answer_loss(self.respond(nets["model"], labelled.images, marks, None), target)


recipe = Recipe(
    paper="interactive-fcn",
    title="Clicks as Gaussian channels",
    claim="A network trained on clicks into its own errors reaches a higher Dice after five clicks on left ventricles, "
    "which it never saw, than one trained on first clicks alone.",
    arms={
        "first click alone": Arm(ClickFcn(channels=CHANNELS, corrections=0)),
        "clicks on errors": Arm(ClickFcn(channels=CHANNELS)),
        "clicks that know no errors": Arm(ClickFcn(channels=CHANNELS, errors=False)),
        "unet": Arm(BASELINE),
    },
    compare=("clicks on errors", "first click alone"),
    ablation=("clicks on errors", "clicks that know no errors"),
    replicate="fold",
    metric="dice_5",
    score=click_rows,
    scales=scales(
        replace(HEARTS, hidden=(LEFT_VENTRICLE,), asked="hidden"),
        "first click alone",
        "clicks on errors",
        "clicks that know no errors",
    ),
    source="monai.apps.deepgrow for the simulated person; the figures of the paper were not at hand",
    components=(
        Component(
            "clicks as channels",
            "implemented",
            "one channel of Gaussians for what is meant and one for what is not, beside the image; the network sees "
            "no answer of its own. Where dots overlap the nearer one counts (MONAI blurs all clicks and scales to 1)",
        ),
        Component(
            "clicks on errors",
            "implemented",
            "on the larger error, deep inside it with a chance proportional to exp(depth) - 1 as in MONAI's deepgrow. "
            "Up to four corrections an image, each number equally often (MONAI: with a chance that falls with every "
            "answer, and never none). Answers on the way are not trained, as there; the averaged weights, which also "
            "predict, give them. That was chosen after runs of 150 steps on fold 9, which is not scored: Dice after "
            "five clicks 0.67, where the trained weights give them 0.60; blind clicks 0.72, first clicks alone 0.50 "
            "(six cases, one seed)",
        ),
        Component(
            "previously unseen structures",
            "implemented",
            "left ventricles are unlabelled in training, neither a target nor background to another structure, and are "
            "alone asked for; training shows right ventricles and myocardium (the paper: abdominal CT)",
        ),
        Component(
            "one to a few clicks",
            "implemented",
            "Dice after one, three and five clicks of a simulated person, each in the middle of the largest error",
        ),
        Component(
            "fully convolutional network",
            "simplified",
            "the book's narrow U-Net on MR slices of hearts; the paper's network sees slices of abdominal CT",
        ),
        Component("speed of an answer", "absent", "seconds are recorded with every run; the claim here is about Dice"),
        Component("comparison with other techniques", "absent", "the arms differ in the clicks of training alone"),
    ),
)
