"""Small models of four builds that answer every kind of question in words, as a harness wants it.

All learn from the same training patients. A subclass says how it learns, and makes a callable of what it learnt
(`model`), which gets questions and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import Augment
from medcook.language import words_of
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.classification import image_labels
from medcook.networks.vila import LLAMAS, Line, Photographs, Siglip, Vila
from medcook.pretraining import fresh
from medcook.recipes.fairness.mask_of_truth import MaskedClassifier, apart
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings import _writing as writing
from medcook.recipes.findings._experts import LUNGS, coloured
from medcook.recipes.findings._harness import Model, Question
from medcook.recipes.findings._judging import said_otherwise
from medcook.recipes.findings._mined import FACTS, SIDES, Known, MinedTask, said_answer
from medcook.recipes.findings._settings import AUGMENT
from medcook.recipes.findings.tb_cxr import LungsFirst
from medcook.recipes.language._parsing import f1
from medcook.recipes.language._reading import Reader
from medcook.recipes.language._reports import said
from medcook.sampling import trained

BRAINS = MinedTask("embedded", outcome="group", positive="atrophy", fold=0)
LLAMA = LLAMAS["3B"] | {"vocab_size": 1 + writing.STOP, "max_position_embeddings": 256, "initializer_range": 0.1}
LLAMA |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIGLIP |= {"image_size": 48, "patch_size": 8}
COARSE, BUCKETS = 16, 256
"""Sides of the coarse mask that a linear map gives; numbers that tell which words a report has."""
UNREAD = "I cannot read reports."


@dataclass
class Miner(Method):
    """What is evaluated.

    encoder  `imagenet`: SqueezeNet with what photographs taught it; `random`: a small network that knows nothing
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 1e-3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    encoder: Literal["imagenet", "random"] = "imagenet"

    axes = 2
    trial = BRAINS

    augment = MaskedClassifier.augment

    def learner(self) -> nn.Module:
        """What learns."""
        raise NotImplementedError

    def outcomes(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """How probable the outcome is in each of the images (B, 1, H, W)."""
        raise NotImplementedError

    def model(self, fitted, known: Known) -> Model:
        """The callable that answers."""
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = self.learner()
        return nn.ModuleDict({"model": model, "average": fresh(model)})

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 2, H, W): how probable the outcome is, the same all over each image."""
        found = self.outcomes(nets, apart(images)[0])
        return torch.stack([1 - found, found], dim=1)[:, :, None, None].expand(-1, -1, *images.shape[2:])


@dataclass
class Probe(Miner):
    """Features that stay as they are, and linear maps of them to everything that is known of an image.

    Training learns the map to the outcome; the others have a closed form (ridge regression).
    """

    def learner(self) -> Reader:
        reader = Reader(self.encoder, 1, 2, self.channels)
        reader.encoder.requires_grad_(False)
        return reader

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](apart(labelled.images)[0]).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, 2))

    def outcomes(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return nets["average"](images).float().softmax(1)[:, 1]

    def eyes(self, fitted, known: Known) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Features (N, C) of known images, each with mean 0 and variance 1, and what makes them of an image (H, W)."""
        reader = trained(fitted)["average"]
        found = torch.cat([reader.features(part) for part in known.images.split(32)]).numpy()
        mean, spread = found.mean(0), found.std(0) + 1e-6

        def seen(image: np.ndarray) -> np.ndarray:
            return (reader.features(torch.from_numpy(image)[None, None]).numpy()[0] - mean) / spread

        return (found - mean) / spread, seen

    def model(self, fitted, known: Known) -> Model:
        features, seen = self.eyes(fitted, known)
        facts = np.array([[fact in truth["mining"] for fact in FACTS] for truth in known.truths], float)
        lungs = torch.from_numpy(np.array([truth["segmentation"] for truth in known.truths], np.float32))
        coarse = F.adaptive_avg_pool2d(lungs[:, None], COARSE).flatten(1).numpy()
        boxes = np.array([truth["localisation"].flatten() for truth in known.truths])
        of_facts, of_masks, of_boxes = (ridge(features, target) for target in (facts, coarse, boxes))
        of_words = ridge(np.array([bag(said_otherwise(report)) for report in known.reports]), facts, weight=1.0)
        nets, size = trained(fitted), tuple(known.images.shape[2:])

        def answer(question: Question) -> str:
            if question.image is None:
                return said_answer("mining", stated(of_words(bag(question.text))))
            x, kind = seen(question.image), question.kind
            if kind == "classification":
                return "yes" if self.outcomes(nets, torch.from_numpy(question.image)[None, None]) > 0.5 else "no"
            if kind == "localisation":
                return said_answer(kind, of_boxes(x).reshape(2, 4).clip(0, [size[1], size[0]] * 2))
            if kind == "segmentation":
                mask = torch.from_numpy(of_masks(x)).float().view(1, 1, COARSE, COARSE)
                return said_answer(kind, F.interpolate(mask, size, mode="bilinear")[0, 0].numpy() > 0.5)
            return of_facts_said(kind, stated(of_facts(x)))

        return answer


@dataclass
class Nearest(Probe):
    """The same features; what is known of the most similar known image, or report, is the answer."""

    def model(self, fitted, known: Known) -> Model:
        features, seen = self.eyes(fitted, known)
        lengths = np.linalg.norm(features, axis=1)
        reports = [frozenset(words_of(said_otherwise(report))) for report in known.reports]

        def answer(question: Question) -> str:
            if question.image is None:
                words = frozenset(words_of(question.text))
                likeness = np.array([f1(words, report) for report in reports])
            else:
                likeness = features @ seen(question.image) / lengths
            for number in np.argsort(-likeness, kind="stable"):
                if question.kind in known.truths[number]:
                    return said_answer(question.kind, known.truths[number][question.kind])
            return "none"

        return answer


@dataclass
class Segmenter(Miner):
    """A U-Net for lungs and a classifier; of findings it says what is commonest with its outcome. It cannot read."""

    rate: float = 5e-4

    def learner(self) -> LungsFirst:
        return LungsFirst(Reader(self.encoder, 1, 2, self.channels), "unet", LUNGS)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        image, drawn = apart(labelled.images)
        logits = nets["model"].reader(image).float()
        told = F.cross_entropy(logits, image_labels(labelled.labels, 2))
        return told + find_loss("both")(nets["model"].lungs(image), (drawn[:, 0] > 0.5).byte())

    def outcomes(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return nets["average"].reader(images).float().softmax(1)[:, 1]

    def model(self, fitted, known: Known) -> Model:
        nets, usual = trained(fitted), {}
        for outcome in ("yes", "no"):
            some = [truth for truth in known.truths if truth["classification"] == outcome]
            usual[outcome] = mined.ignorant(known.truths) | mined.ignorant(some) | {"classification": outcome}

        def answer(question: Question) -> str:
            if question.image is None:
                return UNREAD
            image = torch.from_numpy(question.image)[None, None]
            if question.kind not in mined.PLACES:
                return usual["yes" if self.outcomes(nets, image) > 0.5 else "no"][question.kind]
            lungs = nets["average"].lungs(image)[0].argmax(0).numpy() == 1
            found = mined.boxes_of(lungs) if question.kind == "localisation" else lungs
            return "none" if found is None else said_answer(question.kind, found)

        return answer


@dataclass
class Writer(Miner):
    """A language model behind frozen eyes: every answer is written, token by token (`_writing`)."""

    rate: float = 6e-3

    def learner(self) -> Vila:
        return Vila(Photographs() if self.encoder == "imagenet" else Siglip(SIGLIP), LLAMA)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """All questions about every image and its report; where no reports are handed out, they are empty."""
        images, lungs = apart(labelled.images)
        outcomes = image_labels(labelled.labels, 2).bool().tolist()
        reports = ("",) * len(images) if labelled.groups is None else said(labelled.groups)
        size, lines, told, shown = tuple(images.shape[2:]), [], [], []
        for number, (mask, outcome, report) in enumerate(zip(lungs[:, 0] > 0.5, outcomes, reports, strict=True)):
            mask = mask.cpu().numpy()
            for kind, truth in mined.truths_of(mask, outcome, report).items():
                question = mined.asked(kind, mask, report)
                given, answer = writing.heard(question), writing.told(kind, truth, size)
                lines.append(given + answer)
                told.append([False] * len(given) + [True] * len(answer))
                shown += [] if question.image is None else [number]
        pictures = nets["model"].pictures(coloured(images))
        return nets["model"].loss(lines, told, pictures[shown])

    def write(self, net: Vila, question: Line, pictures: Tensor) -> Line:
        """The tokens of an answer, each the most probable one, without the end."""
        line = list(question)
        while len(line) - len(question) < writing.MOST:
            token = int(net.next_words([line], pictures).argmax())
            if token == writing.STOP:
                break
            line.append(token)
        return line[len(question) :]

    def outcomes(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The share of `yes` in `yes` and `no`."""
        question = writing.heard(Question("classification", "", np.zeros((1, 1))))
        logits = nets["average"].next_words([question] * len(images), nets["average"].pictures(coloured(images)))
        return logits[:, [writing.WORDS.index(word) for word in ("no", "yes")]].softmax(1)[:, 1]

    def model(self, fitted, known: Known) -> Model:
        net, size = trained(fitted)["average"], tuple(known.images.shape[2:])
        blind = torch.zeros(0, 1, LLAMA["hidden_size"])

        def answer(question: Question) -> str:
            image = question.image
            seen = blind if image is None else net.pictures(coloured(torch.from_numpy(image)[None, None]))
            return writing.written(question.kind, self.write(net, writing.heard(question), seen), size)

        return answer


def ridge(x: np.ndarray, y: np.ndarray, weight: float = 100.0) -> Callable[[np.ndarray], np.ndarray]:
    """The linear map from x (N, C) to y (N, D) that minimises |x W + b - y|^2 + weight |W|^2; b is not held small."""
    centre, mean = x.mean(0), y.mean(0)
    inner = x - centre
    weights = np.linalg.solve(inner.T @ inner + weight * np.eye(x.shape[1]), inner.T @ (y - mean))
    return lambda new: (new - centre) @ weights + mean


def bag(text: str) -> np.ndarray:
    """(BUCKETS,): 1 for each word of a text, at a place by its letters."""
    found = np.zeros(BUCKETS)
    found[[crc32(word.encode()) % BUCKETS for word in words_of(text)]] = 1
    return found


def stated(shares: np.ndarray) -> frozenset[str]:
    """The facts whose share is above one half."""
    return frozenset(fact for fact, share in zip(FACTS, shares, strict=True) if share > 0.5)


def of_facts_said(kind: str, facts: frozenset[str]) -> str:
    """What an image is said to show, as the answer of a kind."""
    sides = facts & frozenset(SIDES)
    return {
        "detection": said_answer(kind, sides),
        "counting": str(len(sides)),
        "generation": said_answer("mining", facts),
    }[kind]
