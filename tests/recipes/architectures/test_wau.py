"""Window attention upsampling: who is asked, who answers, and what is left without it."""

import pytest
import torch
import torch.nn.functional as F

from medcook.recipes.architectures.wau import Wau, WauUNet, WindowAttentionUpsample, joined, windows


def features(seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Deep features on a grid of 8 x 8, the skip's on 16 x 16."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 12, 8, 8, generator=rng), torch.randn(batch, 8, 16, 16, generator=rng)


@pytest.fixture
def upsample() -> WindowAttentionUpsample:
    torch.manual_seed(0)
    return WindowAttentionUpsample(12, 8, heads=2, window=4)


@pytest.mark.component("attention decoder")
def test_it_is_multi_head_attention_from_skip_to_deep(upsample):
    """Against torch.nn.MultiheadAttention with the same weights, in each of the four windows."""
    deep, skip = features()
    with torch.no_grad():
        upsample.bias.normal_()
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        reference.out_proj.weight.copy_(upsample.out.weight), reference.out_proj.bias.copy_(upsample.out.bias)
    found = upsample.attend(deep, skip)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near = deep[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(2).transpose(1, 2)
        fine = skip[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(2).transpose(1, 2)
        keys, values = upsample.key_value(upsample.deep_norm(near)).chunk(2, -1)
        bias = upsample.bias.repeat(2, 1, 1)
        wanted, _ = reference(upsample.query(upsample.query_norm(fine)), keys, values, attn_mask=bias)
        here = found[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(2).transpose(1, 2)
        assert torch.allclose(here, wanted, atol=1e-5)


@pytest.mark.component("attention decoder")
def test_the_skip_decides_where_to_look(upsample):
    """With the same deep features, another skip gets another answer; bilinear upsampling would not notice."""
    deep, skip = features()
    plain = WindowAttentionUpsample(12, 8, attention=False)
    assert not torch.allclose(upsample(deep, skip), upsample(deep, skip.flip(1)))
    assert torch.equal(plain(deep, skip), plain(deep, skip.flip(1)))


@pytest.mark.component("bilinear residual")
def test_attention_is_added_to_bilinear_upsampling(upsample):
    deep, skip = features()
    smooth = F.interpolate(upsample.project(deep), scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(upsample(deep, skip), smooth + upsample.attend(deep, skip), atol=1e-6)
    upsample.residual = False
    assert torch.equal(upsample(deep, skip), upsample.attend(deep, skip))


@pytest.mark.component("window attention")
def test_a_pixel_hears_its_own_window_alone(upsample):
    deep, skip = features()
    other = deep.clone()
    other[:, :, :4, :4] = deep[:, :, :4, :4].flip(1)
    changed = (upsample.attend(other, skip) - upsample.attend(deep, skip)).abs().amax((0, 1)) > 1e-6
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[:8, :8] = True
    assert torch.equal(changed, wanted)


@pytest.mark.component("window attention")
def test_windows_are_put_together_as_they_were():
    image = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    assert torch.equal(joined(windows(image, 4), 4, 8, 12), image)
    assert torch.equal(windows(image, 4)[1, :, 0], image[0, 0, :4, 4:8].flatten())


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = WauUNet(inputs=1, classes=3, channels=(4, 8, 8))
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_the_ablation_has_no_attention():
    full, bare = (Wau(attention=attention, channels=(4, 8)).model(1, 3) for attention in (True, False))
    names = {name for name, _ in bare.named_parameters()}
    assert names < {name for name, _ in full.named_parameters()}
    assert not any("query" in name for name in names)
