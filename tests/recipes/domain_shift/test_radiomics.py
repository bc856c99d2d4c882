"""Radiomic features against definitions written out in loops, and the images that are filtered before."""

from itertools import product

import numpy as np
import pytest
import pywt
from scipy import ndimage, stats
from skimage.feature import graycomatrix
from textures import texture

from medcook.recipes.domain_shift import _radiomics as radio

SQUARE = np.array([[1, 2, 5, 2], [3, 5, 1, 3], [1, 3, 5, 5], [3, 1, 1, 1]]) - 1
"""The example of PyRadiomics' documentation, with levels from 0 on."""


def few_levels(seed: int = 0) -> np.ndarray:
    """(9, 11) of levels 0 to 4, of which 3 is missing."""
    levels = np.random.default_rng(seed).integers(0, 4, (9, 11))
    levels[:4, :5] = 2
    return np.where(levels == 3, 4, levels)


def entropy(p) -> float:
    p = np.asarray(p, float).ravel()
    return float(-sum(x * np.log2(x) for x in p if x > 0))


@pytest.mark.component("standardised radiomic features")
class TestFeatures:
    def test_first_order_is_that_of_numpy_and_scipy(self):
        image = texture()
        levels = radio.grey_levels(image)
        flat = image.ravel()
        p = np.unique(levels, return_counts=True)[1] / levels.size
        low, high = np.percentile(flat, (10, 90))
        inner = flat[(flat >= low) & (flat <= high)]
        expected = [
            *((flat**2).sum(), stats.entropy(p, base=2), (p**2).sum(), flat.min(), low, np.median(flat), high),
            *(flat.max(), flat.mean(), stats.iqr(flat), flat.max() - flat.min(), np.mean(abs(flat - flat.mean()))),
            *(np.mean(abs(inner - inner.mean())), np.sqrt(np.mean(flat**2)), flat.var(), stats.skew(flat)),
            stats.kurtosis(flat, fisher=False),
        ]
        assert np.allclose(radio.first_order(image, levels), expected)

    def test_grey_levels_are_bins_that_begin_at_zero(self):
        image = np.array([[-0.25, -0.2, -0.01], [0.0, 0.09, 0.31]])
        assert radio.grey_levels(image).tolist() == [[0, 1, 2], [3, 3, 6]]
        assert radio.grey_levels(100 * image).max() == radio.MOST - 1

    def test_pairs_are_those_of_scikit_image(self):
        levels = few_levels()
        angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
        expected = graycomatrix(levels.astype(np.uint8), [1], angles, 5, symmetric=True, normed=True)[:, :, 0]
        assert np.allclose(radio.cooccurrence(levels), expected.transpose(2, 0, 1))

    def test_glcm_is_what_its_formulas_say(self):
        """Each in loops over i and j."""
        levels = few_levels()

        def of(p: np.ndarray) -> list[float]:
            count = len(p)
            cells = [(i + 1, j + 1, p[i, j]) for i, j in product(range(count), repeat=2)]
            mean = lambda f: sum(f(i, j) * q for i, j, q in cells)  # noqa: E731
            mu = mean(lambda i, j: i)
            variance = mean(lambda i, j: (i - mu) ** 2)
            apart = [sum(q for i, j, q in cells if abs(i - j) == k) for k in range(count)]
            sums = [sum(q for i, j, q in cells if i + j == k) for k in range(2, 2 * count + 1)]
            away = sum(k * q for k, q in enumerate(apart))
            side = p.sum(1)
            hx, hxy = entropy(side), entropy(p)
            hxy1 = -sum(q * np.log2(side[i - 1] * side[j - 1]) for i, j, q in cells if q)
            hxy2 = entropy(np.outer(side, side))
            return [
                mean(lambda i, j: i * j),
                mu,
                *(mean(lambda i, j, k=k: (i + j - 2 * mu) ** k) for k in (4, 3, 2)),
                mean(lambda i, j: (i - j) ** 2),
                (mean(lambda i, j: i * j) - mu**2) / variance,
                mean(lambda i, j: abs(i - j)),
                entropy(apart),
                sum((k - away) ** 2 * q for k, q in enumerate(apart)),
                *(sum(q**2 for _, _, q in cells), hxy, (hxy - hxy1) / hx, np.sqrt(1 - np.exp(-2 * (hxy2 - hxy)))),
                mean(lambda i, j: 1 / (1 + (i - j) ** 2)),
                mean(lambda i, j: 1 / (1 + ((i - j) / count) ** 2)),
                mean(lambda i, j: 1 / (1 + abs(i - j))),
                mean(lambda i, j: 1 / (1 + abs(i - j) / count)),
                sum(q / k**2 for k, q in enumerate(apart) if k),
                *(p.max(), entropy(sums), variance),
            ]

        assert np.allclose(radio.glcm(levels), np.mean([of(p) for p in radio.cooccurrence(levels)], 0))

    def test_runs_are_those_of_a_walk(self):
        levels = few_levels()
        height, width = levels.shape
        for found, (down, right) in zip(radio.runs(levels), ((0, 1), (1, 0), (1, 1), (1, -1)), strict=True):
            expected = []
            for y, x in product(range(height), range(width)):
                inside = lambda a, b: 0 <= a < height and 0 <= b < width  # noqa: E731
                if inside(y - down, x - right) and levels[y - down, x - right] == levels[y, x]:
                    continue  # no start
                length = 1
                while inside(y + length * down, x + length * right) and (
                    levels[y + length * down, x + length * right] == levels[y, x]
                ):
                    length += 1
                expected.append((levels[y, x], length))
            assert sorted(zip(*found, strict=True)) == sorted(expected)

    def test_zones_are_connected_parts(self):
        levels = few_levels()
        expected = []
        for value in np.unique(levels):
            parts, count = ndimage.label(levels == value, np.ones((3, 3)))
            expected += [(value, (parts == k + 1).sum()) for k in range(count)]
        ((level, size),) = radio.zones(levels)
        assert sorted(zip(level, size, strict=True)) == sorted(expected) and size.sum() == levels.size

    def test_sizes_are_what_their_formulas_say(self):
        """From the matrix of how often each size of each level is found, with a level that is missing."""
        level, size = np.array([0, 0, 1, 1, 1, 3]), np.array([1, 2, 2, 2, 5, 1])
        matrix = np.zeros((4, 5))
        np.add.at(matrix, (level, size - 1), 1)
        n, i, j = matrix.sum(), np.arange(1, 5)[:, None], np.arange(1, 6)[None]
        p = matrix / n
        expected = [
            *((p / j**2).sum(), (p * j**2).sum()),
            *((matrix.sum(1) ** 2).sum() / n, (matrix.sum(1) ** 2).sum() / n**2),
            *((matrix.sum(0) ** 2).sum() / n, (matrix.sum(0) ** 2).sum() / n**2),
            *(n / 13, (p * (i - (p * i).sum()) ** 2).sum(), (p * (j - (p * j).sum()) ** 2).sum(), entropy(p)),
            *((p / i**2).sum(), (p * i**2).sum(), (p / i**2 / j**2).sum(), (p * i**2 / j**2).sum()),
            *((p * j**2 / i**2).sum(), (p * i**2 * j**2).sum()),
        ]
        assert np.allclose(radio.sizes([(level, size)], 13), expected)
        other = (level[::-1] + 1, size)
        both = radio.sizes([(level, size), other], 13)
        assert np.allclose(both, (radio.sizes([(level, size)], 13) + radio.sizes([other], 13)) / 2)

    def test_ngtdm_is_that_of_the_documented_example(self):
        i, p = np.array([1, 2, 3, 5.0]), np.array([6, 2, 4, 4]) / 16
        s = np.zeros(6)
        for y, x in product(range(4), repeat=2):
            near = [SQUARE[a, b] + 1 for a, b in product(range(4), repeat=2) if 0 < max(abs(a - y), abs(b - x)) < 2]
            s[SQUARE[y, x] + 1] += abs(SQUARE[y, x] + 1 - np.mean(near))
        assert np.allclose(s[1:], [13.35, 2.0, 3.03, 0, 10.075], atol=0.01)
        s = s[[1, 2, 3, 5]]
        pairs = list(product(range(4), repeat=2))
        expected = [
            1 / (p * s).sum(),
            sum(p[a] * p[b] * (i[a] - i[b]) ** 2 for a, b in pairs) / 12 * s.sum() / 16,
            (p * s).sum() / sum(abs(i[a] * p[a] - i[b] * p[b]) for a, b in pairs),
            sum(abs(i[a] - i[b]) * (p[a] * s[a] + p[b] * s[b]) / (p[a] + p[b]) for a, b in pairs) / 16,
            sum((p[a] + p[b]) * (i[a] - i[b]) ** 2 for a, b in pairs) / s.sum(),
        ]
        assert np.allclose(radio.ngtdm(SQUARE), expected, rtol=1e-6)

    def test_every_kind_is_among_the_features(self):
        image = texture()
        found, levels = radio.features(image), radio.grey_levels(image)
        parts = (radio.first_order(image, levels), radio.glcm(levels), radio.sizes(radio.runs(levels), image.size))
        parts += (radio.sizes(radio.zones(levels), image.size), radio.ngtdm(levels))
        assert [len(part) for part in parts] == [17, 22, 16, 16, 5] and np.array_equal(found, np.concatenate(parts))
        assert len(found) == radio.COUNT

    @pytest.mark.parametrize("image", [np.zeros((9, 8)), np.full((16, 16), 3.0), np.eye(17)])
    def test_a_flat_image_has_features_too(self, image):
        assert np.isfinite(radio.radiomics(image)).all()


@pytest.mark.component("filtered versions of the image")
class TestFilters:
    def test_wavelets_are_those_of_pywavelets(self):
        image = texture((16, 24))
        ((low, (across, down, both)),) = pywt.swt2(image, "coif1", 1)
        for found, expected in zip(radio.wavelets(image), (low, down, across, both), strict=True):
            assert np.allclose(found, expected, atol=1e-8)

    def test_a_blob_answers_at_its_own_scale(self):
        grid = np.hypot(*np.mgrid[-20:21, -20:21])
        small, large = (np.exp(-(grid**2) / (2 * sigma**2)) for sigma in (2, 4))
        for image, strongest in ((small, 0), (large, 1)):
            answers = [abs(blob[20, 20]) for blob in radio.blobs(image)]
            assert np.argmax(answers) == strongest
        (found,) = radio.blobs(texture((30, 30)), (2.0,))
        assert np.allclose(found, 4 * ndimage.gaussian_laplace(texture((30, 30)), 2.0, mode="nearest"))
