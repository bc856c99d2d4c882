"""FLanS, free-form language-based segmentation (Da, Wang, Xu, Bhatia, Kass-Hout, Wei and Xiao, 2025; arXiv 2410.12831,
"Segment as You Wish").

Idea: one asks by name, by position or by size, in many wordings, and scans may lie in any orientation. A small network
finds out how a scan is turned. The scan is turned upright, segmented there, and the mask is turned back: so what an
organ looks like is not confused with where it lies, and all turns of a scan get the same answer. With g_k the eight
turns and mirrorings of a square,

  a_k = s(g_k^-1 x),   c = onehot(argmax a) + softmax(a) - stop(softmax(a)),
  mask = sum_k c_k g_k f(sum_j c_j g_j^-1 x, sentence),   loss + CE(a, the turn that x was given)

Position is that in the scan as it was acquired, so it is asked of scans that nobody has turned, as there.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.interactive import overlap
from medcook.language import Names, Question, ToldUNet, meant, one_of, shown_in
from medcook.methods import Batch, Moment
from medcook.recipes.language._settings import BRAIN, NAMED_BUDGET, NAMED_QUICK, NamedTask, ToldOfNames, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained

TURNS = 8
"""Turns by 90 degrees, and the same after mirroring; 0 leaves everything as it is."""
HEART = ("right ventricle", "myocardium", "left ventricle")
NAMED_BY = (
    *("{name}", "the {name}", "segment the {name}", "please outline the {name}", "where is the {name}?"),
    *("measure the volume of the {name}", "I want to see the {name} in this scan", "is the {name} enlarged? mark it"),
)
"""Wordings of questions; `{name}` is a structure's, or a word of `PLACES` or `EXTENTS`. Scores use the first."""
DESCRIBED_BY = (
    *("the {name} structure", "segment the {name} part", "please outline the {name} organ"),
    *("I would like to see the {name} region of this image", "mark what is {name}"),
)
PLACES = ("leftmost", "rightmost", "topmost", "lowest")
EXTENTS = ("largest", "smallest")
KINDS = ("name", "position", "size")
"""What a question asks by."""


def turned(maps: Tensor, turn: int) -> Tensor:
    """Square maps (..., S, S), mirrored for turns above 3, then turned by 90 degrees, `turn` modulo 4 times."""
    maps = maps.flip(-1) if turn >= TURNS // 2 else maps
    return maps.rot90(turn % 4, (-2, -1))


def upright(maps: Tensor, turn: int) -> Tensor:
    """The inverse of `turned`."""
    maps = maps.rot90(-(turn % 4), (-2, -1))
    return maps.flip(-1) if turn >= TURNS // 2 else maps


def each_turned(maps: Tensor, turns: Tensor) -> Tensor:
    """Maps (B, ..., S, S), each by its own of turns (B,)."""
    return torch.stack([turned(one, turn) for one, turn in zip(maps, turns.tolist(), strict=True)])


def extreme(label: Tensor, word: str) -> int:
    """The value of a label map (H, W) whose structure reaches furthest to a side, or is the largest or smallest one."""
    found = {}
    for value in shown_in(label):
        rows, columns = (label == value).nonzero(as_tuple=True)
        found[value] = {
            "leftmost": -columns.min(),
            "rightmost": columns.max(),
            "topmost": -rows.min(),
            "lowest": rows.max(),
            "largest": len(rows),
            "smallest": -len(rows),
        }[word]
    return max(found, key=lambda value: int(found[value]))


@dataclass(frozen=True)
class FreeForm(Names):
    """Structures are asked for by name, position or size."""

    names: tuple[str, ...] = HEART
    forms: tuple[str, ...] = NAMED_BY
    described: tuple[str, ...] = DESCRIBED_BY

    def describe(self, label: Tensor, word: str, form: int = 0) -> Question:
        """A question by a word of `PLACES` or `EXTENTS` about a label map (H, W) that shows something."""
        return Question(self.described[form].format(name=word), (extreme(label, word),))

    def question(self, label: Tensor, kind: str, absent: bool) -> Question:
        """A random question of one of `KINDS` about a label map (H, W); by name, where it does not show two."""
        if kind == "name" or len(shown_in(label)) < 2:
            return self.ask(shown_in(label), None, absent)
        word = one_of(PLACES if kind == "position" else EXTENTS)
        return self.describe(label, word, int(torch.randint(len(self.described), ())))


class Canonicaliser(nn.Module):
    """How a scan is turned: images (B, C, S, S) to one number for each of the eight turns, (B, 8) float32.

    Number k is what a small network says about the image, turned back by k: turning the image permutes the numbers.
    """

    def __init__(self, inputs: int, width: int = 8):
        super().__init__()
        sides = (inputs, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(4, o), nn.ReLU())
                for i, o in zip(sides, sides[1:], strict=False)
            )
        )
        self.score = nn.Linear(4 * width * 16, 1)

    def forward(self, images: Tensor) -> Tensor:
        versions = torch.stack([upright(images, turn) for turn in range(TURNS)], dim=1)
        small = F.avg_pool2d(versions.flatten(0, 1), 2)
        seen = F.adaptive_avg_pool2d(self.layers(small).float(), 4).flatten(1)
        return self.score(seen).view(len(images), TURNS).float()


def chosen(numbers: Tensor, learning: bool) -> Tensor:
    """One-hot (B, 8) of the highest of numbers (B, 8); in training the gradient is that of their softmax."""
    hard = F.one_hot(numbers.argmax(1), TURNS).to(numbers.dtype)
    soft = numbers.softmax(1)
    return hard + soft - soft.detach() if learning else hard


class CanonicalUNet(ToldUNet):
    """A U-Net that is told what to find, in scans that are turned upright before and back after."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int):
        super().__init__(inputs, channels, width)
        self.canonicaliser = Canonicaliser(inputs)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the upright images, and last which turn they had, one-hot (B, 8)."""
        turns = chosen(self.canonicaliser(images), self.training)
        versions = torch.stack([upright(images, turn) for turn in range(TURNS)], dim=1)
        return [*super().encode((versions * turns[:, :, None, None, None]).sum(1).to(images.dtype)), turns]

    def decode(self, maps: list[Tensor], sentences: tuple[str, ...]) -> Tensor:
        *maps, turns = maps
        logits = super().decode(maps, sentences)
        back = torch.stack([turned(logits, turn) for turn in range(TURNS)], dim=1)
        return (back * turns[:, :, None, None]).sum(1)


@dataclass
class Turned(ToldOfNames):
    """Asked about scans in every orientation.

    kinds      what training asks by, with the shares `shares`
    canonical  whether scans are turned upright first;   prior: weight of the loss of the turns
    """

    language: FreeForm = FreeForm()
    kinds: tuple[str, ...] = KINDS
    shares: tuple[float, ...] = (0.5, 0.25, 0.25)
    canonical: bool = True
    prior: float = 1.0

    def network_for(self, inputs: int) -> nn.Module:
        return (CanonicalUNet if self.canonical else ToldUNet)(inputs, self.channels, self.width)

    def drawn_kinds(self, count: int) -> list[str]:
        """What each of so many questions asks by."""
        chances = torch.tensor(self.shares[: len(self.kinds)])
        return [self.kinds[number] for number in torch.multinomial(chances, count, replacement=True).tolist()]

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        count = len(labelled.labels)
        kinds, absent = self.drawn_kinds(count), (torch.rand(count) < self.absent).tolist()
        asked = zip(labelled.labels, kinds, absent, strict=True)
        questions = [self.language.question(label, kind, no) for label, kind, no in asked]
        turns = torch.randint(TURNS, (count,))
        turns[[kind == "position" for kind in kinds]] = 0
        images = each_turned(labelled.images, turns).contiguous(memory_format=torch.channels_last)
        masks = each_turned(meant(labelled.labels, questions), turns)
        sentences = tuple(question.sentence for question in questions)
        loss = self.answer_loss(nets["model"](images, sentences), masks)
        if not self.canonical:
            return loss
        return loss + self.prior * F.cross_entropy(nets["model"].canonicaliser(images), turns.to(images.device))


def agreement(masks: Tensor) -> float:
    """The mean Dice of any two of masks (K, ...) bool; two empty ones agree."""
    found = [overlap(one, other) for one, other in combinations(masks, 2)]
    return sum(found) / len(found)


@torch.no_grad()
def oriented_rows(fitted, case: Case) -> list[dict]:
    """A row for each of `KINDS`: the mean over the words that it asks with, over the slices of a case.

    dice        on the network's grid; by name and size over all eight turns, by position in the scan as it is
    upright     the same for the scan as it is;   consistent: of the answers for the eight turns, turned back, with each
                other (`agreement`)
    """
    nets, method, task = trained(fitted), fitted.method, fitted.task
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    kept = torch.tensor([len(shown_in(label)) > 1 for label in labels])
    images, labels = images[kept], labels[kept]
    if not len(images):
        return []
    language, questions = method.language, {}
    names = [(language.name(value), labels == value) for value in task.structures if language.plain(value)]
    questions["name"] = [(name, truth) for name, truth in names if truth.any()]
    for kind, words in (("position", PLACES), ("size", EXTENTS)):
        for word in words:
            asked = [language.describe(label, word) for label in labels]
            truth = torch.stack([label == question.values[0] for label, question in zip(labels, asked, strict=True)])
            questions.setdefault(kind, []).append((asked[0].sentence, truth))
    everything = [pair for pairs in questions.values() for pair in pairs]
    sentences = tuple(sentence for sentence, _ in everything)
    answers = []
    for turn in range(TURNS):
        parts = turned(images, turn).split(16)
        found = torch.cat([method.answer(nets, part.contiguous(), sentences) for part in parts])
        answers.append(upright(found, turn) > 0.5)
    answers = torch.stack(answers)  # (turns, slices, sentences, S, S)
    rows, place = [], 0
    for kind, pairs in questions.items():
        values: dict[str, list[float]] = {"dice": [], "upright": [], "consistent": []}
        for _, truth in pairs:
            mine = answers[:, :, place]
            place += 1
            each = [overlap(masks, truth) for masks in mine[: 1 if kind == "position" else TURNS]]
            values["dice"].append(sum(each) / len(each))
            values["upright"].append(each[0])
            values["consistent"].append(agreement(mine))
        rows.append(evaluation.row(case, kind, **{name: sum(found) / len(found) for name, found in values.items()}))
    return rows


HEARTS = NamedTask("acdc", evaluation="test", counts=(40, 5, 15))
ARMS = {
    "names alone": Turned(kinds=("name",), shares=(1.0,), canonical=False),
    "flans": Turned(),
    "without canonicalisation": Turned(canonical=False),
}
BRAINS = FreeForm(BRAIN.names)

recipe = Recipe(
    paper="flans",
    title="FLanS: free-form questions about scans in any orientation",
    claim="Asked by name, position or size about hearts in eight orientations, a network that learned such questions "
    "and turns scans upright has a higher Dice than one that was asked by name alone.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("flans", "names alone"),
    ablation=("flans", "without canonicalisation"),
    score=oriented_rows,
    scales=scales(
        NAMED_QUICK,
        HEARTS,
        *ARMS,
        budget=NAMED_BUDGET,
        methods={name: replace(method, language=BRAINS) for name, method in ARMS.items()},
    ),
    source="abstract; modules/canonicalization_sam, modules/model.py, utils/train_utils.py, prompts/ and "
    "main_train_three_stage_ddp.py in the authors' repository, github.com/LongchaoDa/SegmentAsYouWish",
    components=(
        Component(
            "prompts by name, position and size",
            "implemented",
            "half of the questions by name, a quarter each by position and size, with answers made from the label. A "
            "structure is the leftmost if it reaches furthest to the left. Position is asked of scans that are not "
            "turned, as there; name and size of all. The baseline has never heard the words of position and size",
        ),
        Component(
            "prompt generator with retrieval",
            "simplified",
            "eight wordings of a name and five of a position or a size, drawn at random; scores ask with the first",
        ),
        Component(
            "symmetry-aware canonicalisation",
            "implemented",
            "turns by 90 degrees and mirrorings, as in their group of eight; images are square, so that no pixel is "
            "interpolated. In place of steerable convolutions a small network looks at all eight turned images, which "
            "makes it as equivariant. The choice passes gradients straight through, from the segmenter too, as there. "
            "Their prior, a cross-entropy, says that training scans are upright as they are; here they are turned at "
            "random and the turn is the target, which for an equivariant network is the same. There are no stages: "
            "all learns at once, and nothing is warmed up. Nothing was looked at beforehand",
        ),
        Component(
            "consistency across orientations",
            "implemented",
            "the column `consistent`: Dice of the answers for all eight turns with each other. After canonicalisation "
            "it is 1 by construction, but for rounding; whether the one answer is right stands in `dice`",
        ),
        Component("SAM's encoder and decoder, CLIP's text encoder", "simplified", "the chapter's U-Net that is told"),
        Component("100,000 images of seven data sets", "simplified", "hearts of 40 patients, one set"),
    ),
)
