"""X-rays from volumes, see medcook/projections.py."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric
from skimage.metrics import structural_similarity

from medcook.data import Case
from medcook.projections import (
    BONE,
    DEPTH,
    EXCESS,
    SOFT,
    Beam,
    ProjectionTask,
    Suppression,
    compared,
    suppression_rows,
    turned,
    views,
)
from medcook.tasks import Budget
from medcook.training import fit

CT = Beam((2, 1, 0), pixel=2.0)


def block(bone: float = 1000.0) -> Case:
    """A box of water, 30 x 30 x 20 voxels of 2 mm, with a rod of bone along the body in the middle."""
    image = np.full((1, 40, 40, 20), -1000.0, dtype=np.float32)
    image[0, 5:35, 5:35] = 0
    image[0, 18:22, 18:22] = bone
    return Case(image, np.zeros((40, 40, 20), dtype=np.uint8), "box", "box", (2.0, 2.0, 2.0))


def test_a_ray_loses_what_the_closed_form_says():
    seen = views(block(), CT, (0.0,), (20, 40))
    water, rod = 30 * 2 / DEPTH, (26 * 2 + 4 * 2 * (SOFT + EXCESS * (2 - SOFT))) / DEPTH
    assert seen.xray[0, 5, 10].item() == pytest.approx(1 - math.exp(-water), abs=1e-4)
    assert seen.xray[0, 5, 20].item() == pytest.approx(1 - math.exp(-rod), abs=1e-4)
    assert seen.soft[0, 5, 20].item() == pytest.approx(1 - math.exp(-(26 * 2 + 8 * SOFT) / DEPTH), abs=1e-4)
    assert seen.bone[0, 5, 20].item() == pytest.approx(8) and seen.bone[0, 5, 10] == 0
    assert seen.xray[0, 5, 0] == 0 and torch.equal(seen.xray[..., :16], seen.soft[..., :16])


def test_no_bone_no_difference():
    seen = views(block(bone=20.0), CT, (0.0, 20.0), (16, 32))
    assert torch.equal(seen.xray, seen.soft) and not seen.bone.any()


def test_turning_moves_what_is_on_one_side_to_the_front():
    volume = torch.zeros(3, 9, 9)
    volume[:, 8, 4] = 1
    quarter = turned(volume, 90.0)
    assert quarter[1].argmax() in (4 * 9 + 8, 4 * 9)
    torch.testing.assert_close(turned(volume, 360.0), volume, rtol=1e-3, atol=1e-3)


def test_rows_begin_where_the_body_does():
    case = block()
    case.image[..., :6] = -1000
    seen = views(case, CT, (0.0,), (20, 40)).xray[0, :, 10]
    assert (seen[:14] > 0.3).all() and (seen[14:] == 0).all()


def test_measures_agree_with_others():
    rng = np.random.default_rng(0)
    truth, xray = (torch.from_numpy(rng.random((2, 1, 32, 32))).float() for _ in range(2))
    given = 0.8 * truth + 0.2 * xray
    found = compared(given, truth, xray)
    one = [structural_similarity(given[i, 0].numpy(), truth[i, 0].numpy(), data_range=1.0) for i in range(2)]
    assert found["psnr"] == pytest.approx(PSNRMetric(max_val=1)(given, truth).mean().item(), rel=1e-4)
    assert found["ssim"] == pytest.approx(np.mean(one), abs=0.02)  # another window
    assert found["suppression"] == pytest.approx(1 - 0.2**2, abs=1e-4) == found["detail"]
    nothing = compared(xray, truth, xray)
    assert nothing["suppression"] == pytest.approx(0) and nothing["detail"] == pytest.approx(0)
    assert compared(truth, truth, xray)["suppression"] == 1 and compared(truth, truth, xray)["ssim"] > 0.999


@dataclass
class Told(Suppression):
    """Gives every X-ray back, less a number that it learns."""

    def training_step(self, nets, labelled, unlabelled, now):
        xray, soft = self.pair(labelled.images)
        return (nets["model"](xray)[:, :1] - soft).square().mean()

    def suppress(self, nets, xrays):
        assert xrays.shape[1] == 1, "the truth must not be at hand"
        return nets["average"](xrays)[:, :1]

    def build(self, inputs, classes, dims):
        return super().build(1, classes, dims)


def test_truth_is_cut_off_before_anything_is_predicted():
    method = Told(channels=(8, 8))
    nets = method.build(2, 2, 2).eval()
    images = torch.randn(2, 2, 16, 16)
    other = torch.cat([images[:, :1], -images[:, 1:]], 1)
    found = method.predict(nets, images)
    assert torch.equal(found, method.predict(nets, other)) and found.shape == (2, 2, 16, 16)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 16, 16))


def test_a_run_is_scored_on_held_out_patients():
    task = ProjectionTask("embedded", fold=0, angles=(-20.0, 0.0), side=32)
    fitted = fit(Told(channels=(8, 8)), task, Budget(6, 4, "float32", 1), cache=False, progress=False)
    case = next(iter(task.cases("val")))
    (row,) = suppression_rows(fitted, case)
    assert row["patient_id"] == case.patient_id and row["psnr"] > 0 and 0 <= row["dice"] <= 1
    assert (task.samples("val").labels <= 1).all() and task.samples("labelled").images.shape[1:] == (2, 32, 32)
    assert task.data_kind == "real-anatomy-simulated" and BONE > 0


def test_a_data_set_that_is_not_projected_says_so():
    from medcook.errors import MedcookError

    with pytest.raises(MedcookError, match="acdc"):
        _ = ProjectionTask("acdc").preparation
