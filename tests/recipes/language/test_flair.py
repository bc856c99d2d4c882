"""FLAIR: its encoders against an implementation of their own, its checkpoint, and categories in an expert's words."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks import flair as published
from medcook.networks.flair import Retina, load_flair, on_canvas
from medcook.recipes.language import flair
from medcook.recipes.language._expert import DESCRIPTIONS, NAMES
from medcook.recipes.language._reading import BRAINS
from medcook.recipes.language._reports import SIGNS
from medcook.recipes.language.flair import CAPTION, CATEGORIES, Flair, category_of, described, probe_rows, recipe
from medcook.sampling import trained
from medcook.tasks import Budget
from medcook.training import Loop, unlabelled_samples

BLOCKS, PLANES, WIDTH, LAYERS, SPACE = (1, 2, 1, 1), (4, 4, 8, 8), 128, 3, 6
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fun", "##dus", "photograph", "of", "drusen", "macula")


def published_state() -> dict[str, Tensor]:
    """Random weights under the published names."""
    norm = lambda name, size: {f"{name}.weight": (size,), f"{name}.bias": (size,)}  # noqa: E731
    line = lambda name, inputs, outputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}  # noqa: E731
    batch = lambda name, size: norm(name, size) | {f"{name}.running_{k}": (size,) for k in ("mean", "var")}  # noqa: E731
    vision, text = "vision_model.model", "text_model.model"
    shapes = {f"{vision}.conv1.weight": (PLANES[0], 3, 7, 7), "logit_scale": ()} | batch(f"{vision}.bn1", PLANES[0])
    inputs = PLANES[0]
    for stage, (blocks, planes) in enumerate(zip(BLOCKS, PLANES, strict=True), 1):
        for number in range(blocks):
            name = f"{vision}.layer{stage}.{number}"
            for k, (i, o, side) in enumerate([(inputs, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)], 1):
                shapes |= {f"{name}.conv{k}.weight": (o, i, side, side)} | batch(f"{name}.bn{k}", o)
            if number == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * planes, inputs, 1, 1)}
                shapes |= batch(f"{name}.downsample.1", 4 * planes)
            inputs = 4 * planes
    shapes |= {f"{text}.embeddings.word_embeddings.weight": (len(WORDS), WIDTH)}
    shapes |= {f"{text}.embeddings.position_embeddings.weight": (512, WIDTH)}
    shapes |= {f"{text}.embeddings.token_type_embeddings.weight": (2, WIDTH)} | norm(
        f"{text}.embeddings.LayerNorm", WIDTH
    )
    for number in range(LAYERS):
        name = f"{text}.encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= line(f"{name}.attention.{part}", WIDTH, WIDTH)
        shapes |= norm(f"{name}.attention.output.LayerNorm", WIDTH) | norm(f"{name}.output.LayerNorm", WIDTH)
        shapes |= line(f"{name}.intermediate.dense", WIDTH, 4 * WIDTH) | line(f"{name}.output.dense", 4 * WIDTH, WIDTH)
    shapes |= line(f"{text}.pooler.dense", WIDTH, WIDTH)
    shapes |= {"vision_model.projection_head_vision.projection.weight": (SPACE, 4 * PLANES[-1])}
    shapes |= {"text_model.projection_head_text.projection.weight": (SPACE, WIDTH)}
    rng = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    return state


class Reference:
    """The published model's forward pass from its own names."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], None, stride, padding)

    def batch(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return self.state[f"{name}.weight"] * scaled + self.state[f"{name}.bias"]

    def project(self, name: str, x: Tensor) -> Tensor:
        x = self.state[f"{name}.projection.weight"] @ (x / x.norm())
        return x / x.norm()

    def image(self, image: Tensor) -> Tensor:
        """(3, H, W) to a unit vector."""
        root = "vision_model.model"
        x = self.batch(f"{root}.bn1", self.conv(f"{root}.conv1", image[None], 2, 3)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for stage, blocks in enumerate(BLOCKS, 1):
            for number in range(blocks):
                name, stride = f"{root}.layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
                y = self.batch(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
                y = self.batch(f"{name}.bn2", self.conv(f"{name}.conv2", y, stride, 1)).relu()
                y = self.batch(f"{name}.bn3", self.conv(f"{name}.conv3", y))
                if number == 0:
                    x = self.batch(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
                x = (x + y).relu()
        return self.project("vision_model.projection_head_vision", x[0].mean((1, 2)))

    def text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(N,) tokens and mask to a unit vector."""
        root, states = "text_model.model", []
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        words, places, kinds = (self.state[f"{root}.embeddings.{name}.weight"] for name in names)
        x = self.norm(f"{root}.embeddings.LayerNorm", words[tokens] + places[: len(tokens)] + kinds[0])
        for number in range(LAYERS):
            name = f"{root}.encoder.layer.{number}"
            q, k, v = (self.line(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
            heads = []
            for part in (slice(0, 64), slice(64, 128)):
                similarity = (q[:, part] @ k[:, part].T / 8).masked_fill(mask[None] == 0, -math.inf)
                heads.append(similarity.softmax(1) @ v[:, part])
            found = self.line(f"{name}.attention.output.dense", torch.cat(heads, 1))
            x = self.norm(f"{name}.attention.output.LayerNorm", x + found)
            inner = F.gelu(self.line(f"{name}.intermediate.dense", x))
            x = self.norm(f"{name}.output.LayerNorm", x + self.line(f"{name}.output.dense", inner))
            states.append(x)
        return self.project("text_model.projection_head_text", (states[0] + states[1] + states[-1]).mean(0) / 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in the published layout."""
    found = tmp_path_factory.mktemp("flair")
    torch.save(published_state(), found / "flair_resnet.pth")
    (found / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return found


@pytest.mark.component("architecture")
class TestArchitecture:
    @pytest.mark.parametrize("size", [(64, 64), (45, 70)])
    def test_the_image_tower_is_that_of_an_implementation_of_its_own(self, folder, size):
        images, reference = torch.rand(2, 3, *size), Reference(published_state())
        with torch.no_grad():
            found = load_flair(folder).images(images)
        torch.testing.assert_close(found, torch.stack([reference.image(x) for x in images]), atol=2e-4, rtol=1e-3)

    def test_the_text_tower_takes_three_layers_and_every_place(self, folder):
        tokens = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]])
        mask, reference = (tokens > 0).long(), Reference(published_state())
        with torch.no_grad():
            found = load_flair(folder).texts(tokens, mask)
        wanted = torch.stack([reference.text(*row) for row in zip(tokens, mask, strict=True)])
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)

    def test_the_published_one_has_the_published_number_of_weights(self):
        with torch.device("meta"):
            model = published.Flair()
        count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
        assert count(model.vision) == 23_508_032  # ResNet-50 without its 1000 classes
        assert round(count(model.text) / 1e6) == 108 and count(model.to_space) == 512 * (2048 + 768)


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, folder):
        state, model = published_state(), load_flair(folder)
        mine = {name: weight for name, weight in model.state_dict().items() if weight.is_floating_point()}
        assert len(mine) == len(state) and not model.training
        assert sorted(float(w.sum()) for w in mine.values()) == sorted(float(w.sum()) for w in state.values())

    def test_the_hubs_form_half_precision_and_spare_weights_are_the_same_model(self, folder, tmp_path):
        state = published_state() | {
            "spare": torch.ones(3),
            "text_model.model.embeddings.position_ids": torch.arange(9),
        }
        save_file(state, tmp_path / "model.safetensors")
        one, other = load_flair(folder).state_dict(), load_flair(tmp_path).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        torch.save({name: weight.half() for name, weight in published_state().items()}, tmp_path / "flair_resnet.pth")
        assert all(w.dtype == torch.float32 for w in load_flair(tmp_path).parameters())

    def test_what_is_missing_or_damaged_is_said(self, tmp_path):
        with pytest.raises(MedcookError, match="no FLAIR checkpoint") as error:
            load_flair(tmp_path)
        assert "github.com/jusiro/FLAIR" in str(error.value)
        state = published_state()
        del state["vision_model.model.layer2.1.bn2.bias"]
        torch.save(state, tmp_path / "flair_resnet.pth")
        with pytest.raises(MedcookError, match="layer2.1.bn2.bias"):
            load_flair(tmp_path)
        (tmp_path / "flair_resnet.pth").write_bytes(b"no weights")
        with pytest.raises(MedcookError, match="cannot be read"):
            load_flair(tmp_path)
        torch.save(published_state(), tmp_path / "flair_resnet.pth")
        with pytest.raises(MedcookError, match="vocab.txt"):
            Retina(tmp_path)

    def test_a_photograph_fills_the_canvas_from_its_corner(self):
        image = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8)
        found = on_canvas(image, 32)
        assert found.shape == (3, 32, 32) and (found[:, 16:] == 0).all()
        wanted = np.asarray(Image.fromarray(image).resize((32, 16), Image.Resampling.BILINEAR)) / 255
        assert np.abs(found[:, :16].numpy() - wanted.transpose(2, 0, 1)).max() < 0.01

    def test_categories_are_compared_by_their_descriptions(self, folder):
        retina, image = Retina(folder), np.full((30, 20, 3), 99, np.uint8)
        asked = {"drusen": ("drusen", "a macula"), "other": ("macula",)}
        found, model, similar = retina.zero_shot(image, asked, 64), retina.model, []
        with torch.no_grad():
            vector = model.images(on_canvas(image, 64)[None])[0]
            for descriptions in asked.values():
                tokens = retina.tokenizer([f"A fundus photograph of {d}" for d in descriptions], padding=True)
                ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
                similar.append(model.texts(ids, mask).mean(0) @ vector)
            wanted = (torch.stack(similar) * model.logit_scale.exp().clamp(1, 100)).softmax(0)
        assert list(found.values()) == pytest.approx(wanted.tolist(), rel=1e-4)


TINY = Flair(start="random", channels=(4, 8, 8), width=16)
REPORTS = ("PTB in the right upper field", "normal", "left pleural effusion", "normal")
READS, LABELS = Moment(0, 9), Moment(8, 9)


def built(method: Flair = TINY) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 2, 2)


@pytest.mark.component("expert knowledge in text")
class TestWords:
    def test_every_sign_has_a_name_and_descriptions_that_do_not_say_it(self):
        assert set(CATEGORIES) == {*SIGNS, "normal"} == set(DESCRIPTIONS)
        for category, said in DESCRIPTIONS.items():
            assert len(set(said)) == len(said) >= 2 and not any(NAMES[category] in sentence for sentence in said)

    def test_a_name_and_each_description_are_drawn_as_often(self):
        said = [CAPTION.format(words) for words in (NAMES["cavity"], *DESCRIPTIONS["cavity"])]
        found = []
        for seed in range(600):
            torch.manual_seed(seed)
            found.append(described("cavity", False))
        assert set(found) == set(said) and all(found.count(one) == pytest.approx(200, abs=40) for one in said)

    def test_the_ablation_says_names(self):
        method, without = (recipe.arms[name].method for name in recipe.ablation)
        assert replace(without, names=False) == method
        assert {described("cavity", True) for _ in range(20)} == {CAPTION.format("cavity")}


@pytest.mark.component("contrast by category")
class TestContrast:
    def test_it_is_the_cross_entropy_with_all_of_the_category_both_ways(self, monkeypatch):
        signs = dict(zip(REPORTS, ("tuberculosis", "normal", "effusion"), strict=False))
        monkeypatch.setattr(flair, "category_of", signs.get)
        nets, images, method = built(), torch.randn(4, 1, 32, 32), replace(TINY, names=True)
        v = method.seen(nets, images)
        t = method.heard(nets, tuple(CAPTION.format(NAMES[signs[report]]) for report in REPORTS))
        target = torch.tensor([[1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1, 0], [0, 0.5, 0, 0.5]])
        forth, back = (-(target * s.log_softmax(1)).sum(1).mean() for s in (v @ t.T / 0.07, t @ v.T / 0.07))
        found = method.reading(nets, images, REPORTS, READS)
        assert found.item() == pytest.approx(((forth + back) / 2).item(), rel=1e-4)

    def test_one_of_several_signs_is_drawn(self):
        found = []
        for seed in range(400):
            torch.manual_seed(seed)
            found.append(category_of("left pleural effusion"))
        assert found.count("effusion") == pytest.approx(200, abs=40) and set(found) == {"effusion", "pleura"}

    def test_reading_trains_every_part_in_either_precision(self):
        images = torch.randn(4, 1, 32, 32)
        for mixed in (False, True):
            nets = built()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = TINY.reading(nets, images, REPORTS, READS)
            loss.backward()
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            for part in (nets["model"].encoder, nets["pretext"]):
                assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


@pytest.mark.component("37 categorical data sets")
def test_categories_come_from_reports_and_the_outcome_from_few_patients():
    assert category_of("normal") == "normal" and category_of("RUL cavities") == "cavity"
    for name in flair.FULL_ARMS:
        assert recipe.arms[name].changes == {"labelled": flair.SHOTS}


@pytest.mark.component("linear probe")
class TestProbe:
    def batch(self, size: tuple[int, int] = (32, 32)) -> tuple[Batch, Batch]:
        labels = torch.tensor([0, 1, 0, 1]).byte().view(-1, 1, 1).expand(-1, *size).contiguous()
        labelled = Batch(torch.randn(4, 1, *size), labels)
        return labelled, labelled._replace(labels=torch.full_like(labels, IGNORE), groups=torch.arange(4))

    @pytest.mark.parametrize(("probe", "encoder_moves"), [(True, False), (False, True)])
    def test_labels_move_the_layer_alone(self, probe, encoder_moves):
        method = replace(TINY, probe=probe)
        nets = built(method)
        method.training_step(nets, *self.batch(), LABELS).backward()
        moved = lambda part: any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())  # noqa: E731
        assert moved(nets["model"].encoder) == encoder_moves and moved(nets["model"].head)
        assert not moved(nets["pretext"])

    def test_it_is_one_layer_on_standardised_features_before_the_projection(self):
        nets, (labelled, _) = built().train(), self.batch()
        features = nets["model"].features(labelled.images)
        standard = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-5).sqrt()
        logits = standard @ nets["model"].head[1].weight.T + nets["model"].head[1].bias
        wanted = F.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
        assert TINY.supervised(nets, labelled, LABELS).item() == pytest.approx(wanted.item(), rel=1e-4)

    @pytest.mark.parametrize("size", [(32, 32), (37, 50)])
    def test_any_size(self, size):
        assert TINY.predict(built().eval(), torch.randn(2, 1, *size)).shape == (2, 2, *size)

    def test_arms_differ_in_what_they_say(self):
        probed, full, names, plain = (recipe.arms[name].method for name in flair.FULL_ARMS)
        assert not full.has_pretext and not plain.has_pretext and plain.probe and probed.has_pretext and names.names
        assert {probed.share, full.share, names.share, plain.share} == {probed.share}


@pytest.fixture(scope="module")
def fitted():
    task, budget = replace(BRAINS, labelled=4), Budget(steps=4, batch=4, precision="float32", checks=0)
    extra = unlabelled_samples(TINY, task)
    loop = Loop(TINY, task, budget, "float32", 0, task.samples("labelled"), extra, None, False, accelerator="cpu")
    return loop.run()


@pytest.mark.component("zero-shot by descriptions")
class TestZeroShot:
    def test_a_category_is_the_mean_over_its_name_and_descriptions(self):
        nets, images = built().eval(), torch.randn(2, 1, 32, 32)
        reader, similar = nets["reader"], []
        for category in ("normal", "tuberculosis"):
            said = (NAMES[category], *DESCRIPTIONS[category])
            texts = torch.stack([TINY.heard(reader, (CAPTION.format(words),))[0] for words in said]).mean(0)
            similar.append(TINY.seen(reader, images) @ texts / 0.07)
        wanted = torch.stack(similar, 1).softmax(1)
        torch.testing.assert_close(
            TINY.zero_shot(reader, images, ("normal", "tuberculosis")), wanted, atol=1e-4, rtol=1e-4
        )

    def test_a_row_says_whether_the_words_are_right(self, fitted):
        for case in list(fitted.task.cases("val"))[:3]:
            (row,) = probe_rows(fitted, case)
            reader, images = trained(fitted)["reader"], fitted.task.preparation.images(case)
            with torch.no_grad():
                chance = TINY.zero_shot(reader, images, ("normal", "tuberculosis")).mean(0)[1]
            assert row["zero_shot"] == float((chance > 0.5) == bool(row["outcome"]))
