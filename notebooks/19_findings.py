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
# # 19 · Findings and diagnosis
#
# **After this chapter you can** build classifiers and detectors that use segmentation: of lungs, of lesions, of what
# surrounds them; judge them by ranking (AUC), by detections (average precision) and by the facts in a report; check
# where a classifier looks; and read a paper on diagnosis with the right questions.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | chest X-rays, tuberculosis or not (Montgomery, Shenzhen); nodules drawn into them | about 5 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that it matters more what a classifier is shown than what it is
# made of, and that a hundred patients leave wide intervals around an AUC.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, findings_figures, pooled, teaching, widgets
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.findings_figures import Diagnosed
from medcook.preparation import Preparation
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.fairness.mask_of_truth import apart, hide
from medcook.recipes.findings import (
    _asked,
    _detection,
    _harness,
    _judging,
    _mined,
    _nodules,
    lesion_centric,
    mllm_data_mining,
    spectral_graph_ct,
    tb_cxr,
)
from medcook.sampling import trained
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# One nodule in each X-ray, drawn into the lungs, so that it is known which are malignant: those with spicules. Two
# networks of one kind, trained alike, are asked. One sees the whole image; the other sees the patch around the nodule,
# which somebody has to find first.

# %% tags=["cover"]
recipe = find_recipe("lesion-centric")
ending = "" if profile == "full" else ", from nothing"
models = {}
for name in ("lesion patch", "whole image"):
    method, task, budget, seed = recipe.run(profile, name + ending, 0)
    task = replace(task, evaluation="val")  # the chapter looks at validation patients; the test set is the recipes'
    models[name] = fit(method, task, budget, seed)


def asked(fitted, images, labels):
    with torch.no_grad():
        return fitted.method.scores(trained(fitted), images, labels)


shown = task.samples("val")
thought = {name: asked(fitted, shown.images, shown.labels).numpy() for name, fitted in models.items()}
kinds = shown.labels.flatten(1).amax(1).tolist()
chosen = [n for kind in (1, 2) for n in [k for k, found in enumerate(kinds) if found == kind][:3]]


def diagnosed(numbers):
    """Samples with these numbers, and what both networks say of them."""
    rows = [
        Diagnosed(
            shown.images[n, 0].numpy(),
            shown.labels[n].numpy() > 0,
            _nodules.STRUCTURES[kinds[n]],
            {name: float(probability[n]) for name, probability in thought.items()},
        )
        for n in numbers
    ]
    return findings_figures.diagnosed_figure(rows, task.data.manifest)


diagnosed(chosen)

# %% [markdown]
# **Ranking, not thresholds.** A probability of one half is a convention. What a network has learnt shows in how it
# ranks: the area under the curve (AUC) is the probability that a malignant nodule has a higher score than a benign
# one.

# %%
scored = {
    name: pd.DataFrame({"score": probability, "outcome": [float(kind == _nodules.MALIGNANT) for kind in kinds]})
    for name, probability in thought.items()
}
findings_figures.roc_figure(scored, task.dataset)

# %% [markdown]
# ## The mechanisms
# **AUC counts pairs**; a tie is half a point. And its error is the scatter of what each patient adds to it: *DeLong*
# compares two networks on the same patients that way.

# %%
teaching.show_code(lesion_centric.delong)

# %% tags=["nbval-check-output", "mechanism"]
outcome, people = np.array([True, True, False, False, False]), np.arange(5)
for name, scores in (("all pairs right", [9, 8, 3, 2, 1]), ("one wrong", [9, 2, 3, 1, 1]), ("a tie", [9, 3, 3, 1, 1])):
    scores = np.array(scores, float)
    areas, covariance = lesion_centric.delong(scores[None], outcome, people)
    print(f"{name:16} AUC {pooled.auc(scores, outcome):.3f}, by DeLong {areas[0]:.3f} ± {covariance[0, 0] ** 0.5:.3f}")

# %% [markdown]
# **Only what is shown may count.** To show a network the lungs alone, everything else becomes mean grey, and the lungs
# alone set mean and spread; else their frame would leak through the normalisation.

# %%
teaching.show_code(hide)

# %% tags=["nbval-check-output", "mechanism"]
picture = torch.tensor([[[[1.0, 3.0, 100.0], [5.0, 7.0, -100.0]]]])
left = torch.tensor([[[[True, True, False], [True, True, False]]]])
for name, other in (("bright frame", picture), ("dark frame", picture.where(left, torch.tensor(-5.0)))):
    print(f"{name:13}", [round(value, 2) for value in hide(other, left).flatten().tolist()])

# %% [markdown]
# **Where does it look?** A network that ends in a mean over its maps and one linear layer can be taken apart exactly:
# the class activation map (Zhou et al. 2016) says what every place adds to the decision.

# %%
teaching.show_code(tb_cxr.activation)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
reader = tb_cxr.Reader("random", 1, 2, (4, 8)).eval()
x_rays = torch.randn(3, 1, 32, 32)
with torch.no_grad():
    logits, heat = reader(x_rays), tb_cxr.activation(reader, x_rays)
apart_by, bias = logits[:, 1] - logits[:, 0], reader.head.bias[1] - reader.head.bias[0]
alike = torch.allclose(heat.mean((1, 2)) + bias, apart_by, atol=1e-5)
print("maps", tuple(heat.shape), "- their means and the bias make the decision:", alike)

# %% [markdown]
# **A detector finds everything several times.** Of boxes that overlap, the surest is kept. How good it is then, depends
# on how many false boxes may come with the true ones: the curve of that, at seven rates, gives one number (*CPM*).

# %%
teaching.show_code(_detection.suppressed, _detection.cpm)

# %% tags=["nbval-check-output", "mechanism"]
boxes = torch.tensor([[10.0, 10, 20, 20], [11, 10, 21, 20], [40, 40, 50, 50], [10, 10, 20, 20]])
sure = torch.tensor([0.9, 0.8, 0.7, 0.3])
for overlap in (1.0, 0.9, 0.3):
    print(f"kept, where boxes may overlap by {overlap}:", _detection.suppressed(boxes, sure, overlap))

# %% [markdown]
# **Slices are neighbours.** *CT-SSG* makes a graph of a volume: slices near each other are joined, and in each
# convolution they hear of their neighbours. How far a message travels is a property of the graph.

# %%
teaching.show_code(spectral_graph_ct.laplacian, spectral_graph_ct.ChebyshevConvolution)

# %% tags=["nbval-check-output", "mechanism"]
scaled = spectral_graph_ct.laplacian(9, reach=1) - torch.eye(9)
heard = [torch.eye(9)[4], scaled[4]]  # what slice 4 says, after no step and after one
heard.append(2 * scaled @ heard[1] - heard[0])
for steps, message in enumerate(heard):
    print("after", steps, "steps it is heard in slices", message.abs().gt(1e-6).nonzero().flatten().tolist())

# %% [markdown]
# **Is a report right?** Measures of words count words. A report that says the same otherwise shares few of them, one
# with the wrong side nearly all.

# %%
teaching.show_code(_judging.shared_facts, _judging.with_an_error)

# %% tags=["nbval-check-output", "mechanism"]
report = "PTB in the right upper field"
for said in (report, _judging.said_otherwise(report), _judging.with_an_error(report, "side")):
    print(f"BLEU {_judging.bleu(said, report):.2f}, facts {_judging.shared_facts(said, report):.2f}: {said}")

# %% [markdown]
# **Whatever answers in words can be asked.** A harness asks a model, reads the answer in the form that it asked for,
# and counts what cannot be read: refusals, other forms, failures, silence. All of these score nothing.

# %%
teaching.show_code(_harness.judge, _harness.one_of)

# %% tags=["nbval-check-output", "mechanism"]
kind = _harness.Kind("Is there tuberculosis? Answer yes or no.", _harness.one_of("yes", "no"), _harness.same)
question = _harness.Question("classification", kind.prompt)


def broken(question):
    raise OSError("no such service")


for said in ("Yes.", "No, the lungs are clear.", "Yes or no.", "I'm sorry, I can't read X-rays.", broken):
    judged = _harness.judge(said if callable(said) else lambda question, said=said: said, kind, question, "yes")
    print(f"{judged.status:10} {judged.score:.0f}  {said if isinstance(said, str) else '(it fails)'}")

# %% [markdown]
# **A model may ask another one.** In *VILA-M3* a conversation is one row of tokens. The model learns only those that it
# says itself: to call an expert by its name, and to answer when it has read what the expert found.

# %%
teaching.show_code(_asked.conversation)

# %% tags=["nbval-check-output", "mechanism"]
heard = {"CXR": "predictions tuberculosis yes", "LUNGS": "results <image> area 24 right 52"}
for topic in ("tuberculosis", "size", "sex"):
    question, answer = _asked.TOPICS[topic].forms[0], _asked.TOPICS[topic].answers[-1]
    line, mine = _asked.conversation(topic, question, answer, heard)
    words = _asked.written(line).split()
    cards = len(_asked.CARDS.split()) + 1  # and the token that begins it
    said = [f"[{word}]" if own else word for word, own in zip(words[cards:], mine[cards:], strict=True)]
    print(" ".join(said))

# %% [markdown]
# In brackets is what the model says, and learns; the cards of both experts stand before all of it.
#
# ## Where it looks
# Tuberculosis in real X-rays: one network sees the whole image, one the lungs alone, as a U-Net finds them. Outlined
# are the lungs as people drew them.

# %%
recipe = find_recipe("tb-cxr")
ending = "" if profile == "full" else ", small encoder"
looks, seen = {}, None
for name in ("whole X-rays", "segmented lungs"):
    method, task, budget, seed = recipe.run(profile, name + ending, 0)
    task = replace(task, evaluation="val")
    fitted = fit(method, task, budget, seed)
    seen = task.samples("val")
    positive = [n for n in range(len(seen)) if seen.labels[n].max() == 1][:6]
    nets, images = trained(fitted), seen.images[positive]
    with torch.no_grad():
        heat = tb_cxr.activation(nets["average"].reader, method.view(nets, images)).clamp_min(0)
    heat = torch.nn.functional.interpolate(heat[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-6)
    image, lungs = apart(images)
    parts = zip(image[:, 0].numpy(), heat.numpy(), lungs[:, 0].numpy() > 0.5, strict=True)
    looks[name] = list(parts)
findings_figures.maps_figure(looks, task.data.manifest)

# %% [markdown]
# **A map is no proof.** The network that sees the lungs alone puts most of its activation above them, where it is shown
# nothing but grey: what it learnt from borders and shapes of the lungs is gathered there.
#
# ## Ablation: lungs, or only less of the image?
# The same network sees a piece of the image with the shape and area of the lungs, but elsewhere.

# %%
display(teaching.evidence_table("tb-cxr"))
teaching.verdict_table("tb-cxr")

# %% [markdown]
# ## Successes and failures
# Of nodules seen in the patch: malignant ones that were taken for benign, and benign ones taken for malignant.

# %%
score = thought["lesion patch"]
order = np.argsort(score)
missed = [n for n in order if kinds[n] == _nodules.MALIGNANT][:3]
alarms = [n for n in order[::-1] if kinds[n] == _nodules.BENIGN][:3]
diagnosed([*missed, *alarms])

# %% [markdown]
# Malignant nodules without visible spicules, or whose spicules end in the chest wall, are taken for benign; ribs that
# cross a benign one are taken for spicules. The network that sees the whole image says nearly the same of all.
#
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three seeds or folds, once four, the last
# checkpoint.

# %%
ids = teaching.measured("19_findings")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# **Which model is best depends on the question.** Four small models learnt from the same X-rays, lungs and reports, and
# are asked seven kinds of questions. Zero is who sees nothing and says what is commonest.

# %%
frame = evidence_frame("mllm-data-mining", "full")
frame = frame.set_index("structure").loc[list(_mined.KINDS)].reset_index()
findings_figures.questions_figure(frame, "skill", "skill: 0 knows nothing, 1 is always right", "chest_xray")

# %% [markdown]
# What their answers are worth, their ranks by that, 1 the best, and how far the kinds agree (Kendall's W, from 0 to 1).

# %%
ranks = mllm_data_mining.ranked(dict(list(frame.groupby("arm", sort=False))))
display(frame.pivot_table(index="arm", columns="structure", values="score", sort=False).round(2), ranks)
everything, images = mllm_data_mining.concordance(ranks), mllm_data_mining.concordance(ranks.drop("mining"))
print(f"W {everything:.2f}, of questions on images alone {images:.2f}")

# %% [markdown]
# Subgroups by DeLong, of the patch against the whole image; where networks look; which errors judges of reports notice;
# and what else was measured.

# %%
frame = evidence_frame("lesion-centric", "full")
pair = (frame[frame["arm"] == name] for name in ("lesion patch", "whole image"))
display(lesion_centric.compared(*pair).round(3).set_index("subgroup"))
frame = evidence_frame("gpt4v-study", "full")
table = frame.pivot_table(index="arm", columns="structure", values="right").round(2)
display(table.rename_axis(columns="wrong is the"))
columns = {
    "unit": ["f1", "false_positives", "sensitivity", "dice", "diagnosed"],
    "vae-lung": ["error", "silhouette", "purity"],
    "lung-health-bench": ["cpm", "found", "false_positives"],
    "cxr-report": ["f1", "kinds", "exact", "stated", "true"],
    "tb-cxr": ["correct", "inside", "area", "lungs"],
    "meddet": ["map", "map_noisy", "teachers", "weights", "flops"],
    "medregion-ct": ["f1", "places", "bleu"],
    "mllm-data-mining": ["score", "skill", "refused", "malformed"],
    "vila-m3": ["correct", "alone", "expert", "called"],
}
for paper, names in columns.items():
    table = evidence_frame(paper, "full").groupby("arm")[names].mean().round(3)
    display(table.rename_axis(paper))
frame = evidence_frame("vila-m3", "full")
display(frame.pivot_table(index="arm", columns="structure", values="correct").round(3).rename_axis("vila-m3, correct"))

# %% [markdown]
# **How to read it.**
#
# - **What a classifier is shown decides.** The same network tells malignant nodules with an AUC of 0.887 in the patch
#   around them, of 0.721 in the whole image, at both hospitals and in every subgroup; in a patch elsewhere it is at
#   0.500, as it should be. Somebody had to find the nodule first.
# - **Lungs alone are not told apart from the whole X-ray**: 0.831 and 0.839, give or take 0.07, and as much of the
#   image that is mostly not lung still gives 0.804. So tuberculosis, or what goes with it, is seen outside of the
#   lungs, too. The paper's accuracies, 0.999 with lungs alone and 0.971 without, are of a database that was put
#   together from several sources.
# - **Judges of words prefer the wrong report.** BLEU is right in 2 of 100 pairs, facts found by words in 77 (in 43
#   where a negation is wrong); these were written by the hand that wrote the paraphrases. An encoder that read X-rays
#   with their reports had no such help, and is right in 13 of 100.
# - **Regions help a report.** With features, masks and measures of six regions, the facts of written reports have an
#   F1 of 0.541, with global features alone of 0.477, with masks dealt to other regions of 0.447; BLEU moves half as
#   much (0.662, 0.630, 0.616).
# - **One network for both lungs is better than one for each**: an F1 of 0.821 and 0.776, with 0.75 and 1.00 false
#   findings an image. The experts share the steps, so that each has half of them. That queries stand in a hierarchy
#   shows no gain (0.817 flat), and kinds are hardly told apart.
# - **One model for all is better than one for each.** With as many weights and steps, one network for three
#   abnormalities is at an F1 of 0.762, a network for each at 0.653, and thirds of the image add nothing to that (0.673
#   without). What is alike in findings has to be learnt once only.
# - **Whether slices need edges is open.** From a stack of the heart, a graph of slices tells the disease with an AUC
#   of 0.700, the mean over slices with 0.685, a graph of shuffled slices with 0.698: 64 patients cannot tell them
#   apart.
# - **What surrounds a nodule shows no gain in radiomics.** A random forest on the outline, grown by 4 pixels, has an
#   AUC of 0.670, on the nodule alone of 0.663, with the surroundings of another nodule of 0.640: less than 0.06 would
#   not be seen. Spicules are there, though; the network that sees the patch has 0.887.
# - **A latent space keeps what a loss asks for.** From the latent vectors of a VAE an MLP does not tell malignancy
#   (AUC 0.507, Dirichlet 0.491); from as many principal components it has 0.583. Both draw patches of 32 x 32 pixels
#   with their ribs, and spicules are a small part of that; the VAE draws them worse, after some thousand steps.
# - **A warm start is not told from none.** Classifiers that first told nodules from what a detector took for nodules
#   are at an AUC of 0.875, from random weights at 0.870, after self-supervision and after shuffled candidates at
#   0.864. The detector misses next to nothing (a CPM of 0.996), so that there may have been little left to learn from
#   its mistakes.
# - **A protocol finds what was put in.** Vessels were drawn nearer to malignant nodules, by the odds that the paper
#   found in CT. Measured in the image they tell malignancy with an AUC of 0.648, the distance to the pleura, which is
#   drawn alike for both, with 0.482. That says nothing about cancer. Around the mirrored place it is 0.601, and the
#   interval of the difference does not leave zero out.
# - **Which model is best depends on what it was made for.** The language model leans to reports, the segmenter to
#   places, by a difference of 0.905 in skill. Most of that is by design: the segmenter refuses reports, and on images
#   it is as good as the language model at every kind of question, or better. On images alone kinds agree more (W
#   0.70): the linear map is best at telling what is there, the segmenter at saying where and at writing reports. That
#   these two cross is sure for boxes alone (0.85 and 0.90 of answers), not for detection (0.70 and 0.63).
# - **To ask is learnt at once, to gain by it is not.** A model that may ask experts always calls the right one. With
#   what they find it answers 0.690 of all questions rightly, without experts 0.679, with what they find in other
#   patients 0.688: inconclusive. It gains where it sees little itself (is the right lung much larger, 0.667, without
#   0.527), and may lose where it sees enough (how large both are, 0.655, without 0.763, an interval that includes
#   zero; the expert alone is at 0.645).
# - **KAN layers do not show in 138 patients.** From corrupted X-rays of tuberculosis MedViT has an AUC of 0.653 with
#   the blocks of its second version, 0.653 with those of the first, 0.655 without KAN.
# - **Teachers who know no more teach little.** A small detector that two large ones teach is at 0.770, alone at
#   0.764: inconclusive. The teachers have learnt for 225 steps, and are not better than their student, which has a
#   fifth of their weights.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("19_findings"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** There are CT volumes of thousands of patients; here X-rays of 688 and once hearts
# in MR of 64, and what is diagnosed is partly drawn into them. Tuberculosis and its reports are real. **What is the
# same**: the mechanism, the images and steps in all arms that are compared, and patients who train nothing and are
# scored once.
#
# **Four questions for a paper on diagnosis.** Who found the lesion that the classifier is shown, and would it be found
# at the hospital that uses it? What else tells the sick from the healthy: a hospital, a scanner, a frame? Is the AUC's
# interval given, over patients? And what does a wrong answer cost, of either kind?
#
# ## Play with it
# Draw a nodule, from smooth to spiculated, and see from where on who calls it malignant (in a live notebook).

# %%
nodules = models["lesion patch"].task
prepared = nodules.preparation
plain = Preparation(**{part.name: getattr(prepared, part.name) for part in fields(Preparation)})
cases = [case for case, _ in zip(nodules.cases("val"), range(8), strict=False)]
backgrounds = [(plain.images(case)[0], plain.labels(case)[0].numpy() > 0) for case in cases]


def paint(number, degree, radius):
    image, lungs = backgrounds[number]
    cells = np.argwhere(_nodules.inner(lungs))
    centre = tuple(cells[len(cells) // 3].astype(float))
    bright, mask = _nodules.shaped(degree, radius, centre, lungs.shape, np.random.default_rng(number))
    return image + 1.2 * torch.from_numpy(bright).float(), torch.from_numpy(mask.astype(np.uint8))


scores = {name: lambda images, labels, fitted=fitted: asked(fitted, images, labels) for name, fitted in models.items()}
widgets.nodule_explorer(scores, paint, len(backgrounds), nodules.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** How well does it rank? `np` is numpy.


# %% tags=["exercise", "exercise-auc"]
def auc(scores, outcomes):
    """The share of pairs of a sick (outcome 1) and a healthy one (0) in which the sick has the higher score.

    Both are arrays (N,); a pair with equal scores is half a point.
    """
    raise NotImplementedError


# %%
check("19/auc", auc)

# %% [markdown]
# **2.** What speaks for a class, and where?


# %% tags=["exercise", "exercise-activation"]
def activation(maps, weights):
    """The class activation map (H, W) of maps (C, H, W) and a class's weights (C,).

    Without what speaks against the class, and divided by its largest value; 0 everywhere if nothing speaks for it.
    """
    raise NotImplementedError


# %%
check("19/activation", activation)

# %% [markdown]
# **3.** A detector finds everything several times.


# %% tags=["exercise", "exercise-suppress"]
def suppress(boxes, scores, limit):
    """Non-maximum suppression: the numbers of the boxes that are kept, the most probable first.

    boxes (N, 4): top, left, bottom, right. A box is left out if its intersection over union with a kept one of a
    higher score is above the limit.
    """
    raise NotImplementedError


# %%
check("19/suppress", suppress)

# %% [markdown]
# ## What to read next
# - Zhou et al.: *Learning deep features for discriminative localization* (CVPR 2016).
# - Zech et al.: *Variable generalization performance of a deep learning model to detect pneumonia in chest
#   radiographs* (PLOS Medicine 2018).
# - DeLong, DeLong and Clarke-Pearson: *Comparing the areas under two or more correlated receiver operating
#   characteristic curves* (Biometrics 1988).
# - Irvin et al.: *CheXpert: a large chest radiograph dataset with uncertainty labels and expert comparison*
#   (AAAI 2019).
