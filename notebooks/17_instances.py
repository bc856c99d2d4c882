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
# # 17 · Instances
#
# **After this chapter you can** separate things of one kind that touch, and put together one that is torn; make pixels
# vote for the middle of what they belong to; let a semantic and an instance segmentation help each other; and judge all
# of that by panoptic quality.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, on slides, no network | 1 | under 1 GB |
# | `full` | glass slides composed of sections of real hearts (ACDC) | about 8 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that a mask that is nearly perfect miscounts all the same, and
# that a count can be right although no border was ever seen.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, instance_figures, plots, teaching
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.instance_figures import Counted, Election
from medcook.losses import cross_entropy_and_dice
from medcook.measures import instances
from medcook.metrics import dice
from medcook.preparation import Preparation, zscore
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.instances import _centroids, _glass, _parts, co_seg, slidesegmenter
from medcook.sampling import trained
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# How many cross-sections lie on a slide? The first network finds tissue, and each connected part of it counts as a
# section: a torn one counts twice, two that touch count once. The second one tells of every pixel where the middle of
# its section is. Numbers in brackets: by how many the count is wrong.

# %% tags=["cover"]
recipe = find_recipe("slidesegmenter")
models = {}
for name in ("connected parts", "slidesegmenter"):
    method, task, budget, seed = recipe.run(profile, name, 0)
    task = replace(task, evaluation="val")  # the chapter looks at validation patients; the test set is the recipes'
    models[name] = fit(method, task, budget, seed)


def found_on(fitted, light):
    """Sections (H, W) that a trained method finds on a slide, and what its network saw."""
    image = zscore(torch.from_numpy(light).float())
    found, seen = fitted.method.sections(trained(fitted), image[None])
    return found[0], seen


slides = [slide for case in task.cases("val") for slide in task.preparation.slides(case)]
answers = [{name: found_on(fitted, slide.light)[0] for name, fitted in models.items()} for slide in slides]
wrong = pd.DataFrame(
    [
        {name: abs(int(found.max()) - int(slide.sections.max())) for name, found in answer.items()}
        for slide, answer in zip(slides, answers, strict=True)
    ]
)


def counted(numbers):
    """Slides with these numbers, their sections, and what both methods find."""
    shown = [Counted(slides[n].light, slides[n].sections, answers[n]) for n in numbers]
    return instance_figures.counted_figure(shown, task.data.manifest)


gain = (wrong["connected parts"] - wrong["slidesegmenter"]).to_numpy()
counted(np.argsort(-gain, kind="stable")[:3])

# %% [markdown]
# **What is real here, and what is not.** There are no whole-slide images at hand. Tissue and outlines are real: slices
# of hearts, neighbours of one patient on one slide, as serial sections of a block lie side by side. How they lie, touch
# and tear, their stain, the light, dust and pen are simulated, so that the truth is known. No patient is on both sides
# of the split.
#
# Colours follow the law of Beer and Lambert: what a stain or an ink absorbs adds up, and light fades exponentially.

# %%
teaching.show_code(_glass.absorbed, _glass.torn)

# %% tags=["nbval-check-output", "mechanism"]
tissue = np.ones((1, 1), bool)
for name, grey in (("dark", 0.0), ("bright", 1.0)):
    absorbed = _glass.absorbed(np.full((1, 1), grey), tissue, np.random.default_rng(0))[:, 0, 0]
    colours = np.exp(-absorbed)
    print(f"{name:6} in the image: red {colours[0]:.3f}, green {colours[1]:.3f}, blue {colours[2]:.3f} of the light")

# %% [markdown]
# ## The mechanisms
# **Pixels vote.** *SlideSegmenter* (Lucassen et al. 2024) learns, beside masks of tissue and pen, how far each pixel is
# from the centroid of its section, down and to the right. Pixel minus distance is a vote for a place. All votes of a
# section fall near one place, whatever lies between its fragments. The peaks of a two-dimensional histogram of votes
# are the sections, and each pixel goes to the peak that is nearest to its vote.

# %%
teaching.show_code(
    _centroids.to_centroids,
    slidesegmenter.votes_of,
    slidesegmenter.histogram,
    slidesegmenter.peaks,
    slidesegmenter.by_histogram,
)

# %% tags=["nbval-check-output", "mechanism"]
torn_and_touching = np.zeros((64, 64), int)
torn_and_touching[8:18, 6:16] = torn_and_touching[8:18, 22:32] = 1
torn_and_touching[38:54, 8:24], torn_and_touching[38:54, 24:40] = 2, 3
mask = torn_and_touching > 0
true_distance = _centroids.to_centroids(torch.from_numpy(torn_and_touching)[None])[0].numpy()
blurred = true_distance + np.random.default_rng(0).standard_normal(true_distance.shape)
print("sections:", torn_and_touching.max())
for name, way in slidesegmenter.WAYS.items():
    found = way(mask, blurred)
    quality = instances.quality(found, torn_and_touching)
    print(f"by {name:9} {found.max()}, panoptic quality {quality.panoptic:.3f}")

# %% [markdown]
# Connected parts count right by accident: one too many, one too few. So a count alone is no proof that sections were
# found, and the quality of the sections stands beside it. Watershed knows where middles are, but floods over connected
# tissue alone.
#
# On a slide, by the trained network:

# %%
network = models["slidesegmenter"]
chosen = int(np.argmax(gain))
sections, seen = found_on(network, slides[chosen].light)
tissue, distance = (seen.tissue[0] > 0).numpy(), seen.distance[0].numpy()
votes = slidesegmenter.votes_of(tissue, distance)
counts = slidesegmenter.histogram(votes, tissue.shape)
election = Election(votes, counts, slidesegmenter.peaks(counts), sections)
instance_figures.votes_figure(slides[chosen].light, election, task.data.manifest)

# %% [markdown]
# **Panoptic quality** (Kirillov et al. 2019). A found instance and a true one are a match where their intersection over
# union is above one half; no instance can have two. With matches $TP$, found ones without a match $FP$, and missed ones
# $FN$,
#
# $$PQ = \underbrace{\frac{|TP|}{|TP| + (|FP| + |FN|)/2}}_{\text{detection}} \cdot
# \underbrace{\frac{1}{|TP|} \sum_{TP} IoU}_{\text{segmentation}}$$
#
# The aggregated Jaccard index (AJI) puts all pixels of all pairs together; one found instance that covers several true
# ones is counted with each. Dice of the masks sees none of it:

# %%
teaching.show_code(instances.quality, instances.aggregated_jaccard)

# %% tags=["nbval-check-output", "mechanism"]
truth = np.zeros((12, 22), int)
truth[1:11, 1:11], truth[1:11, 11:21] = 1, 2
split = truth.copy()
split[6:11, 1:11] = 3
shifted = np.roll(truth, 1, axis=1)
for name, found in (("right", truth), ("merged", (truth > 0) * 1), ("one split", split), ("shifted", shifted)):
    pq, dq, sq = instances.quality(found, truth)
    aji = instances.aggregated_jaccard(found, truth)
    masks = dice(found > 0, truth > 0)
    print(f"{name:9} PQ {pq:.3f} = {dq:.3f} x {sq:.3f}, AJI {aji:.3f}, Dice of the masks {masks:.3f}")

# %% [markdown]
# **Panoptic** means that every pixel has a class and an instance. Then a segment is one class within one instance, and
# the mean over classes is the figure: both must be right.
#
# **Maps that jump at borders.** *HoVer-Net* (Graham et al. 2019) divides the way to the middle by the longest there is:
# from -1 to 1 in every instance, however large. Where two touch, the map falls from 1 to -1, and that is where the
# border is.

# %%
teaching.show_code(_centroids.directions, _centroids.by_directions)

# %% tags=["nbval-check-output", "mechanism"]
row = torch.tensor([[0, 1, 1, 1, 1, 1, 2, 2, 2, 0]])[None]
print("instances ", row.flatten().tolist())
print("to the right", [round(value, 2) + 0.0 for value in _centroids.directions(row)[0, 1].flatten().tolist()])
discs = np.zeros((48, 64), int)
rows, columns = np.indices(discs.shape)
for number, (down, across) in enumerate([(16, 16), (16, 34), (32, 25)], 1):
    discs[(np.hypot(rows - down, columns - across) < 10) & (discs == 0)] = number
maps = _centroids.directions(torch.from_numpy(discs)[None])[0].numpy()
found = _centroids.by_directions(discs > 0, maps)
parts = _parts.by_parts(discs > 0)
print(f"three discs that touch: {parts.max()} part, {found.max()} instances", end=", ")
print(f"panoptic quality {instances.quality(found, discs).panoptic:.3f}")

# %% [markdown]
# **Two branches that prompt each other.** In *Co-Seg++* (Xu et al. 2025) a semantic and an instance branch answer
# twice. The first answer of each is a prompt for the other, as clicks are for SAM: a prompt encoder makes a map of it,
# which is added to the embedding of the image. The ablation lets each branch see its own first answer instead.

# %%
teaching.show_code(co_seg.CoNet.forward, co_seg.CoNet.answer)

# %% tags=["nbval-check-output", "mechanism"]
picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
names = ("semantic", "instance")
for prompts in ("mutual", "own", "to instances"):
    torch.manual_seed(0)
    tiny = co_seg.CoNet(3, (4, 4, 8, 8, 8), 8, True, prompts).eval()
    with torch.no_grad():
        before = tiny(picture)[1]
        for source, said in enumerate(names):
            tiny.decoders[source].tokens[0] += 1  # what a branch says at first
            after = tiny(picture)[1]
            tiny.decoders[source].tokens[0] -= 1
            moved = [name for name, a, b in zip(names, before, after, strict=False) if (a - b).abs().max() > 1e-3]
            print(f"{prompts:12} the {said} branch is heard by: {', '.join(moved) or 'nobody'}")

# %% [markdown]
# Summaries of both decoders are to agree: a symmetric divergence of Kullback and Leibler, which is 0 where both say the
# same.

# %%
teaching.show_code(co_seg.disagreement)

# %% tags=["nbval-check-output", "mechanism"]
one = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
for name, other in (("the same", one), ("the same odds", one + 5), ("another", -one), ("nothing", 0 * one)):
    print(f"{name:13} {co_seg.disagreement(one, other).item():.3f}")

# %% [markdown]
# ## Crowded slides
# Classes are the real structures of the hearts, instances the sections, most of which touch another one. Two networks
# of their own, and two branches that prompt each other:

# %%
recipe = find_recipe("co-seg")
pair = {}
for name in recipe.compare:
    method, crowds, budget, seed = recipe.run(profile, name, 0)
    crowds = replace(crowds, evaluation="val")
    pair[name] = fit(method, crowds, budget, seed)
crowded = [slide for case in crowds.cases("val") for slide in crowds.preparation.slides(case)]
segmented = [
    {
        name: fitted.method.panoptic(trained(fitted), zscore(torch.from_numpy(slide.light))[None])[0]
        for name, fitted in pair.items()
    }
    for slide in crowded
]


def panoptic(answer, slide):
    """The mean over classes of the panoptic quality of segments."""
    of = [
        [co_seg.segments(*maps, value) for maps in (answer, (slide.structures, slide.sections))]
        for value in crowds.structures
    ]
    return float(np.mean([instances.quality(*each).panoptic for each in of if np.any(each)]))


table = pd.DataFrame(
    [
        {name: panoptic(answer, slide) for name, answer in each.items()}
        for slide, each in zip(crowded, segmented, strict=True)
    ]
)


def segments(number):
    """A slide, its classes and instances, and what both networks find."""
    slide = crowded[number]
    titled = {f"{name}: PQ {table[name][number]:.2f}": maps for name, maps in segmented[number].items()}
    shown = {"truth": (slide.structures, slide.sections), **titled}
    return instance_figures.segments_figure(slide.light, shown, crowds.structures, crowds.data.manifest)


segments(int(table.mean(axis=1).argmax()))

# %% [markdown]
# Where they differ most, in favour of prompts, and against them:

# %%
difference = table[recipe.compare[0]] - table[recipe.compare[1]]
for number in (int(difference.argmax()), int(difference.argmin())):
    display(segments(number))

# %% [markdown]
# **One encoder, two masters.** Both branches of Co-Seg++ share an encoder. How hard does each loss pull at it, in the
# first step?

# %%
torch.manual_seed(0)
untaught = pair["co-seg++"].method.build(3, crowds.classes, 2)["model"]
some = crowds.samples("val")
told = some.raters[:8, 0]
first, second = untaught(some.images[:8])
losses = {
    "semantic": sum(cross_entropy_and_dice(each.semantic, some.labels[:8]) / 2 for each in (first, second)),
    "instance": sum(
        weight * co_seg.instance_loss(each.instance, _centroids.directions(told), told)
        for weight, each in ((0.5, first), (1.0, second))
    ),
}
for name, loss in losses.items():
    pulls = torch.autograd.grad(loss, list(untaught.encoders.parameters()), retain_graph=True)
    print(
        f"{name} loss {loss.item():.2f}, its gradient {torch.cat([pull.flatten() for pull in pulls]).norm():.2f} long"
    )

# %%
histories = {name: [fitted.history] for name, fitted in {**models, **pair}.items()}
plots.learning_curves(histories, title="one seed; losses of both papers differ in scale")

# %% [markdown]
# ## Ablation: is it the votes?
# The ablation of SlideSegmenter keeps the network and its distances, but floods from where they are smallest. That of
# Co-Seg++ keeps everything, but each branch is prompted by itself.

# %%
ids = teaching.measured("17_instances")
for paper in ids:
    display(teaching.evidence_table(paper))
teaching.verdict_table(*ids)

# %% [markdown]
# ## Successes and failures
# The validation slides on which SlideSegmenter's count is worst, and below them how often each count is wrong.

# %%
counted(np.argsort(-wrong["slidesegmenter"].to_numpy(), kind="stable")[:3])

# %%
pd.DataFrame({name: wrong[name].value_counts() for name in wrong}).fillna(0).astype(int).rename_axis("wrong by")

# %% [markdown]
# Small sections that touch have votes that fall into one peak. Where torn ones touch, the network cannot tell whose a
# fragment is, and its votes are spread. And a speck that is taken for tissue votes, too.
#
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three seeds, the last checkpoint.

# %%
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, and what was measured besides. `error of true parts` counts the connected parts of the true mask: so
# wrong is a segmentation without any error.

# %%
display(comparison.every_arm(summaries))
columns = {
    "slidesegmenter": ["error", "error of parts", "error of true parts", "pq", "dq", "sq", "tissue", "pen"],
    "co-seg": ["pq", "dice", "pq sections", "dq sections", "sq sections", "aji"],
}
for paper in ids:
    display(evidence_frame(paper, "full").groupby("arm")[columns[paper]].mean().round(3).rename_axis(paper))

# %% [markdown]
# **How to read it.**
#
# - **A perfect mask miscounts.** Parts of the true mask are wrong by 0.783 sections a slide, those of the predicted one
#   by 0.769, although its Dice is 0.988. Better masks would not help.
# - **Votes do.** The same count by SlideSegmenter is wrong by 0.358, its panoptic quality is 0.868 in place of 0.612.
# - **It is not the distances alone.** Flooded from where distances are smallest, the count is wrong by 0.858, no less
#   than by connected parts: fragments have minima of their own. Only who counts votes beyond connected tissue puts them
#   together.
# - **Prompts cost here, and sharing more.** Two networks of their own are at a panoptic quality of 0.630, branches that
#   prompt each other at 0.364, each prompted by itself at 0.408. Instances are found equally well by all (0.937, 0.935,
#   0.934); what suffers are the classes, with a Dice of 0.826, 0.664 and 0.684. The latter two share an encoder that
#   learns from nothing, at which the instance loss pulls much harder, with the paper's weights (in the first step by
#   61.57, the semantic loss by 0.29). There the encoder was pre-trained, and mostly frozen.
#
# ## All papers of the chapter
# *NCL-SM* (Khan et al. 2023) is a data set of muscle fibres in whole sections, each with its instance and its class.
# It has to be fetched by hand; manifest and reader are here.

# %%
display(teaching.chapter_papers("17_instances"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** There are whole slides of skin, nuclei by the hundred, and teeth in CT; here a few
# sections of hearts on slides of 96 pixels. Networks are narrow, learn from nothing and for a minute or two. **What is
# the same**: the mechanism, the slides and steps in all arms that are compared, and patients who train nothing and are
# scored once.
#
# **Four questions for a paper on instances.** Would a perfect mask count right, so that there is nothing to separate?
# Do instances that touch occur in the test set, and how often? What becomes of fragments? And is a match that hardly
# covers half of an instance good enough for what is measured afterwards?
#
# ## Play with it
# Tear one section, move the other one nearer, and see from where on who counts wrong (in a live notebook).

# %%
prepared = task.preparation
plain = Preparation(prepared.size, prepared.long_side, prepared.centre, prepared.smooth)
case = next(task.cases("val"))
pieces = _glass.pieces(plain.images(case)[:, 0].numpy(), plain.labels(case).numpy())


def arrange(gap, near):
    rng = np.random.default_rng(1)
    one, other = (_glass.turned(pieces[k * (len(pieces) - 1) // 2], rng) for k in (0, 1))
    one = _glass.torn(one, gap, rng) if gap else one
    maps = _glass.side_by_side(one, other, near, prepared.side)
    calm = replace(prepared.manner, dust=0, marks=0)
    slide = _glass.painted(*maps, calm, np.random.default_rng(2))
    return slide.light, slide.sections


asked = {name: lambda light, fitted=fitted: found_on(fitted, light)[0] for name, fitted in models.items()}
instance_figures.gap_explorer(arrange, asked, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** How good are the instances? `np` is numpy.


# %% tags=["exercise", "exercise-panoptic"]
def panoptic(found, truth):
    """Panoptic quality of two maps (H, W) of whole numbers: 0 is the background, any other number an instance.

    1.0 where both are empty.
    """
    raise NotImplementedError


# %%
check("17/panoptic", panoptic)

# %% [markdown]
# **2.** What does a network learn that shall vote?


# %% tags=["exercise", "exercise-distances"]
def distances(sections):
    """(2, H, W): how many rows below, and how many columns right of its section's centroid every pixel lies.

    sections (H, W): 0 is the background, where both are 0.
    """
    raise NotImplementedError


# %%
check("17/distances", distances)

# %% [markdown]
# **3.** Count the votes.


# %% tags=["exercise", "exercise-elect"]
def elect(votes, size, least):
    """How many sections there are: bins that are higher than their (up to eight) neighbours and hold `least` or more.

    votes (N, 2): row and column of each vote, whole numbers. The histogram has `size` (H, W) bins, one for each place;
    votes beyond it are lost.
    """
    raise NotImplementedError


# %%
check("17/elect", elect)

# %% [markdown]
# ## What to read next
# - Kirillov, He, Girshick, Rother and Dollár: *Panoptic segmentation* (CVPR 2019).
# - Graham et al.: *HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology images*
#   (Medical Image Analysis 2019).
# - Schmidt, Weigert, Broaddus and Myers: *Cell detection with star-convex polygons* (MICCAI 2018).
# - Stringer, Wang, Michaelos and Pachitariu: *Cellpose: a generalist algorithm for cellular segmentation* (Nature
#   Methods 2021).
