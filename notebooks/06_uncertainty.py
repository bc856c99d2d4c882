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
# # 06 · How sure is it, and may we believe that?
#
# **After this chapter you can** tell a probability from a softmax; score a forecast against several raters who
# disagree; say what a clinic gains by handing over the tenth of the cases that a network is least sure of; and make a
# promise about misses that holds, and say when it will not.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains with three raters, no network | 1 | under 1 GB |
# | `full` | cells with ten annotations each (BU-BIL), chest X-rays of two hospitals, hearts (ACDC) | about 6 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** a network that is sure of many of the very pixels about which
# ten annotations differ, and no single remedy: whether a probability is true and whether an image is strange are two
# questions.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, handover, reliability, teaching, widgets
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.measures.calibration import brier, expected_calibration_error, temper
from medcook.measures.conformal import choose_lambda
from medcook.measures.disagreement import consensus, crps, energy_distance, jaccard_distances
from medcook.measures.selective import handed_over, risk_coverage
from medcook.methods.probabilistic_unet import ProbabilisticUNet
from medcook.methods.uncertainty import DeepEnsemble, MCDropout, RandomRater, TestTime, positions, tempered
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.uncertainty import autopaint, chexmask_u, daugs, ius_prescreen, maxquery, mefn, pulaski
from medcook.sampling import case_samples
from medcook.statistics import interval
from medcook.tasks import prepare
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# One image and what several people made of it. Where they differ nobody is wrong: the image does not say. A forecast
# for this image that deserves the name says 0.5 where half of them draw the border outside a pixel.

# %%
curvas = find_recipe("curvas")
method, task, budget, seed = curvas.run(profile, "softmax", 0)
held_out = task.samples("val")
VALUE = max(task.structures, key=lambda value: int(reliability.disputed(held_out.raters, value).sum()))
example = reliability.most_disputed(held_out, VALUE)[0]
drawn = held_out.raters[example].numpy() == VALUE
reliability.sample_sheet(
    held_out.images[example, 0].numpy(), {f"{len(drawn)} annotations of one image": drawn}, task.data.manifest
)

# %% [markdown]
# There are two ways not to know. **The image does not say**: a blurred border, and more training will not sharpen it;
# raters are the measure of it. **The network has not seen it**: another hospital, another disease; here every rater
# may agree, and the network is the only one in doubt, if it is. A softmax is trained for neither.
#
# ## The failure first
# One U-Net, trained on the raters' majority, on images that it was not trained on. Blue to yellow is 0 to 1. On the
# right, the pixels on which at least a fifth of the raters is against the rest: orange where the network is *sure* of
# one side, with a probability of at least 0.95, yellow where it is not.

# %% tags=["cover"]
single = fit(method, task, budget, seed)
said = {"softmax": reliability.forecast(single)}
reliability.confidence_figure(said["softmax"], reliability.most_disputed(held_out, VALUE), VALUE)

# %%
print(f"{budget.steps} steps in {single.cost['seconds']:.0f} s,", "from the run cache" if single.cached else "just now")
print(f"sure on {reliability.sure_where_disputed(said['softmax'], VALUE):.0%} of the pixels about which raters differ")

# %% [markdown]
# ## Is a probability true?
# Of all pixels that get 80%, 80% should be right. Sort the pixels into bins by what was said, compare with what was
# right, weigh each bin by its pixels: the **expected calibration error**. The judges here are all raters, each of them
# counts, and only the box around the structure counts: in a whole image nineteen pixels of twenty are easy background,
# and would make any error look small.

# %%
teaching.show_code(expected_calibration_error, brier)

# %% tags=["nbval-check-output", "mechanism"]
forecast = np.array([[0.1, 0.2, 0.05, 0.3, 0.2], [0.9, 0.8, 0.95, 0.7, 0.8]])
truth = np.array([1, 1, 0, 1, 0])
print(f"calibration error {expected_calibration_error(forecast, truth, 10):.3f}", end=", ")
print(f"Brier score {brier(forecast, truth):.3f}")
print(f"the same, never less than certain: {expected_calibration_error(forecast.round(), truth, 10):.3f}")

# %% [markdown]
# ## Five remedies
# **Temperature.** Divide the logits by one number, found on images that neither train nor are scored. The order of the
# probabilities stays, and so does every decision. **Dropout**, left on while predicting: many networks for one training
# (not measured here). **Views**: mirror and turn the image, turn the answers back. **A random rater** in every step of
# the training instead of the majority: nothing else changes, and in the long run the softmax is the share that says
# yes. **A deep ensemble**: the same training from several random starts, at as many times the cost.

# %%
teaching.show_code(temper, MCDropout.samples, TestTime.turned, RandomRater, DeepEnsemble.training_step)

# %% tags=["nbval-check-output", "mechanism"]
for temperature in (0.5, 1.0, 2.0):
    print(f"temperature {temperature}:", temper(np.array([0.7, 0.2, 0.1]), temperature).round(3))

# %% tags=["nbval-check-output", "mechanism"]
views = TestTime()
picture = torch.arange(9.0).reshape(1, 1, 3, 3)
every = range(len(positions((3, 3))))
seen = [views.turned(picture, number) for number in every]
back = [views.turned(one, number, back=True) for number, one in enumerate(seen)]
print(f"{len({str(one.tolist()) for one in seen})} different views,", end=" ")
print(f"{sum(torch.equal(one, picture) for one in back)} of them turned back to the image")

# %% [markdown]
# Temperature and views need no training of their own: they ask the network above again, in another way. The random
# rater is trained live, and so is the ensemble, at five times the cost, but not at `quick`.

# %%
said["temperature"] = reliability.forecast(
    tempered(replace(single, method=curvas.method(profile, "temperature")), role="calibration")
)
said["views"] = reliability.forecast(replace(single, method=curvas.method(profile, "views")))
for arm in ("random rater", "deep ensemble") if profile != "quick" else ("random rater",):
    said[arm] = reliability.forecast(fit(*curvas.run(profile, arm, 0)))
reliability.reliability_diagram(said)

# %%
pd.DataFrame(
    {
        name: {
            "calibration error, near": reliability.calibration_error(reliability.reliability_of(one)),
            "sure where raters differ": reliability.sure_where_disputed(one, VALUE),
        }
        for name, one in said.items()
    }
).T.round(3)

# %% [markdown]
# That is one fold of one cross-validation, on the network's grid. The committed evidence has all three folds, on the
# images' own grid. *CRPS* scores the area that is predicted against the areas that raters drew,
# *Dice* counts only the pixels on which all of them agree.

# %%
teaching.show_evidence("curvas", table=True)

# %% [markdown]
# The challenge behind this protocol (CURVAS) found that better calibrated models segment better, too. Is it so from
# image to image? Rank correlation of calibration error and Dice, over images; below zero says that it is:

# %%
frame = evidence_frame("curvas", "full")
association = {name: interval(rows, "ece_dice_correlation", 500) for name, rows in frame.groupby("arm", sort=False)}
shown = {name: [teaching.with_interval(e.mean, e.low, e.high)] for name, e in association.items()}
display(pd.DataFrame(shown, index=["rank correlation"]).T)

# %% [markdown]
# Every interval includes zero: with 25 images it cannot be told here. What can be told is that the ensemble is better
# calibrated than one softmax; that a random rater does what it promises in the long run cannot be seen in 240 steps.
#
# ## Raters are not noise: samples instead of a mean
# A probability for each pixel does not say which pixels go together: two raters of whom one draws wide and one tight
# are not two hundred coin tosses along the border. What is wanted is a network that draws *whole* segmentations, as
# different from each other as the raters' are. How to score a set of samples against a set of raters? By how far
# they are apart, less how far each set is apart in itself: zero for sets that are alike. For numbers such as areas that
# is the CRPS, for masks the energy distance with 1 − IoU in place of the difference.

# %%
teaching.show_code(crps, energy_distance)

# %% tags=["nbval-check-output", "mechanism"]
areas = [90, 100, 130]
guesses = {"as spread as the raters": areas, "their mean, three times": [107] * 3, "too wide": [60, 160]}
for name, samples in guesses.items():
    print(f"{name:24s} CRPS {crps(samples, areas):.3f}")
rows = np.arange(24).reshape(1, 1, 24)
raters = (rows < np.array([8, 10, 16]).reshape(3, 1, 1)).astype(np.uint8)
print(f"the majority alone, against its three raters: {energy_distance(consensus(raters)[None], raters):.3f}", end=", ")
print(f"of two raters' masks: {jaccard_distances(raters[:1], raters[2:])[0, 0]:.3f}")

# %% [markdown]
# The **probabilistic U-Net** (Kohl et al. 2018) is told in training, by a second network that sees the annotation,
# which rater's manner it is to imitate; that manner is a few numbers, and at test they are drawn. It is trained one
# annotation at a time. **PULASki** (Chatterjee et al. 2025) draws a set of samples, and trains with the distance
# between this set and all the raters. The same idea as the score above, made a loss:

# %%
teaching.show_code(ProbabilisticUNet.training_step, pulaski.Pulaski.training_step, pulaski.energy_distance)

# %% tags=["nbval-check-output", "mechanism"]
two = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
print("set against itself:", round(pulaski.energy_distance(two, two).item(), 3), end="; ")
print("against its own middle:", round(pulaski.energy_distance(two.mean(1, keepdim=True), two).item(), 3), end="; ")
print("moved by 3:", round(pulaski.energy_distance(two + 3, two).item(), 3))

# %%
sampling = find_recipe("pulaski")
nets = {arm: fit(*sampling.run(profile, arm, 0)) for arm in reversed(sampling.compare)}
field = next(iter(nets.values())).task
cases = list(field.cases("val"))
case = max(cases, key=lambda one: jaccard_distances(one.raters == VALUE, one.raters == VALUE).mean())
plane = (slice(None),) if case.image.ndim == 3 else (slice(None), case.image.shape[1] // 2)
sheet = {"raters": case.raters[plane] == VALUE}
for name, net in nets.items():
    sheet[f"samples, {name}"] = (case_samples(net, case, len(case.raters)).argmax(1) == VALUE).numpy()[plane]
reliability.sample_sheet(case.image[0][plane[1:]], sheet, field.data.manifest)

# %% [markdown]
# Look at the column *all*: are the samples' outlines spread where the raters' are, and only there? Samples that are all
# alike are one mistake, samples that differ in the wrong place another. The evidence counts both: how far apart two
# raters are, how far two samples (they should be as far), and how far a sample is from a rater.

# %%
frame = evidence_frame("pulaski", "full")
display(frame.groupby("arm", sort=False)[["raters_apart", "samples_apart", "samples_to_raters"]].mean().round(3))
teaching.show_evidence("pulaski", table=True)

# %% [markdown]
# ## The clinician's question
# *If I look at a tenth of the cases myself, how much better is the rest?* That is what uncertainty is for, and it needs
# no calibration: only that uncertain cases are the bad ones. Hand over the most uncertain share, take the mean error of
# the rest. Two curves to compare with: cases drawn at random, and somebody who knows every error beforehand.

# %%
teaching.show_code(risk_coverage, handed_over)

# %% tags=["nbval-check-output", "mechanism"]
error, uncertainty = np.array([0.02, 0.30, 0.05, 0.20, 0.03]), np.array([0.1, 0.8, 0.2, 0.9, 0.3])
coverage, risk = risk_coverage(uncertainty, error)
print("coverage", coverage, "risk", risk.round(3))
everything, rest = handed_over(uncertainty, error, 0.2)
print(f"a fifth handed over: error of all {everything:.3f}, of the rest {rest:.3f}", end=", ")
print(f"at best {handed_over(error, error, 0.2)[1]:.3f}")

# %% [markdown]
# The test X-rays of two hospitals, of which the training saw one. Two kinds of uncertainty, each ranking its own
# network's errors: the mean **entropy** of a U-Net's pixels, and the **spread of landmarks** that a graph
# autoencoder draws (CheXmask-U, Cosarinsky et al. 2026; more of it below).

# %%
frame = evidence_frame("chexmask-u", "full")
compared = list(find_recipe("chexmask-u").compare)
handover.handover_figure(frame, "chest_xray", compared)

# %%
handover.handover_table(frame)

# %% [markdown]
# Read both heights and slopes. Handing over a tenth gains what the intervals say, about half of what is possible. The
# graph autoencoder's doubt may rank its errors as well as entropy does, *but what is left after a tenth, or even most,
# of its cases went is worse than all of the U-Net's*. A curve that falls is no substitute for one that starts low.
#
# One trained network, case by case: move the share (in a live notebook) and see who goes, and what is left.

# %%
handover.handover_view(frame, "u-net entropy", 0.1, "chest_xray")

# %%
widgets.handover_slider(frame, "chest_xray", "u-net entropy")

# %% [markdown]
# High on the left are the cases to worry about: wrong, and sure of it. Nobody will look at them. Here are such cases,
# from the validation patients: above, those of which the U-Net is least sure; below, the worst among the half of which
# it is surest.

# %%
landmarks = find_recipe("chexmask-u")
lungs = fit(*landmarks.run(profile, "u-net entropy", 0))
reliability.caught_and_missed(reliability.forecast(lungs))

# %% [markdown]
# Above, doubt about what is odd in this one image. Below, at `full`, one mistake again and again: the part of the lung
# behind the heart, which these labels include. An error that is made the same way every time is no doubt to a network.
#
# ## An honest promise
# *On average you will miss at most a twentieth of the structure.* No probability, calibrated or not, gives that
# promise; **conformal risk control** does (Angelopoulos et al. 2024), for any network, without an assumption about it.
# Mark every pixel whose probability reaches a threshold; on `n` calibration cases take the strictest threshold with
# which the mean loss, with one further case that loses everything counted along, stays below the promise. That further
# case is the next patient.

# %%
teaching.show_code(choose_lambda, handover.missed_shares)

# %% tags=["nbval-check-output", "mechanism"]
falling = np.linspace(1, 0, 6) ** 2 * np.array([[0.2], [0.6], [1.0]])
print("mean losses", falling.mean(0).round(3))
for count in (1, 10, 100):
    many = np.repeat(falling, count, axis=0)
    print(f"{len(many):3d} calibration cases: lambda {choose_lambda(many, 0.2)} for a promise of 0.2")

# %%
ALPHA = 0.05
elsewhere = {"quick": "island", "full": "Montgomery"}.get(profile, "Montgomery")
home = lungs.task.keep[0][1]
abroad = replace(lungs, task=replace(lungs.task, keep=(("site", elsewhere),)))
losses, marked = [], []
for one in (reliability.forecast(lungs), reliability.forecast(abroad, role="labelled")):
    probability = handover.as_cases(1 - one.probabilities[:, 0], one.case_of)
    there = handover.as_cases(one.raters[:, 0] > 0, one.case_of)
    losses.append(handover.missed_shares(probability, there))
    marked.append(handover.marked_shares(probability, there).mean(0))
size = len(losses[0]) // 2
print(f"{len(losses[0])} cases of {home}, {size} calibrate in each draw; {len(losses[1])} of {elsewhere}")
print(f"with {size} calibration cases the smallest promise that can be made is {1 / (size + 1):.3f}")
promised = handover.promises(losses[0], ALPHA, size, losses[1])
handover.promise_figure(promised, ALPHA, (f"{home}, other cases", elsewhere), lungs.task.data.manifest)

# %%
usual = int(np.argmin(np.abs(handover.THRESHOLDS - 0.5)))
chosen = int(promised["chosen"].median())
pd.DataFrame(
    {
        name: {
            "missed, threshold 0.5": loss[:, usual].mean(),
            "missed, as promised": column.mean(),
            "promise": ALPHA,
            "area marked over true area": area[chosen],
        }
        for name, loss, column, area in zip(
            (home, elsewhere), losses, (promised["here"], promised["elsewhere"]), marked, strict=True
        )
    }
).T.round(3)

# %% [markdown]
# The small print. The promise is about the **average** over calibration sets and further cases, not about each
# patient or each calibration set. With few cases it is dear: to promise 0.05, the calibration cases themselves must
# lose much less, because the one further case that is counted loses everything. It needs cases that are
# **exchangeable** with the calibration cases: those of another hospital are not, and nothing in the method notices.
# Where the second row keeps the promise all the same, it does so by luck, not by right. And the promise is no merit of
# the network: a bad one keeps it by marking half of the image, so read the last column along with it.
#
# ## What it has never seen
# **Queries that know what they know** (MaxQuery, Yuan et al. 2023). A mask transformer sorts pixels by resemblance to
# a few learned queries. A pixel that resembles none of them is out of distribution. Here one structure of the heart is
# unlabelled in training; at test it is to be found by being strange.

# %%
teaching.show_code(maxquery.responses, maxquery.combine, maxquery.strangeness, maxquery.distribution_loss)

# %% tags=["nbval-check-output", "mechanism"]
centres = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
pixels = torch.tensor([[[4.0, 0.0, 2.0, -3.0], [0.0, 4.0, 2.0, -3.0]]])
response = maxquery.responses(centres, pixels)
print("softmax doubt  ", maxquery.doubt(response)[0].numpy().round(3))
print("query strangeness", maxquery.strangeness(response)[0].numpy().round(3))

# %% [markdown]
# The last pixel is like neither query: softmax doubts it no more than the third, which lies between the two; its
# strangeness is the highest.

# %%
strange = fit(*find_recipe("maxquery").run(profile, "maxquery", 0))
heart = strange.task
shown = prepare(heart.data, heart.preparation, heart.val_patients)
unknown = shown.labels == heart.unknown
largest = unknown.flatten(1).sum(1)
numbers = [int((largest * (shown.case_of == k)).argmax()) for k in shown.case_of.unique()[:2]]
with torch.no_grad():
    strange.nets.eval()
    images = shown.images[numbers]
    maps = {
        "softmax doubt, same network": 1 - strange.method.predict(strange.nets, images).amax(1).numpy(),
        "query strangeness": strange.method.strange(strange.nets, images).numpy(),
    }
what = f"{heart.data.manifest.classes[heart.unknown]}: never labelled in training"
reliability.score_sheet(images[:, 0].numpy(), unknown[numbers].numpy(), maps, heart.data.manifest, what=what)

# %% [markdown]
# Bright is strange. Softmax is sure of the right ventricle, which nobody labelled; its pixels are stranger than those
# of the heart that was labelled. But the body around the heart is nearly as strange, so that strangeness alone does
# not say where the unknown structure is.

# %%
teaching.show_evidence("maxquery", table=True)

# %% [markdown]
# **Paint it healthy** (AutoPaint, Astaraki et al. 2023). Learn on healthy images to paint what is hidden. What differs
# most from its painted version is found, taken out, and painted over: what is abnormal must not paint itself. The
# difference is the anomaly. Tested on chest X-rays with tuberculosis by a network that saw healthy lungs only.

# %%
teaching.show_code(autopaint.repaint, autopaint.find, autopaint.AutoPaint.healthy)

# %% tags=["nbval-check-output", "mechanism"]
difference = torch.zeros(1, 1, 7, 9)
difference[0, 0, 3, 4], difference[0, 0, 0, 8] = 2.0, 5.0
region = torch.ones(1, 1, 7, 9, dtype=torch.bool)
region[..., 7:] = False
print(autopaint.find(difference, region, 0.02)[0, 0].int().numpy())

# %%
teaching.show_evidence("autopaint")

# %% [markdown]
# **Look before you segment** (Chalcroft et al. 2021). A segmentation network finds something even where nothing is
# (here in a fifth of such frames); a classifier looks first, and where it sees no target nothing is segmented. Both
# learn from raters who disagree: from one of them at random in every step, from their vote, from their mean. A rival
# that asks no classifier: throw away whatever is found that is too small.

# %%
teaching.show_code(ius_prescreen.screened, ius_prescreen.sample)

# %% tags=["nbval-check-output", "mechanism"]
three = torch.tensor([[[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 0]]]], dtype=torch.uint8)
for how in ("vote", "mean"):
    print(how, ius_prescreen.sample(three, 2, how)[0, 1, 0].numpy().round(3), end="; ")
torch.manual_seed(0)
everyone = torch.cat([ius_prescreen.sample(three, 2, "random") for _ in range(400)])
print(f"random: {len(everyone[:, 1].flatten(1).unique(dim=0))} different labels; a shut gate leaves", end=" ")
print(ius_prescreen.screened(everyone[:2], torch.tensor([True, False])).argmax(1).flatten(1).any(1).tolist())

# %%
teaching.show_evidence("ius-prescreen")

# %% [markdown]
# **Choose by uncertainty** (DAUGS, Yalcinkaya et al. 2024). Several networks, and for each case the solution of the one
# that contradicts itself least from patch to patch. Trained in one hospital, scored in the other.

# %%
teaching.show_code(daugs.patchwise, daugs.uncertainty, daugs.least_uncertain)

# %% tags=["nbval-check-output", "mechanism"]
ramp = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)


def steady(part):
    """Says of a pixel the same in every patch."""
    return torch.cat([-part, part], 1).softmax(1)


def fickle(part):
    """Says something that depends on the rest of the patch."""
    return torch.cat([part.mean((2, 3), keepdim=True) - part, part], 1).softmax(1)


for name, answer in {"steady": steady, "fickle": fickle}.items():
    solution, deviation = daugs.patchwise(answer, ramp, (2, 2), 2)
    print(f"{name}: uncertainty {daugs.uncertainty(solution, deviation).item():.4f}")

# %%
teaching.show_evidence("daugs")

# %% [markdown]
# **Fuse evidence** (MEFN, Qi et al. 2024). Each modality says what it believes *and how much it does not know*;
# Dempster's rule lets the one that knows nothing have no say. Two contrasts of one brain, of which one may be spoilt.
# Both brain and damage are **simulated**: what this row says is of the mechanism alone, not of PET and CT. It says that
# no gain was seen.

# %%
teaching.show_code(mefn.opinion, mefn.dempster)

# %% tags=["nbval-check-output", "mechanism"]
sure, doubtful, against = (torch.tensor(e).view(1, 2, 1) for e in ([8.0, 0.0], [0.2, 0.0], [0.0, 4.0]))
for name, other in {"with one that knows little": doubtful, "with one that objects": against}.items():
    belief, ignorance = mefn.dempster(mefn.opinion(sure), mefn.opinion(other))
    print(f"sure, fused {name}: belief {belief[0, :, 0].numpy().round(3)}, unknown {ignorance.item():.3f}")

# %%
teaching.show_evidence("mefn")

# %% [markdown]
# **Doubt about a landmark** (CheXmask-U, Cosarinsky et al. 2026). An encoder gives a distribution over a latent space,
# a graph decoder turns draws from it into contours; their spread, landmark by landmark, is the doubt. It should grow
# when the image is damaged, and where.

# %%
teaching.show_code(chexmask_u.ChebConv.forward, chexmask_u.GraphVAE.doubts)

# %% tags=["nbval-check-output", "mechanism"]
step = -chexmask_u.scaled_laplacian(6)
bump = torch.eye(12)[2]
print("a bump on the left lung's ring, and after one step and two among its neighbours:")
for values in (bump, step @ bump, step @ step @ bump):
    print(values.numpy().round(3) + 0.0)

# %%
teaching.show_evidence("chexmask-u")

# %% [markdown]
# ## What the ingredient adds
# For every paper of the chapter: squares show what the method gains over its comparator, circles what the ingredient
# in the title gains over nothing else but its absence.

# %%
papers = teaching.measured("06_uncertainty")
comparison.forest([teaching.need_summary(paper) for paper in papers])

# %% [markdown]
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("06_uncertainty"))
teaching.verdict_table(*papers)

# %% [markdown]
# **Three questions for a paper about uncertainty.** Against whom is it calibrated: one label, or the people who
# disagree? Does the uncertainty beat its cheapest rival, the entropy of one softmax, *at the decision it is meant for*?
# And was anything (temperature, threshold, bound) fitted on the cases that are reported, or on cases that the next
# hospital's will not resemble?
#
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The expected calibration error, by hand. `confidence` holds what was said of the likeliest class of each pixel,
# `right` whether it was right. Bin k of `bins` holds confidences from k / bins up to, but without, (k + 1) / bins; the
# last one also holds 1.


# %% tags=["exercise", "exercise-calibration_error"]
def calibration_error(confidence, right, bins):
    """Mean gap between confidence and accuracy over `bins` bins of equal width, weighted by their pixels."""
    raise NotImplementedError


# %%
check("06/calibration_error", calibration_error)

# %% [markdown]
# **2.** The energy distance of two sets of numbers, such as the areas of samples and those of raters: twice the mean
# distance between a sample and a rater, less the mean distance of two samples, less that of two raters. Means are over
# all pairs, a number with itself included.


# %% tags=["exercise", "exercise-sets_apart"]
def sets_apart(samples, raters):
    """2 E|s - y| - E|s - s'| - E|y - y'| of two sets of numbers; every pair counts, also a number with itself."""
    raise NotImplementedError


# %%
check("06/sets_apart", sets_apart)

# %% [markdown]
# **3.** The promise. `losses` has a row for each calibration case and a column for each lambda, from strict to careful;
# no loss is above 1. Which is the first lambda that keeps a further case's expected loss at or below `alpha`? Where no
# lambda does, say so: return None.


# %% tags=["exercise", "exercise-promise"]
def promise(losses, alpha):
    """Position of the first lambda that keeps the promise, or None; losses (cases, lambdas) fall along a row."""
    raise NotImplementedError


# %%
check("06/promise", promise)

# %% [markdown]
# ## What to read next
# - Guo et al.: *On Calibration of Modern Neural Networks* (ICML 2017). Where temperature comes from.
# - Kohl et al.: *A Probabilistic U-Net for Segmentation of Ambiguous Images* (NeurIPS 2018).
# - Angelopoulos, Bates: *A Gentle Introduction to Conformal Prediction* (2021), then *Conformal Risk Control* (ICLR
#   2024): what may be promised, and to whom.
# - Jungo, Reyes: *Assessing Reliability and Challenges of Uncertainty Estimations for Medical Image Segmentation*
#   (MICCAI 2019): measured where it counts, by the case.
# - Jaeger et al.: *A Call to Reflect on Evaluation Practices for Failure Detection* (ICLR 2023): why the curve of this
#   chapter, and not another one.
