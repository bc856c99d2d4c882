"""`python -m benchmarks.run [PART ...]`: speed and memory, measured here and reported; nothing is asserted.

Writes benchmarks/results.json and the tables of benchmarks/README.md. Run it on a machine that does nothing
else: the load that other work caused is recorded beside the numbers. With parts (training, methods, metrics, clicks,
chapters) these alone are measured anew and the others kept: only where the machine is the same.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.metrics.surface_distance import compute_average_surface_distance

from benchmarks.clicks import click_times
from benchmarks.marks import put, table
from benchmarks.methods import method_costs
from medcook import metrics
from medcook.data import open_dataset
from medcook.notebooks.runner import cooked_dir
from medcook.provenance import environment
from medcook.recipes import find_recipe
from medcook.runs import write_atomically
from medcook.tasks import Samples
from medcook.training import Loop

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by python -m benchmarks.run -->", "<!-- end of results -->"
STEPS = 6
"""Timed steps of a training run; the first is left out of the medians."""

METRIC_ROUNDS = 5

BASELINES = ("unet-acdc", "unet-hippocampus")
"""Recipes whose training step is timed, in the size that they have at `full`; the tensors are made up."""


def main(words: list[str]) -> None:
    parts = {
        "training": lambda: [training(paper) for paper in BASELINES],
        "methods": method_costs,
        "metrics": compare_metrics,
        "clicks": click_times,
        "chapters": chapters,
    }
    if unknown := set(words) - set(parts):
        sys.exit(f"There is no part {sorted(unknown)[0]!r}. Known: {', '.join(parts)}.")
    kept = json.loads((HERE / "results.json").read_text(encoding="utf-8")) if words else {}
    found = {} if words else {"machine": machine()}
    found |= {name: measure() for name, measure in parts.items() if name in (words or parts)}
    if "chapters" in words:
        found["chapters"] = merged(kept["chapters"], found["chapters"])
    results = kept | found
    write_atomically(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    put(report(results), BEGIN, END)


def merged(kept: list[dict], found: list[dict]) -> list[dict]:
    """Chapters' records, the new one where there are two, in the order of profile and chapter."""
    both = {(one["profile"] != "quick", one["chapter"]): one for one in [*kept, *found]}
    return [both[key] for key in sorted(both)]


def machine() -> dict:
    """Processor, cores, versions, and how busy other work kept the cores in the minute before."""
    return {"cores": os.cpu_count(), **environment(), "load_before": round(os.getloadavg()[0], 1)}


def training(paper: str) -> dict:
    """Median step in either precision, the share of it that loading takes, and minutes of a whole run."""
    loops = {precision: made_up(paper, precision, STEPS) for precision in ("float32", "bfloat16")}
    budget, size = find_recipe(paper).scales["full"].budget, loops["float32"].train.images.shape[2:]
    found = {precision: loop.run().cost for precision, loop in loops.items()}
    seconds = {precision: cost["step_seconds"] for precision, cost in found.items()}
    return {
        "recipe": paper,
        "batch": [budget.batch, 1, *size],
        "steps": budget.steps,
        "minutes": round(min(seconds.values()) * budget.steps / 60, 1),
        "step_ms": {precision: round(1000 * value, 1) for precision, value in seconds.items()},
        "bfloat16_over_float32": round(seconds["bfloat16"] / seconds["float32"], 2),
        "loading_share": {precision: cost["loading_fraction"] for precision, cost in found.items()},
    }


def made_up(paper: str, precision: str, steps: int) -> Loop:
    """The training loop of a baseline at `full`, for a few steps, on made-up images of its size."""
    method, task, budget, _ = find_recipe(paper).run("full", "unet", 0)
    size = task.preparation.size
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(64, 1, *[4] * len(size), generator=rng) * task.classes
    labels = torch.nn.functional.interpolate(coarse, size)[:, 0].byte()
    samples = Samples(labels[:, None] + torch.randn(64, 1, *size, generator=rng), labels, torch.arange(64))
    budget = replace(budget, steps=steps, checks=0)
    return Loop(method, task, budget, precision, 0, samples, None, None, progress=False)


def mask_pairs(patients: int = 6) -> list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """(rater, truth, spacing): every structure of some embedded patients, drawn by two hands."""
    dataset = open_dataset("embedded")
    pairs = []
    for case in dataset.cases(dataset.split.train[:patients]):
        pairs += [(case.raters[2] == value, case.label == value, case.spacing) for value in dataset.manifest.structures]
    return pairs


def monai_scores(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """The same three numbers by MONAI."""
    a, b = (torch.from_numpy(mask)[None, None].float() for mask in (pred, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = dict(include_background=True, spacing=list(spacing))
        return {
            "dice": compute_dice(a, b).item(),
            "hd95": compute_hausdorff_distance(a, b, percentile=95, **settings).item(),
            "assd": compute_average_surface_distance(a, b, symmetric=True, **settings).item(),
        }


def own_scores(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    score = metrics.score(pred, truth, spacing)
    return {name: getattr(score, name) for name in ("dice", "hd95", "assd")}


def compare_metrics() -> dict:
    """Largest difference from MONAI over all pairs, and the median milliseconds of all three metrics of a pair.

    Both take turns; of all rounds, the one whose ratio is in the middle counts.
    """
    pairs = mask_pairs()
    rounds = [(*timed(own_scores, pairs), *timed(monai_scores, pairs)) for _ in range(METRIC_ROUNDS)]
    ours, our_ms, theirs, their_ms = sorted(rounds, key=lambda one: one[1] / one[3])[METRIC_ROUNDS // 2]
    return {
        "pairs": len(pairs),
        "shape": list(pairs[0][0].shape),
        "largest_difference": {
            name: float(f"{max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True)):.1e}")
            for name in ours[0]
        },
        "medcook_ms": round(our_ms, 2),
        "monai_ms": round(their_ms, 2),
        "ratio": round(our_ms / their_ms, 2),
    }


def timed(function: Callable, pairs: list[tuple]) -> tuple[list, float]:
    """The results, and the median milliseconds of a call; the first call warms up."""
    function(*pairs[0])
    results, taken = [], []
    for pair in pairs:
        began = time.perf_counter()
        results.append(function(*pair))
        taken.append(1000 * (time.perf_counter() - began))
    return results, statistics.median(taken)


def chapters() -> list[dict]:
    """Minutes and peak memory of each chapter as `medcook cook` last recorded them in this cache."""
    found = []
    for profile in ("quick", "full"):
        for path in sorted(cooked_dir(profile).glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                {
                    "chapter": record["chapter"],
                    "profile": profile,
                    "minutes": round(record["minutes"], 2),
                    "peak_mb": round(record["peak_mb"]),
                }
            )
    return found


CLICKS = (
    "asked from | a click on a new image | embedding an image | the first click on it | the second"
    " | the second, where the pointer rested"
)


def report(results: dict) -> str:
    """The results as Markdown."""
    at, scored, clicks = results["machine"], results["metrics"], results["clicks"]
    steps = [
        [
            one["recipe"],
            " × ".join(map(str, one["batch"])),
            *one["step_ms"].values(),
            one["bfloat16_over_float32"],
            *[f"{share:.1%}" for share in one["loading_share"].values()],
            f"{one['minutes']} for {one['steps']} steps",
        ]
        for one in results["training"]
    ]
    costs = [[c["method"], c["labels_alone"], c["with_unlabelled"], c["mean"]] for c in results["methods"]]
    asked = [
        [way, *(f"{median} ({low} to {high})" for low, median, high in found.values())]
        for way, found in clicks["ms"].items()
    ]
    cooked = [[c["chapter"], c["profile"], c["minutes"], c["peak_mb"]] for c in results["chapters"]]
    differences = ", ".join(f"{name} {value:g}" for name, value in scored["largest_difference"].items())
    return f"""Measured with {at["threads"]} thread(s) of {at["cores"]} cores, {at["cpu"]}, device {at["device"]},
torch {at["torch"]}, MONAI {at["monai"]}; load before the start: {at["load_before"]} (0 is a machine at rest).

**A training step** of the baselines, in milliseconds, the share of it that loading and augmentation take, and what a
whole run at `full` takes (validation not counted):

{table("recipe | batch | float32 | bfloat16 | ratio | loading, float32 | loading, bfloat16 | minutes of a run", steps)}

**A step of the semi-supervised methods** over the supervised step, in float32: while labels are used alone, with
unlabelled images beside as many labelled ones, and their mean over a run of chapter 04.

{table("method | labels alone | with unlabelled images | mean of a run", costs)}

**Metrics** (Dice, HD95 and ASSD of one structure) on {scored["pairs"]} pairs of masks of shape {scored["shape"]}: \
{scored["medcook_ms"]} ms here,
{scored["monai_ms"]} ms with MONAI, ratio {scored["ratio"]}. Largest difference: {differences}.

**A click** on the small SAM, in milliseconds until its mask: image of {clicks["side"]} × {clicks["side"]} pixels, \
{clicks["threads"]} threads;
the median of {clicks["rounds"]} rounds and their range, where a round is the median of {clicks["clicks"]} clicks. \
The book asks from three distances;
its widget does so in the precision that is faster, embeds an image when it is shown, and what is around the pointer
once that rests.

{table(CLICKS, asked)}

**Chapters**, as `medcook cook` recorded them:

{table("chapter | profile | minutes | peak MB", cooked) if cooked else "none cooked in this cache yet."}
"""


if __name__ == "__main__":
    main(sys.argv[1:])
