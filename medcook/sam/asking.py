"""Prompts for the truth, many at once, as training asks them: clicks, boxes and scribbles at random, corrections.

All of it works on the device of the generator that it is given, without waiting for that device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.sam.model import DENSE, MOST_POINTS, PADDING, SIZE, Prompts

CAREFUL = 0.5
"""Share of clicks that are aimed at the middle of what they mean, rather than anywhere in it."""
FORGETFUL = 0.5
"""Share of corrections that do not show the answer that they correct, as where only clicks are kept."""


def first_prompts(masks: Tensor, rng: torch.Generator) -> tuple[Prompts, Tensor]:
    """Random prompts for masks (M, SIZE, SIZE), and (M,) bool: which are a single click and may mean several things."""
    count, here = len(masks), rng.device
    kind = torch.rand(count, generator=rng, device=here)
    single, boxed, scribbled = kind < 0.3, (kind >= 0.3) & (kind < 0.75), kind >= 0.85
    clicks = torch.where(single, 1, torch.randint(1, 4, (count,), generator=rng, device=here))
    clicks = torch.where(boxed & (kind < 0.65), 0, clicks)
    asked = torch.arange(MOST_POINTS, device=here) < clicks[:, None]
    points = F.pad(pick(masks, 3, rng), (0, 0, 0, MOST_POINTS - 3)) * asked[:, :, None]
    labels = torch.where(asked, 1, PADDING)
    boxes = torch.where(boxed[:, None], loose_boxes(masks, rng), torch.nan)
    dense = torch.zeros(count, 3, DENSE, DENSE, device=here)
    draw_box(dense, boxes)
    draw_points(dense, points, labels)
    dense[:, 2] = torch.maximum(dense[:, 2], scribbles(masks, rng) * scribbled[:, None, None])
    return Prompts(points, labels, boxes, dense), single


def pick(masks: Tensor, count: int, rng: torch.Generator, careful: float = CAREFUL) -> Tensor:
    """(M, count, 2) random points x, y inside masks (M, H, W), in input pixels.

    careful  share of the masks whose points are more likely deep in them, as a person clicks
    """
    width = masks.shape[-1]
    chances = masks.float()
    if careful > 0:
        reach = max(1, width // 20)
        deep = F.avg_pool2d(chances[:, None], (2 * reach + 1, 1), 1, (reach, 0))
        deep = F.avg_pool2d(deep, (1, 2 * reach + 1), 1, (0, reach))[:, 0] * chances
        deep = (deep / deep.amax((1, 2), keepdim=True).clamp_min(1e-6)) ** 4
        aimed = torch.rand(len(masks), 1, 1, generator=rng, device=rng.device) < careful
        chances = torch.where(aimed, deep, chances)
    chances = chances.flatten(1) + 1e-9  # the race of exponential clocks that `multinomial` runs, on any device
    where = (chances / torch.empty_like(chances).exponential_(generator=rng)).topk(count).indices
    xy = torch.stack([where % width, where // width], dim=2).float() + 0.5
    return xy * (SIZE / width)


def loose_boxes(masks: Tensor, rng: torch.Generator) -> Tensor:
    """(M, 4) left, top, right, bottom of masks, each side moved by up to a twentieth of the box, or two pixels."""
    rows, columns = masks.any(2), masks.any(1)
    left, top = columns.float().argmax(1), rows.float().argmax(1)
    right, bottom = SIZE - columns.flip(1).float().argmax(1), SIZE - rows.flip(1).float().argmax(1)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    slack = ((boxes[:, 2:] - boxes[:, :2]) / 20).clamp_min(2).repeat(1, 2)
    calm = torch.rand(len(masks), 1, generator=rng, device=rng.device) < 0.7  # mostly tight boxes
    moves = torch.rand(boxes.shape, generator=rng, device=rng.device) * 2 - 1
    return (boxes + moves * slack * (1 - 0.75 * calm.float())).clamp(0, SIZE)


def _centres(like: Tensor) -> Tensor:
    """(DENSE,) where the cells of a drawn prompt lie, in input pixels."""
    return (torch.arange(DENSE, device=like.device) + 0.5) * (SIZE / DENSE)


def draw_box(dense: Tensor, boxes: Tensor) -> None:
    """Draw boxes (M, 4) into channel 1 of the dense prompts; rows without a box (NaN) stay 0."""
    centres = _centres(dense)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside = ((centres > top) & (centres < bottom))[:, :, None] & ((centres > left) & (centres < right))[:, None]
    dense[:, 1] = torch.where(boxes.isnan().any(1)[:, None, None], 0.0, inside * 2.0 - 1)


def draw_points(dense: Tensor, points: Tensor, labels: Tensor) -> None:
    """Draw points as soft dots into channel 2 of the dense prompts: 1 for foreground, -1 for background."""
    centres = _centres(dense)
    near = lambda k: torch.exp(-(((points[..., k, None] - centres) / 5.0) ** 2))  # noqa: E731
    dots = near(1)[..., :, None] * near(0)[..., None, :]
    dense[:, 2] = (dots * (labels == 1)[..., None, None]).amax(1) - (dots * (labels == 0)[..., None, None]).amax(1)


def scribbles(masks: Tensor, rng: torch.Generator) -> Tensor:
    """(M, DENSE, DENSE) strokes: straight lines between four points of each mask, where they run inside it."""
    ends = pick(masks, 4, rng, careful=0.0)
    along = torch.linspace(0, 1, 40, device=masks.device)[:, None]
    path = torch.cat([ends[:, None, k] * (1 - along) + ends[:, None, k + 1] * along for k in range(3)], dim=1)
    x, y = path.long().clamp(0, SIZE - 1).unbind(2)
    inside = masks.flatten(1).gather(1, y * SIZE + x).float()
    cells = (y * DENSE // SIZE) * DENSE + x * DENSE // SIZE
    strokes = torch.zeros(len(masks), DENSE * DENSE, device=masks.device)
    return strokes.scatter_reduce(1, cells, inside, "amax").view(-1, DENSE, DENSE)


def corrected(prompts: Prompts, logits: Tensor, truth: Tensor, round_: int, rng: torch.Generator) -> Prompts:
    """The prompts with a click on a wrong pixel of logits (M, DENSE, DENSE), and mostly with the answer itself."""
    wrong = (logits > 0) != (truth > 0.5)
    point = pick(wrong, 1, rng)[:, 0]
    x, y = (point * (DENSE / SIZE)).long().clamp(0, DENSE - 1).unbind(1)
    label = (truth[torch.arange(len(truth), device=truth.device), y, x] > 0.5).long()
    points, labels = prompts.points.clone(), prompts.labels.clone()
    points[:, 2 + round_] = point
    labels[:, 2 + round_] = torch.where(wrong.flatten(1).any(1), label, PADDING)
    dense, strokes = prompts.dense.clone(), prompts.dense[:, 2]
    draw_points(dense, points, labels)
    dense[:, 2] = torch.where(strokes.abs() > dense[:, 2].abs(), strokes, dense[:, 2])
    shown = torch.rand(len(truth), 1, 1, generator=rng, device=rng.device) >= FORGETFUL
    dense[:, 0] = (logits / 8).clamp(-1, 1) * shown
    return Prompts(points, labels, prompts.boxes, dense)
