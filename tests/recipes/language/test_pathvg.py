"""Terms and what is known of them, how knowledge is fused with an expression, and the score that asks unheard terms."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained

from medcook.language import row_of, words_of
from medcook.recipes.language import _terms, pathvg
from medcook.recipes.language._findings import FINDINGS, box_iou, box_of, value_of
from medcook.recipes.language._terms import (
    IMPLICIT,
    KNOWN,
    PLAIN,
    UNHEARD,
    Terms,
    estranged,
    facts_about,
    terms_in,
)
from medcook.recipes.language.pathvg import KnowingUNet, KnowledgeFusion, PKNet, grounded, implicit_rows

SMALL = (4, 8, 8)


def heard(language: Terms, count: int = 600) -> list:
    """Questions of training about images that show two findings."""
    torch.manual_seed(0)
    return [language.ask((1 + k % 36, 1 + (k + 7) % 36), None, k % 5 == 0) for k in range(count)]


@pytest.mark.component("implicit terms turned into explicit visual features")
def test_each_term_has_its_own_sentence_that_does_not_name_the_plain_term():
    terms = [*PLAIN.values(), *UNHEARD.values(), *(term for each in IMPLICIT.values() for term in each)]
    assert sorted(terms) == sorted(KNOWN) and len({*KNOWN.values()}) == len(KNOWN) == 24
    for word, term in (*UNHEARD.items(), *((word, term) for word, each in IMPLICIT.items() for term in each)):
        assert word not in words_of(KNOWN[term]) and word not in words_of(term)


@pytest.mark.component("implicit terms turned into explicit visual features")
def test_training_never_uses_the_terms_of_the_score_but_knows_most_words_of_their_sentences():
    questions = heard(Terms())
    said = " ".join(question.sentence for question in questions)
    assert not any(term in said for term in UNHEARD.values())
    assert all(term in said for term in (*PLAIN.values(), *(term for each in IMPLICIT.values() for term in each)))
    words = {word for question in questions for fact in facts_about(question.sentence) for word in words_of(fact)}
    for word, term in UNHEARD.items():
        mine = words_of(KNOWN[term])
        assert np.mean([each in words for each in mine]) > 0.65, word
    rows = {row_of(word) for word in words_of(said)} | {row_of(word) for word in words}
    strange = {word for term in UNHEARD.values() for word in words_of(term)} - words - {"zone"}
    assert len(strange) == 6 and not rows & {row_of(word) for word in strange}, "nor words that share a row with them"


@pytest.mark.component("implicit terms turned into explicit visual features")
def test_terms_are_looked_up_as_they_come():
    sentence = "left lung, costophrenic zone: coin lesion, small"
    assert terms_in(sentence) == ["costophrenic zone", "coin lesion"]
    assert facts_about(sentence) == (KNOWN["costophrenic zone"], KNOWN["coin lesion"])
    assert facts_about("baseline patches of apexes") == ()


@pytest.mark.component("visual grounding by expressions with attributes")
def test_an_expression_means_one_combination_and_half_of_them_are_implicit():
    language = Terms()
    for value, finding in enumerate(FINDINGS, 1):
        plain, unheard = language.name(value), language.unheard(value)
        assert terms_in(plain) == [PLAIN[finding.kind], PLAIN[finding.field]]
        assert terms_in(unheard) == [UNHEARD[finding.kind], UNHEARD[finding.field]]
        for sentence in (plain, unheard):
            assert finding.size in words_of(sentence) and finding.side in words_of(sentence)
    means = {term: word for word, term in PLAIN.items()}
    means |= {term: word for word, each in IMPLICIT.items() for term in each}
    implicit = []
    for question in heard(language):
        (value,) = question.values
        finding, terms = FINDINGS[value - 1], terms_in(question.sentence)
        assert {means[term] for term in terms} == {finding.kind, finding.field} and len(terms) == 2
        implicit += [term not in PLAIN.values() for term in terms]
    assert 0.45 < np.mean(implicit) < 0.55
    assert not any(terms_in(q.sentence)[0] not in PLAIN.values() for q in heard(Terms(implicit=0.0), 20))
    everywhere = tuple(range(1, 37))
    assert language.ask(everywhere, None, True).values[0] in everywhere


@pytest.mark.component("knowledge fusion module")
def test_fusion_adds_what_the_knowledge_says_through_a_gate():
    torch.manual_seed(0)
    fusion, words, known = KnowledgeFusion(8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    empty = torch.zeros(2, 5, dtype=torch.bool)
    empty[1, 3:] = True
    found = fusion(words, known, empty)
    q, k, v = fusion.attention.in_proj_weight.chunk(3)
    for row in range(2):
        said = fusion.norms[1](known[row][~empty[row]])
        projected = (fusion.norms[0](words[row]) @ q.T, said @ k.T, said @ v.T)
        heads = [F.scaled_dot_product_attention(*(x[:, n : n + 2] for x in projected)) for n in range(0, 8, 2)]
        told = fusion.attention.out_proj(torch.cat(heads, dim=1))
        gate = torch.sigmoid(fusion.gate(torch.cat([words[row], told], dim=1)))
        assert torch.allclose(found[row], words[row] + gate * told, atol=1e-5)


def network(**settings) -> KnowingUNet:
    torch.manual_seed(0)
    return KnowingUNet(1, SMALL, 16, **({"knowledge": True, "hide": 0.0} | settings)).eval()


@pytest.mark.component("knowledge fusion module")
def test_each_expression_gets_the_words_of_its_own_facts():
    net = network()
    sentences = (
        "small abscess in the base of the left lung",
        "all nodules",
        "large patch in the apex of the left lung",
    )
    words, empty = net.text.tokens(sentences)
    known, none = net.known([facts_about(sentence) for sentence in sentences], words, empty)
    for row, facts in enumerate((("abscess", "base"), (), ("patch", "apex"))):
        parts = [net.text.tokens((KNOWN[term],))[0][0] for term in facts] or [words[row][~empty[row]]]
        assert torch.allclose(known[row][~none[row]], torch.cat(parts), atol=1e-5)


@pytest.mark.component("knowledge fusion module")
def test_understanding_does_not_depend_on_neighbours():
    net = network()
    sentences = ("small abscess in the base of the left lung", "all findings", "large patch in the right lung, apex")
    together = net.understand(sentences)
    assert torch.allclose(together, torch.cat([net.understand((each,)) for each in sentences]), atol=1e-5)


@pytest.mark.component("implicit terms turned into explicit visual features")
def test_what_is_known_changes_what_is_understood_but_for_the_ablation(monkeypatch):
    sentence = ("small abscess in the left lung",)
    nets = [network(), network(knowledge=False)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = [net.understand(sentence) for net in nets]
    monkeypatch.setitem(_terms.KNOWN, "abscess", "A cloudy area with a blurred edge.")
    after = [net.understand(sentence) for net in nets]
    assert not torch.allclose(before[0], after[0], atol=1e-4) and torch.equal(before[1], after[1])
    arms = {name: arm.method for name, arm in pathvg.recipe.arms.items()}
    assert arms["without knowledge"] == replace(arms["pknet"], knowledge=False)
    assert arms["expression alone"].language == arms["pknet"].language


@pytest.mark.component("hidden terms")
def test_made_up_words_replace_terms_and_nothing_else():
    torch.manual_seed(0)
    sentence = "there is a small coin lesion in the left lung, hilar zone"
    assert estranged(sentence, 0.0) == sentence
    words = set()
    for _ in range(50):
        found = re.fullmatch(r"there is a small (\d+) in the left lung, (\d+)", estranged(sentence, 1.0))
        words |= {*found.groups()}
    assert len(words) > 90
    kept = np.mean(["hilar zone" in estranged(sentence, 0.3) for _ in range(300)])
    assert kept == pytest.approx(0.7, abs=0.08)


@pytest.mark.component("hidden terms")
def test_terms_are_hidden_in_training_alone_and_what_is_known_stays():
    net, sentence, read = network(hide=1.0), ("small abscess in the base of the left lung",), []
    tokens = net.text.tokens
    net.text.tokens = lambda sentences: read.append(list(sentences)) or tokens(sentences)
    net.understand(sentence)
    net.train().understand(sentence)
    (plain, facts), (hidden, same) = read[:2], read[2:]
    assert plain == [*sentence] and facts == same == sorted(facts_about(sentence[0]))
    assert re.fullmatch(r"small \d+ in the \d+ of the left lung", hidden[0])


@pytest.mark.component("visual grounding by expressions with attributes")
def test_a_hit_is_about_the_surest_part_of_an_answer():
    truth, answer = np.zeros((2, 32, 32))
    truth[4:10, 4:10], answer[4:10, 4:9], answer[20:30, 20:30] = 1, 0.9, 0.7
    found = grounded(answer, truth > 0)
    assert found["hit"] == 1 and found["dice"] == pytest.approx(60 / 166)
    assert grounded(answer / 1.5, truth > 0)["hit"] == 1
    answer[25, 25] = 0.95
    assert grounded(answer, truth > 0)["hit"] == 0 and grounded(answer / 2, truth > 0)["hit"] == 0


@pytest.mark.component("visual grounding by expressions with attributes")
def test_the_score_asks_for_what_is_there_in_unheard_and_in_plain_terms():
    label = torch.zeros(2, 32, 32, dtype=torch.uint8)
    values = [value_of(FINDINGS[k]) for k in (3, 20)]
    label[0, 4:10, 4:10], label[0, 20:28, 18:26] = values
    asked = []

    class Method:
        language = Terms()

        def answer(self, nets, images, sentences):
            asked.extend(sentences)
            answers = torch.zeros(1, len(sentences), 32, 32)
            answers[0, 1::2] = (label[0] > 0) & (label[0] == values[0])  # plain: always the first finding
            answers[0, 0, 20:28, 20:28] = 0.9  # unheard: asked for the first, most of the second
            answers[0, 2, 20:28, 20:28] = 0.9
            return answers

    nets = torch.nn.ModuleDict()
    task = SimpleNamespace(preparation=SimpleNamespace(both=lambda case: (torch.zeros(2, 1, 32, 32), label)))
    fitted = SimpleNamespace(method=Method(), nets=nets, weights={"last": nets.state_dict()}, task=task)
    case = SimpleNamespace(case_id="a", patient_id="a")
    (row,) = implicit_rows(fitted, case)
    language = Method.language
    assert asked == [say(value) for value in sorted(values) for say in (language.unheard, language.name)]
    overlap = box_iou(box_of((label[0] == values[1]).numpy()), (20, 20, 28, 28))
    assert overlap >= 0.5 and row["structure"] == "implicit"
    assert row["hit"] == 0.5 and row["hit_plain"] == 0.5 and row["dice_plain"] == 0.5 and row["pointed"] == 0.5
    label.zero_()
    assert implicit_rows(fitted, case) == []


@pytest.mark.parametrize("settings", [{}, {"knowledge": False}])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(settings, size):
    assert_every_parameter_is_trained(PKNet(channels=SMALL, **settings), size)
