"""Medal S: spatio-textual prompt model for medical segmentation (Shi, Chen, Liu, Zhang, Chen and Li, 2025; arXiv
2511.13001).

A prompt is a name and a rough mask. All names of an image and their masks, a channel each, are answered in one pass,
where prompting one class after the other encodes image and mask anew for each. With pixel features F, the weights w_s
that name s has become (SAT's, see `_queries.py`), and rough masks M_s at the image's own resolution,

  E = sum_s w_s M_s,    F' = conv([F, E]),    logits_s = F' . w_s

so a mask is bound to its name by w_s, and no channel needs to know which class it is for. The image gets one more
channel, all rough masks together. In training rough masks are made from the truth: blocks are taken out of it and put
into it. Nobody has to draw one afterwards: the answer to the names alone is the rough mask of a second pass. So that it
does not only repeat itself, every block is answered from the rough masks of the other blocks.

How well it does was not looked at before the test, but for a short run on the embedded brains.
"""

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medcook.data import Case
from medcook.evaluation import row
from medcook.methods import Batch
from medcook.metrics import dice
from medcook.recipes.language._queries import Queried, QueriedUNet, dotted
from medcook.recipes.language._settings import BRAIN, NAMED, NAMED_BUDGET, NAMED_QUICK, own_values, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained

SIDES = (4, 8, 16)
"""Pixels a side of the blocks that are taken out of rough masks or put into them."""
BLOCK = 8
"""Pixels a side of the blocks that a second pass answers from one another."""


class SpatialUNet(QueriedUNet):
    """The network of queries that also sees rough masks.

    spatial  whether it does; if not, it is the network of queries
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, layers: int, spatial: bool):
        super().__init__(inputs + spatial, channels, width, layers)
        self.spatial = spatial
        if spatial:
            fine = channels[0]
            norm = nn.InstanceNorm2d(fine, affine=True)
            self.refine = nn.Sequential(nn.Conv2d(2 * fine, fine, 3, padding=1), norm, nn.LeakyReLU())

    def bound(self, pixels: Tensor, weights: Tensor, rough: Tensor) -> Tensor:
        """Pixel features (B, C, H, W) that know rough masks (B, S, H, W), each by its name's weights (B, S, C + 1)."""
        bound = torch.einsum("bshw,bsc->bchw", rough, weights[..., :-1].float())
        return self.refine(torch.cat([pixels, bound.to(pixels.dtype)], dim=1))

    def prompted(
        self, images: Tensor, queries: Tensor, nobody: Tensor, rough: Tensor | None, union: Tensor | None = None
    ) -> Tensor:
        """Logits (B, S, H, W) of queries (B, S, width) and rough masks (B, S, H, W), or of names alone.

        union  (B, 1, H, W): what all rough masks cover, if it is to be something else
        """
        if not self.spatial:
            return self(images, queries, nobody)
        if union is None:
            union = images.new_zeros(images[:, :1].shape) if rough is None else rough.amax(1, keepdim=True)
        maps = self.encode(torch.cat([images, union], dim=1))
        pixels, weights = self.pixels(maps), self.mask(self.ask(maps, queries, nobody))
        return dotted(pixels if rough is None else self.bound(pixels, weights, rough), weights)


def blocks(chosen: Tensor, side: int, size: torch.Size) -> Tensor:
    """What is chosen of coarse blocks (..., h, w), as a map (..., H, W) of `size`."""
    large = chosen.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
    return large[..., : size[0], : size[1]]


def simulated(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Rough masks (B, S, H, W) of true ones, and what they cover together (B, 1, H, W); by torch's own generator.

    Of a third of the images there are none; else a third of the classes is left out, 30% to 90% of all blocks are taken
    out of all masks, more are taken out of some, and up to 2% are put into some.
    """
    size, device = masks.shape[2:], masks.device
    side = SIDES[int(torch.randint(len(SIDES), ()))]
    count, classes = masks.shape[:2]
    grid = [-(-length // side) for length in size]
    draw = lambda *shape: torch.rand(count, *shape, device=device)  # noqa: E731
    out = draw(1, *grid) < 0.3 + 0.6 * draw(1, 1, 1)
    into = (draw(1, *grid) < 0.02 * draw(1, 1, 1)) & ~out
    mine = [draw(classes, *grid) <= draw(1, *grid) for _ in range(2)]
    drawn = draw(1, 1, 1) > 0.35
    kept = masks.bool() & (draw(classes, 1, 1) > 0.3)
    rough = (kept & blocks(~out & mine[0], side, size)) | blocks(into & mine[1], side, size)
    union = (kept.any(1, keepdim=True) & blocks(~out, side, size)) | blocks(into, side, size)
    return (rough & drawn).float(), (union & drawn).float()


def halves(size: torch.Size, device: torch.device) -> Tensor:
    """(H, W) bool: every other of the blocks of `BLOCK` pixels, as on a chessboard."""
    rows, columns = (torch.arange(length, device=device) // BLOCK for length in size)
    return (rows[:, None] + columns) % 2 == 0


@dataclass
class MedalS(Queried):
    """Names and rough masks.

    spatial  rough masks are there; if not, names are all that is heard, and there is one pass
    order    the names of an image are asked for in `parallel`, or one after the other (`sequential`)
    alone    in training, the share of images that are asked for one of their names alone
    blind    in training, the share of steps without rough masks
    """

    spatial: bool = True
    order: Literal["parallel", "sequential"] = "parallel"
    alone: float = 0.3
    blind: float = 0.1

    def network_for(self, inputs: int) -> SpatialUNet:
        return SpatialUNet(inputs, self.channels, self.width, self.layers, self.spatial)

    def chosen(self, labelled: Batch) -> tuple[Tensor, Tensor]:
        """A sheet, of which some rows keep one of their names alone."""
        values, known = super().chosen(labelled)
        asked = values > 0
        first = torch.where(asked, torch.rand(values.shape, device=values.device), -1.0).argmax(1, keepdim=True)
        single = torch.rand(len(values), 1, device=values.device) < self.alone
        dropped = single & (torch.arange(values.shape[1], device=values.device) != first)
        return values.masked_fill(dropped, 0), known & ~dropped

    def asked(self, net: nn.Module, labelled: Batch, queries: Tensor, values: Tensor) -> Tensor:
        masks = (labelled.labels[:, None] == values[..., None, None]) & (values > 0)[..., None, None]
        rough, union = simulated(masks)
        blind = bool(torch.rand(()) < self.blind)
        return net.prompted(labelled.images, queries, values == 0, None if blind else rough, union)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        return self.passes(nets, images, sentences)[-1]

    def passes(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...], rough: Tensor | None = None):
        """Answers (B, S, H, W) of the first pass and of the last; `rough` (B, S, H, W) is what somebody drew, if so."""
        if not sentences:
            return (images.new_zeros(len(images), 0, *images.shape[2:]),) * 2
        if self.order == "sequential" and len(sentences) > 1:
            drawn = [None] * len(sentences) if rough is None else rough.split(1, dim=1)
            found = [self.passes(nets, images, (one,), mine) for one, mine in zip(sentences, drawn, strict=True)]
            return tuple(torch.cat(answers, dim=1) for answers in zip(*found, strict=True))
        net = nets["average"]
        queries = net.text(sentences)[None].expand(len(images), -1, -1)
        nobody = torch.zeros(queries.shape[:2], dtype=torch.bool, device=images.device)
        nothing = images.new_zeros(len(images), len(sentences), *images.shape[2:])
        first = net.prompted(images, queries, nobody, nothing if rough is None else rough).sigmoid()
        if not self.spatial or rough is not None:
            return first, first
        return first, refined(lambda mask: net.prompted(images, queries, nobody, mask).sigmoid(), (first > 0.5).float())


def refined(answer, rough: Tensor) -> Tensor:
    """A second pass: `answer` of rough masks (B, S, H, W), every block from what the other half of all blocks shows."""
    half = halves(rough.shape[2:], rough.device)
    return torch.where(half, answer(rough * ~half), answer(rough * half))


def coarse(masks: Tensor) -> Tensor:
    """What a quick hand draws of masks (B, S, H, W) bool: the blocks of `BLOCK` pixels that they fill by half."""
    shares = F.avg_pool2d(masks.float(), BLOCK, ceil_mode=True)
    return blocks(shares >= 0.5, BLOCK, masks.shape[2:]).float()


@torch.no_grad()
def work(fitted, image: Tensor, sentences: tuple[str, ...]) -> dict[str, float]:
    """Passes through the network, and billions of floating-point operations, that a slice (C, H, W) takes."""
    nets, seen = trained(fitted), []
    handle = nets["average"].net.down[0].register_forward_hook(lambda *_: seen.append(1))
    with FlopCounterMode(display=False) as counter:
        fitted.method.answer(nets, image[None], sentences)
    handle.remove()
    return {"passes": float(len(seen)), "gigaflops": counter.get_total_flops() / 1e9}


@torch.no_grad()
def spatial_rows(fitted, case: Case) -> list[dict]:
    """A row for each structure that is named: Dice over all slices of a case, on the network's grid.

    dice    of the last answer to the names alone;   first  of the first pass
    drawn   where somebody drew rough masks, `coarse` ones of the truth
    passes, gigaflops   see `work`;   microseconds  for a slice, as measured, a whole number
    """
    method, nets, task, rows = fitted.method, trained(fitted), fitted.task, []
    named = [value for value in task.structures if value <= len(method.language.names) and method.language.plain(value)]
    drawn = case.attributes.get("annotated", own_values(task, case))
    values = [value for value in drawn if value in named]
    if not values:
        return rows
    sentences = tuple(method.language.name(value) for value in values)
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    truth = torch.stack([labels == value for value in values], dim=1)
    parts, begun = images.split(16), perf_counter()
    pairs = [method.passes(nets, part, sentences) for part in parts]
    took = (perf_counter() - begun) / len(images)
    rough = zip(parts, coarse(truth).split(16), strict=True)
    answers = [torch.cat(found) > 0.5 for found in zip(*pairs, strict=True)]
    answers.append(torch.cat([method.passes(nets, part, sentences, mask)[0] for part, mask in rough]) > 0.5)
    effort = once(fitted, f"work {len(values)}", lambda: work(fitted, images[0], sentences))
    for number, value in enumerate(values):
        true, (first, last, hybrid) = truth[:, number].numpy(), (found[:, number].numpy() for found in answers)
        columns = {"dice": dice(last, true), "first": dice(first, true), "drawn": dice(hybrid, true)}
        empty = {"missed": bool(true.any() and not last.any()), "false_alarm": bool(last.any() and not true.any())}
        told = {"set": case.attributes.get("set", ""), "microseconds": round(took * 1e6)}
        rows.append(row(case, task.structures[value]) | columns | empty | told | effort)
    return rows


ARMS = {"parallel": MedalS(), "sequential": MedalS(order="sequential"), "names alone": MedalS(spatial=False)}

recipe = Recipe(
    paper="medal-s",
    title="Medal S: names and rough masks, all at once",
    claim="Asked for all structures in one go, a network of names and rough masks segments as well, within a Dice of "
    "0.02, as when it is asked for one after the other, which takes as many times the passes as there are structures.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("parallel", "sequential"),
    ablation=("parallel", "names alone"),
    expect="non-inferior",
    margin=0.02,
    score=spatial_rows,
    scales=scales(
        NAMED_QUICK,
        NAMED,
        *ARMS,
        budget=NAMED_BUDGET,
        methods={name: replace(method, language=BRAIN) for name, method in ARMS.items()},
    ),
    published={
        "time saved by parallel prompting, 24 classes, at least": 0.9,
        "five modalities, DSC": 0.7544,
        "five modalities, DSC of SAT": 0.6983,
    },
    source="the abstract; model/medals.py, data/cvpr25_train_dataset.py, train/trainer.py and inference.py in the "
    "authors' repository, github.com/yinghemedical/Medal-S",
    components=(
        Component(
            "channel-wise alignment of names and masks",
            "implemented",
            "rough masks times the weights of their names, summed, beside the features of the pixels; a convolution "
            "with instance norm. At the image's own resolution, here 64 x 64; two dimensions in place of three",
        ),
        Component(
            "all classes in parallel",
            "implemented",
            "columns `passes`, `gigaflops` and `microseconds`. Both orders are asked of networks that were trained "
            "alike: in training three images in ten are asked for one name alone, which is ours, so that neither is "
            "new to it. The seconds of a run are those of training, and alike. At most seven structures are asked for",
        ),
        Component(
            "rough masks made from the truth",
            "simplified",
            "blocks of 4, 8 or 16 pixels are taken out and put in, classes and whole images are left out, with their "
            "rates; of one size for a batch, and each class keeps its share of blocks by chance",
        ),
        Component(
            "self-refinement",
            "simplified",
            "a second pass, in which every block is answered from the others, as in their inference; they repeat it "
            "with random halves of several sizes, here it is done once, on a chessboard. Column `first`: before it",
        ),
        Component(
            "architecture",
            "implemented",
            "theirs, of volumes, in `medcook.networks.medal_s`: 109 million weights of the network, and BioLORD as its "
            "text encoder; tested against an implementation of its own. What is trained here is the small network",
        ),
        Component(
            "checkpoint",
            "implemented",
            "both published files, of network and text encoder, by their names of weights; tested on small ones. The "
            "published weights are not at hand, nor the words of BioLORD's tokenizer",
        ),
        Component("hybrid mode", "implemented", "column `drawn`: rough masks come from the truth's blocks of 8 pixels"),
        Component("dynamic resampling", "absent", "slices of 64 x 64 are one patch"),
        Component("two stages at two resolutions", "absent", "there is one resolution"),
        Component("text preprocessing and post-processing", "absent", "names are given; answers stay as they are"),
        Component("243 classes of BiomedSegFM", "absent", "14 structures of five sets"),
    ),
)
