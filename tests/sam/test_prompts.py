"""Prompts: checked in plain words, and drawn where a careful person would click."""

import numpy as np
import pytest

from medcook.errors import MedcookError
from medcook.sam.prompts import Prompt, box_of, first_click, middle_of, next_click

SHAPE = (40, 60)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(), "empty"),
        (Prompt(foreground=((61, 5),)), "outside the image of 60 x 40"),
        (Prompt(background=((5, -1),)), "outside"),
        (Prompt(box=(5, 5, 5, 20)), "has no area"),
        (Prompt(box=(20, 5, 10, 20)), "has no area"),
        (Prompt(box=(5, 5, 80, 20)), "outside"),
        (Prompt(mask=np.zeros((4, 4), bool)), "the image"),
    ],
)
def test_what_makes_no_sense_is_said(prompt, words):
    with pytest.raises(MedcookError, match=words):
        prompt.check(SHAPE)


def test_good_prompts_pass():
    for prompt in (Prompt(foreground=((60, 40),)), Prompt(box=(0, 0, 60, 40)), Prompt(mask=np.ones(SHAPE, bool))):
        prompt.check(SHAPE)


def disc(x, y, radius):
    rows, columns = np.indices(SHAPE) + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def test_the_box_holds_every_pixel():
    mask = np.zeros(SHAPE, bool)
    mask[3:7, 10:31] = True
    assert box_of(mask) == (10, 3, 31, 7)
    with pytest.raises(MedcookError, match="empty mask"):
        box_of(mask & False)


def test_the_first_click_is_deep_inside_the_largest_part():
    mask = disc(15, 20, 9) | disc(45, 20, 5)
    x, y = middle_of(mask)
    assert abs(x - 15) <= 1 and abs(y - 20) <= 1
    assert first_click(mask).foreground == ((x, y),)


def test_the_next_click_is_in_the_largest_error_and_says_which_way():
    truth = disc(15, 20, 9)
    prompt = first_click(truth)
    too_little = next_click(prompt, truth & (np.indices(SHAPE)[1] < 15), truth)
    assert len(too_little.foreground) == 2 and too_little.foreground[1][0] > 15
    too_much = next_click(prompt, truth | disc(45, 20, 8), truth)
    assert len(too_much.background) == 1 and abs(too_much.background[0][0] - 45) <= 1
    assert next_click(prompt, truth, truth) is prompt


def test_scaling_moves_everything():
    small = Prompt(((4, 6),), ((1, 1),), (0, 2, 8, 10)).scaled(0.5)
    assert small == Prompt(((2, 3),), ((0.5, 0.5),), (0, 1, 4, 5))


def test_the_next_click_goes_where_one_part_of_the_error_is_largest_not_where_its_sum_is():
    truth, answer = np.zeros((12, 12), bool), np.zeros((12, 12), bool)
    for corner in (0, 4, 8):
        truth[0:2, corner : corner + 2] = True  # missing: 12 pixels in three parts
    answer[6:9, 3:6] = True  # too much: 9 pixels in one
    clicked = next_click(first_click(truth), answer, truth)
    assert clicked.background == ((4.5, 7.5),) and len(clicked.foreground) == 1


def test_the_border_of_the_image_is_a_border_of_the_object():
    mask = np.zeros((9, 9), bool)
    mask[:5] = True
    assert middle_of(mask)[1] == 2.5
