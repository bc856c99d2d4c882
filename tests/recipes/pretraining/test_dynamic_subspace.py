"""Learners of subspaces: pairs, clusters, who owns which output, when there is one learner more, and what is scored."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.networks.squeezenet import SqueezeNet
from medcook.recipes.pretraining import dynamic_subspace
from medcook.recipes.pretraining._kinds import NEAR, clustering, kind_rows, region
from medcook.recipes.pretraining._subspaces import (
    BETA,
    CUTOFF,
    HELD,
    LEAST,
    MARGIN,
    SPLIT,
    Similarity,
    State,
    agreement,
    important,
    in_clusters,
    kmeans,
    margin_loss,
    renumbered,
    split,
)
from medcook.recipes.pretraining.dynamic_subspace import BRAINS, ClassNetwork, SubspaceLearners, recipe
from medcook.tasks import Budget
from medcook.training import Loop

LEARNERS, CLASSES = SubspaceLearners(start="random"), ClassNetwork(start="random")
TASK = replace(BRAINS, fold=0, told=("site", "group"))
MIDDLE, LATE = Moment(5, 30), Moment(29, 30)


def built(method=LEARNERS) -> nn.ModuleDict:
    torch.manual_seed(0)
    return method.build(1, 3, 2).train()


def batch(count: int = 8, size: tuple[int, int] = (32, 32), held: bool = False) -> Batch:
    """Images of three kinds; with `held` the last one is held out."""
    rng = torch.Generator().manual_seed(0)
    labels = (torch.arange(count) % 3).byte().view(-1, 1, 1).expand(-1, *size).contiguous()
    images = labels[:, None] + torch.randn(count, 1, *size, generator=rng)
    index = torch.arange(count) * HELD
    if held:
        index[-1] = HELD - 1
    return Batch(images, labels, index)


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.tensor([[0.0, 0, 4], [5.0, 0, 0], [0.0, 6, 0], [1.0, 1, -5]])
    truth = torch.arange(60) % 4
    return centres[truth] + torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * 0.6, truth


@pytest.fixture
def model() -> Similarity:
    torch.manual_seed(0)
    return Similarity(SqueezeNet(features_only=True), 32, attention=True).train()


@pytest.mark.component("multiple learners in subspaces")
class TestSubspaces:
    def test_the_loss_of_pairs_is_that_of_a_loop(self):
        rng = torch.Generator().manual_seed(1)
        vectors = F.normalize(torch.randn(9, 4, generator=rng), dim=1)
        vectors[1] = F.normalize(vectors[0] + 0.1 * vectors[2], dim=0)  # of another kind, and too near to be taken
        kinds = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 2])
        apart = torch.cdist(vectors.double(), vectors.double())
        total, wrong = 0.0, 0
        count = sum(int((kinds == kinds[i]).sum()) - 1 for i in range(9)) // 9
        for i in range(9):
            terms = [apart[i, j] - BETA + MARGIN for j in range(9) if j != i and kinds[j] == kinds[i]]
            others = [j for j in range(9) if kinds[j] != kinds[i]]
            others.sort(key=lambda j: (bool(apart[i, j] < CUTOFF), float(apart[i, j])))
            terms += [BETA - apart[i, j] + MARGIN for j in others[:count]]
            total += sum(max(0.0, float(term)) for term in terms)
            wrong += sum(term > 0 for term in terms)
        assert margin_loss(vectors, kinds).item() == pytest.approx(float(total / wrong), rel=1e-4)

    def test_who_is_where_it_should_be_costs_nothing_and_has_a_finite_gradient(self):
        vectors = torch.tensor([[1.0, 0], [1.0, 0], [-1.0, 0], [-1.0, 0]], requires_grad=True)
        loss = margin_loss(vectors, torch.tensor([0, 0, 1, 1]))
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(vectors.grad).all()
        far = margin_loss(vectors, torch.tensor([0, 1, 0, 1]))  # pulled from afar; those that coincide are not taken
        assert far.item() == pytest.approx(2 - BETA + MARGIN)

    def test_each_learner_has_a_unit_part_and_all_count_as_much(self, model):
        model.owner[10:] = 1
        raw = torch.randn(5, 32)
        one, two = model.parts(raw)
        torch.testing.assert_close(one, raw[:, :10] / raw[:, :10].norm(dim=1, keepdim=True))
        torch.testing.assert_close(two, raw[:, 10:] / raw[:, 10:].norm(dim=1, keepdim=True))
        torch.testing.assert_close(model.whole(raw), torch.cat([one, two], dim=1) / 2**0.5)

    def test_a_learner_sees_its_own_cluster_alone(self, model):
        model.owner[10:] = 1
        raw = torch.randn(8, 32, requires_grad=True)
        kinds, clusters = torch.arange(8) % 2, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
        learns = torch.tensor([True] * 4 + [False] + [True] * 3)
        loss = in_clusters(model.parts(raw), kinds, clusters, learns)
        one, two = model.parts(raw)
        wanted = 4 / 7 * margin_loss(one[:4], kinds[:4]) + 3 / 7 * margin_loss(two[5:], kinds[5:])
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        assert (raw.grad[:5, 10:] == 0).all() and (raw.grad[5:, :10] == 0).all() and (raw.grad[4] == 0).all()
        assert (raw.grad[:4, :10] != 0).any() and (raw.grad[5:, 10:] != 0).any()

    def test_clusters_are_those_of_scikit_learn(self):
        points, truth = blobs()
        labels, centres = kmeans(points, 4)
        assert normalized_mutual_info_score(truth, labels) == pytest.approx(1)
        best = KMeans(4, n_init=10, random_state=0).fit(points.numpy())
        inertia = (points - centres[labels]).square().sum()
        assert inertia.item() == pytest.approx(best.inertia_, rel=1e-4)

    def test_most_images_keep_the_number_of_their_cluster(self):
        rng = np.random.default_rng(0)
        for count, before in ((3, 3), (4, 3), (4, 4)):
            old = torch.from_numpy(rng.integers(0, before, 40))
            new = torch.from_numpy(rng.integers(0, count, 40))
            number = renumbered(new, old, count)
            assert sorted(number.tolist()) == list(range(count))
            best = max(int((torch.tensor(p)[new] == old).sum()) for p in itertools.permutations(range(count)))
            assert int((number[new] == old).sum()) == best

    def test_clusters_are_formed_of_directions_and_give_the_learner(self):
        points, truth = blobs()
        state = State(16, 4)
        state.learners.fill_(4)
        state.seen.add(F.pad(points, (0, 509)), truth)
        state.regroup()
        scaled = F.pad(points * torch.linspace(1, 9, 60)[:, None], (0, 509))
        assert normalized_mutual_info_score(truth, state.clusters(scaled)) > 0.9
        before = state.clusters(scaled)
        state.regroup()
        assert torch.equal(state.clusters(scaled), before)

    def test_at_the_end_all_outputs_are_one_embedding_of_all_images(self, monkeypatch):
        nets, calls = built(), []
        nets["model"].owner[50:] = 1
        nets["state"].learners.fill_(2)
        monkeypatch.setattr(dynamic_subspace, "margin_loss", lambda v, k: calls.append(v.shape) or margin_loss(v, k))
        LEARNERS.training_step(nets, batch(), None, Moment(24, 30))
        assert calls == []
        LEARNERS.training_step(nets, batch(), None, Moment(25, 30))
        assert calls == [(8, 128)]


@pytest.mark.component("learners are added while training")
class TestGrowth:
    def test_scores_are_how_much_the_loss_moves_with_an_output(self):
        nets = built()
        model = nets["model"]
        LEARNERS.training_step(nets, batch(), None, MIDDLE)
        with torch.no_grad():
            raw = model.embedding(model.pooled(batch().images)).double()
        kinds = torch.arange(8) % 3
        for j in (0, 77):
            up, down = raw.clone(), raw.clone()
            up[:, j], down[:, j] = up[:, j] * 1.01, down[:, j] * 0.99
            slope = (margin_loss(F.normalize(up, dim=1), kinds) - margin_loss(F.normalize(down, dim=1), kinds)) / 0.02
            assert nets["state"].taylor[j].item() == pytest.approx(slope.item(), rel=0.02, abs=1e-6)

    def test_what_is_above_half_of_the_range_is_important(self):
        taylor = torch.tensor([-4.0, 0.1, 2.0, 2.1, -0.1, 3.0])
        assert important(taylor).tolist() == [True, False, False, True, False, True]

    def divided(self, model: Similarity) -> tuple[State, Similarity, bool]:
        state, average = State(32, 3), Similarity(SqueezeNet(features_only=True), 32, attention=True)
        state.taylor[:] = torch.arange(32.0)
        return state, average, split(model, average, state)

    def test_important_outputs_stay_and_the_others_begin_anew_as_the_next_learner(self, model):
        model.owner[:4] = 0
        before = model.embedding.weight.detach().clone()
        state, average, done = self.divided(model)
        assert done and state.learners == 2
        assert model.owner.tolist() == [1] * 16 + [0] * 16
        assert torch.equal(model.embedding.weight[16:], before[16:])
        assert (model.embedding.weight[:16] != before[:16]).all(1).sum() == 16
        assert torch.equal(average.embedding.weight[:16], model.embedding.weight[:16])
        assert torch.equal(average.owner, model.owner)
        deviation = (2 / (512 + 16)) ** 0.5  # Xavier's
        assert model.embedding.weight[:16].std().item() == pytest.approx(deviation, rel=0.05)

    def test_only_the_last_learner_is_split(self, model):
        model.owner[20:] = 1
        average, state = Similarity(SqueezeNet(features_only=True), 32, attention=True), State(32, 3)
        state.learners.fill_(2)
        state.taylor[:20], state.taylor[20:] = 100, torch.arange(12.0)
        assert split(model, average, state)
        assert model.owner.tolist() == [0] * 20 + [2] * 6 + [1] * 6

    @pytest.mark.parametrize("outputs, high", [(SPLIT, 5), (20, LEAST - 1), (20, 20 - LEAST + 1)])
    def test_nothing_is_split_where_there_is_too_little(self, model, outputs, high):
        model.owner[:] = 1
        model.owner[:outputs] = 0
        state = State(32, 3)
        state.taylor[:high] = 1.0
        average = Similarity(SqueezeNet(features_only=True), 32, attention=True)
        assert not split(model, average, state) and state.learners == 1

    def test_a_learner_comes_after_patience_and_the_next_one_not_before_it_got_better(self, monkeypatch):
        nets, found = built(), iter([0.3, 0.5, 0.5, 0.4, 0.5, 0.5, 0.6, 0.1, 0.2])
        state = nets["state"]
        state.held.add(torch.randn(12, 128), torch.arange(12) % 3)
        monkeypatch.setattr(dynamic_subspace, "agreement", lambda *_: next(found))
        counts = []
        for _ in range(9):
            last = (nets["model"].owner == int(state.learners) - 1).nonzero()[:, 0]
            state.taylor[last] = torch.arange(float(len(last)))
            LEARNERS.review(nets)
            counts.append(int(state.learners))
        assert counts == [1, 1, 1, 2, 2, 2, 2, 2, 3]
        assert state.taylor.abs().sum() == 0

    def test_it_is_looked_at_images_from_which_nobody_learns(self):
        nets, given = built(), batch(held=True)
        LEARNERS.training_step(nets, given, None, MIDDLE).backward()
        vectors, kinds = nets["state"].held.all()
        assert kinds.tolist() == [1] and len(nets["state"].seen.all()[1]) == 7
        model, other = nets["model"], given.images.clone()
        torch.testing.assert_close(vectors, model.whole(model.embedding(model.pooled(given.images[-1:]))).detach())
        other[-1] = 500
        for method in (LEARNERS, CLASSES):
            losses = []
            for images in (given.images, other):
                losses.append(method.training_step(built(method), given._replace(images=images), None, LATE).item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_agreement_is_1_where_kinds_are_clusters_and_near_0_by_chance(self):
        points, truth = blobs()
        assert agreement(points, truth) == pytest.approx(1)
        assert abs(agreement(points, truth[torch.randperm(60, generator=torch.Generator().manual_seed(0))])) < 0.1

    def test_the_ablation_never_grows_and_differs_in_nothing_else(self):
        method, ablation = (recipe.arms[name].method for name in recipe.ablation)
        assert replace(ablation, grows=True) == method
        fixed = replace(LEARNERS, grows=False, looks=30)
        nets = built(fixed)
        nets["state"].held.add(torch.zeros(12, 128), torch.arange(12) % 3)
        for step in range(8):
            fixed.training_step(nets, batch(), None, Moment(step, 30))
        assert nets["state"].learners == 1 and nets["model"].owner.max() == 0

    def test_looks_are_spread_over_the_training_but_its_end(self):
        steps = [step for step in range(180) if LEARNERS.is_look(Moment(step, 180))]
        assert steps == list(range(9, 180, 9))


@pytest.mark.component("attention module")
class TestAttention:
    def test_the_mean_over_the_maps_is_weighted_by_it(self, model):
        images = batch(2).images
        maps = model.maps(images)
        attention = model.attention(maps)
        assert attention.shape == (2, 1, *maps.shape[2:]) and attention.min() > 0 and attention.max() < 1
        wanted = torch.einsum("bchw,bhw->bc", maps, attention[:, 0]) / maps[0, 0].numel()
        torch.testing.assert_close(model.pooled(images), wanted)

    def test_without_it_places_count_as_much(self):
        net = Similarity(SqueezeNet(features_only=True), 8, attention=False)
        images = batch(2).images
        torch.testing.assert_close(net.pooled(images), net.maps(images).mean((2, 3)))

    def test_the_maps_are_squeezenets_before_the_last_pool(self):
        encoder, seen = SqueezeNet(features_only=True), []
        encoder.fire8.register_forward_hook(lambda _, __, out: seen.append(out))
        net = Similarity(encoder, 8, attention=False)
        maps = net.maps(batch(2, (64, 48)).images)
        encoder.features(58.0 * batch(2, (64, 48)).images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(maps, seen[-1] / 40)

    def test_what_the_learners_look_at_is_the_attention(self):
        nets, images = built().eval(), batch(2).images
        average = nets["average"]
        torch.testing.assert_close(LEARNERS.look(nets, images), average.attention(average.maps(images))[:, 0])


@pytest.fixture(scope="module")
def fitted():
    budget, train = Budget(steps=4, batch=4, precision="float32", checks=0), TASK.samples("labelled")
    return Loop(LEARNERS, TASK, budget, "float32", 0, train, None, None, progress=False, accelerator="cpu").run()


class TestScore:
    @pytest.mark.component("image retrieval")
    def test_the_nearest_training_patients_are_of_the_kind_or_not(self, fitted):
        cases = list(TASK.cases("labelled"))
        with torch.no_grad():
            vectors = [fitted.method.embed(fitted.nets, TASK.preparation.images(case)).mean(0) for case in cases]
        vectors = F.normalize(torch.stack(vectors).double(), dim=1).numpy()
        kinds = np.array([TASK.kinds.index((case.attributes["site"], case.attributes["group"])) for case in cases])
        judge = KNeighborsClassifier(1).fit(vectors, kinds)
        for case in itertools.islice(TASK.cases("val"), 3):
            (row,) = kind_rows(fitted, case)
            with torch.no_grad():
                vector = fitted.method.embed(fitted.nets, TASK.preparation.images(case)).mean(0).double()
            vector = F.normalize(vector, dim=0).numpy()[None]
            near = kinds[judge.kneighbors(vector, NEAR)[1][0]]
            site, group = TASK.kinds[near[0]]
            own = case.attributes
            assert row["site"] == (site == own["site"]) and row["finding"] == (group == own["group"])
            assert row["recall"] == row["site"] * row["finding"]
            assert row["recall_4"] == (TASK.kinds.index((own["site"], own["group"])) in near)
            assert row["kind"] == TASK.kinds.index((own["site"], own["group"])) and row["learners"] == 1

    @pytest.mark.component("image clustering")
    def test_clusters_are_compared_with_kinds_in_each_replicate(self):
        rng = np.random.default_rng(0)
        columns = {name: rng.integers(0, 3, 40) for name in ("kind", "cluster")}
        frame = pd.DataFrame(columns | {"replicate": np.arange(40) % 2})
        wanted = [normalized_mutual_info_score(columns["kind"][k::2], columns["cluster"][k::2]) for k in range(2)]
        assert clustering(frame) == pytest.approx(np.mean(wanted))
        assert clustering(frame.assign(cluster=2 - frame["kind"])) == pytest.approx(1)

    @pytest.mark.component("weakly supervised segmentation")
    def test_the_region_is_what_is_above_the_middle_of_each_map(self):
        maps = torch.tensor([[[0.0, 1.0], [0.2, 0.9]], [[5.0, 7.0], [6.5, 5.5]]])
        assert region(maps, (2, 2)).tolist() == [[[False, True], [False, True]], [[False, True], [True, False]]]
        assert region(maps, (8, 6)).shape == (2, 8, 6)

    @pytest.mark.component("weakly supervised segmentation")
    def test_dice_is_of_attention_and_structures(self, fitted):
        case = next(iter(TASK.cases("val")))
        images, truth = TASK.preparation.images(case), TASK.preparation.labels(case) > 0
        with torch.no_grad():
            found = region(fitted.method.look(fitted.nets, images), truth.shape[1:])
        wanted = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert kind_rows(fitted, case)[0]["dice"] == pytest.approx(wanted.item())


@pytest.mark.component("comparison with a classification network")
class TestClassNetwork:
    def test_its_loss_is_cross_entropy_of_the_pooled_maps(self):
        nets, given = built(CLASSES), batch(held=True)
        model = nets["model"]
        logits = model.embedding(model.maps(given.images).mean((2, 3)))
        wanted = F.cross_entropy(logits[:-1], (torch.arange(8) % 3)[:-1])
        torch.testing.assert_close(CLASSES.training_step(nets, given, None, LATE), wanted)
        torch.testing.assert_close(CLASSES.embed(nets, given.images), model.maps(given.images).mean((2, 3)))

    def test_its_map_sums_up_to_the_logit_of_the_likeliest_kind(self):
        nets, images = built(CLASSES).eval(), batch().images
        logits = CLASSES.kinds_of(nets, images)
        likeliest = logits.argmax(1)
        bias = nets["average"].embedding.bias[likeliest]
        torch.testing.assert_close(CLASSES.look(nets, images).mean((1, 2)) + bias, logits.amax(1))


@pytest.mark.component("three public data sets")
def test_a_kind_is_what_a_patient_has_of_both_attributes():
    assert len(TASK.kinds) == TASK.classes == 6 and TASK.kinds == tuple(sorted(set(TASK.kinds)))
    samples = TASK.samples("labelled")
    for number, case in enumerate(TASK.cases("labelled")):
        mine = samples.labels[samples.case_of == number]
        assert (mine == TASK.kinds.index((case.attributes["site"], case.attributes["group"]))).all()
    full = recipe.scales["full"]
    assert full.task.told == ("site", "tuberculosis") and full.task.folds == full.replicates == 3


@pytest.mark.parametrize("method", [LEARNERS, CLASSES, replace(LEARNERS, attention=False)])
@pytest.mark.parametrize("now", [MIDDLE, LATE])
def test_any_size_in_either_precision_and_every_part_learns(method, now):
    for size, mixed in (((40, 37), False), ((64, 64), True)):
        nets, given = built(method).to(memory_format=torch.channels_last), batch(6, size)
        images = given.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = method.training_step(nets, given._replace(images=images), None, now)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["model"].parameters())
        assert nets["model"].embedding.weight.grad.abs().max() > 0
        found = method.predict(nets.eval(), images)
        assert found.shape == (6, 3, *size) and torch.allclose(found.sum(1), torch.ones(6, *size), atol=1e-5)


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="not volumes"):
        LEARNERS.build(1, 2, 3)
