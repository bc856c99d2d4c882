"""Heads made from sentences about modality and class, and batches of one modality each."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.data import Case
from medcook.domains import PLAIN, as_shown
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.few_shot.vlp_sam import TEXT, encode_text
from medcook.recipes.language import mulmodseg
from medcook.recipes.language.mulmodseg import DARK, WIDTH, Alternating, TextHeaded, headed, in_both, recipe, sentences

TINY = dict(channels=(4, 8))


class Sees(nn.Module):
    """A network that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Conv2d(1, 3, 1), []

    def forward(self, images, modality):
        self.seen.append((images[:, 0, 0, 0].tolist(), modality))
        return self.head(images)


def batch(numbers: list[int], groups: list[int]) -> Batch:
    """Images that are their number all over, with that number as label, too."""
    images = torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = (torch.tensor(numbers) % 3).byte().view(-1, 1, 1).expand(-1, 8, 8)
    return Batch(images, labels, groups=torch.tensor(groups))


def shown(method: Alternating, batches: list[Batch]) -> tuple[list, list[torch.Tensor]]:
    """What the network saw in each step, and the losses."""
    torch.manual_seed(0)
    nets = nn.ModuleDict({"model": Sees(), "waiting": mulmodseg.Bank()})
    losses = [method.training_step(nets, one, None, Moment(step, 10)) for step, one in enumerate(batches)]
    return nets["model"].seen, losses


def network(classes: int = 4, names=mulmodseg.HEART) -> TextHeaded:
    torch.manual_seed(0)
    return TextHeaded(1, classes, (4, 8), names)


@pytest.mark.component("modality-conditioned text embedding")
class TestHeads:
    def test_a_head_is_three_convolutions(self):
        torch.manual_seed(0)
        features, heads = torch.randn(2, WIDTH, 5, 6), torch.randn(2, 3, sum(mulmodseg.SIZES))
        found = headed(features, heads)
        for row in range(2):
            for k in range(3):
                x, at = features[row : row + 1], 0
                biases = heads[row, k, 2 * WIDTH**2 + WIDTH :]
                for layer, outputs in enumerate((WIDTH, WIDTH, 1)):
                    weight = heads[row, k, at : at + outputs * WIDTH].view(outputs, WIDTH, 1, 1)
                    at += outputs * WIDTH
                    x = F.conv2d(x, weight, biases[layer * WIDTH : layer * WIDTH + outputs])
                    x = F.relu(x) if layer < 2 else x
                torch.testing.assert_close(found[row, k], x[0, 0], atol=1e-4, rtol=1e-4)

    def test_the_sentence_of_modality_and_class_decides(self):
        """Where two modalities say the same, so does the network; a class's sentence is heard by its head alone."""
        net, images = network(), torch.randn(2, 1, 16, 16)
        bright, dark = (net(images, number) for number in (0, 1))
        assert not torch.allclose(bright, dark, atol=1e-4)
        net.said[0, 2] = net.said[1, 2]
        mixed = net(images, 0)
        torch.testing.assert_close(mixed[:, 2], dark[:, 2])
        torch.testing.assert_close(mixed[:, [0, 1, 3]], bright[:, [0, 1, 3]])

    def test_heads_also_depend_on_the_image_as_a_whole(self):
        """With its own deepest features taken away, an image's heads are others."""
        net, images = network(), torch.randn(2, 1, 16, 16)
        before = net(images, 0)
        net.image.weight.data.zero_()
        assert not torch.allclose(before, net(images, 0), atol=1e-4)

    def test_the_features_are_those_of_the_u_net(self):
        net, images = network().eval(), torch.randn(2, 1, 13, 18)
        features, deepest = net.both_ends(images)
        torch.testing.assert_close(features, net.net(images))
        assert deepest.shape == (2, 8, 6, 9) and features.shape == (2, WIDTH, 13, 18)

    def test_the_ablation_is_the_same_but_for_its_heads(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        differ = {key for key, value in arms["mulmodseg"].items() if arms["without text"][key] != value}
        assert differ == {"heads"} and recipe.ablation == ("mulmodseg", "without text")
        plain = Alternating(**TINY, heads="plain").build(1, 3, 2)["model"]
        images = torch.randn(2, 1, 8, 8)
        assert torch.equal(plain(images, 0), plain(images, 1))


@pytest.mark.component("frozen text encoder")
def test_sentences_and_their_encoding_stay_as_they_are():
    said = sentences(("background", "liver"), 3)
    assert said[1][1] == "A dark blood magnetic resonance imaging of a liver." and said[0][2].endswith("a structure 2.")
    net = network(3, ("background", "liver"))
    torch.testing.assert_close(net.said[1, 1], encode_text(said[1][1]) * TEXT**0.5)
    assert len({tuple(row) for row in net.said.flatten(0, 1).tolist()}) == 6
    assert "said" not in dict(net.named_parameters()) and "said" in net.state_dict()


@pytest.mark.component("alternating training")
class TestTurns:
    BATCHES = (([1, 2, 3, 4], [0, 1, 0, 1]), ([5, 6, 7, 8], [1, 1, 1, 0]), ([9, 10, 11, 12], [1, 0, 0, 0]))

    def test_steps_see_one_modality_in_turn_and_every_image_once(self):
        seen, losses = shown(Alternating(), [batch(*each) for each in self.BATCHES])
        assert seen == [([1, 3], 0), ([2, 4, 5, 6, 7], 1), ([8, 10, 11, 12], 0)]
        torch.manual_seed(0)
        net = Sees()
        images = torch.tensor([2.0, 4, 5, 6, 7]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        labels = torch.tensor([2, 1, 2, 0, 1]).byte().view(-1, 1, 1).expand(-1, 8, 8)
        assert losses[1].item() == pytest.approx(cross_entropy_and_dice(net(images, 1), labels).item(), rel=1e-5)

    def test_without_turns_a_step_sees_both(self):
        seen, _ = shown(Alternating(turns=False), [batch(*each) for each in self.BATCHES[:2]])
        assert seen == [([1, 3], 0), ([2, 4], 1), ([8], 0), ([5, 6, 7], 1)]

    def test_where_there_is_nobody_nothing_is_learnt(self):
        seen, losses = shown(Alternating(), [batch([1, 2], [1, 1]), batch([3], [0])])
        assert seen == [([1, 2], 1)] and losses[0].item() == 0

    def test_who_waits_is_saved(self):
        """An interrupted run goes on with the images that wait."""
        method = Alternating(**TINY)
        nets, other = method.build(1, 3, 2), method.build(1, 3, 2)
        method.training_step(nets, batch(*self.BATCHES[0]), None, Moment(0, 10))
        other.load_state_dict(nets.state_dict())
        assert other["waiting"].images[:, 0, 0, 0].tolist() == [2, 4]

    def test_prediction_uses_the_batch_at_hand(self):
        """Brighter images with more contrast are answered the same, where running means would remember the training."""
        for heads in ("text", "plain"):
            torch.manual_seed(0)
            nets = Alternating(**TINY, heads=heads).build(1, 3, 2).eval()
            images = torch.randn(3, 1, 16, 16)
            inner = [part for part in nets["average"].modules() if isinstance(part, nn.BatchNorm2d)]
            assert inner and not any(part.track_running_stats for part in inner)
            one, other = (Alternating(**TINY, heads=heads).predict(nets, scale * images) for scale in (1, 30))
            torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


@pytest.mark.component("single-modality training")
def test_each_of_the_separate_networks_learns_from_its_own():
    torch.manual_seed(0)
    method = Alternating(**TINY, heads="separate")
    nets = method.build(1, 3, 2)
    for step, each in enumerate(TestTurns.BATCHES[:2]):
        nets.zero_grad()
        method.training_step(nets, batch(*each), None, Moment(step, 10)).backward()
        trained = [any(p.grad is not None for p in net.parameters()) for net in nets["model"].nets]
        assert trained == [step == 0, step == 1]


@pytest.mark.component("no significant structural modifications")
def test_text_adds_little_to_the_network():
    """Four U-Net levels and more stay as they are; what is added costs few numbers."""
    counts = [
        sum(p.numel() for p in Alternating(heads=heads).build(1, 4, 2)["model"].parameters())
        for heads in ("text", "plain")
    ]
    assert 1 < counts[0] / counts[1] < 1.25
    theirs, mine = (Alternating(heads=h).build(1, 4, 2)["model"].net for h in ("text", "plain"))
    shapes = [[p.shape for p in [*net.down.parameters(), *net.up.parameters()]] for net in (theirs, mine)]
    assert shapes[0] == shapes[1]


def test_the_score_asks_about_both_appearances():
    class Task:
        structures = {1: "ring"}

    asked = []

    @dataclass
    class Run:
        method: object
        task: object = Task()

        def predict(self, case):
            asked.append((getattr(self.method, "modality", None), case.attributes["look"]))
            return case.label if case.attributes["look"] == PLAIN else 0 * case.label

    label = torch.ones(4, 4).byte().numpy()
    case = Case(torch.randn(1, 4, 4).numpy(), label, case_id="a", patient_id="a", spacing=(1.0, 1.0))
    rows = in_both(Run(Alternating()), case)
    assert asked == [(0, PLAIN), (1, DARK)]
    assert [(row["structure"], row["dice"]) for row in rows] == [(f"ring, {PLAIN}", 1.0), (f"ring, {DARK}", 0.0)]
    in_both(Run(Supervised()), as_shown(case, DARK))
    assert asked[2:] == [(None, PLAIN), (None, DARK)]


@pytest.mark.component("unpaired CT and MR")
def test_arms_share_setting_and_groups_say_the_appearance():
    task = recipe.scales["full"].task
    assert task.look == DARK and task.known is None and task.dataset == "acdc"
    methods = [arm.method for arm in recipe.arms.values()]
    assert len({(m.channels, m.loss, m.rate, str(m.augmentation)) for m in methods}) == 1
    small = replace(Alternating.trial, fold=0)
    samples = small.samples("labelled")
    looks = [small.preparation.look_of(case) for case in small.cases("labelled")]
    assert samples.groups.tolist() == [int(looks[number] == DARK) for number in samples.case_of.tolist()]


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_every_parameter_is_trained_at_any_size(size):
    assert_every_parameter_is_trained(Alternating(channels=(4, 8, 8)), size)
