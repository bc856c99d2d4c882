"""VLP-SAM: names as codes, a reference image and a name that are both heard, tokens that reach a frozen SAM."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook.few_shot import FewShotTask, Shots
from medcook.methods import Batch, Moment
from medcook.recipes.few_shot import vlp_sam
from medcook.recipes.few_shot.vlp_sam import VLPSam, called_dice, encode_text, episodes_of
from medcook.training import Fitted

SMALL = {"channels": (4, 4, 8, 8), "keys": 8, "pretrained": False, "names": ("left part", "right part"), "count": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return VLPSam(**SMALL).build(1, 3, 2)["average"].eval()


def shots(count: int = 1, size: int = 32, first: int = 8) -> Shots:
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    masks[:, first : first + 12, 10:24] = 1
    return Shots(torch.randn(count, 1, size, size), torch.randn(count, 8, size // 4, size // 4), masks)


def merged(net, support: Shots, query: Shots, name: str = "left part", **changes):
    with torch.no_grad():
        return VLPSam(**SMALL | changes).called(name).merged(net, support, query)[0]


@pytest.mark.component("text embedding of the class name")
class TestText:
    def test_a_name_has_one_code_of_length_one(self):
        code = encode_text("Left ventricle")
        assert code.norm().item() == pytest.approx(1, abs=1e-6)
        assert torch.equal(code, encode_text("left VENTRICLE"))

    def test_names_that_share_letters_are_alike_and_others_are_not(self):
        left, right, liver = (encode_text(name) for name in ("left ventricle", "right ventricle", "spleen"))
        assert 0.4 < left @ right < 0.95 and abs(left @ liver) < 0.3

    def test_the_name_is_heard_unless_it_is_taken_away(self, net):
        support, query = shots(), shots()
        for text in (True, False):
            found = [merged(net, support, query, name, text=text) for name in SMALL["names"]]
            assert torch.allclose(*found) != text

    def test_episodes_bear_their_names(self, monkeypatch):
        """Label 1 is the first name: an episode that is asked for by the second one shows label 2."""
        method = VLPSam(**SMALL, encoder="own")
        nets = method.build(1, 3, 2)
        labels = torch.zeros(4, 32, 32, dtype=torch.uint8)
        labels[:, :8, :8], labels[:, 20:, 20:] = 1, 2
        seen = []

        def logits(self, net, support, query):
            seen.append((self.name, bool(query.masks[0, 0, 0] == 1), bool(query.masks[0, 31, 31] == 1)))
            return torch.zeros(len(query.images), 2, 8, 8, requires_grad=True)

        monkeypatch.setattr(VLPSam, "logits", logits)
        for _ in range(4):
            method.training_step(nets, Batch(torch.randn(4, 1, 32, 32), labels), None, Moment(0, 1))
        assert set(seen) == {("left part", True, False), ("right part", False, True)}

    def test_no_episode_where_one_image_shows_it(self):
        known = shots(3)
        known = known._replace(masks=torch.stack([known.masks[0], known.masks[0] * 2, known.masks[0] * 2]))
        assert not episodes_of(known, 1, 1) and len(episodes_of(known, 2, 1)) == 1

    def test_scores_ask_by_name(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            vlp_sam, "novel_dice", lambda one, case: seen.append((one.method.name, one.task.novel)) or []
        )
        task = FewShotTask("embedded", novel=(1, 3), source="embedded")
        fitted = Fitted(VLPSam(**SMALL), task, None, {}, {}, {})
        called_dice(fitted, SimpleNamespace())
        assert seen == [(name, (value,)) for value, name in task.novel_structures.items()]


@pytest.mark.component("visual reference")
class TestReference:
    def test_the_image_is_heard_unless_it_is_taken_away(self, net):
        query = shots()
        supports = shots(), shots(first=16)
        for image in (True, False):
            found = [merged(net, support, query, image=image) for support in supports]
            assert torch.allclose(*found) != image

    def test_prior_and_mean_feature_both_stand_in_what_is_merged(self, net):
        given = {}
        hook = net["merge"].register_forward_hook(lambda _, inputs, __: given.update(x=inputs[0]))
        support, query = shots(), shots()
        prior = VLPSam(**SMALL).called("left part").merged(net, support, query)[1]
        hook.remove()
        pooled = torch.nn.functional.avg_pool2d(support.maps, 2)
        inside = torch.nn.functional.adaptive_avg_pool2d(support.masks[:, None].float(), 4)[:, 0] > 0.5
        wanted = net["project"](pooled).movedim(1, -1)[inside].mean(0)
        assert torch.allclose(given["x"][0, 8:16, 0, 0], wanted, atol=1e-5)
        assert torch.equal(given["x"][:, 24], prior)


@pytest.mark.component("image-text similarity map")
def test_the_map_is_the_cosine_with_the_name(net):
    given = {}
    hook = net["merge"].register_forward_hook(lambda _, inputs, __: given.update(x=inputs[0]))
    query = shots()
    merged(net, shots(), query)
    hook.remove()
    keys, word = given["x"][0, :8].numpy(), net["say"](encode_text("left part")).detach().numpy()
    wanted = np.einsum("dhw,d->hw", keys, word) / np.linalg.norm(keys, axis=0) / np.linalg.norm(word)
    assert np.allclose(given["x"][0, 25].numpy(), wanted, atol=1e-5)


@pytest.mark.component("prompt embeddings into a frozen SAM")
def test_only_what_makes_prompts_learns():
    method = VLPSam(**SMALL).called("left part")
    net = method.build(1, 3, 2)["model"]
    query = shots(2)
    logits = method.logits(net, shots(), query)
    assert logits.shape == (2, 2, 32, 32)
    method.query_loss(logits, query).backward()
    assert all(p.grad is None for p in net["sam"].parameters())
    for name in ("tokens", "say", "merge", "rough", "out"):
        assert max(p.grad.abs().max() for p in net[name].parameters()) > 0
