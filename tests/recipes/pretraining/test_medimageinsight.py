"""MedImageInsight: its towers against an implementation of their own, its checkpoint, and an embedding put to use."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.unicl import PUBLISHED, TOKENIZER, MedImageInsight, UniCL, load_unicl
from medcook.recipes.fairness.cxr_clip_fairness import captions
from medcook.recipes.pretraining import medimageinsight
from medcook.recipes.pretraining._searching import (
    at_operating_point,
    fairness,
    gallery_of,
    insight_rows,
    left_out,
    operating_point,
    search,
    unit,
    voted,
)
from medcook.recipes.pretraining.medimageinsight import BRAINS, DomainsTask, Insight, recipe, sentences
from medcook.tasks import Budget
from medcook.training import fit

LITTLE = medimageinsight.DAVIT
VOCABULARY = ("!", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>")
HEADS, GROUPS, WINDOW = [1, 2], [2, 4], 3


def tiny_config() -> dict:
    config = deepcopy(PUBLISHED)
    two = {name: values[:2] for name, values in config["IMAGE_ENCODER"]["SPEC"].items() if name != "WINDOW_SIZE"}
    two |= {"DIM_EMBED": [8, 16], "DEPTHS": [1, 2], "NUM_HEADS": HEADS, "NUM_GROUPS": GROUPS, "WINDOW_SIZE": WINDOW}
    config["IMAGE_ENCODER"] |= {"IMAGE_SIZE": [40, 40], "SPEC": two, "NUM_CLASSES": 0}
    config["LANG_ENCODER"] = {"CONTEXT_LENGTH": 7, "WIDTH": 12, "HEADS": 3, "LAYERS": 2, "AUTOGRESSIVE": False}
    config["UNICL_MODEL"] = {"DIM_PROJECTION": 6}
    return config


def published_state() -> dict[str, Tensor]:
    """Random weights under the published names."""
    shapes = {"lang_encoder.token_embedding.weight": (6, 12), "lang_encoder.positional_embedding": (7, 12)}
    for number in range(2):
        block = f"lang_encoder.resblocks.{number}"
        shapes |= {f"{block}.attn.in_proj_weight": (36, 12), f"{block}.attn.in_proj_bias": (36,)}
        shapes |= line(f"{block}.attn.out_proj", 12, 12) | line(f"{block}.mlp.c_fc", 12, 48)
        shapes |= line(f"{block}.mlp.c_proj", 48, 12) | norm(f"{block}.ln_1", 12) | norm(f"{block}.ln_2", 12)
    shapes |= norm("lang_encoder.ln_final", 12) | norm("image_encoder.norms", 16)
    shapes |= {"image_projection": (16, 6), "lang_projection": (12, 6), "logit_scale": ()}
    for stage, (inputs, width, kernel, depth) in enumerate([(3, 8, 7, 1), (8, 16, 3, 2)]):
        conv = f"image_encoder.convs.{stage}"
        shapes |= {f"{conv}.proj.weight": (width, inputs, kernel, kernel), f"{conv}.proj.bias": (width,)}
        shapes |= norm(f"{conv}.norm", inputs if stage else width)
        for number in range(depth):
            for kind, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                block = f"image_encoder.blocks.{stage}.{number}.{kind}"
                for conv in ("conv1", "conv2"):
                    shapes |= {f"{block}.{conv}.fn.dw.weight": (width, 1, 3, 3), f"{block}.{conv}.fn.dw.bias": (width,)}
                shapes |= norm(f"{block}.{attention}.norm", width) | norm(f"{block}.ffn.norm", width)
                shapes |= line(f"{block}.{attention}.fn.qkv", width, 3 * width)
                shapes |= line(f"{block}.{attention}.fn.proj", width, width)
                shapes |= line(f"{block}.ffn.fn.net.fc1", width, 4 * width)
                shapes |= line(f"{block}.ffn.fn.net.fc2", 4 * width, width)
    rng = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def line(name: str, inputs: int, outputs: int) -> dict:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


class Reference:
    """The published model's forward pass from its own names, token by token and window by window."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return self.state[f"{name}.weight"] * scaled + self.state[f"{name}.bias"]

    def image(self, image: Tensor) -> Tensor:
        """(3, H, W) to a unit vector."""
        x = image.movedim(0, -1)
        for stage, depth in enumerate((1, 2)):
            name, stride, padding = f"image_encoder.convs.{stage}", (4, 2)[stage], (3, 1)[stage]
            weight, bias = self.state[f"{name}.proj.weight"], self.state[f"{name}.proj.bias"]
            x = self.norm(f"{name}.norm", x) if stage else x
            x = F.conv2d(x.movedim(-1, 0)[None], weight, bias, stride, padding)[0].movedim(0, -1)
            x = x if stage else self.norm(f"{name}.norm", x)
            for number in range(depth):
                for kind, attend in (("spatial_block", self.windows), ("channel_block", self.channels)):
                    x = self.block(f"image_encoder.blocks.{stage}.{number}.{kind}", x, attend, stage)
        vector = self.norm("image_encoder.norms", x.flatten(0, 1).mean(0)) @ self.state["image_projection"]
        return vector / vector.norm()

    def block(self, name: str, x: Tensor, attend, stage: int) -> Tensor:
        """(H, W, C) to the same."""
        kind = "window_attn" if "spatial" in name else "channel_attn"
        x = x + self.depthwise(f"{name}.conv1.fn.dw", x)
        x = x + attend(f"{name}.{kind}.fn", self.norm(f"{name}.{kind}.norm", x), stage)
        x = x + self.depthwise(f"{name}.conv2.fn.dw", x)
        inner = F.gelu(self.line(f"{name}.ffn.fn.net.fc1", self.norm(f"{name}.ffn.norm", x)))
        return x + self.line(f"{name}.ffn.fn.net.fc2", inner)

    def depthwise(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x.movedim(-1, 0)[None], weight, bias, padding=1, groups=len(bias))[0].movedim(0, -1)

    def windows(self, name: str, x: Tensor, stage: int) -> Tensor:
        """Tokens attend to those of their window; the image is filled up with zeros."""
        height, width = x.shape[:2]
        filled = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        found = torch.zeros_like(filled)
        for top in range(0, filled.shape[0], WINDOW):
            for left in range(0, filled.shape[1], WINDOW):
                place = (slice(top, top + WINDOW), slice(left, left + WINDOW))
                q, k, v = self.line(f"{name}.qkv", filled[place].flatten(0, 1)).chunk(3, dim=1)
                heads = [
                    self.attend(*parts) for parts in zip(*(t.chunk(HEADS[stage], 1) for t in (q, k, v)), strict=True)
                ]
                found[place] = self.line(f"{name}.proj", torch.cat(heads, 1)).view(WINDOW, WINDOW, -1)
        return found[:height, :width]

    def channels(self, name: str, x: Tensor, stage: int) -> Tensor:
        """Channels attend to those of their group, as vectors over all tokens."""
        q, k, v = self.line(f"{name}.qkv", x.flatten(0, 1)).chunk(3, dim=1)
        groups = [
            self.attend(*(t.T for t in parts)).T
            for parts in zip(*(t.chunk(GROUPS[stage], 1) for t in (q, k, v)), strict=True)
        ]
        return self.line(f"{name}.proj", torch.cat(groups, 1)).view_as(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v

    def text(self, tokens: list[int]) -> Tensor:
        """A sentence without what fills it up, to a unit vector; the last token speaks for all."""
        x = self.state["lang_encoder.token_embedding.weight"][tokens]
        x = x + self.state["lang_encoder.positional_embedding"][: len(tokens)]
        for number in range(2):
            name = f"lang_encoder.resblocks.{number}"
            seen = self.norm(f"{name}.ln_1", x, 1e-12)
            qkv = seen @ self.state[f"{name}.attn.in_proj_weight"].T + self.state[f"{name}.attn.in_proj_bias"]
            heads = [self.attend(*parts) for parts in zip(*(t.chunk(3, 1) for t in qkv.chunk(3, 1)), strict=True)]
            x = x + self.line(f"{name}.attn.out_proj", torch.cat(heads, 1))
            inner = self.line(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, 1e-12))
            x = x + self.line(f"{name}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
        vector = self.norm("lang_encoder.ln_final", x, 1e-12)[-1] @ self.state["lang_projection"]
        return vector / vector.norm()


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint in the published layout: the weights are safetensors, though the file is called `.pt`."""
    (folder / "vision_model").mkdir(parents=True)
    (folder / TOKENIZER).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
    save_file(state, folder / "vision_model" / "medimageinsigt-v1.0.0.pt")
    words = ", ".join(f'"{word}": {number}' for number, word in enumerate(VOCABULARY))
    (folder / TOKENIZER / "vocab.json").write_text(f"{{{words}}}", encoding="utf-8")
    (folder / TOKENIZER / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = ", ".join(f'"{name}_token": "<|endoftext|>"' for name in ("unk", "pad", "eos"))
    marks = f'{{{end}, "bos_token": "<|startoftext|>", "do_lower_case": true}}'
    (folder / TOKENIZER / "tokenizer_config.json").write_text(marks, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("insight"), published_state())


@pytest.mark.component("architecture")
class TestArchitecture:
    @pytest.mark.parametrize("size", [(40, 40), (37, 50)])
    def test_the_image_tower_is_that_of_an_implementation_of_its_own(self, folder, size):
        images, reference = torch.randn(2, 3, *size), Reference(published_state())
        with torch.no_grad():
            found = load_unicl(folder).images(images)
        torch.testing.assert_close(
            found, torch.stack([reference.image(image) for image in images]), atol=2e-4, rtol=1e-3
        )

    def test_the_text_tower_reads_both_ways_and_the_last_token_speaks(self, folder):
        reference, asked = Reference(published_state()), [[4, 1, 5], [4, 2, 3, 1, 5]]
        tokens = torch.tensor([row + [5] * (7 - len(row)) for row in asked])  # filled up with the end, as published
        mask = torch.tensor([[1] * len(row) + [0] * (7 - len(row)) for row in asked])
        with torch.no_grad():
            found = load_unicl(folder).texts(tokens, mask)
        torch.testing.assert_close(found, torch.stack([reference.text(row) for row in asked]), atol=2e-4, rtol=1e-3)

    def test_the_published_one_has_the_published_number_of_weights(self):
        with torch.device("meta"):
            model = UniCL(PUBLISHED)
        count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
        assert round(count(model.davit, model.norm) / 1e9, 2) == 0.36
        assert round(count(model.language) / 1e9, 2) == 0.25

    def test_the_small_one_trains_every_weight_in_either_precision(self):
        nets, data = built(LITTLE), batch()
        for mixed in (False, True):
            nets.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = LITTLE.training_step(nets, data, others(), Moment(0, 10))
            loss.backward()
            model = nets["model"]
            assert torch.isfinite(loss) and not any(p.requires_grad for p in nets["average"].parameters())
            unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert unused == []


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, folder):
        state, model = published_state(), load_unicl(folder)
        sizes = lambda tensors: sorted(tuple(tensor.shape) for tensor in tensors)  # noqa: E731
        assert sizes(state.values()) == sizes(model.state_dict().values()) and not model.training
        mine = {float(tensor.sum()) for tensor in model.state_dict().values()}
        assert mine == {float(tensor.sum()) for tensor in state.values()}

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


def built(method) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, BRAINS.classes, 2).train()


def batch(numbers: tuple[int, ...] = (6, 7, 6, 11), size: int = 40) -> Batch:
    labels = torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1).expand(-1, size, size).contiguous()
    rng = torch.Generator().manual_seed(1)
    return Batch(torch.randn(len(numbers), 1, size, size, generator=rng), labels)


def others(size: int = 40) -> Batch:
    data = batch((24, 24, 24, 24), size)
    return data._replace(labels=torch.full_like(data.labels, IGNORE), raters=data.labels[:, None])


@pytest.mark.component("contrast of images, texts and labels (UniCL)")
class TestContrast:
    def loss(self, v: Tensor, t: Tensor, scale: Tensor, captions: list[int]) -> float:
        """The definition, image by image and sentence by sentence."""
        total = 0.0
        for one, other in ((v, t), (t, v)):
            for i, caption in enumerate(captions):
                chances = (scale * other @ one[i]).log_softmax(0)
                same = [k for k in range(len(captions)) if captions[k] == caption]
                total -= sum(chances[k] for k in same) / len(same)
        return float(total) / (2 * len(captions))

    @torch.no_grad()
    def test_a_steps_loss_is_the_definition(self):
        nets, data, extra, numbers = built(LITTLE), batch(), others(), [6, 7, 6, 11, 24]
        found = LITTLE.training_step(nets, data, extra, Moment(0, 10)).item()
        model, images = nets["model"], torch.cat([data.images, extra.images[:1]])
        v, t = model.images(images), model.texts(tuple(model.sentences[number] for number in numbers))
        assert found == pytest.approx(self.loss(v, t, model.scale, numbers), rel=1e-4)

    def test_images_that_are_captioned_alike_share_their_sentences(self):
        v, t = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
        numbers, scale = torch.tensor([1, 2, 1, 3, 2, 1]), torch.tensor(5.0)
        found = medimageinsight.contrast(v, t, numbers, scale).item()
        assert found == pytest.approx(self.loss(v, t, scale, numbers.tolist()), rel=1e-4)
        assert found != pytest.approx(self.loss(v, t, scale, list(range(6))), rel=1e-3)


@pytest.mark.component("many domains")
class TestDomains:
    def test_nobody_of_the_new_hospital_is_learned_from(self):
        data = BRAINS.data
        site = lambda patients: {data.attributes(data.patients[p][0])["site"] for p in patients}  # noqa: E731
        assert site(BRAINS.labelled_patients) == {"south", "island"}
        assert site(BRAINS.reference_patients) == site(BRAINS.val_patients) == {"north"}
        parts = [set(part) for part in (BRAINS.labelled_patients, BRAINS.reference_patients, BRAINS.val_patients)]
        assert len(set.union(*parts)) == sum(map(len, parts)) and not set.union(*parts) & set(data.split.test)
        committed = replace(BRAINS, fold=None)
        assert set(committed.val_patients) <= set(data.split.val) and not set(committed.labelled_patients) & set(
            data.split.val
        )

    def test_a_training_is_handed_the_images_of_other_domains(self):
        seen = []

        class Noting(Insight):
            def training_step(self, nets, labelled, unlabelled, now):
                seen.append(unlabelled)
                return super().training_step(nets, labelled, unlabelled, now)

        method = Noting(captions=BRAINS.sentences, encoder="davit")
        fit(method, BRAINS, Budget(steps=1, batch=4, checks=0), cache=False, progress=False)
        assert seen[0].raters is not None and len(seen[0].images) == 4
        assert not replace(BRAINS, domains=()).unlabelled_patients

    def test_a_hospital_that_is_not_there_is_an_error(self):
        with pytest.raises(MedcookError, match="nobody is of"):
            _ = replace(BRAINS, new=("site", "moon")).val_patients

    def test_labels_are_the_captions_numbers(self):
        samples, data = BRAINS.samples("labelled"), BRAINS.data
        cases = [case for patient in BRAINS.labelled_patients for case in data.patients[patient]]
        known = sentences("embedded", BRAINS.domains)
        assert (samples.labels == samples.labels[:, :1, :1]).all()
        for number, case in enumerate(cases):
            facts, (label,) = data.attributes(case), set(samples.labels[samples.case_of == number, 0, 0].tolist())
            finding, sex = (
                {"atrophy": "diseased", "control": "clear"}[facts["group"]],
                {"F": "woman", "M": "man"}[facts["sex"]],
            )
            assert known[label].startswith(f"brain mri {finding} {sex} ")
            assert label % 2 == (facts["group"] == "atrophy")

    def test_other_domains_come_with_their_own_captions_as_raters(self, monkeypatch):
        groups = {"embedded, negative": ("negative mri", {"atrophy": "thin", "control": "clear"})}
        monkeypatch.setattr(medimageinsight, "OTHERS", groups)
        samples, data, known = BRAINS.samples("unlabelled"), BRAINS.data, sentences("embedded", BRAINS.domains)
        assert (
            known[24:] == ("negative mri", "negative mri thin", "negative mri clear")
            and (samples.labels == IGNORE).all()
        )
        facts = [data.attributes(case)["group"] for p in data.split.train for case in data.patients[p]]
        said = [known[number] for number in samples.raters[:, 0, 0, 0].tolist()]
        assert said == [
            f"negative mri {groups['embedded, negative'][1][facts[k]]}" for k in range(len(facts)) for _ in range(8)
        ]
        assert torch.equal(samples.raters, samples.raters[:, :, :1, :1].expand_as(samples.raters))

    def test_every_caption_of_the_real_domains_has_a_number(self):
        known = sentences("chest_xray", medimageinsight.DOMAINS)
        assert len(known) == len(set(known)) == 24 + 8 and "heart mri infarcted" in known
        assert known[1].split()[-1] == "diseased" and len(captions(("sex", "age"))) == 24

    def test_the_ablation_is_the_same_without_them(self):
        method, ablation = (recipe.arms[name] for name in recipe.ablation)
        assert replace(ablation.method, others=method.method.others) == method.method and not ablation.changes

    def test_an_arms_captions_are_those_of_its_task(self):
        for profile, scale in recipe.scales.items():
            for arm in recipe.arms_at(profile):
                method, task = recipe.run(profile, arm, 0)[:2]
                assert method.captions == task.sentences and len(task.sentences) == task.classes
                assert (
                    len(captions(task.said)) == (2 if "findings" in arm else 24) and scale.task.domains == task.domains
                )

    @pytest.mark.parametrize("share, seen", [(0.0, 4), (0.25, 5), (1.0, 8)])
    def test_a_batch_has_so_many_of_them(self, monkeypatch, share, seen):
        asked, contrast = [], medimageinsight.contrast
        monkeypatch.setattr(medimageinsight, "contrast", lambda v, *rest: asked.append(len(v)) or contrast(v, *rest))
        method = replace(LITTLE, others=share)
        method.training_step(built(method), batch(), others(), Moment(0, 10))
        assert asked == [seen]


@pytest.fixture(scope="module")
def fitted() -> SimpleNamespace:
    """The small embedding as it starts, with a task: its gallery is real."""
    nets = built(LITTLE).eval()
    return SimpleNamespace(method=LITTLE, task=replace(BRAINS, most=40), nets=nets, weights={"last": nets.state_dict()})


@pytest.mark.component("classification without fine-tuning")
class TestNearest:
    def test_a_vote_is_that_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        known, asked, findings = rng.normal(size=(60, 5)), rng.normal(size=(20, 5)), (rng.random(60) < 0.4) * 1.0
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        expected = KNeighborsClassifier(7, metric="cosine").fit(known, findings).predict_proba(asked)[:, 1]
        np.testing.assert_allclose(voted(unit(asked) @ unit(known).T, findings, 7), expected)

    def test_fifteen_vote_where_there_are_enough(self):
        findings = (np.arange(100) < 15) * 1.0
        assert voted(-np.arange(100.0)[None], findings)[0] == 1 and voted(-np.arange(100.0)[None], findings, 16)[0] < 1
        assert voted(-np.arange(8.0)[None], findings[11:19])[0] == 1 and voted(np.zeros((1, 3)), findings[:3])[0] == 1

    def test_a_patients_score_is_the_vote_of_the_new_hospitals_training_patients(self, fitted):
        case, task = next(iter(fitted.task.cases("val"))), fitted.task
        known = list(task.cases("reference"))
        assert {case.patient_id for case in known} == set(task.reference_patients)
        similarity = np.array([unit(fitted, one) @ unit(fitted, case) for one in known])
        ill = np.array([one.attributes["group"] == "atrophy" for one in known], dtype=float)
        (row,) = insight_rows(fitted, case)
        assert row["score"] == pytest.approx(ill[np.argsort(-similarity)[: len(ill) // 4]].mean())
        assert row["outcome"] == float(case.attributes["group"] == "atrophy") and 0 < row["zero_shot"] < 1

    def test_the_baseline_is_what_the_encoder_was_before(self):
        method = replace(LITTLE, tuned=False)
        nets, data = built(method), batch()
        method.training_step(nets, data, None, Moment(0, 10)).backward()
        assert all(p.grad is None for p in nets["model"].image.parameters())
        features = nets["average"].image(data.images)
        torch.testing.assert_close(method.embed(nets, data.images), features / features.norm(dim=1, keepdim=True))
        learnt, baseline = (recipe.arms[name].method for name in recipe.compare)
        assert replace(baseline, tuned=True) == learnt

    def test_volumes_are_refused(self):
        with pytest.raises(MedcookError, match="not volumes"):
            LITTLE.build(1, 2, 3)


@pytest.mark.component("image-image search with evidence")
class TestSearch:
    def test_what_is_nearest_comes_first_of_all_domains(self, fitted):
        case, gallery = next(iter(fitted.task.cases("val"))), gallery_of(fitted)
        count = len(fitted.task.reference_patients)
        assert gallery.names[:count] == fitted.task.reference_patients
        assert set(gallery.names[count:]) == {"embedded, negative"} and len(gallery.names) == count + 40
        assert np.isnan(gallery.findings[count:]).all() and not np.isnan(gallery.findings[:count]).any()
        np.testing.assert_allclose(np.linalg.norm(gallery.vectors, axis=1), 1, atol=1e-4)
        table = search(fitted, case, 9)
        similarity = gallery.vectors @ unit(fitted, case)
        np.testing.assert_allclose(table["similarity"], np.sort(similarity)[::-1][:9])
        assert table["name"].tolist() == [gallery.names[k] for k in np.argsort(-similarity, kind="stable")[:9]]

    def test_a_known_image_finds_itself(self, fitted):
        case = next(iter(fitted.task.cases("reference")))
        first = search(fitted, case, 1).iloc[0]
        assert first["name"] == case.patient_id and first["similarity"] == pytest.approx(1, abs=1e-4)

    def test_precision_counts_the_same_finding_and_kind(self, fitted):
        for case in list(fitted.task.cases("val"))[:2]:
            (row,), table = insight_rows(fitted, case), search(fitted, case)
            assert row["precision"] == pytest.approx(np.mean([found == row["outcome"] for found in table["finding"]]))
            assert row["same_kind"] == pytest.approx(np.mean([name != "embedded, negative" for name in table["name"]]))


@pytest.mark.component("sensitivity and specificity by need")
class TestOperatingPoint:
    @pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 1.0])
    def test_it_is_the_highest_threshold_of_the_roc_curve_that_is_sensitive_enough(self, wanted):
        rng = np.random.default_rng(3)
        findings = (rng.random(80) < 0.5) * 1.0
        scores = np.round(rng.random(80) + 0.3 * findings, 1)
        _, sensitivity, thresholds = roc_curve(findings, scores, drop_intermediate=False)
        assert operating_point(scores, findings, wanted) == thresholds[np.flatnonzero(sensitivity >= wanted)[0]]

    def test_known_images_are_scored_by_the_others(self):
        vectors, findings = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3 == 0
        for one in (0, 7, 29):
            rest = np.arange(30) != one
            expected = voted((vectors[rest] @ vectors[one])[None], findings[rest], 30 // 4)[0]
            assert left_out(vectors, findings)[one] == pytest.approx(expected)

    def test_its_sensitivity_and_specificity_are_those_of_new_patients(self):
        outcome, called = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
        frame = pd.DataFrame({"patient_id": list("abcdefghij"), "outcome": outcome, "called": called}, dtype=object)
        found = at_operating_point(frame.astype({"outcome": float, "called": float}))
        assert found["sensitivity"].mean == 0.75 and found["specificity"].mean == pytest.approx(4 / 6)


@pytest.mark.component("fairness across age and sex")
def test_every_group_of_age_and_sex_has_its_own_auc():
    rng = np.random.default_rng(0)
    words = [
        f"Montgomery {age} {sex}"
        for age, sex in zip(rng.choice(["young", "older"], 90), rng.choice(["woman", "man"], 90), strict=True)
    ]
    outcome = rng.integers(0, 2, 90)
    frame = pd.DataFrame(
        {"patient_id": [f"p{k}" for k in range(90)], "case_id": [f"p{k}" for k in range(90)], "group": words}
    )
    frame = frame.assign(structure="tuberculosis", outcome=outcome * 1.0, score=outcome + rng.normal(size=90))
    table = fairness(frame).set_index("subgroup")
    for name in ("woman", "man", "young", "older"):
        part = frame[[name in said.split() for said in words]]
        assert (
            table.auc[name] == pytest.approx(roc_auc_score(part.outcome, part.score))
            and table.low[name] < table.auc[name]
        )


def test_the_task_at_full_scores_every_patient_of_the_hospital_once():
    task = recipe.scales["full"].task
    assert isinstance(task, DomainsTask) and task.folds == recipe.scales["full"].replicates == 3
