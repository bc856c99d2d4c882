"""Tuning on a hospital's few X-rays: what thaws when, at which rate, mixed images, the probe, and the pretext."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import SqueezeNet
from medcook.recipes.pretraining import bpd_finetune
from medcook.recipes.pretraining.bpd_finetune import (
    BRAINS,
    STAGES,
    OtherHospitalsTask,
    SiteTuned,
    cut_mixed,
    mixed_loss,
    recipe,
)
from medcook.tasks import Budget
from medcook.training import Loop

TUNED = SiteTuned(start="random", share=0.0)
STEPS = 90
"""30 of the probe, then 60: layers 4, 3 and 2 thaw at 10%, 30% and 60% of these, in steps 36, 48 and 66."""


def batch(size: tuple[int, int] = (32, 32), count: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) % 2).byte().view(-1, 1, 1).expand(-1, *size).contiguous()
    return Batch(labels[:, None] + torch.randn(count, 1, *size, generator=rng), labels)


def built(method: SiteTuned) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 2, 2).train()


def learning(nets, method: SiteTuned, step: int, steps: int = STEPS, extra: Batch | None = None) -> list[bool]:
    """Which of the stages, the head (and the pretext's head) get a gradient in a step."""
    nets.zero_grad()
    method.training_step(nets, batch(), extra, Moment(step, steps)).backward()
    model = nets["model"]
    parts = [[getattr(model.encoder, name) for name in names] for names in STAGES] + [[model.head]]
    parts += [[nets["pretext"]]] if "pretext" in nets else []
    return [any(p.grad is not None for part in mine for p in part.parameters()) for mine in parts]


@pytest.mark.component("progressive layer freezing")
class TestFreezing:
    def test_stages_thaw_from_the_head_down_at_their_moments_and_the_stem_never(self):
        nets = built(TUNED)
        for step in (29, 30, 35, 36, 47, 48, 65, 66, 89):
            expected = [False, step >= 66, step >= 48, step >= 36, True]
            assert learning(nets, TUNED, step) == expected

    def test_what_is_frozen_stays_as_it_was_to_the_last_bit_and_the_rest_moves(self):
        nets, method = built(TUNED), replace(TUNED, cutmix=0.0)
        before = {name: tensor.clone() for name, tensor in nets["model"].named_parameters()}
        optimiser, schedule = method.optimise([p for p in nets.parameters() if p.requires_grad], 30)
        for step in range(20):  # layer 3 thaws in step 16, layer 2 in step 22
            method.training_step(nets, batch(), None, Moment(step, 30)).backward()
            optimiser.step(), optimiser.zero_grad(set_to_none=True), schedule.step()
        moved = {name for name, tensor in nets["model"].named_parameters() if not torch.equal(tensor, before[name])}
        thawed = ("head.", *(f"encoder.{name}." for names in STAGES[2:] for name in names))
        assert moved == {name for name in before if name.startswith(thawed)}

    def test_the_ablation_trains_every_layer_after_the_probe_and_is_the_same_otherwise(self):
        method, ablation = (recipe.arms[name].method for name in recipe.ablation)
        assert replace(ablation, progressive=True) == method
        flat = replace(ablation, start="random", share=0.0)
        assert learning(built(flat), flat, 29) == [False] * 4 + [True]
        assert learning(built(flat), flat, 30) == [True] * 5

    def test_stages_are_the_whole_encoder_in_order(self):
        names = [name for names in STAGES for name in names]
        assert names == [name for name, _ in SqueezeNet(features_only=True).named_children()]


@pytest.mark.component("discriminative learning rates")
class TestRates:
    @pytest.mark.parametrize(
        "progressive, peaks", [(True, (1e-4, 2.5e-4, 5e-4, 1e-3)), (False, (2.5e-4,) * 3 + (1e-3,))]
    )
    def test_each_stage_goes_along_torchs_one_cycle_to_its_own_peak(self, progressive, peaks):
        nets, method = built(TUNED), replace(TUNED, progressive=progressive)
        optimiser, schedule = method.optimise([p for p in nets.parameters() if p.requires_grad], STEPS)
        other = torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)]} for _ in peaks])
        cycle = OneCycleLR(other, list(peaks), total_steps=60, pct_start=0.3)
        for step in range(STEPS):
            found = [group["lr"] for group in optimiser.param_groups]
            expected = [group["lr"] for group in other.param_groups] if step >= 30 else [0.0, 0.0, 0.0, 1e-3]
            assert found[1:] == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert found[0] == (0 if progressive else pytest.approx(expected[0], rel=1e-6))
            optimiser.step(), schedule.step()
            if step >= 30:
                other.step(), cycle.step() if step + 1 < STEPS else None

    def test_a_group_holds_the_weights_of_its_stage(self):
        method = replace(TUNED, share=0.5)
        nets = built(method)
        groups = method.optimise([p for p in nets.parameters() if p.requires_grad], STEPS)[0].param_groups
        model = nets["model"]
        parts = [[p for name in names for p in getattr(model.encoder, name).parameters()] for names in STAGES]
        parts += [list(model.head.parameters()), list(nets["pretext"].parameters())]
        assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in part] for part in parts]


@pytest.mark.component("CutMix")
class TestCutMix:
    def test_a_box_comes_from_the_partner_and_lam_is_what_is_left(self):
        images = torch.arange(6.0).view(-1, 1, 1, 1).expand(-1, 2, 24, 40)
        shares = []
        for seed in range(200):
            torch.manual_seed(seed)
            mixed, partner, lam = cut_mixed(images)
            assert sorted(partner.tolist()) == list(range(6))
            torch.testing.assert_close(mixed.mean((1, 2, 3)), lam * torch.arange(6.0) + (1 - lam) * partner)
            changed = (mixed != images).any(1)[partner != torch.arange(6)]
            rows, columns = changed[0].any(1), changed[0].any(0)
            assert (changed == (rows[:, None] & columns)).all()
            assert changed[0].float().mean().item() == pytest.approx(1 - lam)
            shares.append(lam)
        assert min(shares) < 0.3 and max(shares) > 0.95

    def test_the_box_is_as_large_as_it_was_drawn_where_it_fits(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.75))  # 1 - u = 1/4: half of each side
        monkeypatch.setattr(torch, "randint", lambda side, _: torch.tensor(side // 2))
        assert cut_mixed(torch.randn(4, 1, 32, 64))[2] == 0.75

    def test_the_loss_is_that_of_the_mixed_label(self):
        logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
        partner = torch.tensor([3, 0, 4, 1, 2])
        soft = 0.3 * F.one_hot(targets, 3) + 0.7 * F.one_hot(targets[partner], 3)
        torch.testing.assert_close(mixed_loss(logits, targets, partner, 0.3), F.cross_entropy(logits, soft))

    @pytest.mark.parametrize("cutmix, step, expected", [(1.0, 30, 1), (0.0, 30, 0), (1.0, 29, 0)])
    def test_batches_are_mixed_after_the_probe_alone(self, monkeypatch, cutmix, step, expected):
        asked = []
        monkeypatch.setattr(bpd_finetune, "cut_mixed", lambda images: asked.append(1) or cut_mixed(images))
        method = replace(TUNED, cutmix=cutmix)
        method.training_step(built(method), batch(), None, Moment(step, STEPS))
        assert len(asked) == expected


@pytest.mark.component("linear probing")
class TestProbe:
    def test_the_arm_never_touches_the_encoder(self):
        probe = replace(recipe.arms["linear probe"].method, start="random", share=0.0)
        nets = built(probe)
        assert all(learning(nets, probe, step) == [False] * 4 + [True] for step in (0, 50, STEPS - 1))
        assert probe.rates(Moment(STEPS - 1, STEPS))[:5] == (0, 0, 0, 0, 1e-3)

    def test_the_head_is_linear_in_normalised_features(self):
        nets, data = built(TUNED), batch((40, 24))
        model = nets["model"].eval()
        with torch.no_grad():
            grey = PHOTOGRAPH * data.images.expand(-1, 3, -1, -1)
            features = model.encoder.features(grey).mean((2, 3))
            norm, line = model.head[0], model.head[2]
            expected = line((features - norm.running_mean) / (norm.running_var + norm.eps).sqrt())
            torch.testing.assert_close(model(data.images), expected)


@pytest.mark.component("ImageNet initialisation")
def test_both_sides_start_from_the_same_imagenet_weights(monkeypatch):
    torch.manual_seed(7)
    weights = SqueezeNet(features_only=True)
    monkeypatch.setattr(bpd_finetune, "load_squeezenet", lambda: weights)
    for name in recipe.compare:
        model = recipe.arms[name].method.build(1, 2, 2)["average"]
        assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), weights.parameters(), strict=True))
    method, baseline = (recipe.arms[name].method for name in recipe.compare)
    assert replace(baseline, share=method.share) == method


@pytest.mark.component("in-domain pre-training")
class TestPretext:
    def test_who_is_learned_from_is_of_other_hospitals_and_of_the_training_part(self):
        data, held_out = BRAINS.data, BRAINS.data.split.folds(3)[0][1]
        site = lambda patient: data.attributes(data.patients[patient][0])["site"]  # noqa: E731
        assert {site(p) for p in BRAINS.unlabelled_patients} == {"south", "island"}
        assert {site(p) for p in BRAINS.labelled_patients + BRAINS.val_patients} == {"north"}
        assert not set(BRAINS.unlabelled_patients) & {*held_out, *data.split.test}

    def test_their_finding_comes_along_and_nothing_else(self):
        samples = BRAINS.samples("unlabelled")
        groups = [BRAINS.data.attributes(BRAINS.data.patients[p][0])["group"] for p in BRAINS.unlabelled_patients]
        said = torch.tensor([group == "atrophy" for group in groups])[samples.case_of]
        assert (samples.labels == IGNORE).all() and samples.raters.shape == (len(samples), 1, 96, 96)
        assert torch.equal(samples.raters, said.byte().view(-1, 1, 1, 1).expand_as(samples.raters))
        sex = replace(BRAINS, finding=("sex", "M")).samples("unlabelled")
        assert torch.equal(sex.images, samples.images) and not torch.equal(sex.raters, samples.raters)

    def test_patients_without_the_finding_known_stay_out(self):
        assert replace(BRAINS, finding=("shoe size", 40)).unlabelled_patients == ()

    def test_it_learns_the_finding_with_all_layers_and_not_the_outcome(self):
        method = replace(TUNED, share=0.5)
        nets, other = built(method), batch()
        known = (1 - other.labels)[:, None]
        other = other._replace(labels=torch.full_like(other.labels, IGNORE), raters=known)
        assert learning(nets, method, 44, extra=other) == [True] * 4 + [False, True]
        assert learning(nets, method, 45, extra=other) == [False] * 4 + [True, False]
        losses = []
        for raters in (known, 1 - known):
            torch.manual_seed(1)
            losses.append(method.training_step(nets, batch(), other._replace(raters=raters), Moment(0, STEPS)).item())
        torch.manual_seed(1)
        logits = nets["pretext"](nets["model"].features(method.view(other.images)))
        assert losses[0] == pytest.approx(F.cross_entropy(logits, known[:, 0, 0, 0].long()).item(), rel=1e-4)
        assert losses[0] != losses[1]

    def test_rates_of_the_pretext_are_those_of_full_tuning(self):
        method = replace(TUNED, share=0.5)
        for step in range(45):
            stages, heads = method.rates(Moment(step, 90))[:4], method.rates(Moment(step, 90))[4:]
            assert stages == pytest.approx([0.25 * heads[1]] * 4) and heads[0] == 0
        assert max(method.rates(Moment(step, 90))[5] for step in range(45)) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (128, 128), (21, 45)])
def test_probabilities_are_the_same_all_over_an_image_of_any_size(size):
    found = TUNED.predict(built(TUNED).eval(), torch.randn(2, 1, *size))
    assert found.shape == (2, 2, *size) and torch.allclose(found.sum(1), torch.ones(2, *size))
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))


@pytest.mark.parametrize("mixed", [False, True])
def test_every_part_gets_finite_gradients_in_either_precision(mixed):
    method = replace(TUNED, share=0.5, cutmix=1.0, progressive=False)
    nets, other = built(method), batch()
    for step in (0, 80):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = method.training_step(nets, batch(), other, Moment(step, STEPS))
        loss.backward()
        assert torch.isfinite(loss)
    trained = [p for name in ("model", "pretext") for p in nets[name].parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_run_of_both_phases_ends_and_scores_whoever_is_held_out():
    method, task = replace(TUNED, share=0.5), BRAINS
    budget = Budget(steps=6, batch=4, precision="float32", checks=0)
    samples = (task.samples("labelled"), task.samples("unlabelled"))
    fitted = Loop(method, task, budget, "float32", 0, *samples, None, progress=False, accelerator="cpu").run()
    case = next(iter(task.cases("val")))
    (row,) = recipe.score(fitted, case)
    assert 0 < row["score"] < 1 and row["outcome"] == (case.attributes["group"] == "atrophy")


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="not volumes"):
        TUNED.build(1, 2, 3)


def test_at_full_every_patient_of_the_hospital_is_scored_once():
    task = recipe.scales["full"].task
    assert isinstance(task, OtherHospitalsTask) and task.folds == recipe.scales["full"].replicates == 3
