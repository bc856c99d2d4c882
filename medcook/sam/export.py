"""`python -m medcook.sam.export FOLDER`: a finished pre-training becomes the weights that ship with the book."""

import argparse
from pathlib import Path

import torch

from medcook.errors import MedcookError
from medcook.sam.checkpoints import SMALL, save_small
from medcook.sam.model import SmallSam


def export(folder: Path, path: Path = SMALL) -> None:
    """Write the moving average in folder/state.pt as float16 safetensors; MedcookError where it is not finished."""
    source = folder / "state.pt"
    if not source.exists():
        raise MedcookError(f"{source}: there is no pre-training.", "Start one: python -m medcook.sam.pretraining.")
    state = torch.load(source, map_location="cpu", weights_only=True)
    if state["step"] < state["plan"]["steps"]:
        done = f"step {state['step']} of {state['plan']['steps']}"
        raise MedcookError(f"{source} is at {done}.", "Give the pre-training the same command again: it goes on.")
    model = SmallSam()
    model.load_state_dict(state["average"])
    save_small(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    export(parser.parse_args().folder)


if __name__ == "__main__":
    main()
