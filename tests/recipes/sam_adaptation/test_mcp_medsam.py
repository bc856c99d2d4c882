"""MCP-MedSAM: two more tokens, a crop that is the box, and batches in which every modality comes as often."""

import numpy as np
import pytest
import torch
from skimage.transform import resize

from medcook.data.splits import open_test
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation._modalities import EMBEDDED, ModalitiesTask, Several, balanced, targets_here
from medcook.recipes.sam_adaptation.mcp_medsam import CROP, McpMedSam, cropped, recipe
from medcook.sam import adapting
from medcook.sam.model import SIZE, SmallSam
from medcook.tasks import Samples, Task


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


def batch() -> Batch:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 10:30, 10:30], labels[:, 35:55, 20:50] = 1, 2
    images = labels[:, None] + 0.1 * torch.randn(2, 1, 64, 64)
    return Batch(images, labels, groups=torch.tensor([2, 2]))


@pytest.fixture
def nets() -> torch.nn.ModuleDict:
    return McpMedSam().build(1, 3, 2)


BOX = torch.tensor([[20.0, 30, 80, 90]])


@pytest.mark.component("modality prompt")
class TestModality:
    def test_only_the_token_of_the_modality_that_was_seen_learns(self, nets):
        McpMedSam().training_step(nets, batch(), None, Moment(0, 1)).backward()
        reached = nets["model"].modality_prompt.weight.grad.abs().amax(1) > 0
        assert reached.tolist() == [False, False, True]

    def test_another_modality_is_another_answer(self, nets):
        model = nets["average"].eval()
        one, other = (McpMedSam().masks(model, batch().images[:1], BOX, torch.tensor([k])) for k in (0, 1))
        assert one.shape == (1, 64, 64) and not torch.allclose(one, other, atol=1e-4)

    def test_without_it_there_is_none(self):
        model = McpMedSam(modality=False).build(1, 3, 2)["model"]
        images, method = torch.randn(1, 1, SIZE, SIZE), McpMedSam(modality=False)
        assert not hasattr(model, "modality_prompt")
        assert len(method.further(model, images, BOX, torch.tensor([0]))) == 1


@pytest.mark.component("content prompt")
class TestContent:
    def test_the_crop_is_what_the_box_holds(self):
        rng = np.random.default_rng(0)
        image = resize(rng.random((8, 8)), (SIZE, SIZE)).astype(np.float32)
        found = cropped(torch.from_numpy(image)[None, None], BOX)[0, 0].numpy()
        wanted = resize(image[30:90, 20:80], (CROP, CROP), order=1)
        assert found.shape == (CROP, CROP) and np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
        assert abs(found.mean()) < 1e-5 and found.std() == pytest.approx(1, abs=0.01)

    def test_it_learns_and_changes_the_answer(self, nets):
        McpMedSam().training_step(nets, batch(), None, Moment(0, 1)).backward()
        assert all(p.grad.abs().max() > 0 for p in nets["model"].content_prompt.parameters())
        model, image = nets["model"], torch.randn(1, 1, SIZE, SIZE)
        one, other = (McpMedSam().further(model, image * sign, BOX, torch.tensor([0]))[1] for sign in (1, -1))
        assert not torch.allclose(one, other)

    def test_without_it_there_is_none(self):
        assert not hasattr(McpMedSam(content=False).build(1, 3, 2)["model"], "content_prompt")


@pytest.mark.component("modality-balanced sampling")
class TestBalance:
    def test_every_group_comes_as_often_and_no_sample_is_lost(self):
        groups = torch.tensor([0] * 10 + [1] * 3 + [2])
        found = balanced(groups)
        assert groups[found].bincount().tolist() == [10, 10, 10] and len(found.unique()) == 14

    def test_a_task_repeats_the_slices_of_small_modalities(self, monkeypatch):
        labels = torch.ones(5, 32, 32, dtype=torch.uint8)
        labels[4] = 0
        plain = Samples(torch.zeros(5, 1, 32, 32), labels, torch.tensor([0, 0, 0, 1, 1]))

        class Data:
            patients = {"a": ["a:1"], "b": ["b:1"]}
            attributes = staticmethod(lambda case: {"modality": int(case == "b:1")})

        monkeypatch.setattr(Task, "samples", lambda self, role: plain)
        monkeypatch.setattr(ModalitiesTask, "data", Data)
        monkeypatch.setattr(ModalitiesTask, "labelled_patients", ("a", "b"))
        counts = {on: ModalitiesTask("acdc", balanced=on).samples("labelled").groups for on in (True, False)}
        assert counts[True].bincount().tolist() == [3, 3] and counts[False].bincount().tolist() == [3, 1]

    def test_the_arms_of_the_ablation_differ_in_nothing_else(self):
        arms = [recipe.arms[name] for name in recipe.ablation]
        assert arms[0].method == arms[1].method
        assert recipe.scales["full"].task.balanced and arms[1].changes == {"balanced": False}


class TestSeveral:
    """Two sets as one; the embedded cohort stands for both, the second under another name."""

    @pytest.fixture
    def data(self):
        data = Several((("embedded", 3, 1, 1),))
        other = data.sets["embedded"]
        data.sets = {"embedded": other, "again": other}
        data.offsets = {"embedded": 0, "again": 3}
        data.parts = (("embedded", 3, 1, 1), ("again", 2, 1, 1))
        return data

    def test_patients_are_those_of_the_sets_splits(self, data):
        split, own = data.split, data.sets["again"].split
        assert [len(part) for part in (split.train, split.val, split.test)] == [5, 2, 2]
        assert split.train[3:] == tuple(f"again:{name}" for name in own.train[:2])
        assert split.test == (f"embedded:{own.test[0]}", f"again:{own.test[0]}")

    def test_labels_are_numbered_behind_each_other(self, data):
        name = data.patients[data.split.train[3]][0]
        case, own = data.load(name), data.sets["again"].load(name.split(":", 1)[1])
        assert np.array_equal(case.label, np.where(own.label > 0, own.label + 3, 0))
        assert case.attributes["modality"] == 1 and case.patient_id == data.split.train[3]

    def test_test_patients_stay_behind_the_door(self, data):
        name = data.patients[data.split.test[1]][0]
        with pytest.raises(MedcookError, match="test case"):
            data.load(name)
        with open_test("a test"):
            assert data.load(name).case_id == name

    def test_what_nobody_annotated_is_no_target(self):
        case = next(iter(EMBEDDED.cases("labelled")))
        known = {target.structure for target in targets_here(EMBEDDED, case)}
        case.attributes["annotated"] = [1]
        assert len(known) == 3 and {t.structure for t in targets_here(EMBEDDED, case)} == {EMBEDDED.structures[1]}
