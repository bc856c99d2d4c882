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
# # 14 · Another hospital, another scanner
#
# **After this chapter you can** say by how much a network fails where images look different; try what is cheap before
# what is clever; adapt a network without labels, and without the images that it was trained on; and measure how far
# apart two sets of images are before anything is trained.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC) under simulated scanners, chest X-rays of two hospitals | about 12 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that a change of contrast which no reader would mind ruins a
# network, that two real hospitals may hardly differ, and that much of the way back needs no labels.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from scipy import linalg  # noqa: F401, for the exercises

from medcook import comparison, domain_figures, plots, teaching, widgets
from medcook.domains import LOOKS, PLAIN, DomainTask
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.domain_shift import ct_mr_prior, frd, graphecho, mrsegmentator, sfda
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# One slice as it is, and as three simulated scanners show it. Below: how bright the pixels of each structure are. The
# anatomy and the labels are the same.

# %% tags=["cover"]
study = find_recipe("sfda")
method, task, budget, seed = study.run(profile, "source only", 0)
plain = task.samples("labelled")
number = int(torch.stack([(plain.labels == value).flatten(1).sum(1) > 0 for value in task.structures]).sum(0).argmax())
image, label = plain.images[number, 0], plain.labels[number].numpy()
domain_figures.looks_figure(image, label, LOOKS, task.data.manifest)

# %% [markdown]
# A network learns that blood is bright. Where blood is not, it is lost; nobody told it what a heart is.
#
# **Source** is what has labels; **target** is where the network shall work, without any. Real scanners differ in more
# ways at once than these; but of these we know the truth.
#
# ## What does a shift cost?
# Networks that learnt from one look, and one that learnt from all, each scored on other patients under every look.

# %%
many = find_recipe("mrsegmentator")
plain_net, several, plan, start = many.run(profile, "one sequence", 0)
specialists = {look: fit(plain_net, replace(several, looks=(look,)), plan, start) for look in (PLAIN, "washed out")}
networks = {**specialists, "all looks": fit(*many.run(profile, "all drawn by hand", 0))}
table = domain_figures.across_looks(networks, list(LOOKS), several.val_patients)
domain_figures.matrix_figure(table, several.dataset)

# %% [markdown]
# Away from its own look a network mostly fails, though not both ways: what learnt from washed-out images does as well
# on images as they are (0.75) as at home (0.74). The network of all looks manages everywhere, and pays 0.07 and 0.09
# for it where these are at home: there are as many patients, but fewer in each look. **Variety in training is the first
# remedy.** The rest of the chapter is for those who cannot have it, or have it without labels.
#
# ## Cheap things first
# Before anything is learnt anew: give each target image the brightness that source images have (the order of its pixels
# stays). Or normalise each batch by its own statistics, in place of those that the network remembers from the source;
# whatever is adapted below does that as well. One fold, the patients under `washed out`:

# %%
source_only = fit(method, task, budget, seed)
reference = np.sort(plain.images.flatten().numpy()[:: max(1, plain.images.numel() // 200_000)])
oracle = fit(method, replace(task, known=None, sides="target"), budget, seed)
arms = {"SFDA": "source-free", "SFDA, source kept": "with the source"}
adapted = {name: fit(*study.run(profile, arm, 0)) for name, arm in arms.items()}


def matching(case):
    """The source's network on a case whose brightness was made the source's."""
    seen = domain_figures.matched(task.preparation.images(case), reference)
    return domain_figures.with_images(source_only, case, seen)


predictors = {
    "nothing": source_only.predict,
    "matched brightness": matching,
    **{name: one.predict for name, one in adapted.items()},
    "all target labels": oracle.predict,
}
scores = {name: evaluate(predict, task.data, task.val_patients) for name, predict in predictors.items()}
domain_figures.remedies_figure(scores, task.dataset)

# %% [markdown]
# Matched brightness makes it worse here, 0.39, without it 0.49: this look is blurred, shaded and noisy as well, and
# none of that goes away. Up to 0.69 could be had, with all target labels.
#
# ## The mechanisms
# **Adapt without the source.** Patients' images may not leave a hospital; a network may. *Source-free adaptation*
# (Bateson et al.) makes it sure of what it says in the target, by entropy. That alone has an easy way out: say
# "background" everywhere, and be sure. So the share of each structure is held to what anatomy expects:

# %%
teaching.show_code(sfda.weighted_entropy, sfda.divergence, sfda.SourceFree.adaptation)

# %% tags=["nbval-check-output", "mechanism"]
sure = torch.tensor([[0.99, 0.99, 0.01, 0.99], [0.01, 0.01, 0.99, 0.01]]).reshape(1, 2, 2, 2)
unsure, empty = torch.full((1, 2, 2, 2), 0.5), torch.tensor([0.999, 0.001]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
even, prior = torch.tensor([0.5, 0.5]), torch.tensor([[0.75, 0.25]])
for name, said in (("sure", sure), ("unsure", unsure), ("sure of nothing", empty)):
    entropy, kl = sfda.weighted_entropy(said, even), sfda.divergence(sfda.shares(said), prior)
    print(f"{name:16} entropy {entropy:.3f}, divergence from the prior {kl:.3f}")

# %% [markdown]
# **One network for all, and a person who corrects.** *MRSegmentator* (Häntze et al. 2024) learnt from CT, for which
# there were labels. A network labels the scans of the other sequences, an expert looks at each label, and draws only
# those that he does not accept; so the network gets better and he draws less.

# %%
teaching.show_code(mrsegmentator.InTheLoop.annotate, mrsegmentator.structure_dice, mrsegmentator.corrected)

# %% tags=["nbval-check-output", "mechanism"]
proposed = torch.tensor([[[1, 1, 0, 2, 2, 0]]])
expert = torch.tensor([[[1, 1, 1, 0, 2, 2]]])
overlaps, present = mrsegmentator.structure_dice(proposed, expert, 3)
print("Dice of two structures:", [round(value, 3) for value in overlaps[0].tolist()])
print("what the expert leaves:", mrsegmentator.corrected(proposed, expert, overlaps < 0.7).flatten().tolist())
annotations = mrsegmentator.Annotations(slots=4, structures=2)
annotations.note(torch.tensor([3]), present, overlaps < 0.7)
print(f"share of structures drawn by hand: {annotations.share():.3f}")

# %% [markdown]
# **Translate, and keep the labels.** With labels of very few target patients, *cross-modality priors* (Jiang et al.
# 2019) show the many labelled source images as the target's scanner would, by a cycle-consistent GAN. So that
# structures stay where their labels say, the segmentation of the translated image trains the translator, too:

# %%
teaching.show_code(ct_mr_prior.CrossModality.training_step, ct_mr_prior.CrossModality.play)

# %% tags=["nbval-check-output", "mechanism"]
segmenter, made = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [-2.0]], requires_grad=True)
torch.nn.init.constant_(segmenter.weight, 3.0)
ct_mr_prior.frozen(segmenter, made).sum().backward()
print("what moves the translator:", made.grad.flatten().tolist(), "and the segmenter:", segmenter.weight.grad)
bright, dark = torch.full((50,), 1.0), torch.full((50,), -1.0)
for name, other in (("itself", bright), ("another", dark)):
    shares = ct_mr_prior.histogram(bright), ct_mr_prior.histogram(other)
    print(f"divergence of a brightness from {name}: {ct_mr_prior.divergence(*shares):.3f}")

# %% [markdown]
# **Match parts, and the beat.** *GraphEcho* (Yang et al. 2023) samples pixels of each structure as nodes, in the source
# by its labels, in the target by the network's own, and matches the two graphs: partners shall be of the same class.
# A second graph follows the heart through a beat. Here the beat is simulated, from one image each.

# %%
teaching.show_code(graphecho.sinkhorn, graphecho.matching_loss, graphecho.same_beat)

# %% tags=["nbval-check-output", "mechanism"]
alike = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
partners = graphecho.sinkhorn(alike)
print("matching:", [[round(value, 3) for value in row] for row in partners.tolist()])
for name, same in (("right", [[1, 0, 0], [0, 1, 0]]), ("wrong", [[0, 1, 0], [1, 0, 0]])):
    loss = graphecho.matching_loss(partners, torch.tensor(same) > 0)
    print(f"loss where the partners' classes are {name}: {loss:.3f}")

# %% [markdown]
# **Measure how far apart.** Before a network fails, the images can tell that they are others. The Fréchet distance
# compares means and covariances of features; FID takes those of a network that knows photographs, the *Fréchet radiomic
# distance* (Konz et al.) takes grey values and textures, which were defined for medical images, each in units of its
# standard deviation.

# %%
teaching.show_code(frd.frechet, frd.reference_of, frd.Reference)

# %% tags=["nbval-check-output", "mechanism"]
rng = np.random.default_rng(0)
cloud = rng.standard_normal((500, 3))
cloud = (cloud - cloud.mean(0)) / cloud.std(0, ddof=1)
for name, other in (("itself", cloud), ("moved by 2", cloud + [2, 0, 0]), ("twice as wide", 2 * cloud)):
    print(f"squared distance from a set {name}: {abs(frd.frechet(cloud, other)):.3f}")
known = frd.reference_of(cloud * [1, 10, 100])
print("scores:", [round(score, 3) for score in known.scores(np.array([[3.0, 0, 0], [0, 30, 0], [0, 0, 300]])).tolist()])

# %% [markdown]
# How many images does it take? Distances between two hospitals, by the size of the sets (bands: draws).

# %%
apart = find_recipe("frd")
here = apart.run(profile, "radiomics", 0)[1]
near = here.samples("labelled").images
others = [case for case in here.cases("val") if case.attributes["site"] != here.keep[0][1]]
far = torch.cat([here.preparation.images(case) for case in others])
count = min(len(near), len(far), 48)
sizes = [count // 4, count // 2, count]


def curve(describer):
    """Squared distances (draws, sizes) in the features of one method."""
    sets = [describer.describe(images[:: max(1, len(images) // count)][:count]) for images in (near, far)]
    return domain_figures.by_size(*sets, lambda a, b: np.exp(2 * frd.frd(a, b, describer.standardised)), sizes, draws=8)


rivals = ("radiomics", "ImageNet features" if profile == "full" else "random features")
curves = {name: (sizes, curve(apart.method(profile, name))) for name in rivals}
domain_figures.distance_figure(curves, here.dataset)

# %% [markdown]
# A distance that falls as sets grow was too large before: covariances of few images in many dimensions are noise.
#
# ## Successes and failures
# The same patients by the source's network, after adaptation, and by a network that had the target's labels. First the
# case on which the source's network is worst, then the one on which adaptation does most harm.

# %%
both = pd.DataFrame({name: scores[name].groupby("case_id")["dice"].mean() for name in ("nothing", "SFDA")})
for case_id in (both["nothing"].idxmin(), (both["SFDA"] - both["nothing"]).idxmin()):
    case = task.data.load(case_id)
    chosen = ("nothing", "SFDA", "all target labels")
    display(plots.compare_methods(case, {name: predictors[name](case) for name in chosen}, task.data.manifest))

# %%
plots.learning_curves({name: [one.history] for name, one in adapted.items()}, title="one fold, one seed")

# %% [markdown]
# ## Two real hospitals
# Chest X-rays of Montgomery and Shenzhen: a network that learnt at one, scored at the other, against one that learnt
# there.

# %%
real = (
    DomainTask("embedded", source="north", target="south") if profile == "quick" else DomainTask("chest_xray", fold=0)
)
learners = {
    f"learnt at {real.source}": fit(method, real, budget, seed),
    f"learnt at {real.target}": fit(method, replace(real, known=None, sides="target"), budget, seed),
}
for name, one in learners.items():
    line = summary(evaluate(one.predict, real.data, real.val_patients)).loc["all"]
    print(f"{name}, scored at {real.target}: Dice {line['dice']:.3f} [{line['low']:.3f}, {line['high']:.3f}]")

# %% [markdown]
# ## Ablation: what holds the adaptation?
# Entropy alone can be had by saying nothing but background. So the ablation takes the prior of class ratios away.

# %%
display(teaching.evidence_table("sfda"))
teaching.verdict_table("sfda")

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three folds, the last checkpoint.

# %%
ids = teaching.measured("14_domain_shift")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# What the recipes measured besides: Dice of MRSegmentator's arms by structure and look, with the share of structures
# that the expert drew; and how often FRD's score raises an alarm, for X-rays as they are and slightly corrupted.

# %%
frame = evidence_frame("mrsegmentator", "full")
frame[["structure", "look"]] = frame["structure"].str.split(", ", expand=True)
for column in ("look", "structure"):
    display(frame.pivot_table(index="arm", columns=column, values="dice").round(3))
alarms = evidence_frame("frd", "full")
display(frame.groupby("arm")[["dice", "drawn"]].mean().round(3))
alarms["hospital"] = np.where(alarms["outcome"] == 0, "own", "other")
alarms.groupby(["arm", "hospital"])[["alarm", "noisy", "blurred", "shaded"]].mean().round(3)

# %% [markdown]
# **How to read it.**
#
# - **Most of the way back needs no source.** Under `washed out` the source's network is at 0.326 (three folds, very
#   different from each other), adapted without the source at 0.579, with the source at hand at 0.635. Without the prior
#   it is at 0.580, so the prior is not what helps; it may be that batches are normalised by their own statistics, as in
#   every adapted arm here. The source's absence costs 0.055, more than the 0.03 that we would have called comparable.
# - **Graphs add little to a judge.** GraphEcho is at 0.641, adversarial alignment alone, which normalises each scanner
#   for itself as well, at 0.630, and without matching it is at 0.639. Both intervals include zero. A beat that is made
#   from one image cannot say what a heart's own motion would.
# - **Radiomics tell hospitals apart**: AUC 0.998, where features of an ImageNet network have 0.827. That each feature
#   is measured in its own standard deviation adds 0.014. A score above the usual raises an alarm for 4% of the own
#   hospital's intact X-rays and for all of the other's; with ImageNet features, for 29% of these. Filters add nothing
#   to this, but notice blur: 1.00 of slightly blurred ones raise an alarm, 0.21 without.
# - **Where a loop has a person in it, it works**: one network of four sequences, whose labels a network proposes and an
#   expert corrects, is at 0.540 over all of them, without corrections at 0.225, and a network of one sequence at 0.386
#   (0.837 on its own, 0.113 on a negative). With all labels drawn by hand it is 0.696. The expert drew 78% of the
#   structures: a network that learnt for a minute is a poor annotator, and the right ventricle never recovers (0.207).
# - **Translated images must keep their structures**: the loss that sees to it is worth 0.054. But where two patients of
#   the target have labels, it is open whether translated images are better than plain augmentation of these two (both
#   0.668; a fold each above, below and equal).
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("14_domain_shift"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Scanners are simulated, on hearts that one hospital scanned: anatomy, resolution and
# who was scanned are the same on both sides, as they never are. Networks are narrow and learn for a minute. **What is
# the same**: the mechanism, the steps of all arms, and that nobody saw a label of the target unless it is said.
#
# **Four questions for a paper on domain adaptation.** What do matched brightness, batch statistics and plain
# augmentation bring on the same data? Were steps and weights chosen on target labels? Is the gain there in every
# direction, and on the source as well? And does the shift change who was scanned, or only how?
#
# ## Play with it
# Build a scanner and watch a network that never saw it (in a live notebook). Contrast 1 is the image as it is, -1 its
# negative.

# %%
widgets.scanner_explorer(source_only, image, label, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** How far are an image's class ratios from a prior? `np` is numpy.


# %% tags=["exercise", "exercise-ratio"]
def ratio(probabilities, prior):
    """Kullback-Leibler divergence (natural logarithm) of the mean class ratios of (classes, H, W) from a prior."""
    raise NotImplementedError


# %%
check("14/ratio", ratio)

# %% [markdown]
# **2.** The Fréchet distance of two sets of features. `linalg.sqrtm` is scipy's root of a matrix.


# %% tags=["exercise", "exercise-frechet"]
def frechet(a, b):
    """Fréchet distance, squared, between sets of features (images, features), each taken for a Gaussian."""
    raise NotImplementedError


# %%
check("14/frechet", frechet)

# %% [markdown]
# **3.** The simplest adaptation: give an image the brightness of another.


# %% tags=["exercise", "exercise-matched"]
def matched(image, reference):
    """An image (H, W) with the brightness of `reference` (any number of values); the order of its pixels stays."""
    raise NotImplementedError


# %%
check("14/matched", matched)

# %% [markdown]
# ## What to read next
# - Guan and Liu: *Domain adaptation for medical image analysis: a survey* (IEEE TBME 2022).
# - Tsai et al.: *Learning to adapt structured output space for semantic segmentation* (CVPR 2018).
# - Wang et al.: *Tent: fully test-time adaptation by entropy minimization* (ICLR 2021), where statistics adapt first.
# - Billot et al.: *SynthSeg* (Medical Image Analysis 2023): train on every contrast that can be imagined.
