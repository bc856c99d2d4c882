"""A report from models that each look for one abnormality: what they see, learn, answer and what is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.findings._settings import FINDINGS_QUICK
from medcook.recipes.findings.cxr_report import (
    NORMAL,
    Detector,
    Reporter,
    facts_in,
    named,
    recipe,
    report_rows,
    result_code,
    segments,
    stated,
    written,
)
from medcook.recipes.language._findings import FIELDS, FINDINGS, KINDS, Finding, value_of
from medcook.tasks import Budget
from medcook.training import Fitted, Loop

TINY = Reporter(channels=(4, 8))
CLASSES = 1 + len(FINDINGS)
CODES = [f"{number:09b}" for number in range(2**9)]


def built(method: Reporter = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, CLASSES, 2)


def images(count: int = 4, size: tuple[int, int] = (30, 32)) -> torch.Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(1))


def labels(count: int = 4, size: tuple[int, int] = (30, 32)) -> torch.Tensor:
    """Squares of random findings, some over others."""
    rng = np.random.default_rng(2)
    found = np.zeros((count, *size), np.uint8)
    for label in found:
        for _ in range(4):
            top, left = rng.integers(size[0] - 3), rng.integers(size[1] - 3)
            label[top : top + 3, left : left + 3] = rng.integers(1, CLASSES)
    return torch.from_numpy(found)


@pytest.mark.component("a binary-classification model for each abnormality")
class TestModels:
    def test_a_model_learns_from_its_own_abnormality_alone(self):
        """The defining property: what is true of other abnormalities moves none of its weights."""
        gradients = []
        for kind in ("nodule", "cavity"):
            nets, truth = built(), torch.zeros(4, 30, 32).byte()
            truth[:2, 2:5, 2:5] = value_of(Finding(kind, "small", "right", "upper"))
            TINY.training_step(nets, Batch(images(), truth), None, Moment(0, 9)).backward()
            gradients.append([[p.grad.clone() for p in model.parameters()] for model in nets["model"]])
        same = [all(map(torch.equal, *pair)) for pair in zip(*gradients, strict=True)]
        assert same == [kind == "patch" for kind in KINDS]

    def test_answers_come_in_the_order_of_the_kinds(self):
        nets = built().eval()
        found = TINY.logits(nets["average"], images())
        assert found.shape == (4, 3, 3)
        for number, model in enumerate(nets["average"]):
            torch.testing.assert_close(found[:, number], model(images())[:, 0])

    def test_the_loss_is_the_mean_over_all_answers(self):
        nets, truth = built(), labels()
        loss = TINY.training_step(nets, Batch(images(), truth), None, Moment(0, 9))
        p = TINY.logits(nets["model"], images()).sigmoid()
        wanted = -torch.where(facts_in(truth), p, 1 - p).log().mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_the_baseline_has_as_many_weights_in_one_model(self):
        methods = [recipe.arms[name].method for name in (*recipe.compare, recipe.ablation[1])]
        counts = [parameters(method.build(1, CLASSES, 2)["model"]) for method in methods]
        assert counts[1] == pytest.approx(counts[0], rel=0.03) and counts[2] == counts[0]
        assert [len(method.build(1, CLASSES, 2)["model"]) for method in methods] == [3, 1, 3]
        assert replace(methods[1], each=True) == replace(methods[2], thirds=True) == methods[0]

    def test_every_weight_learns_in_either_precision(self):
        for method in (TINY, replace(TINY, each=False), replace(TINY, thirds=False)):
            for mixed in (False, True):
                nets = built(method)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = method.training_step(nets, Batch(images(), labels()), None, Moment(0, 9))
                loss.backward()
                assert loss.dtype == torch.float32 and torch.isfinite(loss)
                assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())

    def test_it_learns_to_find_what_is_bright(self):
        truth = labels(16)
        given = 0.3 * images(16) + 3 * (truth[:, None] > 0)
        nets = built()
        optimiser = torch.optim.Adam(nets["model"].parameters(), 1e-2)
        losses = []
        for _ in range(30):
            losses.append(TINY.training_step(nets, Batch(given, truth), None, Moment(0, 9)))
            losses[-1].backward()
            optimiser.step(), optimiser.zero_grad()
        assert losses[-1] < 0.6 * losses[0]

    @pytest.mark.parametrize("size", [(32, 32), (37, 50), (64, 64)])
    def test_any_size(self, size):
        for method in (TINY, replace(TINY, each=False), replace(TINY, thirds=False)):
            found = method.predict(built(method).eval(), images(2, size))
            assert found.shape == (2, CLASSES, *size) and torch.allclose(found.sum(1), torch.ones(2, *size))


@pytest.mark.component("slicing into upper, middle and lower segments")
class TestSegments:
    def test_they_cover_the_image_from_the_top(self):
        given = images()
        assert torch.equal(segments(given).movedim(1, 2).flatten(2, 3), given)
        for height in (31, 32, 64):
            rows = torch.arange(height).view(1, 1, height, 1).expand(1, 1, height, 2)
            found = [part[0, :, 0].tolist() for part in segments(rows)[0]]
            assert sorted({row for part in found for row in part}) == list(range(height))
            assert len({len(part) for part in found}) == 1 and sum(map(len, found)) <= height + 2

    def test_an_answer_sees_its_third_alone(self):
        """The defining property: other rows change no answer; where the features are cut, they do."""
        given, other = images(), images()
        other[:, :, 10:20] += 3
        changed = {}
        for thirds in (True, False):
            torch.manual_seed(0)
            model = Detector(1, 2, (4, 8), thirds).eval()
            before, after = model(given), model(other)
            changed[thirds] = [bool((before[..., third] != after[..., third]).any()) for third in range(3)]
        assert changed == {True: [False, True, False], False: [True, True, True]}

    def test_all_thirds_have_the_same_weights(self):
        model = Detector(1, 2, (4, 8), True).eval()
        turned = torch.cat([images()[:, :, 20:], images()[:, :, :20]], dim=2)
        torch.testing.assert_close(model(turned), model(images()).roll(1, 2))

    def test_features_are_cut_in_thirds_too(self):
        model = Detector(1, 2, (4, 8), False).eval()
        maps = model.encoder.maps(images(size=(36, 32)))
        wanted = torch.stack([model.head(part.amax((2, 3))) for part in maps.chunk(3, dim=2)], dim=2)
        torch.testing.assert_close(model(images(size=(36, 32))), wanted)


class TestFacts:
    def test_they_are_where_the_middles_of_findings_are(self):
        for label, found in zip(labels(8), facts_in(labels(8)), strict=True):
            wanted = set()
            for value in set(label.unique().tolist()) - {0}:
                row = ndimage.center_of_mass(label.numpy() == value)[0]
                wanted.add((FINDINGS[value - 1].kind, FIELDS[int((row + 0.5) // 10)]))
            assert named(found) == wanted

    def test_nothing_and_unlabelled_are_no_facts(self):
        assert not facts_in(torch.zeros(1, 9, 9).byte()).any() and not facts_in(torch.full((1, 9, 9), 255)).any()


@pytest.mark.component("result code")
class TestCode:
    def test_digits_are_the_models_answers_one_after_the_other(self):
        found = torch.zeros(3, 3, dtype=torch.bool)
        found[1, 0] = found[2, 2] = True
        assert result_code(found) == "000100001"

    def test_a_digit_is_one_above_one_half(self, monkeypatch):
        logits = torch.tensor([[[0.1, -0.1, 0.0], [-2.0, 3.0, -1.0], [-1.0, -1.0, -1.0]]])
        monkeypatch.setattr(Reporter, "logits", lambda self, models, given: logits)
        (report,) = TINY.reports({"average": None}, images(1))
        assert report == written("100010000")


@pytest.mark.component("pre-determined sentences")
class TestSentences:
    @pytest.mark.parametrize("some", [CODES[part::8] for part in range(8)])
    def test_what_a_report_states_is_what_its_code_says(self, some):
        """The defining property, for every code there is."""
        for code in some:
            bits = torch.tensor([bit == "1" for bit in code]).view(3, 3)
            assert stated(written(code)) == named(bits) and result_code(bits) == code

    def test_every_code_has_its_own_report(self):
        assert len({written(code) for code in CODES}) == len(CODES)

    def test_a_report_in_full(self):
        assert written("000101001") == (
            "No nodules. Cavity seen in the upper and lower part of the image. "
            "Patch seen in the lower part of the image."
        )
        assert written("0" * 9) == NORMAL and stated(NORMAL) == set()

    def test_other_words_state_facts_too(self):
        assert stated("There is a small cavity, upper field. No nodule in the middle.") == {("cavity", "upper")}


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    budget, task = Budget(steps=4, batch=4, precision="float32", checks=0), FINDINGS_QUICK
    return Loop(TINY, task, budget, "float32", 0, task.samples("labelled"), None, None, False, "cpu").run()


class TestRows:
    def test_they_measure_the_words_of_the_report(self, fitted, monkeypatch):
        case = next(iter(FINDINGS_QUICK.cases("val")))
        truth = facts_in(FINDINGS_QUICK.preparation.both(case)[1])
        for change in (0, 1):
            codes = truth.clone()
            if change:
                codes[:, 0, 0] ^= True
            reports = [written(result_code(code)) for code in codes]
            monkeypatch.setattr(Reporter, "reports", lambda self, nets, given, reports=reports: reports)
            (row,) = report_rows(fitted, case)
            assert row["exact"] == 1 - change and (row["f1"] == 1) == (not change)
            count = truth.flatten(1).sum(1)
            said = codes.flatten(1).sum(1)
            wanted = 2 * (truth & codes).flatten(1).sum(1) / (count + said)
            assert row["f1"] == pytest.approx(wanted.mean().item())
            assert (row["stated"], row["true"]) == (said.float().mean().item(), count.float().mean().item())

    def test_kinds_are_counted_without_their_place(self, fitted, monkeypatch):
        case = next(iter(FINDINGS_QUICK.cases("val")))
        truth = facts_in(FINDINGS_QUICK.preparation.both(case)[1])
        reports = [
            written(result_code(code.any(1, keepdim=True) & (F.one_hot(torch.tensor(1), 3) > 0))) for code in truth
        ]
        monkeypatch.setattr(Reporter, "reports", lambda self, nets, given: reports)
        (row,) = report_rows(fitted, case)
        assert row["kinds"] == 1

    def test_reports_are_really_written(self, fitted):
        found = TINY.reports(fitted.nets.eval(), images(3, (64, 64)))
        assert len(found) == 3 and set(found) <= {written(code) for code in CODES}
