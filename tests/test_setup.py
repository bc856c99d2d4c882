"""pyproject.toml, constraints.txt, the two conda environments and the package's imports agree with each other."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

import pytest
import yaml
from packaging.requirements import Requirement

from medcook.paths import ROOT

CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
USED_AS_PROGRAMS = {"jupyterlab", "ipykernel", "ipympl", "nbval"}
USED_FOR_ITS_FILES = {"nilearn"}
"""The embedded template is read from nilearn's files without importing it."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None = None) -> set[str]:
    """Names of the core dependencies, or of an extra."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {canonical(re.match(r"[\w.-]+", text).group()) for text in listed}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in wanted), "every line pins one version, no local build"
    return {canonical(name): version for name, version in (line.split("==") for line in wanted)}


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def environment(path: str) -> dict[str, str]:
    """{PyPI name: version} of a conda environment file, its pip section included."""
    listed = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["dependencies"]
    pip = next(item["pip"] for item in listed if isinstance(item, dict))
    conda = [item for item in listed if isinstance(item, str) and item != "pip" and not item.startswith("python>")]
    found = dict(item.split("=") for item in conda) | dict(item.split("==") for item in pip if item != "-e .")
    return {canonical(CONDA_NAMES.get(name, name)): version for name, version in found.items()}


def test_torch_is_the_agreed_version_of_any_build(pins):
    assert pins["torch"] == "2.13.0"


@pytest.mark.parametrize("extra", [None, "dev", "cluster", "browser", "book"])
def test_every_dependency_is_pinned(pins, extra):
    assert declared(extra) <= set(pins)


@pytest.mark.parametrize("extra", ["dev", "cluster", "browser", "book"])
def test_what_the_dependencies_depend_on_is_pinned(pins, extra):
    """Followed through what is installed, for this platform."""
    waiting, seen = declared() | declared(extra), set()
    if missing := {name for name in waiting if not is_installed(name)}:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    while waiting:
        name = waiting.pop()
        seen.add(name)
        needed = [Requirement(text) for text in requires(name) or []]
        wanted = {canonical(need.name) for need in needed if not need.marker or need.marker.evaluate({"extra": ""})}
        waiting |= wanted - seen
    gpu_libraries = {name for name in seen if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert seen - gpu_libraries - set(pins) == set(), "torch pins its GPU libraries itself"


def test_the_pinned_versions_are_the_tested_ones(pins):
    installed = {name: version(name).partition("+")[0] for name in declared() | declared("dev")}
    assert installed == {name: pins[name] for name in installed}


def test_conda_environment_agrees_with_the_pins(pins):
    wanted = declared() | declared("dev")
    assert environment("environment.yml") == {name: pins[name] for name in wanted}


def test_binder_environment_agrees_with_the_pins(pins):
    assert environment("binder/environment.yml") == {name: pins[name] for name in declared()}


def test_conda_environments_allow_the_same_python():
    wanted = f"python{PROJECT['requires-python']}"
    for path in ("environment.yml", "binder/environment.yml"):
        assert wanted in yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["dependencies"]


def imported() -> set[str]:
    """Distributions that the package and the chapters import, anywhere in their files."""
    names = set()
    for path in [*(ROOT / "medcook").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    known = packages_distributions()
    outside = names - set(sys.stdlib_module_names) - {"medcook"}
    return {canonical(known[name][0]) if name in known else name for name in outside}


def test_the_dependencies_are_what_the_package_imports():
    assert imported() | USED_AS_PROGRAMS | USED_FOR_ITS_FILES == declared()


def test_postbuild_and_ci_are_executable():
    for path in ("binder/postBuild", ".ci/run"):
        assert (ROOT / path).stat().st_mode & 0o111, path


def test_the_version_is_the_same_everywhere():
    from medcook import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
