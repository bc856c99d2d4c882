"""Bone suppression by diffusion and what mends its images; with that, what recipes of bone suppression share."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import nn

from medcook.data.transforms import NONE
from medcook.methods import Batch, Moment
from medcook.projections import ProjectionTask, compared, suppression_rows
from medcook.recipes.imperfect_labels._adversarial import PatchJudge, played
from medcook.recipes.synthesis import _bones
from medcook.recipes.synthesis._bones import (
    DIFFUSION,
    RANGE,
    PixelDiffusion,
    UNetSuppression,
    dissimilarity,
    hybrid_loss,
    noise_like,
)
from medcook.recipes.synthesis.bs_diff import BSDiff, Enhancer, Generator, recipe
from medcook.tasks import Budget
from medcook.training import fit

STEPS = 20
FIRST, MAKES, SECOND = Moment(0, STEPS), Moment(13, STEPS), Moment(14, STEPS)


def pairs(size: tuple[int, int] = (32, 32), many: int = 2) -> Batch:
    """Smooth images, to which a bright bar is added for the X-ray."""
    rng = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.randn(many, 1, 4, 4, generator=rng), size, mode="bilinear")
    labels = torch.zeros(many, *size).byte()
    labels[:, 8:16] = 1
    return Batch(torch.cat([soft + 0.5 * labels[:, None], soft], dim=1), labels)


def built(method) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 2, 2).train()


def step(method, nets: nn.ModuleDict, now: Moment, batch: Batch | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, batch or pairs(), None, now)


def moved(nets: nn.Module) -> set[str]:
    return {name for name, weight in nets.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}


def learn(method, steps: int, batch: Batch | None = None) -> nn.ModuleDict:
    """All steps of a run on one batch, with Adam in place of the schedule."""
    nets = built(method)
    optimiser = torch.optim.Adam([weight for weight in nets.parameters() if weight.requires_grad], lr=1e-2)
    for number in range(steps):
        torch.manual_seed(number)
        loss = method.training_step(nets, batch or pairs(), None, Moment(number, steps))
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        method.after_step(nets, Moment(number, steps))
    return nets.eval()


class TestShared:
    def test_the_loss_of_the_u_net_is_what_suppression_measures(self):
        method, batch = UNetSuppression(channels=(8, 8)), pairs()
        nets = built(method)
        nets["average"] = nets["model"]
        given = method.suppress(nets, batch.images[:, :1])
        assert step(method, nets, FIRST).item() == pytest.approx((given - batch.images[:, 1:]).square().mean().item())

    def test_a_u_net_that_says_nothing_leaves_the_x_ray(self):
        batch = pairs()
        silent = nn.Conv2d(1, 1, 1)
        nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
        assert torch.equal(UNetSuppression.less(silent, batch.images[:, :1]), batch.images[:, :1])

    def test_a_prediction_depends_on_nothing_but_its_image(self):
        batch = pairs(many=3)
        for method in (UNetSuppression(), PixelDiffusion(calls=2), BSDiff(calls=2)):
            nets = built(method).eval()
            for weight in nets.parameters():
                weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                torch.manual_seed(3)
                together = method.suppress(nets, batch.images[:, :1])
                alone = method.suppress(nets, batch.images[1:2, :1])
            torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)

    def test_the_same_noise_each_time_and_another_for_another_seed(self):
        images = torch.zeros(2, 1, 8, 8)
        assert torch.equal(noise_like(images), noise_like(images)) and not torch.equal(
            noise_like(images), noise_like(images, 1)
        )
        assert noise_like(torch.zeros(1, 4, 64, 64)).std().item() == pytest.approx(1, abs=0.02)

    def test_similarity_is_scikits(self):
        rng = np.random.default_rng(0)
        truth = rng.standard_normal((1, 1, 48, 48)).astype(np.float32)
        given = truth + 0.3 * rng.standard_normal(truth.shape).astype(np.float32)
        wanted = structural_similarity(
            given[0, 0], truth[0, 0], data_range=RANGE, gaussian_weights=True, sigma=1.0, use_sample_covariance=False
        )
        found = dissimilarity(torch.from_numpy(given), torch.from_numpy(truth)).item()
        assert found == pytest.approx(1 - wanted, abs=0.02)
        assert dissimilarity(torch.from_numpy(truth), torch.from_numpy(truth)).item() == pytest.approx(0, abs=1e-5)

    def test_the_hybrid_loss_is_the_sum_of_its_parts(self):
        torch.manual_seed(0)
        given, truth, judge = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16), PatchJudge(1).eval()
        wanted = (given - truth).abs().mean() + dissimilarity(given, truth) + 0.01 * sum(played(judge, truth, given))
        assert hybrid_loss(given, truth, judge).item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_judge_and_enhancer_both_learn_from_it(self):
        torch.manual_seed(0)
        given, judge = torch.randn(2, 1, 16, 16, requires_grad=True), PatchJudge(1)
        hybrid_loss(given, torch.randn(2, 1, 16, 16), judge).backward()
        assert given.grad.abs().max() > 0 and moved(judge) == {name for name, _ in judge.named_parameters()}


@pytest.mark.component("conditional diffusion model")
class TestDiffusion:
    def test_the_loss_is_that_of_diffusion_told_the_x_ray(self):
        batch, method = pairs(), BSDiff()
        nets = built(method)
        denoiser = nets["pretext"].denoiser
        nn.init.normal_(denoiser.leave[-1].weight)
        found = step(method, nets, FIRST)
        torch.manual_seed(1)
        t, noise = torch.randint(1000, (2,)), torch.randn(2, 1, 32, 32)
        noisy = DIFFUSION.noised(batch.images[:, 1:], noise, t)
        said = batch.images[:, :1] + denoiser(noisy, t, maps=batch.images[:, :1])
        wanted = (said - DIFFUSION.wanted(batch.images[:, 1:], noise, t)).square().mean()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_another_x_ray_gives_another_image(self):
        nets = built(BSDiff(calls=2)).eval()
        for weight in nets.parameters():
            weight.data += 0.05 * torch.randn(weight.shape)
        xrays = torch.randn(1, 1, 32, 32).repeat(2, 1, 1, 1)
        xrays[1] *= -1
        with torch.no_grad():
            one, other = BSDiff(calls=2).suppress(nets, xrays)
        assert (one - other).abs().max() > 1e-2

    def test_every_call_starts_where_the_last_one_ended(self, monkeypatch):
        seen = []

        def net(x, t, maps):
            seen.append((x, int(t[0])))
            return torch.zeros_like(x)

        PixelDiffusion(calls=4).suppress({"average": net}, torch.zeros(1, 1, 8, 8))
        assert [t for _, t in seen] == [999, 666, 333, 0]
        first, second = seen[0][0], seen[1][0]
        clean, noise = DIFFUSION.seen(torch.zeros_like(first), first, torch.tensor([999]))
        torch.testing.assert_close(second, DIFFUSION.noised(clean.clamp(-4, 4), noise, torch.tensor([666])))


@pytest.mark.component("enhancement module")
class TestEnhancement:
    def test_it_begins_with_the_image_itself_and_keeps_any_size(self):
        for size in ((32, 32), (64, 64), (16, 24)):
            images = torch.randn(2, 1, *size)
            assert torch.equal(Enhancer()(images), images)

    def test_all_goes_through_half_as_many_numbers(self):
        net = Enhancer()
        seen = []
        net.outward[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
        net(torch.randn(1, 1, 64, 64))
        assert seen[0].numel() == 64 * 64 // 2

    def test_what_was_made_is_kept_beside_what_it_should_be(self):
        batch, method = pairs(), BSDiff(calls=2)
        nets = built(method)
        assert step(method, nets, MAKES).item() == 0
        made, soft = nets["pretext"].made.images.chunk(2, dim=1)
        torch.testing.assert_close(made, nets["pretext"].make(batch.images[:, :1], 2))
        assert torch.equal(soft, batch.images[:, 1:])

    def test_its_loss_is_of_made_images_alone(self):
        method = BSDiff(calls=2)
        nets = built(method)
        step(method, nets, MAKES)
        first = step(method, nets, SECOND)
        other = pairs()._replace(images=torch.randn(2, 2, 32, 32))
        assert step(method, nets, SECOND, other).item() == pytest.approx(first.item(), rel=1e-4)
        torch.manual_seed(1)
        made, soft = nets["pretext"].made.draw(2)[0].chunk(2, dim=1)
        assert first.item() == pytest.approx(hybrid_loss(made, soft, nets["judge"]).item(), rel=1e-4)

    def test_it_takes_noise_out_of_what_was_made(self, monkeypatch):
        batch = pairs((16, 16))
        soft = batch.images[:, 1:]
        noisy = soft + 0.3 * noise_like(soft)
        method = BSDiff(share=0.1, making=1)
        monkeypatch.setattr(Generator, "make", lambda self, xrays, calls: noisy)
        nets = learn(method, 100, batch=batch)
        with torch.no_grad():
            mended = nets["model"](noisy)
        assert (mended - soft).square().mean() < 0.8 * (noisy - soft).square().mean()

    def test_the_denoiser_stands_still_meanwhile(self):
        method = BSDiff(calls=2)
        nets = built(method)
        step(method, nets, MAKES)
        step(method, nets, SECOND).backward()
        assert {name.split(".")[0] for name in moved(nets)} == {"model", "judge"}

    def test_the_enhancer_mends_what_is_predicted(self):
        method, xrays = BSDiff(calls=2), pairs().images[:, :1]
        nets = built(method).eval()
        nn.init.constant_(nets["average"].outward[-1].bias, 0.5)
        with torch.no_grad():
            found = method.suppress(nets, xrays)
            torch.testing.assert_close(found, nets["pretext"].make(xrays, 2) + 0.5)
            torch.testing.assert_close(BSDiff(calls=2, enhanced=False).suppress(nets, xrays), found - 0.5)


@pytest.mark.component("hybrid loss")
def test_the_loss_of_enhancement_has_all_its_levels(monkeypatch):
    torch.manual_seed(0)
    given, truth, judge = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16), PatchJudge(1).eval()
    full = hybrid_loss(given, truth, judge).item()
    monkeypatch.setattr(_bones, "dissimilarity", lambda given, truth: torch.tensor(0.0))
    without = hybrid_loss(given, truth, judge).item()
    assert full - without == pytest.approx(dissimilarity(given, truth).item(), rel=1e-4)
    pixels = (given - truth).abs().mean().item()
    assert hybrid_loss(given, truth, judge, adversarial=0.0).item() == pytest.approx(pixels, rel=1e-5)
    assert without == pytest.approx(pixels + 0.01 * sum(played(judge, truth, given)).item(), rel=1e-4)


@pytest.mark.component("bone suppression ratio")
def test_suppression_is_the_share_of_the_bones_squares_that_is_gone():
    batch = pairs()
    xrays, soft = (batch.images[:, k : k + 1] for k in (0, 1))
    given = soft + 0.3 * (xrays - soft)
    assert compared(given, soft, xrays)["suppression"] == pytest.approx(1 - 0.3**2, abs=1e-4)
    assert compared(given + 0.1, soft, xrays)["suppression"] < 1 - 0.3**2 - 0.01  # brightness counts, too


@pytest.mark.component("dual-energy X-rays of 120 patients")
def test_six_patients_of_nine_train_and_three_are_scored():
    task = recipe.scales["full"].task
    assert type(task) is ProjectionTask and task.dataset == "openkbp" and task.data_kind == "real-anatomy-simulated"
    assert (len(task.labelled_patients), len(task.val_patients), len(task.angles)) == (6, 3, 9)


class TestPhases:
    def test_the_denoiser_has_as_many_steps_in_the_ablation(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        full, cut = (arms[name] for name in recipe.ablation)
        assert {key for key in full if full[key] != cut[key]} == {"enhanced"} and cut["enhanced"] is False
        for steps in (600, 40, 20):
            rates = []
            for enhanced in (True, False):
                method = BSDiff(enhanced=enhanced)
                moments = [(Moment(number, steps), *method.phase(Moment(number, steps))) for number in range(steps)]
                rates.append([method.rate_at(now) for now, first, then in moments if first and method.learning(then)])
            assert rates[0] == rates[1] and len(rates[0]) == max(1, round(0.7 * steps) - 12)

    def test_without_enhancement_nothing_happens_before_the_denoiser_learns(self):
        method = BSDiff(enhanced=False)
        nets = built(method)
        assert step(method, nets, FIRST).item() == step(method, nets, Moment(17, STEPS)).item() == 0
        step(method, nets, Moment(19, STEPS)).backward()
        assert {name.split(".")[1] for name in moved(nets)} == {"denoiser"}

    def test_the_sampler_follows_the_denoiser_until_images_are_made(self):
        method = BSDiff(calls=1)
        nets = built(method)
        for weight in nets["pretext"].denoiser.parameters():
            weight.data += 1
        before = deepcopy(nets["pretext"].sampler.state_dict())
        method.after_step(nets, MAKES)
        assert all(torch.equal(before[name], value) for name, value in nets["pretext"].sampler.state_dict().items())
        method.after_step(nets, FIRST)
        assert any((before[name] != value).any() for name, value in nets["pretext"].sampler.state_dict().items())

    def test_every_parameter_learns(self):
        method = BSDiff(calls=1, augmentation=NONE)
        nets = built(method)
        for weight in nets.parameters():
            weight.data += 0.02 * torch.randn(weight.shape)
        for now in (FIRST, MAKES, SECOND):
            loss = step(method, nets, now)
            loss.backward()
        wanted = {name for name, weight in nets.named_parameters() if weight.requires_grad}
        assert moved(nets) == wanted


def test_a_run_is_scored_and_a_bank_survives_being_saved():
    task = ProjectionTask("embedded", fold=0, angles=(0.0,), side=32)
    method = BSDiff(calls=2, making=2)
    fitted = fit(method, task, Budget(10, 2, "float32", 0), cache=False, progress=False)
    (row,) = suppression_rows(fitted, next(iter(task.cases("val"))))
    assert row["psnr"] > 0 and len(fitted.nets["pretext"].made) == 4
    again = built(method)
    again.load_state_dict(fitted.weights["last"])
    assert len(again["pretext"].made) == 4


def test_bfloat16():
    for method in (UNetSuppression(), BSDiff(calls=2)):
        nets = built(method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for now in (FIRST, MAKES, SECOND):
                assert torch.isfinite(step(method, nets, now))
            assert method.suppress(nets.eval(), pairs().images[:, :1]).dtype == torch.float32
