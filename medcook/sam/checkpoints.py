"""Weights: those of the small SAM, which ship with the book, and the public ones, by name or file.

`load_sam` takes a name from `PUBLIC` (or any name on the Hugging Face hub), a folder that `save_pretrained` wrote,
or an original `.pth` file of Segment Anything or MedSAM. Tensors are read by safetensors or with `weights_only=True`: a
checkpoint cannot run code.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel, Sam2Model, SamConfig, SamModel, SamVisionConfig

from medcook.errors import MedcookError
from medcook.sam.model import SmallSam

SMALL = Path(__file__).parent / "weights" / "small_sam.safetensors"
PUBLIC = {
    "sam-base": "facebook/sam-vit-base",
    "sam-large": "facebook/sam-vit-large",
    "sam-huge": "facebook/sam-vit-huge",
    "medsam": "wanglab/medsam-vit-base",
    "sam2-tiny": "facebook/sam2.1-hiera-tiny",
    "sam2-base": "facebook/sam2.1-hiera-base-plus",
}
"""Short names of public checkpoints, and where they lie."""
ARCHITECTURES = {"sam": SamModel, "sam2": Sam2Model, "sam2_video": Sam2Model}
"""`model_type` of a configuration, and the class that loads it."""
VISION = {768: (12, 12, (2, 5, 8, 11)), 1024: (24, 16, (5, 11, 17, 23)), 1280: (32, 16, (7, 15, 23, 31))}
"""Width of SAM's published encoders: depth, heads and layers with global attention."""

RENAMED = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
     "prompt_encoder.shared_embedding.positional_embedding"),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.layers\.2\.", r"\1.proj_out."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.layers\.1\.", r"\1.layers.0."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)  # fmt: skip
"""Original names of Segment Anything's weights, as patterns, and what transformers calls them; all that match apply."""


def save_small(model: SmallSam, path: Path) -> None:
    """Write the small SAM's weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("sam.prompt_encoder.shared_embedding.positional_embedding", None)  # the same tensor as the image's
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.replace(path)


def load_small(path: Path = SMALL) -> SmallSam:
    """The small SAM with its weights, in evaluation mode."""
    state = _tensors(Path(path))
    model = SmallSam()
    state["sam.prompt_encoder.shared_embedding.positional_embedding"] = state.get(
        "sam.shared_image_embedding.positional_embedding"
    )
    _fill(model, state, path)
    return model.float().eval()


def load_sam(name: str | Path) -> PreTrainedModel:
    """A public SAM by short name, hub name, folder or original file, in evaluation mode; see the module's docstring."""
    name = PUBLIC.get(str(name), name)
    path = Path(name)
    if path.is_file():
        return load_original(path)
    if not path.is_dir() and (path.suffix in (".pth", ".pt", ".safetensors") or path.is_absolute()):
        raise MedcookError(f"{name}: there is no such checkpoint.", f"Known by name: {', '.join(PUBLIC)}.")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise MedcookError(f"{name} is a {config.model_type!r} model, no SAM.", f"It should be one of: {known}.")
        return ARCHITECTURES[config.model_type].from_pretrained(name).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{name}: the checkpoint cannot be read ({reason}).", _way_out(path)) from error


def _way_out(path: Path) -> str:
    if path.is_dir():
        return "Delete the folder and download it again."
    return "Connect to the network, or download it elsewhere and give its folder or file; the small SAM needs neither."


def load_original(path: Path) -> SamModel:
    """An original `.pth` of Segment Anything or MedSAM (their names and layout) as transformers' SamModel."""
    state = _tensors(path)
    state = state.get("model", state)
    if "image_encoder.patch_embed.proj.weight" not in state:
        raise MedcookError(
            f"{path} holds no weights of Segment Anything.", "Give an original SAM or MedSAM checkpoint."
        )
    model = SamModel(original_config(state, path))
    state = {renamed(name): tensor for name, tensor in state.items()}
    code = state["prompt_encoder.shared_embedding.positional_embedding"]
    _fill(model, state | {"shared_image_embedding.positional_embedding": code}, path)
    return model.eval()


def renamed(name: str) -> str:
    """What transformers calls an original weight."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def original_config(state: dict[str, torch.Tensor], path: Path) -> SamConfig:
    """The configuration that fits an original checkpoint, read off its shapes."""
    width = state["image_encoder.patch_embed.proj.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("image_encoder.blocks."))
    side = state["image_encoder.pos_embed"].shape[1]
    heads, spread = VISION[width][1:] if width in VISION else (max(1, width // 64), tuple(range(depth)))
    if width in VISION and depth != VISION[width][0]:
        raise MedcookError(
            f"{path}: an encoder of width {width} and depth {depth} is none of SAM's.", "Check the file."
        )
    vision = SamVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        global_attn_indexes=list(spread),
        image_size=16 * side,
    )
    prompt = {"image_size": 16 * side, "patch_size": 16}
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a `.safetensors` or PyTorch file; MedcookError naming a missing, foreign or truncated one."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MedcookError(f"{path}: there is no such checkpoint.", "Give an existing file.") from error
    except Exception as error:  # torch.load raises a dozen kinds for a damaged or unsafe file
        reason = " ".join(str(error).split())[:120]
        raise MedcookError(f"{path}: not a readable checkpoint ({reason}).", "Download it again.") from error
    if not isinstance(found, dict):
        raise MedcookError(f"{path}: holds a {type(found).__name__}, no weights by name.", "Give a state dictionary.")
    return found


def _fill(model: torch.nn.Module, state: dict, path: Path) -> None:
    """Load weights that must fit exactly; MedcookError naming the first that does not."""
    wanted = model.state_dict()
    for name in [*(wanted.keys() - state.keys()), *(state.keys() - wanted.keys())]:
        raise MedcookError(f"{path}: of another architecture ({name}).", f"It should hold a {type(model).__name__}.")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            shapes = f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise MedcookError(
                f"{path}: of another architecture ({shapes}).", "Use the checkpoint made for this model."
            )
    model.load_state_dict(state)
