"""Only a finished pre-training becomes weights, and these are its moving average."""

import pytest
import torch

from medcook.errors import MedcookError
from medcook.sam.checkpoints import load_small
from medcook.sam.export import export
from medcook.sam.model import SmallSam


def test_a_finished_pretraining_is_exported(tmp_path):
    torch.manual_seed(0)
    model = SmallSam()
    state = {"average": model.state_dict(), "step": 5, "plan": {"steps": 6}}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(MedcookError, match="step 5 of 6"):
        export(tmp_path, tmp_path / "small.safetensors")
    torch.save(state | {"step": 6}, tmp_path / "state.pt")
    export(tmp_path, tmp_path / "small.safetensors")
    kept, found = model.state_dict(), load_small(tmp_path / "small.safetensors").state_dict()
    assert all(torch.allclose(found[name], tensor, atol=2e-3) for name, tensor in kept.items())


def test_nothing_to_export_is_said(tmp_path):
    with pytest.raises(MedcookError, match="no pre-training"):
        export(tmp_path)
