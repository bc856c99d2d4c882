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
# # 04 · Few labels, many images
#
# **After this chapter you can** say what a few labelled patients cost in Dice, and how much of it depends on *which*
# patients; write a mean teacher, pseudo-labels and copy-paste; see confirmation bias happen; read a semi-supervised
# paper and ask the three questions that decide whether to believe it.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | 100 hearts (ACDC), 3, 7 or 14 of 70 patients labelled | about 6 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** a mean Dice near 0.80 from three labelled hearts after a minute
# of training, with a spread between draws of patients that is larger than what most methods add.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, film, plots, teaching, widgets
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.methods import FixMatch, MeanTeacher, UncertaintyAwareMeanTeacher
from medcook.methods.co_training import cross_supervision
from medcook.methods.semi_supervised import SemiSupervised, boxes, forgetful, ramp_up, strong
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.semi_supervised import bcp
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# An expert needs minutes for a slice, a scanner a second. So there are always a few labelled patients and many others.
# What can the others teach? Not *what* a ventricle is called, but how hearts look, and that a network which is sure of
# something ought to stay sure of it when the image gets a little noise.

# %%
recipe = find_recipe("few-labels")
method, task, budget, seed = recipe.run(profile, "supervised, 3", 0)
known, unknown = task.samples("labelled"), task.samples("unlabelled")


def middle(samples, number):
    """The middle slice of a case."""
    mine = (samples.case_of == number).nonzero()[:, 0]
    return int(mine[len(mine) // 2])


figure, grid = plots.panels(2, 7, size=(12, 3.9))
for column in range(7):
    other = middle(unknown, 2 * column)
    plots.show_slice(grid[1, column], unknown.images[other, 0].numpy())
    grid[0, column].set_axis_off()
for column, patient in enumerate(range(0, int(known.case_of.max()) + 1, 2 if profile != "quick" else 1)):
    mine = middle(known, patient)
    plots.show_slice(grid[0, column], known.images[mine, 0].numpy(), known.labels[mine].numpy())
patients = (len(task.labelled_patients), len(task.unlabelled_patients))
grid[0, 0].set_title(f"{patients[0]} patients with labels", fontsize=9, loc="left")
grid[1, 0].set_title(f"7 of {patients[1]} patients without", fontsize=9, loc="left")
plots.structure_legend(figure, task.structures)
plots.credit(figure, task.data.manifest)

# %% [markdown]
# ## The failure first
# The baseline of chapter 02, half as wide so that a minute buys more steps, on three labelled patients and nothing
# else.

# %%
baseline = fit(method, task, budget, seed)
scored = evaluate(baseline.predict, task.data, task.val_patients)
cost = baseline.cost
print(f"{budget.steps} steps, {cost['seconds']:.0f} s,", "from the run cache" if baseline.cached else "trained now")
display(summary(scored).round(3))
plots.worst_cases(baseline, scored)

# %% [markdown]
# Look at the failures: structures that are missing, or found twice, in slices unlike any that the network was shown.
# And look at what *which three patients* means. The committed evidence has three draws:

# %%
few = evidence_frame("few-labels", "full")
draws = comparison.by_method(few).query("method == 'supervised'").groupby(["labelled", "replicate"])["dice"].mean()
display(draws.unstack().round(3).rename(columns=lambda k: f"draw {k}"))
ceiling = teaching.need_summary("few-labels").arms["all labels"]
print(f"all 70 labelled patients, the same steps: {ceiling.mean:.3f}")

# %% [markdown]
# One of the draws with seven patients is far below the one with three: there the training never found one structure,
# and none of the seven methods that continue it finds it (the comparison below counts 40 misses for each). A mean over
# draws would hide that; a paper that shows its best seed would never mention it.
#
# A paper that reports one draw (nearly all do, and always the same one, here draw 0) reports a number that another draw
# would have moved by this much. Keep that in mind for every table below.
#
# ## Four ways to learn from images without labels
# All of them add a second loss to the labelled one, and let it grow slowly, because a teacher that knows nothing yet
# should not be believed.

# %%
teaching.show_code(SemiSupervised, ramp_up, forgetful)

# %% tags=["nbval-check-output", "mechanism"]
print("rising:", [round(ramp_up(time / 10, 0.5), 3) for time in range(7)])

# %% tags=["nbval-check-output", "mechanism"]
layer = torch.nn.BatchNorm2d(1)
strange = torch.arange(4.0).reshape(1, 1, 2, 2) + 10
with forgetful(layer):
    layer(strange)
print(f"running mean after a forgetful pass {layer.running_mean.item():.3f},", end=" ")
layer(strange)
print(f"after an ordinary one {layer.running_mean.item():.3f}")

# %% [markdown]
# One line deserves a word: `forgetful`. Perturbed images must not leave their mark on the statistics by which batch
# normalisation will treat plain ones.
#
# **1. Mean teacher.** The moving average of the student's weights teaches the student. **2. Uncertainty-aware mean
# teacher.** The same, where several noisy votes of the teacher agree.

# %%
teaching.show_code(MeanTeacher, UncertaintyAwareMeanTeacher)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
nets = MeanTeacher(channels=(4, 8)).build(inputs=1, classes=3, dims=2)
mean, entropy = UncertaintyAwareMeanTeacher(votes=8).vote(nets, torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
print("eight votes, mean of one pixel:", [round(value, 3) for value in mean[0, :, 4, 4].tolist()])
print(f"entropy {entropy[0, 4, 4]:.3f} of at most {np.log(3):.3f} nats")

# %% [markdown]
# **3. Weak to strong** (FixMatch): what is said surely of a plain view must be said of a heavily perturbed one.
# **4. Cross pseudo supervision**: two networks from different random starts take each other's hard labels.

# %%
teaching.show_code(FixMatch, cross_supervision)

# %% tags=["nbval-check-output", "mechanism"]
logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, -3.0]]])[:, :, :, None]
print("two networks, each taught by the other:", round(cross_supervision(logits, logits.flip(0)).item(), 3))
torch.manual_seed(0)
print("share of a strong view that is blanked:", round(boxes(2, (10, 10), 0.3).float().mean().item(), 3))

# %%
torch.manual_seed(1)
example = unknown.images[[middle(unknown, 2 * number) for number in range(3)]]
figure, grid = plots.panels(2, 3, size=(6.6, 4.8))
for column, (plain, perturbed) in enumerate(zip(example, strong(example), strict=True)):
    plots.show_slice(grid[0, column], plain[0].numpy(), title="weak view" if column == 0 else "")
    plots.show_slice(grid[1, column], perturbed[0].numpy(), title="strong view" if column == 0 else "")
plots.credit(figure, task.data.manifest)

# %% [markdown]
# ## Copy and paste
# *Bai et al., CVPR 2023.* Paste a box of a labelled image into an unlabelled one and the other way round; mix labels
# and pseudo-labels with the very same mask. Labels and guesses then stand side by side in every image, and the
# network cannot treat the two sources differently. This is the recipe's own code:

# %%
teaching.show_code(bcp.copy_paste, bcp.BCP)

# %% tags=["nbval-check-output", "mechanism"]
box = torch.zeros(1, 4, 6, dtype=torch.bool)
box[:, 1:3, 2:5] = True
truth, guess = torch.full((1, 4, 6), 3, dtype=torch.uint8), torch.arange(24, dtype=torch.uint8).reshape(1, 4, 6) % 3
print(bcp.copy_paste(truth, guess, box)[0].numpy())
uniform = torch.zeros(1, 4, 4, 6)
print("loss of a clueless student:", round(bcp.BCP().mixed_loss(uniform, truth, guess, box, 0.5).item(), 3))

# %%
torch.manual_seed(2)
pair = [known.images[[middle(known, 0)]], unknown.images[[middle(unknown, 2)]]]
square = boxes(1, tuple(pair[0].shape[2:]), bcp.BCP().side)
mixed = {"labelled": pair[0], "unlabelled": pair[1], "inward": bcp.copy_paste(*pair, square)}
mixed["outward"] = bcp.copy_paste(*pair[::-1], square)
figure, panels = plots.panels(1, 4, size=(9.6, 2.9))
for panel, (name, image) in zip(panels, mixed.items(), strict=True):
    plots.show_slice(panel, image[0, 0].numpy(), title=name)
plots.credit(figure, task.data.manifest)

# %% [markdown]
# ## Watch the pseudo-labels
# We train twice more, live, and stop nine times to ask the teacher about patients whose labels the training never
# sees (they exist: we hid them). Orange marks what is *wrong and confident*; yellow what is wrong and unsure.

# %%
films = {
    name: film.watch(*recipe.run(profile, arm, 0), **({} if profile != "quick" else {"count": 8, "frames": 5}))
    for name, arm in {"mean teacher": "mean teacher, 3", "copy-paste": "bcp, 3"}.items()
}
watched = films["mean teacher"]
biased = watched.most_biased()
film.strip(watched, biased)

# %%
film.quality_figure(films)

# %% [markdown]
# Two things happen at once: pseudo-labels become better, and the teacher becomes *sure* of them, the wrong ones too.
# Move the slider (in a live notebook) and look for orange that never goes away.

# %%
widgets.film_viewer(watched)

# %% [markdown]
# ## Confirmation bias
# A student that learns from its own errors keeps them. Take the errors half way through and ask how many are still
# there at the end: those of which the teacher was sure, and the others.

# %%
half = len(watched.steps) // 2
table = pd.DataFrame({name: one.survival(half) for name, one in films.items()}).T
table.columns = [f"{name} still wrong at the end" for name in table.columns]
table.round(2)

# %% [markdown]
# That is why thresholds, uncertainty weights, two networks and copy-paste exist: each is a way not to believe oneself.
# In this run copy-paste has not helped against it.
#
# ## Ablation: what remains without copy-paste
# The claimed ingredient of *bidirectional copy-paste* is the pasting. Take it away and leave the rest (pre-training,
# moving average, largest parts, pseudo-labels at half weight) as it is:

# %%
display(teaching.evidence_table("bcp"))
teaching.verdict_table("bcp")

# %% [markdown]
# This question was asked before: on the method's
# [issue tracker](https://github.com/DeepMed-Lab-ECNU/BCP/issues/26) a reader removes the mixing at 7 labelled patients
# and still gets 88.8; the authors confirm it, and report 75.8 without mixing (against 87.6 with it) at 3 patients.
# The gain of a semi-supervised *system* is not the gain of the ingredient in its title. For every paper of the chapter,
# squares show what the method gains over its comparator, circles what its ingredient gains over nothing else but its
# absence:

# %%
papers = [row for row in teaching.chapter_papers("04_semi_supervised").index if teaching.load_summary(row)]
comparison.forest([teaching.need_summary(paper) for paper in papers])

# %% [markdown]
# ## The comparison nobody publishes
# Every 2D method of this chapter and its baselines: same network, same steps, same augmentation, same labelled batch,
# three draws of patients, the last checkpoint, the 20 test patients; no method was tuned on its own; three, seven and
# fourteen labelled patients.

# %% tags=["cover"]
comparison.comparison_figure(few, teaching.need_summary("few-labels"), "all labels")

# %%
compared = comparison.compare_methods(few)
display(comparison.readable(compared, teaching.need_summary("few-labels")))

# %%
display(comparison.told_apart(compared))

# %% [markdown]
# Differences are paired by patient and draw; p is Wilcoxon's over patients, after Holm over the whole table; a missed
# structure counts with the image diagonal in HD95. The seconds are of one core. *val-selected* picks the checkpoint on
# ten validation patients: with three labelled patients that is more labels for choosing than for training, which is
# why the last checkpoint comes first here.
#
# How to read it. **Three labels.** In one minute of training two methods are told apart as better, both with two
# networks that teach each other: cross pseudo supervision, the simplest, and C3S3, which gains no more. A student that
# must say under strong perturbation what it said without comes next, and is not told apart. Consistency with one's own
# moving average changes little, with or without uncertainty, anatomy or an assistant to weigh it, perhaps because in
# this minute the average is hardly wiser than the student. Methods that change the task itself (mixed images, label
# maps out of noise, transposed views) are lowest: perhaps they ask for more steps than a minute has.
#
# **Seven.** The methods with the largest gains are those that do not start from the common first half, labels alone,
# and so are spared the draw in which that half failed. Show only these rows and they look like the best semi-supervised
# methods of the chapter. It is a result about starting points. The intervals, which count the draws, include zero; p
# counts patients within the draws that happened, and is tiny. Where they disagree, believe the interval.
#
# **Fourteen.** Nothing is told apart from labels alone as better; what cost most at three labels still costs. *These
# are findings about this budget*, not about ten hours on a GPU; the `paper` profile is there for those.
#
# ## Beside published figures

# %%
teaching.literature("acdc-few-labels")

# %% [markdown]
# Published tables use a weaker baseline (little augmentation, 256 × 256, 30 000 steps) and one draw, and they disagree
# with each other where they report the same method. Ours uses strong augmentation and a heart located beforehand. Much
# of what separated methods from their baselines there is already in the baseline here. **What differs**: everything
# but the data and the split. **What is the same**: 70 training patients, the published order for draw 0, 20 test
# patients.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("04_semi_supervised"))
teaching.verdict_table(*papers)

# %% [markdown]
# **Three questions for a semi-supervised paper.** Is the baseline as well trained and augmented as the method? How
# large is the gain beside the spread between draws of labelled patients? And what is left when the ingredient in the
# title is taken away?
#
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The teacher is a moving average, so for a while it still holds its random start. How much of it is left after
# `steps` steps with a fixed `decay`? And with `warm_up`, where step k = 0, 1, ... uses
# `min(decay, (k + 1) / (k + 10))`?


# %% tags=["exercise", "exercise-ema_after"]
def ema_after(decay, steps, warm_up):
    """Share of its random start that is left in the teacher after `steps` steps."""
    raise NotImplementedError


# %%
check("04/ema_after", ema_after)

# %% [markdown]
# **2.** Paste the box of a labelled image into an unlabelled one (2D arrays, `box` is boolean). Labels are mixed by the
# same box; in the loss a pixel with a label weighs 1, one with a pseudo-label 0.5. The inputs must stay as they are.


# %% tags=["exercise", "exercise-copy_paste"]
def copy_paste(labelled, labels, unlabelled, pseudo, box):
    """The mixed image, its labels and their weights in the loss: three new arrays of one shape."""
    raise NotImplementedError


# %%
check("04/copy_paste", copy_paste)

# %% [markdown]
# **3.** A threshold on confidence trades how many pixels teach against how many of them are right. Write both numbers;
# where no pixel is confident the precision is not known: return None for it. (Most confident pixels are background,
# which is easy: a high precision says little about the heart.)


# %% tags=["exercise", "exercise-pseudo_gain"]
def pseudo_gain(pseudo, confidence, truth, threshold):
    """(coverage, precision): the share of pixels that are confident, and the share of these that are right, or None."""
    raise NotImplementedError


# %%
check("04/pseudo_gain", pseudo_gain)

# %% [markdown]
# ## What to read next
# - Tarvainen, Valpola: *Mean teachers are better role models* (NeurIPS 2017). Six pages that are still the baseline.
# - Bai et al.: *Bidirectional Copy-Paste* (CVPR 2023), and then issue 26 of its repository.
# - Yang et al.: *Revisiting Weak-to-Strong Consistency* (UniMatch, CVPR 2023): strong views, well tuned.
# - Oliver et al.: *Realistic Evaluation of Deep Semi-Supervised Learning Algorithms* (NeurIPS 2018): every question
#   asked above, asked first.
