"""The rules every notebook keeps; `problems` names each breach with its cell."""

import ast
import re

from nbformat import NotebookNode

from medcook.errors import MedcookError
from medcook.notebooks.chapters import tags
from medcook.notebooks.parameters import declared

CHECK = "nbval-check-output"
MECHANISM = "mechanism"
EXERCISE = "exercise"
MIN_CHECKS, MIN_MECHANISMS, MIN_EXERCISES = 5, 3, 3

SHELL = re.compile(r"^\s*(!|%%?(bash|sh|sx|system|script|pip|conda|mamba|cd)\b|pip install\b)", re.MULTILINE)
SHELL_CALLS = {"os.system", "os.popen", "subprocess.run", "subprocess.Popen", "subprocess.check_output"}
CWD_CALLS = {"os.getcwd", "os.chdir", "Path.cwd", "pathlib.Path.cwd"}
ABSOLUTE = re.compile(r"^(/[\w.]+(/|$)|~[/\\]|[A-Za-z]:[\\/])")
RELATIVE = re.compile(r"^\.\.?[/\\]")
SET = re.compile(r"(?<![\w:])\{('[^']*'|\"[^\"]*\"), [^:{}]*\}")
"""A printed set of texts; Python orders it anew in every process."""
CUT = re.compile(r"<t[dh][^>]*>([^<]{4,})\.\.\.</t[dh]>")
"""A cell of a table whose text pandas cut off."""
MAGIC = re.compile(r"^(\s*)%%?[A-Za-z].*$", re.MULTILINE)


def problems(notebook: NotebookNode, name: str) -> list[str]:
    """Breaches of the rules that can be seen in the source alone."""
    found = _parameters(notebook, name)
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code":
            found += [f"{name}: cell {number} {breach}" for breach in _code(cell.source)]
    found += _counts(notebook, name)
    return found + _exercises(notebook, name)


def output_problems(notebook: NotebookNode, name: str) -> list[str]:
    """What nbval cannot compare: a checked cell without a stored text, or one that prints a set. Stored errors. Tables
    whose text is cut off."""
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        outputs = cell.get("outputs", [])
        if CHECK in tags(cell) and not any(map(_has_text, outputs)):
            found.append(f"{name}: cell {number} is tagged {CHECK} and has no stored text output")
        if CHECK in tags(cell) and any(SET.search(_text(output)) for output in outputs):
            found.append(f"{name}: cell {number} prints a set, whose order changes from run to run: print it sorted")
        if any(output.output_type == "error" for output in outputs):
            found.append(f"{name}: cell {number} has a stored error")
        for text in CUT.findall(" ".join(output.get("data", {}).get("text/html", "") for output in outputs))[:1]:
            remedy = 'say pd.set_option("display.max_colwidth", None) first'
            found.append(f"{name}: cell {number} has a table that cuts off {text!r}: {remedy}")
    return found


def _has_text(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout" and bool(output.text.strip())
    return "text/plain" in output.get("data", {}) and "image/png" not in output.data


def _text(output: NotebookNode) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def _parameters(notebook: NotebookNode, name: str) -> list[str]:
    try:
        known = declared(notebook, name)
    except MedcookError as error:
        return [error.problem]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    found = [] if "parameters" in tags(first) else [f"{name}: the parameters cell is not the first code cell"]
    if "PROFILE" not in known or known["PROFILE"] is not None:
        found.append(f"{name}: the parameters cell lacks PROFILE = None")
    return found


def _counts(notebook: NotebookNode, name: str) -> list[str]:
    checked = [cell for cell in notebook.cells if CHECK in tags(cell)]
    found = []
    if len(checked) < MIN_CHECKS:
        found.append(f"{name}: {len(checked)} cells tagged {CHECK}, at least {MIN_CHECKS} needed")
    mechanisms = sum(MECHANISM in tags(cell) for cell in checked)
    if mechanisms < MIN_MECHANISMS:
        found.append(f"{name}: {mechanisms} checked cells tagged {MECHANISM}, at least {MIN_MECHANISMS} needed")
    exercises = sum(EXERCISE in tags(cell) for cell in notebook.cells)
    if exercises < MIN_EXERCISES:
        found.append(f"{name}: {exercises} exercises, at least {MIN_EXERCISES} needed")
    return found


def _exercises(notebook: NotebookNode, name: str) -> list[str]:
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if EXERCISE not in tags(cell):
            continue
        names = [tag for tag in tags(cell) if tag.startswith(f"{EXERCISE}-")]
        if len(names) != 1:
            found.append(f"{name}: an exercise cell needs one tag {EXERCISE}-NAME and has {names}")
        if following is None or "check(" not in following.source:
            found.append(f"{name}: no check follows the exercise {names}")
    return found


def _code(source: str) -> list[str]:
    """Breaches in one code cell."""
    if SHELL.search(source):
        return ["runs a shell or pip line"]
    try:
        tree = ast.parse(MAGIC.sub(r"\1pass", source))
    except SyntaxError as error:
        return [f"is not valid Python ({error.msg})"]
    found = []
    inside_fstring = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (call := ast.unparse(node.func)) in SHELL_CALLS | CWD_CALLS:
            found.append(f"calls {call}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside_fstring:
            if ABSOLUTE.match(node.value):
                found.append(f"holds the absolute path {node.value!r}")
            elif RELATIVE.match(node.value):
                found.append(f"holds {node.value!r}, which depends on the working directory")
    return found
