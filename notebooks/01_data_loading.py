# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Data: loading, looking, splitting
#
# **After this chapter you can** read medical images in five formats without losing where they are in space; bring their
# grey values to one scale, and see when that went wrong; split a data set so that the score means something.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts, chest X-rays, hippocampi, CT, cells | about 10 from scratch, 2 from the run cache | 2 GB |
#
# What you see on the web was made by `full`. **Expect** to distrust a data set until you have looked at it.

# %% tags=["parameters"]
PROFILE = None

# %%
import shutil
import tempfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pydicom
import torch
from IPython.display import display
from PIL import Image
from pydicom.data import get_testdata_file

from medcook import plots, statistics, teaching, widgets
from medcook.data import IGNORE, Case, intensity, open_dataset
from medcook.data.manifests import load_manifest, manifest_names
from medcook.data.readers.dicom import read_series
from medcook.data.readers.hdf5 import read_hdf5
from medcook.data.readers.nifti import Volume, canonical, read_nifti
from medcook.data.readers.png import read_gray, read_labels
from medcook.data.readers.sparse_csv import SHAPE, read_sparse
from medcook.data.splits import Split
from medcook.data.transforms import Augment
from medcook.drawers import leakage_figure
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.metrics import dice
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.data_loading.leakage import SliceTask, half_of
from medcook.training import fit

profile = resolve_profile(PROFILE)
quick = profile == "quick"
pd.set_option("display.max_colwidth", None)


def first_cases(name, count):
    """One case each of the first `count` training patients of a data set."""
    data = open_dataset(name)
    return data.manifest, [data.load(data.patients[patient][0]) for patient in data.split.train[:count]]


# %% [markdown]
# ## The idea, in one picture
# A network accepts any array. It does not know left from right, millimetres from pixels, Hounsfield units from
# file units, or whether the label lies on the image. Of these five pictures one is right. **All five load without an
# error**, and all five would train.

# %%
embedded, brains = first_cases("embedded", 6)
brain = brains[0]
if quick:
    shown, image, label = embedded, brain.image[0, 4], brain.label[4]
    other_values, what = image * intensity.bias_field(image.shape, 1.0, np.random.default_rng(3)), "a coil's shading"
else:
    chests = open_dataset("chest_xray")
    first = next(patient for patient in chests.split.train if chests.attributes(patient)["site"] == "Montgomery")
    shown, image, label = chests.manifest, chests.load(first).image[0], chests.load(first).label
    other_values, what = 255 - image, "white read as black"
limits = (0, np.percentile(image, 99.5))

figure, panels = plots.panels(1, 5, size=(12, 3))
for panel, title, pixels, drawn, aspect in [
    (panels[0], "right", image, label, 1.0),
    (panels[1], "mirrored", image[:, ::-1], label[:, ::-1], 1.0),
    (panels[2], "spacing guessed", image, label, 1.5),
    (panels[3], what, other_values, label, 1.0),
    (panels[4], "label of a flipped image", image, label[:, ::-1], 1.0),
]:
    plots.show_slice(panel, pixels, drawn, title=title, limits=limits, aspect=aspect, fill=0.2)
plots.structure_legend(figure, shown.structures)
plots.credit(figure, shown)

# %% [markdown]
# This chapter is about not falling for the other four, and about a sixth mistake that no picture shows: the split.
#
# ## One contract for every format
# Whatever a file looks like, the book turns it into a `Case`: an image with channels first, a label on the same grid,
# the voxel size *or None*, and above all the **patient** it belongs to.

# %%
teaching.show_code(Case)

# %% [markdown]
# The same brain, written five times with the field's own libraries. A DICOM series is one file a slice, each with its
# place in space; rows and columns are described in a frame that points left and back (LPS), NIfTI's right and
# forward (RAS).

# %%
folder = Path(tempfile.mkdtemp(prefix="chapter01-"))
volume, labels = brain.image[0], brain.label
top = float(volume.max())
dz, dy, dx = brain.spacing
affine = np.array(
    [[0, 0, dx, 0], [0, -dy, 0, 0], [dz, 0, 0, 0], [0, 0, 0, 1]]
)  # slices go up, rows back, columns right


def write_dicom(series, volume, spacing, slope):
    """One file a slice, 16 bits a pixel; the stored integers times `slope` are the values."""
    series.mkdir()
    series_uid = pydicom.uid.generate_uid()
    for number, plane in enumerate(volume):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.SOPInstanceUID = pydicom.uid.MRImageStorage, pydicom.uid.generate_uid()
        slice_.SeriesInstanceUID, slice_.PatientName = series_uid, "Doe^Jane"
        slice_.ImagePositionPatient = [0, 0, number * spacing[0]]
        slice_.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]  # columns run to the right, rows to the back
        slice_.PixelSpacing = list(spacing[1:])
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 0
        slice_.RescaleSlope, slice_.RescaleIntercept = pydicom.valuerep.DS(slope, auto_format=True), 0
        slice_.PixelData = np.round(plane / float(slice_.RescaleSlope)).astype(np.uint16).tobytes()
        slice_.save_as(series / f"{number:02d}.dcm", enforce_file_format=True)


nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "image.nii.gz")
nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "label.nii.gz")

write_dicom(folder / "series", volume, brain.spacing, slope=top / 65535)

with h5py.File(folder / "case.h5", "w") as stored:
    stored["image"], stored["label"] = volume, labels

for number, (plane, drawn) in enumerate(zip(volume, labels, strict=True)):
    Image.fromarray(np.round(plane * (255 / top)).astype(np.uint8)).save(folder / f"image{number}.png")
    Image.fromarray(drawn).save(folder / f"label{number}.png")

cube = np.zeros(SHAPE, np.float32)  # this format always fills a cube of 128 voxels a side
cube[: len(volume), :96, :96] = volume
filled = np.flatnonzero(cube)
pd.DataFrame({"data": cube.ravel()[filled]}, index=filled).to_csv(folder / "image.csv")
ventricles = np.zeros(SHAPE, bool)
ventricles[: len(volume), :96, :96] = labels == 3
pd.DataFrame({"data": np.nan}, index=np.flatnonzero(ventricles)).to_csv(folder / "ventricles.csv")

# %% [markdown]
# And read back. The book's tests watch the next cell: if a reader changes what it returns, they fail.

# %% tags=["nbval-check-output", "mechanism"]
from_nifti, from_dicom = read_nifti(folder / "image.nii.gz"), read_series(folder / "series")
from_hdf5 = read_hdf5(folder / "case.h5", ("image", "label"))
upright = canonical(Volume(volume, affine)).array
stack = range(len(volume))
read_back = {
    "NIfTI": (from_nifti.array - volume, read_nifti(folder / "label.nii.gz").array == labels),
    "DICOM": (canonical(from_dicom).array - upright, None),
    "HDF5": (from_hdf5["image"] - volume, from_hdf5["label"] == labels),
    "PNG": (
        np.stack([read_gray(folder / f"image{n}.png") for n in stack]) * (top / 255) - volume,
        np.stack([read_labels(folder / f"label{n}.png") for n in stack]) == labels,
    ),
    "sparse CSV": (read_sparse(folder / "image.csv") - cube, read_sparse(folder / "ventricles.csv") == ventricles),
}
geometry = {"NIfTI": from_nifti, "DICOM": from_dicom}
for name, (difference, agree) in read_back.items():
    error = float(np.abs(difference).max()) / top
    label_text = "no label stored" if agree is None else "label the same" if agree.all() else "label differs"
    kept = geometry.get(name)
    where = f"spacing {tuple(round(s, 3) for s in kept.spacing)} axes {kept.orientation}" if kept else "no geometry"
    print(f"{name:10s}  largest error {error:.3f} of the range  {label_text:15s}  {where}")

# %%
shutil.rmtree(folder)

# %% [markdown]
# Three things to take home. Eight bits cost 0.2% of the range, and Hounsfield units do not fit in them. HDF5, PNG and
# CSV know neither spacing nor direction: somebody has to write these down beside them. And DICOM gave the slices *in
# the other order* (its first axis points down, **I**nferior): an array alone does not say which end is the head; the
# affine does. DICOM also carried a patient's name, which the reader does not even read.
#
# ## Orientation and spacing
# An **affine** sends voxel indices to millimetres. Flipping and swapping the axes of an array is harmless as long as
# the affine moves along: every voxel stays where it was in the world.

# %%
teaching.show_code(canonical)

# %% tags=["nbval-check-output", "mechanism"]
to_world = np.array([[0, 0, -2.0, 9], [0, -1.5, 0, 5], [6.0, 0, 0, -3], [0, 0, 0, 1]])
small = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), to_world)
turned = canonical(small)
print("axes", small.orientation, "->", turned.orientation, "  shape", small.array.shape, "->", turned.array.shape)
print("spacing", small.spacing, "->", turned.spacing)
for value in (0, 7, 23):
    places = [v.affine @ [*np.argwhere(v.array == value)[0], 1] for v in (small, turned)]
    before, after = (" ".join(f"{x:.3f}" for x in place[:3]) for place in places)
    print(f"voxel with value {value:2d} lies at {before} before, at {after} after")

# %% [markdown]
# **A spacing that is not known is never guessed.** With the wrong one a volume in millilitres is wrong by the same
# factor, a Hausdorff distance means nothing, and an anatomy is trained out of shape. In this book an unknown spacing is
# `None`, and distances are then called pixels. Below, a volume with thick slices, cut across them.

# %%
if quick:
    shown, case, cut, limits = embedded, brain, np.s_[::-1, :, 40], None
    rows, columns = 0, 1
    side, drawn = case.image[0][cut], case.label[cut]
else:
    shown, (case, *_) = first_cases("openkbp", 1)
    cut, limits = np.s_[22:104, 64, 14:106], (-160, 240)
    rows, columns = 2, 0
    side, drawn = case.image[0][cut].T, case.label[cut].T
high, wide = case.spacing[rows], case.spacing[columns]
present = {value: name for value, name in shown.structures.items() if (drawn == value).any()}
figure, panels = plots.panels(1, 2, size=(8, 1.9 if quick else 3.6))
for panel, title, shape in [
    (panels[0], f"as measured: a voxel is {high:g} mm high, {wide:.1f} mm wide", high / wide),
    (panels[1], "spacing ignored: every voxel a square", 1.0),
]:
    plots.show_slice(panel, side, drawn, title=title, limits=limits, aspect=shape, fill=0.2)
plots.structure_legend(figure, present)
plots.credit(figure, shown)

# %% [markdown]
# ## Intensity
# **CT** has units. Air is −1000 HU, water 0, bone several hundred to 2000. A screen shows 256 greys, so one looks
# through a *window*: a level in the middle, a width around it. Networks too see more through the window that fits.

# %%
teaching.show_code(intensity.window)

# %% tags=["nbval-check-output", "mechanism"]
tissues = np.array([-1000, -700, -100, 0, 60, 300, 1000])
print("HU          ", " ".join(f"{hu:7d}" for hu in tissues))
for name, (level, width) in intensity.WINDOWS.items():
    print(f"{name:12s}", " ".join(f"{value:7.3f}" for value in intensity.window(tissues, level, width)))

# %%
if quick:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(get_testdata_file("CT_small.dcm", download=False), folder)
        plane, shape = read_series(Path(folder)).array[0], 1.0
    figure, panels = plots.panels(1, 3, size=(9, 3.4))
    source = "A vertebra between the lungs: CT_small.dcm, a test file of pydicom (MIT licence)."
    figure.supxlabel(source, fontsize=7, color="0.4")
else:
    plane, shape = side, high / wide
    figure, panels = plots.panels(1, 3, size=(9, 2.8))
    plots.credit(figure, "openkbp")
for panel, (name, (level, width)) in zip(panels, intensity.WINDOWS.items(), strict=True):
    title = f"{name}: level {level:g}, width {width:g} HU"
    plots.show_slice(panel, intensity.window(plane, level, width), title=title, limits=(0, 1), aspect=shape)
display(figure)

# %% [markdown]
# Live, with two sliders (the three pictures above are its static twin):

# %%
widgets.window_viewer(plane, aspect=shape)

# %% [markdown]
# **MR** has no units. The same tissue has other numbers in every scanner, so each volume is brought to zero mean and
# unit deviation on its own. Left: six volumes as stored. Right: the same after a z-score *per volume*.

# %%
manifest, cases = (embedded, brains) if quick else first_cases("hippocampus", 6)
named = {f"{case.case_id} {case.attributes.get('site', '')}".strip(): case.image for case in cases}
figure = plots.histograms(
    {
        "as stored": named,
        "z-score per volume": {name: intensity.zscore(image_) for name, image_ in named.items()},
    }
)
plots.credit(figure, manifest)

# %% tags=["nbval-check-output", "mechanism"]
values = np.array([[2.0, 4.0, 6.0], [8.0, 10.0, 500.0]], np.float32)
inside = np.array([[True, True, True], [True, True, False]])
for name, result in {
    "z-score": intensity.zscore(values),
    "of another scale": intensity.zscore(1000 * values),
    "within a mask": intensity.zscore(values, inside),
    "clipped first": intensity.zscore(intensity.clip_percentiles(values, 0, 80)),
}.items():
    print(f"{name:17s}", " ".join(f"{value:7.3f}" for value in result.ravel()))

# %% [markdown]
# One bright voxel took the whole range for itself in the first row: clip, or normalise within a mask.
#
# A z-score cannot undo the **bias field**: the coil hears near tissue louder than far tissue, so that white matter on
# one side gets the numbers of grey matter on the other. It is smooth and it multiplies, so its logarithm can be fitted.

# %%
teaching.show_code(intensity.bias_field, intensity.estimate_bias)

# %%
patient = next(case for case in brains if case.attributes["site"] == "north")  # the scanner with the least of it
clean, tissue = patient.image[0], np.isin(patient.label, (1, 2))
field = intensity.bias_field(clean.shape, 0.7, np.random.default_rng(2))
shaded = clean * field
found = intensity.estimate_bias(shaded, tissue)
figure, panels = plots.panels(1, 5, size=(12, 3.1))
limits, ratio = (0, np.percentile(shaded, 99.5)), (0.5, 2)
for panel, title, pixels in [
    (panels[0], "image", clean),
    (panels[2], "what the scanner gives", shaded),
    (panels[4], "corrected", shaded / found),
]:
    plots.show_slice(panel, pixels[4], title=title, limits=limits)
for panel, title, factor in [(panels[1], "simulated field", field), (panels[3], "estimated field", found)]:
    drawn = panel.imshow(
        np.ma.masked_where(patient.label[4] == 0, factor[4]), cmap="PuOr_r", norm="log", vmin=ratio[0], vmax=ratio[1]
    )
    panel.set_title(title, fontsize=9)
    panel.set_axis_off()
bar = figure.colorbar(drawn, ax=panels[3], shrink=0.6, location="bottom")
bar.set_ticks([0.5, 1, 2], labels=["½", "1", "2"])
bar.minorticks_off()
plots.credit(figure, embedded)

# %% tags=["nbval-check-output", "mechanism"]
white = patient.label == 2
for name, volume_ in {"image": clean, "with the field": shaded, "corrected": shaded / found}.items():
    spread = volume_[white].std() / volume_[white].mean()
    print(f"{name:15s} spread of white matter {spread:.3f} of its mean")

# %% [markdown]
# Corrected, white matter is more even than in the image we started from: that scanner had a field of its own. For real
# work take N4 (SimpleITK, ANTs); the idea is the same, the fit is more careful.
#
# ## Looking
# Look at every data set before you train on it, slice by slice, with the outlines on and off.

# %%
if quick:
    shown, case = embedded, brain
else:
    shown, (case, *_) = first_cases("acdc", 1)
widgets.slice_viewer(case, shown)

# %% [markdown]
# The same, for readers on the web:

# %%
plots.montage(case, shown)

# %% [markdown]
# Labels come in kinds. **Scribbles** mark about one pixel in a hundred and leave the rest open: unlabelled is not
# background, and stands in the book as 255, which no loss and no metric counts. And experts **disagree**: several
# raters draw the same object several times, and the spread is the ceiling of what a Dice score can mean.

# %%
if not quick:
    number = int((case.label > 0).sum(axis=(1, 2)).argmax())
    scribble = case.extras["scribble"][number]
    window = plots.around(case.label[number], margin=45)
    figure, panels = plots.panels(1, 2, size=(7, 3.9))
    plots.show_slice(panels[0], case.image[0, number][window], case.label[number][window], title="every pixel")
    plots.show_slice(panels[1], case.image[0, number][window], scribble[window], title="scribbles (white: background)")
    background = np.ma.masked_not_equal(scribble[window], 0) + 1
    panels[1].imshow(background, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    plots.structure_legend(figure, shown.structures)
    display(plots.credit(figure, shown))
    print(f"{(case.extras['scribble'] != IGNORE).mean():.1%} of this case's pixels are scribbled")

# %%
if quick:
    figure = plots.raters_figure(brain, embedded, ["A", "B", "C"], value=3, number=4)
else:
    shown, cells = first_cases("bubil", 8)
    most_disputed = min(cells, key=lambda cell: np.mean([dice(one, cell.label) for one in cell.raters]))
    figure = plots.raters_figure(most_disputed, shown, most_disputed.attributes["raters"])
display(figure)

# %%
if not quick:
    figure, panels = plots.panels(1, 4, size=(11, 3.3))
    kinds = [(site, sick) for site in ("Montgomery", "Shenzhen") for sick in (False, True)]
    for panel, (site, sick) in zip(panels, kinds, strict=True):
        patient_id = next(
            p
            for p in chests.split.train
            if (known := chests.attributes(p))["site"] == site and known["tuberculosis"] == sick and known["age"]
        )
        xray = chests.load(patient_id)
        person = f"{xray.attributes['sex']}, {xray.attributes['age']} years"
        title = f"{site}, {'tuberculosis' if sick else 'no tuberculosis'}\n{person}"
        plots.show_slice(panel, xray.image[0], xray.label, title=title, fill=0.2)
    display(plots.credit(figure, chests.manifest))

# %% [markdown]
# ## Class imbalance
# How much of an image is the thing you are after? A network that answers "background" everywhere is right in 96 of 100
# pixels of these hearts, in more than 99 of 100 of the CT, and useless. This is why losses and metrics are per
# structure (chapter 02).


# %%
def shares(name, patients=20):
    """Mean share of the annotated voxels of each structure, over cases of some training patients."""
    manifest, cases = first_cases(name, patients)
    found = {structure: [] for structure in manifest.structures.values()}
    for case in cases:
        counts = np.bincount(case.label.ravel(), minlength=256)
        for value in case.attributes.get("annotated", manifest.structures):
            found[manifest.structures[value]].append(counts[value] / (case.label.size - counts[IGNORE]))
    return {structure: float(np.mean(values)) for structure, values in found.items()}


at_hand = ["embedded"] if quick else ["chest_xray", "hippocampus", "bubil", "acdc", "openkbp"]
balance = {name: shares(name) for name in at_hand}
plots.credit(plots.class_balance(balance), *at_hand)

# %% [markdown]
# ## Cards
# What a reader must know of a data set before using it stands in its manifest: structures, counts, licence and terms,
# whom to cite, where it is from. One of them in full, and all of them in brief:

# %%
display(teaching.dataset_card("acdc"))
cards = [load_manifest(name) for name in manifest_names()]


def listed(names, most=5):
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


pd.DataFrame(
    [
        {
            "data set": card.name,
            "modality": f"{card.modality}, {card.dimensions}D",
            "structures": listed(list(card.structures.values())),
            "patients": card.facts.patients,
            "cases": card.facts.cases,
            "licence": card.licence,
            "access": card.access,
        }
        for card in cards
    ]
).set_index("data set")

# %% [markdown]
# Every file is checked against its SHA-256 and every case against its manifest when it is loaded: shapes, label values,
# NaN, empty labels. `medcook data show FOLDER` does the same for images of your own.
#
# ## Augmentation: image and label move together
# New views of the few patients there are: turned, scaled, shifted, brighter, noisier. What moves the image must move
# the label, by the same map, in one go. The label takes the nearest voxel: there is no structure number 1.5.

# %%
teaching.show_code(Augment.__call__)

# %%
if quick:
    shown, pixels, drawn = embedded, brain.image[0, 4], brain.label[4]
else:
    shown, pixels, drawn = load_manifest("acdc"), case.image[0, number][window], case.label[number][window]
copies = 6
batch = torch.from_numpy(intensity.zscore(pixels)).expand(copies, 1, -1, -1)
batch_labels = torch.from_numpy(drawn.copy()).expand(copies, -1, -1)
moved, moved_labels = Augment()(batch, batch_labels, torch.Generator().manual_seed(4))
moved[0], moved_labels[0] = batch[0], batch_labels[0]
figure, panels = plots.panels(1, copies, size=(12, 2.9))
for number_, panel in enumerate(panels):
    title = f"draw {number_}" if number_ else "original"
    plots.show_slice(panel, moved[number_, 0].numpy(), moved_labels[number_].numpy(), title=title, fill=0.2)
plots.structure_legend(figure, shown.structures)
plots.credit(figure, shown)

# %% [markdown]
# The proof is an image that *is* its label: if both went the same way, they still agree afterwards.

# %% tags=["nbval-check-output", "mechanism"]
disc = (torch.linspace(-1, 1, 64)[:, None] ** 2 + (torch.linspace(-1, 1, 64) - 0.4) ** 2 < 0.16).to(torch.uint8)
geometry_only = Augment(gamma=0, contrast=0, brightness=0, noise=0)
batch_labels = disc.expand(4, 64, 64)
moved, moved_labels = geometry_only(batch_labels[:, None].float(), batch_labels, torch.Generator().manual_seed(0))
for number_ in range(4):
    image_mask, label_mask = moved[number_, 0].numpy() > 0.5, moved_labels[number_].numpy() > 0
    together, left_behind = dice(image_mask, label_mask), dice(image_mask, disc.numpy() > 0)
    print(f"draw {number_}: Dice of image and label moved together {together:.3f}, label left behind {left_behind:.3f}")

# %% [markdown]
# ## Splits by patient
# A score promises how a network does on the *next patient*. Two slices of one heart, or two visits of one person, are
# near copies; when one is in training and the other is scored, the score measures memory. So patients are split, never
# slices, images or visits. The book's splits are committed, hashed into every result, and refuse a patient who stands
# twice; a test patient cannot even be read by training code.

# %% tags=["nbval-check-output"]
committed = open_dataset("embedded").split
print("train", len(committed.train), "val", len(committed.val), "test", len(committed.test), "hash", committed.hash)
for attempt in (
    lambda: Split(train=("anna", "ben"), val=("ben",), test=("cleo",)),
    lambda: open_dataset("embedded").load(committed.test[0]),
):
    try:
        attempt()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# What does leakage do? An experiment. Both arms are scored on **the same slices**: a random half of those of the
# held-out patients. Both train on **as many slices**. Only, *by slice*, the other half of the held-out patients' slices
# is among the training ones.

# %%
teaching.show_code(half_of, SliceTask)

# %% tags=["nbval-check-output", "mechanism"]
scored_half, leaked_half = half_of("patient001_frame01", 10, 0), half_of("patient001_frame01", 10, 1)
print("scored slices", sorted(scored_half), " may leak", sorted(leaked_half))
print(
    "in both",
    {*scored_half} & {*leaked_half} or "none",
    " in neither",
    {*range(10)} - {*scored_half, *leaked_half} or "none",
)

# %% [markdown]
# Live, at this profile:

# %%
recipe = find_recipe("leakage")
scored, runs = {}, []
for arm in recipe.arms_at(profile):
    tables = []
    for replicate in range(recipe.scales[profile].replicates):
        run = fit(*recipe.run(profile, arm, replicate))
        runs.append(run)
        table = evaluate(run.predict, run.task.data, run.task.val_patients)
        tables.append(table.assign(replicate=replicate))
    scored[arm] = pd.concat(tables, ignore_index=True)
    print(arm)
    display(summary(scored[arm]).round(3))
print(f"{len(runs)} training runs,", "all from the run cache" if all(run.cached for run in runs) else "trained now")
gap = statistics.difference(*(scored[arm] for arm in recipe.compare))
print(
    f"{recipe.compare[0]} minus {recipe.compare[1]}: {gap.effect:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}],",
    f"{gap.n_patients} patients, {gap.n_replicates} run{'s' * (gap.n_replicates > 1)} an arm",
)

# %% [markdown]
# At `quick` that is a rehearsal on a few simulated brains. What counts is the committed `full` evidence on real hearts:

# %%
display(teaching.evidence_table("leakage"))
teaching.verdict_table("leakage")

# %%
measured = evidence_frame("leakage", "full")
gains = measured.groupby(["patient_id", "arm"])["dice"].mean().unstack()
gains = gains["by slice"] - gains["by patient"]
without = gains.drop(gains.idxmax()).mean()
print(f"mean {gains.mean():+.3f}, median {gains.median():+.3f}, {(gains > 0).sum()} of {len(gains)} patients gain")
print(f"the one who gains most ({gains.idxmax()}) gains {gains.max():+.3f}; without them the mean is {without:+.3f}")
leakage_figure(teaching.need_summary("leakage"), measured)

# %% [markdown]
# The gap is what a paper gains by splitting slices, without being any better for the next patient. A mean can lean on
# one patient: here a third of it on the one for whom the honest network failed, and whom the leaking one had already
# seen. That is why the median, and the figure of all patients, stand beside it. These runs are short and heavily
# augmented; one expects more of it where a network has time to learn its patients by heart. Before you believe a
# number, ask: *what was split?*
#
# ## The papers of this chapter
# The Decathlon's protocol was measured as well. Retrained on hippocampi and cells, which it was not made for, an
# algorithm that configures itself has a higher mean Dice than one whose settings were made for hearts: it gains on the
# hippocampi, and loses on the cells.

# %%
display(teaching.chapter_papers("01_data_loading"))
teaching.verdict_table("msd")

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** A CT window: map Hounsfield units to 0..1.


# %% tags=["exercise", "exercise-window"]
def to_unit(hounsfield, level, width):
    """Hounsfield units to 0..1: `level` becomes 0.5, and `width` HU around it fill the range."""
    raise NotImplementedError


# %%
check("01/window", to_unit)

# %% [markdown]
# **2.** A surgeon wants millilitres, not voxels. And when the file does not say how large a voxel is?


# %% tags=["exercise", "exercise-volume"]
def volume_ml(mask, spacing):
    """Volume of a boolean mask in millilitres, from the voxel sizes in mm; None where they are not known."""
    raise NotImplementedError


# %%
check("01/volume", volume_ml)

# %% [markdown]
# **3.** The most important function of your next project. Case ids look like `patient07_frame02`; some patients have
# more cases than others.


# %% tags=["exercise", "exercise-split"]
def split_cases(case_ids, test_share, seed):
    """Two lists of case ids (train, test): `test_share` of the patients, with all their cases, are in test."""
    raise NotImplementedError


# %%
check("01/split", split_cases)

# %% [markdown]
# ## What to read next
# - Antonelli et al.: *The Medical Segmentation Decathlon* (Nature Communications 2022): ten tasks, one format.
# - Heller et al.: *The KiTS21 challenge* (2023): three annotators a kidney, and what becomes of them.
# - Kapoor, Narayanan: *Leakage and the reproducibility crisis in machine-learning-based science* (Patterns 2023).
# - Tustison et al.: *N4ITK: improved N3 bias correction* (IEEE TMI 2010).
# - Next: chapter 02 builds a U-Net on what you have loaded, and says how sure one can be of it.
