"""The run cache: keys by content, writes that are whole or absent, damage that is noticed."""

import json

import pytest
import torch

from medcook.runs import RunFolder, content_key, load_tensors, save_tensors, write_atomically

RECORD, WEIGHTS = {"history": {"loss": [1.0]}}, {"last": {"weight": torch.arange(2000.0)}}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    run = RunFolder("abc")
    run.path.mkdir(parents=True)
    return run


def test_a_key_is_its_content():
    key = content_key(method={"rate": 0.1, "loss": "dice"}, seed=0)
    assert key == content_key(seed=0, method={"loss": "dice", "rate": 0.1}) and len(key) == 16
    assert key != content_key(method={"rate": 0.1, "loss": "dice"}, seed=1)
    assert key != content_key(method={"rate": 0.1000001, "loss": "dice"}, seed=0)


def test_a_finished_run_is_read_back(folder):
    assert folder.finished() is None
    folder.save_checkpoint({"step": 3})
    assert folder.checkpoint() == {"step": 3} and folder.finished() is None
    folder.finish(RECORD, WEIGHTS)
    record, weights = folder.finished()
    assert record == RECORD and torch.equal(weights["last"]["weight"], WEIGHTS["last"]["weight"])
    assert folder.checkpoint() is None


@pytest.mark.parametrize("name", ["run.json", "weights.pt"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"rubbish" * 50, lambda b: bytes(len(b))],
    ids=["empty", "cut short", "rubbish", "zeros"],
)
def test_a_damaged_run_is_not_finished(folder, name, damage):
    folder.finish(RECORD, WEIGHTS)
    path = folder.path / name
    path.write_bytes(damage(path.read_bytes()))
    assert folder.finished() is None


@pytest.mark.parametrize("content", [b"", b"rubbish" * 50, b"PK\x03\x04 cut short"])
def test_a_damaged_checkpoint_starts_again(folder, content):
    (folder.path / "checkpoint.pt").write_bytes(content)
    assert folder.checkpoint() is None


def test_killed_between_weights_and_record_is_not_finished(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medcook.runs.write_atomically", killed)
    folder.save_checkpoint({"step": 3})
    with pytest.raises(KeyboardInterrupt):
        folder.finish(RECORD, WEIGHTS)
    assert folder.finished() is None and folder.checkpoint() == {"step": 3}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_tensors({"step": 1}, path)

    def full_disk(content, partial):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        save_tensors({"step": 2}, path)
    assert load_tensors(path) == {"step": 1}


def test_text_is_replaced_in_one_move(tmp_path):
    path = tmp_path / "new" / "run.json"
    write_atomically(path, "old")
    write_atomically(path, json.dumps({"a": 1}))
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_nothing_in_a_weights_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"trap": Trap()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a readable file of tensors"):
        load_tensors(tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_run_can_be_removed(folder):
    folder.finish(RECORD, WEIGHTS)
    folder.remove()
    assert folder.finished() is None and not folder.path.exists()
