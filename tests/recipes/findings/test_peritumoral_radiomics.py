"""Outlines against scikit's clusterings, growing, features of regions, another's surroundings, and classifiers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, optimize
from skimage.feature import graycomatrix, graycoprops
from skimage.filters import threshold_otsu
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestClassifier
from sklearn.mixture import GaussianMixture

from medcook.methods import Batch, Moment
from medcook.recipes.domain_shift import _radiomics as radio
from medcook.recipes.findings import _outlined
from medcook.recipes.findings._nodules import NoduleTask
from medcook.recipes.findings._outlined import SEGMENTERS, described, expanded, outlined
from medcook.recipes.findings.peritumoral_radiomics import (
    ARMS,
    EXPANSIONS,
    GROWN,
    SEGMENTATIONS,
    Peritumoral,
    centre,
    grey_and_truths,
    learnt,
    radiomic_rows,
    recipe,
    with_surroundings,
)
from medcook.sampling import once
from medcook.tasks import Budget
from medcook.training import Loop


def grey(bright: int = 60, dark: int = 140, seed: int = 0) -> np.ndarray:
    """Whole numbers, of two heaps of unlike width that touch."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(40, 12, bright), rng.normal(0, 5, dark)]).round()


def nodules(side: int = 48, count: int = 3, seed: int = 0):
    """Images (N, H, W) of noise with a bright disc each, and the discs (N, H, W) bool."""
    rng, (rows, columns) = np.random.default_rng(seed), np.indices((side, side))
    discs = np.stack([np.hypot(rows - 14 - 6 * k, columns - 20 - 4 * k) <= 4 for k in range(count)])
    return rng.normal(0, 0.2, discs.shape) + 1.5 * discs, discs


@pytest.mark.component("outlines by Otsu, fuzzy C-means, mixture and KNN")
class TestOutlines:
    @pytest.mark.parametrize("seed", range(4))
    def test_otsu_is_scikits(self, seed):
        values = grey(seed=seed)
        assert np.array_equal(_outlined.otsu(values), values > threshold_otsu(values.astype(np.int64)))

    @pytest.mark.parametrize("seed", range(4))
    def test_k_means_is_scikits(self, seed):
        values = grey(seed=seed)
        found = KMeans(2, n_init=5, random_state=0).fit(values[:, None])
        assert np.array_equal(_outlined.k_means(values), found.labels_ == found.cluster_centers_.argmax())

    @pytest.mark.parametrize("seed", range(4))
    def test_fuzzy_centres_minimise_bezdeks_sum(self, seed):
        values = grey(seed=seed)
        centres, u = _outlined.memberships(values)
        lost = lambda c: (1 / (1 / ((values[:, None] - c) ** 2 + 1e-12)).sum(1)).sum()  # noqa: E731
        wanted = optimize.minimize(lost, centres + [2, -3], method="Nelder-Mead", options={"xatol": 1e-6}).x
        np.testing.assert_allclose(centres, wanted, atol=1e-3)
        d = (values[:, None] - centres) ** 2
        np.testing.assert_allclose(u, d[:, 0] / d.sum(1), atol=1e-4)
        assert np.array_equal(_outlined.fuzzy_c_means(values), d[:, 1] < d[:, 0])

    @pytest.mark.parametrize("seed", range(4))
    def test_the_mixture_is_scikits(self, seed):
        values = grey(seed=seed)
        means, u = _outlined.responsibilities(values, tolerance=1e-9)
        found = GaussianMixture(2, tol=1e-9, max_iter=500, random_state=0).fit(values[:, None])
        bright = found.means_[:, 0].argmax()
        np.testing.assert_allclose(np.sort(means), np.sort(found.means_[:, 0]), rtol=0.02, atol=0.1)
        np.testing.assert_allclose(u, found.predict_proba(values[:, None])[:, bright], atol=0.05)
        assert np.array_equal(_outlined.mixture(values), u > 0.5)

    @pytest.mark.parametrize("how", SEGMENTERS)
    def test_only_the_box_of_the_truth_is_looked_at(self, how):
        images, discs = nodules()
        for image, disc in zip(images, discs, strict=True):
            box = np.zeros_like(disc)
            box[ndimage.find_objects(disc.astype(int))[0]] = True
            far = image + 9 * ~expanded(box, 2)
            found = outlined(image, disc, how, 2)
            assert np.array_equal(found, outlined(far, box, how, 2)) and not (found & ~expanded(box, 2)).any()
            assert 2 * (found & disc).sum() / (found.sum() + disc.sum()) > 0.85

    def test_specks_go_unless_nothing_would_be_left(self):
        images, discs = nodules(count=1)
        speck, lone = images[0].copy(), np.zeros((48, 48))
        speck[9, 15] = lone[14, 20] = 3.0
        assert not outlined(speck, discs[0], "otsu", 2)[9, 15]
        assert np.argwhere(outlined(lone, discs[0], "otsu", 2)).tolist() == [[14, 20]]


@pytest.mark.component("peritumoral expansion")
class TestExpansion:
    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_a_grown_outline_holds_all_within_so_many_steps(self, steps):
        disc = nodules()[1][0]
        wanted = ndimage.distance_transform_cdt(~disc, "chessboard") <= steps
        assert np.array_equal(expanded(disc, steps), wanted)

    def test_what_is_described_is_the_nodule_and_its_surroundings(self):
        images, discs = nodules()
        others = [(image, centre(disc)) for image, disc in zip(images, discs, strict=True)]
        for steps, pixels in ((0, 0), (GROWN, 2)):  # images of 48 pixels are half as large
            found = Peritumoral(steps=steps).features(images, discs, others)
            for image, disc, line in zip(images, discs, found, strict=True):
                region = expanded(outlined(image, disc, "otsu", 1), pixels)
                np.testing.assert_allclose(line, described(image, region))
                changed = image.copy()
                changed[~region] += 7
                np.testing.assert_allclose(described(changed, region), line)
                assert line[17] == region.sum()

    def test_the_ablation_lays_anothers_surroundings_around(self, monkeypatch):
        images, discs = nodules()
        at, there = centre(discs[0]), centre(discs[1])
        gained = expanded(discs[0], 3) & ~discs[0]
        found = with_surroundings(images[0], gained, at, images[1], there)
        assert np.array_equal(found[~gained], images[0][~gained])
        moved = np.roll(images[1], (at[0] - there[0], at[1] - there[1]), (0, 1))
        assert np.array_equal(found[gained], moved[gained])
        edge = with_surroundings(images[0], gained, at, images[1], (0, 0))
        assert edge[at[0] - 5, at[1]] == images[1][0, 0]
        monkeypatch.setattr("medcook.recipes.findings.peritumoral_radiomics.outlined", lambda image, truth, *_: truth)
        method, others = Peritumoral(another=True), [(images[1], there)]
        changed = images[:1] + 5 * expanded(discs[0], 2) * ~discs[0]
        same = [method.features(each, discs[:1], others) for each in (images[:1], changed)]
        np.testing.assert_allclose(*same)
        assert not np.allclose(*(Peritumoral().features(each, discs[:1], others) for each in (images[:1], changed)))

    def test_arms_differ_by_the_region_alone(self):
        method, plain, filled = (arm.method for arm in ARMS.values())
        assert (plain.steps, method.steps, filled.steps) == (0, GROWN, GROWN)
        assert replace(plain, steps=GROWN, also=EXPANSIONS) == method == replace(filled, another=False, also=EXPANSIONS)
        assert [recipe.arms[name].method.another for name in recipe.ablation] == [False, True]


class TestFeatures:
    def test_of_a_whole_image_they_are_those_of_radiomics(self):
        image = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((14, 11)), 1)
        image /= image.std()
        found, levels = described(image, np.ones_like(image, bool)), radio.grey_levels(image)
        np.testing.assert_allclose(found[:17], radio.first_order(image, levels))
        np.testing.assert_allclose(found[32:48], radio.sizes(radio.runs(levels), levels.size))
        np.testing.assert_allclose(found[48:], radio.sizes(radio.zones(levels), levels.size))
        assert len(found) == _outlined.COUNT

    def test_cooccurrence_is_scikits(self):
        levels = np.random.default_rng(0).integers(0, 6, (9, 12))
        angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
        matrix = graycomatrix(levels.astype(np.uint8), [1], angles, 6, symmetric=True, normed=True)
        names = ("contrast", "dissimilarity", "homogeneity", "ASM", "entropy", "correlation")
        wanted = [graycoprops(matrix, name).mean() for name in names]
        wanted[4] /= math.log(2)  # in bits
        np.testing.assert_allclose(_outlined.cooccurring(levels)[:6], wanted)

    def test_neighbours_across_a_gap_are_none(self):
        levels = np.array([[0, 0, -1, 1, 1]] * 3)
        assert _outlined.cooccurring(levels)[0] == 0 and _outlined.cooccurring(np.array([[0, 1]]))[0] == 1
        ((level, size),) = _outlined.zones(levels)
        assert level.tolist() == [0, 1] and size.tolist() == [6, 6]
        assert np.isfinite(described(np.ones((3, 3)), np.eye(3, dtype=bool))).all()

    def test_shape_tells_a_disc_from_a_bar_and_a_cross(self):
        rows, columns = np.indices((41, 41)) - 20
        disc, bar = np.hypot(rows, columns) <= 15, (abs(rows) <= 2) & (abs(columns) <= 15)
        cross = bar | bar.T
        area, _, circular, eccentric, long, short, extent, solid = _outlined.shape(disc)
        assert area == pytest.approx(math.pi * 15**2, rel=0.02) and (long, short) == pytest.approx((30, 30), rel=0.03)
        assert circular > 0.9 and eccentric < 0.1 and extent == pytest.approx(math.pi / 4, rel=0.08) and solid > 0.95
        assert _outlined.shape(bar)[3] > 0.95 and _outlined.shape(cross)[7] < 0.6 and _outlined.shape(cross)[2] < 0.5


@pytest.fixture(scope="module")
def runs():
    """{arm: a run}, on few patients."""
    task, found = NoduleTask("embedded", side=48, versions=1, labelled=8), {}
    samples = task.samples("labelled")
    for number, (name, arm) in enumerate(ARMS.items()):
        budget = Budget(steps=2, batch=4, precision="float32", checks=0)
        method = replace(arm.method, trees=20)
        loop = Loop(method, task, budget, "float32", number, samples, None, None, False, accelerator="cpu")
        found[name] = loop.run()
    return found


@pytest.mark.component("classifiers")
class TestClassifiers:
    def test_they_are_fitted_on_training_nodules_and_asked_about_new_ones(self, runs):
        fitted = runs["nodule alone"]
        samples = fitted.task.samples("labelled")
        there = (samples.labels > 0).flatten(1).any(1)
        images, truths = grey_and_truths(samples.images[there], samples.labels[there])
        outcome = (samples.labels[there] == 2).flatten(1).any(1).numpy()
        features = lambda images, truths: np.stack(  # noqa: E731
            [described(image, outlined(image, truth, "otsu", 1)) for image, truth in zip(images, truths, strict=True)]
        )
        seed = int(fitted.nets["model"].seed)
        forest = RandomForestClassifier(20, min_samples_leaf=2, random_state=seed).fit(
            features(images, truths), outcome
        )
        case = next(iter(fitted.task.cases("val")))
        new = features(*grey_and_truths(*fitted.task.preparation.both(case)))
        rows = radiomic_rows(fitted, case)
        assert [row["score"] for row in rows] == pytest.approx(forest.predict_proba(new)[:, 1])
        for name, column in (("logistic", "score_logistic"), ("neighbours", "score_neighbours")):
            line = once(fitted, "learnt", pytest.fail).fitted[name]
            standard = line[0]
            np.testing.assert_allclose(standard.mean_, features(images, truths).mean(0))
            assert [row[column] for row in rows] == pytest.approx(line.predict_proba(new)[:, 1])
        assert {row["outcome"] for row in rows} <= {0.0, 1.0} and len(rows) == len(new)

    def test_each_arm_says_what_it_tried_in_the_same_columns(self, runs):
        case = next(iter(runs["nodule alone"].task.cases("val")))
        rows = {name: radiomic_rows(fitted, case)[0] for name, fitted in runs.items()}
        assert len({tuple(row) for row in rows.values()}) == 1
        tried = {name: {way for way in (*SEGMENTATIONS, *EXPANSIONS) if not math.isnan(row[f"score {way[0]} {way[1]}"])}
                 for name, row in rows.items()}  # fmt: skip
        assert tried == {
            "grown by 4 pixels": set(EXPANSIONS),
            "nodule alone": set(SEGMENTATIONS),
            "another's surroundings": set(),
        }
        assert all(row[f"dice {how}"] > 0.4 for row in rows.values() for how in SEGMENTERS)

    def test_anothers_surroundings_are_of_another_patient(self, runs, monkeypatch):
        fitted, pairs = runs["another's surroundings"], []
        cases = fitted.task.samples("labelled").case_of
        monkeypatch.setattr(Peritumoral, "features", lambda self, images, truths, others, way=None: (
            pairs.append((images, others)) or np.random.default_rng(0).random((len(images), 3))))  # fmt: skip
        known = learnt(fitted)
        (images, others), number = pairs[0], {image.tobytes(): k for k, image in enumerate(pairs[0][0])}
        mine = torch.tensor([number[other.tobytes()] for other, _ in others])
        assert (cases[mine] != cases).all() and len(mine.unique()) == len(images)
        assert known.other("a")[0] is not known.other("b")[0] and known.other("a")[1] == known.other("a")[1]

    def test_every_seed_has_its_own_forest(self):
        seeds = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            nets = Peritumoral().build(1, 3, 2)
            seeds.append(int(nets["model"].seed))
            assert nets["average"].seed == nets["model"].seed
        assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize("side", [32, 48, 96])
def test_the_loss_follows_the_features_at_any_size(side):
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(3, side, side, dtype=torch.uint8)
    labels[:2, 10:18, 12:20] = 2
    data = Batch(torch.randn(3, 1, side, side, generator=rng), labels)
    losses = {}
    for name, arm in ARMS.items():
        torch.manual_seed(0)
        nets = arm.method.build(1, 3, 2)
        loss = arm.method.training_step(nets, data, None, Moment(0, 2))
        loss.backward()
        losses[name] = loss.item()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
        answer = arm.method.predict(nets, data.images)
        assert answer.shape == (3, 3, side, side) and torch.allclose(answer.sum(1), torch.ones(()))
    assert len(set(losses.values())) == 3
