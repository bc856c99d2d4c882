"""CheXWorld, a world model of radiographs (Yue, Wang, Tao, Liu, Song and Huang, CVPR 2025).

Idea: a network that knows the body can say what it does not see. An encoder sees some tokens of a crop, in a changed
appearance; a predictor says what a slowly moving copy of the encoder sees at the hidden tokens, in another crop, and
before the appearance changed. It is told where that is and what the change was. All happens in latent space. For two
crops y_1, y_2 of height h and width w, tokens u, v on a grid N, and i, j in {1, 2}:

    x_i  = Mask(T_a_i(y_i), M_i)                                 changed by the action a_i, tokens M_i hidden       (9)
    D    = ((top_j - top_i) / h, (left_j - left_i) / w)          where y_j lies, seen from y_i; 0 for i = j         (4)
    phi  = (D_h N_h + u, D_w N_w + v)                            a token of y_j in the coordinates of x_i           (5)
    m    = policy(mask token + PE(phi), a_i)                     what the predictor is asked                        (8)
    L_ij = mean over M_j of |g(f(x_i) + PE, m) - LN f'(y_j)|^2   f' is the moving average of f                 (10, 11)
    L    = mean of L_11, L_22, L_12, L_21                                                                          (12)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.image_pool import PoolTask
from medcook.methods import Batch, Moment
from medcook.pretraining import follow, fresh
from medcook.recipes.pretraining._settings import BASELINE, BRAINS, LABELLED, scales
from medcook.recipes.pretraining._tokens import (
    MaskedAutoencoder,
    Predictor,
    TokenPretrained,
    TokenUNet,
    between,
    crops,
    grid_places,
    picked,
)
from medcook.recipes.recipe import Arm, Component, Recipe

BLOCKS, BLOCK_AREA, BLOCK_RATIO = 4, (0.15, 0.2), (0.75, 1.5)
"""Of the hidden blocks: their number, the share of the grid of each, and height over width."""
WINDOW_AREA = (0.75, 1.0)
"""Share of the grid of the square in which the context lies."""
LEAST = 4
"""Tokens that a context has at least, on small grids too."""
CHANGE, GAMMA, RADIUS = (0.6, 1.4), (0.5, 2.0), (0.1, 2.0)
"""Ranges of the factors of brightness and contrast, of gamma, and of a blur's standard deviation in pixels."""
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
"""The action that does nothing: brightness, contrast, gamma, blur."""


def drawn_actions(count: int, *, exposure_only: bool = False) -> Tensor:
    """Actions (count, 4): factors of brightness and contrast, gamma, and a blur in pixels.

    The first three act with probability 0.8, together, and the blur with 0.2; `exposure_only` draws two of them.
    """
    drawn = torch.stack(
        [between(*CHANGE, count), between(*CHANGE, count), between(*map(math.log, GAMMA), count).exp()], dim=1
    )
    drawn = torch.cat([drawn, between(*RADIUS, count)[:, None]], dim=1)
    acts = torch.stack([torch.rand(count) < 0.8] * 3 + [torch.rand(count) < 0.2], dim=1)
    if exposure_only:
        acts[:, 2:] = False
    return torch.where(acts, drawn, torch.tensor(UNCHANGED))


def changed(images: Tensor, actions: Tensor) -> Tensor:
    """T_a of images (B, C, H, W): between the darkest and the brightest value of each, which count as 0 and 1."""
    brightness, contrast, gamma, blur = (part.view(-1, 1, 1, 1).to(images.device) for part in actions.unbind(1))
    low = images.amin((1, 2, 3), keepdim=True)
    span = images.amax((1, 2, 3), keepdim=True) - low + 1e-5
    unit = ((images - low) / span * brightness).clamp(0, 1)
    mean = unit.mean((1, 2, 3), keepdim=True)
    unit = (mean + contrast * (unit - mean)).clamp(0, 1).pow(gamma)
    return blurred(unit, blur.flatten()) * span + low


def blurred(images: Tensor, deviations: Tensor) -> Tensor:
    """Images (B, C, H, W), each by a Gaussian of its own standard deviation (B,) in pixels; borders repeat."""
    half = math.ceil(3 * RADIUS[1])
    steps = torch.arange(-half, half + 1, device=images.device)
    kernels = torch.exp(-(steps**2) / (2 * deviations.clamp_min(1e-3)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    maps = F.pad(images.flatten(0, 1)[None], [half] * 4, mode="replicate")
    maps = F.conv2d(maps, kernels[:, None, None], groups=len(kernels))
    return F.conv2d(maps, kernels[:, None, :, None], groups=len(kernels)).view_as(images)


def side_of(size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width, in tokens, of a random rectangle on a grid."""
    tokens = size[0] * size[1] * float(between(*area, 1))
    shape = math.exp(float(between(math.log(ratio[0]), math.log(ratio[1]), 1)))
    height, width = round(math.sqrt(tokens * shape)), round(math.sqrt(tokens / shape))
    return min(max(height, 1), size[0]), min(max(width, 1), size[1])


def rectangles(count: int, size: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """(count, H W) bool: a rectangle of `side` somewhere on each grid."""
    inside = []
    for length, extent in zip(side, size, strict=True):
        start, line = torch.randint(0, extent - length + 1, (count, 1)), torch.arange(extent)
        inside.append((line >= start) & (line < start + length))
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)


def hide(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens that a context keeps (count, K), and of hidden ones (count, M), as many for each.

    Four blocks are hidden; the context is what is left of a large square. Some are left out at random, so that each
    image has as many.
    """
    side = side_of(size, BLOCK_AREA, BLOCK_RATIO)
    hidden = torch.stack([rectangles(count, size, side) for _ in range(BLOCKS)]).any(0)
    seen = rectangles(count, size, side_of(size, WINDOW_AREA, (1.0, 1.0))) & ~hidden
    most = max(LEAST, int(seen.sum(1).min()))
    kept = (torch.rand(hidden.shape) + 2 * seen + ~hidden).topk(min(most, hidden.shape[1])).indices
    return kept, (torch.rand(hidden.shape) + hidden).topk(int(hidden.sum(1).min())).indices


class Scene(NamedTuple):
    """What is predicted from what: 2 B crops, all first ones first.

    contexts, views  (2 B, C, H, W): x before tokens are hidden, and y
    kept, hidden     numbers of the tokens that a context keeps (2 B, K) and of those that are hidden (2 B, M)
    shift            D (B, 2), where the second crops lie, seen from the first, in crops
    actions          (2 B, 4): what made the contexts of the views
    """

    contexts: Tensor
    views: Tensor
    kept: Tensor
    hidden: Tensor
    shift: Tensor
    actions: Tensor


def other(pairs: Tensor) -> Tensor:
    """(2 B, ...) with first and second crops exchanged."""
    return pairs.roll(len(pairs) // 2, 0)


@dataclass
class CheXWorld(TokenPretrained):
    """Predicts what is hidden, what another crop shows and what it looked like before, all at once.

    layout    the other crop is predicted as well
    domains   contexts change their appearance, and the predictor is told how
    told      of where the other crop lies and how the appearance changed; else it has to guess
    momentum  of the moving average at first; it rises to 1 along a cosine
    """

    layout: bool = True
    domains: bool = True
    told: bool = True
    momentum: float = 0.97

    def pretext_parts(self, model: TokenUNet, inputs: int, dims: int) -> nn.Module:
        actions = len(UNCHANGED) if self.domains else 0
        predictor = Predictor(self.width, self.narrow, self.short, self.heads, self.width, actions)
        return nn.ModuleDict({"predictor": predictor, "target": fresh(model.encoder)})

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        return self.surprise(nets, self.scene(images.images))

    def scene(self, images: Tensor) -> Scene:
        """Two crops of each image (B, C, H, W) in an exposure of its own, and what becomes of them; at random."""
        device = images.device
        with torch.autocast(device.type, enabled=False):
            views, shift = crops(changed(images, drawn_actions(len(images), exposure_only=True)))
            actions = drawn_actions(len(views))
            contexts = changed(views, actions) if self.domains else views
        kept, hidden = hide(len(views), self.grid(views))
        return Scene(contexts, views, kept.to(device), hidden.to(device), shift, actions.to(device))

    def surprise(self, nets: nn.ModuleDict, scene: Scene) -> Tensor:
        """L of the module's docstring."""
        size = self.grid(scene.views)
        places = grid_places(size).to(scene.views.device)
        known, there = nets["model"].encoder(scene.contexts, scene.kept), places[scene.kept]
        with torch.no_grad():
            truth = nets["pretext"]["target"](scene.views).float()
            truth = picked(F.layer_norm(truth, truth.shape[-1:]), scene.hidden)
        asked, actions = places[scene.hidden], self.told * scene.actions
        if self.layout:
            move = torch.cat([scene.shift, -scene.shift])[:, None] * torch.tensor(size, device=asked.device)
            asked = torch.cat([asked, other(asked) + self.told * move])
            truth = torch.cat([truth, other(truth)])
            known, there, actions = (torch.cat([part, part]) for part in (known, there, actions))
        guess = nets["pretext"]["predictor"](known, there, asked, actions)
        return F.mse_loss(guess.float(), truth)

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        """The average follows; at the end it takes the encoder's place, as in the paper's fine-tuning."""
        encoder, target = nets["model"].encoder, nets["pretext"]["target"]
        follow(target, encoder, 1 - (1 - self.momentum) * (1 + math.cos(math.pi * now.fraction)) / 2)
        if now.step == now.steps - 1:
            encoder.load_state_dict(target.state_dict())


RADIOGRAPHS = PoolTask("chest_xray", labelled=LABELLED, evaluation="test", pool=("chest_xray",))

recipe = Recipe(
    paper="chexworld",
    title="A world model of chest X-rays: hidden parts, other parts, other exposures",
    claim="With three labelled chest X-rays and the others' images, a world model that predicts hidden parts, another "
    "crop and another exposure gives a higher Dice of the lungs than a masked autoencoder.",
    arms={
        "from scratch": Arm(TokenPretrained(share=0.0)),
        "chexworld": Arm(CheXWorld()),
        "local structure alone": Arm(CheXWorld(layout=False, domains=False)),
        "masked autoencoder": Arm(MaskedAutoencoder()),
        "without global layout": Arm(CheXWorld(layout=False)),
        "without domain variation": Arm(CheXWorld(domains=False)),
        "not told": Arm(CheXWorld(told=False)),
        "u-net from scratch": Arm(BASELINE),
    },
    compare=("chexworld", "masked autoencoder"),
    ablation=("chexworld", "local structure alone"),
    replicate="draw",
    scales=scales(BRAINS, RADIOGRAPHS, "chexworld", "local structure alone", "masked autoencoder"),
    source="official code, github.com/LeapLabTHU/CheXWorld (PRETRAIN.md, models/jepa_add.py, data_utils); text, arXiv "
    "2504.13820; figures: its table 2",
    published={
        "SIIM-ACR pneumothorax, ViT-B": 0.8458,
        "SIIM-ACR pneumothorax, masked autoencoder": 0.8301,
        "RSNA pneumonia, ViT-B": 0.7902,
        "RSNA pneumonia, masked autoencoder": 0.7739,
    },
    components=(
        Component(
            "joint-embedding prediction",
            "implemented",
            "context encoder, predictor half as wide, moving average as target, normalised tokens, squared error; the "
            "average is what is fine-tuned. A ViT of 3 layers, 64 channels and patches of 8 pixels for ViT-B/16, with "
            "the U-Net's way up of the official segmentation, each size in one step: 1.5 times the cost of the book's "
            "U-Net, and 1.7 times in the pretext. It is the network of every arm at `full`. The average starts at "
            "0.97, where the paper has 0.996 for many times the steps",
        ),
        Component(
            "local anatomical structures",
            "implemented",
            "four blocks of 15 to 20% of the grid are hidden, and the context is what is left of a square of 75 to "
            "100%; the encoder gets the tokens that are left and no others. Which tokens are dropped so that all "
            "images have as many is drawn, where the official code cuts off the last ones",
        ),
        Component(
            "global anatomical layouts",
            "implemented",
            "two crops of the same size, 30 to 100% of the image; the place of a token in the other crop is encoded in "
            "the coordinates of the context. As in the official code the hidden tokens of the other crop are "
            "predicted, not all of them as in the text. Crops are not mirrored, which the code does and the text does "
            "not say",
        ),
        Component(
            "domain variations",
            "implemented",
            "brightness, contrast, gamma and blur in the official ranges, on an image's own range of values; the "
            "action is joined with the mask token by three layers. The target has an exposure of its own, in the "
            "ablation too",
        ),
        Component(
            "unified framework",
            "implemented",
            "each context and each target is encoded once and serves two of the four predictions",
        ),
        Component(
            "comparison with other self-supervised methods",
            "simplified",
            "a masked autoencoder on the same crops, with the same encoder and a predictor as small as the world "
            "model's: the one of the paper's competitors that saw X-rays alone. No other method, and no foundation "
            "model, is run",
        ),
        Component(
            "transfer to eight benchmarks",
            "simplified",
            "lung masks of three patients of Montgomery and Shenzhen, after 300 steps on the training patients' images "
            "instead of 300 epochs on half a million. Looked at before, on one draw that is not scored and its "
            "validation patients: with five labelled patients, Dice 0.938 from scratch and 0.937 with the world model. "
            "Three were taken since five leave little to gain",
        ),
        Component("analyses of what was learned", "absent", "only what fine-tuning makes of it is measured"),
    ),
)
