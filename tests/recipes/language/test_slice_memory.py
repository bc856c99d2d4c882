"""A memory of slices: what is kept, in which order, and how features attend to it."""

import pytest
import torch
import torch.nn.functional as F
from attended import attended, remembered

from medcook.recipes.language._slice_memory import ENTRIES, PATCH, Memory, MemoryAttention, mates, nearest, small
from medcook.recipes.pretraining._tokens import grid_places, sinusoids

WIDTH = 16


@pytest.mark.component("similarity-sorting self-updating memory")
def test_the_most_similar_come_first():
    torch.manual_seed(0)
    present, looks, there = torch.randn(3, 2, 2, 3), torch.randn(3, 9, 2, 2, 3), torch.rand(3, 9) > 0.3
    there[2, 2:] = False
    order, found = nearest(present, looks, there)
    assert order.shape == (3, ENTRIES)
    for k in range(3):
        cosine = {
            m: float(present[k].flatten() @ looks[k, m].flatten() / present[k].norm() / looks[k, m].norm())
            for m in range(9)
            if there[k, m]
        }
        wanted = sorted(cosine, key=cosine.get, reverse=True)[:ENTRIES]
        assert order[k][found[k]].tolist() == wanted and found[k].sum() == len(wanted)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_a_sure_answer_replaces_what_is_least_similar():
    """A list that is kept by hand, over twelve slices; the second sentence is never sure."""
    torch.manual_seed(0)
    looks, kept = torch.randn(12, 5, 2, 3), []
    memory = Memory.empty(2, looks)
    for number, look in enumerate(looks):
        present, masks = look.expand(2, *look.shape), torch.rand(2, 16, 24) > 0.5
        sure = number != 5
        memory = memory.updated(present, masks, torch.tensor([sure, False]))
        if sure:
            kept.sort(key=lambda entry: F.cosine_similarity(entry[0].flatten(), look.flatten(), dim=0))
            kept = kept[1:] if len(kept) == ENTRIES else kept
            kept.append((look, F.avg_pool2d(masks[0][None].float(), 2)[0]))
        assert memory.there.sum(1).tolist() == [len(kept), 0]
        mine = {float(entry.sum()): mask for entry, mask in zip(memory.looks[0], memory.masks[0], strict=True)}
        assert all(torch.allclose(mine[float(entry.sum())], mask) for entry, mask in kept)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_features_attend_to_entries_that_there_are_or_to_a_vector_for_none():
    torch.manual_seed(0)
    part, features = MemoryAttention(6, WIDTH), torch.randn(2, WIDTH, 6, 6)
    memory = remembered()
    codes = sinusoids(grid_places((6, 6)), WIDTH)
    found, none = part(features, memory), part(features, memory._replace(there=memory.there & False))
    for k in range(2):
        keys = [part.nothing[0, 0]]
        now = features[k].flatten(1).T
        alone = now + attended(part.attend, now + codes, torch.stack(keys))
        assert torch.allclose(none[k].flatten(1).T, alone, atol=1e-5)
        for rank in range(2):
            for row in range(3):
                for column in range(3):
                    cut = memory.masks[k, rank, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
                    place = sinusoids(torch.tensor([2 * row + 0.5, 2 * column + 0.5]), WIDTH)
                    look = part.look(memory.looks[k, rank, :, row, column]) + part.mask(cut.flatten())
                    keys.append(look + part.ranks[rank, 0] + place)
        together = now + attended(part.attend, now + codes, torch.stack(keys))
        assert torch.allclose(found[k].flatten(1).T, together, atol=1e-5)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_masks_are_kept_small():
    masks = torch.rand(2, 3, 32, 48)
    found = small(masks, torch.zeros(2, 5, 8, 12))
    assert torch.equal(found, masks) and small(masks, torch.zeros(2, 5, 2, 3)).shape == (2, 3, 2 * PATCH, 3 * PATCH)
    assert torch.allclose(small(masks, torch.zeros(4, 6)), F.avg_pool2d(masks, 2), atol=1e-6)


@pytest.mark.component("similarity-sorting self-updating memory")
def test_mates_are_other_images_of_the_set_that_show_what_is_asked_for():
    labels = torch.zeros(5, 8, 8, dtype=torch.uint8)
    for image, values in enumerate([(1, 2), (2,), (1,), (1, 2), (2,)]):
        for value in values:
            labels[image, value] = value
    groups = torch.tensor([0, 0, 0, 1, 1])
    found = mates(labels, groups, torch.tensor([1, 2, 2, 2, 0]))
    wanted = [[2], [0], [0, 1], [4], []]
    assert [row.nonzero().flatten().tolist() for row in found] == wanted
    assert mates(labels, None, torch.tensor([1, 2, 2, 2, 0]))[0].nonzero().flatten().tolist() == [2, 3]
