"""MCP-MedSAM (Lyu et al., 2024): tell the model which modality it sees, and show it what the box holds.

Beside the tokens of the box the mask decoder reads two more: one learnt for each modality, m_k, and one that a small
network computes from the image inside the box, c = f(crop(x, box)):
    mask = decoder(encoder(x), [box, m_k, c]).
Training images are drawn so that every modality comes as often, however many images it has.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.methods import Batch, Moment
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._concepts import tight_boxes
from medcook.recipes.sam_adaptation._modalities import EMBEDDED, ModalitiesTask, targets_here
from medcook.recipes.sam_adaptation._prompting import mean_rows, scales
from medcook.sam.adapting import PromptedSam, asked_for, fitted_in, with_boxes
from medcook.sam.asking import loose_boxes
from medcook.sam.model import DENSE, FINE, SIZE, Embedding, SmallSam, masks_of
from medcook.sam.predictor import restore
from medcook.sam.pretraining import mask_loss
from medcook.sam.zero_shot import Target, dice

CROP = 32
"""Side of the crop that the content prompt is computed from."""


class ContentPrompt(nn.Module):
    """The image inside a box, (M, 1, CROP, CROP), to a token (M, hidden)."""

    def __init__(self, hidden: int):
        super().__init__()
        sides = (1, 16, 32, 64)
        steps = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.GELU())
            for i, o in zip(sides, sides[1:], strict=False)
        ]
        self.layers = nn.Sequential(*steps, nn.Flatten(), nn.Linear(64 * (CROP // 8) ** 2, hidden))

    def forward(self, crops: Tensor) -> Tensor:
        return self.layers(crops)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """(M, 1, CROP, CROP): what boxes (M, 4) hold of images (M, 1, SIZE, SIZE), each to zero mean and unit variance."""
    left, top, right, bottom = (boxes / SIZE * 2 - 1).unbind(1)
    zero = torch.zeros_like(left)
    across, down = (right - left) / 2, (bottom - top) / 2
    rows = [torch.stack([across, zero, (left + right) / 2], 1), torch.stack([zero, down, (top + bottom) / 2], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(boxes), 1, CROP, CROP], align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return (crops - crops.mean((2, 3), keepdim=True)) / crops.std((2, 3), keepdim=True).clamp_min(1e-3)


@dataclass
class McpMedSam(PromptedSam):
    """Answers boxes, with a token for the modality and one for the box's content.

    modality, content  whether these tokens are there
    modalities         how many modalities there are
    """

    tuned: tuple[str, ...] = ("encoder", "prompts", "decoder")
    prompts: str = "box"
    modality: bool = True
    content: bool = True
    modalities: int = 3

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = super().build(inputs, classes, dims)["model"]
        hidden = model.sam.config.mask_decoder_config.hidden_size
        if self.modality:
            model.modality_prompt = nn.Embedding(self.modalities, hidden)
        if self.content:
            model.content_prompt = ContentPrompt(hidden)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model = nets["model"]
        masks, owner = asked_for(labelled.labels, self.objects)
        if not len(masks):
            return 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        groups = torch.zeros(len(labelled.images), dtype=torch.long) if labelled.groups is None else labelled.groups
        images, boxes = fitted_in(labelled.images), loose_boxes(masks, torch.default_generator)
        low, fine = self.answer(model, model.embed(images).at(owner), images[owner], boxes, groups[owner])
        truth = [F.adaptive_avg_pool2d(masks[:, None].float(), side)[:, 0] for side in (DENSE, FINE)]
        return sum(mask_loss(logits.float(), true).mean() for logits, true in zip((low, fine), truth, strict=True))

    def answer(
        self, model: SmallSam, embedding: Embedding, images: Tensor, boxes: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, DENSE, DENSE) and (M, FINE, FINE) for boxes (M, 4) in input pixels; `groups` are modalities."""
        embedding, sparse = model.prompted(embedding, with_boxes(boxes))
        sparse = torch.cat([sparse, *self.further(model, images, boxes, groups)], dim=2)
        decoder = model.sam.mask_decoder
        first = (decoder.mask_tokens.weight[:1], decoder.output_hypernetworks_mlps[:1])
        low, _ = masks_of(model.sam, embedding, sparse, *first)
        return low[:, 0], model.refine(low, embedding)[:, 0]

    def further(self, model: SmallSam, images: Tensor, boxes: Tensor, groups: Tensor) -> list[Tensor]:
        """The tokens (M, 1, 1, hidden) of modality and content, where this method has them."""
        tokens = [model.modality_prompt(groups)] if self.modality else []
        tokens += [model.content_prompt(cropped(images, boxes)).float()] if self.content else []
        return [token[:, None, None] for token in tokens]

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, *size) where nobody prompts: the answer to a box around everything, taken as class 1."""
        whole = torch.tensor([0.0, 0.0, SIZE, SIZE]).expand(len(images), 4)
        groups = torch.zeros(len(images), dtype=torch.long)
        found = self.masks(nets["average"], images, whole, groups).sigmoid()[:, None]
        others = found.new_zeros(len(images), nets["model"].classes - 2, *images.shape[2:])
        return torch.cat([1 - found, found, others], dim=1)

    def masks(self, model: SmallSam, images: Tensor, boxes: Tensor, groups: Tensor) -> Tensor:
        """Logits (M, *size) of images (M, 1, *size), a box (in input pixels) and a modality for each."""
        large = fitted_in(images)
        _, fine = self.answer(model, model.embed(large), large, boxes, groups)
        return restore(fine[:, None], tuple(images.shape[2:]))[:, 0]


@torch.no_grad()
def boxed_rows(fitted, case: Case) -> list[dict]:
    """Mean Dice from the tight box of each structure of a case; the column `group` is its modality's set."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    model, modality = fitted.nets["average"].eval(), torch.tensor([case.attributes["modality"]])

    def ask(target: Target) -> dict[str, float]:
        image, mask = torch.from_numpy(target.image)[None, None], torch.from_numpy(target.mask)
        answer = fitted.method.masks(model, image, tight_boxes(mask[None]), modality)[0] > 0
        return {"dice": dice(answer.numpy(), target.mask)}

    rows = mean_rows(case, targets_here(fitted.task, case), ask)
    return [{**found, "group": case.attributes["set"]} for found in rows]


FULL = ModalitiesTask(
    "acdc",
    evaluation="test",
    counts=(10, 4, 10),
    parts=(("chest_xray", 20, 10, 20), ("bubil", 8, 5, 10)),
    balanced=True,
)
"""About 190 slices of heart MR, 20 chest X-rays and 8 microscopy images."""

recipe = Recipe(
    paper="mcp-medsam",
    title="MCP-MedSAM: prompts for modality and content",
    claim="On heart MR, chest X-ray and microscopy together, a learnt modality prompt and a content prompt raise the "
    "Dice of answers to boxes against the same model without both.",
    arms={
        "without both prompts": Arm(McpMedSam(modality=False, content=False)),
        "mcp-medsam": Arm(McpMedSam()),
        "without balanced sampling": Arm(McpMedSam(), {"balanced": False}),
        "without modality prompt": Arm(McpMedSam(modality=False)),
        "without content prompt": Arm(McpMedSam(content=False)),
    },
    compare=("mcp-medsam", "without both prompts"),
    ablation=("mcp-medsam", "without balanced sampling"),
    scales=scales(
        "without both prompts",
        "mcp-medsam",
        "without balanced sampling",
        quick=replace(EMBEDDED, balanced=True),
        full=FULL,
        steps=150,
    ),
    score=boxed_rows,
    components=(
        Component(
            "modality prompt",
            "implemented",
            "a learnt token for each modality; the official code adds text features of CLIP and a loss that names it",
        ),
        Component(
            "content prompt",
            "implemented",
            "three convolutions on the 32 x 32 crop of the box; the official code adds image features of CLIP",
        ),
        Component(
            "modality-balanced sampling",
            "implemented",
            "images of the smaller sets repeat until every modality has as many (`ModalitiesTask.balanced`)",
        ),
        Component(
            "lightweight encoder, one day on one GPU",
            "simplified",
            "the book's small SAM, half a minute on a CPU core; all of it learns",
        ),
    ),
)
