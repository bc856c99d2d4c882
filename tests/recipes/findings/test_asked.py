"""Conversations in which experts are asked: what they found as text, and what is said of a patient."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from medcook.networks.vila import IMAGE
from medcook.recipes.findings import _asked as asked
from medcook.recipes.findings._asked import CALLS, STOP, TOPICS, UNKNOWN, WORDS, Measure, written
from medcook.recipes.findings._experts import Findings, coloured, overlay
from medcook.recipes.findings.vila_m3 import BRAINS


@pytest.mark.component("the model calls an expert by a word")
class TestCalls:
    def test_a_word_that_calls_brings_what_the_expert_found(self):
        script = {
            0: [CALLS["CXR"], "yes", STOP],
            1: ["no", STOP, STOP],
            2: [CALLS["LUNGS"], CALLS["LUNGS"], "large", STOP],
        }
        rows = []

        def next_words(lines):
            rows.append([list(row) for row in lines])
            words = [script[k][min(len(rows), len(script[k])) - 1] for k in range(3)]
            return F.one_hot(torch.tensor([w if w == STOP else WORDS.index(w) for w in words]), len(WORDS) + 1)

        heard = [{"CXR": "predictions tuberculosis yes", "LUNGS": "results <image> area 20 right 50"}] * 3
        replies = asked.talk(next_words, ["tell the age"] * 3, heard, cards=True)
        assert replies == [("CXR", "yes"), (None, "no"), ("LUNGS", f"{CALLS['LUNGS']} large")]
        assert len(rows) == asked.SAYS and all(row == asked.prompt("tell the age", True) for row in rows[0])
        added = rows[1][0][len(rows[0][0]) :]
        assert added == asked.spelt(f"{CALLS['CXR']} predictions tuberculosis yes tell the age")
        assert rows[1][2].count(IMAGE) == 2 and rows[1][0].count(IMAGE) == rows[1][1].count(IMAGE) == 1

    def test_rows_show_their_image_and_then_its_overlay(self):
        assert asked.shown([[IMAGE], [IMAGE, 3, IMAGE], [IMAGE]], [0, 0, 2], 3) == [0, 0, 3, 2]

    def test_without_cards_nobody_is_called(self):
        with_cards, alone = (asked.prompt("tell the sex", cards) for cards in (True, False))
        names = {WORDS.index(call) for call in CALLS.values()}
        assert names <= set(with_cards) and not names & set(alone)
        row, told = asked.conversation("tuberculosis", "tuberculosis or not", "no", None)
        assert [word for word, mine in zip(row, told, strict=True) if mine] == [WORDS.index("no"), STOP]


@pytest.mark.component("expert feedback in the conversation")
class TestFeedback:
    def found(self) -> Findings:
        """Of two images: in the first both lungs, of 15 and 10 pixels of 100; in the second nothing."""
        lungs = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
        lungs[0, 0, 2:7, 1:4] = lungs[0, 0, 2:7, 7:9] = True
        return Findings(torch.tensor([0.9, 0.2]), lungs)

    def test_it_is_text_with_numbers(self):
        one, other = self.found().texts()
        assert one == {"CXR": "predictions tuberculosis yes", "LUNGS": "results <image> area 25 right 60"}
        assert other == {"CXR": "predictions tuberculosis no", "LUNGS": "results <image> area 0 right 50"}

    def test_it_stands_between_call_and_answer(self):
        heard = self.found().texts()[0]
        row, told = asked.conversation("size", "tell the size of the lungs", "large", heard)
        before, after = written(row).split(f" {CALLS['LUNGS']} results ")
        assert before == f". {asked.CARDS} <image> tell the size of the lungs"
        assert after == "<image> area 25 right 60 tell the size of the lungs large ."
        mine = [WORDS[word] if word != STOP else "." for word, own in zip(row, told, strict=True) if own]
        assert mine == [CALLS["LUNGS"], "large", "."]

    def test_where_no_expert_knows_there_is_none(self):
        row, told = asked.conversation("sex", "tell the sex", "man", self.found().texts()[0])
        assert written(row) == f". {asked.CARDS} <image> tell the sex man ." and sum(told) == 2

    def test_the_right_lung_is_on_the_left_and_red(self):
        lungs, image = self.found().lungs, torch.randn(2, 1, 10, 10)
        right = asked.right_lung(lungs)
        assert right[0, 0, 2:7, 1:4].all() and int(right.sum()) == 15
        changed = overlay(image, lungs) - coloured(image)
        assert torch.allclose(changed[:, :1], right.float(), atol=1e-6) and (changed[:, 1] == 0).all()
        assert torch.allclose(changed[:, 2:], (lungs & ~right).float(), atol=1e-6)

    def test_all_that_may_be_said_has_a_word(self):
        heard = {"CXR": "predictions tuberculosis no", "LUNGS": "results <image> area 100 right 0"}
        for name, topic in TOPICS.items():
            for form, answer in product(topic.forms, topic.answers):
                asked.conversation(name, form, answer, heard)
        assert len(set(WORDS)) == len(WORDS)


@pytest.mark.component("expert-guided instruction fine-tuning")
@pytest.mark.parametrize("area, right, wanted", [(19, 54, [0, 0]), (25, 56, [1, 1]), (31, 40, [2, 0])])
def test_sizes_have_two_limits(area, right, wanted):
    measure = Measure(sizes=(20.0, 30.0), larger=55.0)
    assert measure.numbers(torch.tensor([[area, right]], dtype=torch.float32)).tolist() == [wanted]


class TestTask:
    def test_groups_say_half_sex_and_age(self):
        samples, people = BRAINS.samples("labelled"), BRAINS.labelled_patients
        halves, person = asked.decoded(samples.groups)
        for number, patient in enumerate(people):
            known = BRAINS.data.attributes(BRAINS.data.patients[patient][0])
            mine = samples.case_of == number
            assert set(halves[mine].tolist()) == {number % 2}, "all images of a patient are in one half"
            wanted = [{"F": 0, "M": 1}[known["sex"]], int(known["age"] >= 47)]
            assert person[mine].unique(dim=0).tolist() == [wanted]

    def test_what_is_not_known_is_said(self):
        assert BRAINS.person({}) == (UNKNOWN, UNKNOWN) and BRAINS.person({"sex": "M", "age": 47}) == (1, 1)
        for facts in [(0, -1, -1), (1, 0, 1), (0, 1, 0), (1, -1, 1)]:
            half, person = asked.decoded(torch.tensor([asked.coded(*facts)]))
            assert (half.item(), *person[0].tolist()) == facts


def test_what_is_spelt_can_be_written_again():
    text = f"{asked.CARDS} <image> is there tuberculosis"
    assert written([STOP, *asked.spelt(text), STOP]) == f". {text} ."
