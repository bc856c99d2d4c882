"""DSAIF: what the tree filters keep and remove, and who sees which view."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.morphology import area_opening, local_maxima
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.methods.co_training import cross_supervision
from medcook.recipes.semi_supervised.dsaif import DSAIF, dual_views, max_tree_filter, min_tree_filter, recipe

TINY = dict(channels=(4, 8))
LATE = Moment(9, 10)


def grey(seed: int, size: tuple[int, ...] = (9, 9), levels: int = 6) -> np.ndarray:
    """Smooth enough to have chains of only children, rough enough to branch."""
    noise = np.random.default_rng(seed).random(size)
    smooth = ndimage.gaussian_filter(noise, 0.7)
    return ((smooth - smooth.min()) / np.ptp(smooth) * (levels - 1)).round().astype(np.uint8) * 10


def by_thresholds(image: np.ndarray, area: int = 1) -> np.ndarray:
    """The filter by its definition: components of all threshold sets, each only child dropped, each pixel repainted."""
    nodes = {}
    for level in np.unique(image):  # a component that several thresholds share has the highest of them
        labels, count = ndimage.label(image >= level, np.ones((3,) * image.ndim))
        nodes |= {frozenset(np.flatnonzero(labels == number)): level for number in range(1, count + 1)}
    ordered = sorted((node for node in nodes if len(node) >= area), key=len, reverse=True)
    parent = {node: min((big for big in ordered if big > node), key=len, default=None) for node in ordered}
    children = list(parent.values())
    out = np.empty(image.size, np.uint8)
    for node in ordered:
        if parent[node] is None or children.count(parent[node]) > 1:
            out[list(node)] = nodes[node]
    return out.reshape(image.shape)


def bumps(*tops: tuple[int, ...]) -> np.ndarray:
    """A row of pyramids, each rising from 10 through its own grey values."""
    image = np.full((7, 8 * len(tops)), 10, np.uint8)
    for k, values in enumerate(tops):
        for step, value in enumerate(values):
            image[1 + step : 6 - step, 8 * k + 1 + step : 8 * k + 6 - step] = value
    return image


@pytest.mark.component("max-tree and min-tree")
class TestTrees:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("size", [(9, 9), (6, 11), (5, 4, 4)])
    @pytest.mark.parametrize("area", [1, 3])
    def test_the_filter_is_that_of_the_threshold_sets(self, seed, size, area):
        image = grey(seed, size)
        assert np.array_equal(max_tree_filter(image, area), by_thresholds(image, area))

    def test_the_min_tree_is_the_max_tree_of_the_inverse(self):
        image = grey(0)
        assert np.array_equal(255 - min_tree_filter(image), by_thresholds(255 - image))
        assert (max_tree_filter(image) <= image).all() and (min_tree_filter(image) >= image).all()

    def test_it_goes_by_the_order_of_grey_values_alone(self):
        image, table = grey(1), np.sort(np.random.default_rng(0).permutation(256)[:51]).astype(np.uint8)
        for tree_filter in (max_tree_filter, min_tree_filter):
            assert np.array_equal(tree_filter(table[image]), table[tree_filter(image)])

    def test_corners_touch(self):
        image = np.zeros((6, 6), np.uint8)
        image[1, 1], image[2, 2], image[4, 1] = 9, 9, 9
        assert np.array_equal(max_tree_filter(image, 2), np.zeros_like(image))  # an only child
        image[4, 2] = 9
        assert np.array_equal(max_tree_filter(image, 2), image)

    def test_views_are_images_on_the_grey_scale_of_the_original(self):
        image = torch.from_numpy(grey(2)).float()[None] / 7 - 3
        bright, dark = dual_views(image, 1)
        coarse = ((image[0] - image.min()) / (image.max() - image.min()) * 255).round().byte().numpy()
        for view, tree_filter in ((bright, max_tree_filter), (dark, min_tree_filter)):
            expected = torch.from_numpy(tree_filter(coarse)) / 255 * (image.max() - image.min()) + image.min()
            assert view.dtype == image.dtype and torch.allclose(view[0], expected, atol=1e-5)
        assert not torch.allclose(bright, dark)

    def test_channels_have_trees_of_their_own(self):
        one, two = (torch.from_numpy(grey(seed)).float() for seed in (3, 4))
        both = dual_views(torch.stack([one, two]), 1)[0]
        assert torch.allclose(both[0], dual_views(one[None], 1)[0][0], atol=1e-4)

    def test_a_flat_image_stays(self):
        flat = torch.full((1, 8, 8), -0.7)
        assert all(torch.allclose(view, flat) for view in dual_views(flat, 5))


@pytest.mark.component("removal of nodes without siblings")
class TestOnlyChildren:
    def test_a_single_pyramid_falls_to_the_ground(self):
        assert np.array_equal(max_tree_filter(bumps((20, 30, 40))), np.full((7, 8), 10))

    def test_of_a_chain_the_node_next_to_the_root_stays(self):
        """Two pyramids are siblings where they leave the ground; what stands on either is an only child."""
        assert np.array_equal(max_tree_filter(bumps((20, 30, 40), (50, 60))), bumps((20,), (50,)))

    def test_what_branches_stays_as_it_is(self):
        image = bumps((20,), (30,))
        image[2, 2] = image[4, 4] = 90
        assert np.array_equal(max_tree_filter(image), image)

    def test_it_keeps_every_peak_and_makes_none(self):
        for seed in range(4):
            image = grey(seed, (16, 16), 12)
            before, after = (local_maxima(each, connectivity=2) for each in (image, max_tree_filter(image)))
            labels, count = ndimage.label(after, np.ones((3, 3)))
            assert count == ndimage.label(before, np.ones((3, 3)))[1]
            assert set(np.unique(labels[before])) == set(range(1, count + 1))

    def test_twice_is_once(self):
        image = grey(5, (16, 16), 20)
        once = max_tree_filter(image, 3)
        assert not np.array_equal(once, image) and np.array_equal(max_tree_filter(once, 3), once)


@pytest.mark.component("removal of small components")
class TestSmallComponents:
    @pytest.mark.parametrize("area", [2, 5, 20])
    def test_it_is_an_area_opening_before_the_siblings_are_counted(self, area):
        image = grey(6, (16, 16), 20)
        opened = area_opening(image, area, connectivity=2)
        assert not np.array_equal(opened, image)
        assert np.array_equal(max_tree_filter(image, area), max_tree_filter(opened))

    def test_a_speck_is_nobodys_sibling(self):
        image = bumps((20, 30), (10,))
        image[3, 12] = 80
        assert np.array_equal(max_tree_filter(image, 5), np.full_like(image, 10))
        assert max_tree_filter(image).max() == 80


def batch(seed: int, known: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (4, 16, 16), generator=rng).byte()
    images = labels[:, None] + torch.randn(4, 1, 16, 16, generator=rng)
    return Batch(images, labels if known else torch.full_like(labels, IGNORE))


class Seen(nn.Module):
    """A network that notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.images = nn.Conv2d(1, 3, 1), []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return self.layer(images)


@pytest.mark.component("max-tree and min-tree")
class TestWhoSeesWhat:
    def test_one_sees_the_max_tree_where_the_other_sees_the_min_tree(self):
        images = torch.cat([batch(seed).images for seed in range(4)])[..., :8, :8]
        first = 0
        for image, one, two in zip(images, *DSAIF(share=1.0, area=2).pair(images), strict=True):
            bright, dark = dual_views(image, 2)
            first += torch.equal(one, bright)
            assert (torch.equal(one, bright) and torch.equal(two, dark)) or (
                torch.equal(one, dark) and torch.equal(two, bright)
            )
        assert 0 < first < len(images)  # by chance, image by image

    def test_the_share_of_filtered_images(self):
        images = batch(0).images[..., :8, :8].repeat(16, 1, 1, 1)
        one, two = DSAIF().pair(images)
        plain = torch.tensor([torch.equal(image, view) for image, view in zip(images, one, strict=True)])
        assert 20 <= plain.sum() <= 44 and torch.equal(one[plain], two[plain])

    def test_noise_gives_each_its_own(self):
        images = batch(0).images
        one, two = DSAIF(views="noise").pair(images)
        assert all(0 < (view - images).abs().max() <= 0.2 + 1e-6 for view in (one, two))
        assert not torch.equal(one, two)


@pytest.mark.component("mutually supervised networks")
class TestMutualSupervision:
    def step(self, now: Moment = LATE, **settings) -> tuple[nn.ModuleDict, Tensor]:
        nets = nn.ModuleDict({"model": Seen(), "second": Seen()})
        loss = DSAIF(**settings).training_step(nets, batch(0), batch(1, False), now)
        loss.backward()
        return nets, loss

    def test_each_learns_the_labels_and_the_others_hard_label(self):
        nets, loss = self.step(share=1.0, weight=0.7)
        (known, free), (known_too, free_too) = (net.images for net in nets.values())
        assert not torch.equal(known, known_too) and not torch.equal(free, free_too)
        logits = [net.layer(image) for net, image in zip(nets.values(), (known, known_too), strict=True)]
        supervised = sum(find_loss("both")(each, batch(0).labels) for each in logits)
        mutual = cross_supervision(nets["model"].layer(free), nets["second"].layer(free_too))
        assert loss.item() == pytest.approx((supervised + 0.7 * mutual).item(), rel=1e-5)

    def test_both_are_taught_by_unlabelled_images(self):
        plain, _ = self.step(weight=0.0)
        torch.manual_seed(0)
        taught, _ = self.step(weight=1.0)
        for name in ("model", "second"):
            assert not torch.allclose(plain[name].layer.weight.grad, taught[name].layer.weight.grad)

    def test_at_first_labels_alone(self):
        nets, _ = self.step(Moment(0, 10))
        assert [len(net.images) for net in nets.values()] == [1, 1]

    def test_two_networks_from_two_starts_and_one_that_predicts(self):
        method = DSAIF(**TINY)
        nets = method.build(1, 3, 2).eval()
        assert not torch.equal(nets["model"].head.weight, nets["second"].head.weight)
        images = batch(0).images
        assert torch.equal(method.predict(nets, images), nets["average"](images).softmax(1))


def test_the_arms_differ_in_the_views_alone():
    assert recipe.arms["dsaif"].method.settings() == recipe.arms["noise views"].method.settings() | {"views": "trees"}
