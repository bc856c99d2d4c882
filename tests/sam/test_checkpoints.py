"""Checkpoints: the small SAM's own, and public ones in each of their formats, all offline with small random weights."""

from pathlib import Path

import pytest
import torch
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel, SamVisionConfig, ViTConfig

from medcook.errors import MedcookError
from medcook.sam.checkpoints import load_sam, load_small, renamed, save_small
from medcook.sam.model import SIZE, SmallSam

NAMES = Path(__file__).with_name("original_names.txt")
"""Names and shapes of an original checkpoint of Segment Anything: one block of width 128, an image of 64 pixels."""


def original() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    lines = [line.split() for line in NAMES.read_text().splitlines()]
    return {name: torch.randn([int(n) for n in shape], generator=rng) * 0.05 for name, *shape in lines}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return SmallSam().eval()


@torch.no_grad()
def test_the_small_sam_comes_back_as_it_was_saved_in_half_precision(small, tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(small, path)
    assert path.stat().st_size < 20e6
    again = load_small(path)
    image = torch.randn(1, 1, SIZE, SIZE)
    for one, other in zip(small.embed(image), again.embed(image), strict=True):
        assert torch.allclose(one, other, atol=0.02 * float(one.abs().max()))
    assert not again.training


@torch.no_grad()
def test_an_original_file_is_read_with_its_names(tmp_path):
    state = original()
    torch.save(state, tmp_path / "sam.pth")
    model = load_sam(tmp_path / "sam.pth")
    assert isinstance(model, SamModel)
    theirs, ours = dict(model.named_parameters()), dict(model.named_buffers())
    assert torch.equal(
        theirs["vision_encoder.layers.0.attn.qkv.weight"], state["image_encoder.blocks.0.attn.qkv.weight"]
    )
    moved = state["mask_decoder.output_hypernetworks_mlps.2.layers.1.weight"]
    assert torch.equal(theirs["mask_decoder.output_hypernetworks_mlps.2.layers.0.weight"], moved)
    code = state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert torch.equal((theirs | ours)["shared_image_embedding.positional_embedding"], code)
    found = model(torch.randn(1, 3, 64, 64), input_points=torch.tensor([[[[20.0, 30.0]]]]))
    assert found.pred_masks.shape == (1, 1, 3, 16, 16) and torch.isfinite(found.pred_masks).all()


def test_every_original_name_has_one_new_name():
    names = [renamed(name) for name in original()]
    assert len(set(names)) == len(names) and not any("image_encoder" in name for name in names)


def test_a_folder_of_transformers_is_read(tmp_path):
    vision = SamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64)
    prompt = {"image_size": 64, "patch_size": 16}
    saved = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt))
    saved.save_pretrained(tmp_path / "sam")
    again = load_sam(tmp_path / "sam")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def sam2_config() -> Sam2Config:
    backbone = dict(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 2, 4, 2],
        global_attention_blocks=[2],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = dict(
        backbone_config=backbone | {"model_type": "sam2_hiera_det_model"},
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    return Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": 64, "patch_size": 16})


def test_a_folder_of_sam2_is_read(tmp_path):
    saved = Sam2Model(sam2_config())
    saved.save_pretrained(tmp_path / "sam2")
    again = load_sam(tmp_path / "sam2")
    assert isinstance(again, Sam2Model)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_what_is_no_sam_is_said(tmp_path):
    ViTConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(MedcookError, match="is a 'vit' model, no SAM"):
        load_sam(tmp_path / "vit")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(MedcookError, match=r"other.pth holds no weights of Segment Anything"):
        load_sam(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(MedcookError, match="holds a list"):
        load_sam(tmp_path / "list.pth")


def test_another_architecture_is_said(small, tmp_path):
    state = original()
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(MedcookError, match=r"sam.pth: of another architecture \(mask_decoder.iou_token.weight"):
        load_sam(tmp_path / "sam.pth")
    from medcook.sam.model import small_config

    save_small(SmallSam(small_config(width=96, heads=3)), tmp_path / "narrow.safetensors")
    with pytest.raises(MedcookError, match="of another architecture"):
        load_small(tmp_path / "narrow.safetensors")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_missing_and_truncated_files_are_said(small, tmp_path, ending):
    path = tmp_path / f"sam{ending}"
    with pytest.raises(MedcookError, match="there is no such checkpoint"):
        load_sam(path)
    whole = tmp_path / f"whole{ending}"
    torch.save(original(), whole) if ending == ".pth" else save_small(small, whole)
    path.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(MedcookError, match="not a readable checkpoint"):
        load_sam(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(MedcookError, match="not a readable checkpoint"):
        load_sam(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_without_network_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MedcookError, match="the small SAM needs neither"):
        load_sam("sam-base")
