"""Words in place of boxes: kinds and absence, tests on answers, recognition, shapes, and the box-prompted SAM.

And the published network: its parts against those of transformers, its decoder against one written out.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import biomedparse_weights as weights
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from scipy import stats
from skimage.measure import regionprops
from torch import nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

from medcook.data import Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks import biomedparse as network
from medcook.networks.biomedparse import load_biomedparse
from medcook.networks.seem import places_of
from medcook.recipes.language import _parsing as parsing
from medcook.recipes.language import biomedparse
from medcook.recipes.language._queries import sheet, sheet_loss
from medcook.recipes.language._settings import BRAIN, EVERYTHING, NAMES, SETS
from medcook.recipes.language.biomedparse import BiomedParse, BoxPrompted, Parsed, Parser, kinds_of
from medcook.sam.model import SmallSam
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of

SMALL = dict(channels=(4, 6, 8), width=16)
NOW = Moment(1, 10)


def disc(down: float, across: float, radius: float, side: int = 40) -> torch.Tensor:
    rows, columns = np.indices((side, side))
    return torch.from_numpy(np.hypot(rows - down, columns - across) <= radius)


def batch() -> Batch:
    """A heart with two of its structures, a neck with a mandible."""
    torch.manual_seed(1)
    labels = torch.zeros(2, 24, 24, dtype=torch.uint8)
    labels[0, :6], labels[0, 10:16], labels[1, 4:12, 4:12] = 1, 3, 12
    return Batch(torch.randn(2, 1, 24, 24), labels, groups=torch.tensor([0, 2]))


@pytest.mark.component("segmentation from a text prompt")
def test_an_answer_does_not_depend_on_what_else_is_asked():
    torch.manual_seed(0)
    method, images = BiomedParse(**SMALL), torch.randn(2, 1, 24, 30)
    nets = method.build(1, 18, 2).eval()
    names = ("larynx", "mandible", "spinal cord")
    with torch.no_grad():
        together = method.answer(nets, images, names)
        for place, name in enumerate(names):
            assert torch.allclose(method.answer(nets, images, (name,))[:, 0], together[:, place], atol=1e-5)
    assert together.shape == (2, 3, 24, 30) and not torch.allclose(together[:, 0], together[:, 1], atol=1e-4)


@pytest.mark.component("joint learning of masks and kinds")
def test_a_name_has_the_kind_of_its_set_and_none_where_it_is_not_there():
    values = torch.tensor([[1, 3, 4], [1 + NAMES.index("cell"), 12, 0]])
    there = torch.tensor([[True, False, True], [True, True, False]])
    assert kinds_of(values, there, SETS).tolist() == [[1, 0, 2], [5, 3, 0]]
    assert kinds_of(values[:1], there[:1], ()).tolist() == [[1, 0, 1]]


@pytest.mark.component("joint learning of masks and kinds")
def test_the_loss_is_of_masks_and_of_kinds_that_are_known():
    torch.manual_seed(0)
    method, data = BiomedParse(joint=0.3, absent=0.0, **SMALL), batch()
    nets = method.build(1, 18, 2)
    torch.manual_seed(5)
    loss = method.training_step(nets, data, None, NOW)
    torch.manual_seed(5)
    torch.rand(2)  # who is asked for something absent
    values, known = sheet(EVERYTHING, data)
    queries = nets["model"].text(method.named(values))[(values - 1).clamp_min(0)]
    logits, kinds = nets["model"].parse(data.images, queries, values == 0)
    assert known.int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [0] * 6 + [1]]
    truth = {(0, 0): 1, (0, 1): 0, (0, 2): 1, (1, 6): 3}  # set 0; not there; set 0; set 2
    entropy = -sum(kinds[place].log_softmax(0)[kind] for place, kind in truth.items()) / 4
    assert torch.allclose(loss, sheet_loss(logits, data.labels, values, known) + 0.3 * entropy, atol=1e-4)


@pytest.mark.component("joint learning of masks and kinds")
def test_some_images_are_asked_for_what_is_certainly_not_there():
    data = batch()
    values, known = sheet(EVERYTHING, data)
    method, asked = BiomedParse(absent=0.7, **SMALL), {0: [], 1: []}
    for seed in range(200):
        torch.manual_seed(seed)
        more, sure = method.with_absent(data, values, known)
        assert torch.equal(more[:, :-1], values) and torch.equal(sure[:, :-1], known)
        assert torch.equal(sure[:, -1], more[:, -1] > 0)
        for row in range(2):
            asked[row] += [int(more[row, -1])] * bool(more[row, -1])
    assert 0.6 < len(asked[0]) / 200 < 0.8
    assert 2 in asked[0] and not {1, 3} & {*asked[0]}
    assert not set(range(6, 13)) & {*asked[1]}, "what is not drawn may be there"


@pytest.mark.component("joint learning of masks and kinds")
def test_the_ablation_learns_masks_alone():
    torch.manual_seed(0)
    method, data = BiomedParse(joint=0.0, absent=1.0, **SMALL), batch()
    nets, asked = method.build(1, 18, 2), []
    nets["model"].asking.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    method.training_step(nets, data, None, NOW).backward()
    assert asked == [7] and not nets["model"].kind.weight.grad.any()
    arms = {name: arm.method for name, arm in biomedparse.recipe.arms.items()}
    assert arms["text, masks alone"] == replace(arms["text"], joint=0.0)


@pytest.mark.component("rejection of prompts that fit nothing")
def test_means_are_over_what_an_answer_claims():
    answer, image = torch.tensor([[0.9, 0.7], [0.4, 0.1]]), torch.tensor([[1.0, -1.0], [9.0, 9.0]])
    probability, brightness = parsing.means(answer, image)
    assert probability == pytest.approx(0.8) and brightness == pytest.approx(0.5)
    assert parsing.means(answer / 2, image) is None


@pytest.mark.component("rejection of prompts that fit nothing")
def test_the_p_value_is_that_of_two_kolmogorov_smirnov_tests():
    rng = np.random.default_rng(0)
    found = list(zip(rng.beta(20, 3, 40), rng.beta(4, 5, 40), strict=True))
    fits = parsing.expected(found)
    for values, (a, b) in zip(np.array(found).T, fits, strict=True):
        assert (a, b) == pytest.approx(stats.beta.fit(values, floc=0, fscale=1)[:2], rel=1e-4)
    for value in ((0.9, 0.5), (0.6, 0.5), (0.85, 0.95)):
        single = [stats.ks_1samp([m], stats.beta(*shape).cdf).pvalue for m, shape in zip(value, fits, strict=True)]
        assert parsing.p_value(value, fits) == pytest.approx(np.prod(single) ** 0.5, abs=1e-9)
    assert parsing.p_value((0.87, 0.44), fits) > 0.5 > 0.05 > parsing.p_value((0.52, 0.95), fits)
    assert parsing.p_value(None, fits) == 0 and parsing.p_value((0.5, 0.5), None) == 1
    alike = stats.beta(*parsing.beta(np.full(9, 0.8)))
    assert alike.mean() == pytest.approx(0.8) and alike.std() == pytest.approx(0.01)
    assert parsing.expected(found[:4]) is None and parsing.expected([(1.0, 0.5)] * 3 + found) is not None


@pytest.mark.component("rejection of prompts that fit nothing")
def test_what_is_told_of_right_and_of_wrong_names():
    full, empty = torch.full((4, 4), 0.9), torch.full((4, 4), 0.1)
    slices = [
        Parsed((1,), {1: (full, 0.4), 2: (full, 0.01), 3: (empty, 0.0)}),
        Parsed((1,), {1: (full, 0.02), 2: (full, 0.6), 3: (empty, 0.0)}),
        Parsed((1, 2), {1: (full, 0.9), 2: (full, 0.6), 3: (full, 0.3)}),
    ]
    told = biomedparse.judged(slices, 1, [2, 3, None])
    assert told["kept"] == pytest.approx(2 / 3) and told["p_right"] == pytest.approx(0.44)
    assert told["rejected"] == 1 and told["silent"] == 0.5 and told["p_wrong"] == pytest.approx(0.005)
    assert biomedparse.judged(slices, 1, [3, None, 3])["rejected"] == 0.5
    assert np.isnan(biomedparse.judged(slices, 1, [None] * 3)["rejected"])


@pytest.mark.component("recognition of all objects")
def test_the_surest_of_answers_that_overlap_is_kept_and_the_rejected_are_dropped():
    one, much, other = disc(10, 10, 6), disc(12, 10, 6), disc(30, 30, 5)
    answers = torch.stack([one, much, other, other & False, disc(20, 30, 5)]).float()
    assert parsing.recognised(answers, [0.3, 0.5, 0.2, 0.9, 0.1], 0.05) == [1, 2, 4]
    assert parsing.recognised(answers, [0.3, 0.5, 0.04, 0.9, 0.1], 0.05) == [1, 4]
    assert parsing.recognised(answers, [0.6, 0.5, 0.2, 0.9, 0.1], 0.05, shared=1.0) == [0, 1, 2, 4]
    assert parsing.f1({1, 2}, {2, 3, 4}) == pytest.approx(0.4) and parsing.f1(set(), set()) == 1
    ps = (0.3, 0, 0.5, 0, 0)
    found = Parsed((1,), {k + 1: (answers[k], ps[k]) for k in range(5)})
    assert biomedparse.recognition(found, set()) == pytest.approx(2 / 3)
    assert biomedparse.recognition(found, {1, 3}) == 1, "what is not drawn may be there"


@pytest.mark.component("irregular shapes")
def test_ratios_of_shapes_that_are_known():
    box = torch.zeros(40, 40, dtype=torch.bool)
    box[5:15, 8:28] = True
    told = parsing.regularity(box.numpy())
    assert told["box_ratio"] == 1 and told["convex_ratio"] == 1
    inertia = 200 * (10**2 + 20**2) / 12  # of a full rectangle
    assert told["inertia_ratio"] == pytest.approx(200**2 / (2 * np.pi * inertia), abs=1e-6)
    assert parsing.regularity(disc(20, 20, 15).numpy())["inertia_ratio"] == pytest.approx(1, abs=0.01)
    two = (disc(10, 8, 5) | disc(30, 30, 6)).numpy()
    told, theirs = parsing.regularity(two), regionprops(two.astype(int))[0]
    assert told["convex_ratio"] == pytest.approx(theirs.solidity) and told["box_ratio"] == pytest.approx(theirs.extent)
    assert told["inertia_ratio"] < 0.5


@pytest.fixture
def small_sam(monkeypatch):
    """A SAM with random weights in place of the one that ships."""
    torch.manual_seed(0)
    sam = SmallSam().eval()
    monkeypatch.setattr(biomedparse, "load_small", lambda: sam)
    return sam


@pytest.mark.component("box-prompted SAM")
def test_sam_gets_the_tight_box_and_nothing_of_it_learns(small_sam):
    method = BoxPrompted(language=BRAIN)
    nets = method.build(1, 4, 2)
    method.training_step(nets, batch(), None, NOW).backward()
    assert [name for name, p in nets["model"].named_parameters() if p.grad is not None] == ["idle"]
    masks, images = torch.stack([disc(12, 15, 6), disc(25, 20, 9)]), torch.randn(2, 1, 40, 40)
    fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, method=method)
    found, predictor = biomedparse.boxed(fitted, images, masks), Predictor(small_sam)
    for image, mask, answer in zip(images[:, 0].numpy(), masks.numpy(), found.numpy(), strict=True):
        assert np.array_equal(predictor(image, Prompt(box=box_of(mask))).mask, answer)


@pytest.mark.component("rejection of prompts that fit nothing")
def test_the_score_of_a_network_that_knows_everything(monkeypatch):
    """It answers every name with what the image, which is its label map, shows of it; and is right about absence."""
    label = torch.zeros(4, 40, 40, dtype=torch.uint8)
    for number in range(3):
        label[number][disc(12, 12, 5 + number)] = 1
    label[1][disc(30, 28, 6)] = 3

    def answer(nets, images, sentences):
        values = [1 + BRAIN.names.index(sentence) for sentence in sentences]
        return torch.stack([torch.where(images[:, 0] == value, 0.9, 0.1) for value in values], dim=1)

    method = BiomedParse(language=BRAIN, **SMALL)
    method.answer = answer
    images = label[:, None].float()
    task = SimpleNamespace(
        preparation=SimpleNamespace(images=lambda case: images, labels=lambda case: label),
        samples=lambda role: SimpleNamespace(images=images.repeat(4, 1, 1, 1), labels=label.repeat(4, 1, 1)),
        structures={1: "grey", 2: "white", 3: "csf"},
        data=None,
    )
    fitted = SimpleNamespace(
        nets=nn.ModuleDict({"average": nn.Identity()}), weights={"last": {}}, method=method, task=task
    )
    known = biomedparse.expectations(fitted)
    assert set(known) == {1, 3} and known[3] is None, "of the third structure there are four images alone"
    case = Case(images.numpy()[None, :, 0], label.numpy(), "c", "p")
    rows = {row["structure"]: row for row in biomedparse.parsed_rows(fitted, case)}
    assert set(rows) == {"grey", "csf"} and all(row["dice"] == 1 and row["kept"] == 1 for row in rows.values())
    assert all(row["rejected"] == row["silent"] == row["recognised"] == 1 for row in rows.values())
    ratios = [parsing.regularity(disc(12, 12, radius).numpy())["box_ratio"] for radius in (5, 6, 7)]
    assert rows["grey"]["box_ratio"] == pytest.approx(np.mean(ratios))
    assert all(parsing.p_value((0.52, 0.9), known[1]) < 0.05 for _ in rows)
    monkeypatch.setattr(biomedparse, "boxed", lambda fitted, images, masks: masks & (torch.arange(40) < 12))
    fitted.method = BoxPrompted(language=BRAIN)
    boxed = {row["structure"]: row for row in biomedparse.parsed_rows(fitted, case)}
    assert boxed["csf"]["dice"] == 0 < boxed["grey"]["dice"] < 1
    assert boxed["grey"]["box_ratio"] == rows["grey"]["box_ratio"]


def test_all_of_it_is_trained_on_images_of_any_size():
    assert_every_parameter_is_trained(BiomedParse(language=BRAIN, **SMALL), (30, 45))
    assert isinstance(BiomedParse(language=BRAIN, **SMALL).network_for(1), Parser)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("biomedparse") / "biomedparse_v1.pt"
    torch.save(weights.published(), path)
    return path


def code(height: int, width: int) -> torch.Tensor:
    """Places (cells, 64) as transformers gives them."""
    found = Mask2FormerSinePositionEmbedding(32, normalize=True)((1, 64, height, width), "cpu", torch.float32)
    return found[0].flatten(1).T


@pytest.mark.component("architecture")
class TestArchitecture:
    def test_the_backbone_sees_what_that_of_transformers_sees(self, checkpoint):
        theirs, images = weights.focal_model(weights.TINY["stages"]), torch.randn(2, 3, 64, 96)
        weights.into(theirs, weights.FOCAL, weights.published())
        with torch.no_grad():
            found = load_biomedparse(checkpoint, weights.HEADS).backbone(images)
            expected = theirs(images).last_hidden_state
        assert [tuple(each.shape[1:]) for each in found] == [(4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 2, 3)]
        torch.testing.assert_close(found[3].flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-3)

    def test_names_are_read_as_by_the_text_model_of_clip(self, checkpoint):
        state, theirs = weights.published(), weights.text_model()
        weights.into(theirs, weights.CLIP, weights.in_thirds(state))
        tokens, mask = torch.tensor([[3, 5, 12, 12], [4, 2, 9, 12]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        with torch.no_grad():
            words, names = load_biomedparse(checkpoint, weights.HEADS).language(tokens, mask)
            expected = theirs(tokens).last_hidden_state @ state[f"{weights.PREDICTOR}.lang_encoder.lang_proj"]
        torch.testing.assert_close(words, torch.cat([expected[0, :3], expected[1]]), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(names, torch.stack([expected[0, 2], expected[1, 3]]), atol=1e-4, rtol=1e-3)

    def test_places_are_those_of_mask2former(self):
        torch.testing.assert_close(places_of(3, 5, 64), code(3, 5), atol=1e-5, rtol=1e-5)

    def test_masks_and_vectors_are_those_of_an_implementation_of_its_own(self, checkpoint):
        model, rng = load_biomedparse(checkpoint, weights.HEADS), torch.Generator().manual_seed(3)
        images, words = 255 * torch.rand(2, 3, 64, 96, generator=rng), torch.randn(4, 64, generator=rng)
        mean, spread = (torch.tensor(each)[:, None, None] for each in (network.MEAN, network.SPREAD))
        reference = weights.Reference(weights.published())
        with torch.no_grad():
            masks, vectors = model(images, words)
            for image, mask, vector in zip(images, masks, vectors, strict=True):
                maps = [each[0] for each in model.backbone((image[None] - mean) / spread)]
                features, scales = reference.pyramid(maps, code)
                expected = reference.decoded(features, scales, words, code)
                torch.testing.assert_close(mask, expected[0], atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(vector, expected[1], atol=1e-3, rtol=1e-3)
        assert masks.shape == (2, 5, 16, 24)

    def test_a_query_asks_where_its_mask_is_and_everywhere_if_that_is_empty(self):
        predictor = network.BiomedParse(
            image={"width": 4, "depths": (1,) * 4}, width=64, words=5, text=8, text_layers=1
        )
        masks = torch.full((1, 2, 4, 4), -1.0)
        masks[0, 0, :2, 2:] = 3
        hidden = predictor.sem_seg_head.predictor.unseen(masks, (2, 2))
        assert hidden.shape == (8, 2, 4)
        assert hidden[:, 0].tolist() == [[True, False, True, True]] * 8 and not hidden[:, 1].any()

    def test_a_name_takes_the_mask_of_the_query_most_like_it(self, checkpoint):
        model, rng = load_biomedparse(checkpoint, weights.HEADS), torch.Generator().manual_seed(3)
        images, tokens = 255 * torch.rand(1, 3, 64, 64, generator=rng), torch.tensor([[3, 5, 12], [4, 12, 12]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        with torch.no_grad():
            words, names = model.language(tokens, mask)
            masks, vectors = model(images, words)
            found = model.parse(images, tokens, mask, size=(40, 50))
            scaled = model.language.similar(vectors, names)[0]
        cosine = F.cosine_similarity(vectors[0][:, None], names[None], dim=2)
        torch.testing.assert_close(scaled, cosine * model.language.logit_scale.exp())
        for number in range(2):
            best = masks[:, [cosine[:, number].argmax()]]
            expected = F.interpolate(best, (40, 50), mode="bilinear")[:, 0].sigmoid()
            torch.testing.assert_close(found[:, number], expected)
        assert model.parse(images, tokens, mask).shape == (1, 2, 64, 64)

    def test_an_image_must_halve_five_times(self, checkpoint):
        with pytest.raises(MedcookError, match=r"\(64, 72\).*multiples of 32"):
            load_biomedparse(checkpoint, weights.HEADS)(torch.zeros(1, 3, 64, 72), torch.zeros(2, 64))

    def test_the_published_sizes(self):
        with torch.device("meta"):
            model, backbone = network.BiomedParse(), weights.focal_model(weights.PUBLISHED["stages"])
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert found == weights.shapes(weights.PUBLISHED)
        count = lambda part: sum(weight.numel() for weight in part.parameters())  # noqa: E731
        assert count(model) == 340_360_953
        norms = 2 * sum(model.backbone.widths[:3])
        assert count(model.backbone) == count(backbone) + norms, "FocalNet-L, and a norm for each stage's map"
        assert count(model.language.lang_encoder) == 63_165_952, "the text model of CLIP ViT-B/16"


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, checkpoint):
        mine, theirs = load_biomedparse(checkpoint, weights.HEADS).state_dict(), weights.published()
        unused = ("pn_indicator", "mask_sptial_embed", "biomed_encoder", "dilation_kernel")
        theirs = {name: tensor for name, tensor in theirs.items() if not any(word in name for word in unused)}
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    @pytest.mark.parametrize(
        "lost",
        ["backbone.layers.1.blocks.1.gamma_2", "sem_seg_head.pixel_decoder.adapter_2.norm.bias", "backbone.norm0.bias"],
    )
    def test_a_missing_weight_is_named(self, tmp_path, lost):
        state = weights.published()
        del state[lost]
        torch.save(state, tmp_path / "short.pt")
        with pytest.raises(MedcookError, match=rf"short\.pt: the checkpoint cannot be read.*{re.escape(lost)}"):
            load_biomedparse(tmp_path / "short.pt", weights.HEADS)

    def test_a_weight_of_another_shape_is_named(self, tmp_path):
        wrong = "sem_seg_head.predictor.class_embed"
        torch.save(weights.published() | {wrong: torch.zeros(64, 3)}, tmp_path / "wrong.pt")
        with pytest.raises(MedcookError, match=rf"size mismatch for {re.escape(wrong)}"):
            load_biomedparse(tmp_path / "wrong.pt", weights.HEADS)

    def test_files_that_are_none_are_refused(self, tmp_path, checkpoint):
        with pytest.raises(MedcookError, match="there is no BiomedParse checkpoint") as error:
            load_biomedparse(tmp_path / "nothing.pt")
        assert "huggingface.co/microsoft/BiomedParse" in str(error.value)
        (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:600])
        torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
        torch.save({"model": Path("x")}, tmp_path / "code.pt")
        for name in ("broken", "other", "code"):
            with pytest.raises(MedcookError, match=rf"{name}\.pt: the checkpoint cannot be read"):
                load_biomedparse(tmp_path / f"{name}.pt")
