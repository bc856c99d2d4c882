"""Dice of novel structures in volumes, with every support that the task asks for."""

import zlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import Case
from medcook.few_shot.method import Shots
from medcook.few_shot.task import chunks, extent

Ready = tuple[nn.ModuleDict, list[Shots]]
"""The network that answers, and the support of every chunk."""

_ready: WeakKeyDictionary = WeakKeyDictionary()


def novel_dice(fitted, case: Case) -> list[dict]:
    """A row for each novel structure and support: volume Dice on the case's own grid, `group` names the support.

    From the first to the last slice that shows the structure, chunk by chunk (see `extent`); elsewhere there is none.
    """
    found = answers(fitted, case)
    return [
        evaluation.row(
            case, name, dice=metrics.dice(mask, truth), support=float(number), group=patients, missed=not mask.any()
        )
        for name, number, patients, mask, truth in found
    ]


@torch.no_grad()
def answers(fitted, case: Case) -> Iterator[tuple]:
    """(structure, number of the support, its patients, mask, truth) of every novel structure and support."""
    task, method = fitted.task, fitted.method
    fitted.nets.load_state_dict(fitted.weights["last"])
    net = fitted.nets.eval()["average"]
    images, maps = task.preparation.images(case), None
    for value, name in task.novel_structures.items():
        if not (slices := extent(case, value)):
            continue
        for number in range(task.supports):
            answering, supports = supported(fitted, number, value)
            if answering is not net:
                queries = Shots(images, encode(method, answering, images))
            else:
                maps = encode(method, net, images) if maps is None else maps
                queries = Shots(images, maps)
            probability = torch.zeros(len(images), 2, *images.shape[2:])
            probability[:, 0] = 1
            for part, support in zip(chunks(slices, task.chunks), supports, strict=True):
                inside = method.segment(answering, support, queries.take(part))
                probability[part] = torch.stack([1 - inside, inside], dim=1)
            mask = task.preparation.restore(probability, case)[1].numpy() > 0.5
            patients = " ".join(each.patient_id for each in task.support_cases(number, value))
            yield name, number, patients, mask, case.label == value


def supported(fitted, number: int, value: int) -> Ready:
    """What answers with one support: made once for every fitted network; its randomness is seeded by the support."""
    kept = _ready.setdefault(fitted.nets, {})
    identity = (number, value, fitted.task)
    if identity not in kept:
        net, method = fitted.nets["average"], fitted.method
        chunked = fitted.task.support(number, value)
        shots = [Shots(images, encode(method, net, images), masks) for images, masks in chunked]
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(f"support {number} of {value}, draw {fitted.task.draw}".encode()))
            answering = method.adapt(net, shots)
        if answering is not net:
            shots = [Shots(each.images, encode(method, answering, each.images), each.masks) for each in shots]
        kept[identity] = (answering, shots)
    return kept[identity]


def encode(method, net: nn.ModuleDict, images: Tensor) -> Tensor:
    """Features of any number of slices."""
    return torch.cat([method.encode(net, part) for part in images.split(16)])
