"""Source and generated notebook: agreement, stable ids, whole files, and copies to work in."""

import nbformat
import pytest

from medcook import paths
from medcook.errors import MedcookError
from medcook.notebooks import chapters
from medcook.notebooks.chapters import all_chapters, differences, find_chapters, generate, work_copy, write_notebook


def generated(chapter):
    write_notebook(generate(chapter), chapter.pair)
    return nbformat.read(chapter.pair, as_version=4)


def with_outputs(chapter):
    """Generate the pair and give every code cell an output, as execution would."""
    notebook = generated(chapter)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
    write_notebook(notebook, chapter.pair)
    return notebook


def test_a_generated_pair_agrees_with_its_source(write_chapter):
    chapter = write_chapter("x = 1", ("y = 2", "mechanism"))
    assert differences(chapter) == ["01_tiny.ipynb does not exist"]
    generated(chapter)
    assert differences(chapter) == []


@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        (["x = 2", ("y = 2", "mechanism")], "cell 3 differs"),
        (["x = 1", "y = 2"], "cell 4 differs"),
        (["x = 1", ("y = 2", "mechanism"), "z = 3"], "has 4 cells, the source 5"),
    ],
)
def test_a_changed_source_is_found(write_chapter, after, complaint):
    generated(write_chapter("x = 1", ("y = 2", "mechanism")))
    assert any(complaint in difference for difference in differences(write_chapter(*after)))


def test_ids_are_the_same_every_time_and_stay_when_a_cell_is_inserted(write_chapter):
    before = generated(write_chapter("x = 1", "y = 2", "y = 2"))
    ids = [cell.id for cell in before.cells]
    assert len(set(ids)) == len(ids)
    assert [cell.id for cell in generate(write_chapter("x = 1", "y = 2", "y = 2")).cells] == ids
    after = [cell.id for cell in generated(write_chapter("x = 1", "new = 0", "y = 2", "y = 2")).cells]
    assert [*after[:3], *after[4:]] == ids


def test_a_changed_cell_loses_its_output_and_the_others_keep_theirs(write_chapter):
    with_outputs(write_chapter("x = 1", "y = 2"))
    cells = generated(write_chapter("x = 10000", "y = 2")).cells
    assert [bool(cell.get("outputs")) for cell in cells[2:]] == [False, True]


def test_a_kill_while_writing_leaves_the_old_file(write_chapter, monkeypatch):
    chapter = write_chapter("x = 1")
    generated(chapter)
    kept = chapter.pair.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chapters.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_notebook(generate(write_chapter("x = 2")), chapter.pair)
    assert chapter.pair.read_bytes() == kept
    assert {path.name for path in chapter.pair.parent.iterdir()} == {chapter.source.name, chapter.pair.name}


def test_a_source_without_kernelspec_is_refused(write_chapter):
    with pytest.raises(MedcookError, match="01_tiny.py has no kernelspec"):
        write_chapter("x = 1", header="").read()


def test_chapters_are_found_by_number_and_by_name(write_chapter):
    chapter = write_chapter("x = 1")
    (paths.NOTEBOOKS / "helper.py").write_text("")
    assert all_chapters() == [chapter]
    for name in ("1", "01", "01_tiny", "notebooks/01_tiny.ipynb"):
        assert find_chapters([name]) == [chapter]
    with pytest.raises(MedcookError, match="no chapter '7'. Chapters: 01_tiny"):
        find_chapters(["7"])


def test_a_work_copy_has_no_outputs_and_never_overwrites(write_chapter, tmp_path):
    chapter = write_chapter("x = 1")
    with_outputs(chapter)
    notebook, source = work_copy(chapter, tmp_path / "work")
    assert not any(cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)
    assert source.read_text() == chapter.source.read_text()
    notebook.write_text("the student's work")
    with pytest.raises(MedcookError, match="exists and was left as it is. Open it, or start a second copy"):
        work_copy(chapter, tmp_path / "work")
    assert notebook.read_text() == "the student's work"
    assert work_copy(chapter, tmp_path / "work", "again")[0].name == "again.ipynb"
