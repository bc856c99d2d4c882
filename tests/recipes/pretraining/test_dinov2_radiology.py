"""Features of photographs: what learns in each arm, both decoders, and diagnosis from what an encoder sees."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from medcook.data.transforms import NONE
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.squeezenet import SqueezeNet
from medcook.recipes.fairness.cxr_clip_fairness import embedding
from medcook.recipes.pretraining._probing import STRENGTH, diagnosis, known, study_rows
from medcook.recipes.pretraining._settings import CHANNELS
from medcook.recipes.pretraining.dinov2_radiology import (
    BRAINS,
    FEW,
    RANDOM,
    FromNothing,
    HierarchicalDecoder,
    LinearDecoder,
    Photographs,
    recipe,
)
from medcook.recipes.pretraining.ssl_diversity import LEVELS, GreyEncoder
from medcook.tasks import Budget
from medcook.training import Loop

FROZEN = Photographs(start="random")
LOW_RANK, TUNED = replace(FROZEN, tunes="low-rank"), replace(FROZEN, tunes="all")
NOW = Moment(0, 10)


def built(method) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def batch(size: tuple[int, int] = (48, 40)) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(torch.randn(2, 1, *size, generator=rng), torch.randint(0, 3, (2, *size), generator=rng).byte())


def learning(method) -> tuple[set[str], set[str]]:
    """Names of the encoder's and of the decoder's parameters that a step gives a gradient."""
    nets = built(method)
    method.training_step(nets, batch(), None, NOW).backward()
    moved = {name for name, weight in nets["model"].named_parameters() if weight.grad is not None}
    return {n for n in moved if n.startswith("encoder.")}, {n for n in moved if n.startswith("decoder.")}


@pytest.mark.component("organ segmentation on frozen features")
class TestFrozen:
    def test_only_the_decoder_learns_and_all_of_it(self):
        encoder, decoder = learning(FROZEN)
        assert not encoder
        assert decoder == {f"decoder.{name}" for name, _ in built(FROZEN)["model"].decoder.named_parameters()}

    def test_after_steps_the_encoder_is_as_it_was_and_the_one_that_predicts_too(self):
        nets = built(FROZEN)
        before = {name: weight.clone() for name, weight in nets["model"].encoder.named_parameters()}
        optimiser, schedule = FROZEN.optimise([p for p in nets.parameters() if p.requires_grad], 4)
        for step in range(3):
            FROZEN.training_step(nets, batch(), None, Moment(step, 4)).backward()
            optimiser.step(), optimiser.zero_grad(), schedule.step()
            FROZEN.after_step(nets, Moment(step, 4))
        for part in ("model", "average"):
            assert all(torch.equal(before[name], p) for name, p in nets[part].encoder.named_parameters())

    def test_each_channel_is_seen_with_mean_0_and_deviation_1(self, monkeypatch):
        model = built(FROZEN)["model"].eval()
        levels, seen = model.descend(batch().images), []
        monkeypatch.setattr(model, "descend", lambda images: levels)
        model.decoder.register_forward_hook(lambda _, inputs, __: seen.extend(inputs[0]))
        model(batch().images)
        for maps, given in zip(levels, seen, strict=True):
            flat = maps.double().flatten(2)
            wanted = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
            torch.testing.assert_close(given.flatten(2).double(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.component("linear and hierarchical decoders")
class TestDecoders:
    def test_the_linear_one_is_one_linear_layer_on_the_enlarged_maps(self):
        levels = [torch.randn(2, 5, 12, 10), torch.randn(2, 7, 6, 5), torch.randn(2, 3, 3, 3)]
        decoder = LinearDecoder((5, 7, 3), 4)
        stacked = torch.cat([F.interpolate(x, (12, 10), mode="bilinear", align_corners=False) for x in levels], dim=1)
        weight = torch.cat([head.weight for head in decoder.heads], dim=1)
        bias = torch.stack([head.bias for head in decoder.heads]).sum(0)
        torch.testing.assert_close(decoder(levels), F.conv2d(stacked, weight, bias), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["linear", "hierarchical"])
    def test_every_level_has_a_say_at_its_place(self, kind):
        method = replace(FROZEN, decoder=kind)
        model = built(method)["model"].eval()
        sizes = [(24, 20), (12, 10), (6, 5), (3, 3)]
        levels = [torch.randn(1, n, *size).requires_grad_() for n, size in zip(LEVELS.values(), sizes, strict=True)]
        model.decoder(levels)[0, 1, 0, 0].backward()
        for maps in levels:
            slope = maps.grad.abs().sum((0, 1))
            assert slope[0, 0] > 0 and (slope[-1, -1] == 0 or maps is levels[-1])

    def test_the_hierarchical_one_goes_up_from_the_deepest(self):
        decoder = HierarchicalDecoder((4, 6, 8), 2, (3, 5, 7)).eval()
        levels = [torch.randn(1, 4, 16, 16), torch.randn(1, 6, 8, 8), torch.randn(1, 8, 4, 4)]
        fine, middle, deep = (project(x) for project, x in zip(decoder.project, levels, strict=True))
        first, second = decoder.join
        wanted = decoder.head(second(first(deep, middle), fine))
        torch.testing.assert_close(decoder(levels), wanted)
        assert wanted.shape == (1, 2, 16, 16)


@pytest.mark.component("parameter-efficient fine-tuning")
class TestLowRank:
    def test_at_the_start_nothing_is_changed(self):
        frozen, tuned = (built(method)["model"].eval() for method in (FROZEN, LOW_RANK))
        tuned.decoder.load_state_dict(frozen.decoder.state_dict())
        torch.testing.assert_close(tuned(batch().images), frozen(batch().images))

    def test_only_the_updates_and_the_decoder_learn(self):
        encoder, decoder = learning(LOW_RANK)
        assert len(encoder) == 2 * 3 * 8 and all("lora_" in name for name in encoder)
        assert len(decoder) == len(learning(FROZEN)[1])

    def test_a_layer_is_its_weight_and_twice_an_update_of_rank_4(self):
        layer = built(LOW_RANK)["model"].encoder.layers["fire5"].expand3x3
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert down.shape[0] == up.shape[1] == 4
        nn.init.normal_(up)
        x = torch.randn(1, 32, 6, 5)
        weight = layer.base_layer.weight + 2 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        wanted = F.conv2d(x, weight, layer.base_layer.bias, padding=1)
        torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-3)

    def test_the_updates_learn_at_the_rate_of_the_decoder(self):
        nets = built(LOW_RANK)
        optimiser, _ = LOW_RANK.optimise([p for p in nets.parameters() if p.requires_grad], 10)
        assert [group["max_lr"] for group in optimiser.param_groups] == [LOW_RANK.rate] * 2


@pytest.mark.component("end-to-end fine-tuning")
class TestFineTuning:
    def test_all_learns(self):
        encoder, decoder = learning(TUNED)
        assert len(encoder) + len(decoder) == len(list(built(TUNED)["model"].parameters()))

    def test_the_encoder_is_ten_times_slower(self):
        nets = built(TUNED)
        optimiser, _ = TUNED.optimise([p for p in nets.parameters() if p.requires_grad], 10)
        groups = {frozenset(map(id, group["params"])): group["max_lr"] for group in optimiser.param_groups}
        model = nets["model"]
        assert groups[frozenset(map(id, model.decoder.parameters()))] == TUNED.rate
        assert groups[frozenset(map(id, model.encoder.parameters()))] == pytest.approx(TUNED.rate / 10)
        assert all(group["weight_decay"] == TUNED.decay for group in optimiser.param_groups)


@pytest.fixture(scope="module")
def fitted():
    method = replace(FROZEN, decoder="linear", augmentation=NONE)
    budget = Budget(steps=2, batch=2, precision="float32", checks=0)
    train = BRAINS.samples("labelled")
    return Loop(method, BRAINS, budget, "float32", 0, train, None, None, progress=False, accelerator="cpu").run()


@pytest.fixture(scope="module")
def given(fitted) -> tuple[np.ndarray, np.ndarray]:
    """(N, 512) mean deepest maps of all training patients, and whether they have atrophy."""
    encoder = fitted.nets["average"].encoder
    cases = list(BRAINS.data.cases(BRAINS.data.split.train))
    with torch.no_grad():
        vectors = [encoder(BRAINS.preparation.images(case)).mean((0, 2, 3)).numpy() for case in cases]
    return np.stack(vectors), np.array([case.attributes["group"] == "atrophy" for case in cases])


class TestDiagnosis:
    @pytest.mark.component("kNN")
    def test_the_nearest_by_angle_vote(self, fitted, given):
        there, case = known(fitted), next(iter(BRAINS.cases("val")))
        lengths = np.linalg.norm(given[0], axis=1, keepdims=True)
        np.testing.assert_allclose(there.vectors, given[0] / lengths, atol=1e-5)
        judge = KNeighborsClassifier(min(15, len(there.vectors) // 4), metric="cosine")
        judge.fit(there.vectors, given[1])
        vector = embedding(fitted, case).astype(float)
        assert study_rows(fitted, case)[0]["knn"] == pytest.approx(judge.predict_proba(vector[None])[0, 1])

    @pytest.mark.component("linear probing")
    def test_the_probe_is_where_the_penalised_likelihood_is_flat(self, fitted, given):
        vectors, outcome = given
        scaled, model = (vectors - vectors.mean(0)) / vectors.std(0).clip(1e-12), known(fitted).probe[-1]
        scaled[:, vectors.std(0) == 0] = 0
        chance = 1 / (1 + np.exp(-(scaled @ model.coef_[0] + model.intercept_)))
        slope = STRENGTH * ((outcome - chance) @ scaled) - model.coef_[0]
        assert np.abs(slope).max() < 0.02 * np.abs(STRENGTH * (outcome @ scaled)).max()
        case = next(iter(BRAINS.cases("val")))
        assert 0 < study_rows(fitted, case)[0]["score"] < 1

    def test_rows_have_the_usual_measures_and_the_patients_outcome(self, fitted):
        cases = list(BRAINS.cases("val"))
        rows = study_rows(fitted, cases[0])
        assert [row["structure"] for row in rows] == list(BRAINS.structures.values())
        assert all(0 <= row["dice"] <= 1 and {"hd95", "missed"} <= set(row) for row in rows)
        assert [row["outcome"] for row in rows] == [float(cases[0].attributes["group"] == "atrophy")] * 3

    def test_auc_counts_each_patient_once(self):
        rng = np.random.default_rng(0)
        one = pd.DataFrame({"score": rng.random(20), "knn": rng.random(20), "outcome": rng.integers(0, 2, 20)})
        frame = pd.concat([one.assign(structure="a"), one[:7].assign(structure="b")])
        wanted = {"linear probe": one["score"], "kNN": one["knn"]}
        assert diagnosis(frame) == {
            name: pytest.approx(roc_auc_score(one["outcome"], value)) for name, value in wanted.items()
        }


@pytest.mark.component("few-shot learning")
def test_few_are_drawn_and_the_outcome_of_all_training_patients_is_known(given):
    for profile in ("quick", "full"):
        assert recipe.scales[profile].task.labelled == FEW
    assert len(BRAINS.labelled_patients) == FEW < len(given[0])


@pytest.mark.component("comparison with U-Net")
class TestUNet:
    def test_it_has_what_the_others_have(self):
        unet, frozen = FromNothing(), recipe.arms["frozen features"].method
        assert unet.channels == CHANNELS
        for name in ("rate", "decay", "average", "loss", "augmentation"):
            assert getattr(unet, name) == getattr(frozen, name)

    def test_its_deepest_maps_are_its_features(self):
        nets, images = built(FromNothing()).eval(), batch().images
        wanted = nets["average"].descend(images)[-1].mean((2, 3))
        torch.testing.assert_close(FromNothing().embed(nets, images), wanted)


def test_arms_differ_in_what_learns_and_in_the_decoder_alone():
    base = recipe.arms["frozen features"].method
    assert recipe.arms["low-rank updates"].method == replace(base, tunes="low-rank")
    assert recipe.arms["fine-tuned"].method == replace(base, tunes="all")
    assert recipe.arms["linear decoder"].method == replace(base, decoder="linear")
    assert recipe.arms["frozen features" + RANDOM].method == replace(base, start="random")
    assert base.start == "imagenet"


def test_features_of_a_photograph_are_what_squeezenet_makes_of_it():
    net = SqueezeNet(features_only=True).eval()
    method_maps = GreyEncoder(net).levels(batch().images)
    assert [maps.shape[1] for maps in method_maps] == list(LEVELS.values())


@pytest.mark.parametrize("method", [FROZEN, LOW_RANK, TUNED, replace(FROZEN, decoder="linear")])
@pytest.mark.parametrize("size", [(64, 64), (45, 38)])
def test_any_size_in_either_precision(method, size):
    nets, given = built(method).to(memory_format=torch.channels_last), batch(size)
    images = given.images.contiguous(memory_format=torch.channels_last)
    for mixed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = method.training_step(nets, given._replace(images=images), None, NOW)
        loss.backward()
        assert torch.isfinite(loss) and loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in nets.parameters() if p.requires_grad)
    assert method.predict(nets.eval(), images).shape == (2, 3, *size)


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="not volumes"):
        FROZEN.build(1, 2, 3)
