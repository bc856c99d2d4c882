"""MedImageInsight's published files: what is read and told from them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from unicl_weights import Reference, published_state, write

from medcook.errors import MedcookError
from medcook.networks.unicl import PUBLISHED, TOKENIZER, MedImageInsight, UniCL, load_unicl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("insight"), published_state())


@pytest.mark.component("architecture")
class TestArchitecture:
    def test_the_published_one_has_the_published_number_of_weights(self):
        with torch.device("meta"):
            model = UniCL(PUBLISHED)
        count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
        assert round(count(model.davit, model.norm) / 1e9, 2) == 0.36
        assert round(count(model.language) / 1e9, 2) == 0.25


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_the_earlier_names_are_the_same_model(self, folder, tmp_path):
        old = {}
        for name, tensor in published_state().items():
            for new, before in (
                ("image_encoder.convs", "visual.conv_embeds"), ("image_encoder.blocks", "visual.main_blocks"),
                ("image_encoder.", "visual."), ("lang_encoder.", "text."), ("image_projection", "vision_projection"),
                ("lang_projection", "text_projection"), ("spatial_block.window_attn.norm", "0.norm1"),
                ("channel_block.channel_attn.norm", "1.norm1"), ("spatial_block.ffn.norm", "0.norm2"),
                ("channel_block.ffn.norm", "1.norm2"), ("spatial_block.window_attn.fn", "0.attn"),
                ("channel_block.channel_attn.fn", "1.attn"), ("ffn.fn.net", "mlp"), ("conv1.fn.dw", "cpe.0.proj"),
                ("conv2.fn.dw", "cpe.1.proj"), ("spatial_block.", "0."), ("channel_block.", "1."),
            ):  # fmt: skip
                name = name.replace(new, before)
            old[name] = tensor
        one, other = load_unicl(folder).state_dict(), load_unicl(write(tmp_path / "old", old)).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_half_precision_and_weights_that_nobody_needs_are_no_harm(self, folder, tmp_path):
        state = {name: tensor.half() for name, tensor in published_state().items()} | {
            "image_encoder.head": torch.ones(3)
        }
        model = load_unicl(write(tmp_path / "half", state))
        assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())

    def test_a_folder_without_one_says_where_they_are(self, tmp_path):
        with pytest.raises(MedcookError, match="no MedImageInsight checkpoint") as error:
            load_unicl(tmp_path)
        assert "huggingface.co/lion-ai/MedImageInsights" in str(error.value)

    @pytest.mark.parametrize("lost", ["lang_projection", "image_encoder.blocks.1.1.channel_block.ffn.fn.net.fc2.bias"])
    def test_a_missing_weight_is_named(self, tmp_path, lost):
        state = published_state()
        del state[lost]
        with pytest.raises(MedcookError, match=r"cannot be read \('.*(lang_projection|1\.1\.channel_block.*bias)"):
            load_unicl(write(tmp_path / "short", state))

    def test_weights_of_another_size_and_damaged_ones_are_refused(self, tmp_path):
        state = published_state() | {"image_projection": torch.zeros(16, 9)}
        with pytest.raises(MedcookError, match="image_projection"):
            load_unicl(write(tmp_path / "other", state))
        broken = write(tmp_path / "broken", published_state())
        weights = next((broken / "vision_model").iterdir())
        weights.write_bytes(weights.read_bytes()[:900])
        with pytest.raises(MedcookError, match="broken: the checkpoint cannot be read"):
            load_unicl(broken)

    def test_images_and_sentences_are_compared_offline(self, folder):
        model, image = MedImageInsight(folder), np.random.default_rng(0).normal(size=(30, 44)).astype(np.float32)
        assert model.image(image).norm().item() == pytest.approx(1, abs=1e-5)
        tokens = [[4, 1, 5], [4, 2, 1, 5]]
        expected = torch.stack(
            [Reference(load_file(next((folder / "vision_model").iterdir()))).text(row) for row in tokens]
        )
        torch.testing.assert_close(model.texts(["a", "b A"]), expected, atol=2e-4, rtol=1e-3)
        found = model.zero_shot(image, ["a", "b a"])
        assert found.sum().item() == pytest.approx(1, abs=1e-5) and not torch.allclose(found[0], found[1])

    def test_a_missing_tokenizer_is_said(self, tmp_path):
        bare = write(tmp_path / "bare", published_state())
        (bare / TOKENIZER / "vocab.json").unlink()
        with pytest.raises(MedcookError, match="no tokenizer"):
            MedImageInsight(bare)
