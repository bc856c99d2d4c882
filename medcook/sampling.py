"""What scores ask of a trained run: its networks, several predictions of a case, what is found only once."""

from collections.abc import Callable
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn

from medcook.data.case import Case
from medcook.precision import autocast
from medcook.training import Fitted

T = TypeVar("T")


def trained(fitted: Fitted) -> nn.ModuleDict:
    """The networks with the weights of the last step, ready to predict."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    return fitted.nets.eval()


@torch.no_grad()
def case_samples(fitted: Fitted, case: Case, count: int, seed: int = 0) -> Tensor:
    """(count, classes, *spatial) float32 probabilities of the last checkpoint, each from one sample of the method.

    A method without `samples` gives its one prediction, (1, classes, *spatial). What is random depends on the case
    and the seed alone.
    """
    if not hasattr(fitted.method, "samples"):
        return fitted.probabilities(case)[None]
    nets, preparation = trained(fitted), fitted.task.preparation
    with (
        torch.random.fork_rng(),
        autocast(fitted.cost),
    ):
        torch.manual_seed(crc32(f"{case.case_id} {seed}".encode()))
        parts = [fitted.method.samples(nets, part, count) for part in preparation.images(case).split(16)]
    return torch.stack([preparation.restore(sample.float(), case) for sample in torch.cat(parts, dim=1)])


def once(fitted: Fitted, name: str, make: Callable[[], T]) -> T:
    """What `make` gives, kept with a trained run: for what its score needs in every case and should find only once."""
    kept = vars(fitted).setdefault("_kept", {})
    if name not in kept:
        kept[name] = make()
    return kept[name]
