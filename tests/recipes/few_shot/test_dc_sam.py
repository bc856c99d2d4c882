"""DC-SAM: the cycle against a plain loop, two branches, SAM's features, and a SAM that stays as it is."""

import pytest
import torch

from medcook.few_shot import Shots
from medcook.recipes.few_shot._prompting import mask_priors, shown
from medcook.recipes.few_shot.dc_sam import HIDDEN, CycleAttention, DCSam, cycle_bias

SMALL = {"channels": (4, 4, 8, 8), "keys": 8, "tokens": 3, "pretrained": False}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int = 1, size: int = 32) -> Shots:
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[:, 8:20, 10:24] = 1
    images = masks[:, None] + 0.3 * torch.randn(count, 1, size, size)
    return Shots(images, torch.randn(count, 8, size // 4, size // 4), masks)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return DCSam(**SMALL).build(1, 3, 2)


def prompts(nets, query: Shots, **changes):
    """Tokens and rough mask of one fixed support."""
    method, support = DCSam(**SMALL | changes), shots()
    coarse = torch.randn(2, HIDDEN, 10, 10, generator=torch.Generator().manual_seed(1))
    maps = method.joined(torch.cat([support.maps, query.maps]), coarse)
    inside = shown(support.masks, tuple(maps.shape[2:]))
    return method.prompts(nets["model"], maps[:1], inside, maps[1:])


@pytest.mark.component("cycle-consistent cross-attention")
class TestCycle:
    def test_as_in_a_plain_loop(self):
        attention, kind = torch.randn(3, 4, 9), torch.rand(3, 9) > 0.5
        found = cycle_bias(attention, kind)
        for b in range(3):
            for j in range(9):
                token = max(range(4), key=lambda i, b=b, j=j: attention[b, i, j].item())
                back = max(range(9), key=lambda k, b=b, token=token: attention[b, token, k].item())
                assert (found[b, 0, j] == 0) == bool(kind[b, back] == kind[b, j])

    def test_something_always_remains(self):
        for _ in range(20):
            assert (cycle_bias(torch.randn(5, 2, 6), torch.rand(5, 6) > 0.5) == 0).any(-1).all()

    def test_what_the_cycle_excludes_is_not_heard(self):
        layer = CycleAttention(8, heads=1)
        tokens, places, kind = torch.randn(1, 2, 8), torch.randn(1, 7, 8), torch.rand(1, 7) > 0.5
        asked, keys = layer.ask(layer.before(tokens)), layer.key(places)
        excluded = cycle_bias(asked @ keys.transpose(1, 2) / 8**0.5, kind)[0, 0].isinf()
        assert excluded.any()
        hears = []
        for consistent in (True, False):
            given = places.clone().requires_grad_(True)
            layer(tokens, given, kind, consistent).sum().backward()
            hears.append(given.grad[0, excluded].abs().max().item())
        assert hears[0] == 0 and hears[1] > 0

    def test_every_head_has_its_own_cycle(self):
        found = CycleAttention(8, heads=2)(torch.randn(3, 2, 8), torch.randn(3, 7, 8), torch.rand(3, 7) > 0.5, True)
        assert found.shape == (3, 2, 8) and found.isfinite().all()


@pytest.mark.component("positive and negative branch")
class TestBranches:
    def test_tokens_of_both_with_the_codes_of_their_side(self, nets):
        codes = nets["model"]["sam"].sam.prompt_encoder.point_embed
        both, _ = prompts(nets, shots())
        alone, _ = prompts(nets, shots(), dual=False)
        assert both.shape == (1, 6, HIDDEN) and alone.shape == (1, 3, HIDDEN)
        torch.manual_seed(0)
        both, _ = prompts(nets, shots())
        torch.manual_seed(0)
        alone, _ = prompts(nets, shots(), dual=False)
        assert torch.allclose(both[:, 3:], alone) and not torch.allclose(both[:, :3], alone)
        before = nets["model"]["negative"].out.bias.detach().clone()
        with torch.no_grad():
            for branch in ("negative", "positive"):
                nets["model"][branch].out.weight.zero_(), nets["model"][branch].out.bias.zero_()
        tokens, _ = prompts(nets, shots())
        assert torch.allclose(tokens[0, 0], codes[0].weight[0]) and torch.allclose(tokens[0, 5], codes[1].weight[0])
        with torch.no_grad():
            for branch in ("negative", "positive"):
                torch.nn.init.normal_(nets["model"][branch].out.weight, std=0.1)
                nets["model"][branch].out.bias.copy_(before)

    def test_the_rough_mask_weighs_both_priors(self, nets):
        support = shots()
        query = support._replace(maps=support.maps.clone())
        _, rough = prompts(nets, query)
        inside = shown(support.masks, tuple(rough.shape[1:]))
        assert rough.shape == (1, 4, 4) and rough.abs().max() <= 1 and inside.any()
        maps = torch.randn(2, 8, 4, 4)
        priors = mask_priors(maps, torch.stack([inside[0], inside[0]]), maps)
        assert priors[:, 1][torch.stack([inside[0]] * 2)].min() == pytest.approx(1, abs=1e-5)


@pytest.mark.component("SAM features in the mask prior")
class TestFusion:
    def test_sam_has_its_say_where_places_are_compared(self):
        maps, coarse = torch.randn(2, 8, 8, 8), torch.randn(2, HIDDEN, 10, 10)
        inside = torch.zeros(1, 4, 4, dtype=torch.bool)
        inside[0, 1:3, 1:3] = True
        found = []
        for fused in (True, False):
            for sam in (coarse, coarse.flip(0) * 2):
                both = DCSam(**SMALL, fused=fused).joined(maps, sam)
                found.append(mask_priors(both[:1], inside, both[1:]))
        assert not torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[2], found[3])


@pytest.mark.component("prompt tuning of a frozen SAM")
class TestFrozen:
    def test_only_the_prompts_learn(self, nets):
        method, query = DCSam(**SMALL), shots(2)
        logits = method.logits(nets["model"], shots(), query)
        assert logits.shape == (2, 2, 32, 32)
        nets.zero_grad()
        method.query_loss(logits, query).backward()
        assert all(p.grad is None for p in nets["model"]["sam"].parameters())
        assert nets["model"]["positive"].tokens.grad.abs().max() > 0
        assert nets["model"]["rough"].weight.grad.abs().max() > 0

    def test_sam_hears_tokens_and_rough_mask(self, nets):
        from medcook.recipes.few_shot._prompting import decoded, embedded

        sam, query = nets["average"]["sam"].eval(), shots()
        with torch.no_grad():
            embedding = embedded(sam, query.images)
            ask = lambda tokens, rough: decoded(sam, embedding, tokens, rough, (32, 32))  # noqa: E731
            tokens, rough = torch.randn(1, 2, HIDDEN), torch.zeros(1, 4, 4)
            plain = ask(tokens, rough)
            assert plain.shape == (1, 32, 32)
            assert not torch.allclose(plain, ask(-tokens, rough)) and not torch.allclose(plain, ask(tokens, rough + 1))
