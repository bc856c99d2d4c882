"""Checks of chapter 07's exercises."""

import numpy as np

from medcook.exercises import exercise, expect, expect_close


@exercise("07/equity_scaled")
def check_equity_scaled(equity_scaled):
    values, groups = np.array([0.9, 0.9, 0.9, 0.6]), np.array(["A", "A", "A", "B"])
    found = equity_scaled(values, groups)
    expect(isinstance(found, tuple | list) and len(found) == 2, "return two numbers: by the sum, by the spread")
    expect(found[0] is not None and found[1] is not None, "your function returns nothing yet.")
    spread = 0.3 / np.sqrt(2)
    if np.isclose(found[0], 0.825 / (1 + spread)) and np.isclose(found[1], 0.825 / 1.3):
        expect(False, "the sum comes first, then the spread")
    numerators = [0.75 / 1.3, 0.75 / (1 + spread)]
    expect(
        not np.allclose(found, numerators),
        "the overall value is the mean over patients, not the mean of the groups' means: large groups count more in it",
    )
    expect(not np.isclose(found[0], 0.825 / (1 + 0.3 / 2)), "by the sum: add the distances up, do not take their mean")
    expect(
        not np.isclose(found[0], 0.825),
        "distances have no sign: without the absolute value those of a better and a worse group cancel",
    )
    expect_close(found[0], 0.825 / 1.3, "by the sum: overall / (1 + sum of |group's mean - overall mean|)")
    expect(not np.isclose(found[1], 0.825 / 1.15), "K - 1 in the standard deviation's denominator: look for `ddof`")
    expect_close(found[1], 0.825 / (1 + spread), "by the spread: overall / (1 + standard deviation of the group means)")
    many = equity_scaled(np.array([0.8, 0.6, 0.7, 0.7]), np.array([2, 0, 1, 1]))
    expect_close(many, [0.7 / 1.2, 0.7 / 1.1], "three groups: a distance for each group, and one spread of all three")
    expect_close(equity_scaled([0.5, 0.5], ["x", "y"]), [0.5, 0.5], "equal groups: nothing to scale by")


@exercise("07/permutation_p")
def check_permutation_p(permutation_p):
    def asked(values, groups, times=2000):
        return permutation_p(np.array(values), np.array(groups), times, np.random.default_rng(0))

    groups, kept = np.array(["A"] * 4 + ["B"] * 4), np.arange(8.0)
    values = kept.copy()
    p = permutation_p(values, groups, 2000, np.random.default_rng(0))
    expect(p is not None, "your function returns nothing yet.")
    expect(np.ndim(p) == 0, "return one number")
    untouched = np.array_equal(values, kept) and groups.tolist() == ["A"] * 4 + ["B"] * 4
    expect(untouched, "your function shuffles the arrays it was given in place: work on copies (`rng.permutation`)")
    expect(0 <= p <= 1, "p is a share: between 0 and 1")
    expect(p < 0.5, "p is the share of random gaps that are at least as large as the measured one, not smaller")
    expect(
        abs(p - 1 / 70) > 0.006 or abs(p - 2 / 70) < abs(p - 1 / 70),
        "a gap has no direction: best minus worst, whichever group that is",
    )
    expect(abs(p - 2 / 70) < 0.012, "deal the groups out among the patients: same sizes, every patient once")
    expect_close(asked([3.0] * 6, list("AABBCC")), 1.0, "all are equal: every random gap is as large (>= counts ties)")
    few = asked(np.arange(40.0), ["A"] * 20 + ["B"] * 20, 50)
    expect(few > 0, "no p of zero: the measured way of dealing is one of the possible ways, count it in both")
    expect_close(few, 1 / 51, "the measured way counts once above and once below: (1 + reached) / (1 + times)")
    three = asked([1, 1, 1, 1, 1, 2.0], list("AABBCC"))
    expect_close(three, 1.0, "three groups: the gap is between the best and the worst of all of them")


@exercise("07/shortcut_drop")
def check_shortcut_drop(shortcut_drop):
    plain, drained = np.array([0.2, 0.6, 0.4, 0.4, 0.1]), np.array([0.3, 0.9, 0.7, 0.8, 0.95])
    ill = np.array([True, True, False, False, False])
    found = shortcut_drop(plain, drained, ill)
    expect(isinstance(found, tuple | list) and len(found) == 3, "return three numbers: with drains, without, the drop")
    with_drain, without, drop = found
    expect_close(
        without, 4 / 6, "without: of all pairs of an ill and a healthy patient, where does the ill score more?"
    )
    expect(
        not np.isclose(with_drain, 2 / 6),
        "with: the healthy never have a drain; only the scores of the ill are taken from `drained`",
    )
    expect_close(with_drain, 4 / 6, "with: the scores of the ill from `drained`, those of the healthy from `plain`")
    expect_close(drop, 0.0, "the drop is the AUC with drains minus the AUC without")
    tied = shortcut_drop(np.array([0.5, 0.5, 0.3]), np.array([0.9, 0.0, 0.0]), np.array([1, 0, 0]))
    expect_close(tied[1], 0.75, "a tie counts half: neither right nor wrong")
    expect_close(tied[0], 1.0, "with a drain the ill scores above both: `ill` may hold 0 and 1, too")
    expect_close(tied[2], 0.25, "the drop is the AUC with drains minus the AUC without: positive where drains help")
