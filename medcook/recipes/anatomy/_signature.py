"""What AirMorph measures of a tree of airways whose branches have names: a signature of six numbers, and a pattern.

stenosis    1 - smallest over mean radius of a branch, mean over branches
ectasia     largest over mean radius of a branch, mean over branches
tortuosity  length of a branch over the straight way between its ends, mean over branches: 1 where it is straight
divergence  the largest angle, in radians, under which two ends of a lobe's bronchi are seen from where these begin
length      the longest way from there to an end, over the length of the trachea
complexity  how the number of boxes that a lobe's centre lines touch grows as boxes get smaller: a dimension, 1 to 2

The last three are of each lobe, and their mean is of the tree. Radii within the discs at forks are left out, and those
of branches in which the steps of pixels would count (`NARROW`).
"""

from itertools import combinations

import numpy as np

from medcook.recipes.anatomy._airways import LOBES, NAMES, VALUE
from medcook.recipes.anatomy._stenoses import NARROW, judged
from medcook.recipes.anatomy._trees import Branch, Tree, children_of

SIGNATURE = ("stenosis", "ectasia", "tortuosity", "divergence", "length", "complexity")
SHORTEST = 5.0
"""Pixels of a branch whose shape is looked at."""
BOXES = (2, 4, 8, 16)


def stenosis(radius: np.ndarray) -> float:
    """Of radii (N,) along a branch."""
    return float(1 - radius.min() / radius.mean())


def ectasia(radius: np.ndarray) -> float:
    """Of radii (N,) along a branch. The paper's code has the inverse, and a note to turn it round."""
    return float(radius.max() / radius.mean())


def tortuosity(branch: Branch) -> float:
    return branch.length / max(branch.chord, 1e-6)


def open_angle(start: np.ndarray, ends: list[np.ndarray]) -> float:
    """The largest angle in radians between two ways from a start to ends (2,); 0 with fewer than two."""
    ways = [(end - start) / np.linalg.norm(end - start) for end in ends if np.linalg.norm(end - start) > 0]
    return max((float(np.arccos(np.clip(a @ b, -1, 1))) for a, b in combinations(ways, 2)), default=0.0)


def dimension(points: np.ndarray) -> float:
    """The box-counting dimension of points (N, 2): the slope of log(boxes touched) over log(1 / side of a box)."""
    counts = [len(np.unique(np.floor(points / side), axis=0)) for side in BOXES]
    return float(-np.polyfit(np.log(BOXES), np.log(counts), 1)[0])


def of_lobe(tree: Tree, lobe: int) -> list[int]:
    """The numbers of the branches of a lobe, numbered from 1."""
    return [number for number, branch in enumerate(tree) if NAMES[branch.name].lobe == lobe]


def ways(tree: Tree, numbers: list[int]) -> dict[int, float]:
    """{branch: the way from where some branches begin to its end}, of these branches alone, parents before children."""
    found: dict[int, float] = {}
    for number in numbers:
        found[number] = tree[number].length + found.get(tree[number].parent, 0.0)
    return found


def signature(tree: Tree) -> dict[str, float]:
    """The six numbers of a tree with names; NaN where nothing of it can be measured."""
    named = [k for k, branch in enumerate(tree) if NAMES[branch.name].lobe and branch.length >= SHORTEST]
    parents, radii = {branch.parent for branch in tree}, []
    for number in named:
        branch = tree[number]
        radius = branch.radius[judged(branch, (branch.parent >= 0, number in parents))]
        radii += [radius] if len(radius) and radius.mean() >= NARROW else []
    trachea = max((branch.length for branch in tree if branch.name == VALUE["trachea"]), default=np.nan)
    lobes = [measured(tree, numbers) for k in range(1, 1 + len(LOBES)) if (numbers := of_lobe(tree, k))]
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")  # noqa: E731
    divergence, length, complexity = (mean([each[k] for each in lobes]) for k in range(3))
    return {
        "stenosis": mean([stenosis(radius) for radius in radii]),
        "ectasia": mean([ectasia(radius) for radius in radii]),
        "tortuosity": mean([tortuosity(tree[number]) for number in named]),
        "divergence": divergence,
        "length": length / trachea,
        "complexity": complexity,
    }


def measured(tree: Tree, numbers: list[int]) -> tuple[float, float, float]:
    """Divergence, longest way in pixels and complexity of a lobe, whose branches have these numbers."""
    first = min(numbers, key=lambda number: tree[number].generation)
    ends = [tree[k].points[-1] for k in numbers if not set(children_of(tree, k)) & set(numbers)]
    points = np.concatenate([tree[number].points for number in numbers])
    return open_angle(tree[first].points[0], ends), max(ways(tree, numbers).values()), dimension(points)


def consistency(tree: Tree) -> float:
    """Of branches that are of a segment and have others below them: the share whose segment all of these have."""
    agree = []
    for number, branch in enumerate(tree):
        segment = NAMES[branch.name].segment
        below = [tree[k].name for k in descendants(tree, number)]
        if segment and below:
            agree.append(all(NAMES[name].segment == segment for name in below))
    return float(np.mean(agree)) if agree else float("nan")


def descendants(tree: Tree, number: int) -> list[int]:
    """The numbers of all branches that are supplied by a branch."""
    found = []
    for child in children_of(tree, number):
        found += [child, *descendants(tree, child)]
    return found


def pattern(tree: Tree, lobe: int) -> frozenset[frozenset[int]]:
    """How a lobe's bronchus parts: the sets of segments, two or more, that share one of its bronchi."""
    found = set()
    for number in of_lobe(tree, lobe):
        if not NAMES[tree[number].name].segment:
            supplied = {NAMES[tree[k].name].segment for k in descendants(tree, number)} - {0}
            found |= {frozenset(supplied)} if len(supplied) > 1 else set()
    return frozenset(found)


def agreement(one: Tree, other: Tree) -> float:
    """How much two trees part alike: shared sets of `pattern` over all of both, mean over lobes that have any."""
    found = []
    for lobe in range(1, 1 + len(LOBES)):
        mine, theirs = pattern(one, lobe), pattern(other, lobe)
        if mine | theirs:
            found.append(len(mine & theirs) / len(mine | theirs))
    return float(np.mean(found)) if found else float("nan")
