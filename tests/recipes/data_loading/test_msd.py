"""The Decathlon: networks that share nothing, tests and ranks by hand and by scipy, outlines by MONAI, windows."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy import stats

from medcook.data import IGNORE, Case, open_dataset
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.preparation import preparation_for
from medcook.recipes.data_loading import _decathlon, msd
from medcook.recipes.data_loading._decathlon import DecathlonTask, configured, extent, for_hearts, whole
from medcook.recipes.data_loading._ranking import better, kept, ranks, significance, standings, surface_dice
from medcook.recipes.data_loading.msd import KNOWN, Retrained, recipe, renumbered
from medcook.tasks import Budget
from medcook.training import Loop

NOW = Moment(1, 10)
TINY = Retrained(channels=(2, 4), structures=(2, 1))


def batch() -> Batch:
    """Three images of the first task, one of the second, none of which shows everything."""
    torch.manual_seed(0)
    labels = torch.zeros(4, 16, 16, dtype=torch.uint8)
    labels[0, :4], labels[1, 5:9], labels[2, 2:6], labels[3, 8:] = 1, 2, 1, 3
    labels[3, :2] = IGNORE
    return Batch(torch.randn(4, 1, 16, 16), labels, groups=torch.tensor([0, 0, 0, 1]))


def built(classes: int = 4):
    torch.manual_seed(1)
    return TINY.build(1, classes, 2)


def case(label: np.ndarray, **attributes) -> Case:
    return Case(np.zeros((1, *label.shape), np.float32), label.astype(np.uint8), "c", "p", attributes=attributes)


@pytest.mark.component("one algorithm for many tasks")
class TestRetrained:
    def test_a_step_is_the_mean_of_the_tasks_losses_on_their_own_structures(self):
        nets, data = built().train(), batch()
        loss = TINY.training_step(nets, data, None, NOW)
        nets = built().train()
        second = torch.where(data.labels == 3, 1, data.labels)[3:]
        losses = [
            cross_entropy_and_dice(nets["model"][0](data.images[:3]), data.labels[:3]),
            cross_entropy_and_dice(nets["model"][1](data.images[3:]), second),
        ]
        torch.testing.assert_close(loss, sum(losses) / 2)
        assert [net.head.out_channels for net in nets["model"]] == [3, 2]

    def test_labels_are_numbered_from_one_and_the_rest_stays(self):
        labels = torch.tensor([0, 4, 5, IGNORE], dtype=torch.uint8)
        assert renumbered(labels, 3).tolist() == [0, 1, 2, IGNORE]

    def test_what_one_task_learns_reaches_no_other(self):
        nets, data = built().train(), batch()
        alone = data._replace(images=data.images[:3], labels=data.labels[:3], groups=data.groups[:3])
        TINY.training_step(nets, alone, None, NOW).backward()
        learns = [any(p.grad is not None and p.grad.any() for p in net.parameters()) for net in nets["model"]]
        assert learns == [True, False]

    def test_a_case_is_answered_by_its_tasks_network(self):
        nets, images = built().eval(), torch.randn(2, 1, 16, 16)
        with torch.no_grad():
            first, second = (TINY.answer(nets, images, number) for number in (0, 1))
            torch.testing.assert_close(second, nets["average"][1](images).softmax(1))
            mixed = TINY.predict(nets, images)
        torch.testing.assert_close(mixed[:, 1:], torch.cat([first[:, 1:], second[:, 1:]], 1) / 2)
        torch.testing.assert_close(mixed.sum(1), torch.ones(2, 16, 16))

    def test_data_of_other_structures_are_one_task(self):
        nets = built(classes=6)
        assert len(nets["model"]) == 1 and nets["model"][0].head.out_channels == 6

    def test_all_algorithms_get_the_same(self):
        for arm in recipe.arms.values():
            assert type(arm.method) is Retrained and set(arm.changes) <= {"settings"}
            assert arm.method.structures == msd.STRUCTURES
        three = [recipe.arms[name].method for name in ("self-configuring", "made for hearts", "one size")]
        assert three[0] == three[1] == three[2]
        small = recipe.arms["small, not augmented"].method
        data = batch()
        same = small.augment(data, torch.Generator().manual_seed(0))
        torch.testing.assert_close(same.images, data.images, atol=1e-5, rtol=1e-5)
        assert torch.equal(same.labels, data.labels)


@pytest.mark.component("known and unseen tasks")
class TestTasks:
    def test_numbers_of_structures_are_those_of_the_sets(self):
        names = [msd.FULL.dataset, *(name for name, *_ in msd.FULL.parts)]
        assert tuple(len(open_dataset(name).manifest.structures) for name in names) == msd.STRUCTURES
        assert names[:3] == list(KNOWN) and not set(names[3:]) & set(KNOWN)

    @pytest.fixture
    def rows(self, monkeypatch):
        """Rows of a case of a set: the first of its two structures is found, the second is not."""
        label = np.zeros((2, 20, 20), np.uint8)
        label[0, 2:8, 2:8], label[1, 10:15, 3:9] = 3, 4
        found = np.where(label == 3, 1, 0)
        structures = {1: "one", 2: "two", 3: "three", 4: "four"}
        own = SimpleNamespace(manifest=SimpleNamespace(structures={1: "three", 2: "four"}))
        monkeypatch.setattr(msd, "segmented", lambda fitted, case: torch.from_numpy(found))

        def scored(name: str, **attributes) -> list[dict]:
            data = SimpleNamespace(sets={name: own}, offsets={name: 2})
            fitted = SimpleNamespace(task=SimpleNamespace(structures=structures, data=data))
            return msd.task_rows(fitted, case(label, set=name, modality=1, **attributes))

        return scored

    @pytest.mark.parametrize(("name", "column", "other"), [("acdc", "known", "unseen"), ("bubil", "unseen", "known")])
    def test_a_row_counts_where_its_task_belongs(self, rows, name, column, other):
        three, four = rows(name)
        assert (three["structure"], four["structure"]) == ("three", "four") and three["set"] == name
        assert three["dice"] == three[column] == three["nsd"] == 1 and not three["missed"]
        assert four["dice"] == four[column] == four["nsd"] == 0 and four["missed"]
        assert np.isnan(three[other]) and np.isnan(four[other])

    def test_what_is_not_drawn_is_not_scored(self, rows):
        assert [row["structure"] for row in rows("openkbp", annotated=[3])] == ["three"]


@pytest.mark.component("ranking by significance")
class TestRanking:
    def test_the_test_is_scipys_and_one_sided(self):
        rng = np.random.default_rng(0)
        one, other = rng.normal(0.1, 0.1, 12), rng.normal(0, 0.1, 12)
        assert better(one, other) == pytest.approx(stats.wilcoxon(one, other, alternative="greater").pvalue)
        assert better(one, one) == 1
        five = np.arange(1, 6) / 10
        assert better(five, 0 * five) == pytest.approx(1 / 2**5), "all signs of five cases agree in one way of 32"
        assert better(five[:4], 0 * five[:4]) > 0.05

    def test_scores_are_the_numbers_of_those_beaten(self):
        base = np.arange(8) / 100
        values = pd.DataFrame({"a": base + 0.3, "b": base + 0.3, "c": base + 0.2, "d": base})
        values.loc[::2, "b"] += 0.01
        values.loc[1::2, "b"] -= 0.01
        scores = significance(values)
        assert scores.to_dict() == {"a": 2, "b": 2, "c": 1, "d": 0}
        assert ranks(scores).to_dict() == {"a": 1, "b": 1, "c": 3, "d": 4}
        assert significance(values, alpha=1 / 2**8).to_dict() == {"a": 0, "b": 0, "c": 0, "d": 0}

    def tables(self) -> dict[str, pd.DataFrame]:
        """On x an algorithm is the better the later its letter, on y the other way round; on z all are the same."""
        tables = {}
        for place, name in enumerate("abc"):
            rows = []
            for number in range(6):
                for replicate in (0, 1):
                    say = {"case_id": number, "replicate": replicate}
                    jump = (1 if replicate else -1) * (number % 2) * place
                    value = place + number / 10 + jump
                    rows.append(say | {"set": "x", "structure": "s", "dice": value, "nsd": value})
                    rows.append(say | {"set": "y", "structure": "s", "dice": -value, "nsd": -value})
                    rows.append(say | {"set": "y", "structure": "t", "dice": -value, "nsd": 0.0})
                    rows.append(say | {"set": "z", "structure": "s", "dice": 0.5, "nsd": 0.5})
            tables[name] = pd.DataFrame(rows)
        return tables

    def test_ranks_are_averaged_over_structures_and_metrics_and_then_over_tasks(self):
        found = standings(self.tables())
        assert found["x"].to_dict() == {"a": 3, "b": 2, "c": 1}
        assert found["y"].to_dict() == {"a": 1, "b": (3 * 2 + 1) / 4, "c": (3 * 3 + 1) / 4}
        assert found["z"].to_dict() == {"a": 1, "b": 1, "c": 1}
        assert found["mean"].to_dict() == pytest.approx({"a": 5 / 3, "b": 4.75 / 3, "c": 4.5 / 3})
        assert list(found.index) == ["c", "b", "a"]
        assert list(standings(self.tables(), ("y",)).columns) == ["y", "mean"]

    def test_places_that_are_kept_and_turned_round(self):
        x, y = (standings(self.tables(), (name,)) for name in "xy")
        assert kept(x, x) == 1 and kept(x, y) == -1
        other = x.assign(mean=[1, 3, 2])
        assert kept(x, other) == pytest.approx(stats.kendalltau([1, 2, 3], [1, 3, 2]).statistic) == pytest.approx(1 / 3)


@pytest.mark.component("normalised surface Dice")
class TestSurfaceDice:
    @pytest.mark.parametrize("tolerance", [1.0, 2.0, 3.5])
    def test_it_is_monais_in_a_slice(self, tolerance):
        rows, columns = np.indices((40, 40))
        one, other = np.hypot(rows - 18, columns - 20) < 9, np.hypot(rows - 20, (columns - 21) / 1.2) < 10
        onehot = [torch.from_numpy(mask)[None, None].float() for mask in (one, other)]
        theirs = compute_surface_dice(*onehot, [tolerance], include_background=True)
        assert surface_dice(one, other, tolerance) == pytest.approx(float(theirs), abs=1e-6)

    def test_slices_count_by_their_outlines_and_one_mask_alone_is_wrong(self):
        masks = np.zeros((3, 12, 12), bool)
        masks[0, 2:6, 2:6] = True  # an outline of 12
        alone = masks.copy()
        alone[1, 4:7, 4:7] = True  # of 8
        assert surface_dice(masks, masks, 1) == 1 and surface_dice(masks[1:], masks[1:], 1) == 1
        assert surface_dice(alone, masks, 1) == surface_dice(masks, alone, 1) == pytest.approx(24 / 32)
        far = np.roll(masks, 5, axis=1)
        assert surface_dice(far, masks, 1) == 0 and surface_dice(far, masks, 5) == 1


@pytest.mark.component("self-configuring algorithm")
class TestFingerprint:
    def test_the_extent_is_of_the_farthest_label_and_the_window_shows_it(self):
        first, second = np.zeros((3, 80, 100)), np.zeros((3, 40, 50))
        first[1, 30:50, 60:75], second[0, 18:22, 24:30] = 1, 2  # columns up to 74: 24.5 of 50 from the middle
        first[2, 0, 0] = IGNORE
        cases = [case(first), case(second), case(np.zeros((3, 9, 9)))]
        found = extent(cases)
        assert found == pytest.approx(2 * (74 - 49.5) / 100)
        plan = configured(found)
        assert plan.size == (64, 64) and plan.long_side == round(64 / (0.49 * 1.1))
        shown = plan.labels(cases[0])
        assert (shown == 1).any() and shown[1].count_nonzero() == pytest.approx(300 * 1.19**2, rel=0.1)
        assert configured(0.99).long_side == 64 and configured(0.0).long_side == 64

    def test_every_task_is_configured_by_its_own_training_cases(self, monkeypatch):
        seen = []

        def spied(cases):
            seen.append([one.case_id for one in cases])
            return 0.5 / len(seen)

        monkeypatch.setattr(_decathlon, "extent", spied)
        task = DecathlonTask("embedded", counts=(2, 1, 1))
        plans = dict(task.preparation.plans)
        training = {case_id for patient in task.labelled_patients for case_id in task.data.patients[patient]}
        assert plans == {"embedded": configured(0.5)} and set(seen[0]) == training
        one = next(task.cases("labelled"))
        assert torch.equal(task.preparation.images(one), configured(0.5).images(one))


@pytest.mark.component("solution made for one task")
def test_settings_of_hearts_are_the_baselines_and_look_at_the_middle_elsewhere():
    hearts, plain = for_hearts("acdc"), preparation_for("acdc")
    assert hearts.centre == plain.centre == "roi"
    assert hearts.size[0] / hearts.long_side == plain.size[0] / plain.long_side == 0.5
    assert for_hearts("bubil") == replace(hearts, centre="image")
    assert whole() == replace(for_hearts("bubil"), long_side=64)
    for settings, expected in (("hearts", for_hearts("embedded")), ("whole", whole())):
        task = DecathlonTask("embedded", counts=(1, 1, 1), settings=settings)
        assert dict(task.preparation.plans) == {"embedded": expected}
    settings = {name: arm.changes.get("settings", "fingerprint") for name, arm in recipe.arms.items()}
    assert list(settings.values()) == ["fingerprint", "hearts", "whole", "whole"]


def test_a_run_is_scored_from_end_to_end():
    task = DecathlonTask("embedded", counts=(1, 1, 1))
    method, samples = Retrained(channels=(2, 4)), task.samples("labelled")
    assert samples.groups.unique().tolist() == [0]
    budget = Budget(steps=2, batch=2, precision="float32", checks=0)
    fitted = Loop(method, task, budget, "float32", 0, samples, None, None, False, accelerator="cpu").run()
    one = next(task.cases("val"))
    rows = msd.task_rows(fitted, one)
    assert [row["structure"] for row in rows] == list(open_dataset("embedded").manifest.structures.values())
    assert msd.segmented(fitted, one).shape == one.label.shape and all(row["set"] == "embedded" for row in rows)
