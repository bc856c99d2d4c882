"""Images and sentences in one space (CLIP: Radford et al., ICML 2021), small enough to be trained on a laptop.

An image encoder and a text encoder end in unit vectors of the same length. Images come closer to their own sentence
than to those of the other images of a batch, and the other way round. A sentence then is a classifier: the more
similar, the more probable. Sentences are made from words of the captions alone; no text model was trained beforehand.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.methods.classification import image_labels
from medcook.methods.method import Batch, Method, Moment
from medcook.networks.encoder import Encoder

HIGHEST_SCALE = 100.0
"""What CLIP lets the inverse temperature grow to."""


class ImageText(nn.Module):
    """An image encoder and a text encoder that meet in unit vectors of `width` numbers.

    sentences  define the words that are known; the text encoder is the mean of a sentence's words, and two layers, so
               the order of words has no meaning
    """

    def __init__(
        self, *, sentences: tuple[str, ...], inputs: int, channels: tuple[int, ...], width: int, heat: float, dims: int
    ):
        super().__init__()
        self.sentences = sentences
        self.vocabulary = {word: number for number, word in enumerate(known_words(sentences), start=1)}
        self.image = Encoder(inputs=inputs, channels=channels, dims=dims)
        self.project = nn.Linear(channels[-1], width, bias=False)
        self.words = nn.EmbeddingBag(len(self.vocabulary) + 1, width, mode="mean", padding_idx=0)
        self.phrase = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / heat)))

    def images(self, images: Tensor) -> Tensor:
        """(B, C, *size) to unit vectors (B, width)."""
        return F.normalize(self.project(self.image(images)).float(), dim=1)

    def patches(self, images: Tensor) -> Tensor:
        """(B, C, *size) to unit vectors (B, width, *small): the same encoder, without the mean over the image."""
        maps = self.image.maps(images)
        return F.normalize(self.project(maps.movedim(1, -1)).movedim(-1, 1).float(), dim=1)

    def texts(self, sentences: tuple[str, ...]) -> Tensor:
        """Unit vectors (len(sentences), width)."""
        tokens = self.tokens(sentences).to(self.words.weight.device)
        return F.normalize(self.phrase(self.words(tokens)).float(), dim=1)

    def tokens(self, sentences: tuple[str, ...]) -> Tensor:
        """(len(sentences), most words) int64; 0 fills up."""
        numbers = [[self.number(word) for word in sentence.split()] for sentence in sentences]
        most = max(1, *map(len, numbers))
        return torch.tensor([found + [0] * (most - len(found)) for found in numbers])

    def number(self, word: str) -> int:
        if word not in self.vocabulary:
            raise MedcookError(f"The word {word!r} was in no caption.", f"Known: {', '.join(self.vocabulary)}.")
        return self.vocabulary[word]

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by: one over the temperature; it is learned."""
        return self.log_scale.exp().clamp(max=HIGHEST_SCALE)


def known_words(sentences: tuple[str, ...]) -> list[str]:
    """Every word once, in the order of the alphabet."""
    return sorted({word for sentence in sentences for word in sentence.split()})


def contrast(images: Tensor, texts: Tensor, captions: Tensor, scale: Tensor | float) -> Tensor:
    """The loss of a batch: cross-entropy over its texts for each image, and over its images for each text, averaged.

    images, texts  unit vectors (B, width), the text of image b in row b
    captions       (B,) int64; images whose captions are the same share their probability: none is the other's negative
    """
    return matched(scale * images @ texts.T, captions)


def matched(similarity: Tensor, captions: Tensor, image_weight: float = 0.5) -> Tensor:
    """The same of similarities (B, B) of images and texts; images look for texts with this weight, texts for images
    with the rest."""
    same = (captions[:, None] == captions[None]).to(similarity.dtype)
    target = same / same.sum(1, keepdim=True)
    there, back = F.cross_entropy(similarity, target), F.cross_entropy(similarity.T, target)
    return image_weight * there + (1 - image_weight) * back


def numbered(captions: tuple[str, ...]) -> Tensor:
    """(B,) int64: equal captions have the same number."""
    places = {caption: place for place, caption in enumerate(captions)}
    return torch.tensor([places[caption] for caption in captions])


@dataclass
class ContrastiveImageText(Method):
    """Learns which caption belongs to an image; the label of an image is the number of its caption.

    captions  sentences by number; further numbers are "class 3", and so on
    width     of the space in which images and sentences meet
    heat      temperature of the similarities at the start; it is learned
    """

    captions: tuple[str, ...] = ()
    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    rate: float = 2e-3
    width: int = 64
    heat: float = 0.1

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = self.image_text(self.sentences(classes), inputs, dims)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def image_text(self, sentences: tuple[str, ...], inputs: int, dims: int) -> ImageText:
        """The network for these sentences."""
        space = {"channels": self.channels, "width": self.width, "heat": self.heat}
        return ImageText(sentences=sentences, inputs=inputs, dims=dims, **space)

    def sentences(self, classes: int) -> tuple[str, ...]:
        """One sentence a class."""
        return (*self.captions, *(f"class {number}" for number in range(len(self.captions), classes)))[:classes]

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model = nets["model"]
        captions = image_labels(labelled.labels, len(model.sentences))
        texts = model.texts(tuple(model.sentences[number] for number in captions.tolist()))
        return contrast(model.images(labelled.images), texts, captions, model.scale)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Zero-shot probabilities of the captions (B, classes, *size), constant over each image."""
        found = self.zero_shot(nets, images, nets["average"].sentences)
        return found.view(*found.shape, *[1] * (images.ndim - 2)).expand(*found.shape, *images.shape[2:])

    def zero_shot(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        """How probable each sentence is, against the others: (B, len(sentences))."""
        average = nets["average"]
        return (average.scale * average.images(images) @ average.texts(sentences).T).softmax(1)

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Unit vectors (B, width) of images."""
        return nets["average"].images(images)
