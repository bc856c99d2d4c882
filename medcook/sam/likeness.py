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
    """A small U-Net (Ronneberger et al. 2015) over features, drawn prompt and likeness; adds nothing before it learned.

    seen, quarter, eighth, coarse  channels of its inputs, at sides S, S, S / 2 and S / 4
    """

    def __init__(self, seen: int, quarter: int, eighth: int, coarse: int, widths: tuple[int, ...] = (64, 96, 128)):
        super().__init__()
        first, second, third = widths
        self.enter = nn.ModuleList(
            nn.Conv2d(inputs, width, 1)
            for inputs, width in ((seen + quarter, first), (first + eighth, second), (second + coarse, third))
        )
        self.down = nn.ModuleList([Residual(first), Residual(second), nn.Sequential(Residual(third), Residual(third))])
        self.rise = nn.ModuleList([nn.Conv2d(second, first, 1), nn.Conv2d(third, second, 1)])
        self.up = nn.ModuleList([Residual(first), Residual(second)])
        self.leave = nn.ModuleList([nn.Conv2d(first, quarter, 1), nn.Conv2d(second, eighth, 1)])
        for layer in self.leave:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Tensor, quarter: Tensor, eighth: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to quarter (M, *, S, S) and to eighth (M, *, S / 2, S / 2), in the precision of the weights."""
        precision = self.leave[0].weight.dtype
        seen, quarter, eighth, coarse = (each.to(precision) for each in (seen, quarter, eighth, coarse))
        fine = self.down[0](self.enter[0](torch.cat([seen, quarter], dim=1)))
        middle = self.down[1](self.enter[1](torch.cat([F.avg_pool2d(fine, 2), eighth], dim=1)))
        deep = self.down[2](self.enter[2](torch.cat([F.avg_pool2d(middle, 2), coarse], dim=1)))
        middle = self.up[1](middle + self.rise[1](_twice(deep)))
        fine = self.up[0](fine + self.rise[0](_twice(middle)))
        return self.leave[0](fine), self.leave[1](middle)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Residual(nn.Module):
    """Two 3 x 3 convolutions, normalised before, beside what they are given."""

    def __init__(self, width: int):
        super().__init__()
        layers = [(nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        self.layers = nn.Sequential(*(layer for group in layers for layer in group))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
