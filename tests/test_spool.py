"""Tensors in a file: read as they were written, mapped as one, private to who changes them."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medcook import spool
from medcook.errors import MedcookError
from medcook.spool import Spool

PARTS = [torch.arange(24.0).view(2, 3, 4), torch.ones(1, 3, 4), -torch.ones(5, 4, 3).transpose(1, 2)]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    filled = Spool()
    return SimpleNamespace(spool=filled, places=[filled.append(part) for part in PARTS], folder=tmp_path / "cache")


def test_each_is_read_as_it_was_written(written):
    for place, part in reversed(list(zip(written.places, PARTS, strict=True))):
        assert torch.equal(written.spool.read(place), part)


def test_all_are_mapped_as_one_and_more_can_follow(written):
    mapped = written.spool.mapped()
    assert mapped.dtype == torch.float32 and torch.equal(mapped, torch.cat(PARTS))
    written.spool.read(written.places[0])
    written.spool.append(PARTS[0])
    assert torch.equal(written.spool.mapped(), torch.cat([*PARTS, PARTS[0]]))


def test_what_is_changed_in_a_mapped_tensor_stays_there(written):
    first, second = written.spool.mapped(), written.spool.mapped()
    first[0] = 7
    assert (first[0] == 7).all() and torch.equal(second, torch.cat(PARTS))
    assert torch.equal(written.spool.read(written.places[0]), PARTS[0])


def test_a_mapped_tensor_outlives_its_spool_and_no_file_is_left(written):
    mapped = written.spool.mapped()
    written.spool = None
    assert torch.equal(mapped, torch.cat(PARTS)) and not list(written.folder.iterdir())


def test_other_types_are_kept(written):
    labels = Spool()
    place = labels.append(torch.tensor([[1, 255]], dtype=torch.uint8))
    assert labels.read(place).dtype == labels.mapped().dtype == torch.uint8
    assert np.array_equal(labels.mapped(), [[1, 255]])


@pytest.mark.parametrize("other", [torch.ones(1, 4, 3), torch.ones(1, 3, 4).double()], ids=["shape", "type"])
def test_what_would_not_fit_is_refused(written, other):
    with pytest.raises(ValueError, match="after"):
        written.spool.append(other)
    assert torch.equal(written.spool.mapped(), torch.cat(PARTS))


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "Permission denied")])
def test_a_disk_that_takes_nothing_is_named(written, monkeypatch, number, said):
    def refuse(*arguments, **options):
        raise OSError(number, "Permission denied")

    monkeypatch.setattr(spool, "TemporaryFile", refuse)
    with pytest.raises(MedcookError, match=said) as caught:
        Spool()
    assert str(written.folder) in str(caught.value) and caught.value.hint
