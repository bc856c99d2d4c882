"""`python -m benchmarks.growth`: does the cost grow like the data? The embedded cohort, 1, 4 and 16 times as large.

Every measurement has a process of its own. One prepares the samples of all patients, as a training does, and then takes
a few training steps on them; another predicts and scores every patient and computes the intervals, as a chapter does.
Time is processor time on one thread, which other work disturbs less than the time on the clock; memory is the peak of
the process, with all that it imports. Writes benchmarks/growth.json and its table in README.md.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

from benchmarks.marks import put, table
from medcook.data.embedded import PATIENTS, Embedded
from medcook.data.manifests import load_manifest
from medcook.data.splits import Split
from medcook.errors import MedcookError
from medcook.evaluation import evaluate, summary
from medcook.provenance import environment
from medcook.recipes import find_recipe
from medcook.runs import write_atomically
from medcook.tasks import Samples, Task, prepare
from medcook.training import Fitted, Loop, threads

HERE = Path(__file__).parent
BEGIN, END = "<!-- growth: made by python -m benchmarks.growth -->", "<!-- end of growth -->"
TIMES = (1, 4, 16)
STEPS = 6
"""Training steps on the prepared samples; their mean is reported, the building of the network with them."""

REPEATS = 3
"""Fresh processes for each measurement, but for the largest size."""

MIB = 2**20


class Grown(Embedded):
    """The embedded cohort with `count` patients, simulated as the committed ones are; all are for training."""

    def __init__(self, count: int):
        super().__init__(load_manifest("embedded"))
        self.count = count

    def index(self) -> dict[str, str]:
        return {f"brain{number:02d}": f"brain{number:02d}" for number in range(1, self.count + 1)}

    @cached_property
    def split(self) -> Split:
        return Split(train=tuple(self.patients), val=(), test=(), source="all patients train")


def preparing(patients: int) -> dict:
    """Cost of preparing the samples of so many patients; `tensors_mb` they hold, `step_ms` of a training on them."""
    data, fitted = Grown(patients), warmed_up()
    samples, cost = measured(lambda: prepare(data, fitted.task.preparation, data.split.train))
    held = sum(part.numel() * part.element_size() for part in (samples.images, samples.labels, samples.case_of))
    steps = measured(lambda: train(fitted.task, samples))[1]["seconds"]
    return cost | {"tensors_mb": round(held / MIB, 1), "step_ms": round(1000 * steps / STEPS)}


def evaluating(patients: int) -> dict:
    """Cost of predicting and scoring so many patients, and of the intervals of their mean Dice."""
    data, fitted = Grown(patients), warmed_up()
    return measured(lambda: summary(evaluate(fitted.predict, data, data.split.train)))[1]


def warmed_up() -> Fitted:
    """The baseline of `quick`, trained for a few steps on two patients: what a process does once is done by now."""
    task = Task("embedded", labelled=2)
    fitted = train(task, task.samples("labelled"))
    summary(evaluate(fitted.predict, task.data, task.labelled_patients))
    return fitted


def train(task: Task, samples: Samples) -> Fitted:
    """A few steps of the baseline's training, in float32."""
    method, _, budget, seed = find_recipe("unet-acdc").run("quick", "unet", 0)
    budget = replace(budget, steps=STEPS, checks=0)
    return Loop(method, task, budget, "float32", seed, samples, None, None, progress=False).run()


def measured(work: Callable) -> tuple[object, dict]:
    """What the work gives; its `seconds` of processor time and of the clock (`wall`), and the process's `peak_mb`."""
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    seconds, wall = time.process_time() - processor, time.perf_counter() - wall
    return found, {"seconds": round(seconds, 3), "wall": round(wall, 3), "peak_mb": round(peak() / MIB, 1)}


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PARTS = {"preparing": preparing, "evaluating": evaluating}


def cost_of(part: str, patients: int) -> dict:
    """What a part costs on one thread, in the process that this is called in."""
    with threads(1):
        return PARTS[part](patients)


def grow(first: int) -> list[dict]:
    """One row a size, `first` patients and more: patients, and the cost of each part, each from a fresh process."""
    rows = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for times in TIMES:
            repeats = REPEATS if times < TIMES[-1] else 1
            costs = {part: median(pool, part, times * first, repeats) for part in PARTS}
            rows.append({"times": times, "patients": times * first, **costs})
            print(rows[-1], flush=True)
    return [row | {"ratios": {part: ratios(row[part], rows[0][part]) for part in PARTS}} for row in rows]


def median(pool: ProcessPoolExecutor, part: str, patients: int, repeats: int) -> dict:
    """The cost of a part, of the repetition whose seconds are in the middle."""
    costs = [pool.submit(cost_of, part, patients).result() for _ in range(repeats)]
    return sorted(costs, key=lambda cost: cost["seconds"])[repeats // 2]


def ratios(cost: dict, first: dict) -> dict:
    """Seconds and peak memory over those of the smallest cohort."""
    return {what: round(cost[what] / first[what], 2) for what in ("seconds", "peak_mb")}


def added(rows: list[dict], part: str, what: str) -> float:
    """MB for each further patient, between the two largest sizes: the smallest may stay below what the imports took.

    0 where it took less, which is chance.
    """
    less, more = rows[-2:]
    return max(0.0, (more[part][what] - less[part][what]) / (more["patients"] - less["patients"]))


def report(found: dict) -> str:
    """The results as Markdown."""
    at, rows = found["machine"], found["rows"]
    head = "patients | times | preparing, s | times | peak MB | evaluating, s | times | peak MB | a training step, ms"
    lines = [
        [row["patients"], row["times"], *[c for part in PARTS for c in cells(row, part)], row["preparing"]["step_ms"]]
        for row in rows
    ]
    prepared, tensors = (f"{added(rows, 'preparing', what):.2f} MB" for what in ("peak_mb", "tensors_mb"))
    evaluated = f"{added(rows, 'evaluating', 'peak_mb'):.2f} MB"
    where = f"{at['cores']} cores, {at['cpu']}; load before the start: {at['load_before']}"
    return f"""Processor seconds on one thread of {where}; median of three, but of one for the largest. *Times* is
over the first line; the peak is that of the whole process, with all that it imports.

{table(head, lines)}

A further patient adds {prepared} to preparing, whose samples ({tensors} of tensors each) lie in a file, and {evaluated}
to evaluating, which reads one case at a time. A training has as many steps as its budget says, however many patients
there are; what it has read of that file stays in memory as long as there is room.
"""


def cells(row: dict, part: str) -> list:
    cost, grown = row[part], row["ratios"][part]
    return [f"{cost['seconds']:.1f}", f"{grown['seconds']:.1f}", round(cost["peak_mb"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=PATIENTS, help="how many the smallest cohort has")
    args = parser.parse_args()
    machine = {"cores": os.cpu_count(), **environment(), "threads": 1, "load_before": round(os.getloadavg()[0], 1)}
    found = {"machine": machine, "rows": grow(args.patients)}
    write_atomically(HERE / "growth.json", json.dumps(found, indent=1) + "\n")
    print(report(found))
    try:
        put(report(found), BEGIN, END)
    except MedcookError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
