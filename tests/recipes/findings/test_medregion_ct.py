"""MedRegion-CT: what a report says, what is told of each region, and that words come one after the other."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.recipes.findings import medregion_ct
from medcook.recipes.findings._reported import (
    MOST,
    REGIONS,
    STATED,
    STOP,
    WORDS,
    PaintedRegions,
    Writer,
    agreement,
    apart,
    facts_in,
    numbered,
    report_of,
    spelt,
)
from medcook.recipes.findings.medregion_ct import (
    GRID,
    LOOKS,
    METHOD,
    QUICK,
    MaskEncoder,
    Seen,
    attributes_of,
    displaced,
    inside,
    named,
    recipe,
    report_rows,
)
from medcook.recipes.language._findings import FINDINGS, Finding, Painted, fields_of, value_of
from medcook.training import Fitted
from tests.chest import chest

TINY = replace(METHOD, channels=(4, 8), width=16)
VALUES = tuple(value_of(Finding(*words.split())) for words in ("patch large left lower", "nodule small right upper"))
LEARNS, WRITES = Moment(0, 10), Moment(9, 10)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def six(size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """(1, 6, H, W): the regions of a chest."""
    numbers = torch.from_numpy(numbered(chest()[0].numpy() > 0))
    numbers = F.interpolate(numbers[None, None], size=size, mode="nearest")
    return apart(torch.cat([normal(1, 1, *size), numbers], dim=1))[1]


def batch(size: tuple[int, int] = (32, 32), count: int = 3) -> Batch:
    numbers = (six(size) * torch.arange(1, 7).view(6, 1, 1)).sum(1).expand(count, -1, -1)
    labels = torch.zeros(count, *size, dtype=torch.uint8)
    labels[0, 2:6, 2:6], labels[0, 20:26, 20:26], labels[1, 10:12, 9:12] = *VALUES, VALUES[0]
    return Batch(torch.stack([normal(count, *size), numbers], dim=1), labels)


def built(method=TINY) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(2, 37, 2)


@pytest.mark.component("six region masks")
class TestRegions:
    def test_the_second_channel_is_the_map_of_the_fields(self):
        case = next(iter(QUICK.cases("val")))
        preparation = replace(QUICK.preparation, versions=2)
        images, labels = preparation.both(case)
        plain = Painted(**vars(preparation))
        assert torch.equal(images[:, :1], plain.images(case)) and torch.equal(labels, plain.labels(case))
        organ = super(Painted, plain).labels(case)[0].numpy() > 0
        for number, region in enumerate(REGIONS):
            wanted = torch.from_numpy(fields_of(organ)[region]).float()
            found = apart(images)[1][:2, number]
            assert torch.equal(found[0], wanted) and torch.equal(found[1], wanted)

    def test_findings_are_in_the_region_that_they_are_named_after(self):
        case = next(iter(QUICK.cases("val")))
        images, labels = QUICK.preparation.both(case)
        for image, label in zip(images, labels, strict=True):
            for value in set(label.unique().tolist()) - {0}:
                place = torch.nonzero(label == value).float().mean(0).round().long()
                number = int(image[1][tuple(place)])
                assert number == 0 or REGIONS[number - 1] == (FINDINGS[value - 1].side, FINDINGS[value - 1].field)

    def test_augmentation_moves_regions_with_the_image_and_leaves_their_numbers(self):
        given = batch()
        given = given._replace(images=given.images[:, 1:].repeat(1, 2, 1, 1), labels=given.images[:, 1].byte())
        moved = TINY.augment(given, torch.Generator().manual_seed(2))
        assert set(moved.images[:, 1].unique().tolist()) <= set(range(7))
        assert torch.equal(moved.images[:, 1], moved.labels.float())
        assert not torch.equal(moved.images[:, 1], given.images[:, 1])
        assert isinstance(QUICK.preparation, PaintedRegions)


@pytest.mark.component("region representative token pooling")
class TestPooling:
    @pytest.mark.parametrize("size", [(8, 8), (32, 32), (5, 7)])
    def test_a_region_token_is_the_mean_inside_its_mask(self, size):
        """By a loop over cells, each counted by how much of it is covered."""
        maps, masks = normal(1, 3, *size), six()
        found = inside(maps, masks)
        for k in range(6):
            share = F.adaptive_avg_pool2d(masks[:, k : k + 1], size)[0, 0]
            total = sum(share[y, x] * maps[0, :, y, x] for y in range(size[0]) for x in range(size[1]))
            torch.testing.assert_close(found[0, k], total / share.sum(), rtol=1e-4, atol=1e-5)

    def test_nothing_outside_counts_and_an_empty_region_is_zero(self):
        maps, masks = normal(1, 3, 32, 32), six()
        masks[:, 2] = 0
        other = torch.where(masks[:, 1:2] > 0, maps, 100.0)
        assert torch.equal(inside(maps, masks)[:, 1], inside(other, masks)[:, 1])
        assert not torch.allclose(inside(maps, masks)[:, 0], inside(other, masks)[:, 0])
        assert (inside(maps, masks)[:, 2] == 0).all()

    def test_global_tokens_come_from_a_grid_and_region_tokens_after_them(self):
        torch.manual_seed(0)
        seen, image = Seen((4, 8), 16, ("region",), False).eval(), normal(2, 1, 32, 32)
        masks = six().expand(2, -1, -1, -1)
        maps = seen.encoder.maps(image)
        cells = maps.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).transpose(1, 2)
        wanted = [seen.whole(cells) + seen.cells, seen.region(inside(maps, masks)) + seen.names["region"]]
        torch.testing.assert_close(seen(image, masks), seen.norm(torch.cat(wanted, 1)), rtol=1e-4, atol=1e-5)
        assert seen(image, masks).shape == (2, GRID**2 + 6, 16)

    def test_the_ablation_pools_each_region_in_another_ones_mask(self):
        masks = torch.cat([six(), six().roll(5, dims=2), six().flip(3)])
        found = displaced(masks)
        orders = [[int((each == mask).flatten(1).all(1).nonzero()[0, 0]) for each in dealt]
                  for dealt, mask in zip(found, masks, strict=True)]  # fmt: skip
        assert all(sorted(order) == [*range(6)] for order in orders)
        assert all(number != k for order in orders for k, number in enumerate(order))
        assert torch.equal(displaced(masks), found)
        torch.manual_seed(0)
        seen = Seen((4, 8), 16, ("region", "mask"), True).eval()
        maps = seen.encoder.maps(normal(3, 1, 32, 32))
        torch.testing.assert_close(seen.of("region", maps, masks), seen.region(inside(maps, found)))
        torch.testing.assert_close(seen.of("mask", maps, masks)[1, 2], seen.mask(masks[1, 2:3])[0])

    def test_images_differ_in_how_masks_are_dealt(self):
        cut = [six() * (torch.arange(32) >= first) for first in range(12)]
        orders = {
            tuple(int((each == mask).flatten(1).all(1).nonzero()[0, 0]) for each in displaced(masks)[0])
            for masks in cut
            for mask in [masks[0]]
        }
        assert len(orders) > 3


@pytest.mark.component("mask encoder")
class TestMaskEncoder:
    def test_it_tells_position_and_shape(self):
        torch.manual_seed(0)
        net, square = MaskEncoder(16), torch.zeros(3, 32, 32)
        square[0, 4:12, 4:12] = square[1, 20:28, 20:28] = square[2, 4:8, 4:20] = 1
        found = net(square)
        assert found.shape == (3, 16) and torch.cdist(found, found)[[0, 0, 1], [1, 2, 2]].min() > 0.02

    @pytest.mark.parametrize("size", [(64, 64), (37, 50)])
    def test_any_size(self, size):
        mask = torch.zeros(1, *size)
        mask[:, size[0] // 2 :] = 1
        assert MaskEncoder(16)(mask).shape == (1, 16)

    def test_the_image_plays_no_part(self):
        torch.manual_seed(0)
        seen = Seen((4, 8), 16, ("mask",), False).eval()
        one, other = (seen(normal(1, 1, 32, 32, seed=seed), six()) for seed in (0, 1))
        assert torch.equal(one[:, -6:], other[:, -6:]) and not torch.equal(one[:, :-6], other[:, :-6])


@pytest.mark.component("attributes as text")
class TestAttributes:
    def test_size_diameter_and_place_of_a_rectangle(self):
        masks = torch.zeros(1, 6, 20, 40)
        masks[0, 0, 2:10, 4:12] = 1
        found = attributes_of(masks)
        assert found[0] == "right upper field area 8 height 4 width 2 row 3 column 2"
        assert found[5] == "left lower field area 0 height 0 width 0 row 0 column 0"

    def test_they_are_read_by_a_text_encoder(self):
        torch.manual_seed(0)
        seen = Seen((4, 8), 16, ("attributes",), False).eval()
        masks = torch.cat([six(), six().roll(8, dims=2)])
        wanted = seen.text(attributes_of(masks)).view(2, 6, 16)
        torch.testing.assert_close(seen.of("attributes", torch.zeros(2, 8, 4, 4), masks), wanted)
        assert not torch.allclose(wanted[0], wanted[1])


@pytest.mark.component("facts and words of reports")
class TestReports:
    def test_a_report_goes_region_by_region(self):
        report = report_of(VALUES)
        assert report == "right upper field: small nodule. left lower field: large patch."
        assert report_of(()) == "no finding." and facts_in("no finding") == set()

    def test_facts_are_found_again(self):
        for values in [(value,) for value in range(1, len(FINDINGS) + 1)] + [VALUES, (1, 2, 20, 36)]:
            assert facts_in(report_of(values)) == {FINDINGS[value - 1] for value in values}

    def test_words_that_make_no_sentence_state_nothing(self):
        assert not facts_in("right field upper small nodule right upper field nodule") and STATED.groups == 4

    def test_agreement_agrees_with_sets(self):
        assert agreement({1, 2, 3}, {2, 3, 4, 5}) == pytest.approx({"precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7})
        assert agreement(set(), set())["f1"] == 1 and agreement(set(), {1}) == dict.fromkeys(agreement({1}, {2}), 0.0)

    def test_rows_measure_what_was_written(self, monkeypatch):
        case = next(iter(QUICK.cases("val")))
        _, labels = QUICK.preparation.both(case)
        truth = [report_of(tuple(sorted(set(label.unique().tolist()) - {0}))) for label in labels]
        assert all(facts_in(each) for each in truth)
        nets = built()
        fitted = Fitted(TINY, QUICK, nets, {"last": nets.state_dict()}, {}, {"precision": "float32"})
        monkeypatch.setattr(type(TINY), "reports", lambda self, nets, images: truth)
        row = report_rows(fitted, case)[0]
        assert all(row[name] == 1 for name in ("f1", "precision", "recall", "places", "bleu"))
        wrong = [each.replace("small", "LARGE").replace("large", "small").replace("LARGE", "large") for each in truth]
        monkeypatch.setattr(type(TINY), "reports", lambda self, nets, images: wrong)
        row = report_rows(fitted, case)[0]
        assert row["f1"] < 1 and row["places"] == 1 and 0 < row["bleu"] < 1


class TestWriter:
    def test_a_word_sees_none_after_it(self):
        torch.manual_seed(0)
        writer, tokens = Writer(16).eval(), normal(1, 5, 16)
        words = torch.tensor([[STOP, 1, 2, 3, 4]])
        changed = words.clone()
        changed[0, 3:] = 7
        one, other = writer(words, tokens), writer(changed, tokens)
        torch.testing.assert_close(one[:, :3], other[:, :3])
        assert not torch.allclose(one[:, 3:], other[:, 3:])

    def test_the_loss_is_the_mean_over_all_words_and_ends(self):
        torch.manual_seed(0)
        writer, tokens = Writer(16).eval(), normal(2, 5, 16)
        reports = [report_of(VALUES), report_of(())]
        total, count = 0.0, 0
        for number, report in enumerate(reports):
            line = [*(WORDS.index(word.strip(":.")) for word in report.split()), STOP]
            for place, word in enumerate(line):
                before = torch.tensor([[STOP, *line[:place]]])
                total -= writer(before, tokens[number : number + 1])[0, -1].log_softmax(0)[word].item()
                count += 1
        assert writer.loss(reports, tokens).item() == pytest.approx(total / count, rel=1e-5)
        given, wanted = spelt(reports)
        assert given.shape == wanted.shape == (2, 11) and (wanted[1, 3:] == -100).all()

    def test_it_writes_the_most_probable_word_until_it_stops(self):
        writer = Writer(16)
        line = [WORDS.index(word) for word in ["right", "upper", "field", "small", "nodule"]] + [STOP]
        answers = lambda words, tokens: F.one_hot(  # noqa: E731
            torch.tensor([[line[min(k, 5)] for k in range(words.shape[1])]]).expand(len(words), -1), len(WORDS) + 1
        ).float()
        writer.forward = answers
        assert writer.write(torch.zeros(2, 3, 16)) == ["right upper field small nodule"] * 2
        writer.forward = lambda words, tokens: F.one_hot(torch.zeros_like(words) + 2, len(WORDS) + 1).float()
        assert writer.write(torch.zeros(1, 3, 16))[0].split() == ["field"] * MOST

    def test_it_learns_a_report_by_heart(self):
        torch.manual_seed(0)
        writer, tokens = Writer(16), normal(2, 5, 16)
        reports = [report_of(VALUES), report_of((3,))]
        optimiser = torch.optim.Adam(writer.parameters(), 2e-2)
        for _ in range(40):
            optimiser.zero_grad()
            writer.loss(reports, tokens).backward()
            optimiser.step()
        assert [facts_in(report) for report in writer.write(tokens)] == [facts_in(report) for report in reports]


class TestSteps:
    def test_cells_are_named_after_kind_and_size(self):
        labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
        labels[0, 1, 1], labels[0, 6:, 6:], labels[0, 0, 7] = VALUES[0], VALUES[1], IGNORE
        found = named(labels, (4, 4))
        wanted = torch.zeros(4, 4, dtype=torch.int64)
        wanted[0, 0], wanted[3, 3] = 1 + LOOKS.index(("patch", "large")), 1 + LOOKS.index(("nodule", "small"))
        assert torch.equal(found[0], wanted)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_the_encoder_learns_first_and_then_the_rest(self, mixed):
        for now, learns in ((LEARNS, ("encoder", "pretext")), (WRITES, ("tokens", "writer"))):
            nets = built().train()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = TINY.training_step(nets, batch(), None, now)
            loss.backward()
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            for name, weight in nets.named_parameters():
                parts = ("average", "pretext", "encoder", "writer")
                part = next((part for part in parts if part in name.split(".")), "tokens")
                assert (weight.grad is not None and weight.grad.isfinite().all()) == (part in learns), name

    @pytest.mark.parametrize("size", [(32, 32), (48, 64)])
    def test_any_size_and_images_without_regions(self, size):
        nets, given = built().eval(), batch(size)
        for images in (given.images, given.images[:, :1]):
            found = TINY.predict(nets, images)
            assert found.shape == (3, 37, *size) and torch.allclose(found.sum(1), torch.ones(3, *size))

    def test_what_is_predicted_is_what_is_stated(self, monkeypatch):
        monkeypatch.setattr(type(TINY), "reports", lambda self, nets, images: [report_of(VALUES), "no finding."])
        found = TINY.predict({"average": SimpleNamespace(classes=37)}, normal(2, 2, 8, 8))[:, :, 0, 0]
        assert found[0].nonzero()[:, 0].tolist() == sorted([0, *VALUES]) and found[1, 0] == 1

    def test_arms_differ_by_what_is_told_alone(self):
        method, baseline, without = (medregion_ct.ARMS[name] for name in [*recipe.compare, recipe.ablation[1]])
        assert replace(baseline, parts=method.parts) == method == replace(without, shuffled=False)
        shapes = [
            {name: weight.shape for name, weight in built(replace(each, channels=(4, 8))).state_dict().items()}
            for each in (method, without)
        ]
        assert shapes[0] == shapes[1]
