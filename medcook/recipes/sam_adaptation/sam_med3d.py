"""SAM-Med3D (Wang et al., 2023): Segment Anything in three dimensions throughout, prompted by a few 3D points.

Image encoder, prompt encoder and mask decoder are SAM's with every layer 3D, and all of it learns, from scratch:
patches are boxes, attention runs over all of a volume, positions are z, y, x, and masks are volumes. A click in a slice
speaks for all. Training has two stages: at first on many targets, also such as no expert drew, then on the good ones.
Answers are corrected by clicks on what is wrong, which see the last answer:

    mask_k = decoder(encoder(x) + dense(mask_{k-1}), points_1 ... points_k),   point_{k+1} in where mask_k is wrong
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from medcook.data.transforms import Augment
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.sam_adaptation._volumes import (
    MILD,
    ClickedVolumes,
    Mixed,
    PositionCode,
    as_volumes,
    asked_in,
    click_rows,
    drawn,
    random_clicks,
    resized,
)
from medcook.sam.adapting import PromptedSam, fitted_in
from medcook.sam.model import SIZE, Prompts
from medcook.sam.predictor import encode, restore
from medcook.sam.prompts import first_click
from medcook.tasks import Budget, VolumeTask

STRIDES = (2, 4, 8)
"""Voxels of a side that a cell of the stem's features stands for; the last is a token's."""


def step_down(inputs: int, outputs: int, depth: bool) -> nn.Sequential:
    """A convolution that halves every side; without `depth` it looks at one slice of two, and not beside it."""
    kernel, padding = ((3, 3, 3), (1, 1, 1)) if depth else ((1, 3, 3), (0, 1, 1))
    return nn.Sequential(nn.Conv3d(inputs, outputs, kernel, 2, padding), nn.GroupNorm(8, outputs), nn.GELU())


class Block(nn.Module):
    """A transformer block: tokens (B, d, h, w, width) attend to the whole volume, or without `depth` to their layer."""

    def __init__(self, width: int, heads: int, depth: bool):
        super().__init__()
        self.depth = depth
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.flatten(1, 3) if self.depth else tokens.flatten(0, 1).flatten(1, 2)
        seen = self.norms[0](x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        return (x + self.mlp(self.norms[1](x))).view_as(tokens)


class Encoder3D(nn.Module):
    """Volumes (B, 1, D, H, W) to features at half, a quarter and an eighth of the resolution; the last are attended."""

    def __init__(self, widths: tuple[int, ...], blocks: int, heads: int, depth: bool):
        super().__init__()
        self.stem = nn.ModuleList(step_down(i, o, depth) for i, o in zip((1, *widths), widths, strict=False))
        self.blocks = nn.Sequential(*[Block(widths[-1], heads, depth) for _ in range(blocks)])
        self.codes = PositionCode(widths[-1])

    def forward(self, volumes: Tensor) -> list[Tensor]:
        found = [volumes]
        for step in self.stem:
            found.append(step(found[-1]))
        tokens = found[-1].permute(0, 2, 3, 4, 1)
        tokens = self.blocks(tokens + self.codes.grid(tokens.shape[1:4]))
        return [*found[1:-1], tokens.permute(0, 4, 1, 2, 3)]


class Prompts3D(nn.Module):
    """Clicks as tokens (M, N, width); clicks and the last answer drawn, as something to add to features."""

    def __init__(self, width: int, half: int):
        super().__init__()
        self.codes, self.kinds = PositionCode(width), nn.Embedding(3, width)
        self.coarse, self.fine = nn.Conv3d(2, width, 1), nn.Conv3d(2, half, 3, padding=1)

    def forward(self, points: Tensor, marks: Tensor, size: tuple[int, ...]) -> Tensor:
        """points (M, N, 3) voxels of a volume of this size; marks (M, N) 1, 0, or -1, whose token says no more."""
        places = (points + 0.5) / torch.tensor(size, device=points.device)
        kinds = self.kinds((marks + 1).long())
        return kinds + self.codes(places) * (marks >= 0)[..., None]

    def drawn(self, points: Tensor, marks: Tensor, earlier: Tensor | None, cells: tuple, size: tuple) -> Tensor:
        """(M, 2, *cells): clicks as dots, and the earlier logits (M, *size)."""
        dots = drawn(points, marks, cells, size)
        last = torch.zeros_like(dots) if earlier is None else (resized(earlier[:, None], cells) / 8).clamp(-1, 1)
        return torch.cat([dots, last], dim=1)


class Sam3D(nn.Module):
    """Segment Anything in 3D: see `ClickedVolumes.make`. depth False: the encoder sees every slice on its own."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 96), blocks: int = 4, heads: int = 4, depth: bool = True):
        super().__init__()
        half, quarter, width = widths
        self.encoder, self.prompts = Encoder3D(widths, blocks, heads, depth), Prompts3D(width, half)
        config = SamMaskDecoderConfig(hidden_size=width, mlp_dim=2 * width, num_attention_heads=heads)
        config._attn_implementation = "eager"
        self.transformer = SamTwoWayTransformer(config)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, 1, width))
        self.weigh = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, half))
        self.up = nn.ModuleList([nn.ConvTranspose3d(width, quarter, 2, 2), nn.ConvTranspose3d(quarter, half, 2, 2)])
        self.norm = nn.GroupNorm(1, quarter)

    def encode(self, volumes: Tensor) -> tuple[Tensor, ...]:
        return (*self.encoder(volumes), volumes)

    def answer(self, embedding: tuple[Tensor, ...], points: Tensor, marks: Tensor, earlier: Tensor | None) -> Tensor:
        """Logits (M, D, H, W) from all clicks so far and the earlier logits; made at half the resolution."""
        half, quarter, coarse, volume = embedding
        size, cells = volume.shape[2:], coarse.shape[2:]
        coarse = coarse + self.prompts.coarse(self.prompts.drawn(points, marks, earlier, cells, size))
        half = half + self.prompts.fine(self.prompts.drawn(points, marks, earlier, half.shape[2:], size))
        clicks = self.prompts(points, marks, size)[:, None]
        asked = torch.cat([self.mask_token.expand(len(clicks), -1, -1, -1), clicks], dim=2)
        place = self.prompts.codes.grid(cells).permute(3, 0, 1, 2).expand_as(coarse)
        tokens, image = self.transformer(asked, coarse, place, attention_similarity=None)
        image = image.transpose(2, 3).reshape(coarse.shape)
        image = F.gelu(self.norm(resized(self.up[0](image), quarter.shape[2:]) + quarter))
        image = F.gelu(resized(self.up[1](image), half.shape[2:]) + half)
        logits = torch.einsum("mc,mcdhw->mdhw", self.weigh(tokens[:, 0, 0]), image)
        return resized(logits[:, None], size)[:, 0]


@dataclass
class SamMed3D(ClickedVolumes):
    """Everything learns, in two stages.

    broad  share of the steps in which half of the targets are such as no expert drew
    depth  False: the encoder sees every slice on its own
    """

    clicks: int = 3
    broad: float = 0.4
    depth: bool = True

    def make(self) -> Sam3D:
        return Sam3D(depth=self.depth)

    def targets(self, volumes: Tensor, labels: Tensor, now: Moment) -> tuple[Tensor, Tensor]:
        """In the first stage one of an expert's structures of each volume, and one region that looks alike."""
        if now.fraction >= self.broad:
            return asked_in(labels, self.objects)
        masks, owner = asked_in(labels, self.objects - 1)
        regions = alike(volumes, random_clicks(torch.ones_like(labels, dtype=torch.bool)))
        return torch.cat([masks, regions]), torch.cat([owner, torch.arange(len(volumes))])


def alike(volumes: Tensor, seeds: Tensor, reach: float = 10.0, width: float = 0.5) -> Tensor:
    """(B, D, H, W) bool: what lies within `reach` voxels of a seed (B, 1, 3) and looks as it does.

    Looks are the mean of 3 x 3 x 3 voxels of volumes (B, 1, D, H, W), told apart by `width` standard deviations
    """
    smooth = F.avg_pool3d(F.pad(volumes, (1,) * 6, mode="replicate"), 3, stride=1)[:, 0]
    z, y, x = seeds[:, 0].long().unbind(1)
    value = smooth[torch.arange(len(smooth)), z, y, x].view(-1, 1, 1, 1)
    axes = [torch.arange(count, device=volumes.device) for count in smooth.shape[1:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).float()
    near = (grid - seeds[:, :, None, None]).norm(dim=-1) < reach
    return near & ((smooth - value).abs() < width)


@dataclass
class SliceSam(PromptedSam):
    """The small SAM, slice by slice: it learns from slices of the volumes, and when scored gets a click in every slice.

    slices  that a step takes of each volume, among those that show a structure
    """

    prompts: str = "click"
    rounds: int = 1
    slices: int = 2
    augmentation: Augment = field(default_factory=lambda: MILD)

    def build(self, inputs: int, classes: int, dims: int) -> Mixed:
        return Mixed(super().build(inputs, classes, 2).items())

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        images, labels = as_volumes(labelled.images), as_volumes(labelled.labels[:, None])[:, 0]
        chosen = []
        for number, label in enumerate(labels):
            shown = ((label > 0) & (label < 255)).flatten(1).any(1).nonzero()[:, 0]
            chosen += [(number, k) for k in shown[torch.randperm(len(shown))[: self.slices]].tolist()]
        numbers, planes = zip(*chosen or [(0, 0)], strict=True)
        batch = Batch(images[list(numbers), :, list(planes)], labels[list(numbers), list(planes)])
        return super().training_step(nets, batch, None, now)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        volumes = as_volumes(images)
        found = super().predict(nets, volumes.transpose(1, 2).flatten(0, 1))
        return found.unflatten(0, (len(volumes), -1)).transpose(1, 2).reshape(len(images), -1, *images.shape[2:])

    def answers(self, nets: nn.ModuleDict, volume: Tensor, truth: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """One answer, to a click in the middle of the structure in each slice that shows it: (slices, mask)."""
        model, shape = nets["average"], truth.shape[1:]
        there = np.flatnonzero(truth.any((1, 2)))
        embedding = model.embed(fitted_in(volume[0, :, there].transpose(0, 1)))
        every = [encode(first_click(truth[k]), SIZE / max(shape)) for k in there]
        logits, iou = model.decode(embedding, Prompts(*map(torch.cat, zip(*every, strict=True))))
        best = 1 + iou[:, 1:].argmax(1)  # one click may mean several things
        masks = model.refine(logits[torch.arange(len(best)), best][:, None], embedding)
        answer = np.zeros(truth.shape, bool)
        answer[there] = restore(masks, shape)[:, 0].numpy() > 0
        yield len(there), answer


recipe = Recipe(
    paper="sam-med3d",
    title="SAM-Med3D: a few 3D points instead of a click in every slice",
    claim="Prompted by at most three 3D points, a SAM that is 3D throughout segments the hippocampus better than the "
    "small 2D SAM, adapted to the same patients, does from a click in every slice.",
    arms={
        "slice by slice": Arm(SliceSam()),
        "sam-med3d": Arm(SamMed3D()),
        "without depth": Arm(SamMed3D(depth=False)),
        "one stage": Arm(SamMed3D(broad=0.0)),
        "one click": Arm(SamMed3D(clicks=1)),
        "3D U-Net": Arm(Supervised(channels=(16, 32, 64, 64), augmentation=MILD)),
    },
    compare=("sam-med3d", "slice by slice"),
    ablation=("sam-med3d", "without depth"),
    replicate="draw",
    score=click_rows,
    scales={
        "quick": Scale(
            VolumeTask("embedded", labelled=4, evaluation="test"), Budget(steps=20, batch=2, checks=0), replicates=1
        ),
        "full": Scale(
            VolumeTask("hippocampus", labelled=24, evaluation="test"),
            Budget(steps=160, batch=2, checks=0),
            arms=("slice by slice", "sam-med3d", "without depth"),
        ),
    },
    source="the paper's abstract; layers, clicks and the answer fed back follow the official code, "
    "github.com/uni-medical/SAM-Med3D",
    components=(
        Component(
            "fully 3D structure",
            "simplified",
            "encoder, prompt encoder and decoder are 3D and learn from scratch; small, with a convolution stem whose "
            "finer features join the decoder and with drawn clicks, as in the small SAM; masks at half the resolution",
        ),
        Component(
            "a few 3D prompt points",
            "implemented",
            "clicks after the first lie on what is wrong: at random while learning, in its middle when scored; the "
            "last answer is a prompt as well",
        ),
        Component(
            "two-stage training",
            "simplified",
            "the first stage adds regions of the same volumes that look alike to the targets, for a large data set of "
            "mixed quality; the second has experts' masks alone, at a falling rate",
        ),
        Component("SA-Med3D-140K", "absent", "22,000 volumes; here 24 patients, each with two structures"),
        Component("unseen targets", "absent", "both structures are trained"),
    ),
)
