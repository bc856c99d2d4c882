"""Words in place of boxes: kinds and absence, tests on answers, recognition, shapes, and the box-prompted SAM."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import assert_every_parameter_is_trained
from scipy import stats
from skimage.measure import regionprops
from torch import nn

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.recipes.language import _parsing as parsing
from medcook.recipes.language import biomedparse
from medcook.recipes.language._queries import sheet, sheet_loss
from medcook.recipes.language._settings import BRAIN, EVERYTHING, NAMES, SETS
from medcook.recipes.language.biomedparse import BiomedParse, BoxPrompted, Parsed, Parser, kinds_of
from medcook.sam.model import SmallSam
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of

SMALL = dict(channels=(4, 6, 8), width=16)
NOW = Moment(1, 10)


def disc(down: float, across: float, radius: float, side: int = 40) -> torch.Tensor:
    rows, columns = np.indices((side, side))
    return torch.from_numpy(np.hypot(rows - down, columns - across) <= radius)


def batch() -> Batch:
    """A heart with two of its structures, a neck with a mandible."""
    torch.manual_seed(1)
    labels = torch.zeros(2, 24, 24, dtype=torch.uint8)
    labels[0, :6], labels[0, 10:16], labels[1, 4:12, 4:12] = 1, 3, 12
    return Batch(torch.randn(2, 1, 24, 24), labels, groups=torch.tensor([0, 2]))


@pytest.mark.component("segmentation from a text prompt")
def test_an_answer_does_not_depend_on_what_else_is_asked():
    torch.manual_seed(0)
    method, images = BiomedParse(**SMALL), torch.randn(2, 1, 24, 30)
    nets = method.build(1, 18, 2).eval()
    names = ("larynx", "mandible", "spinal cord")
    with torch.no_grad():
        together = method.answer(nets, images, names)
        for place, name in enumerate(names):
            assert torch.allclose(method.answer(nets, images, (name,))[:, 0], together[:, place], atol=1e-5)
    assert together.shape == (2, 3, 24, 30) and not torch.allclose(together[:, 0], together[:, 1], atol=1e-4)


@pytest.mark.component("joint learning of masks and kinds")
def test_a_name_has_the_kind_of_its_set_and_none_where_it_is_not_there():
    values = torch.tensor([[1, 3, 4], [1 + NAMES.index("cell"), 12, 0]])
    there = torch.tensor([[True, False, True], [True, True, False]])
    assert kinds_of(values, there, SETS).tolist() == [[1, 0, 2], [5, 3, 0]]
    assert kinds_of(values[:1], there[:1], ()).tolist() == [[1, 0, 1]]


@pytest.mark.component("joint learning of masks and kinds")
def test_the_loss_is_of_masks_and_of_kinds_that_are_known():
    torch.manual_seed(0)
    method, data = BiomedParse(joint=0.3, absent=0.0, **SMALL), batch()
    nets = method.build(1, 18, 2)
    torch.manual_seed(5)
    loss = method.training_step(nets, data, None, NOW)
    torch.manual_seed(5)
    torch.rand(2)  # who is asked for something absent
    values, known = sheet(EVERYTHING, data)
    queries = nets["model"].text(method.named(values))[(values - 1).clamp_min(0)]
    logits, kinds = nets["model"].parse(data.images, queries, values == 0)
    assert known.int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [0] * 6 + [1]]
    truth = {(0, 0): 1, (0, 1): 0, (0, 2): 1, (1, 6): 3}  # set 0; not there; set 0; set 2
    entropy = -sum(kinds[place].log_softmax(0)[kind] for place, kind in truth.items()) / 4
    assert torch.allclose(loss, sheet_loss(logits, data.labels, values, known) + 0.3 * entropy, atol=1e-4)


@pytest.mark.component("joint learning of masks and kinds")
def test_some_images_are_asked_for_what_is_certainly_not_there():
    data = batch()
    values, known = sheet(EVERYTHING, data)
    method, asked = BiomedParse(absent=0.7, **SMALL), {0: [], 1: []}
    for seed in range(200):
        torch.manual_seed(seed)
        more, sure = method.with_absent(data, values, known)
        assert torch.equal(more[:, :-1], values) and torch.equal(sure[:, :-1], known)
        assert torch.equal(sure[:, -1], more[:, -1] > 0)
        for row in range(2):
            asked[row] += [int(more[row, -1])] * bool(more[row, -1])
    assert 0.6 < len(asked[0]) / 200 < 0.8
    assert 2 in asked[0] and not {1, 3} & {*asked[0]}
    assert not set(range(6, 13)) & {*asked[1]}, "what is not drawn may be there"


@pytest.mark.component("joint learning of masks and kinds")
def test_the_ablation_learns_masks_alone():
    torch.manual_seed(0)
    method, data = BiomedParse(joint=0.0, absent=1.0, **SMALL), batch()
    nets, asked = method.build(1, 18, 2), []
    nets["model"].asking.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    method.training_step(nets, data, None, NOW).backward()
    assert asked == [7] and not nets["model"].kind.weight.grad.any()
    arms = {name: arm.method for name, arm in biomedparse.recipe.arms.items()}
    assert arms["text, masks alone"] == replace(arms["text"], joint=0.0)


@pytest.mark.component("rejection of prompts that fit nothing")
def test_means_are_over_what_an_answer_claims():
    answer, image = torch.tensor([[0.9, 0.7], [0.4, 0.1]]), torch.tensor([[1.0, -1.0], [9.0, 9.0]])
    probability, brightness = parsing.means(answer, image)
    assert probability == pytest.approx(0.8) and brightness == pytest.approx(0.5)
    assert parsing.means(answer / 2, image) is None


@pytest.mark.component("rejection of prompts that fit nothing")
def test_the_p_value_is_that_of_two_kolmogorov_smirnov_tests():
    rng = np.random.default_rng(0)
    found = list(zip(rng.beta(20, 3, 40), rng.beta(4, 5, 40), strict=True))
    fits = parsing.expected(found)
    for values, (a, b) in zip(np.array(found).T, fits, strict=True):
        assert (a, b) == pytest.approx(stats.beta.fit(values, floc=0, fscale=1)[:2], rel=1e-4)
    for value in ((0.9, 0.5), (0.6, 0.5), (0.85, 0.95)):
        single = [stats.ks_1samp([m], stats.beta(*shape).cdf).pvalue for m, shape in zip(value, fits, strict=True)]
        assert parsing.p_value(value, fits) == pytest.approx(np.prod(single) ** 0.5, abs=1e-9)
    assert parsing.p_value((0.87, 0.44), fits) > 0.5 > 0.05 > parsing.p_value((0.52, 0.95), fits)
    assert parsing.p_value(None, fits) == 0 and parsing.p_value((0.5, 0.5), None) == 1
    alike = stats.beta(*parsing.beta(np.full(9, 0.8)))
    assert alike.mean() == pytest.approx(0.8) and alike.std() == pytest.approx(0.01)
    assert parsing.expected(found[:4]) is None and parsing.expected([(1.0, 0.5)] * 3 + found) is not None


@pytest.mark.component("rejection of prompts that fit nothing")
def test_what_is_told_of_right_and_of_wrong_names():
    full, empty = torch.full((4, 4), 0.9), torch.full((4, 4), 0.1)
    slices = [
        Parsed((1,), {1: (full, 0.4), 2: (full, 0.01), 3: (empty, 0.0)}),
        Parsed((1,), {1: (full, 0.02), 2: (full, 0.6), 3: (empty, 0.0)}),
        Parsed((1, 2), {1: (full, 0.9), 2: (full, 0.6), 3: (full, 0.3)}),
    ]
    told = biomedparse.judged(slices, 1, [2, 3, None])
    assert told["kept"] == pytest.approx(2 / 3) and told["p_right"] == pytest.approx(0.44)
    assert told["rejected"] == 1 and told["silent"] == 0.5 and told["p_wrong"] == pytest.approx(0.005)
    assert biomedparse.judged(slices, 1, [3, None, 3])["rejected"] == 0.5
    assert np.isnan(biomedparse.judged(slices, 1, [None] * 3)["rejected"])


@pytest.mark.component("recognition of all objects")
def test_the_surest_of_answers_that_overlap_is_kept_and_the_rejected_are_dropped():
    one, much, other = disc(10, 10, 6), disc(12, 10, 6), disc(30, 30, 5)
    answers = torch.stack([one, much, other, other & False, disc(20, 30, 5)]).float()
    assert parsing.recognised(answers, [0.3, 0.5, 0.2, 0.9, 0.1], 0.05) == [1, 2, 4]
    assert parsing.recognised(answers, [0.3, 0.5, 0.04, 0.9, 0.1], 0.05) == [1, 4]
    assert parsing.recognised(answers, [0.6, 0.5, 0.2, 0.9, 0.1], 0.05, shared=1.0) == [0, 1, 2, 4]
    assert parsing.f1({1, 2}, {2, 3, 4}) == pytest.approx(0.4) and parsing.f1(set(), set()) == 1
    ps = (0.3, 0, 0.5, 0, 0)
    found = Parsed((1,), {k + 1: (answers[k], ps[k]) for k in range(5)})
    assert biomedparse.recognition(found, set()) == pytest.approx(2 / 3)
    assert biomedparse.recognition(found, {1, 3}) == 1, "what is not drawn may be there"


@pytest.mark.component("irregular shapes")
def test_ratios_of_shapes_that_are_known():
    box = torch.zeros(40, 40, dtype=torch.bool)
    box[5:15, 8:28] = True
    told = parsing.regularity(box.numpy())
    assert told["box_ratio"] == 1 and told["convex_ratio"] == 1
    inertia = 200 * (10**2 + 20**2) / 12  # of a full rectangle
    assert told["inertia_ratio"] == pytest.approx(200**2 / (2 * np.pi * inertia), abs=1e-6)
    assert parsing.regularity(disc(20, 20, 15).numpy())["inertia_ratio"] == pytest.approx(1, abs=0.01)
    two = (disc(10, 8, 5) | disc(30, 30, 6)).numpy()
    told, theirs = parsing.regularity(two), regionprops(two.astype(int))[0]
    assert told["convex_ratio"] == pytest.approx(theirs.solidity) and told["box_ratio"] == pytest.approx(theirs.extent)
    assert told["inertia_ratio"] < 0.5


@pytest.fixture
def small_sam(monkeypatch):
    """A SAM with random weights in place of the one that ships."""
    torch.manual_seed(0)
    sam = SmallSam().eval()
    monkeypatch.setattr(biomedparse, "load_small", lambda: sam)
    return sam


@pytest.mark.component("box-prompted SAM")
def test_sam_gets_the_tight_box_and_nothing_of_it_learns(small_sam):
    method = BoxPrompted(language=BRAIN)
    nets = method.build(1, 4, 2)
    method.training_step(nets, batch(), None, NOW).backward()
    assert [name for name, p in nets["model"].named_parameters() if p.grad is not None] == ["idle"]
    masks, images = torch.stack([disc(12, 15, 6), disc(25, 20, 9)]), torch.randn(2, 1, 40, 40)
    fitted = SimpleNamespace(nets=nets, weights={"last": nets.state_dict()}, method=method)
    found, predictor = biomedparse.boxed(fitted, images, masks), Predictor(small_sam)
    for image, mask, answer in zip(images[:, 0].numpy(), masks.numpy(), found.numpy(), strict=True):
        assert np.array_equal(predictor(image, Prompt(box=box_of(mask))).mask, answer)


@pytest.mark.component("rejection of prompts that fit nothing")
def test_the_score_of_a_network_that_knows_everything(monkeypatch):
    """It answers every name with what the image, which is its label map, shows of it; and is right about absence."""
    label = torch.zeros(4, 40, 40, dtype=torch.uint8)
    for number in range(3):
        label[number][disc(12, 12, 5 + number)] = 1
    label[1][disc(30, 28, 6)] = 3

    def answer(nets, images, sentences):
        values = [1 + BRAIN.names.index(sentence) for sentence in sentences]
        return torch.stack([torch.where(images[:, 0] == value, 0.9, 0.1) for value in values], dim=1)

    method = BiomedParse(language=BRAIN, **SMALL)
    method.answer = answer
    images = label[:, None].float()
    task = SimpleNamespace(
        preparation=SimpleNamespace(images=lambda case: images, labels=lambda case: label),
        samples=lambda role: SimpleNamespace(images=images.repeat(4, 1, 1, 1), labels=label.repeat(4, 1, 1)),
        structures={1: "grey", 2: "white", 3: "csf"},
        data=None,
    )
    fitted = SimpleNamespace(
        nets=nn.ModuleDict({"average": nn.Identity()}), weights={"last": {}}, method=method, task=task
    )
    known = biomedparse.expectations(fitted)
    assert set(known) == {1, 3} and known[3] is None, "of the third structure there are four images alone"
    case = Case(images.numpy()[None, :, 0], label.numpy(), "c", "p")
    rows = {row["structure"]: row for row in biomedparse.parsed_rows(fitted, case)}
    assert set(rows) == {"grey", "csf"} and all(row["dice"] == 1 and row["kept"] == 1 for row in rows.values())
    assert all(row["rejected"] == row["silent"] == row["recognised"] == 1 for row in rows.values())
    ratios = [parsing.regularity(disc(12, 12, radius).numpy())["box_ratio"] for radius in (5, 6, 7)]
    assert rows["grey"]["box_ratio"] == pytest.approx(np.mean(ratios))
    assert all(parsing.p_value((0.52, 0.9), known[1]) < 0.05 for _ in rows)
    monkeypatch.setattr(biomedparse, "boxed", lambda fitted, images, masks: masks & (torch.arange(40) < 12))
    fitted.method = BoxPrompted(language=BRAIN)
    boxed = {row["structure"]: row for row in biomedparse.parsed_rows(fitted, case)}
    assert boxed["csf"]["dice"] == 0 < boxed["grey"]["dice"] < 1
    assert boxed["grey"]["box_ratio"] == rows["grey"]["box_ratio"]


def test_all_of_it_is_trained_on_images_of_any_size():
    assert_every_parameter_is_trained(BiomedParse(language=BRAIN, **SMALL), (30, 45))
    assert isinstance(BiomedParse(language=BRAIN, **SMALL).network_for(1), Parser)
