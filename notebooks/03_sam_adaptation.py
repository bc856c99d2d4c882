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
# # 03 · A model that answers clicks, and what it takes to teach it anatomy
#
# **After this chapter you can** prompt a Segment Anything model and judge its answers against methods that need no
# training; adapt it by turning few knobs (a decoder, low-rank updates, singular values) and say what each costs; and
# tell what of a published gain comes from the model and what from the box that somebody drew who knew the answer.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains, no network | 1 | under 1 GB |
# | `full` | hearts (ACDC) | about 4 | 2 GB |
#
# What you see on the web was made by `full`. SAM's own weights are hundreds of megabytes, so the book has a **small
# SAM** of its own: the same parts, six and a half million weights, taught on synthetic scenes alone. **Expect** a
# model that follows your clicks and knows no anatomy.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from scipy import ndimage  # noqa: F401 - for the second exercise

from medcook import comparison, plots, teaching
from medcook.evaluation import evaluate
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.sam_adaptation import (
    cosam,
    dvpt,
    h_sam,
    i_medsam,
    lesion_sam3,
    medsamix,
    salt,
    sam_med2d,
    sam_med3d,
)
from medcook.recipes.sam_adaptation._adapters import Bottleneck
from medcook.sam import card, prompts
from medcook.sam.adapting import targets_of
from medcook.sam.asking import draw_box, draw_points
from medcook.sam.checkpoints import load_small
from medcook.sam.classical import COMPETITORS
from medcook.sam.clicking import click_sheet, click_widget
from medcook.sam.figures import cost_figure, cost_table, zero_shot_figure
from medcook.sam.likeness import depths, likeness, shown
from medcook.sam.model import DENSE, SIZE, SmallSam
from medcook.sam.predictor import Predictor, box_overlap, reaching
from medcook.sam.views import agreement
from medcook.sam.zero_shot import score
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A promptable model knows no classes. You show it *one* object, by a click, a box or a scribble; it answers with a mask
# and with how good it believes the mask to be. Then you correct it. Here a rule does the clicking: first in the middle
# of the object, then in the middle of the largest error. Filled: the answer; dotted: the truth; a plus lies on the
# object, a cross beside it.

# %% tags=["cover"]
experiment = find_recipe("salt")
method, task, budget, seed = experiment.run(profile, "salt", 0)
predictor = Predictor(load_small())
case = next(iter(task.cases("val")))
targets = {target.structure: target for target in targets_of(task, case)}
click_sheet(predictor, list(targets.values())[:3])

# %% tags=["nbval-check-output", "mechanism"]
truth, answer = np.zeros((12, 16), bool), np.zeros((12, 16), bool)
truth[2:10, 3:11], answer[2:10, 3:7] = True, True
prompt = prompts.first_click(truth)
print(f"first click: {prompt.foreground[0]}; half is missing,", end=" ")
print(f"so the next is {prompts.next_click(prompt, answer, truth).foreground[-1]}, on the object")
answer[:, 3:16] = True
print(f"too much on the right: the next is {prompts.next_click(prompt, answer, truth).background[-1]}, beside it")

# %% [markdown]
# ## The failure first
# Nothing of this model was taught on a real image. How far does it get, and is that any better than what needs no model
# at all: the ellipse that fills the box, a graph cut, a random walker? All get the same prompts, on validation
# patients.

# %%
methods = {card.OURS: card.mask_of(predictor), **COMPETITORS}
patients = task.val_patients[: 4 if profile != "quick" else 1]
asked = [target for case in task.data.cases(patients) for target in targets_of(task, case)]
scores = score(methods, asked)
zero_shot_figure(scores)

# %%
display(card.means(scores).groupby("prompt", sort=False).mean().round(3))

# %% [markdown]
# The model card has the same for five sets: test patients of the three large ones, all patients of the two small ones.

# %%
zero_shot_figure(card.stored())

# %% [markdown]
# Read it line by line, not by its mean. From the box, an ellipse is hard to beat on what is round; a ring, whose box
# holds two structures, is hard for all, and so are the cells and the mandible. From a single click a random walker,
# which floods what looks alike, is ahead of the network on some: on the lungs, which are one object in two parts, on
# one of the parotids and on the larynx. Which targets have a border that the prompt points at, and which are defined by
# convention? Unevenness is what the survey *SAM4MIS* (Zhang et al. 2024) reports of the real SAM over dozens of
# studies, and why adaptation is the subject of all the others in this chapter.
#
# ## How a prompt gets in
# SAM turns points and corners into tokens that attend to the image. From a billion masks it learns what they mean. The
# small SAM has no billion masks; so its prompts are also *drawn*, and the image is compared with what they show: the
# middle of a box, its rim (of a ring, that is the wall) and its surroundings.

# %%
teaching.show_code(SmallSam.prompted, depths, shown, likeness)

# %% tags=["nbval-check-output", "mechanism"]
drawn, box = torch.zeros(1, 3, DENSE, DENSE), torch.tensor([[40.0, 40.0, 120.0, 120.0]])
draw_box(drawn, box)
depth = depths(box / SIZE, DENSE)
middle, rim, around = shown(drawn, depth)
square = drawn[:, 1:2] > 0
print(
    f"of the middle's weight {middle[square].sum():.3f} lies in the box, of the rim's {rim[square].sum():.3f},", end=" "
)
print(f"of the surroundings' {around[square].sum():.3f}")
distances = likeness(square.float(), drawn, depth)[0]
for name, distance in zip(("the middle", "the rim", "what is around"), distances, strict=True):
    print(f"from {name} a place inside is {distance[20, 20]:.3f} away, a place far outside {distance[2, 2]:.3f}")

# %% tags=["nbval-check-output", "mechanism"]
clicks = torch.zeros(1, 3, DENSE, DENSE)
draw_points(clicks, torch.tensor([[[40.0, 40.0], [120.0, 80.0]]]), torch.tensor([[1, 0]]))
inside, _, outside = shown(clicks, torch.zeros(1, 2, DENSE, DENSE))
for name, weights in (("on the object", inside), ("beside it", outside)):
    row, column = divmod(int(weights.argmax()), DENSE)
    print(f"the click {name}: row {row}, column {column} of the drawn prompt")

# %% [markdown]
# A box says one thing more: how far the object reaches. Where nothing but a box is given, the threshold above which a
# place counts as object is the one whose mask fills the box best.

# %% tags=["nbval-check-output", "mechanism"]
rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
timid = 3 - torch.hypot(rows - 19.5, columns - 19.5)[None, None] / 3
asked_box = [5.0, 5.0, 35.0, 35.0]
for name, logits in (("as it is", timid), ("let out to its box", reaching(timid, asked_box))):
    print(f"{name}: {int((logits > 0).sum())} places,", end=" ")
    print(f"box overlap {box_overlap(logits[0, 0] > 0, torch.tensor(asked_box)):.3f}")

# %% [markdown]
# A click says nothing of the kind: on the wall of the heart it may mean the wall, the heart, or the chest. So clicks
# are looked at from three distances: the image, a half and a quarter of it. All give candidates, and the answer is the
# mask that is *expected* to overlap most with whichever candidate is right, which depends on how far each is trusted.

# %%
teaching.show_code(agreement)

# %% tags=["nbval-check-output", "mechanism"]
radius = torch.hypot(rows - 19.5, columns - 19.5)
at_click = prompts.Prompt(foreground=((20.0, 20.0),))
for small, large, trust in ((10, 12, 0.5), (4, 18, 0.5), (4, 18, 0.8)):
    candidates = torch.stack([torch.where(radius < one, 9.0, -9.0) for one in (small, large)])
    answer, overlap = agreement(candidates, torch.tensor([trust, 1 - trust]), at_click)
    across = int((answer[20] > 0).sum())
    print(f"{small} or {large}, {trust:.0%} for the small one: radius {across / 2:.0f}, expected IoU {overlap:.2f}")

# %% [markdown]
# ## Adapting it: which knobs?
# The model has an image encoder (most of the weights), a prompt encoder and a light decoder. Tuning everything costs
# memory and forgets; tuning the decoder alone cannot see what the encoder does not show. In between lie small additions
# to a frozen encoder, all of which **start as the identity**, so that training begins with what the model already
# knows:
#
# - **LoRA** (Hu et al. 2022): W + BA with B = 0;
# - **adapters**: h + up(gelu(down(h))) with up = 0; SAM-Med2D's also looks along channels and across space;
# - **SALT** (Elsayed et al. 2025): take the weight apart into singular values; scale and shift the largest, give the
#   rest a low-rank update;
# - **MedSAMix** (Yang et al. 2025): no training at all: a weight between two models' weights, layer by layer.

# %%
teaching.show_code(salt.SingularLinear.weight, salt.rescaled, Bottleneck, sam_med2d.Adapter.forward, medsamix.merged)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
layer, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
adapted = salt.SingularLinear(layer, top=2, rank=1)
print(f"SALT before training: the largest change is {(adapted(x) - layer(x)).abs().max():.3f}")
adapted.scale.data[0] = 1.0
values = [torch.linalg.svdvals(weight.detach()) for weight in (layer.weight, adapted.weight())]
print("singular values before:", np.round(values[0].numpy(), 3))
print("with the first one doubled:", np.round(values[1].numpy(), 3))
block = Bottleneck(6, 2)
print(f"an adapter before training: the largest change is {(block(x) - x).abs().max():.3f}")

# %% tags=["nbval-check-output", "mechanism"]
one, other = {"neck.w": torch.tensor([0.0, 1.0])}, {"neck.w": torch.tensor([1.0, 3.0])}
for share in (0.0, 0.25, 1.0):
    print(f"merged at {share:.2f}:", medsamix.merged(one, other, {"neck": share})["neck.w"].numpy().round(3))

# %% [markdown]
# ## Run it
# Segmentation without prompts: a token for each class asks for all of them at once, as in SAMed (Zhang and Liu 2023).
# The same few labelled patients, the same steps; what differs is what learns. At `full` a U-Net from scratch stands
# beside them.

# %%
arms = ("u-net", "decoder only", "lora", "salt") if profile != "quick" else ("decoder only", "salt")
costs, answers, tables = {}, {}, {}
for arm in arms:
    adapted = None  # one network at a time, for the memory's sake
    adapted = fit(*experiment.run(profile, arm, 0))
    answers[arm], tables[arm] = adapted.predict(case), evaluate(adapted.predict, task.data, task.val_patients)
    trained, seconds = adapted.cost["parameters"], adapted.cost["seconds"]
    costs[arm] = [f"{trained:,}", round(seconds, 1), round(tables[arm]["dice"].mean(), 3)]
columns = ["parameters trained", "seconds", "Dice, validation"]
display(pd.DataFrame.from_dict(costs, orient="index", columns=columns))

# %%
plots.compare_methods(case, answers, task.data.manifest)

# %% [markdown]
# The best and the worst validation patients of SALT:

# %%
plots.worst_cases(adapted, tables["salt"], count=3)

# %% [markdown]
# One draw of patients says little. The recipe repeats this over three draws and on the test patients, for the verdict:

# %%
teaching.show_evidence("salt")

# %% [markdown]
# What a Dice costs: parameters trained (on a log scale) against what they bring. Low-rank updates everywhere are the
# cheap end here, and too little: with the decoder itself frozen, the class tokens get no masks of their own in so few
# steps. In SALT's comparison above LoRA stands beside a decoder that learns. Seconds were taken while other work ran on
# the machine, more for some arms than for others: read them as an order of magnitude.

# %%
papers = teaching.measured("03_sam_adaptation")
if "finetune-sam" in papers:
    display(cost_figure(teaching.need_summary("finetune-sam")))
teaching.show_evidence("finetune-sam")

# %% [markdown]
# Mind the U-Net. It starts from nothing, so in the same few steps it lags far behind: here a pre-trained model pays.
# But its steps are cheap, and nobody has to stop there. What more of them bring (test patients; the same number of
# labelled ones):

# %%
for name, paper, arm in (
    ("adapted, LoRA, 120 steps", "salt", "lora"),
    ("U-Net, 120 steps", "h-sam", "u-net"),
    ("U-Net, 400 steps (chapter 04)", "few-labels", "supervised, 3"),
):
    if paper in papers or paper == "few-labels":
        found = teaching.need_summary(paper).arms[arm]
        print(f"{name}: {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")

# %% [markdown]
# A paper on adapting SAM that does not show a U-Net trained on the same labels until it is done leaves out its
# strongest competitor.
#
# ## Who drew the box?
# A prompt that is made from the truth carries the truth: where the object is, how large, that there is one. *Medical
# SAM3* (Jiang et al. 2026) asks what is left when only a name is given; *SAM-Med2D* (Cheng et al. 2023) tunes for every
# kind of prompt.

# %%
for paper in ("medical-sam3", "sam-med2d"):
    teaching.show_evidence(paper)

# %% [markdown]
# ## Segmentation without prompts
# Nobody clicks in a screening. These papers keep what SAM has learnt and do without its prompts, with a token for each
# class. *H-SAM* (Cheng et al. 2024) decodes twice: what the first decoder finds steers where the class tokens of the
# second look. *DVPT* (He et al. 2025) runs one small module beside all frozen layers, whose learnt queries look at the
# image before they speak. *I-MedSAM* (Wei et al. 2024) decodes points instead of pixels, and looks again at those that
# it doubts. *ESP-MedSAM* (Xu et al. 2024) has a light student draw its own prompts, and *CC-SAM* (Gowda and Clifton
# 2024) fuses a frozen CNN in.

# %%
teaching.show_code(h_sam.steering, dvpt.DynamicPrompts.forward, i_medsam.PointDecoder.doubt)

# %% tags=["nbval-check-output", "mechanism"]
prior = torch.full((1, 3, 2, 2), -4.0)
prior[0, 1, 0, 0] = prior[0, 0, 1, 1] = 4.0  # class 1 in one corner, background in the opposite one, else undecided
steer = h_sam.steering(prior, torch.ones(3), side=2)[0]
print("what is added to the attention of class 1, place by place:", steer[1].numpy().round(2))
print("and of class 2, which the first decoder rules out in two corners:", steer[2].numpy().round(2))

# %%
for paper in ("h-sam", "dvpt", "i-medsam", "esp-medsam", "cc-sam"):
    teaching.show_evidence(paper)

# %% [markdown]
# ## Prompted, and tuned in other ways
# A convolution branch beside the transformer (*SAM-UNet*, Yang et al. 2024); tokens for the modality and for what the
# box holds (*MCP-MedSAM*, Lyu et al. 2024); organs shrunken and made grainy, for small ones (*SAS*, Ferreira et al.
# 2025); and merging in place of training (*MedSAMix*, Yang et al. 2025).

# %%
for paper in ("sam-unet", "mcp-medsam", "sas", "medsamix"):
    teaching.show_evidence(paper)

# %% [markdown]
# ## Volumes
# A click in every slice is no way to work through a volume. *SAM-Med3D* (Wang et al. 2023) makes every part of SAM 3D
# and learns it anew; *3DSAM-adapter* (Gong et al. 2023) lets the frozen layers of a 2D model see neighbouring slices
# through adapters; *Jiang et al.* (2026) ask the 2D model slice by slice, and give the answer in one slice to the next
# as its prior.

# %%
teaching.show_code(sam_med3d.alike, lesion_sam3.outwards)

# %%
for paper in ("sam-med3d", "3dsam-adapter", "lesion-sam3"):
    teaching.show_evidence(paper)

# %% [markdown]
# ## Elsewhere: another hospital, another modality
# *CoSAM* (Fu et al. 2024) learns where its own mask is wrong, corrects it and asks itself again; here it is trained on
# X-rays of one hospital and scored on those of another. The survey of *Zhang, Shen and Jiao* (2024) asks for a table
# over modalities and targets: how uneven is the model as it is, and does adapting it to all of them at once mend that?

# %%
teaching.show_code(cosam.correct, cosam.prompts_of)

# %%
for paper in ("cosam", "sam4mis"):
    teaching.show_evidence(paper)

# %% [markdown]
# ## Ablation
# Squares: the method against its comparator. Circles: the method against itself without the claimed ingredient.

# %%
if papers:
    display(comparison.forest([teaching.need_summary(paper) for paper in papers]))
    display(cost_table(*[teaching.need_summary(paper) for paper in papers]))
    print(comparison.tally([teaching.need_summary(paper) for paper in papers]))

# %% [markdown]
# Compare the squares with the circles. A square says that the whole package beats its comparator, which is often a
# model that was adapted less; a circle says that the claimed ingredient is what does it. Where the square lies right of
# zero and the circle on it, the gain comes with the labels and the steps; that the idea adds to it was not seen.

# %% [markdown]
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("03_sam_adaptation"))
display(teaching.verdict_table(*papers) if papers else "No paper of this chapter has been measured yet.")

# %% [markdown]
# **What differs from the papers.** A model of six and a half million weights that has seen synthetic scenes stands for
# one of ninety million that has seen a billion masks; slices of 160 pixels; a hundred or two steps. **What is the
# same**: the parts, where the additions go, and that every arm gets the same labels and steps.
#
# **Four questions for a paper on adapting SAM.** Where does the prompt come from at test time? How does a U-Net do on
# the same labels? What was tuned, and what did that cost? Which targets get worse?
#
# ## Play with it
# Click on the object; with the right button, or with Shift, beside it; or drag a box. On the web you see the rule's
# clicks at the top of this chapter instead. Here the network answers in bfloat16 where that is faster, and all that a
# first click is looked at from is embedded when an image is shown.

# %%
adapted = None  # one network at a time
click_widget(Predictor(predictor.model, precision="auto"), targets)

# %% [markdown]
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** A linear layer with LoRA. `weight` is frozen, (outputs, inputs); `down` is (rank, inputs), `up` is (outputs,
# rank); the update is scaled by alpha over the rank.


# %% tags=["exercise", "exercise-low_rank"]
def low_rank(x, weight, down, up, alpha):
    """(N, outputs) of x (N, inputs): what the frozen layer answers, plus the scaled low-rank update."""
    raise NotImplementedError


# %%
check("03/low_rank", low_rank)

# %% [markdown]
# **2.** Where does a careful person click next? In the middle of the largest connected error, be it something that is
# missing or something that is too much. `ndimage` has `label` and `distance_transform_edt`.


# %% tags=["exercise", "exercise-next_click"]
def next_click(answer, truth):
    """(row, column, on the object?) of the next click for two masks (H, W) bool; None where nothing is wrong."""
    raise NotImplementedError


# %%
check("03/next_click", next_click)

# %% [markdown]
# **3.** The heart of SALT. Take a weight apart, scale and shift its largest singular values, put it together again.


# %% tags=["exercise", "exercise-rescaled"]
def rescaled(weight, scale, shift):
    """The weight (outputs, inputs) with its first len(scale) singular values times `scale` plus `shift`; in numpy."""
    raise NotImplementedError


# %%
check("03/rescaled", rescaled)

# %% [markdown]
# ## What to read next
# - Kirillov et al.: *Segment Anything* (ICCV 2023), above all its appendix on training with simulated clicks.
# - Wong et al.: *ScribblePrompt* (ECCV 2024): prompts of every kind, taught on synthetic label maps.
# - Gu et al.: *How to build the best medical image segmentation algorithm using foundation models* (2024).
# - Mazurowski et al.: *Segment Anything Model for medical image analysis: an experimental study* (2023).
# - Hu et al.: *LoRA* (ICLR 2022), and Houlsby et al.: *Parameter-Efficient Transfer Learning for NLP* (ICML 2019).
