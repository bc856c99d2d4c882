"""The test set, read once: the models of a finished cross-validation vote on the test patients."""

from datetime import UTC, datetime

import pandas as pd
import torch

from medcook import evaluation, records, statistics
from medcook.data import Case
from medcook.evidence import folder
from medcook.records import Strict
from medcook.training import Fitted, fit


class TestReading(Strict):
    """What the ensemble of a recipe's runs scored on the test patients.

    keys    content keys of the runs: the test set is opened again only when these change
    rows    the evaluation table, packed; `mean`, `low`, `high` in units of `metric`, interval over patients
    single  the mean of each member alone, from the same reading
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    paper: str
    profile: str
    arm: str
    keys: list[str]
    dataset: str
    metric: str
    mean: float
    low: float
    high: float
    structures: dict[str, float]
    single: list[float]
    missed: int
    patients: int
    rows: dict
    reads: int
    reason: str
    date: str


def vote(members: list[Fitted]):
    """A predictor: the class with the highest mean probability over the members."""

    def predict(case: Case):
        return torch.stack([member.probabilities(case) for member in members]).mean(0).argmax(0).to(torch.uint8).numpy()

    return predict


def load_test_reading(paper: str, profile: str = "full") -> TestReading | None:
    """The committed reading of a recipe's test set, or None."""
    return records.read(TestReading, folder(paper, profile) / "test.json")


def read_test_once(recipe, profile: str = "full", arm: str | None = None) -> TestReading:
    """Score the vote of all runs of an arm on the test patients, unless these very runs were scored before."""
    arm = arm or next(iter(recipe.arms))
    members = [fit(*recipe.run(profile, arm, number)) for number in range(recipe.scales[profile].replicates)]
    keys = [member.key for member in members]
    known = load_test_reading(recipe.paper, profile)
    if known and known.keys == keys:
        return known
    predictors = {"vote": vote(members)} | {f"member {k}": member.predict for k, member in enumerate(members)}
    reason = f"{recipe.paper} {profile}: vote of {len(members)} finished runs"
    tables = evaluation.evaluate_test_many(predictors, members[0].task.data, reason)
    reading = _reading(recipe, profile, arm, keys, members[0].task.dataset, tables, reason)
    records.save(reading, folder(recipe.paper, profile) / "test.json")
    return reading


def _reading(recipe, profile, arm, keys, dataset, tables: dict[str, pd.DataFrame], reason: str) -> TestReading:
    votes = tables.pop("vote")
    estimate = statistics.interval(votes, recipe.metric)
    return TestReading(
        paper=recipe.paper,
        profile=profile,
        arm=arm,
        keys=keys,
        dataset=dataset,
        metric=recipe.metric,
        mean=estimate.mean,
        low=estimate.low,
        high=estimate.high,
        structures=votes.groupby("structure")[recipe.metric].mean().to_dict(),
        single=[float(table[recipe.metric].mean()) for table in tables.values()],
        missed=int(votes["missed"].sum()),
        patients=votes["patient_id"].nunique(),
        rows=records.pack(votes, recipe.metric),
        reads=votes.attrs["reads"]["count"],
        reason=reason,
        date=datetime.now(UTC).date().isoformat(),
    )
