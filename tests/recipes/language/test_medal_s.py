"""Names and rough masks: how they are bound, asked for at once or one by one, made rough, and used a second time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from medal_s_weights import HEADS, WIDTH, Reference, published, published_text

from medcook.data import Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks import medal_s as published_network
from medcook.networks.medal_s import TextEncoder, load_medal_s, load_text_encoder, places_of
from medcook.recipes.language import medal_s
from medcook.recipes.language._queries import sheet
from medcook.recipes.language._settings import BRAIN, EVERYTHING
from medcook.recipes.language.medal_s import BLOCK, MedalS, SpatialUNet, blocks, coarse, halves, refined, simulated

SMALL = dict(channels=(4, 6, 8), width=16)


def network() -> SpatialUNet:
    torch.manual_seed(0)
    return SpatialUNet(1, (4, 6, 8), 16, 2, True)


def asked(count: int = 3) -> tuple[torch.Tensor, ...]:
    """Images, queries, nobody, and rough masks."""
    torch.manual_seed(1)
    rough = (torch.rand(2, count, 24, 30) > 0.8).float()
    return torch.randn(2, 1, 24, 30), torch.randn(2, count, 16), torch.zeros(2, count, dtype=torch.bool), rough


@pytest.mark.component("channel-wise alignment of names and masks")
def test_each_mask_is_bound_to_its_names_weights():
    net, (_, _, _, rough) = network(), asked()
    pixels, weights = torch.randn(2, 4, 24, 30), torch.randn(2, 3, 5)
    bound = torch.zeros(2, 4, 24, 30)
    for image in range(2):
        for name in range(3):
            for channel in range(4):
                bound[image, channel] += rough[image, name] * weights[image, name, channel]
    conv, norm, _ = net.refine
    x = F.conv2d(torch.cat([pixels, bound], dim=1), conv.weight, conv.bias, padding=1)
    mean, spread = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
    x = (x - mean) / (spread + norm.eps).sqrt()
    assert torch.allclose(net.bound(pixels, weights, rough), F.leaky_relu(x, 0.01), atol=1e-4)


@pytest.mark.component("channel-wise alignment of names and masks")
def test_pairs_may_come_in_any_order_but_a_mask_is_not_anybodys():
    net, (images, queries, nobody, rough) = network(), asked()
    found = net.prompted(images, queries, nobody, rough)
    order = [2, 0, 1]
    moved = net.prompted(images, queries[:, order], nobody, rough[:, order])
    assert torch.allclose(moved, found[:, order], atol=1e-4)
    assert not torch.allclose(net.prompted(images, queries, nobody, rough[:, order]), found, atol=1e-3)


@pytest.mark.component("channel-wise alignment of names and masks")
def test_the_image_has_one_more_channel_of_all_masks_together():
    net, (images, queries, nobody, rough) = network(), asked()
    seen = []
    net.net.down[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = torch.rand(2, 1, 24, 30)
    net.prompted(images, queries, nobody, rough)
    net.prompted(images, queries, nobody, rough, given)
    alone = net.prompted(images, queries, nobody, None)
    assert all(torch.equal(each[:, :1], images) for each in seen)
    assert torch.equal(seen[0][:, 1:], rough.bool().any(1, keepdim=True).float())
    assert torch.equal(seen[1][:, 1:], given) and not seen[2][:, 1:].any()
    assert alone.shape == (2, 3, 24, 30)
    assert not torch.allclose(alone, net.prompted(images, queries, nobody, rough * 0), atol=1e-3)


@pytest.mark.component("rough masks made from the truth")
def test_blocks_cover_the_image_and_end_with_it():
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    found = blocks(chosen, 4, torch.Size([7, 10]))
    for row in range(7):
        for column in range(10):
            assert found[row, column] == chosen[row // 4, column // 4]


@pytest.mark.component("rough masks made from the truth")
def test_rough_masks_lose_blocks_classes_and_everything_and_win_little():
    masks = torch.zeros(200, 3, 32, 40, dtype=torch.bool)
    masks[:, 0, :16], masks[:, 1, 16:, :20] = True, True
    torch.manual_seed(0)
    parts = [simulated(masks) for _ in range(6)]
    rough, union = (torch.cat(part) for part in zip(*parts, strict=True))
    truth = masks.repeat(6, 1, 1, 1)
    assert rough.shape == truth.shape and union.shape == (1200, 1, 32, 40)
    assert set(rough.unique().tolist()) == {0, 1} == set(union.unique().tolist())
    nothing = ~rough.flatten(1).any(1) & ~union.flatten(1).any(1)
    assert 0.33 < nothing.float().mean() < 0.6, "a third are blank, and some lose everything"
    kept = (rough.bool() & truth).flatten(2).sum(2) / truth.flatten(2).sum(2).clamp_min(1)
    assert 0.04 < kept[:, :2].mean() < 0.2 and (kept[:, 0] > 0.4).any()
    assert 0.3 < (kept[~nothing, 0] == 0).float().mean() < 0.7, "classes are left out"
    false = (rough.bool() & ~truth).float().mean()
    assert 0 < false < 0.02 and rough[:, 2].any()
    again = [simulated(masks), simulated(masks)]
    assert not torch.equal(again[0][0], again[1][0])


@pytest.mark.component("rough masks made from the truth")
def test_a_step_shows_rough_masks_of_what_it_asks_for():
    torch.manual_seed(0)
    method, seen = MedalS(language=BRAIN, blind=0.0, alone=0.0, **SMALL), []
    labels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    labels[:, :16], labels[:, 16:, 16:] = 2, 3
    nets = method.build(1, 4, 2)
    bound = nets["model"].bound
    nets["model"].bound = lambda pixels, weights, rough: seen.append(rough) or bound(pixels, weights, rough)
    for _ in range(12):
        method.training_step(nets, Batch(torch.randn(3, 1, 32, 32), labels), None, Moment(1, 10))
    rough = torch.cat(seen)
    right = torch.stack([labels == value for value in (1, 2, 3)], dim=1).repeat(12, 1, 1, 1)
    assert rough[right].mean() > 4 * rough[~right].mean() and rough[:, 1][right[:, 1]].any()
    blind = replace(method, blind=1.0)
    seen.clear()
    blind.training_step(nets, Batch(torch.randn(3, 1, 32, 32), labels), None, Moment(1, 10))
    assert not seen


@pytest.mark.component("all classes in parallel")
def test_some_images_are_asked_for_one_name_alone():
    labels = torch.zeros(600, 8, 8, dtype=torch.uint8)
    labels[:, :4] = 1
    batch = Batch(torch.randn(600, 1, 8, 8), labels, groups=torch.zeros(600, dtype=torch.long))
    torch.manual_seed(0)
    values, known = MedalS(alone=0.4, **SMALL).chosen(batch)
    every, sure = sheet(EVERYTHING, batch)
    counts = (values > 0).sum(1)
    assert set(counts.tolist()) == {1, 3} and 0.33 < (counts == 1).float().mean() < 0.47
    single = values[counts == 1].sum(1)
    assert all(60 < (single == value).sum() < 120 for value in (1, 2, 3))
    assert torch.equal(known, sure & (values > 0)) and torch.equal(values[counts == 3], every[counts == 3])


@pytest.mark.component("all classes in parallel")
def test_in_parallel_the_passes_do_not_depend_on_how_many_are_asked_for():
    torch.manual_seed(0)
    images, names = torch.randn(2, 1, 24, 32), ("grey matter", "white matter", "ventricles")
    for order, spatial, passes in (("parallel", True, 3), ("sequential", True, 9), ("parallel", False, 1)):
        method = MedalS(language=BRAIN, order=order, spatial=spatial, **SMALL)
        nets = method.build(1, 4, 2).eval()
        fitted = SimpleNamespace(method=method, nets=nets, weights={"last": nets.state_dict()})
        found = medal_s.work(fitted, images[0], names)
        one = medal_s.work(fitted, images[0], names[:1])
        assert found["passes"] == passes and one["passes"] == (3 if spatial else 1)
        assert found["gigaflops"] > 0 and (found["gigaflops"] / one["gigaflops"] > 2.5) == (order == "sequential")
        with torch.no_grad():
            assert method.answer(nets, images, names).shape == (2, 3, 24, 32)
    arms = {name: arm.method for name, arm in medal_s.recipe.arms.items()}
    assert arms["sequential"] == replace(arms["parallel"], order="sequential")
    assert arms["names alone"] == replace(arms["parallel"], spatial=False)


@pytest.mark.component("all classes in parallel")
def test_one_after_the_other_is_as_if_each_were_asked_alone():
    torch.manual_seed(0)
    method = MedalS(language=BRAIN, order="sequential", **SMALL)
    nets, images, names = method.build(1, 4, 2).eval(), torch.randn(2, 1, 24, 32), ("ventricles", "grey matter")
    rough = (torch.rand(2, 2, 24, 32) > 0.5).float()
    parallel = replace(method, order="parallel")
    with torch.no_grad():
        for given in (None, rough):
            found = method.passes(nets, images, names, given)[-1]
            for place, name in enumerate(names):
                mine = None if given is None else given[:, place : place + 1]
                alone = parallel.passes(nets, images, (name,), mine)[-1]
                assert torch.allclose(found[:, place], alone[:, 0], atol=1e-5)


@pytest.mark.component("self-refinement")
def test_a_block_is_answered_from_the_others():
    half = halves(torch.Size([20, 30]), torch.device("cpu"))
    for row in range(20):
        for column in range(30):
            assert half[row, column] == ((row // BLOCK + column // BLOCK) % 2 == 0)
    rough = torch.ones(1, 2, 20, 30)
    assert not refined(lambda mask: mask, rough).any(), "nobody hears of its own rough mask"
    assert refined(lambda mask: 1 - mask, rough).all()


@pytest.mark.component("self-refinement")
def test_the_second_pass_gets_what_the_first_found():
    torch.manual_seed(0)
    method = MedalS(language=BRAIN, **SMALL)
    nets, images = method.build(1, 4, 2).eval(), torch.randn(2, 1, 24, 32)
    given, prompted = [], nets["average"].prompted
    nets["average"].prompted = lambda i, q, n, rough: given.append(rough) or prompted(i, q, n, rough)
    with torch.no_grad():
        first, last = method.passes(nets, images, ("grey matter", "ventricles"))
    half = halves(torch.Size([24, 32]), torch.device("cpu"))
    found = (first > 0.5).float()
    assert len(given) == 3 and not given[0].any()
    assert torch.equal(given[1], found * ~half) and torch.equal(given[2], found * half)
    assert found.any() and not torch.equal(first, last)


@pytest.mark.component("hybrid mode")
def test_what_a_quick_hand_draws_are_blocks_half_full():
    masks = torch.zeros(1, 2, 20, 16, dtype=torch.bool)
    masks[0, 0, :8, :5], masks[0, 1, 8:16, 8:11] = True, True
    masks[0, 0, 16:20, 8:16] = True
    drawn = coarse(masks)
    assert drawn[0, 0, :8, :8].all() and drawn[0, 0, 16:, 8:].all() and drawn[0, 0].sum() == 96
    assert not drawn[0, 1].any()


@pytest.mark.component("hybrid mode")
def test_the_score_tells_first_last_and_drawn_apart():
    """A method that at first finds the left half of a structure, then all of it, and what is drawn."""
    label = torch.zeros(2, 32, 32, dtype=torch.uint8)
    label[:, 8:24, 8:24], label[1, 26:30, 2:12] = 1, 3
    images = label[:, None].float()

    def passes(nets, images, sentences, rough=None):
        values = [1 + BRAIN.names.index(sentence) for sentence in sentences]
        full = torch.stack([(images[:, 0] == value).float() for value in values], dim=1)
        return (full * (torch.arange(32) < 16) if rough is None else rough), full

    method = MedalS(language=BRAIN, **SMALL)
    nets = method.build(1, 4, 2)
    method.passes = passes
    preparation = SimpleNamespace(images=lambda case: images, labels=lambda case: label)
    task = SimpleNamespace(preparation=preparation, structures={1: "grey", 2: "white", 3: "csf"}, data=None)
    fitted = SimpleNamespace(method=method, nets=nets, weights={"last": nets.state_dict()}, task=task)
    case = Case(label.numpy()[None].astype(np.float32), label.numpy(), "c", "p")
    rows = {row["structure"]: row for row in medal_s.spatial_rows(fitted, case)}
    assert rows["grey"]["dice"] == 1 and rows["grey"]["first"] == pytest.approx(2 / 3) and rows["grey"]["drawn"] == 1
    assert rows["csf"]["first"] == 1 and rows["csf"]["drawn"] == 0 and not rows["csf"]["missed"]
    assert rows["white"]["dice"] == 1 and not rows["white"]["false_alarm"]
    assert all(isinstance(row["microseconds"], int) for row in rows.values()), "what differs is no part of fingerprints"


@pytest.mark.parametrize("spatial", [True, False])
def test_all_of_it_is_trained_on_images_of_any_size(spatial):
    method = MedalS(language=BRAIN, spatial=spatial, blind=0.0, **SMALL)
    assert_every_parameter_is_trained(method, (30, 45))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("medal")
    torch.save({"model_state_dict": published(), "step": 3}, found / "nano.pth")
    torch.save({"model_state_dict": published_text()}, found / "text.pth")
    return found


@pytest.mark.component("architecture")
class TestArchitecture:
    @pytest.mark.parametrize("told", [False, True])
    def test_masks_are_those_of_an_implementation_of_its_own(self, folder, told):
        rng = torch.Generator().manual_seed(2)
        volumes, queries = torch.randn(2, 1, 8, 8, 8, generator=rng), torch.randn(2, 3, WIDTH, generator=rng)
        coarse = torch.rand(2, 3, 8, 8, 8, generator=rng) if told else None
        with torch.no_grad():
            found = load_medal_s(folder / "nano.pth", HEADS)(volumes, queries, coarse)
        reference = Reference(published())
        each = [(volumes[k], queries[k], coarse[k] if told else None) for k in range(2)]
        expected = torch.stack([reference.masks(*one) for one in each])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    def test_names_are_read_as_by_an_implementation_of_its_own(self, folder):
        tokens, reference = [[0, 5, 6, 2], [0, 7, 8, 9, 5, 2]], Reference(published_text())
        padded = torch.tensor([row + [1] * (6 - len(row)) for row in tokens])
        with torch.no_grad():
            found = load_text_encoder(folder / "text.pth", HEADS)(padded, (padded != 1).long(), torch.tensor([0, 3]))
        expected = torch.stack([reference.query(row, modality) for row, modality in zip(tokens, (0, 3), strict=True)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    def test_all_masks_at_once_are_those_of_each_alone(self, folder):
        model, rng = load_medal_s(folder / "nano.pth", HEADS), torch.Generator().manual_seed(2)
        volume, queries = torch.randn(1, 1, 8, 12, 16, generator=rng), torch.randn(1, 3, WIDTH, generator=rng)
        with torch.no_grad():
            together = model(volume, queries)
            alone = torch.cat([model(volume, queries[:, [k]]) for k in range(3)], dim=1)
        assert together.shape == (1, 3, 8, 12, 16)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)

    def test_the_published_sizes(self):
        with torch.device("meta"):
            model, text = published_network.MedalS(), TextEncoder(vocab_size=30527, max_position_embeddings=514)
        count = lambda part: sum(weight.numel() for weight in part.parameters())  # noqa: E731
        assert model.projection_layer[0].weight.shape == (768, 1792)
        assert round(count(model) / 1e6) == 109, "SAT-Nano, which has the same parts, has 110 million"
        assert count(text.text_tower.biolord) == 109_486_464 - 590_592, "all-mpnet-base-v2 without its pooler"

    def test_every_place_has_its_own_code(self):
        found = places_of((3, 2, 4), 768)
        assert found.shape == (24, 768) and len(found.unique(dim=0)) == 24
        assert torch.allclose(found.square().sum(1), torch.full((24,), 384.0), rtol=1e-4)


@pytest.mark.component("checkpoint")
class TestCheckpoint:
    def test_every_weight_finds_its_place(self, folder):
        for load, state in ((load_medal_s, published()), (load_text_encoder, published_text())):
            name = "nano" if load is load_medal_s else "text"
            mine = load(folder / f"{name}.pth", HEADS).state_dict()
            unused = ("all_modules", "mid_mask_embed", "atlas_tower")
            theirs = {
                key.removeprefix("module."): t for key, t in state.items() if not any(word in key for word in unused)
            }
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)

    @pytest.mark.parametrize("lost", ["fusion_conv.convs.0.norm.bias", "transformer_decoder.layers.1.linear2.weight"])
    def test_a_missing_weight_is_named(self, tmp_path, lost):
        state = published()
        del state[f"module.{lost}"]
        torch.save({"model_state_dict": state}, tmp_path / "short.pth")
        with pytest.raises(MedcookError, match=lost.replace(".", r"\.")):
            load_medal_s(tmp_path / "short.pth", HEADS)

    def test_files_that_are_none_are_refused(self, tmp_path, folder):
        with pytest.raises(MedcookError, match="there is no Medal S checkpoint") as error:
            load_medal_s(tmp_path / "nothing.pth")
        assert "github.com/yinghemedical/Medal-S" in str(error.value)
        (tmp_path / "broken.pth").write_bytes((folder / "nano.pth").read_bytes()[:600])
        torch.save({"model_state_dict": {"module.a": torch.zeros(2)}}, tmp_path / "other.pth")
        for name in ("broken", "other"):
            with pytest.raises(MedcookError, match=rf"{name}\.pth: the checkpoint cannot be read"):
                load_medal_s(tmp_path / f"{name}.pth")
