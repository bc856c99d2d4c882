"""Evidence: run a recipe's arms, keep what came out, and say what became of the claim.

It lies in papers/evidence/<paper>/<profile>/: `<arm>-<k>.json` for replicate k of an arm, written as soon as that run
is finished, and `summary.json`. A run whose record is there and asks for the same thing is not repeated, so that an
interrupted `reproduce` goes on where it stopped.
"""

import re
import time
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from medcook import evaluation, metrics, paths, records
from medcook.errors import MedcookError, Paused
from medcook.profiles import PROFILES, resolve_profile
from medcook.provenance import environment
from medcook.records import Record, Summary
from medcook.summaries import Identity, build_summary


def reproduce(
    recipe,
    profile: str | None = None,
    replicates: int | None = None,
    progress: bool = True,
    minutes: float | None = None,
    devices: int = 1,
) -> Summary:
    """Run every arm in every replicate that has no current record, then summarise and judge.

    recipe      a `medcook.recipes.recipe.Recipe`; `replicates` overrides the number in its scale for this profile
    minutes     after so long the run under way saves its state and raises `Paused`; the next call goes on there
    devices     GPUs, or processes of a CPU, that share every batch
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    profile = resolve_profile(profile)
    count = replicates or scale_of(recipe, profile).replicates
    bar = tqdm(runs_of(recipe, profile, count), desc=recipe.paper, disable=not progress)
    for arm, number in bar:
        bar.set_postfix_str(f"{arm} {number}")
        _run(recipe, profile, arm, number, progress, deadline, devices)
    return summarise(recipe, profile, count)


def run_one(
    recipe, profile: str, arm: str, number: int, minutes: float | None = None, devices: int = 1, progress: bool = True
) -> None:
    """One arm's replicate, recorded; nothing where its record is current. MedcookError where the profile lacks it."""
    scale_of(recipe, profile)
    if arm not in recipe.arms_at(profile):
        raise MedcookError(
            f"{recipe.paper} has no arm {arm!r} at {profile}.", f"It has: {', '.join(recipe.arms_at(profile))}."
        )
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    _run(recipe, profile, arm, number, progress, deadline, devices)


def runs_of(recipe, profile: str, count: int) -> list[tuple[str, int]]:
    """(arm, replicate) of every run for `count` replicates: one replicate of all arms after the other."""
    return [(arm, number) for number in range(count) for arm in recipe.arms_at(profile)]


def unfinished(recipe, profile: str, replicates: int | None = None) -> list[tuple[str, int]]:
    """(arm, replicate) of every run of a profile that has no current record."""
    count = replicates or scale_of(recipe, profile).replicates
    return [run for run in runs_of(recipe, profile, count) if not _is_current(recipe, profile, *run)]


def summarise(recipe, profile: str, count: int) -> Summary:
    """Judge `count` replicates, and those after them whose records are current; write summary.json."""
    arms = recipe.arms_at(profile)
    while all(_is_current(recipe, profile, arm, count) for arm in arms):
        count += 1
    runs = {arm: [_record(recipe.paper, profile, arm, number) for number in range(count)] for arm in arms}
    identities = {arm: _identity(recipe, profile, arm, 0) for arm in arms}
    summary = build_summary(recipe, profile, runs, identities)
    records.save(summary, folder(recipe.paper, profile) / "summary.json")
    return summary


def load_summary(paper: str, profile: str | None = None) -> Summary | None:
    """The summary of a paper at a profile, or at the largest one that has any; None where there is none."""
    for name in (profile,) if profile else reversed(PROFILES):
        if found := records.read(Summary, folder(paper, name) / "summary.json"):
            return found
    return None


def evidence_frame(paper: str, profile: str, checkpoint: str = "last") -> pd.DataFrame:
    """All per-case rows of a paper at a profile, of every arm and replicate, with columns arm, replicate and seed.

    checkpoint  `last` (the primary result) or `selected`; a frame without rows where nothing was measured
    """
    tables = []
    for path in sorted(folder(paper, profile).glob("*-[0-9]*.json")):
        record = records.read(Record, path)
        if rows := record.rows if checkpoint == "last" else record.rows_selected:
            tables.append(records.unpack(rows).assign(arm=record.arm, replicate=record.replicate, seed=record.seed))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def folder(paper: str, profile: str) -> Path:
    """Where the evidence of a paper at a profile lies."""
    return paths.EVIDENCE / paper / profile


def is_stale(recipe, summary: Summary) -> bool:
    """Whether the code no longer does what the evidence says it did."""
    return bool(stale_because(recipe, summary))


def stale_because(recipe, summary: Summary) -> str:
    """Why the evidence is stale, in words; empty while it is fresh. Cheap settings first, then behaviour."""
    from medcook.fingerprints import agree

    if summary.profile not in recipe.scales or set(recipe.arms_at(summary.profile)) != set(summary.arms):
        return "the recipe has other arms or profiles"
    for arm, result in summary.arms.items():
        if setting(recipe, summary.profile, arm) != result.setting:
            return f"arm {arm}: its settings, budget or data changed"
    for arm, result in summary.arms.items():
        tolerance = recipe.method(summary.profile, arm).trial_tolerance
        if not agree(fingerprint(recipe, summary.profile, arm), result.fingerprint, tolerance):
            return f"arm {arm}: its behaviour changed"
    return ""


def setting(recipe, profile: str, arm: str, number: int = 0) -> str:
    """Hash of what an arm's replicate is asked to do and on which data, without running anything."""
    from medcook.runs import content_key

    method, task, budget, seed = recipe.run(profile, arm, number)
    return content_key(
        method=method.settings(),
        task=task.describe(),
        budget=vars(budget),
        seed=seed,
        data=[task.data.hash, task.data.split.hash],
    )


def fingerprint(recipe, profile: str, arm: str) -> dict[str, float]:
    """What the code does: the behaviour of the arm's method at a profile, its own score, metrics on fixed masks."""
    from medcook.fingerprints import behaviour, scored

    own = scored(recipe, profile, arm) if recipe.score else {}
    return behaviour(recipe.method(profile, arm)) | own | metrics_on_fixed_masks()


@cache
def metrics_on_fixed_masks() -> dict[str, float]:
    """Metrics of two shifted boxes, and of a missed one, to 1e-3: they move when a metric's definition does."""
    truth, pred = np.zeros((8, 12, 12), dtype=bool), np.zeros((8, 12, 12), dtype=bool)
    truth[2:6, 2:8, 3:9] = pred[3:7, 2:9, 5:10] = True
    spacing = (2.0, 1.0, 0.5)
    scores = {"overlap": metrics.score(pred, truth, spacing), "missed": metrics.score(pred & False, truth, spacing)}
    return {
        f"{name} {measure}": round(getattr(score, measure), 3)
        for name, score in scores.items()
        for measure in ("dice", "hd95", "assd")
    }


def scale_of(recipe, profile: str):
    """The recipe's scale at a profile; MedcookError naming the profiles it has."""
    if profile not in recipe.scales:
        raise MedcookError(f"{recipe.paper} has no {profile!r} profile.", f"It has: {', '.join(recipe.scales)}.")
    return recipe.scales[profile]


def _identity(recipe, profile: str, arm: str, number: int) -> Identity:
    return Identity(setting(recipe, profile, arm, number), fingerprint(recipe, profile, arm))


def _request(recipe, profile: str, arm: str, number: int) -> str:
    """Hash of the identity: a record with the same request need not be made again."""
    from medcook.runs import content_key

    return content_key(identity=_identity(recipe, profile, arm, number))


def _path(paper: str, profile: str, arm: str, number: int) -> Path:
    return folder(paper, profile) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', arm)}-{number}.json"


def _record(paper: str, profile: str, arm: str, number: int) -> Record | None:
    return records.read(Record, _path(paper, profile, arm, number))


def _is_current(recipe, profile: str, arm: str, number: int) -> bool:
    try:
        record = _record(recipe.paper, profile, arm, number)
    except MedcookError:
        return False
    return record is not None and record.request == _request(recipe, profile, arm, number)


def _run(recipe, profile: str, arm: str, number: int, progress: bool, deadline: float | None, devices: int = 1) -> None:
    """Train, score and record one arm's replicate, unless its record is current; Paused past the deadline."""
    from medcook import training

    if _is_current(recipe, profile, arm, number):
        return
    method, task, budget, seed = recipe.run(profile, arm, number)
    try:
        fitted = training.fit(method, task, budget, seed, progress=progress, deadline=deadline, devices=devices)
    except Paused as pause:
        raise Paused(pause.step, pause.steps, f"arm {arm}, replicate {number}") from None
    tables, reads = _score(fitted, task, f"{recipe.paper} {profile} {arm} {number}", recipe.score)
    record = Record(
        paper=recipe.paper,
        arm=arm,
        profile=profile,
        replicate=number,
        seed=seed,
        request=_request(recipe, profile, arm, number),
        key=fitted.key,
        task=task.describe(),
        method=method.settings(),
        budget=vars(budget),
        dataset=task.data.manifest.name,
        dataset_hash=task.data.hash,
        split_hash=task.data.split.hash,
        data=data_kind(task),
        rows=records.pack(tables["last"], recipe.metric, everything=recipe.score is not None),
        rows_selected=records.pack(tables["selected"], recipe.metric) if "selected" in tables else None,
        history=records.thin(fitted.history),
        cost=fitted.cost,
        environment=environment(),
        test_reads=reads,
        date=_today(),
    )
    records.save(record, _path(recipe.paper, profile, arm, number))


def _score(fitted, task, reason: str, score=None) -> tuple[dict[str, pd.DataFrame], dict | None]:
    """({checkpoint: table}, reads of the test set): on the patients that the task says it is evaluated on.

    A recipe's own score is of the last checkpoint alone.
    """
    predictors = {name: partial(fitted.predict, checkpoint=name) for name in fitted.weights}
    if score:
        predictors = {"last": fitted}
    same = "selected" in predictors and _same(fitted.weights["last"], fitted.weights["selected"])
    if same:  # the last look at the validation cases was the best
        del predictors["selected"]
    if task.evaluation == "test":
        tables = evaluation.evaluate_test_many(predictors, task.data, reason, score)
        reads = tables["last"].attrs["reads"]
    else:
        tables, reads = evaluation.evaluate_many(predictors, task.data, task.val_patients, score), None
    return tables | ({"selected": tables["last"]} if same else {}), reads


def _same(one: dict, other: dict) -> bool:
    return all(bool((one[name] == other[name]).all()) for name in one)


def data_kind(task) -> str:
    """`real`, `real-anatomy-simulated` or `simulated`: what the task says of itself, else what its manifest says."""
    declared = getattr(task, "data_kind", None)
    return declared or ("simulated" if task.data.manifest.simulated else "real")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
