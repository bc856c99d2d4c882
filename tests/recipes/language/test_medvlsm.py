"""Prompts in degrees, the network that hears them, and what the score asks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import Case
from medcook.language import LONGEST, Names, words_of
from medcook.methods import Batch, Moment
from medcook.methods.frozen import PHOTOGRAPH
from medcook.recipes.language import medvlsm
from medcook.recipes.language._attributes import WORDS, anything, described, prompt, showing, wrong
from medcook.recipes.language.medvlsm import BRAINS, NOTHING, ClipSeg, Photographs, Small, Vlsm, prompted_rows

SETTINGS = dict(language=BRAINS, encoder="small", width=16)


def ellipse(down: float, across: float, height: float, width: float, side: int = 64) -> np.ndarray:
    rows, columns = np.indices((side, side))
    return ((rows - down) / height) ** 2 + ((columns - across) / width) ** 2 <= 1


@pytest.mark.component("prompts in degrees")
def test_what_is_said_of_a_mask_is_true():
    disc = ellipse(10, 50, 4, 4)
    assert described(disc) == {"number": "one", "size": "small", "shape": "round", "place": "top right"}
    bar = ellipse(32, 30, 5, 20)
    assert described(bar) == {"number": "one", "size": "medium", "shape": "elongated", "place": "middle center"}
    two = ellipse(50, 12, 12, 10) | ellipse(50, 40, 12, 10)
    assert described(two) == {"number": "two", "size": "large", "shape": "round", "place": "bottom center"}
    crescent = ellipse(32, 20, 14, 14) & ~ellipse(32, 25, 14, 14)
    assert described(crescent)["shape"] == "irregular"
    assert described(disc | ellipse(40, 10, 2, 2) | ellipse(55, 30, 2, 2))["number"] == "several"
    assert all(word in WORDS[what] for mask in (disc, bar, two, crescent) for what, word in described(mask).items())


@pytest.mark.component("prompts in degrees")
def test_a_prompt_says_it_all_and_is_read_to_its_end():
    words = described(ellipse(10, 50, 4, 4))
    assert prompt("larynx", words) == "one small round larynx located in the top right of the image"
    assert prompt("larynx", None) == "larynx"
    longest = max(medvlsm.PLAIN.names, key=lambda name: len(name.split()))
    assert len(prompt(longest, words).split()) <= LONGEST and words_of(prompt(longest, words))[-1] == "image"


@pytest.mark.component("comparison with image-only models")
@pytest.mark.component("prompts in degrees")
def test_each_degree_asks_as_much_as_it_should():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[torch.from_numpy(ellipse(10, 50, 4, 4))] = 2
    label[40, 40:44] = 1  # too small
    batch = Batch(torch.randn(1, 1, 64, 64), label[None])
    asked = {said: Vlsm(said=said, **SETTINGS).questions(batch)[0] for said in ("nothing", "name", "all")}
    assert asked["nothing"] == (NOTHING, (2,)) and asked["name"] == ("white matter", (2,))
    assert asked["all"] == ("one small round white matter located in the top right of the image", (2,))
    torch.manual_seed(0)
    nobody = Vlsm(said="all", **SETTINGS).questions(Batch(batch.images, batch.labels * 0))[0]
    assert nobody.values == () and len(words_of(nobody.sentence)) > 10
    both = label.clone()
    both[50:60, 5:15] = 1
    assert Vlsm(said="nothing", **SETTINGS).questions(Batch(batch.images, both[None]))[0].values == (1, 2)


@pytest.mark.component("are words used at all")
def test_wrong_words_are_words_and_all_wrong():
    for seed in range(20):
        torch.manual_seed(seed)
        true = anything()
        false = wrong(true)
        assert true.keys() == false.keys() and all(false[what] in WORDS[what] for what in true)
        assert not any(true[what] == false[what] for what in true)


def test_slices_are_spread_over_those_that_show_enough():
    masks = torch.zeros(9, 8, 8, dtype=torch.bool)
    masks[[1, 2, 4, 5, 7], :2, :4] = True
    masks[8, 0, :7] = True
    assert showing(masks, 3).tolist() == [1, 4, 7] and showing(masks, 9).tolist() == [1, 2, 4, 5, 7]
    assert showing(masks & False, 3).tolist() == []


class Obedient(nn.Module):
    """Answers by a rule on the sentence; remembers what it was asked."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.heard = rule, []

    def encode(self, images):
        return images

    def decode(self, images, sentences):
        self.heard += sentences
        return torch.stack([self.rule(image[0], text) for image, text in zip(images, sentences, strict=True)])


def scored(rule, said: str) -> tuple[list[dict], list[str]]:
    """Rows of a case of three slices, in two of which a disc is seen, of which the image is a copy."""
    label = np.zeros((3, 64, 64), np.uint8)
    label[0, ellipse(10, 50, 5, 5)] = label[2, ellipse(50, 10, 12, 12)] = 2
    images, labels = torch.from_numpy(label[:, None] / 2.0).float(), torch.from_numpy(label)
    preparation = SimpleNamespace(images=lambda case: images, labels=lambda case: labels)
    net = Obedient(rule)
    nets = nn.ModuleDict({"average": net})
    structures = {1: "grey", 2: "white", 3: "csf"}
    task = SimpleNamespace(preparation=preparation, structures=structures, data=None)
    fitted = SimpleNamespace(nets=nets, weights={"last": {}}, method=Vlsm(said=said, **SETTINGS), task=task)
    return prompted_rows(fitted, Case(label[None].astype(np.float32), label, "c", "p")), net.heard


@pytest.mark.component("are words used at all")
def test_the_score_tells_a_network_that_listens_from_one_that_does_not():
    deaf = lambda image, text: image - 0.5  # noqa: E731
    (row,), heard = scored(deaf, "name")
    assert row["structure"] == "white" and row["dice"] == row["bare"] == row["all"] == row["misled"] == 1
    assert heard.count("white matter") == 2 and heard.count(NOTHING) == 2 and len(heard) == 8
    assert sum("one small round white matter located in the top right" in text for text in heard) == 1
    assert sum("one large round white matter located in the bottom left" in text for text in heard) == 1
    listens = lambda image, text: (image - 0.5) * (1 if "round" in text else -1)  # noqa: E731
    for said in ("name", "all", "nothing"):
        (row,), _ = scored(listens, said)
        assert row["all"] == 1 and row["misled"] == row["bare"] == 0 and row["dice"] == float(said == "all")
    half = lambda image, text: image * (torch.arange(64) < 32) - 0.5  # noqa: E731
    assert scored(half, "name")[0][0]["dice"] == 0.5, "the mean over slices"


@pytest.mark.component("pre-trained encoder, light decoder, conditioning")
def test_maps_are_those_of_squeezenet_and_it_never_learns():
    torch.manual_seed(0)
    encoder, images = Photographs(pretrained=False), torch.randn(2, 1, 40, 32)
    maps = encoder(images)
    large = F.interpolate(PHOTOGRAPH * images, size=(60, 48), mode="bilinear").expand(-1, 3, -1, -1)
    inside = []
    for name in encoder.kept:
        getattr(encoder.net, name).register_forward_hook(lambda _, given, out: inside.append(F.relu(out)))
    last = encoder.net.features(large)
    assert torch.equal(maps[3], last) and [each.shape[1] for each in maps] == list(encoder.counts)
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(maps, inside, strict=True))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.component("pre-trained encoder, light decoder, conditioning")
def test_the_prompt_conditions_the_deepest_block_by_scale_and_shift():
    torch.manual_seed(0)
    net, images = ClipSeg(Small(1, True), 16), torch.randn(2, 1, 32, 40)
    nn.init.normal_(net.film.line.weight, std=0.5)
    maps, size = net.encode(images)
    vectors = net.text(("lungs", "cell"))
    scale, shift = (vectors @ net.film.line.weight.T + net.film.line.bias)[:, :, None, None].chunk(2, 1)
    x = net.blocks[3](net.reduce[3](maps[3]) * (1 + scale) + shift)
    for k in (2, 1, 0):
        x = F.interpolate(net.lower[k](x), size=maps[k].shape[2:], mode="bilinear") + net.reduce[k](maps[k])
        x = net.blocks[k](x)
    assert torch.allclose(net.decode((maps, size), ("lungs", "cell")), net.head(x)[:, 0], atol=1e-4)
    assert not torch.allclose(net(images, ("cell", "lungs")), net(images, ("lungs", "cell")), atol=1e-3)


@pytest.mark.component("pre-trained encoder, light decoder, conditioning")
def test_a_block_of_tokens_knows_where_they_are():
    torch.manual_seed(0)
    block = medvlsm.Tokens(16)
    maps = torch.zeros(1, 16, 3, 4)
    assert len(block(maps).flatten(2)[0].T.round(decimals=4).unique(dim=0)) == 12


@pytest.mark.component("image features dominate")
def test_without_knowledge_the_encoder_stays_random():
    data = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 4, (2, 32, 32)).byte())
    for knows in (True, False):
        nets = Vlsm(knows=knows, **SETTINGS).build(1, 4, 2)
        Vlsm(knows=knows, **SETTINGS).training_step(nets, data, None, Moment(0, 10)).backward()
        learns = [parameter.grad is not None for parameter in nets["model"].encoder.parameters()]
        assert all(learns) if knows else not any(learns)
    first, second = (Vlsm(knows=False, **SETTINGS | {"encoder": "squeezenet"}).build(1, 4, 2) for _ in range(2))
    weight = [nets["model"].encoder.net.conv1.weight for nets in (first, second)]
    assert not torch.equal(*weight)


def test_all_of_it_is_trained_on_images_of_any_size():
    for said in ("nothing", "name", "all"):
        assert_every_parameter_is_trained(Vlsm(said=said, **SETTINGS), (45, 38))


def test_the_arms_differ_in_one_thing():
    arms = {name: arm.method for name, arm in medvlsm.recipe.arms.items()}
    name = arms["name"]
    assert arms["name and attributes"] == replace(name, said="all")
    assert arms["nothing said"] == replace(name, said="nothing")
    assert arms["name, random image features"] == replace(name, knows=False)
    assert isinstance(name.language, Names) and name.language.forms == ("{name}",)
