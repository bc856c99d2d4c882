"""Symbolic segmentation: what is said, what is understood, who learns from it, and what symbols tell apart."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score

from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.architectures.symbolic_seg import (
    GRID,
    HIDDEN,
    Receiver,
    Sender,
    Symbolic,
    discrimination,
    information,
    symbols,
)

SMALL = (4, 6, 8)


def net(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return Symbolic(**({"channels": SMALL, "vocabulary": 5, "length": 3} | settings)).model(1, 3)


def sentence(*numbers: int, vocabulary: int = 5) -> torch.Tensor:
    return F.one_hot(torch.tensor([numbers]), vocabulary).float()


def lstm_step(x, state, memory, weights):
    """One step of an LSTM, written out: gates in the order of torch."""
    into, across, into_bias, across_bias = weights
    enter, keep, new, out = (x @ into.T + into_bias + state @ across.T + across_bias).chunk(4, -1)
    memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
    return out.sigmoid() * memory.tanh(), memory


@pytest.mark.component("Sender")
def test_it_says_symbol_after_symbol_and_hears_itself():
    torch.manual_seed(0)
    sender, features = Sender(6, vocabulary=5, length=4).eval(), 5 * torch.randn(20, 6, 8, 8)
    torch.nn.init.normal_(sender.choose.weight), torch.nn.init.normal_(sender.embedding.weight)
    said, weights = sender(features), list(sender.cell.parameters())
    assert said.shape == (20, 4, 5) and torch.equal(said.sum(-1), torch.ones(20, 4)) and said.amax(-1).eq(1).all()
    assert len(said.argmax(-1).unique(dim=0)) > 3
    state = torch.tanh(sender.see(F.avg_pool2d(features, 8 // GRID).flatten(1)))
    memory, heard = torch.zeros(20, HIDDEN), sender.start
    for place in range(4):
        state, memory = lstm_step(heard, state, memory, weights)
        assert torch.equal(said[:, place].argmax(-1), sender.choose(state).argmax(-1))
        heard = sender.embedding.weight.T[said[:, place].argmax(-1)]


@pytest.mark.component("symbols from a categorical distribution")
def test_symbols_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    drawn = symbols(logits.expand(20_000, 4), 1.0, draw=True)
    assert torch.allclose(drawn.mean(0), logits.softmax(0), atol=0.01)
    assert torch.allclose(drawn.amax(-1), torch.ones(20_000), atol=1e-6)
    best = symbols(logits.expand(3, 4), 1.0, draw=False)
    assert torch.equal(best, F.one_hot(torch.tensor([3, 3, 3]), 4).float())


@pytest.mark.component("symbols from a categorical distribution")
def test_it_draws_while_training_and_not_in_prediction():
    sender, features = Sender(6, vocabulary=5, length=8), torch.randn(4, 6, 4, 4)
    said = {}
    for training in (True, False):
        sender.train(training)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            said.setdefault(training, []).append(sender(features).argmax(-1))
    for one, two, other in said.values():
        assert torch.equal(one, two)
        assert torch.equal(two, other) == (other is said[False][2])


@pytest.mark.component("Receiver")
def test_it_reads_the_sentence_to_its_end():
    torch.manual_seed(0)
    receiver, said = Receiver(2, vocabulary=5), sentence(1, 4, 2)
    state = memory = torch.zeros(1, HIDDEN)
    for symbol in said.unbind(1):
        state, memory = lstm_step(receiver.embedding(symbol), state, memory, list(receiver.lstm.parameters()))
    drawn = receiver.draw(state).reshape(1, 2, GRID, GRID)
    assert torch.allclose(receiver(said, torch.Size((GRID, GRID))), drawn, atol=1e-6)
    wanted = F.interpolate(drawn, size=(7, 9), mode="bilinear", align_corners=False)
    assert torch.allclose(receiver(said, torch.Size((7, 9))), wanted, atol=1e-6)


@pytest.mark.component("Receiver")
def test_what_is_said_takes_part_in_the_mask():
    """The same image with other sentences: each place counts, and so does the order."""
    network = net().eval()
    levels = network.levels(torch.randn(1, 1, 32, 32))
    before = network.masks(levels, sentence(0, 1, 2))
    for other in (sentence(3, 1, 2), sentence(0, 3, 2), sentence(0, 1, 3), sentence(2, 1, 0)):
        assert not torch.allclose(network.masks(levels, other), before, atol=1e-7)


@pytest.mark.component("Receiver")
def test_unheard_it_is_the_unet():
    """With no weight on what the Receiver drew, the masks are those of the book's U-Net, with the same weights."""
    network, book, image = net().eval(), UNet(classes=3, channels=SMALL).eval(), torch.randn(1, 1, 33, 40)
    state = {name: value for name, value in network.state_dict().items() if name in book.state_dict()}
    known = SMALL[-1] + SMALL[-2]
    state["up.1.0.weight"] = state["up.1.0.weight"][:, :known]
    book.load_state_dict(state)
    assert not torch.allclose(network(image), book(image), atol=1e-6)
    with torch.no_grad():
        network.up[-1][0].weight[:, known:] = 0
    assert torch.allclose(network(image), book(image), atol=1e-6)


@pytest.mark.component("cooperation of the agents")
def test_both_agents_learn_from_the_mask():
    """The loss of the mask reaches the Sender through discrete symbols; it learns to tell two images apart."""
    torch.manual_seed(0)
    sender, receiver = Sender(1, vocabulary=4, length=2), Receiver(1, vocabulary=4)
    features = torch.stack([torch.ones(1, 4, 4), -torch.ones(1, 4, 4)]).repeat(8, 1, 1, 1)
    wanted = features.clamp_min(0)
    agents = torch.nn.ModuleList([sender, receiver])
    for step in range(40):
        agents.zero_grad()
        (receiver(sender(features), torch.Size((4, 4))) - wanted).square().mean().backward()
        with torch.no_grad():
            for parameter in agents.parameters():
                parameter -= 0.02 * (1 - step / 40) * parameter.grad.sign()
    agents.eval()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sender.parameters())
    assert not torch.equal(sender(features)[0], sender(features)[1])
    assert (receiver(sender(features), torch.Size((4, 4))) - wanted).square().mean() < 0.02


@pytest.mark.component("interpretation")
def test_information_is_that_of_scikit_learn():
    rng = torch.Generator().manual_seed(0)
    present = torch.randint(0, 2, (200,), generator=rng)
    for said in (torch.randint(0, 6, (200,), generator=rng), 2 * present + 1, torch.zeros(200).long()):
        wanted = mutual_info_score(said.numpy(), present.numpy())
        assert information(said, present) == pytest.approx(wanted, abs=1e-9)
    assert information(2 * present + 1, present) > 0.6 and information(said, present) == 0
    assert information(present, torch.ones(200).long()) == 0


@pytest.mark.component("interpretation")
def test_places_that_tell_of_a_structure_are_found():
    """The second symbol says whether structure 1 is there, the third whether structure 2 is, the first nothing."""
    labels = torch.zeros(8, 4, 4, dtype=torch.uint8)
    labels[::2, 1, 2], labels[:4, 0, 0] = 1, 2
    first, second = (labels == 1).flatten(1).any(1), (labels == 2).flatten(1).any(1)
    sentences = torch.stack([torch.full((8,), 3), 1 + first, 4 - second.long()], dim=1)
    nats = torch.tensor(2.0).log().item()
    found = discrimination(sentences, labels, classes=3)
    assert torch.allclose(found, torch.tensor([[0, 0], [nats, 0], [0, nats]]), atol=1e-6)


@pytest.mark.component("interpretation")
def test_sentences_are_those_that_prediction_hears():
    method = Symbolic(channels=SMALL, vocabulary=5, length=3)
    torch.manual_seed(0)
    nets, images = method.build(1, 3, 2).eval(), torch.randn(4, 1, 32, 32)
    said = method.sentences(nets, images)
    assert said.shape == (4, 3) and said.dtype == torch.int64
    network = nets["average"]
    masks = network.masks(network.levels(images), F.one_hot(said, 5).float()).softmax(1)
    assert torch.equal(method.predict(nets, images), masks)
    assert torch.equal(method.predict(nets, images), method.predict(nets, images))


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    assert net()(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_says_the_same_of_every_image():
    full, bare = net(), net(speak=False)
    names, others = dict(full.named_parameters()), dict(bare.named_parameters())
    assert set(names) - set(others) == {name for name in names if name.startswith("sender")} and set(others) < set(
        names
    )
    assert all(names[name].shape == others[name].shape for name in others)
    said = bare.say(torch.randn(4, SMALL[-1], 8, 8))
    assert torch.equal(said, sentence(0, 0, 0).expand(4, -1, -1))


@pytest.mark.parametrize("settings", [{}, {"speak": False}])
def test_every_parameter_is_trained(settings):
    method = Symbolic(channels=SMALL, **settings)
    nets = method.build(1, 3, 2)
    batch = Batch(torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in nets["model"].parameters())


def test_it_works_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        network = net()
        levels = network.levels(torch.randn(2, 1, 32, 32))
        assert network.say(levels[-1]).dtype == torch.float32
        assert torch.isfinite(network(torch.randn(2, 1, 32, 32)).float()).all()
