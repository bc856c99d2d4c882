"""Sentences of reports about structures, and which structure a sentence is about."""

import re

SYNONYMS = {
    "brainstem": ("brain stem",),
    "spinal cord": ("cord", "myelon"),
    "parotid": ("parotid gland", "parotid salivary gland"),
    "esophagus": ("oesophagus", "gullet"),
    "larynx": ("voice box",),
    "mandible": ("lower jaw", "jawbone"),
}
"""Other words for an organ; those that a data set uses are known anyway."""

SENTENCES = ("Swelling of the {side} {organ}.", "The {organ} is displaced{on}.", "{side} {organ}: no abnormality.")


def parsed(name: str) -> tuple[str, str]:
    """Side (empty where there is none) and organ of a structure's name."""
    words = name.lower().split()
    sides = [word for word in words if word in ("left", "right")]
    return " ".join(sides), " ".join(word for word in words if word not in sides)


def words_for(organ: str) -> tuple[str, ...]:
    return (organ, *SYNONYMS.get(organ, ()))


def phrases(name: str) -> list[str]:
    """Sentences of a report about a structure, in every word for it."""
    side, organ = parsed(name)
    forms = [
        (sentence, word, f" on the {side}" if side and "{on}" in sentence else "")
        for word in words_for(organ)
        for sentence in SENTENCES
    ]
    return [" ".join(text.format(side=side, organ=word, on=on).split()) for text, word, on in forms]


def meant(phrase: str, structures: dict[int, str]) -> int | None:
    """The structure that a phrase is about: the longest word for an organ in it, on the side it tells; None where that
    leaves none or several."""
    text = " ".join(re.findall("[a-z]+", phrase.lower()))
    told, found = set(text.split()) & {"left", "right"}, []
    for value, name in structures.items():
        side, organ = parsed(name)
        words = [word for word in words_for(organ) if f" {word} " in f" {text} "]
        if words and (not side or told == {side}):
            found.append((max(map(len, words)), value))
    best = [value for length, value in found if length == max(found)[0]]
    return best[0] if len(best) == 1 else None
