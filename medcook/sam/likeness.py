"""What a prompt says about looks: how like the inside, and how like the outside, each place of the image is.

A SAM has to learn from a billion masks that an object mostly looks the same all over and other than its surroundings.
The small one is told, as classical methods are: from the drawn prompt come a foreground and a background, and every
place is compared with both, feature by feature. What to make of it is learned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CORE, CLICK = 0.2, 1.0
"""Weight of the middle of a box beside that of a click."""
REACH = 3
"""How many cells around a box count as its surroundings."""


def foreground(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, 1, S, S) of what a drawn prompt (M, 3, S, S) shows as object and as surroundings; each sums to 1.

    The middle of the box (a Gaussian with the spread of the box) and clicks on the object; the cells around the box and
    clicks beside the object. Where a prompt shows neither, the weights are even.
    """
    inside, clicks = (dense[:, 1:2] > 0).float(), dense[:, 2:3]
    around = F.max_pool2d(inside, 2 * REACH + 1, 1, REACH) - inside
    side = dense.shape[-1]
    place = torch.arange(side, dtype=torch.float32, device=dense.device)
    core = inside
    for shape in ((1, 1, side, 1), (1, 1, 1, side)):
        at, mass = place.view(shape), inside.sum((2, 3), keepdim=True).clamp_min(1)
        middle = (inside * at).sum((2, 3), keepdim=True) / mass
        spread = ((inside * (at - middle) ** 2).sum((2, 3), keepdim=True) / mass).clamp_min(0.25)
        core = core * torch.exp(-((at - middle) ** 2) / spread)
    shown = (CORE * core + CLICK * clicks.clamp_min(0) ** 2, CORE * around + CLICK * (-clicks).clamp_min(0) ** 2)
    return tuple((weights + 1e-5) / (weights + 1e-5).sum((2, 3), keepdim=True) for weights in shown)


def likeness(features: Tensor, dense: Tensor) -> Tensor:
    """(M, 2 C, S, S): for each of features (M, C, S, S) how far it is from the object's, then from the surroundings'.

    The distance from the weighted mean in weighted standard deviations, squashed to 0 .. 1.
    """
    found = []
    for weights in foreground(dense):
        mean = (weights * features).sum((2, 3), keepdim=True)
        spread = (weights * (features - mean) ** 2).sum((2, 3), keepdim=True).sqrt()
        found.append(torch.tanh((features - mean).abs() / (3 * spread + 0.3)))
    return torch.cat(found, dim=1)


class Mixer(nn.Module):
    """Features, drawn prompt and likeness, mixed by a few convolutions; adds nothing before it has learned."""

    def __init__(self, inputs: int, outputs: int, width: int = 32, depth: int = 2):
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
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
