"""What a prompt says about looks: how like the inside, and how like the outside, each place of the image is.

A SAM has to learn from a billion masks that an object mostly looks the same all over and other than its surroundings.
The small one is told, as classical methods are: from the drawn prompt come a foreground and a background, and every
place is compared with both, feature by feature. What to make of it is learned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOX, CLICK = 0.2, 1.0
"""Weight of what a box shows beside that of a click."""
REACH = 3
"""How many cells around a box count as its surroundings."""
RIM, WIDTH = 0.15, 0.12
"""How deep in the box its rim lies, and how far it reaches, where 0 is the edge of the ellipse in it, 1 its middle."""


def depths(boxes: Tensor, side: int) -> Tensor:
    """(M, 2, side, side): how deep each place lies in the ellipse that fills a box, and in the box itself.

    boxes (M, 4) left, top, right, bottom as shares of the image, NaN for none. 1 in the middle, 0 at the edge, at least
    -1 outside; 0 everywhere where there is no box.
    """
    place = (torch.arange(side, dtype=torch.float32, device=boxes.device) + 0.5) / side
    middle, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = ((place - middle[:, axis, None]) / half[:, axis, None].clamp_min(1e-3) for axis in (0, 1))
    x, y = x[:, None, :], y[:, :, None]
    found = torch.stack([1 - torch.hypot(*torch.broadcast_tensors(x, y)), 1 - torch.maximum(x.abs(), y.abs())], dim=1)
    return found.clamp_min(-1).nan_to_num()


def shown(dense: Tensor, depth: Tensor) -> list[Tensor]:
    """Weights (M, 1, S, S), each with sum 1, of what a prompt shows of the object, of its rim, and of what is around.

    dense   (M, 3, S, S) the drawn prompt
    depth   (M, 2, S, S) in its box, see `depths`

    The middle of the box, and clicks on the object; a band inside the box's ellipse; the cells around the box, and
    clicks beside the object. Where a prompt does not show one of them, its weights are even.
    """
    inside, clicks = (dense[:, 1:2] > 0).float(), dense[:, 2:3]
    around = F.max_pool2d(inside, 2 * REACH + 1, 1, REACH) - inside
    core = inside * torch.exp(-3 * (1 - depth[:, :1]) ** 2)
    rim = inside * torch.exp(-(((depth[:, :1] - RIM) / WIDTH) ** 2))
    weights = (BOX * core + CLICK * clicks.clamp_min(0) ** 2, rim, BOX * around + CLICK * (-clicks).clamp_min(0) ** 2)
    return [(each + 1e-5) / (each + 1e-5).sum((2, 3), keepdim=True) for each in weights]


def likeness(features: Tensor, dense: Tensor, depth: Tensor) -> Tensor:
    """(M, 3 C, S, S): for each of features (M, C, S, S) how far it is from the object's, its rim's, its surroundings'.

    The distance from the weighted mean in weighted standard deviations, squashed to 0 .. 1.
    """
    found = []
    for weights in shown(dense, depth):
        mean = (weights * features).sum((2, 3), keepdim=True)
        spread = (weights * (features - mean) ** 2).sum((2, 3), keepdim=True).sqrt()
        found.append(torch.tanh((features - mean).abs() / (3 * spread + 0.3)))
    return torch.cat(found, dim=1)


def certainty(logits: Tensor) -> Tensor:
    """(...): the overlap that masks of logits (..., S, S) have with the truth if each probability is right."""
    soft, hard = logits.sigmoid(), (logits > 0).float()
    return (soft * hard).sum((-2, -1)) / torch.maximum(soft, hard).sum((-2, -1)).clamp_min(1e-6)


class Mixer(nn.Module):
    """Features, drawn prompt and likeness, mixed by a few convolutions; adds nothing before it has learned."""

    def __init__(self, inputs: int, outputs: int, width: int = 32, depth: int = 2):
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 1)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.leave = nn.Conv2d(width, outputs, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, *parts: Tensor) -> Tensor:
        """Parts (M, *, S, S) to (M, outputs, S, S)."""
        x = self.enter(torch.cat(parts, dim=1))
        for one in self.blocks:
            x = x + one(x)
        return self.leave(x)


def block(width: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, normalised before."""
    layers = [(nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
    return nn.Sequential(*(layer for group in layers for layer in group))
