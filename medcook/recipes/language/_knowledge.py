"""What is known of structures, in plain sentences, and how a text encoder learns it before it sees any image.

Facts stand in for an encyclopaedia of anatomy: of each structure what else it is called, what it is, and how it lies to
others. Nothing in them comes from the data sets.
"""

import torch
from torch import Tensor
from torch.optim import Adam

from medcook.language import TextEncoder
from medcook.recipes.language._reading import pairs

SAID = {
    "right ventricle of the heart": (
        "right heart chamber below the right atrium",
        "chamber that pumps blood without oxygen to the lungs, with a thin wall and the form of a crescent",
    ),
    "myocardium of the left ventricle": (
        "heart muscle",
        "thick ring of muscle that contracts and drives blood into the aorta",
    ),
    "left ventricle of the heart": (
        "left heart chamber below the left atrium",
        "round chamber from which blood with oxygen is pumped into the aorta",
    ),
    "anterior hippocampus": (
        "head of the hippocampus",
        "front part of the hippocampus in the temporal lobe, beside the amygdala, wide and bent",
    ),
    "posterior hippocampus": (
        "body and tail of the hippocampus",
        "back part of the hippocampus in the temporal lobe, narrow, ending near the splenium",
    ),
    "brainstem": (
        "midbrain, pons and medulla",
        "stalk of the brain between the cerebrum and the spinal cord, in front of the cerebellum",
    ),
    "spinal cord": ("medulla spinalis", "long thin bundle of nerves inside the canal of the vertebrae"),
    "right parotid gland": (
        "right salivary gland of the cheek",
        "gland that makes saliva, before and below the right ear",
    ),
    "left parotid gland": (
        "left salivary gland of the cheek",
        "gland that makes saliva, before and below the left ear",
    ),
    "esophagus": ("gullet", "soft tube of muscle through which food goes down to the stomach, often collapsed"),
    "larynx": ("voice box", "organ of cartilage with the vocal cords at the top of the airway"),
    "mandible": ("lower jaw bone", "bone of the form of a horseshoe that carries the lower teeth, very bright in CT"),
    "lungs": (
        "both lungs",
        "two large organs full of air beside the heart, dark in an X-ray",
    ),
    "cell": ("single biological cell", "smallest living unit, with a nucleus and a membrane, seen under a microscope"),
    "grey matter": ("cortex and deep nuclei", "tissue of the bodies of nerve cells, a folded ribbon around the brain"),
    "white matter": ("fibre tracts", "tissue of nerve fibres with fat around them, inside of the cortex"),
    "ventricles": ("spaces of cerebrospinal fluid", "hollows in the middle of the brain that are full of clear fluid"),
}
"""Of each structure another name and a definition."""

LIES = (
    ("right ventricle of the heart", "is separated by the septum from the", "left ventricle of the heart"),
    ("myocardium of the left ventricle", "surrounds the", "left ventricle of the heart"),
    ("left ventricle of the heart", "is surrounded by the", "myocardium of the left ventricle"),
    ("myocardium of the left ventricle", "touches with its septum the", "right ventricle of the heart"),
    ("anterior hippocampus", "goes over at its back into the", "posterior hippocampus"),
    ("posterior hippocampus", "goes over at its front into the", "anterior hippocampus"),
    ("brainstem", "goes over at its lower end into the", "spinal cord"),
    ("spinal cord", "goes over at its upper end into the", "brainstem"),
    ("right parotid gland", "is the mirror image of the", "left parotid gland"),
    ("left parotid gland", "is the mirror image of the", "right parotid gland"),
    ("right parotid gland", "lies behind the right branch of the", "mandible"),
    ("left parotid gland", "lies behind the left branch of the", "mandible"),
    ("esophagus", "begins below and behind the", "larynx"),
    ("larynx", "lies in front of the upper end of the", "esophagus"),
    ("esophagus", "runs in front of the spine, in which is the", "spinal cord"),
    ("mandible", "lies in front of both the", "right parotid gland"),
    ("lungs", "lie on both sides of the", "left ventricle of the heart"),
    ("grey matter", "covers the", "white matter"),
    ("white matter", "is covered by the", "grey matter"),
    ("ventricles", "are surrounded by the", "white matter"),
)
"""(structure, how it lies, to which other)."""


def facts() -> list[tuple[str, str, str]]:
    """(one text, another that means the same, the structure that both mean).

    A name goes with what else it is called and with its definition; a structure and how it lies, with the other's name.
    """
    told = [(name, sentence, name) for name, sentences in SAID.items() for sentence in sentences]
    return told + [(f"{one} {how}", other, other) for one, how, other in LIES]


def knowledge_loss(text: TextEncoder, known: list[tuple[str, str, str]]) -> Tensor:
    """Texts of one structure are drawn together and away from all others', in both directions."""
    left, right, owners = zip(*known, strict=True)
    return pairs(text(left), text(right), owners)


def teach(text: TextEncoder, steps: int, rate: float = 3e-3) -> float:
    """Let a text encoder learn all facts, without any image; returns the last loss."""
    optimiser, known = Adam(text.parameters(), rate), facts()
    device = next(text.parameters()).device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        for _ in range(steps):
            loss = knowledge_loss(text, known)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    optimiser.zero_grad()
    return float(loss.detach()) if steps else float("nan")
