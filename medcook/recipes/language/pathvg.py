"""PathVG, visual grounding in pathology (Zhong, Hao, Wu, Chang, Jiang, Nie, Tang and Bai, arXiv 2502.20869, 2025).

Idea: expressions of pathologists hold terms that imply what is seen and do not say it. PKNet, the paper's model, has a
large language model turn each term into visible features, in words. A knowledge fusion module lets the expression's
words E attend to the words K of that knowledge and adds what they find where a gate lets it in,

    F = E + sigmoid(W [E, A]) * A,    A = attention(E, K, K),

and F tells the network what to ground. Here, findings in chest X-rays are asked for by terms such as abscess.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from medcook import evaluation
from medcook.data import Case
from medcook.language import ToldUNet, mean_words
from medcook.recipes.language._boxes import detections
from medcook.recipes.language._findings import FINDINGS as COMBINATIONS
from medcook.recipes.language._findings import box_iou, box_of, measures
from medcook.recipes.language._settings import FINDINGS, FINDINGS_BUDGET, FINDINGS_QUICK, ToldOfFindings, scales
from medcook.recipes.language._terms import Terms, estranged, facts_about
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained


class KnowledgeFusion(nn.Module):
    """The knowledge fusion module: the formula above, with layer normalisation before the attention."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.gate = nn.Linear(2 * width, width)

    def forward(self, expression: Tensor, knowledge: Tensor, empty: Tensor) -> Tensor:
        """Words (B, L, width), of knowledge (B, M, width), and where there is none of these (B, M): (B, L, width)."""
        asked, known = self.norms[0](expression), self.norms[1](knowledge)
        found, _ = self.attention(asked, known, known, key_padding_mask=empty, need_weights=False)
        return expression + self.gate(torch.cat([expression, found], dim=-1)).sigmoid() * found


class KnowingUNet(ToldUNet):
    """The chapter's network, which understands an expression with the help of what is known of its terms.

    knowledge  whether it is told what is known; without, the expression attends to itself
    hide       the share of terms that are replaced by made-up words while training; what is known of them stays
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, knowledge: bool, hide: float):
        super().__init__(inputs, channels, width)
        self.fusion = KnowledgeFusion(width)
        self.knowledge, self.hide = knowledge, hide

    def understand(self, sentences: tuple[str, ...]) -> Tensor:
        said = [estranged(sentence, self.hide) for sentence in sentences] if self.training else sentences
        with torch.autocast(self.text.places.device.type, enabled=False):
            words, empty = self.text.tokens(said)
            facts = [facts_about(sentence) if self.knowledge else () for sentence in sentences]
            fused = self.fusion(words, *self.known(facts, words, empty))
            return mean_words(fused, empty)

    def known(self, facts: list[tuple[str, ...]], words: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Words (B, M, width) of what is known for each of B expressions, and where there is none (B, M).

        Every fact is read on its own. Where nothing is known, these are the expression's own words.
        """
        every = sorted({fact for some in facts for fact in some})
        read = dict(zip(every, zip(*self.text.tokens(every), strict=True), strict=True)) if every else {}
        rows = [
            torch.cat([tokens[~blank] for tokens, blank in (read[fact] for fact in some)]) if some else own[~none]
            for some, own, none in zip(facts, words, empty, strict=True)
        ]
        counts = torch.tensor([len(row) for row in rows], device=words.device)
        padded = pad_sequence(rows, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=words.device) >= counts[:, None]


@dataclass
class ToldInTerms(ToldOfFindings):
    """The chapter's baseline, which hears expressions with plain and with implicit terms."""

    language: Terms = Terms()


@dataclass
class PKNet(ToldInTerms):
    """The same, with knowledge; see `KnowingUNet`."""

    knowledge: bool = True
    hide: float = 0.5

    def network_for(self, inputs: int) -> nn.Module:
        return KnowingUNet(inputs, self.channels, self.width, self.knowledge, self.hide)


def grounded(answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`measures` of an answer to an expression that means one region: `hit` is about the box of that connected part, of
    all above a probability of one half, in which the most probable pixel is."""
    found = detections(answer, level=0.5)
    box = max(found)[1] if found else None
    return measures(answer, truth) | {"hit": float(box_iou(box, box_of(truth)) >= 0.5)}


def implicit_rows(fitted, case: Case) -> list[dict]:
    """One row: means over a case's findings, each asked for in terms that training never used, see `grounded`; and
    `hit_plain`, `dice_plain`, `pointed_plain` where the terms were plain."""
    nets, language = trained(fitted), fitted.method.language
    images, labels = fitted.task.preparation.both(case)
    found: list[dict] = []
    for image, label in zip(images, labels, strict=True):
        there = sorted({*label.unique().tolist()} - {0})
        if not there:
            continue
        asked = [say(value) for value in there for say in (language.unheard, language.name)]
        with torch.no_grad():
            answers = fitted.method.answer(nets, image[None], tuple(asked))[0].float().numpy()
        for value, unheard, plain in zip(there, answers[::2], answers[1::2], strict=True):
            truth = (label == value).numpy()
            other = grounded(plain, truth)
            kept = {f"{name}_plain": other[name] for name in ("hit", "dice", "pointed")}
            found.append(grounded(unheard, truth) | kept)
    if not found:
        return []
    means = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    return [evaluation.row(case, "implicit", **means)]


recipe = Recipe(
    paper="pathvg",
    title="What a term implies is said beside it",
    claim="A network that is told what is known of the terms of an expression grounds findings that are asked for in "
    "terms it never heard better than one that hears the expression alone.",
    arms={
        "expression alone": Arm(ToldInTerms()),
        "pknet": Arm(PKNet()),
        "without knowledge": Arm(PKNet(knowledge=False)),
    },
    compare=("pknet", "expression alone"),
    ablation=("pknet", "without knowledge"),
    metric="hit",
    score=implicit_rows,
    scales=scales(FINDINGS_QUICK, FINDINGS, budget=FINDINGS_BUDGET),
    source="abstract, arXiv 2502.20869; code in part, github.com/ssecv/PathVG (models/transcp.py), in which the words "
    "of an expression and of three sentences of knowledge are read as one text and the fusion module is left out",
    components=(
        Component(
            "visual grounding by expressions with attributes",
            "simplified",
            "the box around the surest part of the answer's mask, where PKNet predicts a box; metric hit, whether it "
            "overlaps the true box by half of the union. As there, each expression means one region",
        ),
        Component(
            "implicit terms turned into explicit visual features",
            "simplified",
            f"no language model is at hand: {len(COMBINATIONS)} combinations are named by 24 terms, of each of which "
            "one short true sentence was written for this recipe and is looked up. Six of the terms are in no "
            "training expression, and scores ask with these; most words of their sentences are heard in others",
        ),
        Component(
            "knowledge fusion module",
            "simplified",
            "its equations were not at hand; attention from the expression to the knowledge and a gate. In the "
            "ablation the expression attends to itself, with the same parameters",
        ),
        Component(
            "hidden terms",
            "implemented",
            "not in the paper: in training, half of the terms that this network reads are made-up words. It stands in "
            "for the text model's training on a world of terms: else every term of training is learnt by heart, and "
            "nothing asks for knowledge. The ablation's terms are hidden as well, the baseline's not",
        ),
        Component("knowledge-enhanced large language model", "absent", "see above; also BERT and pretrained encoders"),
        Component(
            "multi-scale pathology images",
            "absent",
            "chest X-rays with findings drawn into them. What was looked at, in one seed that is not scored and on "
            "validation images: Dice asked in unheard and in plain terms, 0.58 and 0.58 of PKNet, 0.42 and 0.65 of the "
            "expression alone. After it, hit became about the surest part of an answer, in all arms; it had been about "
            "all parts",
        ),
        Component("RefPath", "absent", "27,610 images at several magnifications, not at hand"),
    ),
)
