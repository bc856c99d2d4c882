"""The grid of fine-tuning: which weights learn in each of its cells."""

import pytest
import torch
from torch import nn

from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation._adapters import Bottleneck
from medcook.recipes.sam_adaptation.finetune_sam import FinetunedSam, recipe
from medcook.sam import adapting
from medcook.sam.model import SmallSam, small_config

CELLS = {name: arm.method for name, arm in recipe.arms.items() if isinstance(arm.method, FinetunedSam)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of one block with random weights."""
    torch.manual_seed(0)
    monkeypatch.setattr(adapting, "start", lambda pretrained=True: SmallSam(small_config(depth=1)))


def learning(method: FinetunedSam) -> set[str]:
    """Names of what learns, without the class tokens and their heads."""
    named = method.build(1, 3, 2)["model"].named_parameters()
    return {name for name, p in named if p.requires_grad and not name.startswith(("tokens", "heads"))}


@pytest.mark.component("model components")
@pytest.mark.parametrize("how", ["full", "adapter", "lora"])
def test_only_the_chosen_component_learns(how):
    decoder = learning(FinetunedSam(component="decoder", how=how))
    both = learning(FinetunedSam(component="encoder and decoder", how=how))
    assert decoder and not any("vision_encoder" in name for name in decoder)
    assert decoder < both and all("vision_encoder" in name for name in both - decoder)


@pytest.mark.component("parameter-efficient tuning")
class TestEfficient:
    def test_adapters_learn_and_nothing_else(self):
        names = learning(FinetunedSam(how="adapter"))
        ends = {name.rsplit(".1.", 1)[0].rsplit(".", 1)[-1] for name in names}
        assert ends == {"proj", "lin2", "out_proj"} and all(".1.down." in name or ".1.up." in name for name in names)

    def test_lora_learns_and_nothing_else(self):
        names = learning(FinetunedSam(how="lora"))
        layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
        assert layers == {"qkv", "proj", "lin1", "lin2", "q_proj", "k_proj", "v_proj", "out_proj"}
        assert all("lora_" in name for name in names)

    @pytest.mark.parametrize("how", ["adapter", "lora"])
    def test_it_starts_as_the_model_that_it_adapts(self, how):
        torch.manual_seed(1)
        plain = FinetunedSam(how="full").build(1, 3, 2)["model"]
        torch.manual_seed(1)
        adapted = FinetunedSam(how=how).build(1, 3, 2)["model"]
        images = torch.randn(2, 1, 48, 48)
        assert torch.allclose(plain(images), adapted(images), atol=1e-5)

    def test_an_adapter_is_a_residual_bottleneck(self):
        block, x = Bottleneck(6, 2), torch.randn(4, 6)
        assert torch.equal(block(x), x)
        block.up.weight.data.normal_()
        wanted = x + nn.functional.gelu(x @ block.down.weight.T + block.down.bias) @ block.up.weight.T
        assert torch.allclose(block(x), wanted, atol=1e-6)

    @pytest.mark.parametrize("how", ["adapter", "lora"])
    def test_what_is_frozen_stays_as_it_is(self, how):
        method = FinetunedSam(how=how)
        nets = method.build(1, 3, 2)
        before = {name: p.clone() for name, p in nets["model"].named_parameters()}
        optimiser, _ = method.optimise([p for p in nets["model"].parameters() if p.requires_grad], 10)
        batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
        method.training_step(nets, batch, None, Moment(0, 10)).backward()
        optimiser.step()
        moved = {name for name, p in nets["model"].named_parameters() if not torch.equal(p, before[name])}
        assert moved and moved <= {name for name, p in nets["model"].named_parameters() if p.requires_grad}


@pytest.mark.component("few and all labels")
def test_an_arm_with_all_labels_sees_every_training_patient():
    few, everyone = (recipe.run("full", name, 0)[1].labelled for name in ("decoder", "decoder, all labels"))
    assert few == 3 and everyone is None
