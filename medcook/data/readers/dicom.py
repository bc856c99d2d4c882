"""A DICOM series: one folder of slices, sorted by their position in space. Names of patients are not even read."""

import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from medcook.data.readers.damage import readable
from medcook.data.readers.nifti import Volume
from medcook.errors import MedcookError

GEOMETRY = (
    "SeriesInstanceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "SpacingBetweenSlices",
)
PIXELS = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit")
VALUES = ("PixelRepresentation", "PixelData", "RescaleSlope", "RescaleIntercept", "NumberOfFrames", "SliceThickness")
TOLERANCE = 0.01  # of the slice distance, and of a direction's cosines
GAP = 1.5  # times the usual distance: a slice is missing
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_series(folder: Path) -> Volume:
    """One series as (slices, rows, columns) float32 in rescaled units (CT: Hounsfield), affine to RAS+ mm.

    Slices are sorted along the normal of their plane; their distance gives the spacing. MedcookError when there is no
    DICOM file, more than one series or orientation, a slice missing between others, or two in one place. A slice that
    is missing at either end cannot be noticed.
    """
    slices = read_slices(folder)
    with readable(folder, "DICOM series: geometry", "Export it again.", quoting=False):
        require_one_series(folder, slices)
        normal = normal_of(slices)
        slices = dict(sorted(slices.items(), key=lambda item: depth(item[1], normal)))
        affine = affine_of(next(iter(slices.values())), normal, slice_distance(folder, slices, normal))
    with readable(folder, "DICOM series: pixels", "Export them uncompressed.", quoting=False):
        return Volume(np.stack([rescaled(dataset) for dataset in slices.values()]), affine)


def read_slices(folder: Path) -> dict[Path, pydicom.Dataset]:
    """{file: dataset} of every DICOM image in the folder; only geometry and pixels are read."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may quote what stands in the file
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with readable(path, "DICOM file", "Export it again.", quoting=False), suppress(InvalidDicomError):
                dataset = pydicom.dcmread(path, specific_tags=[*GEOMETRY, *PIXELS, *VALUES])
                if "ImagePositionPatient" in dataset and "PixelData" in dataset:
                    found[path] = dataset
    if not found:
        raise MedcookError(f"{folder}: no DICOM slices with a position in space.", "Give the folder of one series.")
    return found


def require_one_series(folder: Path, slices: dict[Path, pydicom.Dataset]) -> None:
    """Raise MedcookError where the folder mixes series or directions."""
    series = {str(dataset.get("SeriesInstanceUID")) for dataset in slices.values()}
    if len(series) > 1:
        raise MedcookError(f"{folder}: it mixes {len(series)} series.", "Put each series into a folder of its own.")
    first, *others = slices.items()
    for path, dataset in others:
        if not np.allclose(orientation(dataset), orientation(first[1]), atol=TOLERANCE):
            hint = "Give a folder with parallel slices only."
            raise MedcookError(f"{path}: this slice is not parallel to {first[0].name}.", hint)


def orientation(dataset: pydicom.Dataset) -> np.ndarray:
    """Directions (2, 3) of growing column and growing row, LPS."""
    return np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)


def normal_of(slices: dict[Path, pydicom.Dataset]) -> np.ndarray:
    return np.cross(*orientation(next(iter(slices.values()))))


def depth(dataset: pydicom.Dataset, normal: np.ndarray) -> float:
    """Position along the normal in mm."""
    return float(np.dot(np.array(dataset.ImagePositionPatient, float), normal))


def slice_distance(folder: Path, slices: dict[Path, pydicom.Dataset], normal: np.ndarray) -> float:
    """Distance in mm between sorted slices; MedcookError where it jumps or is zero."""
    names = [path.name for path in slices]
    depths = np.array([depth(dataset, normal) for dataset in slices.values()])
    if len(depths) == 1:
        return stated_distance(folder, next(iter(slices.values())))
    steps = np.diff(depths)
    for before, after, step in zip(names, names[1:], steps, strict=False):
        if step <= TOLERANCE * steps.max():
            raise MedcookError(f"{folder}: {before} and {after} show the same place.", "Remove one of them.")
    usual = float(steps.min())
    for before, after, step in zip(names, names[1:], steps, strict=False):
        if step > GAP * usual:
            where = f"between {before} and {after} ({step:.2f} mm, usually {usual:.2f} mm)"
            raise MedcookError(f"{folder}: a slice is missing {where}.", "Export the series again, complete.")
    return float(depths[-1] - depths[0]) / len(steps)


def stated_distance(folder: Path, dataset: pydicom.Dataset) -> float:
    """The distance that a single slice states of itself."""
    stated = dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness")
    if not stated:
        raise MedcookError(f"{folder}: one slice, which does not say how thick it is.", "Give the whole series.")
    return float(stated)


def rescaled(dataset: pydicom.Dataset) -> np.ndarray:
    """One slice (rows, columns) float32 with its slope and intercept applied."""
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return dataset.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def affine_of(first: pydicom.Dataset, normal: np.ndarray, distance: float) -> np.ndarray:
    """(4, 4) from (slice, row, column) to RAS+ mm; `first` is the first slice of the sorted series."""
    along_row, along_column = orientation(first)
    row_size, column_size = (float(size) for size in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = normal * distance
    affine[:3, 1] = along_column * row_size
    affine[:3, 2] = along_row * column_size
    affine[:3, 3] = np.array(first.ImagePositionPatient, float)
    return LPS_TO_RAS @ affine
