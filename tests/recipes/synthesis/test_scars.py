"""Simulated scars: where they lie and how they look, and masks that move from one heart's wall to another's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scarred_hearts import free, labelled
from scipy import ndimage

from medcook.data import Case
from medcook.data.transforms import warp
from medcook.recipes.synthesis._scars import (
    CORE,
    INFARCT,
    ScarTask,
    alignment,
    lesions_of,
    moved_lesions,
    scar_of,
    scar_rows,
    scarred,
)


@pytest.mark.component("lesion mask diffusion")
class TestMovedMasks:
    def test_it_turns_by_the_angle(self):
        source = labelled()
        grid = alignment(source.raters.float(), source.raters.float(), torch.tensor([0.0, 1.0, 2.0, 3.0]))
        moved = warp(source.images, source.labels, grid)[1]
        middle = torch.tensor([15.0, 17.0])
        places = [(label > 0).nonzero().float().mean(0) - middle for label in moved]
        angles = torch.tensor([torch.atan2(place[0], place[1]) for place in places])
        turned = torch.remainder(angles[0] - angles, 2 * torch.pi)
        torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 2.0, 3.0]), atol=0.1, rtol=0)

    def test_lesions_stay_in_the_wall(self):
        torch.manual_seed(0)
        _, labels = moved_lesions(labelled(), free().raters.float())
        assert (labels[free().raters[:, 0] == 0] == 0).all() and (labels.flatten(1).amax(1) > 0).all()
        assert len({tuple(label.flatten().tolist()) for label in labels}) == 4
        assert moved_lesions(labelled()._replace(labels=torch.zeros(4, 32, 32).byte()), free().raters) is None


@pytest.mark.component("cardiac lesion MRI and lung nodule CT")
class TestScars:
    def case(self, patient: str = "patient007", name: str = "ED") -> Case:
        """Nine slices of a heart, in two of which there is no wall."""
        label = np.zeros((9, 48, 48), dtype=np.uint8)
        rows, columns = np.indices((48, 48))
        away = np.hypot(rows - 22, columns - 26)
        label[1:8] = np.where(away < 9, 3, np.where(away < 17, 2, 0))
        image = np.float32([0.5, 0, 1, 3])[label] + 0.05 * np.random.default_rng(0).standard_normal(label.shape)
        return Case(image[None].astype(np.float32), label, f"{patient}-{name}", patient)

    def test_a_scar_is_always_the_same_and_its_patients_alone(self):
        one, same, systole, other = (
            scarred(case, 2, 3) for case in (self.case(), self.case(), self.case(name="ES"), self.case("patient008"))
        )
        assert np.array_equal(one.image, same.image) and np.array_equal(one.label, systole.label)
        assert not np.array_equal(one.image, systole.image) and not np.array_equal(one.label, other.label)

    @pytest.mark.parametrize("number", range(5))
    def test_it_lies_in_the_wall_with_the_core_in_the_infarct(self, number):
        case = self.case(f"patient{number}")
        found = scarred(case, 2, 3)
        assert set(np.unique(found.label)) == {0, INFARCT, CORE}
        assert (case.label[found.label > 0] == 2).all() and not found.label[[0, 8]].any()
        touching = ndimage.binary_dilation(found.label == CORE, np.ones((1, 3, 3)))
        assert not (touching & (case.label == 3)).any()
        far = ~ndimage.binary_dilation(found.label > 0, np.ones((1, 9, 9)))
        np.testing.assert_allclose(found.image[0][far], case.image[0][far], atol=1e-3)

    def test_infarcts_are_as_bright_as_the_patient_says_and_cores_as_dark_as_the_wall(self):
        types = set()
        for number in range(12):
            scar = scar_of(f"patient{number}")
            found = scarred(self.case(f"patient{number}"), 2, 3)
            bright = found.image[0][ndimage.binary_erosion(found.label == INFARCT, np.ones((1, 2, 2)))].mean()
            core = found.image[0][ndimage.binary_erosion(found.label == CORE, np.ones((1, 3, 3)))]
            assert bright == pytest.approx(1 + 2 * scar.bright, abs=0.5)
            assert not len(core) or core.mean() < 1 + scar.bright
            types.add(scar.bright > 0.85)
        assert types == {True, False}

    def test_depth_and_width_are_those_of_the_scar(self):
        case, scar = self.case(), scar_of("patient007")
        scar = scar._replace(angle=0.0, twist=0.0, width=0.8, middle=0.5, reach=2.0, transmurality=0.5)
        found = lesions_of(case.label == 2, case.label == 3, scar)[4] > 0
        rows, columns = found.nonzero()
        assert np.abs(np.arctan2(rows - 22, columns - 26)).max() < 0.8 and (columns > 26).all()
        depths = np.hypot(rows - 22, columns - 26)
        assert 12 <= depths.max() <= 14  # half of 9 .. 17
        assert found[22, 36] and not found[22, 40]

    def test_the_window_lies_around_the_heart_with_and_without_a_scar(self):
        task = ScarTask("embedded", labelled=2)
        case, painted = next(iter(task.cases("labelled"))), task.preparation
        healthy = replace(painted, healthy=True)
        heart = np.isin(case.label, (2, 3)).nonzero()
        assert painted.window(case).centre == pytest.approx((heart[1].mean(), heart[2].mean()))
        outside = healthy.labels(case) == 0
        both = [preparation.images(case)[:, 0][outside] for preparation in (painted, healthy)]
        assert torch.corrcoef(torch.stack(both))[0, 1] > 0.99
        drawn = F.one_hot(painted.labels(case).long(), 3).movedim(-1, 1).float()
        found = painted.restore(drawn, case).argmax(0).numpy()
        overlap = 2 * ((found > 0) & (scarred(case, 2, 3).label > 0)).sum()
        assert overlap / ((found > 0).sum() + (scarred(case, 2, 3).label > 0).sum()) > 0.75

    def test_who_draws_the_scar_has_a_dice_of_one(self):
        class Knows:
            task = ScarTask("embedded", labelled=2)

            def predict(self, case):
                return scarred(case, 2, 3).label

        rows = scar_rows(Knows(), next(iter(Knows.task.cases("labelled"))))
        assert [row["dice"] for row in rows] == [1.0, 1.0] and [row["structure"] for row in rows] == [
            "infarct",
            "no-reflow",
        ]
