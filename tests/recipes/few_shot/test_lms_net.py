"""LMS-Net: each update minimises the energy it comes from, and the rounds are trained."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from medcook.few_shot import PrototypeNetwork, Shots
from medcook.few_shot.baselines import SHARPNESS
from medcook.losses import cross_entropy_and_dice
from medcook.recipes.few_shot.lms_net import LMSNet, Stage, contrast, move, two_classes

SMALL = {"channels": (4, 4, 6, 6)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int, width: int = 6, size: int = 24) -> Shots:
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[..., size // 2 :] = 1
    maps = 0.6 * torch.randn(count, width, size // 4, size // 4)
    maps[:, 0] += 2.0 * masks[:, ::4, ::4] - 1
    return Shots(torch.zeros(count, 1, size, size), maps, masks)


def network(method: LMSNet) -> nn.ModuleDict:
    net = method.build(1, 3, 2)["model"]
    for stage in net["stages"]:
        nn.init.normal_(stage.last.weight, std=0.3)
    return net


@pytest.mark.component("prototype update")
class TestPrototypes:
    def test_they_minimise_the_energy(self):
        maps, inside, given = torch.randn(1, 3, 4, 4), torch.rand(1, 4, 4), torch.randn(1, 2, 3)
        pixels = maps[0].flatten(1).T.double().numpy()
        weights = torch.stack([1 - inside, inside], 1)[0].flatten(1).double().numpy()

        def energy(flat: np.ndarray) -> float:
            points = flat.reshape(2, 3)
            distance = ((pixels[None] - points[:, None]) ** 2).sum(2)
            return (weights * distance).mean(1).sum() + 0.3 * ((points - given[0].numpy()) ** 2).sum()

        wanted = minimize(energy, np.zeros(6)).x.reshape(2, 3)
        assert np.allclose(move(maps, inside, given, torch.tensor(0.3))[0].numpy(), wanted, atol=1e-3)

    def test_with_much_trust_they_stay(self):
        maps, inside, given = torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4), torch.randn(2, 2, 3)
        assert torch.allclose(move(maps, inside, given, torch.tensor(1e6)), given, atol=1e-4)

    def test_they_follow_a_query_that_looks_different(self):
        support, query = shots(1), shots(2)
        query = query._replace(maps=query.maps + 0.8 * torch.randn(1, 6, 1, 1))
        method = LMSNet(**SMALL)
        changed, kept = (
            LMSNet(**SMALL, update=on, prior=False).descend(network(method), support, query)[-1] for on in (True, False)
        )
        assert not torch.allclose(changed, kept, atol=0.05)


@pytest.mark.component("mask update")
class TestMask:
    def test_it_minimises_region_term_and_entropy(self):
        """Without a prior: u minimises u d_1 + (1 - u) d_0 - e H(u), pixel by pixel."""
        maps, points = torch.randn(1, 3, 1, 1), torch.randn(1, 2, 3)
        d0, d1 = ((maps[0, :, 0, 0] - points[0]) ** 2).sum(1).tolist()
        grid = np.linspace(1e-5, 1 - 1e-5, 100001)
        entropy = -(grid * np.log(grid) + (1 - grid) * np.log(1 - grid))
        best = grid[np.argmin(grid * d1 + (1 - grid) * d0 - 0.5 * entropy)]
        assert (contrast(maps, points) / 0.5).sigmoid().item() == pytest.approx(best, abs=1e-4)

    def test_the_prior_speaks_in_every_round(self):
        support, query = shots(1), shots(2)
        net = network(LMSNet(**SMALL))
        with_prior, without = (LMSNet(**SMALL, prior=on).descend(net, support, query) for on in (True, False))
        assert torch.equal(with_prior[0], without[0])
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(with_prior[1:], without[1:], strict=True))

    def test_the_prior_sees_mask_and_neighbours(self):
        stage = Stage(6)
        nn.init.normal_(stage.last.weight)
        maps, inside = torch.zeros(1, 6, 13, 13), torch.zeros(1, 13, 13)
        spot = inside.clone()
        spot[0, 6, 6] = 1
        moved = (stage.prior(maps, spot) - stage.prior(maps, inside))[0].abs() > 1e-7
        assert moved[6, 6] and moved[5:8, 5:8].sum() > 1 and not moved[0, 0]


@pytest.mark.component("unfolding")
class TestRounds:
    def test_every_round_has_its_own_weights_and_learns(self):
        method, support, query = LMSNet(**SMALL), shots(1), shots(2)
        net = network(method)
        assert len(method.descend(net, support, query)) == 4
        method.episode_loss(net, support, query).backward()
        for stage in net["stages"]:
            assert stage.trust.grad.abs() > 0 and stage.sharpness.grad.abs() > 0
            assert stage.last.weight.grad.abs().max() > 0

    def test_every_round_is_supervised(self):
        method, support, query = LMSNet(**SMALL, rounds=2), shots(1), shots(2)
        net = network(method)
        found = method.descend(net, support, query)
        size = (24, 24)
        wanted = [
            cross_entropy_and_dice(
                nn.functional.interpolate(two_classes(each), size, mode="bilinear"), query.masks
            ).item()
            for each in found
        ]
        assert method.episode_loss(net, support, query).item() == pytest.approx(np.mean(wanted), abs=1e-5)


@pytest.mark.component("learned Mumford-Shah model")
class TestEnergy:
    def test_the_first_mask_is_the_prototypes(self):
        """Squared distance of unit vectors is 2 - 2 cosine: with the right sharpness round 0 is a prototype network."""
        support, query = shots(1), shots(2)
        net = network(LMSNet(**SMALL))
        nn.init.constant_(net["stages"][0].sharpness, np.log(SHARPNESS / 2))
        first = two_classes(LMSNet(**SMALL).descend(net, support, query)[0]).softmax(1)
        wanted = PrototypeNetwork().logits(net, support, query).softmax(1)
        assert torch.allclose(first, wanted, atol=1e-4)

    def test_the_energy_falls(self):
        """Region term, trust and entropy together, without a prior, from round to round."""
        method, support, query = LMSNet(**SMALL, prior=False, rounds=4), shots(1), shots(1)
        net = network(method)
        maps = torch.nn.functional.normalize(query.maps, dim=1)
        from medcook.few_shot.baselines import prototypes

        given = torch.nn.functional.normalize(prototypes(support), dim=1)[None]
        sharp, trust = net["stages"][0].sharpness.exp(), net["stages"][0].trust.exp()
        values = []
        for logits in method.descend(net, support, query):
            inside = logits.sigmoid()
            points = move(maps, inside, given, trust)
            masks = torch.stack([1 - inside, inside], 1)
            distance = (maps[:, None] - points[..., None, None]).square().sum(2)
            entropy = -(masks * masks.clamp_min(1e-9).log()).sum(1).mean()
            energy = (masks * distance).sum(1).mean() + trust * (points - given).square().sum() - entropy / sharp
            values.append(energy.item())
        assert all(later <= earlier + 1e-5 for earlier, later in zip(values, values[1:], strict=False))
        assert values[-1] < values[0]
