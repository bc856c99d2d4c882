"""Multi-scale self-guided attention (Sinha and Dolz, IEEE Journal of Biomedical and Health Informatics 2021).

Features of four scales, brought to one size, are fused; every scale is then refined by attention over positions and
over channels, twice, and the fused features go with it as a guide (arXiv 1906.02849). A small encoder-decoder beside
each attention says in few numbers what is in the image; two losses between these modules guide what is attended to.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

SCALES = 4


class Stage(NamedTuple):
    """One refinement of all scales, one after the other: what entered (4 B, 2 W, H, W), its code, and that decoded."""

    entered: Tensor
    code: Tensor
    decoded: Tensor


class Refined(NamedTuple):
    """What the network has at the end: the logits of each scale before and after its refinement, and both stages."""

    early: list[Tensor]
    late: list[Tensor]
    stages: tuple[Stage, Stage]


def guidance(first: Stage, second: Stage) -> Tensor:
    """0.25 x the distance of both stages' codes + 0.1 x that of what entered and was decoded, summed over scales."""
    codes = F.mse_loss(first.code.float(), second.code.float())
    rebuilt = sum(F.mse_loss(stage.decoded.float(), stage.entered.float()) for stage in (first, second))
    return SCALES * (0.25 * codes + 0.1 * rebuilt)


class PositionAttention(nn.Module):
    """(B, C, H, W) to the same: every position adds a mean over all positions, weighted by softmax(q k').

    Those heard are means over `pool` x `pool` positions; 1 is the paper's. The weight of what is added, `gamma`, begins
    at zero and is learnt, here as in ChannelAttention (Fu et al., CVPR 2019).
    """

    def __init__(self, channels: int, pool: int = 4):
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, max(1, channels // 8), 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma, self.pool = nn.Parameter(torch.zeros(1)), pool

    def forward(self, x: Tensor) -> Tensor:
        heard = F.avg_pool2d(x, self.pool, ceil_mode=True)
        query, key, value = self.query(x), self.key(heard), self.value(heard)
        query, key, value = (t.flatten(2).transpose(1, 2).contiguous() for t in (query, key, value))
        told = (query @ key.transpose(1, 2)).softmax(-1) @ value
        return x + self.gamma * told.transpose(1, 2).reshape(x.shape)


class ChannelAttention(nn.Module):
    """(B, C, H, W) to the same: every channel adds a mean over all channels, those least like it with most weight."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        with torch.autocast(x.device.type, enabled=False):  # sums over all positions: bfloat16 would be too coarse
            weights = (-flat.float() @ flat.float().transpose(1, 2)).softmax(-1)
        return x + self.gamma * (weights.to(x.dtype) @ flat).reshape(x.shape)


class EncoderDecoder(nn.Module):
    """(B, inputs, H, W) to a code (B, 2 width, H / 4, W / 4) and, from the code alone, back to the shape it had."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.encode = nn.ModuleList([DoubleConv(inputs, width, 2), DoubleConv(width, 2 * width, 2)])
        self.decode = nn.ModuleList([DoubleConv(2 * width, width, 2), DoubleConv(width, width, 2)])
        self.out = nn.Conv2d(width, inputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = F.max_pool2d(self.encode[0](x), 2)
        code = F.max_pool2d(self.encode[1](half), 2)
        decoded = resized(self.decode[0](code), half.shape[2:])
        return code, resized(self.out(self.decode[1](decoded)), x.shape[2:])


def branch(width: int, attention: nn.Module) -> nn.Sequential:
    """An attention between two convolutions, (B, 2 width, H, W) to (B, width, H, W)."""

    def convolution(inputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    return nn.Sequential(*convolution(2 * width), attention, *convolution(width))


class Refinement(nn.Module):
    """(position attention + channel attention) x what was decoded: (B, 2 width, H, W), twice, to (B, width, H, W)."""

    def __init__(self, width: int, attention: bool):
        super().__init__()
        self.position = branch(width, PositionAttention(width) if attention else nn.Identity())
        self.channel = branch(width, ChannelAttention() if attention else nn.Identity())
        self.semantic = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, entered: Tensor, decoded: Tensor) -> Tensor:
        return self.out((self.position(entered) + self.channel(entered)) * self.semantic(decoded))


class GuidedAttentionNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W): the mean over the refined scales.

    The encoder is that of the book's U-Net; its last four levels are brought to a quarter of the image.
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        width: int = 16,
        attention: bool = True,
    ):
        super().__init__()
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in zip((inputs, *channels), channels, strict=False))
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            for c in channels[-SCALES:]
        )
        self.fuse = DoubleConv(SCALES * width, width, 2)
        self.codes = nn.ModuleList(EncoderDecoder(2 * width, width // 2) for _ in range(2))
        self.stages = nn.ModuleList(
            nn.ModuleList(Refinement(width, attention) for _ in range(SCALES)) for _ in range(2)
        )
        self.early, self.late = (nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in range(SCALES)) for _ in range(2))

    def scales(self, image: Tensor) -> list[Tensor]:
        """Four scales, each (B, width, H / 4, W / 4)."""
        levels = [self.down[0](image)]
        for block in self.down[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        size = [side // 4 for side in image.shape[2:]]
        return [resized(reduce(x), size) for reduce, x in zip(self.reduce, levels[-SCALES:], strict=True)]

    def stage(self, number: int, found: list[Tensor], guides: list[Tensor]) -> tuple[list[Tensor], Stage]:
        """Each scale and its guide, refined; one encoder-decoder serves all scales, as one batch."""
        entered = [torch.cat(pair, dim=1) for pair in zip(found, guides, strict=True)]
        together = torch.cat(entered)
        code, decoded = self.codes[number](together)
        refined = zip(self.stages[number], entered, decoded.chunk(SCALES), strict=True)
        return [refine(x, y) for refine, x, y in refined], Stage(together, code, decoded)

    def refine(self, image: Tensor) -> Refined:
        """All that training needs; the fused features guide as they are, then weighted by the first attention."""
        found = self.scales(image)
        fused = self.fuse(torch.cat(found, dim=1))
        attended, first = self.stage(0, found, SCALES * [fused])
        refined, second = self.stage(1, found, [x * fused for x in attended])
        early, late = (
            [head(x) for head, x in zip(heads, features, strict=True)]
            for heads, features in ((self.early, found), (self.late, refined))
        )
        return Refined(early, late, (first, second))

    def forward(self, image: Tensor) -> Tensor:
        return resized(torch.stack(self.refine(image).late).mean(0), image.shape[2:])


@dataclass
class GuidedAttention(Architecture):
    """Four scales, each refined twice; logits before and after are supervised, eight in all.

    attention  False: no position and channel attention; convolutions and guidance stay
    guided     False: no losses between modules
    """

    attention: bool = True
    guided: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return GuidedAttentionNet(inputs=inputs, classes=classes, channels=self.channels, attention=self.attention)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The paper's sum of eight losses of logits and the guidance, divided by eight."""
        early, late, stages = nets["model"].refine(labelled.images)
        logits = [resized(x.float(), labelled.images.shape[2:]) for x in early + late]
        total = sum(find_loss(self.loss)(x, labelled.labels) for x in logits)
        return (total + guidance(*stages) if self.guided else total) / len(logits)


recipe = Recipe(
    paper="ms-guided-attention",
    title="Multi-scale guided attention",
    claim="Position and channel attention, guided by fused scales, give a higher Dice on hearts than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "guided attention": Arm(GuidedAttention()),
        "without attention": Arm(GuidedAttention(attention=False)),
        "without guidance losses": Arm(GuidedAttention(guided=False)),
    },
    compare=("guided attention", "unet"),
    ablation=("guided attention", "without attention"),
    replicate="fold",
    scales=scales("unet", "guided attention", "without attention"),
    components=(
        Component(
            "multi-scale features",
            "implemented",
            "four levels at 16 channels (the paper's: 64), brought to a quarter of the image, as the paper's are",
        ),
        Component(
            "position attention",
            "simplified",
            "every position hears all others, as means over 4 x 4 (the paper's: single positions) to spare time",
        ),
        Component("channel attention", "implemented", "channels in the place of positions"),
        Component(
            "guided refinement",
            "implemented",
            "two stages for each scale; the fused features enter the first as they are, the second weighted by it; "
            "ReLU instead of its learnt slope",
        ),
        Component(
            "losses between modules",
            "implemented",
            "codes of both stages alike (0.25), and what entered rebuilt (0.1), as in the published code; its "
            "encoder-decoders are eight times wider for their input, and upsample by transposed convolutions; ours see "
            "all scales as one batch",
        ),
        Component(
            "deep supervision", "implemented", "eight heads with equal weight; the mean of the last four predicts"
        ),
        Component(
            "encoder",
            "simplified",
            "that of the book's U-Net, trained from scratch; the paper's is a residual network of 101 layers",
        ),
        Component("lower spread", "absent", "the verdict compares means; the paper also reports smaller deviations"),
        Component("other organs", "absent", "tested on hearts alone, not on abdominal organs and brain tumours"),
    ),
)
