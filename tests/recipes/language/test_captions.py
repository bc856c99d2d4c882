"""Losses that tell the captions of images apart."""

import pytest
import torch
import torch.nn.functional as F

from medcook.recipes.language._captions import clip_loss, dhn_nce, same_captions


def similarities(count: int = 5) -> torch.Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(count, count, requires_grad=True)


def different(count: int = 5) -> torch.Tensor:
    return torch.eye(count, dtype=torch.bool)


@pytest.mark.component("DHN-NCE loss")
class TestLoss:
    def test_decoupled_the_partner_pulls_with_full_force(self):
        """A partner that is closer by one lowers the loss by one, however close it is; InfoNCE hardly moves then."""
        for more in (0.0, 20.0):
            one, other = (similarities() + (more + step) * torch.eye(5) for step in (0, 1))
            found = dhn_nce(one, different(), 0.15) - dhn_nce(other, different(), 0.15)
            assert found.item() == pytest.approx(1, abs=1e-4)
        assert (clip_loss(one, different()) - clip_loss(other, different())).item() < 0.01

    def test_hard_negatives_count_more(self):
        found = similarities() / 3
        slopes = {}
        for hard in (0.0, 1.0):
            (slope,) = torch.autograd.grad(dhn_nce(found, different(), hard), found, retain_graph=True)
            away = slope[~different()]
            slopes[hard] = away / away.sum()
        hardest = found[~different()].argmax()
        assert slopes[1.0][hardest] > 1.3 * slopes[0.0][hardest]

    def test_without_differences_it_is_clip_loss(self):
        found = similarities()
        rows = torch.arange(5)
        expected = (F.cross_entropy(found, rows) + F.cross_entropy(found.T, rows)) / 2
        torch.testing.assert_close(clip_loss(found, different()), expected)

    def test_equal_captions_are_no_negatives(self):
        found, same = similarities(), same_captions(("a", "b", "a", "c", "d"))
        assert same.sum() == 7
        changed = found.clone()
        changed[0, 2], changed[2, 0] = 50.0, 50.0
        for loss in (lambda x: dhn_nce(x, same, 0.15), lambda x: clip_loss(x, same)):
            torch.testing.assert_close(loss(found), loss(changed))
        alone = dhn_nce(found, torch.ones(5, 5, dtype=torch.bool), 0.15)
        assert alone.item() == 0 and alone.requires_grad
