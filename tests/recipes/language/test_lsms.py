"""Attention at several scales: the formula, what the words change, all scales at once, and what an answer costs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.recipes.language import _one, lsms
from medcook.recipes.language.lsms import (
    LSMS,
    FullScaleDecoder,
    LSMSNet,
    ScaleAwareAttention,
    WordAttention,
    multiply_adds,
    over_space,
    resized_sum,
)

SMALL = (4, 8, 8, 8, 8)
METHOD = lsms.recipe.arms["lsms"].method


def words(count: int = 2, length: int = 5, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of words, the last two of the second sentence missing."""
    empty = torch.zeros(count, length, dtype=torch.bool)
    empty[1, -2:] = True
    return torch.randn(count, length, width), empty


@pytest.mark.component("scale-aware vision-language attention")
def test_attention_is_the_formula():
    torch.manual_seed(0)
    block, x = ScaleAwareAttention(8, 16, (3, 7)), torch.randn(2, 8, 12, 10)
    spoken, empty = words()

    def strip(part: nn.Module, y):
        kernel = part[1].weight * part[0].weight  # an outer product: across, then down
        bias = part[0].bias[:, None, None]
        inner = F.conv2d(y, part[0].weight, padding=(0, part[0].kernel_size[1] // 2), groups=8) + bias
        whole = F.conv2d(y, kernel, padding=[side // 2 for side in kernel.shape[2:]], groups=8)
        constant = F.conv2d(bias.expand_as(inner), part[1].weight, padding=(kernel.shape[2] // 2, 0), groups=8)
        return whole + constant + part[1].bias[:, None, None]

    near = F.conv2d(x, block.near.weight, block.near.bias, padding=2, groups=8)
    total = near + sum(strip(part, near) for part in block.strips) + block.words(near, spoken, empty)
    assert torch.allclose(block(x, spoken, empty), block.mix(total) * x, atol=1e-5)


@pytest.mark.component("scale-aware vision-language attention")
def test_places_attend_to_the_words_that_are_there():
    """Against a loop over places with PyTorch's own attention and instance normalisation."""
    torch.manual_seed(0)
    part, maps = WordAttention(8, 16), torch.randn(2, 8, 3, 4)
    spoken, empty = words()
    found = part(maps, spoken, empty)
    normal = lambda rows: F.instance_norm(rows.T[None])[0].T  # noqa: E731
    for image in range(2):
        asked = normal(part.ask(maps[image].flatten(1).T))
        there = spoken[image][~empty[image]]
        said = F.scaled_dot_product_attention(asked, part.key(there), part.value(there))
        said = normal(part.out(said))
        assert torch.allclose(found[image].flatten(1).T, part.gate(said) * said, atol=1e-4)
    assert over_space(torch.full((1, 5, 2), 3.0)).abs().max() == 0


@pytest.mark.component("diverse convolutional kernels")
@pytest.mark.parametrize("kernels", [(), (5,), (5, 7, 11)])
def test_a_place_reaches_as_far_as_the_longest_strip(kernels):
    torch.manual_seed(0)
    block, x = ScaleAwareAttention(4, 16, kernels).double(), torch.randn(1, 4, 41, 41, requires_grad=True).double()
    spoken, empty = words(count=2)
    block.words = Silent()
    (gradient,) = torch.autograd.grad(block(x, spoken, empty)[0, :, 20, 20].sum(), x)
    reached = gradient.abs().sum((0, 1)).nonzero()
    half = 2 + max((k // 2 for k in kernels), default=0)
    assert reached.amin() == 20 - half and reached.amax() == 20 + half


class Silent(nn.Module):
    """No words are heard."""

    def forward(self, maps, spoken, empty):
        return torch.zeros_like(maps)


@pytest.mark.component("diverse convolutional kernels")
def test_the_ablation_lacks_the_strips_alone():
    without = lsms.recipe.arms["one kernel"].method
    assert without == replace(METHOD, kernels=())
    nets = [replace(one, channels=SMALL).build(1, 3, 2)["model"] for one in (METHOD, without)]
    missing = set(dict(nets[0].named_parameters())) - set(dict(nets[1].named_parameters()))
    assert missing and all(".strips." in name for name in missing)
    assert set(dict(nets[1].named_parameters())) < set(dict(nets[0].named_parameters()))


@pytest.mark.component("full-scale decoder")
def test_every_scale_sees_every_other():
    torch.manual_seed(0)
    decoder = FullScaleDecoder((4, 8, 8, 8), 8).eval()
    stages = [torch.randn(1, 8, side, side, requires_grad=True) for side in (16, 8, 4)]
    alone = decoder.everything
    found = decoder.together(stages)
    assert found.shape == (1, 8, 16, 16)
    (told,) = torch.autograd.grad(found.sum(), decoder.scale, retain_graph=True)
    assert (told.abs().sum(1) > 0).all(), "a place says of which scale it is"
    far = torch.autograd.grad(found[0, :, 0, 0].sum(), stages, retain_graph=True)
    assert all(each[0, :, -1, -1].abs().sum() > 0 for each in far), "the other corner of each scale is seen"
    decoder.everything = nn.Identity()
    near = torch.autograd.grad(decoder.together(stages)[0, :, 0, 0].sum(), stages)
    assert all(each[0, :, -1, -1].abs().sum() == 0 for each in near)
    decoder.everything = alone


@pytest.mark.component("full-scale decoder")
def test_all_scales_are_summed_at_the_size_of_the_finest():
    maps = [torch.randn(1, 2, 8, 6), torch.randn(1, 2, 4, 3), torch.randn(1, 2, 1, 1)]
    upsample = nn.Upsample(size=(8, 6), mode="bilinear")
    assert torch.allclose(resized_sum(maps), sum(upsample(each) for each in maps), atol=1e-6)
    decoder = FullScaleDecoder((4, 8, 8), 8).eval()
    grown = [torch.randn(1, count, side, side, requires_grad=True) for count, side in ((4, 16), (8, 8), (8, 4))]
    gradients = torch.autograd.grad(decoder(grown).sum(), grown)
    assert all(each.abs().sum() > 0 for each in gradients)


@pytest.mark.component("full-scale decoder")
def test_the_other_decoder_goes_scale_after_scale_as_the_baseline():
    method = lsms.recipe.arms["scale after scale"].method
    assert method == replace(METHOD, full_scale=False)
    net = replace(method, channels=SMALL).build(1, 3, 2)["model"]
    assert net.whole is None and len(net.net.up) == 4


def test_every_image_hears_its_own_sentence():
    torch.manual_seed(0)
    net, images = LSMSNet(1, SMALL, 16, (5, 7), True).eval(), torch.randn(2, 1, 32, 32)
    both = net(images, ("left lung", "all small nodules in the upper field"))
    assert torch.allclose(both[0], net(images[:1], ("left lung",))[0], atol=1e-3)
    maps = net.encode(images[:1])
    heard = [net.fuse(maps, net.understand((said,)), (said,)) for said in ("left lung", "right lung")]
    assert torch.equal(heard[0][0], heard[1][0])
    assert all(
        not torch.allclose(one, other, atol=1e-5) for one, other in zip(*(part[1:] for part in heard), strict=True)
    )


@pytest.mark.component("lower computational cost")
def test_multiply_adds_are_those_of_the_layers():
    """Counted by hand: a convolution and a matrix product."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.line = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(5, 7)

        def forward(self, images, sentences):
            return self.conv(images), self.line(torch.zeros(2, 5))

    assert multiply_adds(Plain()) == pytest.approx((64 * 64 * 3 * 9 + 2 * 5 * 7) / 1e6)


@pytest.mark.component("lower computational cost")
def test_rows_tell_what_an_answer_costs_and_it_is_less_than_the_baselines(monkeypatch):
    found = [{"structure": "one", "dice": 0.5}, {"structure": "absent", "rejected": 0.25}, {"structure": "several"}]
    monkeypatch.setattr(_one, "grounding_rows", lambda fitted, case: found)
    rows = {}
    for name in ("told", "lsms"):
        nets = lsms.recipe.arms[name].method.build(1, 37, 2)
        fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()})
        (rows[name],) = lsms.costed_rows(fitted, None)
        assert rows[name]["parameters"] == pytest.approx(sum(w.numel() for w in nets["average"].parameters()) / 1e3)
        assert rows[name]["dice"] == 0.5 and rows[name]["rejected_absent"] == 0.25
    assert 0.5 * rows["told"]["multiply_adds"] < rows["lsms"]["multiply_adds"] < 0.7 * rows["told"]["multiply_adds"]
    assert rows["lsms"]["parameters"] < rows["told"]["parameters"]
    monkeypatch.setattr(_one, "grounding_rows", lambda fitted, case: [])
    assert lsms.costed_rows(fitted, None) == []


@pytest.mark.parametrize("settings", [{}, {"kernels": ()}, {"full_scale": False}])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(settings, size):
    method = LSMS(channels=SMALL, **settings)
    method.language = replace(method.language, several=0.0)
    assert_every_parameter_is_trained(method, size)
