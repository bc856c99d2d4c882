"""MedViTV2: curves on edges, neighbours that are spread out, the blocks of both, and corrupted images."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline
from skimage.util import random_noise
from sklearn.metrics import roc_auc_score

from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.preparation import zscore
from medcook.recipes.findings import _corruptions as corruptions
from medcook.recipes.findings._corruptions import KINDS, STRENGTHS, corrupt, corrupted
from medcook.recipes.findings._medvit import HEAD
from medcook.recipes.findings.medvitv2 import (
    BRAINS,
    GFP,
    LFP,
    KANLayer,
    NeighbourhoodAttention,
    TellingByMedViT,
    bells,
    by_corruption,
    corruption_rows,
    mixer,
    neighbours,
    recipe,
)
from medcook.tasks import Budget
from medcook.training import Loop

TINY = TellingByMedViT(channels=(16, 32, 32))
METHODS = {name: arm.method for name, arm in recipe.arms.items()}


def maps(count: int = 2, channels: int = 16, size: tuple[int, int] = (7, 9)) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def batch(count: int = 4, side: int = 48) -> Batch:
    labels = (torch.arange(count) % 2).byte()[:, None, None].expand(-1, side, side)
    return Batch(maps(count, 1, (side, side)), labels)


@pytest.mark.component("Kolmogorov-Arnold layers in a transformer")
class TestKAN:
    def test_every_edge_has_a_curve_of_its_own(self):
        """The defining property, edge by edge: an output is the sum of one function of each input."""
        torch.manual_seed(0)
        layer, x = KANLayer(3, 2), maps(4, 3, (1, 1)).flatten(1)
        weights = layer.curves.weight.view(2, 3, 8).double()
        seen = layer.norm(x).double()
        wanted = torch.zeros(4, 2, dtype=torch.double)
        for output in range(2):
            for given in range(3):
                for bell, centre in enumerate(np.linspace(-2, 2, 8)):
                    value = 1 / torch.cosh((seen[:, given] - centre) / 0.33) ** 2
                    wanted[:, output] += weights[output, given, bell] * value
        torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)

    def test_a_bell_has_the_shape_of_a_b_spline(self):
        """SciPy's cubic one over knots 0.42 apart, scaled to a height of one."""
        x = np.linspace(-4, 4, 801)
        for bell, centre in zip(bells(torch.from_numpy(x)).T.numpy(), np.linspace(-2, 2, 8), strict=True):
            spline = BSpline.basis_element(centre + 0.42 * np.arange(-2, 3), extrapolate=False)
            found = np.nan_to_num(spline(x)) / spline(centre)
            assert np.abs(bell - found).max() < 0.06 and x[bell.argmax()] == pytest.approx(centre, abs=0.01)

    def test_a_curve_is_not_a_line(self):
        layer = KANLayer(2, 1)
        one, two = torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
        assert not torch.allclose(layer(one), -layer(two))
        assert bells(torch.tensor(50.0)).abs().max() < 1e-6, "far away a bell is silent"

    def test_the_perceptron_has_as_many_weights(self):
        counts = [parameters(mixer(48, kan)) for kan in (True, False)]
        assert counts[0] == pytest.approx(counts[1], rel=0.02)
        counts = [parameters(METHODS[name].build(1, 2, 2)["model"]) for name in (*recipe.compare, "without kan")]
        assert max(counts) < 1.05 * min(counts)

    def test_the_arms_are_what_they_say(self):
        method, first, without = (METHODS[name] for name in (*recipe.compare, recipe.ablation[1]))
        assert replace(without, kan=True) == method == replace(first, kan=True, local="dilated")
        has = [any(isinstance(part, KANLayer) for part in m.build(1, 2, 2).modules()) for m in (method, first, without)]
        assert has == [True, False, False]


@pytest.mark.component("dilated neighborhood attention")
class TestNeighbours:
    @pytest.mark.parametrize(
        ("length", "kernel", "dilation"), [(16, 3, 5), (16, 3, 1), (11, 5, 2), (7, 3, 9), (2, 3, 4)]
    )
    def test_they_are_the_window_of_the_own_group_that_is_nearest(self, length, kernel, dilation):
        fits = min(kernel, length)
        step = min(dilation, length // fits)
        for place, found in enumerate(neighbours(length, kernel, dilation).tolist()):
            group = [other for other in range(length) if other % step == place % step]
            windows = [group[first : first + fits] for first in range(len(group) - fits + 1)]
            assert found == min(windows, key=lambda window: abs(window[fits // 2] - place))
            assert place in found

    @pytest.mark.parametrize("dilation", [1, 2, 32])
    def test_it_is_attention_in_a_loop(self, dilation):
        torch.manual_seed(0)
        net, x = NeighbourhoodAttention(16, dilation), maps()
        torch.nn.init.normal_(net.bias)
        query, key, value = net.asked(x).double().chunk(3, dim=1)
        height, width = x.shape[2:]
        down, across = neighbours(height, 3, dilation), neighbours(width, 3, dilation)
        steps = [min(dilation, length // 3) for length in (height, width)]
        wanted = torch.zeros_like(query)
        for i in range(height):
            for j in range(width):
                places = [(p, q) for p in down[i].tolist() for q in across[j].tolist()]
                for head in range(16 // HEAD):
                    mine = slice(head * HEAD, (head + 1) * HEAD)
                    scores = []
                    for p, q in places:
                        number = ((p - i) // steps[0] + 2) * 5 + (q - j) // steps[1] + 2
                        similar = (query[:, mine, i, j] * key[:, mine, p, q]).sum(1) / HEAD**0.5
                        scores.append(similar + net.bias[number, head].double())
                    weights = torch.stack(scores).softmax(0)
                    found = sum(w[:, None] * value[:, mine, p, q] for w, (p, q) in zip(weights, places, strict=True))
                    wanted[:, mine, i, j] = found
        torch.testing.assert_close(net(x).double(), net.out(wanted.float()).double(), atol=1e-5, rtol=1e-4)

    def test_only_second_blocks_are_dilated(self):
        blocks = [part for part in METHODS["medvit v2"].build(1, 2, 2)["model"].blocks if isinstance(part, LFP)]
        x, reached = maps(1, 24, (16, 16)), []
        for block in blocks[:2]:
            moved = x.clone()
            moved[..., 8, 13] += 5
            block.eval()
            reached.append(bool((block.look(x) != block.look(moved))[..., 8, 8].any()))
        assert reached == [False, True]
        plain = METHODS["without dilation"].build(1, 2, 2)["model"].blocks[1].look
        assert plain.dilation == 1 and METHODS["medvit v1"].build(1, 2, 2)["model"].blocks[1].look[0][0].groups == 3


@pytest.mark.component("hierarchical hybrid of local and global feature perception")
class TestBlocks:
    def test_local_blocks_come_first_and_the_last_is_global(self):
        kinds = [type(block) for block in TINY.build(1, 2, 2)["model"].blocks]
        assert kinds == [LFP, LFP, LFP, GFP, GFP]

    def test_a_local_block_sees_nearby_and_a_global_one_everything(self):
        torch.manual_seed(0)
        x, moved = maps(1, 16, (12, 12)), maps(1, 16, (12, 12))
        moved[..., 11, 11] += 5
        local = LFP(16, 16, False, "plain", second=False).eval()
        everywhere = GFP(16, 32, False, True, fewer=2).eval()
        assert torch.equal(local(x)[..., 0, 0], local(moved)[..., 0, 0])
        assert not torch.equal(everywhere(x)[..., 0, 0], everywhere(moved)[..., 0, 0])

    @pytest.mark.parametrize("size", [(32, 32), (37, 50), (16, 16)])
    def test_any_size(self, size):
        for method in METHODS.values():
            net = replace(method, channels=(16, 32, 32)).build(1, 2, 2)["model"].eval()
            assert torch.isfinite(net(maps(2, 1, size))).all() and net(maps(2, 1, size)).shape == (2, 2)

    def test_every_weight_learns_in_either_precision(self):
        for method in METHODS.values():
            for mixed in (False, True):
                torch.manual_seed(0)
                nets = replace(method, channels=(16, 32, 32)).build(1, 2, 2)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = method.training_step(nets, batch(), None, Moment(0, 9))
                loss.backward()
                assert loss.dtype == torch.float32 and torch.isfinite(loss)
                assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in nets["model"].parameters())
                still = [name for name, p in nets["model"].named_parameters() if not p.grad.abs().max() > 0]
                assert not still, still

    def test_every_stage_halves_a_quarter_of_the_image(self):
        sizes, net = [], METHODS["medvit v2"].build(1, 2, 2)["model"].eval()
        for block in net.blocks:
            block.register_forward_hook(lambda _, given, found: sizes.append(found.shape[1:]))
        net(maps(1, 1, (128, 128)))
        assert sizes == [(24, 32, 32), (24, 32, 32), (48, 16, 16), (48, 16, 16), (96, 8, 8)]

    def test_the_outcome_is_told_all_over_the_image_from_the_image_alone(self):
        nets, given = TINY.build(1, 2, 2).eval(), batch()
        with torch.no_grad():
            found = TINY.predict(nets, given.images)
            assert found.shape == (4, 2, 48, 48) and torch.allclose(found.sum(1), torch.ones(4, 48, 48))
            assert torch.equal(found[..., 0, 0], nets["average"](given.images).softmax(1))
        one, other = (
            TINY.training_step(nets, given._replace(labels=labels), None, Moment(0, 9)).item()
            for labels in (given.labels, 1 - given.labels)
        )
        logits = nets["model"](given.images).log_softmax(1)
        for loss, wanted in ((one, given.labels), (other, 1 - given.labels)):
            truth = wanted[:, 0, 0].long()
            assert loss == pytest.approx(-logits[range(4), truth].mean().item(), abs=1e-5)


def grey(side: int = 64) -> np.ndarray:
    """A smooth image with values from 0.1 to 0.9."""
    x = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((side, side)), 4)
    return 0.1 + 0.8 * (x - x.min()) / np.ptp(x)


@pytest.mark.component("corrupted medical images")
class TestCorruptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_stronger_is_further_away(self, kind):
        far = [
            np.abs(corrupt(grey(224), kind, strength, np.random.default_rng(1)) - grey(224)).mean()
            for strength in STRENGTHS[kind]
        ]
        assert far == sorted(far) and far[0] > 0

    def test_noise_is_as_strong_as_it_says(self):
        x, rng = np.full((300, 300), 0.5), np.random.default_rng(0)
        assert corrupt(x, "gaussian noise", 0.1, rng).std() == pytest.approx(0.1, rel=0.03)
        assert corrupt(x, "speckle noise", 0.2, rng).std() == pytest.approx(0.1, rel=0.03)
        assert corrupt(x, "shot noise", 50, rng).std() == pytest.approx((0.5 / 50) ** 0.5, rel=0.03)
        ours = corrupt(x, "impulse noise", 0.1, rng)
        theirs = random_noise(x, mode="s&p", amount=0.1, rng=1)
        for value in (0, 1):
            assert (ours == value).mean() == pytest.approx((theirs == value).mean(), abs=0.005)

    def test_pixels_are_means_of_blocks(self):
        x = np.arange(64.0).reshape(8, 8) / 64
        found = corruptions.pixelated(x, 4)
        wanted = x.reshape(4, 2, 4, 2).mean((1, 3)).repeat(2, 0).repeat(2, 1)
        np.testing.assert_allclose(found, wanted)
        assert np.array_equal(corruptions.pixelated(x, 20), x), "no more pixels than there are"

    def test_blur_is_measured_in_large_images(self):
        point = np.zeros((112, 112))
        point[56, 56] = 1
        found = corrupt(point, "blur", 4.0, np.random.default_rng(0))
        spread = np.sqrt((found.sum(1) * (np.arange(112) - 56) ** 2).sum())
        assert spread == pytest.approx(2, rel=0.02)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_name_decides_alone(self, kind):
        images = maps(2, 1, (48, 48))
        torch.manual_seed(0)
        one = corrupted(images, kind, "a")
        torch.manual_seed(1)
        assert torch.equal(one, corrupted(images, kind, "a")) and one.shape == images.shape
        assert not all(torch.equal(one, corrupted(images, kind, name)) for name in "bcde")
        for image in one:
            torch.testing.assert_close(zscore(image), image, atol=1e-4, rtol=1e-4)

    def test_an_empty_image_stays_empty(self):
        found = corrupted(torch.zeros(1, 1, 16, 16), "gamma up", "a")
        assert torch.equal(found, torch.zeros(1, 1, 16, 16))

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match="no corruption 'rain'"):
            corrupt(grey(), "rain", 1, np.random.default_rng(0))


@pytest.fixture(scope="module")
def fitted():
    budget, task = Budget(steps=3, batch=4, precision="float32", checks=0), BRAINS
    return Loop(TINY, task, budget, "float32", 0, task.samples("labelled"), None, None, False, "cpu").run()


def test_rows_have_every_corruption_and_the_clean_score(fitted):
    case = next(iter(BRAINS.cases("val")))
    rows = corruption_rows(fitted, case)
    assert [row["structure"] for row in rows] == list(KINDS) and len({row["score"] for row in rows}) > 5
    images = BRAINS.preparation.images(case)
    sick = float(case.attributes["group"] == "atrophy")
    with torch.no_grad():
        told = lambda given: fitted.nets.eval()["average"](given).softmax(1)[:, 1].mean().item()  # noqa: E731
        for row in rows:
            assert row["score"] == pytest.approx(told(corrupted(images, row["structure"], case.case_id)), abs=1e-5)
            assert row["score_clean"] == pytest.approx(told(images), abs=1e-5) and row["outcome"] == sick
            assert row["correct"] == float((row["score"] > 0.5) == sick)
            assert row["correct_clean"] == float((row["score_clean"] > 0.5) == sick)
    case.attributes["group"] = None
    assert corruption_rows(fitted, case) == []


def test_each_kind_has_its_own_auc():
    rng = np.random.default_rng(0)
    outcome = np.repeat(rng.integers(0, 2, 40), len(KINDS)).astype(float)
    clean = np.repeat(rng.normal(size=40), len(KINDS)) + outcome
    frame = pd.DataFrame({"structure": list(KINDS) * 40, "outcome": outcome, "score_clean": clean})
    frame["score"] = clean + rng.normal(size=len(frame))
    found = by_corruption(frame)
    blurred = frame[frame["structure"] == "blur"]
    assert found["blur"] == pytest.approx(roc_auc_score(blurred["outcome"], blurred["score"]))
    assert found["clean"] == pytest.approx(roc_auc_score(blurred["outcome"], blurred["score_clean"]))
    assert found["all"] == pytest.approx(roc_auc_score(outcome, frame["score"])) and len(found) == 2 + len(KINDS)
