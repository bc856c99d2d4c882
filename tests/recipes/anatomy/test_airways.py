"""Airways with names: how they are planted in lungs, what illness changes, and the signature that is measured."""

from dataclasses import replace

import numpy as np
import pytest

from medcook.recipes.anatomy import _airways, _signature, _trees
from medcook.recipes.anatomy._airways import COUNTS, NAMES, SEGMENTS, VALUE, airways, both_lungs, ill, sectors
from medcook.recipes.anatomy._signature import SIGNATURE, signature
from medcook.recipes.anatomy._trees import Branch, children_of

SIZE = (128, 128)


def lungs() -> np.ndarray:
    rows, columns = np.indices(SIZE)
    return sum(((rows - 64) / 52) ** 2 + ((columns - middle) / 24) ** 2 < 1 for middle in (32, 96)) > 0


def tree(seed: int = 0):
    return airways(lungs(), np.random.default_rng(seed))


def line(points, radius: float = 2.0, name: str = "RB1", parent: int = -1, generation: int = 0) -> Branch:
    """A tube through places, half a pixel a step."""
    points = np.asarray(points, float)
    parts = [
        np.linspace(a, b, max(2, int(2 * np.linalg.norm(b - a)))) for a, b in zip(points, points[1:], strict=False)
    ]
    whole = np.concatenate(parts)
    return Branch(whole, np.full(len(whole), radius), parent, generation, VALUE[name])


def test_every_name_knows_its_lobe_segment_and_subsegment():
    assert len(NAMES) == 64 and len(VALUE) == 64 and COUNTS == (6, 19, 37)
    assert NAMES[VALUE["RB6"]] == ("RB6", 3, 6, 0) and NAMES[VALUE["LB1+2"]] == ("LB1+2", 4, 11, 0)
    assert NAMES[VALUE["LB10b"]] == ("LB10b", 5, 18, 36) and NAMES[VALUE["trachea"]][1:] == (0, 0, 0)
    assert NAMES[VALUE["RM bronchus"]][1:] == (2, 0, 0)
    assert len({named.subsegment for named in NAMES}) == 37


@pytest.mark.parametrize("seed", range(4))
def test_names_follow_the_tree(seed):
    found = tree(seed)
    assert found[0].name == VALUE["trachea"] and [one.parent for one in found].count(-1) == 1
    for number, branch in enumerate(found):
        mine = NAMES[branch.name]
        for child in children_of(found, number):
            other = NAMES[found[child].name]
            assert not mine.lobe or other.lobe == mine.lobe
            assert not mine.segment or (other.segment == mine.segment and other.subsegment and not mine.subsegment)
            assert found[child].radius[0] < branch.radius[-1] and np.allclose(found[child].points[0], branch.points[-1])
    segments = [NAMES[one.name].name for one in found if NAMES[one.name].segment and not NAMES[one.name].subsegment]
    assert len(segments) == len(set(segments)) and {*sum(SEGMENTS.values(), ())} - {*segments} <= {"RB7"}
    below = lambda name: np.mean([one.points[-1, 0] for one in found if NAMES[one.name].name == name])  # noqa: E731
    assert below("RB1") < below("RB10") and below("LB1+2") < below("LB10")
    right = [one for one in found if NAMES[one.name].lobe in (1, 2, 3)]
    assert all(one.points[-1, 1] < 64 for one in right)
    carina = found[0].points[-1]
    assert abs(carina[1] - 64) < 3 and 30 < carina[0] < 60


def test_people_differ_in_where_their_bronchi_part():
    patterns = [_signature.pattern(tree(seed), 3) for seed in range(12)]
    assert 1 < len(set(patterns)) < 12
    usual = frozenset({7, 8, 9, 10})
    assert sum(usual in each or usual - {7} in each for each in patterns) > 5
    missing = sum(VALUE["RB7"] not in [one.name for one in tree(seed)] for seed in range(24))
    assert 0 < missing < 12


def test_sectors_are_as_large_as_their_shares_and_turn_round_in_the_other_lung():
    cells = np.argwhere(np.ones((20, 20)))
    hub, heading = np.array([9.5, -5.0]), np.array([0.0, 1.0])
    upper, lower = sectors(cells, hub, heading, (1, 3), mirrored=False)
    assert (len(upper), len(lower)) == (100, 300) and upper[:, 0].mean() < lower[:, 0].mean()
    first, second = sectors(cells, hub, heading, (1, 3), mirrored=True)
    assert len(first) == 100 and first[:, 0].mean() > second[:, 0].mean()
    leftwards = sectors(cells, np.array([9.5, 25.0]), -heading, (1, 3), mirrored=True)
    assert leftwards[0][:, 0].mean() < leftwards[1][:, 0].mean()


def test_segments_lie_in_their_order_from_above_downwards():
    found = [tree(seed) for seed in range(6)]
    row = lambda one, name: np.mean([b.points[-1, 0] for b in one if NAMES[b.name].name.rstrip("ab") == name])  # noqa: E731
    for above, below in (("RB1", "RB3"), ("RB6", "RB9"), ("LB1+2", "LB5"), ("LB6", "LB10")):
        assert np.mean([row(one, above) < row(one, below) for one in found if row(one, below) > 0]) > 0.8


def test_lungs_are_told_apart_even_if_one_is_larger():
    rows, columns = np.indices(SIZE)
    uneven = ((rows - 60) ** 2 + (columns - 40) ** 2 < 900) | ((rows - 60) ** 2 + (columns - 100) ** 2 < 300)
    right, left = both_lungs(uneven)
    assert right[:, 1].max() <= 70 and left[:, 1].min() >= 80 and len(right) + len(left) == uneven.sum()
    one = both_lungs(np.ones((10, 10), bool))
    assert one[0][:, 1].max() < one[1][:, 1].min()
    assert airways(np.zeros(SIZE, bool), np.random.default_rng(0)) == ()


def test_illness_changes_what_its_name_says():
    healthy = tree()
    sick = {state: ill(healthy, state, 1.0, np.random.default_rng(1)) for state in _airways.STATES}
    assert sick["healthy"] is healthy
    changed = {
        name: [k for k, (a, b) in enumerate(zip(healthy, each, strict=True)) if a is not b]
        for name, each in sick.items()
    }
    for name, numbers in changed.items():
        assert (len(numbers) > 5) == (name != "healthy")
        assert all(NAMES[healthy[k].name].lobe for k in numbers), "not the main bronchi"
    for k in changed["narrowed"]:
        branch = sick["narrowed"][k]
        (at, degree), before = branch.stenoses[0], healthy[k].radius
        assert branch.radius[at] == pytest.approx((1 - degree) * before[at]) and 0.4 <= degree <= 0.7
    for k in changed["widened"]:
        ratio = sick["widened"][k].radius / healthy[k].radius
        assert 1.35 < ratio.max() < 1.95 and ratio[0] == pytest.approx(1)
    for k in changed["tortuous"]:
        branch = sick["tortuous"][k]
        assert (
            np.allclose(branch.points[[0, -1]], healthy[k].points[[0, -1]]) and branch.length > 1.02 * healthy[k].length
        )


def test_air_is_dark_between_bright_walls_and_pixels_have_names():
    image = np.zeros(SIZE)
    planted = _airways.with_airways(image, lungs(), np.random.default_rng(3))
    found = planted.trees["airways"]
    drawn = _trees.rendered(found, SIZE)
    assert (
        planted.image[0][drawn.edge < -1].max() < -0.4
        and planted.image[0][(drawn.edge > 0.5) & (drawn.edge < 1)].mean() > 0.2
    )
    assert np.abs(planted.image[0][drawn.edge >= _trees.REACH]).max() < 0.25
    assert ((planted.label > 0) == _trees.solid(found, drawn)).all() and planted.state in _airways.STATES
    trachea = found[0].points[len(found[0].points) // 2].round().astype(int)
    assert planted.label[tuple(trachea)] == VALUE["trachea"]
    assert set(np.unique(planted.label)) - {0} <= {one.name for one in found}
    middles = np.array([one.points[len(one.points) // 2].round().astype(int) for one in found])
    assert np.mean(planted.label[tuple(middles.T)] == [one.name for one in found]) > 0.9
    states = [_airways.with_airways(image, lungs(), np.random.default_rng(seed)).state for seed in range(8)]
    assert len(set(states)) > 2


def test_tortuosity_of_a_line_is_one_and_of_a_half_circle_half_of_pi():
    assert _signature.tortuosity(line([[5, 5], [25, 25]])) == pytest.approx(1)
    angles = np.linspace(0, np.pi, 500)
    half = Branch(10 * np.stack([np.sin(angles), np.cos(angles)], 1), np.ones(500))
    assert _signature.tortuosity(half) == pytest.approx(np.pi / 2, rel=1e-3)


def test_stenosis_and_ectasia_are_of_the_mean():
    radius = np.array([2.0, 2.0, 1.0, 3.0])
    assert _signature.stenosis(radius) == pytest.approx(0.5) and _signature.ectasia(radius) == pytest.approx(1.5)
    assert _signature.stenosis(np.ones(5)) == 0 and _signature.ectasia(np.ones(5)) == 1


def test_divergence_is_an_angle():
    start = np.array([10.0, 10.0])
    ends = [np.array([10.0, 20.0]), np.array([20.0, 20.0]), np.array([15.0, 10.0])]
    assert _signature.open_angle(start, ends) == pytest.approx(np.pi / 2)
    assert _signature.open_angle(start, ends[:2]) == pytest.approx(np.pi / 4)
    assert _signature.open_angle(start, ends[:1]) == 0 == _signature.open_angle(start, [start, ends[0]])


def test_complexity_of_a_line_is_one_and_of_a_square_two():
    steps = np.arange(0, 64, 0.25)
    assert _signature.dimension(np.stack([np.full_like(steps, 3.0), steps], 1)) == pytest.approx(1)
    assert _signature.dimension(np.argwhere(np.ones((64, 64)))) == pytest.approx(2)


def forked() -> tuple[Branch, ...]:
    """A trachea of 40 pixels and one lobe: a bronchus of 10, a segment of 20 and one of 30 with a winding end."""
    return (
        line([[0, 50], [40, 50]], 4.0, "trachea"),
        line([[40, 50], [40, 60]], 3.0, "RU bronchus", 0, 1),
        line([[40, 60], [20, 60]], 2.0, "RB1", 1, 2),
        line([[40, 60], [40, 90]], 2.0, "RB2", 1, 2),
        line([[20, 60], [15, 63]], 1.5, "RB1a", 2, 3),
    )


def test_a_signature_of_a_tree_that_is_known():
    found = signature(forked())
    assert tuple(found) == SIGNATURE
    assert found["length"] == pytest.approx((10 + 30) / 40, rel=0.05)
    assert found["tortuosity"] == pytest.approx(1) and found["stenosis"] == pytest.approx(0, abs=1e-6)
    assert found["ectasia"] == pytest.approx(1)
    ends = np.array([15, 63]) - [40, 50], np.array([40, 90]) - [40, 50]
    angle = np.arccos(ends[0] @ ends[1] / np.linalg.norm(ends[0]) / np.linalg.norm(ends[1]))
    assert found["divergence"] == pytest.approx(angle)
    thin = tuple(replace(one, radius=0.3 * one.radius) for one in forked())
    assert np.isnan(signature(thin)["stenosis"]) and signature(thin)["tortuosity"] == pytest.approx(1)
    assert all(np.isnan(value) for value in signature(()).values())


@pytest.mark.parametrize(
    ("state", "name"), [("narrowed", "stenosis"), ("widened", "ectasia"), ("tortuous", "tortuosity")]
)
def test_each_illness_raises_its_number(state, name):
    healthy = tree(2)
    values = [signature(each)[name] for each in (healthy, ill(healthy, state, 1.0, np.random.default_rng(0)))]
    assert values[1] > values[0] + 0.02


def test_consistency_asks_whether_all_that_is_supplied_agrees():
    found = forked()
    assert _signature.consistency(found) == 1.0
    wrong = (*found[:4], replace(found[4], name=VALUE["RB2a"]))
    assert _signature.consistency(wrong) == 0.0
    deeper = (*wrong, line([[40, 90], [40, 99]], 1.0, "RB2b", 3, 3))
    assert _signature.consistency(deeper) == 0.5 and np.isnan(_signature.consistency(found[:2]))
    assert _signature.descendants(found, 1) == [2, 4, 3]


def test_patterns_are_the_segments_that_share_a_bronchus():
    found = forked()
    assert _signature.pattern(found, 1) == {frozenset({1, 2})} and _signature.pattern(found, 2) == frozenset()
    three = (*found, line([[40, 55], [50, 55]], 2.0, "RB3", 1, 2))
    assert _signature.pattern(three, 1) == {frozenset({1, 2, 3})}
    assert _signature.agreement(found, found) == 1.0 and _signature.agreement(found, three) == 0.0
    both = (*three, line([[40, 60], [45, 60]], 2.0, "RU bronchus", 1, 2), line([[45, 60], [60, 60]], 2.0, "RB1", 6, 3))
    again = (*both, line([[45, 60], [60, 70]], 2.0, "RB2", 6, 3))
    assert _signature.agreement(again, three) == 0.5 and np.isnan(_signature.agreement((), ()))
