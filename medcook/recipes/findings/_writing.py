"""Answers of every kind as rows of tokens: words, numbers in percent of the image's sides, and nothing else.

So one language model can write labels, counts, boxes, outlines and what reports state, as large models do, and what it
writes can be put in the form that a harness expects. A word of a report that is read has a token by its letters.
"""

import zlib

import numpy as np

from medcook.language import words_of
from medcook.networks.vila import IMAGE, Line
from medcook.recipes.findings._harness import Question, said_box
from medcook.recipes.findings._mined import FACTS, KINDS, PLACES, lungs_of
from medcook.recipes.language._reports import facts_of

LEVELS = 6
"""Heights, from the top of a lung to its bottom, at which an outline has a corner on either side."""
PERCENT, BUCKETS = 100, 256

WORDS = ("yes", "no", "none", *FACTS, *(str(number) for number in range(PERCENT)), *KINDS)
"""What may be said, and the names of the kinds, which stand for their prompts."""
READ, STOP = len(WORDS), len(WORDS) + BUCKETS
"""First of the tokens of words that are read; what begins and ends a row."""
MOST = 1 + 2 * 4 * LEVELS
"""Tokens of the longest answer, with its end."""


def heard(question: Question) -> Line:
    """A question as tokens: the image, if there is one, the kind, and the words of the report."""
    read = [READ + zlib.crc32(word.encode()) % BUCKETS for word in words_of(question.text)]
    return [STOP, *([] if question.image is None else [IMAGE]), WORDS.index(question.kind), *read]


def told(kind: str, truth: object, size: tuple[int, int]) -> Line:
    """A true answer as tokens, with the end; `size` is that of the image in which places are."""
    if kind in PLACES:
        points = truth.reshape(-1, 2) if kind == "localisation" else np.concatenate([*map(corners, lungs_of(truth))])
        shares = (PERCENT * points / [size[1], size[0]]).round().clip(0, PERCENT - 1).astype(int)
        words = [str(share) for share in shares.flatten()]
    elif kind in ("classification", "counting"):
        words = [str(truth)]
    else:
        facts = frozenset().union(*facts_of(truth)) if kind == "generation" else truth
        words = [word for word in FACTS if word in facts] or ["none"]
    return [*map(WORDS.index, words), STOP]


def written(kind: str, line: Line, size: tuple[int, int]) -> str:
    """Tokens that a model wrote, without the end, as an answer; whatever they are, they become some text."""
    words = [WORDS[token] if token < READ else "?" for token in line]
    if kind not in PLACES or not all(word.isdigit() for word in words):
        return ", ".join(words)
    pixels = [int(word) * size[1 - place % 2] / PERCENT for place, word in enumerate(words)]
    if kind == "localisation":
        return " ".join(said_box(np.array(pixels[start : start + 4])) for start in range(0, len(pixels), 4))
    points = [
        f"[{', '.join(f'{value:g}' for value in pixels[start : start + 2])}]" for start in range(0, len(pixels), 2)
    ]
    outlines = (", ".join(points[start : start + 2 * LEVELS]) for start in range(0, len(points), 2 * LEVELS))
    return " ".join(f"[{outline}]" for outline in outlines)


def corners(mask: np.ndarray) -> np.ndarray:
    """(2 LEVELS, 2), x and y: the outline of a mask (H, W) bool, down its left side and up its right one."""
    rows = np.flatnonzero(mask.any(1))
    levels = rows[np.linspace(0, len(rows) - 1, LEVELS).round().astype(int)]
    left, right = mask[levels].argmax(1), mask.shape[1] - mask[levels, ::-1].argmax(1)
    sides = [np.stack([side, levels + 0.5], axis=1) for side in (left, right)]
    return np.concatenate([sides[0], sides[1][::-1]])
