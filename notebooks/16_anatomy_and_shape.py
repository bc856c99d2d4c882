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
# **After this chapter you can** write a structure down as pixels, landmarks, level set, mesh, points or tree, and say
# what each cannot say; draw contours that cannot have holes; let a contour move by itself; complete a shape of which a
# part is missing; and measure a vessel along its centre line.
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

from medcook import comparison, plots, pooled, shape_figures, teaching, tree_figures, widgets
from medcook.data.landmarks import landmarks
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.metrics import dice
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.anatomy import (
    _airways,
    _branch_graph,
    _shapes,
    _signature,
    _stenoses,
    _trees,
    hybridgnet,
    medshapenet,
    saliency_acm,
    tubule_sensitive,
)
from medcook.recipes.anatomy._centrelines import parsed
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
# **Vessels as trees.** A vessel is a line that is as wide here and there. *SAM-VMNet* (Huang et al. 2025) finds vessels
# in angiograms, thins the mask to a centre line, and looks how wide the largest disc is that fits in around each of its
# points. Where the radius falls and rises again, a stenosis is reported:

# %%
teaching.show_code(_stenoses.turning_points, _stenoses.dips)

# %% tags=["nbval-check-output", "mechanism"]
middle = np.stack([np.full(105, 32.0), np.linspace(6, 58, 105)], axis=1)
tube = _trees.narrowed(_trees.Branch(middle, np.full(105, 4.0)), at=60, degree=0.6, width=3.0)
covered = np.clip(0.5 - _trees.rendered((tube,), (64, 64)).edge, 0, 1)  # how much of each pixel the tube covers
(line,) = parsed(covered)
print(f"diameter in pixels: median {2 * np.median(line.radius):.3f}, least {2 * line.radius.min():.3f}", end=" ")
print(f"(true {2 * np.median(tube.radius):.3f} and {2 * tube.radius.min():.3f})")
(tight,) = _stenoses.stenoses_of((line,))
print(f"a stenosis in column {tight.place[1]:.3f}, of which {tight.degree:.3f} is gone (true 36.000 and 0.600)")

# %% [markdown]
# No angiograms are at hand, so vessels with stenoses of known place and degree are drawn into real X-rays, as dark as
# they are deep. What is measured here is the true mask: nothing was segmented. So this is as good as measuring can be
# on this grid of pixels.

# %%
vessels = find_recipe("sam-vmnet").run(profile, "sam-vmnet", 0)[1]
angiograms = (one for each in vessels.cases("val") for one in vessels.preparation.planted(each))
narrow = next(one for one in angiograms if _stenoses.true_stenoses(one.trees["vessels"]))
lines, drawn = parsed(narrow.label), narrow.trees["vessels"]
tree_figures.diameters_figure(narrow.image[0], lines, _stenoses.stenoses_of(lines), drawn, vessels.data.manifest)

# %% [markdown]
# **Thin branches.** Where branches of one pixel are to be found, few pixels say anything. A *tubule-sensitive* network
# (Qin et al. 2021) weighs its channels after every block. Others average a map over all places before; here rows and
# columns are kept apart, with weights that are learnt, so that where something lies has a say:

# %%
teaching.show_code(tubule_sensitive.Recalibration, tubule_sensitive.attention, tubule_sensitive.distillation)

# %% tags=["nbval-check-output", "mechanism"]
spot = torch.zeros(1, 1, 4, 4)
spot[0, 0, 1, 2] = 8.0
squeezed = []
layer = tubule_sensitive.Recalibration(1, 4)
layer.weigh[0].register_forward_pre_hook(lambda _, given: squeezed.append(given[0].detach()[0, 0]))
layer(spot)
kept = [round(squeezed[0][place].item(), 3) for place in [(1, 2), (1, 0), (3, 3)]]
print(f"squeezed, at the spot, in its row, elsewhere: {kept}; by a mean over all places: {spot.mean():.3f} anywhere")
fine = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, 0.0]).outer(torch.ones(8))[None, None]
coarse = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
other = coarse.flip(2)
costs = [round(tubule_sensitive.distillation([fine, each]).item(), 3) for each in (fine, coarse, other)]
print(f"to attend as the finer layer does costs {costs}: it itself, a coarser one, one that looks elsewhere")

# %% [markdown]
# **Branches with names.** *AirMorph* (Zhang et al. 2024) thins airways to a tree and names each branch: lobe, segment,
# subsegment. A branch by itself has but its place and shape. A transformer that knows how many forks lie between two
# branches can also ask whom it hangs from, and average its answer with those of the branches it supplies:

# %%
teaching.show_code(_branch_graph.SoftSubtree, _branch_graph.averaged)

# %% tags=["nbval-check-output", "mechanism"]
below = torch.tensor([[[1, 1, 1], [0, 1, 0], [0, 0, 1]]]) > 0
answers = torch.tensor([[[0.2, 0.0], [0.0, 3.0], [0.0, 2.0]]])
for name, weights in (("a subtree", below.float()), ("itself", torch.eye(3)[None])):
    means = _branch_graph.averaged(answers, weights, torch.ones_like(below))[0].argmax(-1).tolist()
    print(f"a parent that is not sure, and its two children, averaged over {name}: segments {means}")

# %% [markdown]
# Of a tree with names a signature of six numbers is taken. Some of them are known for simple shapes:

# %% tags=["nbval-check-output", "mechanism"]
turn = np.linspace(0, np.pi, 400)
arch = _trees.Branch(20 * np.stack([np.sin(turn), np.cos(turn)], axis=1), np.ones(400))
print(f"tortuosity: of a line {_signature.tortuosity(tube):.3f}, of a half circle {_signature.tortuosity(arch):.3f}")
bulge = np.array([2.0, 2.0, 1.0, 2.0, 3.0])
print(f"stenosis {_signature.stenosis(bulge):.3f}, ectasia {_signature.ectasia(bulge):.3f} of radii {bulge.tolist()}")
corner = _signature.open_angle(np.zeros(2), [np.array([0.0, 5.0]), np.array([7.0, 0.0])])
print(f"divergence: two branches at a right angle {corner:.3f}")
flat, square = np.stack([np.zeros(128), np.arange(128) / 2], axis=1), np.argwhere(np.ones((64, 64)))
print(f"complexity: of a line {_signature.dimension(flat):.3f}, of a square {_signature.dimension(square):.3f}")

# %%
naming = find_recipe("airmorph").run(profile, "airmorph", 0)[1]
grown = [one for each in naming.cases("val") for one in naming.preparation.planted(each) if one.trees["airways"]]
shown = next(one for one in grown if one.state == "healthy")
scale = len(shown.label) / _trees.ROWS
twins = {
    state: _airways.ill(shown.trees["airways"], state, scale, np.random.default_rng(0)) for state in _airways.STATES[1:]
}
tree_figures.names_figure(
    shown.image[0],
    {"healthy": shown.trees["airways"], "the same, tortuous": twins["tortuous"]},
    lambda branch: _airways.NAMES[branch.name].lobe,
    lambda branch: _airways.NAMES[branch.name].name if branch.name in _branch_graph.SEGMENT_VALUES else "",
    _airways.LOBES,
    naming.data.manifest,
)

# %%
trees = {"healthy": shown.trees["airways"], **twins}
pd.DataFrame({state: _signature.signature(each) for state, each in trees.items()}).T.round(3)

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
# Every arm's mean, of all recipes of the chapter.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# What the recipes measured besides: X-rays by hospital, as they are and covered; how far the answers from two starts
# agree; a missing part by the kind of cut; vessels, their diameter and stenoses; airways, and into how many parts what
# is found of them falls; names at three levels, and whether a tree hangs together; thin branches.

# %%
columns = {
    "hybridgnet": ["dice", "dice_covered", "pieces", "pieces_covered"],
    "saliency-acm": ["dice", "agreement", "worst"],
    "medshapenet": ["dice_half-space", "dice_ball", "dice_whole", "chamfer"],
    "sam-vmnet": ["iou", "sensitivity", "diameter_error", "tpr", "ppv", "degree_error", "tpr_truth", "ppv_truth"],
    "aeropath": ["length", "branches", "precision", "parts", "whole"],
    "airmorph": ["lobes", "segments", "subsegments", "segments_truth", "consistency", "patterns", "length_detected"],
    "tubule-sensitive": ["branches", "length", "peripheral", "dice", "precision", "leakage"],
}
for paper, names in columns.items():
    by = ["arm", "group"] if paper == "hybridgnet" else ["arm"]
    display(evidence_frame(paper, "full").groupby(by)[names].mean().round(3))

# %% [markdown]
# Branches that were found, by run: in which was a structure never found at all?

# %%
thin = evidence_frame("tubule-sensitive", "full")
display(thin.pivot_table(index=["arm", "replicate"], columns="structure", values="branches").round(2))

# %% [markdown]
# Can trees be told ill from healthy ones by their signature, and how well by their volume, branches and length alone?
# Areas under the curve, of each arm's own trees; below, what the signature is of each disease.

# %%
airways = evidence_frame("airmorph", "full")
by = {"signature": "score", "volume, branches, length": "score_plain"}
areas = {
    arm: {name: pooled.value(part.assign(score=part[column]), "auc") for name, column in by.items()}
    for arm, part in airways.groupby("arm")
}
display(pd.DataFrame(areas).T.round(3))
display(airways.groupby("state")[list(_signature.SIGNATURE)].mean().round(3))

# %% [markdown]
# **How to read it.**
#
# - **Shape pays where something is hidden.** Under a square HybridGNet is at 0.877, the U-Net at 0.834 (both
#   hospitals). The U-Net takes a dark square for lung or breaks there (at the own hospital, Shenzhen, 2.6 parts and
#   holes in place of two lungs), the contour goes on. On X-rays as they are it is the other way round: 0.957 for
#   pixels, 0.932 for contours at the own hospital, 0.953 and 0.911 at the other.
# - **Looking up in the image helps**: at the own hospital the contours are at 0.932 as they are and 0.886 covered,
#   without skip connections at 0.914 and 0.880.
# - **The nearest training shapes are hard to beat.** Ten of them, shifted and put to the vote, complete a missing part
#   with a Dice of 0.800; the network, after 300 steps, with 0.777. The prior costs no training at all.
# - **Neighbours say much**: without them the network is at 0.699, and of a structure that is gone altogether it finds
#   0.30 in place of 0.67.
# - **What stands out leads a contour home.** Saliency raises Dice from 0.50 to 0.61 (LIF: 0.54, Chan-Vese: 0.53), and
#   the answer hardly depends on the start: two starts agree with a Dice of 0.99, without saliency with 0.75, Chan-Vese
#   with 0.94. That left ventricles are bright helps, for so is what is salient here.
# - **Whom a branch hangs from says what it is called.** 0.822 of the length of segments gets the right name; where each
#   branch is named by itself 0.705, and where it sees all others, but not how they hang together, 0.727. So it is not
#   the others that help, but the tree. Of true masks all three name more, and lie as far apart.
# - **A signature tells ill trees from healthy ones** with an area of 0.848; what needs no names and no radii along
#   branches, volume, number and length, with 0.706.
# - **Networks that scan are behind here.** After as many steps a U-Net of convolutions finds vessels with an
#   intersection over union of 0.790, SAM-VMNet with 0.685; what the small SAM tells shows no gain (0.673 without).
# - **Patches lose the thread.** Patches at full resolution, told what a smaller image shows, find 0.929 of the length
#   of the airways in one piece, a U-Net that sees the whole image 0.970; the answer falls into 12 parts in place of 6.
#   Without the smaller image the length is not told apart from 0.929 (0.920), but precision is lower (0.847, with it
#   0.911), and there are 19 parts.
# - **A mean hides what was never found.** Recalibration, distillation and maps of anatomy look as if they did harm:
#   0.515 of the branches are found, by the U-Net 0.663. But in every arm some runs never find veins or arteries in
#   their 300 steps; where a structure is found at all, all arms find it within hundredths of each other.
# - **A stenosis asks more of a mask than overlap does.** On true masks 0.952 of them are found, and 0.852 of what is
#   reported is one; on the U-Net's 0.619 and 0.611. A pixel at either side of a vessel of six is a third of it.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("16_anatomy_and_shape"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Landmarks are sampled from masks, where the paper has experts'; shapes are the
# book's own masks, not a hundred thousand; vessels and airways are drawn into real X-rays, in a plane, so that every
# branch is known; networks are narrow and learn for a minute or two. **What is the same**: the mechanism, the steps of
# all arms, and what is hidden from whom.
#
# **Five questions for a paper on shape.** Is the gain there where the image shows everything, or only where it does
# not? Can the form describe what the anatomy does, a hole or a third part? Is plausible also right? How good is the
# nearest training shape? And of trees: is it pixels that are counted, of which the trunk has most, or branches?
#
# ## Play with it
# Hide a square of the image, and see what each network makes of it (in a live notebook).

# %%
widgets.hiding_explorer(trained, plane, mask, task.data.manifest)

# %% [markdown]
# ## Your turn
# Four exercises. Each check tells you whether you are right, and hints where you are not.
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
# **4.** How much of a vessel's diameter is gone at its tightest place? Compare it with the mean of the widest place
# before and the widest after it.


# %% tags=["exercise", "exercise-degree"]
def degree(radii):
    """The share of the diameter, from 0 to 1, that is gone where radii (N,) along a vessel are smallest."""
    raise NotImplementedError


# %%
check("16/degree", degree)

# %% [markdown]
# ## What to read next
# - Cootes, Taylor, Cooper and Graham: *Active shape models* (CVIU 1995): what shapes are likely, before networks.
# - Chan and Vese: *Active contours without edges* (IEEE TIP 2001).
# - Park, Florence, Straub, Newcombe and Lovegrove: *DeepSDF* (CVPR 2019): shapes as functions that are learnt.
# - Gaggion et al.: *CheXmask* (Scientific Data 2024), and chapter 06: how sure a landmark is.
# - Zhang et al.: *Multi-site, multi-domain airway tree modeling* (Medical Image Analysis 2023): how trees are scored.
