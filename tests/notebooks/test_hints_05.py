"""The hints of chapter 05's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pytest
from solved import solver

from medcook.exercises import check, exercise_names

solution = solver("05_few_shot")
NAMES = ["nearest_prototype", "training_slices", "luck"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"05/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("05") == [f"05/{name}" for name in NAMES]


def cosines(query, prototype):
    return query @ prototype / np.linalg.norm(query, axis=1) / np.linalg.norm(prototype)


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def by(measure, combine=lambda inside, outside: inside > outside, prepare=lambda features: features):
    """A prototype network with one part exchanged."""

    def answer(support, mask, query):
        support = prepare(support)
        return combine(*(measure(query, support[part].mean(0)) for part in (mask, ~mask)))

    return answer


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s, m, q: None, "one answer for each"),
        (by(cosines, lambda inside, outside: inside < outside), "the larger one"),
        (by(cosines, lambda inside, outside: (inside > outside).astype(int)), "True or False"),
        (by(cosines, lambda inside, outside: np.abs(inside) > np.abs(outside)), "keep their sign"),
        (by(lambda q, p: -np.linalg.norm(q - p, axis=1)), "not distances"),
        (by(cosines, prepare=unit), "average the features first"),
        (by(cosines, lambda inside, outside: (inside > outside)[:1]), "one answer for each"),
    ],
)
def test_nearest_prototype(answer, hint):
    assert hint in check("05/nearest_prototype", answer).hint


def everything(labels, novel, setting):
    return np.arange(len(labels)), labels.copy()


def blank(labels, novel, setting):
    hidden = np.isin(labels, list(novel))
    return np.arange(len(labels)), np.where(hidden, 0, labels)


def in_place(labels, novel, setting):
    labels[np.isin(labels, list(novel))] = 0
    return np.arange(len(labels)), labels


def only_base(labels, novel, setting):
    """Drops empty slices too."""
    numbers, maps = solution("training_slices")(labels, novel, setting)
    keep = maps.any((1, 2)) if setting == 2 else np.ones(len(maps), bool)
    return numbers[keep], maps[keep]


def all_maps(labels, novel, setting):
    numbers, _ = solution("training_slices")(labels, novel, setting)
    return numbers, blank(labels, novel, setting)[1][: len(numbers)]


def one_of_them(labels, novel, setting):
    return solution("training_slices")(labels, {max(novel)}, setting)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda labels, novel, setting: np.arange(5), "return two things"),
        (in_place, "writes into the labels"),
        (everything, "it is background"),
        (blank, "leaves out every slice"),
        (only_base, "shows nothing at all"),
        (all_maps, "belong to the slices"),
        (one_of_them, "several novel structures"),
    ],
)
def test_training_slices(answer, hint):
    assert hint in check("05/training_slices", answer).hint


def pairs(dice, gain, differ=lambda a, b: abs(a - b), start=1, strict=False):
    means = dice.mean(1)
    found = [differ(means[i], means[j]) for i in range(len(means)) for j in range(i + start, len(means))]
    return float(np.mean([each > gain if strict else each >= gain for each in found]))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda dice, gain: dice.mean(1), "return one number"),
        (lambda dice, gain: 3.0, "between 0 and 1"),
        (lambda dice, gain: pairs(dice.T, gain), "means over patients"),
        (lambda dice, gain: pairs(dice, gain, start=0), "each pair once"),
        (lambda dice, gain: pairs(np.sort(dice, 1)[:, :1], gain), "means over patients"),
        (lambda dice, gain: pairs(dice, gain + 1e-6), "as large as the gain"),
        (lambda dice, gain: pairs(dice, gain, lambda a, b: b - a), "the sign does not matter"),
    ],
)
def test_luck(answer, hint):
    assert hint in check("05/luck", answer).hint
