"""MedCLIP-SAM (Koleilat, Asgariandehkordi, Rivaz and Xiao, MICCAI 2024; arXiv 2403.20253).

Idea: an image-text model has seen captions of whole images and no mask. Where in an image does a sentence come from?
The saliency of the sentence, cleaned by a conditional random field, becomes a box, and SAM answers to it: a mask
without any annotation. Such masks of training images can then train a U-Net. For similarities s_bj of the images b and
texts j of a batch, divided by a temperature, and the same the other way round:

  DHN-NCE    -s_bb + log sum_{j != b} w_bj exp(s_bj),  w_bj = N exp(beta s_bj) / sum_{k != b} exp(beta s_bk)
  gScoreCAM  relu(sum_k softmax(c)_k A_k),  c_k = similarity of the sentence and the image times A_k's enlarged map,
             for the channels with the largest mean gradient of the similarity, else 0
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.recipes.language._captions import BUDGET, ONE, ONE_QUICK, CaptionNet
from medcook.recipes.language._saliency import FromCaptions, described_rows, larger, largest, unit
from medcook.recipes.language._settings import scales
from medcook.recipes.recipe import Arm, Component, Recipe

TAU, LEAST = 1.05, 1e-8
"""Of the energies that saliency becomes, as in the official code."""
SMOOTH, BILATERAL = 3.0, 5.0
"""What neighbours count in the random field: near ones, and those that look alike."""


def gscorecam(net: CaptionNet, image: Tensor, sentence: str, top: int, heat: float) -> Tensor:
    """(H, W), 0 to 1: the saliency of a sentence in an image (1, C, H, W), from `top` channels of the last cells."""
    text, size = net.texts((sentence,)).detach(), image.shape[2:]
    with torch.enable_grad():
        cells = net.cells(net.maps(image)).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad((net.pooled(cells) @ text.T).sum(), cells)
    chosen = slope[0].mean((1, 2)).topk(top).indices
    with torch.no_grad():
        cells = cells.detach()
        seen = image * unit(larger(cells, size)[0, chosen])[:, None]
        scores = torch.zeros(cells.shape[1], device=cells.device)
        scores[chosen] = (net.images(seen) @ text.T)[:, 0] / heat
        found = F.relu(torch.einsum("c,chw->hw", scores.softmax(0), cells[0]))
        return unit(larger(found[None, None], size)[0, 0])


def kernels(image: Tensor, reach: int, near: float, wide: float, alike: float) -> list[tuple[float, Tensor]]:
    """(weight, what each of the (2 reach + 1)^2 pixels around counts (K, H * W)) of an image (H, W); sums are 1."""
    side = 2 * reach + 1
    steps = torch.arange(side, device=image.device) - reach
    far = (steps[:, None] ** 2 + steps[None] ** 2).flatten()[:, None].float()
    there = around(torch.ones_like(image)[None], reach)[0] * (far > 0)
    apart = (around(image[None], reach)[0] - image.flatten()) ** 2
    smooth = there * torch.exp(-far / (2 * near**2))
    bilateral = there * torch.exp(-far / (2 * wide**2) - apart / (2 * alike**2))
    return [(weight, k / k.sum(0).clamp_min(1e-6)) for weight, k in ((SMOOTH, smooth), (BILATERAL, bilateral))]


def around(maps: Tensor, reach: int) -> Tensor:
    """(N, K, H * W): the pixels around each one of maps (N, H, W); 0 outside."""
    side = 2 * reach + 1
    return F.unfold(maps[:, None], side, padding=reach).view(len(maps), side**2, -1)


def random_field(
    saliency: Tensor, image: Tensor, reach: int = 7, near: float = 1.0, wide: float = 5.0, alike: float = 0.5
) -> Tensor:
    """(H, W) bool: one mean-field step of a conditional random field on saliency (H, W), 0 to 1, of an image (H, W).

    near, wide  standard deviations in pixels;   alike: of brightness, in the image's own
    """
    share = torch.stack([1 - saliency, saliency])
    energy = -(share + LEAST).log() / (TAU * share.sigmoid())
    before = around(energy.neg().softmax(0), reach)
    heard = sum(weight * (kernel * before).sum(1) for weight, kernel in kernels(image, reach, near, wide, alike))
    outside, inside = heard - energy.flatten(1)
    return (inside > outside).view(image.shape)


@dataclass
class MedClipSam(FromCaptions):
    """Saliency by gScoreCAM, cleaned by a random field; `top` channels of 96 make it."""

    top: int = 10

    def saliency(self, net: CaptionNet, image: Tensor, sentence: str) -> Tensor:
        return gscorecam(net, image, sentence, self.top, self.heat)

    def rough(self, image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
        return largest(random_field(torch.from_numpy(saliency), torch.from_numpy(image)).numpy())


recipe = Recipe(
    paper="medclip-sam",
    title="MedCLIP-SAM: from captions to masks",
    claim="Without any mask, after captions alone, SAM with boxes from a sentence's saliency finds findings in X-rays "
    "with a higher Dice than the saliency itself.",
    arms={
        "saliency alone": Arm(MedClipSam(refined=False)),
        "medclip-sam": Arm(MedClipSam()),
        "plain InfoNCE": Arm(MedClipSam(contrast="info-nce")),
        "weak supervision": Arm(MedClipSam(weak=True)),
    },
    compare=("medclip-sam", "saliency alone"),
    ablation=("medclip-sam", "plain InfoNCE"),
    score=described_rows,
    scales=scales(
        ONE_QUICK,
        ONE,
        "saliency alone",
        "medclip-sam",
        "plain InfoNCE",
        "weak supervision",
        budget=BUDGET,
    ),
    source="abstract; loss/hnl.py, saliency_maps/pytorch_grad_cam/gscore_cam.py, crf/densecrf_sal.py and "
    "segment-anything/prompt_sam.py in the authors' repository, github.com/HealthX-Lab/MedCLIP-SAM; temperature and "
    "hardness from the commands of github.com/HealthX-Lab/MedCLIP-SAMv2",
    components=(
        Component(
            "DHN-NCE loss",
            "implemented",
            "beta 0.15 for both ways, as there. In the official code the weights' denominator is without beta and the "
            "diagonal counts as 1; here as in the equation. Images with the very same caption are no negatives, which "
            "holds for InfoNCE here, too. The temperature is 0.1 in both; there 0.6",
        ),
        Component(
            "fine-tuned BiomedCLIP",
            "simplified",
            "no such model is at hand: a convolutional encoder and a text encoder of one block learn from nothing, "
            "630 steps of 24 images. The captions are descriptions of one large finding that is drawn into each "
            "X-ray; of the masks nothing is used but which finding it is. With several findings in an image, of every "
            "size, 400 steps taught little; with a mean over the image in place of the maximum, nothing. How far a "
            "cell of the last features sees was decided on 48 validation images, seed 7: with 15 pixels the "
            "saliency's peak was in the finding in 0.73 of them, with 31 in 0.08, and the Dice of DHN-NCE's masks was "
            "0.60 and 0.23",
        ),
        Component(
            "gScoreCAM",
            "implemented",
            "10 of 96 channels, a tenth as there, of the last features before the maximum over the image",
        ),
        Component(
            "conditional random field",
            "simplified",
            "one mean-field step, as there, but with the 15 x 15 pixels around each in place of all, and widths for "
            "images of 64 x 64",
        ),
        Component(
            "SAM prompted by text in a zero-shot setting",
            "implemented",
            "the box of the largest part of the cleaned saliency, as for single structures there; the book's small "
            "SAM, frozen, whose Dice from the true boxes of 91 findings of validation patients was 0.93",
        ),
        Component(
            "weak supervision",
            "implemented",
            "a U-Net on zero-shot masks of about 190 training images, each asked for with its own caption, in the "
            "last 30% of the steps, in which the other arms do nothing. It is not told the sentence: there is one "
            "finding in an image. There a residual U-Net, on all images",
        ),
        Component("breast, brain and lung images", "simplified", "real X-rays; findings are drawn into them"),
    ),
)
