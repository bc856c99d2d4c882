"""Manifests: what a data set is, who may use it, where it comes from and how it is checked."""

from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medcook.errors import MedcookError
from medcook.paths import MANIFESTS


class Strict(BaseModel):
    """A model that refuses unknown fields, so that a typo in a manifest is found at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Facts(Strict):
    """What loading checks: counts, label values, and classes that every case must contain."""

    patients: int | None = None
    cases: int | None = None
    label_values: list[int]
    foreground_in_every_case: bool = False


class Archive(Strict):
    """One packed file that holds a whole set: where it is, its size and its checksum as published."""

    url: str
    bytes: int | None = None
    algorithm: Literal["sha256", "md5"] = "sha256"
    checksum: str


class Manifest(Strict):
    """One YAML file in data_manifests/: `options` go to the reader; `registry` and `splits` are paths there."""

    name: str
    title: str
    modality: str
    dimensions: Literal[2, 3]
    classes: dict[int, str]
    licence: str
    terms: str
    citation: str
    source: str
    access: Literal["embedded", "open", "registered"]
    apply_at: str | None = None
    third_party_copy: str | None = None
    retrieved: date | None = None
    reader: str
    options: dict[str, str] = Field(default_factory=dict)
    registry: str | None = None
    archive: Archive | None = None
    splits: str | None = None
    simulated: bool = False
    facts: Facts
    notes: list[str] = Field(default_factory=list)

    @property
    def structures(self) -> dict[int, str]:
        """Classes without the background."""
        return {value: name for value, name in self.classes.items() if value != 0}


def load_manifest(name: str, folder: Path = MANIFESTS) -> Manifest:
    """The manifest called `name`; MedcookError when there is none or a field is wrong."""
    path = folder / f"{name}.yaml"
    if name not in manifest_names(folder):
        known = [other for other in manifest_names(folder) if other.startswith(f"{name}/")] or manifest_names(folder)
        raise MedcookError(f"There is no data set called {name!r}.", f"Known: {', '.join(known)}.")
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise MedcookError(f"{path.name}: {first_line(error)}.", "Correct the manifest's field.") from error


def first_line(error: Exception) -> str:
    """The first complaint of a pydantic or YAML error, on one line."""
    if isinstance(error, ValidationError):
        issue = error.errors()[0]
        return f"field {'.'.join(str(part) for part in issue['loc'])!r}: {issue['msg']}"
    return " ".join(str(error).split())


def manifest_names(folder: Path = MANIFESTS) -> list[str]:
    """Names of all manifests, sorted: the path below the folder, for example `acdc` or `msd/Task09_Spleen`."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
