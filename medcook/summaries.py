"""From records to a summary: means with intervals, comparisons, the verdict. Nothing here runs or reads anything."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from medcook import pooled, records, statistics
from medcook.records import ArmResult, Comparison, Record, Summary, tidy
from medcook.verdicts import Verdict, gains, judge

KINDS = ("real", "real-anatomy-simulated", "simulated")


class Identity(NamedTuple):
    """What an arm is: hash of its settings and data, and its behaviour fingerprint."""

    setting: str
    fingerprint: dict[str, float]


def build_summary(
    recipe, profile: str, runs: Mapping[str, list[Record]], identities: Mapping[str, Identity]
) -> Summary:
    """The summary of complete replicates: `runs` holds one record per replicate for every arm."""
    frames = {arm: _frame(found) for arm, found in runs.items()}
    comparison, ablation = (_compare(recipe, pair, frames, runs) for pair in (recipe.compare, recipe.ablation))
    everything = [run for found in runs.values() for run in found]
    first = everything[0]
    data = weakest_kind(run.data for run in everything)
    return Summary(
        paper=recipe.paper,
        title=recipe.title,
        claim=recipe.scales[profile].claim or recipe.claim,
        profile=profile,
        metric=recipe.metric,
        unit=frames[first.arm].unit.iloc[0] if recipe.metric in ("hd95", "assd") else "",
        expect=recipe.expect,
        margin=recipe.margin,
        published=recipe.published,
        source=recipe.source,
        dataset=first.dataset,
        dataset_hash=first.dataset_hash,
        split_hash=first.split_hash,
        data=data,
        replicate=recipe.replicate,
        seeds=[run.seed for run in runs[first.arm]],
        arms={arm: _arm(recipe.metric, frames[arm], found, identities[arm]) for arm, found in runs.items()},
        comparison=comparison,
        ablation=ablation,
        verdict=_verdict(recipe, profile, comparison, data),
        environment=first.environment,
        test_reads=sum(run.test_reads["count"] for run in everything if run.test_reads),
        date=max(run.date for run in everything),
    )


def weakest_kind(kinds) -> str:
    """The least real of several kinds of data."""
    return max(kinds, key=KINDS.index)


def _frame(runs: list[Record]) -> pd.DataFrame:
    return pd.concat([records.unpack(run.rows).assign(replicate=run.replicate) for run in runs], ignore_index=True)


def _arm(metric: str, frame: pd.DataFrame, runs: list[Record], identity: Identity) -> ArmResult:
    estimate = statistics.interval(frame, metric)
    selected = [records.unpack(run.rows_selected)[metric].mean() for run in runs if run.rows_selected]
    content = {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "missed": int(frame.missed.sum()),
        "false_alarms": int(frame.false_alarm.sum()),
        "rows": len(frame),
        "patients": estimate.n_patients,
        "structures": _of_structures(frame, metric),
        "selected": sum(selected) / len(selected) if selected else None,
        "cost": _mean_cost(runs),
        **identity._asdict(),
    }
    return ArmResult(**tidy(content))


def _of_structures(frame: pd.DataFrame, metric: str) -> dict[str, float]:
    """Without structures of which the metric is not defined, such as an AUC where all outcomes are the same."""
    found = {name: pooled.value(part, metric) for name, part in frame.groupby("structure", sort=False)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _mean_cost(runs: list[Record]) -> dict[str, float]:
    """Numeric costs, averaged over the runs."""
    return pd.DataFrame([run.cost for run in runs]).select_dtypes("number").mean().to_dict()


def _compare(recipe, pair: tuple[str, str] | None, frames, runs) -> Comparison | None:
    """a minus b; None where the recipe compares nothing or this profile does not run both arms."""
    if not pair or not set(pair) <= set(frames):
        return None
    a, b = pair
    found = statistics.difference(frames[a], frames[b], recipe.metric)
    name = recipe.cost
    cost_a, cost_b = (_mean_cost(runs[arm]).get(name) for arm in pair)
    content = {
        "a": a,
        "b": b,
        "effect": found.effect,
        "low": found.low,
        "high": found.high,
        "per_replicate": found.per_replicate,
        "p": found.p,
        "n_patients": found.n_patients,
        "n_replicates": found.n_replicates,
        "design": found.design,
        "smallest_effect": statistics.smallest_effect(found),
        "cost": name,
        "cost_ratio": cost_a / cost_b if cost_a and cost_b else None,
    }
    return Comparison(**tidy(content))


def _verdict(recipe, profile: str, comparison: Comparison | None, data: str) -> Verdict:
    if comparison is None:
        return "not judged"
    bounds = [math.nan if bound is None else bound for bound in (comparison.low, comparison.high)]
    low, high, per_replicate = gains(recipe.metric, *bounds, comparison.per_replicate)
    return judge(
        profile=profile,
        expect=recipe.expect,
        low=low,
        high=high,
        per_replicate=per_replicate,
        margin=recipe.margin,
        cost_ratio=comparison.cost_ratio,
        data=data,
    )
