"""Getting files: from the mirror, else the cache, else the network, and never unverified.

A file counts only when its checksum agrees with the registry. Downloads run in a few threads, resume where they
stopped (`.part` files) and are moved into place when complete; a lock keeps two processes from fetching a file twice.
"""

import contextlib
import errno
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from medcook.data.archives import extract
from medcook.data.manifests import Archive
from medcook.data.registry import Entry, registry_of
from medcook.errors import MedcookError
from medcook.paths import cache_dir, mirror_dir

THREADS = 6
TIMEOUT = (10, 30)  # seconds to connect, and between two packets
CHUNK = 1 << 16  # bytes
ATTEMPTS = 3  # per url; each resumes the last

Advance = Callable[[int], None]

_verified: set[tuple[Path, int, int, str]] = set()
_sessions = threading.local()


class WrongChecksum(Exception):
    """A download that is not the file it should be."""


class Stopped(Exception):
    """Another download failed or the user interrupted: this one ends too, and keeps its part."""


def data_dir(name: str) -> Path:
    """Where the files of the set `name` are kept, downloaded or put there by hand."""
    return cache_dir() / "data" / name


def checksum_of(path: Path, algorithm: str = "sha256") -> str:
    """Checksum of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def is_verified(path: Path, entry: Entry) -> bool:
    """Does the file carry the entry's checksum? Computed once per file, size and modification time."""
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns, entry.checksum)
    if key not in _verified and checksum_of(path, entry.algorithm) == entry.checksum:
        _verified.add(key)
    return key in _verified


def folders(name: str) -> list[Path]:
    """Where files of a set lie on this machine: in the mirror, if there is one, and in the cache."""
    mirror = mirror_dir()
    return [mirror / name, data_dir(name)] if mirror else [data_dir(name)]


def local(name: str, path: str) -> Path | None:
    """The verified file on this machine (mirror first, used in place; then the cache), or None.

    A mirror that disagrees with the registry is an error; a damaged file of the cache is fetched again.
    Sets without a registry are found by their path alone.
    """
    entry = entry_of(name, path)
    mirror = mirror_dir()
    if mirror and (found := mirror / name / path).is_file():
        if entry and not is_verified(found, entry):
            raise MedcookError(f"{found}: wrong {entry.algorithm}.", "Repair this file, or unset MEDCOOK_MIRROR.")
        return found
    cached = data_dir(name) / path
    if cached.is_file() and (entry is None or is_verified(cached, entry)):
        return cached
    return None


def entry_of(name: str, path: str) -> Entry | None:
    """The registry's entry for a file; None for a set without registry, MedcookError for a file it does not list."""
    registry = registry_of(name)
    if registry and path not in registry:
        raise MedcookError(f"{name} has no file {path!r}.", f"See data_manifests/registries/{name}.csv.")
    return registry.get(path)


def file(name: str, path: str) -> Path:
    """One file of a set, fetched on first use."""
    return local(name, path) or fetch(name, [path], progress=False)[0]


def fetch(name: str, paths: Iterable[str] | None = None, progress: bool = True) -> list[Path]:
    """Bring the given files of a set (default: all in its registry) onto this machine, verified, in the given order.

    Killed or failed half-way, the same call resumes. Raises MedcookError when a file cannot be had.
    """
    registry = registry_of(name)
    if not registry:
        raise MedcookError(f"{name} has no registry of files to fetch.", f"See `medcook data show {name}`.")
    wanted = list(registry if paths is None else paths)
    missing = [registry[path] for path in wanted if local(name, path) is None]
    if missing:
        with download_bar(name, sum(entry.bytes for entry in missing), progress) as advance:
            in_parallel(lambda entry, count: fetch_one(name, entry, count), missing, advance)
    return [local(name, path) for path in wanted]


def fetch_archive(name: str, archive: Archive, progress: bool = True) -> Path:
    """Download, verify and unpack a set that comes as one archive, whose top folder is the last part of `name`."""
    folder = data_dir(name)
    entry = Entry(Path(archive.url).name, archive.checksum, archive.bytes, (archive.url,), archive.algorithm)
    packed = cache_dir() / "archives" / entry.path
    with download_bar(name, archive.bytes, progress) as advance, writing(packed, entry):
        if not folder.exists():
            if not packed.exists():
                download(name, entry, packed, advance)
            unpacked = folder.with_name(f".{folder.name}.unpacking")
            shutil.rmtree(unpacked, ignore_errors=True)
            extract(packed, unpacked)
            folder.parent.mkdir(parents=True, exist_ok=True)
            (unpacked / folder.name).rename(folder)
            shutil.rmtree(unpacked)
            packed.unlink()
    return folder


def in_parallel(work: Callable[[Entry, Advance], None], entries: list[Entry], advance: Advance) -> None:
    """Run `work` on each entry in a few threads; the first failure, or Ctrl-C, stops all at their next packet."""
    stop = threading.Event()

    def advance_unless_stopped(count: int) -> None:
        if stop.is_set():
            raise Stopped
        advance(count)

    pool = ThreadPoolExecutor(THREADS)
    try:
        for _ in pool.map(lambda entry: work(entry, advance_unless_stopped), entries):
            pass
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def download_bar(name: str, total: int | None, show: bool) -> Iterator[Advance]:
    """A progress bar over `total` bytes, on stderr; yields the function that advances it."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(f"fetching {name}", total=total)
        yield lambda count: bar.advance(task, count)


def fetch_one(name: str, entry: Entry, advance: Advance) -> None:
    """Download one file into the cache, unless another process did so while we waited for its lock."""
    target = data_dir(name) / entry.path
    with writing(target, entry):
        if local(name, entry.path) is None:
            download(name, entry, target, advance)


@contextlib.contextmanager
def writing(target: Path, entry: Entry) -> Iterator[None]:
    """Hold the lock of a file that is to be written; a full or read-only disk becomes one clear sentence."""
    locks = cache_dir() / "locks"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{entry.checksum}.lock"):
            yield
    except requests.RequestException:  # an OSError too, but not one of the disk
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space and run the same command: it resumes, and nothing that was fetched is lost."
            raise MedcookError(f"The disk is full: cannot write {target}.", hint) from error
        hint = "Set MEDCOOK_CACHE to a folder you can write."
        raise MedcookError(f"{target}: {error.strerror or error}.", hint) from error


def download(name: str, entry: Entry, target: Path, advance: Advance) -> None:
    """Try each url in turn until one delivers the file with the right checksum, then move it into place."""
    part = target.with_name(target.name + ".part")
    problems: list[Exception] = []
    for url in entry.urls:
        try:
            receive_patiently(url, part, entry.bytes, advance)
            if checksum_of(part, entry.algorithm) != entry.checksum:
                part.unlink()
                raise WrongChecksum(f"wrong {entry.algorithm} from {url}")
            part.replace(target)
            return
        except (requests.RequestException, WrongChecksum) as error:
            problems.append(error)
    raise not_had(name, entry, problems)


def receive_patiently(url: str, part: Path, size: int | None, advance: Advance) -> None:
    """`receive`, taken up again where a connection broke, a few times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return receive(url, part, size, advance)
        except requests.HTTPError:
            raise
        except requests.RequestException:
            if attempt == ATTEMPTS:
                raise


def receive(url: str, part: Path, size: int | None, advance: Advance) -> None:
    """Append what is still missing of `url` to `part`, by HTTP Range where the server knows it."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have > size:
        part.unlink()
        have = 0
    if have == size:
        return advance(have)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session().get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is missing; the checksum will tell
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        advance(have if resumed else 0)
        with part.open("ab" if resumed else "wb") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                advance(len(chunk))


def session() -> requests.Session:
    """This thread's HTTP session: one connection serves many small files."""
    if not hasattr(_sessions, "session"):
        _sessions.session = requests.Session()
    return _sessions.session


def not_had(name: str, entry: Entry, problems: list[Exception]) -> MedcookError:
    """The one sentence that says why a file could not be had."""
    what = f"{entry.path} of {name}"
    if wrong := next((problem for problem in problems if isinstance(problem, WrongChecksum)), None):
        return MedcookError(f"{what}: {wrong}.", "That download was removed, all else is kept; try again later.")
    if all(isinstance(problem, (requests.ConnectionError, requests.Timeout)) for problem in problems):
        hint = "Connect, or set MEDCOOK_MIRROR to a folder with a copy; the embedded cohort needs neither."
        return MedcookError(f"{what} is not on this machine, and there is no network and no mirror.", hint)
    reason = next(problem for problem in reversed(problems) if isinstance(problem, requests.RequestException))
    return MedcookError(f"{what} could not be downloaded: {reason}.", "Try again; what is complete is kept.")
