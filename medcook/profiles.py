"""The three sizes of everything: quick (embedded data), full (real data, laptop), paper (published setting)."""

import os

from medcook.errors import MedcookError

PROFILES = ("quick", "full", "paper")


def resolve_profile(profile: str | None = None) -> str:
    """`profile` if given, else the environment's PROFILE, else `quick`."""
    chosen = profile or os.environ.get("PROFILE") or "quick"
    if chosen not in PROFILES:
        raise MedcookError(f"Unknown profile {chosen!r}.", f"Choose one of {', '.join(PROFILES)}.")
    return chosen
