"""Where a vessel is narrowed, and how much: from the radius along its branches, after SAM-VMNet's code.

Along a branch the radius falls, to a bottom, and rises again: a V. With the radii at its two tops and at the bottom,

    degree = 1 - 2 r_bottom / (r_top before + r_top after).

A V counts from a degree of `LEAST` on, in a branch that is wide enough on average; of two that are close to each other
the deeper one. Near a fork the largest disc that fits in is that of the fork, which is left out.
"""

from typing import NamedTuple

import numpy as np

from medcook.recipes.anatomy._trees import Branch, Tree

LEAST = 0.25
NARROW = 1.0
"""Mean radius in pixels below which no branch is judged: steps of pixels would count. There 4 pixels of 800 rows."""
APART = 4.0
"""Pixels between two stenoses, and from a true one to one that was found; there 10 of 800 between two."""


class Found(NamedTuple):
    """A stenosis: its place (row, column) and degree."""

    place: np.ndarray
    degree: float


def turning_points(values: np.ndarray) -> list[int]:
    """Where a series turns, both ends included; of a level stretch the middle."""
    steps = np.sign(np.diff(values))
    moving = np.flatnonzero(steps)
    turns = [0]
    for before, after in zip(moving, moving[1:], strict=False):
        if steps[before] != steps[after]:
            turns.append((before + 1 + after) // 2)
    return [*turns, len(values) - 1]


def dips(values: np.ndarray) -> list[tuple[int, float]]:
    """(place, degree) of every V in a series of radii: between two tops of it, which may be its ends."""
    turns, found = turning_points(values), []
    for before, bottom, after in zip(turns, turns[1:], turns[2:], strict=False):
        if values[bottom] < min(values[before], values[after]):
            found.append((bottom, 1 - 2 * values[bottom] / (values[before] + values[after])))
    return found


def judged(branch: Branch, forks: tuple[bool, bool]) -> slice:
    """The points of a branch between the discs at its ends; `forks`: whether there is a fork at each."""
    arc, margin = branch.arc, [branch.radius[end] if fork else 0.0 for end, fork in zip((0, -1), forks, strict=True)]
    kept = np.flatnonzero((arc >= margin[0]) & (arc <= arc[-1] - margin[1]))
    return slice(kept[0], kept[-1] + 1) if len(kept) > 2 else slice(0, 0)


def stenoses_of(tree: Tree, least: float = LEAST) -> list[Found]:
    """All stenoses of a tree from a degree on, the deepest first."""
    found, parents = [], {branch.parent for branch in tree}
    for number, branch in enumerate(tree):
        part = judged(branch, (branch.parent >= 0, number in parents))
        radius, points = branch.radius[part], branch.points[part]
        if len(radius) and radius.mean() >= NARROW:
            found += [Found(points[at], degree) for at, degree in dips(radius) if degree >= least]
    kept: list[Found] = []
    for one in sorted(found, key=lambda each: -each.degree):
        if all(np.linalg.norm(one.place - other.place) > APART for other in kept):
            kept.append(one)
    return kept


def true_stenoses(tree: Tree) -> list[Found]:
    """Those that were drawn."""
    return [Found(branch.points[one.at], one.degree) for branch in tree for one in branch.stenoses]


def agreement(found: list[Found], truth: list[Found], near: float = APART) -> dict[str, float]:
    """How well stenoses were found: each is one true one's, the nearest pairs first.

    tpr, ppv     share of true ones that were found, of found ones that are true; NaN where there is none
    degree_error mean difference of degrees, of pairs;   extra  how many were found that are not there
    """
    distance = np.array([[np.linalg.norm(one.place - other.place) for other in truth] for one in found])
    distance = distance.reshape(len(found), len(truth))
    errors = []
    while distance.size and distance.min() <= near:
        one, other = np.unravel_index(distance.argmin(), distance.shape)
        errors.append(abs(found[one].degree - truth[other].degree))
        distance[one], distance[:, other] = np.inf, np.inf
    share = lambda count: len(errors) / count if count else float("nan")  # noqa: E731
    mean = float(np.mean(errors)) if errors else float("nan")
    return {
        "tpr": share(len(truth)),
        "ppv": share(len(found)),
        "degree_error": mean,
        "extra": float(len(found) - len(errors)),
    }
