"""What this machine has, and what each profile will take on it."""

import os
import platform
from pathlib import Path

import psutil

from medcook.paths import cache_dir, mirror_dir

REFERENCE_STEP_S = 0.06
"""Seconds of the timed step below, in the faster precision, on the 2-core laptop for which the profiles were sized."""

REFERENCE_MINUTES = {"quick": "1", "full": "20"}
"""Minutes a chapter takes at most on that laptop."""

GIB = 2**30


def report() -> dict[str, str]:
    """{what: finding}, in the order in which it is printed. Trains for about two seconds to time it."""
    import torch

    from medcook.precision import time_steps

    memory = psutil.virtual_memory()
    timings = time_steps()
    faster = min(timings, key=timings.get)
    return {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor cores": f"{os.cpu_count()}, of which PyTorch uses {torch.get_num_threads()}",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "GPU": ", ".join(gpus()) or "none: everything runs on the processor",
        "PyTorch": f"{torch.__version__} ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'})",
        "a training step": ", ".join(f"{name} {ms:.0f} ms" for name, ms in timings.items()) + f": use {faster}",
        "data mirror": _mirror(),
        "cache": f"{cache_dir()}, {folder_bytes(cache_dir()) / GIB:.2f} GiB used, {_free(cache_dir()):.1f} GiB free",
        **expectations(timings[faster] / 1000),
    }


def expectations(step_s: float) -> dict[str, str]:
    """A rough word on every profile for a machine whose training step takes `step_s` seconds."""
    ratio = step_s / REFERENCE_STEP_S
    found = {
        f"profile {name}": f"about {max(0.2, float(minutes) * ratio):.1f} minutes a chapter at most"
        for name, minutes in REFERENCE_MINUTES.items()
    }
    return found | {"profile paper": "hours" if gpus() else "made for a GPU; on this machine days"}


def gpus() -> list[str]:
    """Names of the GPUs that PyTorch can use."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mirror() -> str:
    mirror = mirror_dir()
    if mirror is None:
        return "none (set MEDCOOK_MIRROR to a folder with the data sets to save the downloads)"
    return str(mirror) if mirror.is_dir() else f"MEDCOOK_MIRROR is {mirror}, which does not exist"


def _free(folder: Path) -> float:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return psutil.disk_usage(str(existing)).free / GIB
