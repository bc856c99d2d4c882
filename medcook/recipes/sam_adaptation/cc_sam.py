"""CC-SAM (Gowda and Clifton, ECCV 2024): a frozen CNN beside SAM's encoder, fused by variational attention, and text.

A frozen convolutional network sees what is local, the frozen vision transformer what is global; adapters of features
and of positions are all that learns in the transformer. How much of each branch every channel takes is a random
variable: its mean and spread are read from both branches, it is sampled while learning and its mean used afterwards,
and its distribution is kept near a prior. A description in words is a prompt. With g the mean over the image:

    m, s = MLP[g(V), g(C)],   a ~ N(m, s^2),   w = softmax(a) over the branches,   E = w_V V + w_C C
    loss = segmentation + beta KL(N(m, s^2) || N(m_0, 1))
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.few_shot.imagenet import DEEP, WIDTHS, imagenet_maps
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.networks.squeezenet import SqueezeNet, load_squeezenet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam.adapting import AdaptedSam, Segmenter, fitted_in, no_prompts
from medcook.sam.model import PATCH, SIZE, Embedding, masks_of
from medcook.sam.predictor import restore
from medcook.tasks import Budget, Task

SIDE = SIZE // PATCH
DESCRIPTION = "an irregular shape with a faint boundary of low contrast against a grey and noisy background"
"""What a person might say of the structures, cells and others alike; one description, for all images."""


class FeatureAdapter(nn.Module):
    """Tokens (B, h, w, width) plus what a bottleneck makes of them; nothing at first."""

    def __init__(self, width: int, middle: int = 48):
        super().__init__()
        self.down, self.up = nn.Linear(width, middle), zeroed(nn.Linear(middle, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.up(F.gelu(self.down(tokens)))


class PositionAdapter(nn.Module):
    """Positions (1, h, w, width) plus what a convolution over neighbouring ones makes of them; nothing at first."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = zeroed(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, positions: Tensor) -> Tensor:
        return positions + self.conv(positions.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class VariationalFusion(nn.Module):
    """Fuses two branches (B, hidden, h, w) with weights that are a random variable.

    The prior, and the weights at first, give `trust` of 1 to the transformer.
    """

    def __init__(self, hidden: int, trust: float = 0.9, middle: int = 64):
        super().__init__()
        self.infer = nn.Sequential(nn.Linear(2 * hidden, middle), nn.GELU(), zeroed(nn.Linear(middle, 4 * hidden)))
        odds = torch.tensor(trust / (1 - trust)).log()
        self.register_buffer("prior", torch.stack([odds / 2, -odds / 2])[:, None].repeat(1, hidden))

    def forward(self, vit: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """The fused features, and the mean divergence of the weights' distribution from the prior."""
        both = torch.cat([vit.mean((2, 3)), cnn.mean((2, 3))], dim=1)
        shift, log_spread = self.infer(both).float().view(len(both), 2, 2, -1).unbind(1)
        mean = self.prior + shift
        sampled = mean + torch.randn_like(mean) * log_spread.exp() if self.training else mean
        weights = sampled.softmax(1)[..., None, None].to(vit.dtype)
        return weights[:, 0] * vit + weights[:, 1] * cnn, divergence(shift, log_spread)


def divergence(shift: Tensor, log_spread: Tensor) -> Tensor:
    """Mean of KL(N(m_0 + shift, spread^2) || N(m_0, 1)) = (shift^2 + spread^2 - 1) / 2 - log spread."""
    return (0.5 * (shift**2 + (2 * log_spread).exp() - 1) - log_spread).mean()


class TextPrompt(nn.Module):
    """A description as tokens (1, words, hidden): an embedding of each word, learnt from scratch, and an MLP."""

    def __init__(self, description: str, hidden: int):
        super().__init__()
        words = description.split()
        vocabulary = sorted(set(words))
        self.register_buffer("words", torch.tensor([vocabulary.index(word) for word in words]))
        self.embedding = nn.Embedding(len(vocabulary), hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self) -> Tensor:
        return self.mlp(self.embedding(self.words))[None]


class CCSam(nn.Module):
    """A segmenter with a frozen CNN beside its encoder: images (B, C, H, W) to logits (B, classes, H, W)."""

    def __init__(self, segmenter: Segmenter, cnn: str, adapters: bool, description: str):
        super().__init__()
        self.segmenter = segmenter
        encoder = segmenter.sam.sam.vision_encoder
        width, hidden = encoder.config.hidden_size, encoder.config.output_channels
        self.features = nn.ModuleList(FeatureAdapter(width) for _ in encoder.layers) if adapters else None
        self.positions = PositionAdapter(width) if adapters else None
        self.cnn = self.project = self.fusion = None
        if cnn != "none":
            made = load_squeezenet() if cnn == "imagenet" else SqueezeNet(features_only=True)
            self.cnn = made.requires_grad_(False)
            self.project = nn.Sequential(nn.Conv2d(WIDTHS[DEEP], hidden, 1), nn.GroupNorm(1, hidden))
            self.fusion = VariationalFusion(hidden)
        self.text = TextPrompt(description, hidden) if description else None

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, classes, H, W), and the divergence of the fusion where there is one."""
        fitted, kl = fitted_in(images), None
        embedding = self.embed(fitted)
        if self.cnn is not None:
            coarse, kl = self.fusion(embedding.coarse, self.local(fitted))
            embedding = embedding._replace(coarse=coarse)
        return restore(self.masks(embedding), tuple(images.shape[2:])), kl

    def local(self, fitted: Tensor) -> Tensor:
        """What the frozen CNN sees of (B, 1, SIZE, SIZE): (B, hidden, SIDE, SIDE)."""
        maps = imagenet_maps(self.cnn, fitted)[DEEP]
        return self.project(
            F.interpolate(maps.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        )

    def embed(self, fitted: Tensor) -> Embedding:
        """The transformer's embedding, with adapted features and positions."""
        sam = self.segmenter.sam
        encoder = sam.sam.vision_encoder
        place = encoder.pos_embed if self.positions is None else self.positions(encoder.pos_embed)
        tokens = encoder.patch_embed(fitted) + place
        for number, layer in enumerate(encoder.layers):
            tokens = layer(tokens)
            if self.features is not None:
                tokens = self.features[number](tokens)
        fine, quarter, eighth = encoder.patch_embed.finer
        return Embedding(encoder.neck(tokens), sam.skips[0](eighth), sam.skips[1](quarter), fine)

    def masks(self, embedding: Embedding) -> Tensor:
        """(B, classes, FINE, FINE) logits; the words are tokens beside the (empty) prompts."""
        sam, count = self.segmenter.sam, len(embedding.coarse)
        embedding, sparse = sam.prompted(embedding, no_prompts(count, embedding.coarse.device))
        if self.text is not None:
            words = self.text().to(sparse.dtype).expand(count, 1, -1, -1)
            sparse = torch.cat([sparse, words], dim=2)
        logits, _ = masks_of(sam.sam, embedding, sparse, self.segmenter.tokens, self.segmenter.heads)
        return sam.refine(logits, embedding)


@dataclass
class CCSamMethod(AdaptedSam):
    """Adapters, fusion, words and decoder learn; both encoders stay.

    cnn          the second branch: as ImageNet left it, with random weights, or none (then nothing is fused)
    adapters     False: neither adapters of features nor of positions
    description  the text prompt; empty for none
    beta         weight of the divergence
    """

    cnn: Literal["imagenet", "random", "none"] = "imagenet"
    adapters: bool = True
    description: str = DESCRIPTION
    beta: float = 0.01

    def adapt(self, model: Segmenter) -> CCSam:
        return CCSam(model, self.cnn, self.adapters, self.description)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits, kl = nets["model"].answer(labelled.images)
        loss = find_loss(self.loss)(logits.float(), labelled.labels)
        return loss if kl is None else loss + self.beta * kl


recipe = Recipe(
    paper="cc-sam",
    title="CC-SAM: a frozen CNN beside SAM, and a description in words",
    claim="With a frozen CNN fused in, adapters and a text prompt, the small SAM segments cells of low contrast better "
    "than when it is fine-tuned whole.",
    arms={
        "fine-tuned": Arm(AdaptedSam(tuned=("encoder", "prompts", "decoder"))),
        "cc-sam": Arm(CCSamMethod()),
        "without cnn": Arm(CCSamMethod(cnn="none")),
        "random cnn": Arm(CCSamMethod(cnn="random")),
        "without text": Arm(CCSamMethod(description="")),
        "decoder only": Arm(AdaptedSam()),
        "unet": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("cc-sam", "fine-tuned"),
    ablation=("cc-sam", "without cnn"),
    replicate="fold",
    scales={
        "quick": Scale(
            Task("embedded", folds=3),
            Budget(steps=30, batch=4, checks=0),
            replicates=1,
            arms=("fine-tuned", "random cnn", "without cnn"),
        ),
        "full": Scale(
            Task("bubil", folds=3),
            Budget(steps=140, batch=4, checks=0),
            arms=("fine-tuned", "cc-sam", "without cnn", "random cnn", "without text"),
        ),
    },
    source="the paper's abstract; there is no official code, so that the fusion's layers are our reading",
    components=(
        Component(
            "frozen CNN branch",
            "implemented",
            "SqueezeNet as ImageNet left it, its features at about an eighth of the resolution; for the paper's ResNet",
        ),
        Component(
            "variational attention fusion",
            "simplified",
            "a weight of each branch for every channel, Gaussian before a softmax, sampled while learning; the weights "
            "and their prior begin at nine parts transformer (our choice)",
        ),
        Component(
            "feature and position adapters", "implemented", "after every block, and of the positions; 0 at first"
        ),
        Component(
            "text description prompts",
            "simplified",
            "one description for all images, its words embedded from scratch as prompt tokens: no language model is at "
            "hand that read medical text, so that these learn as prompts do and bring no knowledge along",
        ),
        Component("descriptions by ChatGPT", "absent", "written by hand"),
        Component("ultrasound", "absent", "none is at hand; cells in phase contrast, faint and of low contrast"),
    ),
)
