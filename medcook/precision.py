"""Which precision trains faster on this machine: timed once, then remembered."""

import json
import platform
import time
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import nn

from medcook.errors import MedcookError
from medcook.paths import cache_dir
from medcook.runs import write_atomically

PRECISIONS = ("float32", "bfloat16")
GAIN = 0.9
"""bfloat16 is taken where its step costs less than this share of a float32 step."""


def resolve_precision(wanted: str) -> str:
    """`auto` becomes bfloat16 where `timed_precisions` found it faster, else float32."""
    if wanted in PRECISIONS:
        return wanted
    if wanted != "auto":
        raise MedcookError(f"There is no precision {wanted!r}.", f"Choose auto, {' or '.join(PRECISIONS)}.")
    found = timed_precisions()
    return "bfloat16" if found["bfloat16"] < GAIN * found["float32"] else "float32"


def autocast(cost: Mapping) -> torch.autocast:
    """Where a trained network predicts: in the precision of its training, which its cost names."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=cost["precision"] == "bfloat16")


def timed_precisions() -> dict[str, float]:
    """Milliseconds of a small training step in either precision, timed once for a machine and torch version."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = f"{device} {torch.backends.cpu.get_cpu_capability()} {torch.__version__}"
    path = cache_dir() / f"precision-{sha256(machine.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        write_atomically(path, json.dumps(time_steps()))
    return json.loads(path.read_text(encoding="utf-8"))


def time_steps() -> dict[str, float]:
    """Milliseconds of a training step of a small convolutional network in either precision, timed now."""
    return {"float32": 1000 * time_step(torch.float32), "bfloat16": 1000 * time_step(torch.bfloat16)}


def time_step(dtype, repeats: int = 3) -> float:
    """Median seconds of a training step of a small convolutional network, batch 8 of 128 x 128, in `dtype`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 4, 1),
    ]
    net = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    image = torch.linspace(-1, 1, 8 * 128 * 128, device=device).reshape(8, 1, 128, 128)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = net(image).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[repeats // 2]
