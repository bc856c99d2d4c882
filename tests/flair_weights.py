"""A small FLAIR with random weights by the published names, and the published model written out for it."""

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "photograph", "of", "drusen", "healthy", "red"]
HEADS, WIDTH, HIDDEN = 2, 8, 12


def published_state() -> dict[str, Tensor]:
    """Random weights of a small model, by the published names: two stages of two and one blocks, two layers of BERT."""
    rng = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=rng) * 0.3

    def norm(name: str, count: int) -> None:
        put(f"{name}.weight", count), put(f"{name}.bias", count), put(f"{name}.running_mean", count)
        state[f"{name}.running_var"] = torch.rand(count, generator=rng) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    vision = "vision_model.model"
    put(f"{vision}.conv1.weight", 6, 3, 7, 7), norm(f"{vision}.bn1", 6)
    before = 6
    for stage, (depth, count) in enumerate(((2, 8), (1, 16)), start=1):
        for number in range(depth):
            name, narrow = f"{vision}.layer{stage}.{number}", count // 4
            shapes = ((narrow, before, 1, 1), (narrow, narrow, 3, 3), (count, narrow, 1, 1))
            for k, shape in enumerate(shapes, start=1):
                put(f"{name}.conv{k}.weight", *shape), norm(f"{name}.bn{k}", shape[0])
            if number == 0:
                put(f"{name}.downsample.0.weight", count, before, 1, 1), norm(f"{name}.downsample.1", count)
            before = count
    put("vision_model.projection_head_vision.projection.weight", WIDTH, 16)
    text = "text_model.model"
    for kind, count in (("word", len(WORDS)), ("position", 20), ("token_type", 2)):
        put(f"{text}.embeddings.{kind}_embeddings.weight", count, HIDDEN)
    layer_norms = [f"{text}.embeddings.LayerNorm"]
    lines = [(f"{text}.pooler.dense", HIDDEN, HIDDEN)]
    for number in range(2):
        name = f"{text}.encoder.layer.{number}"
        lines += [(f"{name}.attention.self.{part}", HIDDEN, HIDDEN) for part in ("query", "key", "value")]
        lines += [(f"{name}.attention.output.dense", HIDDEN, HIDDEN), (f"{name}.intermediate.dense", 20, HIDDEN)]
        lines += [(f"{name}.output.dense", HIDDEN, 20)]
        layer_norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name, outputs, inputs in lines:
        put(f"{name}.weight", outputs, inputs), put(f"{name}.bias", outputs)
    for name in layer_norms:
        put(f"{name}.weight", HIDDEN), put(f"{name}.bias", HIDDEN)
    put("text_model.projection_head_text.projection.weight", WIDTH, HIDDEN)
    state["logit_scale"] = torch.tensor(2.0)
    return state


class Reference:
    """The published model from its weights alone, written out."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def norm(self, name: str, x: Tensor) -> Tensor:
        parts = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, spread, weight, bias = (part[:, None, None] for part in parts)
        return (x - mean) / (spread + 1e-5).sqrt() * weight + bias

    def image(self, image: Tensor) -> Tensor:
        vision = "vision_model.model"
        x = F.conv2d(image[None], self.state[f"{vision}.conv1.weight"], stride=2, padding=3)
        x = F.max_pool2d(self.norm(f"{vision}.bn1", x).relu(), 3, stride=2, padding=1)
        for stage, number in ((1, 0), (1, 1), (2, 0)):
            name, stride, was = f"{vision}.layer{stage}.{number}", 2 if (stage, number) == (2, 0) else 1, x
            for k, (step, padding) in enumerate(((1, 0), (stride, 1), (1, 0)), start=1):
                x = F.conv2d(x, self.state[f"{name}.conv{k}.weight"], stride=step, padding=padding)
                x = self.norm(f"{name}.bn{k}", x)
                x = x.relu() if k < 3 else x
            if number == 0:
                was = F.conv2d(was, self.state[f"{name}.downsample.0.weight"], stride=stride)
                was = self.norm(f"{name}.downsample.1", was)
            x = (x + was).relu()
        return self.projected(x.mean((0, 2, 3)), "vision_model.projection_head_vision")

    def projected(self, vector: Tensor, name: str) -> Tensor:
        vector = self.state[f"{name}.projection.weight"] @ (vector / vector.norm())
        return vector / vector.norm()

    def line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-12).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def text(self, tokens: list[int]) -> Tensor:
        """A sentence that is not filled up."""
        text, embed = "text_model.model", "text_model.model.embeddings"
        x = (
            self.state[f"{embed}.word_embeddings.weight"][tokens]
            + self.state[f"{embed}.token_type_embeddings.weight"][0]
        )
        x = self.layer_norm(f"{embed}.LayerNorm", x + self.state[f"{embed}.position_embeddings.weight"][: len(tokens)])
        states = []
        for number in range(2):
            name = f"{text}.encoder.layer.{number}"
            parts = (self.line(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
            heads = []
            for q, k, v in zip(*(part.chunk(HEADS, 1) for part in parts), strict=True):
                heads.append((q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v)
            seen = self.line(f"{name}.attention.output.dense", torch.cat(heads, 1))
            x = self.layer_norm(f"{name}.attention.output.LayerNorm", x + seen)
            inner = F.gelu(self.line(f"{name}.intermediate.dense", x))
            x = self.layer_norm(f"{name}.output.LayerNorm", x + self.line(f"{name}.output.dense", inner))
            states.append(x.mean(0))
        first, second, last = states[0], states[1], states[-1]
        return self.projected((first + second + last) / 3, "text_model.projection_head_text")
