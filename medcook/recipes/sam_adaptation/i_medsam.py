"""I-MedSAM: Implicit Medical Image Segmentation with Segment Anything (Wei et al., ECCV 2024).

SAM's features, read at any point: a small network takes what they say at a coordinate, and the coordinate itself, to
the classes there, so that masks have no resolution of their own. A second network looks again at the points that the
first is least sure about. On the way in, the image's amplitude spectrum passes through an adapter beside every layer of
the encoder: edges are high frequencies.

    spectrum   A = |FFT(image)|, scaled to 0..1;  T_0 = patches of A,  T_l = adapter_l(T_{l-1})
    layers     X_l = layer_l(X_{l-1}) + g_l T_l / 2
    coarse     (logits, h) = f(features at x, gamma(x)),  gamma(x) = sin and cos of 2^j pi x
    unsure     u(x) = variance of the answer when one or the other half of the coarse features h is dropped
    fine       logits = g(features at x, gamma(x), h) at the eighth of the points with the largest u
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._adapters import Bottleneck, lora, scales
from medcook.recipes.sam_adaptation.h_sam import Upscale, decode, masks
from medcook.sam.adapting import AdaptedSam, Segmenter, fitted_in, no_prompts
from medcook.sam.model import Embedding

OCTAVES = 6
"""Frequencies of the code of a coordinate."""


def spectrum(images: Tensor) -> Tensor:
    """Amplitudes (B, 1, H, W) of the images' Fourier transform, zero frequency in the middle, log, 0 to 1 each."""
    with torch.autocast(images.device.type, enabled=False):
        amplitude = torch.fft.fftshift(torch.fft.fft2(images.float()).abs(), dim=(-2, -1)).log1p()
        low, high = (getattr(amplitude, end)(dim=(-2, -1), keepdim=True) for end in ("amin", "amax"))
        return (amplitude - low) / (high - low).clamp_min(1e-6)


def code(points: Tensor) -> Tensor:
    """(B, P, 2) coordinates in -1..1 to (B, P, 2 + 4 * OCTAVES): themselves, sines and cosines."""
    angles = (points[..., None] * torch.pi * 2 ** torch.arange(OCTAVES, device=points.device)).flatten(2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


def read(features: Tensor, points: Tensor) -> Tensor:
    """Features (B, C, h, w) at points (B, P, 2), x and y in -1..1, bilinearly: (B, P, C)."""
    found = F.grid_sample(features.float(), points[:, None].float(), padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def grid(height: int, width: int, device=None) -> Tensor:
    """(height * width, 2) the pixel centres x, y of an image on the padded square, which reaches from -1 to 1."""
    longest = max(height, width)
    axis = lambda size: (torch.arange(size, device=device) + 0.5) * 2 / longest - 1  # noqa: E731
    y, x = torch.meshgrid(axis(height), axis(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


class PointDecoder(nn.Module):
    """Features of points, and their codes, to logits: f, the choice of unsure points, and g.

    choose  `unsure` points are looked at again, or evenly `spread` ones, or `none`
    """

    def __init__(self, features: int, classes: int, width: int = 64, share: float = 0.125, choose: str = "unsure"):
        super().__init__()
        self.classes, self.share, self.choose = classes, share, choose
        seen = features + 2 + 4 * OCTAVES
        self.coarse = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.answer = nn.Linear(width, classes)
        self.fine = nn.Sequential(nn.Linear(seen + width, width), nn.GELU(), nn.Linear(width, classes))
        for last in (self.answer, self.fine[-1]):
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, P, C) of points (B, P, 2) and what is said there (B, P, K), to coarse and final logits."""
        seen = torch.cat([features, code(points)], dim=-1)
        hidden = self.coarse(seen)
        coarse = start + self.answer(hidden)
        chosen = self.chosen(hidden, coarse)
        if chosen is None:
            return coarse, coarse
        pick = lambda values: values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))  # noqa: E731
        again = pick(coarse) + self.fine(torch.cat([pick(seen), pick(hidden)], dim=-1))
        index = chosen[..., None].expand(-1, -1, self.classes)
        return coarse, coarse.scatter(1, index, again.to(coarse.dtype))

    def chosen(self, hidden: Tensor, coarse: Tensor) -> Tensor | None:
        """(B, n) which of the P points are looked at again."""
        count = int(self.share * hidden.shape[1])
        if self.choose == "none" or not count:
            return None
        if self.choose == "spread":
            return torch.arange(count, device=hidden.device).expand(len(hidden), -1) * hidden.shape[1] // count
        return self.doubt(hidden, coarse).topk(count, dim=1).indices

    def doubt(self, hidden: Tensor, coarse: Tensor) -> Tensor:
        """u (B, P): variance over two answers, each with one half of the hidden features dropped, the other doubled."""
        with torch.no_grad():
            half = torch.arange(hidden.shape[-1], device=hidden.device) % 2
            base = coarse - self.answer(hidden)
            said = [(base + self.answer(hidden * 2 * kept)).float().softmax(-1) for kept in (half, 1 - half)]
            return torch.stack(said).var(0).mean(-1)


class Implicit(nn.Module):
    """A segmenter whose decoder ends in a `PointDecoder`, and whose encoder hears of frequencies; see the module."""

    def __init__(self, first: Segmenter, frequency: bool = True, implicit: bool = True, choose: str = "unsure"):
        super().__init__()
        self.first, self.implicit, self.frequency = first, implicit, frequency
        encoder, decoder = first.sam.sam.vision_encoder, first.sam.sam.mask_decoder
        width = encoder.config.hidden_size
        if frequency:
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in encoder.layers)
            self.adapters = nn.ModuleList(Bottleneck(width, width // 8) for _ in encoder.layers)
            self.gains = nn.Parameter(torch.zeros(len(encoder.layers), width))
        if implicit:
            features = decoder.upscale_conv2.out_channels + 16
            self.points = PointDecoder(features, len(first.tokens), choose=choose)

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B, K, *size) of images (B, C, H, W), on the images' own grid where no size is given."""
        size = size or tuple(images.shape[2:])
        maps = self.maps(images)
        points = grid(*size, device=images.device).expand(len(images), -1, -1)
        return self.at(maps, points)[1].transpose(1, 2).reshape(len(images), -1, *size)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What points are read from: features (B, C, 40, 40) and (B, 16, 80, 80), first masks (B, K, 80, 80)."""
        embedding = self.embed(fitted_in(images))
        embedding, sparse = self.first.sam.prompted(embedding, no_prompts(len(images), images.device))
        decoder = self.first.sam.sam.mask_decoder
        tokens, image = decode(self.first, decoder.transformer, embedding.coarse, self.first.tokens, sparse)
        pixels = Upscale(decoder)(image, embedding)
        return pixels, embedding.fine, self.first.sam.refine(masks(self.first.heads, tokens, pixels), embedding)

    def at(self, maps: tuple[Tensor, Tensor, Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse and final logits (B, P, K) at points (B, P, 2)."""
        pixels, fine, first = (read(each, points) for each in maps)
        return self.points(torch.cat([pixels, fine], dim=-1), points, first) if self.implicit else (first, first)

    def embed(self, images: Tensor) -> Embedding:
        """(B, 1, SIZE, SIZE) to their embedding, with the spectrum beside the layers."""
        if not self.frequency:
            return self.first.embed(images)
        encoder = self.first.sam.sam.vision_encoder
        wave = encoder.patch_embed(spectrum(images)) + encoder.pos_embed
        tokens = encoder.patch_embed(images) + encoder.pos_embed  # the last image's finer features are kept
        for layer, norm, adapter, gain in zip(encoder.layers, self.norms, self.adapters, self.gains, strict=True):
            wave = adapter(norm(wave))
            tokens = layer(tokens) + 0.5 * gain * wave
        fine, quarter, eighth = encoder.patch_embed.finer
        skips = self.first.sam.skips
        return Embedding(encoder.neck(tokens), skips[0](eighth), skips[1](quarter), fine)


@dataclass
class IMedSam(AdaptedSam):
    """The small SAM with LoRA, a frequency adapter and a decoder of points.

    rank       of LoRA
    frequency  False: no frequency adapter
    implicit   False: SAM's masks, interpolated, as in the discrete baseline
    choose     which points are looked at again
    sampled    points of each image that a training step is about
    """

    rank: int = 4
    frequency: bool = True
    implicit: bool = True
    choose: Literal["unsure", "spread", "none"] = "unsure"
    sampled: int = 4096

    def adapt(self, model: Segmenter) -> nn.Module:
        lora(model.sam.sam.vision_encoder, self.rank, ("qkv",))
        return Implicit(model, self.frequency, self.implicit, self.choose)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the coarse and of the final answers, at random points; of all of them without points."""
        if not self.implicit:
            return super().training_step(nets, labelled, unlabelled, now)
        model, labels = nets["model"], labelled.labels.flatten(1)
        every = grid(*labelled.labels.shape[1:], device=labels.device)
        order = torch.stack([torch.randperm(len(every))[: self.sampled] for _ in labels]).to(labels.device)
        answers = model.at(model.maps(labelled.images), every[order])
        loss, truth = find_loss(self.loss), labels.gather(1, order)
        return sum(loss(logits.float().transpose(1, 2), truth) for logits in answers) / 2


recipe = Recipe(
    paper="i-medsam",
    title="I-MedSAM: masks of no resolution, with frequencies beside the encoder",
    claim="With three labelled patients, a frequency adapter and a decoder of points that looks again where it is "
    "unsure lower HD95 against the same SAM with LoRA and its own mask decoder.",
    arms={
        "discrete": Arm(IMedSam(frequency=False, implicit=False)),
        "i-medsam": Arm(IMedSam()),
        "spread points": Arm(IMedSam(choose="spread")),
        "without frequency": Arm(IMedSam(frequency=False)),
        "frequency only": Arm(IMedSam(implicit=False)),
        "decoder only": Arm(AdaptedSam()),
        "u-net": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("i-medsam", "discrete"),
    ablation=("i-medsam", "without frequency"),
    replicate="draw",
    metric="hd95",
    scales=scales("discrete", "i-medsam", "spread points", "without frequency"),
    published={"trainable parameters, millions": 1.6},
    source="the paper's abstract; adapter and decoder follow the official code, github.com/ucwxb/I-MedSAM",
    components=(
        Component(
            "frequency adapter",
            "implemented",
            "the amplitude spectrum through the frozen stem and a bottleneck beside each layer, added with weight one "
            "half, as in the official code; log amplitudes and a gain for each channel that is zero at first are ours",
        ),
        Component(
            "implicit decoder",
            "implemented",
            "two layers over SAM's upscaled features, the stem's features and codes of the coordinate; it adds to the "
            "masks of SAM's decoder read at the same point, so that it need not begin from nothing (ours)",
        ),
        Component("output at any resolution", "implemented", "the decoder answers on a grid of any size"),
        Component(
            "uncertainty-guided sampling",
            "implemented",
            "an eighth of the points are looked at again, as in the official code; two complementary halves are "
            "dropped in place of two random dropouts, so that predictions repeat",
        ),
        Component("LoRA encoder", "implemented", "peft's LoRA of rank 4 on queries, keys and values, in all arms"),
        Component("cross-domain ability", "absent", "one data set; `cosam` crosses sites"),
    ),
)
