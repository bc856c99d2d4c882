"""Two tiny batches, and a world without noise."""

import pytest
import torch

from medcook.data import IGNORE
from medcook.methods import Batch


@pytest.fixture
def labelled() -> Batch:
    rng = torch.Generator().manual_seed(1)
    return Batch(torch.randn(2, 1, 16, 16, generator=rng), torch.randint(0, 3, (2, 16, 16), generator=rng).byte())


@pytest.fixture
def unlabelled() -> Batch:
    rng = torch.Generator().manual_seed(2)
    return Batch(torch.randn(2, 1, 16, 16, generator=rng), torch.full((2, 16, 16), IGNORE, dtype=torch.uint8))


@pytest.fixture
def silence(monkeypatch) -> None:
    """`noisy` leaves images as they are."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
