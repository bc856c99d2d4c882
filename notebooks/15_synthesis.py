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
# # 15 · Synthesis
#
# **After this chapter you can** write a diffusion model in forty lines and say what each of its choices does; make
# images from masks, and test whether they are worth anything; take the bones off an X-ray, and know how wrong that is;
# and read a paper on synthetic data with the right questions.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC), X-rays that are projected from head-and-neck CT (OpenKBP) | about 5 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that what is told to a generator comes out well, that what is
# not told is blurred or invented, and that made images rarely teach a segmenter what a few real ones did not.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np  # noqa: F401, for the exercises
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, synthesis_figures, teaching, widgets
from medcook.evaluation import evaluate_many
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.projections import suppression_rows
from medcook.recipes import find_recipe
from medcook.recipes.synthesis import _diffusion, _painting, bs_ldm, gl_lcm, gms, lefusion, medsegfactory, seg2med
from medcook.synthesis_figures import Shown
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# An image drowns in noise, a little more at every step, until nothing is left. A network learns to see the image in
# the noise. Then it is given nothing but noise, and sees an image in that: a new one. Here it is also told where the
# structures of a heart are, so that what it makes has labels from the start.

# %% tags=["cover"]
study = find_recipe("seg2med")
method, task, budget, seed = study.run(profile, "made", 0)
task = replace(task, evaluation="val")  # the chapter looks at validation patients; the test set is the recipes'
made = fit(method, task, budget, seed)
diffusion, sampler, shown = seg2med.DIFFUSION, made.nets["sampler"].eval(), task.samples("val")
number = int((shown.labels > 0).flatten(1).sum(1).argmax())
image, label = shown.images[[number]], shown.labels[[number]]
maps = method.maps(image, label, task.classes)


def told(noisy, t):
    return sampler(noisy, t, maps=maps.expand(len(noisy), -1, -1, -1))


drowned = synthesis_figures.drowned(diffusion, image, (0, 200, 400, 600, 800, 999))
start = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
way = synthesis_figures.way_back(diffusion, told, start, 20)
times = [t for number, t in enumerate(way) if number in (0, 4, 8, 12, 16, 19)]
synthesis_figures.gallery(
    {
        "A heart drowns": {f"t = {t}": Shown(noisy[0, 0].numpy(), limits=(-2, 3)) for t, noisy in drowned.items()},
        "What is seen in\nanother noise,\ntold the masks": {
            f"t = {t}": Shown(way[t][0, 0].numpy(), limits=(-2, 3)) for t in times
        },
    },
    task.data.manifest,
)

# %% [markdown]
# ## The mechanisms
# **Diffusion** (Ho et al. 2020). Noising has a closed form, so a network is trained at any time t at once; sampling
# walks back in a few steps, and at each the network says what the image is. That is all of it:

# %%
teaching.show_code(_diffusion.Diffusion.noised, _diffusion.Diffusion.loss, _diffusion.Diffusion.sample)

# %% tags=["nbval-check-output", "mechanism"]
signal = _diffusion.Diffusion().signal
for t in (0, 250, 500, 750, 999):
    print(f"t = {t:3}: {signal[t]:.3f} of the variance is image")
x, e = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), -1.0)
for target in ("noise", "image", "velocity"):
    wanted = _diffusion.Diffusion(target=target).wanted(x, e, torch.tensor([500]))
    print(f"a network that is asked for the {target:8} should say {wanted.mean():+.3f}")

# %% [markdown]
# **Lesions and nothing else.** *LeFusion* (Zhang et al. 2025) does not make images, it makes lesions: the loss looks
# only inside their masks, and on the way back everything else is the real image, noised to the same time.

# %%
teaching.show_code(lefusion.focused_loss, lefusion.fill, lefusion.histograms)

# %% tags=["nbval-check-output", "mechanism"]
wall = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
hole = torch.zeros(1, 1, 8, 8)
hole[..., 2:4, 2:4] = 1
torch.manual_seed(0)
filled = lefusion.fill(lefusion.DIFFUSION, lambda noisy, t: torch.full_like(noisy, 3.0), wall, hole, 5)
print("outside the mask the image is real:", bool((filled[hole == 0] == wall[hole == 0]).all()))
print("inside is what the network sees:   ", filled[hole == 1].tolist())
texture = lefusion.histograms(filled, hole)[0, 0]
print("its histogram tells how bright:     bin", int(texture.argmax()), "of", len(texture))

# %% [markdown]
# **Image and mask at once.** *MedSegFactory* (Mao et al. 2025) has a stream for the image and one for the mask, and
# each looks at the other in every step, so that they fit together.

# %%
teaching.show_code(medsegfactory.JointCrossAttention)

# %% [markdown]
# **A label map is a picture, too.** *GMS* (Huo et al. 2025) has one autoencoder for images and for label maps, each
# structure in a colour of its own. It stays as it is, and a small network learns to get from an image's latents to
# those of its labels; the decoder draws the rest.

# %%
teaching.show_code(_painting.painted, _painting.shares, gms.GMS.supervised)

# %% tags=["nbval-check-output", "mechanism"]
colours = _painting.painted(torch.tensor([[[0, 1, 2, 3]]]), 4)
print("colours of background and three structures:", colours[0, :, 0].int().T.tolist())
blurred = colours[..., :2].mean(-1, keepdim=True)
print("half background, half the first:           ", _painting.shares(blurred)[0, :, 0, 0].tolist())

# %% [markdown]
# **Without bones.** *BS-LDM* (Sun et al. 2025) makes the image that an X-ray would be without its bones, from the X-ray
# and noise. A constant that is added to all of the noise (*offset noise*) teaches it the overall brightness, which
# ordinary noise hardly hides.

# %%
teaching.show_code(bs_ldm.offset_noise, bs_ldm.limited)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
blank = torch.zeros(2000, 1, 16, 16)
for strength in (0.0, 0.1):
    noise = bs_ldm.offset_noise(blank, strength)
    mean = noise.mean((1, 2, 3))
    print(f"offset {strength}: deviation of a pixel {noise.std():.2f}, of an image's mean {mean.std():.2f}")

# %% [markdown]
# **In one step.** *GL-LCM* (Sun et al. 2025) trains a network to see the same image at every time of a way back. Then
# the way need not be walked: one or a few steps are enough.

# %%
teaching.show_code(gl_lcm.boundary, gl_lcm.consistent)

# %% tags=["nbval-check-output", "mechanism"]
noisy, guess = torch.full((1, 1, 1, 1), 5.0), torch.zeros(1, 1, 1, 1)
for t in (0, 1, 20, 999):
    print(f"t = {t:3}: of the noisy image is kept {gl_lcm.consistent(guess, noisy, torch.tensor([t])).item() / 5:.3f}")

# %% [markdown]
# ## Is it worth anything?
# A made image looks right quickly. Whether it is, a **segmenter that has only seen real images** can tell: does it find
# the structures that the image was made from? First the patients whose masks it finds best and worst.

# %%
rows = evaluate_many({"made": made}, task.data, task.val_patients, study.score)["made"]
by_case = rows.groupby("case_id")["dice"].mean().sort_values()
pictures = {}
for case_id in (by_case.index[-1], by_case.index[len(by_case) // 2], by_case.index[0]):
    case = task.data.load(case_id)
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    one = int((labels > 0).flatten(1).sum(1).argmax())
    with torch.no_grad():
        new = method.shown(made.nets.eval(), images, labels, task.classes).float()
        found = {name: made.answer(seen)[one].argmax(0).numpy() for name, seen in (("real", images), ("made", new))}
    pictures[f"{case_id}\nDice {by_case[case_id]:.2f}"] = {
        "real image": Shown(images[one, 0].numpy()),
        "its labels": Shown(images[one, 0].numpy(), labels[one].numpy()),
        "made from them": Shown(new[one, 0].numpy()),
        "found in the made one": Shown(new[one, 0].numpy(), found["made"]),
        "found in the real one": Shown(images[one, 0].numpy(), found["real"]),
    }
synthesis_figures.gallery(pictures, task.data.manifest, legend=True)

# %% [markdown]
# ## Bones off
# Of an X-ray nobody knows what it would be without bones, unless it is made twice, with two energies. But an X-ray can
# be **projected from a CT**, and there the bones can be taken away before: the truth is known to the last pixel
# (`medcook.projections`). The patients below were not trained on.

# %%
bones = find_recipe("bs-diff")
names = bones.arms_at("full")
fitted = {}
for name in names:
    how, where, steps, start_from = bones.run(profile, name, 0)
    fitted[name] = fit(how, where, steps, start_from)
held = list(where.cases("val"))
xrays = {case.case_id: where.preparation.images(case) for case in held}
without = {}
for case_id, pair in list(xrays.items())[:3]:
    view = len(pair) // 2
    row = {"X-ray": Shown(pair[view, 0].numpy()), "without bones": Shown(pair[view, 1].numpy())}
    for name, one in fitted.items():
        with torch.no_grad():
            given = one.method.suppress(one.nets.eval(), pair[[view], :1]).float()
        row[name] = Shown(given[0, 0].numpy())
    without[case_id] = row
synthesis_figures.gallery(without, where.data.manifest)

# %%
measured = evaluate_many(fitted, where.data, where.val_patients, suppression_rows)
frame = pd.concat([table.assign(arm=name) for name, table in measured.items()], ignore_index=True)
frame.groupby("arm", sort=False)[["psnr", "ssim", "suppression", "detail", "dice"]].mean().round(3)

# %% [markdown]
# **Suppression**: how much of the difference between X-ray and truth is gone, 1 is all of it, and 0 is the X-ray as it
# was. **Detail**: the same of edges alone.
#
# ## Ablation: is it the masks?
# Without masks the generator knows only where the image is dark, middle or bright at an eighth of its resolution. And
# one step of plain regression gets the same maps, without any diffusion.

# %%
display(teaching.evidence_table("seg2med"))
teaching.verdict_table("seg2med")

# %%
frame = evidence_frame("seg2med", "full")
frame.groupby("arm", sort=False)[["dice", "ssim", "psnr"]].mean().round(3)

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three draws, seeds or folds, the last checkpoint.

# %%
ids = teaching.measured("15_synthesis")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter, and how many structures of how many it misses altogether.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# How much of the bones is taken off the X-rays of each patient, and how much of their edges by each arm of BS-Diff; the
# same of each fold in BS-LDM and GL-LCM; how often a phrase meets its structure: with a box that overlaps by more than
# a half, with a point, and by structure in mean overlap. Last, how many weights learn from labels in GMS and what it is
# compared with.

# %%
frame = evidence_frame("bs-diff", "full")
display(frame.pivot_table(index="patient_id", columns="arm", values="suppression").round(2))
display(frame.groupby("arm")[["suppression", "detail"]].mean().round(3))
for paper in ("bs-ldm", "gl-lcm"):
    frame = evidence_frame(paper, "full")
    display(frame.pivot_table(index="replicate", columns="arm", values="suppression").round(3))
frame = evidence_frame("paxray", "full")
display(frame.groupby("arm")[["hit", "pointing"]].mean().round(2))
display(frame.pivot_table(index="structure", columns="arm", values="iou").round(2))
weights = {arm: int(found.cost["parameters"]) for arm, found in teaching.need_summary("gms").arms.items()}
pd.Series(weights, name="weights that learn").to_frame()

# %% [markdown]
# **How to read it.**
#
# - **What is told comes out.** In hearts that were made from masks a segmenter finds these as well as in real ones:
#   Dice 0.812 and 0.817. Without masks it is 0.335, so that is no leak of the tissue maps. One step of regression
#   gets 0.760, and is the better picture by SSIM and PSNR: both like what is blurred. **A measure of pictures is not
#   a measure of what they are for.**
# - **Diffusion is not told apart from one step.** It takes 0.840 of what bones add off the X-rays of patients it never
#   saw, a U-Net in one step 0.788: inconclusive. Most of that is one patient of nine; of five the U-Net takes off more,
#   and on average its edges are nearer to the truth (0.465 and 0.423). The enhancement shows no gain (0.835 without
#   it). Diffusion of pixels, from another recipe, is at 0.831, diffusion in the latents of a small autoencoder at
#   0.675, most of which is one fold of three; offset noise and limits show no gain in that (0.668 without).
# - **Made images add little to real ones.** X-rays made from sentences, beside 120 real ones, leave a classifier where
#   it was (AUC 0.837, without them 0.843). They do hold what their sentences say: alone they are at 0.814, and with
#   shuffled sentences they harm (0.772; to the right sentences the difference has an interval from 0.005 to 0.155). Of
#   pairs that two joined streams make from three patients' labels the segmenter gets worse (0.733, without them 0.773),
#   and that the streams are joined shows no gain (0.727 apart).
# - **A lesion needs a loss of its own.** Where the noise is predicted in the lesion alone, made infarcts and no-reflow
#   give a Dice of 0.415, with the loss all over the image of 0.302, lower in every draw. Without any made ones it is
#   0.375, so whether they help is inconclusive: most of that gain is one draw. With lesions that are cut out and pasted
#   it is 0.362.
# - **Eight calls for fifty, perhaps.** A consistency model takes 0.724 of the bones off, latent diffusion 0.674. One
#   fold of three makes that; in the two others it is behind, by up to 0.047, where 0.02 was allowed: inconclusive.
# - **One background and three cut-outs** are not told apart from the three images that they come from (0.490 and
#   0.486); all images are far ahead (0.637). Draws of these disagree widely.
# - **A frozen autoencoder can segment, and a U-Net segments better.** The mapping between latents reaches 0.569 with a
#   third of the weights, a U-Net 0.773. That the autoencoder stays frozen is right: trained along, it is at 0.318.
# - **Small first, then fine**: anatomy is right more often in hippocampi that are made in two stages (0.514) than in
#   one (0.384). That masks are made along with them costs some of it (0.553 without).
# - **Masks from a CT ground phrases**: regions of a network that learnt from projected structures meet the named one
#   (box IoU above 0.5) in half of the cases, the best region proposals in a quarter. By a point the proposals are no
#   worse (0.75 and 0.64), and by mean IoU it is open (0.375 and 0.408): larynx and oesophagus are not found at all by
#   the network within these steps.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("15_synthesis"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Here a generator has some hundred steps, on 64 × 64 pixels, from tens of patients;
# there it has days on thousands, and most begin with a network that was trained on millions of photographs. **What is
# the same**: the mechanism, the steps of the segmenter in all arms that are compared, and that no generator learns from
# a patient who is scored.
#
# **Four questions for a paper on synthesis.** What was the generator told, and how much of the image is in that? Has
# the segmenter without made images as many steps, and the strong augmentation that one would use anyway? Did the
# generator see patients of the test set, or of the set that a pre-trained network came from? And is the measure about
# pictures that look alike, or about what they are for?
#
# ## Play with it
# Choose how much noise a slice drowns in, and see what the network finds in it: told the right masks, or those of
# another patient (in a live notebook).

# %%
other = shown.labels[[(number + len(shown) // 2) % len(shown)]]
wrong = method.maps(image, other, task.classes)
networks = {
    "told its masks": lambda noisy, t: sampler(noisy, t, maps=maps),
    "told another's": lambda noisy, t: sampler(noisy, t, maps=wrong),
}
widgets.diffusion_explorer(diffusion, networks, image, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** An image drowns. `np` is numpy.


# %% tags=["exercise", "exercise-noised"]
def noised(image, noise, signal):
    """An image (H, W) with noise (H, W), both of variance 1; `signal`, 0 to 1, is the image's share of the variance."""
    raise NotImplementedError


# %%
check("15/noised", noised)

# %% [markdown]
# **2.** A step of the way back: the noise in a noisy image was found; now go to a time at which there is less of it.


# %% tags=["exercise", "exercise-back"]
def back(noisy, noise, signal, following):
    """x at a time where the image has the share `following` of the variance, from x where it has `signal`.

    noisy = sqrt(signal) * image + sqrt(1 - signal) * noise; image and noise stay the same.
    """
    raise NotImplementedError


# %%
check("15/back", back)

# %% [markdown]
# **3.** An X-ray from a CT.


# %% tags=["exercise", "exercise-xray"]
def xray(volume, voxel, depth):
    """(rows, columns) brightness, 0 to 1 and dense is bright, from attenuations (rows, columns, along the ray).

    Of the intensity exp(-p / depth) is left after a ray has passed attenuation p: the sum of the voxels' values times
    their length `voxel`.
    """
    raise NotImplementedError


# %%
check("15/xray", xray)

# %% [markdown]
# ## What to read next
# - Ho, Jain and Abbeel: *Denoising diffusion probabilistic models* (NeurIPS 2020).
# - Song, Meng and Ermon: *Denoising diffusion implicit models* (ICLR 2021).
# - Rombach et al.: *High-resolution image synthesis with latent diffusion models* (CVPR 2022).
# - Kazerouni et al.: *Diffusion models in medical imaging: a comprehensive survey* (Medical Image Analysis 2023).
