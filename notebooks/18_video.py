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
# # 18 · Video
#
# **After this chapter you can** name the stage of every frame of a long procedure with a network over time; follow a
# structure that words or a click show once, and say what the memory of a tracker holds; judge both with measures that
# count absent frames; and test what blur, darkness and noise do to them.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | flights through simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | flights through real hippocampi (Decathlon Task04) | about 8 | 2 GB |
#
# What you see on the web was made by `full`. **No real video is at hand**: a camera flies through real volumes, goes
# in, hesitates, turns round and comes back, and some of its frames are blurred, dark, hazy or noisy. Anatomy, labels
# and patients are real; path and disturbances are simulated. **Expect** that time says what a single frame cannot.

# %% tags=["parameters"]
PROFILE = None

# %%
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, teaching, video_figures
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.video import _following, _procedures, _tracker, colontcn, resurgsam2, sam2_robotic
from medcook.sampling import trained
from medcook.training import fit
from medcook.video_figures import Followed

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A flight goes in and comes back. As in a colonoscopy, everything is *insertion* until the far end is reached; on the
# way back the structure counts that a frame shows. So one and the same slice has two names, and nothing in the frame
# says which. Three networks get the same features of the same frames: one looks at frames alone, two over time.

# %% tags=["cover"]
recipe = find_recipe("colontcn")
arms = {"frames alone": "frames alone", "MS-TCN": "ms-tcn", "ColonTCN": "colontcn"}
runs = {name: fit(*recipe.run(profile, arm, 0)) for name, arm in arms.items()}
procedures = runs["ColonTCN"].task
stages = procedures.structures


def answered(fitted, flight):
    """The stage of each frame of a flight, as a network over time says."""
    with torch.no_grad():
        return fitted.method.stage_logits(trained(fitted), flight.frames[None, None])[0].argmax(0).numpy()


def ribbons(case):
    """Truth and answers of a patient's flight."""
    (flight,) = procedures.preparation.flights(case)
    truth = _procedures.stages_of(flight.labels[None])[0].numpy()
    found = {name: answered(fitted, flight) for name, fitted in runs.items()}
    return video_figures.ribbon_figure(
        truth, found, stages, flight.slices, flight.bursts >= 0, procedures.data.manifest
    )


ribbons(next(procedures.cases("val")))

# %% [markdown]
# ## The mechanisms
# **Two names for one slice.** The label of a frame follows from what was seen before.

# %%
teaching.show_code(_procedures.stages)

# %% tags=["nbval-check-output", "mechanism"]
of_slice = np.array([0, 4, 4, 3, 2])  # outside, two slices of one structure, one of another, the far end
flown = np.array([0, 1, 2, 1, 2, 3, 4, 3, 2, 1, 0])
for slice_, stage in zip(flown, _procedures.stages(flown, of_slice), strict=True):
    print(f"slice {slice_}: stage {stage}", end="; ")

# %% [markdown]
# **How far does it see?** A convolution over time sees a few neighbours. *ColonTCN* (Biffi et al. 2025) doubles the
# step between them from block to block, so that the number of frames grows with a power of two, and the weights hardly.

# %%
teaching.show_code(colontcn.TemporalBlock, colontcn.overlooked)

# %% tags=["nbval-check-output", "mechanism"]
for blocks in (1, 2, 3, 5):
    near, far = (colontcn.overlooked(7, blocks, dilated) for dilated in (False, True))
    print(f"{blocks} blocks overlook {far} frames, without dilation {near}")
torch.manual_seed(0)
net = colontcn.ColonTCN(1, 2, 8, blocks=2, kernel=3, dilated=True, dropout=0.0).eval()
signal = torch.zeros(1, 1, 31, requires_grad=True)
net(signal + 1)[0][0, :, 15].sum().backward()
print("frame 15 depends on frames", signal.grad[0, 0].abs().gt(1e-8).nonzero().flatten().tolist())

# %% [markdown]
# **What counts as right?** Frames are many, stages are few, and some are rare. Accuracy forgives who never names a rare
# stage; the weighted F1 hardly less; the macro F1 does not.

# %%
teaching.show_code(_procedures.frame_measures)

# %% tags=["nbval-check-output", "mechanism"]
truth = np.array([0] * 2 + [1] * 10 + [2] * 1 + [3] * 7)
answers = {
    "all right": truth,
    "two frames late": np.roll(truth, 2),
    "never the far end": np.where(truth == 2, 1, truth),
    "always insertion": np.ones_like(truth),
}
for name, found in answers.items():
    values = _procedures.frame_measures(found, truth, 4)
    print(f"{name:18}", ", ".join(f"{key} {values[key]:.3f}" for key in ("accuracy", "weighted_f1", "macro_f1")))

# %% [markdown]
# **Which frame to begin with?** A tracker follows what it was shown in one frame. *ReSurgSAM2* (Liu et al. 2025) finds
# it by words, and waits until several neighbours in a row are credible; of these it takes the one whose mask is
# expected to be the best.

# %%
teaching.show_code(resurgsam2.credible_frame, resurgsam2.most_diverse, resurgsam2.Track)

# %% tags=["nbval-check-output", "mechanism"]
candidates = [(4, 0.91), (9, 0.62), (10, 0.78), (11, 0.55), (12, 0.71), (13, 0.58)]
for count in range(1, len(candidates) + 1):
    frame, alone = (resurgsam2.credible_frame(candidates[:count], window) for window in (5, 1))
    print(f"after frame {candidates[count - 1][0]}: of a window {frame}, by itself {alone}")

# %% [markdown]
# **What to remember?** Recent frames are all alike, and all blurred while the blur lasts. So some frames from longer
# ago stay: of a few good ones, the one that is least like what is kept already.

# %% tags=["nbval-check-output", "mechanism"]
kept = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
looks = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.1], [0.6, 0.6, 0.0], [1.0, 0.0, 0.2]]).view(4, 3, 1, 1)
similar = torch.nn.functional.cosine_similarity(looks, kept[None], dim=1).flatten()
print("similar to the last one kept:", [round(value, 3) for value in similar.tolist()])
print("the diverse one:", resurgsam2.most_diverse(looks, kept))
track = resurgsam2.Track(find_recipe("resurgsam2").arms["resurgsam2"].method, looks)
track.first = 2
track.long.extend([7, 13])
print("in the bank at frame 15:", track.slots(15))

# %% [markdown]
# **Is it followed?** In video, region and contour are judged in every frame (*J* and *F* of DAVIS). A frame in which
# the structure is not there counts, too: nothing found is right, anything is wrong.

# %% tags=["nbval-check-output", "mechanism"]
square = torch.zeros(4, 12, 12, dtype=torch.bool)
square[:3, 3:9, 3:9] = True
moved = torch.stack([square[0], square[1].roll(1, 1), square[2] & False, square[3]])
for number, (region, contour) in enumerate(zip(*_tracker.region_and_contour(moved, square), strict=True)):
    print(f"frame {number}: J {region:.3f}, F {contour:.3f}")
print({name: round(value, 3) for name, value in _following.followed(moved, square).items()})

# %% [markdown]
# ## Follow it
# The structure is named, found, and then followed without words: only the bank knows what it was. One network, asked
# twice: as the baseline does it (the first credible frame, recent memory), and as *ReSurgSAM2* does.

# %%
referring = find_recipe("resurgsam2")
method, task, budget, seed = referring.run(profile, "resurgsam2", 0)
tracker = fit(method, replace(task, evaluation="val"), budget, seed)  # the test set is the recipes'
ways = {arm: referring.method(profile, arm) for arm in ("first frame, recent memory", "resurgsam2")}
manifest, flights, starts, scores = task.data.manifest, {}, {}, []
nets, began, seen = trained(tracker), time.perf_counter(), 0
for case, _ in zip(tracker.task.cases("val"), range(8 if profile == "full" else 2), strict=False):
    (flight,) = task.preparation.flights(case)
    for value, name in task.structures.items():
        tracks = {arm: way.follow(nets, flight.frames[None], way.language.name(value)) for arm, way in ways.items()}
        masks = {arm: _following.joined(track.answers).masks.numpy() for arm, track in tracks.items()}
        title, true = f"{case.case_id}, {name}", (flight.labels == value).numpy()
        flights[title] = Followed(flight.frames.numpy(), true, masks, flight.bursts >= 0)
        starts[title] = {arm: track.first for arm, track in tracks.items() if track.first is not None}
        scores += [
            {"flight": title, "arm": arm, **_following.followed(torch.from_numpy(mask), flight.labels == value)}
            for arm, mask in masks.items()
        ]
        seen += len(ways) * len(true)
pace = seen / (time.perf_counter() - began)
print(f"{pace:.0f} frames of {task.side} x {task.side} pixels a second, on this computer")
scores = pd.DataFrame(scores)
scores.groupby("arm")[["jf", "j", "f", "dice", "present"]].mean().round(3)

# %%
table = scores.pivot(index="flight", columns="arm", values="jf")
best = table["resurgsam2"].idxmax()
there = np.flatnonzero(flights[best].truth.any((1, 2)) | flights[best].answers["resurgsam2"].any((1, 2)))
where = there[np.linspace(0, len(there) - 1, min(10, len(there))).round().astype(int)]
display(video_figures.strip_figure(flights[best], where, manifest))
video_figures.overlap_figure(flights[best], manifest, starts[best])

# %% [markdown]
# A dot marks the frame from which a network followed. Before it, words are asked in every frame.
#
# ## Successes and failures
# The flight with the lowest score, and the one on which both ways differ most; then the procedure whose stages went
# worst.

# %%
worst, torn = table["resurgsam2"].idxmin(), table.diff(axis=1).iloc[:, 1].abs().idxmax()
for title in dict.fromkeys((worst, torn)):
    print(title)
    display(video_figures.overlap_figure(flights[title], manifest, starts[title]))


def wrong(case):
    """The share of frames that ColonTCN names wrongly."""
    (flight,) = procedures.preparation.flights(case)
    return np.mean(answered(runs["ColonTCN"], flight) != _procedures.stages_of(flight.labels[None])[0].numpy())


ribbons(max((case for case, _ in zip(procedures.cases("val"), range(20), strict=False)), key=wrong))

# %% [markdown]
# Stages go wrong at their borders, where a slice shows a little of two structures, and where the camera turns back for
# a few frames. A structure is lost where it is small; and one that has left the image may go on being seen.
#
# ## Ablation: is it the depth or the dilation?
# Without dilation, as many blocks with as many weights see some frames to either side; with it, the whole flight.

# %%
teaching.show_evidence("colontcn", table=True)

# %% [markdown]
# ## A point, a box, and what corruption costs
# A promptable model (*SAM*) answers each image by itself; with a memory (*SAM 2*) it goes on where nobody prompts. Both
# learnt from regions that nobody drew, as a watershed finds them, and are asked for the hippocampus, which they were
# never shown. Neither has Meta's weights: the same small network, with and without memory. A specialist, trained on
# hippocampi, needs no prompt.

# %%
teaching.show_code(sam2_robotic.prompts_of, sam2_robotic.corrupted)

# %% tags=["nbval-check-output", "mechanism"]
stripes = torch.linspace(0, 12, 40).sin().expand(1, 40, 40)
plain = (stripes - stripes.mean()) / stripes.std()
for kind in sam2_robotic.CORRUPTIONS:
    away = [(sam2_robotic.corrupted(stripes, kind, k, "a") - plain).square().mean().sqrt() for k in (1, 3, 5)]
    print(f"{kind:15} moves a pixel by {', '.join(f'{value:.2f}' for value in away)} standard deviations")

# %%
frame = evidence_frame("sam2-robotic", "full")
columns = {name: {0: name, **{k: f"{name}_{k}" for k in (1, 3, 5)}} for name in ("point", "box", "first_box")}
lines = {
    "SAM 2, a box in each frame": ("sam 2", columns["box"]),
    "SAM, a box in each frame": ("sam", columns["box"]),
    "SAM 2, a point in each frame": ("sam 2", columns["point"]),
    "SAM, a point in each frame": ("sam", columns["point"]),
    "SAM 2, a box in the first frame": ("sam 2", columns["first_box"]),
    "SAM, the first frame's box kept": ("sam", columns["first_box"]),
    "specialist, no prompt": ("specialist", columns["point"]),
}
display(video_figures.severity_figure(frame, lines, "hippocampus"))
names = ["point", "points", "box", "first_point", "first_box", "change", "box_change", "first_change"]
display(frame.groupby("arm")[names].mean().round(3))

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea.

# %%
ids = teaching.measured("18_video")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# What was measured besides: of stages under both protocols (in the first, patients of every centre train; in the
# second, the centre that is tested was never seen), and of initial frames and memories.

# %%
frame = evidence_frame("colontcn", "full")
frame["protocol"] = np.where(frame["replicate"] < 5, "five folds", "four folds, unseen centre")
names = ["weighted_f1", "macro_f1", "accuracy", "jaccard", "withdrawal", "segments", "single", "weights"]
display(frame.groupby(["protocol", "arm"])[names].mean().round(3))
names = ["jf", "j", "f", "dice", "present", "initial", "right", "begun", "kept"]
evidence_frame("resurgsam2", "full").groupby("arm")[names].mean().round(3)

# %% [markdown]
# **How to read it.**
#
# - **Time says what a frame cannot.** From the same features, stages have a weighted F1 of 0.557 where frames are seen
#   alone, and of 0.916 with ColonTCN. Frames alone change their stage 2.4 times as often as there are changes.
# - **It has to see far, not only to its neighbours.** Without dilation, 0.881, and the error in the length of the
#   withdrawal doubles (from 0.041 to 0.085, in five folds): 30 frames to either side do not reach the far end from
#   everywhere.
# - **ColonTCN is as good as MS-TCN with about half of the weights**: 0.916 and 0.912, too little to be called better
#   by rule. In the second protocol, where the tested centre was never seen, 0.913 and 0.909; in the first, 0.918 and
#   0.915.
# - **To follow something, begin where it is seen for sure.** A structure that is named has a J&F of 0.736 from a
#   credible initial frame on, of 0.690 from the first frame that shows it by itself. That the memory is diverse adds
#   nothing to it (0.737 without), and nothing alone (0.692). How often frames are disturbed, and what counts as
#   credible, was set on validation patients until the ways could be told apart: so some difference was to be
#   expected. J and F count frames without the structure, `dice` only those with it.
# - **A box in each frame is worth more than training on the structure.** On hippocampi, which it never saw, the
#   promptable model with a memory has a Dice of 0.800 where each frame comes with a box, the specialist 0.765 without
#   a prompt. But somebody has to draw a tight box in every frame. A point in each is far behind (0.397; the model
#   without memory 0.552), and a box in the first frame alone, for which the memory is there, leads to nothing
#   (0.072): it has not learnt to follow what it was never shown. Corruption takes 0.001 from answers to boxes
#   (without memory 0.062), from the specialist's 0.174.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("18_video"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** There are videos of colonoscopies and operations; here flights through volumes, with
# frames of a few dozen pixels. Encoders are small and learn for a minute. **What is the same**: the mechanism, the
# frames and steps of all arms that are compared, and patients who train nothing.
#
# **Four questions for a paper on video.** Are patients, or only frames, kept apart between training and test, and was a
# centre left out? Do absent structures count? Who shows the object, how often, and does a competitor get as many
# prompts? And does it see the future, or could it run while the patient lies there?
#
# ## Play with it
# Fly through the volumes frame by frame, and watch what each way of remembering makes of it (in a live notebook).

# %%
video_figures.flight_explorer(flights, manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** How many frames does an answer depend on? `np` is numpy.


# %% tags=["exercise", "exercise-overlooked"]
def overlooked(kernel, dilations):
    """Frames that an answer depends on, after convolutions over time with an odd kernel and these dilations, one after
    the other: dilations is a list, and a convolution with dilation 4 looks at every fourth frame."""
    raise NotImplementedError


# %%
check("18/overlooked", overlooked)

# %% [markdown]
# **2.** Which frame shall tracking begin with?


# %% tags=["exercise", "exercise-credible"]
def credible(good, level, window):
    """The best frame of the first `window` neighbouring frames that are all above the level; None where there are none.

    good (T,): how good each frame's mask is expected to be.
    """
    raise NotImplementedError


# %%
check("18/credible", credible)

# %% [markdown]
# **3.** How well was it followed?


# %% tags=["exercise", "exercise-followed"]
def followed(found, truth):
    """The mean Jaccard index over all frames of masks (T, H, W) bool.

    Where the structure is not there, nothing found is right, and counts 1.
    """
    raise NotImplementedError


# %%
check("18/followed", followed)

# %% [markdown]
# ## What to read next
# - Bai, Kolter and Koltun: *An empirical evaluation of generic convolutional and recurrent networks for sequence
#   modeling* (2018).
# - Abu Farha and Gall: *MS-TCN: multi-stage temporal convolutional network for action segmentation* (CVPR 2019).
# - Ravi et al.: *SAM 2: segment anything in images and videos* (2024).
# - Perazzi et al.: *A benchmark dataset and evaluation methodology for video object segmentation* (CVPR 2016).
# - Hendrycks and Dietterich: *Benchmarking neural network robustness to common corruptions and perturbations*
#   (ICLR 2019).
