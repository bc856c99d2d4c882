"""ESP-MedSAM (Xu et al., 2024): a light encoder taught by SAM's, which prompts its own decoder.

A student takes the place of SAM's encoder; SAM's, frozen, teaches it and is then left behind. What is common to all
images is learnt apart from what the modality needs: a controller beside the student's block works for the task alone.
The student's embedding e says which patches show a structure, and that is drawn into the embedding as a prompt. With
T the teacher, s and c the student without and with its controller, y the labels and u their share of each patch:

    p = 1[sigmoid(patch(e)) >= 1/2],   masks = decoder(e + dense(p)),   e = c(x)
    loss = segmentation(masks, y) + a BCE(patch(e), u) + b |s(x) - T(x)|^2
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam import adapting
from medcook.sam.adapting import AdaptedSam, Segmenter, fitted_in
from medcook.sam.model import PATCH, SIZE, STEM, ConvStem, Embedding
from medcook.sam.predictor import restore
from medcook.tasks import Budget, Task

SIDE = SIZE // PATCH
"""Patches a side; SAM has a token for each."""


class Encoded(NamedTuple):
    """What SAM's encoder gives back: (B, hidden, SIDE, SIDE)."""

    last_hidden_state: Tensor


class Inverted(nn.Module):
    """An inverted residual block (MobileNetV2): wider, a convolution a channel, narrower again; (B, C, H, W)."""

    def __init__(self, channels: int, expansion: int = 2):
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(8, wide),
            nn.GELU(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.GroupNorm(8, wide),
            nn.GELU(),
            nn.Conv2d(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Controller(nn.Module):
    """What a modality adds to a block: a key and value of its own (heads, 1, size), and an MLP, 0 at first."""

    def __init__(self, width: int, heads: int, middle: int = 32):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(heads, 1, width // heads))
        self.mlp = nn.Sequential(nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)


class TinyBlock(nn.Module):
    """Attention, a convolution a channel, MLP, as in TinyViT; tokens (B, SIDE, SIDE, width)."""

    def __init__(self, width: int, heads: int = 6, ratio: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor, control: Controller | None = None) -> Tensor:
        x = x + self.attend(self.norm1(x), control)
        x = x + self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        seen = self.norm2(x)
        return x + self.mlp(seen) + (control.mlp(seen) if control is not None else 0)

    def attend(self, x: Tensor, control: Controller | None) -> Tensor:
        """Attention of all tokens to all others, and to the modality's where there is one."""
        count, height, width, channels = x.shape
        qkv = self.qkv(x).view(count, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if control is not None:
            token = control.token.to(key.dtype).expand(count, -1, -1, -1)
            key, value = torch.cat([key, token], dim=2), torch.cat([value, token], dim=2)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.project(found.transpose(1, 2).reshape(count, height, width, channels))


class Student(nn.Module):
    """Takes the place of SAM's encoder: its stem, made a little deeper, and one block with a controller.

    The stem starts as a copy of the teacher's, everything else from scratch.
    """

    def __init__(self, teacher: nn.Module):
        super().__init__()
        width, hidden = teacher.config.hidden_size, teacher.config.output_channels
        self.patch_embed: ConvStem = deepcopy(teacher.patch_embed)
        self.patch_embed.steps[2].extend([Inverted(STEM[1]), Inverted(STEM[1])])
        self.pos_embed = nn.Parameter(teacher.pos_embed.detach().clone())
        self.block, self.control = TinyBlock(width), Controller(width, heads=6)
        self.neck = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.GroupNorm(1, hidden))
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> Encoded:
        return Encoded(self.embed(self.tokens(images)))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, SIDE, SIDE, width) before the block."""
        return self.patch_embed(images) + self.pos_embed

    def embed(self, tokens: Tensor, controlled: bool = True) -> Tensor:
        """(B, hidden, SIDE, SIDE): what the task needs, or, without the controller, what is common to all images."""
        tokens = self.block(tokens, self.control if controlled else None)
        return self.neck(tokens.permute(0, 3, 1, 2))


class SelfPrompts(nn.Module):
    """Which patches show which structure, and that as a dense prompt."""

    def __init__(self, hidden: int, structures: int):
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(hidden, 64, 1), nn.GroupNorm(1, 64), nn.GELU(), nn.Conv2d(64, structures, 1)
        )
        self.dense = nn.Sequential(nn.Conv2d(structures, hidden, 1), nn.GroupNorm(1, hidden), nn.GELU())

    def forward(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (B, hidden, SIDE, SIDE) to patch logits (B, structures, SIDE, SIDE) and the prompt (as embedding).

        The prompt is drawn from decisions, so that the decoder's loss does not change what the patches say.
        """
        logits = self.patches(coarse)
        return logits, self.dense((logits.detach() >= 0).to(coarse.dtype))


class EspSam(nn.Module):
    """A segmenter with a light encoder that prompts itself: images (B, C, H, W) to logits (B, classes, H, W)."""

    def __init__(self, segmenter: Segmenter, classes: int, prompted: bool):
        super().__init__()
        teacher = segmenter.sam.sam.vision_encoder
        self.segmenter = segmenter
        segmenter.sam.sam.vision_encoder = Student(teacher)
        self.prompter = SelfPrompts(teacher.config.output_channels, classes - 1) if prompted else None

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits (B, classes, H, W), what the patches say, and the common embedding that the teacher judges."""
        student = self.segmenter.sam.sam.vision_encoder
        tokens = student.tokens(fitted_in(images))
        fine, quarter, eighth = student.patch_embed.finer
        skips, coarse, patches = self.segmenter.sam.skips, student.embed(tokens), None
        if self.prompter is not None:
            patches, prompt = self.prompter(coarse)
            coarse = coarse + prompt
        masks = self.segmenter.masks(Embedding(coarse, skips[0](eighth), skips[1](quarter), fine))
        return restore(masks, tuple(images.shape[2:])), patches, student.embed(tokens, controlled=False)


@dataclass
class EspMedSam(AdaptedSam):
    """Trains a light encoder, its self-prompts and the decoder; SAM's encoder teaches, and takes no part in predicting.

    prompting   weight of the patches' cross-entropy; 0 takes the self-prompts away
    distilling  weight of the squared difference to the teacher's embedding; 0 takes the teacher away
    """

    tuned: tuple[str, ...] = ("prompts", "decoder")
    prompting: float = 1.0
    distilling: float = 1.0

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The teacher stands apart: it is neither averaged nor trained."""
        nets = super().build(inputs, classes, dims)
        if self.distilling:
            nets["teacher"] = adapting.start(self.pretrained).sam.vision_encoder.requires_grad_(False)
        return nets

    def adapt(self, model: Segmenter) -> EspSam:
        return EspSam(model, len(model.heads), self.prompting > 0)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits, patches, common = nets["model"].answer(labelled.images)
        loss = find_loss(self.loss)(logits.float(), labelled.labels)
        if patches is not None:
            shares = shares_of(labelled.labels, patches.shape[1])
            loss = loss + self.prompting * F.binary_cross_entropy_with_logits(patches.float(), shares)
        if self.distilling:
            with torch.no_grad():
                taught = nets["teacher"](fitted_in(labelled.images)).last_hidden_state
            loss = loss + self.distilling * F.mse_loss(common.float(), taught.float())
        return loss


def shares_of(labels: Tensor, structures: int) -> Tensor:
    """(B, structures, SIDE, SIDE): each structure's share of every patch, of labels (B, H, W)."""
    longest = max(labels.shape[1:])
    labels = F.pad(labels, (0, longest - labels.shape[2], 0, longest - labels.shape[1]))
    masks = torch.stack([labels == value for value in range(1, structures + 1)], dim=1).float()
    return F.adaptive_avg_pool2d(masks, SIDE)


recipe = Recipe(
    paper="esp-medsam",
    title="ESP-MedSAM: a light student that prompts itself",
    claim="A light encoder taught by the small SAM's, which prompts itself, segments hearts without prompts as well as "
    "the whole small SAM, fine-tuned, with fewer parameters.",
    arms={
        "fine-tuned": Arm(AdaptedSam(tuned=("encoder", "prompts", "decoder"))),
        "esp-medsam": Arm(EspMedSam()),
        "without self-prompts": Arm(EspMedSam(prompting=0.0)),
        "without distillation": Arm(EspMedSam(distilling=0.0)),
        "decoder only": Arm(AdaptedSam()),
    },
    compare=("esp-medsam", "fine-tuned"),
    ablation=("esp-medsam", "without self-prompts"),
    replicate="draw",
    expect="cheaper-at-equal-quality",
    margin=0.02,
    cost="parameters",
    scales={
        "quick": Scale(
            Task("embedded", labelled=3, evaluation="test"), Budget(steps=40, batch=4, checks=0), replicates=1
        ),
        "full": Scale(
            Task("acdc", labelled=7, evaluation="test"),
            Budget(steps=160, batch=4, checks=0),
            arms=("fine-tuned", "esp-medsam", "without self-prompts", "without distillation"),
        ),
    },
    published={"parameters, as a share of SAM-Base": 0.314},
    source="the paper's abstract; patch prompts, and where the controller sits in a block, follow the official code, "
    "github.com/xq141839/ESP-MedSAM",
    components=(
        Component(
            "multi-modal decoupled knowledge distillation",
            "simplified",
            "squared difference of embeddings, of the student without its controller; in one training with the task, "
            "not in a stage before it, on the labelled images alone (the other arms see no others either)",
        ),
        Component(
            "lightweight encoder",
            "simplified",
            "the small SAM's stem with two inverted residual blocks, and one block as in TinyViT, for TinyViT itself",
        ),
        Component(
            "modality controller",
            "simplified",
            "a key and value token and an MLP beside the block's; one, because a data set here has one modality",
        ),
        Component(
            "self-patch prompt generator",
            "implemented",
            "patches are SAM's tokens, with a channel for each structure; trained on each patch's share of the "
            "structure, thresholded at one half, drawn as a dense prompt",
        ),
        Component(
            "query-decoupled modality decoder",
            "simplified",
            "a query and a head of its own for each structure; for one data set there is one modality to decode",
        ),
        Component("zero-shot and transfer between modalities", "absent", "one modality is trained and scored"),
    ),
)
