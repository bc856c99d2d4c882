"""The ledger: its rows, the status rule on made-up facts, and the tests it finds in source files."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from medcook import cli, coverage, evidence, papers, paths, records
from medcook.data.manifests import load_manifest
from medcook.errors import MedcookError
from medcook.papers import Facts, Row, status
from medcook.records import ArmResult, Comparison, Summary

COMPARISON = Comparison(
    a="method",
    b="baseline",
    effect=0.02,
    low=0.01,
    high=0.03,
    per_replicate=[0.02, 0.01, 0.03],
    p=0.001,
    n_patients=20,
    n_replicates=3,
    design="crossed",
    smallest_effect=0.01,
    cost="seconds",
    cost_ratio=1.1,
)
ARM = ArmResult(
    mean=0.9,
    low=0.88,
    high=0.92,
    missed=0,
    false_alarms=0,
    rows=60,
    patients=20,
    structures={"heart": 0.9},
    selected=None,
    cost={"seconds": 45.0},
    setting="s",
    fingerprint={"loss": 1.0},
)
SUMMARY = Summary(
    paper="bcp",
    title="T",
    claim="C",
    profile="full",
    metric="dice",
    unit="",
    expect="superior",
    margin=0.0,
    published={"acdc, 7 patients": 0.888},
    source="table 2",
    dataset="acdc",
    dataset_hash="d",
    split_hash="s",
    data="real",
    replicate="seed",
    seeds=[0, 1, 2],
    arms={"method": ARM, "baseline": ARM},
    comparison=COMPARISON,
    ablation=COMPARISON,
    verdict="supported",
    environment={"python": "3.11"},
    test_reads=0,
    date="2026-01-01",
)


def row(kind="method", **options):
    values = {"id": "bcp", "title": "T", "kind": kind, "chapter": "04_semi_supervised", "idea": "I", "claim": "C"}
    return Row(**(values | options))


def recipe(methods=3, implemented=("copy-paste",)):
    def arm(number):
        return SimpleNamespace(method=SimpleNamespace(settings=lambda: {"number": number}), changes={})

    components = [SimpleNamespace(name=name, status="implemented") for name in implemented]
    components.append(SimpleNamespace(name="left out", status="absent"))
    return SimpleNamespace(arms={str(n): arm(n) for n in range(methods)}, components=components)


COMPLETE = Facts(recipe=recipe(), tested=frozenset({"copy-paste"}), summary=SUMMARY)


def altered(**changes):
    return replace(COMPLETE, summary=SUMMARY.model_copy(update=changes))


def test_the_ledger_holds_174_papers_of_known_kinds():
    rows = papers.load_ledger()
    assert len(rows) == 174 and len({row.id for row in rows}) == 174
    assert {part for row in rows for part in row.parts} <= papers.KINDS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- {id: a, title: T, kind: method, chapter: 01_x, idea: I, claim: C, clam: C}", "clam"),
        ("- {id: a, title: T, kind: metod, chapter: 01_x, idea: I, claim: C}", "metod"),
        ("- {id: a, title: T, kind: method, chapter: x, idea: I, claim: C}", "chapter"),
        ("- {id: a, title: T, kind: method, chapter: 01_x, idea: I}", "claim"),
        ("- just words", "row 1"),
        ("- [unclosed", "expected"),
        ("\n".join(["- {id: a, title: T, kind: method, chapter: 01_x, idea: I, claim: C}"] * 2), "twice"),
    ],
)
def test_a_mistake_in_the_ledger_is_named(tmp_path, text, named):
    path = tmp_path / "papers.yaml"
    path.write_text(text)
    with pytest.raises(MedcookError, match=named):
        papers.load_ledger(path)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (COMPLETE, "works"),
        (altered(profile="paper"), "works"),
        (altered(verdict="not supported"), "works"),
        (altered(profile="quick"), "partial"),
        (altered(data="simulated"), "partial"),
        (altered(seeds=[0, 1]), "partial"),
        (altered(ablation=None), "partial"),
        (altered(comparison=None), "partial"),
        (replace(COMPLETE, stale="arm method: its behaviour changed"), "partial"),
        (replace(COMPLETE, stale=None), "works"),
        (replace(COMPLETE, tested=frozenset()), "partial"),
        (replace(COMPLETE, recipe=recipe(implemented=("copy-paste", "teacher"))), "partial"),
        (replace(COMPLETE, recipe=recipe(implemented=())), "partial"),
        (replace(COMPLETE, summary=None), "partial"),
        (replace(COMPLETE, recipe=None, tested=frozenset()), "missing"),
        (Facts(), "missing"),
    ],
)
@pytest.mark.parametrize("kind", ["method", "architecture", "metric"])
def test_when_a_method_works(kind, facts, expected):
    assert status(row(kind), facts) == expected


def test_simulated_evidence_counts_only_where_the_row_says_why():
    excused = row(no_real_data="two annotators per slice are in no open set")
    assert status(excused, altered(data="simulated")) == "works"


@pytest.mark.parametrize("kind", ["study", "benchmark", "survey"])
def test_a_protocol_needs_three_methods_and_evidence_but_no_ablation(kind):
    assert status(row(kind), altered(ablation=None)) == "works"
    assert status(row(kind), replace(COMPLETE, recipe=recipe(methods=2))) == "partial"
    assert status(row(kind), replace(COMPLETE, summary=None)) == "partial"
    assert status(row(kind), Facts()) == "missing"


def test_arms_with_the_same_settings_are_one_method():
    same = SimpleNamespace(method=SimpleNamespace(settings=lambda: {}), changes={})
    begun = COMPLETE.recipe.components
    three = SimpleNamespace(arms={"a": same, "b": same, "c": same}, components=begun)
    assert status(row("study"), replace(COMPLETE, recipe=three)) == "partial"


@pytest.mark.parametrize(("change", "expected"), [("settings", "works"), ("labelled", "partial")])
def test_how_images_are_prepared_is_part_of_a_method_and_how_many_there_are_is_not(change, expected):
    method = SimpleNamespace(settings=lambda: {})
    arms = {name: SimpleNamespace(method=method, changes={change: name}) for name in "abc"}
    recipe = SimpleNamespace(arms=arms, components=COMPLETE.recipe.components)
    assert status(row("study"), replace(COMPLETE, recipe=recipe)) == expected


def test_a_dataset_needs_manifest_reader_fixture_and_facts():
    manifest = load_manifest("acdc")
    whole = Facts(manifests=(manifest,), fixtures=frozenset({"test_acdc_reads"}))
    unreadable = manifest.model_copy(update={"reader": "nobody"})
    factless = manifest.model_copy(
        update={"facts": manifest.facts.model_copy(update={"patients": None, "cases": None})}
    )
    assert status(row("dataset"), whole) == "works"
    assert status(row("dataset"), replace(whole, fixtures=frozenset())) == "partial"
    assert status(row("dataset"), replace(whole, manifests=(manifest, unreadable))) == "partial"
    assert status(row("dataset"), replace(whole, manifests=(factless,))) == "partial"
    assert status(row("dataset"), Facts()) == "missing"


def test_a_foundation_model_needs_architecture_and_checkpoint_tests():
    tested = frozenset({"copy-paste", "architecture", "checkpoint"})
    assert status(row("foundation-model"), replace(COMPLETE, tested=tested)) == "works"
    assert status(row("foundation-model"), COMPLETE) == "partial"


def test_a_composite_kind_needs_each_part():
    dataset = {"manifests": (load_manifest("acdc"),), "fixtures": frozenset({"test_acdc_reads"})}
    both = replace(COMPLETE, **dataset)
    assert status(row("dataset+method"), both) == "works"
    assert status(row("dataset+method"), COMPLETE) == "partial"
    assert status(row("dataset+benchmark"), Facts(**dataset)) == "partial"
    assert status(row("dataset+model"), Facts()) == "missing"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_component_tests_are_found_by_marker_and_mapping(tmp_path):
    marked = "import pytest\n@pytest.mark.component('mix')\ndef test_mix(): ...\n"
    marked += "@pytest.mark.component('teacher')\nclass TestTeacher:\n    def test_it(self): ...\n"
    marked += "@pytest.mark.component('untested')\ndef helper(): ...\n"
    mapped = "COMPONENTS = {'head': 'test_head', 'gone': 'test_gone', 'two': ['test_head', 'test_two']}\n"
    mapped += "def test_head(): ...\ndef test_two(): ...\n"
    write(tmp_path, "recipes/semi/test_study_2_5d.py", marked)
    write(tmp_path, "recipes/heads/test_head_paper.py", mapped)
    assert coverage.component_tests("study-2.5d", tmp_path) == {"mix", "teacher"}
    assert coverage.component_tests("head-paper", tmp_path) == {"head", "two"}
    assert coverage.component_tests("unknown", tmp_path) == set()


def test_fixture_tests_are_found_by_the_whole_id(tmp_path):
    text = "def test_msd_reads_all_tasks(): ...\ndef test_msdx_other(): ...\ndef helper_msd_x(): ...\n"
    write(tmp_path, "data/test_sets.py", text)
    assert coverage.fixture_tests("msd", tmp_path) == {"test_msd_reads_all_tasks"}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Evidence for one paper of the ledger, in a folder of its own."""
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    records.save(SUMMARY, evidence.folder("bcp", "full") / "summary.json")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_json_lists_every_paper_with_what_was_measured(measured):
    entries = {entry["id"]: entry for entry in json.loads(call("papers", "--json", "--no-check").stdout)}
    wanted = {"id", "chapter", "kind", "status", "verdict", "profile", "dataset", "data", "seeds", "effect"}
    assert len(entries) == 174 and all(wanted | {"interval", "stale"} <= set(entry) for entry in entries.values())
    assert entries["bcp"]["verdict"] == "supported" and entries["bcp"]["interval"] == [0.01, 0.03]
    assert entries["bcp"]["seeds"] == 3 and entries["bcp"]["p_holm"] == 0.001
    assert entries["umct"]["verdict"] is None and entries["umct"]["seeds"] == 0


def test_evidence_without_its_recipe_is_stale_and_unchecked_evidence_is_unknown():
    assert papers.stale_state(None, SUMMARY, check=True) == "its recipe is gone"
    assert papers.stale_state(recipe(), SUMMARY, check=False) is None
    assert papers.stale_state(recipe(), None, check=True) == ""


def test_evidence_that_cannot_be_checked_on_this_machine_is_unknown(monkeypatch):
    def offline(*_):
        raise MedcookError("The weights are not on this machine.")

    monkeypatch.setattr(evidence, "stale_because", offline)
    assert papers.stale_state(recipe(), SUMMARY, check=True) is None


def test_p_is_adjusted_over_all_papers_but_not_over_quick():
    entries = [{"p": 0.01, "profile": "full"}, {"p": 0.02, "profile": "full"}, {"p": 0.5, "profile": "quick"}]
    adjusted = papers.adjust([*entries, {"p": None, "profile": None}])
    assert [entry["p_holm"] for entry in adjusted] == [0.02, 0.02, None, None]


def test_the_table_names_every_paper_and_the_books_own_claims(measured):
    result = call("papers", "--no-check")
    assert result.exit_code == 0
    assert all(row.id in result.stdout for row in papers.load_ledger())
    assert "174 papers" in result.stdout and "own claims" in result.stdout and "leakage" in result.stdout


def test_show_says_what_is_missing_and_what_was_found(measured):
    text = call("papers", "show", "bcp", "--no-check").stdout
    assert "a test for every implemented component" in text and "verdict at full: supported" in text
    assert "0.888" in text and "table 2" in text


@pytest.mark.parametrize("command", [("papers", "show"), ("reproduce",)])
def test_an_unknown_paper_is_answered_with_the_nearest(command):
    result = call(*command, "leakge")
    assert result.exit_code == 1 and "leakage" in result.stderr and "Traceback" not in result.stderr


def test_reproduce_prints_table_verdict_and_environment(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "reproduce", lambda *what, **how: asked.append((what[1:], how)) or SUMMARY)
    result = call("reproduce", "leakage", "--profile", "full", "--replicates", "3", "--minutes", "50")
    assert result.exit_code == 0 and asked == [(("full", 3), {"minutes": 50, "devices": 1})]
    assert all(word in result.stdout for word in ("baseline", "verdict at full: supported", "python 3.11", "+0.0200"))


def test_a_profile_that_does_not_exist_is_one_line():
    result = call("reproduce", "leakage", "--profile", "fast")
    assert result.exit_code == 1 and "fast" in result.stderr


def test_fingerprints_are_recomputed_for_every_paper_asked_for(monkeypatch):
    class Here:
        """A pool of processes that is none."""

        def __init__(self, *_):
            self.map = map

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    asked = []
    monkeypatch.setattr(papers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(papers, "stale_state", lambda recipe, summary, check: asked.append((recipe.paper, check)))
    papers.recompute(["bcp", "salt"])
    assert asked == [("bcp", True), ("salt", True)]
