"""VESSA: what the assistant matches, whom it is prompted by, and whom it teaches."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from medcook.data import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, MeanTeacher, Moment
from medcook.recipes.semi_supervised.vessa import TemplateMatcher, Vessa, degraded, fuse

TINY = dict(channels=(4, 8))
EARLY, LATE = Moment(0, 10), Moment(9, 10)


@pytest.fixture
def nets() -> nn.ModuleDict:
    """A student, and a teacher that says something else."""
    nets = Vessa(**TINY).build(inputs=1, classes=3, dims=2)
    with torch.no_grad():
        nets["average"].head.weight *= 4
    return nets


@pytest.fixture
def matcher() -> TemplateMatcher:
    return TemplateMatcher(inputs=1, classes=3, channels=(4, 8), dims=2)


def batch(seed: int, count: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count, 16, 16), generator=rng).byte()
    return Batch(labels[:, None] + torch.randn(count, 1, 16, 16, generator=rng), labels)


def unlabelled(seed: int) -> Batch:
    images, labels = batch(seed)[:2]
    return Batch(images, torch.full_like(labels, IGNORE))


class Recording(nn.Module):
    """An assistant that keeps what it is asked, and always answers the same."""

    classes = 3

    def __init__(self, logits: tuple[float, ...] = (0.0, 0.0, 0.0)):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.asked: list[tuple] = []

    def forward(self, query, templates, masks, prompt=None):
        self.asked.append((query, templates, masks, prompt))
        return self.logits.view(1, -1, 1, 1).expand(len(query), 3, *query.shape[2:])


def step(method: Vessa, nets: nn.ModuleDict, now: Moment = LATE) -> torch.Tensor:
    """One step on always the same images, with always the same random numbers."""
    torch.manual_seed(3)
    return method.training_step(nets, batch(0), unlabelled(1), now)


@pytest.mark.component("visual feature matching")
class TestMatching:
    def features(self, count: int) -> torch.Tensor:
        return torch.randn(count, 5, 4, 4)

    def test_best_and_mean_similarity_to_every_class(self, matcher):
        """Each class has two feature vectors; enough are drawn to meet both."""
        matcher.pixels = 4000
        masks = torch.randint(0, 3, (2, 1, 4, 4)).float()
        kind = masks[:, 0].long() * 2 + torch.randint(0, 2, (2, 4, 4))
        vectors, query = torch.randn(6, 5), self.features(3)
        found = matcher.semantic(query, vectors[kind].movedim(-1, 1), masks).numpy()
        pixels = query.movedim(1, -1).reshape(-1, 5).numpy()
        for value in range(3):
            wanted = cosine_similarity(pixels, vectors[kind][masks[:, 0] == value].numpy())
            assert found[:, 2 * value].ravel() == pytest.approx(wanted.max(1), abs=1e-5)
            assert found[:, 2 * value + 1].ravel() == pytest.approx(wanted.mean(1), abs=0.08)

    def test_pixels_that_say_nothing_are_not_matched(self, matcher):
        """Where the mask is IGNORE there is something that looks just like the query."""
        query = self.features(1)
        masks = torch.full((1, 1, 4, 4), float(IGNORE))
        assert not matcher.semantic(query, query, masks).any() and not matcher.spatial(query, query, masks).any()
        masks[..., 0, 0] = 2
        assert matcher.semantic(query, query, masks)[0, 4, 0, 0].item() == pytest.approx(1, abs=1e-5)
        assert matcher.semantic(query, query, masks)[0, 4, 0, 1] < 0.99

    def test_space_comes_from_the_templates_that_look_alike(self, matcher):
        templates = torch.cat([torch.eye(5)[each].view(1, 5, 1, 1).expand(1, 5, 4, 4) for each in (0, 1)])
        masks = torch.randint(0, 3, (2, 1, 4, 4)).float()
        said = nn.functional.one_hot(masks[:, 0].long(), 3).movedim(-1, 1).float()
        found = matcher.spatial(templates[[1, 0]], templates, masks)
        assert torch.allclose(found, said[[1, 0]], atol=1e-3)
        between = matcher.spatial(templates.sum(0, keepdim=True), templates, masks)
        assert torch.allclose(between[0], said.mean(0), atol=1e-5)

    def test_likeness_weighs_by_the_softmax_of_the_cosine(self, matcher):
        query, templates = self.features(1), self.features(3)
        masks = torch.randint(0, 3, (3, 1, 4, 4)).float()
        means = [part.flatten(2).mean(2).numpy() for part in (query, templates)]
        weight = softmax(cosine_similarity(*means)[0] / 0.1)
        said = np.eye(3)[masks[:, 0].long().numpy()]
        wanted = np.einsum("m,mhwc->chw", weight, said)
        assert matcher.spatial(query, templates, masks)[0].numpy() == pytest.approx(wanted, abs=1e-5)

    def test_the_mask_follows_templates(self, matcher):
        """Other masks on the same templates, another answer."""
        query, (images, labels, *_) = batch(0, 1).images, batch(1, 2)
        torch.manual_seed(0)
        one = matcher(query, images, labels)
        torch.manual_seed(0)
        other = matcher(query, images, (labels + 1) % 3)
        assert one.shape == (1, 3, 16, 16) and (one - other).abs().max() > 1e-3


@pytest.mark.component("template bank")
class TestBank:
    def test_the_bank_is_what_is_labelled(self):
        images, masks = Vessa().bank(batch(0))
        assert torch.equal(images, batch(0).images) and torch.equal(masks, batch(0).labels)

    def test_no_image_is_its_own_template(self):
        """Every labelled image is asked about once; templates come with their masks, and never with the query."""
        assistant, known = Recording(), batch(0)
        Vessa().rehearse(assistant, known, (known.images, known.labels))
        asked = torch.cat([query for query, *_ in assistant.asked])
        assert sorted(asked.flatten(1).sum(1).tolist()) == sorted(known.images.flatten(1).sum(1).tolist())
        for query, templates, masks, _ in assistant.asked:
            assert len(templates) == 2
            assert not (query[:, None] == templates[None]).flatten(2).all(2).any()
            for image, mask in zip(templates, masks, strict=True):
                place = int((known.images == image).flatten(1).all(1).nonzero())
                assert torch.equal(mask, known.labels[place])

    def test_unlabelled_images_are_matched_with_the_bank(self, nets):
        nets["assistant"] = Recording()
        step(Vessa(**TINY), nets)
        query, templates, masks, _ = nets["assistant"].asked[-1]
        assert torch.equal(query, unlabelled(1).images)
        assert torch.equal(templates, batch(0).images) and torch.equal(masks, batch(0).labels)

    def test_without_templates_the_bank_says_nothing_and_all_else_is_equal(self, nets):
        nets["assistant"] = Recording()
        step(Vessa(**TINY), nets)
        step(Vessa(**TINY, templates=False), nets)
        with_them, without = nets["assistant"].asked[:3], nets["assistant"].asked[3:]
        for (query, images, _, prompt), (same_query, same_images, masks, same_prompt) in zip(
            with_them, without, strict=True
        ):
            assert torch.equal(query, same_query) and torch.equal(images, same_images)
            assert torch.equal(prompt, same_prompt) and (masks == IGNORE).all()

    def test_the_assistant_learns_the_labels_of_the_query(self):
        """One that reads the labels off the query has nothing to learn; one that guesses has."""
        known = batch(0)
        known = known._replace(images=known.labels[:, None].float())
        reader = Recording()
        reader.forward = lambda query, *others: 20 * torch.eye(3)[query[:, 0].long()].movedim(-1, 1)
        read, guessed = (Vessa().rehearse(one, known, (known.images, known.labels)) for one in (reader, Recording()))
        nothing = torch.zeros(4, 3, 16, 16)
        assert read < 1e-4 and guessed.item() == pytest.approx(self.cost(nothing, known.labels), abs=0.02)

    def cost(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        return cross_entropy_and_dice(logits, labels).item()


@pytest.mark.component("dynamic interaction")
class TestInteraction:
    def test_the_teacher_prompts_the_assistant(self, nets, monkeypatch):
        """The teacher is the student's moving average: when it says something else, so does the prompt."""
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        nets["assistant"] = Recording()
        prompts = []
        for _ in range(2):
            said = nets["average"](unlabelled(1).images).softmax(1)
            step(Vessa(**TINY), nets)
            prompts.append(nets["assistant"].asked[-1][3])
            assert torch.allclose(prompts[-1], said, atol=1e-5)
            nn.init.normal_(nets["average"].head.bias)
        assert not torch.allclose(*prompts)

    def test_without_feedback_nobody_prompts(self, nets):
        nets["assistant"] = Recording()
        step(Vessa(**TINY, feedback=False), nets)
        assert nets["assistant"].asked[-1][3] is None

    def test_what_the_assistant_is_sure_of_joins_the_pseudo_label(self):
        teacher, assistant = torch.rand(2, 3, 8, 8).softmax(1), (4 * torch.randn(2, 3, 8, 8)).softmax(1)
        fused = fuse(teacher, assistant, 0.8)
        sure = assistant.max(1).values >= 0.8
        assert 0.1 < sure.float().mean() < 0.9
        for value in range(3):
            wanted = np.where(sure, (teacher[:, value] + assistant[:, value]) / 2, teacher[:, value])
            assert fused[:, value].numpy() == pytest.approx(wanted)

    def test_the_student_learns_the_joint_pseudo_label(self, nets):
        """A sure assistant drags the target from the teacher's to its own class; an unsure one leaves it."""
        costs = {}
        for name, logits in (("sure", (0.0, 9.0, 0.0)), ("unsure", (0.0, 0.0, 0.0))):
            nets["assistant"] = Recording(logits)
            with_it, without = (step(Vessa(**TINY, weight=weight), nets).item() for weight in (1.0, 0.0))
            costs[name] = with_it - without
        plain, silent = (self.mean_teacher(nets, weight) for weight in (1.0, 0.0))
        assert costs["unsure"] == pytest.approx(plain - silent, rel=0.1)
        assert abs(costs["sure"] - costs["unsure"]) > 0.01

    def mean_teacher(self, nets: nn.ModuleDict, weight: float) -> float:
        torch.manual_seed(3)
        return MeanTeacher(**TINY, weight=weight).training_step(nets, batch(0), unlabelled(1), LATE).item()

    def test_a_prompt_changes_the_mask(self, matcher):
        query, (images, labels, *_) = batch(0, 1).images, batch(1, 2)
        answers = []
        for value in (None, 0, 1):
            prompt = value if value is None else torch.eye(3)[value].view(1, 3, 1, 1).expand(1, 3, 16, 16)
            torch.manual_seed(0)
            answers.append(matcher(query, images, labels, prompt))
        assert (answers[0] - answers[1]).abs().max() > 1e-3 < (answers[1] - answers[2]).abs().max()
        torch.manual_seed(0)
        assert torch.equal(matcher(query, images, labels, torch.zeros(1, 3, 16, 16)), answers[0])

    def test_half_of_the_rehearsals_have_no_prompt(self):
        known, assistant = batch(0, 200), Recording()
        Vessa().rehearse(assistant, known, (known.images, known.labels))
        prompts = torch.cat([prompt for *_, prompt in assistant.asked])
        given = prompts.flatten(1).any(1)
        assert 0.4 < given.float().mean() < 0.6
        assert torch.allclose(prompts[given].sum(1), torch.ones(1), atol=1e-5)

    def test_stand_ins_of_the_student_err_in_patches(self):
        labels = torch.zeros(50, 32, 32, dtype=torch.uint8)
        labels[:, 8:24, 8:24] = 1
        assert torch.equal(degraded(labels, 3, blobs=0.0).argmax(1), labels.long())
        wrong = degraded(labels, 3, blobs=6.0).argmax(1) != labels
        assert 0.02 < wrong.float().mean() < 0.5
        assert wrong[:, 1:][wrong[:, :-1]].float().mean() > 0.7  # what lies below a mistake is one as well


@pytest.mark.component("two stages")
class TestStages:
    def test_first_the_assistant_learns_beside_the_student(self, nets):
        """No unlabelled image is looked at, and neither network's labels move the other."""
        seen = []
        nets["average"].register_forward_pre_hook(lambda net, images: seen.append(images))
        loss = step(Vessa(**TINY), nets, EARLY)
        loss.backward()
        assert not seen
        assert all(p.grad.abs().max() > 0 for name in ("model", "assistant") for p in nets[name].parameters())
        alone = Vessa(**TINY).training_step(nets, batch(0), None, LATE)
        torch.manual_seed(3)
        supervised = cross_entropy_and_dice(nets["model"](batch(0).images), batch(0).labels)
        torch.manual_seed(3)
        known = batch(0)
        rehearsal = Vessa(**TINY).rehearse(nets["assistant"], known, (known.images, known.labels))
        assert loss.item() == pytest.approx((supervised + rehearsal).item(), abs=1e-5)
        assert alone.item() == pytest.approx(loss.item(), abs=0.2)

    def test_then_unlabelled_images_teach_the_student_alone(self, nets):
        gradients = []
        for weight in (0.0, 1.0):
            nets.zero_grad()
            step(Vessa(**TINY, weight=weight, sure=0.0), nets).backward()
            gradients.append([nets["model"].head.weight.grad.clone(), nets["assistant"].decoder[1].weight.grad.clone()])
        (student, assistant), (taught, same) = gradients
        assert not torch.allclose(student, taught) and torch.allclose(assistant, same)
        assert assistant.abs().max() > 0


@pytest.mark.component("mask decoder")
@pytest.mark.parametrize("size", [(16, 16), (17, 21), (8, 8, 9)])
def test_the_mask_has_the_size_of_the_query(size):
    matcher = TemplateMatcher(inputs=1, classes=3, channels=(4, 8), dims=len(size))
    query, templates = torch.randn(2, 1, *size), torch.randn(3, 1, *size)
    assert matcher(query, templates, torch.zeros(3, *size, dtype=torch.uint8)).shape == (2, 3, *size)


def test_unlabelled_images_leave_the_students_statistics_alone(nets):
    def statistics(other: Batch | None) -> list[torch.Tensor]:
        fresh = deepcopy(nets)
        Vessa(**TINY).training_step(fresh, batch(0), other, LATE)
        return [value for name, value in fresh["model"].named_buffers() if "running" in name]

    for one, other in zip(statistics(None), statistics(unlabelled(1)), strict=True):
        assert torch.equal(one, other)
