"""Mining images and reports: the harness with made-up models, what is true of an image, and how models rank."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up_xrays import SIZE, known, lungs
from scipy.stats import friedmanchisquare
from skimage.measure import regionprops
from sklearn.metrics import f1_score, jaccard_score

from medcook.recipes.findings import _harness as harness
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings._harness import Question, ask, judge
from medcook.recipes.findings._mined import KINDS, PLACES, REPORTS
from medcook.recipes.findings._miners import BRAINS, Nearest, Probe, Segmenter, Writer
from medcook.recipes.findings.mllm_data_mining import ARMS, concordance, mined_rows, ranked, recipe
from medcook.recipes.language._reports import reports_of
from medcook.tasks import Budget
from medcook.training import Loop


class Remote:
    """A made-up service: gives its answers in turn, raises those that are errors, and may be slow."""

    def __init__(self, *answers, seconds: float = 0.0):
        self.answers, self.seconds, self.asked = list(answers), seconds, []

    def __call__(self, question: Question) -> str:
        self.asked.append(question)
        time.sleep(self.seconds)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


IMAGE_QUESTION = mined.asked("classification", np.zeros(SIZE, np.float32), "PTB")


@pytest.mark.component("a harness for any model")
class TestHarness:
    def test_a_model_is_asked_and_its_answer_judged(self):
        model = Remote("I think yes, there is.")
        found = judge(model, KINDS["classification"], IMAGE_QUESTION, "yes")
        assert found == ("answered", 1.0, 5) and model.asked == [IMAGE_QUESTION]
        assert judge(lambda question: "no", KINDS["classification"], IMAGE_QUESTION, "yes").score == 0

    def test_prompts_say_how_to_answer_and_how_large_the_image_is(self):
        image = np.zeros(SIZE, np.float32)
        for kind in KINDS:
            question = mined.asked(kind, image, "PTB in the right upper field")
            assert question.kind == kind and "{" not in question.prompt
            assert ("60 x 40" in question.prompt) == (kind in PLACES)
        assert (
            "yes or no" in IMAGE_QUESTION.prompt
            and "[left, top, right, bottom]" in mined.asked("localisation", image, "").prompt
        )

    def test_only_reports_are_asked_about_without_an_image(self):
        question = mined.asked("mining", np.zeros(SIZE, np.float32), "RUL infiltrate")
        assert question.image is None and question.text == "upper part of the right lung consolidation"
        assert "rul" not in question.text and mined.asked("detection", np.zeros(SIZE, np.float32), "RUL").text == ""

    def test_who_fails_is_asked_again(self):
        model = Remote(OSError("busy"), "yes")
        assert ask(model, IMAGE_QUESTION, tries=2) == ("answered", "yes") and len(model.asked) == 2
        assert ask(Remote(OSError(), ValueError()), IMAGE_QUESTION, tries=2) == ("failed", "")

    def test_who_takes_too_long_is_left(self):
        slow = Remote("yes", seconds=0.4)
        start = time.monotonic()
        assert ask(slow, IMAGE_QUESTION, seconds=0.05) == ("late", "") and time.monotonic() - start < 0.3
        assert ask(Remote("yes"), IMAGE_QUESTION, seconds=5) == ("answered", "yes")
        assert ask(Remote(TimeoutError()), IMAGE_QUESTION)[0] == "late"


@pytest.mark.component("answers that cannot be used")
class TestUnusable:
    @pytest.mark.parametrize(
        "answer, status",
        [
            ("I'm sorry, I can't help with medical images.", "refused"),
            ("As an AI, I am not able to say yes or no.", "refused"),
            ("Yes. No.", "malformed"),
            ("perhaps", "malformed"),
            ("", "malformed"),
            (None, "failed"),
            (OSError("502"), "failed"),
            (TimeoutError(), "late"),
        ],
    )
    def test_a_service_may_do_anything_and_scores_nothing(self, answer, status):
        found = judge(Remote(answer), KINDS["classification"], IMAGE_QUESTION, "yes")
        assert found.status == status and found.score == 0

    @pytest.mark.parametrize(
        "kind, answer",
        [
            ("localisation", "[1, 2, 3, 4]"),  # one box of two
            ("localisation", "[1, 2, 3] [4, 5, 6, 7]"),
            ("localisation", "[9, 2, 3, 4] [1, 2, 3, 4]"),  # right of its right side
            ("localisation", "[1, 2, 3, 4] [1, 2, 61, 4]"),  # outside
            ("localisation", "[-1, 2, 3, 4] [1, 2, 3, 4]"),
            ("segmentation", "[[1, 2], [3, 4]]"),
            ("segmentation", "[[1, 2], [3, 4], [5]]"),
            ("segmentation", "[[1, 2], [3, 4], [5, 41]]"),
            ("segmentation", "the lungs are dark"),
            ("counting", "one or two"),
            ("counting", "-1"),
            ("counting", "1.5"),
            ("detection", "somewhere"),
            ("mining", "a cat"),
            ("generation", " ... "),
        ],
    )
    def test_answers_in_another_form_are_not_guessed_at(self, kind, answer):
        assert KINDS[kind].parse(answer, SIZE) is None


@pytest.mark.component("tasks on images and on reports")
class TestTasks:
    @pytest.mark.parametrize(
        "kind, answer, value",
        [
            ("classification", "No.", "no"),
            ("detection", "In the Right lung, and the left", {"right", "left"}),
            ("detection", "none", frozenset()),
            ("counting", "There are two.", 2),
            ("counting", "1", 1),
            ("mining", "tuberculosis; upper", {"tuberculosis", "upper"}),
            ("mining", "Normal", frozenset()),
            ("generation", "Clear lungs.", "Clear lungs."),
        ],
    )
    def test_answers_are_read(self, kind, answer, value):
        assert KINDS[kind].parse(answer, SIZE) == value

    def test_boxes_are_read_in_their_order(self):
        found = KINDS["localisation"].parse("right: [1, 2, 3.5, 4], left: [10,20,60,40]", SIZE)
        assert found.tolist() == [[1, 2, 3.5, 4], [10, 20, 60, 40]]

    def test_outlines_are_the_union_of_polygons(self):
        found = KINDS["segmentation"].parse(
            "[[8, 5], [20, 5], [20, 30], [8, 30]] and [[35,8],[45,8],[45,30],[35,30]]", SIZE
        )
        assert harness.mask_overlap(found, lungs()) > 0.95
        assert KINDS["segmentation"].parse("[[0, 0], [60, 0], [60, 40], [0, 40]]", SIZE).mean() > 0.9

    def test_what_is_said_is_read_back(self):
        truths = mined.truths_of(lungs(), True, "PTB in the right upper field")
        assert set(truths) == set(KINDS)
        for kind, truth in truths.items():
            found = KINDS[kind].parse(mined.said_answer(kind, truth), SIZE)
            assert KINDS[kind].score(found, truth) > 0.97

    def test_truths_are_those_of_outcome_lungs_and_report(self):
        truths = mined.truths_of(lungs(), True, "bilateral PTB")
        assert (
            truths["classification"] == "yes" and truths["counting"] == 2 and truths["detection"] == {"right", "left"}
        )
        assert truths["mining"] == {"right", "left", "tuberculosis"} and truths["segmentation"].sum() == lungs().sum()
        boxes = [
            np.array(region.bbox)[[1, 0, 3, 2]] for region in regionprops(lungs().astype(int) * [[1] * 30 + [2] * 30])
        ]
        np.testing.assert_array_equal(truths["localisation"], boxes)
        healthy = mined.truths_of(lungs(), False, "normal")
        assert healthy["detection"] == frozenset() and healthy["counting"] == 0

    def test_what_nobody_knows_is_not_asked(self):
        assert not {"detection", "counting"} & set(mined.truths_of(lungs(), True, "TB"))
        one = lungs()
        one[:, 30:] = False
        one[10, 8:20] = True
        assert "segmentation" in mined.truths_of(one, False, "normal")
        assert not set(PLACES) & set(mined.truths_of(np.zeros(SIZE, bool), False, "normal"))

    def test_scores_are_those_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        one, other = rng.random((2, 30)) < 0.4
        sets = [frozenset(np.flatnonzero(mask)) for mask in (one, other)]
        assert harness.overlap(*sets) == harness.mask_overlap(one, other) == pytest.approx(f1_score(one, other))
        assert harness.overlap(frozenset(), frozenset()) == harness.mask_overlap(one & ~one, one & ~one) == 1
        boxes = np.array([[[3, 4, 20, 18], [30, 2, 50, 33]], [[5, 1, 25, 16], [0, 35, 9, 40]]], float)
        masks = np.zeros((2, 2, *SIZE), bool)
        for place, (left, top, right, bottom) in zip(np.ndindex(2, 2), boxes.reshape(-1, 4).astype(int), strict=True):
            masks[place][top:bottom, left:right] = True
        wanted = np.mean([jaccard_score(masks[0, k].ravel(), masks[1, k].ravel()) for k in range(2)])
        assert harness.box_overlap(*boxes) == pytest.approx(wanted)


@pytest.mark.component("models rank differently by task")
class TestRanks:
    def test_who_sees_nothing_says_what_is_commonest(self):
        some = known(7)  # four are ill
        found = mined.ignorant(some.truths)
        assert found["classification"] == "yes" and found["detection"] == "right" and found["counting"] == "1"
        assert found["generation"] == "PTB in the right upper field" and found["mining"] == "right, upper, tuberculosis"
        mean = np.mean([truth["localisation"] for truth in some.truths], axis=0)
        np.testing.assert_allclose(KINDS["localisation"].parse(found["localisation"], SIZE), mean, atol=0.51)
        chances = mined.chances(some)
        assert chances["classification"] == pytest.approx(4 / 7) and chances["mining"] == pytest.approx(4 / 7)
        assert 0.7 < chances["localisation"] < 1 and 0.7 < chances["segmentation"] < 1

    def test_skill_is_zero_for_the_ignorant_and_one_for_the_perfect(self):
        assert mined.skill(0.6, 0.6) == 0 and mined.skill(1.0, 0.6) == pytest.approx(1) and mined.skill(0.4, 0.6) < 0

    @pytest.mark.parametrize("kinds", [list(KINDS), [kind for kind in KINDS if kind not in ("detection", "counting")]])
    def test_a_patients_mean_leaning_is_the_difference_of_two_means(self, kinds):
        skills = dict(zip(kinds, np.random.default_rng(1).normal(size=len(kinds)), strict=True))
        weights = mined.leanings(kinds)
        means = [np.mean([skills[kind] for kind in kinds if kind in group]) for group in (REPORTS, PLACES)]
        assert np.mean([weights[kind] * skills[kind] for kind in kinds]) == pytest.approx(means[0] - means[1])
        assert weights["classification"] == 0

    def test_two_models_with_the_same_order_everywhere_lean_alike(self):
        weights = mined.leanings(list(KINDS))
        better = sum(weights[kind] * 0.5 for kind in KINDS)
        assert better == pytest.approx(0)

    def frames(self, scores: dict[str, list[float]]) -> dict[str, pd.DataFrame]:
        kinds = list(KINDS)[: len(next(iter(scores.values())))]
        return {name: pd.DataFrame({"structure": kinds, "score": values}) for name, values in scores.items()}

    def test_ranks_are_of_each_kind(self):
        table = ranked(self.frames({"a": [0.9, 0.2, 0.5], "b": [0.5, 0.4, 0.1], "c": [0.1, 0.3, 0.5]}))
        assert (
            table.to_numpy().tolist() == [[1, 2, 3], [3, 1, 2], [1.5, 3, 1.5]] and list(table.index) == list(KINDS)[:3]
        )

    def test_concordance_is_friedmans_statistic_scaled(self):
        scores = np.random.default_rng(2).random((4, 7))
        ranks = ranked(self.frames(dict(zip("abcd", scores.tolist(), strict=True))))
        wanted = friedmanchisquare(*ranks.to_numpy().T).statistic / (7 * 3)
        assert concordance(ranks) == pytest.approx(wanted)
        assert concordance(pd.DataFrame([[1, 2, 3]] * 5)) == pytest.approx(1)

    def test_the_pair_and_the_models(self):
        assert recipe.compare == ("language model", "segmenter") and recipe.metric == "leaning"
        assert [type(method) for method in ARMS.values()] == [Writer, Segmenter, Probe, Nearest]
        assert not any(arm.changes for arm in recipe.arms.values())


class TestRows:
    @pytest.fixture(scope="class")
    def fitted(self):
        budget = Budget(steps=3, batch=4, precision="float32", checks=0)
        task, method = BRAINS, Segmenter(encoder="random", channels=(4, 8))
        return Loop(method, task, budget, "float32", 0, task.samples("labelled"), None, None, False, "cpu").run()

    def test_a_model_that_knows_the_truth_has_all_skill(self, fitted, monkeypatch):
        case = next(iter(BRAINS.cases("val")))
        report, images = reports_of(BRAINS.data)[case.case_id], BRAINS.preparation.images(case).numpy()
        truths = [mined.truths_of(mask > 0.5, case.attributes["group"] == "atrophy", report) for mask in images[:, 1]]

        def oracle(question: Question) -> str:
            if question.image is None:
                return mined.said_answer("mining", truths[0]["mining"])
            number = next(k for k, image in enumerate(images[:, 0]) if np.array_equal(image, question.image))
            return mined.said_answer(question.kind, truths[number][question.kind])

        monkeypatch.setattr(Segmenter, "model", lambda self, fitted, known: oracle)
        rows = mined_rows(replace(fitted), case)
        assert {row["structure"] for row in rows} == set(truths[0])
        for row in rows:
            assert (
                row["score"] > 0.97
                and row["answered"] == 1
                and row["malformed"] == row["refused"] == row["failed"] == 0
            )
            chance = mined.chances(mined.known_of(BRAINS))[row["structure"]]
            assert row["skill"] == pytest.approx(mined.skill(row["score"], chance))
            assert row["leaning"] == pytest.approx(mined.leanings(list(truths[0]))[row["structure"]] * row["skill"])

    def test_what_becomes_of_questions_is_counted(self, fitted, monkeypatch):
        answers = {
            "classification": "I cannot.",
            "localisation": "left",
            "segmentation": OSError(),
            "generation": TimeoutError(),
        }

        def model(question: Question) -> str:
            answer = answers.get(question.kind, "none")
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(Segmenter, "model", lambda self, fitted, known: model)
        rows = {row["structure"]: row for row in mined_rows(replace(fitted), next(iter(BRAINS.cases("val"))))}
        assert (
            rows["classification"]["refused"]
            == rows["localisation"]["malformed"]
            == rows["segmentation"]["failed"]
            == 1
        )
        assert rows["generation"]["failed"] == rows["mining"]["answered"] == 1 and rows["classification"]["words"] == 2
        assert all(rows[kind]["skill"] < 0 for kind in ("classification", "localisation"))

    def test_cases_without_a_report_or_an_outcome_have_no_row(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        case.attributes["group"] = None
        assert mined_rows(fitted, case) == []
