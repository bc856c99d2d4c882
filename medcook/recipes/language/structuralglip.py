"""StructuralGLIP, prompts as a knowledge bank (Yang, Chen, Huang, Yang, Xie, Leng, Cao and Zhang, ICLR 2025; arXiv
2502.16223).

Idea: a grounding model that never saw a disease is told what it looks like. Put into one sentence with the target's
name, the description distracts. Here a branch of its own carries it from layer to layer, the knowledge bank, and in
each layer image and bank select each other. With s the similarity of places v and words l,

    V = the places of which sum_l s(v, l) is highest,    L = the words of which mean_{v in V} s(v, l) is highest,
    every place attends to L alone, every word to V alone.

Categories of findings are held out of training and then detected by their descriptions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.language import ToldUNet, mean_words
from medcook.recipes.language._boxes import average_precision, detections
from medcook.recipes.language._described import HELD_OUT, Categories, category_of
from medcook.recipes.language._findings import box_of
from medcook.recipes.language._settings import FINDINGS, FINDINGS_BUDGET, FINDINGS_QUICK, ToldOfFindings, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained

SHARE, WORDS = 4, 5
"""One of so many places is selected; so many words are."""


def highest(values: Tensor, count: int) -> Tensor:
    """(B, N) bool: the `count` highest of each row."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(min(count, values.shape[1])).indices, True)


def selected(similar: Tensor, empty: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places (B, N) bool, words (B, M) bool, and how much each place resembles the words (B, N).

    similar  (B, heads, N, M) of places and words;   empty  (B, M) where there is no word
    before   (B, N) how much places of the layer before resembled its words: half of it counts
    """
    of_places = similar.masked_fill(empty[:, None, None], 0).sum(-1).mean(1)
    if before is not None:
        of_places = (of_places + before) / 2
    places = highest(of_places, max(1, of_places.shape[1] // SHARE))
    share = places[:, None, :, None].to(similar.dtype)
    of_words = ((similar * share).sum(2) / share.sum(2)).mean(1).masked_fill(empty, -torch.inf)
    return places, highest(of_words, WORDS) & ~empty, of_places


class DeepFusion(nn.Module):
    """Attention both ways between the places of a map and words, each added with a learnt weight; then both branches of
    words go through the same transformer block, each on its own."""

    def __init__(self, channels: int, width: int, select: bool, layers: int, heads: int = 4):
        super().__init__()
        self.heads, self.select = heads, select
        self.norms = nn.ModuleList((nn.LayerNorm(channels), nn.LayerNorm(width)))
        self.keys = nn.ModuleList((nn.Linear(channels, width), nn.Linear(width, width)))
        self.values = nn.ModuleList((nn.Linear(channels, width), nn.Linear(width, width)))
        self.out = nn.ModuleList((nn.Linear(width, channels), nn.Linear(width, width)))
        self.weights = nn.ParameterList(torch.full((count,), 1 / layers) for count in (channels, width))
        self.speak = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, width) to (B, heads, N, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, maps: Tensor, branches: list[tuple[Tensor, Tensor]], before: Tensor | None):
        """Maps (B, C, H, W); branches of words (B, M, width), each with where there is none (B, M): all after fusion.

        before  (B, 1, h, w) resemblance of the coarser layer; this layer's (B, 1, H, W) is the third of the results
        """
        places = self.norms[0](maps.flatten(2).transpose(1, 2))
        spoken, empty = (torch.cat(parts, dim=1) for parts in zip(*branches, strict=True))
        words = self.norms[1](spoken)
        asked, known = self.split(self.keys[0](places)), self.split(self.keys[1](words))
        similar = asked @ known.transpose(2, 3) / asked.shape[-1] ** 0.5
        seen, heard = torch.ones_like(places[..., 0], dtype=torch.bool), ~empty
        if self.select:
            if before is not None:
                before = F.interpolate(before, size=maps.shape[2:], mode="nearest").flatten(1)
            seen, heard, before = selected(similar, empty, before)
            before = before.view(len(maps), 1, *maps.shape[2:])
        told = similar.masked_fill(~heard[:, None, None], -torch.inf).softmax(3) @ self.split(self.values[1](words))
        shown = similar.transpose(2, 3).masked_fill(~seen[:, None, None], -torch.inf).softmax(3)
        shown = shown @ self.split(self.values[0](places))
        told, shown = (out(x.transpose(1, 2).flatten(2)) for out, x in zip(self.out, (told, shown), strict=True))
        maps = maps + (self.weights[0] * told).transpose(1, 2).reshape(maps.shape)
        spoken = (spoken + self.weights[1] * shown).split([words.shape[1] for words, _ in branches], dim=1)
        after = [
            (self.speak(words, src_key_padding_mask=none), none)
            for words, (_, none) in zip(spoken, branches, strict=True)
        ]
        return maps, after, before


class GroundingUNet(ToldUNet):
    """Fuses image and words at the three coarsest levels; the target's words after that make the head's weights.

    bank    the description is a branch of its own; else it is one prompt with the name
    select  see `selected`
    """

    LAYERS = 3

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, bank: bool, select: bool):
        super().__init__(inputs, channels, width)
        del self.deepest, self.rising
        self.bank = bank
        coarse = channels[-self.LAYERS :]
        self.layers = nn.ModuleList(DeepFusion(count, width, select, len(coarse)) for count in coarse)

    def listen(self, sentences: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
        """The target's branch and, with a bank, the description's: words (B, M, width), where there is none (B, M)."""
        if not self.bank:
            return [self.text.tokens(sentences)]
        names, looks = zip(*(sentence.partition(":")[::2] for sentence in sentences), strict=True)
        return [self.text.tokens(names), self.text.tokens(looks)]

    def decode(self, maps: list[Tensor], sentences: tuple[str, ...]) -> Tensor:
        branches, before, x = self.listen(sentences), None, maps[-1]
        for level in reversed(range(len(maps))):
            if level < len(maps) - 1:
                x = F.interpolate(x, size=maps[level].shape[2:], mode=self.net.mode, align_corners=False)
                x = self.net.up[level](torch.cat([maps[level], x], dim=1))
            layer = level - len(maps) + len(self.layers)
            if layer >= 0:
                with torch.autocast(x.device.type, enabled=False):
                    x, branches, before = self.layers[layer](x.float(), branches, before)
        weights = self.ask(mean_words(*branches[0])).float()
        found = torch.einsum("bchw,bc->bhw", x.float(), weights[:, :-1])
        return found / x.shape[1] ** 0.5 + weights[:, -1][:, None, None]


@dataclass
class OnePrompt(ToldOfFindings):
    """The chapter's baseline; name and description are one sentence."""

    language: Categories = Categories()


@dataclass
class StructuralGLIP(OnePrompt):
    """The same questions, heard by another network; see `GroundingUNet`."""

    bank: bool = True
    select: bool = True

    def network_for(self, inputs: int) -> nn.Module:
        return GroundingUNet(inputs, self.channels, self.width, self.bank, self.select)


def detection_rows(fitted, case: Case) -> list[dict]:
    """One row: average precision of boxes at an overlap of one half, over all held-out categories asked in each of a
    case's images; `ap_trained`, the same of trained categories, asked where they are. No row where nothing is held out.
    """
    nets, language = trained(fitted), fitted.method.language
    images, labels = fitted.task.preparation.both(case)
    asked = {"ap": [], "ap_trained": []}
    for image, label in zip(images, labels, strict=True):
        there = sorted({*label.unique().tolist()} - {0})
        boxes = {category: [] for category in HELD_OUT} | {category_of(value): [] for value in there}
        for value in there:
            boxes[category_of(value)].append(box_of((label == value).numpy()))
        with torch.no_grad():
            answers = fitted.method.answer(nets, image[None], tuple(map(language.say, boxes)))[0].float().numpy()
        for (category, true), answer in zip(boxes.items(), answers, strict=True):
            asked["ap" if category in HELD_OUT else "ap_trained"].append((detections(answer), true))
    found = {name: average_precision(questions) for name, questions in asked.items()}
    return [] if found["ap"] != found["ap"] else [evaluation.row(case, "held out", **found)]


recipe = Recipe(
    paper="structuralglip",
    title="Descriptions kept beside the question",
    claim="Findings that training never asked for are detected better where their descriptions are a knowledge bank, "
    "matched with the image layer by layer, than where they are part of one prompt.",
    arms={
        "one prompt": Arm(OnePrompt()),
        "structuralglip": Arm(StructuralGLIP()),
        "without bank": Arm(StructuralGLIP(bank=False, select=False)),
        "without selection": Arm(StructuralGLIP(select=False)),
    },
    compare=("structuralglip", "one prompt"),
    ablation=("structuralglip", "without bank"),
    metric="ap",
    score=detection_rows,
    scales=scales(FINDINGS_QUICK, FINDINGS, "one prompt", "structuralglip", "without bank", budget=FINDINGS_BUDGET),
    source="abstract, arXiv 2502.16223; official code, github.com/CapricornGuang/StructuralGLIP "
    "(maskrcnn_benchmark/utils/fuse_helper.py, modeling/rpn/vldyhead.py, docs/project_summary.md)",
    components=(
        Component(
            "zero-shot detection",
            "simplified",
            "six of 18 categories are held out of training's questions; findings of theirs are in its images. There, "
            "GLIP's weights from natural images and no medical training at all. Categories have names that tell "
            "nothing; in half of the questions of training, in every arm, the name is made up: it stands in for a "
            "text model that knows a world of names",
        ),
        Component(
            "prompts as a latent knowledge bank",
            "implemented",
            "a branch of the description's words beside the target's, through the same transformer blocks, as in the "
            "official code. The baseline hears name and description as one sentence; the ablation, too, in the network "
            "of this recipe",
        ),
        Component(
            "mutual selection",
            "implemented",
            "as in the official code: a place counts by its similarity to all words, half of it that of the coarser "
            "level; a word by its mean similarity to the selected places. A quarter of the places and five words; "
            "there, 5 places of the coarsest level, four times as many of each finer one, and five words",
        ),
        Component(
            "fusion across modalities in every layer",
            "simplified",
            "attention both ways at the three coarsest levels on the way up, one level a layer; there, six layers "
            "over five levels, selection in some. The target's words after that make the head's weights",
        ),
        Component(
            "category-level prompts",
            "implemented",
            "one description a category, of shape, edge, size and place, written for this recipe; in training, each "
            "part is said in one of two ways. There, a language model wrote them",
        ),
        Component("instance-level prompts", "absent", "there is no model that answers questions about an image"),
        Component(
            "average precision of boxes",
            "simplified",
            "of one patient's questions together at an overlap of one half, as in COCO; there, over a whole data set "
            "and overlaps from 0.5 to 0.95. Boxes are those of connected parts above a probability of 0.3",
        ),
        Component("fine-tuned models", "absent", "only categories that were held out are scored; ap_trained beside"),
        Component(
            "endoscopy, microscopy, photography and radiology",
            "absent",
            "findings drawn into real chest X-rays. What was looked at, in one seed that is not scored, on validation "
            "images and after 500 steps: average precision of held-out and of trained categories, 0.16 and 0.39, of "
            "one prompt 0.20 and 0.49, of the same network without bank 0.15 and 0.40; nothing was changed after it",
        ),
    ),
)
