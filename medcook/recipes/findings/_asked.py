"""Questions about an X-ray, answers that are facts, experts that may be asked, and all of it as words in a row.

Facts are real: tuberculosis, the lungs as people drew them, sex and age of patients of whom these are known. A question
is put in one of several forms. A conversation goes as those of VILA-M3 (Nath et al., CVPR 2025): cards of experts, the
image and the question; a call of an expert, or the answer; what the expert found, and the question again; the answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from medcook.cohorts import first_attributes
from medcook.networks.vila import IMAGE, Line, called
from medcook.recipes.fairness.mask_of_truth import RegionTask
from medcook.tasks import Samples


@dataclass(frozen=True)
class Topic:
    """forms  of the question, the first of which scores ask;   expert  who knows about it, empty: nobody does"""

    forms: tuple[str, ...]
    answers: tuple[str, ...]
    expert: str = ""


TOPICS = {
    "tuberculosis": Topic(
        ("is there tuberculosis", "does this show tuberculosis", "tuberculosis or not"), ("no", "yes"), "CXR"
    ),
    "size": Topic(
        ("how large are the lungs", "what size have the lungs", "tell the size of the lungs"),
        ("small", "middle", "large"),
        "LUNGS",
    ),
    "sides": Topic(
        ("is the right lung much larger", "is the left lung much smaller", "much more lung on the right"),
        ("no", "yes"),
        "LUNGS",
    ),
    "sex": Topic(("is this a man or a woman", "tell the sex", "what sex has the patient"), ("woman", "man")),
    "age": Topic(("is the patient young or older", "tell the age", "how old is the patient"), ("young", "older")),
}
EXPERTS = {"CXR": "tells tuberculosis", "LUNGS": "draws the lungs"}
"""{name: what its card says}."""
CALLS = {name: f"<{name}()>" for name in EXPERTS}
CARDS = " ".join(f"{CALLS[name]} {card}" for name, card in EXPERTS.items())
FOUND = {"CXR": "predictions tuberculosis {}", "LUNGS": "results <image> area {} right {}"}
UNKNOWN = -1

NUMBERS = tuple(str(number) for number in range(101))
_SAID = [CARDS, *FOUND.values(), *(text for topic in TOPICS.values() for text in (*topic.forms, *topic.answers))]
WORDS = (*sorted({word for text in _SAID for word in text.split()} - {"<image>", "{}"}), *NUMBERS)
STOP = len(WORDS)
"""The token that ends an answer; it also begins a conversation."""
SAYS = 4
"""Tokens that a model says about a question, at most: a call, an answer, the end, and one more."""


def spelt(text: str) -> Line:
    """The tokens of a text; a picture's place is `IMAGE`."""
    return [IMAGE if word == "<image>" else WORDS.index(word) for word in text.split()]


def written(line: Line) -> str:
    """The text of tokens; a full stop is where a conversation begins and ends."""
    return " ".join("<image>" if word == IMAGE else [*WORDS, "."][word] for word in line)


def prompt(question: str, cards: bool) -> Line:
    """How a conversation begins: with or without the experts' cards."""
    return [STOP, *spelt(f"{CARDS if cards else ''} <image> {question}")]


def conversation(topic: str, question: str, answer: str, heard: Mapping[str, str] | None) -> tuple[Line, list[bool]]:
    """A whole conversation, and which of its tokens are the model's.

    heard  {expert: what it found}; None: there are no experts, and the model answers alone
    """
    line = prompt(question, heard is not None)
    told = [False] * len(line)
    parts = [(answer, True)]
    expert = TOPICS[topic].expert
    if heard is not None and expert:
        parts = [(CALLS[expert], True), (f"{heard[expert]} {question}", False), *parts]
    for text, mine in parts:
        words = spelt(text)
        line, told = line + words, told + [mine] * len(words)
    return [*line, STOP], [*told, True]


class Reply(NamedTuple):
    """The expert that was called, or None, and the answer: all other words."""

    call: str | None
    answer: str


def talk(
    next_words: Callable[[list[Line]], Tensor], questions: list[str], heard: list[Mapping[str, str]], cards: bool
) -> list[Reply]:
    """Conversations of a model about questions, each word the most probable one.

    next_words  the model: rows of tokens to logits (B, 1 + words) of what comes after each
    heard       for each question {expert: what it would say}; the first that is called is heard, and asked no more
    """
    lines = [prompt(question, cards) for question in questions]
    calls: list[str | None] = [None] * len(lines)
    answers: list[list[str]] = [[] for _ in lines]
    going = set(range(len(lines)))
    for _ in range(SAYS):
        for k, word in enumerate(next_words(lines).argmax(1).tolist()):
            if k not in going:
                continue
            lines[k] = [*lines[k], word]
            call = called(WORDS[word]) if word != STOP else None
            if word == STOP:
                going.remove(k)
            elif call and calls[k] is None:
                calls[k] = call[0]
                lines[k] += spelt(f"{heard[k][call[0]]} {questions[k]}")
            else:
                answers[k].append(WORDS[word])
    return [Reply(call, " ".join(answer)) for call, answer in zip(calls, answers, strict=True)]


def shown(lines: list[Line], owners: list[int], count: int) -> list[int]:
    """Which of 2 `count` pictures the rows show, one after the other: first the owner's image, then its overlay."""
    return [owner + count * k for line, owner in zip(lines, owners, strict=True) for k in range(line.count(IMAGE))]


def right_lung(lungs: Tensor) -> Tensor:
    """The right lungs (B, 1, H, W) bool of masks of both: what lies on the image's left of the mask's middle column."""
    columns = torch.arange(lungs.shape[3], device=lungs.device)
    there = lungs.any(2, keepdim=True)
    first = torch.where(there, columns, lungs.shape[3]).amin(3, keepdim=True)
    last = torch.where(there, columns, -1).amax(3, keepdim=True)
    return lungs & (2 * columns <= first + last)


def measured(lungs: Tensor) -> Tensor:
    """(B, 2): the area of lungs (B, 1, H, W) bool in percent of the image, and the right one's share of it in percent;
    50 where nothing is there."""
    area, right = (part.flatten(1).sum(1).float() for part in (lungs, right_lung(lungs)))
    share = torch.where(area > 0, right / area.clamp_min(1), 0.5)
    return 100 * torch.stack([area / lungs[0].numel(), share], dim=1)


@dataclass(frozen=True)
class Measure:
    """When lungs are middle or large, by their area, and the right one much larger, by its share; in percent.

    At these values training patients of Montgomery and Shenzhen fall into thirds and halves.
    """

    sizes: tuple[float, float] = (21.1, 25.6)
    larger: float = 54.0

    def numbers(self, found: Tensor) -> Tensor:
        """(B, 2) int64: numbers of the answers on size and sides, of what `measured` found."""
        cuts = torch.tensor(self.sizes, device=found.device)
        return torch.stack([torch.bucketize(found[:, 0].contiguous(), cuts), (found[:, 1] > self.larger).long()], dim=1)


@dataclass(frozen=True)
class AskedTask(RegionTask):
    """X-rays with their lungs and the outcome; groups say which half of the patients an image is of, sex and age.

    older  from so many years on
    """

    older: int = 37

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        patients = getattr(self, f"{role}_patients")
        facts = [(number, first_attributes(self.data, patient)) for number, patient in enumerate(patients)]
        codes = [
            coded(number % 2, *self.person(known))
            for (number, known), patient in zip(facts, patients, strict=True)
            for _ in self.data.patients[patient]
        ]
        return replace(samples, groups=torch.tensor(codes)[samples.case_of])

    def person(self, attributes: Mapping) -> tuple[int, int]:
        """Numbers of the answers on sex and age; `UNKNOWN` where they are not known."""
        sex, age = attributes.get("sex"), attributes.get("age")
        return {"F": 0, "M": 1}.get(sex, UNKNOWN), UNKNOWN if age is None else int(age >= self.older)


def coded(half: int, sex: int, age: int) -> int:
    """Three facts as one number; `decoded` takes it apart."""
    return half + 2 * (sex + 1) + 6 * (age + 1)


def decoded(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Halves (B,), and numbers of the answers on sex and age (B, 2)."""
    return codes % 2, torch.stack([codes // 2 % 3, codes // 6], dim=1) - 1


def commonest(codes: Tensor) -> tuple[str, ...]:
    """For each topic without an expert the commonest answer among codes (B,): what somebody says who knows nothing."""
    topics = [topic for topic in TOPICS.values() if not topic.expert]
    known = [numbers[numbers != UNKNOWN] for numbers in decoded(codes)[1].T]
    return tuple(topic.answers[int(numbers.mode()[0])] for topic, numbers in zip(topics, known, strict=True))
