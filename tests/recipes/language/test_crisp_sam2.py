"""Image and name that attend to each other, where the semantics go, a memory of slices, and what refines a mask."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attended import attended, remembered
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import IGNORE
from medcook.language import Question, mask_loss, mean_words, meant
from medcook.methods import Batch, Moment
from medcook.recipes.language import crisp_sam2
from medcook.recipes.language._semantics import Injection, Interaction, SemanticPrompts, places
from medcook.recipes.language._settings import BRAIN, EVERYTHING, NAMES, ToldOfNames
from medcook.recipes.language.crisp_sam2 import CrispNet, CrispSam2, asked_values, overlaps
from medcook.recipes.pretraining._tokens import grid_places, sinusoids

CHANNELS, WIDTH = (4, 6, 8, 10), 16
SMALL = dict(channels=CHANNELS, width=WIDTH)
ASKED = ("left ventricle of the heart", "segment the mandible")


def network(**switches: bool) -> CrispNet:
    torch.manual_seed(0)
    parts = dict(interact=True, memory=True, refine=True) | switches
    return CrispNet(1, CHANNELS, WIDTH, **parts).eval()


def heard(net: CrispNet, said: tuple[str, ...] = ASKED):
    images = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    return net.hear(net.encode(images), said)


@pytest.mark.component("progressive cross-attention interaction")
def test_interaction_is_the_formula_at_both_levels():
    """Each image on its own, without the words that there are not, with PyTorch's attention."""
    torch.manual_seed(0)
    part, maps = Interaction(6, WIDTH), torch.randn(2, 6, 8, 6)
    words, empty = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    empty[1, 3:] = True
    found = part(maps, words, empty)
    assert found.shape == (2, WIDTH, 4, 3)
    for k in range(2):
        v = part.see(F.avg_pool2d(maps[k], 2).flatten(1).T) + sinusoids(grid_places((4, 3)), WIDTH)
        t = words[k, ~empty[k]]
        told = v + attended(part.first["places"], v, t)
        shown = t + attended(part.first["words"], t, v)
        c = part.joint(torch.cat([v, t.mean(0).expand_as(v)], dim=1))
        s = c + attended(part.second["places"], c, told) + attended(part.second["words"], c, shown)
        assert torch.allclose(found[k].flatten(1).T, s, atol=1e-5)


@pytest.mark.component("progressive cross-attention interaction")
def test_semantics_of_a_place_depend_on_all_of_image_and_sentence():
    net = network()
    maps = [torch.randn(2, 4, 24, 24), torch.randn(2, 6, 12, 12, requires_grad=True)]
    scene = net.hear(maps, ASKED)
    (slope,) = torch.autograd.grad(scene.semantics[0, :, 0, 0].square().sum(), maps[-1])
    assert (slope[0].abs().sum(0) > 0).all() and not slope[1].any()
    other = net.hear(maps, (ASKED[1], ASKED[1])).semantics - scene.semantics
    assert (other[0].abs().amax(0) > 1e-4).all() and other[1].abs().max() < 1e-5
    assert other[0].flatten(1).std(1).max() > 1e-3, "not the same at every place"


@pytest.mark.component("progressive cross-attention interaction")
def test_the_ablation_lacks_the_interaction_alone():
    without = crisp_sam2.recipe.arms["without interaction"].method
    assert without == replace(crisp_sam2.recipe.arms["crisp-sam2"].method, interact=False)
    net, whole = network(interact=False), network()
    missing = set(dict(whole.named_parameters())) - set(dict(net.named_parameters()))
    assert missing and all(name.startswith("interaction.") for name in missing)
    assert set(dict(net.named_parameters())) < set(dict(whole.named_parameters()))
    mean = mean_words(*net.text.tokens(ASKED))
    assert torch.allclose(heard(net).semantics, mean[:, :, None, None].expand(-1, -1, 6, 6))
    assert crisp_sam2.recipe.arms["told"].method == ToldOfNames()


@pytest.mark.component("injection into the image encoder")
def test_semantics_are_added_by_a_shared_and_an_own_layer():
    torch.manual_seed(0)
    part, maps, s = Injection(WIDTH, (6, 8)), torch.randn(2, 8, 10, 7), torch.randn(2, WIDTH, 5, 4)
    hidden = F.relu(torch.einsum("bchw,oc->bohw", s, part.shared.weight[..., 0, 0]) + part.shared.bias[:, None, None])
    own = part.own[1]
    added = torch.einsum("bchw,oc->bohw", hidden, own.weight[..., 0, 0]) + own.bias[:, None, None]
    added = nn.Upsample(size=(10, 7), mode="bilinear")(added)
    assert torch.allclose(part(1, maps, s), maps + added, atol=1e-5)


@pytest.mark.component("injection into the image encoder")
def test_a_level_has_heard_before_the_next_descends_from_it():
    net = network()
    images = torch.randn(2, 1, 24, 24)
    scene = net.hear(net.encode(images), ASKED)
    expected = [net.net.down[0](images)]
    expected.append(net.injection(0, net.net.down[1](F.max_pool2d(expected[-1], 2)), scene.semantics))
    for level in (2, 3):
        x = net.net.down[level](F.max_pool2d(expected[-1], 2))
        expected.append(net.injection(level - 1, x, scene.semantics))
    assert len(scene.maps) == 4
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(scene.maps, expected, strict=True))


@pytest.mark.component("injection into the image encoder")
def test_what_an_image_becomes_depends_on_the_sentence_by_injection_alone():
    net = network()
    one, other = heard(net), heard(net, ASKED[::-1])
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(one.maps, other.maps, strict=True)]
    assert same == [True, False, False, False] and not torch.allclose(one.features, other.features, atol=1e-4)
    for layer in net.injection.own:
        nn.init.zeros_(layer.weight)
    assert torch.equal(heard(net).features, heard(net, ASKED[::-1]).features)


@pytest.mark.component("semantic prompting")
def test_prompts_are_made_of_what_features_hear_in_the_semantics():
    torch.manual_seed(0)
    part, e, s = SemanticPrompts(WIDTH), torch.randn(2, WIDTH, 4, 6), torch.randn(2, WIDTH, 4, 6)
    sparse, dense = part(e, s)
    for k in range(2):
        f = attended(part.hear, e[k].flatten(1).T, s[k].flatten(1).T) + sinusoids(grid_places((4, 6)), WIDTH)
        f = f @ part.mix.weight[..., 0, 0].T + part.mix.bias
        both = torch.cat([e[k].flatten(1).T, f], dim=1) @ part.dense.weight[..., 0, 0].T + part.dense.bias
        assert torch.allclose(dense[k].flatten(1).T, both, atol=1e-5)
        pooled = f.unflatten(0, (2, 2, 2, 3)).mean((1, 3)).flatten(0, 1)
        assert torch.allclose(sparse[k], part.sparse(pooled), atol=1e-5)


@pytest.mark.component("semantic prompting")
def test_the_two_way_decoder_gets_these_prompts_and_nothing_else():
    net, given = network(memory=False), []
    scene = heard(net)
    net.two_way.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    net.answer(scene, None)
    sparse, dense = net.prompts(scene.features, scene.semantics)
    tokens, image, codes, _ = given[0]
    assert torch.equal(tokens[:, 0], torch.cat([net.outputs.expand(2, -1, -1), sparse], dim=1))
    assert torch.equal(image, scene.features + dense)
    assert torch.allclose(codes[1].flatten(1).T, sinusoids(grid_places((6, 6)), WIDTH))


@pytest.mark.component("semantic prompting")
def test_prompts_alone_tell_what_is_asked_for():
    """Where the encoder has heard nothing, the semantics still change the answer."""
    net = network(memory=False)
    scene = heard(net)
    found = [net.answer(scene._replace(semantics=s), None).logits for s in (scene.semantics, scene.semantics.flip(0))]
    assert not torch.allclose(*found, atol=1e-4)


@pytest.mark.component("semantic prompting")
def test_a_mask_is_the_product_of_its_token_and_the_features_of_pixels():
    net, seen = network(memory=False), {}
    net.mask.register_forward_hook(lambda _, inputs, output: seen.update(token=inputs[0], weights=output))
    net.two_way.register_forward_hook(lambda _, inputs, output: seen.update(queries=output[0]))
    net.net.up[0].register_forward_hook(lambda _, inputs, output: seen.update(pixels=output))
    found = net.answer(heard(net), None).coarse
    assert torch.equal(seen["token"], seen["queries"][:, 0, 1])
    for k in range(2):
        each = sum(seen["pixels"][k, c] * seen["weights"][k, c] for c in range(4)) / 2 + seen["weights"][k, 4]
        assert torch.allclose(found[k], each, atol=1e-5)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_places_of_a_coarser_grid_lie_in_the_middle_of_what_they_cover():
    assert torch.allclose(places(torch.zeros(4, 6), 8), sinusoids(grid_places((4, 6)), 8))
    wanted = [[r, c] for r in (0.5, 2.5) for c in (1.0, 4.0)]
    assert torch.allclose(places(torch.zeros(4, 6), 8, (2, 2)), sinusoids(torch.tensor(wanted), 8))


def willing(sure: float) -> tuple[CrispSam2, nn.ModuleDict]:
    """A method whose answers are never empty, and whose memory takes in what is at least so sure."""
    torch.manual_seed(0)
    method = CrispSam2(sure=sure, **SMALL)
    nets = method.build(1, 15, 2).eval()
    nets["average"].mask[-1].bias.data[-1] = 1.0
    return method, nets


@pytest.mark.component("similarity-sorting self-updating memory")
def test_slices_are_answered_in_order_and_know_the_answers_before_them():
    images = torch.randn(4, 1, 26, 20)
    with torch.no_grad():
        method, nets = willing(sure=0.0)
        found = method.answer(nets, images, ASKED)
        assert found.shape == (4, 2, 26, 20) and found.min() >= 0 and found.max() <= 1
        assert torch.allclose(method.answer(nets, images[:2], ASKED), found[:2], atol=1e-5)
        assert torch.allclose(method.answer(nets, images, ASKED[1:]), found[:, 1:], atol=1e-5)
        changed = torch.cat([torch.randn(1, 1, 26, 20), images[1:]])
        assert (method.answer(nets, changed, ASKED)[2] - found[2]).abs().max() > 1e-5
        method, nets = willing(sure=1.1)
        alone = torch.cat([method.answer(nets, image[None], ASKED) for image in images])
        assert torch.allclose(method.answer(nets, images, ASKED), alone, atol=1e-5)
        assert torch.allclose(alone[0], found[0], atol=1e-5) and not torch.allclose(alone[3], found[3], atol=1e-5)
    assert method.answer(nets, images, ()).shape == (4, 0, 26, 20)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_the_memory_that_a_slice_attends_to_is_sorted_for_it():
    method, nets = willing(sure=0.0)
    net, given, images = nets["average"], [], torch.randn(7, 1, 24, 24)
    net.memory.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    with torch.no_grad():
        method.answer(nets, images, ASKED)
        looks = net.looks(net.encode(images))
    assert [memory.there.sum(1).tolist() for memory in given] == [[k, k] for k in (0, 1, 2, 3, 4, 4, 4)]
    for look, memory in zip(looks, given, strict=True):
        for kept, there in zip(memory.looks, memory.there, strict=True):
            cosine = F.cosine_similarity(look.flatten(), kept[there].flatten(1), dim=1)
            assert torch.equal(cosine, cosine.sort(descending=True).values)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_an_empty_answer_is_no_memory():
    method, nets = willing(sure=0.0)
    nets["average"].mask[-1].bias.data[-1] = -1e4
    images = torch.randn(3, 1, 24, 24)
    with torch.no_grad():
        alone = torch.cat([method.answer(nets, image[None], ASKED) for image in images])
        assert torch.equal(method.answer(nets, images, ASKED), alone)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_in_training_mates_and_their_true_masks_are_the_memory():
    torch.manual_seed(0)
    labels = torch.zeros(4, 12, 12, dtype=torch.uint8)
    labels[0, :4], labels[1, 3:9, 2:7], labels[2, 6:, 5:], labels[3, :, 0] = 1, 1, 1, 2
    data, looks = Batch(torch.randn(4, 1, 12, 12), labels, groups=torch.zeros(4).long()), torch.randn(4, 6, 3, 3)
    questions = [Question(NAMES[0], (1,)), Question(NAMES[0], ()), Question(NAMES[2], ()), Question("anything", ())]
    assert asked_values(EVERYTHING, questions) == [1, 1, 3, 0]
    memory = CrispSam2(forget=0.0).borrowed(looks, data, questions)
    assert memory.there.sum(1).tolist() == [2, 2, 0, 0]
    order = sorted((1, 2), key=lambda j: -F.cosine_similarity(looks[0].flatten(), looks[j].flatten(), dim=0))
    for place, mate in enumerate(order):
        assert torch.equal(memory.looks[0, place], looks[mate])
        assert torch.equal(memory.masks[0, place], (labels[mate] == 1).float())
    assert not CrispSam2(forget=1.0).borrowed(looks, data, questions).there.any()


@pytest.mark.component("similarity-sorting self-updating memory")
def test_overlap_is_intersection_over_union_of_what_is_known():
    torch.manual_seed(0)
    logits, masks = torch.randn(4, 6, 6), torch.randint(0, 2, (4, 6, 6)).byte()
    masks[0, :3] = IGNORE
    masks[2], logits[2] = 0, -1.0
    masks[3] = 0
    for k, value in enumerate(overlaps(logits, masks).tolist()):
        cells = [(logits[k, r, c] > 0, masks[k, r, c] == 1) for r in range(6) for c in range(6) if masks[k, r, c] < 2]
        both, either = sum(bool(a and b) for a, b in cells), sum(bool(a or b) for a, b in cells)
        assert value == pytest.approx(both / either if either else 1.0)


@pytest.mark.component("mask refining")
def test_a_residual_is_added_to_the_coarse_mask():
    net, seen = network(memory=False), {}
    net.net.up[0].register_forward_hook(lambda _, inputs, output: seen.update(pixels=output))
    net.correct.register_forward_hook(lambda _, inputs, output: seen.update(token=inputs[0], weights=output))
    net.two_way.register_forward_hook(lambda _, inputs, output: seen.update(queries=output[0]))
    found = net.answer(heard(net), None)
    assert torch.equal(seen["token"], seen["queries"][:, 0, 2]), "a token of its own"
    both = torch.cat([seen["pixels"], found.coarse.sigmoid()[:, None]], dim=1)
    detail = F.relu(F.conv2d(both, net.detail.weight, net.detail.bias, padding=1))
    more = sum(detail[:, c] * seen["weights"][:, c, None, None] for c in range(4)) / 2
    assert torch.allclose(found.logits, found.coarse + more, atol=1e-5) and more.abs().max() > 1e-3
    plain = network(refine=False)
    again = plain.answer(heard(plain), remembered())
    assert torch.equal(again.coarse, again.logits)


@pytest.mark.component("mask refining")
def test_both_masks_are_learned_and_how_good_they_are():
    torch.manual_seed(0)
    method = CrispSam2(memory=False, absent=0.0, **SMALL)
    nets = method.build(1, 3, 2).eval()
    data = Batch(torch.randn(3, 1, 24, 24), torch.randint(0, 3, (3, 24, 24)).byte())
    torch.manual_seed(1)
    loss = method.training_step(nets, data, None, Moment(0, 10))
    torch.manual_seed(1)
    questions = method.questions(data)
    net, masks = nets["model"], meant(data.labels, questions)
    found = net.answer(net.hear(net.encode(data.images), tuple(q.sentence for q in questions)), None)
    halves = [mask_loss(each, masks, True) for each in (found.coarse, found.logits)]
    assert not torch.allclose(*halves)
    error = sum(abs(one - two) for one, two in zip(found.expected, overlaps(found.logits, masks), strict=True)) / 3
    assert torch.allclose(loss, sum(halves) / 2 + 0.1 * error, atol=1e-5)


@pytest.mark.parametrize("switches", [{}, {"interact": False}, {"memory": False}, {"refine": False}])
@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_every_parameter_is_trained_at_any_size(switches, size):
    method = CrispSam2(channels=(4, 8, 8, 8, 8), width=16, language=BRAIN, absent=0.0, forget=0.0, **switches)
    assert_every_parameter_is_trained(method, size)


def test_another_memory_is_another_answer():
    net = network()
    scene, memory = heard(net), remembered()
    found = net.answer(scene, memory).logits
    assert not torch.allclose(net.answer(scene, memory._replace(there=memory.there & False)).logits, found, atol=1e-5)
    assert not net.looks(net.encode(torch.randn(2, 1, 24, 24))).requires_grad
