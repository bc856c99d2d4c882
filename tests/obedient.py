"""A guided network that does as it is told, for tests."""

import numpy as np
import torch
from torch import nn

from medcook.interactive import MEANT


class Obedient(nn.Module):
    """Notes in `seen` what guides it, and answers with what lies within `reach` pixels of a mark of what is meant.

    Marks must be soft dots of sigma 4.
    """

    classes = 4

    def __init__(self, seen: list, reach: int):
        super().__init__()
        self.seen, self.reach = seen, reach

    def forward(self, images, guidance):
        self.seen.append(guidance)
        inside = guidance[:, MEANT] > np.exp(-(self.reach**2) / 32)
        return torch.stack([torch.zeros_like(images[:, 0]), inside * 2.0 - 1], 1)
