"""Regions at every grain, their alignment with phrases, what contrasts, and the score over all grains."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained

from medcook.data.transforms import NONE
from medcook.language import mask_loss
from medcook.methods import Batch, Moment
from medcook.recipes.language import _one, med_glip
from medcook.recipes.language._findings import FIELDS, SIDES, FindingsTask, Spoken, fields_of
from medcook.recipes.language.med_glip import (
    GRAINS,
    REGION,
    VALUES,
    AlignedUNet,
    HierarchyTask,
    MedGLIP,
    grain_rows,
    means,
)

SMALL = (4, 8, 8, 8)
METHOD = med_glip.recipe.arms["med-glip"].method
PHRASES = {question.sentence: grain for grain, questions in GRAINS.items() for question in questions}


def data(count: int = 4) -> Batch:
    """Images with two findings each, and fields of lungs."""
    torch.manual_seed(1)
    labels, fields = torch.zeros(2, count, 24, 20, dtype=torch.uint8)
    for number in range(count):
        labels[number, 3:8, 3:8], labels[number, 14:20, 10:15] = 1 + number, 30 + number
    fields[:, 2:22, 2:9] = (1 + torch.arange(20) * 3 // 20)[:, None].byte()
    fields[:, 2:22, 11:18] = (4 + torch.arange(20) * 3 // 20)[:, None].byte()
    return Batch(torch.randn(count, 1, 24, 20), labels, raters=fields[:, None])


@pytest.mark.component("hierarchical region labels")
def test_every_grain_is_the_union_of_the_next():
    regions = data(1).raters[:, 0]
    nothing = torch.zeros_like(regions)
    masks = {q.sentence: means(nothing, regions, q)[0] for questions in GRAINS.values() for q in questions}
    assert list(GRAINS) == ["lungs", "side", "field"] and list(map(len, GRAINS.values())) == [1, 2, 6]
    assert torch.equal(masks["both lungs"], regions[0] > 0)
    assert torch.equal(masks["both lungs"], masks["right lung"] | masks["left lung"])
    assert masks["right lung"].nonzero()[:, 1].max() < masks["left lung"].nonzero()[:, 1].min(), "the patient's right"
    for side in SIDES:
        parts = [masks[f"{field} field of the {side} lung"] for field in FIELDS]
        assert torch.equal(torch.stack(parts).sum(0), masks[f"{side} lung"].long())
        heights = [part.nonzero()[:, 0].float().mean() for part in parts]
        assert heights == sorted(heights), "the upper field is on top"


@pytest.mark.component("hierarchical region labels")
def test_values_of_findings_and_of_regions_are_apart():
    labels, regions = torch.tensor([[[0, 1, 6, 36]]]).byte(), torch.tensor([[[1, 0, 2, 6]]]).byte()
    ask = lambda *values: means(labels, regions, med_glip.Question("x", values))[0, 0].tolist()  # noqa: E731
    assert ask(1) == [False, True, False, False] and ask(REGION + 1) == [True, False, False, False]
    assert ask(6, REGION + 6) == [False, False, True, True]
    assert means(labels, None, med_glip.Question("x", (1, 101)))[0, 0].tolist() == [False, True, False, False]


@pytest.mark.component("hierarchical region labels")
def test_samples_come_with_the_fields_that_findings_are_drawn_into():
    task = HierarchyTask("embedded", versions=2)
    samples, plain = task.samples("val"), FindingsTask("embedded", versions=2).samples("val")
    assert torch.equal(samples.images, plain.images) and torch.equal(samples.labels, plain.labels)
    assert samples.raters.shape == (len(samples), 1, 64, 64) and samples.raters.dtype == torch.uint8
    case = next(task.cases("val"))
    organ = super(type(task.preparation), task.preparation).labels(case)[3].numpy() > 0
    for place, mask in fields_of(organ).items():
        for version in (6, 7):
            assert np.array_equal(samples.raters[version, 0].numpy() == VALUES[place] - REGION, mask)


@pytest.mark.component("hierarchical region labels")
def test_a_share_of_the_phrases_names_regions_of_each_grain_but_for_the_ablation():
    batch = data()
    torch.manual_seed(0)
    counts = {"lungs": 0, "side": 0, "field": 0, "finding": 0}
    for _ in range(150):
        for question in METHOD.questions(batch):
            counts[PHRASES.get(question.sentence, "finding")] += 1
    assert counts["finding"] == pytest.approx(360, abs=40)
    assert all(counts[grain] == pytest.approx(80, abs=25) for grain in GRAINS)
    without = med_glip.recipe.arms["findings alone"].method
    assert without == replace(METHOD, hierarchy=0.0)
    assert not {question.sentence for _ in range(30) for question in without.questions(batch)} & {*PHRASES}
    assert len(METHOD.questions(batch._replace(raters=None))) == 4


@pytest.mark.component("grounded language-image alignment")
def test_a_score_is_the_mean_of_a_phrases_words_summed_over_levels():
    torch.manual_seed(0)
    net = AlignedUNet(1, SMALL, 16).eval()
    sentences = ("right lung", "small nodule in the upper field of the left lung")
    maps = net.encode(torch.randn(2, 1, 24, 20))
    assert [level.shape[1:] for level in maps] == [(4, 24, 20), (8, 12, 10), (8, 6, 5)]
    found = net.align(maps, sentences)
    words, empty = net.text.tokens(sentences)
    for phrase in range(2):
        spoken = words[phrase][~empty[phrase]]
        total = 0
        for level, line in zip(maps, net.words, strict=True):
            each = torch.stack([(level * line(word)[:, None, None]).sum(1) for word in spoken])
            total = total + F.interpolate(each.mean(0)[:, None], size=(24, 20), mode="bilinear") / level.shape[1] ** 0.5
        assert torch.allclose(found[:, phrase], total[:, 0] + net.bias(spoken.mean(0)), atol=1e-4)
    assert torch.equal(net.decode(maps, sentences), torch.stack([found[0, 0], found[1, 1]]))


@pytest.mark.component("grounded language-image alignment")
def test_every_phrase_is_scored_in_every_image():
    torch.manual_seed(0)
    scores, truth = torch.randn(3, 3, 5, 6), torch.rand(3, 3, 5, 6) > 0.6
    method = MedGLIP(contrast=0.7)
    mine = [torch.stack([every[k, k] for k in range(3)]) for every in (scores, truth.byte())]
    own = mask_loss(*mine, each=True)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    others = sum(F.binary_cross_entropy_with_logits(scores[i, j], truth[i, j].float()) for i, j in pairs) / 6
    assert torch.allclose(method.alignment_loss(scores, truth), own + 0.7 * others, atol=1e-6)
    pooled = MedGLIP(contrast=0.7, each=False).alignment_loss(scores, truth)
    assert torch.allclose(pooled, mask_loss(*mine, each=False) + 0.7 * others, atol=1e-6) and METHOD.each
    alone = method.alignment_loss(scores[:1, :1], truth[:1, :1])
    assert torch.allclose(alone, mask_loss(scores[0, :1], truth[0, :1].byte(), each=True))


@pytest.mark.component("grounded language-image alignment")
def test_a_step_knows_what_the_phrases_of_others_mean_in_an_image():
    torch.manual_seed(0)
    method, batch, seen = replace(METHOD, channels=SMALL), data(3), []
    asked = [GRAINS["side"][0], med_glip.Question("one", (1, 31)), GRAINS["field"][5]]
    method.questions = lambda batch: asked
    method.alignment_loss = lambda scores, truth: seen.append((scores, truth)) or scores.sum()
    nets = method.build(1, 37, 2)
    method.training_step(nets, batch, None, Moment(0, 1))
    ((scores, truth),) = seen
    assert scores.shape == truth.shape == (3, 3, 24, 20)
    for image in range(3):
        assert torch.equal(truth[image, 0], (batch.raters[image, 0] > 0) & (batch.raters[image, 0] <= 3))
        assert torch.equal(truth[image, 1], (batch.labels[image] == 1) | (batch.labels[image] == 31))
        assert torch.equal(truth[image, 2], batch.raters[image, 0] == 6)


@pytest.mark.component("no expert modules")
def test_all_grains_go_through_the_same_parameters():
    torch.manual_seed(0)
    net = AlignedUNet(1, SMALL, 16)
    used = []
    for grain in (*GRAINS, "finding"):
        sentence = GRAINS[grain][0].sentence if grain in GRAINS else Spoken().name(5)
        net.zero_grad()
        net.decode(net.encode(torch.randn(2, 1, 24, 20)), (sentence, sentence)).square().sum().backward()
        used.append({name for name, weights in net.named_parameters() if weights.grad.abs().sum() > 0})
    assert used[0] == used[1] == used[2] == used[3] == {name for name, _ in net.named_parameters()}


@pytest.mark.component("better than other grounding models")
def test_rows_are_about_findings_and_tell_of_the_other_grains(monkeypatch):
    fields = data(1).raters[:, 0]

    class Method:
        def answer(self, nets, images, sentences):
            masks = {"both lungs": fields[0] > 0, "right lung": fields[0] > 0, "left lung": fields[0] == 0}
            return torch.stack([masks.get(sentence, fields[0] == 1).float() for sentence in sentences])[None]

    nets = torch.nn.ModuleDict()
    preparation = SimpleNamespace(images=lambda case: torch.zeros(3, 1, 24, 20))
    task = SimpleNamespace(preparation=preparation, fields=lambda case: fields.repeat(3, 1, 1))
    fitted = SimpleNamespace(method=Method(), nets=nets, weights={"last": {}}, task=task)
    rows = [{"structure": "one", "dice": 0.5}, {"structure": "absent", "rejected": 0.1}, {"structure": "several"}]
    monkeypatch.setattr(_one, "grounding_rows", lambda fitted, case: rows)
    (row,) = grain_rows(fitted, None)
    assert row["dice"] == 0.5 and row["dice_lungs"] == 1
    assert row["dice_side"] == pytest.approx((2 / 3 + 0) / 2) and row["dice_field"] == pytest.approx(1 / 6)


def test_augmentation_moves_regions_with_the_image():
    batch = data(2)
    turned = METHOD.augment(batch, torch.Generator().manual_seed(0))
    assert turned.raters.shape == batch.raters.shape and not torch.equal(turned.raters, batch.raters)
    still = replace(METHOD, augmentation=NONE).augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(still.raters, batch.raters)


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(size):
    method = MedGLIP(channels=SMALL)
    method.language = replace(method.language, several=0.0)
    method.absent = 0.0
    assert_every_parameter_is_trained(method, size)
