"""The doctor's report on a machine."""

from medcook import doctor, precision


def test_the_report_has_what_the_readme_promises(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(precision, "time_step", lambda dtype: 0.1 if "bfloat16" in str(dtype) else 0.2)
    found = doctor.report()
    assert {"Python", "memory", "GPU", "PyTorch", "profile quick", "profile full", "profile paper"} <= set(found)
    assert found["a training step"] == "float32 200 ms, bfloat16 100 ms: use bfloat16"
    assert "does not exist" in found["data mirror"]


def test_expectations_grow_with_the_step():
    slow, fast = (doctor.expectations(doctor.REFERENCE_STEP_S * factor)["profile full"] for factor in (2, 1))
    assert slow == "about 40.0 minutes a chapter at most" and fast == "about 20.0 minutes a chapter at most"


def test_folder_bytes_counts_files_below(tmp_path):
    assert doctor.folder_bytes(tmp_path / "nowhere") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    assert doctor.folder_bytes(tmp_path) == 3
