"""One page a paper: idea, claim, the mechanism's code, its components, evidence and verdict."""

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from medcook import coverage, evidence, paths, recipes
from medcook.book.markup import details, inline, mark, markdown, prose, python, table
from medcook.papers import Facts, Row, gather, requirements, status
from medcook.records import Comparison, Summary
from medcook.teaching import with_interval

SHOWN_LINES = 80
"""So much of the mechanism is shown at once; the rest is folded away."""


@dataclass(frozen=True)
class Page:
    """What a page is about: a paper of the ledger, or (without a row) one of the book's own claims."""

    paper: str
    row: Row | None = None

    @cached_property
    def facts(self) -> Facts:
        """Recipe, tests and evidence; freshness is not recomputed."""
        if self.row:
            return gather(self.row, check=False)
        tested = frozenset(coverage.component_tests(self.paper))
        return Facts(recipes.find_recipe(self.paper), tested, evidence.load_summary(self.paper), None)

    @property
    def source(self) -> Path | None:
        """The recipe's file."""
        module = recipes.recipe_modules().get(self.paper)
        return paths.ROOT / f"{module.replace('.', '/')}.py" if module else None

    @property
    def chapter(self) -> str:
        """The folder of the chapter, `04_semi_supervised`, or of the recipe where there is no row."""
        return self.row.chapter if self.row else self.source.parent.name

    def markdown(self, has_figure: bool) -> str:
        """The whole page; `has_figure` says that <paper>.png lies beside it."""
        parts = [self._head(), *self._idea(), *self._mechanism(), *self._components(), *self._evidence(has_figure)]
        return "---\norphan: true\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        title = self.row.title if self.row else self.facts.recipe.title
        kind = self.row.kind if self.row else "a claim of the book's own"
        where = [f"chapter {self.chapter.replace('_', ' ')}", kind, f"`{self.paper}`"]
        if self.row and self.row.code:
            where.append(f"[the authors' code](https://{self.row.code.removeprefix('https://')})")
        state = mark(status(self.row, self.facts)) if self.row else ""
        verdict = mark(self.facts.summary.verdict) if self.facts.summary else ""
        back = "[The ledger](../ledger.md) · " + " · ".join(where)
        return f"# {markdown(title)}\n\n{back}\n\n{state} {verdict}".rstrip()

    def _idea(self) -> list[str]:
        recipe = self.facts.recipe
        parts = [f"**Idea.** {markdown(self.row.idea)}\n\n**Claim.** {markdown(self.row.claim)}"] if self.row else []
        if recipe is None:
            return [*parts, _not_written(self.paper)]
        return [*parts, f"**Tested here.** {markdown(recipe.claim)}"]

    def _mechanism(self) -> list[str]:
        if self.source is None:
            return []
        source = self.source.read_text(encoding="utf-8")
        docstring, shown, rest, declared = split_source(source)
        name = self.source.relative_to(paths.ROOT)
        parts = ["## Mechanism", prose(docstring), f"From `{name}`, as it runs:"]
        parts += [python("\n\n\n".join(shown))] if shown else []
        parts += [details("The rest of its functions and classes", python("\n\n\n".join(rest)))] if rest else []
        return [*parts, details("What is compared, as code", python(declared))]

    def _components(self) -> list[str]:
        facts = self.facts
        if facts.recipe is None or not facts.recipe.components:
            return []
        rows = [
            [inline(part.name), mark(part.status), "yes" if part.name in facts.tested else "–", note(part.note)]
            for part in facts.recipe.components
        ]
        return ["## Components", table(["component", "here", "tested", "note"], rows)]

    def _evidence(self, has_figure: bool) -> list[str]:
        facts = self.facts
        if facts.recipe is None:
            return []
        parts = ["## Evidence"]
        if facts.summary is None:
            parts.append(f"Not measured yet. `medcook reproduce {self.paper} --profile full` does it.")
        else:
            parts += [self._figure()] if has_figure else []
            parts += evidence_parts(facts.summary)
        return [*parts, self._asked()]

    def _figure(self) -> str:
        summary = self.facts.summary
        what = f"Evidence of {self.paper} at {summary.profile}: {summary.metric.replace('_', ' ')} of every arm"
        return f"![{markdown(what)}]({self.paper}.png)"

    def _asked(self) -> str:
        if not self.row:
            return ""
        met = requirements(self.row, self.facts)
        lines = [f"- {'yes' if there else '**no**'}: {markdown(name)}" for name, there in met.items()]
        return "**What *works* asks for.**\n\n" + "\n".join(lines)


def note(text: str) -> str:
    """A cell that is wide enough to be read."""
    return f'<td class="note">{inline(text)}</td>'


def _not_written(paper: str) -> str:
    return (
        ":::{note}\nNot written yet: there is no recipe for this paper. [Contributing](../contributing.md) says in one "
        f"page how to add one; `medcook papers new {paper}` begins it.\n:::"
    )


def split_source(source: str) -> tuple[str, list[str], list[str], str]:
    """(docstring, definitions that are shown, those folded away, the `recipe = ...` statement) of a recipe's file."""
    tree, lines = ast.parse(source), source.splitlines()

    def text(node: ast.stmt) -> str:
        first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
        return "\n".join(lines[first - 1 : node.end_lineno])

    definitions = [text(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    declared = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "recipe"]
    shown, rest, count = [], [], 0
    for definition in definitions:
        count += definition.count("\n") + 1
        (shown if count <= SHOWN_LINES or not shown else rest).append(definition)
    return ast.get_docstring(tree) or "", shown, rest, text(declared[-1]) if declared else ""


def evidence_parts(summary: Summary) -> list[str]:
    """Verdict, arms, comparisons, published figures and provenance of a summary."""
    rows = [_arm(name, arm) for name, arm in summary.arms.items()]
    unit = f" ({summary.unit})" if summary.unit else ""
    head = [
        "arm",
        f"{summary.metric.replace('_', ' ')}{unit}",
        "val-selected",
        "missed",
        "patients",
        "steps",
        "s a run",
    ]
    parts = [
        f"At `{summary.profile}`: {mark(summary.verdict)} *{markdown(summary.claim)}*",
        table(head, rows),
    ]
    compared = {"Compared": summary.comparison, "Ablation": summary.ablation}
    lines = [f"- {name}: {_difference(part, summary.metric)}" for name, part in compared.items() if part]
    seen = summary.comparison.smallest_effect if summary.comparison else None
    if summary.verdict == "inconclusive here" and seen is not None:
        lines.append(f"- The smallest effect that this run could have seen: {seen:.3f}")
    lines += [
        f"- Published: {markdown(setting)}: {value}" + (f" ({markdown(summary.source)})" if summary.source else "")
        for setting, value in summary.published.items()
    ]
    lines.append(
        f"- Data: {markdown(summary.dataset)} ({summary.data}), `{summary.dataset_hash}`; "
        f"split `{summary.split_hash}`; readings of the test set: {summary.test_reads}"
    )
    lines.append(f"- Made on {summary.date}: {markdown(_environment(summary))}")
    lines.append(f"- Again: `medcook reproduce {summary.paper} --profile {summary.profile}`")
    return [*parts, "\n".join(lines)]


def _arm(name: str, arm) -> list[str]:
    cost = [arm.cost.get(key) for key in ("steps", "seconds")]
    return [
        inline(name),
        inline(with_interval(arm.mean, arm.low, arm.high)),
        "–" if arm.selected is None else f"{arm.selected:.3f}",
        f"{arm.missed} of {arm.rows}",
        str(arm.patients),
        *("–" if value is None else f"{value:.0f}" for value in cost),
    ]


def _difference(part: Comparison, metric: str) -> str:
    effect = with_interval(part.effect, part.low, part.high, sign=True)
    runs = ", ".join(f"{value:+.3f}" for value in part.per_replicate)
    p = "" if part.p is None else f", p = {part.p:.3g}"
    names = markdown(f"{part.a} − {part.b}: {metric.replace('_', ' ')}")
    return f"{names} {markdown(effect)} (95%){p}; {part.n_patients} patients; replicates: {runs}"


def _environment(summary: Summary) -> str:
    return ", ".join(f"{name} {value}" for name, value in summary.environment.items() if value is not None)
