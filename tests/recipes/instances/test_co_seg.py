"""Co-Seg++: prompts made of maps, the decoder, who prompts whom, HoVer-Net's maps, and the losses."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from medcook.losses import cross_entropy, soft_dice
from medcook.measures.instances import quality
from medcook.methods import Batch, Moment
from medcook.recipes.instances import _centroids, _prompted, co_seg
from medcook.recipes.instances._slides import CLASSES
from medcook.recipes.instances.co_seg import Answers, CoNet, CoSeg, recipe

NOW = Moment(0, 10)
ARMS = {name: arm.method for name, arm in recipe.arms.items()}
TINY = dict(channels=(4, 4, 8, 8, 8), width=8)


@pytest.fixture
def crowd() -> np.ndarray:
    """(64, 64): three discs that touch, and a rectangle alone."""
    rows, columns = np.indices((64, 64))
    sections = np.zeros((64, 64), np.uint8)
    for number, (row, column) in enumerate([(20, 18), (20, 38), (38, 28)], 1):
        sections[(np.hypot(rows - row, columns - column) < 11) & (sections == 0)] = number
    sections[54:62, 40:60] = 4
    return sections


def maps_of(sections: np.ndarray) -> np.ndarray:
    return _centroids.directions(torch.from_numpy(sections)[None])[0].numpy()


@pytest.mark.component("instances by HoVer-Net's maps")
def test_directions_go_from_minus_one_to_one_in_every_instance(crowd):
    maps = maps_of(crowd)
    assert not maps[:, crowd == 0].any()
    for number in (1, 2, 3, 4):
        places = np.argwhere(crowd == number)
        away = places - places.mean(0)
        scaled = np.where(away < 0, away / -away.min(0), away / away.max(0))
        assert np.allclose(maps[:, crowd == number].T, scaled, atol=1e-5)


@pytest.mark.component("instances by HoVer-Net's maps")
def test_instances_are_what_maps_say(crowd):
    rng, maps = np.random.default_rng(0), maps_of(crowd)
    for noise in (0.0, 0.15):
        found = _centroids.by_directions(crowd > 0, maps + noise * rng.standard_normal(maps.shape))
        assert found.max() == 4 and quality(found, crowd).panoptic > 0.95
        assert np.array_equal(found > 0, crowd > 0)
    assert ndimage.label(crowd > 0)[1] == 2, "parts alone miscount"
    assert _centroids.by_directions(crowd > 0, 0 * maps).max() == 2, "without slopes every part is one"
    assert not _centroids.by_directions(crowd > 9, maps).any()


@pytest.mark.component("instances by HoVer-Net's maps")
def test_slopes_are_those_of_the_kernel_and_the_loss_looks_at_them(crowd):
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    down, right = _centroids.slopes(torch.stack([3 * rows, 5 * columns])[None])[0, :, 2:-2, 2:-2]
    each = sum(row**2 / (row**2 + column**2) for row in range(-2, 3) for column in range(-2, 3) if row or column)
    assert torch.allclose(down, torch.full_like(down, 3 * each)) and torch.allclose(
        right, torch.full_like(right, 5 * each)
    )
    assert _centroids.slopes(torch.stack([columns, rows])[None])[0, :, 2:-2, 2:-2].abs().max() < 1e-5
    truth, inside = torch.from_numpy(maps_of(crowd))[None], torch.from_numpy(crowd)[None] > 0
    error = torch.randn(1, 2, 64, 64)
    slopes = _centroids.slopes(error).square()[:, :, inside[0]].mean()
    expected = 8 * error.square().mean() + 2.5 * slopes
    assert torch.isclose(_centroids.direction_loss(truth + error, truth, inside), expected, rtol=1e-4)


@pytest.mark.component("prompt encoder")
def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    one, other = torch.randn(8), torch.randn(8)
    size = (5, 6)
    a, b = (_prompted.rotated(token.expand(1, 30, 8), size)[0].view(5, 6, 8) for token in (one, other))
    assert torch.allclose(a.norm(dim=2), one.norm().expand(5, 6)) and torch.equal(a[0, 0], one)
    assert torch.isclose(a[1, 2] @ b[3, 1], a[0, 3] @ b[2, 2], atol=1e-5)
    assert not torch.isclose(a[1, 2] @ b[3, 1], a[1, 2] @ b[3, 2], atol=1e-3)
    assert not torch.isclose(a[1, 2] @ b[3, 1], a[1, 2] @ b[2, 1], atol=1e-3)


@pytest.mark.component("prompt encoder")
def test_places_attend_to_each_other_by_softmax():
    torch.manual_seed(0)
    attend, x, y = _prompted.Attend(8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    normed = attend.norm(x)
    for other, source in ((y, y), (None, normed)):
        key, value = attend.offer(source).chunk(2, dim=-1)
        asked, offered = (_prompted.rotated(each, (2, 3)) for each in (attend.ask(normed), key))
        expected = attend.out(F.scaled_dot_product_attention(asked, offered, value))
        assert torch.allclose(attend(x, other, (2, 3)), expected, atol=1e-5)


@pytest.mark.component("prompt encoder")
def test_the_scan_reads_in_order():
    torch.manual_seed(0)
    scan, x = _prompted.Scan(8), torch.randn(1, 12, 8)
    changed = x.clone()
    changed[:, 6] += 1
    moved = (scan(changed) - scan(x)).abs().amax((0, 2)) > 1e-7
    assert not moved[:5].any() and moved[5:].all(), "one token ahead is seen by the convolution"


@pytest.mark.component("prompt encoder")
def test_a_prompt_hears_of_its_maps_and_of_the_image():
    torch.manual_seed(0)
    encoder, maps, embedding = _prompted.PromptEncoder(3, 8), torch.rand(2, 3, 32, 48), torch.randn(2, 8, 4, 6)
    prompt = encoder(maps, embedding)
    assert prompt.shape == embedding.shape
    for altered in (encoder(maps.flip(3), embedding), encoder(maps, embedding.flip(3))):
        assert (prompt - altered).abs().amax((0, 1)).min() > 1e-6, "every place hears of every other"
    nothing = encoder(None, embedding)
    assert nothing.shape == embedding.shape and torch.equal(nothing[0, :, 0, 0], nothing[1, :, 3, 5])


@pytest.mark.component("collaborative decoder")
def test_masks_are_products_of_tokens_and_features():
    torch.manual_seed(0)
    decoder = _prompted.Decoder(3, 8, (4, 6))
    embedding, prompt = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    skips = [torch.randn(2, 4, 16, 16), torch.randn(2, 6, 8, 8)]
    features = []
    decoder.norms[0].register_forward_hook(lambda module, inputs, output: features.append(output.relu()))
    weights = []
    decoder.masks.register_forward_hook(lambda module, inputs, output: weights.append(output))
    logits, summary = decoder(embedding, prompt, skips, second=True)
    fine = (decoder.up[1](features[0]) + skips[0]).relu()
    expected = torch.einsum("bkc,bchw->bkhw", weights[0][..., :-1], fine) / 2 + weights[0][..., -1, None, None]
    assert torch.allclose(logits, expected, atol=1e-5) and summary.shape == (2, 2, 4, 4)
    same, _ = decoder(embedding + prompt, torch.zeros_like(prompt), skips, second=True)
    assert torch.allclose(logits, same, atol=1e-5), "a prompt is added to the embedding"
    first, _ = decoder(embedding, prompt, skips, second=False)
    assert not torch.allclose(logits, first, atol=1e-3), "each pass has tokens of its own"


def net(prompts: str, shared: bool = True) -> CoNet:
    torch.manual_seed(0)
    return CoNet(3, TINY["channels"], TINY["width"], shared, prompts).eval()


@pytest.mark.component("mutual prompts")
@pytest.mark.component("ablation")
@pytest.mark.parametrize(
    ("prompts", "semantic_hears", "instance_hears"),
    [("mutual", {1}, {0}), ("own", {0}, {1}), ("to instances", {0}, {0})],
)
def test_who_prompts_whom(prompts, semantic_hears, instance_hears):
    """The last answers, by which decoder's first tokens move them."""
    model, images = net(prompts), torch.randn(1, 3, 32, 32)
    first, second = model(images)
    heard = {"semantic": set(), "instance": set()}
    for source in (0, 1):
        with torch.no_grad():
            kept = model.decoders[source].tokens.clone()
            model.decoders[source].tokens[0] += 1
            altered_first, altered = model(images)
            model.decoders[source].tokens.copy_(kept)
        assert not torch.allclose(altered_first[source], first[source]) and torch.equal(
            altered_first[1 - source], first[1 - source]
        )
        for name in heard:
            if not torch.allclose(getattr(altered, name), getattr(second, name), atol=1e-6):
                heard[name].add(source)
    assert heard == {"semantic": semantic_hears, "instance": instance_hears}


@pytest.mark.component("mutual prompts")
def test_prompts_are_probabilities_and_ways():
    model, images, given = net("mutual"), torch.randn(2, 3, 32, 32), {}
    for number, name in enumerate(("to semantic", "to instance")):
        model.prompts[number].shrink.register_forward_hook(
            lambda module, inputs, output, name=name: given.update({name: inputs[0]})
        )
    first, second = model(images)
    assert torch.allclose(given["to instance"], first.semantic.softmax(1))
    assert torch.allclose(given["to semantic"][:, 0], first.instance[:, 0].sigmoid())
    assert torch.equal(given["to semantic"][:, 1:], first.instance[:, 1:])
    assert second.semantic.shape == (2, CLASSES, 32, 32) and second.instance.shape == (2, 3, 32, 32)


@pytest.mark.component("separate networks")
def test_separate_networks_share_nothing_and_do_not_hear_of_each_other():
    model = replace(ARMS["separate networks"], **TINY).build(3, CLASSES, 2)["model"]
    first, second = model(torch.randn(2, 3, 32, 32))
    reached = []
    for answer in (second.semantic, second.instance):
        model.zero_grad()
        answer.sum().backward(retain_graph=True)
        reached.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert not reached[0] & reached[1] and len(model.encoders) == 2
    assert ARMS["separate networks"].agree == 0 and len(net("mutual").encoders) == 1


@pytest.mark.component("agreement of the decoders")
def test_disagreement_is_the_symmetric_divergence():
    torch.manual_seed(0)
    one, other = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    pairs = ((one, other), (other, one))
    each = [F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").mean() for a, b in pairs]
    assert torch.isclose(co_seg.disagreement(one, other), sum(each) / 2)
    assert co_seg.disagreement(one, one + 3) < 1e-7 < co_seg.disagreement(one, other)


def batch(crowd: np.ndarray) -> Batch:
    sections = torch.from_numpy(crowd)[None].expand(2, -1, -1)
    labels = (sections > 0).byte()
    labels[:, 15:25], labels[:, 35:40] = 2 * labels[:, 15:25], 3 * labels[:, 35:40]
    return Batch(torch.randn(2, 3, 64, 64), labels, raters=sections[:, None])


@pytest.mark.component("agreement of the decoders")
@pytest.mark.component("mutual prompts")
def test_the_loss_is_the_formula(crowd):
    torch.manual_seed(0)
    data, method = batch(crowd), CoSeg(**TINY)
    nets = method.build(3, CLASSES, 2).eval()
    truth, inside = torch.from_numpy(maps_of(crowd)).expand(2, -1, -1, -1), data.raters[:, 0] > 0
    terms = []
    for answers in nets["model"](data.images):
        semantic = cross_entropy(answers.semantic, data.labels) + soft_dice(answers.semantic, data.labels)
        fore = answers.instance[:, 0]
        soft = fore.sigmoid()
        dice = 1 - (2 * (soft * inside).sum() + 1) / (soft.sum() + inside.sum() + 1)
        mask = F.binary_cross_entropy_with_logits(fore, inside.float()) + dice
        terms += [semantic, mask + _centroids.direction_loss(answers.instance[:, 1:], truth, inside)]
    first = nets["model"](data.images)[0]
    expected = terms[2] / 2 + terms[3] + (terms[0] + terms[1] + 10 * co_seg.disagreement(*first.summaries)) / 2
    assert torch.isclose(method.training_step(nets, data, None, NOW), expected, rtol=1e-4)
    alone = replace(method, agree=0.0).training_step(nets, data, None, NOW)
    assert torch.isclose(expected - alone, 5 * co_seg.disagreement(*first.summaries), rtol=1e-2)
    one = data._replace(raters=(data.raters > 0).byte())
    untold = method.training_step(nets, data._replace(raters=None), None, NOW)
    assert torch.isclose(untold, method.training_step(nets, one, None, NOW))


@pytest.mark.component("ablation")
def test_arms_differ_in_whose_answers_are_prompts():
    method = ARMS["co-seg++"]
    assert method.prompts == "mutual" and method.shared
    assert ARMS["own prompts"] == replace(method, prompts="own")
    assert ARMS["prompts to instances"] == replace(method, prompts="to instances")
    assert ARMS["separate networks"] == replace(method, prompts="own", shared=False, agree=0.0)


class Told(nn.Module):
    """A network whose second answer is told, one image after the other."""

    def __init__(self, kinds: list[np.ndarray], sections: list[np.ndarray]):
        super().__init__()
        self.kinds, self.sections, self.asked = kinds, sections, -1

    def forward(self, images):
        self.asked = (self.asked + 1) % len(self.kinds)
        kind, section = (torch.from_numpy(part[self.asked]).long()[None] for part in (self.kinds, self.sections))
        maps = torch.from_numpy(maps_of(self.sections[self.asked]))[None]
        semantic = 9 * F.one_hot(kind, CLASSES).movedim(-1, 1).float()
        fore = torch.where(section > 0, 9.0, -9.0)
        return None, Answers(semantic, torch.cat([fore[:, None], maps], 1), (None, None))


@pytest.mark.component("semantic, instance and panoptic quality")
def test_rows_tell_semantic_instance_and_panoptic_quality(crowd):
    kinds = batch(crowd).labels[0].numpy()
    labels = torch.from_numpy(kinds + CLASSES * crowd)[None].repeat(3, 1, 1)
    wrong = np.where(kinds == 2, 1, kinds)
    merged = np.where(crowd == 4, 4, (crowd > 0) * 1).astype(np.uint8)
    nets = nn.ModuleDict({"average": Told([kinds, wrong, kinds], [crowd, crowd, merged])})
    preparation = SimpleNamespace(images=lambda case: torch.zeros(3, 3, 64, 64), labels=lambda case: labels)
    fitted = SimpleNamespace(
        nets=nets, weights={"last": {}}, method=CoSeg(), task=SimpleNamespace(preparation=preparation)
    )
    right, mistaken, joined = co_seg.crowd_rows(fitted, SimpleNamespace(case_id="a", patient_id="a"))
    assert right["pq"] > 0.9 and right["dice"] == 1 and right["aji"] > 0.95 and right["counted"] == 4
    assert mistaken["aji"] == right["aji"] and mistaken["pq sections"] == right["pq sections"]
    values = [quality(*(np.where(k == v, crowd, 0) for k in (wrong, kinds))).panoptic for v in (1, 2, 3)]
    assert mistaken["pq"] == pytest.approx(np.mean(values), abs=0.03) and values[1] == 0
    assert mistaken["dice"] == pytest.approx(
        (2 * (kinds == 1).sum() / ((kinds == 1).sum() + (wrong == 1).sum()) + 1) / 3
    )
    assert joined["dice"] == 1 and joined["counted"] == 2 and joined["dq sections"] == pytest.approx(2 / 6)
    assert joined["pq"] < 0.6 and joined["sections"] == 4
    assert right.keys() == mistaken.keys() == joined.keys()
    preparation.images = lambda case: torch.zeros(0, 3, 64, 64)
    assert co_seg.crowd_rows(fitted, SimpleNamespace(case_id="a", patient_id="a")) == []


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
@pytest.mark.parametrize("arm", ["co-seg++", "separate networks"])
def test_every_parameter_is_trained_at_any_size(size, arm):
    torch.manual_seed(0)
    method = replace(ARMS[arm], **TINY)
    nets = method.build(3, CLASSES, 2).train()
    labels = torch.randint(0, CLASSES, (2, *size)).byte()
    for enabled in (False, True):
        nets.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = method.training_step(nets, Batch(torch.randn(2, 3, *size), labels), None, NOW)
        loss.backward()
        got = {name for name, p in nets["model"].named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        rest = {name for name, _ in nets["model"].named_parameters()} - got
        assert all("summary" in name for name in rest) and (rest == set() or arm == "separate networks")
    assert method.predict(nets.eval(), torch.randn(2, 3, *size)).shape == (2, CLASSES, *size)
