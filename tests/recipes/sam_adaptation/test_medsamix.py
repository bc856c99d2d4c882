"""MedSAMix: merging at 0 and 1 gives the parents, layers have shares of their own, and a search needs no gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.recipes.sam_adaptation import medsamix
from medcook.recipes.sam_adaptation.medsamix import MedSamix, boxed_dice, chosen, layer_of, merged, search
from medcook.sam import adapting
from medcook.sam.model import SmallSam
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.sam.zero_shot import Target, dice


@pytest.fixture(scope="module")
def parents() -> tuple[SmallSam, SmallSam]:
    torch.manual_seed(0)
    return SmallSam().eval(), SmallSam().eval()


@pytest.fixture(autouse=True)
def random_weights(monkeypatch, parents):
    for module in (adapting, medsamix):
        monkeypatch.setattr(module, "start", lambda pretrained=True: copied(parents[0]))


def copied(model: SmallSam) -> SmallSam:
    fresh = SmallSam()
    fresh.load_state_dict(model.state_dict())
    return fresh


def targets() -> list[Target]:
    rng = np.random.default_rng(0)
    found = []
    for k in range(3):
        mask = np.zeros((64, 64), bool)
        mask[10 + k : 40, 12 : 30 + k] = True
        image = (mask + rng.normal(0, 0.1, mask.shape)).astype(np.float32)
        found.append(Target("embedded", "p", f"structure {k % 2}", image, mask))
    return found


@pytest.mark.component("layer-wise merging")
class TestMerging:
    def test_at_0_and_1_it_is_a_parent(self, parents):
        states = [parent.state_dict() for parent in parents]
        layers = {layer_of(name) for name in states[0]}
        for share, state in zip((0.0, 1.0), states, strict=True):
            found = merged(*states, dict.fromkeys(layers, share))
            assert all(torch.equal(found[name], weight) for name, weight in state.items())

    def test_a_layer_has_its_own_share(self):
        names = ("sam.vision_encoder.layers.0.attn.qkv.weight", "sam.vision_encoder.layers.1.attn.qkv.weight")
        one, other = dict.fromkeys(names, torch.zeros(3)), dict.fromkeys(names, torch.ones(3))
        found = merged(one, other, {"block 0": 0.25, "block 1": 0.75})
        assert [found[name][0].item() for name in names] == [0.25, 0.75]

    def test_every_block_and_part_is_a_layer(self, parents):
        layers = {layer_of(name) for name in parents[0].state_dict()}
        blocks = {f"block {k}" for k in range(8)}
        assert layers == blocks | {"neck", "vision_encoder", "prompt_encoder", "mask_decoder", "fine features"}


@pytest.mark.component("zero-order search")
class TestSearch:
    def test_it_finds_what_scores_best_without_gradients(self):
        best = np.array([0.1, 0.9, 0.4, 0.7])
        found = search(lambda shares: -float(np.abs(shares - best).sum()), 4, 400, np.random.default_rng(0))
        assert np.abs(found - best).max() < 0.15

    def test_it_is_never_worse_than_a_uniform_merge(self):
        tried = []
        score = lambda shares: tried.append(shares) or float(shares.mean() == 0.5)  # noqa: E731
        found = search(score, 3, 20, np.random.default_rng(0))
        assert (found == 0.5).all() and len(tried) == 20
        assert all(((shares >= 0) & (shares <= 1)).all() for shares in tried)

    def test_only_layers_differ_among_themselves(self, parents):
        first, last = (f"sam.vision_encoder.layers.{k}.attn.qkv.weight" for k in (0, 7))
        one, other = parents[0].state_dict()[first], parents[1].state_dict()[last]

        def score(model):  # best with the generalist's first block and the specialist's last
            state = model.state_dict()
            return -float((state[first] - one).abs().mean() + (state[last] - other).abs().mean())

        spread = {}
        for merge in ("better parent", "uniform", "layers"):
            shares = MedSamix(merge=merge, trials=40).child(parents[1], score)[1].values()
            spread[merge] = len(set(shares))
        assert spread.pop("layers") > 1 and set(spread.values()) == {1}


@pytest.mark.component("single-task optimisation")
class TestChoice:
    def test_the_score_is_that_of_the_predictor(self, parents):
        predictor, found = Predictor(parents[0], zoom=False), {}
        for target in targets():
            normal = (target.image - target.image.mean()) / target.image.std(ddof=1)
            answer = predictor(normal, Prompt(box=box_of(target.mask))).mask
            found.setdefault(target.structure, []).append(dice(answer, target.mask))
        prepared = [
            Target(t.dataset, t.patient, t.structure, (t.image - t.image.mean()) / t.image.std(ddof=1), t.mask)
            for t in targets()
        ]
        wanted = np.mean([np.mean(values) for values in found.values()])
        assert boxed_dice(parents[0], prepared) == pytest.approx(wanted, abs=0.02)

    def test_it_is_chosen_on_validation_patients_once(self, parents, monkeypatch):
        asked = []
        task = SimpleNamespace(cases=lambda role: asked.append(role) or ["a"])
        monkeypatch.setattr(medsamix, "targets_of", lambda task, case: targets())
        nets = torch.nn.ModuleDict({"average": parents[1]})
        fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, task=task)
        fitted.method = MedSamix(merge="better parent")
        assert chosen(fitted) is chosen(fitted) and asked == ["val"]


def test_the_specialist_learns_one_structure(monkeypatch):
    seen = []
    monkeypatch.setattr(
        adapting.PromptedSam, "training_step", lambda self, nets, batch, *rest: seen.append(batch.labels)
    )
    labels = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    MedSamix(specialty=3).training_step(None, Batch(labels[None].float(), labels), None, Moment(0, 1))
    assert seen[0].flatten().tolist() == [0, 0, 0, 3]


def test_an_unknown_merge_is_named():
    with pytest.raises(MedcookError, match="merge by 'slerp'"):
        MedSamix(merge="slerp").build(1, 3, 2)
