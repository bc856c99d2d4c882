"""Medal S's architecture and checkpoints, see medcook/networks/medal_s.py; the recipe is tested elsewhere."""

from pathlib import Path

import pytest
import torch
from medal_s_weights import HEADS, WIDTH, Reference, published, published_text

from medcook.errors import MedcookError
from medcook.networks.medal_s import MedalS, TextEncoder, load_medal_s, load_text_encoder, places_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("medal")
    torch.save({"model_state_dict": published(), "step": 3}, found / "nano.pth")
    torch.save({"model_state_dict": published_text()}, found / "text.pth")
    return found


@pytest.mark.parametrize("told", [False, True])
def test_masks_are_those_of_an_implementation_of_its_own(folder, told):
    rng = torch.Generator().manual_seed(2)
    volumes, queries = torch.randn(2, 1, 8, 8, 8, generator=rng), torch.randn(2, 3, WIDTH, generator=rng)
    coarse = torch.rand(2, 3, 8, 8, 8, generator=rng) if told else None
    with torch.no_grad():
        found = load_medal_s(folder / "nano.pth", HEADS)(volumes, queries, coarse)
    reference = Reference(published())
    each = [(volumes[k], queries[k], coarse[k] if told else None) for k in range(2)]
    expected = torch.stack([reference.masks(*one) for one in each])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_names_are_read_as_by_an_implementation_of_its_own(folder):
    tokens, reference = [[0, 5, 6, 2], [0, 7, 8, 9, 5, 2]], Reference(published_text())
    padded = torch.tensor([row + [1] * (6 - len(row)) for row in tokens])
    with torch.no_grad():
        found = load_text_encoder(folder / "text.pth", HEADS)(padded, (padded != 1).long(), torch.tensor([0, 3]))
    expected = torch.stack([reference.query(row, modality) for row, modality in zip(tokens, (0, 3), strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_all_masks_at_once_are_those_of_each_alone(folder):
    model, rng = load_medal_s(folder / "nano.pth", HEADS), torch.Generator().manual_seed(2)
    volume, queries = torch.randn(1, 1, 8, 12, 16, generator=rng), torch.randn(1, 3, WIDTH, generator=rng)
    with torch.no_grad():
        together = model(volume, queries)
        alone = torch.cat([model(volume, queries[:, [k]]) for k in range(3)], dim=1)
    assert together.shape == (1, 3, 8, 12, 16)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_the_published_sizes():
    with torch.device("meta"):
        model, text = MedalS(), TextEncoder(vocab_size=30527, max_position_embeddings=514)
    count = lambda part: sum(weight.numel() for weight in part.parameters())  # noqa: E731
    assert model.projection_layer[0].weight.shape == (768, 1792)
    assert round(count(model) / 1e6) == 109, "SAT-Nano, which has the same parts, has 110 million"
    assert count(text.text_tower.biolord) == 109_486_464 - 590_592, "all-mpnet-base-v2 without its pooler"


def test_every_place_has_its_own_code():
    found = places_of((3, 2, 4), 768)
    assert found.shape == (24, 768) and len(found.unique(dim=0)) == 24
    assert torch.allclose(found.square().sum(1), torch.full((24,), 384.0), rtol=1e-4)


def test_every_weight_finds_its_place(folder):
    for load, state in ((load_medal_s, published()), (load_text_encoder, published_text())):
        name = "nano" if load is load_medal_s else "text"
        mine = load(folder / f"{name}.pth", HEADS).state_dict()
        unused = ("all_modules", "mid_mask_embed", "atlas_tower")
        theirs = {key.removeprefix("module."): t for key, t in state.items() if not any(word in key for word in unused)}
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("lost", ["fusion_conv.convs.0.norm.bias", "transformer_decoder.layers.1.linear2.weight"])
def test_a_missing_weight_is_named(tmp_path, lost):
    state = published()
    del state[f"module.{lost}"]
    torch.save({"model_state_dict": state}, tmp_path / "short.pth")
    with pytest.raises(MedcookError, match=lost.replace(".", r"\.")):
        load_medal_s(tmp_path / "short.pth", HEADS)


def test_files_that_are_none_are_refused(tmp_path, folder):
    with pytest.raises(MedcookError, match="there is no Medal S checkpoint") as error:
        load_medal_s(tmp_path / "nothing.pth")
    assert "github.com/yinghemedical/Medal-S" in str(error.value)
    (tmp_path / "broken.pth").write_bytes((folder / "nano.pth").read_bytes()[:600])
    torch.save({"model_state_dict": {"module.a": torch.zeros(2)}}, tmp_path / "other.pth")
    for name in ("broken", "other"):
        with pytest.raises(MedcookError, match=rf"{name}\.pth: the checkpoint cannot be read"):
            load_medal_s(tmp_path / f"{name}.pth")
