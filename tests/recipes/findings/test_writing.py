"""Answers as tokens: what a language model is told, writes and is asked."""

import numpy as np
from made_up_xrays import SIZE, known

from medcook.networks.vila import IMAGE
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings import _writing as writing
from medcook.recipes.findings._harness import Question
from medcook.recipes.findings._mined import KINDS


class TestWriting:
    def test_answers_are_tokens_and_come_back(self):
        for truths in known(2).truths:
            for kind, truth in truths.items():
                line = writing.told(kind, truth, SIZE)
                assert line[-1] == writing.STOP and len(line) <= writing.MOST and writing.STOP not in line[:-1]
                text = writing.written(kind, line[:-1], SIZE)
                assert KINDS[kind].score(KINDS[kind].parse(text, SIZE), truth) > 0.9

    def test_places_are_in_percent_of_their_side(self):
        line = writing.told("localisation", np.array([[6.0, 4, 30, 20], [36, 0, 60, 40]]), SIZE)
        assert [writing.WORDS[token] for token in line[:-1]] == ["10", "10", "50", "50", "60", "0", "99", "99"]
        assert writing.written("localisation", line[:4], SIZE) == "[6, 4, 30, 20]"

    def test_a_report_is_written_as_its_facts(self):
        line = writing.told("generation", "RUL infiltrate", SIZE)
        assert writing.written("generation", line[:-1], SIZE) == "right, upper, infiltrate"
        assert writing.written("generation", writing.told("generation", "normal", SIZE)[:-1], SIZE) == "none"

    def test_corners_are_those_of_a_trapezoid(self):
        mask = np.zeros((30, 30), bool)
        for row in range(5, 26):
            mask[row, 10 - row // 5 : 12 + row // 5] = True
        found = writing.corners(mask)
        assert found[:6, 1].tolist() == found[6:, 1][::-1].tolist() and found[0, 1] == 5.5 and found[5, 1] == 25.5
        for x, y in found[:6]:
            assert mask[int(y), int(x)] and not mask[int(y), int(x) - 1]
        for x, y in found[6:]:
            assert mask[int(y), int(x) - 1] and not mask[int(y), int(x)]

    def test_what_a_model_babbles_is_an_answer_in_another_form(self):
        for line in ([writing.WORDS.index("yes"), 5], [writing.READ + 3], []):
            for kind in ("localisation", "segmentation"):
                assert KINDS[kind].parse(writing.written(kind, line, SIZE), SIZE) is None

    def test_a_question_is_an_image_a_kind_and_the_words_of_a_report(self):
        image = writing.heard(mined.asked("detection", np.zeros(SIZE), ""))
        assert image == [writing.STOP, IMAGE, writing.WORDS.index("detection")]
        text = writing.heard(Question("mining", "", None, "right right lung"))
        assert (
            text[:2] == [writing.STOP, writing.WORDS.index("mining")] and text[2] == text[3] != text[4] >= writing.READ
        )
