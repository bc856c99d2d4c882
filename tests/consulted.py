"""A small VILA-M3 that asks made-up experts, and a batch of patients."""

import torch
from made_up_xrays import xrays
from torch import Tensor, nn

from medcook.methods import Batch
from medcook.recipes.findings import _asked as asked
from medcook.recipes.findings._asked import UNKNOWN, Measure
from medcook.recipes.findings.vila_m3 import Consulting

TINY = Consulting(encoder="siglip", channels=(4, 8), language=Measure(sizes=(20.0, 30.0), larger=55.0))


def built(method: Consulting = TINY) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 2, 2)


def batch(count: int = 4) -> Batch:
    """Patients 0 and 2 are ill; the sex of the last is not known."""
    labels = (torch.arange(count) % 2 == 0).byte()[:, None, None].expand(-1, 48, 48)
    people = [(0, 0, 1), (0, 1, 0), (1, 1, 1), (1, UNKNOWN, 0)]
    return Batch(xrays(count), labels, groups=torch.tensor([asked.coded(*person) for person in people[:count]]))


class Certain(nn.Module):
    """An expert that says the same of every image."""

    def __init__(self, outcome: float, row: int):
        super().__init__()
        self.outcome, self.row, self.asked = outcome, row, 0

    def reader(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return torch.tensor([1 - self.outcome, self.outcome]).log().expand(len(images), -1)

    def lungs(self, images: Tensor) -> Tensor:
        logits = torch.full((len(images), 2, *images.shape[2:]), -3.0)
        logits[:, 1, self.row] = 3.0
        logits[:, 0, self.row] = -4.0
        return logits
