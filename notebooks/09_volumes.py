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
# # 09 · Slices or volumes?
#
# **After this chapter you can** look at a volume across all three axes and see where slices go wrong; say what a 2D, a
# 2.5D and a 3D network knows of a voxel's surroundings, and what that costs; cut a volume into slabs and put their
# answers together again; and write an attention that reaches through a whole volume without comparing all its voxels.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hippocampi (Decathlon Task04), three folds; hearts, chest X-rays and CT for some papers | about 5 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that depth is worth something, and that how a network comes to
# see it matters less than that it does.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np  # noqa: F401, for the exercises
import pandas as pd
import torch
from IPython.display import display

from medcook import architectures, comparison, plots, statistics, teaching, volumes, widgets
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.volumes import _slices, cads, cross_d_conv, d_former, mediastinal_ln, stu_net
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# What may the answer at one voxel (orange) depend on? The front of each cube is cut away.

# %% tags=["cover"]
volumes.sights_figure(
    {
        "one slice": "2D U-Net",
        "neighbouring slices": "slices as channels,\ninter-slice fusion",
        "three views": "multi-view fusion",
        "a slab": "slab by slab, 3D U-Net",
        "whole, every other voxel": "dilated attention,\nthe volume at half its resolution",
    }
)

# %% [markdown]
# A 2D network sees a slice and has many of them to learn from. A 3D network sees depth; it pays with memory, and a
# volume is one example where its slices were forty. Between them lies what is called 2.5D. Which is better is no matter
# of taste: it can be measured, and it depends on the data.
#
# ## Look at a volume first
# A voxel has a size along each axis, and slices are often thicker than pixels are wide. Draw them in their true
# proportions, across every axis.

# %%
task = find_recipe("study-2.5d").run(profile, "3d", 0)[1]
case = next(task.cases("val"))
print("shape", case.spatial, "spacing", case.spacing, "mm" if case.spacing else "")
volumes.planes_figure(case, {}, task.data.manifest)

# %% [markdown]
# ## What it costs, before any training

# %%
ids = teaching.measured("09_volumes")
study = find_recipe("study-2.5d")
volume = torch.zeros(1, 1, 32, 56, 40)
schemes = {name: arm.method.build(1, 3, 3)["model"] for name, arm in study.arms.items() if name != "one plane"}
architectures.cost_table(schemes, volume).round(2)

# %% [markdown]
# A 3 × 3 × 3 kernel has three times the weights of a 3 × 3 one and is applied at as many voxels, in the first level;
# deeper ones have fewer slices, for a volume is made smaller along all three axes. What the table does not show is
# memory: every feature map that training keeps is a volume, where it was a slice.
#
# ## The mechanisms
# **Slices that ask their neighbours.** The cheapest depth: hand the network the slices beside this one as channels. Or
# let the features of a slice ask those at the same place above and below:

# %%
teaching.show_code(_slices.neighbours)

# %% tags=["nbval-check-output", "mechanism"]
line = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
for channel, values in zip(["before", "itself", "behind"], _slices.neighbours(line, 3)[0, :, :, 0, 0], strict=True):
    print(f"{channel}:", [round(value, 3) for value in values.tolist()])

# %% [markdown]
# **Attention that reaches through the volume.** Attention among all voxels is out of reach: twice the side, sixty-four
# times the pairs. *D-Former* (Wu et al. 2023) compares the tokens of a window, and then as many tokens that lie far
# apart, like the taps of a dilated convolution. Two steps, and everything has heard of everything:

# %%
teaching.show_code(d_former.grouped)

# %% tags=["nbval-check-output", "mechanism"]
tokens = torch.arange(12.0).reshape(1, 12, 1, 1, 1)
for name, dilated in (("local", False), ("dilated", True)):
    groups = d_former.grouped(tokens, (4, 1, 1), dilated)[0, :, :, 0]
    print(f"{name:8}", [[round(value, 3) for value in group.tolist()] for group in groups])

# %% [markdown]
# **Slabs, put together again.** A CT does not fit into a network. Let one network see slabs of it in full detail and
# another all of it at half the resolution, and fuse what they say (Bouget et al. 2022). A slab predicts its middle
# slices, which it knows best:

# %%
teaching.show_code(mediastinal_ln.from_slabs, mediastinal_ln.fused)

# %% tags=["nbval-check-output", "mechanism"]
deep = torch.linspace(0, 1, 12).sin().reshape(1, 1, 1, 1, 12)
seen = mediastinal_ln.from_slabs(lambda slab: slab.mean(-1, keepdim=True).expand_as(slab), deep, thickness=4, stride=2)
print("means of slabs, two slices each:", [round(value, 3) for value in seen[0, 0, 0, 0].tolist()])
both = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).reshape(2, 1, 2, 1, 1, 1)
for fusion in ("mean", "maximum"):
    print(f"{fusion:8}", [round(value, 3) for value in mediastinal_ln.fused(both, fusion).flatten().tolist()])

# %% [markdown]
# **Kernels that slices train.** Slices with labels are plenty, volumes are few. *Cross-D Conv* (Yavuz and Yang 2024)
# keeps 3D kernels, and for each slice moves them by a learned phase in the Fourier domain, so that a plane of them
# becomes a 2D kernel. In a volume the same weights are used as they are.

# %%
teaching.show_code(cross_d_conv.shifted)

# %% tags=["nbval-check-output", "mechanism"]
kernel = torch.zeros(1, 3, 3, 3)
kernel[0, 1, 1, 1] = 1.0
for shift in (0.0, 0.5, 1.0):
    moved = cross_d_conv.shifted(kernel, torch.tensor([[shift, 0.0, 0.0]]))[0, 0]
    print(f"moved by {shift}:", [round(value, 3) + 0.0 for value in moved[:, 1, 1].tolist()])

# %% [markdown]
# **Blocks that grow.** To be made larger, a network needs blocks that stay trainable when they are many, and weights
# that fit another task. *STU-Net* (Huang et al. 2023) makes nnU-Net's blocks residual and replaces what depends on a
# task's strides by interpolation; then depth and width grow together.

# %%
teaching.show_code(stu_net.Residual, stu_net.Upsample)

# %% tags=["nbval-check-output"]
for name, channels, depth in (("small", stu_net.SMALL, 1), ("wider", stu_net.WIDE, 1), ("large", stu_net.LARGE, 2)):
    grown = stu_net.STUNet(inputs=1, classes=3, channels=channels, depth=depth)
    line = architectures.cost_table({name: grown}, torch.zeros(1, 1, 16, 16, 16)).iloc[0]
    print(f"{name}: {line['parameters']:.0f} parameters, {line['multiply-adds'] / 1e6:.1f} million multiply-adds")

# %% [markdown]
# **Labels from many sources.** *TotalSegmentator* (Wasserthal et al. 2023) and *CADS* (Xu et al. 2025) won by their
# labels, not by their networks: a hundred structures in a thousand CTs, and 167 in twenty-two thousand. No one draws
# them all. Each source draws some, and what it leaves out is **unknown, not background**. So a voxel has candidates,
# the loss is that of their sum, and where the network has become sure it completes what is missing:

# %%
teaching.show_code(cads.candidates, cads.completed)

# %% tags=["nbval-check-output", "mechanism"]
drawn = torch.tensor([[False, True, False]])  # this source draws structure 1 and never structure 2
known = cads.candidates(torch.tensor([[0, 1, 0]]), drawn)
odds = torch.tensor([[[0.05, 0.2, 0.5], [0.05, 0.1, 0.1], [0.9, 0.7, 0.4]]])
for name, table in (("candidates", known), ("completed", cads.completed(known, odds, 0.8))):
    print(f"{name:10}", [[value for value in range(3) if table[0, value, voxel]] for voxel in range(3)])

# %% [markdown]
# ## Slices, volumes, and in between
# Three networks of the study of 2.5D schemes (Zhang et al. 2022), on one fold: U-Net on slices, U-Net on volumes, and
# three U-Nets on slices, one for each plane, whose probabilities are averaged. Same steps, same volumes.

# %%
shown = {"2D": "2d", "three views": "multi-view fusion", "3D": "3d"}
fitted = {}
for name, arm in shown.items():
    method, task, budget, seed = study.run(profile, arm, 0)
    fitted[name] = fit(method, task, budget, seed)
scored = {name: evaluate(one.predict, task.data, task.val_patients) for name, one in fitted.items()}
for name, one in fitted.items():
    line = summary(scored[name]).loc["all"]
    origin = "from the run cache" if one.cached else "trained now"
    print(f"{name:12}  Dice {line['dice']:.3f}, {line['missed']:.0f} missed; {one.cost['seconds']:.0f} s, {origin}")

# %%
plots.learning_curves({name: [one.history] for name, one in fitted.items()}, title="one fold, one seed")

# %% [markdown]
# The case that the 2D network does worst, across all three axes. Its slices lie across the first axis: there its
# outlines look as good as any. Look at it from the side.

# %%
order = scored["2D"].groupby("case_id")["dice"].mean().sort_values()
worst = task.data.load(order.index[0])
volumes.planes_figure(worst, {name: one.predict(worst) for name, one in fitted.items()}, task.data.manifest)

# %% [markdown]
# ### Is it ragged?
# Count the places where two neighbouring voxels have different labels, along each axis, and divide by how many there
# are in the reference: 1 is as smooth as what an expert drew.

# %%
cases = list(task.cases("val"))
answers = {name: [one.predict(case) for case in cases] for name, one in fitted.items()}
volumes.jump_table(cases, answers).round(2)

# %% [markdown]
# ### Where does a structure end?
# The middle of a structure is easy. A slice network has to know from one slice whether the structure has begun:

# %%
volumes.ends_figure(cases, answers, 0, task.dataset)

# %% [markdown]
# Look for yourself, across any axis (in a live notebook):

# %%
widgets.plane_explorer(worst, {name: one.predict(worst) for name, one in fitted.items()}, task.data.manifest)

# %% [markdown]
# ## Best and worst of the volumes

# %%
plots.worst_cases(fitted["3D"], scored["3D"], count=3)

# %% [markdown]
# ## Ablation: three views, or three networks?
# Three networks are an ensemble, and ensembles gain whatever they look at. So the ablation has three networks of the
# same plane.

# %%
display(teaching.evidence_table("study-2.5d"))
teaching.verdict_table("study-2.5d")

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over the same network without its idea. Three folds, the last checkpoint.

# %%
summaries = [teaching.need_summary(paper) for paper in ids]
in_dice = [one for one in summaries if one.metric == "dice"]
comparison.forest(in_dice)

# %%
print(comparison.tally(in_dice))

# %% [markdown]
# The arms of papers that set more than two against each other. *Association* is that of area with age:

# %%
for paper in ("stu-net", "cads", "mediastinal-ln", "deeporgan", "totalsegmentator"):
    display(teaching.evidence_table(paper).rename_axis(paper))
measured = evidence_frame("totalsegmentator", "full").query("arm == 'segmented'")
experts = statistics.interval(measured, "drawn_association")
print(f"area as experts drew it: {teaching.with_interval(experts.mean, experts.low, experts.high)}")

# %% [markdown]
# And what does it cost?

# %% tags=["cover"]
compared = [one for one in in_dice if one.comparison.b == "unet"]
frames = {one.paper: evidence_frame(one.paper, "full") for one in compared}
unet = {"unet": study.arms["3d"].method.build(1, 3, 3)["model"]}
built = unet | {
    one.paper: find_recipe(one.paper).arms[one.comparison.a].method.build(1, 3, 3)["model"] for one in compared
}
table = architectures.gains_over(compared, frames, built, volume.shape[2:])
architectures.cost_figure(table, compared[0].dataset)

# %%
architectures.readable(table)

# %% [markdown]
# **How to read it.**
#
# - **Depth is worth something**: three views are 0.04 above one, and 3D is above 2D. But most of what three views gain
#   over one network comes with three networks of the *same* plane, too. And on these small volumes three 2D networks,
#   one for each plane, are even a little above the 3D one (0.01): 3D is not always best, as the study says.
# - **Cheap depth is worth little here**: neighbouring slices as channels, or attended to, add 0.01 or less.
# - **What is built around depth is mostly not missed**: 3D alone is even a little above 2D and 3D joined (H-DenseUNet,
#   0.01), and MPU-Net with and without its attention are not told apart.
# - **Reaching far helps a transformer a little**: D-Former's dilated attention adds 0.01; with it, D-Former is 0.03
#   below the U-Net. It starts with the bias of its head at 5% of structures, which is ours, not the paper's: from the
#   usual start it learned nothing in so few steps.
# - **A training that moves from slices to volumes can go wrong**: in one fold Cross-D Conv loses a structure, and in
#   the other two it is below the U-Net as well. Its kernels and the statistics of its normalisation come from slices,
#   and half of a short run is all that is left to change them.
# - **Larger is better, to a point**: twice as wide and twice as deep, STU-Net's blocks are 0.01 above the chapter's
#   U-Net, with twice its weights. Made wider alone, for the same cost, they are nearly as good; the small one loses a
#   structure in one fold, which makes most of the measured gain.
# - **Unknown is not background**: where each source draws one structure of the heart, to take the others for background
#   ruins the network (0.18), and to leave them open nearly saves it (0.78; with all labels 0.84, chapter 08).
#   Completing them by the network's own predictions harms here.
# - **Three patients a fold say little**: on head-and-neck CT a fused network of slabs and of the shrunken volume is far
#   above slabs alone (+0.31), and not told apart from the volume alone (+0.03, interval from -0.22 to +0.25). With
#   priors of where structures lie it is highest in the mean (0.61, without them 0.49).
# - **A second look can lose**: DeepOrgan's regions around superpixels, told what patches found, stay below the map of
#   the patches themselves (0.50 in place of 0.62). Zooming out adds 0.01 to that.
# - **Size and age**: lungs as a network finds them on X-rays are smaller in older adults, as those that experts drew
#   are (association -0.29, of both). With a threshold in place of the network it is not told apart from nothing
#   (-0.04).
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("09_volumes"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** A hippocampus as cropped by its data set has forty voxels a side, where an abdomen
# has five hundred: it fits into memory whole, which is not the case that slabs, cascades and 2.5D were made for.
# Networks are narrow and trained for a few minutes at most. **What is the same**: the mechanism, the steps, and three
# folds.
#
# **Four questions for a paper on volumes.** Is the 2D baseline trained on as many voxels? Are distances in millimetres?
# Is a gain over 2D one of depth or one of an ensemble? And does it hold where slices are thick?
#
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** Cover a volume with slabs. No slab may reach beyond the volume, and no slice may be left out.


# %% tags=["exercise", "exercise-slabs"]
def slabs(depth, size, step):
    """First slices of slabs of `size` slices, `step` apart, that cover 0 .. depth - 1; the last slab ends at depth."""
    raise NotImplementedError


# %%
check("09/slabs", slabs)

# %% [markdown]
# **2.** Put their answers together again. `np` is numpy.


# %% tags=["exercise", "exercise-stitch"]
def stitch(parts, starts, depth):
    """Probabilities (depth, H, W): the mean of all slabs that contain a slice; slab k begins at slice starts[k]."""
    raise NotImplementedError


# %%
check("09/stitch", stitch)

# %% [markdown]
# **3.** Move a signal by half a sample. In the Fourier domain a shift turns the phase of each frequency, and turns it
# the more, the higher the frequency is. Cross-D Conv learns such shifts to lay 2D kernels into a volume.


# %% tags=["exercise", "exercise-shifted"]
def shifted(signal, by):
    """A periodic signal moved `by` samples to the right, which need not be a whole number; its length is odd."""
    raise NotImplementedError


# %%
check("09/shifted", shifted)

# %% [markdown]
# ## What to read next
# - Çiçek, Abdulkadir, Lienkamp, Brox and Ronneberger: *3D U-Net* (MICCAI 2016), from sparse slices to dense volumes.
# - Isensee et al.: *nnU-Net* (Nature Methods 2021): how spacing and size decide between 2D, 3D and a cascade.
# - Zhang, Liao, Ding and Zhang: *Bridging 2D and 3D segmentation networks* (2022), the study behind this chapter.
# - Wasserthal et al.: *TotalSegmentator* (2023): what a plain 3D network does with 1204 annotated CTs.
