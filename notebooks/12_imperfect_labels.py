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
# # 12 · When labels are wrong, sparse or someone else's
#
# **After this chapter you can** make labels wrong in the ways people do and measure how much a network minds; learn
# from scribbles, and from label maps of patients whose images you do not have; tell a network that sees through
# mistakes from one that has learnt them by heart; and choose which pixels an expert should be asked about.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC), chest X-rays (Montgomery, Shenzhen), cells (BU-BIL) | about 12 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that networks forgive more than one would think, and that the
# kind of mistake matters more than how many pixels are wrong.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, imperfect, imperfect_figures, plots, teaching, widgets
from medcook.data import IGNORE
from medcook.evaluation import evaluate, summary
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.imperfect_labels import adele, ael_noisy_pseudo, citizen_science, ripu, scribble_aag, spatial_noise
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# One image, and five things that somebody may give you for it in place of a careful expert's label.

# %% tags=["cover"]
task = find_recipe("scribble-aag").run(profile, "scribbles alone", 0)[1]
scribbled, whole = task.samples("labelled"), replace(task, own="labels").samples("labelled")
number = imperfect_figures.fullest(whole.labels)
image, truth = whole.images[number, 0].numpy(), whole.labels[number].numpy()
rng = np.random.default_rng(4)
height, width = truth.shape
squares = [
    round(y * height) * width + round(x * width) for y, x in ((0.35, 0.45), (0.5, 0.35), (0.55, 0.6), (0.75, 0.5))
]
asked = np.where(ripu.window(torch.tensor([squares]), truth.shape, 4)[0], truth, IGNORE)
kinds = {
    "an expert's label": truth,
    "borders off by pixels": imperfect.noisy_borders(truth[None], 4, rng)[0],
    "regions mistaken": imperfect.noisy_regions(truth[None], task.classes, 0.15, 6, rng)[0],
    "scribbles": scribbled.labels[number].numpy(),
    "what was asked for": asked,
    "another patient's label": scribbled.raters[imperfect_figures.fullest(scribbled.raters[:, 0]), 0].numpy(),
}
imperfect_figures.kinds_figure(image, kinds, task.data.manifest)

# %% [markdown]
# Each asks for another remedy. Where mistakes are random from image to image, they average out; where all images share
# them, no method can know. Where labels are missing, what is missing must not be taken for background. Where labels
# are of other patients, they still say what a plausible answer looks like.
#
# ## How wrong may labels be?
# The book's U-Net learns from labels whose borders an annotator has moved: each structure of each patient grown or
# shrunk by up to so many pixels. It is scored on other patients, against the experts.

# %%
study = find_recipe("adele")
method, noisy, budget, seed = study.run(profile, "unet", 0)
amounts, given, learnt, fitted = (0.0, 2.0, 4.0, 8.0), [], [], {}
clean = replace(noisy, kind="none").samples("labelled")
for amount in amounts:
    dose = replace(noisy, kind="borders", amount=amount) if amount else replace(noisy, kind="none")
    fitted[amount] = fit(method, dose, budget, seed)
    labels = dose.samples("labelled").labels
    given.append(imperfect_figures.label_quality(labels.numpy(), clean.labels.numpy(), noisy.classes))
    learnt.append(summary(evaluate(fitted[amount].predict, noisy.data, noisy.val_patients)).loc["all", "dice"])
imperfect_figures.dose_figure(amounts, given, learnt, noisy.dataset)

# %% [markdown]
# Where the network is above its teacher, it has averaged mistakes away that go one way in one patient and the other
# way in the next. That is the first thing to know before a method against noise is praised: **how does plain training
# do?**
#
# ## The mechanisms
# **Learn from what is drawn, and from nothing else.** A scribble covers a percent of the pixels. The loss is a mean
# over those; all others are unknown, also those that augmentation moves in from outside the image. *Multi-scale
# adversarial attention gates* (Valvano et al. 2021) let features pass only where a gate sees a structure, and a
# discriminator, which knows true label maps of other patients, looks at these gates:

# %%
teaching.show_code(scribble_aag.gated, scribble_aag.ScribbleAAG.shown)

# %% tags=["nbval-check-output", "mechanism"]
features = torch.tensor([[[[2.0, 4.0, 6.0]]]])
attention = torch.tensor([0.9, 0.5, 0.0]).reshape(1, 1, 1, 3)  # the background's share
passed = scribble_aag.gated(features, torch.cat([attention, 1 - attention], dim=1))
print("features that pass:", [round(value, 3) for value in passed.flatten().tolist()])

# %% [markdown]
# **Doubt labels, and doubt neighbours together.** *Spatially correlated label errors* (Tadokoro et al. 2026): whether
# a pixel's label is wrong is a hidden variable. The network learns the label that is likely after that doubt, and the
# doubt of neighbours is correlated: one odd pixel is believed, a region that the network contradicts is given up.

# %%
teaching.show_code(spatial_noise.expected_labels, spatial_noise.tridiagonal)

# %% tags=["nbval-check-output", "mechanism"]
said = torch.tensor([[[1, 1, 0]]], dtype=torch.uint8)
doubt = torch.tensor([[[0.1, 0.6, 0.1]]])
print("likely to be class 1:", [round(v, 3) for v in spatial_noise.expected_labels(said, doubt, 2)[0, 1, 0].tolist()])
for name, field in (("one pixel", [0, 0, 1, 0, 0]), ("a region", [0, 1, 1, 1, 0])):
    doubts = torch.tensor(field).float().view(1, 1, 5)
    price = (doubts * spatial_noise.tridiagonal(doubts, 2, 0.75, 0.75)).sum() / doubts.sum()
    print(f"{name}: the prior's price of a doubted pixel is {price:.3f}")

# %% [markdown]
# **Stop before mistakes are learnt by heart.** A network fits what is right in its labels first and their mistakes
# later, some structures sooner than others. *ADELE* (Liu et al. 2022) follows, structure by structure, how well the
# output fits the labels. Where the curve flattens, it begins to correct the labels of this structure by what the
# network is sure of:

# %%
teaching.show_code(adele.has_flattened, adele.corrected)

# %% tags=["nbval-check-output", "mechanism"]
steps = np.arange(1, 13)
for name, pace in (("soon", 0.8), ("late", 9.0)):
    curve = 0.85 * (1 - np.exp(-steps / pace)) if pace > 1 else np.r_[0.1, 0.5, 0.8, np.full(9, 0.85)]
    flat = [bool(adele.has_flattened(curve[:step], fall=0.9)) for step in steps]
    print(f"{name}: flattened after {flat.index(True) + 1 if any(flat) else 'more than 12'} periods")
labels = torch.tensor([[[1, 1, 2, 0]]], dtype=torch.uint8)
sure = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.6, 0.0], [0.9, 0.1, 0.0], [0.0, 0.95, 0.05]]).T.reshape(1, 3, 1, 4)
print("given:    ", labels.flatten().tolist())
for begun in ([False, False, False], [False, True, False]):
    print("corrected:", adele.corrected(labels, sure, torch.tensor(begun), 0.7).flatten().tolist(), "begun", begun[1:])

# %% [markdown]
# **Ask where it matters.** An expert's time is short. *RIPU* (Xie et al. 2022) asks about small squares where the
# prediction is mixed (impurity) and unsure (entropy), so that borders come first, and never the middle of a structure:

# %%
teaching.show_code(ripu.region_impurity, ripu.region_uncertainty)

# %% tags=["nbval-check-output", "mechanism"]
odds = torch.tensor([[0.95, 0.9, 0.6, 0.45, 0.2, 0.05]]).repeat(3, 1)
maps = torch.stack([odds, 1 - odds])[None]
for name, measure in (("impurity", ripu.region_impurity), ("uncertainty", ripu.region_uncertainty)):
    print(f"{name:12}", [round(value, 3) for value in measure(maps, 1)[0, 1].tolist()])

# %% [markdown]
# **Merge a crowd.** Where several people drew, those who agree with the others count for more. With the merged masks
# *citizen science* (Syahmi et al. 2024) trains a generator that makes more images for more masks.

# %%
teaching.show_code(citizen_science.merged, citizen_science.agreement)

# %% tags=["nbval-check-output", "mechanism"]
crowd = torch.tensor([[[[0, 1, 1, 1, 0]], [[0, 1, 1, 0, 0]], [[1, 0, 0, 0, 1]]]], dtype=torch.uint8)
votes = citizen_science.one_hot(crowd, 2)
weights = citizen_science.agreement(votes, torch.ones(1, 3, 1, 5), votes.mean(1))
print("merged:", citizen_science.merged(crowd).flatten().tolist())
print("weights:", [round(value, 3) for value in weights[0].tolist()])

# %% [markdown]
# **No annotation at all.** Masks of other patients say what lungs look like, a cycle-consistent GAN translates images
# to masks of that look and back, and its masks are pseudo-labels. They are wrong in places, and so the Dice loss of
# Wang et al. (2021) weighs a pixel by how sure its labeller was:

# %%
teaching.show_code(ael_noisy_pseudo.certainty, ael_noisy_pseudo.weighted_dice)

# %% tags=["nbval-check-output", "mechanism"]
teller = torch.tensor([[0.95, 0.7, 0.5], [0.05, 0.3, 0.5]]).reshape(1, 2, 1, 3)
answer = torch.tensor([[2.0, 2.0, -2.0], [-2.0, -2.0, 2.0]]).reshape(1, 2, 1, 3)
sure_of = ael_noisy_pseudo.certainty(teller)
print("weights:", [round(value, 3) for value in sure_of.flatten().tolist()])
for name, weights in (("weighted", sure_of), ("all alike", torch.ones_like(sure_of))):
    said_so = 1 - teller.argmax(1)
    print(f"{name}: loss {ael_noisy_pseudo.weighted_dice(-answer, said_so, weights):.3f}")

# %% [markdown]
# ## Whom does it believe?
# Three networks on one fold: plain training on the labels with moved borders, ADELE on the same, and plain training on
# the experts' labels. Look at the **training images**, at the pixels whose label is wrong: does the network say what
# the expert would, or what it was told?

# %%
shown = {"plain training": "unet", "ADELE": "adele", "experts' labels": "clean labels"}
trained = {name: fit(*study.run(profile, arm, 0)) for name, arm in shown.items()}
some = torch.arange(0, len(clean), max(1, len(clean) // 200))
wrong = noisy.samples("labelled").labels
beliefs = imperfect_figures.beliefs_table(trained, clean.images[some], clean.labels[some], wrong[some])
imperfect_figures.beliefs_figure(beliefs, noisy.dataset)

# %%
beliefs.round(3)

# %%
plots.learning_curves({name: [one.history] for name, one in trained.items()}, title="one fold, one seed")

# %% [markdown]
# ## Scribbles against labels
# The same patient by three networks: from scribbles alone, from scribbles with gates that label maps of other patients
# shape, and from full labels.

# %%
sketch = find_recipe("scribble-aag")
named = {"scribbles alone": "scribbles alone", "with gates": "attention gates", "full labels": "full labels"}
drawn = {name: fit(*sketch.run(profile, arm, 0)) for name, arm in named.items()}
scored = {name: evaluate(one.predict, task.data, task.val_patients) for name, one in drawn.items()}
for name, frame in scored.items():
    line = summary(frame).loc["all"]
    print(f"{name:16}  Dice {line['dice']:.3f}, {line['missed']:.0f} missed, {line['false_alarms']:.0f} false alarms")

# %%
order = scored["scribbles alone"].groupby("case_id")["dice"].mean().sort_values()
worst = task.data.load(order.index[0])
plots.compare_methods(worst, {name: one.predict(worst) for name, one in drawn.items()}, task.data.manifest)

# %% [markdown]
# ## Best and worst of scribbles

# %%
plots.worst_cases(drawn["scribbles alone"], scored["scribbles alone"], count=3)

# %% [markdown]
# ## Ablation: is it the shape prior?
# Gates alone are a change of the network. So the ablation keeps them and takes away only what makes them a prior of
# shape: the discriminator then sees the prediction, and no gate.

# %%
display(teaching.evidence_table("scribble-aag"))
teaching.verdict_table("scribble-aag")

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three folds, the last checkpoint.

# %%
ids = teaching.measured("12_imperfect_labels")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# **How to read it.**
#
# - **Doubt pays where mistakes come in blobs.** With 30% of all pixels wrong, spatially correlated doubt brings lungs
#   from 0.906 to 0.953, where experts' labels give 0.963. To doubt each pixel on its own is worse than to believe them
#   all (0.829). The mistakes are of the kind that the method assumes; whether people's are is another question.
# - **Plain training already averages much of the noise away**, as the dose shows: with borders moved it is at 0.803,
#   with experts' labels at 0.852. ADELE is below it (0.759): agreement across scales costs more than it brings in so
#   few steps, and the correction shows no gain (0.775 without it). Here a slice is seen about four times, and little is
#   learnt by heart: there is hardly anything to stop before.
# - **Scribbles get far**: 0.780 from about a percent of the pixels, where full labels of the same images give 0.816.
#   Neither the gates nor the prior of shape add anything that three folds can tell.
# - **Where to ask hardly mattered**: with labels for 2.2% of the other hospital's pixels, chosen by impurity and
#   uncertainty or at random, the network is at 0.947, with all labels at 0.952. Where so little is left to gain, no
#   choice can show its worth.
# - **Knowing shapes goes far without any label**: images without annotation and masks of other patients give lungs at
#   0.817, where a plain cycle GAN ends at 0.296 and human labels give 0.956. Weights against noise, and a second round,
#   add nothing to it (0.815).
# - **Six images are few**, and 25 images to score, too: pix2pix adds 0.014, bent copies 0.006, and both intervals
#   include zero. Labels merged from the crowd (0.675) are not told apart from the expert's (0.662).
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("12_imperfect_labels"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Mistakes are simulated, so that the truth is known; only the scribbles of the
# hearts and the annotators of the cells are people's. Networks are narrow and trained for a minute, where memorisation
# takes long trainings. **What is the same**: the mechanism, the steps, and three folds.
#
# **Four questions for a paper on imperfect labels.** How does plain training do on the same labels, with the same
# augmentation? Were thresholds and the moment to stop chosen on clean validation labels? Is the simulated noise the
# kind that the method assumes? And is anything left of the gain at the noise that people really make?
#
# ## Play with it
# Choose a kind of mistake and how much of it, and see what becomes of a label (in a live notebook).

# %%
widgets.noise_explorer(image, truth, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The loss of a scribble. `probabilities` is (classes, H, W), `scribble` (H, W) has class numbers, and 255 where
# nobody drew. `np` is numpy.


# %% tags=["exercise", "exercise-partial"]
def partial(probabilities, scribble):
    """Cross-entropy of (classes, H, W) and a scribble (H, W): the mean over drawn pixels, 0 if none; 255 is undrawn."""
    raise NotImplementedError


# %%
check("12/partial", partial)

# %% [markdown]
# **2.** Merge the masks of a crowd, some of whom are trusted more than others.


# %% tags=["exercise", "exercise-merged"]
def merged(masks, weights):
    """One mask (H, W) bool of (annotators, H, W): True where those who drew have more than half of all weight."""
    raise NotImplementedError


# %%
check("12/merged", merged)

# %% [markdown]
# **3.** Where is a label map mixed? At the border of the image, count the pixels that are there.


# %% tags=["exercise", "exercise-impurity"]
def impurity(labels, classes, radius):
    """(H, W): entropy (natural logarithm) of the classes within `radius` rows and columns of each pixel of (H, W)."""
    raise NotImplementedError


# %%
check("12/impurity", impurity)

# %% [markdown]
# ## What to read next
# - Tajbakhsh et al.: *Embracing imperfect datasets* (Medical Image Analysis 2020), a map of the field.
# - Warfield, Zou and Wells: *STAPLE* (IEEE TMI 2004): how good is each annotator, and what is the truth, at once.
# - Karimi, Dou, Warfield and Gholipour: *Deep learning with noisy labels* (Medical Image Analysis 2020).
# - Lin, Dai, Jia, He and Sun: *ScribbleSup* (CVPR 2016), where learning from scribbles began.
