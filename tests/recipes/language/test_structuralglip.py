"""Held-out categories and their descriptions, mutual selection, fusion layer by layer, boxes and average precision."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou as monai_iou

from medcook.language import LONGEST, words_of
from medcook.recipes.language import structuralglip
from medcook.recipes.language._boxes import average_precision, detections, matched
from medcook.recipes.language._described import CATEGORIES, HELD_OUT, LOOKS, TITLES, Categories, category_of
from medcook.recipes.language._findings import FINDINGS, box_of, matching
from medcook.recipes.language.structuralglip import (
    DeepFusion,
    GroundingUNet,
    StructuralGLIP,
    detection_rows,
    highest,
    selected,
)

SMALL = (4, 8, 8, 8)


def boxes(rng: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    corners, sides = rng.integers(0, 20, (count, 2)), rng.integers(3, 12, (count, 2))
    return [(*map(int, corner), *map(int, corner + side)) for corner, side in zip(corners, sides, strict=True)]


@pytest.mark.component("average precision of boxes")
@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_that_of_monai(seed):
    rng, questions = np.random.default_rng(seed), []
    for _ in range(6):
        true = boxes(rng, int(rng.integers(0, 4)))
        near = [
            tuple(int(side) for side in np.array(box) + rng.integers(-1, 2, 4)) for box in true if rng.random() < 0.8
        ]
        found = near + boxes(rng, int(rng.integers(0, 4)))
        questions.append(
            ([(float(score), box) for score, box in zip(rng.random(len(found)), found, strict=True)], true)
        )
    zero = lambda rows: np.zeros(len(rows), int)  # noqa: E731
    found = [sorted(each, key=lambda pair: -pair[0]) for each, _ in questions]
    metric = COCOMetric(["finding"], iou_list=[0.5], max_detection=[100])
    rows = matching_batch(
        iou_fn=monai_iou,
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=[np.array([box for _, box in each], float).reshape(-1, 4) for each in found],
        pred_classes=[zero(each) for each in found],
        pred_scores=[np.array([score for score, _ in each]) for each in found],
        gt_boxes=[np.array(true, float).reshape(-1, 4) for _, true in questions],
        gt_classes=[zero(true) for _, true in questions],
    )
    theirs = metric(rows)[0]["AP_IoU_0.50_MaxDet_100"]
    assert average_precision(questions) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.component("average precision of boxes")
def test_average_precision_in_cases_that_can_be_counted():
    box, far = (0, 0, 4, 4), (20, 20, 24, 24)
    assert average_precision([([(0.9, box)], [box])]) == 1
    assert average_precision([([(0.2, box), (0.9, far)], [box])]) == 0.5
    assert average_precision([([(0.2, box)], [box]), ([(0.9, far)], [])]) == 0.5
    assert average_precision([([], [box])]) == 0 and np.isnan(average_precision([([(0.9, box)], [])]))
    assert matched([(0.3, box), (0.9, box)], [box]) == [(0.9, True), (0.3, False)]
    assert matched([(0.9, (0, 0, 4, 2))], [box]) == [(0.9, True)] and matched([(0.9, (0, 0, 4, 1))], [box]) == [
        (0.9, False)
    ]


@pytest.mark.component("average precision of boxes")
def test_a_detection_is_a_connected_part_and_as_sure_as_its_surest_pixel():
    answer = np.zeros((12, 12))
    answer[1:4, 2:6], answer[2, 3], answer[8:10, 8:11] = 0.4, 0.8, 0.6
    answer[6, 0] = 0.2
    assert detections(answer) == [(0.8, (1, 2, 4, 6)), (0.6, (8, 8, 10, 11))]
    assert detections(np.zeros((4, 4))) == []


@pytest.mark.component("zero-shot detection")
def test_a_third_is_held_out_and_every_two_words_of_it_are_trained_together():
    assert len(HELD_OUT) == 6 and len(CATEGORIES) == len({*TITLES}) == 18
    known = [each for each in CATEGORIES if each not in HELD_OUT]
    for category in HELD_OUT:
        assert all(any({*pair} < {*other} for other in known) for pair in combinations(category, 2))
        assert all(any(word in other for other in known) for word in category)


@pytest.mark.component("zero-shot detection")
def test_training_never_asks_for_what_is_held_out():
    torch.manual_seed(0)
    language, titles, strange = Categories(), set(), 0
    for k in range(600):
        there = (1 + k % 36, 1 + (5 * k) % 36)
        question = language.ask(there, None, k % 4 == 0)
        (category,) = {category_of(value) for value in question.values}
        assert category not in HELD_OUT and question.values == matching(**category._asdict())
        shown = {category_of(value) for value in there} - {*HELD_OUT}
        assert (category in shown) == (k % 4 != 0 and bool(shown))
        title = words_of(question.sentence)[1]
        strange += title.isdigit()
        titles |= set() if title.isdigit() else {title}
        assert title.isdigit() or TITLES[CATEGORIES.index(category)] == title
    assert not titles & {TITLES[CATEGORIES.index(category)] for category in HELD_OUT} and len(titles) == 12
    assert 250 < strange < 350
    language.ask(tuple(range(1, 37)), None, True)


@pytest.mark.component("category-level prompts")
def test_a_description_says_every_word_in_one_of_two_ways_and_fits_into_a_sentence():
    language = Categories()
    for value, finding in enumerate(FINDINGS, 1):
        sentence = language.name(value)
        assert all(LOOKS[word][0] in sentence for word in (finding.kind, finding.size, finding.field))
        assert finding.side not in words_of(sentence) and len(words_of(sentence)) <= LONGEST
    torch.manual_seed(0)
    said = [language.ask((1,), None, True).sentence for _ in range(300)]
    for ways in LOOKS.values():
        assert all(any(way in sentence for sentence in said) for way in ways)
    assert max(len(words_of(sentence)) for sentence in said) <= LONGEST


@pytest.mark.component("mutual selection")
def test_places_and_words_select_each_other():
    """Against loops over heads, places and words."""
    torch.manual_seed(0)
    similar, before = torch.randn(2, 3, 16, 8), torch.randn(2, 16)
    empty = torch.zeros(2, 8, dtype=torch.bool)
    empty[1, 6:] = True
    places, words, resembles = selected(similar, empty, before)
    for image in range(2):
        there = [m for m in range(8) if not empty[image, m]]
        of = lambda n: np.mean([sum(float(similar[image, h, n, m]) for m in there) for h in range(3)])  # noqa: B023, E731
        score = [(of(n) + float(before[image, n])) / 2 for n in range(16)]
        assert np.allclose(resembles[image], score, atol=1e-5)
        best = sorted(range(16), key=lambda n: -score[n])[:4]
        assert {*places[image].nonzero()[:, 0].tolist()} == {*best}
        fits = {m: np.mean([float(similar[image, h, n, m]) for h in range(3) for n in best]) for m in there}
        assert {*words[image].nonzero()[:, 0].tolist()} == {*sorted(there, key=lambda m: -fits[m])[:5]}
    assert torch.allclose(selected(similar, empty, None)[2], 2 * resembles - before, atol=1e-5)


@pytest.mark.component("mutual selection")
def test_few_words_and_small_maps_are_selected_whole():
    empty = torch.tensor([[False, True, True]])
    places, words, _ = selected(torch.randn(1, 2, 2, 3), empty, None)
    assert places.sum() == 1 and words.tolist() == [[True, False, False]]
    assert highest(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[False, True, True]]


def branch(count: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, count, width), torch.zeros(1, count, dtype=torch.bool)


@pytest.mark.component("fusion across modalities in every layer")
@pytest.mark.parametrize("select", [True, False])
def test_places_attend_to_the_words_and_words_to_the_places_that_are_selected(select):
    torch.manual_seed(0)
    layer, maps, target, bank = DeepFusion(6, 8, select, 3), torch.randn(1, 6, 4, 4), branch(2), branch(7)
    after, words, resembles = layer(maps, [target, bank], None)
    places = layer.norms[0](maps[0].flatten(1).T)
    spoken = torch.cat([target[0], bank[0]], dim=1)[0]
    heads = lambda x: x.view(len(x), 4, 2).transpose(0, 1)  # noqa: E731
    query, key = heads(layer.keys[0](places)), heads(layer.keys[1](layer.norms[1](spoken)))
    seen, heard = torch.ones(16, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    if select:
        chosen = selected((query @ key.transpose(1, 2) / 2**0.5)[None], torch.zeros(1, 9, dtype=torch.bool), None)
        seen, heard = chosen[0][0], chosen[1][0]
        assert seen.sum() == 4 and heard.sum() == 5 and torch.allclose(resembles.flatten(), chosen[2][0])
    value = heads(layer.values[1](layer.norms[1](spoken)))
    told = F.scaled_dot_product_attention(query, key[:, heard], value[:, heard]).transpose(0, 1).flatten(1)
    expected = maps[0].flatten(1).T + layer.weights[0] * layer.out[0](told)
    assert torch.allclose(after[0].flatten(1).T, expected, atol=1e-5)
    value = heads(layer.values[0](places))
    shown = F.scaled_dot_product_attention(key, query[:, seen], value[:, seen]).transpose(0, 1).flatten(1)
    fused = spoken + layer.weights[1] * layer.out[1](shown)
    for (found, _), part in zip(words, (fused[:2], fused[2:]), strict=True):
        assert torch.allclose(found[0], layer.speak(part[None])[0], atol=1e-5), "each branch is read on its own"


@pytest.mark.component("fusion across modalities in every layer")
def test_layers_are_the_three_coarsest_levels_and_hand_on_what_they_selected():
    torch.manual_seed(0)
    net, seen = GroundingUNet(1, (4, 8, 8, 8), 8, True, True).eval(), []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[2], inputs[2])))
    net(torch.randn(1, 1, 32, 32), ("finding alpha: small",))
    assert [side for side, _ in seen] == [4, 8, 16]
    assert seen[0][1] is None and [before.shape[2:] for _, before in seen[1:]] == [(4, 4), (8, 8)]


@pytest.mark.component("prompts as a latent knowledge bank")
def test_the_description_is_a_branch_of_its_own_that_the_target_does_not_read():
    torch.manual_seed(0)
    net = GroundingUNet(1, SMALL, 8, True, True).eval()
    one, other = ("finding alpha: round and small",), ("finding alpha: large",)
    (name, _), (looks, none) = net.listen(one)
    assert name.shape[1] == 2 and looks.shape[1] == 3 and torch.equal(name, net.listen(other)[0][0])
    assert torch.allclose(looks, net.text.tokens(("round and small",))[0]) and not none.any()
    images = torch.randn(1, 1, 16, 16)
    assert not torch.allclose(net(images, one), net(images, other), atol=1e-4), "but it changes the answer"
    arms = {name: arm.method for name, arm in structuralglip.recipe.arms.items()}
    assert arms["without bank"] == replace(arms["structuralglip"], bank=False, select=False)
    assert arms["without selection"] == replace(arms["structuralglip"], select=False)
    assert all(method.language == arms["one prompt"].language for method in arms.values())
    single = GroundingUNet(1, SMALL, 8, False, False)
    single.load_state_dict(net.state_dict())
    ((words, _),) = single.listen(one)
    assert torch.allclose(words, net.text.tokens(one)[0])


def test_every_image_hears_its_own_sentence():
    torch.manual_seed(0)
    net, images = GroundingUNet(1, SMALL, 8, True, True).eval(), torch.randn(2, 1, 24, 20)
    sentences = ("finding alpha: round, small", "finding beta: cloudy and uneven with a blurred edge, at the top")
    both = net(images, sentences)
    assert both.shape == (2, 24, 20)
    for row in range(2):
        assert torch.allclose(both[row], net(images[row : row + 1], sentences[row : row + 1])[0], atol=1e-4)


@pytest.mark.component("zero-shot detection")
def test_the_score_asks_for_all_that_is_held_out_and_for_what_is_there():
    label, asked = torch.zeros(1, 32, 32, dtype=torch.uint8), []
    held = next(value for value in range(1, 37) if category_of(value) in HELD_OUT)
    known = next(value for value in range(1, 37) if category_of(value) not in HELD_OUT)
    label[0, 4:10, 4:10], label[0, 20:28, 18:26] = held, known

    class Method:
        language = Categories()

        def answer(self, nets, images, sentences):
            asked.extend(sentences)
            answers = torch.zeros(1, len(sentences), 32, 32)
            for number, sentence in enumerate(sentences):
                if sentence == self.language.name(held):
                    answers[0, number] = 0.9 * (label[0] == held)
                elif sentence == self.language.name(known):
                    answers[0, number, :4, :4] = 0.9
                else:
                    answers[0, number, 14:18, 2:8] = 0.95  # false alarms, and surer
            return answers

    nets = torch.nn.ModuleDict()
    task = SimpleNamespace(preparation=SimpleNamespace(both=lambda case: (torch.zeros(1, 1, 32, 32), label)))
    fitted = SimpleNamespace(method=Method(), nets=nets, weights={"last": nets.state_dict()}, task=task)
    (row,) = detection_rows(fitted, SimpleNamespace(case_id="a", patient_id="a"))
    assert asked == [*map(Method.language.say, HELD_OUT), Method.language.name(known)]
    assert row["ap"] == pytest.approx(1 / 6) and row["ap_trained"] == 0
    assert box_of((label[0] == held).numpy()) == (4, 4, 10, 10)
    label[label == held] = 0
    assert detection_rows(fitted, SimpleNamespace(case_id="a", patient_id="a")) == []


@pytest.mark.parametrize("settings", [{}, {"bank": False, "select": False}, {"select": False}])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(settings, size):
    assert_every_parameter_is_trained(StructuralGLIP(channels=SMALL, **settings), size)
