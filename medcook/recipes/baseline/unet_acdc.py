"""The book's baseline on the heart: a U-Net on slices, five-fold cross-validation over train and val patients.

What makes it quick: the heart is located without labels (it is what moves between the two frames), so the
network sees a 128 x 128 window instead of the whole image; whole batches are augmented at once; channels-last
memory, and bfloat16 where it is faster.
"""

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

recipe = Recipe(
    paper="unet-acdc",
    title="U-Net baseline, cine MR of the heart (ACDC)",
    claim="A plain U-Net reaches a mean Dice of 0.88 in 800 steps, minutes of training on two cores.",
    arms={"unet": Arm(Supervised())},
    replicate="fold",
    scales={
        "quick": Scale(Task("embedded"), Budget(steps=60, batch=8, checks=3), replicates=1),
        "full": Scale(Task("acdc"), Budget(steps=800), replicates=5),
    },
    published={
        "nnU-Net, five-fold over 100 patients, 1000 epochs on a GPU": 0.9154,
        "nnU-Net v1, 160 frames train and 40 test": 0.9226,
    },
    source="MIC-DKFZ/nnUNet, documentation/resenc_presets.md; uni-medical/SegBook, STU_Benchmark_Information.csv",
)
