"""How much alike two reports are: by their words (BLEU, ROUGE-L, CIDEr, shared words), or by the facts that they state.

And what judges are tried on: a report said otherwise (`said_otherwise`), and one in which a single fact is wrong
(`with_an_error`). Both are made by rules from real reports.
"""

import re
from collections import Counter
from math import exp, log
from zlib import crc32

import numpy as np

from medcook.language import words_of
from medcook.recipes.language._parsing import f1
from medcook.recipes.language._reports import facts_of

ORDER = 4
"""BLEU and CIDEr look at sequences of up to so many words."""


def sequences(words: list[str], length: int) -> Counter:
    """How often each sequence of so many words occurs."""
    return Counter(tuple(words[place : place + length]) for place in range(len(words) - length + 1))


def bleu(found: str, truth: str) -> float:
    """BLEU of a sentence (Papineni et al., ACL 2002): geometric mean of the precisions of 1 to 4 words, times a penalty
    for being shorter than the truth. Where a longer sequence never matches, one is added to both counts (Lin and Och,
    ACL 2004), since most of these reports have fewer than ten words."""
    mine, theirs = words_of(found), words_of(truth)
    logs = []
    for length in range(1, ORDER + 1):
        have, want = sequences(mine, length), sequences(theirs, length)
        matched, total = sum((have & want).values()), sum(have.values())
        if length > 1:
            matched, total = matched + 1, total + 1
        if not matched:
            return 0.0
        logs.append(log(matched / total))
    return exp(sum(logs) / ORDER + min(0.0, 1 - len(theirs) / max(len(mine), 1)))


def longest_common(one: list[str], other: list[str]) -> int:
    """The number of words of the longest sequence that both have in this order, not necessarily side by side."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row[:]
        for place, theirs in enumerate(other, 1):
            row[place] = before[place - 1] + 1 if word == theirs else max(before[place], row[place - 1])
    return row[-1]


def rouge_l(found: str, truth: str) -> float:
    """ROUGE-L (Lin, 2004): F1 of the longest common sequence of words."""
    mine, theirs = words_of(found), words_of(truth)
    return 2 * longest_common(mine, theirs) / max(len(mine) + len(theirs), 1)


def rarity(reports: tuple[str, ...]) -> tuple[dict[tuple, float], int]:
    """({sequence: in how many reports it occurs}, number of reports): what CIDEr weighs by."""
    counts = Counter()
    for report in reports:
        for length in range(1, ORDER + 1):
            counts.update(set(sequences(words_of(report), length)))
    return counts, len(reports)


def cider(found: str, truth: str, known: tuple[dict[tuple, float], int]) -> float:
    """CIDEr (Vedantam et al., CVPR 2015), without its factor of ten: the mean over 1 to 4 words of the cosine between
    counts of sequences, weighed by how rare each is among known reports (`rarity`)."""
    counts, total = known
    cosines = []
    for length in range(1, ORDER + 1):
        mine, theirs = (
            {key: many * log(total / max(1, counts.get(key, 0))) for key, many in sequences(words, length).items()}
            for words in (words_of(found), words_of(truth))
        )
        dot = sum(value * theirs.get(key, 0.0) for key, value in mine.items())
        norm = np.linalg.norm([*mine.values()] or [0.0]) * np.linalg.norm([*theirs.values()] or [0.0])
        cosines.append(dot / norm if norm else 0.0)
    return float(np.mean(cosines))


def shared_words(found: str, truth: str) -> float:
    """F1 of the words, whatever their order."""
    return f1(frozenset(words_of(found)), frozenset(words_of(truth)))


def shared_facts(found: str, truth: str) -> float:
    """F1 of sides, fields and signs that the two state."""
    return f1(*(frozenset().union(*facts_of(report)) for report in (found, truth)))


OTHERWISE = (
    (r"\brul\b", "right upper lobe"),
    (r"\blul\b", "left upper lobe"),
    (r"\brll\b", "right lower lobe"),
    (r"\blll\b", "left lower lobe"),
    (r"\bright upper (lobe|field)\b", "upper part of the right lung"),
    (r"\bleft upper (lobe|field)\b", "upper part of the left lung"),
    (r"\bright lower (lobe|field)\b", "lower part of the right lung"),
    (r"\bleft lower (lobe|field)\b", "lower part of the left lung"),
    (r"\b(right|left) (secondary )?(ptb|tb)\b", r"\2tuberculosis of the \1 lung"),
    (r"\bbilateral (secondary )?(ptb|tb)\b", r"\1tuberculosis of both lungs"),
    (r"\bptb\b", "pulmonary tuberculosis"),
    (r"\btb\b", "tuberculosis"),
    (r"\bbilaterally\b", "on both sides"),
    (r"\brt\b", "right"),
    (r"\bcavitary\b", "with a cavity,"),
    (r"\binfiltrates?\b", "consolidation"),
    (r"\bpleural effusion\b", "fluid in the pleural space"),
    (r"\bpleurisy\b", "pleuritis"),
    (r"\bscars\b", "scarring"),
    (r"\bnodular\b", "in nodules"),
    (r"\batrophy with wide ventricles\b", "shrunken brain, ventricles too large"),
    (r"\bolder patient\b", "patient of old age"),
    (r"\byoung patient\b", "patient of young age"),
)
"""Ways to say the same: abbreviations in full, another order of words, synonyms."""


def said_otherwise(report: str) -> str:
    """The same in other words, its parts in the opposite order."""
    text = report.lower()
    for pattern, words in OTHERWISE:
        text = re.sub(pattern, words, text)
    parts = [part.strip() for part in re.split(r"[.;]|, ", text) if words_of(part)]
    return "; ".join(reversed(parts))


SWAPS = {
    "side": {"right": "left", "left": "right", "rt": "left", "rul": "lul", "lul": "rul", "rll": "lll", "lll": "rll"},
    "field": {"upper": "lower", "lower": "upper", "rul": "rll", "rll": "rul", "lul": "lll", "lll": "lul"},
    "sign": {
        **{"ptb": "pneumonia", "tb": "pneumonia", "pleurisy": "scars", "effusion": "scars", "scars": "effusion"},
        **{"cavitary": "calcified", "cavity": "calcification", "infiltrate": "effusion", "infiltrates": "effusion"},
        **{"atrophy": "infarction", "wide": "narrow"},
    },
    "age": {"older": "young", "young": "older"},
}
"""{kind of error: {word: what is put in its place}}."""
KINDS = (*SWAPS, "negation")


def with_an_error(report: str, kind: str) -> str | None:
    """The report with one word exchanged, or with a "no" in front; None where no word of it can be exchanged.

    Which word, of several, follows from the report's letters.
    """
    if kind == "negation":
        return None if report.lower().startswith(("no ", "normal")) else f"no {report}"
    swap = SWAPS[kind]
    places = [found for found in re.finditer("[A-Za-z]+", report) if found[0].lower() in swap]
    if not places:
        return None
    place = places[crc32(report.encode()) % len(places)]
    word = swap[place[0].lower()]
    return report[: place.start()] + (word.upper() if place[0].isupper() else word) + report[place.end() :]
