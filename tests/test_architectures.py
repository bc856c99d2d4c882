"""What chapter 08 looks at: fields against known kernels, costs against closed forms, figures against tables."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medcook import architectures, statistics, widgets
from medcook.networks import UNet


def ones(*layers: nn.Module) -> nn.Sequential:
    """Convolutions whose weights are all one."""
    network = nn.Sequential(*layers)
    for layer in network:
        nn.init.ones_(layer.weight)
    return network


def test_a_field_is_the_kernel_of_the_convolution():
    network = nn.Sequential(nn.Conv2d(1, 1, 5, padding=2))
    field = architectures.seen_by(network, torch.rand(1, 1, 16, 16), 6, 9)
    kernel = network[0].weight[0, 0].detach().abs()
    assert torch.allclose(field[4:9, 7:12], kernel / kernel.max(), atol=1e-6)
    assert (field > 0).sum() == 25 and field.max() == 1


def test_two_convolutions_see_further_and_most_in_the_middle():
    network = ones(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    field = architectures.seen_by(network, torch.rand(1, 1, 16, 16), 8, 8)
    assert (field > 0).sum() == 25 and field.argmax() == 8 * 16 + 8
    assert field[6, 6] == pytest.approx(1 / 9)


def test_looking_leaves_no_gradient_and_no_weight_changed():
    network = UNet(inputs=1, classes=3, channels=(4, 8))
    before = [parameter.clone() for parameter in network.parameters()]
    architectures.seen_by(network, torch.rand(1, 1, 16, 16), 3, 4)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))


def test_the_reach_holds_its_share():
    field = torch.zeros(21, 21)
    field[10, 10], field[10, 14], field[2, 10] = 6.0, 3.0, 1.0
    assert [architectures.reach(field, 10, 10, share) for share in (0.5, 0.8, 0.95)] == [0.0, 4.0, 8.0]


def test_multiply_adds_of_a_convolution_and_an_attention():
    image = torch.zeros(1, 3, 10, 12)
    assert architectures.multiply_adds(nn.Conv2d(3, 8, 3, padding=1), image) == 10 * 12 * 8 * 3 * 9

    class Attention(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens

    assert architectures.multiply_adds(Attention(), image) == 2 * 120**2 * 3


def test_counting_leaves_the_network_as_it_was_and_takes_parameters_for_inputs():
    class Said(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.cell = nn.Parameter(torch.zeros(4)), nn.LSTMCell(4, 4)

        def forward(self, x):
            state = x.mean((2, 3))
            return self.cell(self.start.expand_as(state), (state, state))[0]

    network = Said().train()
    assert architectures.multiply_adds(network, torch.zeros(1, 4, 8, 8)) == 2 * 4 * 16
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())


def test_costs_are_over_the_first_network():
    networks = {"narrow": nn.Conv2d(1, 2, 3, padding=1), "wide": nn.Conv2d(1, 6, 3, padding=1)}
    table = architectures.cost_table(networks, torch.zeros(1, 1, 8, 8))
    assert table["parameters"].tolist() == [20, 60] and table["multiply-adds"].tolist() == [8 * 8 * 18, 8 * 8 * 54]
    assert table["parameters, times"].tolist() == table["multiply-adds, times"].tolist() == [1, 3]


@pytest.fixture
def compared():
    """Two papers whose methods gain 0.05 and lose 0.03, their evidence, and a network of each."""
    rng, frames, summaries = np.random.default_rng(0), {}, []
    for paper, gain in (("better", 0.05), ("worse", -0.03)):
        rows = [
            {"arm": arm, "replicate": fold, "case_id": f"{fold}-{patient}", "patient_id": f"{fold}-{patient}"}
            | {"structure": "heart", "dice": 0.8 + (gain if arm == paper else 0) + 0.01 * rng.normal()}
            for arm in (paper, "unet")
            for fold in range(3)
            for patient in range(6)
        ]
        frames[paper] = pd.DataFrame(rows)
        summaries.append(SimpleNamespace(paper=paper, comparison=SimpleNamespace(a=paper, b="unet")))
    sizes = {"unet": 2, "better": 6, "worse": 1}
    networks = {name: nn.Conv2d(1, size, 3, padding=1) for name, size in sizes.items()}
    return summaries, frames, networks


def test_gains_are_paired_differences_with_p_after_holm(compared):
    table = architectures.gains_over(*compared)
    frame = compared[1]["better"]
    found = statistics.difference(frame[frame["arm"] == "better"], frame[frame["arm"] == "unet"])
    assert table.loc["better", ["gain", "low", "high", "p"]].tolist() == [found.effect, found.low, found.high, found.p]
    np.testing.assert_allclose(table["holm"], statistics.holm(table["p"].to_numpy()))
    assert table["parameters, times"].tolist() == [3.0, 0.5]


def test_the_readable_table_begins_with_the_largest_gain(compared):
    shown = architectures.readable(architectures.gains_over(*compared))
    assert list(shown.index) == ["better", "worse"]
    assert [text[0] for text in shown["Dice gained [95% interval]"]] == ["+", "-"]


def test_the_figure_has_a_point_for_each_gain_and_cost(compared):
    table = architectures.gains_over(*compared)
    figure = architectures.cost_figure(table, "embedded")
    for axes, cost in zip(figure.axes, ("parameters", "multiply-adds"), strict=True):
        points = [(float(bar[0].get_xdata()[0]), float(bar[0].get_ydata()[0])) for bar in axes.containers]
        assert points == list(zip(table[f"{cost}, times"], table["gain"], strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["better", "worse"]


def test_every_place_of_the_picture_names_its_papers():
    figure = architectures.anatomy({place: [f"paper of {place}"] for place in architectures.PLACES})
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"paper of {place}" in words for place in architectures.PLACES)


def test_the_explorer_draws_anew_when_pixel_image_or_network_change():
    networks = {name: UNet(inputs=1, classes=3, channels=(4, 8)) for name in ("one", "other")}
    box = widgets.seen_explorer(networks, torch.rand(3, 1, 24, 24), "embedded")
    (which, number, row, column), image = box.children[0].children, box.children[1]
    seen = [bytes(image.value)]
    for control, value in ((which, "other"), (number, 2), (row, 3), (column, 20)):
        control.value = value
        seen.append(bytes(image.value))
    assert len(set(seen)) == 5
