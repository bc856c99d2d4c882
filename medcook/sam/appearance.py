"""What a scene looks like, drawn anew at every use, and how it is looked at: as a whole, close up, or cut off.

In the spirit of SynthSeg (Billot et al. 2023) and ScribblePrompt (Wong et al. 2024): each region gets its own grey
value and texture, then come a bias field, blur, a coarser resolution and noise. All of it is drawn by the generator.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from medcook.sam.scenes import SIZE, SMALLEST, smooth


def appearance(regions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (SIZE, SIZE) float32 of a scene, zero mean and unit variance.

    Often what is seen ends a little beside the border that is true by convention, as where annotators close a contour
    over muscles, or fat blurs into a wall: then a box that is tight says more than the image.
    """
    count = int(regions.max()) + 1
    if rng.random() < 0.6:
        regions = displaced(regions, rng, rng.uniform(0, 4))
    grey = rng.uniform(0, 1, count).astype(np.float32)
    if rng.random() < 0.45:  # few grey values, as where many tissues look alike
        grey = np.round(grey * (levels := rng.integers(2, 5))) / levels + rng.normal(0, 0.04, count).astype(np.float32)
    image = grey[regions]
    amount = (rng.exponential(0.08, count) * (rng.random(count) < 0.7)).astype(np.float32)
    for scale in rng.choice([5, 10, 20, 40, 80], 2, replace=False):
        image += amount[regions] * smooth(rng, int(scale)) if scale < 40 else amount[regions] * grain(rng, int(scale))
    if rng.random() < 0.6:
        image *= np.exp(rng.uniform(0, 0.35) * smooth(rng, int(rng.integers(1, 4))))
    if rng.random() < 0.3:  # what is bright swells, or shrinks
        image = (ndimage.grey_dilation, ndimage.grey_erosion)[rng.integers(2)](image, size=int(rng.choice([3, 5])))
    if rng.random() < 0.4:
        image = coarse(image, rng.uniform(1.3, 4))
    elif rng.random() < 0.7:
        image = ndimage.gaussian_filter(image, rng.uniform(0.3, 1.6))
    image = noisy(image, rng)
    if rng.random() < 0.5:
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low + 1e-6)) ** np.exp(rng.uniform(-0.6, 0.6))
    return normalised(image)


def displaced(regions: np.ndarray, rng: np.random.Generator, pixels: float) -> np.ndarray:
    """The regions, each border moved here and there by about so many pixels."""
    places = np.indices(regions.shape)
    moves = np.stack([smooth(rng, int(rng.integers(6, 14))) for _ in range(2)])
    rows, columns = np.clip(np.round(places + pixels * moves), 0, SIZE - 1).astype(int)
    return regions[rows, columns]


def grain(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(SIZE, SIZE) blocky random texture, `cells` values a side."""
    return np.kron(rng.standard_normal((cells, cells)), np.ones((SIZE // cells,) * 2)).astype(np.float32)


def coarse(image: np.ndarray, factor: float) -> np.ndarray:
    """The image as a scanner of `factor` times coarser pixels shows it, interpolated back."""
    small = max(20, round(SIZE / factor))
    soft = torch.from_numpy(ndimage.gaussian_filter(image, factor / 2.5))[None, None]
    seen = F.interpolate(soft, (small, small), mode="bilinear", align_corners=False)
    return F.interpolate(seen, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0].numpy()


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, Rician or speckle noise, or none."""
    level, kind = rng.exponential(0.06) * image.std() * 3, rng.integers(4)
    field = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(level)
    if kind == 1:
        return image + field[0]
    if kind == 2:
        return np.hypot(image + field[0], field[1])
    if kind == 3:
        return image * (1 + ndimage.gaussian_filter(field[0], rng.uniform(0, 1.2)) * 2)
    return image


def close_up(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (SIZE, SIZE) and masks (T, SIZE, SIZE) of a square window around one of the masks, scaled up to SIZE.

    As the predictor looks at a small box: the window is about twice as long as the mask's box, and as coarse as the
    image was. Masks of which the window cuts off more than a third are left out.
    """
    shown = masks[rng.integers(len(masks))]
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    side = 1 + max(rows[-1] - rows[0], columns[-1] - columns[0])
    side = int(np.clip(side * rng.uniform(1.5, 2.6), 24, SIZE))
    middle = [(ends[0] + ends[-1] + 1) / 2 + rng.uniform(-0.1, 0.1) * side for ends in (rows, columns)]
    top, left = (int(np.clip(at - side / 2, 0, SIZE - side)) for at in middle)
    window = (..., slice(top, top + side), slice(left, left + side))
    kept = masks[window].sum((1, 2)) > 2 / 3 * masks.sum((1, 2))
    tensors = torch.from_numpy(np.concatenate([image[window][None], masks[kept][window]]).astype(np.float32))
    larger = F.interpolate(tensors[None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0].numpy()
    return normalised(larger[0]), larger[1:] > 0.5


def cut_off(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same, as if the image ended earlier on the right or below and were filled up with its edge.

    That is how an image that is not square reaches the model. Where no mask would be left, nothing is cut off.
    """
    end, axis = int(rng.integers(SIZE // 2, SIZE)), int(rng.integers(2))
    kept, gone = ((..., part, slice(None)) if axis else (..., part) for part in (slice(end), slice(end, None)))
    shorter = masks.copy()
    shorter[gone] = False
    if shorter.sum((1, 2)).max() < SMALLEST:
        return image, masks
    seen = normalised(image[kept])
    width = [(0, 0), (0, 0)]
    width[1 - axis] = (0, SIZE - end)
    return np.pad(seen, width, mode="edge"), shorter


def normalised(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, float32."""
    return ((image - image.mean()) / (image.std() + 1e-6)).astype(np.float32)
