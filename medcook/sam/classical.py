"""What a prompt is worth without learning: ellipse, graph cut and random walker, given the same prompt as SAM.

All take an image (height, width) and a Prompt, and give a mask (height, width) bool.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from medcook.sam.prompts import Prompt

SIDE = 72
"""Long side in pixels of the window that graph cut and random walker work on: a grid that they solve in a second."""
SCALE = 1000
"""Capacities of the graph are whole numbers: this many to a unit."""
CORE = 0.3
"""Of a box, the ellipse with this squared radius is taken for object."""
BETA = 500
"""How much a difference in grey value hinders a random walker."""
SMOOTH = {"box": 2.0, "clicks": 20.0}
"""Weight of the cut's length in the energy of the graph."""
REACH = 5
"""Around a click, SIDE / REACH pixels are thought to be object at first."""
# CORE, BETA, SMOOTH and REACH were chosen on training patients of acdc and hippocampus, each by its own mean Dice.


def ellipse(image: np.ndarray, prompt: Prompt) -> np.ndarray:
    """The ellipse that touches the sides of the box. Without a box: a disc of a tenth of the image at the clicks."""
    rows, columns = np.indices(image.shape) + 0.5
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        u, v = (2 * columns - left - right) / (right - left), (2 * rows - top - bottom) / (bottom - top)
        return u**2 + v**2 <= 1
    return _near(image.shape, prompt.foreground, max(image.shape) / 10)


def random_walker(image: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Random walks from every pixel (Grady, PAMI 2006): which seed do they meet first? Solver of scikit-image."""
    from skimage.segmentation import random_walker as solve

    window, small, seeds = _problem(image, prompt)
    if not (seeds == 1).any() or not (seeds == 2).any():
        return np.zeros(image.shape, bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = solve(small, seeds, beta=BETA, mode="cg_j", tol=1e-2, return_full_prob=True)[0]
    return _placed(inside, window, image.shape)


def graph_cut(image: np.ndarray, prompt: Prompt, rounds: int = 3) -> np.ndarray:
    """GrabCut (Rother et al., SIGGRAPH 2004) on grey values: mixtures of Gaussians and a minimal cut, in turns."""
    window, small, seeds = _problem(image, prompt)
    inside = _start(seeds, prompt)
    for _ in range(rounds):
        if inside.all() or not inside.any():
            break
        cost = _mixture_cost(small, inside) - _mixture_cost(small, ~inside)
        inside = _minimal_cut(small, cost, seeds, SMOOTH["clicks" if prompt.box is None else "box"])
    if prompt.box is None:
        inside = _touching(inside, seeds == 1)
    return _placed(inside.astype(np.float32), window, image.shape)


def _touching(inside: np.ndarray, clicks: np.ndarray) -> np.ndarray:
    """The connected parts in which a click lies: far pixels of like grey value are not what was meant."""
    parts, _ = ndimage.label(inside)
    return inside & np.isin(parts, parts[clicks & inside])


def _start(seeds: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Where the object is thought to be at first: the box, or the surroundings of the clicks."""
    if prompt.box is not None:
        return seeds != 2
    return ndimage.distance_transform_edt(seeds != 1) < SIDE / REACH


def _problem(image: np.ndarray, prompt: Prompt) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
    """(window, its image scaled to SIDE and to 0..1, seeds: 1 object, 2 background, 0 to be found)."""
    height, width = image.shape
    window = (0, 0, width, height)
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        margin = 0.25 * max(right - left, bottom - top) + 2
        window = (
            int(max(0, left - margin)),
            int(max(0, top - margin)),
            int(min(width, np.ceil(right + margin))),
            int(min(height, np.ceil(bottom + margin))),
        )
    part = image[window[1] : window[3], window[0] : window[2]].astype(np.float32)
    low, high = np.percentile(part, [1, 99])
    part = ((part - low) / max(high - low, 1e-6)).clip(0, 1)
    factor = min(1.0, SIDE / max(part.shape))
    size = [max(8, round(side * factor)) for side in part.shape]
    small = F.interpolate(torch.from_numpy(part)[None, None], size, mode="area")[0, 0].numpy()
    scale = np.array(size) / part.shape
    return window, small, _seeds(small.shape, prompt, window, scale)


def _seeds(shape: tuple[int, int], prompt: Prompt, window: tuple, scale: np.ndarray) -> np.ndarray:
    """Clicks are discs; a box makes its outside background and its middle object; else the border is background."""
    rows, columns = np.indices(shape) + 0.5
    x, y = columns / scale[1] + window[0], rows / scale[0] + window[1]
    seeds = np.zeros(shape, int)
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        u, v = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        seeds[(abs(u) > 1) | (abs(v) > 1)] = 2
        seeds[u**2 + v**2 < CORE] = 1
    else:
        seeds[[0, -1]], seeds[:, [0, -1]] = 2, 2
    radius = max(1.0, 1.5 / scale.min())
    for points, value in ((prompt.foreground, 1), (prompt.background, 2)):
        for px, py in points:
            near = (x - px) ** 2 + (y - py) ** 2 <= radius**2
            seeds[near] = value
    return seeds


def _mixture_cost(image: np.ndarray, where: np.ndarray, components: int = 3) -> np.ndarray:
    """Minus the log likelihood of every pixel under a mixture of Gaussians fitted to the pixels `where`."""
    from sklearn.mixture import GaussianMixture

    values = image[where][:, None].astype(float)
    if len(values) < 2 * components:
        return np.zeros_like(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = GaussianMixture(components, random_state=0, reg_covar=1e-4, max_iter=30).fit(values)
    return -mixture.score_samples(image.reshape(-1, 1).astype(float)).reshape(image.shape)


def _minimal_cut(image: np.ndarray, cost: np.ndarray, seeds: np.ndarray, smooth: float) -> np.ndarray:
    """The labelling (True: object) of least energy: `cost` of calling a pixel object, and contrast-weighted borders."""
    count, numbers = image.size, np.arange(image.size).reshape(image.shape)
    differences = [np.diff(image, axis=axis) ** 2 for axis in (0, 1)]
    beta = 1 / (2 * np.mean(np.concatenate([d.ravel() for d in differences])) + 1e-9)
    starts = [numbers[:-1].ravel(), numbers[:, :-1].ravel()]
    ends = [numbers[1:].ravel(), numbers[:, 1:].ravel()]
    weights = [smooth * np.exp(-beta * d.ravel()) for d in differences]
    hard = 1e4
    to_object = np.where(seeds == 1, hard, np.where(seeds == 2, 0, np.maximum(-cost, 0))).ravel()
    to_background = np.where(seeds == 2, hard, np.where(seeds == 1, 0, np.maximum(cost, 0))).ravel()
    source, sink, every = count, count + 1, np.arange(count)
    rows = np.concatenate([*starts, *ends, np.full(count, source), every])
    columns = np.concatenate([*ends, *starts, every, np.full(count, sink)])
    capacity = (SCALE * np.concatenate([*weights, *weights, to_object, to_background])).astype(np.int32)
    graph = sparse.csr_matrix((capacity, (rows, columns)), shape=(count + 2, count + 2))
    left = graph - maximum_flow(graph, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    inside = np.zeros(count + 2, bool)
    inside[reached] = True
    return inside[:count].reshape(image.shape)


def _placed(inside: np.ndarray, window: tuple[int, int, int, int], shape: tuple[int, int]) -> np.ndarray:
    """A small window's object probability, above one half, in the pixels of the image."""
    left, top, right, bottom = window
    tensor = torch.from_numpy(np.asarray(inside, np.float32))[None, None]
    large = F.interpolate(tensor, (bottom - top, right - left), mode="bilinear", align_corners=False)[0, 0].numpy()
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = large > 0.5
    return mask


def _near(shape: tuple[int, int], points, radius: float) -> np.ndarray:
    rows, columns = np.indices(shape) + 0.5
    found = np.zeros(shape, bool)
    for x, y in points:
        found |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return found


COMPETITORS = {"ellipse": ellipse, "graph cut": graph_cut, "random walker": random_walker}
