"""Which mechanisms and data sets have tests, read from the test files without running them."""

import ast
import re
from pathlib import Path

from medcook.paths import ROOT

TESTS = ROOT / "tests"
TEST = re.compile(r"^ *def (test_\w+)\(", re.MULTILINE)


def component_tests(paper: str, tests: Path = TESTS) -> set[str]:
    """Names of the components of a paper that a test is for.

    They stand in tests/recipes/<chapter>/test_<paper>.py, as `@pytest.mark.component("name")` on a test or a class
    of tests, or in a module-level `COMPONENTS = {"name": "test_function"}` (or a list of functions).
    """
    found: set[str] = set()
    for path in tests.glob(f"recipes/*/test_{as_identifier(paper)}.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= _marked(tree) | _mapped(tree)
    return found


def fixture_tests(dataset: str, tests: Path = TESTS) -> set[str]:
    """Names of the tests in tests/data/ whose name contains the data set's id."""
    wanted = as_identifier(dataset)
    texts = (path.read_text(encoding="utf-8") for path in tests.glob("data/**/test_*.py"))
    return {name for text in texts for name in TEST.findall(text) if f"_{wanted}_" in f"{name}_"}


def as_identifier(name: str) -> str:
    """An id as it stands in file and function names: `study-2.5d` is `study_2_5d`."""
    return name.replace("-", "_").replace(".", "_")


def _test_names(node: ast.AST) -> set[str]:
    return {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")}


def _marked(tree: ast.Module) -> set[str]:
    """Components named by markers on tests, or on classes that hold tests."""
    return {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and _test_names(node)
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.component"
        for argument in mark.args
        if isinstance(argument, ast.Constant)
    }


def _mapped(tree: ast.Module) -> set[str]:
    """Components of the COMPONENTS mapping whose tests are all there."""
    there = _test_names(tree)
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["COMPONENTS"]:
            named = {key: [value] if isinstance(value, str) else value for key, value in _literal(node.value).items()}
            return {component for component, tests in named.items() if tests and set(tests) <= there}
    return set()


def _literal(node: ast.AST) -> dict:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return {}
