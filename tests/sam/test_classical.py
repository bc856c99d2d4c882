"""The competitors find a bright disc, each from a box and from a click; the cut is a minimal one."""

import itertools

import numpy as np
import pytest

from medcook.sam import classical
from medcook.sam.prompts import Prompt, box_of, first_click
from medcook.sam.zero_shot import dice

ROWS, COLUMNS = np.indices((80, 100)) + 0.5
DISC = (ROWS - 40) ** 2 + (COLUMNS - 55) ** 2 < 15**2
IMAGE = (DISC * 1.0 + np.random.default_rng(0).normal(0, 0.1, DISC.shape)).astype(np.float32)


@pytest.mark.parametrize("method", classical.COMPETITORS.values(), ids=classical.COMPETITORS)
def test_a_disc_is_found_from_its_box(method):
    assert dice(method(IMAGE, Prompt(box=box_of(DISC))), DISC) > 0.93


@pytest.mark.parametrize("name", ["graph cut", "random walker"])
def test_a_disc_is_found_from_a_click(name):
    assert dice(classical.COMPETITORS[name](IMAGE, first_click(DISC)), DISC) > 0.9


def test_a_background_click_takes_away():
    other = (ROWS - 40) ** 2 + (COLUMNS - 15) ** 2 < 12**2
    both = IMAGE + other
    prompt = Prompt(foreground=((55, 40),), background=((15, 40),))
    for method in (classical.graph_cut, classical.random_walker):
        assert not method(both, prompt)[other].mean() > 0.1


def test_the_cut_has_the_least_energy_of_all_labellings():
    rng = np.random.default_rng(3)
    image, cost = rng.uniform(0, 1, (3, 3)), rng.normal(0, 2, (3, 3))
    seeds = np.zeros((3, 3), int)
    seeds[0, 0], seeds[2, 2] = 1, 2
    smooth = 1.5
    pairs = [((r, c), (r + dr, c + dc)) for r in range(3) for c in range(3) for dr, dc in ((0, 1), (1, 0))]
    pairs = [(a, b) for a, b in pairs if max(b) < 3]
    squares = [np.diff(image, axis=axis).ravel() ** 2 for axis in (0, 1)]
    beta = 1 / (2 * np.mean(np.concatenate(squares)) + 1e-9)

    def energy(labels):
        border = sum(smooth * np.exp(-beta * (image[a] - image[b]) ** 2) for a, b in pairs if labels[a] != labels[b])
        return border + cost[labels & (seeds == 0)].sum()

    every = (np.array(bits).reshape(3, 3) for bits in itertools.product([False, True], repeat=9))
    allowed = [labels for labels in every if labels[0, 0] and not labels[2, 2]]
    best = min(energy(labels) for labels in allowed)
    found = classical._minimal_cut(image, cost, seeds, smooth)
    assert found[0, 0] and not found[2, 2]
    assert energy(found) == pytest.approx(best, abs=0.02)
