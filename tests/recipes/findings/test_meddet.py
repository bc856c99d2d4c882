"""MedDet: the neural memory, what fuses teachers, the adversarial game, and who learns when."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import nn

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.findings import meddet
from medcook.recipes.findings._detection import detection_loss, kinds_of_findings
from medcook.recipes.findings.meddet import Fusion, MedDet, NeuralMemory, Teachers, cost, detection_rows, recipe, thrift

TEACHING, LEARNING = Moment(0, 10), Moment(9, 10)
ARMS = {name: arm.method for name, arm in recipe.arms.items()}


def batch(size: tuple[int, int] = (32, 32)) -> Batch:
    """Three images with a nodule, a cavity and a patch each."""
    torch.manual_seed(1)
    labels = torch.zeros(3, *size, dtype=torch.uint8)
    labels[:, 2:7, 3:8], labels[:, 9:14, 1:6], labels[:2, 8:15, 9:15] = 1, 13, 25
    return Batch(torch.randn(3, 1, *size), labels)


def step(method: MedDet, now: Moment, size: tuple[int, int] = (32, 32)) -> tuple[nn.ModuleDict, torch.Tensor]:
    torch.manual_seed(0)
    nets = method.build(1, 37, 2).train()
    loss = method.training_step(nets, batch(size), None, now)
    loss.backward()
    return nets, loss


def touched(module: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]


@pytest.mark.component("second-order nmODE against noise")
def test_memory_is_the_solution_of_its_equation():
    torch.manual_seed(0)
    memory, x = NeuralMemory(3, steps=8), 3 * torch.randn(2, 3, 2, 2)
    angle = memory.angle(x).detach().double().flatten().numpy()
    change = lambda _, y: -y + np.sin(y + np.cos(y + angle) ** 2) ** 2  # noqa: E731
    true = solve_ivp(change, (0, 1), np.zeros_like(angle), rtol=1e-9, atol=1e-10).y[:, -1]
    assert np.allclose(memory(x).detach().flatten(), true, atol=1e-5)
    memory.steps = NeuralMemory(3).steps
    assert np.allclose(memory(x).detach().flatten(), true, atol=0.01)


@pytest.mark.component("second-order nmODE against noise")
def test_memory_is_bounded_and_feels_its_input_as_an_angle():
    torch.manual_seed(0)
    memory, x = NeuralMemory(4), 100 * torch.randn(2, 4, 5, 5)
    before = memory(x)
    assert before.min() >= 0 and before.max() < 1
    with torch.no_grad():
        memory.angle.bias.add_(torch.pi)
    assert torch.allclose(memory(x), before, atol=1e-3)
    heads = [net.head for net in MedDet().build(1, 37, 2)["pretext"]["teachers"].nets]
    assert all(isinstance(branch[3], NeuralMemory) for head in heads for branch in (head.heat, head.sides))
    plain = ARMS["without memory"].build(1, 37, 2)["pretext"]["teachers"]
    assert not any(isinstance(module, NeuralMemory) for module in plain.modules())


@pytest.mark.component("adaptive feature alignment")
@pytest.mark.component("learnable weighted feature fusion")
def test_fusion_aligns_weighs_joins_and_reduces():
    torch.manual_seed(0)
    fusion, maps = Fusion([3, 5], 4), [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 13, 9)]
    found = fusion(maps, (4, 3))
    parts = []
    for k, each in enumerate(maps):
        weight, bias = fusion.align[k].weight[:, :, 0, 0], fusion.align[k].bias
        aligned = torch.einsum("oc,bchw->bohw", weight, each) + bias[:, None, None]
        pooled = F.adaptive_max_pool2d(aligned, (4, 3))
        coefficients = torch.sigmoid(pooled.mean((2, 3)) @ fusion.weigh[k].weight.T + fusion.weigh[k].bias)
        parts.append(pooled * coefficients[:, :, None, None])
    assert found.shape == (2, 4, 4, 3) and torch.allclose(found, fusion.join(torch.cat(parts, 1)), atol=1e-5)


@pytest.mark.component("learnable weighted feature fusion")
def test_fused_features_are_learnt_from_findings_and_leave_the_teachers_alone():
    torch.manual_seed(0)
    teachers, data = Teachers(1, 2, 8, memory=False), batch()
    whole = teachers.loss(data.images, data.labels)
    apart = [detection_loss([(net(data.images), 2)], data.labels, kinds_of_findings) for net in teachers.nets]
    (whole - sum(apart)).backward()
    assert all(touched(teachers.fusions)) and all(touched(teachers.head))
    weights = [p.grad for p in teachers.nets.parameters() if p.grad is not None]
    assert all(grad.abs().max() < 1e-4 for grad in weights), "what fuses asks nothing of the teachers"


@pytest.mark.component("several teachers, one student")
def test_teachers_learn_first_and_then_the_student_alone():
    nets, _ = step(MedDet(), TEACHING)
    teachers = nets["pretext"]["teachers"]
    assert all(touched(teachers)) and not any(touched(nets["model"])) and len(teachers.nets) == 2
    nets, _ = step(MedDet(), LEARNING)
    parts = nets["pretext"]
    assert not any(touched(parts["teachers"])) and not parts["teachers"].training
    assert all(touched(nets["model"])) and all(touched(parts["make"])) and all(touched(parts["judge"]))
    shapes = [{p.shape for p in net.parameters()} for net in parts["teachers"].nets]
    assert shapes[0] != shapes[1]


@pytest.mark.component("several teachers, one student")
@pytest.mark.component("generative adversarial training")
def test_the_loss_is_the_formula():
    nets, loss = step(MedDet(mimicry=0.7, adversary=0.3), LEARNING)
    data, parts, total = batch(), nets["pretext"], []
    pyramid = nets["model"].pyramid(data.images)
    for mine, lesson in zip(pyramid, parts["teachers"].lesson(data.images), strict=True):
        assert torch.allclose(lesson.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
        assert torch.allclose(lesson.std((0, 2, 3), correction=0), torch.ones(16), atol=0.2)
        made = parts["make"](mine)
        true, fake = parts["judge"](lesson), parts["judge"](made)
        game = ((true - 1) ** 2).mean() / 2 + ((fake + 1) ** 2).mean() / 2 + ((fake - 1) ** 2).mean() / 2
        total.append(0.7 * ((made - lesson) ** 2).mean() + 0.3 * game)
    found = detection_loss([(nets["model"].head(pyramid[0]), 2)], data.labels, kinds_of_findings)
    assert torch.isclose(loss, found + sum(total) / 2, rtol=0.02)


@pytest.mark.component("generative adversarial training")
def test_judge_and_student_play_against_each_other():
    nets, _ = step(MedDet(mimicry=0.0), LEARNING)
    plain, _ = step(MedDet(mimicry=0.0, adversary=0.0), LEARNING)
    assert all(touched(nets["pretext"]["judge"])) and not any(touched(plain["pretext"]["judge"]))
    grads = [dict(each["model"].named_parameters())["down.0.0.weight"].grad for each in (nets, plain)]
    assert not torch.allclose(*grads), "the student is to make the judge fail"
    parts, data = nets["pretext"], batch()
    parts.zero_grad()
    with torch.no_grad():
        true, made = parts["teachers"].lesson(data.images)[0], parts["make"](nets["model"].pyramid(data.images)[0])
    before = (parts["judge"](true) - parts["judge"](made)).mean()
    judged = meddet.played(parts["judge"], true, made)[0]
    judged.backward()
    with torch.no_grad():
        for p in parts["judge"].parameters():
            p -= 0.1 * p.grad
    assert (parts["judge"](true) - parts["judge"](made)).mean() > before


@pytest.mark.component("ablation")
def test_untaught_teachers_stay_as_they_were_and_all_else_is_the_same():
    assert ARMS["untaught teachers"] == replace(ARMS["meddet"], taught=False)
    assert ARMS["student alone"] == replace(ARMS["meddet"], waits=True)
    untaught, loss = step(ARMS["untaught teachers"], TEACHING)
    assert loss == 0 and not any(touched(untaught))
    assert untaught["pretext"]["teachers"].nets[0].down[0][1].running_mean.abs().max() > 0
    taught, loss = step(ARMS["meddet"], LEARNING)
    untaught, same = step(ARMS["untaught teachers"], LEARNING)
    assert loss == same and [p.shape for p in taught.parameters()] == [p.shape for p in untaught.parameters()]
    alone, _ = step(ARMS["student alone"], LEARNING)
    assert "pretext" not in alone and all(touched(alone["model"]))
    assert not any(touched(step(ARMS["student alone"], TEACHING)[0]))
    assert ARMS["meddet"].first(meddet.BUDGET.steps) == 225


@pytest.mark.component("fewer weights and operations")
def test_cost_is_that_of_its_convolutions():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    weights, operations = cost(net, torch.zeros(1, 2, 8, 8))
    assert weights == 2 * 4 * 9 + 4 + 4 + 1 and operations == 2 * 64 * (2 * 4 * 9 + 4)
    nets = MedDet().build(1, 37, 2)
    share = thrift(nets["model"], nets["pretext"]["teachers"].nets, torch.zeros(1, 1, 64, 64))
    assert share["weights"] == pytest.approx(0.2, abs=0.02) and share["flops"] == pytest.approx(0.4, abs=0.03)


def test_rows_are_of_the_student_and_of_the_teachers_with_and_without_noise():
    class Sure(nn.Module):
        """Sees findings where images are bright; noise makes it blind."""

        def forward(self, images):
            heat = torch.full((len(images), 3, 16, 16), -9.0)
            heat[:, 0] = 9 * torch.sign(images[:, 0, 1::2, 1::2] - 5)
            return heat, torch.full((len(images), 4, 16, 16), 2.0 if images.std() > 0.9 else 1.0).log()

    images, labels = torch.zeros(2, 1, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
    images[:, :, 5, 7], labels[:, 3:7, 5:9] = 10, 1
    nets = nn.ModuleDict({"average": Sure()})
    task = SimpleNamespace(preparation=SimpleNamespace(both=lambda case: (images, labels)))
    fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, task=task)
    case = SimpleNamespace(case_id="a", patient_id="a")
    (row,) = detection_rows(fitted, case)
    assert row["map"] == pytest.approx(1.0) and np.isnan([row["teachers"], row["weights"]]).all()
    teachers = Teachers(1, 1, 4, memory=False)
    nets["average"], nets["pretext"] = teachers.nets[0], nn.ModuleDict({"teachers": teachers})
    fitted.weights["last"] = nets.state_dict()
    (other,) = detection_rows(fitted, case)
    assert other.keys() == row.keys() and detection_rows(fitted, case) == [other]
    assert np.isfinite([value for value in other.values() if isinstance(value, float)]).all()
    means = [meddet.precision(net.eval(), images, labels) for net in teachers.nets]
    assert other["teachers"] == pytest.approx(np.mean(means)) and other["map"] == pytest.approx(means[0])
    labels[:] = IGNORE
    assert np.isnan(detection_rows(fitted, case)[0]["map"])


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(size):
    torch.manual_seed(0)
    method, data = MedDet(), batch(size)
    for enabled in (False, True):
        nets, got = method.build(1, 37, 2).train(), set()
        for now in (TEACHING, LEARNING):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = method.training_step(nets, data, None, now)
            loss.backward()
            method.after_step(nets, now)
            assert torch.isfinite(loss)
        got = {name for name, p in nets.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        assert got == {name for name, p in nets.named_parameters() if p.requires_grad}
    found = method.predict(nets.eval(), data.images)
    assert found.shape == (3, 37, *size) and torch.allclose(found.sum(1), torch.ones(3, *size), atol=1e-5)
