"""Sentences about the sizes of structures, and how a network of diffusion is told them."""

import torch
from torch import Tensor, nn

SIZES = ("small", "medium", "large")
THIRD = 0.4307
"""Standard deviations from the mean beyond which lies a third of a normal distribution."""
SENTENCES = tuple(f"a {size} organ with a {part} first part" for size in SIZES for part in SIZES)
EMPTY = len(SENTENCES)
"""The number of the sentence that says nothing."""
VOCABULARY = sorted({word for sentence in SENTENCES for word in sentence.split()})


class Facts(nn.Module):
    """Says which sentence is true of labels: is all that is labelled small, medium or large, and what share of it has
    the first structure? The bounds are thirds of the volumes it has seen, as if these were normal.

    seen  (3, 2): how many volumes, the sums of the two facts and the sums of their squares
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3, 2))

    @staticmethod
    def measured(labels: Tensor) -> Tensor:
        """(B, 2) float32 of labels (B, *size): the logarithm of all structures' voxels, and the first one's share."""
        whole = (labels > 0).flatten(1).sum(1) + 1.0
        return torch.stack([whole.log(), (labels == 1).flatten(1).sum(1) / whole], dim=1)

    def see(self, labels: Tensor) -> None:
        facts = self.measured(labels)
        self.seen += torch.stack([torch.ones_like(facts), facts, facts.square()]).sum(1)

    def levels(self, labels: Tensor) -> Tensor:
        """(B, 2) int64 of labels (B, *size): the places in `SIZES` of both facts."""
        mean, square = self.seen[1:] / self.seen[0].clamp_min(1)
        spread = (square - mean.square()).clamp_min(1e-8).sqrt()
        from_mean = (self.measured(labels) - mean) / spread
        return (from_mean > -THIRD).long() + (from_mean > THIRD)

    def number(self, labels: Tensor) -> Tensor:
        """(B,) int64, the places in `SENTENCES` of what is true of labels (B, *size)."""
        size, part = self.levels(labels).unbind(1)
        return len(SIZES) * size + part


class Text(nn.Module):
    """Numbers of sentences (B,) to tokens (B, words, width): a vector for each word and one for each place. What says
    nothing has a word of its own."""

    def __init__(self, width: int):
        super().__init__()
        known = {word: number for number, word in enumerate(VOCABULARY, start=1)}
        rows = [[known[word] for word in sentence.split()] for sentence in SENTENCES]
        self.register_buffer("words", torch.tensor([*rows, [0] * len(rows[0])]))
        self.embed = nn.Embedding(len(known) + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(len(rows[0]), width))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.embed(self.words[numbers]) + self.places
