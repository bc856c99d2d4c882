"""Pseudo-labels: who judges made masks and by what, what calibrates the generator, and which pixels count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.losses import soft_dice
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels._adversarial import PatchJudge, played, taken_for_real, told_apart
from medcook.recipes.imperfect_labels.ael_noisy_pseudo import (
    CalibratedUNet,
    PseudoLabelled,
    ShapeJudge,
    certainty,
    divergence,
    hardened,
    recipe,
    sampled,
    weighted_dice,
    whole,
)

TINY = dict(channels=(4, 4, 6, 8))
GAME, BOTH, FIRST, SECOND = Moment(1, 100), Moment(40, 100), Moment(62, 100), Moment(90, 100)


def batch(size: tuple[int, int] = (32, 32)) -> Batch:
    """Four images without labels, and four masks of others."""
    rng = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (4, 1, *size), generator=rng).byte()
    return Batch(torch.randn(4, 1, *size, generator=rng), torch.full_like(masks[:, 0], IGNORE), raters=masks)


def built(method: PseudoLabelled) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(inputs=1, classes=3, dims=2).train()


def step(method: PseudoLabelled, nets: nn.ModuleDict, now: Moment, labelled: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, labelled or batch(), None, now)


def trained(method: PseudoLabelled, now: Moment) -> set[str]:
    """Names of the networks that one step moves."""
    nets = built(method)
    step(method, nets, now).backward()
    return {name for name, net in nets.items() if any(weight.grad is not None for weight in net.parameters())}


class Says(nn.Module):
    """A network that always gives the same logits, and keeps what it saw."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits, self.seen = nn.Parameter(logits), []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        return self.logits


class TestTheGame:
    def test_each_side_moves_itself(self):
        judge, made = PatchJudge(2), torch.rand(2, 2, 16, 16, requires_grad=True)
        of_judge, of_maker = played(judge.eval(), torch.rand(2, 2, 16, 16), made)
        of_judge.backward(retain_graph=True)
        assert made.grad is None and all(weight.grad.abs().max() > 0 for weight in judge.parameters())
        judge.zero_grad()
        of_maker.backward()
        assert made.grad.abs().max() > 0 and all(weight.grad is None for weight in judge.parameters())
        assert of_maker.item() == pytest.approx(taken_for_real(judge(made)).item())

    def test_hard_masks_with_soft_gradients(self):
        soft = torch.randn(2, 3, 8, 8, requires_grad=True)
        maps = hardened(soft.softmax(1)[:, 1:])
        expected = F.one_hot(soft.argmax(1), 3).movedim(-1, 1)[:, 1:]
        assert torch.allclose(maps, expected.float(), atol=1e-6)
        weights = torch.randn_like(maps)
        (found,) = torch.autograd.grad((maps * weights).sum(), soft)
        (wanted,) = torch.autograd.grad((soft.softmax(1)[:, 1:] * weights).sum(), soft)
        assert torch.allclose(found, wanted)

    def test_the_cycles_close(self):
        """A painter and a generator that undo each other leave the adversary alone; `cycle` weighs what they miss."""
        nets, losses = built(PseudoLabelled(**TINY)), []
        for cycle in (0.0, 1.0, 3.0):
            losses.append(step(PseudoLabelled(**TINY, cycle=cycle), nets.eval(), GAME).item())
        assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)
        images = F.avg_pool2d(batch().images, 2)
        nets["painter"] = Says(images.clone())
        masks = batch().raters[:, 0, 1::2, 1::2]
        sure = 50 * F.one_hot(masks.long(), 3).movedim(-1, 1).float()
        nets["generator"] = Says(sure)
        found = [
            step(PseudoLabelled(**TINY, calibrates=False, shape=False, cycle=c), nets, GAME).item() for c in (0.0, 9.0)
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-5)

    def test_who_is_trained_when(self):
        players = {"generator", "painter", "mask judge", "image judge", "shape judge"}
        assert trained(PseudoLabelled(**TINY), GAME) == players
        assert trained(PseudoLabelled(**TINY), BOTH) == players | {"model"}
        assert trained(PseudoLabelled(**TINY), FIRST) == {"model"} == trained(PseudoLabelled(**TINY), SECOND)

    def test_everything_is_trained(self):
        nets = built(PseudoLabelled())
        step(PseudoLabelled(), nets, BOTH).backward()
        for name, weight in nets.named_parameters():
            assert not weight.requires_grad or (weight.grad is not None and weight.grad.abs().max() > 0), name


@pytest.mark.component("unpaired auxiliary masks")
class TestMasks:
    def test_they_are_what_is_true(self):
        """Each judge of masks is told that the masks of others are true, on the GAN's grid."""
        nets, seen = built(PseudoLabelled(**TINY)), {}
        for name in ("mask judge", "shape judge"):
            nets[name].register_forward_hook(
                lambda _, inputs, __, name=name: seen.setdefault(name, inputs[0].detach().clone())
            )
        step(PseudoLabelled(**TINY), nets, GAME)
        masks = batch().raters[:, 0, 1::2, 1::2]
        expected = torch.stack([masks == 1, masks == 2], dim=1).float()
        assert torch.equal(seen["shape judge"], expected)
        assert (seen["mask judge"] - expected).abs().max() <= 0.4 + 1e-6 and not torch.equal(*seen.values())

    @pytest.mark.parametrize("now", [GAME, BOTH, SECOND])
    def test_labels_of_the_images_are_never_looked_at(self, now):
        method, losses = PseudoLabelled(**TINY), []
        for value in (IGNORE, 0, 2):
            labelled = batch()._replace(labels=torch.full((4, 32, 32), value).byte())
            losses.append(step(method, built(method), now, labelled).item())
        assert losses[0] == losses[1] == losses[2]

    def test_the_order_of_the_masks_does_not_matter(self):
        """No image has a mask of its own: dealt in another order the game is the same, up to chance."""
        method = PseudoLabelled(**TINY, shape=False)
        nets, labelled = built(method).eval(), batch()
        dealt = labelled._replace(raters=labelled.raters.flip(0))
        losses = [torch.stack([method.play(nets, *half(one)) for _ in range(8)]).mean() for one in (labelled, dealt)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01)


def half(labelled: Batch) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(labelled.images, 2), labelled.raters[:, 0, 1::2, 1::2]


@pytest.mark.component("VAE-based discriminator")
class TestShapes:
    def test_the_divergence_is_that_of_torch(self):
        mean, log_variance = torch.randn(2, 5, 4)
        reference = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
        assert divergence(mean, log_variance).item() == pytest.approx(reference.item(), rel=1e-5)

    def test_latents_are_samples(self):
        mean, log_variance = torch.tensor([[2.0, -1.0]]).expand(20000, 2), torch.tensor([[0.0, -2.0]]).expand(20000, 2)
        torch.manual_seed(0)
        latents = sampled(mean, log_variance)
        assert torch.allclose(latents.mean(0), mean[0], atol=0.03)
        assert torch.allclose(latents.var(0), log_variance[0].exp(), atol=0.03)

    def test_evidence_is_description_and_divergence(self):
        judge, masks = ShapeJudge(2).eval(), torch.rand(3, 2, 64, 64).round()
        torch.manual_seed(2)
        found = judge.evidence(masks)
        torch.manual_seed(2)
        mean, log_variance = judge.distribution(masks)
        logits, coarse = judge.decoder(sampled(mean, log_variance)), F.avg_pool2d(masks, 2)
        told = -(coarse * F.logsigmoid(logits) + (1 - coarse) * F.logsigmoid(-logits)).mean()
        assert found.item() == pytest.approx(told.item() + divergence(mean, log_variance).item() / (2 * 32 * 32))

    def test_it_learns_shapes(self):
        """After a few steps discs are described well, and told apart from scattered pixels by their latents."""
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        torch.manual_seed(0)
        judge = ShapeJudge(1)
        optimiser, losses = torch.optim.AdamW(judge.parameters(), 1e-2), []
        for _ in range(40):
            centre = torch.randint(10, 22, (8, 2, 1, 1))
            discs = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 50)[:, None].float()
            scattered = (torch.rand(8, 1, 32, 32) < 0.15).float()
            evidence = judge.evidence(discs)
            optimiser.zero_grad()
            (evidence + told_apart(judge(discs), judge(scattered))).backward()
            optimiser.step()
            losses.append(evidence.item())
        assert losses[-1] < 0.5 * losses[0]
        assert judge(discs).min() > 0 > judge(scattered).max()

    def test_it_moves_the_generator(self):
        """What the generator is told changes with it; without it there is no such network."""
        on, off = PseudoLabelled(**TINY), PseudoLabelled(**TINY, shape=False)
        nets, found = built(on), []
        for method in (on, off):
            nets.zero_grad()
            step(method, nets, GAME).backward()
            found.append(nets["generator"].head.weight.grad.clone())
        assert not torch.allclose(*found) and "shape judge" not in built(off)


@pytest.mark.component("discriminator-guided generator channel calibration")
class TestCalibration:
    def network(self) -> tuple[CalibratedUNet, PatchJudge]:
        torch.manual_seed(0)
        judge = PatchJudge(2).eval()
        return CalibratedUNet(feedback=judge.width, inputs=1, classes=3, channels=(4, 6)).eval(), judge

    def test_channels_are_weighted_by_what_the_judge_felt(self):
        """Written out: head of features times 2 sigmoid of two layers of the pooled features of the first answer."""
        (network, judge), image = self.network(), torch.randn(2, 1, 16, 16)
        features = network.features(image)
        felt = judge.body(network.head(features).softmax(1)[:, 1:]).mean((2, 3))
        first, _, second = network.calibration
        weights = second.weight[:, :, 0, 0] @ F.relu(felt @ first.weight[:, :, 0, 0].T + first.bias).T
        weights = 2 / (1 + torch.exp(-(weights.T + second.bias)))
        expected = network.head(features * weights[:, :, None, None])
        assert torch.allclose(network.calibrated(image, judge), expected, atol=1e-5)
        assert not torch.allclose(expected, network(image), atol=1e-3)

    def test_the_judge_stays_as_it_is(self):
        network, judge = self.network()
        network.calibrated(torch.randn(2, 1, 16, 16), judge).sum().backward()
        assert all(weight.grad is None for weight in judge.parameters())
        assert all(layer.weight.grad.abs().max() > 0 for layer in network.calibration[::2])

    def test_another_judge_another_mask(self):
        (network, judge), image = self.network(), torch.randn(2, 1, 16, 16)
        other = PatchJudge(2).eval()
        assert not torch.allclose(network.calibrated(image, judge), network.calibrated(image, other), atol=1e-5)

    def test_without_it_the_generator_answers_at_once(self):
        method = PseudoLabelled(**TINY, calibrates=False)
        nets, images = built(method).eval(), torch.randn(2, 1, 16, 16)
        assert not hasattr(nets["generator"], "calibration")
        assert torch.equal(method.translated(nets, images), nets["generator"](images))


@pytest.mark.component("noise-weighted Dice loss")
class TestWeights:
    def test_with_equal_weights_it_is_the_dice_loss(self):
        logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
        found = weighted_dice(logits, labels, torch.ones(2, 8, 8))
        assert found.item() == pytest.approx(soft_dice(logits, labels.byte()).item(), rel=1e-6)

    def test_a_pixel_counts_by_its_weight(self):
        """Whole weights are pixels seen so many times; weight 0 is a pixel that is not there."""
        logits, labels = torch.randn(1, 3, 6, 6), torch.randint(0, 3, (1, 6, 6))
        times = torch.randint(0, 4, (36,))
        again = torch.arange(36).repeat_interleave(times)
        repeated = logits.flatten(2)[:, :, again][..., None], labels.flatten(1)[:, again][..., None]
        wanted = soft_dice(repeated[0], repeated[1].byte())
        assert weighted_dice(logits, labels, times.view(1, 6, 6).float()).item() == pytest.approx(wanted.item())

    def test_certainty(self):
        sure, even = torch.tensor([0.0, 1.0, 0.0]), torch.ones(3) / 3
        between = torch.tensor([0.2, 0.6, 0.2])
        found = certainty(torch.stack([sure, even, between])[:, :, None, None])
        assert found.flatten().tolist() == pytest.approx([1, 0, 0.4], abs=1e-6)

    def test_the_step_goes_by_the_labellers_certainty(self):
        nets, images = built(PseudoLabelled(**TINY)), batch().images
        said, logits = 2 * torch.randn(2, 4, 3, 32, 32)
        nets["before"], nets["model"] = Says(said), Says(logits)
        for weighted in (True, False):
            weights = certainty(said.softmax(1)) if weighted else torch.ones(4, 32, 32)
            wanted = weighted_dice(logits, said.argmax(1), weights).item()
            found = PseudoLabelled(**TINY, weighted=weighted).learn(nets, images, SECOND)
            assert found.item() == pytest.approx(wanted, rel=1e-5)


class TestRounds:
    def test_there_are_as_many_as_asked_for(self):
        for rounds in (1, 2, 3):
            method = PseudoLabelled(rounds=rounds)
            found = [method.round(Moment(k, 100)) for k in range(100)]
            assert max(found[:30]) < 0 and found[30:] == sorted(found[30:])
            assert sorted(set(found[30:])) == list(range(rounds))

    def test_at_first_the_gan_labels_and_then_the_round_before(self):
        nets, images = built(PseudoLabelled(**TINY)), batch().images
        nets["labeller"], nets["before"] = Says(torch.randn(4, 3, 16, 16)), Says(torch.randn(4, 3, 32, 32))
        method = PseudoLabelled(**TINY, calibrates=False)
        first, second = method.told(nets, images, FIRST), method.told(nets, images, SECOND)
        fine = F.interpolate(nets["labeller"].logits, (32, 32), mode="bilinear").softmax(1)
        assert torch.equal(nets["labeller"].seen[0], F.avg_pool2d(images, 2)) and torch.allclose(first, fine)
        assert torch.equal(nets["before"].seen[0], images)
        assert torch.allclose(second, nets["before"].logits.softmax(1))

    def test_the_end_of_a_round_makes_a_labeller_of_the_average(self):
        method = PseudoLabelled(**TINY)
        nets = built(method)
        nn.init.normal_(nets["model"].head.weight)
        method.after_step(nets, Moment(63, 100))
        assert not torch.equal(nets["before"].head.weight, nets["average"].head.weight)
        method.after_step(nets, Moment(64, 100))  # the second round begins at 0.65
        assert torch.equal(nets["before"].head.weight, nets["average"].head.weight)
        method.after_step(nets, Moment(65, 100))
        assert not torch.equal(nets["before"].head.weight, nets["average"].head.weight)

    def test_averages_follow_what_is_trained(self):
        for now, labeller, average in ((GAME, True, False), (BOTH, True, True), (FIRST, False, True)):
            method = PseudoLabelled(**TINY)
            nets = built(method)
            for name in ("generator", "model"):
                nn.init.normal_(nets[name].head.weight)
            before = {name: nets[name].head.weight.clone() for name in ("labeller", "average")}
            method.after_step(nets, now)
            assert torch.equal(nets["labeller"].head.weight, before["labeller"]) is not labeller
            assert torch.equal(nets["average"].head.weight, before["average"]) is not average

    def test_the_ablation_learns_plainly_from_the_same_gan(self):
        better, plain = (recipe.arms[name].method.settings() for name in recipe.ablation)
        assert {name for name in better if better[name] != plain[name]} == {"weighted", "rounds"}
        assert plain["rounds"] == 1 and not plain["weighted"]


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (96, 96)])
def test_any_size_comes_back(size):
    method, labelled = PseudoLabelled(), batch(size)
    nets = built(method)
    for bfloat16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            assert torch.isfinite(step(method, nets, BOTH, labelled))
            assert torch.isfinite(step(method, nets, SECOND, labelled))
    assert method.predict(nets.eval(), labelled.images).shape == (4, 3, *size)


def test_the_background_is_what_is_left():
    maps = torch.tensor([[[[0.2, 1.0]], [[0.5, 0.0]]]])
    assert torch.allclose(whole(maps), torch.tensor([[[[0.3, 0.0]], [[0.2, 1.0]], [[0.5, 0.0]]]]))


def test_without_masks_labels_are_all_there_is():
    method, labelled = PseudoLabelled(**TINY), batch()
    labelled = labelled._replace(labels=labelled.raters[:, 0], raters=None)
    nets = built(method)
    wanted = soft_dice(nets["model"](labelled.images), labelled.labels).item()
    assert step(method, nets, GAME, labelled).item() == pytest.approx(wanted, rel=1e-5)


def test_slices_alone():
    with pytest.raises(MedcookError, match="slices"):
        PseudoLabelled().build(1, 3, 3)
