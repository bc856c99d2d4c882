"""VILA-M3: against an implementation of its own, conversations in which experts are asked, and how answers score."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from consulted import TINY, Certain, batch, built
from vila_weights import Reference, published_state, write

from medcook.errors import MedcookError
from medcook.methods import Moment
from medcook.networks.vila import IMAGE, LLAMAS, Siglip, Vila, load_vila
from medcook.recipes.findings import _asked as asked
from medcook.recipes.findings import vila_m3
from medcook.recipes.findings._asked import CALLS, TOPICS, UNKNOWN, written
from medcook.recipes.findings._experts import Experts
from medcook.recipes.findings.vila_m3 import BRAINS, Consulting, asked_rows, recipe
from medcook.tasks import Budget
from medcook.training import Loop

UNHEARD = re.compile(r"^vision_tower\.net\.(head|post_layernorm|encoder\.layers\.2)|k_proj\.bias$")
"""Weights that change nothing: those after the layer that is heard, and what softmax takes away."""


@pytest.mark.component("architecture")
class TestArchitecture:
    @torch.no_grad()
    def test_pictures_and_words_are_those_of_an_implementation_of_its_own(self, tmp_path):
        model, reference = load_vila(write(tmp_path / "vila")), Reference()
        images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(2))
        expected = [reference.picture(image) for image in images]
        pictures = model.pictures(images)
        torch.testing.assert_close(pictures, torch.stack(expected), atol=2e-4, rtol=1e-3)
        rows = [[0, 2, IMAGE, 5, 6, IMAGE, 8], [0, IMAGE, 7]]
        found = model.next_words(rows, pictures)
        wanted = [reference.logits(rows[0], expected[:2]), reference.logits(rows[1], expected[2:])]
        torch.testing.assert_close(found, torch.stack(wanted), atol=2e-4, rtol=1e-3)


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, tmp_path):
        model, mine = load_vila(write(tmp_path / "vila")), {}
        for state in published_state().values():
            mine |= {float(tensor.double().sum()): tensor.shape for tensor in state.values()}
        found = {float(tensor.double().sum()): tensor.shape for tensor in model.state_dict().values()}
        assert found == mine and not model.training
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.component("expert-guided instruction fine-tuning")
class TestTraining:
    def certain(self) -> Experts:
        experts = Experts("random", (4, 8))
        experts[0], experts[1] = Certain(0.9, 2), Certain(0.3, 5)
        return experts

    def test_a_training_image_is_shown_to_who_does_not_know_it(self):
        """The defining property: number k has learnt from half k."""
        experts = self.certain()
        found = experts.consult(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
        assert found.outcome.tolist() == pytest.approx([0.3, 0.9, 0.9, 0.3], abs=1e-6)
        assert found.lungs[:, 0, :, 0].nonzero().tolist() == [[0, 5], [1, 2], [2, 2], [3, 5]]
        assert experts[0].asked == experts[1].asked == 2

    def test_anybody_else_to_both(self):
        found = self.certain().consult(torch.zeros(1, 1, 8, 8))
        assert found.outcome.item() == pytest.approx(0.6)
        assert found.lungs[0, 0, :, 0].nonzero().flatten().tolist() == [2, 5]  # 7 against -5: the surer one wins

    def test_experts_learn_from_their_half_alone(self):
        for half in (0, 1):
            nets, given = built(), batch(2)
            TINY.pretext(nets, given._replace(groups=given.groups % 2 * 0 + half), Moment(0, 9)).backward()
            learnt = [all(p.grad is not None for p in expert.parameters()) for expert in nets["pretext"]]
            assert learnt == [half == 0, half == 1]

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("step, learning", [(0, "pretext"), (8, "model")])
    def test_every_part_learns_in_its_phase_in_either_precision(self, step, learning, mixed):
        nets = built()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = TINY.training_step(nets, batch(), None, Moment(step, 9))
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        for name in ("pretext", "model"):
            weights = dict(nets[name].named_parameters())
            still = [key for key, p in weights.items() if p.grad is None or not p.grad.abs().max() > 0]
            assert all(map(UNHEARD.search, still)) if name == learning else still == list(weights), still

    def test_truths_are_the_outcome_the_lungs_in_the_image_and_the_person(self):
        halves, truths = TINY.facts(batch())
        assert halves.tolist() == [0, 0, 1, 1]
        assert truths.tolist() == [[1, 1, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, UNKNOWN, 0]]

    def test_arms_differ_in_one_thing_each(self):
        method, none, alone, shuffled = (recipe.arms[name].method for name in recipe.arms)
        assert replace(none, experts=True) == replace(alone, speaker="model") == method
        assert replace(shuffled, shuffled=False) == method
        assert recipe.compare == ("expert feedback", "no experts") and recipe.ablation[1] == "shuffled feedback"
        assert not any(arm.changes for arm in recipe.arms.values())


@pytest.mark.component("expert-guided instruction fine-tuning")
@pytest.mark.component("expert feedback in the conversation")
class TestConversations:
    def conversations(self, monkeypatch, method: Consulting) -> list[str]:
        kept = []

        def loss(self, lines, told, pictures):
            assert len(pictures) == sum(row.count(IMAGE) for row in lines)
            kept.extend(written(row) for row in lines)
            return pictures.sum() * 0

        monkeypatch.setattr(Vila, "loss", loss)
        nets = built(method)
        nets["pretext"][0], nets["pretext"][1] = Certain(0.9, 2), Certain(0.3, 5)
        method.training_step(nets, batch(), None, Moment(8, 9))
        return kept

    def heard(self, rows: list[str]) -> list[str]:
        """What the classifier says, in those that call it."""
        called = [row for row in rows if CALLS["CXR"] + " predictions" in row]
        return ["yes" if "predictions tuberculosis yes" in row else "no" for row in called]

    def test_all_questions_with_known_answers_are_asked(self, monkeypatch):
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.0))
        assert len(rows) == 19 and all(asked.CARDS in row for row in rows)
        answers = [
            [row.split()[-2] for row in rows if any(form in row for form in topic.forms)] for topic in TOPICS.values()
        ]
        assert answers == [
            ["yes", "no", "yes", "no"],
            ["middle"] * 4,
            ["yes"] * 4,
            ["woman", "man", "man"],
            ["older", "young", "older", "young"],
        ]
        assert self.heard(rows) == ["no", "no", "yes", "yes"], "of those who do not know the image"

    def test_the_ablation_hears_of_another_patient(self, monkeypatch):
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.0, shuffled=True))
        assert self.heard(rows) == ["yes", "no", "no", "yes"], "of the patient before in the batch"

    def test_without_experts_and_without_cards_nobody_is_heard(self, monkeypatch):
        for method in (replace(TINY, experts=False), replace(TINY, withheld=1.0)):
            rows = self.conversations(monkeypatch, method)
            assert len(rows) == 19 and not any("<CXR()>" in row or "<LUNGS()>" in row for row in rows)

    def test_some_questions_come_without_cards(self, monkeypatch):
        torch.manual_seed(0)
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.5))
        assert 4 < sum(asked.CARDS in row for row in rows) < 15


@pytest.fixture(scope="module")
def fitted():
    budget = Budget(steps=4, batch=4, precision="float32", checks=0)
    return Loop(TINY, BRAINS, budget, "float32", 0, BRAINS.samples("labelled"), None, None, False, "cpu").run()


class TestRows:
    def truths(self, case) -> dict[str, list[str]]:
        drawn = BRAINS.preparation.images(case)[:, 1] > 0.5
        found = {"tuberculosis": ["yes" if case.attributes["group"] == "atrophy" else "no"] * len(drawn)}
        area = drawn.flatten(1).float().mean(1) * 100
        found["size"] = ["small" if a <= 20 else "middle" if a <= 30 else "large" for a in area]
        found["sex"] = [{"F": "woman", "M": "man"}[case.attributes["sex"]]] * len(drawn)
        found["age"] = ["older" if case.attributes["age"] >= 47 else "young"] * len(drawn)
        return found

    @torch.no_grad()
    def test_answers_are_compared_with_the_truth(self, fitted, monkeypatch):
        case = next(iter(BRAINS.cases("val")))
        truths, script = self.truths(case), {}
        for name, right in truths.items():  # half of the answers are wrong
            script[name] = [answer if k % 2 else "nonsense" for k, answer in enumerate(right)]

        def replies(self, nets, images, found, cards=True):
            of = lambda name, k: script.get(name, [""] * 99)[k] if cards else ""  # noqa: E731
            return [[asked.Reply("CXR", of(name, k)) for name in TOPICS] for k in range(len(images))]

        monkeypatch.setattr(Consulting, "replies", replies)
        rows = {row["structure"]: row for row in asked_rows(fitted, case)}
        assert list(rows) == list(TOPICS)
        for name in script:
            assert rows[name]["correct"] == pytest.approx(0.5) and rows[name]["alone"] == 0
        assert [rows[name]["called"] for name in TOPICS] == [1, 0, 0, 0, 0]

    @torch.no_grad()
    def test_experts_alone_answer_what_they_know_and_else_the_commonest(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        experts = replace(TINY, speaker="experts")
        rows = {row["structure"]: row for row in asked_rows(replace(fitted, method=experts), case)}
        nets, truths = fitted.nets.eval(), self.truths(case)
        found = nets["pretext"].consult(BRAINS.preparation.images(case)[:, :1])
        outcome = ["yes" if p > 0.5 else "no" for p in found.outcome.tolist()]
        share = np.mean([a == b for a, b in zip(outcome, truths["tuberculosis"], strict=True)])
        assert rows["tuberculosis"]["correct"] == rows["tuberculosis"]["expert"] == pytest.approx(share)
        people = [BRAINS.data.attributes(BRAINS.data.patients[p][0]) for p in BRAINS.labelled_patients]
        older = sum(known["age"] >= 47 for known in people) > len(people) / 2
        assert rows["age"]["correct"] == float(older == (case.attributes["age"] >= 47))

    @torch.no_grad()
    def test_shuffled_findings_are_those_of_a_training_image(self, fitted, monkeypatch):
        case, seen = next(iter(BRAINS.cases("val"))), []
        consult = Experts.consult
        monkeypatch.setattr(
            Experts, "consult", lambda self, images, halves=None: seen.append(images) or consult(self, images)
        )
        asked_rows(replace(fitted, method=replace(TINY, shuffled=True)), case)
        known = BRAINS.samples("labelled").images[:, :1]
        assert seen[0].shape == BRAINS.preparation.images(case)[:, :1].shape
        assert any(torch.equal(seen[0][0], other) for other in known)

    def test_what_is_not_known_has_no_row(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        case.attributes["sex"] = case.attributes["group"] = None
        assert [row["structure"] for row in asked_rows(fitted, case)] == ["size", "sides", "age"]

    @torch.no_grad()
    def test_predictions_are_answers(self, fitted, monkeypatch):
        answers = iter(["yes", "no", "nonsense"])
        monkeypatch.setattr(
            Consulting,
            "replies",
            lambda self, nets, images, found: [[asked.Reply(None, next(answers))] for _ in images],
        )
        found = TINY.predict(fitted.nets.eval(), batch(3).images)
        assert found.shape == (3, 2, 48, 48) and found[:, 1, 0, 0].tolist() == [1, 0, 0.5]

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="not volumes"):
            TINY.build(1, 2, 3)


@pytest.mark.component("the model calls an expert by a word")
class TestCalls:
    @pytest.mark.parametrize("experts, called", [(True, [0, 0, 0, 1, 1]), (False, [1] * 5)])
    def test_where_there_is_no_expert_nobody_is_to_be_called(self, fitted, monkeypatch, experts, called):
        silent = lambda self, nets, images, found, cards=True: [[asked.Reply(None, "")] * 5 for _ in images]  # noqa: E731
        monkeypatch.setattr(Consulting, "replies", silent)
        run = replace(fitted, method=replace(TINY, experts=experts))
        assert [row["called"] for row in asked_rows(run, next(iter(BRAINS.cases("val"))))] == called

    @pytest.mark.parametrize("experts, cards, shown", [(True, True, True), (True, False, False), (False, True, False)])
    def test_cards_are_shown_where_there_are_experts(self, fitted, monkeypatch, experts, cards, shown):
        seen = []

        def talk(next_words, questions, heard, cards):
            seen.extend([cards, questions, len(heard)])
            return [asked.Reply(None, "")] * len(questions)

        monkeypatch.setattr(asked, "talk", talk)
        images = batch(2).images[:, :1]
        method, nets = replace(TINY, experts=experts), fitted.nets.eval()
        assert len(method.replies(nets, images, nets["pretext"].consult(images), cards)) == 2
        assert seen == [shown, 2 * [topic.forms[0] for topic in TOPICS.values()], 10]


def test_quick_takes_the_published_kind_of_eyes():
    for name in recipe.arms:
        assert recipe.method("quick", name).encoder == "siglip" and recipe.method("full", name).encoder == "imagenet"
    assert isinstance(built()["model"].vision_tower, Siglip)
    assert vila_m3.LLAMA["rms_norm_eps"] == LLAMAS["3B"]["rms_norm_eps"]
