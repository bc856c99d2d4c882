"""VILA-M3's published files, how it speaks and calls experts, and what it learns from."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vila_weights import EYES, MOUTH, VOCABULARY, Reference, published_state, write

from medcook.errors import MedcookError
from medcook.networks.vila import IMAGE, LLAMAS, SIGLIP, FourToOne, Siglip, Vila, VilaM3, called, load_vila, prompt_of
from medcook.sam.sam3 import pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("vila"))


@pytest.mark.component("architecture")
class TestArchitecture:
    def test_the_published_ones_have_the_published_numbers_of_weights(self):
        """Gigabytes of the published files, in two bytes a weight."""
        count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
        for size, words in {"3B": 2_701_560_320, "8B": 8_030_261_248, "13B": 13_015_864_320}.items():
            with torch.device("meta"):
                model = Vila(Siglip(SIGLIP), LLAMAS[size])
            width = model.llm.config.hidden_size
            assert count(model.llm) == words and count(model.vision_tower) == 428_225_600
            assert count(model.mm_projector) == 2 * 4608 + (4608 + 1) * width + (width + 1) * width
        assert round(count(model.mm_projector) * 2 / 1e6, 1) == 99.7

    def test_a_picture_of_384_pixels_is_196_tokens(self):
        """Each of four patches, row by row; there is nothing beyond the last row and column."""
        found = FourToOne()(torch.arange(27 * 27.0)[None, :, None].expand(1, -1, 2))
        assert found.shape == (1, 14 * 14, 8)
        assert found[0, 0].tolist() == [0, 0, 1, 1, 27, 27, 28, 28] and found[0, -1].tolist() == [728, 728, *[0] * 6]

    def test_images_of_any_size_are_stretched(self):
        eyes, image = Siglip(EYES), torch.randn(1, 3, 33, 27)
        small = F.interpolate(image, (20, 20), mode="bilinear", antialias=True, align_corners=False)
        assert torch.allclose(eyes(image), eyes(small), atol=1e-6) and eyes(image).shape == (1, 25, 8)

    def test_a_loss_is_of_what_is_told_alone(self):
        torch.manual_seed(0)
        model = Vila(Siglip(EYES), MOUTH)
        lines, told = [[0, IMAGE, 5, 6, 1], [0, IMAGE, 7]], [[False, False, False, True, True], [False, False, True]]
        pictures = model.pictures(torch.randn(2, 3, 20, 20))
        found = model.loss(lines, told, pictures)
        chances = [
            model.next_words([row[:end]], pictures[[k]]).log_softmax(1)[0, row[end]]
            for k, row in enumerate(lines)
            for end in range(2, len(row))
            if told[k][end]
        ]
        assert len(chances) == 3 and found.item() == pytest.approx(-torch.stack(chances).mean().item(), abs=1e-5)


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_half_precision_is_read_and_may_stay(self, folder, tmp_path):
        half = write(tmp_path / "half", dtype=torch.bfloat16)
        assert {p.dtype for p in load_vila(half).parameters()} == {torch.float32}
        assert {p.dtype for p in load_vila(half, torch.bfloat16).parameters()} == {torch.bfloat16}

    def test_weights_that_nobody_needs_are_no_harm(self, tmp_path):
        parts = published_state()
        parts["llm"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        load_vila(write(tmp_path / "more", parts))

    def test_a_folder_without_one_says_where_they_are(self, tmp_path):
        with pytest.raises(MedcookError, match="vision_tower is missing") as error:
            load_vila(tmp_path)
        assert "MONAI/Llama3-VILA-M3-3B" in str(error.value)

    @pytest.mark.parametrize("part, lost", [("llm", "lm_head.weight"), ("mm_projector", "layers.4.bias")])
    def test_a_missing_weight_is_named(self, tmp_path, part, lost):
        parts = published_state()
        del parts[part][lost]
        with pytest.raises(MedcookError, match=rf"cannot be read \('{part}.{lost}"):
            load_vila(write(tmp_path / "short", parts))

    def test_damaged_and_foreign_ones_are_refused(self, tmp_path):
        broken = write(tmp_path / "broken")
        weights = broken / "vision_tower" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:300])
        with pytest.raises(MedcookError, match="broken: the checkpoint cannot be read"):
            load_vila(broken)
        other = write(tmp_path / "other")
        (other / "mm_projector" / "config.json").write_text('{"mm_projector_type": "linear"}', encoding="utf-8")
        with pytest.raises(MedcookError, match="projector of kind 'linear'"):
            load_vila(other)

    def test_it_speaks_offline(self, folder):
        model, reference = VilaM3(folder), Reference()
        image = np.random.default_rng(0).normal(size=(30, 24)).astype(np.float32)
        row = [0, 2, 4, IMAGE, 6, 5, 7, 3, 4]
        assert model.tokens(prompt_of(["<image>are lungs large"], "", False)) == row
        picture, said = reference.picture(pixels(image, 20)[0]), []
        while len(said) < 4 and 1 not in said:
            said.append(int(reference.logits(row + said, [picture]).argmax()))
        words = " ".join(VOCABULARY[word] for word in said if word > 1)
        assert model.say(["<image>are lungs large"], [image], longest=4) == words

    def test_a_missing_tokenizer_is_said(self, tmp_path):
        bare = write(tmp_path / "bare")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (bare / "llm" / name).unlink()
        with pytest.raises(MedcookError, match="no tokenizer"):
            VilaM3(bare)

    def test_turns_are_written_as_the_models_were_taught(self):
        messages = ["one", "two", "three"]
        assert prompt_of(messages, "hi.", False) == "hi. USER: one ASSISTANT: two</s>USER: three ASSISTANT:"
        parts = prompt_of(messages, "hi.", True).split("<|eot_id|>")
        assert [part.split("\n\n")[1] for part in parts] == ["hi.", *messages, ""]
        assert [part.split("|>")[1].split("<|")[0] for part in parts] == ["system", *["user", "assistant"] * 2]


@pytest.mark.component("the model calls an expert by a word")
class TestCalls:
    @pytest.mark.parametrize(
        "text, call",
        [
            ("Let me first trigger <CXR()>.", ("CXR", "")),
            ("<VISTA3D(hepatic tumor)>", ("VISTA3D", "hepatic tumor")),
            ("<BRATS> it is", ("BRATS", "")),
            ("see <image>: <CXR()>", ("CXR", "")),
            ("<CXR()> or <BRATS()>", None),
            ("two < three > one", None),
            ("no", None),
        ],
    )
    def test_a_call_is_one_name_in_brackets(self, text, call):
        assert called(text) == call

    def test_an_expert_of_a_checkpoints_model_is_heard_once(self, folder, monkeypatch):
        heard, said = [], iter(["<CXR(all)>", "<CXR()> again"])
        monkeypatch.setattr(
            VilaM3, "say", lambda self, messages, images: heard.append((messages[:], len(images))) or next(said)
        )
        model, image = VilaM3(folder), np.zeros((4, 4), np.float32)
        expert = lambda given, argument: (f"<image> of {argument}", given + 1)  # noqa: E731
        found = model.ask(image, "lungs?", {"CXR": expert}, cards="cards ")
        assert found == ["cards <image>lungs?", "<CXR(all)>", "<image> of all\nlungs?", "<CXR()> again"]
        assert heard == [(found[:1], 1), (found[:3], 2)]
        said = iter(["<BRATS()>"])
        assert model.ask(image, "?", {"CXR": expert}) == ["<image>?", "<BRATS()>"]
