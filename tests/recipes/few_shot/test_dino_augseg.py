"""DINO-AugSeg: the Haar transform against PyWavelets, attention against PyTorch's, and what stays frozen."""

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F

from medcook.methods import Batch, Moment
from medcook.recipes.few_shot import dino_augseg
from medcook.recipes.few_shot.dino_augseg import (
    LEVELS,
    ContextFusion,
    DinoAugSeg,
    drop_coefficients,
    haar,
    inverse_haar,
    pyramid,
)

NOW = Moment(0, 10)
TINY = {"channels": (4, 6, 8), "features": "random"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch() -> Batch:
    labels = torch.randint(0, 3, (2, 48, 48)).byte()
    return Batch(labels[:, None].float() + 0.1 * torch.randn(2, 1, 48, 48), labels)


@pytest.mark.component("WT-Aug")
class TestWavelets:
    def test_the_transform_is_pywavelets(self):
        maps = torch.randn(1, 2, 8, 6)
        low, (rows, columns, both) = pywt.dwt2(maps[0, 1].numpy(), "haar")
        for mine, theirs in zip(haar(maps)[:, 0, 1], (low, rows, columns, both), strict=True):
            assert np.allclose(mine.numpy(), theirs, atol=1e-5)

    def test_the_inverse_is_pywavelets(self):
        bands = torch.randn(4, 1, 1, 4, 3)
        low, *high = (band[0, 0].numpy() for band in bands)
        assert np.allclose(inverse_haar(bands)[0, 0].numpy(), pywt.idwt2((low, high), "haar"), atol=1e-5)
        maps = torch.randn(2, 3, 6, 4)
        assert torch.allclose(inverse_haar(haar(maps)), maps, atol=1e-5)

    def test_a_share_of_coefficients_of_every_band_is_lost(self):
        maps = torch.randn(2, 8, 32, 32)
        before, after = haar(maps), haar(drop_coefficients(maps, 0.3))
        lost = after.abs() < 1e-5
        assert torch.allclose(lost.float().mean((1, 2, 3, 4)), torch.full((4,), 0.3), atol=0.03)
        assert torch.allclose(after[~lost], before[~lost], atol=1e-4)

    def test_odd_sides_are_kept(self):
        maps = torch.randn(1, 2, 15, 7)
        assert torch.allclose(drop_coefficients(maps, 0.0), maps, atol=1e-5)

    def test_training_features_are_augmented_and_those_of_a_prediction_are_not(self, monkeypatch):
        shares = []

        def counted(maps, share):
            shares.append(share)
            return maps

        monkeypatch.setattr(dino_augseg, "drop_coefficients", counted)
        always, never = (DinoAugSeg(**TINY, often=1.0, wavelets=on) for on in (True, False))
        nets = always.build(1, 3, 2)
        always.training_step(nets, batch(), None, NOW)
        assert shares == [0.3] * len(LEVELS)
        never.training_step(nets, batch(), None, NOW)
        always.predict(nets, batch().images)
        assert len(shares) == len(LEVELS)


@pytest.mark.component("CG-Fuse")
class TestFusion:
    def test_deep_features_ask_fine_ones(self):
        fusion = ContextFusion(8, 6, 2, True)
        asking, answering = torch.randn(1, 6, 4, 4), torch.randn(1, 6, 2, 2)
        one, other = (F.layer_norm(maps.flatten(2).transpose(1, 2), (6,)) for maps in (asking, answering))
        told = F.scaled_dot_product_attention(fusion.ask(one), fusion.key(other), fusion.value(other))
        wanted = (one + fusion.out(told)).transpose(1, 2).reshape(1, 6, 4, 4)
        assert torch.allclose(fusion.attend(asking, answering), wanted, atol=1e-5)

    def test_a_far_place_is_heard(self):
        """Convolutions reach two cells; attention hears of a change in the other corner."""
        deep, fine = torch.randn(1, 8, 8, 8), torch.randn(1, 6, 16, 16)
        changed = fine.clone()
        changed[..., 12:, 12:] += 3 * torch.randn(1, 6, 4, 4)
        for context in (True, False):
            fusion = ContextFusion(8, 6, 2, context).eval()
            moved = (fusion(deep, changed) - fusion(deep, fine)).abs()[0, :, :4, :4].max()
            assert (moved > 1e-6) == context


@pytest.mark.component("frozen DINOv3 features")
class TestFrozen:
    def test_levels_are_fine_to_deep_and_of_one_scale(self):
        nets = DinoAugSeg(**TINY).build(1, 3, 2)
        levels = pyramid(nets["encoder"], torch.randn(2, 1, 128, 128))
        assert [maps.shape[1] for maps in levels] == list(LEVELS.values())
        assert [maps.shape[2] for maps in levels] == [61, 30, 15]
        assert all(maps.mean((2, 3)).abs().max() < 1e-3 for maps in levels)

    def test_the_decoder_alone_learns(self):
        method = DinoAugSeg(**TINY)
        nets = method.build(1, 3, 2)
        method.training_step(nets, batch(), None, NOW).backward()
        assert all(p.grad is None and not p.requires_grad for p in nets["encoder"].parameters())
        assert all(p.grad is not None for p in nets["model"].parameters())
        assert method.predict(nets.eval(), batch().images).shape == (2, 3, 48, 48)
