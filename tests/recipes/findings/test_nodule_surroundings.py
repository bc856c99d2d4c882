"""Nodules and what is around them: where they are drawn, what is found in the image, and what is measured."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage, stats
from skimage.filters import sato
from sklearn.linear_model import LogisticRegression

from medcook.methods import Batch, Moment
from medcook.pooled import auc
from medcook.recipes.findings import _surroundings, nodule_surroundings
from medcook.recipes.findings._nodules import BENIGN, MALIGNANT
from medcook.recipes.findings._ridges import SIGMAS, ridges, without
from medcook.recipes.findings._surroundings import (
    NEAR,
    ODDS,
    Tree,
    brightness,
    chance,
    grown,
    hila,
    placed,
    with_surroundings,
)
from medcook.recipes.findings.nodule_surroundings import (
    ARMS,
    FAR,
    METHOD,
    NAMES,
    Surroundings,
    association,
    associations,
    away,
    measured,
    reaching,
    recipe,
    surroundings_rows,
)
from medcook.training import Fitted

SIDE = 96


def lungs() -> np.ndarray:
    """(96, 96) bool: two ellipses."""
    rows, columns = np.indices((SIDE, SIDE))
    return np.any([((rows - 48) / 36) ** 2 + ((columns - middle) / 17) ** 2 < 1 for middle in (26, 70)], axis=0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(lines: tuple[int, ...] = (), bright: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image (1, 96, 96) with a nodule of radius 4 at (48, 26) and lines along these columns, lungs, nodule."""
    rows, columns = np.indices((SIDE, SIDE))
    disc = np.hypot(rows - 48, columns - 26) <= 4
    image = 1.2 * disc + sum(bright * np.exp(-(((columns - line) / 1.2) ** 2)) for line in lines) + np.zeros(disc.shape)
    parts = (image.astype(np.float32), lungs(), disc)
    return tuple(torch.from_numpy(part)[None] for part in parts)


def measures(*lines: int, bright: float = 1.0, **settings) -> dict[str, float]:
    return dict(zip(NAMES, measured(*scene(lines, bright), **settings)[0].tolist(), strict=True))


class TestDrawing:
    def test_each_lung_has_a_tree_that_begins_at_its_inner_edge(self):
        roots = hila(lungs())
        assert [root.tolist() for root, _ in roots] == [[48, 42], [48, 54]] and [out for _, out in roots] == [-1, 1]
        for structure in ODDS:
            tree = grown(lungs(), structure, rng())
            middle = tree.distance == 0
            assert middle[:, :48].sum() > 20 and middle[:, 48:].sum() > 20 and not (middle & ~lungs()).any()
            assert all(tree.distance[tuple(root.astype(int))] <= 1 for root, _ in roots)
        nothing = grown(np.zeros((SIDE, SIDE), bool), "vessels", rng())
        assert np.isinf(nothing.distance).all() and not brightness(nothing, "vessels").any()

    def test_vessels_are_bright_and_airways_dark_between_bright_walls(self):
        tree = Tree(np.arange(8.0)[None], np.ones((1, 8)))
        assert brightness(tree, "vessels")[0, 0] == 1 and brightness(tree, "vessels")[0, 4] < 0.01
        airway = brightness(tree, "airways")[0]
        assert airway[0] < -0.95 and airway[2] > 0.3 and abs(airway[5]) < 0.01

    def test_malignant_nodules_lie_near_by_the_odds(self):
        """Of many nodules in one chest, against the odds ratio that was meant."""
        chest, trees = lungs(), {name: grown(lungs(), name, rng(3)) for name in ODDS}
        for name in ODDS:
            odds = {kind: chance(kind, name) / (1 - chance(kind, name)) for kind in (BENIGN, MALIGNANT)}
            assert odds[MALIGNANT] / odds[BENIGN] == pytest.approx(ODDS[name]) and sum(
                chance(kind, name) for kind in odds
            ) == pytest.approx(1)
            some, near = rng(4), {}
            for kind in (BENIGN, MALIGNANT):
                spots = [placed(kind, chest, {name: trees[name]}, some) for _ in range(400)]
                near[kind] = np.mean([trees[name].distance[spot] <= NEAR[name] for spot in spots])
                assert near[kind] == pytest.approx(chance(kind, name), abs=0.08)

    def test_benign_and_malignant_nodules_look_the_same(self, monkeypatch):
        """With the same place the images are equal, whatever the nodule is called."""
        monkeypatch.setattr(_surroundings, "placed", lambda kind, cells, trees, rng: (40, 30))
        found = {}
        for kind in (BENIGN, MALIGNANT):
            monkeypatch.setattr(_surroundings, "MALIGNANT", kind), monkeypatch.setattr(_surroundings, "BENIGN", kind)
            monkeypatch.setattr(_surroundings, "nodule", lambda given, *rest: TRUE_NODULE(BENIGN, *rest))
            found[kind] = with_surroundings(np.zeros((SIDE, SIDE)), lungs(), rng(5))
        assert np.array_equal(found[BENIGN][0], found[MALIGNANT][0])
        assert found[BENIGN][1].max() == BENIGN and found[MALIGNANT][1].max() == MALIGNANT

    def test_images_come_with_their_lungs(self):
        task = Surroundings.trial
        images, labels = task.preparation.both(next(iter(task.cases("val"))))
        assert images.shape[1:] == (2, 48, 48) and set(images[:, 1].unique().tolist()) == {0, 1}
        assert (images[:, 1][labels > 0] == 1).float().mean() > 0.6


TRUE_NODULE = _surroundings.nodule


class TestFinding:
    @pytest.mark.parametrize("bright", [True, False])
    def test_ridges_are_satos(self, bright):
        image = ndimage.gaussian_filter(rng().normal(size=(SIDE, SIDE)), 1) * 5
        wanted = sato(image, sigmas=SIGMAS, black_ridges=not bright, mode="nearest")
        found = ridges(torch.from_numpy(image)[None].float(), bright)[0].numpy()
        inside = (slice(8, -8), slice(8, -8))
        assert np.corrcoef(found[inside].ravel(), wanted[inside].ravel())[0, 1] > 0.99
        np.testing.assert_allclose(found[inside], wanted[inside], atol=0.05 * wanted.max())

    def test_a_line_is_found_whichever_way_it_runs_and_its_opposite_is_not(self):
        rows, columns = np.indices((64, 64))
        for angle in (0, 30, 45, 90, 120):
            across = (rows - 32) * np.cos(np.deg2rad(angle)) + (columns - 32) * np.sin(np.deg2rad(angle))
            line = torch.from_numpy(np.exp(-((across / 1.2) ** 2)))[None].float()
            assert ridges(line, True)[0, 32, 32] > 0.3 and ridges(line, False)[0, 32, 32] < 0.01
            assert ridges(-line, False)[0, 32, 32] > 0.3 and ridges(torch.ones(1, 64, 64), True).max() < 1e-5

    def test_a_nodule_leaves_no_ridge_where_it_was(self):
        image, _, nodule = scene()
        flat = without(image + 3, torch.from_numpy(ndimage.binary_dilation(nodule[0].numpy(), iterations=2))[None])
        assert (flat - 3).abs().max() < 0.05 and ridges(flat, True).max() < 0.02
        assert ridges(image, False).max() > 0.1


@pytest.mark.component("distances, counts and normalised volumes")
class TestMeasures:
    def test_the_distance_is_that_of_the_nearest_pixels(self):
        structure, place = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
        structure[3, 4] = structure[18, 18] = place[6:9, 8:10] = True
        wanted = min(np.hypot(y - 3, x - 4) for y, x in np.argwhere(place))
        assert away(structure, place, 1.0) == pytest.approx(wanted) == 2 * away(structure, place, 2.0)
        assert away(np.zeros((20, 20), bool), place, 1.0) == FAR == away(structure, np.zeros((20, 20), bool), 1.0)

    def test_the_pleura_is_the_edge_of_the_lung(self):
        image, chest, nodule = scene()
        edge = np.argwhere(~chest[0].numpy())
        wanted = min(np.hypot(*(spot - edge).T).min() for spot in np.argwhere(nodule[0].numpy()))
        assert measures()["pleura distance"] == pytest.approx(wanted)

    def test_parts_that_touch_are_counted_and_others_are_not(self):
        near, core = np.zeros((15, 15), bool), np.zeros((15, 15), bool)
        core[5:10, 5:10] = near[7, 10:13] = near[2:5, 7] = near[10, 10] = near[13, 2:5] = True
        assert reaching(near, core) == 3 and reaching(np.zeros((15, 15), bool), core) == 0

    def test_a_vessel_near_the_nodule_is_nearer_and_fills_more_than_one_far_away(self):
        near, far, none = measures(34), measures(40), measures()
        assert near["vessels distance"] < far["vessels distance"] < none["vessels distance"] == FAR
        assert near["vessels volume"] > far["vessels volume"] >= none["vessels volume"] == 0
        assert near["vessels distance"] == pytest.approx(34 - 30, abs=1.5)

    def test_a_vessel_through_the_nodule_reaches_it_from_both_sides(self):
        assert measures(26)["vessels count"] == 2 and measures()["vessels count"] == 0
        assert measures(26, bright=-1.0)["airways count"] >= 2 and measures(26, bright=-1.0)["airways distance"] < 4

    def test_the_volume_is_a_share_of_the_ring_within_the_lungs(self):
        image, chest, nodule = scene((34,))
        covered = ndimage.binary_dilation(nodule[0].numpy(), np.ones((5, 5)))
        ring = ndimage.binary_dilation(covered, np.ones((11, 11))) & ~covered & chest[0].numpy()
        filled = without(image, torch.from_numpy(covered)[None])
        found = (ridges(filled, True)[0] > nodule_surroundings.CUT).numpy()
        assert measures(34)["vessels volume"] == pytest.approx((found & ring).sum() / ring.sum())

    def test_sizes_scale_with_the_image(self):
        rows, columns = np.indices((48, 48))
        disc = np.hypot(rows - 24, columns - 13) <= 2
        image = 1.2 * disc + np.exp(-(((columns - 17) / 0.6) ** 2))
        small = measured(*(torch.from_numpy(x)[None] for x in (image.astype(np.float32), lungs()[::2, ::2], disc)))
        found = dict(zip(NAMES, small[0].tolist(), strict=True))
        assert found["vessels distance"] == pytest.approx(measures(34)["vessels distance"], abs=2)

    def test_the_ablation_measures_around_the_mirror_image(self):
        image, chest, nodule = scene((70,))
        images, labels = torch.stack([image, chest.float()], dim=1), nodule.byte() * MALIGNANT
        there, mirrored = (replace(METHOD, mirrored=mirror).around(images, labels)[0] for mirror in (False, True))
        wanted = measured(image, chest, nodule, nodule.flip(2))[0, METHOD.chosen]
        assert torch.equal(mirrored, wanted) and mirrored[0] < 5 and there[0] == FAR
        assert replace(ARMS[recipe.ablation[1]], mirrored=False) == ARMS[recipe.ablation[0]] == METHOD


@pytest.mark.component("odds ratio and chi-square")
class TestAssociation:
    def test_they_are_scipys(self):
        some = rng(1)
        fact, outcome = some.random(200) < 0.4, some.random(200) < 0.5
        outcome |= fact & (some.random(200) < 0.5)
        table = np.array([[(f & o).sum() for o in (outcome, ~outcome)] for f in (fact, ~fact)])
        found, wanted = association(fact, outcome), stats.chi2_contingency(table, correction=False)
        assert found.odds == pytest.approx(stats.contingency.odds_ratio(table, kind="sample").statistic)
        assert (found.chi2, found.p) == pytest.approx((wanted.statistic, wanted.pvalue))

    def test_an_empty_cell_gives_finite_odds(self):
        fact = np.array([True] * 5 + [False] * 5)
        found = association(fact, fact)
        assert found.odds == pytest.approx(5.5 * 5.5 / 0.25) and found.chi2 == pytest.approx(10)

    def test_near_and_many_are_what_is_asked(self):
        outcome = np.array([1.0, 1, 1, 0, 0, 0])
        frame = pd.DataFrame({name.replace(" ", "_"): [1.0, 2, 3, 4, 5, 6] for name in NAMES}).assign(outcome=outcome)
        found = associations(frame)
        assert found.loc["vessels distance", "odds"] > 1 > found.loc["vessels count", "odds"]
        assert found.loc["pleura distance", ["benign", "malignant"]].tolist() == [5, 2]


@pytest.mark.component("logistic regression with ROC analysis")
class TestRegression:
    def test_it_finds_what_scikit_learn_finds(self, monkeypatch):
        some = torch.Generator().manual_seed(0)
        x = torch.randn(200, 3, generator=some) * torch.tensor([1.0, 5.0, 0.2]) + 3
        odds = (x[:, 0] - 3) * 1.5 - (x[:, 1] - 3) * 0.2
        outcome = torch.rand(200, generator=some) < odds.sigmoid()
        labels = (1 + outcome.byte())[:, None, None].expand(-1, 4, 4)
        monkeypatch.setattr(Surroundings, "around", lambda self, images, labels: images[:, :, 0, 0])
        images = x[:, :, None, None].expand(-1, -1, 4, 4)
        torch.manual_seed(0)
        nets = METHOD.build(2, 3, 2).train()
        optimiser, schedule = METHOD.optimise(list(nets["model"].parameters()), 100)
        for step in range(100):
            loss = METHOD.training_step(nets, Batch(images, labels), None, Moment(step, 100))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step(), schedule.step()
            METHOD.after_step(nets, Moment(step, 100))
        wanted = (
            LogisticRegression(C=1e6).fit((x - x.mean(0)) / x.std(0), outcome).predict_proba((x - x.mean(0)) / x.std(0))
        )
        found = METHOD.scores(nets.eval(), images, labels).detach().numpy()
        np.testing.assert_allclose(found, wanted[:, 1], atol=0.06)
        assert auc(found, outcome.numpy()) == pytest.approx(auc(wanted[:, 1], outcome.numpy()), abs=0.005)

    def test_each_structure_has_its_own_measures(self):
        names = {name: [NAMES[k] for k in method.chosen] for name, method in ARMS.items()}
        assert names["pleura"] == ["pleura distance"] and len(names["vessels"]) == 3
        assert all(name.startswith("airways") for name in names["airways"])
        assert names["vessels"] == names["vessels, mirrored place"]

    def test_rows_have_scores_and_every_measure(self):
        torch.manual_seed(0)
        task, nets = Surroundings.trial, METHOD.build(2, 3, 2)
        fitted = Fitted(METHOD, task, nets, {"last": nets.state_dict()}, {}, {"precision": "float32"})
        case = next(iter(task.cases("val")))
        images, labels = task.preparation.both(case)
        rows = surroundings_rows(fitted, case)
        assert len(rows) == len(labels) and rows[0]["outcome"] == float((labels[0] == MALIGNANT).any())
        wanted = measured(images[:1, 0], images[:1, 1] > 0.5, labels[:1] > 0)[0].tolist()
        assert [rows[0][name.replace(" ", "_")] for name in NAMES] == pytest.approx(wanted)

    @pytest.mark.parametrize("size", [(48, 48), (64, 50)])
    @pytest.mark.parametrize("inputs", [1, 2])
    def test_any_size_with_or_without_lungs(self, size, inputs):
        torch.manual_seed(0)
        nets, images = METHOD.build(inputs, 3, 2), torch.randn(2, inputs, *size)
        labels = torch.zeros(2, *size, dtype=torch.uint8)
        labels[0, 10:14, 10:14], labels[1, 20:24, 20:24] = BENIGN, MALIGNANT
        METHOD.training_step(nets.train(), Batch(images, labels), None, Moment(0, 2)).backward()
        assert all(weight.grad.isfinite().all() for weight in nets["model"].parameters())
        found = METHOD.predict(nets.eval(), images)
        assert found.shape == (2, 3, *size) and torch.allclose(found.sum(1), torch.ones(2, *size))
