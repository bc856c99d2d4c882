"""An adversarial game with one optimiser: the loss of each side leaves the other side's weights alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm


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


def played(judge: nn.Module, true: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """The judge's loss, which moves the judge alone, and that of whoever made the fakes, which moves them alone."""
    return told_apart(judge(true), judge(made.detach())), taken_for_real(frozen(judge, made))


class PatchJudge(nn.Module):
    """(B, inputs, H, W) to judgements of patches (B, 1, H / 8, W / 8): 1 for true ones; `body` has the features."""

    def __init__(self, inputs: int, width: int = 8):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        layers = []
        for before, after in zip((inputs, *widths), widths, strict=False):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.width = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def structures(labels: Tensor, classes: int) -> Tensor:
    """Label maps (B, H, W), complete ones, as (B, classes - 1, H, W) zeros and ones, without the background."""
    return torch.stack([(labels == value).float() for value in range(1, classes)], dim=1)
