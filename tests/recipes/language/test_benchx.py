"""BenchX: one protocol of tuning, rates chosen on patients who do not train, and the methods that it compares."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.methods.contrastive import matched, numbered
from medcook.recipes.language import _bench
from medcook.recipes.language._bench import BRAINS, BenchTask, Candidates, word_similarity
from medcook.recipes.language._reading import Reader
from medcook.recipes.language.benchx import (
    FULL_ARMS,
    BenchConVIRT,
    BenchGLoRIA,
    BenchMeDSLIP,
    BenchSimCLR,
    bench_rows,
    recipe,
)
from medcook.recipes.language.convirt import ConVIRT
from medcook.sampling import trained
from medcook.tasks import Budget, Samples
from medcook.training import Loop, unlabelled_samples

SMALL = {"start": "random", "channels": (4, 8, 8), "width": 16}
TINY = BenchConVIRT(**SMALL)
KINDS = [kind(**SMALL) for kind in (BenchConVIRT, BenchGLoRIA, BenchMeDSLIP, BenchSimCLR)]
READS, LABELS, LATE = Moment(0, 10), Moment(7, 10), Moment(9, 10)
REPORTS = ("PTB in the right upper field", "normal", "scars", "normal")


def built(method=TINY) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 2, 2).train()


def batches(size: tuple[int, int] = (32, 32)) -> tuple[Batch, Batch]:
    """Labelled images, and unlabelled ones of which the second and the fourth are of patients who choose."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 0, 1]).byte().view(-1, 1, 1).expand(-1, *size).contiguous()
    raters = labels.clone()[:, None]
    raters[[0, 2]] = IGNORE
    labelled = Batch(torch.randn(4, 1, *size, generator=rng), labels)
    hidden = torch.full_like(labels, IGNORE)
    images = torch.randn(4, 1, *size, generator=rng)
    return labelled, Batch(images, hidden, torch.tensor([5, 6, 7, 9]), raters=raters, groups=torch.arange(4))


@pytest.mark.component("unified fine-tuning protocol")
class TestProtocol:
    def test_the_head_standardises_and_starts_small(self):
        reader = built()["model"].tried[0]
        norm, line = reader.head
        features = 50 * torch.randn(3, 8) + 7
        standard = (features - features.mean(1, keepdim=True)) / (
            features.var(1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        torch.testing.assert_close(norm(features), standard, atol=1e-4, rtol=1e-4)
        assert line.weight.abs().max() <= 0.04 and (line.bias == 0).all()
        assert built(replace(TINY, standardised=False))["model"].tried[0].head.__class__ is nn.Linear

    def test_the_encoder_has_a_tenth_of_the_heads_rate_of_its_candidate(self):
        method = replace(TINY, rates=(0.02, 0.3))
        nets = built(method)
        optimiser, _ = method.optimise([p for p in nets.parameters() if p.requires_grad], 10)
        groups = [{id(weight) for weight in group["params"]} for group in optimiser.param_groups]
        of = lambda part: next(k for k, group in enumerate(groups) if id(next(part.parameters())) in group)  # noqa: E731
        first, second = nets["model"].tried
        rates = [optimiser.param_groups[of(part)]["lr"] for part in (first.encoder, nets["pretext"])]
        assert rates == pytest.approx([method.pretext_rate / 25] * 2), "everything reads at one rate"
        assert len({of(first.encoder), of(first.head), of(second.encoder), of(second.head), of(nets["pretext"])}) == 5
        for rate, part in ((0.02, first.head), (0.002, first.encoder), (0.3, second.head), (0.03, second.encoder)):
            wanted = [replace(method, rate=rate).rate_at(Moment(step, 10)) for step in range(10)]
            tag = next(part.parameters()).tuned_at
            assert [method.pace(Moment(step, 10), tag) for step in range(10)] == pytest.approx(wanted)

    def test_both_start_from_what_was_read_and_learn_the_same_images(self):
        nets, (labelled, unlabelled) = built(), batches()
        first, second = nets["model"].tried
        with torch.no_grad():
            for weight in first.encoder.parameters():
                weight += 0.1 * torch.randn_like(weight)
        loss = TINY.training_step(nets, labelled, unlabelled, LABELS)
        assert all(map(torch.equal, first.encoder.parameters(), second.encoder.parameters()))
        assert all(map(torch.equal, first.head.parameters(), second.head.parameters()))
        wanted = F.cross_entropy(first(labelled.images), torch.tensor([0, 1, 0, 1]))
        assert loss.item() == pytest.approx(2 * wanted.item(), rel=1e-4)
        loss.backward()
        torch.testing.assert_close(first.head[1].weight.grad, second.head[1].weight.grad)
        with torch.no_grad():
            second.head[1].weight += 1
        TINY.training_step(nets, labelled, unlabelled, LATE)
        assert not torch.equal(first.head[1].weight, second.head[1].weight), "only the first step starts anew"

    def test_the_ablation_is_tuned_as_in_its_own_recipe(self):
        method, without = (recipe.arms[name].method for name in recipe.ablation)
        assert without.rates == (ConVIRT.rate,) and without.encoder_share == 1 and not without.standardised
        changes = {"rates": method.rates, "encoder_share": method.encoder_share, "standardised": True}
        assert replace(without, **changes) == method

    @pytest.mark.parametrize("size", [(32, 32), (37, 50)])
    def test_any_size(self, size):
        nets, (labelled, unlabelled) = built(), batches(size)
        for now in (READS, LATE):
            assert torch.isfinite(TINY.training_step(nets, labelled, unlabelled, now))
        assert TINY.predict(nets.eval(), labelled.images).shape == (4, 2, *size)


@pytest.mark.component("parameter selection on validation patients")
class TestChoice:
    def candidates(self) -> Candidates:
        torch.manual_seed(0)
        return Candidates(Reader("random", 1, 2, (4, 8, 8)), 3)

    def test_the_highest_auc_predicts(self):
        model, rng = self.candidates(), np.random.default_rng(0)
        outcomes = rng.integers(0, 2, 30)
        scores = np.stack([rng.random(30), rng.random(30) + 0.6 * outcomes, rng.random(30) + 0.2 * outcomes])
        places = torch.from_numpy(rng.permutation(1000)[:30])
        model.note(places[:20], torch.from_numpy(outcomes[:20]), torch.from_numpy(scores[:, :20]).float())
        model.note(places[20:], torch.from_numpy(outcomes[20:]), torch.from_numpy(scores[:, 20:]).float())
        assert model.values() == pytest.approx([roc_auc_score(outcomes, row) for row in scores])
        with torch.no_grad():
            model.tried[1].head.bias += 3
        images = torch.randn(2, 1, 32, 32)
        assert model.best() == 1 and torch.equal(model(images), model.tried[1](images))

    def test_before_anything_is_known_the_first_predicts(self):
        model = self.candidates()
        assert model.best() == 0 and all(math.isnan(value) for value in model.values())

    def test_late_steps_note_what_averages_say_of_those_who_choose(self):
        nets, (labelled, unlabelled) = built(), batches()
        TINY.training_step(nets, labelled, unlabelled, Moment(7, 10))
        assert (nets["model"].outcomes == -1).all(), "early steps say nothing yet"
        with torch.no_grad():
            nets["average"].tried[1].head[1].bias[1] += 2
        TINY.training_step(nets, labelled, unlabelled, Moment(98, 100))
        known = (nets["model"].outcomes >= 0).nonzero()[:, 0].tolist()
        assert known == [6, 9] and nets["model"].outcomes[known].tolist() == [1, 1]
        nets["average"].eval()
        for number, reader in enumerate(nets["average"].tried):
            wanted = reader(unlabelled.images[[1, 3]]).softmax(1)[:, 1]
            torch.testing.assert_close(nets["model"].scores[number, known], wanted)

    def test_the_prediction_knows_the_choice(self):
        nets, (labelled, _) = built(), batches()
        nets["model"].note(torch.arange(4), torch.tensor([0, 1, 0, 1]), torch.tensor([[0.9, 0.1] * 2, [0.1, 0.9] * 2]))
        TINY.after_step(nets, LATE)
        assert nets["average"].best() == 1
        wanted = nets["average"].eval().tried[1](labelled.images).softmax(1)
        torch.testing.assert_close(TINY.predict(nets, labelled.images)[:, :, 0, 0], wanted)

    def test_rows_tell_the_rate(self):
        task, budget = BRAINS, Budget(steps=8, batch=8, precision="float32", checks=0)
        extra = unlabelled_samples(TINY, task)
        loop = Loop(TINY, task, budget, "float32", 0, task.samples("labelled"), extra, None, False, accelerator="cpu")
        fitted = loop.run()
        (row,) = bench_rows(fitted, next(iter(task.cases("val"))))
        assert row["rate"] == TINY.rates[trained(fitted)["average"].best()] and 0 <= row["score"] <= 1


@pytest.mark.component("the same data and splits")
class TestData:
    def test_validation_patients_choose_and_are_not_scored(self, monkeypatch):
        task = BenchTask("embedded", outcome="group", positive="atrophy", labelled=4, evaluation="test")
        found, read = task.samples("unlabelled"), super(BenchTask, task).samples("unlabelled")
        val = task.samples("val")
        assert isinstance(found, Samples) and len(found) == len(read) + len(val) <= _bench.MOST
        assert (found.labels == IGNORE).all() and (found.raters[: len(read)] == IGNORE).all()
        assert torch.equal(found.raters[len(read) :, 0], val.labels)
        assert torch.equal(found.images[len(read) :], val.images) and torch.equal(
            found.groups[: len(read)], read.groups
        )
        assert not {*task.choosing_patients} & {*task.data.split.test, *task.unlabelled_patients}

    def test_where_they_are_scored_training_patients_without_a_label_choose(self):
        found, choosing = BRAINS.samples("unlabelled"), {*BRAINS.choosing_patients}
        assert choosing and not choosing & {*BRAINS.val_patients, *BRAINS.labelled_patients}
        for number, patient in enumerate(BRAINS.unlabelled_patients):
            raters = found.raters[found.case_of == number]
            outcome = int(BRAINS.is_positive(BRAINS.data.attributes(BRAINS.data.patients[patient][0])))
            assert (raters == (outcome if patient in choosing else IGNORE)).all()

    @pytest.mark.parametrize("method", KINDS, ids=[type(method).__name__ for method in KINDS])
    def test_who_chooses_is_not_read(self, method, monkeypatch):
        nets, (labelled, unlabelled) = built(method), batches()
        seen = []
        monkeypatch.setattr(type(method), "view", lambda self, images: seen.append(images) or images)
        method.training_step(nets, labelled, unlabelled, READS)
        assert all(torch.equal(images, unlabelled.images[[0, 2]]) for images in seen) and seen
        nobody = unlabelled._replace(raters=unlabelled.raters[[1, 1, 3, 3]])
        assert method.training_step(nets, labelled, nobody, READS).item() == 0

    def test_arms_share_everything_but_how_they_read(self):
        shared = (
            "start",
            "channels",
            "share",
            "pretext_rate",
            "decay",
            "average",
            "augmentation",
            "rates",
            "encoder_share",
        )
        methods = [recipe.arms[name].method for name in FULL_ARMS[:3]]
        for name in shared:
            assert len({repr(getattr(method, name)) for method in methods}) == 1


@pytest.mark.component("nine methods")
@pytest.mark.parametrize("method", KINDS, ids=[type(method).__name__ for method in KINDS])
def test_every_method_trains_its_encoder_in_either_precision(method):
    labelled, unlabelled = batches()
    assert method.trial is BRAINS
    for mixed in (False, True):
        nets = built(method)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = method.training_step(nets, labelled, unlabelled._replace(raters=None), READS)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].tried[0].encoder.parameters())
        assert all(p.grad is None for p in nets["model"].tried[1].parameters()), "the others wait"


@pytest.mark.component("local attention between words and places (GLoRIA)")
class TestGLoRIA:
    def test_words_look_at_places_one_by_one(self):
        torch.manual_seed(0)
        places, words = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
        empty = torch.tensor([[False] * 4, [False, False, True, True]])
        found = word_similarity(places, words, empty, 4.0, 5.0)
        for b in range(2):
            for t in range(2):
                said = words[t][~empty[t]]
                shares = (places[b] @ said.T).softmax(1)  # of every place among the words
                total = 0.0
                for k, word in enumerate(said):
                    looks = (4 * shares[:, k]).softmax(0)
                    seen = looks @ places[b]
                    total += math.exp(5 * float(F.cosine_similarity(word, seen, dim=0)))
                assert found[b, t].item() == pytest.approx(math.log(total))

    def test_equal_reports_share(self):
        similar = torch.randn(3, 3).double()
        target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]).double()
        forth, back = (-(target * s.log_softmax(1)).sum(1).mean() for s in (similar, similar.T))
        assert matched(similar, numbered(("a", "b", "a"))).item() == pytest.approx(
            ((forth + back) / 2).item(), rel=1e-5
        )

    def test_the_whole_and_the_words_count(self):
        method = BenchGLoRIA(**SMALL)
        nets, images = built(method).eval(), torch.randn(4, 1, 32, 32)
        parts, maps = nets["pretext"], nets["model"].maps(images)
        found = method.reading(nets, images, REPORTS, READS)
        words, empty = parts["text"].tokens(REPORTS)
        local = word_similarity(parts["place"](maps.flatten(2).transpose(1, 2)), parts["word"](words), empty, 4, 5)
        vectors = F.normalize(parts["see"](nets["model"].features(images)), dim=1)
        texts = F.normalize(parts["hear"](parts["text"](REPORTS)), dim=1)
        numbers = numbered(REPORTS)
        wanted = matched(10 * local, numbers) + matched(10 * vectors @ texts.T, numbers)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_recipe_runs_three_readers_at_full():
    assert recipe.arms_at("full") == FULL_ARMS and len(FULL_ARMS) == 4
    assert recipe.scales["full"].task.evaluation == "test"
