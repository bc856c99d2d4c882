"""What tests of pretexts share: volumes without labels, and that a method goes through both of its phases."""

import torch
from torch import nn

from medcook.data import IGNORE
from medcook.methods import Batch, Method, Moment


def unlabelled(size: tuple[int, ...], count: int = 3) -> Batch:
    """Noise (count, 1, *size) without labels, always the same."""
    images = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.full((count, *size), IGNORE, dtype=torch.uint8))


def built(method: Method) -> nn.ModuleDict:
    """A method's networks for volumes and three classes, always the same, in training mode."""
    torch.manual_seed(0)
    return method.build(1, 3, 3).train()


def assert_both_phases_work(method: Method, given: Batch) -> None:
    """In bfloat16 both phases have a finite loss, as float32; labels train all of the network, which then predicts."""
    nets, shape = built(method), given.labels.shape
    labelled = given._replace(labels=torch.randint(0, 3, shape).byte())
    for now in (Moment(0, 10), Moment(9, 10)):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.training_step(nets, labelled, given, now)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(weight.grad is not None for weight in nets["model"].parameters())
    assert method.predict(nets.eval(), given.images).shape == (shape[0], 3, *shape[1:])
