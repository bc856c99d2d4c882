"""The audit of image-text models: captions, probes, principal components, subgroups, and the drawn drain."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from medcook.data import Case
from medcook.errors import MedcookError
from medcook.recipes.fairness.cxr_clip_fairness import (
    SAID,
    SEX,
    CaptionTask,
    ProbedContrastive,
    audit,
    by_subgroup,
    captions,
    draw_drain,
    finding,
    has_drain,
    probes_of,
    recipe,
    with_and_without_drain,
    word,
)

TASK = CaptionTask("embedded", labelled=4, outcome="group", positive="atrophy", said=SAID)


@pytest.fixture(scope="module")
def hidden() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (400, 8) of two wide directions that mean nothing, and a narrow one that tells a fact."""
    rng = np.random.default_rng(0)
    facts = rng.random(400) < 0.4
    vectors = rng.normal(size=(400, 8)) * np.array([9, 7, 1, 1, 1, 1, 1, 1])
    vectors[:, 5] += 3 * facts
    return vectors @ np.linalg.qr(rng.normal(size=(8, 8)))[0], facts


class World(SimpleNamespace):
    """A fitted method whose embedding of a case is its image, and which notes whom it was shown."""

    def __init__(self, method, cases: dict[str, list[Case]]):
        self.asked = []
        preparation = SimpleNamespace(images=lambda case: torch.from_numpy(case.image)[None])

        def shown(role):
            self.asked.append(role)
            return iter(cases[role])

        task = SimpleNamespace(cases=shown, preparation=preparation, is_positive=lambda known: known["tuberculosis"])
        super().__init__(method=method, task=task, nets=torch.nn.ModuleDict(), weights={"last": {}})


class ByImage(ProbedContrastive):
    """Embeds an image as its pixels; half of its certainty about the finding is the brightness of the image."""

    def embed(self, nets, images):
        return images.flatten(1)

    def predict(self, nets, images):
        sure = images.mean((1, 2, 3)).sigmoid()[:, None, None, None]
        return torch.cat([1 - sure, sure / 2, 0 * sure, sure / 2], dim=1).expand(-1, -1, *images.shape[2:])


def person(number: int, vector: np.ndarray, man: bool, age: int | None = 50) -> Case:
    known = {"sex": "M" if man else "F", "age": age, "site": ("Montgomery", "Shenzhen")[number % 2]}
    image = vector.astype(np.float32).reshape(1, 1, -1)
    attributes = known | {"tuberculosis": number % 3 == 0}
    return Case(image, np.zeros((1, 8), np.uint8), f"p{number}", f"p{number}", attributes=attributes)


@pytest.fixture
def world(hidden):
    vectors, facts = hidden
    people = [person(k, *pair, age=20 + k % 60) for k, pair in enumerate(zip(vectors, facts, strict=True))]
    return World(ByImage(), {"labelled": people[:300], "val": people[300:]})


class TestCaptions:
    def test_odd_numbers_have_the_finding_and_none_tells_the_sex(self):
        said = captions(SAID)
        assert len(set(said)) == len(said) <= 254
        assert [number for number, caption in enumerate(said) if "diseased" in caption.split()] == list(range(1, 48, 2))
        assert not {"woman", "man"} & {word for caption in said for word in caption.split()}
        assert captions(()) == ("clear", "diseased")

    def test_a_label_is_the_number_of_the_patients_caption(self):
        samples = TASK.samples("labelled")
        for number, patient in enumerate(TASK.labelled_patients):
            known = TASK.data.attributes(patient)
            mine = samples.labels[samples.case_of == number].unique()
            assert len(mine) == 1
            words = captions(SAID)[int(mine)].split()
            assert words == [("clear", "diseased")[known["group"] == "atrophy"], known["site"], word("age", known)]

    def test_what_is_not_known_is_not_said(self):
        assert TASK.caption({"group": "control", "site": "north", "age": None}) == "clear north"
        assert [word("age", {"age": age}) for age in (29, 30, 44, 45)] == ["young", *2 * ["middle-aged"], "older"]

    def test_the_finding_is_what_all_captions_that_tell_it_add_up_to(self, world):
        images = torch.full((1, 1, 1, 8), 0.7)
        assert finding(world, images) == pytest.approx(torch.tensor(0.7).sigmoid().item(), abs=1e-6)


@pytest.mark.component("attributes from embeddings")
class TestProbe:
    def test_it_finds_what_a_narrow_direction_tells(self, hidden):
        vectors, facts = hidden
        probe = ProbedContrastive().probe(vectors[:300], facts[:300])
        assert roc_auc_score(facts[300:], probe.predict_proba(vectors[300:])[:, 1]) > 0.9

    def test_it_finds_nothing_where_there_is_nothing(self, hidden):
        vectors, _ = hidden
        facts = np.random.default_rng(1).random(400) < 0.5
        probe = ProbedContrastive().probe(vectors[:300], facts[:300])
        assert 0.35 < roc_auc_score(facts[300:], probe.predict_proba(vectors[300:])[:, 1]) < 0.65

    def test_it_is_fitted_once_and_on_training_patients_alone(self, world):
        for case in list(world.task.cases("val"))[:3]:
            audit(world, case)
        assert world.asked == ["val", "labelled"]

    def test_rows_hold_what_the_probe_says_and_what_is_so(self, world):
        people = list(world.task.cases("val"))
        rows = pd.DataFrame([row for case in people for row in audit(world, case)])
        assert roc_auc_score(rows.outcome, rows.score) > 0.9 and len(rows) == len(people)
        assert rows.outcome.tolist() == [float(case.attributes["sex"] == "M") for case in people]
        assert rows.site_outcome.tolist() == [float(case.attributes["site"] == "Montgomery") for case in people]
        assert rows.group[0].split() == [people[0].attributes["site"], "young", SEX[people[0].attributes["sex"]]]

    def test_patients_of_whom_little_is_known_are_left_out(self, world):
        case = next(iter(world.task.cases("val")))
        assert audit(world, replace(case, attributes=case.attributes | {"age": None})) == []

    def test_too_few_patients_are_an_error(self, hidden):
        with pytest.raises(MedcookError, match="Too few"):
            ProbedContrastive().probe(hidden[0][:9], np.arange(9) == 4)


@pytest.mark.component("PCA of embeddings")
class TestPrincipalComponents:
    def test_two_of_them_hide_what_the_embedding_tells(self, hidden):
        vectors, facts = hidden
        probe = ProbedContrastive(components=2).probe(vectors[:300], facts[:300])
        assert roc_auc_score(facts[300:], probe.predict_proba(vectors[300:])[:, 1]) < 0.65

    def test_the_plane_of_the_plot_is_the_widest_one(self, world, hidden):
        plane = probes_of(world)["plane"]
        centred = hidden[0][:300] - hidden[0][:300].mean(0)
        widest = np.linalg.svd(centred.astype(np.float32), full_matrices=False)[2][:2]
        np.testing.assert_allclose(np.abs(np.sum(plane.components_ * widest, axis=1)), 1, atol=1e-3)
        case = next(iter(world.task.cases("val")))
        expected = (case.image.ravel() - hidden[0][:300].mean(0)) @ plane.components_.T
        row = audit(world, case)[0]
        np.testing.assert_allclose([row["first"], row["second"]], expected, rtol=1e-3, atol=1e-3)

    def test_both_arms_are_the_same_network(self):
        whole, part = (recipe.arms[name] for name in recipe.compare)
        assert replace(part.method, components=0) == whole.method and part.changes == whole.changes


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    outcome = rng.integers(0, 2, 120)
    words = [
        f"{site} {age} {sex}"
        for site, age, sex in zip(
            rng.choice(["Montgomery", "Shenzhen"], 120),
            rng.choice(["young", "older"], 120),
            rng.choice(["woman", "man"], 120),
            strict=True,
        )
    ]
    score = outcome + rng.normal(size=120) * np.where([words[k].endswith(" man") for k in range(120)], 0.3, 3.0)
    content = {
        "patient_id": [f"p{k}" for k in range(120)],
        "case_id": [f"p{k}" for k in range(120)],
        "structure": "sex",
    }
    content |= {"finding_score": score, "finding_outcome": outcome * 1.0, "drained_score": score + 1.0, "group": words}
    return pd.DataFrame(content)


@pytest.mark.component("subgroup performance")
class TestSubgroups:
    def test_every_subgroup_has_its_own_auc(self, frame):
        table = by_subgroup(frame, 200).set_index("subgroup")
        assert list(table.index) == ["all", "Montgomery", "Shenzhen", "young", "older", "woman", "man"]
        for name, part in [("all", frame), ("woman", frame[frame.group.str.contains("woman")])]:
            assert table.auc[name] == pytest.approx(roc_auc_score(part.finding_outcome, part.finding_score))
            assert table.patients[name] == len(part) and table.diseased[name] == part.finding_outcome.sum()
        assert table.auc["man"] > table.auc["woman"] + 0.2
        assert (table.low < table.auc).all() and (table.auc < table.high).all()

    def test_a_subgroup_of_one_kind_has_none(self, frame):
        table = by_subgroup(frame[(frame.finding_outcome == 1) | ~frame.group.str.contains("young")], 200)
        assert np.isnan(table.set_index("subgroup").auc["young"])


@pytest.mark.component("robustness to a shortcut")
class TestDrain:
    def test_it_is_one_thin_bright_tube_from_the_side(self):
        images = torch.zeros(2, 1, 128, 128)
        for name in ("a", "b", "c"):
            drained = draw_drain(images, name)
            tube = drained[0, 0].numpy() > 1.0
            assert ndimage.label(tube, np.ones((3, 3)))[1] == 1 and 0.005 < tube.mean() < 0.04
            assert tube[:, :6].any() != tube[:, -6:].any()
            torch.testing.assert_close(drained[0], drained[1])
            torch.testing.assert_close(drained, draw_drain(images, name))
        assert not torch.equal(draw_drain(images, "a"), draw_drain(images, "b"))

    def test_only_patients_with_the_finding_get_one_and_only_in_training(self):
        plain, drained = TASK.samples("labelled"), replace(TASK, drain=1.0).samples("labelled")
        changed = (plain.images != drained.images).flatten(1).any(1)
        assert torch.equal(changed, plain.labels[:, 0, 0] % 2 == 1) and changed.any() and not changed.all()
        assert torch.equal(plain.labels, drained.labels)
        assert torch.equal(TASK.samples("val").images, replace(TASK, drain=1.0).samples("val").images)

    def test_the_share_is_kept(self):
        assert np.mean([has_drain(f"p{k}", 0.8) for k in range(2000)]) == pytest.approx(0.8, abs=0.03)
        assert not any(has_drain(f"p{k}", 0.0) for k in range(50))

    def test_with_it_those_with_the_finding_alone_have_it(self, frame):
        found = with_and_without_drain(frame)
        ill = frame.finding_outcome == 1
        assert found["without"].mean == pytest.approx(roc_auc_score(ill, frame.finding_score))
        assert found["with"].mean == pytest.approx(roc_auc_score(ill, frame.finding_score + 1.0 * ill))
        assert found["difference"].mean == pytest.approx(found["with"].mean - found["without"].mean)
        assert found["difference"].low > 0

    def test_it_is_the_same_patient_with_and_without(self, world):
        case = next(iter(world.task.cases("val")))
        row = audit(world, case)[0]
        image = torch.from_numpy(case.image)[None]
        assert row["finding_score"] == pytest.approx(finding(world, image))
        assert row["drained_score"] == pytest.approx(finding(world, draw_drain(image, case.case_id)))
