"""ReXGroundingCT: sentences with their masks, categories, and instances that nobody drew."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook.data import Case
from medcook.language import Question, meant, words_of
from medcook.methods import Batch, Moment
from medcook.recipes.language._findings import FINDINGS, KINDS, MANY, Finding, Spoken, matching, value_of
from medcook.recipes.language._settings import BASELINE, FINDINGS_QUICK, ToldOfFindings
from medcook.recipes.language.rexgroundingct import (
    DIFFUSE,
    ToldCategories,
    ToldInstances,
    about_kinds,
    judged,
    kinds_of,
    recipe,
    representative,
    sentence_rows,
)

NODULE = value_of(Finding("nodule", "small", "right", "upper"))
OTHER = value_of(Finding("nodule", "large", "left", "lower"))
PATCH = value_of(Finding("patch", "small", "left", "upper"))
ALL_NODULES = Question("all nodules", matching(kind="nodule"))
SMALL = (8, 8)


def image_of(*values: int, side: int = 16) -> torch.Tensor:
    """A label map with a square of each value."""
    label = torch.zeros(side, side, dtype=torch.uint8)
    for number, value in enumerate(values):
        label[4 * number : 4 * number + 3, :3] = value
    return label


def batch_of(*labels: torch.Tensor, index=None) -> Batch:
    stack = torch.stack(labels)
    return Batch(stack[:, None].float(), stack, index=index)


@pytest.mark.component("sentences linked with masks")
class TestSentences:
    def test_it_is_the_chapters_baseline(self):
        assert recipe.arms["sentences"].method is BASELINE and type(BASELINE) is ToldOfFindings

    def test_a_mask_holds_what_its_sentence_means_and_nothing_else(self):
        torch.manual_seed(0)
        label = image_of(NODULE, OTHER, PATCH)
        words = {many: one for one, many in MANY.items()}
        seen = set()
        for _ in range(40):
            (question,) = BASELINE.questions(batch_of(label))
            mask = meant(label[None], [question])[0]
            told = {words.get(word, word) for word in words_of(question.sentence)}
            for value in (NODULE, OTHER, PATCH):
                fits = all(told & {word} or not told & others(word) for word in FINDINGS[value - 1])
                assert bool((mask[label == value] == 1).all()) == bool((mask[label == value] == 1).any()) == fits
            assert not mask[label == 0].any()
            seen.add(len(mask[label > 0].unique()))
        assert 2 in seen, "of the findings of an image, some are meant and others are not"


def others(word: str) -> set[str]:
    """The words that tell the same of a finding in another way."""
    place = next(number for finding in FINDINGS for number, mine in enumerate(finding) if mine == word)
    return {finding[place] for finding in FINDINGS} - {word}


@pytest.mark.component("structured labels")
class TestCategories:
    def test_questions_are_about_all_of_a_category(self):
        torch.manual_seed(0)
        asked = [ToldCategories(absent=0.0).questions(batch_of(image_of(NODULE, PATCH)))[0] for _ in range(20)]
        assert {question.sentence for question in asked} == {"all nodules", "all patches"}
        assert all(len(question.values) == 12 for question in asked)
        assert all(FINDINGS[value - 1].kind == kind_in(q.sentence) for q in asked for value in q.values)

    def test_now_and_then_a_category_is_absent(self):
        torch.manual_seed(0)
        (question,) = ToldCategories(absent=1.0).questions(batch_of(image_of(NODULE, PATCH)))
        assert question.sentence == "all cavities"
        everything = tuple(value_of(Finding(kind, "small", "left", "upper")) for kind in KINDS)
        assert about_kinds(Spoken(), everything, absent=True).sentence in {f"all {MANY[kind]}" for kind in KINDS}
        assert about_kinds(Spoken(), (), absent=False).values, "an image without findings is asked about, too"

    def test_a_sentence_names_a_category_or_might_mean_any(self):
        for number, kind in enumerate(KINDS):
            for form in range(3):
                finding = Finding(kind, "large", "left", "upper")
                assert kinds_of(Spoken().full(finding, form)) == (number,)
            assert kinds_of(Spoken().some(kind=kind, side="left")) == (number,)
        assert kinds_of(Spoken().some(side="left")) == (0, 1, 2)

    def test_two_findings_of_a_category_get_the_same_answer(self):
        method, net = ToldCategories(channels=SMALL), Names()
        sentences = (Spoken().name(NODULE), Spoken().name(OTHER), Spoken().name(PATCH), "all findings in the left lung")
        answers = method.answer({"average": net}, torch.zeros(2, 1, 4, 4), sentences)
        assert set(net.heard) == {("all nodules",) * 2, ("all cavities",) * 2, ("all patches",) * 2}
        assert answers.shape == (2, 4, 4, 4)
        shares = torch.sigmoid(torch.tensor([len("all nodules"), len("all nodules"), len("all patches"), 12.0]) - 11)
        torch.testing.assert_close(answers[0, :, 0, 0], shares)

    def test_nothing_but_labels_differs(self):
        assert settings(ToldCategories()) == settings(BASELINE)
        mine, theirs = ToldCategories(channels=SMALL).build(1, 37, 2), ToldOfFindings(channels=SMALL).build(1, 37, 2)
        assert [p.shape for p in mine.parameters()] == [p.shape for p in theirs.parameters()]


def kind_in(sentence: str) -> str:
    return KINDS[kinds_of(sentence)[0]]


def settings(method) -> dict:
    return {part.name: getattr(method, part.name) for part in fields(BASELINE)}


class Names:
    """A network that answers with the length of what it hears."""

    def __init__(self):
        self.heard = []

    def encode(self, images):
        return images

    def decode(self, maps, sentences):
        self.heard.append(sentences)
        return torch.full((len(maps), 4, 4), float(len(sentences[0])) - 11)


@pytest.mark.component("representative instances in training")
class TestInstances:
    def test_at_most_so_many_of_what_is_meant_and_there_are_kept(self):
        there = tuple(sorted((NODULE, OTHER, PATCH, 2)))
        nodules = {value for value in there if FINDINGS[value - 1].kind == "nodule"}
        assert len(nodules) == 3
        for most in (1, 2, 3, 5):
            kept = representative(ALL_NODULES, there, 7, most)
            assert kept.sentence == ALL_NODULES.sentence
            assert len(kept.values) == min(most, 3) and set(kept.values) <= nodules
        absent = Question("all cavities", matching(kind="cavity"))
        assert representative(absent, there, 7, 1).values == ()
        assert representative(Question("it", (NODULE,)), there, 7, 1).values == (NODULE,)

    def test_the_choice_belongs_to_the_image_and_the_sentence_and_is_no_rule(self):
        there = (NODULE, 2, 8, OTHER)
        chosen = [representative(ALL_NODULES, there, image, 1).values for image in range(200)]
        assert chosen == [representative(ALL_NODULES, there, image, 1).values for image in range(200)]
        counts = {value: chosen.count((value,)) for value in there}
        assert min(counts.values()) > 25, "any of them may be the one"
        small = Question("all small nodules", matching(kind="nodule", size="small"))
        both = [(NODULE, 2), (NODULE, 2)]
        kept = [[representative(q, both[0], image, 1).values for image in range(50)] for q in (ALL_NODULES, small)]
        assert kept[0] != kept[1], "each sentence is drawn for by itself"

    def test_a_step_is_told_that_the_others_are_background(self):
        label = image_of(NODULE, OTHER, PATCH)
        batch = batch_of(*[label] * 12, index=torch.arange(30, 42))
        method = ToldInstances(absent=0.0, language=Spoken(several=1.0))
        torch.manual_seed(3)
        kept = method.questions(batch)
        torch.manual_seed(3)
        asked = ToldOfFindings(absent=0.0, language=Spoken(several=1.0)).questions(batch)
        assert [question.sentence for question in kept] == [question.sentence for question in asked]
        masks, whole = meant(batch.labels, kept), meant(batch.labels, asked)
        areas, most = masks.flatten(1).sum(1), whole.flatten(1).sum(1)
        assert (areas == 9).all() and most.max() == 18 and (masks <= whole).all()
        assert [representative(q, (NODULE, OTHER, PATCH), 30 + k, 1).values for k, q in enumerate(asked)] == [
            question.values for question in kept
        ]

    def test_full_descriptions_lose_nothing(self):
        batch = batch_of(*[image_of(NODULE, OTHER, PATCH)] * 8)
        torch.manual_seed(0)
        kept = ToldInstances(language=Spoken(several=0.0)).questions(batch)
        torch.manual_seed(0)
        asked = ToldOfFindings(language=Spoken(several=0.0)).questions(batch)
        assert torch.equal(meant(batch.labels, kept), meant(batch.labels, asked))

    def test_the_ablation_differs_in_nothing_else(self):
        assert settings(ToldInstances()) == settings(BASELINE)
        assert recipe.ablation == ("sentences", "one instance drawn")
        assert recipe.arms["one instance drawn"].method.most == 1


def test_every_parameter_learns():
    labels = torch.randint(0, 30, (6, 24, 40), generator=torch.Generator().manual_seed(0)).byte()
    for method in (ToldCategories(channels=SMALL), ToldInstances(channels=SMALL)):
        torch.manual_seed(0)
        nets, grown = method.build(1, 37, 2), set()
        for number in range(3):  # what modulates changes nothing at first, so what it hears learns from the second step
            nets.zero_grad()
            method.training_step(nets, batch_of(*labels), None, Moment(number, 3)).backward()
            parameters = dict(nets["model"].named_parameters())
            grown |= {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
            with torch.no_grad():
                for p in parameters.values():
                    p -= 0.01 * p.grad if p.grad is not None else 0
        assert grown == set(parameters)


class Oracle:
    """Answers what a sentence means, `errs` says how: all of it, the first instance alone, or all of its category."""

    language = Spoken()

    def __init__(self, labels: torch.Tensor, errs: str = ""):
        self.labels, self.errs, self.number = labels, errs, -1

    def answer(self, nets, images, sentences):
        self.number += 1
        return torch.stack([self.mask(self.labels[self.number], sentence) for sentence in sentences])[None] * 0.9

    def mask(self, label: torch.Tensor, sentence: str) -> torch.Tensor:
        values = self.meaning(sentence)
        if self.errs == "category":
            values = tuple(v for v in range(1, 37) if KINDS.index(FINDINGS[v - 1].kind) in kinds_of(sentence))
        if self.errs == "first":
            values = tuple(v for v in values if (label == v).any())[:1]
        return torch.isin(label, torch.tensor(values, dtype=label.dtype)).float()

    def meaning(self, sentence: str) -> tuple[int, ...]:
        known = {self.language.name(value): (value,) for value in range(1, 37)}
        known |= {self.language.some(kind=kind): matching(kind=kind) for kind in KINDS}
        known |= {self.language.some(side=side): matching(side=side) for side in ("right", "left")}
        return known[sentence]


def scored(labels: list[torch.Tensor], errs: str = "") -> dict | None:
    """The row of `sentence_rows`, if there is one."""
    labels = torch.stack(labels)
    preparation = SimpleNamespace(both=lambda case: (labels[:, None].float(), labels))
    task = SimpleNamespace(preparation=preparation)
    fitted = SimpleNamespace(nets=torch.nn.ModuleDict(), weights={"last": {}}, method=Oracle(labels, errs), task=task)
    case = Case(np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.uint8), "c", "p")
    return next(iter(sentence_rows(fitted, case)), None)


@pytest.mark.component("Dice and HIT a sentence")
class TestScore:
    def test_who_knows_is_right_about_one_and_about_several(self):
        row = scored([image_of(NODULE, OTHER, PATCH), image_of(PATCH)])
        assert row["structure"] == "one" and row["patient_id"] == "p"
        assert [row[name] for name in ("dice", "hit", "focal", "diffuse", "several", "instances")] == [1] * 6

    def test_dice_is_the_mean_over_sentences(self):
        """Of a right nodule, a left one and a left patch, a category's mask holds both nodules, or the patch."""
        row = scored([image_of(NODULE, OTHER, PATCH)], errs="category")
        assert row["dice"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
        assert row["several"] == pytest.approx((1 + 1 + 0.5 + 0.8) / 4), "all nodules, all patches, both lungs"
        assert row["focal"] == pytest.approx(2 / 3) and row["diffuse"] == 1

    def test_an_image_without_findings_has_no_sentences(self):
        assert scored([image_of()]) is None and scored([image_of(PATCH), image_of()])["dice"] == 1

    def test_a_hit_is_a_dice_of_a_tenth(self):
        label = np.zeros((10, 10), np.uint8)
        label[0, :2] = NODULE
        for many, hit in ((38, 1.0), (39, 0.0)):  # 2 * 2 / (2 + 38) is a tenth
            answer = np.zeros(100)
            answer[:many] = 0.7
            found = judged(answer.reshape(10, 10), label, Question("it", (NODULE,)))
            assert found["hit"] == hit and found["dice"] == pytest.approx(4 / (2 + many))


@pytest.mark.component("exhaustive labels in evaluation")
class TestTruth:
    def test_one_of_several_instances_is_not_enough(self):
        row = scored([image_of(NODULE, OTHER)], errs="first")
        assert row["dice"] == row["hit"] == 1
        assert row["several"] == pytest.approx((2 / 3 + 1 + 1) / 3), "all nodules, and each lung"
        assert row["instances"] == pytest.approx((0.5 + 1 + 1) / 3)

    def test_an_instance_is_found_where_half_of_it_is(self):
        label = image_of(NODULE, OTHER).numpy()
        answer = np.where(label == NODULE, 0.9, 0.0)
        answer[4:5, :3] = 0.9
        assert judged(answer, label, ALL_NODULES)["instances"] == 0.5
        answer[5, :2] = 0.9
        assert judged(answer, label, ALL_NODULES)["instances"] == 1

    def test_the_score_knows_nothing_of_what_was_drawn_for_training(self):
        case = next(FINDINGS_QUICK.data.cases(FINDINGS_QUICK.val_patients[:1]))
        labels = FINDINGS_QUICK.preparation.labels(case)
        tables = []
        for method in (BASELINE, ToldInstances()):
            oracle = Oracle(labels)
            oracle.language = method.language
            fitted = SimpleNamespace(
                nets=torch.nn.ModuleDict(), weights={"last": {}}, method=oracle, task=FINDINGS_QUICK
            )
            tables.append(sentence_rows(fitted, case))
        assert tables[0] == tables[1] and tables[0][0]["several"] == tables[0][0]["dice"] == 1


def test_focal_and_diffuse_are_told_apart():
    label = image_of(NODULE, PATCH).numpy()
    answer = (label == NODULE).astype(float)
    left = Question("all findings in the left lung", matching(side="left"))
    assert DIFFUSE == "patch"
    assert judged(answer, label, Question("it", (NODULE,)))["focal"] == 1
    assert np.isnan(judged(answer, label, Question("it", (NODULE,)))["diffuse"])
    assert judged(answer, label, Question("it", (PATCH,)))["diffuse"] == 0
    both = judged(answer, label, left)
    assert np.isnan(both["focal"]) and np.isnan(both["diffuse"])
    row = scored([image_of(NODULE)])
    assert row["focal"] == 1 and np.isnan(row["diffuse"])
