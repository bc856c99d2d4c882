"""Latent consistency on a global and a local way: consistency, guidance, masks and Poisson's equation."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation
from torch import nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.synthesis import gl_lcm
from medcook.recipes.synthesis._bones import DIFFUSION, noise_like
from medcook.recipes.synthesis.bs_ldm import BSLDM, Coder, limited, offset_noise, threshold
from medcook.recipes.synthesis.gl_lcm import (
    GLLCM,
    MANY,
    MARGIN,
    SKIP,
    Finder,
    around,
    boundary,
    consistent,
    fused,
    guided,
    recipe,
    rows,
    shown,
    times,
)

FIRST, SECOND = Moment(0, 10), Moment(5, 10)


def pairs(size: tuple[int, int] = (32, 32), many: int = 4) -> Batch:
    """Smooth images, to which a bright bar is added for the X-ray."""
    rng = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.randn(many, 1, 4, 4, generator=rng), size, mode="bilinear")
    labels = torch.zeros(many, *size).byte()
    labels[:, 8:16, 4:20] = 1
    return Batch(torch.cat([soft + 0.5 * labels[:, None], soft], dim=1), labels)


def built(method: GLLCM) -> nn.ModuleDict:
    """Networks with nothing at exactly 0, where some layers begin."""
    torch.manual_seed(0)
    nets = method.build(2, 2, 2).train()
    for weight in nets.parameters():
        weight.data += 0.02 * torch.randn(weight.shape)
    return nets


def step(method: GLLCM, nets: nn.ModuleDict, now: Moment) -> torch.Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, pairs(), None, now)


def moved(nets: nn.Module) -> set[str]:
    return {name for name, weight in nets.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}


@pytest.mark.component("latent consistency model")
class TestConsistency:
    def test_at_time_0_a_way_has_ended(self):
        noisy, clean = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        assert torch.equal(consistent(clean, noisy, torch.zeros(2)), noisy)
        torch.testing.assert_close(consistent(clean, noisy, torch.full((2,), 999)), clean, atol=1e-3, rtol=1e-3)

    def test_the_boundary_is_that_of_latent_consistency_models(self):
        t = torch.tensor([0, 1, 20, 999])
        skip, out = boundary(t, torch.zeros(4, 1, 1, 1))
        scaled = 10 * t.double()
        torch.testing.assert_close(skip.flatten().double(), 0.25 / (scaled**2 + 0.25))
        torch.testing.assert_close(out.flatten().double(), scaled / (scaled**2 + 0.25).sqrt())

    def test_the_loss_is_that_of_diffusion_and_of_the_distance_from_a_point_nearer_to_the_end(self):
        method, batch = GLLCM(local=False, weight=0.7), pairs()
        nets = built(method)
        found = step(method, nets, SECOND)
        xrays, soft = (nets["pretext"]["coder"].encode(batch.images[:, k : k + 1]) for k in (0, 1))
        torch.manual_seed(1)
        t = torch.randint(1000, (4,))
        noise = offset_noise(soft, method.offset)

        def end(name: str, t: torch.Tensor) -> tuple:
            noisy = DIFFUSION.noised(soft, noise, t)
            clean = xrays + nets[name](noisy, t, maps=xrays)
            return clean, consistent(clean, noisy, t)

        clean, here = end("model", t)
        before = end("average", t - SKIP)[1]
        wanted = (clean - soft).square().mean() + 0.7 * (here - before).square().mean()
        assert (t >= SKIP).all() and found.item() == pytest.approx(wanted.item(), rel=1e-4)
        plain = GLLCM(local=False, weight=0.0)
        assert step(plain, nets, SECOND).item() == pytest.approx((clean - soft).square().mean().item(), rel=1e-4)

    def test_the_averaged_weights_are_what_is_agreed_with(self):
        method = GLLCM(local=False)
        nets = built(method)
        step(method, nets, SECOND).backward()
        assert {name.split(".")[0] for name in moved(nets)} == {"model"}


@pytest.mark.component("few calls")
class TestCalls:
    def test_times_are_spread_evenly_and_the_last_is_not_the_end(self):
        assert times(4) == [999, 749, 500, 250] and times(1) == [999]

    def test_noise_is_added_anew_after_every_call(self):
        seen = []

        def net(x, t, maps):
            seen.append((int(t[0]), x))
            return torch.ones_like(x) - maps

        found = GLLCM(calls=3, local=False).sample(net, torch.zeros(2, 4, 8, 8))
        assert [t for t, _ in seen] == times(3)
        noise = noise_like(found, seed=1)
        torch.testing.assert_close(
            seen[1][1], DIFFUSION.noised(torch.ones_like(noise), noise, torch.tensor([666] * 2)), atol=1e-2, rtol=0
        )
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-2, rtol=0)

    def test_rows_say_how_many(self, monkeypatch):
        monkeypatch.setattr(gl_lcm, "suppression_rows", lambda fitted, case: [{"psnr": 1.0}])
        counted = {}
        for name, arm in recipe.arms.items():
            counted[name] = rows(SimpleNamespace(method=arm.method), None)[0]["calls"]
        assert counted["gl-lcm"] == 8 and counted["without the local way"] == 4
        assert counted["latent diffusion, 50 calls"] == counted["pixel diffusion, 50 calls"] == MANY == 50

    def test_they_are_what_is_called(self):
        images = []
        for method, wanted in ((GLLCM(), 8), (GLLCM(local=False), 4), (BSLDM(calls=5), 5)):
            nets = built(method).eval()
            nets["average"].register_forward_hook(lambda _, given, __: images.append(len(given[0])))
            with torch.no_grad():
                method.suppress(nets, pairs(many=1).images[:, :1])
            assert sum(images) == wanted
            images.clear()


@pytest.mark.component("Local-Enhanced Guidance")
class TestGuidance:
    def test_it_leads_away_from_the_global_way(self):
        local, whole = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        assert torch.equal(guided(local, whole, 1.0), local)
        torch.testing.assert_close(guided(local, whole, 1.5), local + 0.5 * (local - whole))

    def test_only_the_local_way_is_guided(self):
        """The network sees 0.2 on the global way, told 0, and 0.6 on the local one, told 1."""

        def net(x, t, maps):
            return 0.2 + 0.4 * maps - maps

        seen = torch.cat([torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)])
        whole, local = GLLCM(calls=1, strength=2.0).sample(net, seen)
        torch.testing.assert_close(whole, torch.full_like(whole, 0.2), atol=1e-3, rtol=0)
        torch.testing.assert_close(local, torch.full_like(local, 1.0), atol=1e-3, rtol=0)


@pytest.mark.component("thresholds")
def test_what_is_guided_is_held_within_the_limits():
    found = GLLCM(calls=1, local=False).sample(lambda x, t, maps: 9 - maps, torch.zeros(1, 4, 4, 4))
    torch.testing.assert_close(found, torch.full_like(found, threshold(999)), atol=1e-2, rtol=0)
    assert limited(torch.tensor(9.0), 999) == threshold(999)


@pytest.mark.component("lung segmentation")
class TestMask:
    def test_it_reaches_some_pixels_around_bones(self):
        bones = torch.rand(2, 20, 24) > 0.97
        wanted = [binary_dilation(each, np.ones((2 * MARGIN + 1,) * 2)) for each in bones.numpy()]
        assert np.array_equal(around(bones)[:, 0].numpy(), np.stack(wanted))

    def test_outside_there_is_air(self):
        images, mask = torch.randn(2, 2, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
        found = shown(images, mask)
        for mine, before, where in zip(found, images, mask, strict=True):
            assert torch.equal(mine[:, where[0]], before[:, where[0]])
            assert (mine[:, ~where[0]] == before.min()).all()

    def test_a_network_learns_where_bones_are(self):
        method, batch = GLLCM(), pairs()
        nets = built(method)
        logits = deepcopy(nets)["pretext"]["finder"](batch.images[:, :1])
        torch.manual_seed(1)
        rest = BSLDM.pretext(method, deepcopy(nets), method.partly(batch), FIRST)
        wanted = find_loss("both")(logits, batch.labels) + rest
        assert step(method, nets, FIRST).item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_it_finds_a_bar(self):
        torch.manual_seed(0)
        net, batch = Finder(), pairs()
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(25):
            loss = find_loss("both")(net(batch.images[:, :1]), batch.labels)
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        found = net(batch.images[:, :1]).argmax(1)
        assert (found == batch.labels).float().mean() > 0.9


@pytest.mark.component("dual-path sampling")
class TestWays:
    def test_about_half_of_what_is_learnt_from_is_masked(self):
        torch.manual_seed(0)
        batch = pairs((16, 16), many=400)
        found = GLLCM().partly(batch)
        outside = ~around(batch.labels == 1)
        masked = (found.images != batch.images).flatten(1).any(1)
        assert masked.float().mean().item() == pytest.approx(0.5, abs=0.1)
        for k in torch.where(masked)[0][:5]:
            assert (found.images[k][:, outside[k, 0]] == batch.images[k].min()).all()
        assert GLLCM(local=False).partly(batch) is batch

    def test_the_second_is_shown_bones_and_what_is_around_them(self, monkeypatch):
        method, batch = GLLCM(calls=1), pairs(many=1)
        nets, given = built(method).eval(), []
        logits = torch.stack([-batch.labels.float(), batch.labels.float()], dim=1)
        nets["pretext"]["finder"].forward = lambda xrays: logits
        encode = Coder.encode
        monkeypatch.setattr(Coder, "encode", lambda self, images: given.append(images) or encode(self, images))
        with torch.no_grad():
            method.suppress(nets, batch.images[:, :1])
        assert torch.equal(given[0], batch.images[:, :1])
        assert torch.equal(given[1], shown(batch.images[:, :1], around(batch.labels == 1)))

    def test_both_begin_with_the_same_noise(self):
        seen = []
        GLLCM(calls=2).sample(lambda x, t, maps: seen.append(x) or 0 * x - maps, torch.zeros(4, 4, 8, 8))
        for noisy in seen:
            assert torch.equal(*noisy.chunk(2))


@pytest.mark.component("global-local fusion")
class TestFusion:
    def test_it_solves_poissons_equation(self):
        """Pixel by pixel, with a dense solver; the unknown is what is added to the global image."""
        rng = np.random.default_rng(0)
        local, whole, mask = rng.standard_normal((9, 11)), rng.standard_normal((9, 11)), rng.random((9, 11)) > 0.4
        places = {place: k for k, place in enumerate(zip(*np.where(mask), strict=True))}
        matrix, right, apart = np.zeros((len(places), len(places))), np.zeros(len(places)), local - whole
        for (row, column), k in places.items():
            for other in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
                if 0 <= other[0] < 9 and 0 <= other[1] < 11:
                    matrix[k, k] += 1
                if other in places:
                    matrix[k, places[other]] -= 1
                    right[k] += apart[row, column] - apart[other]
        wanted = whole.copy()
        for place, value in zip(places, np.linalg.solve(matrix, right), strict=True):
            wanted[place] += value
        tensors = [torch.from_numpy(each)[None, None].float() for each in (local, whole)]
        found = fused(*tensors, torch.from_numpy(mask)[None, None])
        np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-3)

    def test_outside_nothing_changes_and_brightness_does_not_count(self):
        torch.manual_seed(0)
        local, whole = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
        mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        mask[:, :, 4:12, 3:13] = True
        found = fused(local, whole, mask)
        assert torch.equal(found[~mask], whole[~mask]) and (found - whole)[mask].abs().max() > 0.1
        torch.testing.assert_close(fused(local + 5, whole, mask), found, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused(whole + 5, whole, mask), whole, atol=1e-4, rtol=1e-4)

    def test_black_outside_the_mask_does_not_come_in(self):
        torch.manual_seed(0)
        whole, mask = torch.randn(1, 1, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.bool)
        mask[:, :, 4:12, 4:12] = True
        local = torch.where(mask, whole, -9.0)
        torch.testing.assert_close(fused(local, whole, mask), whole, atol=1e-5, rtol=0)

    def test_it_is_what_is_predicted(self, monkeypatch):
        monkeypatch.setattr(gl_lcm, "fused", lambda local, whole, mask: local + whole + mask)
        method, xrays = GLLCM(calls=1), pairs(many=2).images[:, :1]
        nets = built(method).eval()
        with torch.no_grad():
            found = method.suppress(nets, xrays)
            bones = nets["pretext"]["finder"](xrays).argmax(1) == 1
            coder = nets["pretext"]["coder"]
            seen = torch.cat([coder.encode(xrays), coder.encode(shown(xrays, around(bones)))])
            whole, local = coder.decode(method.sample(nets["average"], seen)).chunk(2)
        torch.testing.assert_close(found, local + whole + bones[:, None])

    def test_no_mask_and_nothing_but_mask(self):
        local, whole = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
        assert torch.equal(fused(local, whole, torch.zeros(2, 1, 8, 8, dtype=torch.bool)), whole)
        assert torch.isfinite(fused(local, whole, torch.ones(2, 1, 8, 8, dtype=torch.bool))).all()


@pytest.mark.component("SZCH-X-Rays and JSRT")
def test_it_is_compared_on_x_rays_from_ct_with_a_margin():
    task = recipe.scales["full"].task
    assert task.dataset == "openkbp" and task.data_kind == "real-anatomy-simulated"
    assert recipe.expect == "non-inferior" and recipe.margin == 0.02


def test_the_ablation_lacks_the_local_way_alone():
    arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
    full, cut = (arms[name] for name in recipe.ablation)
    assert {key for key in full if full[key] != cut[key]} == {"local"} and cut["local"] is False
    assert "finder" not in built(GLLCM(local=False))["pretext"]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 24)])
def test_any_size(size):
    method, xrays = GLLCM(calls=2), pairs(size).images[:, :1]
    nets = built(method).eval()
    with torch.no_grad():
        found = method.suppress(nets, xrays)
        assert found.shape == xrays.shape and torch.equal(found, method.suppress(nets, xrays))


def test_every_parameter_learns():
    nets = built(GLLCM())
    for now in (FIRST, SECOND):
        step(GLLCM(), nets, now).backward()
    assert moved(nets) == {name for name, weight in nets.named_parameters() if weight.requires_grad}


def test_bfloat16():
    nets = built(GLLCM(calls=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for now in (FIRST, SECOND):
            assert torch.isfinite(step(GLLCM(), nets, now))
        assert GLLCM(calls=2).suppress(nets.eval(), pairs().images[:, :1]).dtype == torch.float32
