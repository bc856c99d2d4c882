"""SAM-UNet: a branch that joins the tokens, features of all quarters in the decoder, a transformer that stays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import sam_unet
from medcook.recipes.sam_adaptation.sam_unet import Branch, PromptedSamUNet, Reshaper, SamUNet, unseen_rows
from medcook.sam import adapting
from medcook.sam.model import SIZE, SmallSam


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return SmallSam().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def shaken(model: SamUNet) -> SamUNet:
    """With something in the layers that start at 0."""
    torch.manual_seed(2)
    for part in (model.reshapers, model.up, model.bridges):
        for p in part.parameters() if part is not None else ():
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_it_starts_as_sam(base, images):
    model = SamUNet(base, (8, 8, 16, 16), branch=True, fusion=True)
    with torch.no_grad():
        for mine, theirs in zip(model.embed(images), base.embed(images), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.component("convolution branch")
def test_features_of_four_scales_join_the_tokens_of_four_quarters(base, images):
    sides = [found.shape[1:] for found in Branch((8, 16, 24, 32))(images)]
    assert sides == [(8, 40, 40), (16, 20, 20), (24, 10, 10), (32, 5, 5)]
    model = shaken(SamUNet(base, (8, 8, 16, 16), branch=True, fusion=False))
    seen = []
    layers = base.sam.vision_encoder.layers
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0])) for layer in layers]
    outs = []
    hooks += [layer.register_forward_hook(lambda layer, args, out: outs.append(out)) for layer in layers]
    with torch.no_grad():
        beside = model.branch(images)
        model.embed(images)
        joined = {k: seen[k] - outs[k - 1] for k in range(1, 8)}
        for quarter in range(4):
            wanted = model.reshapers[quarter](beside[quarter])
            torch.testing.assert_close(joined[2 * quarter + 1], wanted, atol=1e-4, rtol=1e-3)
            assert wanted.abs().max() > 0.01
    assert all(joined[k].abs().max() == 0 for k in (2, 4, 6))
    for hook in hooks:
        hook.remove()


@pytest.mark.component("convolution branch")
def test_every_side_becomes_a_grid_of_tokens():
    for side in (40, 10, 5):
        assert Reshaper(8, 12)(torch.ones(1, 8, side, side)).shape == (1, 10, 10, 12)


@pytest.mark.component("multi-scale fusion")
def test_every_quarter_reaches_the_decoder(base, images):
    plain = SamUNet(base, (8, 8, 16, 16), branch=False, fusion=False)
    model = shaken(SamUNet(base, (8, 8, 16, 16), branch=False, fusion=True))
    with torch.no_grad():
        coarse, states = model.encode(base.sam.vision_encoder, images)
        wanted = plain.embed(images).quarter + model.up(coarse)
        for number in range(3):
            wanted = wanted + model.bridges[number](states[number].permute(0, 3, 1, 2))
        torch.testing.assert_close(model.embed(images).quarter, wanted)
        through = base.sam.vision_encoder(images).last_hidden_state
        torch.testing.assert_close(coarse, through)
    assert len(states) == 3 and wanted.shape[2:] == (40, 40)


@pytest.mark.component("frozen transformer")
def test_a_step_trains_everything_but_the_encoder(base, monkeypatch):
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam())
    method = PromptedSamUNet(widths=(8, 8, 8, 8))
    nets = method.build(1, 2, 2)
    shaken(nets["model"])
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, 10:40, 20:50] = 1
    batch = Batch(torch.randn(1, 1, 64, 64) + labels[:, None], labels)
    method.training_step(nets, batch, None, Moment(0, 2)).backward()
    learning = {name for name, p in nets["model"].named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any("vision_encoder" in name for name in learning)
    for part in ("branch", "reshapers", "bridges", "up", "base.sam.mask_decoder", "base.sam.prompt_encoder"):
        assert any(name.startswith(part) for name in learning), part


def test_only_patients_of_other_sites_are_scored(base, monkeypatch):
    label = np.zeros((1, 32, 32), np.uint8)
    label[:, 8:24, 8:24] = 1
    case = lambda site: Case(np.zeros((1, 1, 32, 32), np.float32), label, "c", "p", attributes={"site": site})  # noqa: E731
    truth = torch.from_numpy(label)
    prepared = SimpleNamespace(images=lambda case: torch.zeros(1, 1, 32, 32), labels=lambda case: truth)
    task = SimpleNamespace(keep=(("site", "a"),), preparation=prepared, structures={1: "lung"}, dataset="d")
    asked = []

    def predictor(image, prompt):
        asked.append(prompt)
        return SimpleNamespace(mask=label[0] == 1)

    monkeypatch.setattr(sam_unet, "predictor_of", lambda fitted: predictor)
    assert unseen_rows(SimpleNamespace(task=task), case("a")) == []
    (found,) = unseen_rows(SimpleNamespace(task=task), case("b"))
    assert found["dice"] == found["click_1"] == 1 and found["structure"] == "lung"
    assert asked[0].box == (8, 8, 24, 24) and len(asked[1].foreground) == 1
