"""Names as queries, what is known of them, and specialists of each set."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import IGNORE
from medcook.language import LONGEST, TextEncoder, words_of
from medcook.methods import Batch, Moment
from medcook.recipes.language import _knowledge as knowledge
from medcook.recipes.language import sat
from medcook.recipes.language._queries import QueriedUNet, dotted, sheet, sheet_loss, values_of
from medcook.recipes.language._settings import BRAIN, EVERYTHING, NAMES
from medcook.recipes.language.sat import Sat, Specialists

SMALL = dict(channels=(4, 6, 8), width=16)
NOW = Moment(1, 10)


def network(size: int = 16) -> QueriedUNet:
    torch.manual_seed(0)
    return QueriedUNet(1, (4, 6, 8), size, 2)


def batch(groups: list[int], **there: list[int]) -> Batch:
    """Images of these sets; `there` is {imageK: label values in it}, each a block of four rows."""
    torch.manual_seed(1)
    labels = torch.zeros(len(groups), 24, 24, dtype=torch.uint8)
    for name, values in there.items():
        for place, value in enumerate(values):
            labels[int(name[-1]), 4 * place : 4 * place + 4] = value
    return Batch(torch.randn(len(groups), 1, 24, 24), labels, groups=torch.tensor(groups))


@pytest.mark.component("knowledge in the text encoder")
def test_facts_are_about_all_structures_and_are_read_to_their_end():
    assert set(knowledge.SAID) == {*filter(None, NAMES), *BRAIN.names}
    assert {one for one, _, _ in knowledge.LIES} | {other for *_, other in knowledge.LIES} <= set(knowledge.SAID)
    for texts in knowledge.facts():
        assert all(words_of(text) for text in texts)
        assert all(len(text.split()) <= LONGEST for text in texts)


@pytest.mark.component("knowledge in the text encoder")
def test_the_loss_of_knowledge_against_a_loop():
    """Every text is told from all others' partners; partners that mean the same structure share."""
    torch.manual_seed(0)
    text, known = TextEncoder(16), knowledge.facts()[:5] + knowledge.facts()[-6:]
    left, right = (F.normalize(text([fact[k] for fact in known]), dim=1) for k in (0, 1))
    total = 0.0
    for one, other in ((left, right), (right, left)):
        for row in range(len(known)):
            logs = (one[row] @ other.T / 0.1).log_softmax(0)
            same = [column for column in range(len(known)) if known[column][2] == known[row][2]]
            total -= logs[same].mean() / len(known) / 2
    assert torch.allclose(knowledge.knowledge_loss(text, known), total, atol=1e-5)


@pytest.mark.component("knowledge in the text encoder")
def test_a_taught_encoder_knows_which_name_belongs_to_a_definition():
    torch.manual_seed(0)
    text = TextEncoder(32)
    names = list(knowledge.SAID)
    told = [knowledge.SAID[name][1] for name in names]

    def right() -> int:
        with torch.no_grad():
            near = F.normalize(text(told), dim=1) @ F.normalize(text(names), dim=1).T
        return int((near.argmax(1) == torch.arange(len(names))).sum())

    before = right()
    knowledge.teach(text, 25)
    assert before < 8 and right() >= 15
    assert all(parameter.grad is None for parameter in text.parameters())


@pytest.mark.component("knowledge in the text encoder")
def test_it_is_taught_before_the_first_image_and_never_again():
    data = batch([0, 1], image0=[1, 2], image1=[4])
    for method, step, changed in (
        (Sat(**SMALL), 0, True),
        (Sat(**SMALL), 1, False),
        (Sat(taught=0, **SMALL), 0, False),
    ):
        torch.manual_seed(0)
        nets = method.build(1, 18, 2)
        before = nets["model"].text.words.weight.clone()
        method.training_step(nets, data, None, Moment(step, 10))
        assert (not torch.equal(nets["model"].text.words.weight, before)) == changed


@pytest.mark.component("queries over features of every scale")
def test_tokens_are_means_over_every_scale_at_the_places_of_the_deepest():
    net, images = network(), torch.randn(2, 1, 24, 32)
    maps = net.encode(images)
    pooled = torch.cat([F.avg_pool2d(each, 2 ** (2 - k)) if k < 2 else each for k, each in enumerate(maps)], dim=1)
    tokens = net.gather(pooled.flatten(2).mT)
    scene = net.scene(maps)
    assert scene.shape == (2, 6 * 8, 16)
    apart = scene - tokens  # where they are: the same for every image, another at every place
    assert torch.allclose(apart[0], apart[1], atol=1e-5) and len(apart[0].round(decimals=3).unique(dim=0)) == 48


@pytest.mark.component("queries over features of every scale")
def test_what_a_query_becomes_depends_on_the_image_and_not_on_what_fills_up():
    net = network()
    queries = torch.randn(2, 3, 16)
    nobody = torch.tensor([[False, False, True]] * 2)
    images = torch.randn(2, 1, 24, 24)
    with torch.no_grad():
        maps = net.encode(images)
        found = net.ask(maps, queries, nobody)
        assert torch.allclose(net.ask(maps, queries[:, :2], nobody[:, :2]), found[:, :2], atol=1e-5)
        other = net.ask(net.encode(images.flip(0)), queries, nobody)
        assert torch.allclose(other.flip(0)[:, :2], net.ask(maps, queries.flip(0), nobody)[:, :2], atol=1e-5)
        assert not torch.allclose(other[:, :2], found[:, :2], atol=1e-3)


@pytest.mark.component("a mask for every term at once")
def test_a_mask_is_the_product_of_pixels_and_what_the_query_has_become():
    pixels, weights = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5)
    found = dotted(pixels, weights)
    for b in range(2):
        for s in range(3):
            mine = sum(pixels[b, c] * weights[b, s, c] for c in range(4)) / 2 + weights[b, s, 4]
            assert torch.allclose(found[b, s], mine, atol=1e-5)


@pytest.mark.component("a mask for every term at once")
def test_masks_come_in_the_order_of_the_names_and_the_image_is_looked_at_once():
    torch.manual_seed(0)
    method = Sat(**SMALL)
    nets, images = method.build(1, 18, 2).eval(), torch.randn(2, 1, 22, 30)
    seen = []
    nets["average"].net.down[0].register_forward_hook(lambda *_: seen.append(1))
    names = tuple(EVERYTHING.name(value) for value in (1, 2, 3))
    with torch.no_grad():
        found = method.answer(nets, images, names)
        assert found.shape == (2, 3, 22, 30) and len(seen) == 1
        assert torch.allclose(method.answer(nets, images, names[::-1]).flip(1), found, atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1 and found.std(1).mean() > 0


@pytest.mark.component("a mask for every term at once")
def test_every_name_of_the_set_is_asked_and_what_is_unknown_teaches_nothing():
    lungs = 1 + NAMES.index("lungs")
    data = batch([0, 2, 3], image0=[1, 3], image1=[7, 12], image2=[])
    values, known = sheet(EVERYTHING, data)
    assert values.tolist() == [[1, 2, 3, 0, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12], [lungs, 0, 0, 0, 0, 0, 0]]
    assert known.int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]]
    assert values_of(BRAIN, None) == (1, 2, 3) and values_of(EVERYTHING, None) == (1, 2, 3)
    logits = torch.randn(3, 7, 24, 24, requires_grad=True)
    data.labels[0, :2] = IGNORE
    loss = sheet_loss(logits, data.labels, values, known)
    (slope,) = torch.autograd.grad(loss, logits)
    assert torch.equal(slope.abs().sum((2, 3)) > 0, known) and not slope[0, :, :2].any()
    terms = []
    for image, place in known.nonzero().tolist():
        truth = data.labels[image, 2 if image == 0 else 0 :] == values[image, place]
        found = logits[image, place, 2 if image == 0 else 0 :].sigmoid()
        dice = (2 * found[truth].sum() + 1) / (found.sum() + truth.sum() + 1)
        terms.append((1 - dice, F.binary_cross_entropy(found, truth.float(), reduction="sum"), truth.numel()))
    dices, entropies, counts = zip(*terms, strict=True)
    assert torch.allclose(loss, sum(dices) / len(dices) + sum(entropies) / sum(counts), atol=1e-5)
    assert sheet_loss(logits, data.labels, values, known & False) == 0


@pytest.mark.component("specialists")
def test_a_specialist_learns_from_its_own_set_and_answers_for_it():
    torch.manual_seed(0)
    method = Specialists(**SMALL)
    nets = method.build(1, 18, 2)
    assert [net.head.out_channels for net in nets["model"].nets] == [3, 2, 7, 1, 1]
    method.training_step(nets, batch([0, 3, 3], image0=[1], image1=[1 + NAMES.index("lungs")]), None, NOW).backward()
    slopes = [next(net.parameters()).grad for net in nets["model"].nets]
    assert [slope is not None and bool(slope.abs().sum() > 0) for slope in slopes] == [True, False, False, True, False]
    nets.eval()
    images, net = torch.randn(2, 1, 24, 24), nets["average"]
    with torch.no_grad():
        found = method.answer(nets, images, ("posterior hippocampus", "a unicorn", "lungs", "anterior hippocampus"))
        assert torch.allclose(found[:, [3, 0]], net.nets[1](images).sigmoid(), atol=1e-6)
        assert torch.allclose(found[:, 2:3], net.nets[3](images).sigmoid(), atol=1e-6) and not found[:, 1].any()


@pytest.mark.component("specialists")
def test_specialists_have_the_loss_of_one_model():
    """With the same logits for every structure the loss is the same."""
    method, one = Specialists(**SMALL), Sat(**SMALL)
    data = batch([1, 2, 0], image0=[4], image1=[8, 9], image2=[1, 2])
    nets, single = method.build(1, 18, 2), one.build(1, 18, 2)
    for net in nets["model"].nets:
        nn.init.zeros_(net.head.weight), nn.init.constant_(net.head.bias, 0.3)
    last = single["model"].mask[-1]
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    last.bias.data[-1] = 0.3
    theirs, mine = (m.training_step(n, data, None, NOW) for m, n in ((method, nets), (one, single)))
    assert torch.allclose(theirs, mine, atol=1e-5)


@pytest.mark.parametrize("method", [Sat(language=BRAIN, **SMALL), Specialists(language=BRAIN, **SMALL)])
def test_all_of_it_is_trained_on_images_of_any_size(method):
    assert_every_parameter_is_trained(method, (30, 45))


def test_the_ablation_takes_the_knowledge_away_and_nothing_else():
    arms = {name: arm.method for name, arm in sat.recipe.arms.items()}
    assert arms["without knowledge"] == replace(arms["one model"], taught=0)
