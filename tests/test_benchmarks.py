"""What a benchmark of some parts alone leaves of the others."""

import json

import pytest

from benchmarks import run


def record(chapter: str, minutes: float, profile: str = "quick") -> dict:
    return {"chapter": chapter, "profile": profile, "minutes": minutes, "peak_mb": 700}


def test_a_new_record_takes_the_place_of_the_old_one():
    kept = [record("01_a", 1.0), record("02_b", 2.0), record("01_a", 9.0, "full")]
    found = run.merged(kept, [record("02_b", 0.5), record("03_c", 3.0)])
    assert [(one["chapter"], one["minutes"]) for one in found] == [("01_a", 1), ("02_b", 0.5), ("03_c", 3), ("01_a", 9)]


def test_parts_that_are_not_asked_for_are_kept(tmp_path, monkeypatch):
    before = json.loads((run.HERE / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "results.json").write_text(json.dumps(before))
    reports = []
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "put", lambda text, *marks: reports.append(text))
    monkeypatch.setattr(run, "chapters", lambda: [record("99_new", 0.25)])
    run.main(["chapters"])
    after = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert after["chapters"] == run.merged(before["chapters"], [record("99_new", 0.25)])
    assert {**after, "chapters": None} == {**before, "chapters": None}
    assert "99_new" in reports[0]


def test_an_unknown_part_is_named():
    with pytest.raises(SystemExit, match="no part 'chapter'.*chapters"):
        run.main(["chapter"])
