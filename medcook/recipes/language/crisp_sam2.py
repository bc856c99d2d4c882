"""CRISP-SAM2: SAM2 with cross-modal interaction and semantic prompting for multi-organ segmentation (Yu, Wang, Jin,
Elazab, Jia, Wan, Zou and Ge, 2025; arXiv 2506.23121).

Idea: a SAM2 that hears a sentence where SAM2 wants clicks or boxes. Image and sentence attend to each other; what comes
of it, a map of semantics s, is added to the maps of the image encoder, and is the prompt of SAM's two-way mask decoder.
With v tokens of places, t of words, A(x, y) an attention of x to y, and p features of pixels:

  v' = v + A(v, t),   t' = t + A(t, v),   c = C [v, mean t],   s = c + A(c, v') + A(c, t')      progressive interaction
  x_k = level_k(x_k-1) + U_k relu(M s)                                        injection: M is shared, U_k a level's own
  f = F (A(e, s) + places),   dense = D [e, f],   sparse = MLP(pool f)                               semantic prompting
  coarse = w_mask . p,   logits = coarse + w_cs . R [p, coarse]                                           mask refining

Slices of a case are answered in order. A memory keeps slices and their answers, is sorted by similarity to the present
slice, and takes in an answer that the network is sure of. In training, other images of the batch stand in for it.

How well it does was not looked at before the test, but for a short run on the embedded brains.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from medcook.data import IGNORE
from medcook.language import Names, Question, TextEncoder, mean_words, meant
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.language._semantics import Injection, Interaction, SemanticPrompts, mapped, mlp, places, resized
from medcook.recipes.language._settings import BRAIN, NAMED, NAMED_BUDGET, NAMED_QUICK, ToldOfNames, named_rows, scales
from medcook.recipes.language._slice_memory import Memory, MemoryAttention, mates, nearest, small
from medcook.recipes.recipe import Arm, Component, Recipe


class Scene(NamedTuple):
    """Images that have heard sentences: the maps of every level, the semantics, and the features (B, width, h, w) that
    the mask decoder starts from."""

    maps: list[Tensor]
    semantics: Tensor
    features: Tensor

    def at(self, rows: slice) -> "Scene":
        return Scene([each[rows] for each in self.maps], self.semantics[rows], self.features[rows])


class Answer(NamedTuple):
    """Logits (B, H, W) before and after refining, and the overlap with the truth (B) that is expected of them."""

    coarse: Tensor
    logits: Tensor
    expected: Tensor


class CrispNet(nn.Module):
    """A U-Net that hears a sentence in its deeper levels. On its way up, at the deepest level but one, are the memory,
    the semantic prompts and SAM's two-way decoder; the rest of the way up is what SAM upscales with."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, interact: bool, memory: bool, refine: bool):
        super().__init__()
        self.net = UNet(inputs=inputs, classes=1, channels=channels)
        self.net.head, self.net.up[0] = nn.Identity(), nn.Sequential(*list(self.net.up[0])[:3])
        self.text = TextEncoder(width)
        self.level = len(channels) - 2
        self.interaction = Interaction(channels[self.level - 1], width) if interact else None
        self.injection = Injection(width, channels[1:])
        self.enter, self.leave = nn.Conv2d(channels[-2], width, 1), nn.Conv2d(width, channels[-2], 1)
        self.memory = MemoryAttention(channels[self.level - 1], width) if memory else None
        self.prompts = SemanticPrompts(width)
        config = SamMaskDecoderConfig(hidden_size=width, num_attention_heads=2, mlp_dim=2 * width, num_hidden_layers=1)
        config._attn_implementation = "eager"
        self.two_way = SamTwoWayTransformer(config)
        self.outputs = nn.Parameter(torch.randn(2 + refine, width))
        self.overlap, self.mask = nn.Linear(width, 1), mlp(width, width, channels[0] + 1)
        self.correct = mlp(width, width, channels[0]) if refine else None
        self.detail = nn.Conv2d(channels[0] + 1, channels[0], 3, padding=1) if refine else None

    def encode(self, images: Tensor) -> list[Tensor]:
        """Maps of the finer levels, which see the images alone, the finest first."""
        maps = [self.net.down[0](images)]
        for block in self.net.down[1 : self.level]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        return maps

    def looks(self, maps: list[Tensor]) -> Tensor:
        """How images look, for a memory: (B, C, h, w) float32, without a gradient."""
        size = [max(1, side // 4) for side in maps[-1].shape[2:]]
        return F.adaptive_avg_pool2d(maps[-1].detach().float(), size)

    def hear(self, maps: list[Tensor], sentences: tuple[str, ...]) -> Scene:
        """The image encoder with semantics; a level has them in it before the next one descends from it.

        Without interaction, the semantics are the mean word, at every place.
        """
        words, empty = self.text.tokens(sentences)
        if self.interaction is None:
            size = [side // 2 for side in maps[-1].shape[2:]]
            semantics = mean_words(words, empty)[:, :, None, None].expand(-1, -1, *size)
        else:
            semantics = self.interaction(maps[-1], words, empty)
        maps = [maps[0], *(self.injection(level, each, semantics) for level, each in enumerate(maps[1:]))]
        for block in self.net.down[self.level :]:
            maps.append(self.injection(len(maps) - 1, block(F.max_pool2d(maps[-1], 2)), semantics))
        deepest = torch.cat([maps[-2], resized(maps[-1], maps[-2].shape[2:])], dim=1)
        return Scene(maps, semantics, self.enter(self.net.up[-1](deepest)))

    def answer(self, scene: Scene, memory: Memory | None) -> Answer:
        features = scene.features if self.memory is None else self.memory(scene.features, memory)
        sparse, dense = self.prompts(features, scene.semantics)
        queries = torch.cat([self.outputs.expand(len(sparse), -1, -1), sparse], dim=1)
        codes = mapped(places(features, features.shape[1])[None], features.shape[2:]).expand_as(features)
        with torch.autocast(features.device.type, enabled=False):
            queries, x = self.two_way(queries[:, None].float(), (features + dense).float(), codes, None)
        queries, x = queries[:, 0], self.leave(mapped(x[:, 0], features.shape[2:]))
        for block, skip in zip(reversed(self.net.up[:-1]), reversed(scene.maps[: self.level]), strict=True):
            x = block(torch.cat([skip, resized(x, skip.shape[2:])], dim=1))
        weights, scale = self.mask(queries[:, 1]).float(), x.shape[1] ** 0.5
        coarse = torch.einsum("bchw,bc->bhw", x.float(), weights[:, :-1]) / scale + weights[:, -1, None, None]
        expected = self.overlap(queries[:, 0]).float().sigmoid()[:, 0]
        if self.correct is None:
            return Answer(coarse, coarse, expected)
        detail = F.relu(self.detail(torch.cat([x, coarse.sigmoid()[:, None].to(x.dtype)], dim=1)))
        more = torch.einsum("bchw,bc->bhw", detail.float(), self.correct(queries[:, 2]).float()) / scale
        return Answer(coarse, coarse + more, expected)


def overlaps(logits: Tensor, masks: Tensor) -> Tensor:
    """(B,): intersection over union of answers (B, H, W) and true masks, where these are known; 1 of two empty ones."""
    found, true = (logits > 0) & (masks != IGNORE), masks == 1
    union = (found | true).sum((1, 2))
    return torch.where(union > 0, (found & true).sum((1, 2)) / union.clamp_min(1), 1.0)


def asked_values(language: Names, questions: list[Question]) -> list[int]:
    """The label value that each question names, also where it is not in the image; 0 where that is unknown."""
    known = {form.format(name=name): value for value, name in enumerate(language.names, 1) for form in language.forms}
    return [values[0] if values else known.get(sentence, 0) for sentence, values in questions]


@dataclass
class CrispSam2(ToldOfNames):
    """Every step asks one question about every image, as the baseline does; other images of the batch are its memory.

    interact, memory, refine  whether these parts are there
    forget                    in training, the share of images that have no memory
    sure                      a memory takes in an answer whose expected overlap with the truth is at least this
    coarse, overlap           shares of the loss: of masks before refining, and of the error of expected overlaps
    """

    interact: bool = True
    memory: bool = True
    refine: bool = True
    forget: float = 0.5
    sure: float = 0.5
    coarse: float = 0.5
    overlap: float = 0.1

    def network_for(self, inputs: int) -> CrispNet:
        return CrispNet(inputs, self.channels, self.width, self.interact, self.memory, self.refine)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        questions, net = self.questions(labelled), nets["model"]
        maps = net.encode(labelled.images)
        memory = self.borrowed(net.looks(maps), labelled, questions) if self.memory else None
        found = net.answer(net.hear(maps, tuple(question.sentence for question in questions)), memory)
        masks = meant(labelled.labels, questions)
        loss = self.answer_loss(found.logits, masks)
        if self.refine:
            loss = self.coarse * self.answer_loss(found.coarse, masks) + (1 - self.coarse) * loss
        return loss + self.overlap * (found.expected - overlaps(found.logits, masks)).abs().mean()

    def borrowed(self, looks: Tensor, labelled: Batch, questions: list[Question]) -> Memory:
        """A memory of other images and of their true masks of what an image is asked for."""
        values = torch.tensor(asked_values(self.language, questions), device=looks.device)
        there = mates(labelled.labels, labelled.groups, values)
        there &= (torch.rand(len(looks), 1) >= self.forget).to(there.device)
        order, there = nearest(looks, looks[None].expand(len(looks), *looks.shape), there)
        return Memory(looks[order], small(labelled.labels[order] == values[:, None, None, None], looks), there)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        """Images are slices of a case in their order; a slice may know the answers to those before it."""
        net, count = nets["average"], len(sentences)
        if not sentences:
            return images.new_zeros(len(images), 0, *images.shape[2:])
        maps = net.encode(images)
        looks, answers = net.looks(maps), []
        scene = net.hear([each.repeat_interleave(count, dim=0) for each in maps], sentences * len(images))
        memory = Memory.empty(count, looks)
        for number, look in enumerate(looks):
            present = look.expand(count, *look.shape)
            memory = memory.in_order(present)
            found = net.answer(scene.at(slice(number * count, (number + 1) * count)), memory)
            answers.append(found.logits.sigmoid())
            mask = answers[-1] > 0.5
            memory = memory.updated(present, mask, (found.expected >= self.sure) & mask.flatten(1).any(1))
        return torch.stack(answers)


ARMS = {
    "crisp-sam2": CrispSam2(),
    "told": ToldOfNames(),
    "without interaction": CrispSam2(interact=False),
    "without memory": CrispSam2(memory=False),
    "without refining": CrispSam2(refine=False),
}

recipe = Recipe(
    paper="crisp-sam2",
    title="CRISP-SAM2: semantics as prompts, and a memory of slices",
    claim="Without any geometric prompt, a SAM-like network whose image encoder and prompts come from image and name "
    "attending to each other segments structures that are asked for by name better than the chapter's baseline.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("crisp-sam2", "told"),
    ablation=("crisp-sam2", "without interaction"),
    score=named_rows,
    scales=scales(
        NAMED_QUICK,
        NAMED,
        "crisp-sam2",
        "told",
        "without interaction",
        budget=NAMED_BUDGET,
        methods={name: replace(method, language=BRAIN) for name, method in ARMS.items()},
    ),
    source="the abstract; models/components/semantic_extraction.py, prompt_generation.py, mask_prediction.py and "
    "loss.py, models/sam2/backbones/image_encoder.py and models/utils.py in the authors' repository, "
    "github.com/YU-deep/CRISP_SAM2. The paper beyond its abstract was not at hand",
    components=(
        Component(
            "progressive cross-attention interaction",
            "implemented",
            "two levels, as in their code: image and words attend to each other, then what both are together attends "
            "to each as the first level has left it. At every place and word, where theirs have one token each; with "
            "the inputs added, without convolutions on keys and values. The ablation takes the mean word at every "
            "place for semantics, and keeps all that hears them",
        ),
        Component(
            "injection into the image encoder",
            "implemented",
            "a layer that is shared and one of each level, added. Theirs are small networks in SAM2's neck; here a "
            "level hears before the next descends from it, so that the way down depends on the name. The interaction "
            "sees the maps of the third level, so the two finest blocks see the image alone, and the finest map stays",
        ),
        Component(
            "semantic prompting",
            "simplified",
            "sparse and dense prompts from features that attend to the semantics; there is no other prompt encoder. "
            "Averages in place of adaptive pooling, 1 x 1 convolutions, no BiFPN. The decoder is SAM's two-way "
            "transformer of `transformers`, with one layer of two, width 64 and two heads, on 8 x 8 places; the rest "
            "of the way up of a U-Net, with one convolution in its last block, upscales as SAM2 does with its finer "
            "features. All of this is cut so far that a step takes 1.5 times as long as the baseline's",
        ),
        Component(
            "similarity-sorting self-updating memory",
            "simplified",
            "four slices, by cosine similarity of their features to the present slice; ranks stand where SAM2 has the "
            "time. Their code sorts by the sum of similarities to all other entries. What updates it there is not "
            "to be seen; here an answer enters where the overlap that a token of the decoder expects is at least 0.5, "
            "and replaces the least similar. In training, other images of the batch are the memory, with true masks, "
            "of other patients: half the images have none. In tests it begins anew every 16 slices, goes one way, and "
            "radiographs and cells, single images, have none. The arm without it is not run at `full`",
        ),
        Component(
            "mask refining",
            "simplified",
            "a token of its own beside the mask's, whose weights are multiplied with other features and added to the "
            "coarse logits, and a loss on both, half and half, as theirs. Their features are the semantics; ours a "
            "convolution of pixels' features and the coarse mask. The arm without it is not run at `full`",
        ),
        Component(
            "SAM2, CLIP and their weights",
            "absent",
            "all begins at random: a U-Net in place of Hiera, the book's text encoder in place of CLIP's. So training "
            "in two stages, with parts frozen, has no place, either",
        ),
        Component("descriptions of organs", "absent", "their dictionary of terms is not at hand; names alone are said"),
        Component(
            "seven public datasets",
            "simplified",
            "five sets and 14 structures, of MR, CT, radiographs and microscopy, in slices of 64 x 64. Theirs are "
            "MSD-Spleen, Pancreas-CT, LUNA16, AbdomenCT-1k, WORD, FLARE22 and AMOS22, after training on M3D-Seg",
        ),
        Component("comparison with existing models", "simplified", "the chapter's baseline, which modulates a U-Net"),
    ),
)
