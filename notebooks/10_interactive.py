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
# # 10 · A person in the loop
#
# **After this chapter you can** turn a person's clicks into channels that a network sees; simulate people who correct,
# to train and to test; say how good a method is by the clicks that it takes; and tell what a click costs.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC) and hippocampi (Decathlon Task04), three of ten folds | about 4 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that further clicks help a network that has seen several in
# training, and that how it was taught and how it is built both matter.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from scipy import ndimage  # noqa: F401, for the exercises

from medcook import comparison, interactive, interactive_figures, teaching
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.interactive import (
    _asking,
    imis_bench,
    interactive_fcn,
    interformer,
    nuclick,
    prism,
    scribbleprompt,
    sdl_seg,
)
from medcook.sam.clicking import click_sheet, click_widget
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A click says what is meant (dotted: what a person has in mind). A network cannot see a click, but it can see a
# channel beside the image: bright where somebody clicked.

# %% tags=["cover"]
basics = find_recipe("interformer")
method, task, budget, seed = basics.run(profile, basics.compare[1], 0)
case = next(task.cases("val"))
targets = interactive_figures.prepared_targets(task, case)
first = next(iter(targets.values()))
interactive_figures.guidance_figure(first, method)

# %% [markdown]
# One channel for what is meant, another for what is not, and a third for the network's own last answer, which it is to
# correct: that is the whole of it. The network need not know organs. It is asked for *this*, whatever this is.
#
# ## Who clicks?
# Thousands of training steps need thousands of clicks, so a person is simulated. In a test, a careful one: each click
# goes into the middle of the largest error. In training clicks are less careful, for people differ.

# %%
teaching.show_code(interactive.careful_click, interactive.with_click)

# %% tags=["nbval-check-output", "mechanism"]
truth, answer = torch.zeros(1, 7, 15, dtype=torch.bool), torch.zeros(1, 7, 15, dtype=torch.bool)
truth[0, 1:6, 1:6] = answer[0, 2:5, 10:13] = True
marks = interactive.careful_click(interactive.no_marks(truth), answer, truth)
print("first: ", [tuple(place) for place in marks.nonzero().tolist()])
marks = interactive.careful_click(marks, answer | truth, truth)
print("second:", [tuple(place) for place in marks.nonzero().tolist()], "as (image, kind, row, column)")

# %% [markdown]
# ## The mechanisms
# **Clicks as channels.** A click becomes a soft dot, a Gaussian of the distance to it; a network of any kind can take
# it.

# %%
teaching.show_code(interactive.gaussians, interactive.Guided.guidance)

# %% tags=["nbval-check-output", "mechanism"]
line = torch.zeros(1, 2, 1, 9, dtype=torch.bool)
line[0, interactive.MEANT, 0, 2] = line[0, interactive.MEANT, 0, 7] = True
print([round(value, 3) for value in interactive.gaussians(line, 1.5)[0, interactive.MEANT, 0].tolist()])

# %% [markdown]
# **Learn to be corrected.** What Sakinis et al. (2019) add is the training: the simulated person looks at the
# network's *own* answer and clicks deep inside its larger error, some times in a row.

# %%
teaching.show_code(interactive_fcn.error_clicks, interactive_fcn.deep_pixels)

# %% tags=["nbval-check-output", "mechanism"]
strip = torch.zeros(1, 5, 9, dtype=torch.bool)
strip[0, :, 2:7] = True
depth = interactive_fcn.depths(strip)[0, 2]
print("depths along a row:", [round(value, 3) for value in depth.tolist()])
print("chances, by depth: ", [round(value, 3) for value in (depth.exp() - 1).div((depth.exp() - 1).sum()).tolist()])

# %% [markdown]
# **Marks that are there anyway.** After an operation, clips show where a tumour was. *SDL-Seg* (Kazemimoghadam et al.
# 2021) makes a map of them, and nobody has to click.

# %%
teaching.show_code(sdl_seg.Saliency.guidance, sdl_seg.misplaced)

# %% tags=["nbval-check-output", "mechanism"]
block = torch.zeros(1, 5, 5, dtype=torch.bool)
block[0, 1:4, 1:4] = True
print("where markers can lie:", sdl_seg.on_border(block)[0].int().tolist())

# %% [markdown]
# **Click once in everything.** Who annotates a whole image clicks in each object, so every click also says what its
# neighbours are not. *NuClick* (Alemi Koohbanani et al. 2020) has an inclusion map and an exclusion map, the clicks in
# all other objects, which in training are moved and at times forgotten:

# %%
teaching.show_code(nuclick.NuClick.guidance, nuclick.neighbours_clicks, nuclick.squiggle)

# %% tags=["nbval-check-output", "mechanism"]
ring = torch.zeros(1, 9, 9, dtype=torch.uint8)
ring[0, 1:8, 1:8], ring[0, 3:6, 3:6] = 1, 2
clicks = nuclick.neighbours_clicks(ring, ring == 1, by=0, most=0.0)
print("neighbours of the ring are clicked at", clicks.nonzero()[:, 1:].tolist())
print("a squiggle in the middle part:", np.argwhere(nuclick.squiggle((ring == 2)[0].numpy(), 0.0)).tolist())
share = nuclick.weights(ring == 1, ring == 2)[0, 4]
print("weights along the middle row:", [round(value, 3) for value in share.tolist()])

# %% [markdown]
# **Encode once.** The image does not change when somebody clicks. *InterFormer* (Huang et al. 2023) works out the
# features of the image before, and a light module answers each click: it embeds what was said of each pixel, and lets
# that attend to the features.

# %%
teaching.show_code(interformer.what_is_said, interformer.InterFormer.start, interformer.InterFormer.respond)

# %% tags=["nbval-check-output", "mechanism"]
marks = torch.zeros(1, 2, 1, 9, dtype=torch.bool)
marks[0, interactive.MEANT, 0, 1] = marks[0, interactive.BESIDE, 0, 7] = True
before = torch.tensor([[0.0] * 9, [4.0] * 5 + [-4.0] * 4]).reshape(1, 2, 1, 9)
said = interformer.what_is_said(marks, before, 0.7)[0, :, 0]
for kind, shares in zip(interformer.KINDS, said, strict=True):
    print(f"{kind:15}", [round(value, 3) for value in shares.tolist()])

# %% [markdown]
# **Draw in place of clicking.** A scribble says more than a click and takes hardly longer. For training it has to be
# simulated, and clean skeletons would teach a network to expect clean skeletons. *ScribblePrompt* (Wong et al. 2024)
# draws lines, centrelines and contours, breaks and warps them; and half of its targets are no organs but random pieces
# of the image, so that the network learns to do as it is told:

# %%
teaching.show_code(scribbleprompt.scribble, scribbleprompt.centreline, scribbleprompt.broken, _asking.pieces)

# %% tags=["nbval-check-output", "mechanism"]
bar = np.zeros((7, 11), bool)
bar[2:5, 1:10] = True
print("centreline of a bar:", [tuple(place) for place in np.argwhere(scribbleprompt.centreline(bar)).tolist()])
halves = torch.zeros(8, 16)
halves[:, 8:] = 1
print("pieces of a picture of two halves:", _asking.pieces(halves, 10.0, 32)[0].tolist())

# %% [markdown]
# Simulated scribbles beside one that a person drew:

# %%
drawn_on, scribbled = next(iter(targets.items()))[1], scribbleprompt.peoples_scribbles(task, case)
slices = task.preparation.images(case)[:, 0].numpy()
number = next(index for index, plane in enumerate(slices) if np.array_equal(plane, drawn_on.image))
value = next(value for value, name in task.targets.items() if name == drawn_on.structure)
torch.manual_seed(1)
simulated = {
    "lines": scribbleprompt.lines(drawn_on.mask, 2),
    "a centreline": scribbleprompt.centreline(drawn_on.mask),
    "broken": scribbleprompt.broken(scribbleprompt.centreline(drawn_on.mask)),
    "a contour": scribbleprompt.contour(drawn_on.mask),
    "warped": scribbleprompt.warped(scribbleprompt.contour(drawn_on.mask)) & drawn_on.mask,
}
interactive_figures.scribbles_figure(drawn_on, scribbled[number].numpy() == 1 + value, simulated)

# %% [markdown]
# **Say it in any way.** A click, a box, a name, or several of them: *IMIS-Bench* (Cheng et al. 2025) trains one network
# on random combinations, and measures each of them:

# %%
teaching.show_code(imis_bench.Imis.opening, imis_bench.Imis.guidance, imis_bench.cleaned)

# %% tags=["nbval-check-output", "mechanism"]
meant = torch.zeros(1, 6, 9, dtype=torch.bool)
meant[0, 1:5, 2:7] = True
told = imis_bench.said(("click", "box", "name"), meant, value=2)
print("clicked at", told[0, interactive.MEANT].nonzero().tolist(), "box of", int(told[0, _asking.BOX].sum()), "pixels")
print("names that were said:", [bool(channel.all()) for channel in told[0, _asking.BOX + 1 :]])

# %% [markdown]
# **Take turns in a volume.** *PRISM* (Li et al. 2024) has several heads, each with a guess of its own Dice, and
# the surest answers; then a shallow network, which sees the answer and the marks, moves voxels to the other side:

# %%
teaching.show_code(prism.surest, prism.Corrector, prism.soft_overlap)

# %% tags=["nbval-check-output", "mechanism"]
masks = torch.tensor([[4.0, 4.0, -4.0], [4.0, -4.0, -4.0]]).reshape(1, 2, 3, 1, 1)
target = torch.tensor([1, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
print("Dice of two heads:", [round(value, 3) for value in prism.soft_overlap(masks, target)[0].tolist()])
for confidence in ([0.9, 0.2], [0.3, 0.8]):
    chosen = prism.surest(masks, torch.tensor([confidence]))
    print("sure to", confidence, "answers", (chosen.flatten() > 0).int().tolist())

# %% [markdown]
# ## A session
# The chapter's baseline, a U-Net with clicks, on one fold. Rows: structures of one patient. From left to right it has
# been told more. Green: on the structure; orange: beside it.

# %%
fitted = fit(method, task, budget, seed)
predictor = interactive_figures.GuidedPredictor(fitted)
click_sheet(predictor, list(targets.values())[:3])

# %% [markdown]
# Every case of the fold, after one, three and five clicks an image:

# %%
rows = [line for one in task.cases("val") for line in interactive.click_rows(fitted, one)]
scores = pd.DataFrame(rows).rename(
    columns={name: f"Dice, {count}" for count, name in interactive_figures.COLUMNS.items()}
)
scores.groupby("structure", sort=False)[["Dice, 1", "Dice, 3", "Dice, 5"]].mean().round(3)

# %% [markdown]
# Best and worst after five clicks:

# %%
best, worst = interactive_figures.best_and_worst(rows, "dice_5")
sheets = [(interactive_figures.prepared_targets(task, task.data.load(one["case_id"])), one) for one in (best, worst)]
click_sheet(predictor, [found[one["structure"]] for found, one in sheets])

# %% [markdown]
# ## What does a click cost?
# The median of five, on this machine. What depends on the image alone can be worked out before anybody clicks.

# %%
nets = {
    name: (arm.method, arm.method.build(1, task.classes, 2)["average"].eval())
    for name, arm in basics.arms.items()
    if name in basics.compare
}
plane = torch.from_numpy(first.image)[None, None]
interactive_figures.click_seconds(nets, plane).round(1)

# %% [markdown]
# ## Ablation: must clicks be corrections?
# Perhaps clicks anywhere on the structure and around it teach as much as clicks into errors. So the ablation has as
# many clicks, and its person never looks at an answer.

# %%
display(teaching.evidence_table("interactive-fcn"))
teaching.verdict_table("interactive-fcn")

# %% [markdown]
# ## All of them, side by side
# Dice after one, three and five clicks of every arm, with 95% bands.

# %%
ids = teaching.measured("10_interactive")
clicked = {paper: interactive_figures.clicks_table(evidence_frame(paper, "full")) for paper in ids}
several = {paper: table for paper, table in clicked.items() if table["clicks"].nunique() > 1}
interactive_figures.clicks_figure(several, "acdc", "hippocampus")

# %% [markdown]
# ScribblePrompt's first answer to what people scribbled, and to clicks:

# %%
drawn = evidence_frame("scribbleprompt", "full").groupby("arm", sort=False)
drawn[["dice_scribble", "dice_1", "dice_5"]].mean().round(3)

# %% [markdown]
# What each kind of prompt brings at once, by the network that takes them all:

# %%
answers = evidence_frame("imis-bench", "full")
kinds = {
    "a click": "dice",
    "a box": "dice_box",
    "a name": "dice_name",
    "a click and a box": "dice_click_box",
    "a click and a name": "dice_click_name",
    "a box and a name": "dice_box_name",
}
prompted = interactive_figures.kinds_table(answers[answers["arm"] == "imis"], kinds)
interactive_figures.kinds_figure(prompted, "acdc")

# %% [markdown]
# Squares: over the comparator. Circles: over itself without its idea. Three folds, the last checkpoint.

# %%
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# **How to read it.**
#
# - **Several clicks are learnt**: on left ventricles, which training never showed, a network trained on clicks into its
#   own errors reaches 0.77 after five clicks, one trained on first clicks alone 0.68. But clicks that know no errors
#   teach as much (0.79). What helps is to have seen several clicks; that they were corrections could not be seen to
#   add.
# - **A light module is enough**: InterFormer answers with a quarter of the multiply-adds a click, and its Dice after
#   five clicks is not more than 0.02 below that of the U-Net that runs as a whole each time. Without the attention it
#   loses 0.09. The table of milliseconds shows a smaller gain: on a small image, many small steps take their time, too.
# - **Clicks in the neighbours** add +0.013 to NuClick, and the interval includes zero; with its own network and loss it
#   is not told apart from the U-Net.
# - **Draw once**: on left ventricles that it never saw, ScribblePrompt's first answer to what a person had scribbled is
#   at 0.86, where a network of clicks has 0.53, and 0.77 after five clicks. It is not the synthetic labels' doing:
#   without them it is as good (0.86), and better at a single click (0.70, with them 0.39), perhaps for pieces of an
#   image teach that one click may mean anything.
# - **A box says most**: of the network that takes all, a box gets 0.71 at once, a click 0.38, a name alone nothing,
#   though beside a click it adds 0.05. Trained without names it is better by 0.05 after three interactions. Who takes
#   clicks alone does more with the first (0.57): to listen to everything has its price, too.
# - **PRISM is not told apart from the U-Net**: one fold above it, one level, one far below. Without the corrector its
#   answers are empty when the 120 steps are over, for masks that are products of tokens and features begin slowly, and
#   the shallow corrector does not. So the ablation says more about a short training than about correction.
# - **A further channel is not free**: in one fold the network that sees the map of markers has learnt little when the
#   150 steps are over; in the other two it is a little below and equal. This is about a short training at least as much
#   as about markers.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("10_interactive"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Nobody clicked: clicks are simulated, and never wrong; only ScribblePrompt's
# scribbles are people's. Networks are narrow and learn from one data set for a minute. **What is the same**: the
# channels, who clicks where, and the steps of all arms.
#
# **Four questions for a paper on interactive segmentation.** Who clicked in the test, and would a real person click
# there? Is Dice given by the number of clicks, with failures counted? Does a click that is off by pixels ruin the
# answer? And how long does a person wait after each click?
#
# ## Play with it
# Click on the structure; with the right button, or with Shift, beside it (in a live notebook). The expected IoU is of
# the network's own probabilities.

# %%
click_widget(predictor, targets)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** A map of clicks. `np` is numpy.


# %% tags=["exercise", "exercise-dots"]
def dots(shape, clicks, sigma):
    """A map of (height, width): exp(-d^2 / (2 sigma^2)), d the distance to the nearest click (row, column); or 0."""
    raise NotImplementedError


# %%
check("10/dots", dots)

# %% [markdown]
# **2.** Where to click next. `ndimage.distance_transform_edt(mask)` says how far each pixel of a mask is from the
# nearest pixel outside; `np.pad(mask, 1)` puts a border around it.


# %% tags=["exercise", "exercise-next_click"]
def next_click(answer, truth):
    """(row, column, belongs): the deepest pixel of the larger error, missing or too much; None where all is right."""
    raise NotImplementedError


# %%
check("10/next_click", next_click)

# %% [markdown]
# **3.** How many clicks does it take? What never gets there counts as all the clicks there were: to leave it out would
# flatter the method that fails most.


# %% tags=["exercise", "exercise-clicks_needed"]
def clicks_needed(curves, goal):
    """Mean number of clicks to a Dice of `goal`; curves (images, clicks): Dice after 1, 2, ... clicks; never: all."""
    raise NotImplementedError


# %%
check("10/clicks_needed", clicks_needed)

# %% [markdown]
# ## What to read next
# - Xu, Price, Cohen, Yang and Huang: *Deep interactive object selection* (CVPR 2016): clicks as channels.
# - Mahadevan, Voigtlaender and Leibe: *Iteratively trained interactive segmentation* (BMVC 2018): clicks on errors.
# - Kirillov et al.: *Segment anything* (ICCV 2023), and chapter 03 of this book.
# - Wong et al.: *ScribblePrompt* (ECCV 2024): scribbles, clicks and boxes, on structures never seen.
