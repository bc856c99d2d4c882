"""The same seed, the same bits: gradients of every architecture, in the precision it is trained in.

A convolution that reads memory nobody has written gives another gradient whenever that memory held something else.
"""

import pytest
import torch

from medcook.recipes import all_recipes
from medcook.recipes.architectures._settings import Architecture

METHODS = {
    f"{name}-{arm}": recipe.arms[arm].method
    for name, recipe in all_recipes().items()
    for arm in recipe.arms_at("full")
    if isinstance(recipe.arms[arm].method, Architecture)
    and recipe.scales["full"].task.dataset in ("acdc", "hippocampus")
    and name not in ("u-bench", "medshapenet")  # the latter's networks see partial labels, not images
}
SIZES = {2: ((128, 128), torch.channels_last), 3: ((32, 56, 40), torch.channels_last_3d)}
"""Of hearts and hippocampi as they are prepared, by the number of axes."""


def gradients(network: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # what is dropped or drawn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(image)
    logits.float().square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def spoil_free_memory() -> None:
    """Fill what is free with NaN, so that whoever reads it is found out."""
    for kind in (torch.float32, torch.bfloat16):
        _ = [torch.full((4**power,), torch.nan, dtype=kind) for power in range(4, 12)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_are_the_same_twice(method):
    size, order = SIZES[method.axes]
    network = method.build(1, 4, method.axes)["model"].to(memory_format=order)
    image = torch.randn(2, 1, *size).to(memory_format=order)
    first = gradients(network, image)
    assert all(torch.isfinite(gradient).all() for gradient in first)
    for _ in range(2):
        spoil_free_memory()
        again = gradients(network, image)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
