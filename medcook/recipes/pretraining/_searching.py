"""Classification and search by the nearest known images of an embedding that nobody tunes any more."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from medcook import evaluation, statistics
from medcook.data import Case
from medcook.image_pool import origin
from medcook.recipes.fairness.cxr_clip_fairness import WORDS, by_subgroup, captions, embedding, word
from medcook.sampling import once, trained

NEAREST, EVIDENCE = 15, 5
"""How many known images decide, a quarter of them at most, and how many a search shows."""
SENSITIVITY = 0.9
"""What the operating point is chosen for."""


class Gallery(NamedTuple):
    """Known images: unit vectors (N, D), who they are, and 1, 0 or (another domain's) NaN by the finding, (N,).

    threshold  the operating point
    """

    vectors: np.ndarray
    names: tuple[str, ...]
    findings: np.ndarray
    threshold: float


def voted(similarity: np.ndarray, findings: np.ndarray, nearest: int | None = None) -> np.ndarray:
    """(Q,) the share of the nearest known images (Q, N) that have the finding, 1 or 0 in `findings` (N,)."""
    nearest = nearest or min(NEAREST, max(1, len(findings) // 4))
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :nearest]
    return findings[order].mean(1)


def left_out(vectors: np.ndarray, findings: np.ndarray) -> np.ndarray:
    """(N,) the vote on each known image by the others."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return voted(similarity, findings)


def operating_point(scores: np.ndarray, findings: np.ndarray, sensitivity: float = SENSITIVITY) -> float:
    """The highest threshold at or above which at least that share of those with the finding score."""
    ill = np.sort(scores[findings == 1])[::-1]
    return float(ill[int(np.ceil(sensitivity * len(ill) - 1e-9)) - 1]) if len(ill) else 0.0


def gallery_of(fitted) -> Gallery:
    """The new hospital's training patients and the images of other domains; made when first asked for."""
    return once(fitted, "gallery", lambda: _gallery(fitted))


def _gallery(fitted) -> Gallery:
    trained(fitted)
    known = list(fitted.task.cases("reference"))
    names = [case.patient_id for case in known]
    vectors = np.stack([unit(fitted, case) for case in known])
    findings = np.array([fitted.task.is_positive(case.attributes) for case in known], dtype=float)
    threshold = operating_point(left_out(vectors, findings), findings)
    pool = fitted.task.samples("unlabelled")
    with torch.no_grad():
        others = torch.cat([fitted.method.embed(fitted.nets, part).float() for part in pool.images.split(32)]).numpy()
    domains = [fitted.task.domains[number] for number in origin(pool.groups).set.tolist()]
    blank = np.full(len(others), np.nan)
    return Gallery(np.concatenate([vectors, others]), (*names, *domains), np.concatenate([findings, blank]), threshold)


def unit(fitted, case: Case) -> np.ndarray:
    """(D,) the unit vector of a case; of a volume that of its slices' mean."""
    vector = embedding(fitted, case)
    return vector / np.linalg.norm(vector)


def search(fitted, case: Case, nearest: int = EVIDENCE) -> pd.DataFrame:
    """The known images of all domains that are nearest to a case: columns name, similarity, finding."""
    gallery = gallery_of(fitted)
    similarity = gallery.vectors @ unit(fitted, case)
    order = np.argsort(-similarity, kind="stable")[:nearest]
    columns = {"name": [gallery.names[k] for k in order], "similarity": similarity[order]}
    return pd.DataFrame(columns | {"finding": gallery.findings[order]})


def insight_rows(fitted, case: Case) -> list[dict]:
    """A case of the new hospital: `score` by the nearest known images, `outcome`, and

    called      whether the score reaches the operating point; `zero_shot`: the score by captions alone
    precision   share of the evidence that is of the same kind and has the same finding; `same_kind`: of the same kind
    group       the patient's words
    """
    gallery, images = gallery_of(fitted), fitted.task.preparation.images(case)
    own, outcome = ~np.isnan(gallery.findings), float(fitted.task.is_positive(case.attributes))
    score = voted((gallery.vectors[own] @ unit(fitted, case))[None], gallery.findings[own])[0]
    shown = search(fitted, case)["finding"]
    with torch.no_grad():
        said = fitted.method.predict(fitted.nets, images).flatten(2)[..., 0].mean(0)[: len(captions(fitted.task.said))]
    values = {
        "score": float(score),
        "outcome": outcome,
        "called": float(score >= gallery.threshold),
        "zero_shot": float(said[1::2].sum() / said.sum()),
        "precision": float((shown == outcome).mean()),
        "same_kind": float(shown.notna().mean()),
        "group": " ".join(filter(None, (word(attribute, case.attributes) for attribute in WORDS))),
    }
    return [evaluation.row(case, fitted.task.outcome, **values)]


def at_operating_point(frame: pd.DataFrame) -> dict[str, statistics.Estimate]:
    """Sensitivity and specificity where the score's threshold was chosen on known images."""
    ill, healthy = frame[frame["outcome"] == 1], frame[frame["outcome"] == 0].assign(called=lambda f: 1 - f["called"])
    return {"sensitivity": statistics.interval(ill, "called"), "specificity": statistics.interval(healthy, "called")}


def fairness(frame: pd.DataFrame) -> pd.DataFrame:
    """The AUC of women and men, young, middle-aged and older patients, with intervals."""
    return by_subgroup(frame.assign(finding_score=frame["score"], finding_outcome=frame["outcome"]))
