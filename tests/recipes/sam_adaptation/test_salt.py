"""SALT: what lies between the singular vectors of a layer, and what of it learns."""

import numpy as np
import pytest
import torch
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import salt
from medcook.recipes.sam_adaptation.salt import Lora, Salt, SingularLinear
from medcook.sam import adapting
from medcook.sam.model import SmallSam, small_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of two blocks with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=2)))


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(12, 30)


def spectrum(layer: SingularLinear, linear: nn.Linear) -> np.ndarray:
    """S' (n, n): the adapted weight between the singular vectors that numpy finds for the old one."""
    left, _, right = np.linalg.svd(linear.weight.detach().numpy(), full_matrices=False)
    return left.T @ layer.weight().detach().numpy() @ right.T


@pytest.mark.component("scale and shift of the top singular values")
class TestTop:
    def test_scaled_by_one_changes_nothing(self, linear):
        x = torch.randn(5, 12)
        assert torch.allclose(SingularLinear(linear, top=4, rank=3)(x), linear(x), atol=1e-5)

    def test_each_of_the_largest_is_scaled_and_shifted(self, linear):
        layer = SingularLinear(linear, top=4, rank=0)
        layer.scale.data, layer.shift.data = torch.tensor([0.5, 0.0, -0.5, 0.1]), torch.tensor([0.0, 0.3, 0.0, -0.1])
        values = np.linalg.svd(linear.weight.detach().numpy(), compute_uv=False)
        wanted = values.copy()
        wanted[:4] = values[:4] * [1.5, 1, 0.5, 1.1] + [0, 0.3, 0, -0.1]
        assert np.allclose(spectrum(layer, linear), np.diag(wanted), atol=1e-5)

    def test_none_becomes_negative(self, linear):
        layer = SingularLinear(linear, top=4, rank=0)
        layer.shift.data[1] = -100
        assert abs(spectrum(layer, linear)[1, 1]) < 1e-5

    def test_they_may_be_kept_from_learning(self, linear):
        names = {name for name, p in SingularLinear(linear, 4, 3, rescale=False).named_parameters() if p.requires_grad}
        assert names == {"down", "up", "bias"}


@pytest.mark.component("low-rank update of the remaining subspace")
class TestRest:
    def test_it_changes_what_lies_between_the_smaller_ones_and_nothing_else(self, linear):
        layer = SingularLinear(linear, top=4, rank=3)
        layer.down.data.normal_()
        values = np.linalg.svd(linear.weight.detach().numpy(), compute_uv=False)
        change = spectrum(layer, linear) - np.diag(values)
        assert np.allclose(np.abs(change[:4]), 0, atol=1e-5) and np.allclose(change[:, :4], 0, atol=1e-5)
        assert np.linalg.matrix_rank(change, tol=1e-4) == 3 and np.abs(change[4:, 4:]).max() > 0.1

    def test_without_it_the_top_alone_learns(self, linear):
        layer = SingularLinear(linear, top=12, rank=5)
        assert layer.down.numel() == 0 and layer(torch.randn(2, 12)).shape == (2, 30)


@pytest.mark.component("comparison with LoRA")
class TestMethods:
    def trained(self, method) -> dict[str, int]:
        """Trainable weights of a method's encoder."""
        encoder = method.build(1, 3, 2)["model"].sam.sam.vision_encoder
        return {name: p.numel() for name, p in encoder.named_parameters() if p.requires_grad}

    def test_both_have_as_many_trainable_weights_in_the_same_layers(self):
        mine, theirs = self.trained(Salt()), self.trained(Lora())
        assert sum(mine.values()) == 2 * 11776 and sum(theirs.values()) == 2 * 12288
        assert {name.rsplit(".", 1)[0] for name in mine} == {name.split(".lora_")[0] for name in theirs}

    @pytest.mark.parametrize("method", [Salt(), Lora()], ids=["salt", "lora"])
    def test_it_starts_as_the_model_and_leaves_the_frozen_as_it_is(self, method):
        nets = method.build(1, 3, 2)
        plain = adapting.Segmenter(SmallSam(small_config(depth=2)), 3)
        state = {name.replace(".base_layer", ""): value for name, value in nets["model"].state_dict().items()}
        plain.load_state_dict(
            {name: value for name, value in state.items() if name in plain.state_dict()}, strict=False
        )
        for mine, theirs in zip(layers(nets["model"]), layers(plain), strict=True):
            if isinstance(mine, SingularLinear):
                theirs.weight.data = mine.weight().detach()
        images = torch.randn(2, 1, 32, 32)
        assert torch.allclose(nets["model"](images), plain(images), atol=1e-3)
        frozen = {name: p.clone() for name, p in nets["model"].named_parameters() if not p.requires_grad}
        batch = Batch(images, torch.randint(0, 3, (2, 32, 32)).byte())
        optimiser, _ = method.optimise([p for p in nets["model"].parameters() if p.requires_grad], 10)
        method.training_step(nets, batch, None, Moment(0, 10)).backward()
        optimiser.step()
        after = dict(nets["model"].named_parameters())
        assert all(torch.equal(value, after[name]) for name, value in frozen.items())


@pytest.mark.component("comparison with SVD")
def test_the_svd_baseline_rescales_all_and_adds_nothing():
    method = salt.recipe.arms["singular values only"].method
    encoder = method.build(1, 3, 2)["model"].sam.sam.vision_encoder
    learning = [p for p in encoder.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == 2 * 4 * 2 * 192 and all(p.ndim == 1 for p in learning)


def layers(model) -> list[nn.Module]:
    """The adapted layers of a segmenter's encoder, or the same ones of one that is not."""
    blocks = model.sam.sam.vision_encoder.layers
    return [layer for block in blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2)]
