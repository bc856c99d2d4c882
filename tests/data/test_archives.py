"""Archives whose members would escape are refused before anything is written."""

import io
import stat
import tarfile
import zipfile

import pytest

from medcook.data.archives import extract
from medcook.errors import MedcookError

ESCAPES = ["../evil", "a/../../evil", "/evil", "C:\\evil", "..\\evil"]


def tar_with(path, *members: tarfile.TarInfo):
    with tarfile.open(path, "w:gz") as packed:
        for member in members:
            packed.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def regular(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 1
    return member


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_good_archives_are_unpacked(tmp_path):
    extract(tar_with(tmp_path / "a.tar.gz", regular("in/file")), tmp_path / "tar")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("in/file", "x")
    extract(tmp_path / "a.zip", tmp_path / "zip")
    assert (tmp_path / "tar/in/file").read_text() == (tmp_path / "zip/in/file").read_text() == "x"


@pytest.mark.parametrize("name", ESCAPES)
def test_tar_members_that_escape(tmp_path, name):
    archive = tar_with(tmp_path / "a.tar.gz", regular("good"), regular(name))
    with pytest.raises(MedcookError, match="leads out of the folder"):
        extract(archive, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ESCAPES)
def test_zip_members_that_escape(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("good", "x")
        packed.writestr(name, "x")
    with pytest.raises(MedcookError, match="leads out of the folder"):
        extract(tmp_path / "a.zip", tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar(tmp_path, kind):
    archive = tar_with(tmp_path / "a.tar.gz", link("way-out", "/etc", kind))
    with pytest.raises(MedcookError, match="link or device"):
        extract(archive, tmp_path / "out")


def test_links_in_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        member = zipfile.ZipInfo("way-out")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(member, "/etc")
    with pytest.raises(MedcookError, match="link or device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


def test_damaged_archive_is_named(tmp_path):
    good = tar_with(tmp_path / "a.tar.gz", regular("in/file")).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(good[:40])
    with pytest.raises(MedcookError, match="cut.tar.gz: not a readable archive"):
        extract(tmp_path / "cut.tar.gz", tmp_path / "out")
