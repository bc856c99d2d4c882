"""The book's baseline in three dimensions: a 3D U-Net on the hippocampus (Decathlon Task04), five-fold."""

from medcook.data.transforms import Augment
from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Task

MILD = Augment(rotate=12, scale=0.12, shift=0.06, gamma=0.3, contrast=0.2, brightness=0.2, noise=0.1)
"""The volumes are already cropped around the hippocampus and share one orientation: milder than for hearts."""

recipe = Recipe(
    paper="unet-hippocampus",
    title="U-Net baseline in 3D, hippocampus (MSD Task04)",
    claim="A plain 3D U-Net reaches a mean Dice of 0.87 in 300 steps, minutes of training on two cores.",
    arms={"unet": Arm(Supervised(channels=(16, 32, 64, 128), augmentation=MILD))},
    replicate="fold",
    scales={
        "quick": Scale(Task("embedded"), Budget(steps=60, batch=8, checks=3), replicates=1),
        "full": Scale(Task("hippocampus"), Budget(steps=300, batch=4), replicates=5),
    },
    published={"nnU-Net v1, 208 train and 52 test": 0.8923},
    source="uni-medical/SegBook, STU_Benchmark_Information.csv",
)
