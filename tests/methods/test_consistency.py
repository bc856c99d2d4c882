"""FixMatch: what is said surely of the weak view, and nothing else, teaches the strong view."""

import math

import pytest
import torch
from torch import nn

from medcook.methods import Batch, FixMatch, Moment
from medcook.methods.semi_supervised import strong

END = Moment(100, 100)


class Says(nn.Module):
    """A network that gives the same answer to everything: probabilities (classes, pixels) of one image."""

    def __init__(self, *pixels: tuple[float, ...]):
        super().__init__()
        self.logits = nn.Parameter(logits_of(*pixels))

    def forward(self, images):
        return self.logits.expand(len(images), -1, -1, -1)


def logits_of(*pixels: tuple[float, ...]) -> torch.Tensor:
    """(1, classes, 1, pixels) logits with these probabilities."""
    return torch.tensor(pixels).log().T[None, :, None]


def loss_of(weak: Says, said: torch.Tensor, threshold: float) -> torch.Tensor:
    """The loss of the strong view's logits `said`, when the model answers `weak` to the weak view."""
    image = Batch(torch.zeros(1, 1, *said.shape[2:]), torch.zeros(0))
    return FixMatch(threshold=threshold).unsupervised(nn.ModuleDict({"model": weak}), said, image, END)


def test_closed_form():
    """Three pixels; two of the weak view's labels (1 and 0) are confident, and the mean is over all three."""
    weak = Says((0.03, 0.97), (0.6, 0.4), (0.96, 0.04))
    said = logits_of((0.5, 0.5), (0.9, 0.1), (0.2, 0.8))
    assert loss_of(weak, said, 0.95).item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "taught"), [(0.9, [1, 0, 1]), (0.65, [1, 0, 1]), (0.5, [1, 1, 1]), (0.98, [0] * 3)]
)
def test_the_threshold_excludes(threshold, taught):
    weak = Says((0.03, 0.97), (0.6, 0.4), (0.96, 0.04))
    said = logits_of((0.5, 0.5), (0.9, 0.1), (0.2, 0.8)).requires_grad_()
    loss_of(weak, said, threshold).backward()
    assert (said.grad.abs().sum((0, 1, 2)) > 0).int().tolist() == taught


def test_a_confidence_of_1_reaches_every_threshold():
    said = logits_of((0.5, 0.5))
    assert loss_of(Says((1.0, 0.0)), said, 1.0).item() == pytest.approx(math.log(2))
    assert loss_of(Says((0.999, 0.001)), said, 1.0) == 0


def test_the_strong_view_learns_and_the_weak_view_does_not():
    weak, said = Says((0.03, 0.97), (0.96, 0.04)), logits_of((0.5, 0.5), (0.2, 0.8)).requires_grad_()
    loss_of(weak, said, 0.95).backward()
    assert weak.logits.grad is None
    wanted = torch.tensor([[0.5, 0.2 - 1], [0.5 - 1, 0.8]]) / 2  # probability minus target: (classes, pixels)
    assert torch.allclose(said.grad[0, :, 0], wanted, atol=1e-6)


def test_the_views(labelled, unlabelled):
    """The student sees a strong view, and is taught by what the same network says of the image as it came."""
    method, seen = FixMatch(channels=(4, 8)), []
    nets = method.build(inputs=1, classes=3, dims=2)
    nets["model"].register_forward_pre_hook(lambda net, images: seen.append(images[0]))
    torch.manual_seed(5)
    method.training_step(nets, labelled, unlabelled, END)
    torch.manual_seed(5)
    assert len(seen) == 3 and torch.equal(seen[0], labelled.images)
    assert torch.equal(seen[1], strong(unlabelled.images))
    assert torch.equal(seen[2], unlabelled.images)
