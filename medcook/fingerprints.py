"""What the code does, in a few numbers, and which precision is faster here.

A behaviour fingerprint is the loss of a method after 20 steps on the embedded cohort and the Dice of its
prediction. It moves when the mechanism, the loop, the network or the augmentation changes, and stays put
when code is only tidied. Runs are keyed by it, and evidence is stale when it no longer agrees.
"""

import inspect
import json
import platform
import statistics
import time
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch

from medcook.methods import Method
from medcook.paths import cache_dir
from medcook.runs import write_atomically

STEPS, BATCH = 20, 4
TOLERANCE = 1e-3
SOURCES = ("training.py", "methods.py", "losses.py", "preparation.py", "tasks.py", "networks", "data")


def behaviour(method: Method) -> dict[str, float]:
    """The fingerprint of a method, computed once for each state of the source code."""
    identity = json.dumps(method.settings(), sort_keys=True) + source_hash(type(method))
    source = sha256(identity.encode()).hexdigest()[:16]
    path = cache_dir() / "fingerprints" / f"{source}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = fingerprint(method)
    write_atomically(path, json.dumps(found))
    return found


def fingerprint(method: Method) -> dict[str, float]:
    """{loss, dice} after 20 steps in float32 on one thread, rounded to 1e-3."""
    from medcook.tasks import Budget, Task
    from medcook.training import Loop, threads, validation_dice

    task = Task("embedded", labelled=2)
    budget = Budget(steps=STEPS, batch=2 * BATCH if method.uses_unlabelled else BATCH, precision="float32", checks=0)
    extra = task.samples("unlabelled") if method.uses_unlabelled else None
    with threads(1):
        loop = Loop(method, task, budget, "float32", 0, task.samples("labelled"), extra, None, progress=False)
        fitted = loop.run()
        dice = validation_dice(method, fitted.nets, first_case(task))
    return {"loss": round(sum(fitted.history["loss"][-5:]) / 5, 3), "dice": round(dice, 3)}


def first_case(task):
    """The first validation case's samples."""
    val = task.samples("val")
    mine = val.case_of == 0
    return type(val)(val.images[mine], val.labels[mine], val.case_of[mine])


def agree(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two fingerprints are the same within `TOLERANCE`."""
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) <= TOLERANCE + 1e-9 for name in one)


@lru_cache(maxsize=256)
def source_hash(kind: type) -> str:
    """Hash of the source files that can change what a method does: the core's, and those of its classes."""
    package = Path(__file__).parent
    files = {path for name in SOURCES for path in package.glob(name if name.endswith(".py") else f"{name}/**/*.py")}
    files |= {Path(inspect.getfile(base)) for base in kind.__mro__ if base.__module__.startswith("medcook")}
    digest = sha256(torch.__version__.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def resolve_precision(wanted: str) -> str:
    """`auto` becomes bfloat16 where `timed_precisions` found it faster, else float32."""
    if wanted != "auto":
        return wanted
    found = timed_precisions()
    return "bfloat16" if found["bfloat16"] < 0.9 * found["float32"] else "float32"


def timed_precisions() -> dict[str, float]:
    """Milliseconds of a small training step in either precision, timed once for a machine and torch version."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = sha256(f"{device} {torch.backends.cpu.get_cpu_capability()} {torch.__version__}".encode()).hexdigest()[
        :12
    ]
    path = cache_dir() / f"precision-{machine}.json"
    if not path.exists():
        write_atomically(path, json.dumps({name: _time_step(name) for name in ("float32", "bfloat16")}))
    return json.loads(path.read_text(encoding="utf-8"))


def _time_step(precision: str, repeats: int = 5) -> float:
    """Median milliseconds of forward and backward of three convolutions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)])
        images = torch.randn(8, 32, 64, 64)
    layout = torch.channels_last
    net, images = net.to(device, memory_format=layout), images.to(device, memory_format=layout)
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = net(images).float().square().mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(taken[1:]), 3)
