"""Mining images and reports: the harness with made-up models, what is true of an image, and four small models."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import friedmanchisquare
from skimage.measure import regionprops
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, jaccard_score

from medcook.methods import Batch, Moment
from medcook.networks.vila import IMAGE
from medcook.recipes.findings import _harness as harness
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings import _miners as miners
from medcook.recipes.findings import _writing as writing
from medcook.recipes.findings._harness import Question, ask, judge
from medcook.recipes.findings._mined import KINDS, PLACES, REPORTS, Known
from medcook.recipes.findings._miners import BRAINS, Nearest, Probe, Segmenter, Writer
from medcook.recipes.findings.mllm_data_mining import ARMS, concordance, mined_rows, ranked, recipe
from medcook.recipes.language._reports import reports_of
from medcook.tasks import Budget
from medcook.training import Loop

SIZE = (40, 60)


def lungs(top: int = 5, bottom: int = 30) -> np.ndarray:
    """A right lung of 12 columns, which is on the left, and a left lung of 10."""
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, 8:20] = mask[top + 3 : bottom, 35:45] = True
    return mask


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


def known(count: int = 12) -> Known:
    """Half of the patients are ill on the right; images are brighter at the top where they are, lungs end lower."""
    rng, truths, images, reports = np.random.default_rng(0), [], [], []
    for number in range(count):
        ill = number % 2 == 0
        report = "PTB in the right upper field" if ill else "normal"
        image = rng.normal(size=SIZE).astype(np.float32) + lungs()
        image[:20] += 3 * ill
        truths.append(mined.truths_of(lungs(bottom=36 if ill else 28), ill, report))
        images.append(image), reports.append(report)
    return Known(torch.from_numpy(np.stack(images))[:, None], truths, tuple(reports))


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


TINY = {kind: kind(encoder="random", channels=(4, 8)) for kind in (Writer, Segmenter, Probe, Nearest)}


def stand_in(method) -> SimpleNamespace:
    """A run that has learnt nothing."""
    torch.manual_seed(0)
    nets = method.build(2, 2, 2)
    return SimpleNamespace(method=method, nets=nets, weights={"last": nets.state_dict()})


def questions(some: Known, number: int) -> dict[str, Question]:
    return {kind: mined.asked(kind, some.images[number, 0].numpy(), some.reports[number]) for kind in KINDS}


@torch.no_grad()
def answered(method, some: Known, number: int = 0) -> dict[str, str]:
    model = method.model(stand_in(method), some)
    return {kind: model(question) for kind, question in questions(some, number).items()}


class TestModels:
    def test_the_nearest_case_of_a_known_image_is_itself(self):
        some = known()
        for number in (3, 8):
            for kind, text in answered(TINY[Nearest], some, number).items():
                assert KINDS[kind].score(KINDS[kind].parse(text, SIZE), some.truths[number][kind]) > 0.97

    def test_the_nearest_case_that_has_an_answer_is_taken(self):
        some = known()
        del some.truths[0]["detection"]
        assert answered(TINY[Nearest], some, 0)["detection"] in ("right", "none")

    def test_a_ridge_is_that_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        x, y, new = rng.normal(size=(30, 5)) + 2, rng.normal(size=(30, 3)), rng.normal(size=5)
        np.testing.assert_allclose(miners.ridge(x, y, 7.0)(new), Ridge(7.0).fit(x, y).predict(new[None])[0])

    @torch.no_grad()
    def test_a_linear_map_tells_everything_that_is_known(self, monkeypatch):
        monkeypatch.setattr(miners, "ridge", lambda x, y, weight=0.1, fit=miners.ridge: fit(x, y, 0.1))
        some, right = known(40), {kind: 0.0 for kind in KINDS}
        model = TINY[Probe].model(stand_in(TINY[Probe]), some)
        for number in range(0, 40, 5):
            for kind, question in questions(some, number).items():
                value = KINDS[kind].parse(model(question), SIZE)
                right[kind] += KINDS[kind].score(value, some.truths[number][kind]) / 8
        chance = mined.chances(some)
        assert all(right[kind] > 0.5 + chance[kind] / 2 for kind in KINDS if kind not in ("classification", *PLACES)), (
            right
        )
        assert right["localisation"] > chance["localisation"] and right["segmentation"] > 0.8

    def test_its_classification_is_what_training_taught_it(self, monkeypatch):
        for probability, wanted in ((0.9, "yes"), (0.2, "no")):
            monkeypatch.setattr(Probe, "outcomes", lambda self, nets, images, p=probability: torch.tensor([p]))
            assert answered(TINY[Probe], known())["classification"] == wanted

    def test_frozen_eyes_stay(self):
        nets = stand_in(TINY[Probe]).nets
        TINY[Probe].training_step(nets, batch(), None, Moment(0, 9)).backward()
        assert all(p.grad is None for p in nets["model"].encoder.parameters())
        assert all(p.grad is not None for p in nets["model"].head.parameters())

    @torch.no_grad()
    def test_a_segmenter_draws_what_it_finds_and_says_what_is_usual(self, monkeypatch):
        some, method = known(), TINY[Segmenter]
        run = stand_in(method)
        found = torch.from_numpy(lungs(bottom=36))
        monkeypatch.setattr(run.nets["average"], "lungs", lambda images: torch.stack([~found, found]).float()[None])
        for probability, number in ((0.9, 0), (0.2, 1)):
            monkeypatch.setattr(Segmenter, "outcomes", lambda self, nets, images, p=probability: torch.tensor([p]))
            model = method.model(run, some)
            for kind, question in questions(some, 1).items():
                if kind == "mining":
                    assert judge(model, KINDS[kind], question, frozenset()).status == "refused"
                    continue
                truth = some.truths[0 if kind in PLACES else number][kind]
                assert judge(model, KINDS[kind], question, truth).score > 0.97, kind
        monkeypatch.setattr(run.nets["average"], "lungs", lambda images: torch.stack([found, found]).float()[None] * 0)
        assert judge(model, KINDS["localisation"], questions(some, 1)["localisation"], None).status == "malformed"

    def test_what_the_parts_learn(self):
        for kind in (Writer, Segmenter):
            for mixed in (False, True):
                nets = stand_in(TINY[kind]).nets
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = TINY[kind].training_step(nets, batch(), None, Moment(0, 9))
                loss.backward()
                still = [
                    name
                    for name, p in nets["model"].named_parameters()
                    if p.grad is None or not p.grad.isfinite().all()
                ]
                assert loss.dtype == torch.float32 and all(
                    "head." in n or "post_layernorm" in n or "layers.2" in n for n in still
                )

    def test_a_writer_learns_all_answers_and_nothing_else(self, monkeypatch):
        kept = {}

        def loss(self, lines, told, pictures):
            kept.update(lines=lines, told=told, pictures=pictures)
            return pictures.sum()

        monkeypatch.setattr(miners.Vila, "loss", loss)
        monkeypatch.setattr(miners, "said", lambda groups: ("normal", "RUL infiltrate"))
        TINY[Writer].training_step(
            stand_in(TINY[Writer]).nets, batch()._replace(groups=torch.zeros(2)), None, Moment(0, 9)
        )
        assert len(kept["lines"]) == 2 * len(KINDS) and len(kept["pictures"]) == sum(
            line.count(IMAGE) for line in kept["lines"]
        )
        for line, told in zip(kept["lines"], kept["told"], strict=True):
            first = told.index(True)
            assert all(told[first:]) and line[-1] == writing.STOP and line[:first].count(IMAGE) <= 1
        words = [
            [writing.WORDS[t] for t, mine in zip(*row, strict=True) if mine and t < writing.READ]
            for row in zip(kept["lines"], kept["told"], strict=True)
        ]
        assert words[0] == ["no"] and words[7] == ["yes"] and words[13] == ["right", "upper", "infiltrate"] == words[12]

    @torch.no_grad()
    def test_it_writes_until_it_stops(self, monkeypatch):
        tokens = [writing.WORDS.index(word) for word in ("right", "upper")]
        script = iter([*tokens, writing.STOP, *[tokens[0]] * 99])
        monkeypatch.setattr(
            miners.Vila, "next_words", lambda self, lines, pictures: torch.eye(1 + writing.STOP)[[next(script)]]
        )
        model = TINY[Writer].model(stand_in(TINY[Writer]), known())
        asked = questions(known(), 0)
        assert model(asked["mining"]) == "right, upper"
        assert len(model(asked["generation"]).split()) == writing.MOST

    @torch.no_grad()
    def test_it_reads_without_an_image_and_looks_without_a_report(self):
        run = stand_in(TINY[Writer])
        net, rng = run.nets.eval()["average"], np.random.default_rng(1)
        model = TINY[Writer].model(run, known())
        image = rng.normal(size=SIZE).astype(np.float32)
        line = writing.heard(Question("detection", "", image))
        pictures = net.pictures(miners.coloured(torch.from_numpy(image)[None, None]))
        first = int(net.next_words([line], pictures).argmax())
        said = model(Question("detection", "", image))
        assert said.split(", ")[0] == (writing.written("detection", [first], SIZE) if first != writing.STOP else "")
        assert isinstance(model(Question("mining", "", None, "PTB")), str)

    def test_predictions_are_probabilities(self):
        for method in TINY.values():
            with torch.no_grad():
                found = method.predict(stand_in(method).nets.eval(), batch().images)
            assert found.shape == (2, 2, 48, 48) and torch.allclose(found.sum(1), torch.ones(2, 48, 48))


def batch() -> Batch:
    images = torch.randn(2, 2, 48, 48, generator=torch.Generator().manual_seed(1))
    images[:, 1] = 0
    images[:, 1, 8:32, 4:19] = images[:, 1, 8:32, 28:37] = 1
    return Batch(images, torch.tensor([0, 1]).byte()[:, None, None].expand(-1, 48, 48))


class TestRows:
    @pytest.fixture(scope="class")
    def fitted(self):
        budget = Budget(steps=3, batch=4, precision="float32", checks=0)
        task, method = BRAINS, TINY[Segmenter]
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
