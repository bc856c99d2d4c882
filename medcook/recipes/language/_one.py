"""Scores of recipes that compare how well one finding is told from the others."""

from medcook.data import Case
from medcook.recipes.language._findings import grounding_rows


def one_finding_rows(fitted, case: Case) -> list[dict]:
    """The row of `grounding_rows` of full descriptions of findings that are there, with what is wrongly found where a
    description fits nothing: `rejected_absent`, the share of those that were answered with an empty mask."""
    rows = {row["structure"]: row for row in grounding_rows(fitted, case)}
    return [rows["one"] | {"rejected_absent": rows["absent"]["rejected"]}] if "one" in rows else []
