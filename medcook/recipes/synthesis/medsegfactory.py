"""MedSegFactory (Mao, Wang, Tang, Xu, Wang, Yang, Zhou and Zhou, arXiv 2504.06897, 2025).

Idea: who makes an image for a label map needs label maps first. Here one network denoises both at once, in two streams
with the same weights, from a prompt for each: "image" or "label", and which structures there are. That the two fit is
the work of joint cross-attention in its blocks. With z, y the features of both streams at all positions,

    z  <-  z + out(softmax(Q_z(y) K_z(z)^T / sqrt(width)) V_z(z))
    y  <-  y + out(softmax(Q_y(z) K_y(y)^T / sqrt(width)) V_y(y))

so that each says where the other looks, in itself. The pairs that come of noise train a segmenter along with real ones.
Without the joint, z asks for z and y for y: two generators of the same size, whose images and labels do not belong
together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import Augment, warp
from medcook.methods import Batch, Moment, own_generator
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._denoiser import Denoiser, folded, halved, time_features, unfolded
from medcook.recipes.synthesis._diffusion import Diffusion, Net
from medcook.recipes.synthesis._painting import grey, painted, shares
from medcook.recipes.synthesis._settings import BASELINE, BRAINS, HEARTS, LONGER, scales
from medcook.synthesis import Synthesising

DIFFUSION = Diffusion(target="image")
CALLS = 20
"""Steps on the way back; 50 in the official code."""

WORD = 32
"""Numbers in the vector of a word."""

GENTLE = Augment(rotate=5.0, scale=0.05, shift=0.03)
"""How real pairs are moved for the generator; the segmenter sees them as in every arm."""


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """What queries (B, L, C) find in values (B, M, C) by their keys, in so many heads: (B, L, C)."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    weights = (q @ k.transpose(2, 3)).float().div(q.shape[3] ** 0.5).softmax(3)
    return (weights.to(v) @ v).transpose(1, 2).flatten(2)


class JointCrossAttention(nn.Module):
    """The equations of the module's docstring; where it is not `joint`, each stream asks for itself."""

    def __init__(self, width: int, joint: bool = True, heads: int = 2):
        super().__init__()
        self.joint, self.heads = joint, heads
        self.norm = nn.GroupNorm(8, width)
        self.streams = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in "QKV") for _ in range(2))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (2 B, width, H, W): features of B images, then those of their label maps."""
        both, found = self.norm(x.contiguous()).flatten(2).transpose(1, 2).chunk(2), []
        for number, (query, key, value) in enumerate(self.streams):
            own, asking = both[number], both[1 - number if self.joint else number]
            found.append(attended(query(asking), key(own), value(own), self.heads))
        return x + self.out(torch.cat(found)).transpose(1, 2).reshape(x.shape)


def present(labels: Tensor, structures: int) -> Tensor:
    """(B, structures) bool: which structures labels (B, *size) show."""
    return torch.stack([(labels == k).flatten(1).any(1) for k in range(1, structures + 1)], dim=1)


class TwoStreams(Denoiser):
    """A denoiser of pairs, with the same weights for both streams and joint cross-attention after each block on the way
    up. Images have as many colours as label maps, one for each structure; sides are multiples of 4."""

    def __init__(self, colours: int, joint: bool = True, channels: tuple[int, ...] = (48, 64)):
        super().__init__(colours, colours, channels, told=WORD, tokens=WORD, fold=2)
        self.colours = colours
        self.words = nn.Embedding(2 + 2 * colours, WORD)
        self.met = nn.ModuleList(JointCrossAttention(width, joint) for width in channels)

    def prompts(self, there: Tensor) -> Tensor:
        """Words (2 B, 1 + K, WORD) about pairs that show the structures `there` (B, K) bool: image or label, and then
        with or without each structure."""
        structures = 2 + 2 * torch.arange(self.colours, device=there.device) + there
        return self.words(torch.cat([F.pad(structures, (1, 0), value=stream) for stream in range(2)]))

    def forward(self, x: Tensor, t: Tensor, *, there: Tensor) -> Tensor:
        """Pairs (B, 2 K, H, W), colours of the image first, and times (B,) to what they are without noise."""
        tokens = self.prompts(there)
        known = F.silu(self.time(time_features(t.repeat(2), self.features)) + self.told(tokens.mean(1)))
        x, skips = self.enter(folded(torch.cat(x.chunk(2, dim=1)), self.fold)), []
        for number, block in enumerate(self.down):
            x = block(halved(x) if number else x, known)
            skips.append(x)
        x = self.middle(self.attend(x, tokens), known)
        for number, block in reversed(list(enumerate(self.up))):
            x = self.met[number](block(torch.cat([x, skips[number]], dim=1), known))
            if number:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return torch.cat(unfolded(self.leave(x), self.fold).chunk(2), dim=1)

    def told_of(self, there: Tensor) -> Net:
        """The network with its prompt, as diffusion wants it."""
        return lambda x, t: self(x, t, there=there)


def pairs_of(images: Tensor, labels: Tensor, colours: int) -> Tensor:
    """Grey images (B, C, H, W) and painted labels (B, H, W), at half the resolution: (B, 2 K, H / 2, W / 2)."""
    return halved(torch.cat([grey(images, colours), painted(labels, colours + 1)], dim=1))


def unpacked(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, enlarged along straight lines: images (B, 1, H, W) and labels (B, H, W)."""
    images, maps = F.interpolate(pairs, scale_factor=2, mode="bilinear", align_corners=False).chunk(2, dim=1)
    return images.mean(1, keepdim=True), shares(maps).argmax(1)


def noise_like(pairs: Tensor) -> Tensor:
    """Normal noise for pairs (B, 2 K, H, W), grey in images: else their colours together would show what it hides."""
    image, maps = torch.randn_like(pairs).chunk(2, dim=1)
    return torch.cat([grey(image, image.shape[1]), maps], dim=1)


@dataclass
class PairFactory(Synthesising):
    """Real pairs teach the two streams; prompts of real pairs are what pairs are made of.

    joint  the streams look at each other
    """

    joint: bool = True

    def generator(self, inputs: int, classes: int) -> nn.Module:
        return TwoStreams(classes - 1, self.joint)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """None: how far a pair is moved depends on who sees it."""
        return batch

    def moved(self, batch: Batch, how: Augment) -> Batch:
        """Images with their labels, by torch's own generator."""
        rng = own_generator()
        images, labels = warp(batch.images, batch.labels, how.grid(batch.images, rng))
        return batch._replace(images=images, labels=labels)

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        net, seen = nets["generator"], self.moved(labelled, GENTLE)
        pairs = pairs_of(seen.images, seen.labels, net.colours)
        return DIFFUSION.loss(net.told_of(present(seen.labels, net.colours)), pairs, noise=noise_like(pairs))

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        net = nets["sampler"]
        start = noise_like(pairs_of(labelled.images, labelled.labels, net.colours))
        return unpacked(DIFFUSION.sample(net.told_of(present(labelled.labels, net.colours)), start, CALLS))

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        return super().supervised(nets, self.moved(labelled, self.augmentation), now)


recipe = Recipe(
    paper="medsegfactory",
    title="Images and label maps made together, in two streams of one diffusion model",
    claim="With labels of three patients of acdc, pairs of two joined streams of diffusion, added to the real ones, "
    "give a higher Dice than as many steps on the real pairs alone.",
    arms={
        "real": Arm(BASELINE),
        "real and made": Arm(PairFactory()),
        "streams apart": Arm(PairFactory(joint=False)),
        "real, all steps": Arm(LONGER),
    },
    compare=("real and made", "real"),
    ablation=("real and made", "streams apart"),
    replicate="draw",
    scales=scales(BRAINS, HEARTS, "real", "real and made", "streams apart"),
    source="official code, github.com/jwmao1/MedSegFactory (README with the figure of the framework, "
    "StableDiffusion/Our_Attention.py, medical_pipeline.py; training code is not there); abstract, arXiv 2504.06897",
    components=(
        Component(
            "dual-stream diffusion model",
            "simplified",
            "one network for both streams, as there, but of half a million weights, from nothing and on pixels; the "
            "paper goes on from Stable Diffusion, on its latents. Pairs are made at 32 x 32 and enlarged. Structures "
            "have a colour each; there shades of grey. The network gives the clean pair, not the noise. Looked at "
            "after training on labelled patients of a draw that is not scored: asked for the velocity at 64 x 64 it "
            "gave noise, asked for the pair there label maps like hearts and images without anatomy. At 32 x 32, with "
            "half the motion of real pairs, blurred images show ventricles, too, mostly where their label maps do",
        ),
        Component(
            "joint cross-attention",
            "implemented",
            "after each block on the way up, at 16 x 16 and 8 x 8 positions, in two heads; there in every block of "
            "attention. Both streams look at the same moment, as the paper's figure shows; in the code the label "
            "stream asks what the image stream has just become. There is no self-attention beside it: in the ablation, "
            "which has as many weights, it becomes this",
        ),
        Component(
            "user-defined prompts",
            "simplified",
            "a word for image or label and one for each structure, there or not; learnt vectors for CLIP's. They are "
            "attended to at the deepest map, and their mean is added to the time: else the streams do not know which "
            "they are. No word for modality, region or disease, since acdc has one of each; no guidance",
        ),
        Component(
            "data scarcity: pairs supplement a training set",
            "implemented",
            "labels of three patients; prompts are those of real pairs, of which there are some fifty. 128 made pairs, "
            "half of each batch of the segmenter. On validation patients of that draw, one run each: 0.73, real 0.74",
        ),
        Component("modalities and tasks, 2D and 3D", "absent", "one modality, in slices"),
        Component("quality of images", "absent", "only their use for segmentation is measured"),
    ),
)
