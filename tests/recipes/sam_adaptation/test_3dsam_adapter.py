"""3DSAM-adapter: an encoder of images that sees volumes, what stays frozen, what a click does."""

import importlib

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from medcook.methods import Batch, Moment
from medcook.sam import adapting
from medcook.sam.model import SmallSam

paper = importlib.import_module("medcook.recipes.sam_adaptation.3dsam_adapter")


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SmallSam().sam.vision_encoder.eval()


@pytest.fixture
def volumes():
    return torch.randn(2, 1, 8, 16, 24)


@pytest.mark.component("2D encoder turned 3D")
def test_tokens_are_means_of_slices_at_sams_positions(encoder, volumes):
    found = paper.VolumeEncoder(encoder, 8, depth=True).tokens(volumes)
    assert found.shape == (2, 2, 2, 3, 192)
    slices = nn.functional.interpolate(volumes[1].transpose(0, 1), scale_factor=2, mode="bilinear")
    place = nn.functional.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (2, 3), mode="bilinear")
    wanted = encoder.patch_embed(slices).unflatten(0, (2, 4)).mean(1) + place.permute(0, 2, 3, 1)
    torch.testing.assert_close(found[1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.component("2D encoder turned 3D")
@pytest.mark.parametrize("depth", [True, False])
def test_only_with_depth_a_layer_hears_of_the_others(encoder, volumes, depth):
    model = paper.VolumeEncoder(encoder, 8, depth=depth)
    other = volumes.clone()
    other[:, :, 4:] += torch.randn(2, 1, 4, 16, 24)
    with torch.no_grad():
        change = [(a - b).abs().amax((0, 2, 3, 4)) for a, b in zip(model(volumes), model(other), strict=True)]
    assert len(change) == 4
    assert all((each[0] > 1e-4) == depth and each[1] > 1e-4 for each in change)
    learnt = torch.randn(1, 192, 8) if depth else None
    if depth:
        before = model.tokens(volumes)
        model.depth_position.data = learnt
        moved = model.tokens(volumes) - before
        wanted = nn.functional.interpolate(learnt, 2, mode="linear")[0].T
        torch.testing.assert_close(moved[0, :, 0, 0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.component("spatial adapters")
def test_an_adapter_starts_as_the_identity_and_looks_in_depth():
    adapter = paper.Adapter(6, 4, depth=True)
    tokens = torch.randn(1, 3, 4, 5, 6)
    assert torch.equal(adapter(tokens), tokens)
    nn.init.normal_(adapter.up.weight)
    with torch.no_grad():
        hidden = torch.relu(adapter.down(tokens))[0].numpy()
        kernel, bias = adapter.conv.weight.numpy(), adapter.conv.bias.numpy()
        seen = [ndimage.correlate(hidden[..., k], kernel[k, 0], mode="constant") + bias[k] for k in range(4)]
        wanted = tokens + adapter.up(torch.from_numpy(np.stack(seen, -1)).float().relu())
        torch.testing.assert_close(adapter(tokens), wanted, atol=1e-5, rtol=1e-4)
    assert paper.Adapter(6, 4, depth=False).conv.weight.shape[2] == 1


@pytest.mark.component("spatial adapters")
def test_every_block_has_one(encoder, volumes):
    model = paper.VolumeEncoder(encoder, 8, depth=True)
    with torch.no_grad():
        before = model(volumes)
        for adapter in model.adapters[2:4]:
            nn.init.normal_(adapter.up.weight)
        after = model(volumes)
    assert len(model.adapters) == len(encoder.layers)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.mark.component("most parameters frozen")
def test_a_step_leaves_sam_alone():
    nets = paper.VolumeAdapter().build(1, 3, 3)
    model = nets["model"]
    for adapter in model.encoder.adapters:
        nn.init.normal_(adapter.up.weight, std=0.1)
    labels = torch.zeros(1, 8, 16, 16, dtype=torch.uint8)
    labels[:, 2:6, 4:12, 4:12] = 1
    loss = paper.VolumeAdapter().training_step(nets, Batch(labels[:, None].float(), labels), None, Moment(0, 2))
    loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    frozen = {name for name in learning if ".encoder." in f".{name}" and "encoder.encoder" in name}
    assert frozen and all("layer_norm" in name for name in frozen)
    for part in ("encoder.adapters", "encoder.merge", "encoder.depth_position", "necks", "attention", "decoder"):
        assert any(name.startswith(part) for name in learning), part
    held = sum(p.numel() for p in model.encoder.encoder.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < held / 3


@pytest.mark.component("one click prompt")
def test_the_image_learns_of_the_features_at_the_click():
    model = paper.VolumeAdapter().make().eval()
    seen = []
    model.attention[0].register_forward_pre_hook(lambda layer, args: seen.append(args))
    deep = torch.randn(1, 64, 2, 4, 4)
    stem = torch.randn(1, 48, 8, 16, 16), torch.randn(1, 16, 8, 32, 32)
    embedding = (*[torch.randn(1, 64, 2, 4, 4) for _ in range(3)], deep, *stem, torch.randn(1, 1, 8, 32, 32))
    point = torch.tensor([[[5.5, 11.5, 27.5]]])  # the middle of cell 1, 1, 3
    with torch.no_grad():
        one = model.answer(embedding, point, torch.ones(1, 1), None)
        sampled = seen[0][2] - model.codes((point + 0.5) / torch.tensor([8, 32, 32]))
        torch.testing.assert_close(sampled[0, 0], deep[0, :, 1, 1, 3], atol=1e-4, rtol=1e-3)
        other = model.answer(embedding, point - 4, torch.ones(1, 1), None)
    assert one.shape == (1, 8, 32, 32) and not torch.allclose(one, other)


@pytest.mark.component("one click prompt")
def test_attention_carries_the_click_to_every_token():
    layer = paper.ClickAttention(16, heads=2).eval()
    image, codes, click = torch.randn(1, 12, 16), torch.randn(12, 16), torch.randn(1, 1, 16)
    with torch.no_grad():
        change = (layer(image, codes, click) - layer(image, codes, click + 1)).abs().amax(2)
    assert change.shape == (1, 12) and change.min() > 1e-6


@pytest.mark.component("volumetric decoder")
def test_the_decoder_uses_every_level_the_volume_and_the_drawn_click():
    decoder = paper.VolumeDecoder(4, (6, 5)).eval()
    levels = [torch.randn(1, 4, 2, 3, 3, requires_grad=True) for _ in range(4)]
    stem = [torch.randn(1, 6, 8, 6, 6, requires_grad=True), torch.randn(1, 5, 8, 12, 12, requires_grad=True)]
    volume = torch.randn(1, 1, 8, 12, 12, requires_grad=True)
    points, marks = torch.tensor([[[4.0, 6.0, 6.0]]]), torch.ones(1, 1)
    logits = decoder(levels, stem, volume, points, marks)
    assert logits.shape == (1, 8, 12, 12)
    logits[0, 4, 6, 6].backward()
    assert all(each.grad.abs().max() > 0 for each in (*levels, *stem, volume))
    assert not torch.allclose(logits, decoder(levels, stem, volume, points, 0 * marks - 1))
    assert volume.grad[0, 0, 3].abs().max() > 0  # its neighbour in depth


@pytest.mark.component("volumetric decoder")
def test_the_stems_finer_features_are_those_of_slices(encoder, volumes):
    model = paper.VolumeEncoder(encoder, 8, depth=True)
    model.tokens(volumes)
    slices = nn.functional.interpolate(volumes[1].transpose(0, 1), scale_factor=2, mode="bilinear")
    encoder.patch_embed(slices)
    fine = encoder.patch_embed.finer[0]
    assert model.finer[0].shape == (2, 16, 8, 16, 24)
    torch.testing.assert_close(model.finer[0][1].transpose(0, 1), fine, atol=1e-4, rtol=1e-4)


def test_images_are_volumes_of_one_slice():
    nets = paper.VolumeAdapter().build(1, 3, 2)
    assert paper.VolumeAdapter().predict(nets.eval(), torch.randn(1, 1, 20, 20)).shape == (1, 3, 20, 20)
