"""Fetching from a server on 127.0.0.1: resuming, checksums, urls in turn, two processes, full disk, no network."""

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medcook.data import fetch as fetching
from medcook.data.fetch import data_dir, fetch, fetch_archive, file, local
from medcook.data.manifests import Archive
from medcook.errors import MedcookError

CONTENT = np.random.default_rng(0).bytes(300_000)
DEAD = "http://127.0.0.1:9/gone"  # nothing listens on the discard port


def test_fetch_gives_the_files_in_order_and_leaves_no_parts(server, register):
    server.files = {"/a": b"first", "/b": b"second"}
    register("set", {"x/a": (b"first", f"{server.url}/a"), "b": (b"second", f"{server.url}/b")})
    assert [path.read_bytes() for path in fetch("set", ["b", "x/a"], progress=False)] == [b"second", b"first"]
    assert sorted(p.name for p in data_dir("set").rglob("*") if p.is_file()) == ["a", "b"]
    fetch("set", progress=False)
    assert len(server.requests) == 2, "what is there is not fetched again"


def test_broken_connection_resumes_by_range(server, register):
    server.files, server.break_after = {"/a": CONTENT}, 100_000
    register("set", {"a": (CONTENT, f"{server.url}/a")})
    with pytest.raises(MedcookError, match="a of set"):
        file("set", "a")
    part = data_dir("set") / "a.part"
    kept = part.stat().st_size
    assert 0 < kept <= 100_000
    assert file("set", "a").read_bytes() == CONTENT
    assert server.requests[-1] == ("/a", f"bytes={kept}-")
    assert not part.exists()


def test_a_break_is_taken_up_again_without_being_asked(server, register, monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 2)
    server.files, server.break_after = {"/a": CONTENT}, 100_000
    register("set", {"a": (CONTENT, f"{server.url}/a")})
    assert file("set", "a").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_killed_half_way_then_resumed(server, register, place, tmp_path):
    """A process that is killed while downloading leaves a part, and the next run takes it up."""
    server.files = {"/a": CONTENT}
    register("set", {"a": (CONTENT, f"{server.url}/a")})
    script = f"""
import time
from pathlib import Path
from medcook.data import fetch, registry
registry.MANIFESTS = Path({str(place.parent)!r})
fetch.CHUNK = 1000
plain = fetch.download_bar
class Slow:
    def __enter__(self): return lambda count: time.sleep(0.02)
    def __exit__(self, *error): return False
fetch.download_bar = lambda *args: Slow()
fetch.fetch("set", progress=False)
"""
    child = subprocess.Popen([sys.executable, "-c", script], env=os.environ.copy(), cwd=Path(__file__).parents[2])
    part = data_dir("set") / "a.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= 8192)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = part.stat().st_size
    assert kept < len(CONTENT)
    assert file("set", "a").read_bytes() == CONTENT
    assert server.requests[-1] == ("/a", f"bytes={kept}-")


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_two_processes_fetch_each_file_once(server, register, place):
    files = {f"f{n}": CONTENT[n : n + 50_000] for n in range(8)}
    server.files = {f"/{name}": content for name, content in files.items()}
    register("set", {name: (content, f"{server.url}/{name}") for name, content in files.items()})
    script = (
        "from pathlib import Path; from medcook.data import fetch, registry;"
        f"registry.MANIFESTS = Path({str(place.parent)!r}); fetch.fetch('set', progress=False)"
    )
    root = Path(__file__).parents[2]
    children = [subprocess.Popen([sys.executable, "-c", script], cwd=root) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert sorted(path for path, _ in server.requests) == sorted(server.files)


def test_wrong_checksum_names_the_file_and_removes_only_it(server, register):
    server.files = {"/good": b"good", "/bad": b"tampered"}
    register("set", {"good": (b"good", f"{server.url}/good"), "bad": (b"original", f"{server.url}/bad")})
    with pytest.raises(MedcookError, match="bad of set: wrong sha256"):
        fetch("set", progress=False)
    fetch("set", ["good"], progress=False)
    assert [p.name for p in data_dir("set").iterdir()] == ["good"]


def test_the_first_failure_stops_the_others_and_keeps_their_parts(server, register, monkeypatch):
    """A file that is being received when another fails ends at its next packet; nothing of it is lost."""
    started = threading.Event()
    plain = fetching.receive

    def receive(url, part, size, advance):
        if url.endswith("/bad"):
            started.wait(10)
            return plain(url, part, size, advance)

        def slow(count):
            if count:
                started.set()
            time.sleep(0.02)
            advance(count)

        return plain(url, part, size, slow)

    monkeypatch.setattr(fetching, "receive", receive)
    monkeypatch.setattr(fetching, "CHUNK", 1000)
    server.files = {"/long": CONTENT, "/bad": b"tampered"}
    register("set", {"bad": (b"original", f"{server.url}/bad"), "long": (CONTENT, f"{server.url}/long")})
    with pytest.raises(MedcookError, match="bad of set: wrong sha256"):
        fetch("set", progress=False)
    assert 0 < (data_dir("set") / "long.part").stat().st_size < len(CONTENT)


def test_urls_are_tried_in_turn(server, register):
    server.files = {"/bad": b"tampered", "/a": b"content"}
    urls = f"{DEAD} {server.url}/missing|{server.url}/bad {server.url}/a"
    register("set", {"a": (b"content", urls)})
    assert file("set", "a").read_bytes() == b"content"


def test_missing_on_the_server_says_so(server, register):
    register("set", {"a": (b"content", f"{server.url}/missing")})
    with pytest.raises(MedcookError, match="could not be downloaded: 404"):
        file("set", "a")


def test_no_network_and_no_mirror_is_one_sentence(register):
    register("set", {"a": (b"content", DEAD)})
    with pytest.raises(MedcookError, match="no network and no mirror") as caught:
        file("set", "a")
    assert "a of set" in caught.value.problem and "MEDCOOK_MIRROR" in caught.value.hint


def test_full_disk_keeps_the_part_and_says_so(server, register, monkeypatch):
    server.files = {"/a": CONTENT}
    register("set", {"a": (CONTENT, f"{server.url}/a")})
    real_open = Path.open

    def open_on_a_full_disk(path, mode="r", *args, **kwargs):
        stream = real_open(path, mode, *args, **kwargs)
        return FullDisk(stream, room=150_000) if path.suffix == ".part" and "b" in mode and "r" not in mode else stream

    with monkeypatch.context() as full:
        full.setattr(Path, "open", open_on_a_full_disk)
        with pytest.raises(MedcookError, match="disk is full: cannot write .*a"):
            file("set", "a")
    kept = (data_dir("set") / "a.part").stat().st_size
    assert 0 < kept <= 150_000
    assert file("set", "a").read_bytes() == CONTENT
    assert server.requests[-1] == ("/a", f"bytes={kept}-")


class FullDisk:
    """A file on a disk with `room` bytes left."""

    def __init__(self, stream: io.BufferedIOBase, room: int):
        self.stream, self.room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, chunk: bytes) -> None:
        if len(chunk) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(chunk)
        self.stream.write(chunk)


def test_mirror_comes_first_and_is_used_in_place(register, tmp_path, monkeypatch):
    copy = tmp_path / "mirror" / "set" / "a"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"content")
    register("set", {"a": (b"content", DEAD)})
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path / "mirror"))
    assert file("set", "a") == copy
    assert not data_dir("set").exists()


def test_damaged_mirror_is_named_and_left_alone(register, tmp_path, monkeypatch):
    copy = tmp_path / "mirror" / "set" / "a"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"conTent")
    register("set", {"a": (b"content", DEAD)})
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(MedcookError, match="mirror/set/a: wrong sha256"):
        file("set", "a")
    assert copy.exists()


def test_damaged_cache_file_is_fetched_again(server, register):
    server.files = {"/a": b"content"}
    register("set", {"a": (b"content", f"{server.url}/a")})
    path = file("set", "a")
    path.write_bytes(b"spoiled")
    assert local("set", "a") is None
    assert file("set", "a").read_bytes() == b"content"


def test_a_file_the_registry_does_not_list_is_refused(register):
    register("set", {"a": (b"content", DEAD)})
    with pytest.raises(MedcookError, match="no file '../b'"):
        file("set", "../b")


def test_unreadable_registry_is_named(place):
    (place / "set.csv").write_text("path,sha256\na,b\n")
    with pytest.raises(MedcookError, match="set.csv: not a readable registry"):
        file("set", "a")


def test_archive_is_fetched_verified_and_unpacked_once(server, place):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("Task00_Tiny/dataset.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    server.files = {"/Task00_Tiny.tar": packed.getvalue()}
    checksum = hashlib.md5(packed.getvalue()).hexdigest()
    archive = Archive(url=f"{server.url}/Task00_Tiny.tar", algorithm="md5", checksum=checksum)
    for _ in range(2):
        folder = fetch_archive("msd/Task00_Tiny", archive, progress=False)
        assert (folder / "dataset.json").read_text() == "{}"
    assert len(server.requests) == 1
