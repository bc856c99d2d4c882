"""Symbolic segmentation (Chowdhury, Santamaria-Pang, Kubricht, Qiu and Tu, preprint 2020, arXiv 2008.09866).

Two agents talk about an image. The Sender, an LSTM, sees the deep features of a network and says a sentence, symbol by
symbol, each drawn from a categorical distribution over a vocabulary; the Receiver, another LSTM, reads it, and what it
understood takes part in the mask. Nobody says what a symbol means: both learn from the loss of the mask alone, through
the Gumbel softmax (Jang et al.; Maddison et al., both ICLR 2017). Sentences can then be read beside the images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

HIDDEN, GRID = 64, 4
"""Numbers that an agent remembers; side of the grid on which the Sender sees and the Receiver draws."""


def symbols(logits: Tensor, temperature: float, draw: bool) -> Tensor:
    """One-hot symbols (B, vocabulary): drawn with probabilities softmax(logits), or the most probable.

    What is drawn is discrete; its gradient is that of a softmax of (logits + Gumbel noise) / temperature.
    """
    if draw:
        return F.gumbel_softmax(logits, temperature, hard=True)
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


class Sender(nn.Module):
    """Features (B, inputs, H, W) to a sentence (B, length, vocabulary) of one-hot symbols; drawn while training.

    The features are where the LSTM begins; then it hears what it has said: h_t = LSTM(s_(t-1), h_(t-1)), s_t ~ W h_t.
    """

    def __init__(self, inputs: int, *, vocabulary: int, length: int, temperature: float = 1.0):
        super().__init__()
        self.length, self.temperature = length, temperature
        self.see = nn.Linear(inputs * GRID**2, HIDDEN)
        self.start = nn.Parameter(torch.zeros(HIDDEN))
        self.embedding = nn.Linear(vocabulary, HIDDEN, bias=False)
        self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.choose = nn.Linear(HIDDEN, vocabulary)

    def forward(self, features: Tensor) -> Tensor:
        state = torch.tanh(self.see(F.adaptive_avg_pool2d(features, GRID).flatten(1)))
        memory, heard, sentence = torch.zeros_like(state), self.start.expand_as(state), []
        for _ in range(self.length):
            state, memory = self.cell(heard, (state, memory))
            sentence.append(symbols(self.choose(state), self.temperature, self.training))
            heard = self.embedding(sentence[-1])
        return torch.stack(sentence, dim=1)


class Receiver(nn.Module):
    """A sentence (B, length, vocabulary) to a map (B, width, *size): what it remembers at the end, drawn on a grid."""

    def __init__(self, width: int, *, vocabulary: int):
        super().__init__()
        self.embedding = nn.Linear(vocabulary, HIDDEN, bias=False)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.draw = nn.Linear(HIDDEN, width * GRID**2)

    def forward(self, sentence: Tensor, size: torch.Size) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(sentence))
        return resized(self.draw(state[0]).unflatten(1, (-1, GRID, GRID)), size)


class SymbolicUNet(UNet):
    """The book's U-Net, whose decoder begins with its deep features and what the Receiver makes of the sentence.

    speak  False: there is no Sender, and the Receiver reads the first symbol again and again
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        vocabulary: int = 16,
        length: int = 8,
        width: int = 16,
        speak: bool = True,
    ):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        self.sender = Sender(channels[-1], vocabulary=vocabulary, length=length) if speak else None
        self.receiver = Receiver(width, vocabulary=vocabulary)
        self.up[-1] = DoubleConv(channels[-2] + channels[-1] + width, channels[-2], 2)
        silence = F.one_hot(torch.zeros(length, dtype=torch.long), vocabulary).float()
        self.register_buffer("silence", silence, persistent=False)

    def levels(self, image: Tensor) -> list[Tensor]:
        """The features of the encoder, finest first."""
        found = [self.down[0](image)]
        for block in self.down[1:]:
            found.append(block(self.pool(found[-1], 2)))
        return found

    def say(self, deep: Tensor) -> Tensor:
        """The sentence (B, length, vocabulary) about deep features, in float32 whatever the precision around it."""
        if self.sender is None:
            return self.silence.expand(len(deep), -1, -1)
        with torch.autocast(deep.device.type, enabled=False):
            return self.sender(deep.float())

    def masks(self, levels: list[Tensor], sentence: Tensor) -> Tensor:
        """Logits (B, classes, *size) of an image's features and a sentence."""
        *skips, deep = levels
        with torch.autocast(deep.device.type, enabled=False):
            told = self.receiver(sentence, deep.shape[2:])
        x = torch.cat([deep, told.to(deep.dtype)], dim=1)
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([skip, resized(x, skip.shape[2:])], dim=1))
        return self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        levels = self.levels(image)
        return self.masks(levels, self.say(levels[-1]))


def information(said: Tensor, present: Tensor) -> float:
    """Mutual information in nats of a symbol (N,) and of whether a structure is there (N,): 0 if it says nothing.

    I = sum over symbols s and answers c of p(s, c) log(p(s, c) / (p(s) p(c)))
    """
    joint = torch.stack([torch.bincount(said[present == answer], minlength=int(said.max()) + 1) for answer in (0, 1)])
    joint = joint.double() / len(said)
    alone = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    seen = joint > 0
    return float((joint[seen] * (joint[seen] / alone[seen]).log()).sum())


@dataclass
class Symbolic(Architecture):
    """A U-Net whose decoder is told a sentence about the image.

    vocabulary, length  symbols there are, and symbols in a sentence
    speak               False: every image gets the same sentence, all else equal
    """

    vocabulary: int = 16
    length: int = 8
    speak: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        settings = {"vocabulary": self.vocabulary, "length": self.length, "speak": self.speak}
        return SymbolicUNet(inputs=inputs, classes=classes, channels=self.channels, **settings)

    @torch.no_grad()
    def sentences(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """What the network that predicts says about prepared images (B, C, H, W): numbers of symbols (B, length)."""
        network = nets["average"].eval()
        return network.say(network.levels(images)[-1]).argmax(-1)


def discrimination(sentences: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(length, classes - 1): what the symbol at each place of a sentence tells of each structure, as `information`.

    sentences (N, length) of images with labels (N, H, W); a structure is there if a pixel of it is
    """
    there = [(labels == k).flatten(1).any(1).long() for k in range(1, classes)]
    return torch.tensor([[information(said, present) for present in there] for said in sentences.unbind(1)])


recipe = Recipe(
    paper="symbolic-seg",
    title="Symbolic segmentation: two agents talk about the image",
    claim="A U-Net whose decoder is told a sentence of discrete symbols about the image has a higher Dice on hearts "
    "than the U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "symbolic-seg": Arm(Symbolic()),
        "without symbols": Arm(Symbolic(speak=False)),
    },
    compare=("symbolic-seg", "unet"),
    ablation=("symbolic-seg", "without symbols"),
    replicate="fold",
    scales=scales(),
    source="the paper's abstract; we know of no official code",
    components=(
        Component(
            "Sender",
            "implemented",
            "an LSTM that begins with the deepest features of the U-Net on a grid of 4 x 4; one sentence for each "
            "slice, eight symbols of a vocabulary of sixteen (our choice)",
        ),
        Component(
            "symbols from a categorical distribution",
            "implemented",
            "Gumbel softmax at temperature 1, discrete forwards; the most probable symbol in prediction",
        ),
        Component(
            "Receiver",
            "implemented",
            "an LSTM; its last state becomes a map that joins the deepest features at the entrance of the decoder "
            "(our reading of how it takes part in the mask)",
        ),
        Component("cooperation of the agents", "implemented", "both learn from the loss of the mask alone"),
        Component(
            "interpretation",
            "implemented",
            "mutual information of the symbol at each place of the sentence and the presence of each structure in the "
            "slice; morphology and image characteristics are not looked at",
        ),
        Component(
            "existing architectures made symbolic", "simplified", "the book's U-Net alone, of several in the paper"
        ),
        Component("COVID-19 infections in chest CT", "absent", "hearts in MR; no such CT is at hand"),
    ),
)
