"""UNet++: which node sees which, what every head is trained on, and what pruning leaves out."""

import pytest
import torch
from torch import nn

from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.architectures.unetpp import NestedUNet, Node, UNetPP, name

CHANNELS = (4, 4, 6, 6, 8)


@pytest.fixture
def network() -> NestedUNet:
    return NestedUNet(inputs=1, classes=3, channels=CHANNELS).eval()


class AsInMonai(nn.Module):
    """One of our nodes with the signature of MONAI's: (below, earlier nodes in one tensor)."""

    def __init__(self, node: nn.Module):
        super().__init__()
        self.node = node

    def forward(self, below, earlier):
        return self.node([earlier], below)


@pytest.mark.component("dense skips")
@pytest.mark.component("nested U-Nets")
def test_nodes_are_connected_as_in_monai(network):
    """MONAI's UNet++ with our blocks in the places of its own."""
    from monai.networks.nets import BasicUNetPlusPlus

    reference = BasicUNetPlusPlus(2, 1, 3, features=(*CHANNELS, 4), deep_supervision=True)
    for row in range(5):
        pool = nn.MaxPool2d(2) if row else nn.Identity()
        setattr(reference, f"conv_{row}_0", nn.Sequential(pool, network.node[name(row, 0)]))
        for column in range(1, 5 - row):
            setattr(reference, f"upcat_{row}_{column}", AsInMonai(network.node[name(row, column)]))
    for depth in range(1, 5):
        setattr(reference, f"final_conv_0_{depth}", network.head[str(depth)])
    image = torch.randn(2, 1, 32, 48)
    for found, wanted in zip(network.outputs(image), reversed(reference(image)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.component("dense skips")
@pytest.mark.parametrize("dense", [True, False])
def test_the_encoder_speaks_to_the_last_node_directly(dense):
    """X(0, 4) hears X(0, 0) by itself; without dense skips only through the nodes between."""
    network = NestedUNet(inputs=1, classes=3, channels=CHANNELS, dense=dense).eval()
    given = []
    network.node[name(0, 0)].register_forward_hook(lambda node, inputs, output: given.append(output))
    network.node[name(0, 4)].register_forward_hook(lambda node, inputs, output: given.extend(inputs[0]))
    network(torch.randn(1, 1, 32, 32))
    assert any(earlier is given[0] for earlier in given[1:]) is dense
    assert len(given[1:]) == (4 if dense else 1)


@pytest.mark.component("nested U-Nets")
def test_a_node_mixes_earlier_nodes_and_what_is_below():
    """A kernel that passes on its middle pixel: a weighted sum of the earlier node and of that below, upsampled."""
    node = Node(1, 1, 1).eval()
    weights = {"project.weight": -2.0, "project.bias": 0.0, "mix.1.weight": 1.0, "mix.1.bias": 0.0}
    with torch.no_grad():
        for key, value in weights.items():
            node.get_parameter(key).fill_(value)
        node.mix[0].weight.zero_()[0, :, 1, 1] = torch.tensor([3.0, -5.0])
    earlier, below = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 4, 4)
    wanted = 3 * earlier + 5 * 2 * nn.Upsample(scale_factor=2, mode="bilinear")(below)
    assert torch.allclose(node([earlier], below), wanted, rtol=1e-4)


@pytest.mark.component("nested U-Nets")
def test_every_depth_is_a_u_net_of_its_own(network):
    """The deeper, the further it sees. Positive weights, so that nothing is rectified away."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_().add_(0.1)
    image = torch.ones(1, 1, 32, 256)
    other = image.clone()
    other[..., 128] = 2
    seen = [(b - a).amax((0, 1, 2)) > 1e-3 for a, b in zip(network.outputs(image), network.outputs(other), strict=True)]
    reach = [int(s.sum()) for s in seen]
    assert reach == sorted(reach, reverse=True) and len(set(reach)) == 4 and reach[3] < 24


@pytest.mark.component("deep supervision")
def test_the_loss_is_the_mean_of_all_heads():
    method = UNetPP(channels=CHANNELS)
    nets = method.build(1, 3, 2)
    images, labels = torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte()
    loss = method.training_step(nets, Batch(images, labels), None, Moment(0, 1))
    losses = [cross_entropy_and_dice(logits, labels) for logits in nets["model"].outputs(images)]
    assert len(losses) == 4 and torch.allclose(loss, sum(losses) / 4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].head.parameters())


@pytest.mark.component("deep supervision")
def test_the_mean_probabilities_predict():
    method = UNetPP(channels=CHANNELS)
    nets = method.build(1, 3, 2).eval()
    images = torch.randn(2, 1, 32, 32)
    wanted = sum(logits.softmax(1) for logits in nets["average"].outputs(images)) / 4
    assert torch.allclose(method.predict(nets, images), wanted, atol=1e-6)


@pytest.mark.component("pruning")
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_pruned_it_says_what_that_head_said_and_skips_deeper_nodes(network, depth):
    image, used = torch.randn(1, 1, 32, 32), set()
    wanted = network.outputs(image)[4 - depth]
    for key, node in network.node.items():
        node.register_forward_hook(lambda *_, key=key: used.add(key))
    assert torch.equal(network.pruned(image, depth), wanted)
    assert used == {name(row, column) for row in range(5) for column in range(5 - row) if row + column <= depth}


@pytest.mark.component("pruning")
def test_pruning_changes_the_prediction_alone():
    whole, cut = UNetPP(channels=CHANNELS), UNetPP(channels=CHANNELS, prune=2)
    nets = whole.build(1, 3, 2).eval()
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    losses = [method.training_step(nets, batch, None, Moment(0, 1)) for method in (whole, cut)]
    assert torch.equal(*losses)
    wanted = nets["average"].pruned(batch.images, 2).softmax(1)
    assert torch.allclose(cut.predict(nets, batch.images), wanted)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = NestedUNet(inputs=1, classes=3, channels=CHANNELS)
    assert all(logits.shape == (2, 3, *size) for logits in network.outputs(torch.randn(2, 1, *size)))


def test_the_ablation_lacks_the_dense_skips_alone():
    """The same nodes and heads; those with more than one earlier node get fewer channels, and nothing else differs."""
    models = [UNetPP(dense=dense, channels=CHANNELS).model(1, 3) for dense in (True, False)]
    full, bare = (dict(model.named_parameters()) for model in models)
    assert full.keys() == bare.keys()
    narrower = {key for key in full if full[key].shape != bare[key].shape}
    assert narrower == {f"node.{name(row, column)}.mix.0.weight" for row in range(3) for column in range(2, 5 - row)}


def test_without_deep_supervision_there_is_one_head():
    network = UNetPP(deep=False, channels=CHANNELS).model(1, 3)
    outputs = network.outputs(torch.randn(2, 1, 32, 32))
    outputs[0].sum().backward()
    assert len(outputs) == 1 and all(p.grad is not None for p in network.parameters())
