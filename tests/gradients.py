"""Whether a method trains all of its network."""

import torch

from medcook.methods import Batch, Method, Moment


def assert_every_parameter_is_trained(method: Method, size: tuple[int, int]) -> None:
    """A step of three images, in both precisions: loss and gradients are finite; what it predicts has the size."""
    torch.manual_seed(0)
    nets = method.build(1, 3, 2)
    data = Batch(torch.randn(3, 1, *size), torch.randint(0, 3, (3, *size)).byte())
    for enabled in (False, True):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = method.training_step(nets, data, None, Moment(0, 10))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
    assert method.predict(nets.eval(), data.images).shape == (3, 3, *size)
