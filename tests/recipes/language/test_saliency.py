"""From what is salient to masks: the largest part, its box, SAM, and how masks of descriptions are scored."""

import numpy as np
import pytest
import torch

from medcook.data.transforms import NONE
from medcook.recipes.language import _saliency
from medcook.recipes.language._captions import OneFindingTask
from medcook.recipes.language._saliency import asked_with_box, described_rows, largest
from medcook.recipes.language.medclip_sam import MedClipSam

TINY = dict(channels=(4, 8), augmentation=NONE)


@pytest.mark.component("conditional random field")
class TestField:
    def test_the_largest_part_stays(self):
        mask = np.zeros((9, 9), bool)
        mask[1:3, 1:3], mask[5:8, 5:8] = True, True
        assert largest(mask).sum() == 9 and largest(mask)[6, 6] and not largest(mask & False).any()


@pytest.mark.component("SAM prompted by text in a zero-shot setting")
class TestZeroShot:
    def test_where_nothing_is_salient_the_box_is_the_image(self, monkeypatch):
        asked = []
        answer = lambda image, prompt: asked.append(prompt.box) or type("A", (), {"mask": image > 9})  # noqa: E731
        monkeypatch.setattr(_saliency, "small_sam", lambda: answer)
        asked_with_box(np.zeros((16, 20)), np.zeros((16, 20), bool))
        assert asked == [(0.0, 0.0, 20.0, 16.0)]

    def test_loading_sam_leaves_no_trace(self):
        _saliency.small_sam.cache_clear()
        torch.manual_seed(0)
        expected = torch.rand(())
        torch.manual_seed(0)
        _saliency.small_sam()
        assert torch.equal(torch.rand(()), expected)


def test_the_task_and_its_score():
    task = OneFindingTask("embedded", versions=1, labelled=2)
    case = next(iter(task.cases("val")))
    images, found = task.preparation.both(case)
    assert images.shape[2:] == (64, 64) and max(len(label.unique()) for label in found) == 2
    asked = []

    class Knows(MedClipSam):
        def answer(self, nets, image, sentences):
            asked.extend(sentences)
            place = next(k for k, one in enumerate(images) if torch.equal(one, image[0]))
            return (found[place] > 0).float()[None, None]

    method = Knows(**TINY)
    nets = method.build(1, task.classes, 2)
    fitted = type("F", (), {"nets": nets, "weights": {"last": nets.state_dict()}, "method": method, "task": task})
    rows = described_rows(fitted, case)
    assert rows and all(row["dice"] == row["hit"] == 1 and -1 <= row["tied"] <= 1 for row in rows)
    assert {row["structure"] for row in rows} <= {"nodule", "cavity", "patch"}
    values = [value for label in found for value in label.unique().tolist() if value]
    assert asked == [method.language.name(value) for value in values]
