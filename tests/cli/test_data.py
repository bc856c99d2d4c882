"""The data command: cards, checks, folders, and a sentence with exit status 1 when something is wrong."""

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from medcook.cli import data
from medcook.errors import MedcookError


@pytest.fixture
def run(monkeypatch):
    """run("show", "acdc") -> what was printed; problems are raised."""
    monkeypatch.setattr(data.console, "width", 200, raising=False)
    monkeypatch.setattr(data.console, "_width", 200, raising=False)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(data.app, list(arguments))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return call


def test_list_names_every_set(run):
    printed = run("list")
    for name in ("acdc", "chest_xray", "kits21", "msd/Task10_Colon", "openkbp"):
        assert name in printed


def test_card_shows_licence_citation_and_split(run):
    printed = run("show", "acdc")
    for text in ("CC BY-NC-SA 4.0", "Bernard", "train 70, val 10, test 20", "third-party copy", "creatis"):
        assert text in printed


def test_verify_embedded(run):
    assert "40 cases of 40 patients" in run("verify", "embedded")


def test_verify_counts_damaged_and_missing_files(run, register):
    from medcook.data import datasets, fetch

    register("openkbp", {"pt_1/ct.csv": (b"x", "http://127.0.0.1:9/a"), "pt_2/ct.csv": (b"y", "http://127.0.0.1:9/b")})
    good = fetch.data_dir("openkbp") / "pt_1/ct.csv"
    good.parent.mkdir(parents=True)
    good.write_bytes(b"x")
    assert datasets.open_dataset("openkbp").index() == {"pt_1": "pt_1", "pt_2": "pt_2"}
    with pytest.raises(MedcookError, match="openkbp: 1 problems"):
        run("verify", "openkbp")
    assert good.exists()


def test_fetch_says_what_cannot_be_fetched(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    assert "embedded: ready" in run("fetch", "embedded")
    with pytest.raises(MedcookError, match="kits21 is not on this machine"):
        run("fetch", "kits21")


def test_show_folder_lists_every_problem(run, tmp_path):
    for folder, array in [("images", np.ones((3, 3, 3), np.float32)), ("labels", np.zeros((3, 3, 3), np.uint8))]:
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / folder / "case.nii.gz")
    printed = run("show", str(tmp_path))
    assert "case: the image is constant" in printed and "case: the label is empty" in printed
    bad = np.full((3, 3, 3), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(bad, np.eye(4)), tmp_path / "images" / "case.nii.gz")
    with pytest.raises(MedcookError, match="1 cases cannot be trained on"):
        run("show", str(tmp_path))


def test_unknown_name(run):
    with pytest.raises(MedcookError, match="no data set called 'nothing'"):
        run("show", "nothing")
