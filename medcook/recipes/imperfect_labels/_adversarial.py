"""An adversarial game with one optimiser: the loss of each side leaves the other side's weights alone."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call


def frozen(module: nn.Module, *inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """module(*inputs) with its weights held constant: gradients flow to the inputs alone."""
    constants = {name: weight.detach() for name, weight in module.named_parameters()}
    return functional_call(module, constants, inputs)


def told_apart(real: Tensor, fake: Tensor) -> Tensor:
    """Least-squares loss of a judge (Mao et al., ICCV 2017) that is to say 1 of what is real and -1 of what is not."""
    return ((real.float() - 1).square().mean() + (fake.float() + 1).square().mean()) / 2


def taken_for_real(fake: Tensor) -> Tensor:
    """Least-squares loss of whoever made the fakes: the judge is to say 1 of them."""
    return (fake.float() - 1).square().mean() / 2
