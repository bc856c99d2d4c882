"""VILA-M3: VILA against an implementation of its own, its checkpoint, and conversations in which experts are asked."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.vila import (
    IMAGE,
    LLAMAS,
    SIGLIP,
    FourToOne,
    Siglip,
    Vila,
    VilaM3,
    called,
    load_vila,
    prompt_of,
)
from medcook.recipes.findings import _asked as asked
from medcook.recipes.findings import vila_m3
from medcook.recipes.findings._asked import CALLS, STOP, TOPICS, UNKNOWN, WORDS, Measure
from medcook.recipes.findings._experts import Experts, Findings, coloured, overlay
from medcook.recipes.findings.vila_m3 import BRAINS, Consulting, asked_rows, recipe
from medcook.sam.sam3 import pixels
from medcook.tasks import Budget
from medcook.training import Loop

EYES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
EYES |= {"image_size": 20, "patch_size": 4}
MOUTH = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
MOUTH |= {"num_key_value_heads": 1, "vocab_size": 9, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MOUTH |= {"bos_token_id": 0, "eos_token_id": 1}
VOCABULARY = ("<s>", "</s>", "USER", "ASSISTANT", ":", "lungs", "are", "large", "?")


def line(name: str, inputs: int, outputs: int, bias: bool = True) -> dict:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_state() -> dict[str, dict[str, Tensor]]:
    """{part: weights} with random values, by their published names."""
    start, shapes = "vision_model", {"vision_tower": {}, "mm_projector": {}, "llm": {}}
    eyes, llm = shapes["vision_tower"], shapes["llm"]
    eyes |= {
        f"{start}.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        f"{start}.embeddings.patch_embedding.bias": (8,),
    }
    eyes |= {f"{start}.embeddings.position_embedding.weight": (25, 8), f"{start}.head.probe": (1, 1, 8)}
    for number in range(3):
        layer = f"{start}.encoder.layers.{number}"
        for part in ("k", "v", "q", "out"):
            eyes |= line(f"{layer}.self_attn.{part}_proj", 8, 8)
        eyes |= norm(f"{layer}.layer_norm1", 8) | norm(f"{layer}.layer_norm2", 8)
        eyes |= line(f"{layer}.mlp.fc1", 8, 12) | line(f"{layer}.mlp.fc2", 12, 8)
    eyes |= norm(f"{start}.post_layernorm", 8) | norm(f"{start}.head.layernorm", 8)
    eyes |= {f"{start}.head.attention.in_proj_weight": (24, 8), f"{start}.head.attention.in_proj_bias": (24,)}
    eyes |= line(f"{start}.head.attention.out_proj", 8, 8)
    eyes |= line(f"{start}.head.mlp.fc1", 8, 12) | line(f"{start}.head.mlp.fc2", 12, 8)
    shapes["mm_projector"] |= norm("layers.1", 32) | line("layers.2", 32, 12) | line("layers.4", 12, 12)
    llm |= {"model.embed_tokens.weight": (9, 12), "model.norm.weight": (12,), "lm_head.weight": (9, 12)}
    for number in range(2):
        layer = f"model.layers.{number}"
        llm |= {f"{layer}.input_layernorm.weight": (12,), f"{layer}.post_attention_layernorm.weight": (12,)}
        for part, outputs in (("q", 12), ("k", 4), ("v", 4), ("o", 12)):
            llm |= line(f"{layer}.self_attn.{part}_proj", 12, outputs, bias=False)
        for part, (inputs, outputs) in {"gate": (12, 20), "up": (12, 20), "down": (20, 12)}.items():
            llm |= line(f"{layer}.mlp.{part}_proj", inputs, outputs, bias=False)
    rng = torch.Generator().manual_seed(0)
    return {
        part: {name: 0.5 * torch.randn(shape, generator=rng) for name, shape in names.items()}
        for part, names in shapes.items()
    }


class Reference:
    """The published model's forward pass from its own names, patch by patch and token by token."""

    def __init__(self):
        self.parts = published_state()

    def line(self, part: str, name: str, x: Tensor) -> Tensor:
        bias = self.parts[part].get(f"{name}.bias", torch.zeros(1))
        return x @ self.parts[part][f"{name}.weight"].T + bias

    def norm(self, part: str, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return self.parts[part][f"{name}.weight"] * scaled + self.parts[part][f"{name}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        return self.parts["llm"][f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def picture(self, image: Tensor) -> Tensor:
        """(3, 20, 20) to nine picture tokens (9, 12)."""
        eyes, start = self.parts["vision_tower"], "vision_model"
        kernel = eyes[f"{start}.embeddings.patch_embedding.weight"].flatten(1)
        cells = [image[:, r : r + 4, c : c + 4].flatten() for r in range(0, 20, 4) for c in range(0, 20, 4)]
        x = torch.stack(cells) @ kernel.T + eyes[f"{start}.embeddings.patch_embedding.bias"]
        x = x + eyes[f"{start}.embeddings.position_embedding.weight"]
        for number in range(2):  # of three layers, the last is not heard
            layer = f"{start}.encoder.layers.{number}"
            seen = self.norm("vision_tower", f"{layer}.layer_norm1", x, 1e-6)
            q, k, v = (self.line("vision_tower", f"{layer}.self_attn.{part}_proj", seen) for part in "qkv")
            heads = [(q[:, h] @ k[:, h].T / 2).softmax(1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
            x = x + self.line("vision_tower", f"{layer}.self_attn.out_proj", torch.cat(heads, 1))
            inner = self.line(
                "vision_tower", f"{layer}.mlp.fc1", self.norm("vision_tower", f"{layer}.layer_norm2", x, 1e-6)
            )
            x = x + self.line("vision_tower", f"{layer}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        grid, tokens = x.view(5, 5, 8), []
        at = lambda r, c: grid[r, c] if r < 5 and c < 5 else torch.zeros(8)  # noqa: E731
        for r in range(0, 5, 2):
            for c in range(0, 5, 2):
                tokens.append(torch.cat([at(r, c), at(r, c + 1), at(r + 1, c), at(r + 1, c + 1)]))
        four = self.norm("mm_projector", "layers.1", torch.stack(tokens), 1e-5)
        return self.line("mm_projector", "layers.4", F.gelu(self.line("mm_projector", "layers.2", four)))

    def logits(self, row: list[int], pictures: list[Tensor]) -> Tensor:
        """Of what comes after a row of words and pictures, (9,)."""
        given, pictures = [], list(pictures)
        for word in row:
            given.append(pictures.pop(0) if word == IMAGE else self.parts["llm"]["model.embed_tokens.weight"][[word]])
        x = torch.cat(given)
        for number in range(2):
            layer = f"model.layers.{number}"
            seen = self.rms(f"{layer}.input_layernorm", x)
            q, k, v = (self.line("llm", f"{layer}.self_attn.{part}_proj", seen) for part in "qkv")
            k = self.turned(k)
            heads = []
            for head in q.split(4, 1):
                similar = self.turned(head) @ k.T / 2
                heads.append(similar.masked_fill(torch.ones_like(similar).triu(1) > 0, -torch.inf).softmax(1) @ v)
            x = x + self.line("llm", f"{layer}.self_attn.o_proj", torch.cat(heads, 1))
            seen = self.rms(f"{layer}.post_attention_layernorm", x)
            inner = F.silu(self.line("llm", f"{layer}.mlp.gate_proj", seen)) * self.line(
                "llm", f"{layer}.mlp.up_proj", seen
            )
            x = x + self.line("llm", f"{layer}.mlp.down_proj", inner)
        return self.rms("model.norm", x[-1]) @ self.parts["llm"]["lm_head.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """(L, 4): pairs of numbers as complex ones, turned by an angle that grows with the place."""
        number = torch.complex(x[:, :2], x[:, 2:])
        angle = torch.arange(len(x))[:, None] * 10000.0 ** -torch.tensor([0.0, 0.5])
        number = number * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([number.real, number.imag], dim=1)


def write(folder: Path, parts: dict | None = None, dtype=torch.float32) -> Path:
    """A checkpoint in the published layout; the language model is in two files."""
    parts, configs = parts or published_state(), {"mm_projector": {"mm_projector_type": "mlp_downsample"}}
    configs |= {"vision_tower": EYES | {"model_type": "siglip_vision_model"}, "llm": MOUTH | {"model_type": "llama"}}
    for part, state in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]), encoding="utf-8")
        state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        if part != "llm":
            save_file(state, folder / part / "model.safetensors")
            continue
        files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: state[name] for name in files if files[name] == file}, folder / part / file)
        (folder / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "llm" / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("vila"))


@pytest.mark.component("architecture")
class TestArchitecture:
    @torch.no_grad()
    def test_pictures_and_words_are_those_of_an_implementation_of_its_own(self, folder):
        model, reference = load_vila(folder), Reference()
        images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(2))
        expected = [reference.picture(image) for image in images]
        pictures = model.pictures(images)
        torch.testing.assert_close(pictures, torch.stack(expected), atol=2e-4, rtol=1e-3)
        rows = [[0, 2, IMAGE, 5, 6, IMAGE, 8], [0, IMAGE, 7]]
        found = model.next_words(rows, pictures)
        wanted = [reference.logits(rows[0], expected[:2]), reference.logits(rows[1], expected[2:])]
        torch.testing.assert_close(found, torch.stack(wanted), atol=2e-4, rtol=1e-3)

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
        assert FourToOne()(torch.zeros(1, 27 * 27, 2)).shape == (1, 14 * 14, 8)

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
    def test_every_weight_finds_its_place(self, folder):
        model, mine = load_vila(folder), {}
        for state in published_state().values():
            mine |= {float(tensor.double().sum()): tensor.shape for tensor in state.values()}
        found = {float(tensor.double().sum()): tensor.shape for tensor in model.state_dict().values()}
        assert found == mine and not model.training
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

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
        assert [part.split("|>")[1].split("<|")[0] for part in parts] == [
            "system",
            "user",
            "assistant",
            "user",
            "assistant",
        ]


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

    def test_a_word_that_calls_brings_what_the_expert_found(self):
        script = {
            0: [CALLS["CXR"], "yes", STOP],
            1: ["no", STOP, STOP],
            2: [CALLS["LUNGS"], CALLS["LUNGS"], "large", STOP],
        }
        rows = []

        def next_words(lines):
            rows.append([list(row) for row in lines])
            words = [script[k][min(len(rows), len(script[k])) - 1] for k in range(3)]
            return F.one_hot(torch.tensor([w if w == STOP else WORDS.index(w) for w in words]), len(WORDS) + 1)

        heard = [{"CXR": "predictions tuberculosis yes", "LUNGS": "results <image> area 20 right 50"}] * 3
        replies = asked.talk(next_words, ["tell the age"] * 3, heard, cards=True)
        assert replies == [("CXR", "yes"), (None, "no"), ("LUNGS", f"{CALLS['LUNGS']} large")]
        assert len(rows) == asked.SAYS and all(row == asked.prompt("tell the age", True) for row in rows[0])
        added = rows[1][0][len(rows[0][0]) :]
        assert added == asked.spelt(f"{CALLS['CXR']} predictions tuberculosis yes tell the age")
        assert rows[1][2].count(IMAGE) == 2 and rows[1][0].count(IMAGE) == rows[1][1].count(IMAGE) == 1

    def test_rows_show_their_image_and_then_its_overlay(self):
        assert asked.shown([[IMAGE], [IMAGE, 3, IMAGE], [IMAGE]], [0, 0, 2], 3) == [0, 0, 3, 2]

    def test_without_cards_nobody_is_called(self):
        with_cards, alone = (asked.prompt("tell the sex", cards) for cards in (True, False))
        names = {WORDS.index(call) for call in CALLS.values()}
        assert names <= set(with_cards) and not names & set(alone)
        row, told = asked.conversation("tuberculosis", "tuberculosis or not", "no", None)
        assert [word for word, mine in zip(row, told, strict=True) if mine] == [WORDS.index("no"), STOP]


def said(row: list[int]) -> str:
    return " ".join("<image>" if word == IMAGE else "." if word == STOP else WORDS[word] for word in row)


@pytest.mark.component("expert feedback in the conversation")
class TestFeedback:
    FOUND = Findings(torch.tensor([0.9, 0.2]), torch.zeros(2, 1, 10, 10, dtype=torch.bool))

    def found(self) -> Findings:
        lungs = self.FOUND.lungs.clone()
        lungs[0, 0, 2:7, 1:4] = lungs[0, 0, 2:7, 7:9] = True
        return self.FOUND._replace(lungs=lungs)

    def test_it_is_text_with_numbers(self):
        one, other = self.found().texts()
        assert one == {"CXR": "predictions tuberculosis yes", "LUNGS": "results <image> area 25 right 60"}
        assert other == {"CXR": "predictions tuberculosis no", "LUNGS": "results <image> area 0 right 50"}

    def test_it_stands_between_call_and_answer(self):
        heard = self.found().texts()[0]
        row, told = asked.conversation("size", "tell the size of the lungs", "large", heard)
        before, after = said(row).split(f" {CALLS['LUNGS']} results ")
        assert before == f". {asked.CARDS} <image> tell the size of the lungs"
        assert after == "<image> area 25 right 60 tell the size of the lungs large ."
        mine = [WORDS[word] if word != STOP else "." for word, own in zip(row, told, strict=True) if own]
        assert mine == [CALLS["LUNGS"], "large", "."]

    def test_where_no_expert_knows_there_is_none(self):
        row, told = asked.conversation("sex", "tell the sex", "man", self.found().texts()[0])
        assert said(row) == f". {asked.CARDS} <image> tell the sex man ." and sum(told) == 2

    def test_the_right_lung_is_on_the_left_and_red(self):
        lungs, image = self.found().lungs, torch.randn(2, 1, 10, 10)
        right = asked.right_lung(lungs)
        assert right[0, 0, 2:7, 1:4].all() and int(right.sum()) == 15
        changed = overlay(image, lungs) - coloured(image)
        assert torch.allclose(changed[:, :1], right.float(), atol=1e-6) and (changed[:, 1] == 0).all()
        assert torch.allclose(changed[:, 2:], (lungs & ~right).float(), atol=1e-6)

    def test_all_that_may_be_said_has_a_word(self):
        for name, topic in TOPICS.items():
            for form in topic.forms:
                for answer in topic.answers:
                    asked.conversation(
                        name,
                        form,
                        answer,
                        {"CXR": "predictions tuberculosis no", "LUNGS": "results <image> area 100 right 0"},
                    )
        assert len(set(WORDS)) == len(WORDS)


TINY = Consulting(encoder="siglip", channels=(4, 8), language=Measure(sizes=(20.0, 30.0), larger=55.0))


def built(method: Consulting = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 2, 2)


def batch(count: int = 4, side: int = 48) -> Batch:
    """Lungs of 25 % of the image, the right one with 60 % of it; patients 0 and 2 ill, sex of the last not known."""
    images = torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(1))
    images[:, 1] = 0
    images[:, 1, 8:32, 4:19] = images[:, 1, 8:32, 28:37] = 1
    labels = (torch.arange(count) % 2 == 0).byte()[:, None, None].expand(-1, side, side)
    people = [(0, 0, 1), (0, 1, 0), (1, 1, 1), (1, UNKNOWN, 0)]
    return Batch(images, labels, groups=torch.tensor([asked.coded(*person) for person in people[:count]]))


class Certain(torch.nn.Module):
    """An expert that says the same of every image."""

    def __init__(self, outcome: float, row: int):
        super().__init__()
        self.outcome, self.row, self.asked = outcome, row, 0

    def reader(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return torch.tensor([1 - self.outcome, self.outcome]).log().expand(len(images), -1)

    def lungs(self, images: Tensor) -> Tensor:
        logits = torch.full((len(images), 2, *images.shape[2:]), -3.0)
        logits[:, 1, self.row] = 3.0
        logits[:, 0, self.row] = -4.0
        return logits


@pytest.mark.component("expert-guided instruction fine-tuning")
class TestTraining:
    def certain(self) -> Experts:
        experts = Experts("random", (4, 8))
        experts[0], experts[1] = Certain(0.9, 2), Certain(0.3, 5)
        return experts

    def test_a_training_image_is_shown_to_who_does_not_know_it(self):
        """The defining property: number k has learnt from half k."""
        experts = self.certain()
        found = experts.consult(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
        assert found.outcome.tolist() == pytest.approx([0.3, 0.9, 0.9, 0.3], abs=1e-6)
        assert found.lungs[:, 0, :, 0].nonzero().tolist() == [[0, 5], [1, 2], [2, 2], [3, 5]]
        assert experts[0].asked == experts[1].asked == 2

    def test_anybody_else_to_both(self):
        found = self.certain().consult(torch.zeros(1, 1, 8, 8))
        assert found.outcome.item() == pytest.approx(0.6)
        assert found.lungs[0, 0, :, 0].nonzero().flatten().tolist() == [2, 5]  # 7 against -5: the surer one wins

    def test_experts_learn_from_their_half_alone(self):
        for half in (0, 1):
            nets, given = built(), batch(2)
            TINY.pretext(nets, given._replace(groups=given.groups % 2 * 0 + half), Moment(0, 9)).backward()
            learnt = [all(p.grad is not None for p in expert.parameters()) for expert in nets["pretext"]]
            assert learnt == [half == 0, half == 1]

    def test_every_part_learns_in_its_phase_in_either_precision(self):
        for step, part in ((0, "pretext"), (8, "model")):
            for mixed in (False, True):
                nets = built()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = TINY.training_step(nets, batch(), None, Moment(step, 9))
                loss.backward()
                assert loss.dtype == torch.float32 and torch.isfinite(loss)
                for name in ("pretext", "model"):
                    still = [
                        key for key, p in nets[name].named_parameters() if p.grad is None or not p.grad.abs().max() > 0
                    ]
                    unheard = [
                        key
                        for key in still
                        if any(
                            key.startswith(f"vision_tower.net.{x}")
                            for x in ("head", "post_layernorm", "encoder.layers.2")
                        )
                        or key.endswith("k_proj.bias")
                    ]
                    assert still == unheard if name == part else len(still) == len(list(nets[name].parameters())), still

    def test_truths_are_the_outcome_the_lungs_in_the_image_and_the_person(self):
        halves, truths = TINY.facts(batch())
        assert halves.tolist() == [0, 0, 1, 1]
        assert truths.tolist() == [[1, 1, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, UNKNOWN, 0]]

    @pytest.mark.parametrize("area, right, wanted", [(19, 54, [0, 0]), (25, 56, [1, 1]), (31, 40, [2, 0])])
    def test_sizes_have_two_limits(self, area, right, wanted):
        assert TINY.language.numbers(torch.tensor([[area, right]], dtype=torch.float32)).tolist() == [wanted]

    def conversations(self, monkeypatch, method: Consulting) -> list[str]:
        kept = []

        def loss(self, lines, told, pictures):
            assert len(pictures) == sum(row.count(IMAGE) for row in lines)
            kept.extend(said(row) for row in lines)
            return pictures.sum() * 0

        monkeypatch.setattr(Vila, "loss", loss)
        nets = built(method)
        nets["pretext"][0], nets["pretext"][1] = Certain(0.9, 2), Certain(0.3, 5)
        method.training_step(nets, batch(), None, Moment(8, 9))
        return kept

    def test_all_questions_with_known_answers_are_asked(self, monkeypatch):
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.0))
        assert len(rows) == 19 and all(asked.CARDS in row for row in rows)
        answers = [
            [row.split()[-2] for row in rows if any(form in row for form in topic.forms)] for topic in TOPICS.values()
        ]
        assert answers == [
            ["yes", "no", "yes", "no"],
            ["middle"] * 4,
            ["yes"] * 4,
            ["woman", "man", "man"],
            ["older", "young", "older", "young"],
        ]
        heard = [
            "yes" if "predictions tuberculosis yes" in row else "no"
            for row in rows
            if CALLS["CXR"] + " predictions" in row
        ]
        assert heard == ["no", "no", "yes", "yes"], "of those who do not know the image"

    def test_the_ablation_hears_of_another_patient(self, monkeypatch):
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.0, shuffled=True))
        heard = [
            "yes" if "predictions tuberculosis yes" in row else "no"
            for row in rows
            if CALLS["CXR"] + " predictions" in row
        ]
        assert heard == ["yes", "no", "no", "yes"], "of the patient before in the batch"

    def test_without_experts_and_without_cards_nobody_is_heard(self, monkeypatch):
        for method in (replace(TINY, experts=False), replace(TINY, withheld=1.0)):
            rows = self.conversations(monkeypatch, method)
            assert len(rows) == 19 and not any("<CXR()>" in row or "<LUNGS()>" in row for row in rows)

    def test_some_questions_come_without_cards(self, monkeypatch):
        torch.manual_seed(0)
        rows = self.conversations(monkeypatch, replace(TINY, withheld=0.5))
        assert 4 < sum(asked.CARDS in row for row in rows) < 15

    def test_arms_differ_in_one_thing_each(self):
        method, none, alone, shuffled = (recipe.arms[name].method for name in recipe.arms)
        assert (
            replace(none, experts=True)
            == replace(alone, speaker="model")
            == replace(shuffled, shuffled=False)
            == method
        )
        assert recipe.compare == ("expert feedback", "no experts") and recipe.ablation[1] == "shuffled feedback"
        assert not any(arm.changes for arm in recipe.arms.values())


@pytest.fixture(scope="module")
def fitted():
    budget = Budget(steps=4, batch=4, precision="float32", checks=0)
    return Loop(TINY, BRAINS, budget, "float32", 0, BRAINS.samples("labelled"), None, None, False, "cpu").run()


class TestTask:
    def test_groups_say_half_sex_and_age(self):
        samples, people = BRAINS.samples("labelled"), BRAINS.labelled_patients
        halves, person = asked.decoded(samples.groups)
        for number, patient in enumerate(people):
            known = BRAINS.data.attributes(BRAINS.data.patients[patient][0])
            mine = samples.case_of == number
            assert set(halves[mine].tolist()) == {number % 2}, "all images of a patient are in one half"
            wanted = [{"F": 0, "M": 1}[known["sex"]], int(known["age"] >= 47)]
            assert person[mine].unique(dim=0).tolist() == [wanted]

    def test_what_is_not_known_is_said(self):
        assert BRAINS.person({}) == (UNKNOWN, UNKNOWN) and BRAINS.person({"sex": "M", "age": 47}) == (1, 1)
        for facts in [(0, -1, -1), (1, 0, 1), (0, 1, 0), (1, -1, 1)]:
            half, person = asked.decoded(torch.tensor([asked.coded(*facts)]))
            assert (half.item(), *person[0].tolist()) == facts


class TestRows:
    def truths(self, case) -> dict[str, list[str]]:
        drawn = BRAINS.preparation.images(case)[:, 1] > 0.5
        found = {"tuberculosis": ["yes" if case.attributes["group"] == "atrophy" else "no"] * len(drawn)}
        area = drawn.flatten(1).float().mean(1) * 100
        found["size"] = ["small" if a <= 20 else "middle" if a <= 30 else "large" for a in area]
        found["sex"] = [{"F": "woman", "M": "man"}[case.attributes["sex"]]] * len(drawn)
        found["age"] = ["older" if case.attributes["age"] >= 47 else "young"] * len(drawn)
        return found

    @torch.no_grad()
    def test_answers_are_compared_with_the_truth(self, fitted, monkeypatch):
        case = next(iter(BRAINS.cases("val")))
        truths, script = self.truths(case), {}
        for name, right in truths.items():  # half of the answers are wrong
            script[name] = [answer if k % 2 else "nonsense" for k, answer in enumerate(right)]

        def replies(self, nets, images, found, cards=True):
            of = lambda name, k: script.get(name, [""] * 99)[k] if cards else ""  # noqa: E731
            return [[asked.Reply("CXR", of(name, k)) for name in TOPICS] for k in range(len(images))]

        monkeypatch.setattr(Consulting, "replies", replies)
        rows = {row["structure"]: row for row in asked_rows(fitted, case)}
        assert list(rows) == list(TOPICS)
        for name in script:
            assert rows[name]["correct"] == pytest.approx(0.5) and rows[name]["alone"] == 0
        assert [rows[name]["called"] for name in TOPICS] == [1, 0, 0, 0, 0]

    @pytest.mark.parametrize("experts, called", [(True, [0, 0, 0, 1, 1]), (False, [1] * 5)])
    def test_where_there_is_no_expert_nobody_is_to_be_called(self, fitted, monkeypatch, experts, called):
        silent = lambda self, nets, images, found, cards=True: [[asked.Reply(None, "")] * 5 for _ in images]  # noqa: E731
        monkeypatch.setattr(Consulting, "replies", silent)
        run = replace(fitted, method=replace(TINY, experts=experts))
        assert [row["called"] for row in asked_rows(run, next(iter(BRAINS.cases("val"))))] == called

    @torch.no_grad()
    def test_experts_alone_answer_what_they_know_and_else_the_commonest(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        experts = replace(TINY, speaker="experts")
        rows = {row["structure"]: row for row in asked_rows(replace(fitted, method=experts), case)}
        nets, truths = fitted.nets.eval(), self.truths(case)
        found = nets["pretext"].consult(BRAINS.preparation.images(case)[:, :1])
        outcome = ["yes" if p > 0.5 else "no" for p in found.outcome.tolist()]
        share = np.mean([a == b for a, b in zip(outcome, truths["tuberculosis"], strict=True)])
        assert rows["tuberculosis"]["correct"] == rows["tuberculosis"]["expert"] == pytest.approx(share)
        people = [BRAINS.data.attributes(BRAINS.data.patients[p][0]) for p in BRAINS.labelled_patients]
        older = sum(known["age"] >= 47 for known in people) > len(people) / 2
        assert rows["age"]["correct"] == float(older == (case.attributes["age"] >= 47))

    @torch.no_grad()
    def test_shuffled_findings_are_those_of_a_training_image(self, fitted, monkeypatch):
        case, seen = next(iter(BRAINS.cases("val"))), []
        consult = Experts.consult
        monkeypatch.setattr(
            Experts, "consult", lambda self, images, halves=None: seen.append(images) or consult(self, images)
        )
        asked_rows(replace(fitted, method=replace(TINY, shuffled=True)), case)
        known = BRAINS.samples("labelled").images[:, :1]
        assert seen[0].shape == BRAINS.preparation.images(case)[:, :1].shape
        assert any(torch.equal(seen[0][0], other) for other in known)

    def test_what_is_not_known_has_no_row(self, fitted):
        case = next(iter(BRAINS.cases("val")))
        case.attributes["sex"] = case.attributes["group"] = None
        assert [row["structure"] for row in asked_rows(fitted, case)] == ["size", "sides", "age"]

    @torch.no_grad()
    def test_predictions_are_answers(self, fitted, monkeypatch):
        answers = iter(["yes", "no", "nonsense"])
        monkeypatch.setattr(
            Consulting,
            "replies",
            lambda self, nets, images, found: [[asked.Reply(None, next(answers))] for _ in images],
        )
        found = TINY.predict(fitted.nets.eval(), batch(3).images)
        assert found.shape == (3, 2, 48, 48) and found[:, 1, 0, 0].tolist() == [1, 0, 0.5]

    @pytest.mark.parametrize("experts, cards, shown", [(True, True, True), (True, False, False), (False, True, False)])
    def test_cards_are_shown_where_there_are_experts(self, fitted, monkeypatch, experts, cards, shown):
        seen = []

        def talk(next_words, questions, heard, cards):
            seen.extend([cards, questions, len(heard)])
            return [asked.Reply(None, "")] * len(questions)

        monkeypatch.setattr(asked, "talk", talk)
        images = batch(2).images[:, :1]
        method, nets = replace(TINY, experts=experts), fitted.nets.eval()
        assert len(method.replies(nets, images, nets["pretext"].consult(images), cards)) == 2
        assert seen == [shown, 2 * [topic.forms[0] for topic in TOPICS.values()], 10]

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="not volumes"):
            TINY.build(1, 2, 3)


def test_quick_takes_the_published_kind_of_eyes():
    for name in recipe.arms:
        assert recipe.method("quick", name).encoder == "siglip" and recipe.method("full", name).encoder == "imagenet"
    assert (
        isinstance(built()["model"].vision_tower, Siglip)
        and vila_m3.LLAMA["rms_norm_eps"] == LLAMAS["3B"]["rms_norm_eps"]
    )
