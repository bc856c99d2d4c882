"""What defines CAFormer, that its published checkpoints would load, and that the recipe scales data alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.caformer import Attention, Block, CAFormer, SeparableConvolution, load_surgenet
from medcook.recipes.pretraining._dino import MOMENTUM
from medcook.recipes.pretraining._pyramid import PyramidNet
from medcook.recipes.pretraining.surgenetxl import DIMS, FEW, SmallSurgeNet, recipe

SMALL = SmallSurgeNet()


@pytest.fixture(scope="module")
def published():
    """Weights as a teacher's file has them: the names and shapes of the published code, with its classifier."""
    weights = {name: torch.zeros(shape) for name, shape in published_shapes().items()}
    return weights | {"head.fc1.weight": torch.zeros(2048, 512), "head.fc1.bias": torch.zeros(2048)}


def published_shapes() -> dict[str, tuple[int, ...]]:
    dims, shapes = (64, 128, 320, 512), {"norm.weight": (512,), "norm.bias": (512,)}
    for k, (before, dim, depth) in enumerate(zip((3, *dims), dims, (3, 3, 9, 3), strict=False)):
        size = 3 if k else 7
        down = f"downsample_layers.{k}"
        shapes[f"{down}.conv.weight"], shapes[f"{down}.conv.bias"] = (dim, before, size, size), (dim,)
        shapes[f"{down}.{'pre' if k else 'post'}_norm.weight"] = (before if k else dim,)
        for block in (f"stages.{k}.{j}" for j in range(depth)):
            mixer = {"qkv": (3 * dim, dim), "proj": (dim, dim)}
            if k < 2:
                mixer = {"pwconv1": (2 * dim, dim), "dwconv": (2 * dim, 1, 7, 7), "pwconv2": (dim, 2 * dim)}
            shapes |= {f"{block}.token_mixer.{name}.weight": shape for name, shape in mixer.items()}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * dim, dim), f"{block}.mlp.fc2.weight": (dim, 4 * dim)}
            shapes |= {f"{block}.norm{n}.weight": (dim,) for n in (1, 2)}
            shapes |= {f"{block}.res_scale{n}.scale": (dim,) for n in (1, 2) if k > 1}
    return shapes


@pytest.mark.component("architecture")
@pytest.mark.component("CAFormer and its checkpoints")
def test_all_weights_are_named_and_shaped_as_published():
    with torch.device("meta"):
        found = {name: tuple(weight.shape) for name, weight in CAFormer().state_dict().items()}
    assert found == published_shapes()


@pytest.mark.component("checkpoint")
@pytest.mark.component("CAFormer and its checkpoints")
def test_a_published_checkpoint_loads_without_its_classifier(published, tmp_path):
    published = published | {"norm.bias": torch.arange(512.0)}
    torch.save(published, tmp_path / "teacher.pth")
    network = load_surgenet(tmp_path / "teacher.pth")
    assert torch.equal(network(torch.randn(1, 3, 64, 64)), torch.zeros(1, 512, 2, 2))
    assert torch.equal(network.norm.bias, torch.arange(512.0))
    assert all(p.requires_grad and not p.is_meta for p in network.parameters())


@pytest.mark.component("checkpoint")
@pytest.mark.component("CAFormer and its checkpoints")
def test_files_that_are_no_checkpoint_are_named(published, tmp_path):
    with pytest.raises(MedcookError, match=r"missing\.pth: no such file"):
        load_surgenet(tmp_path / "missing.pth")
    broken = tmp_path / "broken.pth"
    torch.save(published, broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(MedcookError, match=r"broken\.pth: not a checkpoint"):
        load_surgenet(broken)
    torch.save({"student": published}, tmp_path / "dino.pth")
    with pytest.raises(MedcookError, match=r"dino\.pth: not the weights"):
        load_surgenet(tmp_path / "dino.pth")


@pytest.mark.component("architecture")
@pytest.mark.component("CAFormer and its checkpoints")
def test_attention_is_that_of_a_loop_over_heads():
    layer, x = Attention(64), torch.randn(2, 3, 4, 64)
    queries, keys, values = layer.qkv(x.reshape(2, 12, 64)).split(64, dim=2)
    told = []
    for head in range(2):
        q, k, v = (part[:, :, 32 * head : 32 * head + 32] for part in (queries, keys, values))
        told.append((q @ k.transpose(1, 2) / 32**0.5).softmax(2) @ v)
    assert torch.allclose(layer(x), layer.proj(torch.cat(told, 2)).view(2, 3, 4, 64), atol=1e-5)


@pytest.mark.component("architecture")
@pytest.mark.component("CAFormer and its checkpoints")
def test_the_convolution_mixes_neighbours_of_each_channel():
    layer, x = SeparableConvolution(4), torch.randn(2, 9, 8, 4)
    wide = F.relu(F.conv2d(x.permute(0, 3, 1, 2), layer.pwconv1.weight[:, :, None, None]))
    mixed = torch.cat([F.conv2d(wide[:, k : k + 1], layer.dwconv.weight[k : k + 1], padding=3) for k in range(8)], 1)
    wanted = F.conv2d(mixed, layer.pwconv2.weight[:, :, None, None]).permute(0, 2, 3, 1)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


@pytest.mark.component("architecture")
@pytest.mark.component("CAFormer and its checkpoints")
def test_a_block_is_residual_and_its_way_around_has_factors_in_late_stages():
    block, x = Block(32, Attention, scaled=True), torch.randn(1, 2, 2, 32)
    for layer in (block.token_mixer.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
    assert torch.equal(block(x), x)
    nn.init.constant_(block.res_scale1.scale, 2.0)
    nn.init.constant_(block.res_scale2.scale, 3.0)
    assert torch.allclose(block(x), 6 * x)
    assert isinstance(Block(32, SeparableConvolution, scaled=False).res_scale1, nn.Identity)


@pytest.mark.component("feature pyramid for segmentation")
def test_levels_halve_and_any_size_comes_back():
    net = SMALL.model(1, 3, 2)
    assert isinstance(net, PyramidNet)
    maps = net.encoder.levels(torch.randn(1, 1, 64, 48))
    assert [tuple(level.shape[1:]) for level in maps] == [(16, 31, 23), (32, 16, 12), (64, 8, 6), (96, 4, 3)]
    assert [level.shape[1] for level in maps] == list(DIMS)
    out = net(torch.randn(2, 1, 50, 46))
    assert out.shape == (2, 3, 50, 46)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.lateral.parameters())


@pytest.mark.component("pre-training by DINO")
def test_dino_trains_the_encoder_and_its_teacher_follows():
    nets, images = SMALL.build(1, 3, 2), torch.randn(2, 1, 64, 64)
    hidden = Batch(images, torch.full((2, 64, 64), IGNORE, dtype=torch.uint8))
    SMALL.training_step(nets, hidden, hidden, Moment(0, 10)).backward()
    learns = [name for name, p in nets["model"].encoder.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in learns} == {"downsample_layers", "stages"}
    assert nets["model"].head.weight.grad is None
    before = nets["pretext"].teacher.norm.weight.clone()
    nn.init.zeros_(nets["model"].encoder.norm.weight)
    SMALL.after_step(nets, Moment(0, 10))
    assert torch.allclose(nets["pretext"].teacher.norm.weight, MOMENTUM * before)


@pytest.mark.component("scaling of data")
def test_the_arms_differ_in_images_alone():
    runs = {arm: recipe.run("full", arm, 0) for arm in recipe.ablation}
    (method, task, budget, seed), (method2, few, budget2, seed2) = runs.values()
    assert (method.settings(), budget, seed) == (method2.settings(), budget2, seed2)
    assert (task.most, few.most) == (None, FEW) and task.pool == few.pool
