"""A harness for models that are asked about images and reports in words, and answer in words, whatever they are.

A model is a callable: it gets a `Question` and gives text. It may refuse, answer in another form, fail or take too
long; all of that is counted, and scores nothing. A `Kind` of question has a prompt that says in which form to answer, a
parser of answers, which gives None for what it does not understand, and a score of what was parsed, 0 to 1.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from typing import Literal, NamedTuple

import numpy as np
from skimage.draw import polygon2mask
from skimage.measure import approximate_polygon, find_contours

from medcook.recipes.language._parsing import f1

Status = Literal["answered", "malformed", "refused", "failed", "late"]

REFUSAL = re.compile(
    r"\b(cannot|can ?not|can't|could not|couldn't|unable|not able|won't|sorry|apologi[sz]e|as an ai|not qualified)\b",
    re.I,
)
NUMBER = r"-?\d+(?:\.\d+)?"
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NOTHING = frozenset({"none", "normal", "nothing"})
CORNERS = 4
"""Numbers of a box."""


class Question(NamedTuple):
    """kind  a name;   prompt  what is asked, and how to answer;   image  (H, W) or None;   text  a report, or empty"""

    kind: str
    prompt: str
    image: np.ndarray | None = None
    text: str = ""


Model = Callable[[Question], str]


class Kind(NamedTuple):
    """A kind of question: what is asked, of an image or a text, how answers are read, and what they are worth.

    parse  (answer, size of the image) -> what it says, None where that cannot be told;   score  (that, truth) -> 0 to 1
    """

    prompt: str
    parse: Callable[[str, tuple[int, int]], object | None]
    score: Callable[[object, object], float]
    about: Literal["image", "text"] = "image"


class Judged(NamedTuple):
    """How a model answered, in how many words, and what that is worth; 0 unless it is `answered`."""

    status: Status
    score: float
    words: int


def ask(model: Model, question: Question, seconds: float | None = None, tries: int = 1) -> tuple[Status, str]:
    """A model's answer; it is asked again, up to `tries` times, where it fails or takes more than `seconds`.

    A model that is late is left to itself: its thread ends when it does. What is not text counts as a failure.
    """
    status: Status = "failed"
    for _ in range(tries):
        try:
            text = model(question) if seconds is None else in_time(model, question, seconds)
        except (TookTooLong, TimeoutError):
            status = "late"
        except Exception:  # whatever a foreign model raises
            status = "failed"
        else:
            if isinstance(text, str):
                return "answered", text
            status = "failed"
    return status, ""


def in_time(model: Model, question: Question, seconds: float) -> str:
    """The model's answer, or `TimeoutError` after so many seconds."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(model, question).result(seconds)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def judge(model: Model, kind: Kind, question: Question, truth: object, **limits) -> Judged:
    """Ask, read the answer, and say what it is worth; `limits` are those of `ask`."""
    status, text = ask(model, question, **limits)
    words = len(text.split())
    if status != "answered":
        return Judged(status, 0.0, words)
    if REFUSAL.search(text):
        return Judged("refused", 0.0, words)
    size = question.image.shape[-2:] if question.image is not None else (0, 0)
    found = kind.parse(text, size)
    if found is None:
        return Judged("malformed", 0.0, words)
    return Judged("answered", float(kind.score(found, truth)), words)


def one_of(*allowed: str) -> Callable:
    """A parser for exactly one of the allowed words; it may stand in a sentence."""

    def parse(text: str, size: tuple[int, int]) -> str | None:
        found = [word for word in allowed if re.search(rf"\b{re.escape(word)}\b", text, re.I)]
        return found[0] if len(found) == 1 else None

    return parse


def any_of(*allowed: str) -> Callable:
    """A parser for any of the allowed words, as a set; `none` or `normal` alone is the empty set."""

    def parse(text: str, size: tuple[int, int]) -> frozenset[str] | None:
        words = set(re.findall("[a-z]+", text.lower()))
        found = frozenset(words & set(allowed))
        return found if found or words & NOTHING else None

    return parse


def whole_number(text: str, size: tuple[int, int]) -> int | None:
    """A parser for a count, in digits or as a word up to ten; None where there is none, or where there are several."""
    found = {int(digits) for digits in re.findall(r"(?<![\d.-])\d+(?![\d.])", text)}
    found |= {number for number, word in enumerate(COUNTED) if re.search(rf"\b{word}\b", text, re.I)}
    return found.pop() if len(found) == 1 else None


def boxes(count: int) -> Callable:
    """A parser for so many boxes, each [left, top, right, bottom] in pixels of the image, as (count, 4)."""

    def parse(text: str, size: tuple[int, int]) -> np.ndarray | None:
        lists = [re.findall(NUMBER, part) for part in re.findall(r"\[([^\[\]]*)\]", text)]
        if len(lists) != count or any(len(numbers) != CORNERS for numbers in lists):
            return None
        found = np.array(lists, dtype=float)
        ordered = (found[:, :2] < found[:, 2:]).all() and (found >= 0).all()
        return found if ordered and (found <= [size[1], size[0]] * 2).all() else None

    return parse


def outlines(text: str, size: tuple[int, int]) -> np.ndarray | None:
    """A parser for polygons, each [[x, y], [x, y], ...] in pixels, as the mask (H, W) bool of all of them together."""
    mask, found = np.zeros(size, dtype=bool), False
    for part in re.findall(r"\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*)\s*\]", text):
        points = [re.findall(NUMBER, point) for point in re.findall(r"\[([^\[\]]*)\]", part)]
        if len(points) < 3 or any(len(point) != 2 for point in points):
            return None
        corners = np.array(points, dtype=float)
        if (corners < 0).any() or (corners > [size[1], size[0]]).any():
            return None
        mask |= polygon2mask(size, corners[:, ::-1] - 0.5)  # a pixel is where its middle is
        found = True
    return mask if found else None


def said_box(box: np.ndarray) -> str:
    """A box (4,) as an answer."""
    return f"[{', '.join(str(round(float(value))) for value in box)}]"


def said_outline(mask: np.ndarray, tolerance: float = 1.0) -> str:
    """The outlines of a mask (H, W) bool as an answer: a polygon for each of its parts but the tiniest."""
    edges = find_contours(np.pad(mask, 1).astype(float), 0.5)
    height, width = mask.shape
    said = []
    for edge in edges:
        corners = approximate_polygon(edge - 0.5, tolerance)[:-1]
        if len(corners) > 2:
            points = np.clip(corners, 0, [height, width])[:, ::-1].round(1)
            said.append(f"[{', '.join(f'[{x:g}, {y:g}]' for x, y in points)}]")
    return " ".join(said) or "none"


def same(found: object, truth: object) -> float:
    """1 where both are equal, else 0."""
    return float(found == truth)


def overlap(found: frozenset, truth: frozenset) -> float:
    """F1 of two sets; 1 where both are empty."""
    return f1(found, truth)


def box_overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """The mean over boxes (N, 4) of intersection over union."""
    inner = np.minimum(found[:, 2:], truth[:, 2:]) - np.maximum(found[:, :2], truth[:, :2])
    shared = inner.clip(0).prod(1)
    areas = (found[:, 2:] - found[:, :2]).prod(1) + (truth[:, 2:] - truth[:, :2]).prod(1)
    return float((shared / np.maximum(areas - shared, 1e-9)).mean())


def mask_overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks; 1 where both are empty."""
    total = found.sum() + truth.sum()
    return float(2 * (found & truth).sum() / total) if total else 1.0
