"""Composed slides: sections are pieces of real images, torn and touching as asked; colours follow Beer and Lambert."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.data import IGNORE, Case
from medcook.recipes.instances import _glass, _slides
from medcook.recipes.instances._glass import Manner, Piece
from medcook.recipes.instances._settings import CROWDS_QUICK, SLIDES, SLIDES_QUICK
from medcook.recipes.instances._slides import CLASSES, SlidePreparation

CALM = Manner(least=3, most=3, tear=0.0, touch=0.0, marks=0, dust=0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def disc() -> Piece:
    """Of radius 9, label 1, with a darker half of label 2."""
    rows, columns = np.indices((24, 24)) - 11.5
    label = (np.hypot(rows, columns) < 9) * np.where(columns < 0, 1, 2).astype(np.uint8)
    return Piece(np.choose(label, [0.0, 0.8, 0.3]), label)


def parts(mask: np.ndarray) -> int:
    return ndimage.label(mask)[1]


def test_pieces_are_the_largest_parts_of_slices_and_nothing_else(disc):
    label = np.pad(disc.label, 4)
    label[0, 0] = 1
    image = 100 + 50 * np.pad(disc.grey, 4) + 400 * (label == 0)
    (found,) = _glass.pieces(np.stack([image, image]), np.stack([label, label * (np.indices(label.shape)[0] < 8)]))
    (box,) = ndimage.find_objects(np.uint8(disc.label > 0))
    assert np.array_equal(found.label, disc.label[box]), "the slice with too little of it is no piece"
    assert np.allclose(found.grey, (disc.grey[box] - 0.3) / 0.5 * (found.label > 0))


def test_a_turned_piece_is_the_same_piece(disc):
    for seed in range(5):
        piece = _glass.turned(disc, rng(seed))
        assert piece.label.shape == (48, 48)
        for value, grey in ((1, 0.8), (2, 0.3)):
            mine = piece.label == value
            assert mine.sum() == pytest.approx((disc.label == value).sum(), rel=0.06)
            assert np.median(piece.grey[mine]) == pytest.approx(grey)
        assert ndimage.center_of_mass(piece.label > 0) == pytest.approx((23.5, 23.5), abs=0.6)
    turns = [_glass.turned(disc, rng(seed)).label for seed in range(5)]
    assert not any(np.array_equal(turns[0], turn) for turn in turns[1:])


def test_a_torn_piece_loses_nothing_and_its_halves_lie_apart(disc):
    for seed in range(8):
        piece = _glass.torn(Piece(*(np.pad(part, 12) for part in disc)), 5, rng(seed))
        assert parts(piece.label > 0) == 2
        for value in (1, 2):
            assert (piece.label == value).sum() == (disc.label == value).sum()
        halves, _ = ndimage.label(piece.label > 0)
        assert 3 < ndimage.distance_transform_edt(halves != 1)[halves == 2].min() < 7.5
        assert min(np.bincount(halves.ravel())[1:]) > 0.15 * (disc.label > 0).sum()


def test_sections_touch_or_lie_apart_as_asked(disc):
    for seed in range(6):
        _, structures, sections = _glass.laid([disc] * 4, CALM, 96, rng(seed))
        assert sections.max() == 3 == parts(sections > 0)
        gaps = [
            ndimage.distance_transform_edt(sections != k)[(sections > 0) & (sections != k)].min() for k in (1, 2, 3)
        ]
        assert min(gaps) > 0.025 * 96 and np.array_equal(structures > 0, sections > 0)
        _, _, close = _glass.laid([disc] * 4, replace(CALM, touch=1.0), 96, rng(seed))
        assert close.max() == 3 and parts(close > 0) == 1
        _, _, first = _glass.laid([disc] * 4, replace(CALM, least=1, most=1), 96, rng(seed))
        assert np.array_equal(close == 1, first == 1), "who comes later lies under it"
        assert min(np.bincount(close.ravel())[1:]) > 0.75 * (disc.label > 0).sum()
        _, _, torn = _glass.laid([disc] * 4, replace(CALM, tear=1.0), 96, rng(seed))
        assert torn.max() == 3 and parts(torn > 0) == 6


def test_two_pieces_lie_side_by_side_as_far_apart_as_asked(disc):
    for near in (-3, -1, 0, 1, 5):
        grey, structures, sections = _glass.side_by_side(disc, disc, near, 64)
        assert sections.max() == 2 and (sections == 1).sum() == (disc.label > 0).sum()
        away = ndimage.distance_transform_edt(sections != 1)[sections == 2].min()
        assert away == 1 if near <= 0 else near < away < near + 1.5
        hidden = (disc.label > 0).sum() - (sections == 2).sum()
        assert (hidden == 0) == (near >= 0) and np.array_equal(structures > 0, sections > 0)
        assert grey[structures == 1].min() == 0.8


def test_neighbours_lie_on_a_slide_and_go_back_at_the_end(disc):
    many = [Piece(disc.grey, (disc.label > 0) * np.uint8(value)) for value in range(1, 6)]
    seen = set()
    for seed in range(20):
        _, structures, sections = _glass.laid(many, CALM, 96, rng(seed))
        kinds = [int(structures[sections == number].max()) for number in (1, 2, 3)]
        assert all(abs(a - b) == 1 for a, b in zip(kinds, kinds[1:], strict=False))
        seen.add(tuple(kinds))
    assert len(seen) > 3 and any(a == c for a, _, c in seen)


def test_light_follows_beer_and_lambert():
    tissue = np.ones((4, 4), bool)
    dark, bright = (_glass.absorbed(np.full((4, 4), grey), tissue, rng(1))[:, 0, 0] for grey in (0.0, 1.0))
    amounts = rng(1).uniform(0.3, 0.9, 2)
    assert np.allclose(dark, (amounts * [1.1, 1.0]) @ _glass.STAINS)
    assert np.allclose(bright, (amounts * [0.1, 0.35]) @ _glass.STAINS)
    assert not _glass.absorbed(np.ones((4, 4)), ~tissue, rng(1)).any()


def test_ink_takes_light_and_is_labelled_where_it_lies(disc):
    inked = 0
    for seed in range(8):
        plain, marked = (_glass.composed([disc] * 3, replace(CALM, marks=marks), 96, rng(seed)) for marks in (0, 3))
        assert not plain.pen.any() and plain.light.min() >= 0 and plain.light.max() <= 1
        assert np.array_equal(plain.sections > 0, plain.structures > 0)
        assert plain.light.mean(0)[plain.sections > 0].mean() < plain.light.mean(0)[plain.sections == 0].mean() - 0.1
        assert plain.light[:, plain.sections == 0].std() < 0.06, "an empty slide is bright all over"
        pen = marked.pen & (marked.sections == 0)
        inked += marked.pen.any()
        if pen.any():
            assert (
                marked.light.min(0)[pen].mean() < 0.6 < marked.light.min(0)[~marked.pen & (marked.sections == 0)].min()
            )
    assert inked >= 4


@pytest.mark.parametrize("seed", range(6))
def test_markings_are_thin_and_rings_go_around_a_section(disc, seed):
    sections = np.zeros((96, 96), np.uint8)
    sections[30:54, 30:54] = disc.label > 0
    found = _glass.marking(sections, rng(seed))
    assert 0 < found.mean() < 0.12
    hole = ndimage.binary_fill_holes(found) & ~found
    assert not hole.any() or hole[41, 41]


def case(patient: str = "a") -> Case:
    rows, columns = np.indices((80, 80)) - 40
    heart = np.stack([(np.hypot(rows, columns) < radius).astype(np.uint8) for radius in (0, 20, 25, 22)])
    return Case((heart + np.float32(0.01) * columns)[None].astype(np.float32), heart, f"{patient}1", patient)


def test_the_case_decides_what_its_slides_are():
    preparation = SlidePreparation((40, 40), 40, side=64, versions=2, manner=Manner(most=3))
    one, other = (preparation.slides(case()) for _ in range(2))
    assert len(one) == 2 and all(np.array_equal(a.light, b.light) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0].light, one[1].light)
    assert not np.array_equal(one[0].light, preparation.slides(case("b"))[0].light)


def test_images_and_labels_tell_class_and_section():
    preparation = SlidePreparation((40, 40), 40, side=64, versions=3, manner=Manner(least=2, most=3, marks=6))
    slides, images = preparation.slides(case()), preparation.images(case())
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(3), atol=1e-5)
    kinds, sections = _slides.apart(preparation.labels(case()))
    for slide, kind, section in zip(slides, kinds.numpy(), sections.numpy(), strict=True):
        assert np.array_equal(section, slide.sections) and section.max() >= 2
        assert np.array_equal((kind == 1) | (kind == 3), section > 0) and np.array_equal(kind >= 2, slide.pen)
    anatomy = replace(preparation, anatomy=True)
    kinds, _ = _slides.apart(anatomy.labels(case()))
    assert all(np.array_equal(kind, slide.structures) for kind, slide in zip(kinds.numpy(), slides, strict=True))


def test_a_case_without_an_organ_has_no_slides():
    empty = case()
    empty = replace(empty, label=np.zeros_like(empty.label))
    preparation = SlidePreparation((40, 40), 40, side=64, versions=3)
    assert preparation.images(empty).shape == (0, 3, 64, 64) and preparation.labels(empty).shape == (0, 64, 64)


def test_samples_come_with_their_sections():
    task = replace(SLIDES_QUICK, labelled=2)
    samples = task.samples("labelled")
    assert len(samples) == 4 and samples.case_of.tolist() == [0, 0, 1, 1]
    assert samples.labels.max() < CLASSES == task.classes and samples.raters.shape == (4, 1, 48, 48)
    assert torch.equal(samples.raters[:, 0] > 0, (samples.labels == 1) | (samples.labels == 3))
    vars(task)["unlabelled_patients"] = task.labelled_patients[:1]
    hidden = task.samples("unlabelled")
    assert (hidden.labels == IGNORE).all() and (hidden.raters == IGNORE).all()
    crowd = replace(CROWDS_QUICK, labelled=2)
    samples = crowd.samples("labelled")
    assert torch.equal(samples.labels > 0, samples.raters[:, 0] > 0) and samples.labels.max() == 3
    assert crowd.structures == crowd.data.manifest.structures and crowd.manner.tear == crowd.manner.marks == 0
    assert task.data_kind == "simulated" and SLIDES.data_kind == "real-anatomy-simulated"
