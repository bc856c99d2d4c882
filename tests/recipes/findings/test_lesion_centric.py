"""Patch against X-ray: what is seen, DeLong's test for nodules of one patient, subgroups, and where a network looks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from medcook.cohorts import first_attributes
from medcook.methods import Batch, Moment
from medcook.pooled import resampled_auc
from medcook.recipes.findings import _lesions
from medcook.recipes.findings._nodules import nodule
from medcook.recipes.findings.lesion_centric import (
    FULL,
    HOME,
    QUICK,
    Centred,
    HomeTask,
    compared,
    delong,
    elsewhere,
    grad_cam,
    lesion_rows,
    recipe,
    subgroups,
)
from medcook.tasks import Budget
from medcook.training import Loop

SMALL = {"start": "random", "channels": (4, 8, 8)}
CENTRES = [(30, 30), (60, 70), (47, 48), (48, 20), (20, 60)]


def drawn(size: int = 96):
    """Images (5, 1, H, W), zero but for a nodule with rays, and their labels."""
    rng, found = np.random.default_rng(0), []
    for number, centre in enumerate(CENTRES):
        bright, mask = nodule(2, tuple(size * part // 96 for part in centre), (size, size), rng)
        found.append((torch.from_numpy(bright)[None].float(), torch.from_numpy(mask) * (1 + number % 2)))
    images, labels = zip(*found, strict=True)
    return torch.stack(images), torch.stack(labels).byte()


@pytest.mark.component("lesion-centric classifier")
class TestPatch:
    def test_it_is_the_third_around_the_nodule(self):
        images, labels = drawn()
        seen = _lesions.lesions(images, labels)
        assert seen.shape == (5, 1, 32, 32)
        torch.testing.assert_close(seen.flatten(1).sum(1), images.flatten(1).sum(1))  # all of it, with its rays
        assert torch.equal(seen[0, 0, 12:20, 12:20], images[0, 0, 26:34, 26:34])

    @pytest.mark.parametrize("size", [32, 48, 96])
    def test_the_network_sees_it_as_large_as_an_image(self, size):
        images, labels = drawn(size)
        seen = Centred().view(images, labels)
        wanted = F.interpolate(_lesions.lesions(images, labels), (size, size), mode="bilinear")
        assert torch.equal(seen, wanted) and seen.shape == images.shape
        assert torch.equal(_lesions.lesions(images, labels, 2 * round(size / 6)), _lesions.lesions(images, labels))

    @pytest.mark.parametrize("size", [48, 96])
    def test_elsewhere_shows_the_other_lung_and_nothing_of_the_nodule(self, size):
        images, labels = drawn(size)
        assert images.flatten(1).sum(1).min() > 0
        assert Centred(where="elsewhere").view(images, labels).abs().max() == 0
        for label, moved in zip(labels, elsewhere(labels), strict=True):
            before, after = ((part > 0).nonzero().float().mean(0).tolist() for part in (label, moved))
            assert after[1] == pytest.approx(size - 1 - before[1], abs=1e-3)
            assert abs(after[0] - before[0]) == pytest.approx(size / 3) and size / 6 - 1 <= after[0] <= size * 5 / 6 + 1
            assert moved.sum() == label.sum()

    def test_arms_differ_by_what_they_see_alone(self):
        for arms, start in ((FULL, "imagenet"), (QUICK, "random")):
            methods = [arm.method for arm in arms.values()]
            assert {method.where for method in methods} == {"lesion", "whole", "elsewhere"}
            assert len({repr(replace(method, where="lesion")) for method in methods}) == 1
            assert all(method.start == start for method in methods)
        whole = recipe.arms[recipe.compare[1]].method
        images, labels = drawn()
        assert torch.equal(whole.view(images, labels), images)
        assert [recipe.arms[name].method.where for name in recipe.ablation] == ["lesion", "elsewhere"]

    @pytest.mark.parametrize("where", ["lesion", "whole", "elsewhere"])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_every_parameter_learns_in_either_precision(self, where, mixed):
        method = Centred(where=where, **SMALL)
        torch.manual_seed(0)
        nets, (images, labels) = method.build(1, 3, 2), drawn()
        images = images + 0.1 * torch.randn_like(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = method.training_step(nets, Batch(images, labels), None, Moment(0, 9))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
        answer = method.predict(nets.eval(), images)
        assert answer.shape == (5, 3, 96, 96) and torch.allclose(answer.sum(1), torch.ones(()))


def table(patients: int = 60, versions: int = 2, seed: int = 0, shift: float = 1.0, replicate: int | None = None):
    """Rows of a made-up arm; nodules of one patient are alike. Outcomes and facts are the same for any seed."""
    facts, rng = np.random.default_rng(5), np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        own, sex, age = facts.normal(), ("men", "women", "")[patient % 3], (20.0, 60.0, float("nan"))[patient % 3]
        for version in range(versions):
            outcome, radius = float(facts.random() < 0.5), facts.uniform(3, 5)
            score = 0.8 * own + 0.5 * rng.normal() + shift * outcome
            names = {"patient_id": f"p{patient}", "case_id": f"c{patient}", "structure": f"nodule {version}"}
            known = {"group": ("Montgomery", "Shenzhen")[patient % 4 > 0], "radius": radius, "sex": sex, "age": age}
            rows.append(names | {"score": score, "outcome": outcome} | known)
    found = pd.DataFrame(rows)
    return found if replicate is None else found.assign(replicate=replicate)


def arrays(*tables: pd.DataFrame):
    first = tables[0]
    return np.stack([t["score"] for t in tables]), first["outcome"].to_numpy() == 1, first["patient_id"].to_numpy()


@pytest.mark.component("DeLong's test")
class TestDeLong:
    def test_one_nodule_a_patient_gives_the_textbook_formula(self):
        scores, outcome, patient = arrays(*(table(versions=1, seed=s) for s in (0, 1)))
        scores[:, ::5] = np.round(scores[:, ::5])  # ties
        auc, covariance = delong(scores, outcome, patient)
        kernel = lambda x, y: (x > y) + 0.5 * (x == y)  # noqa: E731
        v = np.array([[np.mean([kernel(x, y) for y in s[~outcome]]) for x in s[outcome]] for s in scores])
        w = np.array([[np.mean([kernel(x, y) for x in s[outcome]]) for y in s[~outcome]] for s in scores])
        np.testing.assert_allclose(auc, [roc_auc_score(outcome, s) for s in scores])
        np.testing.assert_allclose(covariance, np.cov(v) / v.shape[1] + np.cov(w) / w.shape[1])

    def test_nodules_of_one_patient_count_together_as_in_a_bootstrap_of_patients(self):
        tables = [table(seed=s, shift=shift) for s, shift in ((0, 1.0), (1, 0.5))]
        scores, outcome, patient = arrays(*tables)
        _, covariance = delong(scores, outcome, patient)
        times = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 4000)[:, np.repeat(np.arange(60), 2)]
        found = [resampled_auc(score, outcome, times) for score in scores]
        errors = lambda c: np.sqrt([c[0, 0], c[1, 1], c[0, 0] + c[1, 1] - 2 * c[0, 1]])  # noqa: E731
        np.testing.assert_allclose(errors(covariance), errors(np.cov(found)), rtol=0.08)

    def test_the_same_nodule_twice_says_no_more_than_once(self):
        scores, outcome, patient = arrays(table(versions=1), table(versions=1, seed=1))
        twice = delong(*(np.repeat(part, 2, axis=-1) for part in (scores, outcome, patient)))
        for found, wanted in zip(twice, delong(scores, outcome, patient), strict=True):
            np.testing.assert_allclose(found, wanted)

    def test_p_and_interval_belong_together_and_the_same_scores_do_not_differ(self):
        found = compared(table(seed=0), table(seed=1, shift=0.2)).iloc[0]
        assert (found["low"] > 0) == (found["p"] < 0.05) and found["low"] < found["difference"] < found["high"]
        same = compared(table(), table()).iloc[0]
        assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)

    def test_of_replicates_the_mean_auc_is_compared(self):
        one, other = (
            pd.concat([table(seed=s + k, shift=d, replicate=s) for s in range(2)]) for k, d in ((0, 1), (9, 0))
        )
        found = compared(one, other.sample(frac=1, random_state=0)).iloc[0]
        aucs = [[roc_auc_score(t.outcome, t.score) for _, t in part.groupby("replicate")] for part in (one, other)]
        assert (found["auc"], found["other_auc"]) == pytest.approx(tuple(map(np.mean, aucs)))
        assert found["difference"] == pytest.approx(np.mean(aucs[0]) - np.mean(aucs[1]))

    def test_one_outcome_alone_is_undefined(self):
        rows = table(patients=4).assign(outcome=1.0)
        assert np.isnan(compared(rows, rows).iloc[0][["auc", "difference", "p"]].to_numpy(float)).all()


def test_subgroups_hold_whom_their_names_say():
    rows = table()
    found = subgroups(rows)
    assert found["Montgomery"].sum() + found["Shenzhen"].sum() == len(rows) == found["all"].sum()
    assert found["small"].sum() == found["large"].sum() == len(rows) / 2
    assert set(rows["sex"][found["women"]]) == {"women"} and found["women"].sum() == found["men"].sum() == len(rows) / 3
    assert set(rows["age"][found["younger than 40"]]) == {20} and set(rows["age"][found["40 and older"]]) == {60}
    lines = compared(rows, table(seed=1)).set_index("subgroup")
    assert list(lines.index) == list(found) and lines.loc["large", "nodules"] == len(rows) / 2


@pytest.fixture(scope="module")
def fitted():
    task, method = HomeTask("embedded", side=48, versions=1, keep=(("site", "north"),)), Centred(**SMALL)
    budget = Budget(steps=3, batch=4, precision="float32", checks=0)
    loop = Loop(method, task, budget, "float32", 0, task.samples("labelled"), None, None, False, accelerator="cpu")
    return loop.run()


@pytest.mark.component("internal and external validation")
class TestHospitals:
    def test_one_hospital_trains_and_both_are_scored(self, fitted):
        task = fitted.task
        assert {first_attributes(task.data, patient)["site"] for patient in task.labelled_patients} == {"north"}
        rows = [row for case in task.cases("val") for row in lesion_rows(fitted, case)]
        assert {row["group"] for row in rows} == {"north", "south", "island"}
        assert len({tuple(row) for row in rows}) == 1 and all(0 <= row["score"] <= 1 for row in rows)
        assert recipe.scales["full"].task.keep == HOME and recipe.scales["full"].task.evaluation == "test"
        assert {row["sex"] for row in rows} == {"men", "women"} and all(row["age"] > 0 for row in rows)


@pytest.mark.component("gradient-based visualization")
class TestAttention:
    def test_it_is_grad_cam_by_autograd(self):
        torch.manual_seed(1)
        net = Centred(**SMALL).build(1, 3, 2)["average"].eval()
        seen = torch.randn(2, 1, 32, 32)
        maps = net.maps(seen).detach().requires_grad_()
        logits = net.head(maps.flatten(2).mean(2))
        (logits[:, 1] - logits[:, 0]).sum().backward()
        heat = (maps.grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
        wanted = F.interpolate(heat * maps[0, 0].numel(), (32, 32), mode="bilinear").detach()
        torch.testing.assert_close(grad_cam(net, seen).detach(), wanted, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("where", ["lesion", "whole"])
    def test_who_looks_everywhere_alike_has_the_nodules_share(self, where, fitted, monkeypatch):
        method, (images, labels) = replace(fitted.method, where=where), drawn()
        even = lambda net, seen: torch.ones_like(seen)  # noqa: E731
        monkeypatch.setattr("medcook.recipes.findings.lesion_centric.grad_cam", even)
        inside, area = method.attention(fitted.nets, images, labels)
        torch.testing.assert_close(inside, area)
        wanted = (labels > 0).flatten(1).float().mean(1) * (9 if where == "lesion" else 1)
        torch.testing.assert_close(area, wanted, rtol=0.15, atol=0)
