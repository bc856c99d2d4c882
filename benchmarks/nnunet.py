"""nnU-Net v2, 2D (Isensee et al., 2021), as a contestant of the race: it plans, augments and trains by itself.

It lies in a folder of its own, because what it depends on wants a torchvision, which 2D training does not use:

    pip install --no-deps --target FOLDER nnunetv2 dynamic-network-architectures acvl-utils batchgenerators \
        batchgeneratorsv2 connected-components-3d fft-conv-pytorch einops blosc2 ndindex msgpack numexpr py-cpuinfo \
        yacs graphviz tifffile imagecodecs SimpleITK seaborn unittest2
    python -m benchmarks.race --nnunet FOLDER
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.tasks import Samples
from medcook.training import validation_dice

NAME = "Dataset001_race"
SPACING = (1.0, 1.0, 8.0)
"""Of the prepared slices: one pixel, and far enough apart for the planner to see that they are slices."""


def nnunet(folder: Path, train: Samples, val: Samples, clock, seed: int) -> None:
    """Train until the clock says that it is over; every case is a volume of its slices. It draws its own seeds."""
    if not (folder / "nnunetv2").is_dir():
        raise MedcookError(f"{folder} holds no nnU-Net.", "Install it: see benchmarks/nnunet.py.")
    sys.path.append(str(folder))
    with TemporaryDirectory() as place:
        trainer = prepared(Path(place), train, val)
        batches, _ = trainer.get_dataloaders()
        clock.restart()
        while True:
            trainer.network.train()
            trainer.train_step(next(batches))
            if clock.due():
                clock.look(
                    lambda: validation_dice(Padded(trainer.network), nn.ModuleDict({"net": trainer.network}), val)
                )


def prepared(place: Path, train: Samples, val: Samples):
    """nnU-Net's trainer on the CPU, after its own fingerprint, plan and preprocessing; `val` only for the split."""
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(place / variable)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false"}
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw, names = place / "raw" / NAME, {}
    for role, samples in (("train", train), ("val", val)):
        names[role] = [written(raw, f"{role}{number:03d}", *case) for number, case in enumerate(cases(samples))]
    classes = {"background": 0} | {f"structure {k}": k for k in range(1, int(train.labels.max()) + 1)}
    described = {"channel_names": {"0": "MRI"}, "labels": classes, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(described | {"numTraining": sum(map(len, names.values()))}))
    with contextlib.redirect_stdout(io.StringIO()):  # pages of plans
        extract_fingerprints([1], num_processes=1)
        plan_experiments([1])
        preprocess([1], configurations=("2d",), num_processes=(1,))
    ready = place / "preprocessed" / NAME
    (ready / "splits_final.json").write_text(json.dumps([names]))
    plans, dataset = (json.loads((ready / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # augments between the steps, as the others do
    plans = plans | {"continue_training": False}
    trainer = nnUNetTrainer(plans, "2d", 0, dataset, device=torch.device("cpu"))
    trainer.initialize()
    return trainer


def cases(samples: Samples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image and label (slices, height, width) of each case."""
    for case in samples.case_of.unique():
        mine = samples.case_of == case
        yield samples.images[mine, 0].numpy(), samples.labels[mine].numpy()


def written(raw: Path, name: str, image: np.ndarray, label: np.ndarray) -> str:
    """The name of a case, whose files were written as nnU-Net wants them."""
    for folder, file, array in (
        ("imagesTr", f"{name}_0000", image.astype(np.float32)),
        ("labelsTr", name, label.astype(np.uint8)),
    ):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        volume = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([*SPACING, 1.0]))
        nibabel.save(volume, raw / folder / f"{file}.nii.gz")
    return name


class Padded:
    """A network as `validation_dice` asks it; nnU-Net's wants sides that it can halve often enough."""

    def __init__(self, net: nn.Module, multiple: int = 64):
        self.net, self.multiple = net, multiple

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        found = self.net(images)
        found = found[0] if isinstance(found, list | tuple) else found
        return found[..., :height, :width].softmax(1)
