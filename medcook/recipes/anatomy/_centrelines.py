"""From a mask back to a tree (`_trees`): centre line, radius at every point of it, branches, and who leaves whom.

The mask is thinned to a line one pixel wide. Pixels of it with more than two neighbours are forks; what lies between
two of them, or a fork and an end, is a branch. The radius is the distance to the nearest pixel outside, as that of the
largest disc around the point that fits in, which is what the "method of moments" of SAM-VMNet's code grows. A map of
probabilities is made finer first, so that a vessel two pixels wide is more than two steps.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage import draw
from skimage.morphology import skeletonize

from medcook.recipes.anatomy._trees import Branch, Tree

FINER = 4
SMOOTH = 1.5
"""Standard deviation in pixels, along a branch, by which places and radii are smoothed."""
AROUND = np.ones((3, 3), bool)


def parsed(soft: np.ndarray, root=None, finer: int = FINER) -> Tree:
    """The tree of a mask, or of probabilities (H, W) above one half; each part of it has a trunk of its own.

    root   row and column: a trunk begins at the end of the line that is nearest; None: at the thickest end
    finer  how many times as many rows it is measured on

    Places and radii are in pixels of the map. Loops are cut open where the ways around them meet.
    """
    mask = finer_grid(np.asarray(soft, float), finer) > 0.5
    if not mask.any():
        return ()
    depth = ndimage.distance_transform_edt(mask) - 0.5
    return rooted(split(without_spurs(skeletonize(mask), depth, finer)), depth, root, finer)


def bridged(soft: np.ndarray, reach: float) -> np.ndarray:
    """Probabilities (H, W) of which all that is above one half hangs together: the largest part, and those that are at
    most `reach` pixels from it or from what was joined before, by bridges three pixels wide; the others are taken out.
    """
    parts, count = ndimage.label(soft > 0.5, AROUND)
    if count < 2:
        return soft
    joined = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    found, left = soft.copy(), set(range(1, count + 1)) - {int(parts[joined][0])}
    while left:
        away, nearest = ndimage.distance_transform_edt(~joined, return_indices=True)
        shortest = np.where(np.isin(parts, list(left)), away, np.inf)
        at = np.unravel_index(shortest.argmin(), shortest.shape)
        if shortest[at] > reach:
            break
        bridge = np.zeros_like(joined)
        bridge[draw.line(*at, *nearest[(slice(None), *at)])] = True
        bridge = ndimage.binary_dilation(bridge) & (parts == 0)
        joined |= (parts == parts[at]) | bridge
        found[bridge] = 1.0
        left.discard(int(parts[at]))
    return np.where(np.isin(parts, list(left)), 0.0, found)


def finer_grid(soft: np.ndarray, finer: int) -> np.ndarray:
    """(H, W) to (finer * H, finer * W), linear between the middles of pixels; borders go on."""
    if finer == 1:
        return soft
    places = [(np.arange(finer * side) + 0.5) / finer - 0.5 for side in soft.shape]
    return ndimage.map_coordinates(soft, np.meshgrid(*places, indexing="ij"), order=1, mode="nearest")


def crowd(line: np.ndarray) -> np.ndarray:
    """(H, W): how many neighbours each pixel of a line has; 0 elsewhere."""
    return (ndimage.convolve(line.astype(np.int16), AROUND.astype(np.int16), mode="constant") - 1) * line


class Piece(NamedTuple):
    """path: pixels (N, 2) of a line in order;   knots: the numbers of what is at its ends."""

    path: np.ndarray
    knots: tuple[int, int]


def split(line: np.ndarray) -> list[Piece]:
    """The pieces of a line (H, W) bool between knots.

    A knot is a fork, whose middle is added to the piece, or a free end. A ring without a fork has two, side by side.
    """
    forks, count = ndimage.label(line & (crowd(line) > 2), AROUND)
    middles = np.array(ndimage.center_of_mass(forks > 0, forks, range(1, count + 1))).reshape(-1, 2)
    pieces, many = ndimage.label(line & (forks == 0), AROUND)
    found, knots = [], count
    for number, box in enumerate(ndimage.find_objects(pieces, many), 1):
        path = ordered(np.argwhere(pieces[box] == number)) + [part.start for part in box]
        first, last = touched(forks, path)
        path = np.vstack([middles[[first - 1]] if first else path[:0], path, middles[[last - 1]] if last else path[:0]])
        ends = []
        for fork in (first, last):
            knots += not fork
            ends.append(fork - 1 if fork else knots - 1)
        found.append(Piece(path, tuple(ends)))
    return found


def ordered(cells: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) of a line without forks, from one end to the other; of a ring, around it."""
    left = {tuple(cell) for cell in cells.tolist()}
    near = lambda cell: [  # noqa: E731
        (cell[0] + y, cell[1] + x)
        for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
        if (cell[0] + y, cell[1] + x) in left
    ]
    here = min(left, key=lambda cell: (len(near(cell)), cell))
    path = []
    while here is not None:
        path.append(here)
        left.discard(here)
        here = next(iter(near(here)), None)
    return np.array(path)


def touched(forks: np.ndarray, path: np.ndarray) -> tuple[int, int]:
    """The forks (H, W), numbered, beside a path's first and last pixel; 0: none. One pixel may be between two."""
    beside = []
    for row, column in (path[0], path[-1]):
        window = forks[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        beside.append([number for number in np.unique(window).tolist() if number])
    first = beside[0][0] if beside[0] else 0
    others = [number for number in beside[1] if number != first] if len(path) == 1 else beside[1]
    return first, others[0] if others else 0


def without_spurs(line: np.ndarray, depth: np.ndarray, finer: int) -> np.ndarray:
    """A line without the short ends that a rough surface grows: those that hardly leave the disc at their fork."""
    for _ in range(3):
        pieces = split(line)
        degree = np.bincount([knot for piece in pieces for knot in piece.knots])
        kept, removed = line.copy(), False
        for path, knots in pieces:
            ends = [degree[knot] == 1 for knot in knots]
            if ends[0] == ends[1]:
                continue
            fork = path[0] if ends[1] else path[-1]
            tip = path[-1] if ends[1] else path[0]
            cell = tuple(fork.round().astype(int))
            if np.linalg.norm(tip - fork) < depth[cell] + finer:
                cells = (path[1:] if ends[1] else path[:-1]).astype(int)
                kept[tuple(cells.T)] = False
                removed = True
        if not removed:
            break
        line = skeletonize(kept)
    return line


def rooted(pieces: list[Piece], depth: np.ndarray, root, finer: int) -> Tree:
    """Pieces of a line as branches in pixels of the map, each part of them from its trunk on."""
    meeting: dict[int, list[int]] = {}
    for number, piece in enumerate(pieces):
        for knot in set(piece.knots):
            meeting.setdefault(knot, []).append(number)
    left, tree = set(range(len(pieces))), []
    while left:
        queue = [(*trunk(pieces, meeting, left, depth, root, finer), -1)]
        while queue:
            number, knot, parent = queue.pop(0)
            if number in left:
                path, far = walked(pieces, meeting, left, number, knot)
                generation = tree[parent].generation + 1 if parent >= 0 else 0
                tree.append(smooth_branch(path, depth, finer, parent, generation))
                queue += [(other, far, len(tree) - 1) for other in meeting[far] if other in left]
    return tuple(tree)


def trunk(pieces, meeting, left: set[int], depth, root, finer: int) -> tuple[int, int]:
    """A piece that is left, and the knot from which it is walked: a free end, if there is one."""
    free = [(k, side) for k in left for side in (0, 1) if len(meeting[pieces[k].knots[side]]) == 1]
    if root is not None:
        far = lambda one: np.linalg.norm(onto(pieces[one[0]].path[-one[1]], finer) - root)  # noqa: E731
        number, side = min(free or [(min(left), 0)], key=far)
    else:
        thick = lambda one: np.median(depth[tuple(pieces[one[0]].path.round().astype(int).T)])  # noqa: E731
        number, side = max(free or [(min(left), 0)], key=thick)
    return number, pieces[number].knots[side]


def walked(pieces, meeting, left: set[int], number: int, knot: int) -> tuple[np.ndarray, int]:
    """The path (N, 2) from a knot along a piece to the next fork or end, and that knot; what is walked is not left.

    A knot where just two pieces meet is none: a corner of the line.
    """
    path = np.zeros((0, 2))
    while True:
        left.discard(number)
        piece = pieces[number]
        forwards = piece.knots[0] == knot
        path = np.vstack([path, piece.path if forwards else piece.path[::-1]])
        knot = piece.knots[1] if forwards else piece.knots[0]
        others = [other for other in meeting[knot] if other in left]
        if len(meeting[knot]) != 2 or not others:
            return path, knot
        number = others[0]


def onto(places: np.ndarray, finer: int) -> np.ndarray:
    """Places on the finer grid as places on the map's."""
    return (places + 0.5) / finer - 0.5


def smooth_branch(path: np.ndarray, depth: np.ndarray, finer: int, parent: int, generation: int) -> Branch:
    """A path of pixels (N, 2) on the finer grid as a branch; its ends stay where they are."""
    radius = ndimage.map_coordinates(depth, path.T, order=1, mode="nearest") / finer
    places, sigma = onto(path.astype(float), finer), SMOOTH * finer
    moved = ndimage.gaussian_filter1d(places, sigma, axis=0, mode="nearest")
    moved[[0, -1]] = places[[0, -1]]
    return Branch(moved, ndimage.gaussian_filter1d(radius, sigma, mode="nearest"), parent, generation)
