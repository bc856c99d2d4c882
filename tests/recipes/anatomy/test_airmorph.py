"""AirMorph: what is known of a branch, who sees whom when names are given, and what a score asks of named trees."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medcook.data import Case
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.anatomy import _branch_graph as graphs
from medcook.recipes.anatomy import _trees, airmorph
from medcook.recipes.anatomy._airways import NAMES, VALUE, with_airways
from medcook.recipes.anatomy._centrelines import bridged, parsed
from medcook.recipes.anatomy._trees import Branch
from medcook.recipes.anatomy.airmorph import Airways, Diseases, naming, recipe

ARMS = {name: arm.method for name, arm in recipe.arms.items()}
SIZE = (128, 128)


def lungs() -> np.ndarray:
    rows, columns = np.indices(SIZE)
    return sum(((rows - 64) / 52) ** 2 + ((columns - middle) / 24) ** 2 < 1 for middle in (32, 96)) > 0


def planted(seed: int = 0):
    return with_airways(np.zeros(SIZE), lungs(), np.random.default_rng(seed))


def tube(start, end, parent: int = -1, generation: int = 0, radius: float = 2.0, name: int = 0) -> Branch:
    points = np.linspace(start, end, 40)
    return Branch(points, np.full(40, radius), parent, generation, name)


def a_tree() -> tuple[Branch, ...]:
    return (
        tube((0, 50), (40, 50), radius=4.0),
        tube((40, 50), (60, 30), 0, 1),
        tube((40, 50), (60, 70), 0, 1),
        tube((60, 70), (90, 60), 2, 2),
        tube((60, 70), (90, 90), 2, 2),
    )


def a_graph(count: int = 2) -> graphs.Graph:
    return graphs.padded([graphs.graph(a_tree(), SIZE), graphs.graph(a_tree()[:3], SIZE)][:count])


def labeller(sight="tree") -> graphs.Labeller:
    torch.manual_seed(0)
    return graphs.Labeller(sight, width=16, heads=2).eval()


@pytest.mark.component("labelling at lobar, segmental and subsegmental resolution")
def test_what_is_known_of_a_branch():
    found = graphs.features(a_tree(), SIZE)
    assert found.shape == (5, graphs.FEATURES)
    assert found[3] == pytest.approx(
        [2 / 5, 75 / 64 - 1, 65 / 64 - 1, np.hypot(30, 10) / 64, 30 / 64, 10 / 64, 2 / 64, 3 / 10**0.5, -1 / 10**0.5],
        abs=1e-4,
    )


@pytest.mark.component("topology")
def test_a_graph_knows_steps_and_who_supplies_whom():
    graph = graphs.graph(a_tree(), SIZE)
    wanted = [[0, 1, 1, 2, 2], [1, 0, 2, 3, 3], [1, 2, 0, 1, 1], [2, 3, 1, 0, 2], [2, 3, 1, 2, 0]]
    assert graph.steps.tolist() == wanted
    below = np.eye(5, dtype=bool)
    below[0], below[2, 3:] = True, True
    assert (graph.below.numpy() == below).all() and graph.there.all()
    apart = graphs.graph((*a_tree(), tube((5, 5), (9, 9))), SIZE)
    assert apart.steps[0, 5] == graphs.FARTHEST and graphs.graph((), SIZE).features.shape == (0, graphs.FEATURES)


@pytest.mark.component("labelling at lobar, segmental and subsegmental resolution")
def test_branches_of_a_label_map_have_its_names():
    one = planted(4)
    graph = graphs.graphs_of(torch.from_numpy(one.label)[None])
    tree = parsed(one.label > 0, graphs.root_of(one.label), graphs.FINER)
    assert len(tree) == int(graph.there.sum())
    right = []
    truth = np.concatenate([branch.points for branch in one.trees["airways"]])
    names = np.repeat([b.name for b in one.trees["airways"]], [len(b.points) for b in one.trees["airways"]])
    for branch, target in zip(tree, graph.targets[0].tolist(), strict=False):
        middle = branch.points[len(branch.points) // 2]
        value = names[np.linalg.norm(truth - middle, axis=1).argmin()]
        right.append(graphs.TARGETS[value].tolist() == target)
    assert np.mean(right) > 0.85
    assert graphs.TARGETS[VALUE["RB6b"]].tolist() == [6, 6, 12] and graphs.TARGETS[VALUE["left main"]].tolist() == [
        2,
        0,
        0,
    ]
    assert (
        graphs.commonest(np.array([[1.0, 1.0], [5.0, 5.0], [1.2, 1.0]]), np.diag([0, 3, 0, 0, 0, 7]).astype(np.uint8))
        == 3
    )
    assert (
        graphs.commonest(np.zeros((2, 2)), np.zeros((4, 4), np.uint8)) == 0 == graphs.commonest(np.zeros((2, 2)), None)
    )
    other = graphs.graphs_of(torch.full((1, 16, 16), 255, dtype=torch.uint8))
    assert not other.there.any(), "what nobody annotated has no branches"


@pytest.mark.component("labelling at lobar, segmental and subsegmental resolution")
def test_the_finest_stage_that_names_a_branch_decides():
    logits = [torch.zeros(4, count) for count in graphs.STAGES]
    logits[0][:, 4] = 1  # RU bronchus
    logits[0][3, 0] = 2
    logits[1][1, 2] = 1
    logits[2][2, 5] = 1
    names = [NAMES[value].name for value in graphs.values_of(logits)]
    assert names == ["RU bronchus", "RB2", "RB3a", "trachea"]


@pytest.mark.component("topology")
def test_attention_is_biased_by_steps():
    torch.manual_seed(0)
    stage, x = graphs.Stage(8, 2), torch.randn(1, 3, 8)
    steps, seen = torch.tensor([[[0, 1, 2], [1, 0, 1], [2, 1, 0]]]), torch.ones(1, 3, 3, dtype=torch.bool)
    query, key, value = (part.reshape(3, 2, 4).transpose(0, 1) for part in stage.enter(x)[0].split(8, -1))
    scores = torch.einsum("hid,hjd->hij", query, key) / 2
    bias = torch.stack([stage.apart.weight[steps[0], head] for head in range(2)])
    mixed = ((scores + bias).softmax(-1) @ value).transpose(0, 1).reshape(3, 8)
    y = stage.norms[0](x[0] + stage.leave(mixed))
    wanted = stage.norms[1](y + stage.shrink(F.gelu(stage.grow(y))))
    assert torch.allclose(stage(x, steps, seen)[0], wanted, atol=1e-5)
    assert not torch.allclose(stage(x, None, seen)[0], wanted, atol=1e-3)
    hidden = seen.clone()
    hidden[:, :, 2] = False
    changed = x.clone()
    changed[:, 2] += torch.randn(8)
    assert torch.allclose(stage(x, steps, hidden)[0, :2], stage(changed, steps, hidden)[0, :2], atol=1e-6)


@pytest.mark.component("topology")
def test_a_soft_subtree_is_its_formula():
    torch.manual_seed(0)
    subtree, x, below = graphs.SoftSubtree(8), torch.randn(1, 5, 8), graphs.graph(a_tree(), SIZE).below[None]
    alike = torch.sigmoid(subtree.one(x[0]) @ subtree.other(x[0]).T / 8**0.5)
    speaks = torch.sigmoid(subtree.speaks(x[0]))
    mine = below[0].float()
    wanted = mine * (alike + (1 - alike) * speaks) + (1 - mine) * alike
    assert torch.allclose(subtree(x, below)[0], wanted, atol=1e-6)
    assert torch.allclose(subtree(x, None)[0], alike, atol=1e-6)
    logits, seen = torch.randn(1, 5, 3), torch.ones(1, 5, 5, dtype=torch.bool)
    seen[..., 4] = False
    kept = wanted[:, :4]
    mean = kept @ logits[0, :4] / kept.sum(1, keepdim=True)
    assert torch.allclose(graphs.averaged(logits, wanted[None], seen)[0], mean, atol=1e-5)


def moved(sight: str, change) -> list[bool]:
    """Of each branch of a tree: whether its answer moves when the graph is changed."""
    net, graph = labeller(sight), a_graph(1)
    with torch.no_grad():
        before, after = (torch.cat(net(each)[0], -1)[0] for each in (graph, change(graph)))
    return ((before - after).abs().amax(-1) > 1e-6).tolist()


def another_last(graph: graphs.Graph) -> graphs.Graph:
    features = graph.features.clone()
    features[:, 4, 1:] += 0.5
    return graph._replace(features=features)


@pytest.mark.component("topology")
def test_arms_differ_by_what_a_branch_sees():
    assert moved("tree", another_last) == moved("all", another_last) == [True] * 5
    assert moved("itself", another_last) == [False] * 4 + [True]
    hung = lambda graph: graph._replace(steps=graph.steps.flip(1), below=graph.below.flip(1))  # noqa: E731
    assert all(moved("tree", hung)) and not any(moved("all", hung)) and not any(moved("itself", hung))
    older = lambda graph: graph._replace(features=graph.features + F.one_hot(torch.tensor(0), graphs.FEATURES))  # noqa: E731
    assert all(moved("tree", older)) and not any(moved("all", older)) and not any(moved("itself", older))
    method = ARMS["airmorph"]
    assert ARMS["branches alone"] == replace(method, sight="itself") and method.sight == "tree"
    assert ARMS["without topology"] == replace(method, sight="all")


@pytest.mark.component("labelling at lobar, segmental and subsegmental resolution")
def test_later_stages_are_told_what_earlier_ones_made_and_padding_changes_nothing():
    net, pair = labeller(), a_graph()
    with torch.no_grad():
        (places, segments, subsegments), weights = net(pair)
        alone = net(a_graph(1))[0]
        assert [each.shape[-1] for each in (places, segments, subsegments)] == list(graphs.STAGES)
        for mine, whole in zip(alone, (places, segments, subsegments), strict=True):
            assert torch.allclose(mine[0], whole[0], atol=1e-5)
        small = net(graphs.padded([graphs.graph(a_tree()[:3], SIZE)]))[0]
        assert all(
            torch.allclose(a[0], b[1, :3], atol=1e-5)
            for a, b in zip(small, (places, segments, subsegments), strict=True)
        )
        net.stages[0].norms[1].bias += torch.randn(16)
        changed = net(pair)[0]
    assert all(
        not torch.allclose(a, b, atol=1e-3) for a, b in zip(changed, (places, segments, subsegments), strict=True)
    )
    assert weights.shape == (2, 5, 5) and weights.min() > 0 and weights.max() < 1


def test_the_loss_asks_each_stage_and_for_pairs_of_one_segment():
    targets = torch.tensor([[[0, 0, 0], [4, 1, 0], [4, 1, 1], [4, 2, 3], [graphs.UNKNOWN] * 3]])
    graph = a_graph(1)._replace(targets=targets)
    torch.manual_seed(0)
    logits, weights = [torch.randn(1, 5, count) for count in graphs.STAGES], torch.rand(1, 5, 5)
    wanted = sum(F.cross_entropy(each[0, :4], targets[0, :4, k]) for k, each in enumerate(logits))
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    wanted = wanted + F.binary_cross_entropy(weights[0, 1:4, 1:4], same)
    assert torch.isclose(graphs.naming_loss((logits, weights), graph), wanted, atol=1e-5)
    nameless = a_graph(1)
    assert graphs.naming_loss((logits, weights), nameless) == 0


@pytest.mark.component("binary airway modelling")
@pytest.mark.component("labelling at lobar, segmental and subsegmental resolution")
def test_a_step_segments_the_view_and_names_branches_of_the_image():
    torch.manual_seed(0)
    method = Airways(channels=(4, 8))
    nets = method.build(1, len(NAMES), 2).train()
    one = planted()
    data = Batch(torch.from_numpy(one.image)[None].float(), torch.from_numpy(one.label)[None])
    seen = method.augment(data, torch.Generator().manual_seed(0))
    assert not torch.equal(seen.labels, data.labels) and torch.equal(seen.raters[:, 0], data.labels)
    loss = method.training_step(nets, seen, None, Moment(0, 10))
    model = nets["model"]
    graph = graphs.graphs_of(data.labels)
    wanted = find_loss("both")(model.segmenter(seen.images), (seen.labels > 0).byte())
    wanted = wanted + graphs.naming_loss(model.labeller(graph), graph)
    assert torch.isclose(loss, wanted, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


class Knowing(torch.nn.Module):
    """In place of a labeller: gives each branch the commonest name of its place in a label map."""

    def __init__(self, label: np.ndarray):
        super().__init__()
        self.label = label

    def named(self, soft):
        tree = parsed(soft, graphs.root_of(soft > 0.5), graphs.FINER)
        return tuple(replace(one, name=graphs.commonest(one.points, self.label)) for one in tree)


@pytest.mark.component("binary airway modelling")
def test_predictions_give_an_airway_the_name_of_the_nearest_branch(monkeypatch):
    one, method = planted(), Airways(channels=(4, 8))
    nets = method.build(1, len(NAMES), 2).eval()
    soft = torch.from_numpy((one.label > 0) * 0.9).float()[None]
    monkeypatch.setattr(method, "found", lambda nets, images: soft)
    monkeypatch.setattr(nets["average"], "named", Knowing(one.label).named)
    with torch.no_grad():
        answer = method.predict(nets, torch.from_numpy(one.image)[None].float())
    assert answer.shape == (1, 64, *SIZE) and torch.allclose(answer.sum(1), torch.ones(1, *SIZE))
    assert torch.allclose(answer[:, 0], 1 - soft)
    there = one.label > 0
    assert (answer[0].argmax(0).numpy()[there] == one.label[there]).mean() > 0.85
    assert (airmorph.nearest_names((), (4, 4)) == 1).all()


@pytest.mark.component("topology preserved")
def test_breaks_are_bridged_and_what_is_far_is_left_out():
    soft = np.zeros((64, 64))
    soft[5:30, 30:34] = soft[35:60, 30:34] = 0.8
    soft[10:13, 2:5] = 0.9
    whole = bridged(soft, 6.0)
    assert len(parsed(whole)) == 1 and parsed(whole)[0].length > 50
    assert (whole[10:13, 2:5] == 0).all() and (whole[5:30, 30:34] == 0.8).all() and whole[32, 31] == 1
    apart = bridged(soft, 4.0)
    assert apart[5:60].max(1).min() == 0 and ((apart > 0).any(1).sum()) == 25
    assert (bridged(soft[:32], 6.0)[5:30] == bridged(soft[:32], 6.0)[5:30]).all()
    assert bridged(soft[:, 20:40], 1.0)[36:].max() == 0
    nothing = np.zeros((8, 8))
    assert bridged(nothing, 5.0) is nothing
    chain = np.zeros((20, 40))
    for column in (2, 12, 22):
        chain[8:12, column : column + 7] = 1.0
    assert (bridged(chain, 5.0)[9, 2:29] == 1).all(), "from part to part"


@pytest.mark.component("topology preserved")
def test_a_broken_airway_is_one_tree_with_names():
    torch.manual_seed(0)
    model = Airways(channels=(4, 8)).build(1, len(NAMES), 2)["average"].eval()
    soft = np.zeros(SIZE)
    soft[5:60, 60:66] = soft[64:120, 60:66] = 0.9
    tree = model.named(soft)
    assert [branch.parent for branch in tree] == [-1] and tree[0].length > 100 and 0 < tree[0].name < len(NAMES)
    assert model.named(np.zeros(SIZE)) == ()


@pytest.mark.component("topological consistency")
@pytest.mark.component("branching pattern analysis")
def test_names_count_along_the_true_line_where_it_was_found():
    truth = (
        tube((0, 50), (40, 50), name=VALUE["trachea"]),
        tube((40, 50), (40, 90), 0, 1, name=VALUE["RB1"]),
        tube((40, 50), (80, 50), 0, 1, name=VALUE["RB2a"]),
    )
    mask = _trees.rendered(truth, SIZE).mask
    right = naming(truth, truth, mask)
    assert all(right[name] == pytest.approx(1, abs=0.02) for name in ("lobes", "segments", "subsegments"))
    assert np.isnan(right["patterns"]), "of one segment a lobe's bronchus is no bronchus of several"
    mixed = (truth[0], replace(truth[1], name=VALUE["RB3"]), replace(truth[2], name=VALUE["RB2b"]))
    found = naming(truth, mixed, mask)
    assert found["lobes"] == pytest.approx(1, abs=0.02) and found["segments"] == pytest.approx(0.5, abs=0.03)
    assert found["subsegments"] == pytest.approx(0, abs=0.03)
    half = mask.copy()
    half[:, 70:] = False
    assert naming(truth, truth, half)["segments"] == pytest.approx(0.75, abs=0.02), "what is missed is not right"
    assert naming(truth, (), mask)["segments"] == 0


@pytest.mark.component("discriminative power for diseases")
@pytest.mark.component("anatomical signature")
def test_diseases_are_learnt_from_signatures():
    rng = np.random.default_rng(0)
    sick = rng.random(60) < 0.5
    measured = []
    for one in sick:
        values = dict.fromkeys((*airmorph.SIGNATURE, *airmorph.PLAIN), 0.0) | {"volume": rng.random()}
        measured.append(values | {"tortuosity": 1.0 + 0.2 * one + 0.02 * rng.standard_normal(), "length": float("nan")})
    diseases = Diseases(measured, list(sick))
    scores = np.array([diseases(one)["score"] for one in measured])
    plain = np.array([diseases(one)["score_plain"] for one in measured])
    assert scores[sick].min() > scores[~sick].max() and abs(plain[sick].mean() - plain[~sick].mean()) < 0.15
    assert Diseases(measured, [True] * 60)(measured[0]) == {"score": 0.5, "score_plain": 0.5}


class Few:
    """A task of one training and one validation image."""

    preparation = replace(airmorph.AIRWAYS_QUICK, side=48).preparation

    def cases(self, role):
        image = np.random.default_rng(len(role)).random((1, 96, 96), np.float32)
        label = np.zeros((96, 96), np.uint8)
        label[10:90, 8:44] = label[10:90, 52:88] = 1
        return iter([Case(image, label, role, role)])


@pytest.mark.component("discriminative power for diseases")
def test_rows_have_names_completeness_and_diseases(monkeypatch):
    method = Airways(channels=(4, 8))
    torch.manual_seed(0)
    nets = method.build(1, len(NAMES), 2)
    case = next(Few().cases("val"))
    planted = Few.preparation.planted(case)
    truth = torch.from_numpy(np.stack([one.label for one in planted]) > 0).float()
    monkeypatch.setattr(method, "found", lambda nets, images: truth)
    fitted = SimpleNamespace(method=method, task=Few(), nets=nets, weights={"last": nets.state_dict()})
    rows = airmorph.airway_rows(fitted, case)
    assert len(rows) == len(planted) > 0 and all(row.keys() == rows[0].keys() for row in rows)
    for row, one in zip(rows, planted, strict=True):
        assert row["length_detected"] == 1 and row["branches_detected"] == 1 and row["parts"] == 1
        assert row["score"] == 0.5 and row["outcome"] == (one.state != "healthy") and row["state"] == one.state
        for name in ("lobes", "segments", "subsegments"):
            assert row[name] == row[f"{name}_truth"] <= 1
        assert {*airmorph.SIGNATURE, "consistency", "patterns"} <= row.keys()
