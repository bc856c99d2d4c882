"""MeDSLIP: what reports state of signs and places, the two streams, their losses, and where a sign is found."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.language import _streams, medslip
from medcook.recipes.language._reading import BRAINS
from medcook.recipes.language._streams import (
    PATHOLOGIES,
    PLACES,
    Stream,
    TwoStreams,
    known_entropy,
    marks,
    parts_of,
    prototype_loss,
    stated,
)
from medcook.recipes.language.convirt import ConVIRT
from medcook.recipes.language.medslip import MeDSLIP, lean, points_right, recipe, side_rows, sign_map
from medcook.tasks import Budget
from medcook.training import Loop, unlabelled_samples

TINY = MeDSLIP(start="random", channels=(4, 8, 8), width=16)
REPORTS = ("PTB in the right upper field, left pleural effusion", "normal", "cavity", "bilateral scars")
READS = Moment(0, 9)


def built(method=TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 2, 2)


def maps(count: int = 4, channels: int = 8):
    return torch.rand(count, channels, 5, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.component("concepts from reports")
class TestConcepts:
    def test_a_part_without_a_place_speaks_of_the_last(self):
        found = parts_of("Left secondary PTB in the upper and middle fields, mainly fibrous lesions; right effusion")
        left = frozenset({"left", "upper", "middle"})
        assert [places for _, places in found] == [left, left, {"right"}]
        assert [sorted(signs) for signs, _ in found] == [["tuberculosis"], ["scars"], ["effusion"]]
        assert parts_of("normal") == []

    def test_what_is_stated_denied_and_unknown(self):
        found, sign, place = stated(REPORTS), PATHOLOGIES.index, PLACES.index
        assert found.pairs[0, sign("tuberculosis")].tolist() == [1, 0, 1, 0, 0]
        assert found.pairs[0, sign("effusion")].tolist() == [0, 1, -1, -1, -1]
        assert (found.pairs[0, sign("cavity")] == -1).all()
        assert found.places[0].tolist() == [1, 1, 1, 0, 0]
        for part in found:
            assert (part[1] == 0).all(), "nothing is anywhere in a normal one"
        assert found.signs[2].tolist() == [int(name == "cavity") * 2 - 1 for name in PATHOLOGIES]
        assert (found.pairs[2] == -1).all()
        assert found.pairs[3, sign("scars"), [place("right"), place("left")]].tolist() == [1, 1]

    def test_marks(self):
        assert marks(frozenset({"lower"})).tolist() == [-1, -1, 0, 0, 1]
        assert marks(frozenset()).tolist() == [-1] * 5


@pytest.mark.component("anatomy-relevant and pathology-relevant streams")
class TestStreams:
    def test_the_two_shares_are_the_whole_and_differ(self):
        torch.manual_seed(0)
        streams, patches = TwoStreams(8, 16), torch.randn(2, 6, 8)
        what, where = streams.halves(patches)
        torch.testing.assert_close(what + where, patches)
        share = torch.sigmoid(patches @ streams.gate.weight.T + streams.gate.bias)
        torch.testing.assert_close(what, share * patches)

    def test_each_stream_sees_its_share_and_answers_its_book(self):
        torch.manual_seed(0)
        streams = TwoStreams(8, 16)
        patches = maps().flatten(2).transpose(1, 2)
        halves = dict(zip(("pathology", "anatomy"), streams.halves(patches), strict=True))
        books = {"pathology": _streams.PATHOLOGY_BOOK, "anatomy": _streams.ANATOMY_BOOK}
        for name, (answers, where, book) in streams(maps()).items():
            torch.testing.assert_close(book, streams.text(books[name]))
            wanted, attention = getattr(streams, name)(halves[name], book)
            torch.testing.assert_close(answers, wanted)
            torch.testing.assert_close(where.flatten(2), attention)
        assert len(_streams.PATHOLOGY_BOOK) == 8 and len(_streams.ANATOMY_BOOK) == 5

    def test_the_ablation_has_one_stream_and_every_loss(self):
        method, without = (recipe.arms[name].method for name in recipe.ablation)
        assert replace(without, together=False) == method
        one = TwoStreams(8, 16, together=True)
        assert one.anatomy is one.pathology and one.gate is None
        truth, ours = stated(REPORTS), replace(TINY, together=True)
        assert set(ours.losses(one, maps(), truth)) == set(TINY.losses(TwoStreams(8, 16), maps(), truth))

    def test_reading_trains_every_part_in_either_precision(self):
        images = torch.randn(4, 1, 32, 32)
        for mixed in (False, True):
            nets = built()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = TINY.reading(nets, images, REPORTS, READS)
            loss.backward()
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            for part in (nets["model"].encoder, nets["pretext"]):
                assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
                assert all(p.grad.abs().max() > 0 for name, p in part.named_parameters() if "in_proj" not in name)

    @pytest.mark.parametrize("size", [(16, 16), (37, 50)])
    def test_any_size(self, size):
        nets = built().eval()
        loss = TINY.reading(nets, torch.randn(2, 1, *size), ("normal", "scars"), READS)
        assert torch.isfinite(loss) and TINY.predict(nets, torch.randn(2, 1, *size)).shape == (2, 2, *size)


@pytest.mark.component("texts attend to patches")
def test_an_answer_is_a_weighted_mean_of_patches_head_by_head():
    torch.manual_seed(0)
    stream, patches, book = Stream(8, 16).double(), torch.randn(2, 6, 8).double(), torch.randn(3, 16).double()
    answers, where = stream(patches, book)
    keys, width = stream.project(patches), 16
    weight, bias = stream.attend.in_proj_weight, stream.attend.in_proj_bias
    q, k, v = (x @ weight[n * width : (n + 1) * width].T + bias[n * width : (n + 1) * width]
               for n, x in enumerate((stream.asked(book).expand(2, -1, -1), keys, keys)))  # fmt: skip
    shares, values = [], []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        share = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(2)
        shares.append(share), values.append(share @ v[..., part])
    found = book + stream.attend.out_proj(torch.cat(values, 2))
    torch.testing.assert_close(answers, found + stream.mix(stream.mixed(found)))
    torch.testing.assert_close(where, torch.stack(shares).mean(0))


@pytest.mark.component("prototypical contrastive learning (ProtoCL)")
class TestProtoCL:
    def test_it_is_one_by_one_what_it_says(self):
        torch.manual_seed(0)
        answers, book = torch.randn(2, 3, 4).double(), torch.randn(5, 4).double()
        pairs = torch.tensor(
            [[[1, 0, 1, 0, -1], [-1] * 5, [0] * 5], [[-1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, -1, -1, -1, -1]]]
        )
        cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
        losses = []
        for b in range(2):
            for q in range(3):
                own = [r for r in range(5) if pairs[b, q, r] == 1]
                if own:
                    good = math.exp(cosine(answers[b, q], book[own].mean(0)) / 0.1)
                    bad = [math.exp(cosine(answers[b, q], book[r]) / 0.1) for r in range(5) if pairs[b, q, r] == 0]
                    losses.append(-math.log(good / (good + sum(bad))))
        assert len(losses) == 4
        assert prototype_loss(answers, pairs, book, 0.1).item() == pytest.approx(np.mean(losses))

    def test_nothing_stated_is_no_loss(self):
        answers = torch.randn(2, 3, 4, requires_grad=True)
        assert prototype_loss(answers, torch.zeros(2, 3, 5).long(), torch.randn(5, 4), 0.1).item() == 0

    def test_each_stream_meets_the_book_of_the_other(self):
        streams, truth = TwoStreams(8, 16), stated(REPORTS)
        found = streams(maps())
        losses = TINY.losses(streams, maps(), truth)
        (what, _, signs), (where, _, places) = found["pathology"], found["anatomy"]
        mine = prototype_loss(streams.pathology.speak(what), truth.pairs, places, 0.1)
        theirs = prototype_loss(streams.anatomy.speak(where), truth.pairs.transpose(1, 2), signs, 0.1)
        assert losses["sign prototypes"].item() == pytest.approx(mine.item())
        assert losses["place prototypes"].item() == pytest.approx(theirs.item())
        assert mine.item() > 0 and theirs.item() > 0


@pytest.mark.component("intra-image contrastive learning (ICL)")
class TestICL:
    def test_it_asks_every_stated_pair_of_one_image(self):
        streams, truth = TwoStreams(8, 16), stated(REPORTS)
        found = streams(maps())
        what, where = found["pathology"][0], found["anatomy"][0]
        losses = []
        for b, s, r in torch.argwhere(truth.pairs >= 0).tolist():
            chance = torch.sigmoid(what[b, s] @ where[b, r] / 4)
            losses.append(-(chance if truth.pairs[b, s, r] == 1 else 1 - chance).log().item())
        assert TINY.losses(streams, maps(), truth)["intra"].item() == pytest.approx(np.mean(losses), rel=1e-4)

    def test_what_is_unknown_does_not_count(self):
        logits, truth = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1, 0, -1])
        wanted = F.binary_cross_entropy_with_logits(logits[:2], torch.tensor([1.0, 0.0]))
        assert known_entropy(logits, truth).item() == pytest.approx(wanted.item())
        assert known_entropy(logits, torch.full((3,), -1)).item() == 0

    def test_presence_is_asked_in_both_streams(self):
        streams, truth = TwoStreams(8, 16), stated(REPORTS)
        losses, found = replace(TINY, proto=False, intra=False).losses(streams, maps(), truth), streams(maps())
        assert set(losses) == {"signs", "places"}
        for name, stream in (("signs", "pathology"), ("places", "anatomy")):
            logits = getattr(streams, stream).there(found[stream][0])[..., 0]
            assert losses[name].item() == pytest.approx(known_entropy(logits, getattr(truth, name)).item())


LUNGS = np.zeros((12, 12), bool)
LUNGS[2:10, 1:5] = LUNGS[2:10, 7:11] = True


@pytest.fixture(scope="module", params=[TINY, ConVIRT(start="random", channels=(4, 8, 8), width=16)])
def fitted(request):
    task, budget = replace(BRAINS, labelled=4), Budget(steps=4, batch=4, precision="float32", checks=0)
    method = request.param
    extra = unlabelled_samples(method, task)
    loop = Loop(method, task, budget, "float32", 0, task.samples("labelled"), extra, None, False, accelerator="cpu")
    return loop.run()


@pytest.mark.component("grounding")
class TestGrounding:
    def test_the_right_lung_is_on_the_left_of_the_image(self):
        found = np.zeros((12, 12))
        found[:, :6], found[0, 11] = 1, 9  # and a spot outside of the lungs
        assert lean(found, LUNGS) == pytest.approx(2, rel=1e-4) and points_right(found, LUNGS)
        assert lean(found[:, ::-1] * 3 + 1, LUNGS) == pytest.approx(-2, rel=1e-4)
        assert not points_right(found[:, ::-1], LUNGS)
        assert lean(found, np.zeros_like(LUNGS)) == 0

    def test_a_map_is_the_mean_attention_of_its_signs(self):
        nets, images = built().eval(), torch.randn(2, 1, 32, 32)
        where = nets["reader"]["pretext"]["streams"](nets["reader"]["model"].maps(images))["pathology"][1]
        signs = frozenset({"cavity", "scars"})
        wanted = (where[:, PATHOLOGIES.index("cavity")] + where[:, PATHOLOGIES.index("scars")]) / 2
        torch.testing.assert_close(sign_map(TINY, nets["reader"], images, signs), wanted)

    def test_of_whole_reports_it_is_the_similarity_patch_by_patch(self):
        method = ConVIRT(start="random", channels=(4, 8, 8), width=16)
        nets, images = built(method).eval(), torch.randn(2, 1, 32, 32)
        reader = nets["reader"]
        found, patches = sign_map(method, reader, images, frozenset({"scars"})), reader["model"].maps(images)
        text = method.heard(reader, ("scars",))[0]
        wanted = F.cosine_similarity(reader["pretext"]["see"](patches[1, :, 3, 2]), text, dim=0)
        assert found.shape == (2, *patches.shape[2:]) and found[1, 3, 2].item() == pytest.approx(
            wanted.item(), rel=1e-4
        )

    def test_rows_are_of_reports_that_name_one_side_and_a_sign(self, fitted, monkeypatch):
        case = next(iter(fitted.task.cases("val")))
        (row,) = side_rows(fitted, case)
        assert np.isfinite(row["score"]) and row["outcome"] in (0, 1) and 0 <= row["pointed"] <= 1
        data = SimpleNamespace(manifest=SimpleNamespace(simulated=False))
        told = {"right PTB": 1, "left scars": 0, "bilateral PTB": None, "normal": None, "right": None}
        for report, right in told.items():
            monkeypatch.setattr(medslip, "reports_of", lambda _, report=report: {case.case_id: report})
            facts = medslip.told_of(SimpleNamespace(data=data), case)
            assert (facts is None) == (right is None) and (facts is None or ("right" in facts.sides) == bool(right))

    def test_labels_do_not_touch_the_reader(self):
        nets = built()
        before = [weight.clone() for weight in nets["reader"].parameters()]
        data = Batch(torch.randn(2, 1, 32, 32), torch.zeros(2, 32, 32).byte())
        unlabelled = data._replace(labels=torch.full_like(data.labels, IGNORE), groups=torch.arange(2))
        TINY.training_step(nets, data, unlabelled, Moment(8, 9)).backward()
        TINY.after_step(nets, Moment(8, 9))
        assert all(map(torch.equal, nets["reader"].parameters(), before))
