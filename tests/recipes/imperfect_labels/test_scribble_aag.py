"""Attention gates: what they let through, who judges them by which maps, and whose weights the game moves."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.imperfect import PartlyLabelled
from medcook.losses import cross_entropy
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels._adversarial import frozen, structures, taken_for_real, told_apart
from medcook.recipes.imperfect_labels.scribble_aag import (
    GatedUNet,
    MultiScaleDiscriminator,
    ScribbleAAG,
    gated,
    pyramid,
    recipe,
)

TINY = dict(channels=(4, 6, 8))
NOW = Moment(5, 10)


def batch(side: int = 16) -> Batch:
    """Four images, scribbled on a tenth of their pixels, and four label maps of others."""
    rng = torch.Generator().manual_seed(0)
    labels, masks = torch.randint(0, 3, (2, 4, side, side), generator=rng).byte()
    labels[torch.rand(labels.shape, generator=rng) > 0.1] = IGNORE
    return Batch(torch.randn(4, 1, side, side, generator=rng), labels, torch.arange(4), raters=masks[:, None])


def built(method: ScribbleAAG) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(inputs=1, classes=3, dims=2).train()


def gradients(method: ScribbleAAG, net: str, labelled: Batch | None = None) -> list[Tensor]:
    """Of one of the networks' weights, after one step; the same seed every time."""
    nets = built(method)
    torch.manual_seed(1)
    method.training_step(nets, labelled or batch(), None, NOW).backward()
    return [weight.grad for weight in nets[net].parameters()]


class Witness(nn.Module):
    """A discriminator with one weight that keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, maps: list[Tensor]) -> Tensor:
        self.seen.append([level.detach().clone() for level in maps])
        return self.weight * sum(level.mean((1, 2, 3)) for level in maps)


class TestTheGame:
    def test_losses_in_closed_form(self):
        real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 0.0])
        assert told_apart(real, fake).item() == pytest.approx(((0.25 + 1) / 2 + (0 + 1) / 2) / 2)
        assert taken_for_real(fake).item() == pytest.approx((4 + 1) / 2 / 2)
        assert told_apart(torch.ones(3), -torch.ones(3)) == 0 == taken_for_real(torch.ones(3))

    def test_a_frozen_network_passes_gradients_on_and_keeps_none(self):
        layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
        frozen(layer, x).sum().backward()
        assert layer.weight.grad is None and torch.allclose(x.grad, layer.weight.sum(0).expand(4, 3))
        assert torch.equal(frozen(layer, x), layer(x)) and layer.weight.requires_grad


@pytest.mark.component("adversarial attention gates")
class TestGates:
    def test_features_pass_where_there_is_foreground(self):
        features, attention = torch.randn(2, 5, 4, 4), torch.rand(2, 3, 4, 4).softmax(1)
        expected = features.numpy() * (attention[:, 1] + attention[:, 2]).numpy()[:, None]
        assert np.allclose(gated(features, attention), expected)

    def test_shut_gates_leave_the_bias_of_the_head(self):
        network = GatedUNet(inputs=1, classes=3, **TINY).eval()
        with torch.no_grad():
            network.gates[0].weight.zero_()
            network.gates[0].bias.copy_(torch.tensor([200.0, 0.0, 0.0]))
        expected = network.head.bias[:, None, None].expand(2, 3, 16, 16)
        assert torch.allclose(network(torch.randn(2, 1, 16, 16)), expected)

    @pytest.mark.parametrize("level", [0, 1])
    def test_every_level_has_one(self, level):
        """What the gate of a level says changes the prediction, and it hears the first of two convolutions."""
        network, image, heard = GatedUNet(inputs=1, classes=3, **TINY).eval(), torch.randn(1, 1, 16, 16), []
        network.up[level][2].register_forward_hook(lambda _, __, output: heard.append(output.clone()))
        network.gates[level].register_forward_hook(lambda _, inputs, __: heard.append(inputs[0].clone()))
        before, attention = network.maps(image)
        assert torch.equal(heard[0], heard[1]) and torch.allclose(attention[level].sum(1), torch.tensor(1.0))
        assert attention[level].shape == (1, 3, 16 // 2**level, 16 // 2**level)
        with torch.no_grad():
            network.gates[level].bias += torch.tensor([3.0, 0.0, 0.0])
        assert not torch.allclose(network(image), before, atol=1e-6)

    def test_the_judge_sees_the_gates(self):
        """On the finest grid the prediction, on the others what the gates there said."""
        nets, labelled = built(ScribbleAAG(**TINY)), batch()
        nets["judge"] = Witness()
        logits, attention = nets["model"].maps(labelled.images)
        ScribbleAAG(**TINY).training_step(nets, labelled, None, NOW)
        _, fake, fooling = nets["judge"].seen
        for seen in (fake, fooling):
            assert torch.equal(seen[0], logits.softmax(1)[:, 1:]) and torch.equal(seen[1], attention[1][:, 1:])
            assert len(seen) == 2

    def test_it_conditions_them(self):
        """Above its first layer, what the adversary asks of a coarse gate is not what the prediction alone asks."""
        nets, labelled = built(ScribbleAAG(**TINY)), batch()
        for conditioned in (True, False):
            method = ScribbleAAG(**TINY, conditioned=conditioned)
            logits, attention = nets["model"].maps(labelled.images)
            shown = method.shown(logits.detach().softmax(1), attention)
            loss = taken_for_real(frozen(nets["judge"], shown))
            assert loss.requires_grad is conditioned
        assert torch.allclose(shown[1], pyramid(logits.softmax(1)[:, 1:], [None, torch.Size([8, 8])])[1])

    def test_without_conditioning_all_else_is_the_same(self):
        one, other = (built(ScribbleAAG(**TINY, conditioned=on)).state_dict() for on in (True, False))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert recipe.ablation == ("attention gates", "gates not conditioned")


class TestTheDiscriminator:
    def judge(self, **settings) -> MultiScaleDiscriminator:
        torch.manual_seed(0)
        return MultiScaleDiscriminator(structures=2, levels=3, **settings)

    def maps(self, side: int = 32) -> list[Tensor]:
        return [torch.rand(2, 2, side // 2**level, side // 2**level) for level in range(3)]

    def test_it_looks_at_every_scale(self):
        maps = [level.requires_grad_() for level in self.maps()]
        verdict = self.judge().eval()(maps)
        verdict.sum().backward()
        assert verdict.shape == (2, 1) and all(level.grad.abs().max() > 0 for level in maps)

    def test_its_convolutions_stretch_nothing_by_more_than_one(self):
        judge = self.judge()
        for _ in range(60):  # the power iteration moves in training
            judge(self.maps(16))
        for convolution in judge.convolutions:
            assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)

    def test_chance_disturbs_it_in_training_alone(self):
        maps = self.maps()
        for settings, changed in ((dict(flip=0.0), True), (dict(noise=0.0, flip=0.0), False)):
            judge = self.judge(**settings)
            for convolution in judge.convolutions:
                convolution.eval()  # power iterations aside
            assert torch.equal(judge(maps), judge(maps)) is not changed
            assert torch.equal(judge.eval()(maps), judge(maps))
        never, always = (self.judge(noise=0.0, flip=flip) for flip in (0.0, 1.0))
        assert torch.allclose(never(maps), -always(maps))

    def test_it_learns_the_shape_of_true_maps(self):
        """Discs against scattered pixels: told apart after a few steps."""
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        disc = ((rows - 16) ** 2 + (columns - 16) ** 2 < 64).float().expand(4, 2, 32, 32)
        judge, sizes = self.judge(), [torch.Size([side, side]) for side in (32, 16, 8)]
        optimiser = torch.optim.AdamW(judge.parameters(), 3e-3)
        for _ in range(40):
            scattered = (torch.rand(4, 2, 32, 32) < 0.2).float()
            loss = told_apart(judge(pyramid(disc, sizes)), judge(pyramid(scattered, sizes)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        judge.eval()
        assert judge(pyramid(disc, sizes)).min() > 0 > judge(pyramid(scattered, sizes)).max()


class TestOneOptimiser:
    def test_the_judge_learns_from_maps_it_does_not_move(self):
        """With no weight on the adversary the segmentor's gradient is that of the scribbles alone."""
        method, labelled = ScribbleAAG(**TINY, weight=0.0), batch()
        nets = built(method)
        cross_entropy(nets["model"](labelled.images), labelled.labels).backward()
        for found, weight in zip(gradients(method, "model"), nets["model"].parameters(), strict=True):
            assert torch.allclose(found, weight.grad, atol=1e-6)
        assert any(gradient.abs().max() > 0 for gradient in gradients(method, "judge"))

    def test_the_segmentor_does_not_move_the_judge(self):
        weak, strong = (gradients(ScribbleAAG(**TINY, weight=weight), "judge") for weight in (0.0, 50.0))
        assert all(torch.equal(a, b) for a, b in zip(weak, strong, strict=True))

    def test_the_terms_are_brought_to_one_size(self):
        nets, labelled = built(ScribbleAAG(**TINY)), batch()
        nets["judge"] = Witness()
        supervised = PartlyLabelled(**TINY).training_step(nets, labelled, None, NOW).item()
        found = ScribbleAAG(**TINY, weight=0.3).training_step(nets, labelled, None, NOW)
        verdicts = [0.5 * sum(level.mean((1, 2, 3)) for level in seen) for seen in nets["judge"].seen]
        assert found.item() == pytest.approx(1.3 * supervised + told_apart(*verdicts[:2]).item(), rel=1e-5)

    def test_everything_is_trained(self):
        for net in ("model", "judge"):
            assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients(ScribbleAAG(), net))


@pytest.mark.component("unpaired segmentation masks")
class TestMasks:
    def test_they_are_what_is_true(self):
        """On all grids, without the background; annotation of the images never reaches the judge."""
        nets, labelled = built(ScribbleAAG(**TINY)), batch()
        nets["judge"] = Witness()
        ScribbleAAG(**TINY).training_step(nets, labelled, None, NOW)
        true = nets["judge"].seen[0]
        masks = labelled.raters[:, 0].numpy()
        assert np.array_equal(true[0].numpy(), np.stack([masks == 1, masks == 2], axis=1))
        assert true[1].shape == (4, 2, 8, 8)

    def test_coarser_ones_are_shares(self):
        halves = structures((torch.arange(16) < 8).byte().expand(1, 16, 16), 2)
        _, coarse = pyramid(halves, [None, torch.Size([8, 8])])
        assert torch.allclose(coarse.mean(), torch.tensor(0.5)) and coarse.min() >= 0 and coarse.max() <= 1
        assert torch.equal(coarse[0, 0, :, :3], torch.ones(8, 3))

    def test_without_them_scribbles_are_all_there_is(self):
        nets, alone = built(ScribbleAAG(**TINY)), batch()._replace(raters=None)
        found, wanted = (method.training_step(nets, alone, None, NOW) for method in (ScribbleAAG(), PartlyLabelled()))
        assert found.item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("size", [(16, 16), (33, 50), (96, 96)])
def test_any_size_comes_back(size):
    method = ScribbleAAG()
    nets, labels = built(method), torch.zeros(2, *size).byte()
    labelled = Batch(torch.randn(2, 1, *size), labels, raters=labels[:, None])
    assert torch.isfinite(method.training_step(nets, labelled, None, NOW))
    assert method.predict(nets.eval(), labelled.images).shape == (2, 3, *size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(method.training_step(nets.train(), labelled, None, NOW))


def test_slices_alone():
    with pytest.raises(MedcookError, match="slices"):
        ScribbleAAG().build(1, 3, 3)
