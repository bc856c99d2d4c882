"""Nothing that the book loads can run code: weights, arrays and settings are read as data."""

import ast
from pathlib import Path

import pytest

from medcook import paths

SAFE = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
}
REFUSED = {("yaml", "load"), ("yaml", "unsafe_load"), ("joblib", "load"), ("os", "system")}
ALLOWED = {"parallel.py": {("pickle", "loads")}}
"""A run's own processes hand each other what they computed."""


def calls(source: str):
    """((object, function), {keyword: constant}) of every call of the form `object.function(...)`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(function := node.func, ast.Attribute):
            continue
        if isinstance(function.value, ast.Name):
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield (function.value.id, function.attr), constants


def unsafe(source: str, name: str = "") -> list[str]:
    """Calls that could run what a file brings."""
    found = []
    for call, constants in calls(source):
        keyword, wanted = SAFE.get(call, (None, None))
        is_pickle = call[0] == "pickle" and call[1].startswith("load") and call not in ALLOWED.get(name, ())
        if (keyword and constants.get(keyword) is not wanted) or call in REFUSED or is_pickle:
            found.append(".".join(call))
    return found


@pytest.mark.parametrize("path", sorted((paths.ROOT / "medcook").rglob("*.py")), ids=lambda path: path.stem)
def test_files_are_read_as_data(path: Path):
    assert unsafe(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.parametrize(
    "line", ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "pickle.load(f)", "yaml.load(f)"]
)
def test_the_check_can_fail(line):
    assert unsafe(line)
    assert not unsafe("torch.load(p, weights_only=True); np.load(p, allow_pickle=False); yaml.safe_load(f)")
