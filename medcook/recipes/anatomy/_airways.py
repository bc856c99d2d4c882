"""Airways with the names of anatomy, drawn into the lungs of real X-rays: lobes, segments B1 to B10, subsegments a, b.

The trachea parts into two main bronchi, these into lobar ones, and so on: eighteen segments, thirty-six subsegments.
Where a bronchus ends, what it supplies is cut into sectors around its end, as large as what goes there has names, in
the order of anatomy. Where names part is usually the same, and in a third of the forks not: patterns of branching
differ between people. An airway is dark between bright walls. It may be ill: narrowed, widened, or tortuous.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from scipy import ndimage

from medcook.recipes.anatomy import _trees
from medcook.recipes.anatomy._boxes import BoxPreparation
from medcook.recipes.anatomy._planted import Planted, PlantedTrees, TreeTask
from medcook.recipes.anatomy._trees import Branch, Tree

SEGMENTS = {
    "RU": ("RB1", "RB2", "RB3"),
    "RM": ("RB4", "RB5"),
    "RL": ("RB6", "RB7", "RB8", "RB9", "RB10"),
    "LU": ("LB1+2", "LB3", "LB4", "LB5"),
    "LL": ("LB6", "LB8", "LB9", "LB10"),
}
"""Segments of each lobe from above downwards: right and left, upper, middle and lower."""
USUAL = {"RU": 1, "RM": 1, "RL": 1, "LU": 2, "LL": 1}
"""After how many of a lobe's segments its bronchus usually parts."""
LOBES = tuple(SEGMENTS)
CENTRAL = ("trachea", "right main", "left main", "right intermediate")


class Named(NamedTuple):
    """What a label value stands for; numbers from 1, 0 where a branch is of none: lobe, segment, subsegment."""

    name: str
    lobe: int = 0
    segment: int = 0
    subsegment: int = 0


def _every_name() -> tuple[Named, ...]:
    found = [Named("background"), *(Named(name) for name in CENTRAL)]
    found += [Named(f"{lobe} bronchus", number) for number, lobe in enumerate(LOBES, 1)]
    owned = [(lobe, name) for lobe, names in enumerate(SEGMENTS.values(), 1) for name in names]
    found += [Named(name, lobe, number) for number, (lobe, name) in enumerate(owned, 1)]
    for number, (lobe, name) in enumerate(owned, 1):
        found += [Named(f"{name}{part}", lobe, number, 2 * number - 1 + k) for k, part in enumerate("ab")]
    return tuple(found)


NAMES = _every_name()
"""`NAMES[value]` is what a label value stands for."""
VALUE = {named.name: value for value, named in enumerate(NAMES)}
COUNTS = (1 + len(LOBES), 1 + sum(map(len, SEGMENTS.values())), 1 + 2 * sum(map(len, SEGMENTS.values())))
"""Classes of lobes, segments and subsegments, none included."""
TRACHEA = 4.2
"""Radius in pixels of 128 rows."""
UNUSUAL, MISSING = 0.35, 0.15
"""How often a bronchus parts elsewhere than usual, and RB7 is not there."""
STATES = ("healthy", "narrowed", "widened", "tortuous")
CHANCES = (0.4, 0.2, 0.2, 0.2)


def bronchus(start, end, radius: float, parent: Branch | None, number: int, name: str, rng) -> Branch:
    """A slightly bent tube between two places, the child of branch `number`."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    way = end - start
    steps = np.linspace(0, 1, max(4, round(np.linalg.norm(way) / _trees.STEP)))[:, None]
    aside = np.array([-way[1], way[0]]) * rng.normal(0, 0.06)
    points = start + steps * way + np.sin(np.pi * steps) * aside
    generation = parent.generation + 1 if parent else 0
    return Branch(points, radius * np.linspace(1, 0.9, len(points)), number, generation, VALUE[name])


def sectors(cells: np.ndarray, hub: np.ndarray, heading: np.ndarray, shares, mirrored: bool) -> list[np.ndarray]:
    """Cells (N, 2) parted by their angle around a hub, seen along a heading, in these shares: from one side to the
    other, which is the other way round if mirrored."""
    ahead, aside = (cells - hub) @ heading, (cells - hub) @ np.array([heading[1], -heading[0]])
    angle = np.arctan2(-aside if mirrored else aside, ahead)
    cuts = np.round(np.cumsum(shares)[:-1] / np.sum(shares) * len(cells)).astype(int)
    return np.split(cells[np.argsort(angle, kind="stable")], cuts)


class Planter:
    """Grows one tree of airways, branch by branch."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.tree = rng, []

    def add(self, start, end, radius: float, parent: int, name: str) -> int:
        """One more branch; its number."""
        before = self.tree[parent] if parent >= 0 else None
        self.tree.append(bronchus(start, end, radius, before, parent, name, self.rng))
        return len(self.tree) - 1

    def supply(self, cells: np.ndarray, names: tuple[str, ...], parent: int, share: float, lobe: str) -> None:
        """Branches from the end of `parent` to cells (N, 2): segments, or the bronchus of several of them."""
        before = self.tree[parent]
        start, middle = before.points[-1], cells.mean(0)
        radius = before.radius[-1] * share ** (1 / 3)
        kind = "tip" if names[0][-1] in "ab" else "segment" if len(names) == 1 else "stem"
        reach = {"tip": (1.05, 1.3), "segment": (0.45, 0.65), "stem": (0.3, 0.5)}[kind]
        end = start + self.rng.uniform(*reach) * (middle - start)
        if np.linalg.norm(end - start) < 2 or len(cells) < 4:
            return
        number = self.add(start, end, radius, parent, names[0] if kind != "stem" else f"{lobe} bronchus")
        if kind == "tip":
            return
        parts = (f"{names[0]}a",), (f"{names[0]}b",)
        if kind == "stem":
            usual = min(USUAL[lobe], len(names) - 1) if names[0] == SEGMENTS[lobe][0] else len(names) // 2
            cut = int(self.rng.integers(1, len(names))) if self.rng.random() < UNUSUAL else usual
            parts = names[:cut], names[cut:]
        self.part(cells, parts, number, lobe)

    def part(self, cells: np.ndarray, parts, parent: int, lobe: str) -> None:
        """The two branches that leave `parent`, each to its sector."""
        heading = self.tree[parent].points[-1] - self.tree[parent].points[-4]
        shares = [len(part) * self.rng.uniform(0.85, 1.15) for part in parts]
        mirrored = lobe[0] == "R"
        pieces = sectors(
            cells, self.tree[parent].points[-1], heading / np.linalg.norm(heading), shares, mirrored=mirrored
        )
        for piece, part, share in zip(pieces, parts, shares, strict=True):
            if len(piece):
                self.supply(piece, part, parent, share / sum(shares), lobe)


def both_lungs(lungs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells (N, 2) of the right lung, which is on the left, and of the left one: the two largest parts of a mask (H, W)
    bool; where there is but one of some size, its halves."""
    parts, count = ndimage.label(lungs)
    large = sorted(range(1, count + 1), key=lambda number: -(parts == number).sum())[:2]
    cells = [np.argwhere(parts == number) for number in large]
    if len(cells) < 2 or len(cells[1]) < 0.2 * len(cells[0]):
        every = np.argwhere(lungs)
        middle = np.median(every[:, 1]) if len(every) else 0
        return every[every[:, 1] < middle], every[every[:, 1] >= middle]
    return tuple(sorted(cells, key=lambda each: each[:, 1].mean()))


def inner(cells: np.ndarray, level: float, right: bool, width: float) -> np.ndarray:
    """The place of a lung's cells (N, 2) that is nearest to the other lung, about a level."""
    near = cells[np.abs(cells[:, 0] - level) <= width]
    near = near if len(near) else cells
    return near[near[:, 1].argmax() if right else near[:, 1].argmin()]


def airways(lungs: np.ndarray, rng: np.random.Generator) -> Tree:
    """The healthy tree of lungs (H, W) bool; none where a side has no lung."""
    sides = both_lungs(lungs)
    if min(map(len, sides)) < 60:
        return ()
    scale, planter = lungs.shape[0] / _trees.ROWS, Planter(rng)
    top, height = np.argwhere(lungs)[:, 0].min(), np.ptp(np.argwhere(lungs)[:, 0])
    row = top + rng.uniform(0.28, 0.36) * height
    edges = [inner(cells, row, right, 0.04 * height + 1)[1] for cells, right in zip(sides, (True, False), strict=True)]
    carina = np.array([row, np.mean(edges)])
    trachea = planter.add((top - 0.02 * height, carina[1]), carina, TRACHEA * scale, -1, "trachea")
    for cells, name in zip(sides, ("right main", "left main"), strict=True):
        level = row + rng.uniform(0.04, 0.1) * height
        hilum = inner(cells, level, name[0] == "r", 0.04 * height + 1)
        radius = planter.tree[trachea].radius[-1] * (0.55 if name[0] == "r" else 0.45) ** (1 / 3)
        main = planter.add(carina, hilum, radius, trachea, name)
        lobes(planter, cells, main, rng)
    return tuple(planter.tree)


def lobes(planter: Planter, cells: np.ndarray, main: int, rng: np.random.Generator) -> None:
    """The lobar bronchi of one lung (N, 2), and all that leaves them."""
    right = planter.tree[main].name == VALUE["right main"]
    depth = (cells[:, 0] - cells[:, 0].min()) / max(1, np.ptp(cells[:, 0]))
    first = rng.uniform(0.34, 0.42) if right else rng.uniform(0.46, 0.54)
    upper, rest = cells[depth < first], cells[depth >= first]
    names = SEGMENTS["RU" if right else "LU"]
    below = SEGMENTS["RM"] + SEGMENTS["RL"] if right else SEGMENTS["LL"]
    share = len(names) / (len(names) + len(below))
    planter.supply(upper, names, main, share, "RU" if right else "LU")
    if not right:
        planter.supply(rest, below, main, 1 - share, "LL")
        return
    before = planter.tree[main]
    start, middle = before.points[-1], rest.mean(0)
    between = start + np.array([0.3, 0.15]) * (middle - start)
    number = planter.add(start, between, before.radius[-1] * (1 - share) ** (1 / 3), main, "right intermediate")
    second = rng.uniform(0.54, 0.62)
    middle_lobe, lower = cells[(depth >= first) & (depth < second)], cells[depth >= second]
    kept = tuple(name for name in SEGMENTS["RL"] if name != "RB7" or rng.random() >= MISSING)
    for piece, which, lobe in ((middle_lobe, SEGMENTS["RM"], "RM"), (lower, kept, "RL")):
        planter.supply(piece, which, number, len(which) / (len(kept) + 2), lobe)


def ill(tree: Tree, state: str, scale: float, rng: np.random.Generator) -> Tree:
    """A healthy tree in a state of `STATES`: what it changes are bronchi beyond the main ones, each by chance."""
    if state == "healthy":
        return tree
    found = []
    for branch in tree:
        hit = NAMES[branch.name].lobe and branch.length >= 6 * scale and rng.random() < 0.6
        found.append(changed(branch, state, scale, rng) if hit else branch)
    return tuple(found)


def changed(branch: Branch, state: str, scale: float, rng: np.random.Generator) -> Branch:
    """A branch with a stenosis, with a wide part, or that winds; its ends stay where they are."""
    share = branch.arc / branch.length
    if state == "narrowed":
        at = round(rng.uniform(0.4, 0.6) * (len(branch.points) - 1))
        return _trees.narrowed(branch, at, rng.uniform(0.4, 0.7), rng.uniform(1.5, 2.5) * scale)
    if state == "widened":
        bulge = np.sin(np.pi * share) ** 2
        return replace(branch, radius=branch.radius * (1 + rng.uniform(0.4, 0.9) * bulge))
    way = (branch.points[-1] - branch.points[0]) / max(branch.chord, 1e-6)
    winds = max(1, round(branch.length / (9 * scale)))
    aside = rng.uniform(0.9, 1.6) * scale * np.sin(2 * np.pi * winds * share) * np.sin(np.pi * share)
    return replace(branch, points=branch.points + aside[:, None] * np.array([-way[1], way[0]]))


def brightness(drawn: _trees.Drawn) -> np.ndarray:
    """(H, W): air is dark, and deeper air darker; a wall of about a pixel around it is bright."""
    wall = np.exp(-(((drawn.edge - 0.8) / 0.7) ** 2)) * (drawn.edge < _trees.REACH)
    return 0.6 * wall - np.clip(0.5 - drawn.edge, 0, 1.5)


def with_airways(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> Planted:
    """An X-ray (H, W) of unit variance with airways, and the label map of their names; `state` is one of `STATES`."""
    scale, state = image.shape[0] / _trees.ROWS, STATES[rng.choice(len(STATES), p=CHANCES)]
    tree = ill(airways(lungs, rng), state, scale, rng)
    drawn, label = _trees.rendered(tree, image.shape), np.zeros(image.shape, np.uint8)
    if tree:
        names, line = np.array([branch.name for branch in tree], np.uint8), _trees.lines(tree, image.shape)
        label[drawn.mask] = names[drawn.owner[drawn.mask]]
        thin = (line > 0) & ~drawn.mask
        label[thin] = names[line[thin] - 1]
    air = ndimage.gaussian_filter(rng.uniform(0.7, 1.0) * brightness(drawn), 0.4)
    return Planted((image + air)[None], label, {"airways": tree}, state)


@dataclass(frozen=True)
class PlantedAirways(PlantedTrees, BoxPreparation):
    """X-rays around the lungs, as drawn by people, with airways in them."""

    margin: float = 1.1

    what: ClassVar[str] = "airways"

    def plant(self, image: np.ndarray, organ: np.ndarray, rng: np.random.Generator) -> Planted:
        return with_airways(image, organ, rng)


@dataclass(frozen=True)
class AirwayTask(TreeTask):
    """Airways to be found and named."""

    painter: ClassVar[type[PlantedTrees]] = PlantedAirways
    names: ClassVar[dict[int, str]] = {value: named.name for value, named in enumerate(NAMES) if value}
