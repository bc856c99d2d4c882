"""The one training loop.

Everything random is a function of (seed, step), so an interrupted run resumes where it stopped and ends
with the same bits, and a run does not depend on how its batches were loaded.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from functools import lru_cache

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from medcook import parallel
from medcook.data.case import IGNORE, Case
from medcook.errors import MedcookError, Paused
from medcook.fingerprints import behaviour, source_hash
from medcook.methods import Batch, Method, Moment
from medcook.networks import parameters
from medcook.precision import autocast, resolve_precision
from medcook.runs import RunFolder, content_key
from medcook.tasks import Budget, Samples, Task

CHECKPOINT_SECONDS = 20.0
GRADIENT_NORM = 5.0
SHORT_RUN = 60
"""Steps up to which a run is keyed by its source code: to find out how it behaves would take as long as the run."""


@dataclass
class Fitted:
    """A trained method: predicts cases on their own grid, and knows how it came about.

    nets      as the training left them, or as the checkpoint that was asked last
    history   step, loss (one entry per step); val_step, val_dice (one per look at the validation cases)
    cost      steps, seconds, step_seconds (median), loading_fraction, peak_mb, parameters, threads, device, precision
    """

    method: Method
    task: Task
    nets: nn.ModuleDict
    weights: dict[str, dict]
    history: dict[str, list]
    cost: dict
    key: str = ""
    cached: bool = False

    @torch.no_grad()
    def answer(self, images: Tensor, checkpoint: str = "last") -> Tensor:
        """Class probabilities (N, classes, *size) float32 of prepared images, in the precision of the training."""
        if checkpoint not in self.weights:
            raise MedcookError(f"This run kept no {checkpoint!r} checkpoint.", f"It has: {', '.join(self.weights)}.")
        self.nets.load_state_dict(self.weights[checkpoint])
        self.nets.eval()
        with autocast(self.cost):
            return torch.cat([self.method.predict(self.nets, part) for part in images.split(16)]).float()

    def probabilities(self, case: Case, checkpoint: str = "last") -> Tensor:
        """Class probabilities (classes, *spatial) float32 on the case's own grid."""
        preparation = self.task.preparation
        return preparation.restore(self.answer(preparation.images(case), checkpoint), case)

    def predict(self, case: Case, checkpoint: str = "last"):
        """Label map (*spatial) uint8 on the case's own grid."""
        return self.probabilities(case, checkpoint).argmax(0).to(torch.uint8).numpy()


def fit(
    method: Method,
    task: Task,
    budget: Budget,
    seed: int = 0,
    *,
    cache: bool = True,
    progress: bool = True,
    deadline: float | None = None,
    devices: int = 1,
) -> Fitted:
    """Train `method` on the task's train and val patients; test patients are out of reach.

    A finished run with the same content (method, task, budget, seed, data, versions, and behaviour or, of short runs,
    source code) is read from the cache; an interrupted one is taken up again. A run that is cached saves its state and
    raises `Paused` after the first step that ends past `deadline` (on the clock of `time.monotonic`). With several
    `devices` (GPUs, or processes of a CPU) each sees its share of every batch; the key is the same.
    """
    precision = resolve_precision(budget.precision)
    train = task.samples("labelled")
    extra = unlabelled_samples(method, task)
    val = task.samples("val")
    key = content_key(
        method=method.settings(),
        task=task.describe(),
        budget={**asdict(budget), "precision": precision},
        seed=seed,
        data=[samples.hash() for samples in (train, extra, val) if samples],
        behaviour=behaviour(method) if budget.steps > SHORT_RUN else source_hash(type(method)),
        torch=torch.__version__,
    )
    loop = Loop(method, task, budget, precision, seed, train, extra, val, progress, deadline, devices=devices)
    if not cache:
        return loop.run()
    folder = RunFolder(key)
    with folder.lock():
        if found := folder.finished():
            record, weights = found
            nets = loop.build()
            nets.load_state_dict(weights["last"])
            return Fitted(method, task, nets, weights, record["history"], record["cost"], key, cached=True)
        fitted = loop.run(folder)
        fitted.key = key
        record = {"method": method.settings(), "task": task.describe(), "history": fitted.history, "cost": fitted.cost}
        folder.finish(record, fitted.weights)
    return fitted


@dataclass
class Loop:
    """One training run; `run` reads from top to bottom.

    deadline     time of `time.monotonic` after which a run with a folder saves its state and pauses
    accelerator  `cpu`, `cuda`, ...; `auto` is a GPU where there is one
    devices      how many of these; each is a process, sees its share of every batch, and has the mean gradient
    """

    method: Method
    task: Task
    budget: Budget
    precision: str
    seed: int
    train: Samples
    extra: Samples | None
    val: Samples | None
    progress: bool = True
    deadline: float | None = None
    accelerator: str = "auto"
    devices: int = 1

    def build(self) -> nn.ModuleDict:
        """The method's networks, initialised from the seed, in channels-last memory."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            dims = self.train.images.ndim - 2
            nets = self.method.build(self.train.images.shape[1], self.task.classes, dims)
        return nets.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)

    def run(self, folder: RunFolder | None = None) -> Fitted:
        """Train for the budget's steps; with a folder, save checkpoints and resume from one."""
        precision = "bf16-mixed" if self.precision == "bfloat16" else "32-true"
        if self.devices == 1:
            return self.train_on(parallel.Alone(self.accelerator, precision), folder)
        return parallel.launch(self, precision, folder)

    def train_on(self, fabric, folder: RunFolder | None) -> Fitted:
        """The run itself, in one of the processes; `fabric` is Lightning's, or `parallel.Alone`."""
        nets = parallel.synchronised(self.build(), fabric)
        trained = [p for p in nets.parameters() if p.requires_grad]
        optimiser, schedule = self.method.optimise(trained, self.budget.steps)
        fabric.to_device(nets)
        state = {"step": 0, "history": {"loss": [], "val_step": [], "val_dice": []}, "seconds": 0.0, "best": None}
        if folder and (saved := folder.checkpoint()):
            nets.load_state_dict(saved["nets"])
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
            state = saved["state"]
        history, clock = state["history"], Clock(state["seconds"])

        bar = tqdm(
            total=self.budget.steps,
            desc="train",
            leave=False,
            mininterval=2,
            disable=not (self.progress and fabric.is_global_zero),
        )
        bar.update(state["step"])
        with torch.random.fork_rng(), bar:
            for step in range(state["step"], self.budget.steps):
                clock.start()
                now = Moment(step, self.budget.steps)
                rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                torch.manual_seed(self.seed * 1_000_003 + step)
                nets.train()
                labelled, unlabelled = self.batches(step, rng, fabric)
                clock.loaded()

                with fabric.autocast():
                    loss = self.method.training_step(nets, labelled, unlabelled, now)
                if not torch.isfinite(loss):
                    raise MedcookError(f"The loss became {loss.item()} at step {step}.", "Lower the learning rate.")
                fabric.backward(loss)
                parallel.average_gradients(trained, fabric)
                nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                schedule.step()
                self.method.after_step(nets, now)

                clock.stepped()
                history["loss"].append(round(loss.item(), 5))
                if self.is_check(step):
                    with fabric.autocast():
                        self.look(nets, step, state)
                bar.update()
                pause = fabric.broadcast(bool(folder and self.is_late() and step + 1 < self.budget.steps))
                if fabric.is_global_zero and (pause or (folder and clock.since_save() > CHECKPOINT_SECONDS)):
                    state["step"], state["seconds"] = step + 1, clock.seconds
                    folder.save_checkpoint(
                        {
                            "nets": nets.state_dict(),
                            "optimiser": optimiser.state_dict(),
                            "schedule": schedule.state_dict(),
                            "state": state,
                        }
                    )
                    clock.saved()
                if pause:
                    raise Paused(step + 1, self.budget.steps)

        weights = {"last": cpu_state(nets)} | ({"selected": state["best"]["nets"]} if state["best"] else {})
        cost = {
            "steps": self.budget.steps,
            **clock.report(),
            "parameters": parameters(nets),
            "threads": torch.get_num_threads(),
            "device": str(fabric.device),
            "precision": self.precision,
        }
        return Fitted(self.method, self.task, nets.cpu(), weights, history, cost)

    def batches(self, step: int, rng: torch.Generator, fabric) -> tuple[Batch, Batch | None]:
        """The augmented batch of a step: labelled images and, for methods that use them, as many unlabelled ones."""
        parts = []
        for samples in (self.train, self.extra):
            if samples is None:
                parts.append(None)
                continue
            chosen = batch_indices(len(samples), self.budget.batch, step, self.seed)
            batch = Batch(*fabric.to_device((samples.images[chosen], samples.labels[chosen], chosen)))
            if samples.raters is not None:
                batch = batch._replace(raters=fabric.to_device(samples.raters[chosen]))
            if samples.groups is not None:
                batch = batch._replace(groups=fabric.to_device(samples.groups[chosen]))
            batch = self.method.augment(batch, rng)
            if samples is self.extra:  # what augmentation moved in from outside says nothing either
                batch = batch._replace(labels=torch.full_like(batch.labels, IGNORE))
            layout = torch.channels_last if batch.images.ndim == 4 else torch.channels_last_3d
            batch = parallel.share(batch, fabric)
            parts.append(batch._replace(images=batch.images.contiguous(memory_format=layout)))
        return parts[0], parts[1]

    def is_late(self) -> bool:
        """Whether the deadline is past."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def is_check(self, step: int) -> bool:
        """Whether to look at the validation cases after this step: `checks` times or more, the last at the end."""
        every = max(1, self.budget.steps // self.budget.checks) if self.budget.checks else 0
        return bool(self.val and every) and (self.budget.steps - 1 - step) % every == 0

    def look(self, nets: nn.ModuleDict, step: int, state: dict) -> None:
        """Score the validation cases on the network's grid; keep the best weights where the task lets val select."""
        dice = validation_dice(self.method, nets, self.val)
        state["history"]["val_step"].append(step + 1)
        state["history"]["val_dice"].append(round(dice, 5))
        if self.task.select and (state["best"] is None or dice > state["best"]["dice"]):
            state["best"] = {"dice": dice, "step": step + 1, "nets": cpu_state(nets)}


class Clock:
    """Seconds of training, the share of them spent loading, and peak memory; validation and saving do not count."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.loading, self.steps, self.peak = seconds, 0.0, [], 0
        self.before = seconds
        self.last_save = time.perf_counter()

    def start(self) -> None:
        self.began = time.perf_counter()

    def loaded(self) -> None:
        self.loading += time.perf_counter() - self.began

    def stepped(self) -> None:
        self.steps.append(time.perf_counter() - self.began)
        self.seconds += self.steps[-1]
        if len(self.steps) % 20 == 1:
            self.peak = max(self.peak, psutil.Process().memory_info().rss)

    def since_save(self) -> float:
        return time.perf_counter() - self.last_save

    def saved(self) -> None:
        self.last_save = time.perf_counter()

    def report(self) -> dict:
        """seconds, step_seconds (median), loading_fraction and peak_mb of this process."""
        mine = self.seconds - self.before
        return {
            "seconds": round(self.seconds, 2),
            "step_seconds": round(sorted(self.steps)[len(self.steps) // 2], 5) if self.steps else 0.0,
            "loading_fraction": round(self.loading / mine, 4) if mine else 0.0,
            "peak_mb": round(self.peak / 2**20),
        }


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Which samples form the batch of a step: shuffled epochs, one after the other, each sample once an epoch."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // count
    return torch.cat(
        [_permutation(count, seed, int(epoch))[positions[epochs == epoch] % count] for epoch in epochs.unique()]
    )


def unlabelled_samples(method: Method, task: Task) -> Samples | None:
    """What a step gets beside the labelled images: None where the method wants nothing or every patient has labels."""
    return task.samples("unlabelled") if method.uses_unlabelled and task.unlabelled_patients else None


@lru_cache(maxsize=64)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))


@torch.no_grad()
def validation_dice(method: Method, nets: nn.ModuleDict, val: Samples) -> float:
    """Mean Dice over cases and structures on the network's grid; a structure absent from both counts 1."""
    nets.eval()
    device = next(nets.parameters()).device
    guess = torch.cat([method.predict(nets, part.to(device)).argmax(1).cpu() for part in val.images.split(16)])
    classes = range(1, int(val.labels[val.labels != IGNORE].max()) + 1)
    scores = []
    for case in val.case_of.unique():
        mine, truth = guess[val.case_of == case], val.labels[val.case_of == case]
        for value in classes:
            a, b = (mine == value) & (truth != IGNORE), truth == value
            size = int(a.sum() + b.sum())
            scores.append(2 * int((a & b).sum()) / size if size else 1.0)
    return sum(scores) / len(scores)


def cpu_state(nets: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in nets.state_dict().items()}


@contextlib.contextmanager
def threads(count: int):
    """Use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
