"""SAM-Med3D: three dimensions throughout, clicks and answers as prompts, two stages; the 2D SAM it is held against."""

import numpy as np
import pytest
import torch

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation.sam_med3d import Block, Encoder3D, Prompts3D, Sam3D, SamMed3D, SliceSam, alike
from medcook.sam import adapting
from medcook.sam.model import SmallSam
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import first_click

TINY = dict(widths=(8, 8, 16), blocks=2, heads=2)
SIZE = (8, 16, 16)


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


def batch() -> Batch:
    labels = torch.zeros(2, *SIZE, dtype=torch.uint8)
    labels[:, 2:6, 3:9, 3:9], labels[:, 2:6, 10:15, 10:15] = 1, 2
    return Batch(torch.randn(2, 1, *SIZE) + labels[:, None], labels)


@pytest.mark.component("fully 3D structure")
def test_patches_are_boxes():
    found = Encoder3D(depth=True, **TINY)(torch.randn(1, 1, 16, 32, 24))
    assert [tuple(each.shape[1:]) for each in found] == [(8, 8, 16, 12), (8, 4, 8, 6), (16, 2, 4, 3)]


@pytest.mark.component("fully 3D structure")
def test_only_in_3d_a_layer_hears_of_the_others():
    tokens = torch.randn(1, 3, 2, 2, 16)
    other = tokens.clone()
    other[:, 2] += torch.randn(2, 2, 16)
    for depth in (True, False):
        block = Block(16, 2, depth).eval()
        change = (block(tokens) - block(other)).abs().amax((0, 2, 3, 4))
        assert (change[0] > 1e-5) == depth and change[2] > 1e-5
        inside = block(tokens[:, :1])[:, 0]
        assert torch.allclose(block(tokens)[:, 0], inside, atol=1e-5) != depth


@pytest.mark.component("fully 3D structure")
def test_positions_are_those_of_a_volume():
    """Of a volume that is the same everywhere, the encoder's tokens differ along every axis."""
    tokens = Encoder3D(depth=True, **TINY).eval()(torch.zeros(1, 1, 48, 48, 48))[-1][0]
    middle = tokens[:, 2:4, 2:4, 2:4]
    for axis in (1, 2, 3):
        assert middle.diff(dim=axis).abs().max() > 1e-3


@pytest.mark.component("fully 3D structure")
def test_a_click_in_one_slice_speaks_for_all():
    model = Sam3D(**TINY).eval()
    embedding = model.encode(torch.randn(1, 1, 16, 16, 16))
    ask = lambda z: model.answer(embedding, torch.tensor([[[z, 8.0, 8.0]]]), torch.ones(1, 1), None)  # noqa: E731
    with torch.no_grad():
        change = (ask(0.0) - ask(2.0)).abs().amax((0, 2, 3))
    assert change.shape == (16,) and change.min() > 1e-6


@pytest.mark.component("fully 3D structure")
def test_all_of_it_learns():
    method = SamMed3D(clicks=2, broad=0.0)
    nets = method.build(1, 3, 3)
    method.training_step(nets, batch(), None, Moment(5, 10)).backward()
    still = {n for n, p in nets["model"].named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert all("k_proj.bias" in name or "final_attn" in name or "layer_norm4" in name for name in still), still


@pytest.mark.component("a few 3D prompt points")
def test_a_click_has_a_place_and_a_kind():
    prompts = Prompts3D(16, 8)
    points = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [7.0, 9.0, 2.0]]])
    tokens = prompts(points, torch.tensor([[1.0, 0.0, -1.0]]), SIZE)[0]
    code = prompts.codes((points[0, 0] + 0.5) / torch.tensor(SIZE))
    torch.testing.assert_close(tokens[0] - code, prompts.kinds.weight[2])
    torch.testing.assert_close(tokens[1] - code, prompts.kinds.weight[1])
    torch.testing.assert_close(tokens[2], prompts.kinds.weight[0])


@pytest.mark.component("a few 3D prompt points")
def test_answers_depend_on_clicks_and_on_the_last_answer():
    model = Sam3D(**TINY).eval()
    embedding = model.encode(torch.randn(1, 1, *SIZE))
    points, marks = torch.tensor([[[3.0, 5.0, 5.0]]]), torch.ones(1, 1)
    with torch.no_grad():
        first = model.answer(embedding, points, marks, None)
        assert not torch.allclose(first, model.answer(embedding, points, marks, torch.ones(1, *SIZE) * 5))
        assert not torch.allclose(first, model.answer(embedding, points, 0 * marks, None))
    shown = model.prompts.drawn(points, marks, torch.full((1, *SIZE), 4.0), (4, 8, 8), SIZE)
    assert shown.shape == (1, 2, 4, 8, 8) and shown[0, 1].unique().tolist() == [0.5]


@pytest.mark.component("two-stage training")
def test_the_first_stage_has_targets_that_nobody_drew():
    method, part = SamMed3D(broad=0.5), batch()
    masks, owner = method.targets(part.images, part.labels, Moment(0, 10))
    assert owner.tolist() == [0, 1, 0, 1]
    drawn = [
        torch.equal(mask, part.labels[k] == 1) or torch.equal(mask, part.labels[k] == 2)
        for mask, k in zip(masks, owner, strict=True)
    ]
    assert drawn == [True, True, False, False]
    masks, owner = method.targets(part.images, part.labels, Moment(5, 10))
    assert owner.tolist() == [0, 0, 1, 1]
    assert all(
        any(torch.equal(mask, part.labels[k] == v) for v in (1, 2)) for mask, k in zip(masks, owner, strict=True)
    )


@pytest.mark.component("two-stage training")
def test_regions_look_alike_and_lie_near():
    volume = torch.zeros(1, 1, 30, 30, 30)
    volume[..., 15:] = 3.0
    found = alike(volume, torch.tensor([[[15.0, 15.0, 10.0]]]), reach=6.0)[0]
    z, y, x = torch.meshgrid(*[torch.arange(30.0)] * 3, indexing="ij")
    near = ((z - 15) ** 2 + (y - 15) ** 2 + (x - 10) ** 2).sqrt() < 6
    assert torch.equal(found, near & (x < 14))  # the mean of three voxels reaches the border one voxel earlier


def test_the_slices_of_volumes_are_learnt_from(monkeypatch):
    seen = []
    step = lambda self, nets, labelled, unlabelled, now: seen.append(labelled) or torch.zeros(())  # noqa: E731
    monkeypatch.setattr(adapting.PromptedSam, "training_step", step)
    part = batch()
    SliceSam(slices=3).training_step(None, part, None, Moment(0, 2))
    assert seen[0].images.shape == (6, 1, 16, 16) and (seen[0].labels > 0).flatten(1).any(1).all()
    for image, label in zip(seen[0].images, seen[0].labels, strict=True):
        assert any(torch.equal(image, v) for v in part.images.transpose(1, 2).flatten(0, 1))
        assert any(torch.equal(label, v) for v in part.labels.flatten(0, 1))
    SliceSam().training_step(None, part._replace(labels=0 * part.labels), None, Moment(0, 2))
    assert len(seen[1].images) == 1


def test_a_click_in_every_slice_is_what_the_predictor_answers():
    nets = SliceSam().build(1, 3, 3).eval()
    truth = np.zeros((4, 24, 20), bool)
    truth[1:3, 5:15, 6:14] = True
    volume = torch.randn(1, 1, 4, 24, 20)
    with torch.no_grad():
        ((prompts, answer),) = SliceSam().answers(nets, volume, truth)
    assert prompts == 2 and not answer[[0, 3]].any()
    predictor = Predictor(nets["average"], zoom=False)
    for k in (1, 2):
        image = volume[0, 0, k].numpy()
        wanted = predictor(image, first_click(truth[k])).mask
        assert (wanted != answer[k]).mean() < 0.1  # the predictor centres each slice, the method the volume
    assert SliceSam().predict(nets, volume).shape == (1, 3, 4, 24, 20)
