"""Branching tubes of which everything is known, to be drawn into real images: centre lines, radii, branches, stenoses.

A tree is a list of branches. Each is a smooth curve of points half a pixel apart with a radius at each, and knows which
branch it leaves. It ends in two thinner ones, whose radii follow Murray's law, r^3 = r1^3 + r2^3. No two branches
cross, which those of real images do. A stenosis takes a known share of the diameter away; nothing else makes a branch
narrower on its way by more than a tenth. Lengths are in pixels of an image of 128 rows, and scale with the image.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

ROWS = 128
STEP = 0.5
"""Pixels from one point of a branch to the next."""
THINNEST = 0.5
"""Radius in pixels below which nothing is drawn: what is left of the tightest stenosis."""
REACH = 2
"""Pixels around a tube in which the distance to its surface is known."""


class Stenosis(NamedTuple):
    """at: the number of the point where it is tightest;   degree: the share of the diameter that is gone there."""

    at: int
    degree: float


@dataclass(frozen=True, eq=False)
class Branch:
    """A tube: points (N, 2) along its middle, row and column, and its radius at each (N,), in pixels.

    parent      number of the branch that it leaves; -1: none
    generation  0 of a trunk, and one more than the parent's
    name        a label value; 0: none
    """

    points: np.ndarray
    radius: np.ndarray
    parent: int = -1
    generation: int = 0
    name: int = 0
    stenoses: tuple[Stenosis, ...] = ()

    @property
    def arc(self) -> np.ndarray:
        """(N,): the way along the branch to each point."""
        return np.r_[0.0, np.linalg.norm(np.diff(self.points, axis=0), axis=1).cumsum()]

    @property
    def length(self) -> float:
        return float(self.arc[-1])

    @property
    def chord(self) -> float:
        """The straight way from its first point to its last."""
        return float(np.linalg.norm(self.points[-1] - self.points[0]))


Tree = tuple[Branch, ...]
"""Branches; each parent stands before its children."""


class Growth(NamedTuple):
    """How a tree grows.

    radius, length  of a trunk;   shrink  length of a branch over that of its parent (lowest, highest)
    generations     how many there are at most;   shortest  branch that is kept
    turn            degrees between a branch and the one that it leaves (lowest, highest)
    bend            degrees that the direction wanders, a standard deviation over ten pixels
    gap             between the surfaces of two branches
    """

    radius: float
    length: float
    shrink: tuple[float, float] = (0.65, 0.9)
    generations: int = 4
    shortest: float = 7.0
    turn: tuple[float, float] = (18.0, 45.0)
    bend: float = 14.0
    gap: float = 3.0


def children_of(tree: Tree, number: int) -> list[int]:
    """The numbers of the branches that leave a branch."""
    return [child for child, branch in enumerate(tree) if branch.parent == number]


def curve(start: np.ndarray, angle: float, length: float, bend: float, rng: np.random.Generator) -> np.ndarray:
    """Points (N, 2), `STEP` apart, from a start; the angle (radians, 0 to the right, pi / 2 down) wanders smoothly."""
    count = max(4, round(length / STEP))
    noise = ndimage.gaussian_filter1d(rng.standard_normal(count + 40), 10)[20:-20]
    heading = angle + np.deg2rad(bend) * np.cumsum(noise - noise[0]) * STEP / 3
    steps = STEP * np.stack([np.sin(heading), np.cos(heading)], axis=1)
    return start + np.vstack([np.zeros((1, 2)), steps.cumsum(0)])


def inside(points: np.ndarray, field: np.ndarray) -> int:
    """How many of the first points (N, 2) lie in a field (H, W) bool without having left it."""
    cells = points.round().astype(int)
    there = ((cells >= 0) & (cells < field.shape)).all(1)
    there[there] = field[tuple(cells[there].T)]
    return len(points) if there.all() else int(there.argmin())


def free(points: np.ndarray, radius: float, tree: Tree, gap: float, skip: int = 0) -> int:
    """How many of the first points (N, 2) of a tube keep a gap to a tree; the first `skip` need not."""
    if not tree:
        return len(points)
    others, radii = np.concatenate([one.points for one in tree]), np.concatenate([one.radius for one in tree])
    near = cKDTree(others).query_ball_point(points[skip:], radius + radii.max() + gap)
    for number, found in enumerate(near, skip):
        if found and (np.linalg.norm(others[found] - points[number], axis=1) - radii[found]).min() < radius + gap:
            return number
    return len(points)


def grow(roots, field: np.ndarray, plan: Growth, rng: np.random.Generator, beside: Tree = ()) -> Tree:
    """A tree within a field (H, W) bool.

    roots   (point, angle in radians) of each trunk;   beside  another tree that is not touched
    """
    scale = field.shape[0] / ROWS
    tree: list[Branch] = []
    todo = [(np.asarray(start, float), angle, plan.radius * scale, plan.length * scale, -1) for start, angle in roots]
    while todo:
        start, angle, radius, length, parent = todo.pop(0)
        generation = tree[parent].generation + 1 if parent >= 0 else 0
        skip = round((4 * radius + 2 * plan.gap * scale) / STEP) if parent >= 0 else 0
        best = start[None]
        for _ in range(4):
            points = curve(start, angle, length, plan.bend / scale, rng)
            points = points[: inside(points, field)]
            points = points[: free(points, radius, (*tree, *beside), plan.gap * scale, skip)]
            best = max(best, points, key=len)
        if len(best) * STEP < plan.shortest * scale or radius < THINNEST * scale:
            continue
        tree.append(Branch(best, radius * np.linspace(1, 0.9, len(best)), parent, generation))
        if generation + 1 < plan.generations and len(best) * STEP > 0.7 * length:  # not where it met something
            todo += forked(tree, plan, length, rng)
    return tuple(tree)


def forked(tree: list[Branch], plan: Growth, length: float, rng: np.random.Generator) -> list[tuple]:
    """Where, which way and how thick the two children of the last branch begin, how long they are, and its number."""
    last = tree[-1]
    ahead = last.points[-1] - last.points[-min(6, len(last.points))]
    angle, share = np.arctan2(*ahead), rng.uniform(0.35, 0.65)
    sides = rng.permutation([-1, 1])
    return [
        (
            last.points[-1],
            angle + side * np.deg2rad(rng.uniform(*plan.turn)),
            last.radius[-1] * part ** (1 / 3),
            length * rng.uniform(*plan.shrink),
            len(tree) - 1,
        )
        for side, part in zip(sides, (share, 1 - share), strict=True)
    ]


def narrowed(branch: Branch, at: int, degree: float, width: float) -> Branch:
    """A branch with one more stenosis: at its point `at` a share `degree` of the diameter is gone, and less around it,
    by a Gaussian of standard deviation `width` pixels."""
    away = branch.arc - branch.arc[at]
    radius = branch.radius * (1 - degree * np.exp(-((away / width) ** 2) / 2))
    return replace(branch, radius=radius, stenoses=(*branch.stenoses, Stenosis(at, degree)))


class Drawn(NamedTuple):
    """A tree on a grid (H, W) of pixels.

    edge       distance to its surface, negative within, and `REACH` far from it
    thickness  how far a ray from the front goes through it: a tube is as deep as it is wide
    owner      number of the branch that a pixel is of, or is nearest to; -1 far away
    """

    edge: np.ndarray
    thickness: np.ndarray
    owner: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: pixels whose middle is in the tree. A tube of `THINNEST` radius may have gaps; see `solid`."""
        return self.edge <= 0


def rendered(tree: Tree, size: tuple[int, int]) -> Drawn:
    """A tree on a grid of pixels; where branches meet, the one counts in which a pixel lies deepest."""
    edge, thickness = np.full(size, float(REACH)), np.zeros(size)
    owner = np.full(size, -1)
    if not tree:
        return Drawn(edge, thickness, owner)
    points, radius = np.concatenate([one.points for one in tree]), np.concatenate([one.radius for one in tree])
    number = np.repeat(np.arange(len(tree)), [len(one.points) for one in tree])
    reach = int(np.ceil(radius.max())) + REACH
    around = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    cells = points.round().astype(int)[:, None] + around
    distance = np.linalg.norm(cells - points[:, None], axis=-1)
    signed = distance - radius[:, None]
    kept = (signed < REACH) & ((cells >= 0) & (cells < size)).all(-1)
    places, values = np.ravel_multi_index(tuple(cells[kept].T), size), signed[kept]
    order = np.argsort(-values, kind="stable")  # of several values of one pixel the last is kept: the lowest
    edge.flat[places[order]] = values[order]
    owner.flat[places[order]] = np.broadcast_to(number[:, None], kept.shape)[kept][order]
    chord = 2 * np.sqrt(np.maximum(np.square(radius)[:, None] - np.square(distance), 0))[kept]
    np.maximum.at(thickness.ravel(), places, chord)
    return Drawn(edge, thickness, owner)


def lines(tree: Tree, size: tuple[int, int]) -> np.ndarray:
    """(H, W): the centre lines, each pixel with the number of its branch, from 1; 0 elsewhere."""
    found = np.zeros(size, int)
    for number, branch in enumerate(tree, 1):
        cells = branch.points.round().astype(int)
        cells = cells[((cells >= 0) & (cells < size)).all(1)]
        found[tuple(cells.T)] = number
    return found


def solid(tree: Tree, drawn: Drawn) -> np.ndarray:
    """(H, W) bool: the mask of a tree that hangs together, pixels of its centre lines included."""
    return drawn.mask | (lines(tree, drawn.edge.shape) > 0)
