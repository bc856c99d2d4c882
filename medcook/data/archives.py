"""Unpacking archives that others made: nothing is written outside the folder that was asked for."""

import tarfile
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from medcook.errors import MedcookError


def extract(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar(.gz) into `folder`; MedcookError, before anything is written, when a member would escape.

    Refused are absolute paths, `..`, drive letters, links and devices.
    """
    try:
        if zipfile.is_zipfile(archive):
            extract_zip(archive, folder)
        else:
            extract_tar(archive, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise MedcookError(f"{archive}: not a readable archive ({error}).", "Delete it and fetch it again.") from error


def extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
            refuse_unsafe(archive, member.filename, is_link)
        packed.extractall(folder)


def extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        members = packed.getmembers()
        for member in members:
            refuse_unsafe(archive, member.name, not (member.isfile() or member.isdir()))
        packed.extractall(folder, members=members, filter="data")


def refuse_unsafe(archive: Path, name: str, special: bool) -> None:
    """Raise MedcookError for a member that is a link or device, or whose name leads out of the folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    outside = posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in (*posix.parts, *windows.parts)
    if special or outside:
        what = "is a link or device" if special else "leads out of the folder"
        raise MedcookError(
            f"{archive}: its member {name!r} {what}; nothing was unpacked.", "Do not trust this archive."
        )
