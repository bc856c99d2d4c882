"""One run on several devices, by Lightning Fabric: a process each, a share of every batch, the mean of all gradients.

Every process draws and augments the whole batch from the same seed and keeps its own part, so that the shares of all
together are the batch that one device would see. One device alone needs none of this: `Alone`.
"""

import contextlib
import logging
import pickle

import torch
from torch import Tensor, nn

from medcook.errors import MedcookError, Paused
from medcook.methods import Batch

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


class Alone:
    """One device: what the loop asks of Fabric, without Fabric, whose import costs seconds and 100 MB.

    accelerator  `auto` is a GPU where there is one; or a device as torch names it
    precision    as Fabric names it: `bf16-mixed`, `32-true`
    """

    world_size, global_rank, is_global_zero = 1, 0, True

    def __init__(self, accelerator: str = "auto", precision: str = "32-true"):
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device = torch.device(found if accelerator == "auto" else accelerator)
        self.mixed = precision == "bf16-mixed"

    def to_device(self, what):
        """A network, a tensor, or a tuple of tensors, on the device."""
        return tuple(part.to(self.device) for part in what) if isinstance(what, tuple) else what.to(self.device)

    def autocast(self):
        """Within it, what is faster so is computed in bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def broadcast(self, what):
        """What the first process says."""
        return what


def launch(loop, precision: str, folder):
    """`loop.train_on` in `loop.devices` processes; what the first one gives. Its errors are raised here."""
    if loop.budget.batch % loop.devices:
        hint = f"Take a number that divides {loop.budget.batch}."
        raise MedcookError(f"A batch of {loop.budget.batch} can't be shared by {loop.devices} devices.", hint)
    on_gpus = loop.accelerator == "cuda" or (loop.accelerator == "auto" and torch.cuda.is_available())
    if on_gpus and loop.devices > torch.cuda.device_count():
        hint = f"Give --devices {torch.cuda.device_count()} at most."
        raise MedcookError(f"There are fewer GPUs than {loop.devices}.", hint)
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=loop.accelerator, devices=loop.devices, precision=precision, strategy="ddp_spawn")
    fitted, error = fabric.launch(Part(loop, folder))
    if error:
        kind, parts = error
        raise kind(*parts)
    return pickle.loads(fitted)


class Part:
    """What one process does; an object, because Fabric takes every other argument apart."""

    def __init__(self, loop, folder):
        self.loop, self.folder = loop, folder

    def __call__(self, fabric) -> tuple:
        """(Fitted, None), or (None, (class, arguments)) of an error for users, which can't cross processes as it is.

        Pickled here: tensors that two processes share would end with the first of them.
        """
        try:
            return pickle.dumps(self.loop.train_on(fabric, self.folder)), None
        except Paused as pause:
            return None, (Paused, (pause.step, pause.steps))
        except MedcookError as error:
            return None, (MedcookError, (error.problem, error.hint))


def synchronised(nets: nn.ModuleDict, fabric) -> nn.ModuleDict:
    """Networks whose batch normalisation sees the whole batch; on CPUs, where torch can't, each sees its share."""
    if fabric.world_size == 1 or fabric.device.type == "cpu":
        return nets
    return nn.SyncBatchNorm.convert_sync_batchnorm(nets)


def share(batch: Batch, fabric) -> Batch:
    """This process's part of a batch: one of `world_size` equal pieces."""
    if fabric.world_size == 1:
        return batch
    size = len(batch.images) // fabric.world_size
    mine = slice(fabric.global_rank * size, (fabric.global_rank + 1) * size)
    return Batch(*(part if part is None else part[mine] for part in batch))


def average_gradients(weights: list[Tensor], fabric) -> None:
    """Each weight's gradient becomes its mean over the processes; a weight that none of them used keeps none."""
    if fabric.world_size == 1:
        return
    used = torch.tensor([float(each.grad is not None) for each in weights], device=fabric.device)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in weights]
    flat = torch.cat([used, *(each.flatten() for each in gradients)])
    used, *parts = fabric.all_reduce(flat, reduce_op="mean").split([len(weights), *(each.numel() for each in weights)])
    for weight, part, by_any in zip(weights, parts, used.tolist(), strict=True):
        weight.grad = part.view(weight.shape).clone() if by_any else None
