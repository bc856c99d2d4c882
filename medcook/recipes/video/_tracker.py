"""A small tracker in the manner of SAM 2 (Ravi et al., 2024): an object is shown once, and followed by a memory.

Every frame is encoded once. The deepest features attend to a bank of earlier frames and of the masks that were found in
them; then they hear words, or see a drawn prompt; the way up makes the mask; and a judge says whether the object is
there at all, and how much the mask will overlap with the truth. The bank has places for the frame in which the object
was shown, for the most recent frames, and for some from longer ago.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.language import Modulation, mask_loss
from medcook.recipes.language._semantics import mlp
from medcook.recipes.language._slice_memory import PATCH, Memory, MemoryAttention, small
from medcook.recipes.volumes._slices import FLAT, SliceUNet

RECENT, LONG = 3, 3
"""Places of a bank for the most recent frames, and for those from longer ago; one more is the first frame's."""
SLOTS = 1 + RECENT + LONG
NOW = 4
"""Frames of a flight that are answered in a step of training; each has the ones before it in its bank."""
PRESENCE, OVERLAP = 0.5, 0.5
"""Weights in the loss of what the judge says."""


class Answer(NamedTuple):
    """Logits (N, H, W) of masks, logits (N,) that the object is there, and the overlap (N,) that is expected."""

    logits: Tensor
    presence: Tensor
    expected: Tensor

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool: nothing where the object is not believed to be there."""
        return (self.logits > 0) & (self.presence > 0)[:, None, None]

    @property
    def seen(self) -> Tensor:
        """(N,): the probability that the object is there."""
        return self.presence.sigmoid()


class Tracker(nn.Module):
    """Frames (N, C, 1, H, W) to maps, once; maps and whatever is known of an object to an `Answer`.

    memory  False: an image model, which hears of no other frame;   words  the width of vectors that are heard, if any
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], memory: bool = True, words: int = 0):
        super().__init__()
        deep = channels[-1]
        self.net = SliceUNet(inputs=inputs, classes=1, channels=channels)
        self.memory = MemoryAttention(deep, deep) if memory else None
        if memory:
            self.memory.ranks = nn.Parameter(0.02 * torch.randn(SLOTS, 1, deep))
        self.drawn = nn.Linear(3 * PATCH**2, deep)
        self.fine = nn.Conv3d(3, channels[0], FLAT, padding=(0, 1, 1))
        self.hear = Modulation(deep, words) if words else None
        self.judge = mlp(2 * deep + 3, deep, 2)

    def encode(self, frames: Tensor) -> list[Tensor]:
        """Maps (N, c, 1, h, w) of every level, the finest first."""
        return self.net.descend(frames)

    def looks(self, maps: list[Tensor]) -> Tensor:
        """How frames look, for a bank: (N, C, h, w), without a gradient."""
        return maps[-1][:, :, 0].detach().float()

    def answer(
        self,
        maps: list[Tensor],
        bank: Memory | None = None,
        prompts: Tensor | None = None,
        words: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Answer:
        """What is found in frames.

        bank  of each frame; an empty one is as good as none;   prompts (N, 3, H, W) drawn as in `medcook.sam`
        words (N, width) that are heard
        added (N, C, h, w), maps that join the deepest ones
        """
        deep = maps[-1][:, :, 0]
        if self.memory is not None and bank is not None:
            deep = torch.where(bank.there.any(1)[:, None, None, None], self.memory(deep, bank), deep)
        if added is not None:
            deep = deep + added
        if prompts is not None:
            deep = deep + self.patches(prompts, deep)
        if words is not None:
            deep = self.hear(deep, words)
        x = self.net.ascend([*maps[:-1], deep[:, :, None]])[0]
        if prompts is not None:
            x = x + self.fine(prompts[:, :, None])
        logits = self.net.head(x)[:, 0, 0].float()
        presence, expected = self.judge(self.evidence(deep.float(), logits.detach())).float().unbind(1)
        return Answer(logits, presence, expected.sigmoid())

    def patches(self, prompts: Tensor, deep: Tensor) -> Tensor:
        """Drawn prompts (N, 3, H, W) as (N, C, h, w)."""
        sized = F.adaptive_avg_pool2d(prompts, [PATCH * side for side in deep.shape[-2:]])
        return self.drawn(F.pixel_unshuffle(sized, PATCH).movedim(1, 3)).movedim(3, 1)

    @staticmethod
    def evidence(deep: Tensor, logits: Tensor) -> Tensor:
        """What the judge sees (N, 2 C + 3): means and maxima of features, the mask's area, how sure its pixels are, and
        the overlap with the truth that these themselves expect."""
        flat, soft, mask = deep.flatten(2), logits.sigmoid(), logits > 0
        area, sure = soft.mean((1, 2)), logits.abs().clamp_max(5).mean((1, 2)) / 5
        both = (soft * mask).sum((1, 2))
        hoped = both / (soft.sum((1, 2)) + mask.sum((1, 2)) - both).clamp_min(1e-6)
        return torch.cat([flat.mean(2), flat.amax(2), torch.stack([area, sure, hoped], 1)], 1)


def at(maps: list[Tensor], rows: Tensor) -> list[Tensor]:
    """The maps of some frames."""
    return [each[rows] for each in maps]


def overlaps(masks: Tensor, truth: Tensor) -> Tensor:
    """(N,): intersection over union of masks (N, H, W) bool; 1 of two empty ones."""
    both, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def answer_loss(found: Answer, truth: Tensor) -> Tensor:
    """Of masks, presence and expected overlap; truth (N, H, W) uint8: 1, 0 or `IGNORE`."""
    there = (truth == 1).flatten(1).any(1)
    reached = overlaps((found.logits > 0) & (truth != IGNORE), truth == 1)
    loss = mask_loss(found.logits, truth, each=True)
    loss = loss + PRESENCE * F.binary_cross_entropy_with_logits(found.presence, there.float())
    return loss + OVERLAP * F.binary_cross_entropy(found.expected, reached)


class Clip(NamedTuple):
    """Numbers of the frames (B, ...) that a step looks at: one in which the object is shown, some from any time, and a
    run of RECENT + NOW neighbours, of which the last NOW are answered."""

    first: Tensor
    long: Tensor
    run: Tensor

    def every(self) -> Tensor:
        """(B, 1 + LONG + RECENT + NOW)."""
        return torch.cat([self.first[:, None], self.long, self.run], 1)


def drawn_clip(there: Tensor) -> Clip:
    """Frames for objects that are there (B, T) bool in some frames, by torch's own generator."""
    count, frames = there.shape
    chance = torch.rand(count, frames) + there.float() * there.any(1, keepdim=True)
    start = torch.randint(max(1, frames - RECENT - NOW + 1), (count, 1))
    run = (start + torch.arange(RECENT + NOW)).clamp_max(frames - 1)
    return Clip(chance.argmax(1), torch.randint(frames, (count, LONG)), run)


def bank_of(looks: Tensor, masks: Tensor, keep: tuple[float, float, float] = (0.95, 0.8, 0.5)) -> Memory:
    """The banks of the NOW answered frames of clips (B, F, ...): (B NOW, SLOTS, ...), the answered ones in a row.

    looks (B, F, C, h, w) and masks (B, F, H, W) of `Clip.every`'s frames
    keep  the chance that the first frame, the recent ones (from some on into the past), and each long one are there
    """
    count, first = len(looks), 1 + LONG
    rows = [[0, *(first + RECENT + now - 1 - back for back in range(RECENT)), *range(1, first)] for now in range(NOW)]
    order = torch.tensor(rows)
    there = torch.rand(count, NOW, SLOTS)
    recent = there[..., 1 : 1 + RECENT]
    there = torch.cat(
        [there[..., :1] < keep[0], (recent < keep[1]).cumprod(-1).bool(), there[..., 1 + RECENT :] < keep[2]], -1
    )
    kept = small(masks, looks)[:, order]
    return Memory(*(part.flatten(0, 1) for part in (looks[:, order], kept, there)))


def region_and_contour(found: Tensor, truth: Tensor, reach: int = 1) -> tuple[Tensor, Tensor]:
    """J and F (N,) of masks (N, H, W) bool, as in DAVIS (Perazzi et al., CVPR 2016): Jaccard index, and F measure of
    contours that may lie `reach` pixels apart; 1 where nothing is there and nothing was found."""
    mine, theirs = outline(found), outline(truth)
    near = lambda lines: F.max_pool2d(lines[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0  # noqa: E731
    share = lambda some, others: (some & near(others)).sum((1, 2)) / some.sum((1, 2)).clamp_min(1)  # noqa: E731
    precision, recall = share(mine, theirs), share(theirs, mine)
    contour = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    nothing = ~(found | truth).flatten(1).any(1)
    return overlaps(found, truth), torch.where(nothing, 1.0, contour)


def outline(masks: Tensor) -> Tensor:
    """The pixels of masks (N, H, W) bool that touch what is outside, or the border."""
    outside = F.pad((~masks)[:, None].float(), (1, 1, 1, 1), value=1.0)
    return masks & (F.max_pool2d(outside, 3, 1)[:, 0] > 0)
