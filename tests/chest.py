"""A label map that has two lungs, for tests."""

import torch


def chest(size: int = 32) -> torch.Tensor:
    """(1, size, size) labels: two boxes for lungs."""
    label = torch.zeros(1, size, size, dtype=torch.uint8)
    label[:, size // 4 : size // 2 + 8, 4:12] = 1
    label[:, size // 4 : size // 2 + 4, 18:27] = 1
    return label
