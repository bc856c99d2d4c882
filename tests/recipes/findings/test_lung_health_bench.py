"""lung-health-bench: candidates, who learns what when, and the detector's metric beside the diagnosis."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.methods import Batch, Moment
from medcook.pretraining import info_nce
from medcook.recipes.findings import lung_health_bench as bench
from medcook.recipes.findings._detection import RATES, froc
from medcook.recipes.findings._nodules import patches, squares
from medcook.recipes.findings.lung_health_bench import PATCH, SURE, Bench, bench_rows, candidates, recipe

ARMS = {name: arm.method for name, arm in recipe.arms.items()}
DETECTING, SUSPECTING, DIAGNOSING = Moment(0, 10), Moment(3, 10), Moment(9, 10)


def batch(size: tuple[int, int] = (48, 48), count: int = 4) -> Batch:
    """Images with a nodule each, benign and malignant in turn."""
    torch.manual_seed(1)
    labels = torch.zeros(count, *size, dtype=torch.uint8)
    for number, label in enumerate(labels):
        label[3 + number : 9 + number, 5:12] = 1 + number % 2
    return Batch(torch.randn(count, 1, *size), labels)


def step(method: Bench, now: Moment) -> tuple[nn.ModuleDict, torch.Tensor]:
    data = batch()
    torch.manual_seed(0)
    nets = method.build(1, 3, 2).train()
    torch.manual_seed(2)
    loss = method.training_step(nets, data, None, now)
    loss.backward()
    return nets, loss


def touched(module: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]


@pytest.mark.component("strategic warm start")
def test_candidates_are_the_nodule_and_false_suspicions_of_both_strata():
    labels = batch(count=2).labels
    labels[1] = 0
    nodule = torch.tensor([6.0, 8.5])
    false = torch.tensor([[30.0, 30 + k] for k in range(6)])
    places = torch.cat([nodule[None] + 1, false[:2], nodule[None] + torch.tensor([4.9, 0]), false[2:]])
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        numbers, found, truth = candidates([places, false], labels)
        assert numbers.tolist() == [0] * 4 + [1] * 2 and truth.tolist() == [True] * 2 + [False] * 4
        assert (found[:2] - nodule).abs().max() <= 2
        for pair in (found[2:4], found[4:6]):
            ranks = [false.eq(place).all(1).nonzero().item() for place in pair]
            assert ranks[0] < SURE <= ranks[1]
            seen |= {*ranks}
        seen |= {tuple(place) for place in (found[:2] - nodule).long().tolist()}
    assert {*range(6)} <= seen and {(2, 2), (-2, -2), (0, 0)} <= seen


@pytest.mark.component("strategic warm start")
def test_patches_lie_around_their_places_also_at_the_border():
    data = batch()
    places = torch.tensor([[(3 + k + 8 + k) / 2, 8.0] for k in range(4)])
    assert torch.equal(squares(data.images, range(4), places, PATCH), patches(data.images, data.labels, PATCH))
    corner = squares(data.images, [2], torch.tensor([[0.0, 47.0]]), PATCH)[0, 0]
    assert torch.equal(corner[16:, :17], data.images[2, 0, :16, 31:]) and not corner[:16].any()


@pytest.mark.component("strategic warm start")
def test_places_are_those_the_detector_is_surest_of():
    class Fixed(nn.Module):
        def forward(self, images):
            heat = torch.full((len(images), 1, 8, 8), -5.0)
            heat[:, 0, 2, 3], heat[:, 0, 6, 1] = 2.0, 4.0
            return heat, torch.zeros(len(images), 4, 8, 8)

    found = bench.suspected(Fixed(), torch.zeros(2, 1, 16, 16))
    assert len(found) == 2 and found[1][:2].tolist() == [[13, 3], [5, 7]] and len(found[1]) <= bench.PEAKS


@pytest.mark.component("strategic warm start")
def test_first_the_detector_learns_then_the_classifier_tells_candidates_then_cancer():
    nets, loss = step(Bench(), DETECTING)
    assert all(touched(nets["pretext"]["detector"])) and not any(touched(nets["model"]))
    nets, loss = step(Bench(), SUSPECTING)
    parts, data = nets["pretext"], batch()
    assert not any(touched(parts["detector"])) and all(touched(nets["model"].encoder)) and all(touched(parts["tell"]))
    torch.manual_seed(2)
    numbers, places, truth = candidates(bench.suspected(parts["detector"], data.images), data.labels)
    features = nets["model"].features(squares(data.images, numbers.tolist(), places, PATCH))
    assert torch.isclose(loss, F.cross_entropy(parts["tell"](features), truth.long()), atol=1e-5)
    nets, loss = step(Bench(), DIAGNOSING)
    assert not any(touched(nets["pretext"])) and all(touched(nets["model"]))
    logits = nets["model"](patches(data.images, data.labels, PATCH))
    assert torch.isclose(loss, F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])), atol=1e-5)


@pytest.mark.component("strategic warm start")
def test_each_part_has_its_own_schedule():
    method, steps = Bench(), 500
    rates = [method.rate_at(Moment(k, steps)) for k in range(steps)]
    for first, last, top in ((0, 120, method.pretext_rate), (120, 200, method.rate), (200, 500, method.rate)):
        assert max(rates[first:last]) == pytest.approx(top) and rates[first] < top / 10 and rates[last - 1] < top / 10


@pytest.mark.component("strategic warm start")
def test_the_ablation_deals_the_answers_out_anew_and_keeps_all_else(monkeypatch):
    assert ARMS["shuffled candidates"] == replace(ARMS["warm start"], start="shuffled")
    (nets, loss), (other, same) = (step(ARMS[name], SUSPECTING) for name in ("warm start", "shuffled candidates"))
    assert [p.shape for p in nets.parameters()] == [p.shape for p in other.parameters()] and loss != same
    answers, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, truth: answers.append(truth) or original(logits, truth))
    for start in ("candidates", "shuffled"):
        method = Bench(start=start)
        method.training_step(method.build(1, 3, 2).train(), batch(count=8), None, SUSPECTING)
    assert answers[0].sum() == answers[1].sum() == 16 and not torch.equal(*answers)
    assert 0 < (answers[0] == answers[1]).sum() < 32


@pytest.mark.component("classifiers compared")
def test_the_others_wait_or_compare_views_of_the_same_patches():
    nets, loss = step(ARMS["random"], SUSPECTING)
    assert loss == 0 and not any(touched(nets)) and set(nets["pretext"]) == {"detector"}
    nets, loss = step(ARMS["self-supervised"], SUSPECTING)
    parts, data, method = nets["pretext"], batch(), ARMS["self-supervised"]
    assert all(touched(nets["model"].encoder)) and all(touched(parts["project"]))
    torch.manual_seed(2)
    numbers, places, _ = candidates(bench.suspected(parts["detector"], data.images), data.labels)
    found = squares(data.images, numbers.tolist(), places, PATCH)
    views = [parts["project"](nets["model"].features(method.view(found))) for _ in range(2)]
    assert torch.isclose(loss, info_nce(*views), atol=1e-4)
    detector = [step(method, DETECTING)[0]["pretext"]["detector"] for method in ARMS.values()]
    assert all(len([*each.parameters()]) == len([*detector[0].parameters()]) for each in detector)


@pytest.mark.component("competition performance metric")
def test_rows_tell_how_often_nodules_are_found_at_seven_rates():
    """A detector whose certainty is written into the image: nodules 1 and 3 of four are surer than most of the rest."""

    class Written(nn.Module):
        def forward(self, images):
            return F.max_pool2d(images, 2), torch.full((len(images), 4, 24, 24), 1.0)

    data = batch()
    images = torch.full((4, 1, 48, 48), -20.0)
    for number, level in enumerate((3.0, -1.0, 2.0, -3.0)):
        images[number, 0, 6 + number, 8] = level
        for k, other in enumerate((2.5, 0.0, -2.0)[: number + 1]):
            images[number, 0, 30 + 6 * k, 40 - 6 * k] = other - number / 10
    nets = nn.ModuleDict({"pretext": nn.ModuleDict({"detector": Written()}), "average": Bench().model(1, 3, 2)})
    task = SimpleNamespace(
        samples=lambda role: Batch(images, data.labels),
        preparation=SimpleNamespace(both=lambda case: (images, data.labels)),
    )
    fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, task=task, method=Bench())
    rows = bench_rows(fitted, SimpleNamespace(case_id="a", patient_id="a", attributes={"site": "Montgomery"}))
    levels, false, sensitivity = froc(bench.detected(nets["pretext"]["detector"], images, data.labels))
    best = [max(sensitivity[false <= rate], default=0) for rate in RATES]
    assert 0.3 < np.mean(best) < 0.9 and np.mean([row["cpm"] for row in rows]) == pytest.approx(np.mean(best))
    assert np.mean([row["false_positives"] for row in rows]) <= 1
    assert np.mean([row["found"] for row in rows]) == pytest.approx(best[RATES.index(1)])
    assert [row["outcome"] for row in rows] == [0, 1, 0, 1] and {row["group"] for row in rows} == {"Montgomery"}
    assert {row["structure"] for row in rows} == {"nodule"} and len({row["support"] for row in rows}) == 4
    data.labels[2] = 0
    assert len(bench_rows(fitted, SimpleNamespace(case_id="a", patient_id="a", attributes={}))) == 3


@pytest.mark.component("internal and external data")
def test_no_training_patient_is_from_the_other_hospital():
    full, quick = recipe.scales["full"].task, recipe.scales["quick"].task
    assert full.keep == (("site", "Shenzhen"),) and quick.keep == () and full.evaluation == "test"


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
@pytest.mark.parametrize("name", ARMS)
def test_every_parameter_is_trained_at_any_size(name, size):
    method, data = ARMS[name], batch(size)
    for enabled in (False, True):
        nets = method.build(1, 3, 2).train()
        for now in (DETECTING, SUSPECTING, DIAGNOSING):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = method.training_step(nets, data, None, now)
            loss.backward()
            method.after_step(nets, now)
            assert torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets.parameters() if p.requires_grad)
    found = method.predict(nets.eval(), data.images)
    assert found.shape == (4, 3, *size) and torch.allclose(found.sum(1), torch.ones(4, *size), atol=1e-5)
