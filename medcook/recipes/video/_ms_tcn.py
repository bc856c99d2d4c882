"""MS-TCN (Abu Farha and Gall, CVPR 2019), a network over time: each stage corrects the answer of the one before."""

import torch.nn.functional as F
from torch import Tensor, nn

SMOOTH, SUDDEN = 0.15, 4.0
"""Weight of the smoothing loss, and the difference of log probabilities from which on it grows no more."""


class ResidualLayer(nn.Module):
    """MS-TCN's layer: one dilated convolution of kernel 3, one of kernel 1, and what came in is added."""

    def __init__(self, width: int, dilation: int, dropout: float):
        super().__init__()
        self.dilated = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.mix, self.dropout = nn.Conv1d(width, width, 1), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mix(F.relu(self.dilated(x))))


class MultiStageTCN(nn.Module):
    """Features (B, inputs, T) of frames to the logits (B, classes, T) of every stage, which sees probabilities of the
    one before, and nothing else."""

    def __init__(self, inputs: int, classes: int, width: int, *, steps: int, layers: int, dropout: float):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(classes if step else inputs, width, 1),
                *(ResidualLayer(width, 2**k, dropout) for k in range(layers)),
                nn.Conv1d(width, classes, 1),
            )
            for step in range(steps)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [self.stages[0](x)]
        for stage in self.stages[1:]:
            found.append(stage(found[-1].softmax(1)))
        return found


def unsteady(logits: Tensor) -> Tensor:
    """MS-TCN's smoothing loss of logits (B, classes, T): squared steps of log probabilities from frame to frame."""
    logs = logits.log_softmax(1)
    return (logs[..., 1:] - logs[..., :-1].detach()).square().clamp_max(SUDDEN**2).mean()
