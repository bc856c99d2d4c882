"""Translators that keep structures, the steps that they share with the segmentation, and how brightness is compared."""

from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import NONE
from medcook.domains import DomainTask
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.domain_shift import ct_mr_prior
from medcook.recipes.domain_shift.ct_mr_prior import (
    BalancedTask,
    CrossModality,
    Translator,
    brightness,
    divergence,
    histogram,
    prior_rows,
    recipe,
)

TINY = dict(channels=(4, 8), translator=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(5, 10)
TASK = BalancedTask("embedded", look="dark blood", known=1)


def batches(size: tuple[int, int] = (32, 24), groups=(1, 0, 0, 1, 0)) -> tuple[Batch, Batch]:
    """Labelled images of two contrasts, and unlabelled ones of the target's, of which there are more than needed."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (5, 4, 4), generator=rng).byte()
    labels = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].byte()
    groups = torch.tensor(groups)
    images = labels[:, None].float() * torch.where(groups == 1, -1.0, 1.0).view(-1, 1, 1, 1)
    images = images + 0.1 * torch.randn(images.shape, generator=rng)
    other = Batch(-images.flip(0), torch.full_like(labels, IGNORE), torch.arange(5))
    return Batch(images, labels, torch.arange(5), groups=groups), other


def built(method: CrossModality) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def step(method: CrossModality, nets: nn.ModuleDict, now: Moment, given=None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, *(given or batches()), now)


def moved(nets: nn.ModuleDict) -> set[str]:
    """Networks of which some weight has a gradient that is not zero."""
    return {
        name for name, net in nets.items() if any(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
    }


class Says(nn.Module):
    """A network that keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.shown = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach())
        return self.weight * images


class Times(nn.Module):
    """A translator that can be undone."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images


@pytest.mark.component("GAN from CT to pseudo MR")
class TestTranslation:
    def test_the_loss_is_that_of_games_and_cycles(self):
        """Written out, with translators that are numbers."""
        method = CrossModality(**TINY, structure=0.0, cycle=0.7)
        nets = built(method)
        nets["there"], nets["back"] = Times(-1.5), Times(-0.5)
        labelled, other = batches()
        x, z = labelled.images[labelled.groups == 0], other.images[:3]
        one, minus = lambda says: (says - 1).square().mean() / 2, lambda says: (says + 1).square().mean() / 2
        found = method.play(nets, x, labelled.labels[:3], z)
        expected = 0.7 * ((0.75 * x - x).abs().mean() + (0.75 * z - z).abs().mean())
        for judge, true, made in (("judge there", z, -1.5 * x), ("judge back", x, -0.5 * z)):
            says = nets[judge].eval()  # spectral normalisation stays as it is
            expected = expected + one(says(true)) + minus(says(made)) + one(says(made))
        assert found.item() == pytest.approx(expected.item(), rel=2e-2)

    def test_judges_learn_from_constant_fakes_and_translators_from_constant_judges(self):
        method = CrossModality(**TINY, structure=0.0, cycle=0.0)
        for constant, moving in (
            (("there", "back"), {"judge there", "judge back"}),
            (("judge there", "judge back"), {"there", "back"}),
        ):
            nets = built(method)
            for name in constant:
                nets[name].requires_grad_(False)
            labelled, other = batches()
            source = labelled.groups == 0
            method.play(nets, labelled.images[source], labelled.labels[source], other.images[:3]).backward()
            assert moved(nets) == moving

    def test_a_translator_adds_to_the_image(self):
        net = Translator(1, (4, 8))
        image = torch.randn(2, 1, 33, 47)
        with torch.no_grad():
            net.net.head.weight.zero_(), net.net.head.bias.fill_(0.5)
        assert torch.allclose(net(image), image + 0.5)

    def test_it_learns_a_negative(self):
        """A few steps against unpaired images of opposite contrast."""
        torch.manual_seed(0)
        method = CrossModality(channels=(4,), translator=(8, 8), cycle=0.0, structure=0.0)
        nets = method.build(1, 2, 2).train()
        optimiser = torch.optim.AdamW(nets.parameters(), 5e-3)
        coarse = lambda: (F.interpolate(torch.rand(8, 1, 4, 4), (16, 16)) > 0.7).float()  # noqa: E731
        labels = torch.zeros(8, 16, 16).byte()
        before = (nets["there"](coarse()).mean() - (1 - coarse()).mean()).abs().item()
        for _ in range(60):
            optimiser.zero_grad()
            method.play(nets, coarse(), labels, 1 - coarse()).backward()
            optimiser.step()
        after = (nets["there"](coarse()).mean() - (1 - coarse()).mean()).abs().item()
        assert after < 0.5 * before


@pytest.mark.component("training data augmented by pseudo MR")
class TestAugmentation:
    def test_first_the_few_real_images_then_translated_ones_too(self):
        method = CrossModality(**TINY, augmentation=NONE)
        labelled, _ = batches()
        real, source = labelled.images[[0, 3]], labelled.images[[1, 2, 4]]
        for now, expected, order in ((EARLY, real, [0, 3]), (LATE, torch.cat([real, -2 * source]), [0, 3, 1, 2, 4])):
            nets = built(method)
            nets["model"], nets["there"] = Says(), Times(-2.0)
            method.structure = 0.0
            method.play = lambda *_: torch.tensor(7.0)
            loss = step(method, nets, now)
            assert len(nets["model"].shown) == 1
            assert torch.allclose(nets["model"].shown[0], expected, atol=1e-4)
            told = find_loss("both")(expected * torch.ones(1, 3, 1, 1), labelled.labels[order])
            assert loss.item() == pytest.approx(told.item() + 7 * (now is EARLY), rel=1e-4)

    def test_after_the_game_the_translator_is_a_constant(self):
        method = CrossModality(**TINY)
        for now, names in ((EARLY, {"model", "there", "back", "judge there", "judge back"}), (LATE, {"model"})):
            nets = built(method)
            step(method, nets, now).backward()
            assert moved(nets) == names
        assert {name for name, p in nets.named_parameters() if not p.requires_grad} == {
            f"average.{name}" for name, _ in nets["average"].named_parameters()
        }

    def test_every_parameter_is_trained(self):
        method = CrossModality(**TINY)
        nets = built(method)
        step(method, nets, EARLY).backward()
        for name, weight in nets.named_parameters():
            assert name.startswith("average") or weight.grad.abs().max() > 0, name

    def test_without_a_translator_the_source_is_shown_as_it_is(self):
        method = CrossModality(channels=(4, 8), translator=(), augmentation=NONE)
        nets = built(method)
        assert set(nets) == {"model", "average"}
        nets["model"] = Says()
        step(method, nets, EARLY)
        assert torch.allclose(nets["model"].shown[0], batches()[0].images[[0, 3, 1, 2, 4]], atol=1e-4)

    def test_intensities_change_after_the_translation(self):
        method, (labelled, _) = CrossModality(**TINY), batches()
        view = method.augment(labelled, torch.Generator().manual_seed(0))
        values = labelled.images.unique()
        assert view.images.min() >= values.min() - 1e-5 and view.images.max() <= values.max() + 1e-5
        assert view.labels.shape == labelled.labels.shape and not torch.equal(view.images, labelled.images)

    def test_known_patients_are_repeated_until_there_are_as_many(self):
        plain = DomainTask("embedded", look="dark blood", known=1).samples("labelled")
        samples = TASK.samples("labelled")
        source, known = (int((plain.groups == k).sum()) for k in (0, 1))
        assert known < source and torch.bincount(samples.groups).tolist() == [source, source]
        assert torch.equal(samples.images[: len(plain)], plain.images)
        target = plain.images[plain.groups == 1]
        assert torch.equal(samples.images[len(plain)], target[0]) and torch.equal(
            samples.images[-1], target[(source - 1) % known]
        )
        times = torch.bincount(samples.case_of[samples.groups == 1])
        assert times[times > 0].max() <= times[times > 0].min() + source // known
        alone = replace(TASK, sides="target").samples("labelled")
        assert len(alone) == known and (alone.groups == 1).all()
        assert torch.equal(TASK.samples("unlabelled").labels.unique(), torch.tensor([IGNORE]).byte())


class TestStructure:
    def test_the_segmentation_of_the_translation_moves_the_translator_alone(self):
        """Against the gradient of the loss written out."""
        method = CrossModality(**TINY, structure=3.0)
        nets = built(method)
        labelled, other = batches()
        chosen = labelled.groups == 0
        given = labelled.images[chosen], labelled.labels[chosen], other.images[:3]
        states = deepcopy(nets.state_dict())
        grads = []
        for weight in (3.0, 0.0):
            nets.load_state_dict(states)
            nets.zero_grad()
            replace(method, structure=weight).play(nets, *given).backward()
            grads.append([p.grad.clone() for p in nets["there"].parameters()])
            assert "model" not in moved(nets)
        nets.load_state_dict(states)
        nets.zero_grad()
        find_loss("both")(nets["model"](nets["there"](given[0])), given[1]).backward()
        alone = [p.grad for p in nets["there"].parameters()]
        assert max(a.abs().max() for a in alone) > 1e-3
        for both, without, extra in zip(*grads, alone, strict=True):
            assert torch.allclose(both - without, 3 * extra, atol=1e-4)

    def test_the_ablation_takes_the_structure_away_and_nothing_else(self):
        one, other = (recipe.arms[name] for name in recipe.ablation)
        mine, theirs = asdict(one.method), asdict(other.method)
        assert {key for key in mine if mine[key] != theirs[key]} == {"structure"} and theirs["structure"] == 0
        assert one.changes == other.changes == {}
        nets = [built(replace(arm.method, **TINY)).state_dict() for arm in (one, other)]
        assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


@pytest.mark.component("Kullback-Leibler divergence of intensities")
class TestDivergence:
    def test_it_is_scipy_s(self):
        p, q = (histogram(torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(k)) + k) for k in (0, 1))
        assert divergence(p, q) == pytest.approx(entropy(p.numpy(), q.numpy())) and divergence(p, p) == 0
        assert divergence(p, q) != pytest.approx(divergence(q, p))

    def test_of_two_gaussians_it_is_half_the_squared_distance(self):
        p = histogram(torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.5)
        q = histogram(torch.randn(400_000, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5)
        assert divergence(p, q) == pytest.approx(0.5, abs=0.02)

    def test_shares_sum_to_one_and_what_lies_beyond_counts_at_the_ends(self):
        images = torch.tensor([-100.0, 0.01, 100.0, 100.0])
        found = histogram(images, bins=4) * 6
        assert torch.allclose(found, torch.tensor([1.5, 0.5, 1.5, 2.5]).double())
        counts, _ = np.histogram(np.linspace(-3.9, 3.9, 50), 64, (-4, 4))
        assert np.allclose(histogram(torch.linspace(-3.9, 3.9, 50)) * 82, counts + 0.5)

    def test_a_row_has_the_divergence_of_translated_source_from_target(self, monkeypatch):
        monkeypatch.setattr(ct_mr_prior, "SHOWN", 2)
        method = CrossModality(**TINY)
        nets = built(method)
        nets["there"] = Times(-1.0)
        images = {
            name: torch.cat([TASK.preparation.images(case) for case in TASK.data.cases(patients[:2])])
            for name, patients in (("source", TASK.source_patients), ("target", TASK.target_patients))
        }
        fitted = SimpleNamespace(task=TASK, method=method, nets=nets, weights={"last": nets.state_dict()})
        expected = divergence(histogram(-images["source"]), histogram(images["target"]))
        assert brightness(fitted) == pytest.approx(expected)
        plain = SimpleNamespace(**{**vars(fitted), "method": recipe.arms["few target labels"].method})
        as_it_is = divergence(histogram(images["source"]), histogram(images["target"]))
        assert brightness(plain) == pytest.approx(as_it_is) and as_it_is != pytest.approx(expected)
        case = next(iter(TASK.cases("val")))
        fitted.predict = lambda given: given.label
        rows = prior_rows(fitted, case)
        assert {row["divergence"] for row in rows} == {brightness(fitted)} and {row["dice"] for row in rows} == {1.0}


@pytest.mark.component("U-Net with batch normalisation")
def test_every_arm_segments_with_the_chapter_s_u_net():
    nets = [arm.method.build(1, 4, 2) for arm in recipe.arms.values()]
    shapes = {name: weight.shape for name, weight in nets[0]["model"].named_parameters()}
    for net in nets:
        assert isinstance(net["model"], UNet) and any(isinstance(m, nn.BatchNorm2d) for m in net["model"].modules())
        assert {name: weight.shape for name, weight in net["model"].named_parameters()} == shapes
    assert len({str(arm.method.augmentation) for arm in recipe.arms.values()}) == 1


def test_arms_share_the_two_patients():
    for arm in recipe.arms.values():
        task = replace(TASK, **arm.changes)
        known = [p for p in task.labelled_patients if task.is_target(p)]
        assert known == list(TASK.target_patients[:1])


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
@pytest.mark.parametrize("now", [EARLY, LATE])
def test_any_size_and_precision(size, now):
    method = CrossModality(**TINY)
    nets = built(method)
    given = batches(size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(step(method, nets, now, given))
    nets.eval()
    answer = method.predict(nets, given[0].images)
    assert answer.shape == (5, 3, *size) and torch.equal(answer, method.predict(nets, given[0].images))


@pytest.mark.parametrize("groups", [(0,) * 5, (1,) * 5])
@pytest.mark.parametrize("now", [EARLY, LATE])
def test_a_step_of_one_side_alone(groups, now):
    method = CrossModality(**TINY)
    nets = built(method)
    loss = step(method, nets, now, batches(groups=groups))
    loss.backward()
    assert torch.isfinite(loss) and moved(nets)
