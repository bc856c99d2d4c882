"""H-SAM: Unleashing the Potential of SAM for Medical Adaptation via Hierarchical Decoding (Cheng et al., CVPR 2024).

SAM without prompts, decoded twice. The first decoder is SAM's own; its masks are a prior that steers a second one: they
say which regions of the embedding matter, and where the token of each class is to look. The second decoder ends in a
pixel decoder that takes up the first one's features and goes on to a finer grid.

    prior      p = softmax(masks of the first decoder), (K, N) on the N tokens of the image; T its class tokens
    enhance    G = gate(attention over classes of (T F^T + balanced noise)),  F2 = F (1 + G)       image features F
    look       softmax(Q K^T / sqrt(d) + a_k log(0.05 + p_k))                 token k of the second decoder
    loss       1/2 loss(first) + 1/2 loss(second);  the prediction is the mean of both logits

Noise is stronger where the true class is rare: classes that few pixels belong to are seen in more variants.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._adapters import lora, scales
from medcook.sam.adapting import AdaptedSam, Segmenter, fitted_in, no_prompts
from medcook.sam.model import FINE, SIZE, Embedding
from medcook.sam.predictor import restore

FLOOR = 0.05
"""Added to the prior before its logarithm: where it is zero, attention is weakened, not forbidden."""


def decode(model: Segmenter, transformer: nn.Module, image: Tensor, tokens: Tensor, sparse: Tensor, steer=None):
    """SAM's two-way transformer: class tokens (K, C) and image (B, C, h, w), to (B, K, C) and (B, C, h, w).

    sparse  tokens of no prompts (B, 1, P, C)
    steer   (B, K, h * w) is added to the attention of the class tokens to the image, in each layer
    """
    sam = model.sam.sam
    asked = torch.cat([sam.mask_decoder.iou_token.weight, tokens]).expand(len(image), 1, -1, -1)
    if steer is not None:
        steer = F.pad(steer, (0, 0, 1, sparse.shape[2]))[:, None].to(image.dtype)
    attended, changed = transformer(
        point_embeddings=torch.cat([asked.to(sparse.dtype), sparse], dim=2),
        image_embeddings=image,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand_as(image),
        attention_similarity=steer,
    )
    return attended[:, 0, 1 : 1 + len(tokens)], changed.transpose(2, 3).reshape(image.shape)


class Upscale(nn.Module):
    """The upscaling of SAM's decoder: image (B, C, h, w) to (B, C / 8, 4 h, 4 w), with the skips of the small SAM."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.first, self.norm, self.second = decoder.upscale_conv1, decoder.upscale_layer_norm, decoder.upscale_conv2

    def forward(self, image: Tensor, embedding: Embedding) -> Tensor:
        image = F.gelu(self.norm(self.first(image) + embedding.eighth))
        return F.gelu(self.second(image) + embedding.quarter)


class MaskGuidedAttention(nn.Module):
    """Class maps (B, K, N), which attend to one another, to a gate (B, 1, N) between 0 and 1."""

    def __init__(self, classes: int, positions: int, heads: int = 4):
        super().__init__()
        self.attention = nn.MultiheadAttention(positions, heads, batch_first=True)
        self.norm, self.select = nn.LayerNorm(positions), nn.Linear(classes, 1)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            maps = F.layer_norm(maps.float(), maps.shape[-1:])
            maps = self.norm(maps + self.attention(maps, maps, maps, need_weights=False)[0])
            return self.select(maps.transpose(1, 2)).transpose(1, 2).sigmoid()


def balanced_noise(labels: Tensor, classes: int, side: int) -> Tensor:
    """(B, 1, side * side): how strong noise is at each place, 0 for the most frequent class up to 1 for an absent one.

    labels (B, H, W); the strength of a class is 1 - its pixels / those of the most frequent one; places that hold
    several classes get the mean.
    """
    known = torch.where(labels == IGNORE, 0, labels).long()
    counts = torch.bincount(known.flatten(), minlength=classes).float()
    strength = 1 - counts / counts.max()
    return F.adaptive_avg_pool2d(strength[known][:, None], side).flatten(2)


class Hierarchy(nn.Module):
    """A segmenter and the second decoder; images (B, C, H, W) to logits (B, K, H, W), the mean of both.

    guided  False: the second decoder is there, but the prior steers nothing
    """

    def __init__(self, first: Segmenter, guided: bool = True, noise: float = 0.5):
        super().__init__()
        decoder, classes = first.sam.sam.mask_decoder, len(first.tokens)
        self.first, self.guided, self.noise = first, guided, noise
        self.transformer = deepcopy(decoder.transformer).requires_grad_(True)
        self.upscale = deepcopy(Upscale(decoder)).requires_grad_(True)
        self.tokens = nn.Parameter(first.tokens.detach().clone())
        self.heads = deepcopy(first.heads).requires_grad_(True)
        width, fine = decoder.upscale_conv2.out_channels, 16
        self.gate = MaskGuidedAttention(classes, (SIZE // 16) ** 2)
        self.strength = nn.Parameter(torch.ones(classes))
        last = nn.Conv2d(2 * width, width, 3, padding=1)
        self.pixels = nn.Sequential(nn.Conv2d(2 * width + fine, 2 * width, 3, padding=1), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack(self.both(images)).mean(0)

    def both(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K, H, W) of the first and of the second decoder; with labels, balanced noise is added."""
        embedding = self.first.embed(fitted_in(images))
        plain = no_prompts(len(images), images.device)
        embedding, sparse = self.first.sam.prompted(embedding, plain)
        transformer = self.first.sam.sam.mask_decoder.transformer
        tokens, image = decode(self.first, transformer, embedding.coarse, self.first.tokens, sparse)
        pixels = Upscale(self.first.sam.sam.mask_decoder)(image, embedding)
        logits = masks(self.first.heads, tokens, pixels)
        second = self.second(embedding, sparse, tokens, image, pixels, logits, labels)
        return tuple(
            restore(each, tuple(images.shape[2:])) for each in (self.first.sam.refine(logits, embedding), second)
        )

    def second(self, embedding, sparse, tokens, image, pixels, logits, labels) -> Tensor:
        """(B, K, FINE, FINE) logits from what the first decoder found."""
        features, steer = embedding.coarse, None
        if self.guided:
            maps = tokens @ image.flatten(2)
            if labels is not None:
                strength = self.noise * balanced_noise(labels_on(labels), len(self.tokens), image.shape[-1])
                maps = maps + strength * maps.detach().std() * torch.randn_like(maps)
            features = features * (1 + self.gate(maps).view(len(maps), 1, *features.shape[2:]))
            steer = steering(logits.detach(), self.strength, image.shape[-1])
        tokens, image = decode(self.first, self.transformer, features, self.tokens, sparse, steer)
        finer = self.pixel_decoder(self.upscale(image, embedding), pixels, embedding.fine)
        return masks(self.heads, tokens, finer)

    def pixel_decoder(self, mine: Tensor, theirs: Tensor, fine: Tensor) -> Tensor:
        """Features (B, C, 40, 40) of the second and the first decoder, and the stem's (B, 16, 80, 80), to the latter's
        grid; at first no more than the second decoder's, enlarged."""
        mine, theirs = (
            F.interpolate(each, (FINE, FINE), mode="bilinear", align_corners=False) for each in (mine, theirs)
        )
        return mine + self.pixels(torch.cat([mine, theirs, fine], dim=1))


def masks(heads: nn.ModuleList, tokens: Tensor, pixels: Tensor) -> Tensor:
    """Class tokens (B, K, C) through their heads, times pixel features (B, c, h, w): logits (B, K, h, w)."""
    weights = torch.stack([head(tokens[:, k]) for k, head in enumerate(heads)], dim=1)
    return torch.einsum("bkc,bchw->bkhw", weights, pixels)


def steering(logits: Tensor, strength: Tensor, side: int) -> Tensor:
    """a_k log(FLOOR + p_k), (B, K, side * side), of the prior's logits (B, K, h, w)."""
    prior = F.adaptive_avg_pool2d(logits.float().softmax(1), side).flatten(2)
    return strength[:, None] * (FLOOR + prior).log()


def labels_on(labels: Tensor) -> Tensor:
    """Labels (B, H, W) on the padded square that the network sees: the padding is background."""
    longest = max(labels.shape[1:])
    return F.pad(labels, (0, longest - labels.shape[2], 0, longest - labels.shape[1]))


@dataclass
class HSam(AdaptedSam):
    """The small SAM with LoRA in its encoder and two decoders.

    rank    of LoRA; `second` False: the first decoder alone, which is SAMed
    guided  False: the second decoder without the prior
    noise   strength of the class-balanced noise, in standard deviations of the class maps
    """

    rank: int = 4
    second: bool = True
    guided: bool = True
    noise: float = 0.5

    def adapt(self, model: Segmenter) -> nn.Module:
        lora(model.sam.sam.vision_encoder, self.rank)
        return Hierarchy(model, self.guided, self.noise) if self.second else model

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if not self.second:
            return super().training_step(nets, labelled, unlabelled, now)
        loss = find_loss(self.loss)
        both = nets["model"].both(labelled.images, labelled.labels)
        return sum(loss(logits.float(), labelled.labels) for logits in both) / 2


recipe = Recipe(
    paper="h-sam",
    title="H-SAM: a first mask guides a second decoder",
    claim="With three labelled patients, a second decoder that the first one's masks guide gives a higher Dice than "
    "prompt-free SAM with the same LoRA encoder.",
    arms={
        "one decoder": Arm(HSam(second=False)),
        "h-sam": Arm(HSam()),
        "without guidance": Arm(HSam(guided=False)),
        "without noise": Arm(HSam(noise=0.0)),
        "decoder only": Arm(AdaptedSam()),
        "u-net": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("h-sam", "one decoder"),
    ablation=("h-sam", "without guidance"),
    replicate="draw",
    scales=scales("one decoder", "h-sam", "without guidance", "u-net"),
    published={"gain in Dice over prompt-free SAM, 10% of slices": 0.0478},
    source="the paper's abstract; structure of the second decoder: the official code, github.com/Cccccczh404/H-SAM",
    components=(
        Component(
            "prior mask of SAM's decoder",
            "implemented",
            "softmax of the first decoder's class masks; gradients do not go through it (our reading)",
        ),
        Component(
            "class-balanced mask-guided self-attention",
            "implemented",
            "one attention layer over class maps, noise by the class at each place; gate by a sigmoid (the official "
            "code takes two layers, noise by rank and a softmax)",
        ),
        Component(
            "learnable mask cross-attention",
            "implemented",
            "the log prior, times a learnt strength for each class, is added to the second decoder's attention from "
            "tokens to image; its last attention layer is left as it is",
        ),
        Component(
            "hierarchical pixel decoder",
            "simplified",
            "features of both decoders and of the stem at half the input's resolution; a residual that is zero at "
            "first, so that the second decoder starts as a copy of the first",
        ),
        Component("LoRA encoder", "implemented", "peft's LoRA of rank 4, in the baseline too"),
        Component("comparison with semi-supervised models", "absent", "chapter 04 has these, with other budgets"),
    ),
)
