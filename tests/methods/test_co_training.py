"""Cross pseudo supervision: two different networks, each taught by the other's hard labels."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.methods import CrossPseudoSupervision, Moment
from medcook.methods.co_training import cross_supervision

METHOD = CrossPseudoSupervision(channels=(4, 8))
END = Moment(100, 100)


@pytest.fixture
def nets() -> nn.ModuleDict:
    return METHOD.build(inputs=1, classes=3, dims=2)


def logits_of(*pixels: tuple[float, ...]) -> torch.Tensor:
    """(1, classes, 1, pixels) logits with these probabilities."""
    return torch.tensor(pixels).log().T[None, :, None]


class TestCrossSupervision:
    def test_closed_form(self):
        """Two pixels: on the first the networks agree (class 0), on the second they do not."""
        first, second = logits_of((0.8, 0.2), (0.7, 0.3)), logits_of((0.6, 0.4), (0.1, 0.9))
        taught_first = -(math.log(0.8) + math.log(0.3)) / 2
        taught_second = -(math.log(0.6) + math.log(0.1)) / 2
        assert cross_supervision(first, second).item() == pytest.approx(taught_first + taught_second, abs=1e-6)

    def test_it_is_symmetric(self):
        first, second = torch.randn(2, 2, 3, 8, 8)
        assert cross_supervision(first, second).item() == pytest.approx(cross_supervision(second, first).item())

    def test_each_is_pushed_to_the_others_hard_label_and_no_gradient_passes_through_it(self):
        """The gradient of a cross-entropy with a fixed target: probability minus target."""
        first, second = torch.randn(2, 2, 3, 8, 8).unbind()
        cross_supervision(first.requires_grad_(), second.requires_grad_()).backward()
        for mine, other in [(first, second), (second, first)]:
            target = F.one_hot(other.argmax(1), 3).movedim(-1, 1)
            assert torch.allclose(mine.grad, (mine.softmax(1) - target) / 128, atol=1e-7)

    def test_scaling_the_teachers_logits_changes_nothing_for_the_pupil(self):
        first, second = torch.randn(2, 2, 3, 8, 8).unbind()
        grads = [torch.autograd.grad(cross_supervision(first.requires_grad_(), second * k), first)[0] for k in (1, 5)]
        assert torch.equal(*grads)


class TestTwoNetworks:
    def test_they_start_apart_and_the_average_with_the_first(self, nets):
        assert not torch.equal(nets["second"].head.weight, nets["model"].head.weight)
        assert torch.equal(nets["average"].head.weight, nets["model"].head.weight)
        assert all(p.requires_grad for name in ("model", "second") for p in nets[name].parameters())

    def test_swapping_them_changes_nothing(self, nets, labelled, unlabelled):
        swapped = nn.ModuleDict({"model": nets["second"], "second": nets["model"], "average": nets["average"]})
        one, other = (METHOD.training_step(pair, labelled, unlabelled, END).item() for pair in (nets, swapped))
        assert one == pytest.approx(other, abs=1e-6)

    @pytest.mark.parametrize(("pupil", "teacher"), [("model", "second"), ("second", "model")])
    def test_each_learns_what_the_other_says(self, nets, labelled, unlabelled, pupil, teacher):
        """The teacher says 2 everywhere: to the gradient of the pupil's last bias that adds p - (0, 0, 1)."""
        bias = nets[pupil].head.bias
        with torch.no_grad():
            nets[teacher].head.bias[2] += 50
        silent, taught = (
            torch.autograd.grad(replace(METHOD, weight=weight).training_step(nets, labelled, unlabelled, END), bias)[0]
            for weight in (0.0, 1.0)
        )
        said = nets[pupil](unlabelled.images).softmax(1).mean((0, 2, 3))
        assert torch.allclose(taught - silent, said - torch.tensor([0.0, 0.0, 1.0]), atol=1e-5)

    def test_they_teach_on_the_unlabelled_images_as_they_are(self, nets, labelled, unlabelled):
        seen = []
        for name in ("model", "second"):
            nets[name].register_forward_pre_hook(lambda net, images: seen.append(images[0]))
        both, silent = (
            replace(METHOD, weight=weight).training_step(nets, labelled, unlabelled, END) for weight in (1.0, 0.0)
        )
        assert torch.equal(seen[2], unlabelled.images) and torch.equal(seen[3], unlabelled.images)
        wanted = cross_supervision(*(nets[name](unlabelled.images) for name in ("model", "second")))
        assert (both - silent).item() == pytest.approx(wanted.item(), abs=1e-5)

    def test_the_average_follows_the_first_and_predicts(self, nets, unlabelled):
        start = nets["average"].head.weight.clone()
        before = METHOD.predict(nets.eval(), unlabelled.images)
        with torch.no_grad():
            nets["second"].head.weight += 10
        METHOD.after_step(nets, Moment(9, 100))
        assert torch.equal(nets["average"].head.weight, start)
        assert torch.equal(METHOD.predict(nets, unlabelled.images), before)
        with torch.no_grad():
            nets["model"].head.weight[0] += 1
        METHOD.after_step(nets, Moment(9, 100))
        assert torch.allclose(nets["average"].head.weight[0], start[0] + 9 / 19)
        assert not torch.allclose(METHOD.predict(nets, unlabelled.images), before)
