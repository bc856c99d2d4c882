"""CADS: names and numbers of sources, what a voxel may be, the loss of that, and what the network completes."""

import pytest
import torch

from medcook.data import IGNORE, open_dataset
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.volumes.cads import (
    Harmonised,
    SourcesTask,
    candidates,
    completed,
    harmonise,
    marginal_cross_entropy,
    marginal_dice,
    recipe,
)

SHARED = {1: "kidney_right", 2: "gallbladder", 3: "liver", 4: "inferior_vena_cava"}
SMALL = (4, 4, 4, 4)
EARLY, LATE = Moment(0, 10), Moment(9, 10)


def one_source_each(images: int, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(images) % (classes - 1) + 1, classes).bool()


@pytest.mark.component("comprehensive dataset")
def test_the_data_half_is_there():
    manifest = open_dataset("cads").manifest
    assert manifest.facts.cases == 22022 and len(manifest.structures) == 167


@pytest.mark.component("harmonised labels")
def test_sources_are_brought_to_one_list_by_words_and_by_synonyms():
    """Liver, right kidney, postcava and right lung of one source; the list has no whole lung."""
    own = {1: "Liver", 2: "right kidney", 3: "postcava", 5: "right lung"}
    label = torch.tensor([[0, 1, 2], [3, 5, IGNORE]], dtype=torch.uint8)
    found = harmonise(label, own, SHARED, {"postcava": "inferior vena cava"})
    assert found.dtype == torch.uint8 and found.tolist() == [[0, 3, 1], [4, IGNORE, IGNORE]]
    assert harmonise(label, own, SHARED, {})[1, 0] == IGNORE, "without the synonym nobody knows what it is"


@pytest.mark.component("harmonised labels")
def test_sources_hide_what_they_do_not_draw_and_speak_one_language():
    """Sources of the embedded brains: each shows its structure alone, under the number of the shared list."""
    task, everything = SourcesTask("embedded", labelled=6), SourcesTask("embedded", labelled=6, hidden=False)
    found, whole = task.samples("labelled"), everything.samples("labelled")
    assert len(found.groups.unique()) > 1 and torch.equal(found.groups, whole.groups)
    kept = whole.labels == (found.groups + 1)[:, None, None]
    assert torch.equal(found.labels, torch.where(kept, whole.labels, 0))
    for patient, cases in zip(task.labelled_patients, range(6), strict=True):
        assert (found.groups[found.case_of == cases] == task.sources[patient]).all()
    assert torch.equal(task.samples("val").labels, everything.samples("val").labels), "validation sees everything"


@pytest.mark.component("integration of heterogeneous sources")
def test_sources_are_of_equal_size_and_the_same_in_every_fold():
    sources = SourcesTask("embedded", fold=0).sources
    assert sources == SourcesTask("embedded", fold=1).sources
    sizes = [list(sources.values()).count(source) for source in range(3)]
    assert sum(sizes) == 30 and max(sizes) - min(sizes) <= 1


@pytest.mark.component("integration of heterogeneous sources")
def test_what_a_voxel_may_be():
    """A source that draws structure 2 of three: what it did not draw is background, or one of the others."""
    drawn = torch.tensor([[False, False, True, False]])
    found = candidates(torch.tensor([[0, 2, 1, IGNORE]], dtype=torch.uint8), drawn)
    background, two, hidden, ignored = found[0].T.tolist()
    assert background == hidden == [True, True, False, True], "what it does not draw tells nothing, were it there"
    assert two == [False, False, True, False] and ignored == [True] * 4
    assert drawn.tolist() == [[False, False, True, False]]


@pytest.mark.component("integration of heterogeneous sources")
def test_the_loss_of_complete_annotations_is_the_books():
    logits, labels = torch.randn(3, 4, 6, 5), torch.randint(0, 4, (3, 6, 5)).byte()
    labels[0, :2] = IGNORE
    known = candidates(labels, torch.ones(3, 4, dtype=torch.bool))
    found = marginal_cross_entropy(logits, known) + marginal_dice(logits, known)
    assert torch.allclose(found, cross_entropy_and_dice(logits, labels), atol=1e-6)


@pytest.mark.component("integration of heterogeneous sources")
def test_the_loss_is_that_of_the_candidates_together():
    """Against a loop over voxels, and Dice over what is known alone."""
    logits, labels = torch.randn(3, 4, 3, 2), torch.randint(0, 4, (3, 3, 2)).byte()
    drawn = one_source_each(3, 4)
    known, soft = candidates(labels, drawn), logits.softmax(1)
    losses = []
    for k, own in enumerate((1, 2, 3)):
        for label, p in zip(labels[k].flatten(), soft[k].flatten(1).T, strict=True):
            losses.append(-torch.log(p[own] if label == own else 1 - p[own]))
    assert torch.allclose(marginal_cross_entropy(logits, known), torch.stack(losses).mean(), atol=1e-5)
    scores = []
    for c in (1, 2, 3):
        overlap = size = 0.0
        for k, own in enumerate((1, 2, 3)):
            told = torch.ones_like(labels[k], dtype=torch.bool) if c == own else labels[k] == own
            truth = (labels[k] == c) & told & (c == own)
            overlap += (soft[k, c] * truth).sum()
            size += (soft[k, c] * told).sum() + truth.sum()
        scores.append(1 - (2 * overlap + 1) / (size + 1))
    assert torch.allclose(marginal_dice(logits, known), torch.stack(scores).mean(), atol=1e-5)


@pytest.mark.component("integration of heterogeneous sources")
def test_three_partial_sources_determine_a_voxel():
    """One image in three sources, of which each draws one structure: the loss alone finds all labels."""
    labels = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8).expand(3, 4)
    known, logits = candidates(labels, one_source_each(3, 4)), torch.zeros(4, 4, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=5.0)
    for _ in range(100):
        optimiser.zero_grad()
        marginal_cross_entropy(logits.expand(3, 4, 4), known).backward()
        optimiser.step()
    assert logits.argmax(0).tolist() == [0, 1, 2, 3] and logits.softmax(0).amax(0).min() > 0.9


@pytest.mark.component("completed annotations")
def test_what_is_sure_is_completed_and_what_experts_drew_stays():
    """Probabilities of five voxels; the source draws structure 1. The shares count among the candidates alone."""
    known = candidates(torch.tensor([[0, 0, 0, 1, IGNORE]], dtype=torch.uint8), torch.tensor([[False, True, False]]))
    p = torch.tensor([[0.1, 0.05, 0.85], [0.4, 0.1, 0.5], [0.02, 0.9, 0.08], [0.9, 0.05, 0.05], [0.2, 0.2, 0.6]])
    found = completed(known, p.T[None], 0.79)[0].T.tolist()
    assert found[0] == [False, False, True], "surely the structure that the source does not draw"
    assert found[1] == [True, False, True], "not sure"
    assert found[2] == [False, False, True], "0.08 of 0.1: that it is not structure 1 is known from the expert"
    assert found[3] == [False, True, False], "the expert's, whatever the network says"
    assert found[4] == [True, True, True]


@pytest.mark.component("completed annotations")
@pytest.mark.parametrize(
    ("complete", "now", "taught"), [(True, LATE, True), (True, EARLY, False), (False, LATE, False)]
)
def test_the_average_teaches_once_it_has_learned(complete, now, taught):
    """A teacher that sees structure 3 everywhere changes the loss late in training, where annotations are completed."""
    method = Harmonised(channels=SMALL, complete=complete)
    labels, groups = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.arange(3)
    batch, nets = Batch(torch.randn(3, 1, 16, 16), labels, groups=groups), method.build(1, 4, 2)
    before = method.training_step(nets, batch, None, EARLY)
    with torch.no_grad():
        nets["average"].head.bias[3] = 50
    after = method.training_step(nets, batch, None, now)
    assert torch.allclose(before, after) != taught
    if taught:
        logits = nets["model"](batch.images)
        known = completed(candidates(labels, one_source_each(3, 4)), method.teach(nets, batch.images), 0.8)
        wanted = marginal_cross_entropy(logits, known) + marginal_dice(logits, known)
        assert torch.allclose(after, wanted, atol=1e-5)
        assert known[:2, 3].all() and not known[2, 3].any(), "source 2 draws structure 3, and did not"


def test_groups_say_which_structure_a_source_draws():
    method, labels = Harmonised(), torch.zeros(4, 8, 8, dtype=torch.uint8)
    batch = Batch(torch.randn(4, 1, 8, 8), labels, groups=torch.tensor([2, 0, 1, 2]))
    assert method.drawn(batch, 4).int().argmax(1).tolist() == [3, 1, 2, 3]
    assert method.drawn(batch._replace(groups=None), 4).int().argmax(1).tolist() == [1, 2, 3, 1]


def test_arms_differ_in_completing_alone_and_every_parameter_learns():
    on, off = (recipe.arms[name].method.settings() for name in recipe.ablation)
    assert {name for name in on if on[name] != off[name]} == {"complete"}
    for method in (Harmonised(channels=SMALL), Harmonised(channels=SMALL, complete=False)):
        nets = method.build(1, 4, 2)
        batch = Batch(torch.randn(3, 1, 24, 17), torch.randint(0, 4, (3, 24, 17)).byte(), groups=torch.arange(3))
        method.training_step(nets, batch, None, LATE).backward()
        assert all(p.grad.abs().max() > 0 for p in nets["model"].parameters())
        assert all(p.grad is None for p in nets["average"].parameters())
        assert method.predict(nets.eval(), batch.images).shape == (3, 4, 24, 17)
