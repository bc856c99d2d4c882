"""The hints of chapter 07's exercises: each typical mistake is told what is wrong with it."""

import numpy as np
import pandas as pd
import pytest
from solved import solver

from medcook import pooled
from medcook.exercises import check, exercise_names
from medcook.measures.fairness import gap_test

solution = solver("07_fairness")
NAMES = ["equity_scaled", "permutation_p", "shortcut_drop"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    verdict = check(f"07/{name}", solution(name))
    assert verdict.solved, verdict.hint


def test_no_exercise_is_without_a_solution():
    assert exercise_names("07") == [f"07/{name}" for name in NAMES]


def test_solutions_are_what_the_book_measures_with():
    rng = np.random.default_rng(0)
    values, groups = rng.random(40), np.array(["north", "south", "south", "west"] * 10)
    wanted = [pooled.equity_scaled(values, groups), pooled.equity_scaled_std(values, groups)]
    assert solution("equity_scaled")(values, groups) == pytest.approx(wanted)
    frame = pd.DataFrame({"patient_id": [f"p{n}" for n in range(40)], "dice": values, "group": groups})
    p = solution("permutation_p")(values, groups, 2000, rng)
    assert p == pytest.approx(gap_test(frame).p, abs=0.05)
    ill = rng.random(40) < 0.4
    assert solution("shortcut_drop")(values, values, ill)[1] == pytest.approx(pooled.auc(values, ill.astype(float)))


def scaled(values, groups, overall=None, of=np.abs, add=np.sum, ddof=1):
    values, groups = np.asarray(values, float), np.asarray(groups)
    means = np.array([values[groups == name].mean() for name in np.unique(groups)])
    whole = values.mean() if overall is None else overall(means)
    return whole / (1 + add(of(means - whole))), whole / (1 + means.std(ddof=ddof))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda v, g: None, "return two numbers"),
        (lambda v, g: scaled(v, g)[0], "return two numbers"),
        (lambda v, g: scaled(v, g)[::-1], "the sum comes first"),
        (lambda v, g: scaled(v, g, overall=np.mean), "mean over patients"),
        (lambda v, g: scaled(v, g, add=np.mean), "add the distances up"),
        (lambda v, g: scaled(v, g, of=lambda d: d - d.mean()), "have no sign"),
        (lambda v, g: scaled(v, g, of=np.square), "by the sum: overall"),
        (lambda v, g: scaled(v, g, ddof=0), "ddof"),
        (lambda v, g: (scaled(v, g)[0], scaled(v, g)[0]), "by the spread: overall"),
        (lambda v, g: scaled(v, np.minimum(g, 1) if np.asarray(g).dtype.kind == "i" else g), "three groups"),
    ],
)
def test_equity_scaled(answer, hint):
    assert hint in check("07/equity_scaled", answer).hint


def dealt(values, groups, times, rng, *, signed=False, reached=np.greater_equal, first=1, draw=None, ends=None):
    values, names = np.asarray(values, float), np.unique(groups)

    def gap(of):
        means = [values[of == name].mean() for name in names]
        return means[-1] - means[0] if signed or ends else max(means) - min(means)

    draw = draw or (lambda: rng.permutation(groups))
    size = abs if ends else float
    measured = size(gap(groups))
    return (first + sum(bool(reached(size(gap(draw())), measured)) for _ in range(times))) / (first + times)


def in_place(values, groups, times, rng):
    p = dealt(values, groups, times, rng)
    rng.shuffle(values)
    return p


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: None, "returns nothing yet"),
        (lambda *given: [0.5, 0.5], "one number"),
        (in_place, "in place"),
        (lambda v, g, n, rng: dealt(v, g, n, rng) * n, "between 0 and 1"),
        (lambda v, g, n, rng: 1 - dealt(v, g, n, rng), "not smaller"),
        (lambda v, g, n, rng: dealt(v, g, n, rng, signed=True), "has no direction"),
        (lambda v, g, n, rng: dealt(v, g, n, rng, draw=lambda: np.roll(g, rng.integers(8))), "same sizes"),
        (lambda v, g, n, rng: dealt(v, g, n, rng, reached=lambda a, b: a > b - (len(v) == 8) / 4), "counts ties"),
        (lambda v, g, n, rng: dealt(v, g, n, rng, first=0), "no p of zero"),
        (lambda v, g, n, rng: dealt(v, g, n, rng) + (n == 50) * 0.01, "once above and once below"),
        (lambda v, g, n, rng: dealt(v, g, n, rng, ends=True), "best and the worst"),
    ],
)
def test_permutation_p(answer, hint):
    assert hint in check("07/permutation_p", answer).hint


def drops(plain, drained, ill, *, tie=0.5, healthy=None, sign=1):
    ill = np.asarray(ill, bool)

    def auc(positive, negative):
        difference = positive[:, None] - negative[None]
        return np.mean((difference > 0) + tie * (difference == 0))

    first = auc(drained[ill], (plain if healthy is None else healthy)[~ill])
    without = auc(plain[ill], plain[~ill])
    return first, without, sign * (first - without)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: None, "return three numbers"),
        (lambda *given: drops(*given)[:2], "return three numbers"),
        (lambda p, d, i: drops(p, d, ~np.asarray(i, bool)), "without: of all pairs"),
        (lambda p, d, i: drops(p, d, i, healthy=d), "never have a drain"),
        (lambda p, d, i: (0.9, *drops(p, d, i)[1:]), "with: the scores of the ill"),
        (lambda p, d, i: (*drops(p, d, i)[:2], 1.0), "the drop is"),
        (lambda p, d, i: drops(p, d, i, tie=0), "a tie counts half"),
        (lambda p, d, i: drops(p, d, i, tie=1), "a tie counts half"),
        (lambda p, d, i: drops(p, d, i, sign=-1), "positive where drains help"),
    ],
)
def test_shortcut_drop(answer, hint):
    assert hint in check("07/shortcut_drop", answer).hint
