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
# # 07 · Fair to whom, and right for which reason?
#
# **After this chapter you can** say who pays for a high mean, and whether a gap between groups is more than noise;
# compare cures by what they change for each group; find out whether a classifier reads the disease or the hospital, by
# hiding what it ought to look at; and judge an explanation by more than its looks.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains of three sites, no network | 1 | under 1 GB |
# | `full` | 688 chest X-rays of two hospitals, with sex, age and tuberculosis | about 6 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** small test groups, wide intervals and several gaps that cannot
# be told from chance; and, on the other hand, much that can be read from images which show nothing of the disease.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, fair_figures, metrics, pooled, statistics, teaching, widgets
from medcook.cohorts import outcome_rows
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.measures import equity, fairness
from medcook.methods.contrastive import contrast
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.fairness import cxr_clip_fairness, fairseg, mask_of_truth, xai_clip
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# Above an X-ray there is a question, and a model that answers it well. Does it answer from the lungs? Take them away,
# and train again. Whatever can then still be told is not in the lungs' texture: it is their outline, the hospital, the
# machine, the posture, the letters at the border. A model that may use it will. Here is what such models are shown:

# %% tags=["cover"]
masking = find_recipe("mask-of-truth")
views = ("full", "without lungs", "without lung box", "lungs only", "silhouette")
masked = masking.run(profile, "full", 0)[1]
shown = masked.samples("val")
ill = shown.labels.flatten(1)[:, 0] == 1
rows = [int(kind.nonzero()[len(shown.images) // 16, 0]) for kind in (ill, ~ill)]
told = teaching.need_summary("mask-of-truth").arms if profile != "quick" else {}
titles = [f"{arm}\nAUC {told[arm].mean:.2f}" if arm in told else arm for arm in views]
fair_figures.view_sheet(
    {title: masking.arms[arm].method.view(shown.images[rows]) for title, arm in zip(titles, views, strict=True)},
    masked.data.manifest,
    [f"{masked.outcome}: {'yes' if ill[row] else 'no'}".replace("group", str(masked.positive)) for row in rows],
)

# %% [markdown]
# An AUC is the chance that an ill person scores above a healthy one; 0.5 is a coin. Those above the columns are of
# test patients, each of a classifier that was trained on that view and nothing else. We come back to them.
# Two questions run through the chapter: **for whom** is the model right, and **for which reason**?
#
# ## The failure first: who pays for the mean?
# A controlled experiment. All training patients of one hospital, and so few of the other that they are 5% of all:
# it is known beforehand who ought to be served badly, and why. Plain training (empirical risk minimisation, ERM)
# minimises the mean loss, and the mean is the large group's.

# %%
rare = find_recipe("fairseg")
method, task, budget, seed = rare.run(profile, "ERM", 0)
baseline = fit(method, task, budget, seed)


def by_patient(fitted):
    """Dice of the validation patients, with their group."""
    return pd.DataFrame([row for case in fitted.task.cases("val") for row in fairseg.group_rows(fitted, case)])


scored = by_patient(baseline)
print(f"{budget.steps} steps, {baseline.cost['seconds']:.0f} s,", "cached" if baseline.cached else "trained now")
print(f"{task.rare} is {task.share:.0%} of {len(task.labelled_patients)} training patients")
print(f"mean Dice of all {scored['patient_id'].nunique()} validation patients: {scored['dice'].mean():.3f}")
display(fairness.by_group(scored).round(3))

# %%
fair_figures.worst_of_groups(baseline, scored, count=1)

# %% [markdown]
# Median and lowest cases of each group, on validation patients. No mean shows these, and the mean of a test set that
# is mostly one hospital is the mean of that hospital. Are the groups really apart, or is it that we now know where to
# look?
#
# ## Is a gap a gap?
# Two groups of a few patients always differ. And a gap, best minus worst, is never negative, so that its bootstrap
# interval *cannot* reach zero: it will look significant whatever you measure. The honest question is what gap the very
# same patients show when the names of the groups are **dealt out at random**. That is a permutation test.

# %%
teaching.show_code(fairness.gap_test, fairness.dealt_gaps, fairness.gaps)

# %% tags=["nbval-check-output", "mechanism"]
small = pd.DataFrame({"patient_id": range(8), "dice": [0.91, 0.93, 0.90, 0.94, 0.92, 0.89, 0.80, 0.83]})
print(fairness.gap_test(small.assign(group=list("AAAAAABB"))))
print(fairness.gap_test(small.assign(group=list("ABABABAB"))))

# %% [markdown]
# The committed evidence has the test patients, and three draws of the rare patients. All of them, by hospital:

# %%
frame = evidence_frame("fairseg", "full")
for arm, mine in frame.groupby("arm", sort=False):
    print(f"{arm}: {fairness.gap_test(mine)}")

# %% [markdown]
# Those whose sex and age are known, by three groupings of the same patients:

# %%
audited = fair_figures.in_words(evidence_frame("cxr-clip-fairness", "full"), cxr_clip_fairness.WORDS)
people = audited[["patient_id", *cxr_clip_fairness.WORDS]].drop_duplicates("patient_id")
plain = frame[frame["arm"] == "ERM"].merge(people, on="patient_id")
groupings = {"site": "site", "sex": "sex", "age": "age"}
fair_figures.null_figure(plain, "chest_xray", groupings)

# %%
fair_figures.gap_table(plain, groupings)

# %% [markdown]
# How to read it. Orange right of the dashed line: more than chance makes. Left of it: **these data cannot tell it from
# noise**, which is not the same as *fair*: with so few patients a real gap of that size would look just so. The gap by
# hospital is told from noise with all patients (0.012), and not with those whose age is known (0.006). And testing
# several groupings, or several networks, is several chances to be surprised, hence Holm's correction; the four tests
# above have none, and with it none of them would pass. The bootstrap intervals of the gaps are all above zero: they
# have to be. A table of subgroups without n, without intervals and without such a test is a table of anecdotes.
#
# Note also how *small* the gap by hospital is. A hospital that is 5% of the training images was expected to pay dearly;
# for lungs, and with strong augmentation, it hardly does. A harder organ may well behave otherwise.
#
# ## One number for quality and fairness, and its two formulas
# FairSeg (Tian et al., ICLR 2024) divides the overall Dice by one plus how far the groups are from it. Two formulas go
# by the same name: the published one **sums** the distances to the overall value, an earlier version of the same paper
# takes the groups' standard deviation, the **spread**. They are not two scales for one thing:

# %%
teaching.show_code(equity.equity_scaled, equity.equity_scaled_std)

# %% tags=["nbval-check-output", "mechanism"]
for name, north, south in (("network X", 0.9750, 0.6750), ("network Y", 0.8375, 0.6875)):
    overall = 0.75 * north + 0.25 * south
    both = [formula(overall, [north, south]) for formula in (equity.equity_scaled, equity.equity_scaled_std)]
    print(f"{name}: overall {overall:.3f}, gap {north - south:.3f};", end=" ")
    print(f"by the sum {both[0]:.3f}, by the spread {both[1]:.3f}")

# %% [markdown]
# The sum prefers Y, the spread prefers X. And X, which one of them rejects for its gap, is nearly as good as Y for the
# south and much better for the north. No formula settles whether that is unfair; **show the groups**, and say which
# formula you scale by.
#
# ## The cures
# **Inverse frequency**: each group weighs the same in sum. It knows the sizes, not the errors. **GroupDRO** (Sagawa et
# al., ICLR 2020): minimise the worst group's loss, softly. **Fair error-bound scaling** (FairSeg): weigh a group by its
# remembered error over the best group's. The recipe's own code:

# %%
teaching.show_code(fairseg.GroupMemory.ratio, fairseg.FairErrorBoundScaling, fairseg.InverseFrequency, fairseg.GroupDRO)

# %% tags=["nbval-check-output", "mechanism"]
both, sizes = torch.tensor([0, 1]), torch.tensor([95, 5])
memory = fairseg.GroupMemory(2, pace=0.1)
memory.remember(both, torch.tensor([0.05, 0.20]), torch.tensor([0.30, 0.80]), sizes)
weigh = {
    "equal": fairseg.FairErrorBoundScaling(gamma=0.0),
    "fair error-bound": fairseg.FairErrorBoundScaling(),
    "inverse frequency": fairseg.InverseFrequency(),
}
for name, cure in weigh.items():
    print(f"{name:18s} weight of a sample, large and rare group:", cure.weights(memory).numpy().round(3))
for _ in range(20):
    fairseg.GroupDRO().total(memory, both, memory.loss, sizes / 100, None)
print(f"{'GroupDRO':18s} share of the loss after 20 steps:         ", memory.odds.softmax(0).numpy().round(3))

# %% [markdown]
# One more thing. What the paper's words say (weigh the loss) and what its published code does differ: the code shrinks
# the *predictions* of a hard group inside the Dice loss. That is not a weight. Two images with the same content, one of
# an easy group and one of a hard one; how strongly does each pull?

# %% tags=["nbval-check-output", "mechanism"]
logits = torch.zeros(2, 2, 4, 4, requires_grad=True)
labels = (torch.arange(16).reshape(1, 4, 4) % 2).repeat(2, 1, 1)
factors = torch.tanh(memory.ratio(1.0))
fairseg.squared_dice(logits, labels, factors).backward()
pull = logits.grad.abs().sum((1, 2, 3))
print("factors, easy and hard:", factors.numpy().round(3), " pull:", pull.numpy().round(3))

# %% [markdown]
# The hard group pulls *less*. Both readings are arms of the recipe; the evidence at `full` has the first. Now one cure
# live, on the same patients and with the same steps:

# %%
cured = fit(*rare.run(profile, "fair error-bound scaling", 0))
fair_figures.group_figure({"ERM": scored, "fair error-bound scaling": by_patient(cured)}, task.dataset)

# %% [markdown]
# And those with evidence on the test patients, three draws each: left every group, right what either formula makes of
# it.

# %%
teaching.show_evidence("fairseg")

# %%
overview = {}
for arm in teaching.need_summary("fairseg").arms:
    mine = frame[frame["arm"] == arm]
    tested = fairness.gap_test(mine)
    gap, worst = (statistics.interval(mine, metric) for metric in ("dice_gap", "worst_group_dice"))
    overview[arm] = {
        "mean Dice": f"{mine['dice'].mean():.3f}",
        "worst group": teaching.with_interval(worst.mean, worst.low, worst.high),
        "gap": teaching.with_interval(gap.mean, gap.low, gap.high),
        "p, dealt at random": f"{tested.p:.2g}",
        "n": " + ".join(map(str, tested.n.values())),
    }
pd.DataFrame.from_dict(overview, orient="index")

# %% [markdown]
# How to read it. First the worst group, then the mean: **a gap also closes when the good group gets worse**, and then
# nobody was helped (look at GroupDRO's row with that in mind). Then the comparison that the ingredient has to win:
# *fair error-bound scaling* against the same code with *equal weights*. Where the interval of that difference includes
# zero, the weights have not been shown to do anything here, however nice the gap looks. A cure can only be seen where
# there is something to cure.
#
# ## Right for the wrong reason
# *Mask of truth* (Sourget et al. 2024). Train a classifier of tuberculosis on X-rays **without lungs**. Hiding must
# leak nothing: hidden pixels must not shape the normalisation either.

# %%
teaching.show_code(mask_of_truth.visible, mask_of_truth.hide)

# %% tags=["nbval-check-output", "mechanism"]
region = torch.zeros(1, 1, 3, 5)
region[..., 1, 1:4] = 1
region[..., 1, 2] = 0
picture = torch.arange(15.0).reshape(1, 1, 3, 5)
spoilt = torch.where(region > 0, 1000.0, picture)
for name in ("without", "without box", "only"):
    seen = mask_of_truth.hide(picture, mask_of_truth.visible(region, name, 1))
    same = torch.allclose(seen, mask_of_truth.hide(spoilt, mask_of_truth.visible(region, name, 1)))
    print(f"{name:12s} hides {int((seen == 0).sum()):2d} pixels; knows what is in the region: {not same}")

# %% [markdown]
# Two live, on validation patients: one that sees all but the region, and one that does not even see its outline.

# %%
classifiers = {arm: fit(*masking.run(profile, arm, 0)) for arm in ("without lungs", "without lung box")}
found = {}
for arm, one in classifiers.items():
    told = pd.DataFrame([row for case in one.task.cases("val") for row in outcome_rows(one, case, group="site")])
    auc = statistics.interval(told, "auc")
    found[arm] = {
        "AUC, 95% interval": teaching.with_interval(auc.mean, auc.low, auc.high),
        "patients": auc.n_patients,
        "of these ill": int(told["outcome"].sum()),
    }
pd.DataFrame.from_dict(found, orient="index")

# %% [markdown]
# And what the committed evidence says. Three controls decide what it means. **Shuffled**: outcomes dealt out at random
# show what chance looks like. **Silhouette**: nothing but the outline of the lungs, because sick lungs have another
# shape, and what was cut out has an outline. **Without lung box** (live, above): only a rectangle is left of it.
# Right: each classifier, tested on images that are masked otherwise than those it was trained on.

# %%
teaching.show_evidence("mask-of-truth")

# %%
looks = evidence_frame("mask-of-truth", "full").query("arm == 'full'")
share, area = (statistics.interval(looks, column) for column in ("attribution", "area"))
print(f"of what the classifier of whole images attributes, {share.mean:.2f} lies in the lungs, which are", end=" ")
print(f"{area.mean:.2f} of the image ({share.n_patients} patients)")
for site, part in looks.groupby("group"):
    auc = statistics.interval(part, "auc")
    print(f"{site}: AUC {teaching.with_interval(auc.mean, auc.low, auc.high)}, {auc.n_patients} patients")

# %% [markdown]
# How to read it. An AUC without lungs whose interval stays above that of *shuffled* means that the rest of the image,
# or the outline of what is missing, gives the outcome away; the silhouette says how much the outline alone does. Here
# the classifier without lungs is not told apart from the one that sees them (0.84 and 0.83): **a high AUC is no
# evidence of a reason**. The classifier of whole images is free to use the same clues, and of what it attributes only
# half as much lies in the lungs as their area would make it. (Attribution is a measurement with faults of its own: see
# the end of this chapter.)
#
# ## A shortcut, planted on purpose
# Ill patients get a chest drain; a model that finds drains finds treated patients (Sourget et al. 2025). Real drains
# are not at hand, so **we draw them**: into 80% of the training images with tuberculosis, and nobody else's. Then the
# very same test patient can be seen with and without it, which real data sets do not allow.

# %%
teaching.show_code(cxr_clip_fairness.draw_drain)

# %%
patients = shown.images[rows][:, :1]
drains = torch.cat([cxr_clip_fairness.draw_drain(one[None], f"patient {k}") for k, one in enumerate(patients)])
fair_figures.view_sheet({"as it is": patients, "simulated drain": drains}, masked.data.manifest)

# %% [markdown]
# AUC where the ill have the drain, where they have none, and how much of the first is the drain's. Only the models
# whose name says so have seen drains in training. A drawn line makes the others take some for ill, too.

# %%
drops = {}
for arm in ("contrastive, probe", "contrastive, simulated drain", "classifier, probe", "classifier, simulated drain"):
    measured = cxr_clip_fairness.with_and_without_drain(audited[audited["arm"] == arm])
    drops[arm] = {name: teaching.with_interval(e.mean, e.low, e.high) for name, e in measured.items()}
pd.DataFrame(drops).T.rename(columns={"with": "with drain", "without": "without", "difference": "the drain's part"})

# %% tags=["nbval-check-output", "mechanism"]
blank = torch.zeros(1, 1, 32, 32)
tube = cxr_clip_fairness.draw_drain(blank, "the same name, the same tube", width=0.03)
print(f"drain: {int((tube > 1).sum())} of {tube.numel()} pixels, brightest {tube.max().item():.3f}")
scores, ill_or_not = np.array([0.2, 0.6, 0.4, 0.4, 0.1]), np.array([1, 1, 0, 0, 0])
print(f"AUC {pooled.auc(scores, ill_or_not):.3f},", end=" ")
print(f"with a drain that adds 0.3 for the ill {pooled.auc(scores + 0.3 * ill_or_not, ill_or_not):.3f}")

# %% [markdown]
# A model that lives on the shortcut looks *better* on a test set that has it. Only the column *without* shows what is
# left for the patient who comes in untreated, and that is the patient for whom the model was made.
#
# ## What embeddings know
# A contrastive image-text model learns which caption belongs to which image. Captions here tell the finding, the
# hospital and the age; **never the sex**. Can it be read from the embeddings all the same?

# %%
teaching.show_code(contrast, cxr_clip_fairness.Probed)

# %% tags=["nbval-check-output", "mechanism"]
captions = torch.tensor([0, 1, 0])
vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
for scale in (1.0, 10.0):
    right, wrong = contrast(vectors, vectors, captions, scale), contrast(vectors, vectors.flip(1), captions, scale)
    print(f"scale {scale:4.1f}: loss {right:.3f} with the right captions, {wrong:.3f} with the wrong ones")

# %% [markdown]
# The usual check is a scatter plot of two principal components, coloured by group. Look for groups:

# %%
contrastive = audited[audited["arm"] == "contrastive, probe"]
fair_figures.plane_figure(contrastive, list(cxr_clip_fairness.WORDS), "chest_xray")

# %% [markdown]
# The hospital is there at a glance; age, which the captions name as well, is not, nor is what they do not name. And two
# components are two of many. A linear probe reads all of them, and is tested on patients it has not seen; the
# comparison is the same probe on the two that are in the plot.

# %%
teaching.show_evidence("cxr-clip-fairness")

# %% [markdown]
# How to read it. "No clusters in the plot" is no evidence that an attribute is absent: the probe decides, not the eye.
# A probe whose interval stays above 0.5 shows that the attribute *can* be read; not that the finding is made from it.
# Sex does show in a chest, and the hospital in full. Age, which the captions do name, could not be read here with any
# certainty: its intervals reach down to 0.5.
#
# Does the finding's AUC differ between subgroups? With the n that decides what may be said:

# %%
subgroups = {
    arm: cxr_clip_fairness.by_subgroup(audited[audited["arm"] == arm])
    for arm in ("contrastive, probe", "classifier, probe")
}
fair_figures.subgroup_figure({arm.split(",")[0]: table for arm, table in subgroups.items()}, "chest_xray")

# %% [markdown]
# Where intervals overlap most of the way, there is no ranking of subgroups to report. Those of men and women hardly
# overlap; they are one pair among seven subgroups, and want a test of their own. And the AUC is blind to one thing: it
# asks whether the ill score above the healthy *within* a group. A model whose scores are shifted for one group can have
# the same AUC in both and still, at the one threshold that a clinic uses, miss the ill of one group. Choose the
# attribute and move the threshold (in a live notebook); here is one setting:

# %%
explored = audited.assign(score=audited["finding_score"], outcome=audited["finding_outcome"])
arms = ["classifier, probe", "contrastive, probe", "classifier, simulated drain"]
explored = pd.concat([explored[explored["arm"] == arm] for arm in arms])
fair_figures.threshold_view(explored[explored["arm"] == arms[0]], "age", 0.5, "chest_xray")

# %%
widgets.threshold_explorer(explored, "chest_xray", list(cxr_clip_fairness.WORDS))

# %% [markdown]
# ## Explanations, where text and image agree
# **Occlusion**: blank one window after the other, note how much evidence is lost. Most windows lie where nothing is,
# each costs a prediction, and their noise ends up in the map. *XAI-CLIP* (Alzubaidi et al. 2026) asks an image-text
# model for the structure by name, and blanks only there.

# %%
teaching.show_code(xai_clip.restrict, xai_clip.occlusion, xai_clip.XaiClip.text_region, xai_clip.XaiClip.region)

# %% tags=["nbval-check-output", "mechanism"]
picture = torch.zeros(1, 6, 6)
picture[0, 1:3, 1:3] = 1.0
there = picture[0] > 0


def counts(images):
    """Evidence of a toy network: how much of the square is still bright."""
    return images.sum((1, 2, 3))


masks = xai_clip.windows((6, 6), 3, 1)
for name, region in (("everywhere", there | True), ("guided", there)):
    tried = xai_clip.restrict(masks, region)
    saliency = xai_clip.occlusion(counts, picture, tried, 0.0)
    inside = saliency[there].sum() / saliency.sum()
    print(f"{name:10s} {len(tried):2d} windows, {inside:.3f} of the saliency inside")

# %%
explaining = find_recipe("xai-clip")
network = fit(*explaining.run(profile, "roi-guided", 0))
ways = {arm: explaining.method(profile, arm) for arm in ("plain occlusion", "roi-guided", "random region")}
organs = network.task.samples("val").labels.flatten(1).float().mean(1)
numbers = organs.argsort(descending=True, stable=True)[[0, len(organs) // 2]].tolist()


def overlap(saliency, truth):
    """Dice of what is salient with the truth."""
    return metrics.score(xai_clip.salient(saliency).numpy(), truth.numpy()).dice


explained = fair_figures.explain(network, ways, numbers, overlap)
fair_figures.saliency_sheet(**explained, manifest=network.task.data.manifest)

# %%
teaching.show_evidence("xai-clip")

# %% [markdown]
# How to read it. A map that is cut down to a region overlaps with that region, whatever the network does: *random
# region* shows what cutting in the wrong place makes, and the region alone, without any network's evidence, may already
# overlap as much as the map does (printed below). Overlap with the lung says that a map is **plausible**. Whether it is
# **faithful** is another question: take away the most salient tenth of the pixels; how much evidence goes? A plausible
# map of a model that looks elsewhere is a lie that looks good, and the last panel is the one that can tell.

# %%
maps = evidence_frame("xai-clip", "full").groupby("arm", sort=False)
columns = ["dice", "region_dice", "evaluations", "faithfulness"]
display(maps[columns].mean().round(3).rename(columns={"region_dice": "region alone, Dice", "dice": "map, Dice"}))
rows = {name: part for name, part in maps}
faithful = statistics.difference(rows["roi-guided"], rows["plain occlusion"], "faithfulness")
told = teaching.with_interval(faithful.mean, faithful.low, faithful.high, sign=True)
print(f"evidence lost with the most salient tenth, guided minus plain: {told}, {faithful.n_patients} patients")

# %% [markdown]
# Half of the predictions saved and a map that looks like a lung: that much the region gives. Whether the map also says
# more of the *network* is for the last line, and an interval that includes zero there means: not shown.

# %% [markdown]
# ## Ablation
# Squares: the method against its comparator. Circles: the method against itself without the claimed ingredient.

# %%
papers = teaching.measured("07_fairness")
comparison.forest([teaching.need_summary(paper) for paper in papers])

# %% [markdown]
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("07_fairness"))
teaching.verdict_table(*papers)

# %% [markdown]
# **What differs from the papers.** Two hospitals stand for identity groups, one disease for many, small networks from
# scratch for large pre-trained ones; drains are simulated. **What is the same**: the questions, the metrics, and that
# every arm gets the same steps.
#
# **Four questions for a paper on fairness.** How many patients has the smallest group? What gap do random groups of
# these sizes show? Which equity formula, and what are the groups' own numbers? What can be told from the image when
# the disease is not in it?
#
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** Both equity-scaled means. The overall value is that of all patients; alpha is 1.


# %% tags=["exercise", "exercise-equity_scaled"]
def equity_scaled(values, groups):
    """(by the sum, by the spread): both equity-scaled means of values, one a patient, with their groups."""
    raise NotImplementedError


# %%
check("07/equity_scaled", equity_scaled)

# %% [markdown]
# **2.** The permutation test of a gap. Deal the groups' names out `times` times (`rng` is a numpy generator). The way
# they were dealt in truth is one of the possible ways, so it counts among them: p is never zero.


# %% tags=["exercise", "exercise-permutation_p"]
def permutation_p(values, groups, times, rng):
    """p of the gap between the best and the worst group's mean, by dealing the groups out `times` times."""
    raise NotImplementedError


# %%
check("07/permutation_p", permutation_p)

# %% [markdown]
# **3.** What is left without the shortcut? `plain` are the scores of the images as they are, `drained` those of the
# same images with a drain, `ill` says who is. In the first AUC all ill have a drain; the healthy never do. Count
# pairs.


# %% tags=["exercise", "exercise-shortcut_drop"]
def shortcut_drop(plain, drained, ill):
    """(AUC with drains, AUC without, the drop): scores of images as they are and with a drain, and who is ill."""
    raise NotImplementedError


# %%
check("07/shortcut_drop", shortcut_drop)

# %% [markdown]
# ## What to read next
# - Tian et al.: *FairSeg* (ICLR 2024), its preprint and its code: three definitions of one idea.
# - Sagawa et al.: *Distributionally Robust Neural Networks for Group Shifts* (ICLR 2020): GroupDRO, and why
#   regularisation matters more than the weights.
# - Sourget et al.: *Mask of truth* (2024) and *Fairness and Robustness of CLIP-Based Models for Chest X-rays* (2025).
# - Zech et al.: *Variable generalization performance of a deep learning model to detect pneumonia in chest
#   radiographs* (PLOS Medicine 2018): the hospital, read from the image.
# - Adebayo et al.: *Sanity Checks for Saliency Maps* (NeurIPS 2018): maps that do not care about the model.
