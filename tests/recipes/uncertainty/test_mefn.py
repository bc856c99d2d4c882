"""MEFN: opinions, Dempster's rule against a brute-force one, the losses against closed forms, and the spoilt cohort."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import special
from torch.distributions import Dirichlet, kl_divergence

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.uncertainty import mefn
from medcook.recipes.uncertainty._contrasts import STATES, ContrastTask, spoilt
from medcook.recipes.uncertainty.mefn import (
    MEFN,
    Calibrator,
    EarlyFusion,
    MeanOfTwo,
    credibility,
    dempster,
    evidence_of,
    evidential_loss,
    fused,
    kl_from_uniform,
    one_in_four,
    opinion,
)

TINY = dict(channels=(4, 8))
MIDDLE = Moment(5, 10)


def some_evidence(*, classes: int = 3, size: tuple[int, ...] = (4, 4), high: float = 10.0) -> torch.Tensor:
    return torch.rand(2, classes, *size) * high


def batch(channels: int = 2) -> Batch:
    labels = torch.randint(0, 3, (2, 16, 16)).byte()
    return Batch(labels[:, None] + torch.randn(2, channels, 16, 16), labels)


@pytest.mark.component("evidence of each modality")
class TestOpinion:
    def test_beliefs_and_uncertainty_sum_to_one(self):
        belief, uncertainty = opinion(some_evidence())
        assert torch.allclose(belief.sum(1, keepdim=True) + uncertainty, torch.ones(2, 1, 4, 4))

    def test_no_evidence_is_no_knowledge_and_much_is_much(self):
        belief, uncertainty = opinion(torch.zeros(1, 4, 2, 2))
        assert (uncertainty == 1).all() and (belief == 0).all()
        assert opinion(torch.full((1, 4, 2, 2), 999.0))[1].max() == pytest.approx(1 / 1000)

    def test_evidence_comes_back(self):
        evidence = some_evidence()
        assert torch.allclose(evidence_of(*opinion(evidence)), evidence, atol=1e-4)

    def test_every_modality_has_a_network_that_sees_it_alone(self):
        model = MEFN(**TINY).build(2, 3, 2)["model"].eval()
        images = torch.randn(1, 2, 16, 16)
        changed = images.clone()
        changed[:, 1] += 1
        (first, second), (again, other) = model(images)[0], model(changed)[0]
        assert torch.equal(first, again) and not torch.equal(second, other)
        assert min(first.min(), second.min()) > 0

    def test_what_is_predicted_is_the_mean_of_the_dirichlet(self):
        method = MEFN(**TINY)
        nets = method.build(2, 3, 2).eval()
        images = torch.randn(2, 2, 16, 16)
        alpha = method.evidence(nets, images) + 1
        expected = Dirichlet(alpha.movedim(1, -1)).mean.movedim(-1, 1)
        assert torch.allclose(method.predict(nets, images), expected, atol=1e-6)
        assert torch.allclose(method.doubt(nets, images), 3 / alpha.sum(1), atol=1e-6)


def by_brute_force(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dempster's rule on masses of all focal sets: singletons {k} and the frame, the last entry."""
    classes = len(first) - 1
    sets = [frozenset({k}) for k in range(classes)] + [frozenset(range(classes))]
    masses = dict.fromkeys(sets, 0.0)
    for (a, x), (b, y) in product(zip(sets, first, strict=True), zip(sets, second, strict=True)):
        if a & b:
            masses[a & b] += x * y
    return np.array([masses[each] for each in sets]) / sum(masses.values())


@pytest.mark.component("Dempster-Shafer fusion")
class TestDempster:
    def masses(self, joint: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        return torch.cat(joint, dim=1).movedim(1, -1).reshape(-1, joint[0].shape[1] + 1).numpy()

    @pytest.mark.parametrize("classes", [2, 4])
    def test_it_is_dempsters_rule(self, classes):
        one, other = (opinion(some_evidence(classes=classes, size=(3,)).double()) for _ in range(2))
        wanted = [by_brute_force(a, b) for a, b in zip(self.masses(one), self.masses(other), strict=True)]
        assert np.allclose(self.masses(dempster(one, other)), wanted, atol=1e-9)

    def test_masses_still_sum_to_one(self):
        assert np.allclose(self.masses(dempster(opinion(some_evidence()), opinion(some_evidence()))).sum(1), 1)

    def test_order_does_not_matter(self):
        evidences = [some_evidence() for _ in range(3)]
        for order in ([1, 0, 2], [2, 1, 0]):
            assert torch.allclose(fused(evidences), fused([evidences[k] for k in order]), rtol=1e-3)

    def test_who_knows_nothing_has_no_say(self):
        evidence = some_evidence()
        assert torch.allclose(fused([evidence, torch.zeros_like(evidence)]), evidence, rtol=1e-4)
        assert torch.allclose(fused([evidence]), evidence, rtol=1e-4)

    def test_agreement_makes_surer_and_the_surer_one_wins_a_conflict(self):
        first, same, against = (torch.tensor(e).view(1, 2, 1) for e in ([8.0, 0.0], [6.0, 0.0], [0.0, 1.0]))
        assert opinion(fused([first, same]))[1] < opinion(first)[1]
        assert fused([first, against])[0, :, 0].argmax() == 0

    def test_total_conflict_stays_finite(self):
        sure = torch.tensor([1e9, 0.0]).view(1, 2, 1)
        assert torch.isfinite(fused([sure, sure.flip(1)])).all()

    def test_the_ablation_takes_the_mean(self):
        evidences = [some_evidence(), some_evidence()]
        assert torch.allclose(fused(evidences, "mean"), sum(evidences) / 2)
        method, images = MEFN(**TINY), torch.randn(1, 2, 16, 16)
        nets = method.build(2, 3, 2).eval()
        assert not torch.allclose(method.predict(nets, images), MEFN(**TINY, rule="mean").predict(nets, images))


@pytest.mark.component("uncertainty calibrator")
class TestCalibrator:
    def test_nothing_is_taken_from_a_modality_that_knows_nothing(self):
        calibrator, features = Calibrator(4, 2), [torch.randn(1, 4, 3, 3) for _ in range(2)]
        torch.nn.init.zeros_(calibrator.offer.bias)
        sure, unsure = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
        first, second = calibrator(features, [sure, unsure])
        assert torch.allclose(first, features[0])
        assert torch.allclose(second, calibrator.taken(torch.zeros_like(features[1]), features[0]))

    def test_more_is_taken_the_more_is_known(self):
        calibrator, features = Calibrator(4, 2), [torch.randn(1, 4, 3, 3) for _ in range(2)]
        sure = torch.zeros(1, 1, 3, 3)
        taken = [calibrator(features, [sure, sure + u])[0] - features[0] for u in (0.9, 0.0)]
        offered = [calibrator.offer(features[1] * (1 - u)) for u in (0.9, 0.0)]
        assert (taken[1].abs() <= offered[1].abs() + 1e-6).all(), "the gate lets through a share"
        assert taken[1].abs().mean() > taken[0].abs().mean()

    def test_uncertainty_is_measured_and_not_learned_here(self):
        model = MEFN(**TINY).build(2, 3, 2)["model"]
        sum(each.sum() for each in model(torch.randn(1, 2, 16, 16))[1]).backward()
        assert all(branch.head.weight.grad is None for branch in model.branches)
        assert all(head.weight.grad.abs().max() > 0 for head in model.heads)

    def test_one_modality_hears_itself_alone(self):
        features = torch.randn(1, 4, 3, 3)
        (heard,) = Calibrator(4, 2)([features], [torch.full((1, 1, 3, 3), 0.25)])
        assert torch.allclose(heard, 0.75 * features)

    def test_without_it_modalities_do_not_meet_before_the_fusion(self):
        model = MEFN(**TINY).build(2, 3, 2)["model"].eval()
        alone, heard = model(torch.randn(1, 2, 16, 16), calibrate=False)
        assert all(a is b for a, b in zip(alone, heard, strict=True))


@pytest.mark.component("uncertainty perceptual loss")
class TestLoss:
    def test_divergence_is_that_of_dirichlet_distributions(self):
        alpha = some_evidence() + 1
        wanted = kl_divergence(Dirichlet(alpha.movedim(1, -1)), Dirichlet(torch.ones(3)))
        assert torch.allclose(kl_from_uniform(alpha)[:, 0], wanted, atol=1e-4)
        assert kl_from_uniform(torch.ones(1, 3, 1)).item() == pytest.approx(0, abs=1e-6)

    def test_surprise_is_the_mean_cross_entropy_under_the_dirichlet_and_uncertain_voxels_count_more(self):
        evidence, labels = some_evidence(size=(5,)), torch.randint(0, 3, (2, 5)).byte()
        alpha = (evidence + 1).double().movedim(1, -1).reshape(-1, 3).numpy()
        true = alpha[np.arange(10), labels.flatten().numpy()]
        surprise = special.digamma(alpha.sum(1)) - special.digamma(true)
        wanted = ((1 + 3 / alpha.sum(1)) * surprise).mean()
        assert evidential_loss(evidence, labels, 0.0).item() == pytest.approx(wanted, rel=1e-4)

    def test_it_cannot_be_lowered_by_being_certain_of_the_weight(self):
        """The weight is held fixed: the gradient is that of the surprise alone, times the weight."""
        evidence = torch.tensor([2.0, 1.0]).view(1, 2, 1).requires_grad_()
        evidential_loss(evidence, torch.zeros(1, 1).byte(), 0.0).backward()
        weight, trigamma = 1 + 2 / 5, special.polygamma(1, [5, 3])
        wanted = weight * np.array([trigamma[0] - trigamma[1], trigamma[0]])
        assert np.allclose(evidence.grad[0, :, 0].numpy(), wanted, atol=1e-5)

    def test_evidence_for_wrong_classes_is_punished_and_for_the_true_one_it_is_not(self):
        labels = torch.zeros(1, 1).byte()

        def penalty(evidence: list[float]) -> float:
            each = torch.tensor(evidence).view(1, 3, 1)
            return (evidential_loss(each, labels, 1.0) - evidential_loss(each, labels, 0.0)).item()

        assert penalty([9.0, 0.0, 0.0]) == pytest.approx(0, abs=1e-5)
        assert penalty([9.0, 5.0, 0.0]) > penalty([9.0, 1.0, 0.0]) > 0.01

    def test_unlabelled_voxels_do_not_count(self):
        evidence, labels = some_evidence(), torch.randint(0, 3, (2, 4, 4)).byte()
        half = labels.clone()
        half[1] = IGNORE
        assert evidential_loss(evidence, half, 0.1).item() == pytest.approx(
            evidential_loss(evidence[:1], labels[:1], 0.1).item(), rel=1e-5
        )
        assert evidential_loss(evidence, torch.full_like(labels, IGNORE), 0.1).item() == 0

    def test_a_quarter_of_the_voxels_is_looked_at_and_each_of_them_sometimes(self):
        labels = torch.arange(32).view(2, 4, 4)
        seen = set()
        for _ in range(40):
            evidence, chosen = one_in_four(labels[:, None].float(), labels)
            assert torch.equal(evidence[:, 0].long(), chosen) and chosen.numel() == 8
            seen |= set(chosen.flatten().tolist())
        assert seen == set(range(32))

    def test_fused_and_single_opinions_are_all_trained(self, monkeypatch):
        method, counted = MEFN(**TINY), []
        nets = method.build(2, 3, 2)
        monkeypatch.setattr(MEFN, "loss_of", lambda self, e, labels, now: counted.append(e) or e.mean())
        method.training_step(nets, batch(), None, MIDDLE).backward()
        assert len(counted) == 3
        parts = [nets["model"].branches[0].head, nets["model"].branches[1].head, *nets["model"].heads]
        assert all(part.weight.grad.abs().max() > 0 for part in parts)


class TestOtherArms:
    def test_the_mean_of_two_is_a_mean_of_networks_that_never_meet(self):
        method = MeanOfTwo(**TINY)
        nets, images = method.build(2, 3, 2).eval(), torch.randn(1, 2, 16, 16)
        each = [net(images[:, k : k + 1]).softmax(1) for k, net in enumerate(nets["average"])]
        assert torch.allclose(method.predict(nets, images), sum(each) / 2, atol=1e-6)

    def test_entropy_is_zero_to_one(self):
        method = EarlyFusion(**TINY)
        method.predict = lambda nets, images: images
        sure, unsure = torch.tensor([1.0, 0, 0]), torch.full((3,), 1 / 3)
        assert method.doubt(None, torch.stack([sure, unsure])[..., None]).flatten().tolist() == pytest.approx([0, 1])

    @pytest.mark.parametrize("method", [EarlyFusion(**TINY), MeanOfTwo(**TINY), MEFN(**TINY)])
    def test_every_arm_learns_from_two_contrasts(self, method):
        nets = method.build(2, 3, 2)
        method.training_step(nets, batch(), None, MIDDLE).backward()
        assert sum(p.grad is not None for p in nets["model"].parameters()) > 10
        assert method.doubt(nets.eval(), batch().images).shape == (2, 16, 16)


class TestCohort:
    task = ContrastTask("embedded")

    def case(self, number: int, state: str):
        patient = self.task.data.split.train[number]
        return self.task.data.load(f"{patient} {state}")

    def test_every_patient_is_three_cases_on_one_side_of_the_split(self):
        data = self.task.data
        assert len(data.index()) == 3 * len(data.patients) == 120
        assert all([data.attributes(c)["spoilt"] for c in cases] == list(STATES) for cases in data.patients.values())

    def test_the_named_contrast_is_spoilt_and_the_other_is_not(self):
        good, first, second = (self.case(0, state) for state in STATES)
        assert good.image.shape == (2, 8, 96, 96)
        assert np.array_equal(good.image[1], first.image[1]) and np.array_equal(good.image[0], second.image[0])
        assert not np.array_equal(good.image[0], first.image[0]) and not np.array_equal(good.image[1], second.image[1])
        assert np.array_equal(good.label, first.label)

    def test_it_is_the_same_every_time(self):
        assert np.array_equal(self.case(1, "T1 spoilt").image, self.case(1, "T1 spoilt").image)

    def test_test_patients_stay_behind_their_door(self):
        with pytest.raises(MedcookError, match="test case"):
            self.task.data.load(f"{self.task.data.split.test[0]} both good")

    def test_each_contrast_is_normalised_on_its_own(self):
        images = self.task.preparation.images(self.case(0, "both good"))
        assert images.shape == (8, 2, 64, 64)
        assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3

    @pytest.mark.parametrize("kind", range(4))
    def test_every_kind_of_damage_changes_the_image(self, kind):
        class Chosen(np.random.Generator):
            def integers(self, *args, **settings):
                return kind if args == (4,) else super().integers(*args, **settings)

        image = self.case(0, "both good").image[0]
        damaged = spoilt(image, Chosen(np.random.PCG64(0)))
        assert damaged.shape == image.shape and damaged.dtype == np.float32 and np.isfinite(damaged).all()
        assert np.corrcoef(image.ravel(), damaged.ravel())[0, 1] < 0.99

    def test_a_row_has_error_uncertainty_and_the_state(self):
        case, method = self.case(0, "T2 spoilt"), MEFN(**TINY)
        fitted = SimpleNamespace(
            method=method, nets=method.build(2, 4, 2).eval(), task=self.task, predict=lambda case: case.label
        )
        (row,) = credibility(fitted, case)
        assert row["structure"] == "T2 spoilt" and row["dice"] == 1 and row["error"] == 0 and 0 < row["uncertainty"] < 1


def test_the_recipe_says_that_its_data_are_simulated():
    from medcook.evidence import data_kind

    assert data_kind(mefn.recipe.scales["full"].task) == "simulated"
