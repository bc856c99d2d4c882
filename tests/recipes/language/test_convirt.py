"""ConVIRT: the contrast of images and sentences, which sentence is read, and what is kept of the reading."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.language import convirt
from medcook.recipes.language._kept import known_reports, overlap, reading_rows, retrieved, strongest
from medcook.recipes.language._reading import BRAINS, FEW
from medcook.recipes.language._reports import facts_of, said
from medcook.recipes.language.convirt import ConVIRT, drawn_from, recipe, sentences_in
from medcook.sampling import trained
from medcook.tasks import Budget
from medcook.training import Loop, unlabelled_samples

TINY = ConVIRT(start="random", channels=(4, 8, 8), width=16)
REPORTS = ("left pleural effusion", "normal chest", "PTB in the right upper field", "scars")
READS, LABELS = Moment(0, 9), Moment(8, 9)


def built(method: ConVIRT = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 2, 2)


def images(count: int = 4, size: tuple[int, int] = (32, 32)):
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(1))


def by_hand(vectors, texts, heat: float, weight: float) -> float:
    """Equations 2 to 4, pair by pair."""
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
    v, u, total = vectors.detach().double(), texts.detach().double(), 0.0
    for i in range(len(v)):
        there = [math.exp(cosine(v[i], u[k]) / heat) for k in range(len(v))]
        back = [math.exp(cosine(u[i], v[k]) / heat) for k in range(len(v))]
        total -= weight * math.log(there[i] / sum(there)) + (1 - weight) * math.log(back[i] / sum(back))
    return total / len(v)


@pytest.mark.component("bidirectional contrast of image and text")
class TestContrast:
    @pytest.mark.parametrize("weight", [0.75, 1.0])
    def test_it_is_the_papers_loss(self, weight):
        nets, method = built(), replace(TINY, image_weight=weight)
        found = method.reading(nets, images(), REPORTS, READS)
        wanted = by_hand(method.seen(nets, images()), method.heard(nets, REPORTS), 0.1, weight)
        assert found.item() == pytest.approx(wanted, rel=1e-5)
        assert (TINY.heat, TINY.image_weight) == (0.1, 0.75)

    def test_equal_sentences_are_no_negatives(self):
        nets, twice = built(), ("normal", "scars", "normal")
        vectors, texts = (F.normalize(t, dim=1) for t in (TINY.seen(nets, images(3)), TINY.heard(nets, twice)))
        log = (vectors @ texts.T / 0.1).log_softmax(1)
        there = -(log[0, [0, 2]].mean() + log[1, 1] + log[2, [0, 2]].mean()) / 3
        found = replace(TINY, image_weight=1.0).reading(nets, images(3), twice, READS)
        assert found.item() == pytest.approx(there.item(), rel=1e-4)

    def test_the_ablation_pairs_images_with_other_reports(self, monkeypatch):
        method, without = (recipe.arms[name].method for name in recipe.ablation)
        assert replace(without, shuffled=False) == method
        nets = built()
        monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count).flip(0))
        found = replace(TINY, shuffled=True).reading(nets, images(), REPORTS, READS)
        assert found.item() == pytest.approx(TINY.reading(nets, images(), REPORTS[::-1], READS).item())
        assert found.item() != pytest.approx(TINY.reading(nets, images(), REPORTS, READS).item())

    def test_every_part_learns_in_its_phase_in_either_precision(self):
        data = Batch(images(), torch.tensor([0, 1, 0, 1]).byte().view(-1, 1, 1).expand(-1, 32, 32))
        unlabelled = data._replace(labels=torch.full_like(data.labels, IGNORE), groups=torch.arange(4))
        for now, parts in ((READS, ("encoder", "pretext")), (LABELS, ("encoder", "head"))):
            for mixed in (False, True):
                nets = built()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = TINY.training_step(nets, data, unlabelled, now)
                loss.backward()
                assert loss.dtype == torch.float32 and torch.isfinite(loss)
                named = {"pretext": nets["pretext"], "encoder": nets["model"].encoder, "head": nets["model"].head}
                for name, part in named.items():
                    moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters()]
                    assert all(moved) if name in parts else not any(moved), name

    @pytest.mark.parametrize("size", [(32, 32), (37, 50), (64, 64)])
    def test_any_size(self, size):
        nets = built().eval()
        assert torch.isfinite(TINY.reading(nets, images(4, size), REPORTS, READS))
        assert TINY.predict(nets, images(4, size)).shape == (4, 2, *size)


@pytest.mark.component("random sentences and random views")
class TestSentencesAndViews:
    def test_a_report_is_cut_at_full_stops_and_semicolons(self):
        report = "1.secondary PTB in the right upper field; 2.small tuberculoma; 12x9mm, LUL. Old TB."
        assert sentences_in(report) == (
            "1.secondary PTB in the right upper field", "2.small tuberculoma", "12x9mm, LUL", "Old TB.",
        )  # fmt: skip
        assert sentences_in("normal") == ("normal",) and sentences_in("active TB; .") == ("active TB",)

    def test_each_is_drawn_as_often_and_by_torchs_generator(self):
        report, found = "one; two; three", []
        for seed in range(600):
            torch.manual_seed(seed)
            found.append(drawn_from(report))
        assert all(found.count(word) == pytest.approx(200, abs=40) for word in ("one", "two", "three"))

    def test_the_drawn_sentence_is_what_is_read(self):
        nets, reports = built(), ("scars; left effusion", "normal", "PTB", "nodule")
        torch.manual_seed(3)
        drawn = tuple(map(drawn_from, reports))
        torch.manual_seed(3)
        found = TINY.reading(nets, images(), reports, READS)
        assert found.item() == pytest.approx(TINY.reading(nets, images(), drawn, READS).item())

    def test_images_are_read_in_a_view_that_is_not_mirrored(self, monkeypatch):
        seen = []
        monkeypatch.setattr(ConVIRT, "seen", lambda self, nets, given: seen.append(given) or torch.randn(4, 16))
        data = Batch(images(), torch.full((4, 32, 32), IGNORE).byte(), groups=torch.arange(4))
        torch.manual_seed(5)
        TINY.pretext(built(), data, READS)
        assert seen[0].shape == data.images.shape and not torch.allclose(seen[0], data.images)
        assert not TINY.augmentation.flip


@pytest.mark.component("encoders and projections")
class TestEncoders:
    def test_a_sentence_is_the_largest_value_over_its_words(self):
        text = built()["pretext"]["text"].eval()
        both = strongest(text, ("scars", "PTB in the right upper field"))
        for sentence, found in zip(("scars", "PTB in the right upper field"), both, strict=True):
            vectors, _ = text.tokens((sentence,))
            wanted = torch.stack([vectors[0, :, k].max() for k in range(16)])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    def test_a_projection_has_one_hidden_layer(self):
        for name in ("see", "hear"):
            kinds = [type(layer).__name__ for layer in built()["pretext"][name]]
            assert kinds == ["Linear", "ReLU", "Linear"]


@pytest.mark.component("a tenth of the labels")
class TestLabels:
    def test_arms_differ_by_labels_and_reading_alone(self):
        method, baseline = (recipe.arms[name] for name in recipe.compare)
        assert (method.changes, baseline.changes) == ({"labelled": FEW}, {})
        assert method.method.has_pretext and not baseline.method.has_pretext
        shared = ("start", "channels", "share", "rate", "decay", "augmentation")
        assert all(getattr(method.method, name) == getattr(baseline.method, name) for name in shared)
        assert recipe.expect == "non-inferior" and recipe.margin == convirt.MARGIN

    def test_half_of_the_few_have_the_outcome_and_everybody_is_read(self):
        task = replace(BRAINS, labelled=4)
        found = task.samples("labelled")
        assert (found.labels.amax((1, 2)) == 1).float().mean() == 0.5 and len(task.labelled_patients) == 4
        read = task.samples("unlabelled")
        assert set(task.labelled_patients) < set(task.unlabelled_patients)
        assert (read.labels == IGNORE).all() and len(said(read.groups)) == len(read)


@pytest.fixture(scope="module")
def fitted():
    task, budget = replace(BRAINS, labelled=4), Budget(steps=6, batch=4, precision="float32", checks=0)
    extra = unlabelled_samples(TINY, task)
    loop = Loop(TINY, task, budget, "float32", 0, task.samples("labelled"), extra, None, False, accelerator="cpu")
    return loop.run()


@pytest.mark.component("retrieval without labels")
class TestRetrieval:
    def test_the_reader_follows_while_it_reads_and_then_stays(self):
        nets = built()
        before = [weight.clone() for weight in nets["reader"].parameters()]
        with torch.no_grad():
            for weight in (*nets["model"].parameters(), *nets["pretext"].parameters()):
                weight += 1
        TINY.after_step(nets, Moment(8, 9))
        assert all(map(torch.equal, nets["reader"].parameters(), before))
        TINY.after_step(nets, Moment(0, 9))
        moved = [(now - then).mean().item() for now, then in zip(nets["reader"].parameters(), before, strict=True)]
        assert moved == pytest.approx([0.9] * len(moved), rel=1e-4)  # the average forgets fast at first
        assert not any(weight.requires_grad for weight in nets["reader"].parameters())

    def test_the_nearest_report_is_found_one_by_one(self, fitted):
        case, nets, known = next(iter(fitted.task.cases("val"))), trained(fitted), known_reports(fitted.task)
        with torch.no_grad():
            image = TINY.seen(nets["reader"], fitted.task.preparation.images(case))
            cosines = {
                report: F.cosine_similarity(image, TINY.heard(nets["reader"], (report,))).mean().item()
                for report in known
            }
        assert retrieved(fitted, case) == max(cosines, key=cosines.get)

    def test_facts_of_two_reports_overlap(self):
        ours, theirs = facts_of("PTB in the right upper field"), facts_of("right PTB with pleural effusion")
        assert overlap(ours, theirs) == pytest.approx(2 / 5)  # right, tuberculosis; upper, effusion, pleura
        assert overlap(facts_of("normal"), facts_of("normal")) == 1 and overlap(facts_of("normal"), ours) == 0

    def test_rows_say_what_was_found_where_something_was_read(self, fitted):
        case = next(iter(fitted.task.cases("val")))
        (row,) = reading_rows(fitted, case)
        assert 0 <= row["facts"] <= 1 and 0 <= row["score"] <= 1
        unread = replace(recipe.arms[recipe.compare[1]].method, start="random")
        nets = unread.build(1, 2, 2)
        assert "reader" not in nets and "pretext" not in nets
