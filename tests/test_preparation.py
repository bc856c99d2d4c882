"""Windows: the grid is where it says, pasting undoes cropping, and what lies outside is what it should be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from medcook.data.case import IGNORE, Case
from medcook.preparation import DEFAULT, PREPARATIONS, Preparation, Window, on_voxels, preparation_for, zscore


def make_case(spatial, label=None, **attributes) -> Case:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *spatial)).astype(np.float32)
    label = rng.integers(0, 3, spatial).astype(np.uint8) if label is None else label
    return Case(image=image, label=label, case_id="a", patient_id="a", attributes=attributes)


def one_hot(label: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(label.long(), classes).movedim(-1, 1).float()


def test_points_of_a_small_grid():
    rows, columns = Window((10.0, 3.0), 2.0, (3, 4)).points()
    assert rows.tolist() == [9.5, 10.0, 10.5]
    assert columns.tolist() == [2.25, 2.75, 3.25, 3.75]


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_positions_are_the_inverse_of_points(scale):
    window = Window((4.3, 7.9, 5.0), scale, (6, 9, 8))
    for points, positions, voxels in zip(window.points(), window.positions((10, 14, 11)), (10, 14, 11), strict=True):
        assert torch.allclose(points[0] + positions / scale, torch.arange(voxels).float(), atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 7), (5, 8, 6)])
def test_pasting_undoes_cropping_at_scale_one(shape):
    labels = torch.randint(0, 3, (2, *shape), generator=torch.Generator().manual_seed(0))
    window = Window(tuple((n - 1) / 2 for n in shape), 1.0, shape)
    assert torch.allclose(window.paste(window.crop(one_hot(labels)), shape), one_hot(labels), atol=1e-5)


def test_outside_the_window_a_prediction_is_background():
    window = Window((3.5, 3.5), 1.0, (4, 4))
    structure = torch.zeros(1, 3, 4, 4)
    structure[:, 2] = 1
    pasted = window.paste(structure, (8, 8))
    assert torch.allclose(pasted.sum(1), torch.ones(1, 8, 8))
    assert torch.allclose(pasted[0, 2, 2:6, 2:6], torch.ones(4, 4)) and pasted[0, 2].sum() == 16
    assert pasted[0, 0, 0, 0] == 1


@pytest.mark.parametrize("scale", [0.8, 1.0, 2.5])
def test_a_ramp_is_sampled_at_the_points(scale):
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    window = Window((9.2, 15.7), scale, (6, 10))
    sampled = window.crop((2 * rows + 3 * columns)[None, None])[0, 0]
    y, x = window.points()
    assert torch.allclose(sampled, 2 * y[:, None] + 3 * x[None], atol=1e-3)


def test_beyond_the_image_the_border_goes_on_and_nothing_is_labelled():
    case = make_case((6, 6), label=np.full((6, 6), 2, np.uint8))
    case.image[0] = 1
    case.image[0, 0] = 5  # the first row
    preparation = Preparation(size=(10, 10))
    image, label = preparation.images(case)[0, 0], preparation.labels(case)[0]
    assert torch.allclose(image[:3], image[2, 2].expand(3, 10)) and image[2, 2] > image[3, 2]
    assert (label[2:8, 2:8] == 2).all() and label.sum() == 2 * 36


def test_unlabelled_voxels_stay_unlabelled():
    label = np.zeros((3, 8, 8), np.uint8)
    label[1, 4] = IGNORE
    label[2] = 1
    cropped = Preparation(size=(8, 8), long_side=16).labels(make_case((3, 8, 8), label=label))
    assert cropped.dtype == torch.uint8 and set(cropped.unique().tolist()) == {0, 1, IGNORE}
    assert (cropped[0] == 0).all() and (cropped[1] == IGNORE).any() and (cropped[2] == 1).all()


def test_other_values_in_place_of_the_label():
    case, other = make_case((8, 8)), np.full((8, 8), 3, np.uint8)
    assert (Preparation(size=(8, 8)).labels(case, other) == 3).all()


@pytest.mark.parametrize(
    ("size", "spatial", "images", "restored"),
    [
        ((8, 8), (12, 10), (1, 1, 8, 8), (3, 12, 10)),  # an image, a slice network
        ((8, 8), (5, 12, 10), (5, 1, 8, 8), (3, 5, 12, 10)),  # a volume, a slice network: slices are the batch
        ((4, 8, 8), (5, 12, 10), (1, 1, 4, 8, 8), (3, 5, 12, 10)),  # a volume network
    ],
)
def test_shapes_of_slices_and_volumes(size, spatial, images, restored):
    case, preparation = make_case(spatial), Preparation(size=size)
    assert preparation.images(case).shape == images
    assert preparation.labels(case).shape == (images[0], *size)
    assert preparation.restore(torch.rand(images[0], 3, *size), case).shape == restored


def test_slices_keep_their_order_and_return_to_their_place():
    case, preparation = make_case((4, 8, 8)), Preparation(size=(8, 8))
    labels = preparation.labels(case)
    assert np.array_equal(labels.numpy(), case.label)
    assert np.array_equal(preparation.restore(one_hot(labels), case).argmax(0).numpy(), case.label)


def test_without_rescaling_the_window_falls_on_voxels():
    assert on_voxels(5.4, 3) == 5 and on_voxels(5.4, 4) == 5.5
    case = make_case((12, 12), roi_centre=(5.3, 6.8))
    window = Preparation(size=(4, 4), centre="roi").window(case)
    cropped = window.crop(torch.from_numpy(case.image)[None])[0, 0]
    top, left = (int(points[0]) for points in window.points())
    assert np.allclose(cropped, case.image[0, top : top + 4, left : left + 4], atol=1e-5)
    assert abs(window.centre[0] - 5.3) <= 0.5 and abs(window.centre[1] - 6.8) <= 0.5


def test_the_long_side_sets_the_scale():
    assert Preparation(size=(8, 8), long_side=40).window(make_case((5, 10, 20))).scale == 2
    assert Preparation(size=(8, 8)).window(make_case((5, 10, 20))).scale == 1


def test_smoothing_averages_what_a_grid_point_stands_for():
    noise = np.random.default_rng(0).standard_normal((1, 256, 256)).astype(np.float32)
    case = Case(noise, np.zeros((256, 256), np.uint8), "noise", "noise")
    ramp = replace(case, image=np.broadcast_to(np.arange(256.0, dtype=np.float32), (1, 256, 256)).copy())
    rough, smooth = (Preparation(size=(24, 24), long_side=32, smooth=on) for on in (False, True))
    window = rough.window(case)
    assert smooth.window(case) == window
    blurred = torch.from_numpy(uniform_filter(noise[0], 9, mode="nearest"))[None, None]
    assert torch.allclose(smooth.images(case), zscore(window.crop(blurred)), atol=1e-3)
    assert torch.allclose(smooth.images(ramp), rough.images(ramp), atol=1e-4)  # no shift
    assert window.crop(torch.from_numpy(noise)[None]).std() > 4 * window.crop(blurred).std()


@pytest.mark.parametrize("shape", [(1, 9, 9), (1, 5, 9, 9)])
def test_nothing_is_smoothed_that_is_not_shrunk(shape):
    case = Case(np.random.default_rng(0).random(shape, np.float32), np.zeros(shape[1:], np.uint8), "a", "a")
    size = (6,) * (len(shape) - 1)
    assert torch.equal(Preparation(size, smooth=True).images(case), Preparation(size).images(case))


def test_zscore():
    images = zscore(torch.rand(3, 1, 8, 8) * 7 + 4)
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5
    assert (zscore(torch.full((2, 1, 4, 4), 3.7)) == 0).all()


def test_a_data_set_without_a_preparation_gets_the_default():
    assert preparation_for("acdc") is PREPARATIONS["acdc"] and preparation_for("folder:mine") is DEFAULT
