"""DistillFSS: attention against a plain loop, and a student that learns the teacher and forgets the support."""

import numpy as np
import pytest
import torch
from torch import nn

from medcook.few_shot import Shots
from medcook.few_shot.baselines import SHARPNESS
from medcook.recipes.few_shot.distillfss import Attention, DistillFSS, attend, mixed, operations

SMALL = {"channels": (4, 4, 8, 8)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shots(count: int = 1, size: int = 32) -> Shots:
    """Slices with a bright square, somewhere."""
    images, masks = 0.2 * torch.randn(count, 1, size, size), torch.zeros(count, size, size, dtype=torch.uint8)
    for k in range(count):
        row, column = torch.randint(0, size // 2, (2,)).tolist()
        masks[k, row : row + size // 2, column : column + size // 2] = 1
    images = images + 2 * masks[:, None]
    return Shots(images, torch.zeros(count, 8, size // 4, size // 4), masks)


def ready(method: Attention) -> tuple[nn.ModuleDict, Shots]:
    """A network in evaluation mode, and a support with its features."""
    net = method.build(1, 3, 2)["average"].eval()
    support = shots(2)
    return net, support._replace(maps=method.encode(net, support.images))


@pytest.mark.component("teacher of support and query")
class TestTeacher:
    def test_a_query_pixel_gets_the_masks_it_attends_to(self):
        queries, keys, inside = torch.randn(1, 4, 2, 2), torch.randn(2, 4, 3, 3), torch.rand(2, 3, 3)
        flat = [
            (keys[s, :, i, j].numpy(), inside[s, i, j].item()) for s in range(2) for i in range(3) for j in range(3)
        ]
        query = queries[0, :, 1, 0].numpy()
        alike = [np.exp(SHARPNESS * query @ key / np.linalg.norm(query) / np.linalg.norm(key)) for key, _ in flat]
        shares = np.array([share for _, share in flat])
        structure, background = np.average(alike, weights=shares), np.average(alike, weights=1 - shares)
        wanted = structure / (structure + background)
        found = attend(queries, keys, inside)
        assert found.shape == (1, 1, 2, 2) and found[0, 0, 1, 0].item() == pytest.approx(wanted, abs=1e-5)

    def test_it_answers_by_the_support(self):
        method = Attention(**SMALL)
        net, support = ready(method)
        support = support._replace(maps=torch.randn_like(support.maps))
        other = support._replace(masks=1 - support.masks)
        assert not torch.allclose(*(method.logits(net, each, support) for each in (support, other)), atol=1e-3)


@pytest.mark.component("support knowledge in a dedicated layer")
class TestLayer:
    def test_the_student_stands_where_attention_stood(self):
        method = DistillFSS(**SMALL, distilling=2)
        net, support = ready(method)
        answering = method.adapt(net, [support])
        student = answering["student"]
        assert student[1].kernel_size == (3, 3) and student[3].out_channels == 1
        wanted = mixed(net, student(support.maps), support.maps)
        assert torch.allclose(method.logits(answering, support, support), wanted)

    def test_the_rest_of_the_network_stays(self):
        method = DistillFSS(**SMALL, distilling=5)
        net, support = ready(method)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        method.adapt(net, [support])
        assert "student" not in net
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.component("teacher-student distillation")
class TestDistillation:
    def test_the_student_comes_to_say_what_the_teacher_says(self):
        """Masks that the student never sees: with a weight on them alone it would not learn the teacher's errors."""
        errors = {}
        for on in (True, False):
            torch.manual_seed(3)
            method = DistillFSS(**SMALL, distilling=150, pace=1e-2, from_teacher=on)
            net, support = ready(method)
            student = method.adapt(net, [support])["student"]
            views, coarse = method.lesson(net, support)
            errors[on] = (student(views.maps) - coarse).square().mean().item()
        assert errors[True] < 0.5 * errors[False]

    def test_the_loss_has_its_three_parts(self):
        method = DistillFSS(**SMALL)
        net, support = ready(method)
        views, coarse = method.lesson(net, support)

        def fixed(maps):
            return torch.full_like(maps[:, :1], 0.3)

        full = method.distillation(net, fixed, views, coarse)
        alone = DistillFSS(**SMALL, from_teacher=False).distillation(net, fixed, views, coarse)
        p = mixed(net, coarse, views.maps).softmax(1)
        q = mixed(net, fixed(views.maps), views.maps).softmax(1)
        kl = (p * (p / q).log()).sum(1).mean()
        assert (full - alone).item() == pytest.approx(((0.3 - coarse) ** 2).mean().item() + kl.item(), abs=1e-5)

    def test_every_chunk_has_its_own_lesson(self):
        seen = []

        class Watching(DistillFSS):
            def lesson(self, net, support):
                seen.append(support)
                return super().lesson(net, support)

        method = Watching(**SMALL, distilling=1)
        net, support = ready(method)
        method.adapt(net, [support.take([0]), support.take([1])])
        assert len(seen) == 2


@pytest.mark.component("no support at test time")
class TestWithoutSupport:
    def test_the_answer_does_not_need_it(self):
        method = DistillFSS(**SMALL, distilling=2)
        net, support = ready(method)
        answering = method.adapt(net, [support])
        nothing = Shots(support.images[:0], support.maps[:0], support.masks[:0])
        assert torch.equal(method.segment(answering, nothing, support), method.segment(answering, support, support))

    @pytest.mark.parametrize("method", [Attention(**SMALL), DistillFSS(**SMALL, distilling=1)])
    def test_operations_grow_with_the_shots_of_attention_alone(self, method, monkeypatch):
        net, support = ready(method)
        answering = method.adapt(net, [support])
        counts = []
        for shot in (1, 2):
            given = support.take(list(range(shot)))
            monkeypatch.setattr(
                "medcook.recipes.few_shot.distillfss.supported", lambda *_, given=given: (answering, [given])
            )
            counts.append(operations(type("Fitted", (), {"method": method}), 1))
        assert (counts[1] > counts[0]) == (type(method) is Attention)

    def test_operations_are_those_of_the_layers(self, monkeypatch):
        method = DistillFSS(**SMALL, distilling=1)
        net, support = ready(method)
        answering = method.adapt(net, [support])
        monkeypatch.setattr("medcook.recipes.few_shot.distillfss.supported", lambda *_: (answering, [support]))
        convolutions = [*answering["student"], *answering["mix"]]
        weights = sum(layer.weight.numel() for layer in convolutions if isinstance(layer, nn.Conv2d))
        found = operations(type("Fitted", (), {"method": method}), 1)
        assert found == pytest.approx(2 * 64 * weights / 1e6)
