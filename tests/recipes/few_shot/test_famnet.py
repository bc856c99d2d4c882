"""FAMNet: bands against NumPy's transform, attention against PyTorch's, and what each band contributes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medcook.few_shot import Shots
from medcook.few_shot.baselines import PrototypeNetwork
from medcook.losses import cross_entropy_and_dice
from medcook.recipes.few_shot.famnet import (
    SIDE,
    CrossAttention,
    FAMNet,
    Matching,
    agreement,
    band_masks,
    bands,
    foreground,
    recipe,
)

SMALL = {"channels": (4, 4, 6, 6)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int, size: int = 48) -> Shots:
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[..., size // 2 :] = 1
    maps = torch.randn(count, 6, size // 4, size // 4)
    maps[:, 0] += 2.0 * masks[:, ::4, ::4] - 1
    return Shots(torch.zeros(count, 1, size, size), maps, masks)


@pytest.mark.component("frequency-aware matching")
class TestBands:
    def test_they_are_those_of_a_shifted_transform(self):
        """The textbook way: move frequency zero to the middle, measure distances from there."""
        features = torch.randn(2, 64)
        square = features.numpy().reshape(2, 8, 8)
        spectrum = np.fft.fftshift(np.fft.fft2(square), axes=(-2, -1))
        row, column = np.indices((8, 8))
        radius = np.hypot(row - 4, column - 4) / np.hypot(4, 4)
        for band, mask in enumerate((radius <= 0.3, (radius > 0.3) & (radius < 0.7), radius >= 0.7)):
            wanted = np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real.reshape(2, 64)
            assert np.allclose(bands(features, 0.3)[band].numpy(), wanted, atol=1e-5)

    def test_their_sum_is_the_input(self):
        features = torch.randn(3, 5, 64)
        assert torch.allclose(bands(features, 0.3).sum(0), features, atol=1e-5)
        assert torch.equal(band_masks(8, 0.3).sum(0), torch.ones(8, 8))

    def test_a_constant_is_low_and_a_chessboard_high(self):
        flat, board = torch.ones(64), (-1.0) ** torch.arange(8.0).add(torch.arange(8.0)[:, None]).flatten()
        for features, band in ((flat, 0), (board, 2)):
            parts = bands(features, 0.3)
            assert torch.allclose(parts[band], features, atol=1e-5)
            assert all(parts[other].abs().max() < 1e-5 for other in range(3) if other != band)

    def test_they_are_matched_apart(self):
        """A change of the query's high frequencies alone reaches the result."""
        method = FAMNet(**SMALL)
        net = method.build(1, 3, 2)["model"]
        support, query = torch.randn(2, 1, 6, 64)
        board = (-1.0) ** torch.arange(8.0).add(torch.arange(8.0)[:, None]).flatten()
        changed = method.matched(net, support, query + board) - method.matched(net, support, query)
        assert changed.abs().max() > 1e-4
        whole = FAMNet(**SMALL, bands=False).matched(net, support, query)
        assert torch.equal(whole, net["matching"](support, query, damped=False))

    def test_foreground_is_pooled_in_order(self):
        maps, inside = torch.arange(256.0).view(1, 1, 16, 16), torch.zeros(1, 16, 16)
        inside[0, :8] = 1
        wanted = torch.arange(128.0).view(64, 2).mean(1)
        assert torch.equal(foreground(maps, inside)[0, 0], wanted)

    def test_without_any_the_likeliest_place_stands_for_it(self):
        maps, inside = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 0.1)
        inside[0, 2, 1] = 0.4
        assert torch.allclose(foreground(maps, inside), maps[:, :, 2, 1, None].expand(1, 3, SIDE * SIDE))


@pytest.mark.component("suppression of domain-variant bands")
class TestDamping:
    def test_agreement_counts_or_is_damped(self):
        support, query = torch.randn(2, 1, 5, 4)
        a, b = support[0, :, 1].numpy(), query[0, :, 1].numpy()
        alike = 1 / (1 + np.exp(-a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        assert agreement(support, query, False)[0, 0, 1].item() == pytest.approx(alike, abs=1e-5)
        assert agreement(support, query, True)[0, 0, 1].item() == pytest.approx(1 - alike, abs=1e-5)

    def test_the_low_and_the_high_band_are_damped_and_the_middle_one_is_not(self):
        seen = []

        class Watching(Matching):
            def forward(self, support, query, damped):
                seen.append(damped)
                return super().forward(support, query, damped)

        net = FAMNet(**SMALL).build(1, 3, 2)["model"]
        net["matching"] = Watching(SIDE * SIDE)
        FAMNet(**SMALL).matched(net, *torch.randn(2, 1, 6, 64))
        FAMNet(**SMALL, damp=False).matched(net, *torch.randn(2, 1, 6, 64))
        assert seen == [True, False, True, False, False, False]

    def test_weights_reach_both_sides(self):
        matching = Matching(64)
        support, query = torch.randn(2, 1, 6, 64)
        weight = agreement(support, query, True)
        wanted = matching.fuse(torch.cat([weight * matching.support(support), weight * matching.query(query)], -1))
        assert torch.allclose(matching(support, query, True), wanted)
        assert not torch.allclose(matching(support, query, False), wanted)


@pytest.mark.component("multi-spectral fusion")
class TestFusion:
    def test_it_is_scaled_dot_product_attention(self):
        attention = CrossAttention(6)
        asking, answering = torch.randn(2, 1, 6, 10)
        q, k = asking.transpose(1, 2), answering.transpose(1, 2)
        wanted = F.scaled_dot_product_attention(attention.ask(q), attention.key(k), attention.value(k)).transpose(1, 2)
        assert torch.allclose(attention(asking, answering), wanted, atol=1e-5)

    def test_every_band_learns_through_it(self):
        method = FAMNet(**SMALL)
        net = method.build(1, 3, 2)["model"]
        method.matched(net, *torch.randn(2, 2, 6, 64)).sum().backward()
        for name in ("low", "high"):
            assert net["fusion"][name].value.weight.grad.abs().max() > 0


@pytest.mark.component("coarse prediction of the query")
class TestPrototype:
    def test_the_first_segmentation_is_that_of_prototypes(self):
        method, support, query = FAMNet(**SMALL), shots(1), shots(2)
        net = method.build(1, 3, 2)["model"]
        coarse, fine = method.coarse_and_fine(net, support, query)
        assert torch.allclose(coarse, PrototypeNetwork().logits(net, support, query), atol=1e-4)
        assert not torch.allclose(coarse, fine, atol=1e-2)

    def test_the_query_changes_the_structure_alone(self):
        method, support, query = FAMNet(**SMALL), shots(1), shots(2)
        net = method.build(1, 3, 2)["model"]
        coarse, fine = method.coarse_and_fine(net, support, query)
        assert torch.allclose(coarse[:, 0], fine[:, 0], atol=1e-4)

    def test_without_gain_the_bands_add_nothing(self):
        method, support, query = FAMNet(**SMALL), shots(1), shots(2)
        net = method.build(1, 3, 2)["model"]
        torch.nn.init.zeros_(net["scalars"]["gain"])
        assert torch.allclose(*method.coarse_and_fine(net, support, query), atol=1e-4)

    def test_both_segmentations_are_trained(self):
        method, support, query = FAMNet(**SMALL), shots(1), shots(2)
        net = method.build(1, 3, 2)["model"]
        wanted = sum(
            cross_entropy_and_dice(F.interpolate(each, (48, 48), mode="bilinear"), query.masks)
            for each in method.coarse_and_fine(net, support, query)
        )
        assert method.episode_loss(net, support, query).item() == pytest.approx(wanted.item(), abs=1e-5)
        method.episode_loss(net, support, query).backward()
        assert net["matching"].fuse[0].weight.grad.abs().max() > 0


def test_training_and_test_are_of_different_data():
    full = recipe.scales["full"].task
    assert full.source == "acdc" and full.dataset == "chest_xray"


def test_shots_are_pooled_together():
    maps, inside = torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4)
    pooled = foreground(maps, inside)
    assert torch.allclose(pooled.mean(2)[0], maps.mean((0, 2, 3)), atol=1e-5)
