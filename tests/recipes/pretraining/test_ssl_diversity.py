"""What defines DINO, and that the pools of the study differ in kinds of images and not in their number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from medcook.data import IGNORE
from medcook.image_pool import origin
from medcook.methods import Batch, Moment
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import SqueezeNet
from medcook.recipes.pretraining._dino import MOMENTUM, Dino, Prototypes, crops, distilled
from medcook.recipes.pretraining._pyramid import PyramidNet
from medcook.recipes.pretraining.ssl_diversity import LEVELS, FromImageNet, GreyEncoder, recipe

SMALL = FromImageNet(imagenet=False)


@pytest.fixture
def images():
    return torch.randn(2, 1, 48, 40, generator=torch.Generator().manual_seed(0))


def test_crops_are_squares_of_the_image():
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    places = torch.stack([rows, columns]).expand(50, 2, 64, 64)
    found = crops(places, 16, (0.25, 0.25), torch.Generator().manual_seed(0))
    height = found[:, 0, -1].mean(1) - found[:, 0, 0].mean(1)
    width = found[:, 1, :, -1].mean(1) - found[:, 1, :, 0].mean(1)
    assert torch.allclose(height, torch.tensor(15 / 16), atol=0.03), "half of the image's side, between pixel centres"
    assert torch.allclose(width.abs(), torch.tensor(15 / 16), atol=0.03)
    assert 0.3 < (width < 0).float().mean() < 0.7, "half of them mirrored"
    assert found.abs().max() <= 1 and found[:, 0].mean((1, 2)).std() > 0.2, "inside the image, at many places"


@pytest.mark.component("self-supervised pre-training with DINO")
def test_the_loss_is_cross_entropy_between_different_crops():
    student = [torch.randn(3, 5) for _ in range(3)]
    teacher, centre = [torch.randn(3, 5) for _ in range(2)], torch.randn(5)
    losses = []
    for t in range(2):
        for s in range(3):
            if s != t:
                wanted = ((teacher[t] - centre) / 0.04).double().softmax(1)
                got = (student[s] / 0.1).double().log_softmax(1)
                losses += [-(wanted[row] * got[row]).sum() for row in range(3)]
    assert distilled(student, teacher, centre).item() == pytest.approx(float(np.mean(losses)), rel=1e-4)


@pytest.mark.component("self-supervised pre-training with DINO")
def test_no_gradient_reaches_the_teacher_and_the_centre_follows_its_scores(images):
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    dino = Dino(encoder, 4, count=6)
    scores = torch.cat([dino.teacher_head(dino.teacher(crop).mean((2, 3))) for crop in (images, images + 1)])
    dino.loss(encoder, [images, images + 1], [images[..., :20, :20]]).backward()
    assert all(p.grad is None for p in (*dino.teacher.parameters(), *dino.teacher_head.parameters()))
    assert all(p.grad is not None for p in (*encoder.parameters(), *dino.head.parameters()))
    assert torch.allclose(dino.centre, 0.1 * scores.mean(0), atol=1e-6)


@pytest.mark.component("self-supervised pre-training with DINO")
def test_the_teacher_is_the_moving_average_and_slows_down():
    encoder = nn.Conv2d(1, 2, 3)
    dino = Dino(encoder, 2, count=3)
    before = dino.teacher.weight.clone()
    nn.init.constant_(encoder.weight, 1.0)
    dino.move(encoder, Moment(0, 10))
    assert torch.allclose(dino.teacher.weight, MOMENTUM * before + (1 - MOMENTUM), atol=1e-6)
    before = dino.teacher.weight.clone()
    dino.move(encoder, Moment(5, 10))
    assert torch.allclose(dino.teacher.weight, (1 + MOMENTUM) / 2 * before + (1 - MOMENTUM) / 2, atol=1e-6)


def test_scores_are_cosines_with_prototypes():
    head = Prototypes(4, 7).eval()
    found = head(torch.randn(5, 4))
    assert found.shape == (5, 7) and found.abs().max() <= 1 + 1e-5
    before = head(torch.ones(1, 4))
    with torch.no_grad():
        head.prototypes.weight *= torch.arange(1.0, 8.0)[:, None]
    assert torch.allclose(head(torch.ones(1, 4)), before, atol=1e-5), "the length of a prototype has no say"


@pytest.mark.component("start from ImageNet")
def test_the_grey_encoder_is_squeezenet_on_a_grey_photograph(images):
    net = SqueezeNet(features_only=True).eval()
    padded = nn.functional.pad(PHOTOGRAPH * images.expand(-1, 3, -1, -1), [3] * 4)
    x = net.features(padded)
    assert torch.allclose(GreyEncoder(net)(images), x, atol=1e-3 * float(x.detach().abs().max()))


@pytest.mark.component("segmentation decoder")
def test_the_pyramid_has_every_level_and_any_size(images):
    net = PyramidNet(GreyEncoder(SqueezeNet(features_only=True)), tuple(LEVELS.values()), 3)
    maps = net.encoder.levels(images)
    assert [level.shape[1] for level in maps] == list(LEVELS.values())
    assert [level.shape[2] for level in maps] == [24, 12, 6, 3]
    out = net(images)
    assert out.shape == (2, 3, 48, 40)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.lateral.parameters())


@pytest.mark.component("self-supervised pre-training with DINO")
def test_dino_trains_the_encoder_alone_and_labels_train_all(images):
    nets = SMALL.build(1, 3, 2)
    hidden = Batch(images, torch.full((2, 48, 40), IGNORE, dtype=torch.uint8))
    SMALL.training_step(nets, hidden, hidden, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].encoder.parameters())
    assert nets["model"].head.weight.grad is None and nets["pretext"].head.prototypes.weight.grad is not None
    before = [p.clone() for p in nets["pretext"].teacher.parameters()]
    with torch.no_grad():
        nets["model"].encoder.layers["conv1"].weight += 1
    SMALL.after_step(nets, Moment(0, 10))
    assert not torch.equal(before[0], next(nets["pretext"].teacher.parameters()))


def test_who_waits_has_no_dino_and_moves_nothing(images):
    waits = replace(SMALL, waits=True)
    nets = waits.build(1, 3, 2)
    hidden = Batch(images, torch.full((2, 48, 40), IGNORE, dtype=torch.uint8))
    waits.training_step(nets, hidden, hidden, Moment(0, 10)).backward()
    assert "pretext" not in nets and all(p.grad is None for p in nets.parameters())
    waits.after_step(nets, Moment(0, 10))
    waits.training_step(nets, Batch(images, torch.zeros_like(hidden.labels)), hidden, Moment(5, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())


@pytest.mark.component("procedure-specific pre-training")
@pytest.mark.component("pre-training on diverse data")
def test_the_pools_differ_in_kinds_and_not_in_number():
    specific = recipe.run("quick", "random start, specific", 0)[1]
    diverse = recipe.run("quick", "random start, diverse", 0)[1]
    sizes = []
    for task, kinds in ((specific, [0]), (diverse, [0, 1])):
        samples = replace(task, most=40).samples("unlabelled")
        sizes.append(len(samples))
        assert origin(samples.groups).set.unique().tolist() == kinds
    assert sizes == [40, 40]
    full = {name: recipe.run("full", name, 0)[1] for name in ("specific", "diverse")}
    assert full["specific"].most == full["diverse"].most
    assert set(full["specific"].pool) < set(full["diverse"].pool)


def test_the_arms_differ_in_the_pretext_alone():
    settings = [recipe.method("full", name).settings() for name in recipe.arms_at("full")]
    for one in settings:
        one.pop("waits")
    assert settings[0] == settings[1] == settings[2]
