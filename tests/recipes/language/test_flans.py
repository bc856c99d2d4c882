"""Questions by name, position and size, and scans that are turned upright and back."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_every_parameter_is_trained
from torch import nn

from medcook.language import mask_loss, meant
from medcook.methods import Batch, Moment
from medcook.recipes.language import flans
from medcook.recipes.language.flans import (
    EXTENTS,
    KINDS,
    PLACES,
    TURNS,
    Canonicaliser,
    CanonicalUNet,
    FreeForm,
    Turned,
    agreement,
    chosen,
    each_turned,
    extreme,
    oriented_rows,
    recipe,
    turned,
    upright,
)

SMALL = dict(channels=(4, 6, 8), width=16)
NOW = Moment(1, 10)


def heart(side: int = 16) -> torch.Tensor:
    """(side, side): 1 is small and on the left, 2 a large block on the right, 3 between and low."""
    label = torch.zeros(side, side, dtype=torch.uint8)
    label[4:7, 1:4], label[2:10, 9:15], label[11:15, 5:8] = 1, 2, 3
    return label


def batch(count: int = 4) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(count, 1, 16, 16), heart().expand(count, -1, -1))


@pytest.mark.component("prompts by name, position and size")
class TestQuestions:
    def test_what_is_extreme(self):
        found = {word: extreme(heart(), word) for word in (*PLACES, *EXTENTS)}
        assert found == dict(leftmost=1, rightmost=2, topmost=2, lowest=3, largest=2, smallest=1)
        assert extreme(heart().flip(-1), "leftmost") == 2 and extreme(heart().flip(-2), "lowest") == 2

    def test_a_question_says_what_its_answer_is(self):
        language, seen = FreeForm(), Counter()
        torch.manual_seed(0)
        for kind in KINDS * 60:
            sentence, values = language.question(heart(), kind, absent=False)
            words = [word for word in (*PLACES, *EXTENTS) if word in sentence]
            if kind == "name":
                assert not words and language.plain(values[0]) in sentence
            else:
                assert words[0] in (PLACES if kind == "position" else EXTENTS)
                assert values == (extreme(heart(), words[0]),) and not any(name in sentence for name in flans.HEART)
            seen[kind, sentence] += 1
        assert len(seen) > 40  # of 24 by name, 20 by position and 10 by size

    @pytest.mark.component("prompt generator with retrieval")
    def test_wordings_are_drawn_at_random_and_scores_use_the_first(self):
        torch.manual_seed(0)
        language = FreeForm()
        for kind, count in (("name", 24), ("size", 10)):
            assert len({language.question(heart(), kind, absent=False).sentence for _ in range(400)}) == count
        assert language.name(1) == "right ventricle" and language.describe(heart(), "largest").sentence == (
            "the largest structure"
        )

    def test_one_structure_alone_is_asked_for_by_name(self):
        label = (heart() == 2).byte() * 2
        assert "myocardium" in FreeForm().question(label, "size", absent=False).sentence
        assert FreeForm().question(0 * label, "position", absent=False).values == ()

    def test_shares_of_kinds(self):
        torch.manual_seed(0)
        found = Counter(Turned().drawn_kinds(4000))
        assert [found[kind] / 4000 for kind in KINDS] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
        assert set(recipe.arms["names alone"].method.drawn_kinds(50)) == {"name"}


class Sees(nn.Module):
    """A network that keeps what it is shown, and answers nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, images, sentences):
        self.seen.append((images, sentences))
        return images[:, 0] * self.weight


@pytest.mark.component("prompts by name, position and size")
def test_images_and_masks_are_turned_together_but_for_positions(monkeypatch):
    """A batch whose image is its label: the answer asked for is in the image that the network sees."""
    method, masks = Turned(canonical=False), []
    monkeypatch.setattr(method, "answer_loss", lambda logits, mask: masks.append(mask) or mask_loss(logits, mask, True))
    torch.manual_seed(3)
    data = batch(64)._replace(
        images=heart()[None, None].float().expand(64, -1, -1, -1), labels=heart().expand(64, -1, -1)
    )
    nets = nn.ModuleDict({"model": Sees()})
    method.training_step(nets, data, None, NOW)
    ((images, sentences),) = nets["model"].seen
    moved = 0
    for image, sentence, mask in zip(images[:, 0], sentences, masks[0], strict=True):
        turn = next(k for k in range(TURNS) if torch.equal(turned(heart(), k).float(), image))
        moved += turn > 0
        value = image[mask > 0].unique().tolist()
        assert len(value) <= 1 and (not value or torch.equal(mask > 0, image == value[0]))
        word = next((word for word in PLACES if word in sentence), None)
        if word:
            assert turn == 0 and value == [extreme(heart(), word)]
        if any(size in sentence for size in EXTENTS):
            assert value == [extreme(heart(), next(size for size in EXTENTS if size in sentence))]
    assert moved > 20


@pytest.mark.component("symmetry-aware canonicalisation")
class TestCanonical:
    def network(self) -> CanonicalUNet:
        torch.manual_seed(0)
        return CanonicalUNet(1, (4, 6, 8), 16).eval()

    def test_eight_turns_that_have_inverses(self):
        image = torch.randn(2, 3, 5, 5)
        versions = [turned(image, turn) for turn in range(TURNS)]
        assert len({tuple(version[0, 0].flatten().tolist()) for version in versions}) == 8
        assert all(torch.equal(upright(version, turn), image) for turn, version in enumerate(versions))
        assert torch.equal(turned(image, 1)[0, 0], image[0, 0].T.flip(0)) and torch.equal(versions[4], image.flip(-1))
        both = each_turned(image, torch.tensor([3, 6]))
        assert torch.equal(both[0], turned(image[0], 3)) and torch.equal(both[1], turned(image[1], 6))

    def test_turning_an_image_permutes_the_numbers(self):
        torch.manual_seed(0)
        net, image = Canonicaliser(1), torch.randn(1, 1, 16, 16)
        plain = net(image)[0]
        for turn in range(TURNS):
            found = net(turned(image, turn))[0]
            torch.testing.assert_close(found.sort().values, plain.sort().values)
            torch.testing.assert_close(found[turn], plain[0])
        assert plain.std() > 1e-4

    def test_answers_turn_with_the_image(self):
        net, image = self.network(), torch.randn(1, 1, 16, 16)
        plain = net(image, ("left ventricle",))
        for turn in range(TURNS):
            found = net(turned(image, turn), ("left ventricle",))
            torch.testing.assert_close(found, turned(plain, turn), atol=1e-4, rtol=1e-4)

    def test_the_image_is_turned_by_the_inverse_of_the_highest_number_and_the_answer_back(self, monkeypatch):
        net, image = self.network(), torch.randn(1, 1, 16, 16)
        told = flans.ToldUNet.forward
        for turn in (2, 5):
            monkeypatch.setattr(
                net.canonicaliser, "forward", lambda x, turn=turn: F.one_hot(torch.tensor([turn]), 8) + 0.0
            )
            plain = super(CanonicalUNet, net).encode(upright(image, turn))
            torch.testing.assert_close(net.encode(image)[0], plain[0])
            expected = turned(super(CanonicalUNet, net).decode(plain, ("x",)), turn)
            torch.testing.assert_close(told(net, image, ("x",)), expected)

    def test_the_choice_is_hard_and_its_gradient_soft(self):
        numbers = torch.randn(3, 8, requires_grad=True)
        weight = torch.randn(3, 8)
        found = chosen(numbers, learning=True)
        torch.testing.assert_close(found, F.one_hot(numbers.argmax(1), 8).float())
        (slope,) = torch.autograd.grad((found * weight).sum(), numbers, retain_graph=True)
        (soft,) = torch.autograd.grad((numbers.softmax(1) * weight).sum(), numbers)
        torch.testing.assert_close(slope, soft)
        assert not chosen(numbers, learning=False).requires_grad

    def test_the_loss_says_which_turn_it_was(self, monkeypatch):
        method = Turned(**SMALL, prior=2.0)
        nets = method.build(1, 4, 2)
        monkeypatch.setattr(method, "answer_loss", lambda logits, masks: 0.0 * logits.sum())
        seen, given, randint = [], [], torch.randint
        nets["model"].canonicaliser.register_forward_hook(lambda _, inputs, found: seen.append((inputs[0], found)))

        def drawn(*args, **settings):
            found = randint(*args, **settings)
            given.extend([found] if args == (TURNS, (6,)) else [])
            return found

        monkeypatch.setattr(flans.torch, "randint", drawn)
        loss = method.training_step(nets, batch(6), None, NOW)
        assert loss.item() == pytest.approx(2 * F.cross_entropy(seen[-1][1], given[0]).item(), rel=1e-5)
        assert len(set(given[0].tolist())) > 1

    def test_it_learns_how_scans_are_turned(self):
        torch.manual_seed(0)
        net = Canonicaliser(1)
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(60):
            turns = torch.randint(TURNS, (16,))
            images = each_turned(heart()[None, None].float() + 0.3 * torch.randn(16, 1, 16, 16), turns)
            loss = F.cross_entropy(net(images), turns)
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        assert loss < 0.5 and (net(images).argmax(1) == turns).float().mean() > 0.8

    def test_the_ablation_is_the_same_without_it(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        differ = {key for key, value in arms["flans"].items() if arms["without canonicalisation"][key] != value}
        assert differ == {"canonical"} and recipe.ablation == ("flans", "without canonicalisation")
        assert type(Turned(canonical=False).network_for(1)) is flans.ToldUNet


@pytest.mark.component("consistency across orientations")
class TestScore:
    def rows(self, answer) -> dict[str, dict]:
        """Rows of a case of one slice, after answers `answer(image, sentences)`."""
        method = SimpleNamespace(language=FreeForm(), answer=lambda nets, images, sentences: answer(images, sentences))
        preparation = SimpleNamespace(
            images=lambda case: heart()[None, None].float(), labels=lambda case: heart()[None]
        )
        task = SimpleNamespace(preparation=preparation, structures=dict.fromkeys((1, 2, 3)))
        nets = SimpleNamespace(load_state_dict=lambda state: None, eval=lambda: None)
        fitted = SimpleNamespace(nets=nets, weights={"last": None}, method=method, task=task)
        case = SimpleNamespace(case_id="a", patient_id="a")
        return {row["structure"]: row for row in oriented_rows(fitted, case)}

    def truth(self, sentence: str) -> int:
        word = next((word for word in (*PLACES, *EXTENTS) if word in sentence), None)
        return extreme(heart(), word) if word else 1 + flans.HEART.index(sentence)

    def test_right_answers_in_every_orientation(self):
        found = self.rows(lambda x, said: torch.stack([(x[:, 0] == self.truth(s)).float() for s in said], 1))
        assert set(found) == set(KINDS)
        assert all(row["dice"] == row["upright"] == row["consistent"] == 1 for row in found.values())

    def test_who_is_right_in_one_orientation_only(self):
        def answer(images, said):
            right = torch.equal(images[0, 0], heart().float())
            return torch.stack([(images[:, 0] == self.truth(s)).float() * right for s in said], 1)

        found = self.rows(answer)
        assert found["name"]["dice"] == pytest.approx(1 / 8) and found["name"]["upright"] == 1
        assert found["position"]["dice"] == 1, "which is asked of the scan as it is"
        assert found["size"]["consistent"] == pytest.approx(21 / 28)  # pairs of seven empty answers agree

    def test_agreement_against_a_loop(self):
        torch.manual_seed(0)
        masks = torch.rand(4, 3, 5, 5) > 0.5
        dice = [2 * (masks[a] & masks[b]).sum() / (masks[a].sum() + masks[b].sum()) for a in range(4) for b in range(a)]
        assert agreement(masks) == pytest.approx((sum(dice) / 6).item())


def test_quick_speaks_of_brains():
    scale = recipe.scales["quick"]
    for name, method in scale.methods.items():
        assert method.language.names[0] == "grey matter"
        assert replace(method, language=FreeForm()) == recipe.arms[name].method
    assert meant(heart()[None], [FreeForm().describe(heart(), "largest")]).sum() == (heart() == 2).sum()


@pytest.mark.parametrize("canonical", [True, False])
def test_every_parameter_is_trained(canonical):
    assert_every_parameter_is_trained(Turned(**SMALL, canonical=canonical), (24, 24))
