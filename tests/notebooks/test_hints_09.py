"""The hints of chapter 09's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("09_volumes")
NAMES = ["slabs", "stitch", "shifted"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"09/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("09") == [f"09/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda depth, size, step: None, "stopped with TypeError"),
        (lambda depth, size, step: list(range(0, depth - size, step)), "is missing"),
        (lambda depth, size, step: list(range(0, depth, step)), "beyond the last slice"),
        (lambda depth, size, step: list(range(0, depth - size + 1, step)), "are in no slab"),
        (lambda depth, size, step: [*range(0, depth - size + 1, step), depth - size], "0, 4, 8"),
        (lambda depth, size, step: list(range(0, depth - size + 1)), "0, 4, 8"),
        (lambda depth, size, step: [0, *range(step, depth - size, step), depth - size], "only once"),
    ],
)
def test_slabs(answer, hint):
    assert hint in check("09/slabs", answer).hint


def laid(parts, starts, depth, *, order=1):
    found = np.zeros((depth, *parts[0].shape[1:]))
    for part, start in list(zip(parts, starts, strict=True))[::order]:
        found[start : start + len(part)] = part
    return found


def summed(parts, starts, depth):
    found = np.zeros((depth, *parts[0].shape[1:]))
    for part, start in zip(parts, starts, strict=True):
        found[start : start + len(part)] += part
    return found


def in_turn(parts, starts, depth):
    found = np.full((depth, *parts[0].shape[1:]), np.nan)
    for part, start in zip(parts, starts, strict=True):
        before = found[start : start + len(part)]
        found[start : start + len(part)] = np.where(np.isnan(before), part, (before + part) / 2)
    return found


def in_place(parts, starts, depth):
    parts[0] *= 2
    return solution("stitch")(parts, starts, depth)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (in_place, "writes into the slabs"),
        (lambda parts, starts, depth: None, "returns nothing yet"),
        (lambda parts, starts, depth: np.concatenate(parts), "(depth, H, W)"),
        (summed, "counted twice"),
        (laid, "has overwritten"),
        (lambda parts, starts, depth: laid(parts, starts, depth, order=-1), "hides the later one"),
        (lambda parts, starts, depth: np.zeros((depth, *parts[0].shape[1:])), "are the volume"),
        (in_turn, "more weight"),
    ],
)
def test_stitch(answer, hint):
    assert hint in check("09/stitch", answer).hint


def turned(signal, by, *, sign=-1, frequency=np.fft.fftfreq, real=True):
    turn = np.exp(sign * 2j * np.pi * frequency(len(signal)) * by)
    found = np.fft.ifft(np.fft.fft(signal) * turn)
    return found.real if real else found


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda signal, by: None, "returns nothing yet"),
        (lambda signal, by: turned(signal, by, sign=1), "went to the left"),
        (lambda signal, by: turned(signal, by, real=False), "its real part"),
        (lambda signal, by: signal, "at place 2"),
        (lambda signal, by: np.roll(signal, 1), "whole length"),
        (lambda signal, by: np.roll(signal, int(by)), "no whole one"),
        (lambda signal, by: turned(signal, by, frequency=lambda n: np.arange(n) / n), "the negative ones"),
    ],
)
def test_shifted(answer, hint):
    assert hint in check("09/shifted", answer).hint
