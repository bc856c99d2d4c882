"""The selective state-space scan of Mamba (Gu and Dao, COLM 2024) in plain PyTorch, for several recipes.

A state h of every channel fades and is written to, token by token, and is read out at each:
    h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t,    y_t = C_t h_t + D x_t.
Step by step that is one small operation for every token. Here the tokens are cut into chunks: all chunks take their
steps at once, from an empty state; then what each chunk inherits is added, chunk by chunk. Nothing is approximated,
and no exponent is positive.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32
"""Tokens of a chunk: about the square root of the number of tokens makes the fewest steps."""


def recurrence(decay: Tensor, added: Tensor, back: bool = False) -> Tensor:
    """h_t = decay_t h_(t-1) + added_t along the second axis of (B, L, ...), from h = 0; records no gradient.

    back  from the last token to the first: h_t = decay_t h_(t+1) + added_t
    """
    length, chunk = added.shape[1], min(CHUNK, added.shape[1])
    spare = (0, 0) * (added.ndim - 2) + (0, -length % chunk)
    states, passed = (F.pad(part, spare).unflatten(1, (-1, chunk)) for part in (added, decay))
    way = slice(None, None, -1 if back else 1)
    for before, t in pairwise(range(chunk)[way]):
        states[:, :, t].addcmul_(passed[:, :, t], states[:, :, before])
        passed[:, :, t].mul_(passed[:, :, before])
    last = 0 if back else chunk - 1
    for before, c in pairwise(range(states.shape[1])[way]):
        states[:, c].addcmul_(passed[:, c], states[:, before, last, None])
    return states.flatten(1, 2)[:, :length]


class Recurrence(torch.autograd.Function):
    """`recurrence` with its gradient, which is the same recurrence back from the last token."""

    @staticmethod
    def forward(ctx, decay: Tensor, added: Tensor) -> Tensor:
        states = recurrence(decay, added)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        for_added = recurrence(later, gradient, back=True)
        for_decay = torch.zeros_like(decay)
        torch.mul(for_added[:, 1:], states[:, :-1], out=for_decay[:, 1:])
        return for_decay, for_added


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y (batch, L, E) of tokens x (batch, L, E), in float32 whatever the precision around it.

    delta (batch, L, E) > 0 the step of each channel at each token; A (E, N) < 0 how fast each of its N states fades
    B, C  (batch, L, N) what a token writes to the states and reads from them; D (E,) what goes past them
    """
    with torch.autocast(x.device.type, enabled=False):
        x, delta, B, C = x.float(), delta.float(), B.float(), C.float()
        decay = torch.exp(delta[..., None] * A)
        added = (delta * x)[..., None] * B[:, :, None]
        states = Recurrence.apply(decay, added)
        return (states @ C[..., None])[..., 0] + D * x


class SelectiveStateSpace(nn.Module):
    """Tokens (B, L, width) to the same: a scan whose step, input and output each token chooses (S6).

    states  of each channel. They start with A = -1, -2, ..., -states and with steps between 0.001 and 0.1, as in Mamba
    """

    def __init__(self, width: int, states: int = 8):
        super().__init__()
        self.sizes = (max(1, width // 16), states, states)
        self.choose = nn.Linear(width, sum(self.sizes), bias=False)
        self.step = nn.Linear(self.sizes[0], width)
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.past = nn.Parameter(torch.ones(width))
        steps = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.step.bias.copy_(steps.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        low, written, read = self.choose(x).split(self.sizes, dim=-1)
        delta = F.softplus(self.step(low).float())
        return selective_scan(x, delta, -self.log_rate.exp(), written, read, self.past).to(x.dtype)
