"""What a prompt says about looks: what it shows of the object and of the rest, and that like places are near."""

import pytest
import torch
from scipy import ndimage

from medcook.sam.asking import draw_box, draw_points
from medcook.sam.likeness import Mixer, certainty, depths, likeness, shown
from medcook.sam.model import DENSE, SIZE

BOX = torch.tensor([[40.0, 60.0, 80.0, 120.0]])  # cells 10 .. 19 and 15 .. 29


@pytest.fixture
def boxed():
    dense = torch.zeros(1, 3, DENSE, DENSE)
    draw_box(dense, BOX)
    return dense, depths(BOX / SIZE, DENSE)


def test_depth_is_one_in_the_middle_of_a_box_and_zero_at_its_edge():
    ellipse, box = depths(BOX / SIZE, SIZE)[0]
    assert ellipse[90, 60] > 0.95 and box[90, 60] > 0.95
    assert box[90, 40] == pytest.approx(0, abs=0.05) and ellipse[60, 60] == pytest.approx(0, abs=0.05)
    assert (box > 0)[60:120, 40:80].all() and (box > 0).sum() == 60 * 40
    assert box[61, 41] > 0 > ellipse[61, 41], "the corner of the box lies outside its ellipse"
    assert (ellipse > 0).sum() == pytest.approx(torch.pi * 30 * 20, rel=0.01)
    assert ellipse.min() == box.min() == -1


def test_without_a_box_there_is_no_depth():
    assert (depths(torch.full((2, 4), torch.nan), 8) == 0).all()


def test_a_box_shows_its_middle_its_rim_and_what_is_around_it(boxed):
    middle, rim, outside = shown(*boxed)
    for weights in (middle, rim, outside):
        assert weights.sum() == pytest.approx(1, abs=1e-4)
    row, column = divmod(int(middle.argmax()), DENSE)
    assert row == 22 and column in (14, 15)
    box = boxed[0][:, 1:2] > 0
    assert middle[box].sum() > 0.95 and outside[box].sum() < 0.05
    far = torch.nn.functional.max_pool2d(box.float(), 9, 1, 4) == 0
    assert outside[far].sum() < 0.15


def test_the_rim_is_the_wall_of_a_ring_and_not_its_cavity(boxed):
    ellipse = boxed[1][0, 0].numpy() > 0
    cavity = ndimage.binary_erosion(ellipse, iterations=3)
    rim = shown(*boxed)[1][0, 0].numpy()
    assert rim[ellipse & ~cavity].sum() > 0.8


def test_clicks_say_what_is_object_and_what_is_not():
    dense = torch.zeros(1, 3, DENSE, DENSE)
    points = torch.tensor([[[40.0, 40.0], [120.0, 120.0]]])
    draw_points(dense, points, torch.tensor([[1, 0]]))
    inside, rim, outside = shown(dense, torch.zeros(1, 2, DENSE, DENSE))
    assert inside[0, 0, 8:12, 8:12].sum() > 0.9 and outside[0, 0, 28:32, 28:32].sum() > 0.9
    assert torch.allclose(rim, torch.full_like(rim, DENSE**-2))


def test_without_a_prompt_every_place_counts_the_same():
    for weights in shown(torch.zeros(2, 3, DENSE, DENSE), torch.zeros(2, 2, DENSE, DENSE)):
        assert torch.allclose(weights, torch.full_like(weights, DENSE**-2))


def test_places_like_the_object_are_near_it_and_far_from_the_surroundings(boxed):
    bright = (boxed[0][:, 1:2] > 0).float()
    features = torch.cat([bright * 2 - 1, torch.ones_like(bright)], dim=1)  # the second tells nothing
    to_object, even, to_rim, _, to_rest, _ = likeness(features, *boxed)[0]
    inside = bright[0, 0] > 0
    for near in (to_object, to_rim):
        assert near[inside].max() < 0.5 < near[~inside].min()
    assert to_rest[~inside].max() < 0.5 < to_rest[inside].min()
    assert even.abs().max() < 1e-4


def test_certainty_is_the_expected_overlap():
    sure = torch.tensor([[20.0, -20.0], [20.0, -20.0]])
    assert certainty(sure) == pytest.approx(1)
    half = torch.tensor([0.8, 0.8, 0.4, 0.1]).logit().view(2, 2)
    assert certainty(half) == pytest.approx((0.8 + 0.8) / (1 + 1 + 0.4 + 0.1))
    assert certainty(torch.full((3, 2, 2), -30.0)).tolist() == pytest.approx([0, 0, 0])


def test_a_mixer_starts_by_adding_nothing_and_learns():
    mixer = Mixer(seen=5, quarter=4, eighth=6, coarse=8, widths=(8, 16, 24))
    parts = [torch.randn(2, channels, side, side) for channels, side in ((5, 16), (4, 16), (6, 8), (8, 4))]
    finer, coarser = mixer(*parts)
    assert finer.shape == (2, 4, 16, 16) and coarser.shape == (2, 6, 8, 8)
    assert finer.abs().max() == 0 == coarser.abs().max()
    (finer.sum() + coarser.sum()).backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in mixer.leave)


def test_every_input_of_a_mixer_reaches_both_of_its_outputs():
    torch.manual_seed(0)
    mixer = Mixer(seen=5, quarter=4, eighth=6, coarse=8, widths=(8, 16, 24))
    for layer in mixer.leave:
        torch.nn.init.normal_(layer.weight)
    parts = [torch.randn(1, channels, side, side) for channels, side in ((5, 16), (4, 16), (6, 8), (8, 4))]
    before = mixer(*parts)
    for number in range(len(parts)):
        changed = [part + (k == number) for k, part in enumerate(parts)]
        assert all(not torch.allclose(a, b) for a, b in zip(mixer(*changed), before, strict=True))
