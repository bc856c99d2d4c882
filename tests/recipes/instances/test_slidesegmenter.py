"""SlideSegmenter: distances to centroids, votes for them, what separates sections, and the loss."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.instances import _parts, slidesegmenter
from medcook.recipes.instances._slides import CLASSES
from medcook.recipes.instances.slidesegmenter import Seen, SlideNet, SlideSegmenter, recipe

NOW = Moment(0, 10)
ARMS = {name: arm.method for name, arm in recipe.arms.items()}
TINY = dict(channels=(4, 8, 8))


@pytest.fixture
def slide() -> np.ndarray:
    """(64, 64): section 1 is torn in two, 2 and 3 touch."""
    sections = np.zeros((64, 64), int)
    sections[8:18, 6:16] = sections[8:18, 22:32] = 1
    sections[38:54, 8:24], sections[38:54, 24:40] = 2, 3
    return sections


def distance_of(sections: np.ndarray) -> np.ndarray:
    return slidesegmenter.to_centroids(torch.from_numpy(sections)[None])[0].numpy()


def same(found: np.ndarray, truth: np.ndarray) -> bool:
    """Whether two maps cut the image into the same instances."""
    pairs = set(zip(found.ravel().tolist(), truth.ravel().tolist(), strict=True))
    return len(pairs) == len(np.unique(found)) == len(np.unique(truth)) and (0, 0) in pairs


@pytest.mark.component("distances to the centroid")
def test_distances_lead_to_the_centroid_of_ones_own_section(slide):
    distance = distance_of(slide)
    assert not distance[:, slide == 0].any()
    for number in (1, 2, 3):
        mine = slide == number
        centroid = np.array(ndimage.center_of_mass(mine))
        assert np.allclose(np.argwhere(mine) - distance[:, mine].T, centroid, atol=1e-4)
    assert not slide[tuple(np.round(ndimage.center_of_mass(slide == 1)).astype(int))], "it may lie beside tissue"


@pytest.mark.component("distances to the centroid")
def test_divergence_is_that_of_the_map():
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 9, 7)
    kernel = torch.zeros(1, 2, 3, 3)
    kernel[0, 0, 0, 1], kernel[0, 0, 2, 1] = -1, 1
    kernel[0, 1, 1, 0], kernel[0, 1, 1, 2] = -1, 1
    assert torch.allclose(slidesegmenter.divergence(maps), F.conv2d(maps, kernel)[:, 0], atol=1e-6)
    whole = slidesegmenter.to_centroids(torch.ones(1, 9, 7))
    assert torch.allclose(slidesegmenter.divergence(whole), torch.full((1, 7, 5), 4.0), atol=1e-5)


@pytest.mark.component("clustering of centroids in a 2D histogram")
def test_every_vote_is_counted_where_it_falls():
    votes = np.array([[10.2, 20.4], [9.9, 20.0], [9.6, 19.7], [63.4, 0.0], [70.0, 3.0], [-2.0, 5.0]])
    counts = slidesegmenter.histogram(votes, (64, 64), sigma=0)
    assert counts.shape == (64, 64) and counts.sum() == 4 and counts[10, 20] == 3 and counts[63, 0] == 1
    coarse = slidesegmenter.histogram(votes, (128, 256), sigma=0)
    assert coarse[5, 5] == 3 and coarse[31, 0] == coarse[35, 0] == 1 and coarse.sum() == 5
    smooth = slidesegmenter.histogram(votes, (64, 64))
    assert np.allclose(smooth, ndimage.gaussian_filter(counts, 1.5))


@pytest.mark.component("clustering of centroids in a 2D histogram")
def test_peaks_are_the_highest_around_and_high_among_all():
    counts = np.zeros((64, 64))
    counts[20, 20], counts[20, 22], counts[40, 50], counts[5, 5] = 9, 8, 5, 1
    counts[60, :] = counts[62, :] = 2 + 0.001 * np.arange(64)
    found = {tuple(place) for place in slidesegmenter.peaks(counts, 7, 98.0).tolist()}
    assert {(20, 20), (40, 50)} <= found and not {(20, 22), (5, 5)} & found
    assert {tuple(place) for place in slidesegmenter.peaks(counts, 3, 98.0).tolist()} >= {(20, 20), (20, 22)}


@pytest.mark.component("clustering of centroids in a 2D histogram")
@pytest.mark.component("fragments and neighbours that touch")
def test_votes_separate_what_touches_and_join_what_is_torn(slide):
    rng, distance = np.random.default_rng(0), distance_of(slide)
    for noise in (0.0, 1.0):
        noisy = distance + noise * rng.standard_normal(distance.shape)
        assert same(slidesegmenter.by_histogram(slide > 0, noisy), slide)
    assert not slidesegmenter.by_histogram(np.zeros((64, 64), bool), distance).any()


@pytest.mark.component("ablation")
@pytest.mark.component("fragments and neighbours that touch")
def test_parts_and_watershed_need_connected_tissue(slide):
    distance = distance_of(slide)
    parts = _parts.by_parts(slide > 0)
    assert parts.max() == 3 and parts[10, 10] != parts[10, 25] and parts[45, 10] == parts[45, 30]
    flooded = _parts.by_watershed(slide > 0, distance)
    assert flooded[45, 10] != flooded[45, 30] and flooded[10, 10] != flooded[10, 25] and flooded.max() == 4
    whole = np.where(slide > 1, slide, 0)
    assert same(_parts.by_watershed(whole > 0, distance_of(whole)), whole)


@pytest.mark.component("ablation")
def test_small_parts_are_no_sections():
    mask = np.zeros((50, 50), bool)
    mask[0, :9], mask[10, :10], mask[20:30, 20:30] = True, True, True
    parts = _parts.by_parts(mask)
    assert sorted(np.unique(parts)) == [0, 1, 2] and not parts[0].any()
    assert not _parts.by_parts(mask & False).any()


@pytest.mark.component("tissue and pen markings")
def test_three_ways_up_from_one_encoder():
    torch.manual_seed(0)
    net = SlideNet(3, (4, 8, 8), distances=True)
    images = torch.randn(2, 3, 32, 24)
    seen = net(images)
    assert seen.tissue.shape == seen.pen.shape == (2, 32, 24) and seen.distance.shape == (2, 2, 32, 24)
    ways = {"tissue": seen.tissue, "pen": seen.pen, "distance": seen.distance}
    for name, answer in ways.items():
        net.zero_grad()
        answer.square().sum().backward(retain_graph=True)
        assert net.encoder.down[0][0].weight.grad.abs().max() > 0
        reached = {other for other in ways if net.get_submodule(other).head.weight.grad is not None}
        reached &= {other for other in ways if (g := net.get_submodule(other).head.weight.grad) is not None and g.any()}
        assert reached == ({name, "tissue"} if name == "distance" else {name})
    with torch.no_grad():
        net.tissue.head.bias -= 100
        net.tissue.head.weight.zero_()
    assert net(images).distance.abs().max() < 1e-6, "where there is no tissue there is no distance"


def batch(slide: np.ndarray) -> Batch:
    sections = torch.from_numpy(slide).byte()[None].expand(2, -1, -1)
    labels = (sections > 0).byte()
    labels[:, 30:50, 20:22] += 2
    return Batch(torch.randn(2, 3, 64, 64), labels, raters=sections[:, None])


@pytest.mark.component("tissue and pen markings")
@pytest.mark.component("distances to the centroid")
def test_the_loss_is_the_formula(slide):
    torch.manual_seed(0)
    data, method = batch(slide), SlideSegmenter(**TINY)
    nets = method.build(3, CLASSES, 2).eval()
    loss, seen = method.training_step(nets, data, None, NOW), nets["model"](data.images)
    terms = []
    truths = ((data.raters[:, 0] > 0).float(), (data.labels >= 2).float())
    for logits, truth in zip(seen[:2], truths, strict=True):
        soft = logits.sigmoid()
        dice = [1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1) for s, t in zip(soft, truth, strict=True)]
        terms.append(sum(dice) / 2 + 10 * F.binary_cross_entropy(soft, truth))
    truth = torch.from_numpy(distance_of(slide)).expand(2, -1, -1, -1)
    error = (seen.distance - truth) / 8
    rows, columns = error[:, 0], error[:, 1]
    change = rows[:, 2:, 1:-1] - rows[:, :-2, 1:-1] + columns[:, 1:-1, 2:] - columns[:, 1:-1, :-2]
    expected = sum(terms) / 2 + (error**2).sum(1).mean() + (change**2).mean()
    assert torch.isclose(loss, expected, rtol=1e-4)
    plain = ARMS["connected parts"]
    assert torch.isclose(replace(plain, **TINY).training_step(nets, data, None, NOW), loss), (
        "what is learnt depends on the network alone"
    )
    assert not hasattr(replace(plain, **TINY).build(3, CLASSES, 2)["model"].distance, "head")


def test_without_sections_all_tissue_is_one(slide):
    torch.manual_seed(0)
    data, method = batch(slide), SlideSegmenter(**TINY)
    nets = method.build(3, CLASSES, 2).eval()
    one = data._replace(raters=(data.raters > 0).byte())
    losses = [method.training_step(nets, each, None, NOW) for each in (data._replace(raters=None), one, data)]
    assert torch.isclose(losses[0], losses[1]) and not torch.isclose(losses[0], losses[2], rtol=1e-3)


@pytest.mark.component("ablation")
def test_arms_differ_in_the_separation_and_the_baseline_in_its_distances():
    method = ARMS["slidesegmenter"]
    assert ARMS["without histogram"] == replace(method, separation="watershed") and method.separation == "histogram"
    assert ARMS["connected parts"] == replace(method, separation="parts", distances=False)
    torch.manual_seed(0)
    nets = [replace(one, **TINY).build(3, CLASSES, 2)["model"] for one in (method, ARMS["without histogram"])]
    assert [p.shape for p in nets[0].parameters()] == [p.shape for p in nets[1].parameters()]


def test_probabilities_are_of_four_classes(slide):
    method = SlideSegmenter(**TINY)
    tissue, pen = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    nets = nn.ModuleDict({"average": Told(tissue, pen, None)})
    found = method.predict(nets, torch.zeros(2, 3, 8, 8))
    assert torch.allclose(found.sum(1), torch.ones(2, 8, 8), atol=1e-6)
    assert torch.allclose(found[:, [1, 3]].sum(1), tissue.sigmoid(), atol=1e-6)
    assert torch.allclose(found[:, [2, 3]].sum(1), pen.sigmoid(), atol=1e-6)


class Told(nn.Module):
    """A network that answers what it is told."""

    def __init__(self, *seen):
        super().__init__()
        self.seen = seen

    def forward(self, images):
        return Seen(*self.seen)


@pytest.mark.component("count of sections")
def test_rows_count_sections_and_parts(slide):
    sections = torch.from_numpy(slide)
    kinds = (sections > 0).byte()
    kinds[5:7] += 2
    labels = torch.stack([kinds + CLASSES * sections.byte(), kinds & 2])
    logit = lambda mask: torch.where(mask, 9.0, -9.0)  # noqa: E731
    tissue = torch.stack([sections > 0, sections == 2])
    distance = torch.from_numpy(np.stack([distance_of(slide), distance_of(np.where(slide == 2, slide, 0))]))
    net = Told(logit(tissue), logit(torch.stack([kinds >= 2, kinds >= 9])), distance.float())
    nets = nn.ModuleDict({"average": net})
    preparation = SimpleNamespace(images=lambda case: torch.zeros(2, 3, 64, 64), labels=lambda case: labels)
    fitted = SimpleNamespace(
        nets=nets, weights={"last": {}}, method=SlideSegmenter(), task=SimpleNamespace(preparation=preparation)
    )
    case = SimpleNamespace(case_id="a", patient_id="a")
    right, wrong = slidesegmenter.slide_rows(fitted, case)
    assert right["error"] == 0 and right["counted"] == right["sections"] == 3 and right["pq"] == right["tissue"] == 1
    assert right["error of parts"] == right["error of true parts"] == 0, "one too many and one too few"
    assert wrong["error"] == wrong["error of parts"] == 1 and wrong["error of true parts"] == 0
    assert wrong["pq"] == wrong["tissue"] == wrong["pen"] == 0 and right["pen"] == 1 and np.isnan(right["pen alarm"])
    assert [row["structure"] for row in (right, wrong)] == ["slide 1", "slide 2"]
    fitted.method = replace(SlideSegmenter(), separation="watershed")
    torn = slidesegmenter.slide_rows(fitted, case)[0]
    assert torn["counted"] == 4 and torn["error"] == 1 and torn["pq"] < 1
    preparation.images = lambda case: torch.zeros(0, 3, 64, 64)
    preparation.labels = lambda case: torch.zeros(0, 64, 64, dtype=torch.uint8)
    assert slidesegmenter.slide_rows(fitted, case) == []


@pytest.mark.component("tissue and pen markings")
def test_slides_without_pen_markings_tell_false_alarms():
    truth = np.zeros((10, 10), bool)
    found = truth.copy()
    found[0, :4] = True
    values = slidesegmenter.pen_values(found, truth)
    assert values["pen alarm"] == 0.04 and np.isnan(values["pen"])
    truth[0, 2:6] = True
    assert slidesegmenter.pen_values(found, truth)["pen"] == 0.5


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
@pytest.mark.parametrize("arm", ["slidesegmenter", "connected parts"])
def test_every_parameter_is_trained_at_any_size(size, arm):
    torch.manual_seed(0)
    method = ARMS[arm]
    nets = method.build(3, CLASSES, 2).train()
    labels = torch.randint(0, CLASSES, (2, *size)).byte()
    for enabled in (False, True):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = method.training_step(nets, Batch(torch.randn(2, 3, *size), labels), None, NOW)
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in nets["model"].parameters())
