"""What recipes share that take prompts of several kinds: clicks, boxes and more, and targets that nobody drew.

Marks may have further channels after the two of `medcook.interactive`. Channel `BOX` is True inside a box.
"""

from dataclasses import dataclass
from itertools import chain, combinations

import torch
from skimage.segmentation import felzenszwalb
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.interactive import Click, Guided, chosen_structure
from medcook.methods import Batch, Moment

BOX = 2
"""Channel of marks that holds a box."""


def complete(marks: Tensor, channels: int) -> Tensor:
    """Marks (B, C, *size) with `channels` channels; what was not said is False."""
    missing = torch.zeros_like(marks[:, :1]).expand(-1, channels - marks.shape[1], *marks.shape[2:])
    return torch.cat([marks, missing], dim=1)


def boxes(masks: Tensor, least: int = 0, most: int = 0) -> Tensor:
    """(B, *size) bool: True inside a box around each mask (B, *size); nowhere where the mask is empty.

    Every side is moved outwards by `least` to `most` pixels, at random, but not out of the image; less than 0: inwards.
    """
    found = torch.zeros_like(masks)
    for box, mask in zip(found, masks, strict=True):
        if mask.any():
            places = mask.nonzero()
            low, high = places.amin(0), places.amax(0)
            moves = torch.randint(least, most + 1, (2, mask.ndim)).to(masks.device).maximum(-((high - low) // 2))
            low, high = (low - moves[0]).clamp_min(0), high + moves[1]
            box[tuple(slice(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True))] = True
    return found


def some_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """A random combination of the kinds, at least one of them; all combinations equally often."""
    every = list(chain.from_iterable(combinations(kinds, count) for count in range(1, len(kinds) + 1)))
    return every[int(torch.randint(len(every), ()))]


def pieces(image: Tensor, scale: float, least: int = 32) -> Tensor:
    """(H, W) int64: the piece that each pixel of an image (H, W) is in, cut by Felzenszwalb and Huttenlocher (2004).

    scale  larger makes larger pieces, of an image scaled to 0 .. 1; none has fewer than `least` pixels
    """
    low, high = image.aminmax()
    unit = ((image - low) / (high - low).clamp_min(1e-5)).detach().double().cpu().numpy()
    return torch.from_numpy(felzenszwalb(unit, scale=scale, sigma=0.5, min_size=least))


def first_then(opening: Tensor, click: Click) -> Click:
    """A simulated person for `medcook.interactive.session`: says `opening` (B, C, *size), and later only clicks."""

    def says(marks: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
        if not marks.any():
            return opening
        return torch.cat([click(marks[:, :BOX], answer, truth), marks[:, BOX:]], dim=1)

    return says


@dataclass
class Prompted(Guided):
    """Guided by prompts of several kinds, and trained also on pieces of the image, which have no name.

    invented  the share of images whose target is a piece of the image, and no structure
    """

    invented: float = 0.5

    axes = 2

    def piece(self, image: Tensor) -> Tensor:
        """(H, W) bool: the piece of an image (H, W) that stands in for a structure."""
        raise NotImplementedError

    def opening(self, truth: Tensor, known: Tensor, values: list[int]) -> Tensor:
        """The first marks (B, C, H, W) on masks (B, H, W) with these label values; 0: it has no name.

        known  (B, H, W): pixels of which the truth is known; nothing is said of the others
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """A target (B, H, W), 1, 0 or `IGNORE`, for every image, and the label value of each; 0 if it was invented."""
        target, values = chosen_structure(batch.labels), []
        for number, (label, image) in enumerate(zip(batch.labels, batch.images, strict=True)):
            shown = label[target[number] == 1]
            values.append(int(shown[0]) if len(shown) else 0)
            if torch.rand(()).item() < self.invented:
                target[number], values[-1] = self.piece(image[0]).to(target.device), 0
        return target, values

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean loss of the answers of all rounds."""
        target, values = self.targets(labelled)
        truth, known = target == 1, target != IGNORE
        marks, answer, losses = self.opening(truth, known, values), None, []
        state = self.start(nets["model"], labelled.images)
        for turn in range(self.rounds):
            if turn:
                marks = self.correct(marks, answer.argmax(1) == 1, truth, known)
            answer = self.respond(nets["model"], state, marks, answer)
            losses.append(self.answer_loss(answer, target))
            answer = answer.detach()
        return sum(losses) / len(losses)
