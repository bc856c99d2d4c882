"""FoB: places around a mask, heat maps that find them in the query, a ring that corrects them, prompts for SAM."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook.few_shot import Shots
from medcook.recipes.few_shot import fob
from medcook.recipes.few_shot.fob import FoB, Localiser, over_segmentation, places_around, ring_fit, spread

SMALL = {"channels": (4, 4, 8, 8), "pretrained": False}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def disc(size: int = 64, x: float = 32, y: float = 32, radius: float = 10) -> np.ndarray:
    at = np.arange(size) + 0.5
    return np.hypot(at[None] - x, at[:, None] - y) < radius


def shots(count: int = 1, size: int = 32) -> Shots:
    """Slices with a bright disc somewhere, and maps that show it and where a cell lies."""
    places = (torch.rand(count, 2) * 0.4 + 0.3) * size
    masks = torch.stack([torch.from_numpy(disc(size, *place.tolist(), size / 7)) for place in places]).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(masks[:, None].float(), 9, 1, 4)
    maps = torch.nn.functional.avg_pool2d(torch.cat([masks[:, None].float(), blurred], 1), 4)
    fine = [maps * k for k in (1, -1, 2, -2)]
    return Shots(masks[:, None].float(), torch.cat(fine, 1), masks)


@pytest.mark.component("category-agnostic background prompts")
class TestPlaces:
    def test_around_a_disc(self):
        middle, *ring = (places_around(disc(), 4, 0.125) + 1) * 32
        assert middle == pytest.approx([32, 32], abs=1)
        for k, place in enumerate(ring):  # ten pixels of radius, four of gap
            turn = math.pi * k / 2
            assert place == pytest.approx([32 + 14 * math.cos(turn), 32 + 14 * math.sin(turn)], abs=1.5)

    def test_none_of_them_lies_on_the_structure(self):
        mask = np.zeros((64, 64), bool)
        mask[10:50, 20:26], mask[44:50, 20:50] = True, True
        _, *ring = ((places_around(mask, 6, 0.12) + 1) * 32).clip(0, 63).astype(int)
        assert not any(mask[y, x] for x, y in ring)

    def test_they_stay_in_the_image(self):
        assert np.abs(places_around(disc(x=60, y=3), 6, 0.5)).max() <= 1


@pytest.mark.component("contextual information")
class TestContext:
    def test_a_prompt_hears_of_the_others(self):
        localiser = Localiser(8, 3)
        maps, places = torch.randn(1, 8, 6, 6), torch.rand(1, 3, 2) - 0.5
        moved = places.clone()
        moved[0, 2] += 0.4
        change = (localiser(maps, places, maps) - localiser(maps, moved, maps)).abs().amax((0, 2))
        assert change[0] > 1e-4 and change[1] > 1e-4

    def test_and_of_the_query_elsewhere(self):
        localiser = Localiser(8, 3)
        support, places, query = torch.randn(1, 8, 6, 6), torch.rand(1, 3, 2) - 0.5, torch.randn(1, 8, 6, 6)
        other = query.clone()
        other[..., 0, 0] += 3
        change = (localiser(support, places, query) - localiser(support, places, other)).abs()
        assert change[..., 10].max() > 1e-4


@pytest.mark.component("localisation in the query")
class TestLocalisation:
    def test_cells_lie_where_grid_sample_reads(self):
        maps = torch.arange(12.0).view(1, 1, 3, 4)
        read = torch.nn.functional.grid_sample(maps, spread((3, 4))[None, None], align_corners=False)
        assert torch.allclose(read.flatten(), torch.arange(12.0), atol=1e-5)

    def test_it_learns_to_find_the_places(self):
        method = FoB(**SMALL, places=3, refining=0)
        net = torch.nn.ModuleDict({"localiser": Localiser(8, 4)})
        optimiser = torch.optim.AdamW(net.parameters(), lr=5e-3)

        def distance() -> float:
            torch.manual_seed(9)
            support, query = shots(), shots(8)
            found = method.localise(net, support, query)[1][-1]
            return (found - method.around(query.masks)).norm(dim=-1).mean().item()

        before = distance()
        for step in range(60):
            torch.manual_seed(step)
            loss = method.episode_loss(net, shots(), shots(4))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert distance() < 0.6 * before

    def test_a_query_without_the_structure_teaches_nothing(self):
        net = torch.nn.ModuleDict({"localiser": Localiser(8, 7)})
        query = shots(2)
        loss = FoB(**SMALL).episode_loss(net, shots(), query._replace(masks=torch.zeros_like(query.masks)))
        assert loss == 0 and loss.requires_grad


@pytest.mark.component("structural constraint")
class TestRing:
    model = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [0.0, -0.5]])

    def test_it_is_moved_and_scaled(self):
        places = 1.3 * self.model[None] + torch.tensor([0.2, -0.1])
        assert torch.allclose(ring_fit(places, self.model), places, atol=1e-6)

    def test_it_is_the_least_squares_fit(self):
        places = self.model[None] + 0.1 * torch.randn(1, 5, 2)
        found = ring_fit(places, self.model)
        rows = [(m[axis], axis == 0, axis == 1) for m in self.model.numpy() for axis in (0, 1)]
        solved = np.linalg.lstsq(np.array(rows, float), places.flatten().numpy(), rcond=None)[0]
        wanted = solved[0] * self.model.numpy() + solved[1:]
        assert np.allclose(found[0].numpy(), wanted, atol=1e-5)

    def test_a_stray_place_is_drawn_back(self):
        """Two peaks of one height for a place: the ring says which is meant."""
        method = FoB(**SMALL, places=4, refining=2)
        at = spread((20, 20))
        support = shots(size=80)
        theirs = method.around(support.masks)
        peak = lambda place: (-((at - place) ** 2).sum(-1) / 0.005).exp()  # noqa: E731
        heat = torch.stack([peak(place) for place in theirs[0]])
        heat[2] += peak(-theirs[0, 2])
        net = {"localiser": lambda *_: (heat + 1e-6).log()[None]}
        query = support._replace(maps=torch.zeros(1, 8, 20, 20))
        first, *_, last = method.localise(net, support, query)[1]
        error = [(found[0, 2] - theirs[0, 2]).norm().item() for found in (first, last)]
        assert error[1] < 0.25 * error[0]


class TestPrompts:
    @pytest.mark.component("category-agnostic background prompts")
    @pytest.mark.parametrize("background", [True, False])
    def test_points_beside_the_object(self, background):
        method = FoB(**SMALL, background=background)
        net = torch.nn.ModuleDict({"localiser": Localiser(8, 7)})
        (prompt, _) = method.prompts(net, shots(), shots(2))
        assert len(prompt.foreground) == 1 and len(prompt.background) == 6 * background
        prompt.check((32, 32))


def test_precision_and_excess(monkeypatch):
    mask, truth = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    mask[0, :2], truth[0, 0] = True, True
    found = [("a", 0, "p1", mask, truth), ("b", 0, "p1", np.zeros_like(mask), truth)]
    monkeypatch.setattr(fob, "answers", lambda *_: iter(found))
    case = SimpleNamespace(case_id="c", patient_id="p")
    first, second = over_segmentation(None, case)
    assert first["precision"] == 0.5 and first["excess"] == 1.0 and first["dice"] == pytest.approx(2 / 3)
    assert second["precision"] == 0 and second["missed"]
