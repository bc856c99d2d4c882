"""Asking in words, see medcook/language.py."""

import pytest
import torch
import torch.nn.functional as F

from medcook import language
from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.language import Modulation, Names, Question, TextEncoder, Told, ToldUNet, mask_loss, meant
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.tasks import Budget, Task
from medcook.training import fit


def test_words_are_lower_case_letters_and_numbers():
    assert language.words_of("The LEFT lung, field 2!") == ["the", "left", "lung", "field", "2"]
    assert len(language.words_of("word " * 50)) == language.LONGEST


def test_a_word_has_one_row_wherever_it_stands():
    rows = language.tokens_of(("left lung", "lung"))
    assert rows.shape == (2, 2) and rows[0, 1] == rows[1, 0] and rows[1, 1] == 0
    assert rows[0].min() > 0 and rows.max() < language.BUCKETS


def test_a_sentence_without_words_is_refused():
    with pytest.raises(MedcookError, match="no words"):
        language.tokens_of(("left", "!?"))


def test_a_sentence_does_not_depend_on_the_length_of_its_neighbours():
    torch.manual_seed(0)
    text = TextEncoder(16).eval()
    alone = text(("small nodule",))
    beside = text(("small nodule", "a large cavity in the upper field of the right lung"))
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_the_order_of_words_matters():
    torch.manual_seed(0)
    text = TextEncoder(16)
    assert not torch.allclose(text(("left of the right",)), text(("right of the left",)), atol=1e-4)


def test_modulation_changes_nothing_at_the_start_and_then_scales_and_shifts_channels():
    modulate, maps, vectors = Modulation(3, 4), torch.randn(2, 3, 5, 6), torch.randn(2, 4)
    assert torch.equal(modulate(maps, vectors), maps)
    torch.nn.init.normal_(modulate.line.weight)
    scale, shift = modulate.line(vectors).chunk(2, 1)
    expected = torch.stack([maps[b, c] * (1 + scale[b, c]) + shift[b, c] for b in range(2) for c in range(3)])
    assert torch.allclose(modulate(maps, vectors).flatten(0, 1), expected, atol=1e-6)


def test_every_image_hears_its_own_sentence():
    torch.manual_seed(0)
    net = ToldUNet(1, (4, 8, 8), 16).eval()
    for part in net.modules():
        if isinstance(part, Modulation):
            torch.nn.init.normal_(part.line.weight)
    images = torch.randn(2, 1, 24, 20)
    both = net(images, ("left lung", "heart"))
    assert both.shape == (2, 24, 20)
    assert torch.allclose(both[1], net(images[1:], ("heart",))[0], atol=1e-4)
    assert not torch.allclose(both[1], net(images[1:], ("left lung",))[0], atol=1e-2)


def test_names_ask_for_what_is_there_and_at_times_for_what_is_not():
    names = Names(("liver", "spleen", "cell"), sets=(0, 0, 1), partial=(0,))
    torch.manual_seed(0)
    asked = [names.ask((1,), 0, False) for _ in range(20)]
    assert {question.values for question in asked} == {(1,)} and all("liver" in question.sentence for question in asked)
    assert len({question.sentence for question in asked}) == 3
    absent = [names.ask((1,), 0, True) for _ in range(20)]
    assert {question.values for question in absent} == {()}
    assert all("cell" in question.sentence for question in absent), "the spleen may be there without being drawn"


def test_nobody_asks_for_what_has_no_name():
    names = Names(("liver", ""))
    torch.manual_seed(0)
    asked = [names.ask((1, 2), None, False) for _ in range(20)]
    assert {question.values for question in asked} == {(1,)}
    others = [names.ask((2,), None, False) for _ in range(20)]
    assert all(question.values == () and "liver" in question.sentence for question in others)
    assert names.name(2) == "structure 2"


def test_what_a_question_means_is_the_union_of_its_values_and_unlabelled_stays_so():
    labels = torch.tensor([[[0, 1, 2, 3, IGNORE]]] * 2, dtype=torch.uint8)
    masks = meant(labels, [Question("some", (1, 3)), Question("none", ())])
    assert masks[:, 0].tolist() == [[0, 1, 0, 1, IGNORE], [0, 0, 0, 0, IGNORE]]


def test_pooled_it_is_the_books_loss_of_two_classes():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 6, 5), torch.randint(0, 2, (3, 6, 5), dtype=torch.uint8)
    masks[0, 0] = IGNORE
    two = torch.stack([-logits / 2, logits / 2], dim=1)
    assert torch.allclose(mask_loss(logits, masks, each=False), find_loss("both")(two, masks), atol=1e-5)


def test_each_image_has_its_own_dice():
    logits = torch.full((2, 4, 4), -9.0)
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    logits[0], masks[0] = 9.0, 1  # a large answer is right
    masks[1, 0, 0] = 1  # a small one is missed
    entropy = F.binary_cross_entropy_with_logits(logits, masks.float())
    assert mask_loss(logits, masks, each=False) - entropy < 0.05
    assert mask_loss(logits, masks, each=True) - entropy == pytest.approx(0.25, abs=0.01)  # (0 + 1 - 1 / 2) / 2


def test_every_parameter_learns():
    torch.manual_seed(0)
    method = Told(channels=(4, 8), language=Names(("a", "b")), absent=0.0)
    nets = method.build(1, 3, 2)
    for part in nets.modules():
        if isinstance(part, Modulation):
            torch.nn.init.normal_(part.line.weight)
    batch = Batch(torch.randn(4, 1, 16, 16), torch.randint(0, 3, (4, 16, 16), dtype=torch.uint8))
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in nets["model"].parameters())


def test_told_learns_two_names_on_the_embedded_cohort():
    names = Names(("grey matter", "white matter", "ventricles"))
    method = Told(channels=(8, 16, 16), language=names, absent=0.0)
    fitted = fit(method, Task("embedded", labelled=2), Budget(60, 8, "float32", 0), cache=False, progress=False)
    losses = fitted.history["loss"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    case = next(fitted.task.cases("val"))
    answers = fitted.method.answer(fitted.nets.eval(), fitted.task.preparation.images(case), ("white matter", "cell"))
    assert answers.shape[1] == 2 and float(answers.min()) >= 0 and float(answers.max()) <= 1
    assert torch.allclose(fitted.answer(fitted.task.preparation.images(case)).sum(1), torch.ones(()), atol=1e-5)
