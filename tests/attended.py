"""PyTorch's attention with the weights of `Attend`, and a memory of slices."""

import torch
from torch import nn

from medcook.recipes.language._semantics import Attend
from medcook.recipes.language._slice_memory import ENTRIES, PATCH, Memory


def remembered(count: int = 2, there: tuple[bool, ...] = (True, True, False, False)) -> Memory:
    rng = torch.Generator().manual_seed(3)
    looks = torch.randn(count, ENTRIES, 6, 3, 3, generator=rng)
    masks = torch.rand(count, ENTRIES, 3 * PATCH, 3 * PATCH, generator=rng)
    return Memory(looks, masks, torch.tensor([there] * count))


def twin(part: Attend) -> nn.MultiheadAttention:
    """PyTorch's attention with the same weights."""
    found = nn.MultiheadAttention(part.ask.in_features, part.heads, batch_first=True)
    found.in_proj_weight.data = torch.cat([part.ask.weight, part.offer.weight])
    found.in_proj_bias.data = torch.cat([part.ask.bias, part.offer.bias])
    found.out_proj.load_state_dict(part.out.state_dict())
    return found


def attended(part: Attend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = part.theirs(y)
    return twin(part)(part.mine(x)[None], y[None], y[None])[0][0]
