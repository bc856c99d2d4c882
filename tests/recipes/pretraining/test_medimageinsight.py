"""MedImageInsight: its towers against an implementation of their own, its checkpoint, and an embedding put to use."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from unicl_weights import Reference, published_state, write

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.unicl import UniCL, load_unicl
from medcook.recipes.fairness.cxr_clip_fairness import captions
from medcook.recipes.pretraining import medimageinsight
from medcook.recipes.pretraining._searching import (
    at_operating_point,
    fairness,
    gallery_of,
    insight_rows,
    left_out,
    operating_point,
    search,
    unit,
    voted,
)
from medcook.recipes.pretraining.medimageinsight import BRAINS, DomainsTask, Insight, recipe, sentences
from medcook.tasks import Budget
from medcook.training import fit

LITTLE = medimageinsight.DAVIT


def built(method) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, BRAINS.classes, 2).train()


def batch(numbers: tuple[int, ...] = (6, 7, 6, 11), size: int = 40) -> Batch:
    labels = torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1).expand(-1, size, size).contiguous()
    rng = torch.Generator().manual_seed(1)
    return Batch(torch.randn(len(numbers), 1, size, size, generator=rng), labels)


def others(size: int = 40) -> Batch:
    data = batch((24, 24, 24, 24), size)
    return data._replace(labels=torch.full_like(data.labels, IGNORE), raters=data.labels[:, None])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> UniCL:
    return load_unicl(write(tmp_path_factory.mktemp("insight"), published_state()))


@pytest.mark.component("architecture")
class TestArchitecture:
    @pytest.mark.parametrize("size", [(40, 40), (37, 50)])
    def test_the_image_tower_is_that_of_an_implementation_of_its_own(self, loaded, size):
        images, reference = torch.randn(2, 3, *size), Reference(published_state())
        with torch.no_grad():
            found = loaded.images(images)
        torch.testing.assert_close(
            found, torch.stack([reference.image(image) for image in images]), atol=2e-4, rtol=1e-3
        )

    def test_the_text_tower_reads_both_ways_and_the_last_token_speaks(self, loaded):
        reference, asked = Reference(published_state()), [[4, 1, 5], [4, 2, 3, 1, 5]]
        tokens = torch.tensor([row + [5] * (7 - len(row)) for row in asked])  # filled up with the end, as published
        mask = torch.tensor([[1] * len(row) + [0] * (7 - len(row)) for row in asked])
        with torch.no_grad():
            found = loaded.texts(tokens, mask)
        torch.testing.assert_close(found, torch.stack([reference.text(row) for row in asked]), atol=2e-4, rtol=1e-3)

    def test_the_small_one_trains_every_weight_in_either_precision(self):
        nets, data = built(LITTLE), batch()
        for mixed in (False, True):
            nets.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = LITTLE.training_step(nets, data, others(), Moment(0, 10))
            loss.backward()
            model = nets["model"]
            assert torch.isfinite(loss) and not any(p.requires_grad for p in nets["average"].parameters())
            unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert unused == []


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, loaded):
        state = published_state()
        sizes = lambda tensors: sorted(tuple(tensor.shape) for tensor in tensors)  # noqa: E731
        assert sizes(state.values()) == sizes(loaded.state_dict().values()) and not loaded.training
        mine = {float(tensor.sum()) for tensor in loaded.state_dict().values()}
        assert mine == {float(tensor.sum()) for tensor in state.values()}


@pytest.mark.component("contrast of images, texts and labels (UniCL)")
class TestContrast:
    def loss(self, v: Tensor, t: Tensor, scale: Tensor, captions: list[int]) -> float:
        """The definition, image by image and sentence by sentence."""
        total = 0.0
        for one, other in ((v, t), (t, v)):
            for i, caption in enumerate(captions):
                chances = (scale * other @ one[i]).log_softmax(0)
                same = [k for k in range(len(captions)) if captions[k] == caption]
                total -= sum(chances[k] for k in same) / len(same)
        return float(total) / (2 * len(captions))

    @torch.no_grad()
    def test_a_steps_loss_is_the_definition(self):
        nets, data, extra, numbers = built(LITTLE), batch(), others(), [6, 7, 6, 11, 24]
        found = LITTLE.training_step(nets, data, extra, Moment(0, 10)).item()
        model, images = nets["model"], torch.cat([data.images, extra.images[:1]])
        v, t = model.images(images), model.texts(tuple(model.sentences[number] for number in numbers))
        assert found == pytest.approx(self.loss(v, t, model.scale, numbers), rel=1e-4)

    def test_images_that_are_captioned_alike_share_their_sentences(self):
        v, t = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
        numbers, scale = torch.tensor([1, 2, 1, 3, 2, 1]), torch.tensor(5.0)
        found = medimageinsight.contrast(v, t, numbers, scale).item()
        assert found == pytest.approx(self.loss(v, t, scale, numbers.tolist()), rel=1e-4)
        assert found != pytest.approx(self.loss(v, t, scale, list(range(6))), rel=1e-3)


@pytest.mark.component("many domains")
class TestDomains:
    def test_nobody_of_the_new_hospital_is_learned_from(self):
        data = BRAINS.data
        site = lambda patients: {data.attributes(data.patients[p][0])["site"] for p in patients}  # noqa: E731
        assert site(BRAINS.labelled_patients) == {"south", "island"}
        assert site(BRAINS.reference_patients) == site(BRAINS.val_patients) == {"north"}
        parts = [set(part) for part in (BRAINS.labelled_patients, BRAINS.reference_patients, BRAINS.val_patients)]
        assert len(set.union(*parts)) == sum(map(len, parts)) and not set.union(*parts) & set(data.split.test)
        committed = replace(BRAINS, fold=None)
        assert set(committed.val_patients) <= set(data.split.val) and not set(committed.labelled_patients) & set(
            data.split.val
        )

    def test_a_training_is_handed_the_images_of_other_domains(self):
        seen = []

        class Noting(Insight):
            def training_step(self, nets, labelled, unlabelled, now):
                seen.append(unlabelled)
                return super().training_step(nets, labelled, unlabelled, now)

        method = Noting(captions=BRAINS.sentences, encoder="davit")
        fit(method, BRAINS, Budget(steps=1, batch=4, checks=0), cache=False, progress=False)
        assert seen[0].raters is not None and len(seen[0].images) == 4
        assert not replace(BRAINS, domains=()).unlabelled_patients

    def test_a_hospital_that_is_not_there_is_an_error(self):
        with pytest.raises(MedcookError, match="nobody is of"):
            _ = replace(BRAINS, new=("site", "moon")).val_patients

    def test_labels_are_the_captions_numbers(self):
        samples, data = BRAINS.samples("labelled"), BRAINS.data
        cases = [case for patient in BRAINS.labelled_patients for case in data.patients[patient]]
        known = sentences("embedded", BRAINS.domains)
        assert (samples.labels == samples.labels[:, :1, :1]).all()
        for number, case in enumerate(cases):
            facts, (label,) = data.attributes(case), set(samples.labels[samples.case_of == number, 0, 0].tolist())
            finding, sex = (
                {"atrophy": "diseased", "control": "clear"}[facts["group"]],
                {"F": "woman", "M": "man"}[facts["sex"]],
            )
            assert known[label].startswith(f"brain mri {finding} {sex} ")
            assert label % 2 == (facts["group"] == "atrophy")

    def test_other_domains_come_with_their_own_captions_as_raters(self, monkeypatch):
        groups = {"embedded, negative": ("negative mri", {"atrophy": "thin", "control": "clear"})}
        monkeypatch.setattr(medimageinsight, "OTHERS", groups)
        samples, data, known = BRAINS.samples("unlabelled"), BRAINS.data, sentences("embedded", BRAINS.domains)
        assert (
            known[24:] == ("negative mri", "negative mri thin", "negative mri clear")
            and (samples.labels == IGNORE).all()
        )
        facts = [data.attributes(case)["group"] for p in data.split.train for case in data.patients[p]]
        said = [known[number] for number in samples.raters[:, 0, 0, 0].tolist()]
        assert said == [
            f"negative mri {groups['embedded, negative'][1][facts[k]]}" for k in range(len(facts)) for _ in range(8)
        ]
        assert torch.equal(samples.raters, samples.raters[:, :, :1, :1].expand_as(samples.raters))

    def test_every_caption_of_the_real_domains_has_a_number(self):
        known = sentences("chest_xray", medimageinsight.DOMAINS)
        assert len(known) == len(set(known)) == 24 + 8 and "heart mri infarcted" in known
        assert known[1].split()[-1] == "diseased" and len(captions(("sex", "age"))) == 24

    def test_the_ablation_is_the_same_without_them(self):
        method, ablation = (recipe.arms[name] for name in recipe.ablation)
        assert replace(ablation.method, others=method.method.others) == method.method and not ablation.changes

    def test_an_arms_captions_are_those_of_its_task(self):
        for profile, scale in recipe.scales.items():
            for arm in recipe.arms_at(profile):
                method, task = recipe.run(profile, arm, 0)[:2]
                assert method.captions == task.sentences and len(task.sentences) == task.classes
                assert (
                    len(captions(task.said)) == (2 if "findings" in arm else 24) and scale.task.domains == task.domains
                )

    @pytest.mark.parametrize("share, seen", [(0.0, 4), (0.25, 5), (1.0, 8)])
    def test_a_batch_has_so_many_of_them(self, monkeypatch, share, seen):
        asked, contrast = [], medimageinsight.contrast
        monkeypatch.setattr(medimageinsight, "contrast", lambda v, *rest: asked.append(len(v)) or contrast(v, *rest))
        method = replace(LITTLE, others=share)
        method.training_step(built(method), batch(), others(), Moment(0, 10))
        assert asked == [seen]


@pytest.fixture(scope="module")
def fitted() -> SimpleNamespace:
    """The small embedding as it starts, with a task: its gallery is real."""
    nets = built(LITTLE).eval()
    return SimpleNamespace(method=LITTLE, task=replace(BRAINS, most=40), nets=nets, weights={"last": nets.state_dict()})


@pytest.mark.component("classification without fine-tuning")
class TestNearest:
    def test_a_vote_is_that_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        known, asked, findings = rng.normal(size=(60, 5)), rng.normal(size=(20, 5)), (rng.random(60) < 0.4) * 1.0
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        expected = KNeighborsClassifier(7, metric="cosine").fit(known, findings).predict_proba(asked)[:, 1]
        np.testing.assert_allclose(voted(unit(asked) @ unit(known).T, findings, 7), expected)

    def test_fifteen_vote_where_there_are_enough(self):
        findings = (np.arange(100) < 15) * 1.0
        assert voted(-np.arange(100.0)[None], findings)[0] == 1 and voted(-np.arange(100.0)[None], findings, 16)[0] < 1
        assert voted(-np.arange(8.0)[None], findings[11:19])[0] == 1 and voted(np.zeros((1, 3)), findings[:3])[0] == 1

    def test_a_patients_score_is_the_vote_of_the_new_hospitals_training_patients(self, fitted):
        case, task = next(iter(fitted.task.cases("val"))), fitted.task
        known = list(task.cases("reference"))
        assert {case.patient_id for case in known} == set(task.reference_patients)
        similarity = np.array([unit(fitted, one) @ unit(fitted, case) for one in known])
        ill = np.array([one.attributes["group"] == "atrophy" for one in known], dtype=float)
        (row,) = insight_rows(fitted, case)
        assert row["score"] == pytest.approx(ill[np.argsort(-similarity)[: len(ill) // 4]].mean())
        assert row["outcome"] == float(case.attributes["group"] == "atrophy") and 0 < row["zero_shot"] < 1

    def test_the_baseline_is_what_the_encoder_was_before(self):
        method = replace(LITTLE, tuned=False)
        nets, data = built(method), batch()
        method.training_step(nets, data, None, Moment(0, 10)).backward()
        assert all(p.grad is None for p in nets["model"].image.parameters())
        features = nets["average"].image(data.images)
        torch.testing.assert_close(method.embed(nets, data.images), features / features.norm(dim=1, keepdim=True))
        learnt, baseline = (recipe.arms[name].method for name in recipe.compare)
        assert replace(baseline, tuned=True) == learnt

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="not volumes"):
            LITTLE.build(1, 2, 3)


@pytest.mark.component("image-image search with evidence")
class TestSearch:
    def test_what_is_nearest_comes_first_of_all_domains(self, fitted):
        case, gallery = next(iter(fitted.task.cases("val"))), gallery_of(fitted)
        count = len(fitted.task.reference_patients)
        assert gallery.names[:count] == fitted.task.reference_patients
        assert set(gallery.names[count:]) == {"embedded, negative"} and len(gallery.names) == count + 40
        assert np.isnan(gallery.findings[count:]).all() and not np.isnan(gallery.findings[:count]).any()
        np.testing.assert_allclose(np.linalg.norm(gallery.vectors, axis=1), 1, atol=1e-4)
        table = search(fitted, case, 9)
        similarity = gallery.vectors @ unit(fitted, case)
        np.testing.assert_allclose(table["similarity"], np.sort(similarity)[::-1][:9])
        assert table["name"].tolist() == [gallery.names[k] for k in np.argsort(-similarity, kind="stable")[:9]]

    def test_a_known_image_finds_itself(self, fitted):
        case = next(iter(fitted.task.cases("reference")))
        first = search(fitted, case, 1).iloc[0]
        assert first["name"] == case.patient_id and first["similarity"] == pytest.approx(1, abs=1e-4)

    def test_precision_counts_the_same_finding_and_kind(self, fitted):
        for case in list(fitted.task.cases("val"))[:2]:
            (row,), table = insight_rows(fitted, case), search(fitted, case)
            assert row["precision"] == pytest.approx(np.mean([found == row["outcome"] for found in table["finding"]]))
            assert row["same_kind"] == pytest.approx(np.mean([name != "embedded, negative" for name in table["name"]]))


@pytest.mark.component("sensitivity and specificity by need")
class TestOperatingPoint:
    @pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 1.0])
    def test_it_is_the_highest_threshold_of_the_roc_curve_that_is_sensitive_enough(self, wanted):
        rng = np.random.default_rng(3)
        findings = (rng.random(80) < 0.5) * 1.0
        scores = np.round(rng.random(80) + 0.3 * findings, 1)
        _, sensitivity, thresholds = roc_curve(findings, scores, drop_intermediate=False)
        assert operating_point(scores, findings, wanted) == thresholds[np.flatnonzero(sensitivity >= wanted)[0]]

    def test_known_images_are_scored_by_the_others(self):
        vectors, findings = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3 == 0
        for one in (0, 7, 29):
            rest = np.arange(30) != one
            expected = voted((vectors[rest] @ vectors[one])[None], findings[rest], 30 // 4)[0]
            assert left_out(vectors, findings)[one] == pytest.approx(expected)

    def test_its_sensitivity_and_specificity_are_those_of_new_patients(self):
        outcome, called = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
        frame = pd.DataFrame({"patient_id": list("abcdefghij"), "outcome": outcome, "called": called}, dtype=object)
        found = at_operating_point(frame.astype({"outcome": float, "called": float}))
        assert found["sensitivity"].mean == 0.75 and found["specificity"].mean == pytest.approx(4 / 6)


@pytest.mark.component("fairness across age and sex")
def test_every_group_of_age_and_sex_has_its_own_auc():
    rng = np.random.default_rng(0)
    words = [
        f"Montgomery {age} {sex}"
        for age, sex in zip(rng.choice(["young", "older"], 90), rng.choice(["woman", "man"], 90), strict=True)
    ]
    outcome = rng.integers(0, 2, 90)
    frame = pd.DataFrame(
        {"patient_id": [f"p{k}" for k in range(90)], "case_id": [f"p{k}" for k in range(90)], "group": words}
    )
    frame = frame.assign(structure="tuberculosis", outcome=outcome * 1.0, score=outcome + rng.normal(size=90))
    table = fairness(frame).set_index("subgroup")
    for name in ("woman", "man", "young", "older"):
        part = frame[[name in said.split() for said in words]]
        assert (
            table.auc[name] == pytest.approx(roc_auc_score(part.outcome, part.score))
            and table.low[name] < table.auc[name]
        )


def test_the_task_at_full_scores_every_patient_of_the_hospital_once():
    task = recipe.scales["full"].task
    assert isinstance(task, DomainsTask) and task.folds == recipe.scales["full"].replicates == 3
