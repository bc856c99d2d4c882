"""Damaged files for every reader: `python tests/fuzz/damaged_files.py [--files 10000]`, or `make fuzz`.

Each file is a function of its kind and number. It is made and read in a child process with bounds on memory and time.
A reader must give an array or raise MedcookError; any other exception, a crash, a hang or a blow-up of memory is a
failure and is named by kind and number: `file("nifti", 17, folder)` makes that file again.
"""

import argparse
import gzip
import json
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
from PIL import Image

from medcook.data.readers.dicom import read_series
from medcook.data.readers.nifti import read_nifti
from medcook.data.readers.png import read_gray, read_labels
from medcook.data.readers.sparse_csv import read_sparse, read_voxel_size
from medcook.data.readers.stl import read_solid
from medcook.data.safe import read_hdf5_safely
from medcook.errors import MedcookError

SECONDS, MEGABYTES, BATCH = 20, 1024, 250
"""What one file may take, and how many a child reads."""
ODD = (0, 1, -1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x8000)
"""Numbers that declared sizes are replaced by."""


def nifti(path: Path, rng: np.random.Generator) -> None:
    kind = rng.choice(["uint8", "int16", "float32", "float64"])
    image = nibabel.Nifti1Image(
        rng.integers(0, 5, rng.integers(1, 9, 3)).astype(kind), np.diag([*rng.random(3) + 0.1, 1])
    )
    nibabel.save(image, path)


def hdf5(path: Path, rng: np.random.Generator) -> None:
    with h5py.File(path, "w") as out:
        image = rng.random(rng.integers(1, 9, 2))
        out.create_dataset("image", data=image, compression=rng.choice([None, "gzip"]))


def png(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 4, rng.integers(1, 9, 2), dtype=np.uint8)).save(path)


def dicom(path: Path, rng: np.random.Generator) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "98892001" / "CT5N"
    path.write_bytes(sorted(folder.iterdir())[0].read_bytes())


def csv(path: Path, rng: np.random.Generator) -> None:
    rows = (f"{index},{value:.3f}" for index, value in zip(rng.integers(0, 128**3, 20), rng.random(20), strict=True))
    path.write_text(",data\n" + "\n".join(rows) + "\n")


def sizes(path: Path, rng: np.random.Generator) -> None:
    path.write_text("\n".join(f"{value:.3f}" for value in rng.random(3)) + "\n")


def tetrahedron(rng: np.random.Generator) -> np.ndarray:
    """(4, 3, 3) float32: its triangles."""
    corners = rng.uniform(0, 9, (4, 3)).astype("<f4")
    return corners[[[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]]


def stl(path: Path, rng: np.random.Generator) -> None:
    triangles = b"".join(bytes(12) + triangle.tobytes() + bytes(2) for triangle in tetrahedron(rng))
    path.write_bytes(bytes(80) + struct.pack("<I", 4) + triangles)


def ascii_stl(path: Path, rng: np.random.Generator) -> None:
    facets = ("".join(f"vertex {x} {y} {z}\n" for x, y, z in triangle) for triangle in tetrahedron(rng))
    text = "".join(f"facet normal 0 0 0\nouter loop\n{corners}endloop\nendfacet\n" for corners in facets)
    path.write_text(f"solid\n{text}endsolid\n")


KINDS: dict[str, tuple[str, Callable, Callable]] = {
    "nifti": (".nii", nifti, read_nifti),
    "nifti.gz": (".nii.gz", nifti, read_nifti),
    "hdf5": (".h5", hdf5, lambda path: read_hdf5_safely(path, ("image",), seconds=SECONDS)),
    "png": (".png", png, read_gray),
    "png labels": (".png", png, read_labels),
    "dicom": (".dcm", dicom, lambda path: read_series(path.parent)),
    "csv": (".csv", csv, read_sparse),
    "voxel sizes": (".csv", sizes, read_voxel_size),
    "stl": (".stl", stl, read_solid),
    "stl in words": (".stl", ascii_stl, read_solid),
}
"""Name: how its files end, what makes a whole one, and its reader."""


def file(kind: str, number: int, folder: Path) -> Path:
    """The damaged file of a kind and number, alone in a new folder."""
    rng = np.random.default_rng([list(KINDS).index(kind), number])
    ending, make, _ = KINDS[kind]
    place = folder / f"{number}"
    place.mkdir()
    path = place / f"file{ending}"
    make(path, rng)
    content = path.read_bytes()
    if kind == "nifti.gz" and rng.random() < 0.7:  # damage within, or only gzip itself would ever be tested
        path.write_bytes(gzip.compress(damaged(gzip.decompress(content), rng), 1))
    elif kind.startswith("png") and rng.random() < 0.3:
        path.write_bytes(other_header(content, rng))
    else:
        path.write_bytes(damaged(content, rng))
    return path


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Content with one to three kinds of damage."""
    for _ in range(rng.integers(1, 4)):
        content = DAMAGE[rng.integers(len(DAMAGE))](content, rng)
    return content


def noise(content: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 2000)))


def truncated(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(0, len(content) + 1))]


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 20))):
        if changed:
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def resized(content: bytes, rng: np.random.Generator) -> bytes:
    """Some number in the first bytes becomes an odd one: a declared size, a type, an offset."""
    form = str(rng.choice([">", "<"])) + str(rng.choice(["H", "I"]))
    width = struct.calcsize(form)
    if len(content) < width + 1:
        return content
    at = int(rng.integers(0, min(len(content), 400) - width + 1))
    value = ODD[rng.integers(len(ODD))] & ((1 << 8 * width) - 1)
    return content[:at] + struct.pack(form, value) + content[at + width :]


def doubled(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(content) + 1))
    return content[:at] + content[: int(rng.integers(0, len(content) + 1))] + content[at:]


def words(content: bytes, rng: np.random.Generator) -> bytes:
    """What people and programs write where a number belongs."""
    odd = (b"nan", b"inf", b"-1", b"1e400", b"99999999999999999999", b"", b"\x00", b"abc", b"\n\n", b",,,,", b'"')
    at = int(rng.integers(0, len(content) + 1))
    return content[:at] + odd[rng.integers(len(odd))] + content[at + int(rng.integers(0, 8)) :]


DAMAGE = (noise, truncated, flipped, flipped, resized, resized, doubled, words)


def other_header(content: bytes, rng: np.random.Generator) -> bytes:
    """A PNG that declares another size, depth or colour, with the right checksum."""
    width, height = (int(rng.choice([0, 1, 7, 40_000, 2**31 - 1, 2**32 - 1])) for _ in range(2))
    depth, colour = int(rng.choice([1, 2, 4, 8, 16, 77])), int(rng.choice([0, 2, 3, 4, 6, 9]))
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def read(kind: str, number: int, folder: Path) -> str:
    """`read`, `refused`, or what went wrong."""
    path = file(kind, number, folder)
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        KINDS[kind][2](path)
        return "read"
    except MedcookError as error:
        named = str(path) in error.problem or str(path.parent) in error.problem
        return "refused" if named and "\n" not in error.problem else f"unclear: {error.problem}"
    except BaseException as error:  # whatever it is, it is a finding
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def _late(*_) -> None:
    raise TimeoutError(f"over {SECONDS} s")


def child(kind: str, first: int, last: int) -> None:
    """Read files first .. last - 1; a line of JSON for each, as soon as it is read."""
    import resource
    import warnings

    import psutil

    warnings.simplefilter("ignore")
    bound = psutil.Process().memory_info().vms + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            print(json.dumps([number, read(kind, number, Path(folder))]), flush=True)


def outcomes(kind: str, count: int) -> Iterator[tuple[int, str]]:
    """(number, outcome) of files 0 .. count - 1; a file that ends its child is named, and the next child goes on."""
    number = 0
    while number < count:
        last = min(count, number + BATCH)
        command = [sys.executable, __file__, "--child", kind, str(number), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BATCH * SECONDS)
        for line in done.stdout.splitlines():
            yield tuple(json.loads(line))
            number += 1
        if number < last:
            yield number, f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
            number += 1


def fuzz(counts: dict[str, int]) -> tuple[Counter, list[str]]:
    """How often each kind was read or refused, and every failure in a line."""
    tally, failures = Counter(), []
    for kind, count in counts.items():
        for number, outcome in outcomes(kind, count):
            fine = outcome in ("read", "refused")
            tally[kind, outcome if fine else "failed"] += 1
            if not fine:
                failures.append(f"{kind} {number}: {outcome}")
    return tally, failures


def shares(files: int) -> dict[str, int]:
    """So many files, evenly over the kinds; HDF5, for which every file starts a process, gets a tenth of a share."""
    even = files // (len(KINDS) - 1)
    counts = {kind: even // 10 if kind == "hdf5" else even for kind in KINDS}
    counts["nifti"] += files - sum(counts.values())
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--child", nargs=3)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), int(args.child[2]))
        return 0
    tally, failures = fuzz(shares(args.files))
    for (kind, outcome), count in sorted(tally.items()):
        print(f"{kind:12s} {outcome:8s} {count}")
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
