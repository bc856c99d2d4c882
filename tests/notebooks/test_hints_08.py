"""The hints of chapter 08's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
import torch
from solved import solver
from torch import nn

from medcook.architectures import seen_by
from medcook.exercises import check, exercise_names
from medcook.recipes.architectures import wau

solution = solver("08_architectures")
NAMES = ["receptive_field", "windows", "combine"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"08/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("08") == [f"08/{name}" for name in NAMES]


def test_solutions_are_what_the_book_computes():
    layers = [(3, 1), (2, 2), (3, 1), (2, 2), (3, 1)]
    network = nn.Sequential(*(nn.Conv2d(1, 1, kernel, stride, bias=False) for kernel, stride in layers))
    for layer in network:
        nn.init.ones_(layer.weight)
    field = seen_by(network, torch.rand(1, 1, 40, 40), 3, 3)
    assert int((field[:, field.sum(0).argmax()] > 0).sum()) == solution("receptive_field")(layers)
    image = np.random.default_rng(0).random((3, 8, 12))
    assert np.allclose(solution("windows")(image, 4), wau.windows(torch.from_numpy(image)[None], 4))


def field(layers, *, grow=lambda kernel: kernel - 1, start=1, first=False):
    seen, step = start, 1
    for kernel, stride in layers:
        step *= stride if first else 1
        seen += grow(kernel) * step
        step *= 1 if first else stride
    return seen


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda layers: None, "returns nothing yet"),
        (lambda layers: field(layers, start=0), "sees itself"),
        (lambda layers: field(layers, grow=lambda kernel: kernel - 1 + (kernel > 3), start=1) + len(layers), "three"),
        (lambda layers: 3 * len(layers) if layers else 1, "overlap"),
        (lambda layers: field([(kernel, 1) for kernel, _ in layers]), "two pixels of the image apart"),
        (lambda layers: field(layers, first=True) - (layers == [(2, 2), (3, 1)]), "not its own"),
        (lambda layers: min(field(layers), 60), "strides multiply"),
    ],
)
def test_receptive_field(answer, hint):
    assert hint in check("08/receptive_field", answer).hint


def cut(image, side, *, order=(1, 3, 2, 4, 0)):
    channels, height, width = image.shape
    split = image.reshape(channels, height // side, side, width // side, side)
    return split.transpose(*order).reshape(-1, side * side, channels)


def in_place(image, side):
    found = cut(image, side).copy()
    image += 1
    return found


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (in_place, "writes into the image"),
        (lambda image, side: cut(image, side).transpose(0, 2, 1), "(windows, pixels of a window, channels)"),
        (lambda image, side: np.zeros_like(cut(image, side)), "none twice"),
        (lambda image, side: cut(image, side, order=(3, 1, 2, 4, 0)), "on the right of the first"),
        (lambda image, side: image.transpose(1, 2, 0).reshape(-1, side * side, len(image)), "cuts stripes"),
        (lambda image, side: cut(image, side, order=(1, 3, 4, 2, 0)), "inside a window"),
        (lambda image, side: cut(image, side)[:, :, ::-1], "upper left square"),
        (lambda image, side: cut(image, side) if side == 2 else None, "yet"),
    ],
)
def test_windows(answer, hint):
    assert hint in check("08/windows", answer).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda first, second: None, "return a pair"),
        (lambda first, second: (None, None), "returns nothing yet"),
        (lambda first, second: (first[0] * second[0], first[0] * second[1] + first[1]), "the first step comes first"),
        (lambda first, second: (first[0] * second[0], first[1] + second[1]), "decays in the second one"),
        (lambda first, second: (first[0] + second[0], second[0] * first[1] + second[1]), "both decays"),
        (lambda first, second: (first[0] * second[0], second[1]), "sort it by h"),
        (lambda first, second: (first[0] * second[0], float(np.sum(second[0] * first[1] + second[1]))), "arrays"),
    ],
)
def test_combine(answer, hint):
    assert hint in check("08/combine", answer).hint
