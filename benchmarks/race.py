"""`python -m benchmarks.race [--seconds 400]`: how long until a network segments hearts, by several ways to train one.

Seconds of training until the mean Dice of acdc's validation patients reaches 0.80, 0.85 and 0.90; looking at these
patients does not count. All train on the same patients, on the same cores, one after the other. Writes
benchmarks/race.json, a contestant at a time, and the table in README.md; cut off, it goes on with who is missing.

    medcook     the book's baseline as chapter 02 trains it
    float32     the same, without bfloat16
    short       the same, with a schedule as short as 0.80 asks for: see `SHORT`
    tutorial    as MONAI's tutorials do it: dictionary transforms on the fly, DataLoader, residual U-Net, Dice, Adam
    literature  as semi-supervised papers do it: 256 x 256, batch 16, SGD at 0.03, rotated and zoomed slice by slice
    nnU-Net     v2, 2D, planned by itself for these slices; with `--nnunet FOLDER`, see benchmarks/nnunet.py
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import monai.transforms as mt
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset
from monai.losses import DiceLoss
from monai.networks.nets import UNet as MonaiUNet
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.marks import put, table
from benchmarks.nnunet import nnunet
from medcook.data.transforms import Augment
from medcook.losses import cross_entropy_and_dice
from medcook.networks import UNet
from medcook.precision import resolve_precision
from medcook.provenance import environment
from medcook.recipes import find_recipe
from medcook.runs import write_atomically
from medcook.tasks import Samples
from medcook.training import Loop, validation_dice

HERE = Path(__file__).parent
BEGIN, END = "<!-- race: made by python -m benchmarks.race -->", "<!-- end of race -->"
TARGETS = (0.80, 0.85, 0.90)
EVERY = 10.0
"""Seconds of training between two looks at the validation patients, or as many as the last look took, if more."""
SHORT = {"steps": 340, "batch": 4}
"""Four images a step and a rate that falls to nothing within about half a minute; no augmentation, and an average over
fewer steps. Chosen by the Dice of these same validation patients, among a dozen such schedules."""
UNTOUCHED = Augment(rotate=0, scale=0, shift=0, gamma=0, contrast=0, brightness=0, noise=0)


class Over(Exception):
    """The last target is reached, or the time is up."""


@dataclass
class Clock:
    """Seconds of training, without the looks; what each look saw."""

    limit: float
    spent: float = 0.0
    look_took: float = 0.0
    seen: list[tuple[float, float]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Start now: what was done before, planning and preprocessing, does not count."""
        self.began = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time to look; the clock stands still until `look` is done."""
        now = self.spent + time.perf_counter() - self.began
        since = now - (self.seen[-1][0] if self.seen else 0.0)
        return now >= self.limit or since >= max(EVERY, self.look_took)

    def look(self, dice: Callable[[], float]) -> None:
        """Score and note it; `Over` at the end of the race."""
        stopped = time.perf_counter()
        self.spent += stopped - self.began
        self.seen.append((self.spent, dice()))
        self.look_took = time.perf_counter() - stopped
        if self.spent >= self.limit or self.seen[-1][1] >= TARGETS[-1]:
            raise Over
        self.began = time.perf_counter()

    def result(self) -> dict:
        """Seconds to each target, None where it was not reached; the best Dice, and seconds in all."""
        reached = {f"{goal:.2f}": next((round(at) for at, dice in self.seen if dice >= goal), None) for goal in TARGETS}
        return {"reached": reached, "best": round(max(dice for _, dice in self.seen), 3), "seconds": round(self.spent)}


def medcook(train: Samples, val: Samples, clock: Clock, precision: str, short: bool = False) -> None:
    """The book's own loop, looked at while it runs."""
    method, task, budget, seed = find_recipe("unet-acdc").run("full", "unet", 0)
    if short:
        method, budget = replace(method, average=0.97, augmentation=UNTOUCHED), replace(budget, **SHORT)

    class Watched(Loop):
        nets: nn.ModuleDict

        def build(self):
            self.nets = super().build()
            return self.nets

        def batches(self, step, rng, fabric):
            if clock.due():
                clock.look(lambda: validation_dice(self.method, self.nets, val))
                self.nets.train()
            return super().batches(step, rng, fabric)

    fitted = Watched(method, task, replace(budget, checks=0), precision, seed, train, None, None, progress=False).run()
    clock.look(lambda: validation_dice(method, fitted.nets, val))
    raise Over


def tutorial(train: Samples, val: Samples, clock: Clock) -> None:
    """MONAI's tutorial style."""
    both = ["image", "label"]
    transforms = mt.Compose(
        [
            mt.EnsureChannelFirstd(["label"], channel_dim="no_channel"),
            mt.RandFlipd(both, prob=0.5, spatial_axis=0),
            mt.RandFlipd(both, prob=0.5, spatial_axis=1),
            mt.RandAffined(both, prob=0.5, rotate_range=0.5, scale_range=0.2, mode=("bilinear", "nearest")),
            mt.RandGaussianNoised(["image"], prob=0.2),
        ]
    )
    items = [{"image": image, "label": label} for image, label in zip(train.images, train.labels, strict=True)]
    loader = DataLoader(Dataset(items, transforms), batch_size=8, shuffle=True)
    net = MonaiUNet(2, 1, int(train.labels.max()) + 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)
    loss = DiceLoss(to_onehot_y=True, softmax=True)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    while True:
        for batch in loader:
            step(optimiser, loss(net(batch["image"].as_tensor()), batch["label"].as_tensor()))
            if clock.due():
                clock.look(lambda: validation_dice(Plain(net), nn.ModuleDict({"net": net}), val))
                net.train()


def literature(train: Samples, val: Samples, clock: Clock) -> None:
    """The setting that semi-supervised papers share, with its augmentation."""
    net = UNet(inputs=1, classes=int(train.labels.max()) + 1, dims=2, channels=(16, 32, 64, 128, 256))
    optimiser = torch.optim.SGD(net.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    for number, (images, labels) in enumerate(slices_of_256(train, rng)):
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * (1 - min(number, 29_999) / 30_000) ** 0.9
        step(optimiser, cross_entropy_and_dice(net(images), labels))
        if clock.due():
            clock.look(lambda: validation_dice(Plain(net, 256), nn.ModuleDict({"net": net}), val))
            net.train()


def slices_of_256(train: Samples, rng: np.random.Generator, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of slices: turned by quarters and mirrored, or rotated by up to 20 degrees; then 256 x 256."""
    while True:
        images, labels = [], []
        for number in rng.integers(0, len(train), batch):
            image, label = train.images[number, 0].numpy(), train.labels[number].numpy()
            if rng.random() < 0.5:
                turns, axis = int(rng.integers(4)), int(rng.integers(2))
                image, label = (np.flip(np.rot90(part, turns), axis).copy() for part in (image, label))
            elif rng.random() < 0.5:
                angle = float(rng.integers(-20, 20))
                image, label = (ndimage.rotate(part, angle, order=0, reshape=False) for part in (image, label))
            scale = [256 / side for side in image.shape]
            images.append(torch.from_numpy(ndimage.zoom(image, scale, order=0))[None])
            labels.append(torch.from_numpy(ndimage.zoom(label, scale, order=0)))
        yield torch.stack(images), torch.stack(labels)


class Plain:
    """A network as `validation_dice` asks it; `side` of the square that it was trained on, if not the samples' own."""

    def __init__(self, net: nn.Module, side: int | None = None):
        self.net, self.side = net, side

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        size = images.shape[2:]
        seen = F.interpolate(images, (self.side, self.side)) if self.side else images
        return F.interpolate(self.net(seen), size, mode="bilinear", align_corners=False).softmax(1)


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def race(seconds: float, found: dict, nnunet_at: Path | None = None) -> Iterator[None]:
    """Every contestant's result, one after the other, into `found`; those that stand there already do not run again.

    nnU-Net takes part where it is installed in a folder.
    """
    task = find_recipe("unet-acdc").run("full", "unet", 0)[1]
    train, val = task.samples("labelled"), task.samples("val")
    ways = {"tutorial": tutorial, "literature": literature}
    faster = resolve_precision("auto")
    ways |= {f"medcook, {p}": partial(medcook, precision=p) for p in ("float32", faster)}
    ways[f"medcook, {faster}, short"] = partial(medcook, precision=faster, short=True)
    if nnunet_at:
        ways["nnU-Net"] = partial(nnunet, nnunet_at)
    for name in sorted(ways.keys() - found.keys(), reverse=True):
        torch.manual_seed(0)
        clock = Clock(seconds)
        try:
            ways[name](train, val, clock)
        except Over:
            found[name] = clock.result()
            print(name, found[name], flush=True)
            yield


def report(found: dict) -> str:
    """The results as Markdown."""
    at = found["machine"]
    rows = [
        [name, *[one["reached"][f"{goal:.2f}"] or f"not in {one['seconds']}" for goal in TARGETS], one["best"]]
        for name, one in found["results"].items()
    ]
    head = " | ".join(["seconds to a mean Dice of", *(f"{goal:.2f}" for goal in TARGETS), "best"])
    load = f"load before the start: {at['load_before']}"
    return f"{at['threads']} thread(s) of {at['cores']} cores, {at['cpu']}; {load}.\n\n{table(head, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    parser.add_argument("--nnunet", type=Path, help="folder that nnU-Net was installed in")
    args = parser.parse_args()
    machine = {"cores": os.cpu_count(), **environment(), "load_before": round(os.getloadavg()[0], 1)}
    path = HERE / "race.json"
    found = {"machine": machine, "results": {}}
    if path.exists() and not args.again:
        found = json.loads(path.read_text(encoding="utf-8"))
    for _ in race(args.seconds, found["results"], args.nnunet):
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    put(report(found), BEGIN, END)


if __name__ == "__main__":
    main()
