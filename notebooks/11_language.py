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
# # 11 · Asking in words
#
# **After this chapter you can** build a network that segments what a sentence asks for; tell whether it listens to the
# sentence, or only looks at the image; learn from radiologists' reports before there are labels; and read a paper on
# language and images with the right questions.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | chest X-rays and reports (Montgomery, Shenzhen); evidence also on four other sets | about 5 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** that a network learns quickly which words stand for which
# kind, slowly that a sentence may be about nothing in the image, and that words which were in no training sentence
# mean nothing to it.

# %% tags=["parameters"]
PROFILE = None

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import comparison, language_figures, metrics, teaching, widgets
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.language import Modulation, Question, TextEncoder, mask_loss, meant
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.language import _findings, _queries, _reading, _reports, _streams, medal_s
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# The same X-ray, and several sentences. Findings were drawn into its lungs, so that it is known what each sentence
# means: sometimes one of them, sometimes several, sometimes none. Everything else in the image is real.

# %% tags=["cover"]
method, task, budget, seed = find_recipe("rexgroundingct").run(profile, "sentences", 0)  # the chapter's baseline
task = replace(task, evaluation="val")  # the chapter looks at validation patients; the test set is the recipes'
listener = fit(method, task, budget, seed)
nets, shown, spoken = listener.nets.eval(), task.samples("val"), method.language
most = [number for number in range(len(shown)) if len(shown.labels[number].unique()) > 4]
number = most[0] if most else 0
image, label = shown.images[number], shown.labels[number]
values = [value for value in label.unique().tolist() if value]
first, last = _findings.FINDINGS[values[0] - 1], _findings.FINDINGS[values[-1] - 1]
missing = next(value for value in range(1, task.classes) if value not in values)
questions = [
    Question(spoken.name(values[0]), (values[0],)),
    Question(spoken.name(values[-1]), (values[-1],)),
    Question(spoken.some(kind=first.kind), _findings.matching(kind=first.kind)),
    Question(spoken.some(side=last.side), _findings.matching(side=last.side)),
    Question(spoken.name(missing), ()),
]
answers = language_figures.answered(method, nets, image, label, questions)
language_figures.answers_figure([answers], task.data.manifest)

# %% [markdown]
# **How it was asked.** Right and left are the patient's, as in reports: the right lung is on the left of the image. A
# network that looks for the brightest spot answers the first questions, too; it fails where several findings are alike,
# and where there is nothing. How often does it happen?

# %%
rows = [row for case in task.cases("val") for row in _findings.grounding_rows(listener, case)]
frame = pd.DataFrame(rows)
measures = ["dice", "hit", "pointed", "rejected"]
frame.groupby("structure", sort=False)[measures].mean().round(2).rename_axis("the sentence is about")

# %% [markdown]
# **Dice** of the answer, **hit**: the boxes around answer and truth overlap by half of their union, **pointed**: the
# most probable pixel is right, **rejected**: nothing was found, which is right where the sentence is about nothing.
#
# ## Does it listen?
# A network may solve its task without the words. So the sentences of the images are swapped: what it answers to another
# image's sentence should be what that sentence means here, mostly nothing.

# %%
torch.manual_seed(0)
asked = [spoken.ask(tuple(v for v in one.unique().tolist() if v), None, False) for one in shown.labels]
swapped = [*asked[1:], asked[0]]
found = {}
for name, sentences in (("its own sentence", asked), ("another image's sentence", swapped)):
    with torch.no_grad():
        parts = [
            nets["average"](shown.images[at : at + 16], tuple(q.sentence for q in sentences[at : at + 16])).sigmoid()
            for at in range(0, len(shown), 16)
        ]
    masks = torch.cat(parts) > 0.5
    own = meant(shown.labels, asked) == 1
    overlap = [metrics.dice(*pair) for pair in zip(masks.numpy(), own.numpy(), strict=True)]
    found[name] = {
        "Dice with what its own sentence means": np.mean(overlap),
        "pixels answered": float(masks.sum((1, 2)).float().mean()),
    }
pd.DataFrame(found).T.round(2)

# %% [markdown]
# It listens: with another image's sentence it no longer outlines what its own one means. But that sentence is mostly
# about nothing in the image, and is answered all the same.
#
# ## The mechanisms
# **Words become vectors, vectors change features.** A word has a vector, found by its letters; a transformer block lets
# the words of a sentence look at each other. What comes out scales and shifts the channels of the image's features: in
# one sentence this channel matters, in another that one. Perez et al. (2018) call it feature-wise linear modulation.

# %%
teaching.show_code(TextEncoder.forward, Modulation.forward)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
change, maps = Modulation(2, 3), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
print("at the start a sentence changes nothing:", change(maps, torch.randn(1, 3)).flatten().tolist())
change.line.bias.data = torch.tensor([0.0, -1.0, 5.0, 0.5])  # two scales, two shifts
print("then it turns channels up, down and off:", change(maps, torch.zeros(1, 3)).flatten().tolist())

# %% [markdown]
# **A sentence means label values, and its mask is their union.** The loss is that of two classes. A small answer hardly
# counts beside a large one if all images of a batch share one Dice; each can have its own instead.

# %%
teaching.show_code(meant, mask_loss)

# %% tags=["nbval-check-output", "mechanism"]
labels = torch.tensor([[[0, 5, 7, 255]]], dtype=torch.uint8)
for sentence, values in (("the fifth", (5,)), ("all of them", (5, 7)), ("the sixth", (6,))):
    print(f"{sentence:12} means", meant(labels, [Question(sentence, values)]).flatten().tolist())
large, small = torch.zeros(2, 8, 8, dtype=torch.uint8)
large[:6], small[0, 0] = 1, 1
right = torch.where(torch.stack([large, 0 * small]) == 1, 9.0, -9.0)  # the small one is missed
for each in (False, True):
    name = "each its own Dice:" if each else "one Dice of both: "
    print(name, f"{mask_loss(right, torch.stack([large, small]), each):.2f}")

# %% [markdown]
# **Reports are labels that nobody had to draw.** *ConVIRT* (Zhang et al. 2022) brings an image and its own report
# together and keeps it from those of the others in a batch, in both directions. Half of the reports here say "normal":
# equal reports are no strangers, they share their probability.

# %%
teaching.show_code(_reading.pairs)

# %% tags=["nbval-check-output", "mechanism"]
corners = torch.eye(3)
for name, reports in (("three reports", ("a", "b", "c")), ("two of them the same", ("a", "a", "c"))):
    matched = _reading.pairs(corners, corners, reports)
    mixed = _reading.pairs(corners, corners.roll(1, 0), reports)
    print(f"{name:20}: loss of matched pairs {matched:.2f}, of mixed up ones {mixed:.2f}")
for name, stated in _reports.facts_of("Inactive TB scars LUL, new cavity in the right upper lobe")._asdict().items():
    print(f"{name:20}: {', '.join(sorted(stated))}")

# %% [markdown]
# **What, and where.** *MeDSLIP* (Fan et al. 2024) takes a report apart: each sign belongs to places, and an image is
# asked in two streams, one for signs and one for places. What a report leaves open stays open.

# %%
teaching.show_code(_streams.parts_of, _streams.stated)

# %% tags=["nbval-check-output", "mechanism"]
report = "Left pleurisy, cavity in the upper field"
for signs, places in _streams.parts_of(report):
    print(" and ".join(sorted(signs)), "in:", ", ".join(sorted(places)))
said = _streams.stated((report, "normal"))
for text, row in zip((report, "normal"), said.signs.tolist(), strict=True):
    print(f"{text:42}", dict(zip(_streams.PATHOLOGIES, row, strict=True)))

# %% [markdown]
# **All names at once.** In *SAT* (Zhao et al. 2025) and *Medal S* each name becomes a vector, after it has asked the
# image, and its mask is the product of this vector with the features of every pixel. Further names cost nearly nothing.

# %%
teaching.show_code(_queries.dotted, medal_s.SpatialUNet.bound)

# %% tags=["nbval-check-output", "mechanism"]
pixels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).view(1, 2, 1, 3)
names = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 2.0, -1.0], [2.0, 2.0, -2.0]]])  # two weights and a bias each
for name, mask in zip(("one", "another", "both together"), _queries.dotted(pixels, names)[0, :, 0] > 0, strict=True):
    print(f"{name:14} of three pixels: {mask.int().tolist()}")

# %% [markdown]
# ## What the hospitals wrote
# The X-rays of Montgomery and Shenzhen came with a radiologist's own words on every patient, in two styles. What they
# state is found by words, without any model: on which side, in which field, what.

# %%
corpus = task.dataset
reports = _reports.reports_of(task.data)
trained_on = [case for patient in task.data.split.train for case in task.data.patients[patient] if case in reports]
facts = pd.DataFrame(
    [
        {name: ", ".join(sorted(found)) for name, found in _reports.facts_of(reports[case])._asdict().items()}
        | {"report": reports[case]}
        for case in trained_on
    ],
    index=trained_on,
)
print(len(facts), "training patients with a report,", facts["report"].nunique(), "different ones")
several = facts[facts["report"].str.len() < 160].drop_duplicates("report")
several.sample(min(6, len(several)), random_state=1)

# %% [markdown]
# ## Ablation: what is a report worth?
# The same encoder with a tenth of the labels, after reading reports, after reading reports that belong to other
# patients, and without reading; and without reading, but with all labels.

# %%
display(teaching.evidence_table("convirt"))
teaching.verdict_table("convirt")

# %% [markdown]
# ## Successes and failures
# Full descriptions of single findings, on validation patients: the ones that are answered best and worst.

# %%
scored = []
for number, one in enumerate(shown.labels):
    there = [value for value in one.unique().tolist() if value]
    asked = [Question(spoken.name(value), (value,)) for value in there]
    for answer in language_figures.answered(method, nets, shown.images[number], one, asked):
        scored.append((metrics.dice(answer.answer > 0.5, answer.truth), len(scored), answer))
scored.sort()
language_figures.answers_figure(
    [[answer for *_, answer in scored[-5:]], [answer for *_, answer in scored[:5]]], task.data.manifest
)

# %% [markdown]
# Nodules and cavities with clear edges can be found exactly, even small ones. Small patches are missed above all, which
# hardly differ from the ribs behind them: then nothing is answered, or another spot.
#
# ## All of them, side by side
# Squares: over the comparator. Circles: over itself without its idea. Three seeds, draws or folds, the last
# checkpoint.

# %%
ids = teaching.measured("11_language")
summaries = [teaching.need_summary(paper) for paper in ids]
comparison.forest(summaries)

# %%
print(comparison.tally(summaries))

# %% [markdown]
# Every arm's mean, of all recipes of the chapter.

# %%
comparison.every_arm(summaries)

# %% [markdown]
# Findings by seed, which decides a lot here; sentences about one finding and about several; a prompt's degrees; Medal
# S before its second pass, and with masks that somebody drew; terms that training never used, and plain ones;
# findings that nobody asked for before, and others; masks that captions alone draw; after reading reports, how far
# the facts in the best-fitting report of a known patient are those of the X-ray's own; names by data set; and hearts
# asked for by name, place and size. These tables count every structure alike, the one above every patient.

# %%
for paper in ("lsms", "rexgroundingct"):
    frame = evidence_frame(paper, "full")
    display(frame.pivot_table(index="arm", columns="replicate", values="dice").round(2).rename_axis(columns=paper))
columns = {
    "rexgroundingct": ["dice", "several", "focal", "diffuse"],
    "medvlsm": ["dice", "bare", "all", "misled"],
    "medal-s": ["dice", "first", "drawn", "passes"],
    "pathvg": ["hit", "pointed", "hit_plain", "pointed_plain"],
    "structuralglip": ["ap", "ap_trained"],
    "medclip-sam": ["dice", "hit"],
    "convirt": ["facts"],
}
for paper, names in columns.items():
    table = evidence_frame(paper, "full").groupby("arm")[names].mean().dropna(how="all").round(3)
    display(table.rename_axis(paper))
for paper, asked_by in (("sat", "set"), ("flans", "structure")):
    frame = evidence_frame(paper, "full")
    display(frame.pivot_table(index="arm", columns=asked_by, values="dice").round(2).rename_axis(paper))

# %% [markdown]
# **How to read it.**
#
# - **Reports may be worth labels.** With a tenth of the labels, reading reports first takes the AUC of tuberculosis
#   from 0.759 to 0.806; all labels without reading give 0.830, with shuffled reports it is 0.751. Most of the gain is
#   one draw's, and with 138 patients every interval includes zero: whether reports replace labels is inconclusive.
#   And most of them say whether tuberculosis was seen.
# - **Tuned alike, readers of reports are alike.** With 36 labels, and a rate that validation patients chose, ConVIRT of
#   2020 tells tuberculosis with an AUC of 0.834, GLoRIA of 2021 with 0.833, MeDSLIP of 2024 with 0.830, ConVIRT as it
#   was tuned before with 0.815. Nothing of this is told apart by 138 patients.
# - **To read categories may help; descriptions show no gain over names.** A linear probe tells tuberculosis with an AUC
#   of 0.816 on an encoder that read categories as descriptions, of 0.834 on one that read their names, of 0.745 on one
#   that read nothing; the whole network, trained, is at 0.730. Intervals include zero, and tuberculosis is one of the
#   categories that were read.
# - **Split by what and where, a report may point better.** Asked for the signs that a report names, a map of two
#   streams tells on which side the radiologist saw them with an AUC of 0.615, of one stream with 0.499, of whole
#   reports with 0.382. These are 32 patients: no interval leaves zero out, and no map is surely better than chance.
# - **One network for all is behind one for each**: 0.691 and 0.762 with the same images and steps, most of it on
#   cells and hippocampi; on hearts and lungs they are level. It is behind by more than 0.02 in two seeds of three
#   alone, so by rule it is inconclusive. Facts about anatomy, told before, show no gain (0.708 without). Hardly
#   anything is found of the small organs of head and neck within these steps.
# - **A box of the truth is worth more than a name.** A network that hears a structure's name is at 0.565; a SAM that
#   never saw these sets, with a tight box of the truth in every slice, at 0.762. Trained on masks alone the network is
#   at 0.647: learning what kind of object it is, and that it is absent, costs accuracy within these steps.
# - **More interaction was worse.** A network like SAM, whose prompts come from an image and a name that attend to each
#   other, is at 0.596, with the mean word in its place at 0.628, the chapter's baseline at 0.676. All of them begin at
#   random and have the same 700 steps. Of SAM 2 and its weights this says nothing.
# - **Two appearances in one network need no words here.** Hearts, half of the patients seen with bright blood and half
#   with dark, are segmented at 0.731 by plain training on both, at 0.709 where appearances take turns, at 0.609 where
#   sentences also make the heads, in every fold. The text encoder tells sentences apart and does not know what they
#   mean; dark blood is simulated.
# - **Questions that were learnt are answered.** Asked by name, position or size about hearts in eight orientations, a
#   network that learnt all three and turns scans upright is at 0.618, without turning at 0.548, one that learnt names
#   alone at 0.495. By name alone the last is as good: it never heard a word of position or size. These are 15 patients.
# - **When a network begins to listen is a matter of luck.** Told the same sentences, the same network is at a Dice of
#   0.24, 0.62 and 0.52 in three runs: within some hundred steps it has, or has not yet, learnt to tell findings of a
#   kind apart. So it says little that attention at several scales has 0.498 and one scale 0.460, or that without its
#   strips it has 0.526.
# - **Little drawn may be more.** Trained on sentences whose masks hold one instance only, single findings are answered
#   with 0.573, where masks hold all that is meant with 0.425: it is the shorter way to listening. Plurals are answered
#   worse. Masks of categories, which cannot part two findings of a kind, give 0.461, so that sentences are better than
#   categories does not show: inconclusive.
# - **Coarse phrases teach fine ones.** A network that is also asked for lungs, sides and fields outlines findings at
#   0.675; with as many phrases, all of findings, at 0.552; the chapter's baseline at 0.425. From 0.425 to 0.552 it is
#   not the idea: every phrase is scored in every image there, and small answers count for themselves. From there on
#   it is, and it needs lung masks.
# - **All at once costs next to nothing.** Names and rough masks, asked for in one go, are at 0.613, one after the other
#   at 0.620, with a third of the passes. The rough masks themselves do harm: names alone are at 0.710.
# - **What nobody asked for can be described.** Kinds of findings that training left out are detected with an average
#   precision of 0.274 where their descriptions stay in a bank of their own, of 0.182 where they stand in one prompt
#   with the name. Without bank the same network has 0.165, though not in every seed. The others gain as well.
# - **Captions draw masks.** Without any mask in training, the places that a sentence makes a network look at outline
#   its finding at 0.490, SAM with a box around them at 0.506, and a network that learns from these at 0.595. With plain
#   InfoNCE, in place of a loss that minds hard negatives, it is 0.364. SAM itself was trained with masks, of synthetic
#   scenes.
# - **What a sentence needs of an image draws no better masks.** SAM with boxes from the information bottleneck is at
#   0.474, from gScoreCAM at 0.506: inconclusive, and better in one seed of three. Without compression it is 0.278; a
#   network that learns from its masks has 0.620. The image-text model learnt from captions of one finding alone.
# - **Knowledge, or learning to do without?** Asked for findings in terms that training never used, a network that is
#   told what is known of them has a hit of 0.466, one that hears the bare expression 0.354. The same network without
#   any knowledge has 0.495: both saw made-up words in training, and have learnt to go by the rest of the sentence.
# - **The name is enough.** A network that is also told number, size, shape and place of what it looks for, all of it
#   true, is no better than one that hears the name: 0.673 and 0.678. It listens, though: where every added word is
#   wrong, its Dice, here counted by structure and not by patient, falls from 0.565 to 0.475. The features that ImageNet
#   taught are worth more, 0.068.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("11_language"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Here words get their meaning from some hundred patients; there a text encoder has
# read millions of sentences before, and knows words that the images never showed it. Findings are drawn into X-rays;
# reports are real. **What is the same**: the mechanism, the images, steps and questions in all arms that are compared,
# and that no test patient's report or mask teaches anything.
#
# **Four questions for a paper on language.** Does the answer change when the sentence does? Is it asked about what is
# not there? Were the test sentences, or their words, in the training? And would the image alone, with a number for each
# class, have done as well?
#
# ## Play with it
# Choose an image and the words of a question, and see what is answered (in a live notebook).

# %%
few = shown if len(shown) <= 24 else replace(shown, images=shown.images[:24], labels=shown.labels[:24])
choices = {
    "kind": ("any", *_findings.KINDS),
    "size": ("any", *_findings.SIZES),
    "side": ("any", *_findings.SIDES),
    "field": ("any", *_findings.FIELDS),
}


def ask(**words):
    whole = len(words) == 4
    sentence = spoken.full(_findings.Finding(**words), 0) if whole else spoken.some(**words)
    return Question(sentence, _findings.matching(**words))


widgets.question_explorer(method, nets, few, task.data.manifest, choices, ask)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** A sentence changes features. `np` is numpy.


# %% tags=["exercise", "exercise-modulate"]
def modulate(maps, scale, shift):
    """Maps (C, H, W) of which channel c is scaled by 1 + scale[c] and shifted by shift[c], both (C,)."""
    raise NotImplementedError


# %%
check("11/modulate", modulate)

# %% [markdown]
# **2.** Images and reports find each other.


# %% tags=["exercise", "exercise-contrast"]
def contrast(similarity):
    """The loss of a batch: similarity (B, B) of image b (row) and report c (column); the pairs are on the diagonal.

    The mean of two cross-entropies: of its own report among all, for each image, and of its own image, for each report.
    """
    raise NotImplementedError


# %%
check("11/contrast", contrast)

# %% [markdown]
# **3.** Has it found the right one?


# %% tags=["exercise", "exercise-hit"]
def hit(one, other):
    """Whether two boxes share at least half of their union; (top, left, bottom, right), the last two exclusive."""
    raise NotImplementedError


# %%
check("11/hit", hit)

# %% [markdown]
# ## What to read next
# - Radford et al.: *Learning transferable visual models from natural language supervision* (ICML 2021).
# - Lüddecke and Ecker: *Image segmentation using text and image prompts* (CVPR 2022).
# - Perez et al.: *FiLM: visual reasoning with a general conditioning layer* (AAAI 2018).
# - Zhao et al.: *A foundation model for joint segmentation, detection and recognition of biomedical objects across nine
#   modalities* (Nature Methods 2025).
