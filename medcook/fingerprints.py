"""What the code does, in a few numbers.

A behaviour fingerprint is the loss of a method after 20 steps on the embedded cohort and the Dice of its
prediction. It moves when the mechanism, the loop, the network or the augmentation changes, and stays put
when code is only tidied. Runs are keyed by it (short ones by their source), and evidence
is stale when it no longer agrees.
"""

import inspect
import json
import re
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch

from medcook.memory import give_back
from medcook.methods import Method
from medcook.paths import cache_dir
from medcook.runs import write_atomically

STEPS, BATCH = 20, 4
SOURCE_KINDS = (".py", ".safetensors")
IMPORT = re.compile(r"^from (medcook\.recipes\.[\w.]+) import", re.MULTILINE)
SOURCES = ("training.py", "methods", "losses.py", "preparation.py", "tasks.py", "networks", "data")


def behaviour(method: Method) -> dict[str, float]:
    """The fingerprint of a method, computed once for each state of the source code."""
    return _remembered([method.settings(), source_hash(type(method))], lambda: fingerprint(method))


def scored(recipe, profile: str, arm: str) -> dict[str, float]:
    """{column: mean} of the recipe's own score of one case after 20 steps on its task at `quick`; computed once."""
    method, task = recipe.method(profile, arm), recipe.run("quick", arm, 0)[1]
    sources = [source_hash(type(method)), source_hash(type(task)), source_hash(recipe.score)]
    return _remembered([method.settings(), task.describe(), *sources], lambda: _scored(recipe.score, method, task))


def _scored(score, method: Method, task) -> dict[str, float]:
    from medcook.training import threads

    with threads(1):
        fitted = _short_run(method, task)
        rows = score(fitted, next(iter(task.cases("val"))))
    numbers = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    means = {name: sum(row[name] for row in rows) / len(rows) for name in sorted(numbers)}
    return {f"score {name}": round(value, 3) for name, value in means.items() if value == value}


def _remembered(identity: list, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `make` gives, kept on disk under a hash of `identity`."""
    source = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / "fingerprints" / f"{source}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    give_back()
    found = make()
    give_back()
    write_atomically(path, json.dumps(found))
    return found


def fingerprint(method: Method) -> dict[str, float]:
    """{loss, dice} after 20 steps in float32 on one thread, rounded to 1e-3; never on a GPU, so that machines agree."""
    from medcook.tasks import Task, VolumeTask
    from medcook.training import threads, validation_dice

    task = method.trial or (VolumeTask if method.axes == 3 else Task)("embedded", labelled=2)
    with threads(1):
        fitted = _short_run(method, task)
        dice = validation_dice(method, fitted.nets, first_case(task))
    return {"loss": round(sum(fitted.history["loss"][-5:]) / 5, 3), "dice": round(dice, 3)}


def _short_run(method: Method, task):
    """`method` after 20 steps on a task, in float32, on the CPU."""
    from medcook.tasks import Budget
    from medcook.training import Loop, unlabelled_samples

    budget = Budget(steps=STEPS, batch=BATCH, precision="float32", checks=0)
    labelled, extra = task.samples("labelled"), unlabelled_samples(method, task)
    return Loop(method, task, budget, "float32", 0, labelled, extra, None, progress=False, accelerator="cpu").run()


def first_case(task):
    """The first validation case's samples."""
    val = task.samples("val")
    mine = val.case_of == 0
    return type(val)(val.images[mine], val.labels[mine], val.case_of[mine])


def agree(one: dict[str, float], other: dict[str, float], tolerance: float = Method.trial_tolerance) -> bool:
    """Whether two fingerprints are the same within a tolerance, which for numbers above 1 is a share of them."""
    near = lambda a, b: abs(a - b) <= tolerance * max(1.0, abs(a)) + 1e-9  # noqa: E731
    return one.keys() == other.keys() and all(near(one[name], other[name]) for name in one)


@lru_cache(maxsize=256)
def source_hash(kind: type | Callable) -> str:
    """Hash of the source files that can change what a class or a score does: shared ones, its own (and its bases'), and
    what these import from recipes."""
    package = Path(__file__).parent
    shared = SOURCES if isinstance(kind, type) else ("evaluation.py", "metrics.py", "measures")
    files = {path for name in shared for path in package.glob(name if name.endswith(".py") else f"{name}/**/*.py")}
    bases = kind.__mro__ if isinstance(kind, type) else (kind,)
    own = {Path(inspect.getfile(base)) for base in bases if base.__module__.startswith("medcook")}
    libraries = {path.parent for path in own if path.parent.parent == package}  # of chapters: sam, few_shot
    files |= {path for folder in libraries for path in folder.rglob("*") if path.suffix in SOURCE_KINDS}
    files |= with_imports(own)
    digest = sha256(torch.__version__.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def with_imports(files: set[Path]) -> set[Path]:
    """Source files and, over any number of steps, the modules of recipes that they import from."""
    root, found, todo = Path(__file__).parent.parent, set(), list(files)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            names = IMPORT.findall(path.read_text(encoding="utf-8"))
            todo += [file for name in names if (file := root / f"{name.replace('.', '/')}.py").exists()]
    return found
