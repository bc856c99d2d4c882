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
# # 02 · A U-Net baseline you can trust
#
# **After this chapter you can** write a U-Net and its training loop; choose a loss and know what the choice is worth;
# read Dice and Hausdorff distances without being fooled; say how many patients are enough, and how sure you are.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | 100 hearts (ACDC), 260 hippocampi (MSD Task04) | about 40 from scratch, 2 from the run cache | 2 GB |
#
# What you see on the web was made by `full`. **Expect** a mean Dice near 0.90 on hearts after five to ten minutes of
# training on two cores.

# %% tags=["parameters"]
PROFILE = None
DATA = None

# %%
import warnings

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from monai.metrics import compute_hausdorff_distance

from medcook import metrics, plots, teaching, widgets
from medcook.data.transforms import Augment
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.losses import LOSSES, cross_entropy, cross_entropy_and_dice, soft_dice
from medcook.methods import Method, follow
from medcook.networks import UNet, parameters
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.tasks import own_data
from medcook.training import Loop, batch_indices, fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A classifier shrinks an image to a word. To label *every pixel* we need both what the shrinking finds (context:
# "this is a heart") and what it throws away (where exactly the wall runs). The U-Net goes down to gather context, up
# again to full size, and at every level hands the fine detail across. Below: one training image, and what each level
# of the network gets to see of it.

# %%
recipe = find_recipe("unet-acdc")
method, task, budget, seed = recipe.run(profile, "unet", 0)
if DATA:
    task = own_data(DATA)
train = task.samples("labelled")
example = int((train.labels > 0).flatten(1).sum(1).argmax())

depth = len(method.channels)
figure, panels = plots.panels(1, depth + 1, size=(2 * depth + 2, 2.6))
for level, panel in enumerate(panels[:-1]):
    shrunk = torch.nn.functional.avg_pool2d(train.images[example : example + 1], 2**level)[0, 0].numpy()
    plots.show_slice(
        panel,
        shrunk,
        title=f"level {level + 1}: {shrunk.shape[0]} × {shrunk.shape[1]}\n{method.channels[level]} channels",
    )
plots.show_slice(panels[-1], train.images[example, 0].numpy(), train.labels[example].numpy(), title="wanted")
plots.structure_legend(figure, task.structures)
plots.credit(figure, task.data.manifest)

# %% [markdown]
# ## The network
# Thirty lines, and a block of two convolutions. Nothing here is specific to medicine, and the number of dimensions is a
# parameter.

# %%
teaching.show_code(UNet)

# %% [markdown]
# A fixed input through a network with fixed weights must always give the same numbers. Cells like the next one are
# checked by the book's tests: if a change of the code changes the mechanism, they fail.

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
tiny = UNet(channels=(4, 8), classes=3).eval()
ramp = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
with torch.no_grad():
    logits = tiny(ramp)
print("shape", tuple(logits.shape), "parameters", parameters(tiny))
print("logits of one pixel", [round(value, 3) for value in logits[0, :, 3, 3].tolist()])

# %% [markdown]
# MONAI has U-Nets ready to use. Ours and theirs are interchangeable: `Supervised(network="monai-unet")`.

# %%
from medcook.networks import build_network

for name in ("unet", "monai-unet", "monai-basic"):
    net = build_network(name, inputs=1, classes=4, channels=(16, 32, 64, 128, 128), dims=2)
    print(f"{name:12s} {parameters(net) / 1e6:.2f} M parameters")

# %% [markdown]
# ## The losses
# Cross-entropy scores every pixel alone. Soft Dice scores the overlap of each structure as a whole, so that a small
# structure weighs as much as a large one. Most people use their sum.

# %%
teaching.show_code(cross_entropy, soft_dice, cross_entropy_and_dice)

# %% tags=["nbval-check-output", "mechanism"]
labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 0, 0, 0], [0, 0, 0, 255]]], dtype=torch.uint8)
sure = torch.nn.functional.one_hot(torch.where(labels == 255, 0, labels).long(), 3).movedim(-1, 1).float()
for name, loss in LOSSES.items():
    values = {how: loss(sure * factor, labels) for how, factor in {"undecided": 0, "half sure": 1, "sure": 20}.items()}
    print(f"{name:13s}", "   ".join(f"{how} {value:.3f}" for how, value in values.items()))

# %% [markdown]
# The pixel marked 255 was annotated by nobody. It counts in no loss and in no metric.
#
# ## The loop
# Batches are drawn from shuffled epochs, augmented all at once, and everything random is a function of the seed and
# the step. That is why an interrupted training resumes and ends with the very same bits. The weights that predict are a
# moving average of the trained ones.

# %%
teaching.show_code(Method.augment, Method.training_step, follow, Loop.run)

# %% tags=["nbval-check-output", "mechanism"]
average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
average.weight.data.fill_(0.0)
model.weight.data.fill_(1.0)
for step in range(3):
    follow(average, model, decay=0.9)
    print(f"after {step + 1} steps the average has moved to {average.weight.item():.3f}")

# %% tags=["nbval-check-output"]
print("batches of 4 from 6 samples:", [sorted(batch_indices(6, 4, step, seed=0).tolist()) for step in range(3)])
image = torch.arange(16.0).reshape(1, 1, 4, 4)
moved, moved_labels = Augment(gamma=0, contrast=0, brightness=0, noise=0)(
    image, image[:, 0].byte(), torch.Generator().manual_seed(1)
)
print("image and label moved alike:", bool((moved[0, 0] - moved_labels[0]).abs().max() <= 2.5))

# %% [markdown]
# ## Train it
# The central experiment, live. In `full` this is five-fold cross-validation over the 80 train and validation patients
# of ACDC; the 20 test patients stay behind a door until the recipe is finished.

# %%
folds = range(recipe.scales[profile].replicates)
runs = [(*recipe.run(profile, "unet", fold),) for fold in folds]
if DATA:
    runs = [(method, task, budget, seed)]
fitted = [fit(*run) for run in runs]
print(
    f"{len(fitted)} training runs of {budget.steps} steps, the first took {fitted[0].cost['seconds']:.0f} s;",
    "all from the run cache" if all(run.cached for run in fitted) else "trained now",
)
plots.learning_curves(
    {"U-Net": [run.history for run in fitted]},
    title=f"{task.data.manifest.title}; line: mean, band: range over runs",
)

# %%
scored = pd.concat(
    [
        evaluate(run.predict, run.task.data, run.task.val_patients).assign(replicate=number)
        for number, run in enumerate(fitted)
    ],
    ignore_index=True,
)
summary(scored).round(3)

# %% [markdown]
# Each number is a mean over patients who were not trained on, with a 95% bootstrap interval over patients and runs. A
# structure that was not found at all stands under *missed*: it counts with Dice 0, and with the image diagonal as its
# distance. It is never dropped.
#
# ## Successes, and the worst cases
# Look at the failures before you look at the mean. The first column is the best case, the others are the worst.

# %% tags=["cover"]
plots.worst_cases(fitted[0], scored[scored["replicate"] == 0])

# %% [markdown]
# On hearts the outermost slices are where many of the worst errors live: the expert had to decide where the ventricle
# ends, and the network was not told.

# %%
case = fitted[0].task.data.load(scored[scored["replicate"] == 0].groupby("case_id")["dice"].mean().idxmin())
widgets.slice_viewer(case, task.data.manifest, fitted[0].predict(case))

# %% [markdown]
# The same, for readers on the web:

# %%
plots.montage(case, task.data.manifest, prediction=fitted[0].predict(case))

# %% [markdown]
# ## Metrics, and how they fool you
# Four predictions for one truth. Dice likes large objects, forgives a distant speck and says nothing about shape; the
# largest distance (Hausdorff) sees the speck and little else, and HD95, which is what papers report, does not see even
# that. Report both, report misses, report n.

# %% tags=["nbval-check-output", "mechanism"]
truth = np.zeros((40, 40), dtype=bool)
truth[10:30, 10:30] = True
shifted, speck, eroded = np.roll(truth, 2, axis=0), truth.copy(), truth.copy()
speck[38, 38] = True
eroded[10:12] = eroded[28:30] = False
for name, guess in {
    "shifted by 2": shifted,
    "a far speck": speck,
    "two rims lost": eroded,
    "nothing": truth & False,
}.items():
    score = metrics.score(guess, truth)
    largest = metrics.hausdorff(guess, truth, percentile=100)
    distances = f"HD95 {score.hd95:6.3f}  largest {largest:6.3f} {score.unit}"
    print(f"{name:14s} Dice {score.dice:.3f}  {distances}  missed {score.missed}")

# %% [markdown]
# Two traps. A mean that drops what is undefined rewards a method for *missing* a structure altogether:


# %%
def library_hd95(guess, truth):
    """MONAI's HD95 of two boolean masks; it warns, too, where one is empty."""
    pair = [torch.tensor(mask)[None, None] for mask in (guess, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute_hausdorff_distance(*pair, include_background=True, percentile=95).item()


guesses = [shifted, truth & False]
theirs = [library_hd95(guess, truth) for guess in guesses]
ours = [metrics.hd95(g, truth) for g in guesses]
print("one good case and one missed one")
print("library, mean of what is finite:", np.mean([d for d in theirs if np.isfinite(d)]), "  from", theirs)
print("here, a miss is the diagonal:   ", round(float(np.mean(ours)), 1))

# %% [markdown]
# And small structures: a shift by two pixels costs a square of forty pixels a twentieth of its Dice, one of six a
# third.

# %%
figure, axes = plots.panels(size=(6, 3.2))
sides = np.arange(3, 41)
for number, shift in enumerate((1, 2)):
    dice = [max(0.0, (side - shift) / side) for side in sides]
    axes.plot(sides, dice, color=plots.colour(number), label=f"shifted by {shift} pixel{'s' * (shift > 1)}")
axes.set(xlabel="side of a square structure, pixels", ylabel="Dice", ylim=(0, 1))
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
display(figure)

# %% [markdown]
# ## Ablation: which loss?
# The same network, data, steps and folds; only the loss differs. Live in this profile:

# %%
losses = find_recipe("losses")
loss_runs = {
    arm: [fit(*losses.run(profile, arm, number)) for number in range(losses.scales[profile].replicates)]
    for arm in losses.arms
}
plots.learning_curves(
    {arm: [run.history for run in runs] for arm, runs in loss_runs.items()}, title="Same budget, three losses"
)

# %% [markdown]
# And what the committed `full` evidence says, with its verdict by rule:

# %%
display(teaching.evidence_table("losses"))
teaching.verdict_table("losses")

# %% [markdown]
# ## How many patients are enough?
# 3, 7, 14, 35 and all 70 labelled patients, three draws each (of all 70: three seeds), the same number of steps, scored
# on the 20 test patients. With few patients, *which* ones you drew matters as much as how many.

# %%
display(plots.credit(plots.dice_against_labels(evidence_frame("labels", "full")), "acdc"))
display(teaching.evidence_table("labels"))
teaching.verdict_table("labels")

# %% [markdown]
# Where the curve flattens, ask what the bottleneck is. Here it is the budget: with five times the steps the same
# network on 64 patients does far better (the table at the end). That more than 14 patients help could not be seen in
# this minute of training; of hearts it says nothing.
#
# ## Three dimensions: the hippocampus
# The same class with `dims=3`, on small MR volumes with 1 mm voxels. Distances are now in millimetres.

# %%
teaching.evidence_table("unet-hippocampus")

# %%
if profile != "quick":
    volume = find_recipe("unet-hippocampus")
    in_3d = fit(*volume.run(profile, "unet", 0))
    scored_3d = evaluate(in_3d.predict, in_3d.task.data, in_3d.task.val_patients)
    display(plots.worst_cases(in_3d, scored_3d, count=3))

# %% [markdown]
# ## How sure are we? The spread between runs
# One number from one run is an anecdote. Two kinds of spread: *other patients* (five folds of the baseline), and
# *nothing but another seed* (three runs on the same 70 patients, scored on the same 20). A method that beats another by
# less than the second has shown nothing; an interval must count both.


# %%
def spread(paper, arm):
    """Mean Dice of each run of an arm, by structure and over all."""
    rows = evidence_frame(paper, "full").query("arm == @arm")
    table = rows.groupby(["replicate", "structure"])["dice"].mean().unstack()
    return table.assign(all=table.mean(axis=1))


for what, (paper, arm) in {"other patients": ("unet-acdc", "unet"), "another seed": ("labels", "70")}.items():
    table = spread(paper, arm)
    print(f"{what}: from {table['all'].min():.3f} to {table['all'].max():.3f}")
    display(table.round(3))

# %% [markdown]
# ## The table, beside published figures

# %%
display(teaching.evidence_table("unet-acdc"))
display(teaching.published_table("unet-acdc", "unet-hippocampus"))
teaching.test_table("unet-acdc", "unet-hippocampus")

# %% [markdown]
# Seconds were measured on one core of a busy machine; `benchmarks/` has the step on two cores at rest.
#
# **What differs from nnU-Net's 91.5**: resolution (ours rescales the longest side to 256 and has no voxel spacing),
# budget (minutes on two cores against a day on a GPU), the number of training patients (64 against 80), one small 2D
# network against the default 3D configuration, and no test-time augmentation. **What is the same**: five-fold
# cross-validation, mean Dice of the three structures per frame at the stored resolution, no selection on held-out data.

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** Soft Dice of one structure: probabilities `p` and a mask `g` of the same shape; two empty ones agree perfectly.


# %% tags=["exercise", "exercise-soft_dice"]
def soft_dice_of(p, g):
    """2 * sum(p * g) / (sum(p) + sum(g)), and 1.0 where both are empty."""
    raise NotImplementedError


# %%
check("02/soft_dice", soft_dice_of)

# %% [markdown]
# **2.** A reviewer asks for the mean HD95. Three cases were found, one was missed altogether. Write the mean that does
# not reward the miss.


# %% tags=["exercise", "exercise-mean_distance"]
def mean_distance(distances, missed, diagonal):
    """Mean of distances in which a missed case (missed[i] is True, distances[i] is nan) counts as the diagonal."""
    raise NotImplementedError


# %%
check("02/mean_distance", mean_distance)

# %% [markdown]
# **3.** How far does the network see? Two 3 × 3 convolutions a level, then pooling by 2: the receptive field, in input
# pixels, of a unit after the two convolutions of level `n` (the first level is 1 and sees 5 pixels).


# %% tags=["exercise", "exercise-receptive_field"]
def receptive_field(level):
    """Side in input pixels of what a unit of this encoder level depends on."""
    raise NotImplementedError


# %%
check("02/receptive_field", receptive_field)

# %% [markdown]
# ## What to read next
# - Ronneberger, Fischer, Brox: *U-Net* (MICCAI 2015). The original, eight pages.
# - Isensee et al.: *nnU-Net* (Nature Methods 2021), and *nnU-Net Revisited* (2024): what a fair baseline takes.
# - Maier-Hein, Reinke et al.: *Metrics Reloaded* (Nature Methods 2024): which metric for which question.
# - Next: chapter 03 starts from a promptable model, chapter 04 from three labelled patients and many unlabelled ones.
