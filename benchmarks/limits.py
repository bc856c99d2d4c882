"""`python -m benchmarks.limits`: how far a training step is from what this machine can do, and where the time goes.

The step is that of the heart's baseline at `full`. Its arithmetic, at the rate at which this machine multiplies large
matrices and convolves many channels, is the least it could take. Its convolutions, each timed on its own in its own
shape, are what the library makes of that; the profiler says what else a step spends its time on. Writes
benchmarks/limits.json and its table in README.md.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.marks import put, table
from benchmarks.run import made_up
from medcook.provenance import environment
from medcook.runs import write_atomically

HERE = Path(__file__).parent
BEGIN, END = "<!-- limits: made by python -m benchmarks.limits -->", "<!-- end of limits -->"
PAPER, STEPS, REPEATS = "unet-acdc", 12, 7
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUPS = {
    "convolution": ("conv",),
    "batch normalisation": ("batch_norm",),
    "ReLU": ("relu", "threshold_backward"),
    "pooling, upsampling, concatenation": ("pool", "upsample", "cat"),
    "copies and casts": ("copy_",),
    "optimiser and average": ("foreach", "fused", "lerp"),
    "augmentation": ("grid_sampler", "randn", "normal_"),
}
"""Operators whose name holds one of the words, the first group that fits; the rest is `all else`."""


def best(work: Callable[[], object]) -> float:
    """The shortest of some repetitions, in seconds: what the machine can do when nothing comes between."""
    work()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def rates(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of a product of two 2048 x 2048 matrices, and of a 3 x 3 convolution of 128 to 128 channels."""
    matrix = torch.ones(2048, 2048, dtype=dtype)
    image = torch.ones(16, 128, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    work = {"matrices": lambda: matrix @ matrix, "convolution": lambda: F.conv2d(image, kernel, padding=1)}
    return {name: gigaflop(one) / best(one) for name, one in work.items()}


def gigaflop(work: Callable[[], object]) -> float:
    """10^9 multiplications and additions of matrix products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def backpropagated(net: nn.Module, images: Tensor) -> None:
    """There and back through a network."""
    net(images).sum().backward()


def convolutions_alone(net: nn.Module, images: Tensor, dtype: torch.dtype) -> float:
    """Seconds of all convolutions of a network, there and back, each in its own shape and by itself."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, _: seen.append((layer, given[0])))
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return sum(convolution_alone(layer, given.to(dtype), given is not images) for layer, given in seen)


def convolution_alone(layer: nn.Conv2d, given: Tensor, further: bool) -> float:
    """Seconds of one convolution, there and back to its kernel and, where it goes `further`, to its input."""
    kernel, given = layer.weight.detach().to(given.dtype).requires_grad_(), given.requires_grad_(further)
    there = lambda: F.conv2d(given, kernel, padding=layer.padding)  # noqa: E731
    wanted, gradient = [given, kernel] if further else [kernel], torch.ones_like(there())
    return best(lambda: torch.autograd.grad(there(), wanted, gradient))


def shares(precision: str) -> dict[str, float]:
    """{group: share of the time that a training run spends in operators}, by the profiler."""
    loop = made_up(PAPER, precision, STEPS)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loop.run()
    spent = dict.fromkeys([*GROUPS, "all else"], 0.0)
    for event in seen.key_averages():
        fits = (group for group, words in GROUPS.items() if any(word in event.key for word in words))
        spent[next(fits, "all else")] += event.self_cpu_time_total
    total = sum(spent.values())
    return {group: round(one / total, 3) for group, one in spent.items()}


def limits(precision: str) -> dict:
    """What a step takes, what it could, and what it is spent on."""
    loop, dtype = made_up(PAPER, precision, STEPS), PRECISIONS[precision]
    found, net = rates(dtype), loop.build()["model"].train()
    images = loop.train.images[: loop.budget.batch].contiguous(memory_format=torch.channels_last)
    work = gigaflop(lambda: backpropagated(net, images))
    return {
        "gflop": round(work, 1),
        "gflop_per_s": {name: round(rate) for name, rate in found.items()},
        "least_ms": round(1000 * work / max(found.values())),
        "convolutions_ms": round(1000 * convolutions_alone(net, images, dtype)),
        "step_ms": round(1000 * loop.run().cost["step_seconds"]),
        "shares": shares(precision),
    }


def report(found: dict) -> str:
    """The results as Markdown."""
    at, parts = found["machine"], found["precisions"]
    rows = [
        ["matrices, GFLOP/s", *(one["gflop_per_s"]["matrices"] for one in parts.values())],
        ["convolution of 128 channels, GFLOP/s", *(one["gflop_per_s"]["convolution"] for one in parts.values())],
        ["arithmetic of a step, GFLOP", *(one["gflop"] for one in parts.values())],
        ["at the better of these rates, ms", *(one["least_ms"] for one in parts.values())],
        ["its convolutions, each alone, ms", *(one["convolutions_ms"] for one in parts.values())],
        ["**the step, ms**", *(one["step_ms"] for one in parts.values())],
        *(
            [f"of it {group}", *(f"{one['shares'][group]:.0%}" for one in parts.values())]
            for group in [*GROUPS, "all else"]
        ),
    ]
    where = f"{at['threads']} thread(s) of {at['cores']} cores, {at['cpu']}; load before the start: {at['load_before']}"
    return f"{where}.\n\n{table(' | '.join([PAPER, *parts]), rows)}\n\n" + "\n".join(map(said, parts.items())) + "\n"


def said(item: tuple[str, dict]) -> str:
    """A line about one precision."""
    precision, one = item
    step, least, alone = one["step_ms"], one["least_ms"], one["convolutions_ms"]
    return (
        f"- {precision}: a step takes {step / least:.1f} times what its arithmetic takes at the machine's rate. "
        f"Its convolutions alone take {alone / least:.1f} times that; the shares above say what else it does."
    )


def main() -> None:
    machine = {"cores": os.cpu_count(), **environment(), "load_before": round(os.getloadavg()[0], 1)}
    found = {"machine": machine, "precisions": {precision: limits(precision) for precision in PRECISIONS}}
    write_atomically(HERE / "limits.json", json.dumps(found, indent=1) + "\n")
    put(report(found), BEGIN, END)


if __name__ == "__main__":
    main()
