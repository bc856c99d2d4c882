"""Several looks at clicks: windows that hold them, and an answer between candidates."""

import numpy as np
import pytest
import torch

from medcook.sam.prompts import Prompt
from medcook.sam.views import CUTS, SHARES, agreement, click_windows, first_windows, obedience, square

SHAPE = (100, 200)
ROWS, COLUMNS = torch.meshgrid(torch.arange(100.0) + 0.5, torch.arange(200.0) + 0.5, indexing="ij")


def disc(radius: float) -> torch.Tensor:
    """Logits of a disc around (100, 50), steep enough to be all or nothing."""
    return torch.where(torch.hypot(ROWS - 50, COLUMNS - 100) < radius, 20.0, -20.0)


CLICK = Prompt(foreground=((100.5, 50.5),))


class TestWindows:
    def test_are_the_image_half_of_it_and_a_quarter(self):
        found = click_windows(CLICK, SHAPE)
        assert found[0] == (0, 0, 200, 100)
        assert [right - left for left, _, right, _ in found] == [200 * share for share in SHARES]

    @pytest.mark.parametrize("seed", range(5))
    def test_hold_all_clicks_and_stay_in_the_image(self, seed):
        rng = np.random.default_rng(seed)
        points = tuple((float(x), float(y)) for x, y in rng.uniform((0, 0), (200, 100), (3, 2)))
        for left, top, right, bottom in click_windows(Prompt(points[:2], points[2:]), SHAPE):
            assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
            assert all(left <= x <= right and top <= y <= bottom for x, y in points)

    @pytest.mark.parametrize("shape", [(256, 256), (100, 200), (333, 71), (40, 60), (20, 30)])
    def test_a_first_click_anywhere_is_looked_at_from_windows_that_are_listed(self, shape):
        """And from no others is any looked at: each that is listed is some click's."""
        height, width = shape
        rows, columns = np.linspace(0, height, 65), np.linspace(0, width, 65)
        clicks = [Prompt(foreground=((float(x), float(y)),)) for x in columns for y in rows]
        asked = {window for click in clicks for window in click_windows(click, shape)}
        listed = first_windows(shape)
        assert set(listed) == asked and len(listed) == len(asked) <= 59
        assert listed[0] == (0, 0, width, height)

    @pytest.mark.parametrize(("clicks", "share"), [(1, 1 / 4), (2, 1 / 8)], ids=["one", "two"])
    def test_clicks_are_well_inside_their_windows(self, clicks, share):
        """So large a share of the side from the border, unless the image ends there."""
        for points in np.random.default_rng(0).uniform((0, 0), (200, 100), (100, clicks, 2)).tolist():
            for left, top, right, bottom in click_windows(Prompt(tuple(map(tuple, points))), SHAPE)[1:]:
                room = (right - left) * share - 2
                for x, y in points:
                    assert (left == 0 or x - left >= room) and (right == 200 or right - x >= room)
                    assert (top == 0 or y - top >= room) and (bottom == 100 or bottom - y >= room)

    def test_of_a_small_image_there_is_one(self):
        assert click_windows(Prompt(foreground=((5.0, 5.0),)), (20, 30)) == [(0, 0, 30, 20)]

    def test_a_square_is_moved_into_the_image(self):
        assert square((190, 5), 40, SHAPE) == (160, 0, 200, 40) and square((100, 50), 40, SHAPE) == (80, 30, 120, 70)


class TestAgreement:
    def test_candidates_that_agree_are_the_answer(self):
        logits, overlap = agreement(torch.stack([disc(20)] * 3), torch.tensor([0.9, 0.5, 0.2]), CLICK)
        assert torch.equal(logits > 0, disc(20) > 0) and overlap.item() == pytest.approx(1)

    @pytest.mark.parametrize(
        ("radii", "trust", "best"),
        [((10, 14, 25, 40), (0.3, 0.9, 0.5, 0.2), 14), ((10, 20, 22), (0.36, 0.16, 0.48), 22)],
        ids=["what most agree on", "less than half of the trust"],
    )
    def test_the_best_threshold_is_found(self, radii, trust, best):
        """By trying them all: no threshold of the mean has a larger expected Dice with the candidates."""
        candidates, trust = torch.stack([disc(radius) for radius in radii]), torch.tensor(trust)
        logits, overlap = agreement(candidates, trust, CLICK)
        weights = trust / trust.sum()
        mean = (candidates.sigmoid() * weights[:, None, None]).sum(0)

        def expected(mask):
            both, sizes = (mask & (candidates > 0)).sum((1, 2)), (candidates > 0).sum((1, 2)) + mask.sum()
            return float((2 * both / sizes) @ weights), float((both / (sizes - both)) @ weights)

        assert expected(logits > 0)[0] == pytest.approx(max(expected(mean > cut)[0] for cut in CUTS), abs=1e-6)
        assert overlap.item() == pytest.approx(expected(logits > 0)[1], abs=1e-6)
        assert torch.equal(logits > 0, disc(best) > 0)

    def test_trust_decides_between_two(self):
        for trust, radius in ((torch.tensor([0.9, 0.1]), 10), (torch.tensor([0.1, 0.9]), 30)):
            logits, _ = agreement(torch.stack([disc(10), disc(30)]), trust, CLICK)
            assert torch.equal(logits > 0, disc(radius) > 0)

    def test_a_candidate_against_the_clicks_hardly_counts(self):
        clicks = Prompt(foreground=((100.5, 50.5),), background=((120.5, 50.5),))
        found = obedience(torch.stack([disc(10), disc(30)]).sigmoid(), clicks)
        assert found.tolist() == [pytest.approx(1), pytest.approx(1e-3)]
        logits, _ = agreement(torch.stack([disc(10), disc(30)]), torch.tensor([0.1, 0.9]), clicks)
        assert torch.equal(logits > 0, disc(10) > 0)

    def test_large_images_are_counted_on_a_coarser_grid_alike(self):
        large = torch.stack([disc(10), disc(25), disc(40)])
        finer = large.repeat_interleave(4, 1).repeat_interleave(4, 2)
        trust = torch.tensor([0.5, 0.4, 0.3])
        small_logits, small_overlap = agreement(large, trust, CLICK)
        fine_logits, fine_overlap = agreement(finer, trust, Prompt(foreground=((402.0, 202.0),)))
        assert torch.equal(fine_logits[::4, ::4] > 0, small_logits > 0)
        assert fine_overlap.item() == pytest.approx(small_overlap.item(), abs=0.02)
