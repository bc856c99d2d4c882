"""A distance in standardised features against closed forms, and what is told from it: another hospital, corruptions."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats
from sklearn.metrics import roc_auc_score
from textures import texture

from medcook.cohorts import meets
from medcook.data import Case
from medcook.domains import shown
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.frozen import FrozenImageNet
from medcook.networks.squeezenet import load_squeezenet
from medcook.recipes.domain_shift import _radiomics as radio
from medcook.recipes.domain_shift import frd as recipes_frd
from medcook.recipes.domain_shift.frd import (
    CORRUPTED,
    Domain,
    InDomainTask,
    Reference,
    domain_rows,
    frd,
    frechet,
    nfrd,
    prepared,
    recipe,
    reference_of,
    stability,
)

KEEP = (("site", "north"),)


def sets(shift: float = 0.0, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((6, 6))
    return tuple(rng.standard_normal((size, 6)) @ mix + k * shift for k in (0, 1))


@pytest.mark.component("standardised radiomic features")
class TestFeatures:
    def test_features_are_in_deviations_over_the_reference(self):
        reference, others = sets(2.0)
        scaled = np.array([1, 1e4, 1e-4, 1, 1, 1])
        constant = np.ones((40, 1))
        known = reference_of(np.hstack([reference * scaled, constant]))
        found = known.standardised(np.hstack([others * scaled, 5 * constant]))
        assert np.allclose(found, (others - reference.mean(0)) / reference.std(0))
        assert frd(reference * scaled, others * scaled) == pytest.approx(frd(reference, others))
        assert frd(reference * scaled, others * scaled, False) != pytest.approx(frd(reference, others, False), abs=1)

    def test_the_ablation_takes_standardisation_away_and_nothing_else(self):
        one, other = (recipe.arms[name] for name in recipe.ablation)
        mine, theirs = asdict(one.method), asdict(other.method)
        assert {key for key in mine if mine[key] != theirs[key]} == {"standardised"}
        features = sets()[0]
        assert np.array_equal(reference_of(features, False).standardised(features), features - features.mean(0))


@pytest.mark.component("filtered versions of the image")
class TestFilters:
    def test_each_version_is_described(self):
        image = texture((16, 16))
        versions = [image, *radio.blobs(image), *radio.wavelets(image)]
        found = radio.radiomics(image)
        assert np.array_equal(found, np.concatenate([radio.features(version) for version in versions]))
        assert len(found) == radio.VERSIONS * radio.COUNT and np.array_equal(radio.radiomics(image, False), found[:76])


@pytest.mark.component("Frechet distance")
class TestDistance:
    def test_it_is_zero_for_equal_sets(self):
        features, _ = sets()
        assert frechet(features, features[::-1]) == pytest.approx(0, abs=1e-9) and frd(features, features) == -np.inf

    def test_of_gaussians_of_one_dimension(self):
        """(difference of means)^2 + (difference of deviations)^2."""
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((50, 1)), 3 * rng.standard_normal((70, 1)) + 2
        expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
        assert frechet(a, b) == pytest.approx(expected)

    def test_it_is_that_of_a_matrix_root(self):
        a, b = sets(1.0)
        b = b @ np.diag([1, 2, 3, 0.5, 1, 1])
        ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
        root = linalg.sqrtm(ca @ cb).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
        assert frechet(a, b) == pytest.approx(expected, rel=1e-6) and frechet(a, b) == pytest.approx(frechet(b, a))

    def test_with_fewer_images_than_features(self):
        a, b = (x[:4] for x in sets(1.0))
        ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
        roots = np.linalg.eigvals(ca @ cb).real.clip(0)
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * np.sqrt(roots).sum()
        assert frechet(a, b) == pytest.approx(expected, rel=1e-5)

    def test_frd_is_its_logarithm(self):
        a, b = sets(3.0)
        standard = [(x - a.mean(0)) / a.std(0) for x in (a, b)]
        assert frd(a, b) == pytest.approx(np.log(np.sqrt(frechet(*standard))))
        assert frd(a, b) < frd(a, b + 5)


@pytest.mark.component("stability at low sample sizes")
def test_stability_is_the_spread_over_random_images():
    a, b = sets(1.0, 60)
    found = stability(a, b, (20, 60), draws=5)
    assert found[60][0] == pytest.approx(frd(a, b)) and found[60][1] == pytest.approx(0, abs=1e-9)
    assert found[20][1] > 0.01 and found == stability(a, b, (20, 60), draws=5)
    rng = np.random.default_rng(0)
    draws = [frd(*(x[rng.choice(60, 20, replace=False)] for x in (a, b))) for _ in range(5)]
    assert found[20] == pytest.approx((np.mean(draws), np.std(draws)))


class Bright(Domain):
    """Describes an image by its mean, alone."""

    def describe(self, images: torch.Tensor) -> np.ndarray:
        return images.mean((1, 2, 3)).double().numpy()[:, None]


def case_of(name: str, value: float, site: str, slices: int = 1) -> Case:
    """Constant slices, of values 1 apart."""
    image = np.full((1, slices, 8, 8), value, np.float32) + np.arange(slices, dtype=np.float32)[:, None, None]
    return Case(image, np.zeros((slices, 8, 8), np.uint8), name, name, attributes={"site": site})


def fitted_with(method: Domain, held: list[Case]) -> SimpleNamespace:
    """In-domain brightness 0, 1, ..., 10, of which mean and deviation are 5 and the root of 10."""
    images = torch.arange(11.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    task = SimpleNamespace(
        keep=KEEP,
        samples=lambda role: SimpleNamespace(images=images),
        cases=lambda role: iter(held),
        preparation=SimpleNamespace(images=lambda case: torch.from_numpy(case.image).transpose(0, 1)),
    )
    return SimpleNamespace(task=task, method=method)


@pytest.mark.component("out-of-domain detection")
class TestDetection:
    def test_a_score_is_the_distance_from_the_mean_in_deviations(self):
        reference, others = sets(1.0)
        known = reference_of(reference)
        expected = [np.sqrt((((x - reference.mean(0)) / reference.std(0)) ** 2).sum()) for x in others]
        assert np.allclose(known.scores(others), expected)
        assert Reference(np.zeros(2), np.array([2.0, 0.0])).scores(np.array([[6.0, 9.0]])).tolist() == [3.0]

    def test_rows_say_how_far_a_case_is_and_where_it_comes_from(self):
        held = [case_of("a", 6, "north"), case_of("b", 20, "south", slices=3), case_of("c", 5, "north")]
        fitted = fitted_with(Bright(), held)
        here, there, middle = (domain_rows(fitted, case)[0] for case in held)
        unit = np.sqrt(10)
        assert here["score"] == pytest.approx(1 / unit) and middle["score"] == 0
        assert there["score"] == pytest.approx((15 + 16 + 17) / 3 / unit)
        assert [row["outcome"] for row in (here, there, middle)] == [0, 1, 0]
        scores = abs(np.arange(11) - 5) / unit
        threshold = stats.norm.ppf(0.95, scores.mean(), scores.std())
        assert prepared(fitted)[1] == pytest.approx(threshold, rel=1e-4)
        assert [row["alarm"] for row in (here, there, middle)] == [0, 1, 0]

    def test_an_alarm_is_a_score_above_the_threshold(self):
        threshold = prepared(fitted_with(Bright(), []))[1]
        for share, alarm in ((0.99, 0), (1.01, 1)):
            case = case_of("a", 5 + share * threshold * np.sqrt(10), "north")
            assert domain_rows(fitted_with(Bright(), [case]), case)[0]["alarm"] == alarm

    def test_a_run_knows_how_far_the_held_out_sets_are(self):
        held = [case_of(str(k), k, "north") for k in (2, 5)] + [case_of(str(k), k, "south") for k in (20, 23, 31)]
        fitted = fitted_with(Bright(), held)
        row = domain_rows(fitted, held[0])[0]
        known = np.arange(11.0)[:, None]
        assert row["frd_in"] == pytest.approx(frd(known, np.array([[2.0], [5.0]])))
        assert row["frd_out"] == pytest.approx(frd(known, np.array([[20.0], [23.0], [31.0]])))
        assert np.isnan(domain_rows(fitted_with(Bright(), held[:2]), held[0])[0]["frd_out"])

    def test_nfrd_is_how_well_single_images_are_told_apart(self):
        a, b = sets(1.0)
        scores = np.concatenate([reference_of(a).scores(x) for x in (a, b)])
        expected = 2 * abs(roc_auc_score([0] * 40 + [1] * 40, scores) - 0.5)
        assert nfrd(a, b) == pytest.approx(expected) and nfrd(a, a) == 0 and nfrd(a, b + 100) == 1

    def test_the_reference_is_of_one_site_and_everybody_is_scored(self):
        task = InDomainTask("embedded", keep=KEEP, fold=0)
        site = lambda p: task.data.attributes(task.data.patients[p][0])["site"]  # noqa: E731
        assert {site(p) for p in task.labelled_patients} == {"north"}
        assert len({site(p) for p in task.val_patients}) > 1
        plain = InDomainTask("embedded", fold=0)
        assert task.val_patients == plain.val_patients and not set(task.val_patients) & set(plain.labelled_patients)
        assert task.samples("labelled").images.shape[1:] == (1, 80, 80)
        assert task.data.split.test and not set(task.data.split.test) & {*task.val_patients, *task.labelled_patients}

    def test_radiomics_tell_another_scanner(self):
        """The whole recipe in small: textures that are smooth, and textures that are not."""
        rng = np.random.default_rng(0)
        make = lambda sigma, k: ndimage.gaussian_filter(rng.standard_normal((k, 24, 24)), (0, sigma, sigma))  # noqa: E731
        unit = lambda x: (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)  # noqa: E731
        seen = [torch.from_numpy(unit(make(s, k))).float()[:, None] for s, k in ((1.0, 20), (1.0, 10), (1.4, 10))]
        known, inside, outside = (Domain(filtered=False).describe(images) for images in seen)
        scores = reference_of(known).scores(np.concatenate([inside, outside]))
        assert roc_auc_score([0] * 10 + [1] * 10, scores) > 0.9
        assert frd(known, inside) < frd(known, outside)


@pytest.mark.component("sensitivity to image corruptions")
class TestCorruptions:
    @pytest.mark.parametrize("guilty", list(CORRUPTED))
    def test_corrupted_images_of_the_hospital_raise_an_alarm(self, monkeypatch, guilty):
        """One corruption makes images far brighter, the others leave them as they are."""
        seen = []

        def corrupted(images, look, rng):
            seen.append((look, rng.standard_normal()))
            return images + 100 * (look is CORRUPTED[guilty])

        monkeypatch.setattr(recipes_frd, "shown", corrupted)
        held = [case_of("a", 6, "north"), case_of("b", 20, "south")]
        fitted = fitted_with(Bright(), held)
        here, there = (domain_rows(fitted, case)[0] for case in held)
        assert {name: here[name] for name in CORRUPTED} == {name: float(name == guilty) for name in CORRUPTED}
        assert all(np.isnan(there[name]) for name in CORRUPTED) and here["alarm"] == 0
        first = seen[: len(CORRUPTED)]
        domain_rows(fitted, held[0])
        assert seen[-len(CORRUPTED) :] == first and len({number for _, number in first}) == len(CORRUPTED)

    def test_they_are_mild(self):
        image = torch.from_numpy(texture((32, 32))).float()[None, None]
        for look in CORRUPTED.values():
            other = shown(image, look, np.random.default_rng(0))
            assert 0.97 < np.corrcoef(image.ravel(), other.ravel())[0, 1] < 1


class TestMethod:
    def test_imagenet_features_are_those_of_the_book_s_frozen_network(self, mirror):
        images = torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
        nets = {"encoder": load_squeezenet()}
        expected = FrozenImageNet().embed(nets, images)
        assert np.allclose(Domain(features="imagenet").describe(images), expected, atol=1e-4)

    def test_an_image_is_described_once_and_each_kind_by_itself(self, monkeypatch):
        images = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(3))
        first = Domain().describe(images)
        assert first.shape == (2, Domain().size()) and Domain(filtered=False).describe(images).shape == (2, 76)
        assert np.array_equal(first[0], radio.radiomics(images[0, 0].numpy()))
        monkeypatch.setattr(radio, "radiomics", lambda *_: pytest.fail("looked at again"))
        assert np.array_equal(Domain().describe(images.flip(0)), first[::-1])

    @pytest.mark.parametrize("arm", list(recipe.arms))
    @pytest.mark.parametrize("size", [(33, 47), (32, 32)])
    def test_any_size_and_a_loss_that_shows_the_features(self, arm, size):
        method = recipe.arms[arm].method
        if method.features == "imagenet":  # whose weights are not on every machine
            method = replace(method, features="random")
        nets = method.build(1, 3, 2)
        images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
        batch = Batch(images, torch.zeros(2, *size).byte())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method.training_step(nets, method.augment(batch, torch.Generator()), None, Moment(0, 4))
            answer = method.predict(nets, images)
        loss.backward()
        assert loss.item() == pytest.approx((np.arcsinh(method.describe(images)) ** 2).mean(), rel=1e-4)
        assert 0 < nets["model"].point.grad.abs().max() < torch.inf
        assert answer.shape == (2, 3, *size) and torch.allclose(answer.sum(1), torch.ones(2, *size))

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="not volumes"):
            Domain().build(1, 2, 3)

    def test_every_arm_but_the_claim_s_has_one_switch_more(self):
        task = recipe.scales["full"].task
        assert meets({"site": "Shenzhen"}, task.keep) and not meets({"site": "Montgomery"}, task.keep)
        assert recipe.arms["without filters"].method == replace(Domain(), filtered=False)
        assert recipe.arms["ImageNet features"].method == Domain(features="imagenet", standardised=False)
