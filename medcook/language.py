"""Asking in words: sentences as vectors, a network that is told what to find, and questions about training images.

A question is a sentence and the label values that it means; its answer is one mask. What can be asked, and how it is
said, is a `Language`: here names of structures (`Names`); chapter 11 has another, of findings in X-rays. No text model
was trained beforehand: words get their meaning here, from the masks that they go with.
"""

import re
import zlib
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods.method import Batch, Method, Moment
from medcook.methods.semi_supervised import NARROW
from medcook.networks import UNet

BUCKETS = 1009
"""Rows of a table of words; a word's row follows from its letters, so that no list of words is needed."""
LONGEST = 24
"""Words of a sentence that are read; the rest is cut off."""


class Question(NamedTuple):
    """A sentence, and the label values that it means: none where it names what is not there."""

    sentence: str
    values: tuple[int, ...]


class Language(Protocol):
    """What can be asked about label maps. A frozen dataclass, since it is among a method's settings."""

    def name(self, value: int) -> str:
        """The sentence for one label value."""

    def ask(self, there: tuple[int, ...], group: int | None, absent: bool) -> Question:
        """A random question about an image that shows the label values `there`, by torch's own generator.

        group   of the image, where its task hands these out; absent: the question shall fit nothing in the image
        """


def words_of(sentence: str) -> list[str]:
    """Lower-case words and numbers, without punctuation; at most `LONGEST`."""
    return re.findall("[a-z]+|[0-9]+", sentence.lower())[:LONGEST]


def row_of(word: str) -> int:
    """The row of a word in a table of `BUCKETS` rows; row 0 is no word's."""
    return 1 + zlib.crc32(word.encode()) % (BUCKETS - 1)


def tokens_of(sentences: list[str] | tuple[str, ...]) -> Tensor:
    """(B, most words) int64 rows of the words; 0 fills up."""
    rows = [[row_of(word) for word in words_of(sentence)] for sentence in sentences]
    if not all(rows):
        raise MedcookError("A sentence has no words.", "Ask for something.")
    most = max(map(len, rows))
    return torch.tensor([found + [0] * (most - len(found)) for found in rows])


class TextEncoder(nn.Module):
    """Sentences to one vector each, and one for every word: a table of words, their places, a transformer block."""

    def __init__(self, width: int, blocks: int = 1):
        super().__init__()
        self.words = nn.Embedding(BUCKETS, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        nn.init.normal_(self.words.weight, std=0.3)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )

    def tokens(self, sentences: list[str] | tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Vectors of the words (B, L, width) float32, and where there is none (B, L) bool."""
        rows = tokens_of(sentences).to(self.words.weight.device)
        empty, x = rows == 0, self.words(rows) + self.places[: rows.shape[1]]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=empty)
        return x.float(), empty

    def forward(self, sentences: list[str] | tuple[str, ...]) -> Tensor:
        """(B, width) float32: the mean over the words."""
        return mean_words(*self.tokens(sentences))


def mean_words(words: Tensor, empty: Tensor) -> Tensor:
    """(B, width): the mean over words (B, L, width), of which some are none (B, L)."""
    there = (~empty)[..., None].to(words)
    return (words * there).sum(1) / there.sum(1)


class Modulation(nn.Module):
    """Scales and shifts feature maps (B, C, H, W), channel by channel, as vectors (B, width) say: FiLM (Perez et al.,
    AAAI 2018). At the start it changes nothing."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.line = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, maps: Tensor, vectors: Tensor) -> Tensor:
        scale, shift = self.line(vectors)[:, :, None, None].chunk(2, dim=1)
        return maps * (1 + scale) + shift


class ToldUNet(nn.Module):
    """A U-Net that hears a sentence: it modulates the deepest features and those of every level on the way up, and
    makes the weights of the head. An image is encoded once (`encode`); each sentence has its own way up (`decode`)."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int):
        super().__init__()
        self.net = UNet(inputs=inputs, classes=1, channels=channels)
        self.net.head = nn.Identity()
        self.text = TextEncoder(width)
        self.deepest = Modulation(channels[-1], width)
        self.rising = nn.ModuleList(Modulation(count, width) for count in channels[:-1])
        self.ask = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, channels[0] + 1))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps of every level of images (B, C, H, W), the finest first."""
        return self.net.descend(images)

    def fuse(self, maps: list[Tensor], vectors: Tensor, sentences: tuple[str, ...]) -> list[Tensor]:
        """The maps after they have heard the sentences, of which `vectors` (B, width) are what was understood."""
        return [*maps[:-1], self.deepest(maps[-1], vectors)]

    def rise(self, maps: list[Tensor], vectors: Tensor) -> Tensor:
        """The way up: (B, channels[0], H, W)."""
        x = maps[-1]
        steps = zip(self.net.up, maps[:-1], self.rising, strict=True)
        for block, skip, modulate in reversed(list(steps)):
            x = F.interpolate(x, size=skip.shape[2:], mode=self.net.mode, align_corners=False)
            x = modulate(block(torch.cat([skip, x], dim=1)), vectors)
        return x

    def understand(self, sentences: tuple[str, ...]) -> Tensor:
        """(B, width): what the sentences mean."""
        return self.text(sentences)

    def decode(self, maps: list[Tensor], sentences: tuple[str, ...]) -> Tensor:
        """Logits (B, H, W) float32 of the masks that the sentences ask for, one for each image's maps."""
        vectors = self.understand(sentences)
        features = self.rise(self.fuse(maps, vectors, sentences), vectors)
        weights = self.ask(vectors)
        found = torch.einsum("bchw,bc->bhw", features.float(), weights[:, :-1].float())
        return found / features.shape[1] ** 0.5 + weights[:, -1].float()[:, None, None]

    def forward(self, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        return self.decode(self.encode(images), sentences)


@dataclass(frozen=True)
class Names:
    """Structures are asked for by name, in one of several forms.

    names    of label values 1, 2, ...; nobody asks for those whose name is empty
    sets     the number of the data set that each name is from; empty: all are from one
    partial  sets in which not everything is annotated: a name of theirs that is not there may be unlabelled
    forms    how a name is put into a sentence, one of them at random; scores use the first
    """

    names: tuple[str, ...] = ()
    sets: tuple[int, ...] = ()
    partial: tuple[int, ...] = ()
    forms: tuple[str, ...] = ("{name}", "the {name}", "segment the {name}")

    def name(self, value: int) -> str:
        return self.forms[0].format(name=self.plain(value) or f"structure {value}")

    def plain(self, value: int) -> str:
        """The name alone; `structure 7` where no name is known."""
        return self.names[value - 1] if value <= len(self.names) else f"structure {value}"

    def ask(self, there: tuple[int, ...], group: int | None, absent: bool) -> Question:
        form = self.forms[int(torch.randint(len(self.forms), ()))]
        there = tuple(value for value in there if self.plain(value))
        others = self.absent(there, group)
        if others and (absent or not there):
            return Question(form.format(name=self.plain(one_of(others))), ())
        value = one_of(there or (1,))
        return Question(form.format(name=self.plain(value)), (value,) if there else ())

    def absent(self, there: tuple[int, ...], group: int | None) -> tuple[int, ...]:
        """Values whose names certainly fit nothing in an image of this group that shows `there`."""
        unsure = {value for value, number in enumerate(self.sets, 1) if number == group and number in self.partial}
        return tuple(value for value, name in enumerate(self.names, 1) if name and value not in {*there, *unsure})


def one_of(values: tuple[int, ...]) -> int:
    """One of them, by torch's own generator."""
    return values[int(torch.randint(len(values), ()))]


def shown_in(label: Tensor, least: int = 1) -> tuple[int, ...]:
    """The label values in a label map, without the background, that cover at least so many pixels."""
    values, counts = label.unique(return_counts=True)
    found = zip(values.tolist(), counts.tolist(), strict=True)
    return tuple(value for value, count in found if value not in (0, IGNORE) and count >= least)


def meant(labels: Tensor, questions: list[Question]) -> Tensor:
    """(B, H, W) uint8: 1 where labels (B, H, W) have a value that their question means; unlabelled stays so."""
    masks = torch.zeros_like(labels)
    for mask, label, question in zip(masks, labels, questions, strict=True):
        mask[torch.isin(label, torch.tensor(question.values, dtype=label.dtype, device=label.device))] = 1
        mask[label == IGNORE] = IGNORE
    return masks


def mask_loss(logits: Tensor, masks: Tensor, each: bool, smooth: float = 1.0) -> Tensor:
    """Binary cross-entropy and one minus soft Dice of logits (B, H, W) and masks (B, H, W), which are 1, 0 or `IGNORE`.

    each  every image has its own Dice, so that small answers count beside large ones; else one for the whole batch
    """
    known, truth = (masks != IGNORE).float(), (masks == 1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, known, reduction="sum") / known.sum().clamp_min(1)
    found, axes = logits.sigmoid() * known, (1, 2) if each else (0, 1, 2)
    overlap, size = (found * truth).sum(axes), found.sum(axes) + truth.sum(axes)
    return entropy + (1 - (2 * overlap + smooth) / (size + smooth)).mean()


@dataclass
class Told(Method):
    """A network that segments what a sentence asks for. Every step asks one question about every image.

    language  what is asked, and how
    width     of sentences' vectors
    absent    the share of questions that name something which is not in the image
    each      see `mask_loss`
    """

    channels: tuple[int, ...] = NARROW
    language: Language = Names()
    width: int = 64
    absent: float = 0.15
    each: bool = False

    axes = 2

    def network_for(self, inputs: int) -> nn.Module:
        """The network; it has `encode` and `decode` as `ToldUNet` has."""
        return ToldUNet(inputs, self.channels, self.width)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("This network is asked about images, not volumes.", "Take a task of slices.")
        model = self.network_for(inputs)
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def questions(self, batch: Batch) -> list[Question]:
        """A random question about each image of a batch."""
        groups = [None] * len(batch.labels) if batch.groups is None else batch.groups.tolist()
        absent = (torch.rand(len(batch.labels)) < self.absent).tolist()
        found = zip(batch.labels, groups, absent, strict=True)
        return [self.language.ask(shown_in(label), group, no) for label, group, no in found]

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        questions = self.questions(labelled)
        sentences = tuple(question.sentence for question in questions)
        return self.answer_loss(nets["model"](labelled.images, sentences), meant(labelled.labels, questions))

    def answer_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Of logits (B, H, W) and masks (B, H, W), which are 1, 0 or `IGNORE`."""
        return mask_loss(logits.float(), masks, self.each)

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        """Probabilities (B, S, H, W) float32 that each pixel is what each of the S sentences asks for."""
        net = nets["average"]
        maps = net.encode(images)
        found = [net.decode(maps, (sentence,) * len(images)).float().sigmoid() for sentence in sentences]
        return torch.stack(found, dim=1)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, H, W): every label value is asked for by its name; background is what no answer claims."""
        classes = nets["average"].classes
        claims = self.answer(nets, images, tuple(self.language.name(value) for value in range(1, classes)))
        everything = torch.cat([1 - claims.amax(1, keepdim=True), claims], dim=1)
        return everything / everything.sum(1, keepdim=True)
