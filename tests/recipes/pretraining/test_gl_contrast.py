"""Global and local contrast: who belongs together, what a region is, and which weights each stage moves."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import NONE
from medcook.image_pool import PLACES
from medcook.methods import Batch, Moment, Supervised
from medcook.pretraining import info_nce, one_cycle
from medcook.recipes.pretraining.gl_contrast import (
    REGIONS,
    GlobalLocal,
    SliceHead,
    contrast,
    part_decoded,
    partners,
    parts,
    recipe,
    regions,
)

TINY = dict(channels=(4, 8, 8, 8, 8))
GLOBAL, LOCAL, LABELS = Moment(0, 10), Moment(4, 10), Moment(8, 10)
"""Steps of a run of ten: two of the encoder, three of the decoder, five on labels."""


def groups(*slices: tuple[int, float]) -> Tensor:
    """Groups of slices (number of the volume, place in it)."""
    return torch.tensor([volume * PLACES + round(place * PLACES) for volume, place in slices])


MIXED = groups((0, 0.0), (1, 0.2), (0, 0.1), (2, 0.9), (1, 0.8), (2, 0.5))
"""Parts 0, 0, 0, 3, 3, 2 of volumes 0, 1, 0, 2, 1, 2."""


def batch(size: tuple[int, int] = (64, 48)) -> Batch:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (6, *size), generator=rng).byte()
    return Batch(torch.randn(6, 1, *size, generator=rng), labels, groups=MIXED)


def built(method: GlobalLocal, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return method.build(1, 3, 2).train()


def step(method: GlobalLocal, nets: nn.ModuleDict, now: Moment, given: Batch | None = None) -> Tensor:
    torch.manual_seed(1)
    return method.training_step(nets, given or batch(), given or batch(), now)


@pytest.mark.component("contrast by the part of the volume (domain-specific cue)")
class TestParts:
    def test_a_volume_is_cut_into_equal_parts(self):
        part, volume = parts(MIXED, 4, 6)
        assert part.tolist() == [0, 0, 0, 3, 3, 2]
        assert volume.tolist() == [0, 1, 0, 2, 1, 2]
        assert parts(groups(*[(0, k / 8) for k in range(8)]), 4, 8)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_without_parts_or_origin_each_slice_is_alone(self):
        for given, count in ((MIXED, 0), (None, 4)):
            positive, negative = partners(*parts(given, count, 6))
            other_view = torch.arange(12).roll(6)
            assert torch.equal(positive, F.one_hot(other_view, 12).bool())
            assert torch.equal(negative, ~(positive | torch.eye(12, dtype=torch.bool)))

    def test_partners_are_those_of_the_loop(self):
        positive, negative = partners(*parts(MIXED, 4, 6))
        part, volume = [0, 0, 0, 3, 3, 2] * 2, [0, 1, 0, 2, 1, 2] * 2
        for a in range(12):
            for p in range(12):
                own_view = a != p and a % 6 == p % 6
                across = part[a] == part[p] and volume[a] != volume[p]
                assert positive[a, p].item() == (own_view or across)
                assert negative[a, p].item() == (part[a] != part[p])

    def test_the_loss_is_that_of_the_loop_over_pairs(self):
        vectors = torch.randn(12, 5)
        positive, negative = partners(*parts(MIXED, 4, 6))
        unit = [(v / v.norm()).double() for v in vectors]
        losses = []
        for a in range(12):
            against = sum(math.exp(unit[a] @ unit[n] / 0.1) for n in range(12) if negative[a, n])
            for p in range(12):
                if positive[a, p]:
                    near = math.exp(unit[a] @ unit[p] / 0.1)
                    losses.append(-math.log(near / (near + against)))
        assert contrast(vectors, positive, negative).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)

    def test_without_parts_it_is_simclr(self):
        vectors = torch.randn(12, 5)
        found = contrast(vectors, *partners(*parts(MIXED, 0, 6)))
        assert found.item() == pytest.approx(info_nce(*vectors.chunk(2)).item(), rel=1e-4)

    def test_where_all_is_of_one_part_there_is_no_loss_and_no_nan(self):
        vectors = torch.randn(4, 5, requires_grad=True)
        loss = contrast(vectors, *partners(torch.zeros(2), torch.arange(2)))
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(vectors.grad).all()

    def test_the_head_knows_where_in_the_slice_something_is(self):
        maps = torch.zeros(2, 3, 8, 8)
        maps[0, :, 0, 0] = maps[1, :, 7, 7] = 64
        one, other = SliceHead(3)(maps)
        assert one.shape == (128,) and not torch.allclose(one, other, atol=1e-2)

    def test_a_step_takes_the_loss_of_two_views_of_the_batch(self):
        """Without augmentation both views are the slices themselves, and the origin decides."""
        method = GlobalLocal(**TINY, augmentation=NONE)
        nets, seen = built(method), []
        nets["pretext"]["whole"].register_forward_hook(lambda _, __, out: seen.append(out))
        loss = step(method, nets, GLOBAL)
        wanted = contrast(seen[0], *partners(*parts(MIXED, 4, 6)))
        assert torch.allclose(seen[0][:6], seen[0][6:], atol=1e-5)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert step(replace(method, partitions=0), nets, GLOBAL).item() != pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.component("local contrastive loss (problem-specific cue)")
class TestRegions:
    def test_a_region_is_its_window_of_the_map(self):
        maps = torch.randn(2, 3, 11, 15)
        found = regions(maps)
        assert found.shape == (2, 13, 27)
        for k, (y, x) in enumerate(REGIONS):
            top, left = round(y * 8), round(x * 12)
            assert torch.equal(found[:, k], maps[:, :, top : top + 3, left : left + 3].flatten(1))
        assert len({(round(y * 8), round(x * 12)) for y, x in REGIONS}) == 13

    def test_the_map_is_that_of_the_network_on_its_way_up(self):
        nets, seen = built(GlobalLocal(**TINY)), []
        nets["model"].up[2].register_forward_hook(lambda _, __, out: seen.append(out))
        images = batch().images
        nets["model"](images)
        found = part_decoded(nets["model"], images, 2)
        assert found.shape == (6, 8, 16, 12) and torch.allclose(found, seen[0], atol=1e-5)

    def test_a_step_contrasts_the_regions_of_each_slice_alone(self):
        method = GlobalLocal(**TINY)
        nets, seen = built(method), []
        nets["pretext"]["regions"].register_forward_hook(lambda _, __, out: seen.append(out))
        loss = step(method, nets, LOCAL)
        assert seen[0].shape == (12, 13, 128)
        wanted = [info_nce(seen[0][k], seen[0][k + 6]) for k in range(6)]
        assert loss.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)

    def test_views_differ_in_intensity_and_stay_in_place(self):
        method = GlobalLocal(**TINY, augmentation=replace(GlobalLocal().augmentation, noise=0.0, gamma=0.0))
        nets, seen = built(method), []
        nets["model"].down[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
        step(method, nets, LOCAL)
        one, other = seen[0].chunk(2)
        assert not torch.allclose(one, other)
        for views in (one, other):  # without noise and gamma a view is a linear map of its slice
            pairs = zip(views.flatten(1), batch().images.flatten(1), strict=True)
            assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.9999 for pair in pairs)


@pytest.mark.component("pre-training in stages, then fine-tuning")
class TestStages:
    def learning(self, method: GlobalLocal, now: Moment) -> set[str]:
        """Which parts of the networks get a gradient in a step; each part wholly."""
        nets = built(method)
        step(method, nets, now).backward()
        found = set()
        for name, part in {
            "encoder": nets["model"].down,
            "first blocks": nets["model"].up[2:],
            "last blocks": nets["model"].up[:2],
            "output": nets["model"].head,
            **nets["pretext"],
        }.items():
            moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters()]
            assert all(moved) or not any(moved), name
            found |= {name} if all(moved) else set()
        return found

    def test_each_stage_moves_its_own_part(self):
        method = GlobalLocal(**TINY)
        assert self.learning(method, GLOBAL) == {"encoder", "whole"}
        assert self.learning(method, LOCAL) == {"first blocks", "regions"}
        assert self.learning(method, LABELS) == {"encoder", "first blocks", "last blocks", "output"}

    def test_without_the_local_loss_the_encoder_has_the_whole_pretext(self):
        method = GlobalLocal(**TINY, local=0.0)
        assert self.learning(method, LOCAL) == {"encoder", "whole"}

    def test_each_stage_has_its_own_schedule(self):
        method = GlobalLocal(pretext_rate=2.0, rate=1.0)
        found = [method.rate_at(Moment(k, 100)) for k in range(100)]
        cycles = [2 * one_cycle(k, 25) for k in range(25)] * 2 + [one_cycle(k, 50) for k in range(50)]
        assert found == pytest.approx(cycles)

    def test_fine_tuning_is_supervised_training(self):
        method = GlobalLocal(**TINY)
        nets = built(method)
        wanted = Supervised(**TINY).training_step(nets, batch(), None, LABELS)
        assert torch.equal(step(method, nets, LABELS), wanted)


@pytest.mark.component("with a simple data augmentation")
class TestMixup:
    def test_images_and_losses_are_mixed_alike(self, monkeypatch):
        monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.25))
        order = torch.tensor([1, 2, 0, 5, 3, 4])
        monkeypatch.setattr(torch, "randperm", lambda n: order)
        method, plain = GlobalLocal(**TINY, mixup=0.1), GlobalLocal(**TINY)
        nets, given = built(method), batch()
        mixed = given._replace(images=0.25 * given.images + 0.75 * given.images[order])
        one = plain.supervised(nets, mixed, LABELS)
        other = plain.supervised(nets, mixed._replace(labels=given.labels[order]), LABELS)
        assert method.supervised(nets, given, LABELS).item() == pytest.approx((0.25 * one + 0.75 * other).item())

    def test_the_share_follows_torchs_generator_and_is_mostly_extreme(self):
        torch.manual_seed(0)
        shares = torch.distributions.Beta(0.1, 0.1).sample((500,))
        assert ((shares < 0.1) | (shares > 0.9)).float().mean() > 0.7
        method = GlobalLocal(**TINY, mixup=0.1)
        nets = built(method).eval()
        assert step(method, nets, LABELS).item() == step(method, nets, LABELS).item()


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (128, 128)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_any_size_and_precision(size, bfloat16):
    method = GlobalLocal(**TINY)
    nets = built(method)
    for now in (GLOBAL, LOCAL, LABELS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = step(method, nets, now, batch(size))
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert method.predict(nets.eval(), batch(size).images).shape == (6, 3, *size)


def test_the_ablation_has_the_same_network_and_encoder_head():
    method, without = (recipe.arms[name].method for name in recipe.ablation)
    assert replace(without, partitions=method.partitions, local=method.local) == method
    ours, theirs = built(method), built(without)
    assert {n: p.shape for n, p in ours["model"].named_parameters()} == {
        n: p.shape for n, p in theirs["model"].named_parameters()
    }
    assert set(ours["pretext"]) - set(theirs["pretext"]) == {"regions"}
