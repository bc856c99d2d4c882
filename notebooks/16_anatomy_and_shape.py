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
# # 16 · Anatomy and shape
#
# **After this chapter you can** write a structure down as pixels, landmarks, level set, mesh or points, and say what
# each cannot say; draw contours that cannot have holes; let a contour move by itself; and complete a shape of which a
# part is missing.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | chest X-rays (Montgomery, Shenzhen), hearts (ACDC), hippocampi (Decathlon Task04) | about 8 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that a network of pixels is hard to beat where the image shows
# everything, and that shape earns its keep where it does not.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, plots, shape_figures, teaching, widgets
from medcook.data.landmarks import landmarks
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.metrics import dice
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.anatomy import _shapes, hybridgnet, medshapenet, saliency_acm
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A structure in five forms. Each can say something that the others cannot, and each makes some mistakes impossible.

# %% tags=["cover"]
contours, completion = find_recipe("hybridgnet"), find_recipe("medshapenet")
method, task, budget, seed = contours.run(profile, "hybridgnet", 0)
solid = completion.run(profile, completion.compare[0], 0)[1]
case, volume = next(task.cases("val")), next(solid.cases("val"))
image, labels = task.preparation.images(case), task.preparation.labels(case)
number = int((labels > 0).flatten(1).sum(1).argmax())
plane, mask = image[number, 0].numpy(), labels[number].numpy() > 0
height, width = mask.shape
points, known = landmarks(labels[[number]], method.nodes)
rings = ((points[0].numpy() + 1) * [width, height] - 1).reshape(2, method.nodes, 2) / 2
shape = _shapes.load_shape(volume, 1)
shape_figures.forms_figure(plane, mask, rings, shape, task.data.manifest, solid.data.manifest)

# %% [markdown]
# Pixels can be any mask, also one with holes or without half a lung. A closed contour has an inside whatever the image
# shows, and no third lung. A level set may split and merge. A mesh has a surface that can be measured, and points are
# what is left when nothing is known of how they hang together.
#
# ## The mechanisms
# **Contours by construction.** *HybridGNet* (Gaggion et al. 2022) encodes the image into a few latent numbers, from
# which convolutions on a graph make landmarks, first few, then twice as many. Its image-to-graph skip connections look
# up features of the image where the landmarks are believed to be:

# %%
teaching.show_code(hybridgnet.unpooling, hybridgnet.HybridGNet.seen, hybridgnet.HybridGNet.decode)

# %% tags=["nbval-check-output", "mechanism"]
ring = hybridgnet.unpooling(6) @ torch.tensor([0.0, 3.0, 6.0, 10.0, 13.0, 16.0])
print("three nodes a ring become six:", [round(value, 3) for value in ring.tolist()])
flow = hybridgnet.scaled_laplacian(4) @ torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
print("the Laplacian hands on to neighbours:", [round(value, 3) for value in flow.tolist()])
two = np.zeros((7, 12), bool)
two[1:6, 1:5] = two[1:6, 7:11] = True
holed = two.copy()
holed[3, 2] = False
print("parts and holes:", hybridgnet.pieces(two), "of two lungs,", hybridgnet.pieces(holed), "with a hole in one")

# %% [markdown]
# **Contours that move by themselves.** Before networks, a contour was the zero line of a function that flows downhill
# in an energy. *Saliency-driven active contours* add a map of what stands out to the energy of local brightness:


# %%
teaching.show_code(saliency_acm.saliency, saliency_acm.means, saliency_acm.Contour.flow)

# %% tags=["nbval-check-output", "mechanism"]
y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
disc = ((y**2 + x**2).sqrt() < 0.5).float()
snake = saliency_acm.Contour(steps=60, window=4.0)
views = snake.views((disc - disc.mean())[None, None] / disc.std())
level = saliency_acm.initial("small", (32, 32))[None, None]
energies = [snake.energy(level, views).item()]
for _ in range(3):
    for _ in range(snake.steps // 3):
        level = snake.moved(level, views)
    energies.append(snake.energy(level, views).item())
print("energy:", [round(energy, 3) for energy in energies])
print("pixels inside:", int((level > 0).sum()), "of", int(disc.sum()))

# %% [markdown]
# The same start on a real image, with and without saliency (dotted: the reference):

# %%
active = find_recipe("saliency-acm")
driven, cells = active.run(profile, active.compare[0], 0)[:2]
cell = next(cells.cases("val"))
picture, told = cells.preparation.images(cell), cells.preparation.labels(cell)
layer = int((told > 0).flatten(1).sum(1).argmax())
begun = saliency_acm.initial("corner", picture.shape[2:])
moves = {
    name: shape_figures.movement(active.method(profile, arm), picture[[layer]], begun)
    for name, arm in (("with saliency", active.ablation[0]), ("without", active.ablation[1]))
}
shape_figures.starts_figure(picture[layer, 0].numpy(), told[layer].numpy() > 0, moves, cells.data.manifest)

# %% [markdown]
# **Shapes without images.** *MedShapeNet* (Li et al.) collects a hundred thousand of them. Whoever has masks has
# shapes: here is the loader, and what it measures on a ball of radius 8 mm, whose volume and area are known.

# %%
teaching.show_code(_shapes.Shape)

# %% tags=["nbval-check-output", "mechanism"]
ball = np.linalg.norm(np.indices((21, 21, 21)) - 10, axis=0) <= 8
facts = _shapes.Shape(ball, (1.0, 1.0, 1.0), "a ball").facts
print(f"volume {facts['volume']:.0f} (true {4 / 3 * np.pi * 512:.0f}), area {facts['area']:.0f}", end=" ")
print(f"(true {4 * np.pi * 64:.0f}: steps of voxels make a surface longer)")
near, far = _shapes.Shape(ball).points(200), _shapes.Shape(ball).points(200, seed=1) + [0, 0, 30]
print(f"chamfer distance of two balls 30 mm apart: {_shapes.chamfer(near, far):.3f}")

# %% [markdown]
# **Complete what is missing.** A part of one structure is cut away, beyond a plane, in a ball, or all of it. A volume
# network sees what is left, and the structures beside it, but no image:

# %%
teaching.show_code(medshapenet.Completion.partial, medshapenet.Completion.example, medshapenet.draw_cut)

# %% tags=["nbval-check-output", "mechanism"]
line = torch.tensor([0, 1, 1, 1, 1, 2, 2, 0]).reshape(1, 1, 8)
cut = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).reshape(1, 1, 8) > 0
for name, one in (("with neighbours", medshapenet.Completion()), ("alone", medshapenet.Completion(neighbours=False))):
    print(name, one.partial(line, 1, cut, 3).flatten(1).int().tolist())

# %% tags=["nbval-check-output", "mechanism"]
asked = medshapenet.draw_cut(torch.ones(4, 6, 8, dtype=torch.bool), "half-space", torch.Generator().manual_seed(0))
every = medshapenet.draw_cut(asked, "whole")
print(f"a half-space takes {asked.float().mean():.3f} of a block, `whole` {every.float().mean():.3f}")

# %% [markdown]
# ## Where the image shows nothing
# Two networks trained at one hospital, one of pixels and one of contours. A square of the image is hidden. Neither has
# ever seen such a thing. Below: the case where they differ most, in favour of each.

# %%
shown = {"U-Net": "unet", "HybridGNet": "hybridgnet", "without skips": "without skips"}
trained = {name: fit(*contours.run(profile, arm, 0)) for name, arm in shown.items()}
patients = list(task.cases("val"))
covered = {
    name: pd.DataFrame([line for one in patients for line in hybridgnet.occluded(net, one)])
    for name, net in trained.items()
}
columns = ["dice", "dice_covered", "pieces", "pieces_covered"]
table = pd.DataFrame({name: frame[columns].mean() for name, frame in covered.items()}).T
table.round(3)

# %%
gain = covered["HybridGNet"]["dice_covered"] - covered["U-Net"]["dice_covered"]
for position in (int(gain.argmax()), int(gain.argmin())):
    one = task.data.load(covered["U-Net"]["case_id"][position])
    seen = hybridgnet.with_box(task.preparation.images(one), hybridgnet.LEVELS, hybridgnet.rng_of(one))[0]
    layer = int((task.preparation.labels(one) > 0).flatten(1).sum(1).argmax())
    answers = {name: (net.answer(seen)[layer].argmax(0) > 0).numpy() for name, net in trained.items()}
    truth = task.preparation.labels(one)[layer].numpy() > 0
    display(shape_figures.covered_figure(seen[layer, 0].numpy(), truth, answers, task.data.manifest))

# %%
plots.learning_curves({name: [net.history] for name, net in trained.items() if "out" not in name}, title="one seed")

# %% [markdown]
# ## A part is missing
# A hippocampus of which a part was cut away (blue: what is left; orange: what was added).

# %%
fill = {"nearest shapes": "nearest shapes", "a network": "completed", "a network, alone": "without neighbours"}
fillers = {name: fit(*completion.run(profile, arm, 0)) for name, arm in fill.items()}
(whole,) = solid.preparation.labels(volume)
piece = medshapenet.draw_cut(whole == 1, "half-space", torch.Generator().manual_seed(3))
added = {"the truth": ((whole == 1) & piece, np.nan)}
for name, net in fillers.items():
    net.nets.load_state_dict(net.weights["last"])
    net.nets.eval()
    asked = net.method.partial(whole, 1, piece, solid.classes)[None]
    with torch.no_grad():
        answer = net.method.complete(net, asked, 1)[0] & piece
    added[name] = (answer, dice(answer.numpy(), ((whole == 1) & piece).numpy()))
left = ((whole == 1) & ~piece).numpy()
shape_figures.completion_figure(
    left,
    {name: (mask.numpy(), score) for name, (mask, score) in added.items()},
    lambda mask: _shapes.Shape(mask, volume.spacing).corners,
    solid.data.manifest,
)

# %% [markdown]
# ## Ablation: what do neighbours say?
# The network that completes sees the structures beside the missing part, whose border is the part's border, too. So the
# ablation hides them.

# %%
display(teaching.evidence_table("medshapenet"))
teaching.verdict_table("medshapenet")

# %% [markdown]
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea.

# %%
ids = teaching.measured("16_anatomy_and_shape")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# What the recipes measured besides: X-rays by hospital, as they are and covered; how far the answers from two starts
# agree; and a missing part by the kind of cut.

# %%
columns = {
    "hybridgnet": ["dice", "dice_covered", "pieces", "pieces_covered"],
    "saliency-acm": ["dice", "agreement", "worst"],
    "medshapenet": ["dice_half-space", "dice_ball", "dice_whole", "chamfer"],
}
for paper, names in columns.items():
    by = ["arm", "group"] if paper == "hybridgnet" else ["arm"]
    display(evidence_frame(paper, "full").groupby(by)[names].mean().round(3))

# %% [markdown]
# **How to read it.**
#
# - **Shape pays where something is hidden.** Under a square HybridGNet is at 0.877, the U-Net at 0.834; the U-Net
#   leaves a hole there (2.6 parts and holes in place of two lungs), the contour goes on. On X-rays as they are it is
#   the other way round: 0.957 for pixels, 0.932 for contours at the own hospital, 0.953 and 0.911 at the other.
# - **Looking up in the image helps**: without skip connections, 0.914 as they are and 0.870 covered.
# - **The nearest training shapes are hard to beat.** Ten of them, shifted and put to the vote, complete a missing part
#   with a Dice of 0.800; the network, after 300 steps, with 0.777. The prior costs no training at all.
# - **Neighbours say much**: without them the network is at 0.699, and of a structure that is gone altogether it finds
#   0.30 in place of 0.67.
# - **What stands out leads a contour home.** Saliency raises Dice from 0.50 to 0.61 (LIF: 0.54, Chan-Vese: 0.53), and
#   the answer hardly depends on the start: two starts agree with a Dice of 0.99, without saliency with 0.75. That left
#   ventricles are bright helps, for so is what is salient here.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("16_anatomy_and_shape"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Landmarks are sampled from masks, where the paper has experts'; shapes are the
# book's own masks, not a hundred thousand; networks are narrow and learn for a minute or two. **What is the same**: the
# mechanism, the steps of all arms, and what is hidden from whom.
#
# **Four questions for a paper on shape.** Is the gain there where the image shows everything, or only where it does
# not? Can the form describe what the anatomy does, a hole or a third part? Is plausible also right? And how good is the
# nearest training shape?
#
# ## Play with it
# Hide a square of the image, and see what each network makes of it (in a live notebook).

# %%
widgets.hiding_explorer(trained, plane, mask, task.data.manifest)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The area inside a contour. `np` is numpy.


# %% tags=["exercise", "exercise-area"]
def area(points):
    """The area inside a closed contour of points (N, 2), in squares of their unit."""
    raise NotImplementedError


# %%
check("16/area", area)

# %% [markdown]
# **2.** What a graph convolution begins with: the mean of each node's neighbours; zeros where there is none.


# %% tags=["exercise", "exercise-neighbours"]
def neighbours(features, adjacency):
    """The mean of each node's neighbours: features (nodes, channels), adjacency (nodes, nodes) of zeros and ones."""
    raise NotImplementedError


# %%
check("16/neighbours", neighbours)

# %% [markdown]
# **3.** How far apart are two surfaces, given as points?


# %% tags=["exercise", "exercise-chamfer"]
def chamfer(a, b):
    """Mean distance of each point to the nearest of the other set, (n, 3) and (m, 3); of both directions the mean."""
    raise NotImplementedError


# %%
check("16/chamfer", chamfer)

# %% [markdown]
# ## What to read next
# - Cootes, Taylor, Cooper and Graham: *Active shape models* (CVIU 1995): what shapes are likely, before networks.
# - Chan and Vese: *Active contours without edges* (IEEE TIP 2001).
# - Park, Florence, Straub, Newcombe and Lovegrove: *DeepSDF* (CVPR 2019): shapes as functions that are learnt.
# - Gaggion et al.: *CheXmask* (Scientific Data 2024), and chapter 06: how sure a landmark is.
