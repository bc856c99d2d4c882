"""What evidence is made of, as small JSON files: a Record per arm and replicate, a Summary per paper and profile."""

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from medcook.errors import MedcookError
from medcook.verdicts import Verdict

DataKind = Literal["real", "real-anatomy-simulated", "simulated"]
NAMES = ("case_id", "patient_id", "structure", "unit", "group")
FLAGS = ("missed", "false_alarm")
KEPT_COLUMNS = (*NAMES, *FLAGS, "dice", "hd95", "assd", "volume_ratio", "n_voxels")
CURVE_POINTS = 40
DIGITS = 5


class Strict(BaseModel):
    """Refuses unknown fields, so that a damaged or foreign file is found at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(Strict):
    """One arm, one replicate: what was run, what came out for every case, what it cost, and where.

    request        hash of everything that was asked for; the run is not repeated while it stays the same
    key            the training run's content hash
    rows           per-case values of the last checkpoint, packed by `pack`; `rows_selected` of the val-selected one
    test_reads     how often and why test cases were read; None where they were not
    """

    paper: str
    arm: str
    profile: str
    replicate: int
    seed: int
    request: str
    key: str
    task: dict
    method: dict
    budget: dict
    dataset: str
    dataset_hash: str
    split_hash: str
    data: DataKind
    rows: dict
    rows_selected: dict | None
    history: dict
    cost: dict
    environment: dict
    test_reads: dict | None
    date: str


class ArmResult(Strict):
    """One arm over its replicates: mean with interval (None: no interval), failures, mean cost, and its identity.

    selected     mean of the val-selected checkpoint, where one was kept
    setting      hash of method, task, budget and data; `fingerprint` the method's behaviour
    """

    mean: float
    low: float | None
    high: float | None
    missed: int
    false_alarms: int
    rows: int
    patients: int
    structures: dict[str, float]
    selected: float | None
    cost: dict[str, float]
    setting: str
    fingerprint: dict[str, float]


class Comparison(Strict):
    """a minus b in units of the metric, with 95% interval, effect per replicate and p (unadjusted).

    smallest_effect  what this run could have seen; `cost_ratio` the named cost of a over that of b
    """

    a: str
    b: str
    effect: float
    low: float | None
    high: float | None
    per_replicate: list[float]
    p: float | None
    n_patients: int
    n_replicates: int
    design: str
    smallest_effect: float | None
    cost: str
    cost_ratio: float | None


class Summary(Strict):
    """A claim and what became of it at one profile."""

    paper: str
    title: str
    claim: str
    profile: str
    metric: str
    unit: str
    expect: str
    margin: float
    published: dict[str, float]
    source: str
    dataset: str
    dataset_hash: str
    split_hash: str
    data: DataKind
    replicate: str
    seeds: list[int]
    arms: dict[str, ArmResult]
    comparison: Comparison | None
    ablation: Comparison | None
    verdict: Verdict
    environment: dict
    test_reads: int
    date: str


def pack(frame: pd.DataFrame, metric: str = "dice", everything: bool = False) -> dict:
    """An evaluation table as {column: list}, rounded; a column with one value throughout is stored as that value.

    Kept are `KEPT_COLUMNS` and `metric`; what follows from these (IoU) is left out. `everything` keeps all columns:
    those of a recipe's own score.
    """
    packed = {}
    for column in frame.columns if everything else frame.columns.intersection([*KEPT_COLUMNS, metric]):
        values = tidy(frame[column].tolist())
        constant = column != "case_id" and len(values) > 1 and all(value == values[0] for value in values)
        packed[column] = values[0] if constant else values
    return packed


def unpack(packed: dict) -> pd.DataFrame:
    """The table that `pack` stored; missing numbers come back as NaN."""
    frame = pd.DataFrame(packed)
    numbers = frame.columns.difference([*NAMES, *FLAGS, "n_voxels"])
    return frame.astype({column: float for column in numbers if not frame[column].map(type).eq(str).any()})


def thin(history: dict[str, list]) -> dict[str, list]:
    """A training history with the loss averaged over at most `CURVE_POINTS` stretches; validation is kept as it is."""
    losses = history.get("loss", [])
    parts = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses))) if losses else []
    curve = {"step": [int(part[-1]) + 1 for part in parts], "loss": [float(np.mean(np.take(losses, p))) for p in parts]}
    return tidy(curve | {name: history[name] for name in ("val_step", "val_dice") if name in history})


def tidy(value):
    """Plain JSON: numpy numbers unwrapped, floats to `DIGITS` significant digits, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): tidy(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(part) for part in value]
    if isinstance(value, np.generic):
        return tidy(value.item())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def save(model: Strict, path: Path) -> None:
    """Write atomically, one field a line, so that a change of evidence is a readable diff."""
    from medcook.runs import write_atomically  # imports torch, which reading evidence does not need

    fields = tidy(model.model_dump(mode="json"))
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read(kind: type[Strict], path: Path):
    """The Record or Summary in a file, None where there is no file; MedcookError naming a damaged one."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        problem = f"{path}: not readable evidence ({reason})."
        raise MedcookError(problem, "Delete it and reproduce the paper.") from error
