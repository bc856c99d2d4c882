"""Asking the small SAM about images of any size: where answers lie, what is remembered, what is refused."""

import numpy as np
import pytest
import torch

from medcook.errors import MedcookError
from medcook.sam import predictor as predictor_module
from medcook.sam.checkpoints import load_small
from medcook.sam.model import DENSE, MOST_POINTS, PADDING, SIZE, SmallSam
from medcook.sam.predictor import (
    ROOMS,
    Predictor,
    box_overlap,
    box_window,
    encode,
    fit_in,
    moved,
    reaching,
    resized,
    restore,
    thinned,
)
from medcook.sam.prompts import Prompt
from medcook.sam.zero_shot import dice

SHAPE = (90, 120)
ROWS, COLUMNS = np.indices(SHAPE) + 0.5
DISC = (ROWS - 30) ** 2 + (COLUMNS - 80) ** 2 < 10**2
IMAGE = (DISC * 1.0 + np.random.default_rng(0).normal(0, 0.1, SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallSam()


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(foreground=((80, 30),)),
        Prompt(foreground=((80, 30), (82, 33)), background=((20, 20),)),
        Prompt(box=(70, 20, 90, 40)),
        Prompt(box=(0, 0, 120, 90)),
        Prompt(mask=DISC),
        Prompt(foreground=tuple((70.0 + k, 30.0) for k in range(20))),
    ],
)
def test_every_prompt_gets_an_answer_on_the_images_own_grid(model, prompt):
    answer = Predictor(model)(IMAGE, prompt)
    assert answer.masks.shape[1:] == answer.logits.shape[1:] == SHAPE and answer.mask.dtype == bool
    assert len(answer.masks) == len(answer.iou) == (4 if prompt == Prompt(foreground=((80, 30),)) else 1)
    assert (np.diff(answer.iou[1:]) <= 0).all() and (answer.iou >= 0).all() and (answer.iou <= 1).all()


def test_in_bfloat16_the_answers_stay_almost_the_same_and_the_model_as_it_was():
    model = load_small()
    exact, fast = Predictor(model), Predictor(model, precision="bfloat16")
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert fast.embed(IMAGE).coarse.dtype == torch.bfloat16
    for prompt in (Prompt(foreground=((80, 30),)), Prompt(box=(70, 20, 90, 40)), Prompt(((80, 30),), ((60, 30),))):
        one, other = exact(IMAGE, prompt), fast(IMAGE, prompt)
        assert dice(one.mask, other.mask) > 0.98 and dice(one.mask, DISC) > 0.9
        assert other.logits.dtype == np.float32 and not np.array_equal(one.logits, other.logits)
        assert abs(one.iou[0] - other.iou[0]) < 0.02


def test_one_look_at_a_single_click_gives_three_masks_best_first(model):
    answer = Predictor(model, zoom=False)(IMAGE, Prompt(foreground=((80, 30),)))
    assert len(answer.masks) == len(answer.iou) == 3 and (np.diff(answer.iou) <= 0).all()
    zoomed = Predictor(model)(IMAGE, Prompt(foreground=((80, 30),)))
    assert np.array_equal(zoomed.masks[1:], answer.masks), "what the whole image says is still among the answers"


def test_a_click_nearby_finds_its_windows_embedded(model):
    predictor, asked = Predictor(model), []
    embed, model.embed = model.embed, lambda images: asked.append(len(images)) or embed(images)
    try:
        for x in (80, 80.5, 20):
            predictor(IMAGE, Prompt(foreground=((x, 30),)))
            asked.append("answered")
    finally:
        del model.embed
    assert asked == [3, "answered", "answered", 2, "answered"]


@pytest.mark.parametrize("shape", [(90, 120), (700, 900)])
def test_after_looking_ahead_a_click_finds_all_its_windows_embedded(model, shape):
    predictor, image = Predictor(model), np.random.default_rng(0).normal(size=shape).astype(np.float32)
    prompt, asked = Prompt(foreground=((80, 30), (70, 40))), []
    expected = Predictor(model)(image, prompt)
    predictor.look_ahead(image, prompt)
    embed, model.embed = model.embed, lambda images: asked.append(len(images)) or embed(images)
    try:
        assert np.array_equal(predictor(image, prompt).mask, expected.mask)
        predictor.look_ahead(image, Prompt(box=(70, 20, 90, 40)))
    finally:
        del model.embed
    assert not asked
    with pytest.raises(MedcookError, match="outside"):
        predictor.look_ahead(image, Prompt(foreground=((-5, 30),)))


@pytest.mark.parametrize(("zoom", "shape"), [(True, IMAGE.shape), (False, IMAGE.shape), (False, (700, 900))])
def test_after_looking_ahead_everywhere_no_first_click_waits_for_an_embedding(model, zoom, shape):
    predictor, asked = Predictor(model, zoom), []
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    predictor.look_ahead(image)
    embed, model.embed = model.embed, lambda images: asked.append(len(images)) or embed(images)
    try:
        for x, y in np.random.default_rng(0).uniform((0, 0), shape[::-1], (10, 2)):
            predictor(image, Prompt(foreground=((float(x), float(y)),)))
    finally:
        del model.embed
    assert not asked


def test_what_was_not_asked_for_longest_is_forgotten(model, monkeypatch):
    monkeypatch.setattr(predictor_module, "KEPT", 2)
    predictor, asked = Predictor(model, zoom=False), []
    embed, model.embed = model.embed, lambda images: asked.append(len(images)) or embed(images)
    try:
        for part in (IMAGE, IMAGE[:50], IMAGE, IMAGE[:60], IMAGE, IMAGE[:50]):
            predictor.embed(part)
            asked.append("answered")
        predictor.embeddings([IMAGE[:50], IMAGE[:50]])
    finally:
        del model.embed
    assert asked == [1, "answered", 1, "answered", "answered", 1, "answered", "answered", 1, "answered"]


def test_windows_embedded_together_are_as_if_each_were_alone(model):
    parts = [IMAGE, IMAGE[20:60, 30:70], IMAGE, IMAGE[:, :50]]
    together = Predictor(model).embeddings(parts)
    for part, found in zip(parts, together, strict=True):
        alone = Predictor(model).embed(part)
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, alone, strict=True))


def test_clicks_on_a_large_image_are_answered_on_a_smaller_grid(model, monkeypatch):
    prompt = Prompt(foreground=((80, 30),), background=((20, 20),))
    large = IMAGE.repeat(2, axis=0).repeat(2, axis=1)
    monkeypatch.setattr(predictor_module, "FRAME", 120)
    answer, small = Predictor(model)(large, prompt.scaled(2)), Predictor(model)(resized(large, 0.5), prompt)
    assert answer.logits.shape == (1, 180, 240) and np.array_equal(answer.iou, small.iou)
    blocks = answer.logits.reshape(1, 90, 2, 120, 2).mean((2, 4))
    assert np.abs(blocks - small.logits)[:, 1:-1, 1:-1].mean() < 0.1 * np.abs(small.logits).mean()


def test_an_image_is_embedded_once(model):
    predictor, asked = Predictor(model, zoom=False), []
    embed, model.embed = model.embed, lambda images: asked.append(1) or embed(images)
    try:
        for x in (70, 80):
            predictor(IMAGE, Prompt(foreground=((x, 30),)))
        predictor(IMAGE + 1, Prompt(foreground=((70, 30),)))
    finally:
        del model.embed
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 40, 40), np.float32), "3 dimensions"),
        (np.full((40, 40), np.nan, np.float32), "NaN"),
        (np.zeros((4, 40), np.float32), "only 40 x 4 pixels"),
    ],
)
def test_what_is_no_image_is_said(model, image, words):
    with pytest.raises(MedcookError, match=words):
        Predictor(model)(image, Prompt(foreground=((2, 2),)))


def test_a_prompt_is_checked_before_anything_is_computed(model):
    with pytest.raises(MedcookError, match="outside"):
        Predictor(model)(IMAGE, Prompt(foreground=((400, 2),)))


def test_small_boxes_are_looked_at_closely():
    assert box_window((0, 0, 120, 90), SHAPE, 2.0) == (0, 0, 120, 90)
    left, top, right, bottom = window = box_window((70, 20, 90, 40), SHAPE, 2.5)
    side = 50
    assert (right - left, bottom - top) == (side, side) and left <= 70 and right >= 90 and top <= 20 and bottom >= 40
    corner = box_window((110, 80, 120, 90), SHAPE, 2.0)
    assert corner[2] == 120 and corner[3] == 90
    inner = moved(Prompt(foreground=((80, 30), (5, 5)), box=(70, 20, 90, 40), mask=DISC), window)
    assert inner.foreground == ((80 - left, 30 - top),) and inner.box == (70 - left, 20 - top, 90 - left, 40 - top)
    assert inner.mask.sum() == DISC.sum()


def test_a_disc_goes_to_the_square_and_back():
    square = fit_in(DISC.astype(np.float32))
    assert square.shape == (1, 1, SIZE, SIZE) and abs(float(square[..., : round(SIZE * 0.75), :].mean())) < 0.05
    again = restore(square, SHAPE)[0, 0].numpy() > float(square.mean()) + 1
    overlap = 2 * (again & DISC).sum() / (again.sum() + DISC.sum())
    assert overlap > 0.95


def test_a_prompt_is_encoded_in_input_pixels():
    factor = SIZE / 120
    found = encode(Prompt(((60, 30),), ((12, 12),), (30, 15, 90, 45), DISC), factor)
    assert found.points[0, 0].tolist() == pytest.approx([60 * factor, 30 * factor])
    assert found.labels[0].tolist() == [1, 0] + [PADDING] * (MOST_POINTS - 2)
    assert found.boxes[0].tolist() == pytest.approx([30 * factor, 15 * factor, 90 * factor, 45 * factor])
    at = lambda channel, x, y: float(found.dense[0, channel, int(y * DENSE / 120), int(x * DENSE / 120)])  # noqa: E731
    assert at(0, 80, 30) == 1 and at(0, 20, 60) == -1  # the mask
    assert at(1, 60, 30) == 1 and at(1, 5, 5) == -1  # the box
    assert at(2, 60, 30) > 0.5 and at(2, 12, 12) < -0.5  # the clicks


def test_a_long_scribble_keeps_its_ends():
    points = list(range(30))
    kept = thinned(points)
    assert len(kept) == MOST_POINTS and kept[0] == 0 and kept[-1] == 29 and thinned(points[:5]) == points[:5]


def test_overlap_of_boxes_is_that_of_the_masks_extents():
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[0, 5:15, 4:12] = True
    masks[1, [5, 14], [4, 11]] = True  # two corners reach as far
    box = torch.tensor([4.0, 5.0, 12.0, 15.0])
    assert box_overlap(masks, box).tolist() == [1, 1, 0]
    assert box_overlap(masks[:1], torch.tensor([4.0, 5.0, 8.0, 15.0])).item() == pytest.approx(0.5)


def test_an_answer_that_stops_short_of_its_box_is_let_out_and_kept_in_it():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(44.0), indexing="ij")
    logits = 3 - torch.hypot(rows - 19.5, columns - 19.5)[None] / 3  # above 0 up to 9 pixels, above -2 up to 15
    let_out = reaching(logits, (5.0, 5.0, 35.0, 35.0))
    assert (logits - let_out)[..., 5:35, 5:35].mean() == pytest.approx(-2.0)
    fits = reaching(logits, (11.0, 11.0, 29.0, 29.0))
    assert torch.equal(fits[..., 11:29, 11:29], logits[..., 11:29, 11:29]), "what fits stays"
    kept_in = reaching(logits, (5.0, 5.0, 20.0, 35.0)) > 0
    assert kept_in[..., :20].any() and not kept_in[..., 21:].any()


def test_a_box_is_looked_at_from_several_distances_and_the_answers_averaged(model):
    box = (70, 20, 90, 40)
    predictor = Predictor(model, tight=False)
    views = [predictor._views(IMAGE, Prompt(box=box), [box_window(box, SHAPE, room)]) for room in ROOMS]
    seen = torch.stack([logits[0, 0] for logits, _ in views])
    assert [int((~one.isnan()).sum()) for one in seen] == [40 * 40, 30 * 30, 56 * 56, 80 * 80]
    answer = predictor(IMAGE, Prompt(box=box))
    row, column = 30, 80
    assert answer.logits[0, row, column] == pytest.approx(seen[:, row, column].mean().item(), abs=1e-4)
    assert answer.iou[0] == pytest.approx(torch.stack([iou for _, iou in views]).mean().clamp(0, 1).item(), abs=1e-4)
    clicked = predictor(IMAGE, Prompt(foreground=((80, 30),), box=box))
    assert (clicked.logits[0] > -20).sum() == 40 * 40, "with a click beside the box, one look is all"


def test_a_loose_box_need_not_be_filled(model):
    rng = np.random.default_rng(0)
    image, prompt = rng.normal(size=(120, 100)).astype(np.float32), Prompt(box=(20, 30, 70, 80))
    filled, left = (Predictor(model, zoom=False, tight=tight)(image, prompt).logits for tight in (True, False))
    assert not np.allclose(filled, left)
