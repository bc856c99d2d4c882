"""What chapters show: the package's own source, and tables that say what the evidence says."""

import nbformat
import pandas as pd
import pytest

from medcook import teaching
from medcook.data.manifests import load_manifest
from medcook.errors import MedcookError
from medcook.methods import follow


def test_intervals_are_written_out_and_never_break():
    assert teaching.with_interval(0.5, 0.4, 0.61).replace("\u00a0", " ") == "0.500 [0.400, 0.610]"
    assert teaching.with_interval(0.5, 0.4, 0.61, sign=True).startswith("+0.500")
    assert " " not in teaching.with_interval(0.5, 0.4, 0.61)
    assert teaching.with_interval(None, None, None) == "–" and teaching.with_interval(0.5, None, None) == "0.500"


def test_shown_code_is_the_source_itself(monkeypatch):
    shown = []
    monkeypatch.setattr(teaching, "display", lambda code, raw: shown.append(code["text/plain"]))
    teaching.show_code(follow)
    assert "def follow" in shown[0] and "_foreach_lerp_" in shown[0]


def test_missing_evidence_says_how_to_make_it():
    with pytest.raises(MedcookError, match="medcook reproduce nobody --profile full"):
        teaching.need_summary("nobody")


@pytest.mark.parametrize("paper", ["leakage", "losses", "labels", "unet-acdc", "unet-hippocampus"])
def test_the_evidence_table_has_every_arm_of_the_committed_summary(paper):
    summary, table = teaching.need_summary(paper), teaching.evidence_table(paper)
    assert list(table.index) == list(summary.arms)
    first = table.iloc[0]
    assert first.iloc[0].startswith(f"{next(iter(summary.arms.values())).mean:.3f}")
    assert any(column.startswith("HD95") for column in table.columns)


def test_a_verdict_stands_beside_its_claim_only():
    table = teaching.verdict_table("losses", "unet-acdc")
    summary = teaching.need_summary("losses")
    assert table.loc[summary.claim, "verdict"] == summary.verdict
    assert table.loc["(also) both against dice", "verdict"] == ""


def test_the_test_table_reports_the_one_reading():
    table = teaching.test_table("unet-acdc", "labels")
    assert list(table.index) == ["acdc"], "labels has no vote"
    assert table.loc["acdc", "test patients"] == 20


def test_a_dataset_card_names_licence_and_citation():
    card = teaching.dataset_card("acdc")["acdc"]
    assert card["licence"] == load_manifest("acdc").licence and "Bernard" in card["citation"]
    assert "third-party" in card["access"]


def test_published_figures_stand_below_ours():
    table = teaching.published_table("unet-hippocampus")
    assert list(table["what"])[0] == "here: unet" and "0.892" in set(table["Dice"])


def test_published_figures_say_where_they_were_checked():
    table = teaching.literature("acdc-few-labels")
    assert table["checked in"].str.len().gt(5).all()
    assert list(table.loc["UA-MT", "Dice, 3 labelled"]) == ["46.0", "61.0"]  # tables disagree
    with pytest.raises(MedcookError, match="acdc-few-labels"):
        teaching.literature("elsewhere")


def test_evidence_that_is_not_there_is_said_and_no_error(monkeypatch, capsys):
    monkeypatch.setattr(teaching, "load_summary", lambda paper, profile=None: None)
    teaching.show_evidence("bcp")
    assert "bcp: not measured yet. Make it: medcook reproduce bcp" in capsys.readouterr().out
    assert teaching.measured("04_semi_supervised") == []


def test_evidence_is_shown_as_figure_table_and_verdict(monkeypatch):
    shown = []
    monkeypatch.setattr(teaching, "display", shown.append)
    teaching.show_evidence("bcp", table=True)
    assert len(shown) == 3 and "verdict" in shown[2].columns
    assert "bcp" in teaching.measured("04_semi_supervised")


def test_a_notebook_is_outdated_where_a_difference_is_another_now(monkeypatch):
    now = {"a": ["x − y: +0.1\u00a0[+0.0, +0.2]", "x − z: +0.0"], "b": ["x < y: +0.3"]}
    monkeypatch.setattr(teaching, "measured", lambda chapter: list(now))
    monkeypatch.setattr(teaching, "verdict_table", lambda paper: pd.DataFrame({"measured": now[paper]}))
    notebook, page = nbformat.v4.new_notebook(), pd.DataFrame({"measured": sum(now.values(), [])}).to_html()
    assert teaching.outdated("01", notebook) == ["a", "b"]
    output = nbformat.v4.new_output("display_data", {"text/html": page})
    notebook.cells = [nbformat.v4.new_code_cell("show()", outputs=[output])]
    assert teaching.outdated("01", notebook) == []
    now["a"][0] = "x − y: +0.1\u00a0[+0.1, +0.2]"
    assert teaching.outdated("01", notebook) == ["a"]
