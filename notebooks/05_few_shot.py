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
# # 05 · One annotated patient
#
# **After this chapter you can** segment a structure that no training ever named, from the annotation of a single
# patient; set up the protocol so that nothing of the answer leaks into training; and say how much of a few-shot result
# is the method, and how much is whose annotation it happened to be.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC): both ventricles are hidden in training | about 7 | 2.3 GB |
#
# What you see on the web was made by `full`. **Expect** an answer without any training on the structure, far below what
# training on many labels reaches, and a spread between supports that few papers show.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np  # noqa: F401 - for the exercises
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, teaching
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.few_shot import Shots, chunks
from medcook.few_shot.baselines import PrototypeNetwork, local_prototypes, prototypes
from medcook.few_shot.method import FewShot, cosine, masked_mean
from medcook.few_shot.supports import spread, spread_figure, spread_table, support_sheet, worst_answers
from medcook.few_shot.task import holds, renumber
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.few_shot import c_graph, dino_augseg, distillfss, famnet, lms_net, repri
from medcook.training import fit
from medcook.widgets import support_picker

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A network that has learned *features*, not classes. Somebody annotates a structure in one patient, the **support**,
# after all training is over. What of another patient, the **query**, is like what was annotated? Above: what
# colleagues might have annotated, each in another patient. Below: what each of these annotations says of the same
# query, in the slice that shows most of the structure. Dice is of the whole volume.

# %% tags=["cover"]
experiment = find_recipe("repri")
arms = {name.split(",")[0]: name for name in experiment.arms_at(profile)}
live = {name: fit(*experiment.run(profile, arms[name], 0)) for name in ("prototypes", "repri")}
task = live["repri"].task
cases = list({case.patient_id: case for case in task.cases("val")}.values())[: 10 if profile != "quick" else 3]
value = next(iter(task.novel_structures))
support_sheet(live["repri"], cases[0], value, 6 if profile != "quick" else 4)

# %% [markdown]
# ## A protocol that does not leak
# "Never seen" is easily said. Base structures may be named in training, novel ones may not; in **setting 1** a novel
# structure still shows in training slices, as background; in **setting 2** slices that show one are left out (Ouyang
# et al. 2022). Supports are drawn from training patients, queries are others.

# %% tags=["nbval-check-output", "mechanism"]
maps = torch.tensor([[[0, 1, 2]], [[3, 3, 0]], [[1, 0, 3]], [[0, 0, 2]]], dtype=torch.uint8)
print("setting 1, with 1 and 3 novel, trains on", renumber(maps, (2,))[:, 0].tolist())
print("setting 2 leaves out the slices", holds(maps, (1, 3)).nonzero()[:, 0].tolist())
for name, count in (("support", 11), ("query", 8)):
    print(f"{name}: slices in three chunks {chunks(list(range(2, 2 + count)), 3)}")

# %% [markdown]
# In volumes the first and the last slice of the structure are taken as known, here as in the literature: somebody
# marks them. Each third of the query is answered by the middle slice of the same third of the support. Remember that
# when you read a Dice of a few-shot paper: it says nothing of slices outside.

# %%
print(f"base: {', '.join(task.base.values())}. Novel: {', '.join(task.novel_structures.values())}.")
print(f"setting {task.setting}, {len(task.labelled_patients)} training patients, {len(task.val_patients)} to validate")

# %% [markdown]
# ## The baseline: one prototype
# The mean feature of the structure, the mean feature of the rest; every place of the query goes to the one that it is
# more alike. That is all of PANet (Wang et al. 2019) at test time:

# %%
teaching.show_code(prototypes, masked_mean, cosine, PrototypeNetwork.logits, FewShot.segment)

# %% tags=["nbval-check-output", "mechanism"]
features = torch.tensor([[[[4.0, 3.0, 0.0, 0.0]], [[0.0, 1.0, 2.0, 3.0]]]])
support = Shots(torch.zeros(1, 1, 1, 4), features, torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8))
print("prototypes of background and structure:", *prototypes(support).numpy().round(3))
query = torch.tensor([[[[1.0, 2.0, 0.5]], [[0.0, 2.0, 3.0]]]])
print("cosines of three places:", *cosine(query, prototypes(support))[0, :, 0].numpy().round(3))

# %% [markdown]
# ## The failure first
# One mean for *everything that is not the structure* is a poor description of a body. What is unlike that mean,
# whatever it is, may go to the structure. Filled: the answer; dashed: the truth; above them the annotations.

# %%
worst_answers(live["prototypes"], cases, count=4)

# %% [markdown]
# ALPNet (Ouyang et al. 2022) gives every square of the background a prototype of its own:

# %%
teaching.show_code(local_prototypes)

# %% tags=["nbval-check-output", "mechanism"]
for name, found in zip(("background", "structure"), local_prototypes(support, window=1), strict=True):
    print(f"{name}: the mean of all, then every square:", *found.numpy().round(3))

# %% [markdown]
# ## Look at the query, too
# *RePRI* (Boudiaf et al., CVPR 2021) trains no episodes at all. It fits a linear classifier, anew for each query
# slice, to the annotated pixels, and to the query's own: these should be *decided* (entropy), and as many of them be
# structure as expected (a Kullback-Leibler term).

# %%
teaching.show_code(repri.RePRI.loss_of, repri.entropy, repri.proportion, repri.kl)

# %% tags=["nbval-check-output", "mechanism"]
logits = torch.tensor([[[-4.0, -4.0, 0.0, 4.0]], [[-1.0, -1.0, 0.0, 1.0]]])
share = repri.proportion(logits)
print("entropy of a decided and of an undecided slice:", repri.entropy(logits).numpy().round(3))
print("share of structure:", share.numpy().round(3))
print("KL to an expected share of one half:", repri.kl(share, torch.tensor([0.5, 0.5])).numpy().round(3))

# %% [markdown]
# ## Run it
# The same features for both; they are ImageNet's at `full` and our own, from scratch, at `quick`. No structure of the
# query was ever named to them. Each method answers with one, three and five annotated patients, several times each,
# with other patients. A dot is a support.

# %%
draws = (5, (1, 3, 5)) if profile != "quick" else (3, (1, 3))
tables = {name: spread(fitted, cases, *draws) for name, fitted in live.items()}
spread_figure(tables, task.dataset)

# %%
for name, table in tables.items():
    display(spread_table(table).style.set_caption(name))

# %% [markdown]
# Two questions to put to it. Do more shots raise the mean, and do they bring supports together? And how far apart are
# the best and the worst support, next to the distance between two methods? A paper that draws one support reports a
# number that a different colleague's annotation would have moved by that much. All evidence of this chapter but
# DINO-AugSeg's, which trains on its three patients, has supports as rows of their own, and intervals over patients and
# draws of supports.
#
# The best and the worst answers of RePRI:

# %%
worst_answers(live["repri"], cases, count=4)

# %% [markdown]
# Is it worth it? On test patients, three draws of supports, beside its ablations:

# %%
teaching.show_evidence("repri", table=True)

# %% [markdown]
# RePRI beats the prototypes. Whether that is the fitting or the look at the query cannot be told here: *support only*
# lies between the two, and is told apart from neither. And entropy without the expected share (*without KL*) does harm:
# slices become decided, for the wrong side, and some answers come back empty. How much depends on that share the paper
# shows with an oracle that knows it.
#
# ## Across domains
# Train on hearts in MR, segment lungs in X-rays: *FAMNet* (Bo et al., AAAI 2025) matches support and query by
# **frequency bands**, and damps those in which domains differ; *C-Graph* (Bo et al. 2025) makes **graphs** of both and
# matches parts.

# %%
teaching.show_code(famnet.bands, famnet.agreement, c_graph.match, c_graph.edges)

# %% tags=["nbval-check-output", "mechanism"]
x = 2 * torch.pi * torch.arange(8.0) / 8
wave = x.cos() + 2 * (3 * x).cos() + (4 * x).cos()[:, None]
found = famnet.bands(wave.flatten(), cutoff=0.3)
energy = found.square().mean(1)
print("energy of the low, middle and high band:", energy.numpy().round(3))
print(f"their sum is the input, up to {(found.sum(0) - wave.flatten()).abs().max():.3f}")

# %% tags=["nbval-check-output", "mechanism"]
nodes, others = torch.eye(3)[None], torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
print("match with the two most alike:", c_graph.match(nodes, others, 2)[0].numpy().round(3))
print("edges of the first node:", c_graph.edges(nodes[0], others, 2, 5.0)[0].numpy().round(3))

# %%
for paper in ("famnet", "c-graph"):
    teaching.show_evidence(paper, table=True)

# %% [markdown]
# Both are above one prototype, and yet look at the line of *local prototypes*: the stronger baseline, which knows
# neither bands nor graphs, is above FAMNet and close to C-Graph. Taking C-Graph's node contrast away changes nothing
# that could be told apart here, and neither with it nor without it is C-Graph told apart from local prototypes. Which
# baseline stands in a paper's table decides what its gain means.
#
# ## Unrolled, distilled, augmented
# *LMS-Net* (Zhang et al. 2025) writes down an energy of prototypes and mask and makes each round of descent a layer.
# *DistillFSS* (Marinis et al. 2025) lets a small layer learn what an attention over all annotated pixels would say;
# then the support can go. *DINO-AugSeg* (Xu et al. 2026) keeps the encoder frozen and drops wavelet coefficients of its
# features.

# %%
teaching.show_code(lms_net.move, lms_net.contrast, distillfss.attend, dino_augseg.drop_coefficients)

# %% tags=["nbval-check-output", "mechanism"]
places, given = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
inside = torch.tensor([[[0.5, 1.0]]])
for trust in (0.1, 10.0):
    moved = lms_net.move(places, inside, given, torch.tensor(trust))[0, 1]
    print(f"trust in the support {trust}: the structure's prototype moves to {moved.numpy().round(3)}")

# %% tags=["nbval-check-output", "mechanism"]
mask = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
keys = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.1, 1.0]]]])
asked = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0]]]])
print("share of structure that each place attends to:", distillfss.attend(asked, keys, mask)[0, 0, 0].numpy().round(3))
square = torch.arange(16.0).reshape(1, 1, 4, 4)
restored = dino_augseg.inverse_haar(dino_augseg.haar(square))
print(f"wavelets and back: the largest change is {(restored - square).abs().max():.3f}")

# %%
for paper in ("lms-net", "distillfss", "dino-augseg"):
    teaching.show_evidence(paper)

# %% [markdown]
# Look at the ablations of *LMS-Net* and *DINO-AugSeg*: what the papers add takes away here. Without its prior, learned
# from superpixels in about a minute, LMS-Net is back at its prototypes; perhaps it has learned the outlines of
# superpixels, not of ventricles. And on frozen features of three patients the plain decoder has the highest mean, and
# no more than a U-Net from scratch. Both papers train for hours, on more; that their gains do not survive a minute is
# what was measured, no more.
#
# ## Asking a promptable model
# The support can also be turned into a *prompt* for the small SAM of chapter 03: points on the structure and on what
# surrounds it (*FoB*), tokens from two branches that check each other (*DC-SAM*), an image and a name (*VLP-SAM*), a
# mask that is warped from the support to the query (*Med-PerSAM*).

# %%
for paper in ("fob", "dc-sam", "vlp-sam", "med-persam"):
    teaching.show_evidence(paper)

# %% [markdown]
# What helps is what SAM already understands: where the background is (*FoB*'s points keep the answer from spilling
# over), and a rough mask (*Med-PerSAM*'s warped ones). Prompt *tokens* that are learned for it in a minute (*DC-SAM*,
# *VLP-SAM*) stay below plain clicks at the most and the least similar place.
#
# ## Ablation, and all papers of the chapter
# Squares: the method against its comparator. Circles: the method against itself without the claimed ingredient.

# %%
papers = teaching.measured("05_few_shot")
if papers:
    display(comparison.forest([teaching.need_summary(paper) for paper in papers]))

# %%
display(teaching.chapter_papers("05_few_shot"))
display(teaching.verdict_table(*papers) if papers else "No paper of this chapter has been measured yet.")

# %% [markdown]
# And the supports in all of this evidence: the standard deviation between supports (means over the same patients) and
# between patients (means over the same supports), of the method that each paper proposes.

# %%
rows = {}
for paper in papers:
    summary, frame = teaching.need_summary(paper), evidence_frame(paper, "full")
    if "support" in frame:
        mine = frame[frame["arm"] == summary.comparison.a].assign(shots=summary.comparison.a)
        rows[paper] = spread_table(mine.assign(replicate=mine["group"]))
display(pd.concat(rows).rename_axis(["paper", "method"]) if rows else "Not measured yet.")

# %% [markdown]
# **What differs from the papers.** Features of a small network that was trained on photographs; slices of 128 pixels; a
# minute of training in place of hours. **What is the same**: the protocol, what is hidden from whom, and that all arms
# of a comparison stand on the same features and the same supports.
#
# **Four questions for a few-shot paper.** How many supports were drawn, and what is the spread between them? Were novel
# structures in the training slices, and does anybody know where the query's structure begins? What do the *untrained*
# features reach with the same prototypes? And what would the same patients' labels buy as plain training data (chapter
# 04)?
#
# ## Play with it
# Choose whose annotation is the support, and see the answer change. On the web you see six of them at the top of this
# chapter instead.

# %%
support_picker(live["repri"], cases[:4], 6 if profile != "quick" else 4)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** The baseline of this chapter, in three lines of numpy: which query features are more like the structure's
# prototype than like the background's, by cosine?


# %% tags=["exercise", "exercise-nearest_prototype"]
def nearest_prototype(support, mask, query):
    """(M,) bool for query (M, D); support (N, D) features, mask (N,) bool: which of these are the structure."""
    raise NotImplementedError


# %%
check("05/nearest_prototype", nearest_prototype)

# %% [markdown]
# **2.** The protocol. Setting 1: all slices, novel structures are background. Setting 2: slices with a novel structure
# are left out. The labels that you are given must stay as they are.


# %% tags=["exercise", "exercise-training_slices"]
def training_slices(labels, novel, setting):
    """(numbers of the slices trained on, their label maps) of labels (N, H, W); novel: a set of labels."""
    raise NotImplementedError


# %%
check("05/training_slices", training_slices)

# %% [markdown]
# **3.** Luck. A paper reports a gain after drawing one support for each method. Take *one* method and its Dice with
# many supports: for which share of the pairs of supports do the means differ by that gain or more, whichever of the
# two is better? That often, nothing but the draw would have made the headline.


# %% tags=["exercise", "exercise-luck"]
def luck(dice, gain):
    """A share from 0 to 1; dice is (supports, patients), a paper reports its mean over patients."""
    raise NotImplementedError


# %%
check("05/luck", luck)

# %% [markdown]
# ## What to read next
# - Wang et al.: *PANet* (ICCV 2019): prototypes, and aligning them back.
# - Ouyang et al.: *Self-supervised Learning for Few-shot Medical Image Segmentation* (TMI 2022): superpixel episodes,
#   and the two settings.
# - Roy et al.: *Squeeze & Excite guided few-shot segmentation of volumetric images* (MedIA 2020): the chunks.
# - Boudiaf et al.: *Few-Shot Segmentation Without Meta-Learning* (CVPR 2021), above all its oracle of the proportion.
# - Butoi et al.: *UniverSeg* (ICCV 2023): the support as an input of one large network.
