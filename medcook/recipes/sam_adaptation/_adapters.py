"""What several recipes of the chapter share: LoRA through peft, bottleneck adapters, and budgets."""

import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, Task

LINEAR = ("qkv", "proj", "lin1", "lin2")
"""Names of the linear layers of the small SAM's image encoder."""
DECODER_LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "lin1", "lin2")
"""Names of the linear layers of its mask decoder's transformer."""

FULL = Budget(steps=120, batch=4, checks=0)
QUICK = Budget(steps=15, batch=2, checks=0)


def lora(part: nn.Module, rank: int, layers: tuple[str, ...] = LINEAR) -> None:
    """Low-rank updates (Hu et al., ICLR 2022) of the named linear layers of `part`; all else in it is frozen.

    Scaled by 2: peft's `lora_alpha` is twice the rank.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers)), part)


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))) over the last axis (Houlsby et al., ICML 2019); `up` is zero at first: the identity."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def scales(*arms: str, labelled: int | None = 3, budget: Budget = FULL) -> dict[str, Scale]:
    """ACDC with few labelled patients, and the embedded cohort."""
    return {
        "quick": Scale(Task("embedded", labelled=2), QUICK, replicates=1, arms=arms or None),
        "full": Scale(Task("acdc", labelled=labelled, evaluation="test"), budget, arms=arms or None),
    }
