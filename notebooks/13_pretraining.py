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
# # 13 · Pre-training
#
# **After this chapter you can** invent a task that needs no labels and say what it teaches; look into a network that
# never saw a label; compare a prepared network fairly with one that starts from nothing; and tune a network of other
# images carefully on few of your own.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC), hippocampi (Decathlon Task04), chest X-rays (Montgomery, Shenzhen) | about 16 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that pretexts are learnt quickly and teach what they ask for,
# and that a few minutes of them on a hundred patients are not what a week on a million images is.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np  # noqa: F401, for the exercises
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, plots, pooled, pretraining_figures, teaching, widgets
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.image_pool import origin, packed
from medcook.pretraining import FromScratch, info_nce
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.pretraining import _dino, barlow_swin, bpd_finetune, chexworld, gl_contrast, lvm_med, mis_fm, voco
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# Labels are dear, images are not. A **pretext** is a question about an image whose answer is known without anybody
# drawing: which two views show the same slice? what was behind the grey squares? how much of another slice was mixed
# in? Who can answer has learnt something of anatomy, we hope; then a few labels have to be enough.

# %% tags=["cover"]
study = find_recipe("gl-contrast")
method, task, budget, seed = study.run(profile, "gl-contrast", 0)
task = replace(task, evaluation="val")  # the chapter looks at validation patients; the test set is the recipes'
pool, shown = task.samples("unlabelled"), task.samples("val")
number = int((shown.labels > 0).flatten(1).sum(1).argmax())
image, partner = shown.images[number], shown.images[(number + len(shown) // 2) % len(shown)]
torch.manual_seed(0)
views = [method.view(image[None])[0, 0].numpy() for _ in range(2)]
seen, mask = pretraining_figures.hidden(image[0], 0.5, image.shape[1] // 8, torch.Generator().manual_seed(0))
levels = mis_fm.strengths(image.shape[1:], 4)
fused = mis_fm.fuse(partner[None], image[None], levels[None], 4)[0, 0]
pretraining_figures.puzzles_figure(
    {
        "Which slices\nare the same?": {"one view": views[0], "another": views[1], "a stranger": partner[0].numpy()},
        "What is\nhidden?": {"shown": seen.numpy(), "asked for": image[0].numpy()},
        "How much of\nanother slice?": {"shown": fused.numpy(), "asked for": levels.numpy()},
    },
    task.data.manifest,
)

# %% [markdown]
# ## What does a network know that never saw a label?
# Slices of validation patients, and for each the slices of other patients that a network finds most like it: one with
# random weights, and one that has learnt by contrast which slices belong to the same part of a heart.

# %%
alone = replace(method, share=1.0)
prepared = fit(alone, task, replace(budget, steps=alone.first(budget.steps) // 2), seed)
random_net = prepared.method.build(1, task.classes, 2)["model"]
networks = {"random weights": random_net, "after the pretext": prepared.nets["model"]}
vectors = {name: pretraining_figures.embedded(net, shown.images) for name, net in networks.items()}
pretraining_figures.alike_figure(vectors, shown.images, shown.case_of, number, task.data.manifest)

# %% [markdown]
# Where in its volume does the slice lie that is most alike? By chance it is a third of the volume away.

# %%
place = origin(packed(0, shown.case_of)).place
for name, found in vectors.items():
    away = pretraining_figures.misplaced(found, shown.case_of, place)
    print(f"{name}: the slice most alike lies {away:.2f} of a volume away")

# %% [markdown]
# A random network is nearly as good (0.12 and 0.09): brightness and outlines already say where a slice lies, and a few
# minutes of contrast add little to that. **Before a representation is praised, look at a random one.**
#
# ## The mechanisms
# **Contrast, with what is known of volumes.** Two views of a slice belong together, all other slices are strangers: so
# says SimCLR. But the slice of the same place in another heart is no stranger. *Global and local contrast* (Chaitanya
# et al. 2020) cuts volumes into parts and takes slices of the same part for partners; then regions within a slice are
# told apart, which is what a segmentation needs.

# %%
teaching.show_code(gl_contrast.partners, gl_contrast.contrast)

# %% tags=["nbval-check-output", "mechanism"]
part, volume = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
positive, negative = gl_contrast.partners(part, volume)
print("partners of the first slice's first view:", positive[0].int().tolist(), "strangers:", negative[0].int().tolist())
corner = torch.eye(3)[[0, 0, 1, 0, 0, 1]]
print(f"loss where partners are alike: {gl_contrast.contrast(corner, positive, negative):.3f}")
print(f"SimCLR's of the same vectors:  {info_nce(*corner.chunk(2)):.3f}")

# %% [markdown]
# **Segment without labels.** *Volume Fusion* (Wang et al. 2023) mixes boxes of one volume into another, each with one
# of K strengths, and asks for the strength of every voxel: a segmentation, so that the decoder learns, too.

# %%
teaching.show_code(mis_fm.strengths, mis_fm.fuse, mis_fm.VolumeFusion.pretext)

# %% tags=["nbval-check-output", "mechanism"]
front, back = torch.full((1, 1, 1, 5), 8.0), torch.zeros(1, 1, 1, 5)
mixed = mis_fm.fuse(front, back, torch.arange(5)[None, None], 4)
print("strengths 0 to 4 of 4:", [round(value, 3) for value in mixed.flatten().tolist()])

# %% [markdown]
# **Where does it come from?** *VoCo* (Wu et al. 2024) cuts a volume into base crops and asks which of them a random
# crop overlaps, and how much, by how alike their vectors are.

# %%
teaching.show_code(voco.overlaps, voco.position_loss)

# %% tags=["nbval-check-output", "mechanism"]
size = (2, 12, 12)
share = voco.overlaps(torch.tensor([[0, 2, 4]]), size)
print("overlaps with 3 x 3 base crops:", [round(value, 3) for value in share.flatten().tolist()])
half = torch.full_like(share, 0.5)
for name, guess in (("right", share), ("nowhere", 0 * half), ("everywhere", half)):
    print(f"loss of saying {name}: {abs(voco.position_loss(guess[None], share[None])):.3f}")

# %% [markdown]
# **Know an image by its neighbours.** *LVM-Med* (Nguyen et al. 2023) takes two views of a batch for two graphs and lets
# a solver match them: images have to be alike, and so do the differences between them. A matching has no gradient; it
# is estimated from a second solution, of affinities that were pushed away from the wrong pairs.

# %%
teaching.show_code(lvm_med.best_matching, lvm_med.edge_affinity, lvm_med.MatchingLoss)

# %% tags=["nbval-check-output", "mechanism"]
affinity = torch.tensor([[0.2, 0.9], [0.8, 0.3]]).flatten().diag().requires_grad_()
quiet = torch.zeros(1, 4, 4)
loss = lvm_med.MatchingLoss.apply(affinity, quiet, 10.0)
loss.backward()
print("matched:", lvm_med.best_matching(affinity.detach()[None])[0].int().tolist(), f"wrong entries: {loss.item():.3f}")
print("gradient of the affinities:", [round(value, 3) for value in affinity.grad.diagonal().tolist()])

# %% [markdown]
# **Predict in the space of features.** What was hidden need not be painted: *CheXWorld* (Yue et al. 2025) predicts what
# a slowly moving copy of the encoder sees there, in another part of the X-ray, and under another exposure. Whoever
# predicts in feature space could make everything the same and be right; that the copy is slow keeps that from
# happening, as it does in **DINO**, where a student says which prototypes a teacher sees.

# %%
teaching.show_code(chexworld.CheXWorld.surprise, _dino.distilled)

# %% tags=["nbval-check-output", "mechanism"]
centre = torch.zeros(3)
certain, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
for name, student in (("the same", certain), ("another", other), ("nothing in particular", torch.zeros(1, 3))):
    said = _dino.distilled([student, student], [certain, certain], centre)
    print(f"DINO's loss where the student says {name}: {said:.3f}")
codes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
print(f"Barlow Twins, independent entries: {barlow_swin.barlow_loss(codes, codes):.3f}")
print(f"Barlow Twins, copies of one entry: {barlow_swin.barlow_loss(codes[:, [0, 0]], codes[:, [0, 0]]):.3f}")

# %% [markdown]
# **Tune with care.** A prepared network can be spoilt in a few steps. *Progressive freezing* (Goedicke-Fritz et al.
# 2025) lets a new head learn first, then thaws the layers one after the other, deep ones at low rates.

# %%
teaching.show_code(bpd_finetune.SiteTuned.frozen, bpd_finetune.SiteTuned.rates)

# %% tags=["nbval-check-output", "mechanism"]
tuned = bpd_finetune.SiteTuned(start="random")
for step in (0, 150, 200, 250, 299):
    still = tuned.frozen(bpd_finetune.Moment(step, 300))
    rates = [f"{rate:.6f}" for rate in tuned.rates(bpd_finetune.Moment(300 + step, 600))[:5]]
    print(f"step {step:3} of 300, stages that learn: {4 - sum(still)}; rates of stages and head: {', '.join(rates)}")

# %% [markdown]
# ## What do labels still add?
# The same network, from scratch and after the pretext, trained on more and more labelled patients (one draw of these,
# validation patients). Both have as many steps with labels.

# %%
arms = {"from scratch": FromScratch(), "after the pretext": method}
few = (1, 3, 10)
runs = {name: {k: fit(arm, replace(task, labelled=k), budget, seed) for k in few} for name, arm in arms.items()}
scores = {
    name: {k: evaluate(one.predict, task.data, task.val_patients) for k, one in by_count.items()}
    for name, by_count in runs.items()
}
means = {name: {k: [summary(frame).loc["all", "dice"]] for k, frame in of.items()} for name, of in scores.items()}
pretraining_figures.labels_figure(means, task.dataset)

# %% [markdown]
# One run a point, and the points jump. The Dice of each structure with ten labelled patients says why:

# %%
pd.DataFrame({name: of[10].groupby("structure")["dice"].mean() for name, of in scores.items()}).round(2)

# %% [markdown]
# In short trainings from scratch a structure is found late, or not at all; that is what a pretext may save, and may
# spoil, and it has little to do with the number of labels.
#
# ## Successes and failures
# With a single labelled patient: first the case on which the network from scratch is worst, then the one that the
# pretext harms most.

# %%
both = pd.DataFrame({name: of[1].groupby("case_id")["dice"].mean() for name, of in scores.items()})
for case_id in (both["from scratch"].idxmin(), (both["after the pretext"] - both["from scratch"]).idxmin()):
    case = task.data.load(case_id)
    answers = {name: by_count[1].predict(case) for name, by_count in runs.items()}
    display(plots.compare_methods(case, answers, task.data.manifest))

# %%
plots.learning_curves({name: [of[1].history] for name, of in runs.items()}, title="one labelled patient, one draw")

# %% [markdown]
# ## Ablation: is it the place of the slice?
# SimCLR on the same slices knows nothing of places, and has no local loss. "Scratch, all steps" spends the time of the
# pretext on the labels: what else it could have bought.

# %%
display(teaching.evidence_table("gl-contrast"))
teaching.verdict_table("gl-contrast")

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three draws or folds, the last checkpoint.

# %%
ids = teaching.measured("13_pretraining")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter, and how many structures of how many it misses altogether.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# Volume Fusion's draws, structure by structure; and the AUC of each fold of Montgomery.

# %%
frame = evidence_frame("mis-fm", "full")
display(frame.pivot_table(index="arm", columns=["replicate", "structure"], values="dice").round(2))
by_fold = evidence_frame("bpd-finetune", "full").groupby("arm")
pd.DataFrame({arm: pooled.of_replicates(part, "auc") for arm, part in by_fold}).T.round(2)

# %% [markdown]
# A structure that is missed: is it lost, or not yet said? Of runs of the first draw, the share of each structure's
# voxels in the labelled volumes that the network finds, and that a linear classifier finds in its last features.

# %%
found = {}
for paper, arm in (("mis-fm", "from scratch"), ("mis-fm", "volume fusion"), ("med3d", "med3d")):
    how, where, steps, start = find_recipe(paper).run(profile, arm, 0)
    net = fit(how, where, steps, start).nets["average"]
    for value, shares in pretraining_figures.recalls(net, where.samples("labelled")).items():
        name = where.structures.get(value, "background")
        found[arm, name] = dict(zip(("network", "linear classifier"), shares, strict=True))
pd.DataFrame(found).T.round(2).unstack()

# %% [markdown]
# What MedImageInsight's embedding is used for besides: of the five known images that a search shows for an X-ray, the
# share of the same kind, and that with the same finding; and how often captions alone are right.

# %%
found = evidence_frame("medimageinsight", "full")
found["captions right"] = ((found["zero_shot"] > 0.5) == (found["outcome"] == 1)).astype(float)
found.groupby("arm")[["same_kind", "precision", "captions right"]].mean().round(3)

# %% [markdown]
# **How to read it.**
#
# - **No pretext beats the labels' own steps.** With one labelled heart, contrast by place is at 0.663, SimCLR at 0.629,
#   no pretext at 0.649; the same time spent on the labels gives 0.684. Whether contrast by place is better than SimCLR,
#   or than no pretext, is open: both intervals include zero.
# - **Graph matching is not told apart from no pretext.** It is at 0.784, no pretext at 0.777. Without its second order
#   it is at 0.642, an interval just above zero, and SimCLR is at 0.689: inconclusive. These differences are mostly one
#   draw's, in which a structure is hardly found: 40 of 360 are missed after SimCLR, 11 without second order, none by
#   the others.
# - **A prepared network can be worse, and its features need not be.** Volume Fusion is at 0.680, from scratch it is at
#   0.827; co-training on annotated CT (Med3D) is at 0.685. Nearly all of that is one draw of three, in which a
#   structure is not found at all. But in the features it is: a linear classifier finds it in the last ones, as the
#   table above says. The new head has not learnt to say it within these steps, at the rate that suits a network from
#   scratch. Strengths add nothing to cutting and pasting, nor do right annotations to mismatched ones. VoCo is at
#   0.797; with shuffled positions, which teach nothing about place, at 0.685 (one draw again, and the interval includes
#   zero).
# - **More images show no gain.** DINO on hearts, hippocampi, necks and X-rays is at 0.757, on hearts alone at 0.771,
#   which is not told apart; ImageNet's weights without any DINO are at 0.781. DINO on all hearts costs a CAFormer 0.039
#   (0.616, without it 0.655), on a tenth of them 0.019. A world model of X-rays is 0.007 ahead of a masked autoencoder;
#   that interval includes zero.
# - **Volumes add nothing to slices that shows.** Clustering slices and volumes together leaves a slice network at 0.591
#   on hippocampi, clustering slices alone at 0.610, no pretext at 0.484; one draw of three makes the difference, in
#   which both structures are lost from scratch. Barlow Twins cost a shallow Swin encoder 0.056 (0.522, without them
#   0.578), and the U-Net, with three times its weights, is at 0.777.
# - **In-domain is not always better.** Tuned on the few X-rays of Montgomery, a network straight from ImageNet has an
#   AUC of 0.89; with Shenzhen's X-rays in half of its steps, carefully thawed, it has 0.76, and with all layers at once
#   0.72. Both intervals include zero.
# - **Features of photographs segment lungs.** From four drawn X-rays, a decoder on SqueezeNet's frozen features is at
#   0.943, with low-rank updates at 0.945, tuned throughout at 0.944, and a U-Net from scratch at 0.938; the interval of
#   frozen features over the U-Net includes zero. Where a task is as easy as that, the start does not matter.
# - **More learners show no gain here.** Of four kinds of X-rays (hospital and finding), the nearest known one is of the
#   same kind for 0.691 in an embedding whose learners were added one by one, 0.725 with one learner, 0.705 in the
#   features of a classification network; the first is told apart from neither.
# - **Other images may help an embedding.** The nearest known X-rays of a hospital that it never saw tell tuberculosis
#   with an AUC of 0.81 after learning from X-rays, hearts, hippocampi and necks with captions, of 0.72 after X-rays
#   alone, and of 0.74 in ImageNet's features. All three folds agree, but with 110 patients both intervals include zero.
#   Captions that tell the finding alone do as well (0.82).
# - **Organs in CT show no gain on hippocampi.** With labels of three patients STU-Net is at 0.551 after seven organs of
#   heads and necks, from scratch at 0.566; with all labels at 0.595 and 0.602. In one draw of three, no arm finds one
#   of the two structures.
# - **Short trainings say little about long ones.** Whether a structure is found within some hundred steps decides more
#   here than what was learnt before. Who compares pretexts has to train to the end.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("13_pretraining"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Here a pretext has some hundred steps on about a hundred patients; there it has
# weeks on hundreds of thousands of images, and that is where it is said to work. Networks are narrow. **What is the
# same**: the mechanism, the steps with labels of all arms that are compared, and that no label of a scored patient is
# seen.
#
# **Four questions for a paper on pre-training.** Has the network from scratch as many steps with labels, and was it
# trained to its end? What would the time of the pretext have bought otherwise? Is the set that was learnt from before
# really without the patients that are scored? And does the gain last where there are more labels?
#
# ## Play with it
# Choose a slice, and see which slices of other patients each network finds like it (in a live notebook).

# %%
widgets.neighbour_explorer(vectors, shown.images, shown.case_of, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The loss of contrast, in one direction: vectors of one view look for their partners among those of the other.
# `np` is numpy.


# %% tags=["exercise", "exercise-contrast"]
def contrast(first, second, heat):
    """InfoNCE of two views (B, D): mean over b of -log(exp(s_bb / heat) / sum over j of exp(s_bj / heat)).

    s_bj is the cosine of first[b] and second[j].
    """
    raise NotImplementedError


# %%
check("13/contrast", contrast)

# %% [markdown]
# **2.** Volume Fusion: mix two images by strengths.


# %% tags=["exercise", "exercise-fused"]
def fused(front, back, levels, highest):
    """Two images (H, W) mixed by `levels` (H, W), 0 to `highest`: which share of each pixel is the front's."""
    raise NotImplementedError


# %%
check("13/fused", fused)

# %% [markdown]
# **3.** The answer to VoCo's question: by how much does a crop overlap others?


# %% tags=["exercise", "exercise-overlap"]
def overlap(corner, corners, side):
    """Which share of its area a square at `corner` (row, column) has in common with each of those at (N, 2)."""
    raise NotImplementedError


# %%
check("13/overlap", overlap)

# %% [markdown]
# ## What to read next
# - Chen et al.: *A simple framework for contrastive learning of visual representations* (ICML 2020).
# - Caron et al.: *Emerging properties in self-supervised vision transformers* (ICCV 2021).
# - Zhou et al.: *Models Genesis* (Medical Image Analysis 2021): one of the first for volumes.
# - Raghu et al.: *Transfusion: understanding transfer learning for medical imaging* (NeurIPS 2019): what ImageNet gives
#   to medical images, and what it does not.
