"""What the code does, in a few numbers.

A behaviour fingerprint is the loss of a method after 20 steps on the embedded cohort and the Dice of its
prediction. It moves when the mechanism, the loop, the network or the augmentation changes, and stays put
when code is only tidied. Runs are keyed by it, and evidence is stale when it no longer agrees.
"""

import inspect
import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch

from medcook.methods import Method
from medcook.paths import cache_dir
from medcook.runs import write_atomically

STEPS, BATCH = 20, 4
TOLERANCE = 1e-3
SOURCES = ("training.py", "methods", "losses.py", "preparation.py", "tasks.py", "networks", "data")


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
    """{loss, dice} after 20 steps in float32 on one thread, rounded to 1e-3; never on a GPU, so that machines agree."""
    from medcook.tasks import Budget, Task
    from medcook.training import Loop, threads, validation_dice

    task = Task("embedded", labelled=2)
    budget = Budget(steps=STEPS, batch=BATCH, precision="float32", checks=0)
    extra = task.samples("unlabelled") if method.uses_unlabelled else None
    with threads(1):
        labelled = task.samples("labelled")
        loop = Loop(method, task, budget, "float32", 0, labelled, extra, None, progress=False, accelerator="cpu")
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
