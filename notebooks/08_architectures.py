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
# # 08 · What is an architecture worth?
#
# **After this chapter you can** name the places in which variants of the U-Net differ from it; write an upsampling that
# attends, a skip that subtracts and a scan whose cost grows with the number of tokens and no faster; see which pixels
# an answer depends on; and compare architectures so that a difference means something.
#
# | profile | data | minutes on 2 cores | memory |
# |---|---|---|---|
# | `quick` | simulated brains that ship with the book, no network | 1 | under 1 GB |
# | `full` | 80 hearts (ACDC), three folds | about 5 | 2 GB |
#
# What you see on the web was made by `full`. **Expect** no winner: after a minute of training from scratch (the
# U-Net's; most variants take longer for as many steps) the plain U-Net is not beaten, and most ideas, taken out of the
# network that was built around them, are not missed.

# %% tags=["parameters"]
PROFILE = None

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from medcook import architectures, comparison, plots, teaching, widgets
from medcook.evaluation import evaluate, summary
from medcook.evidence import evidence_frame
from medcook.exercises import check
from medcook.profiles import resolve_profile
from medcook.recipes import find_recipe
from medcook.recipes.architectures import _scan, m2snet, pranet, u_bench, unetpp, wau
from medcook.training import fit

profile = resolve_profile(PROFILE)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in one picture
# A U-Net is a way down, on which the image loses its size and gains its meaning, and a way up, on which it gets the
# size back with the help of what the skips remember. Hundreds of papers change one of these places. Those of this
# chapter:

# %% tags=["cover"]
architectures.anatomy(
    {
        "way down": [
            "R2U-Net: recurrent convolutions",
            "Swin UNETR: shifted windows",
            "ParaTransCNN: two encoders",
            "SWTR-Unet: attention on levels",
            "MK-UNet: three kernels at once",
            "LightM-UNet, xLSTM-UNet: scans",
        ],
        "skips": ["UNet++: dense", "M²SNet: differences", "MK-UNet: gated", "TransDAE: between scales"],
        "way up": ["WAU: window attention", "PraNet: reverse attention", "MSVM-UNet: several scales"],
        "heads": [
            "UNet++: one a depth",
            "IS-Net: a teacher of features",
            "guided attention: two rounds",
            "symbols: a sentence in between",
        ],
    }
)

# %% [markdown]
# A variant that is better may be so for three reasons: its idea, its size, or a baseline that was not tried as hard.
# So every comparison here has the same data, steps, loss, augmentation and optimiser, and beside each method stands the
# same network **without its idea** (the ablation). What is not the same is what a step costs. So look at that first.
#
# ## What it costs, before any training

# %%
ids = teaching.measured("08_architectures")
recipes = {paper: find_recipe(paper) for paper in ids}
method = find_recipe("wau").arms["unet"].method
built = {"unet": method.build(1, 4, 2)["model"]} | {
    paper: recipe.arms[recipe.compare[0]].method.build(1, 4, 2)["model"]
    for paper, recipe in recipes.items()
    if recipe.metric == "dice"
}
architectures.cost_table(built, torch.zeros(1, 1, 128, 128)).round(2)

# %% [markdown]
# Multiply-adds are those of convolutions, matrix products and attention in one slice of 128 × 128. They say little of
# the time: a depthwise convolution has few of them and waits for memory, a scan waits for its own last step.
#
# ## The mechanisms
# **Upsampling that asks.** A bilinear upsampling does not know what the finer grid looks like. *Window attention
# upsampling* (Li et al. 2022) lets every pixel of the skip ask the deeper pixels of its window. This is the recipe's
# own code:

# %%
teaching.show_code(wau.windows, wau.WindowAttentionUpsample)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
upsample = wau.WindowAttentionUpsample(2, 2, heads=1, window=2)
deep, skip = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2).sin(), torch.linspace(-2, 2, 32).reshape(1, 2, 4, 4).cos()
with torch.no_grad():
    print("asked and told:", [round(value, 3) for value in upsample.attend(deep, skip)[0, 0, 0].tolist()])
    print("with bilinear: ", [round(value, 3) for value in upsample(deep, skip)[0, 0, 0].tolist()])

# %% [markdown]
# **Skips that are dense.** *UNet++* (Zhou et al. 2020) fills the triangle between the way down and the way up. Every
# node of the top row has a head; a deep one may be cut off after training.

# %%
teaching.show_code(unetpp.NestedUNet.features)

# %% tags=["nbval-check-output", "mechanism"]
torch.manual_seed(0)
nested = unetpp.NestedUNet(inputs=1, classes=2, channels=(2, 4, 4)).eval()
image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
with torch.no_grad():
    print("heads at one pixel:", [[round(v, 3) for v in head[0, :, 3, 3].tolist()] for head in nested.outputs(image)])
    print("pruned to depth 1: ", [round(v, 3) for v in nested.pruned(image, 1)[0, :, 3, 3].tolist()])

# %% [markdown]
# **Skips that subtract.** Concatenating two levels repeats what both know. *M²SNet* (Zhao et al. 2023) passes on where
# they differ: pixel by pixel, and summed over 3 × 3 and 5 × 5 neighbours.

# %%
teaching.show_code(m2snet.compared, m2snet.Pyramid)

# %% tags=["nbval-check-output", "mechanism"]
fine, coarse = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4), torch.linspace(0, 1, 4).reshape(1, 1, 2, 2)
for sides in ((1,), (1, 3, 5)):
    apart = m2snet.compared(fine, coarse, sides)[0, 0]
    print(f"squares of {sides}:", [round(value, 3) for value in apart[0].tolist()])

# %% [markdown]
# **Attention that erases.** *PraNet* (Fan et al. 2020) draws a coarse map first, and then looks where that found
# nothing: the features are multiplied by what the map leaves over, class by class, and what is seen there corrects it.

# %%
teaching.show_code(pranet.reverse, pranet.ReverseAttention)

# %% tags=["nbval-check-output", "mechanism"]
coarse_map = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]).reshape(1, 3, 1, 2)
for pixel, left in zip(["first", "second"], pranet.reverse(coarse_map)[0, :, 0].T, strict=True):
    print(f"{pixel} pixel, left over for each class:", [round(value, 3) for value in left.tolist()])

# %% [markdown]
# **A scan in place of attention.** Attention compares every pixel with every other: twice the side, sixteen times the
# cost. A *selective state space* (Gu and Dao 2024; here in LightM-UNet and others) reads the pixels one after the other
# and keeps a state, h ← decay · h + gain, where each pixel chooses its own decay and gain. Its cost grows with the
# number of pixels. The chunks below are the trick that makes it bearable without special kernels:

# %%
teaching.show_code(_scan.recurrence, _scan.selective_scan)

# %% tags=["nbval-check-output", "mechanism"]
decay, gain = torch.full((1, 6, 1), 0.5), torch.tensor([1.0, 0, 0, 4, 0, 0]).reshape(1, 6, 1)
states = _scan.recurrence(decay.clone(), gain.clone())
print("the state fades:", [round(value, 3) for value in states[0, :, 0].tolist()])
tokens, step = torch.linspace(-1, 1, 8).reshape(1, 4, 2), torch.full((1, 4, 2), 0.5)
A, one = -torch.ones(2, 2), torch.ones(1, 4, 2)
found = _scan.selective_scan(tokens, step, A, one, one, torch.zeros(2))
print("read out:       ", [round(value, 3) for value in found[0, :, 0].tolist()])

# %% [markdown]
# ## Does it learn, and what does it look at?
# The U-Net of chapter 02, half as wide, and twice the same with another way up: with window attention, and with the
# same projection and no attention.

# %%
shown = {"U-Net": "unet", "window attention": "wau", "bilinear alone": "bilinear alone"}
recipe = find_recipe("wau")
fitted = {}
for name, arm in shown.items():
    method, task, budget, seed = recipe.run(profile, arm, 0)
    fitted[name] = fit(method, task, budget, seed)
scored = {name: evaluate(one.predict, task.data, task.val_patients) for name, one in fitted.items()}
for name, one in fitted.items():
    line = summary(scored[name]).loc["all"]
    origin = "from the run cache" if one.cached else "trained now"
    print(f"{name:16}  Dice {line['dice']:.3f}, {line['missed']:.0f} missed; {one.cost['seconds']:.0f} s, {origin}")

# %%
plots.learning_curves({name: [one.history] for name, one in fitted.items()}, title="one fold, one seed")

# %% [markdown]
# One fold and one seed tell nothing yet. Look at cases instead: the best of the window attention, and its worst.

# %%
plots.worst_cases(fitted["window attention"], scored["window attention"], count=3)

# %%
order = scored["window attention"].groupby("case_id")["dice"].mean().sort_values()
case = task.data.load(order.index[0])
plots.compare_methods(case, {name: one.predict(case) for name, one in fitted.items()}, task.data.manifest)

# %% [markdown]
# The same worst case, by all three. And what does the answer at one pixel depend on? The gradient of its logit says
# so, pixel by pixel (logarithmic, from a ten-thousandth of the largest value):

# %%
val = task.samples("val")
number = int((val.labels > 0).flatten(1).sum(1).argmax())
inside = (val.labels[number] == val.labels[number].max()).nonzero()
pixel = tuple(inside[len(inside) // 2].tolist())
networks = {name: architectures.fitted_network(one) for name, one in fitted.items()}
architectures.seen_figure(networks, val.images[number : number + 1], pixel, task.dataset)

# %% [markdown]
# A receptive field can be computed from kernels and strides (the first exercise). This is the *effective* one: the
# pixels nearby weigh most, but it takes more than fifty pixels in every direction, most of the slice, to hold 95% of
# what this answer depends on.
#
# Move the pixel yourself, and change the network (in a live notebook):

# %%
few = torch.linspace(0, len(val) - 1, 6).long()
widgets.seen_explorer(networks, val.images[few], task.dataset)

# %% [markdown]
# ## Ablation: is it the attention?

# %%
display(teaching.evidence_table("wau"))
teaching.verdict_table("wau")

# %% [markdown]
# ## All of them, side by side
# Every architecture of the chapter against the same U-Net: three folds of the hearts, the same steps, the last
# checkpoint. Squares: over the U-Net. Circles: over the same network without its idea.

# %%
summaries = [teaching.need_summary(paper) for paper in ids]
in_dice = [one for one in summaries if one.metric == "dice"]
comparison.forest(in_dice)

# %%
print(comparison.tally(in_dice))

# %% [markdown]
# And what does it cost? A gain to the right of 1 was bought.

# %% tags=["cover"]
compared = [one for one in in_dice if one.comparison.b == "unet"]
table = architectures.gains_over(compared, {one.paper: evidence_frame(one.paper, "full") for one in compared}, built)
architectures.cost_figure(table, compared[0].dataset)

# %%
architectures.readable(table)

# %% [markdown]
# ## A benchmark that counts the cost
# A table of Dice does not say whether a difference means anything, nor what it costs. *U-Bench* (Tang et al. 2025) asks
# both of a hundred variants, here of ten. Each is tested against the U-Net, and p is corrected for so many tests. And
# its *U-Score* is a harmonic mean, high where neither quality nor efficiency is low. Efficiency says where parameters
# and multiply-adds lie among the variants, on a logarithmic scale:

# %%
teaching.show_code(u_bench.placed, u_bench.u_score)

# %% tags=["nbval-check-output", "mechanism"]
pool = np.array([1e4, 1e5, 1e6, 1e7])
print("efficient:", {f"{cost:.0e}": round(u_bench.placed(cost, pool), 2) for cost in (1e4, 1e5, 1e6, 1e7)})
for quality, efficient in ((0.8, 0.8), (0.85, 0.1), (0.6, 1.0)):
    print(f"IoU {quality:.2f}, efficiency {efficient:.2f}: U-Score {u_bench.u_score(quality, efficient):.2f}")

# %%
frame = evidence_frame("u-bench", "full")
scores = frame.groupby("arm", sort=False)[["dice", "iou", "efficiency", "u_score"]].mean().join(u_bench.costs())
tested = u_bench.significance(frame)[["gain", "low", "high", "holm"]]
display(scores.drop(columns=["parameters, times", "multiply-adds, times"]).sort_values("u_score").iloc[::-1].round(3))
display(tested.sort_values("gain", ascending=False).rename_axis("Dice over the U-Net's").round(4))
print(f"highest U-Score: {u_bench.advise(scores)}; highest Dice: {scores['dice'].idxmax()}")

# %% [markdown]
# **How to read it.** With these hearts and a minute of training no variant is told apart from the plain U-Net to the
# better, and most are below it. This is no ranking of ideas:
#
# - Learning rate, schedule and augmentation were chosen with the U-Net, long before this chapter. Attention and scans
#   ask for lower rates and many more steps; their papers give them hours, and often weights from ImageNet. What a table
#   shows is an idea *and* a recipe. Where only the new network was tuned, it has this very fault the other way round.
# - The circles do not suffer from that: both networks of a pair are equally foreign to the recipe. There, three kernels
#   instead of one help MK-UNet, and a scan that selects is a little above one that does not (the survey). Erased
#   features, window attention, a second encoder, features of the label map, recurrence, shifted windows, guided
#   attention, LightM-UNet's scan and a sentence of symbols are not missed when they are gone; dense skips, channel
#   attention, subtraction, MSVM-UNet's several scales, the memory of the xLSTM and SWTR-Unet's transformer do harm in
#   so few steps.
# - One claim about Dice is supported: with a selective scan in place of self-attention, in the same U-Net, it is not
#   lower by 0.01 (the survey of Mamba; its comparator is the network with attention).
# - Efficiency depends on who else is in the table. By U-Score MK-UNet is at 0.772 and the U-Net at 0.289, as claimed:
#   most variants have about as many weights as the U-Net, so that whoever has fewer is alone at the upper end of the
#   scale. In Dice MK-UNet is 0.065 below the U-Net, and LightM-UNet, second by U-Score, 0.152. Of nine differences in
#   Dice eight remain after the correction, all of them to the worse.
# - MSVM-UNet scans every level in four directions, and is 0.11 below the U-Net. With convolutions of one size on its
#   way up, in place of three, it is 0.02 better, and still far below.
# - The longest bar is half a failure: in one fold LightM-UNet hardly finds the right ventricle (its misses are counted
#   in its evidence), and in the other two it is below the U-Net as well. A mean over folds hides such a run, the
#   interval does not.
#
# ## All papers of the chapter

# %%
display(teaching.chapter_papers("08_architectures"))
teaching.verdict_table(*ids)

# %% [markdown]
# **What differs from the papers.** Networks are narrow and trained for minutes from scratch, where many papers begin
# with weights from ImageNet and train for hours; hearts stand for polyps, lesions and organs. **What is the same**: the
# mechanism, a baseline that was tried as hard, and three folds of patients instead of one split.
#
# **Four questions for a paper on architectures.** Has the baseline the same augmentation, steps and pre-training? Is
# there the same network without the idea? Is the gain larger than the spread between folds? And what does a plain U-Net
# reach that is allowed to cost as much?
#
# ## Your turn
# Three exercises. Each check tells you whether you are right, and hints where you are not.
#
# **1.** How many pixels of the image, in a row, does one output of a stack of layers see? A layer is (kernel, stride);
# pooling by two is (2, 2).


# %% tags=["exercise", "exercise-receptive_field"]
def receptive_field(layers):
    """Pixels of the image, in a row, that one output of the last layer sees; layers are (kernel, stride)."""
    raise NotImplementedError


# %%
check("08/receptive_field", receptive_field)

# %% [markdown]
# **2.** Cut an image into windows, as every window attention does first. `image` is a numpy array.


# %% tags=["exercise", "exercise-windows"]
def windows(image, side):
    """(C, H, W) to (windows, side * side, C): squares row by row, and so their pixels; H and W multiples of side."""
    raise NotImplementedError


# %%
check("08/windows", windows)

# %% [markdown]
# **3.** Why a scan can run in parallel: two steps h → decay · h + gain, one after the other, are again such a step.
# Which one?


# %% tags=["exercise", "exercise-combine"]
def combine(first, second):
    """The one step (decay, gain) that does what `first` and then `second` do; a step is h -> decay * h + gain."""
    raise NotImplementedError


# %%
check("08/combine", combine)

# %% [markdown]
# ## What to read next
# - Ronneberger, Fischer and Brox: *U-Net* (MICCAI 2015). Eight pages; then see what of it the variants have kept.
# - Isensee et al.: *nnU-Net Revisited* (MICCAI 2024): what becomes of newer architectures when the baseline is tuned.
# - Tang et al.: *U-Bench* (2025): a hundred variants, twenty-eight data sets, and a score that counts the cost.
# - Luo et al.: *Understanding the Effective Receptive Field* (NeurIPS 2016).
# - Gu and Dao: *Mamba* (COLM 2024), and the survey of its use on medical images by Bansal et al. (2024).
