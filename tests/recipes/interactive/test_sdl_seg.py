"""SDL-Seg: where simulated markers lie, what map is made of them, what the network sees, and what is measured."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.interactive import BESIDE, MEANT, no_marks
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.preparation import Preparation
from medcook.recipes.interactive import sdl_seg
from medcook.recipes.interactive.sdl_seg import Saliency, marker_rows, misplaced, on_border

SMALL = (4, 4, 4)


def method(**settings) -> Saliency:
    return Saliency(channels=SMALL, **settings)


def balls(*radii: int, side: int = 17) -> torch.Tensor:
    """(B, side, side, side) bool: a ball each."""
    places = np.indices([side] * 3) - side // 2
    return torch.from_numpy(np.stack([np.linalg.norm(places, axis=0) <= radius for radius in radii]))


def test_markers_lie_on_the_border_of_the_structure():
    torch.manual_seed(0)
    masks = balls(5, 0, 3)
    masks[1] = False
    border = masks.numpy() & ~np.stack([ndimage.binary_erosion(mask) for mask in masks.numpy()])
    assert np.array_equal(on_border(masks), border)
    marks = method(jitter=0, markers=4).first(masks)
    assert marks.flatten(2).sum(2).tolist() == [[4, 0], [0, 0], [4, 0]]
    assert not (marks[:, MEANT].numpy() & ~border).any()


def test_markers_are_off_by_the_jitter_and_stay_in_the_image():
    torch.manual_seed(0)
    marks = torch.zeros(3000, 21, 21, dtype=torch.bool)
    marks[:, 10, 8] = True
    moved = misplaced(marks, 2.0)
    places = moved.nonzero()
    assert places[:, 0].tolist() == list(range(3000))  # each in its own image
    assert places[:, 1:].float().mean(0).tolist() == pytest.approx([10, 8], abs=0.15)
    assert places[:, 1:].float().std(0).tolist() == pytest.approx([2.0, 2.0], abs=0.15)
    assert torch.equal(misplaced(marks, 0), marks) and marks.sum() == 3000
    corner = torch.zeros(50, 4, 6, dtype=torch.bool)
    corner[:, 3, 0] = True
    assert misplaced(corner, 30.0).flatten(1).sum(1).tolist() == [1] * 50


@pytest.mark.component("distance transform and Gaussian")
@pytest.mark.parametrize("size", [(15, 13), (9, 11, 8)])
def test_saliency_is_the_gaussian_of_the_distance_to_the_nearest_marker(size):
    """Against a loop over markers; the channel of what is not meant plays no part."""
    rng = np.random.default_rng(0)
    at = np.stack([rng.integers(0, side, 4) for side in size], axis=1)
    marks = torch.zeros(2, 2, *size, dtype=torch.bool)
    marks[(0, MEANT, *at.T)] = True
    marks[0, BESIDE] = True
    places = np.stack(np.indices(size), axis=-1)
    nearest = np.min([np.linalg.norm(places - one, axis=-1) for one in at], axis=0)
    found = method(sigma=3.0).guidance(marks, None)
    assert found.shape == (2, 1, *size)
    assert found[0, 0].numpy() == pytest.approx(np.exp(-(nearest**2) / (2 * 3.0**2)), abs=1e-6)
    assert (found[1] == 0).all()


@pytest.mark.component("distance transform and Gaussian")
def test_the_ablation_sees_the_marked_voxels_as_they_are():
    torch.manual_seed(0)
    full, bare = method(), method(map="dots")
    marks = full.first(balls(5))
    dots, saliency = bare.guidance(marks, None), full.guidance(marks, None)
    assert torch.equal(dots, marks[:, [MEANT]].float()) and dots.shape == saliency.shape
    assert (saliency == 1).eq(dots == 1).all() and ((saliency > 0.5) & (dots == 0)).any()
    arms = {name: arm.method for name, arm in sdl_seg.recipe.arms.items()}
    assert arms["without distances"] == replace(arms["sdl-seg"], map="dots")
    assert arms["unet"] == replace(arms["sdl-seg"], map="none")
    nets = [one.build(1, 3, 3) for one in (full, bare)]
    nets[1].load_state_dict(nets[0].state_dict())


@pytest.mark.component("image and saliency as channels")
def test_the_network_sees_the_image_and_the_map_and_the_plain_one_the_image():
    images, labels = torch.randn(2, 1, 17, 17, 17), balls(4, 6).to(torch.uint8)
    for kind, channels in {"saliency": 2, "dots": 2, "none": 1}.items():
        one, seen = method(map=kind), []
        nets = one.build(1, 3, 3)
        nets["model"].network.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        torch.manual_seed(5)
        one.training_step(nets, Batch(images, labels), None, Moment(0, 10))
        torch.manual_seed(5)
        marks = one.first(labels == 1)
        assert seen[0].shape[1] == channels and torch.equal(seen[0][:, :1], images)
        assert torch.equal(seen[0][:, 1:], one.guidance(marks, None))


def test_one_structure_is_the_target_and_the_others_are_background():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (2, 16, 16, 16)).byte()
    labels[:, 0] = IGNORE
    one = method(structure=2)
    nets = one.build(1, 4, 3)
    images = torch.randn(2, 1, 16, 16, 16)
    torch.manual_seed(5)
    loss = one.training_step(nets, Batch(images, labels), None, Moment(0, 10))
    torch.manual_seed(5)
    logits = nets["model"](images, one.guidance(one.first(labels == 2), None))
    wanted = labels.clone()
    wanted[(labels == 1) | (labels == 3)] = 0
    wanted[labels == 2] = 1
    assert loss.item() == pytest.approx(find_loss("both")(logits, wanted).item(), abs=1e-5)
    found = one.predict(nets.eval(), images)
    assert found.shape == (2, 4, 16, 16, 16) and (found[:, [1, 3]] == 0).all()
    assert found.sum(1).detach().numpy() == pytest.approx(1, abs=1e-5)


def fitted(one: Saliency, answer) -> SimpleNamespace:
    """What `marker_rows` needs of a trained method that answers with `answer(guidance)` (B, *size) bool."""

    class Net(torch.nn.Module):
        classes = 3

        def forward(self, images, guidance):
            yes = answer(guidance).float()
            return torch.stack([-yes, yes], dim=1) * 20 - torch.tensor([0.0, 10.0]).view(1, 2, 1, 1, 1)

    nets = torch.nn.ModuleDict({"average": Net()})
    task = SimpleNamespace(preparation=Preparation(size=(20, 20, 20)), structures={1: "head", 2: "tail"})
    cost = {"precision": "float32"}
    return SimpleNamespace(method=one, task=task, cost=cost, nets=nets, weights={"last": nets.state_dict()})


def a_case(name: str = "a", value: int = 1) -> Case:
    label = balls(5)[0].numpy().astype(np.uint8) * value
    image = np.random.default_rng(0).normal(size=(1, 17, 17, 17)).astype(np.float32)
    return Case(image=image, label=label, spacing=(2.0, 1.0, 1.0), case_id=name, patient_id=name)


@pytest.mark.component("Dice, HD95 and ASD")
def test_an_answer_is_measured_in_mm_on_the_grid_of_the_case():
    ball = torch.zeros(1, 20, 20, 20, dtype=torch.bool)
    window = Preparation(size=(20, 20, 20)).window(a_case())
    ball = window.crop(balls(3).float()[:, None], padding="zeros")[:, 0] > 0.5
    (row,) = marker_rows(fitted(method(), lambda guidance: ball), a_case())
    truth, found = balls(5)[0].numpy(), balls(3)[0].numpy()
    spacing = (2.0, 1.0, 1.0)
    assert row["structure"] == "head" and not row["missed"]
    assert row["dice"] == pytest.approx(metrics.dice(found, truth))
    assert row["hd95"] == pytest.approx(metrics.hd95(found, truth, spacing))
    assert row["assd"] == pytest.approx(metrics.assd(found, truth, spacing))
    (nothing,) = marker_rows(fitted(method(), lambda guidance: guidance[:, 0] > 2), a_case())
    assert nothing["missed"] and nothing["dice"] == 0
    assert marker_rows(fitted(method(), lambda guidance: ball), a_case(value=2)) == []


def test_every_arm_is_scored_with_the_same_markers_of_a_case():
    seen = []

    def look(guidance):
        seen.append(guidance)
        return torch.zeros(1, 20, 20, 20)

    torch.manual_seed(0)
    for kind, name in (("dots", "a"), ("saliency", "a"), ("dots", "b")):
        marker_rows(fitted(method(map=kind), look), a_case(name))
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3))  # scoring leaves the random numbers of a training alone
    dots, saliency, others = seen
    assert dots.sum() > 1 and torch.equal(dots == 1, saliency == 1)
    assert not torch.equal(dots, others)


@pytest.mark.parametrize("kind", ["saliency", "dots", "none"])
@pytest.mark.parametrize("size", [(33, 47), (8, 14, 10)])
def test_every_parameter_is_trained_at_any_size(kind, size):
    torch.manual_seed(0)
    one = method(map=kind)
    nets = one.build(1, 3, len(size))
    data = Batch(torch.randn(3, 1, *size), torch.randint(0, 3, (3, *size)).byte())
    loss = one.training_step(nets, data, None, Moment(0, 10))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in nets["model"].parameters())
    assert one.predict(nets.eval(), data.images).shape == (3, 3, *size)
    assert torch.equal(one.first(no_marks(data.images[:, 0])[:, 0]), no_marks(data.images[:, 0]))
