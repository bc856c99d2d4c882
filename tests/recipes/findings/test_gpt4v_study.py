"""gpt4v-study: measures of words against closed forms, what judges are tried on, and who is right when."""

from math import exp, log

import pytest
from torchmetrics.functional.text import bleu_score
from torchmetrics.functional.text.rouge import _rouge_l_score

from medcook.recipes.findings import _judging
from medcook.recipes.findings.gpt4v_study import ARMS, JUDGES, judging_rows, recipe, verdict
from medcook.recipes.language._reports import facts_of, reports_of
from medcook.training import fit

ONE = "cavity in the upper field of the right lung"
OTHER = "the right lung has a cavity in its upper field"


@pytest.mark.component("limits of metrics of words")
@pytest.mark.parametrize("name", ["BLEU", "ROUGE-L", "shared words", "shared facts"])
def test_a_report_is_like_itself_alone(name):
    judge = JUDGES[name]
    assert judge(ONE, ONE) == pytest.approx(1)
    assert judge("effusion", ONE) == 0


@pytest.mark.component("limits of metrics of words")
def test_bleu_is_torchmetrics_s_where_every_length_matches():
    """That one adds one to longer sequences' counts, too, if it is asked to smooth."""
    for found, truth in ((ONE[:-5], ONE), (f"large {ONE} {OTHER}", ONE), (ONE, f"{OTHER} {ONE}")):
        assert _judging.bleu(found, truth) == pytest.approx(
            bleu_score([found], [[truth]], n_gram=4, smooth=True).item(), abs=1e-6
        )


@pytest.mark.component("limits of metrics of words")
def test_bleu_punishes_what_is_too_short():
    assert _judging.bleu("a b c d e", "a b c d e f g h i j") == pytest.approx(exp(1 - 10 / 5))


@pytest.mark.component("limits of metrics of words")
def test_rouge_l_is_torchmetrics_s():
    assert _judging.longest_common(ONE.split(), OTHER.split()) == 4  # cavity in upper field
    assert _judging.longest_common(["a", "a"], ["a"]) == 1  # a word is used once
    found = _rouge_l_score(ONE.split(), OTHER.split())["fmeasure"]
    assert _judging.rouge_l(ONE, OTHER) == pytest.approx(float(found))


@pytest.mark.component("limits of metrics of words")
def test_cider_weighs_rare_words_more():
    known = _judging.rarity(("right cavity", "right scars", "right effusion", "left effusion"))
    assert known[0]["right",] == 3 and known[0]["right", "cavity"] == 1 and known[1] == 4
    rare = _judging.cider("left cavity", "right cavity", known)
    assert rare > _judging.cider("right scars", "right cavity", known)
    words = {"right": log(4 / 3), "cavity": log(4), "left": log(4)}
    norms = (words["left"] ** 2 + words["cavity"] ** 2) ** 0.5 * (words["right"] ** 2 + words["cavity"] ** 2) ** 0.5
    assert rare == pytest.approx(words["cavity"] ** 2 / norms / 4)  # longer sequences do not match


@pytest.mark.component("limits of metrics of words")
@pytest.mark.parametrize("report", ["PTB in the right upper field", "left PTB, pleurisy", "cavitary infiltrate RUL."])
def test_a_paraphrase_shares_facts_and_few_words(report):
    said = _judging.said_otherwise(report)
    assert facts_of(said) >= facts_of(report) or _judging.shared_facts(said, report) > 0.7
    assert _judging.shared_words(said, report) < 0.75


@pytest.mark.component("limits of metrics of words")
def test_a_paraphrase_turns_the_parts_round():
    assert _judging.said_otherwise("left PTB, pleurisy; old.") == "old; pleuritis; tuberculosis of the left lung"


@pytest.mark.component("limits of metrics of words")
def test_an_error_changes_one_word_and_a_fact():
    report = "PTB in the right upper field"
    assert _judging.with_an_error(report, "side") == "PTB in the left upper field"
    assert _judging.with_an_error(report, "field") == "PTB in the right lower field"
    assert _judging.with_an_error(report, "sign") == "PNEUMONIA in the right upper field"
    assert _judging.with_an_error(report, "negation") == "no PTB in the right upper field"
    assert _judging.with_an_error(report, "age") is None
    assert _judging.with_an_error("normal", "negation") is None
    for kind in ("side", "field", "sign"):
        assert _judging.shared_facts(_judging.with_an_error(report, kind), report) < 1


@pytest.mark.component("metrics of meaning")
def test_facts_are_compared_by_f1():
    assert _judging.shared_facts("right cavity", "cavity of the right lung, old scars") == pytest.approx(
        2 * 2 / (2 + 3)
    )
    assert _judging.shared_facts("RUL infiltrate", "an infiltrate in the upper field of the right lung") == 1
    assert _judging.shared_facts("normal", "no finding") == 1


@pytest.mark.component("metrics of meaning")
def test_the_better_likeness_decides():
    assert (verdict(0.6, 0.5), verdict(0.5, 0.6), verdict(0.5, 0.5 + 1e-9)) == (1, 0, 0.5)


def rows_of(arm, seed=0):
    task, budget = (scale := recipe.scales["quick"]).task, scale.budget
    fitted = fit(ARMS[arm].method, task, budget, seed=seed, cache=False, progress=False)
    case = next(iter(task.cases("val")))
    return reports_of(task.data)[case.case_id], {row["structure"]: row for row in judging_rows(fitted, case)}


@pytest.mark.component("report generation")
@pytest.mark.component("metrics of meaning")
def test_words_fail_where_facts_do_not_and_an_encoder_gives_cosines():
    report, facts = rows_of("shared facts")
    assert set(facts) >= {"age", "negation"} and all(0 <= row["nearest_agrees"] <= 1 for row in facts.values())
    _, words = rows_of("BLEU")
    assert words["age"]["wrong"] == pytest.approx(_judging.bleu(_judging.with_an_error(report, "age"), report))
    assert words["age"]["right"] == 0 and words["age"]["paraphrase"] < words["age"]["wrong"]
    _, learnt = rows_of("read with X-rays, small encoder")
    assert all(-1 <= row["paraphrase"] <= 1 and row["right"] in (0, 0.5, 1) for row in learnt.values())
    assert len({row["wrong"] for row in learnt.values()}) == len(learnt)
