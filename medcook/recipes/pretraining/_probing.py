"""A diagnosis from the features of networks that learnt to segment: the nearest known images, and a linear probe."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from medcook import pooled
from medcook.data import Case
from medcook.evaluation import score_case
from medcook.recipes.fairness.cxr_clip_fairness import embedding
from medcook.recipes.pretraining._searching import voted
from medcook.sampling import once, trained
from medcook.tasks import Task

STRENGTH = 0.1
"""C of the linear probe's logistic regression, on standardised features."""


@dataclass(frozen=True)
class StudyTask(Task):
    """Structures are drawn for few patients; of every training patient it is known whether `outcome` is `positive`."""

    outcome: str = "tuberculosis"
    positive: object = True

    def is_positive(self, case: Case) -> bool:
        return case.attributes[self.outcome] == self.positive


class Known(NamedTuple):
    """Training X-rays: vectors (N, D) of unit length, 1 or 0 by the outcome (N,), and the linear probe on vectors."""

    vectors: np.ndarray
    findings: np.ndarray
    probe: Pipeline


def known(fitted) -> Known:
    """All training patients with their outcome, drawn or not; made when first asked for."""
    return once(fitted, "known", lambda: _known(fitted))


def _known(fitted) -> Known:
    trained(fitted)
    cases = list(fitted.task.data.cases(fitted.task.data.split.train))
    vectors = np.stack([embedding(fitted, case) for case in cases]).astype(float)
    findings = np.array([fitted.task.is_positive(case) for case in cases], dtype=float)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(vectors, findings)
    return Known(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), findings, probe)


def study_rows(fitted, case: Case) -> list[dict]:
    """The usual measures of each structure, and of the patient, the same in each row:

    score, outcome  the linear probe's probability on the encoder's features, and whether the outcome is there
    knn             the share of the nearest training X-rays in which it is
    """
    there, rows = known(fitted), score_case(fitted.predict(case), case, fitted.task.structures)
    vector = embedding(fitted, case).astype(float)
    values = {
        "score": float(there.probe.predict_proba(vector[None])[0, 1]),
        "knn": float(voted((there.vectors @ vector)[None], there.findings)[0]),
        "outcome": float(fitted.task.is_positive(case)),
    }
    return [row | values for row in rows]


def diagnosis(frame: pd.DataFrame) -> dict[str, float]:
    """The AUC of an arm's table by linear probing and by the nearest X-rays."""
    one = frame[frame["structure"] == frame["structure"].iloc[0]]
    return {
        "linear probe": pooled.value(one, "auc"),
        "kNN": pooled.value(one.assign(score=one["knn"]), "auc"),
    }
