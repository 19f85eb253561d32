"""Minimal pairs from templates: two sentences that differ in one point, of which one is English.

A model is right about a pair if it finds the good sentence more likely. Four kinds: agreement of
verb and subject, often across a noun of the other number; the article before a vowel; the tense
after a word of time; the order of neighboring words. `python -m spectrim.evaluate.tasks.pairs`
writes the files beside this one again.

The task files name `load`, which lm-eval calls for the sentences of one kind.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COUNT = 120
SEED = 7

Pair = tuple[str, str]

_PEOPLE = (
    ("boy", "boys"),
    ("girl", "girls"),
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("soldier", "soldiers"),
    ("servant", "servants"),
    ("brother", "brothers"),
)
_PLACES = (
    ("house", "houses"),
    ("door", "doors"),
    ("tree", "trees"),
    ("window", "windows"),
    ("river", "rivers"),
    ("table", "tables"),
)
_STATES = ("old", "tired", "happy", "silent", "afraid", "young", "angry", "alone")
_VOWELS = (
    *("apple", "egg", "old man", "evening", "open door", "orange", "island", "uncle", "honest man"),
    *("hour", "empty room", "idea", "enemy", "army", "answer", "officer"),
)
_CONSONANTS = (
    *("book", "dog", "letter", "young man", "horse", "garden", "river", "window", "small house"),
    *("chair", "knife", "friend", "great fire", "long road", "door", "table"),
)
_SEEING = ("He saw", "She found", "There was", "They wanted", "I remember", "It was")
_VERBS = (
    *(("walk", "walked"), ("look", "looked"), ("work", "worked"), ("call", "called")),
    *(("come", "came"), ("go", "went"), ("speak", "spoke"), ("sit", "sat"), ("write", "wrote")),
)
_ENDS = ("for an hour", "with his friend", "in the garden", "at the window", "after dinner")
_SUBJECTS = ("the old man", "his father", "the young woman", "her brother", "the doctor")
_PAST = ("Yesterday", "Last night", "A week ago")
_FUTURE = ("Tomorrow", "Next week", "To-morrow morning")
_ORDERED = (
    ("the old man", "the man old"),
    ("the little girl", "the girl little"),
    ("a very good friend", "a good very friend"),
    ("his own brother", "own his brother"),
    ("some of the men", "some the of men"),
    ("the poor woman", "the woman poor"),
)
_DOINGS = (
    "went into the house",
    "looked at the fire",
    "sat down by the window",
    "did not say a word",
    "came back in the evening",
    "opened the door and listened",
)


def _agreement() -> Iterator[Pair]:
    for (one, many), state in itertools.product(_PEOPLE, _STATES[:4]):
        yield f"The {one} was {state}.", f"The {one} were {state}."
        yield f"The {many} were {state}.", f"The {many} was {state}."
    for (one, many), (place, places), state in itertools.product(_PEOPLE, _PLACES, _STATES[6:]):
        start = f"The {one} near the {places}"
        yield f"{start} was {state}.", f"{start} were {state}."
        start = f"The {many} near the {place}"
        yield f"{start} were {state}.", f"{start} was {state}."


def _articles() -> Iterator[Pair]:
    for start in _SEEING:
        for noun in _VOWELS:
            yield f"{start} an {noun}.", f"{start} a {noun}."
        for noun in _CONSONANTS:
            yield f"{start} a {noun}.", f"{start} an {noun}."


def _tense() -> Iterator[Pair]:
    for (now, past), end, subject in itertools.product(_VERBS, _ENDS, _SUBJECTS):
        for word in _PAST:
            yield f"{word} {subject} {past} {end}.", f"{word} {subject} will {now} {end}."
        for word in _FUTURE:
            yield f"{word} {subject} will {now} {end}.", f"{word} {subject} {past} {end}."


def _word_order() -> Iterator[Pair]:
    for (good, bad), doing in itertools.product(_ORDERED, _DOINGS):
        yield f"{good} {doing}.".capitalize(), f"{bad} {doing}.".capitalize()
        first, second, *rest = doing.split()
        swapped = " ".join([second, first, *rest])
        yield f"{good} {doing}.".capitalize(), f"{good} {swapped}.".capitalize()


KINDS: dict[str, Callable[[], Iterator[Pair]]] = {
    "agreement": _agreement,
    "articles": _articles,
    "tense": _tense,
    "word_order": _word_order,
}


def sentences(kind: str) -> list[Pair]:
    """At most `COUNT` different pairs of one kind as (good, bad), the same at every call."""
    pairs = list(dict.fromkeys(KINDS[kind]()))
    random.Random(SEED).shuffle(pairs)  # noqa: S311 (an order, not a secret)
    return pairs[:COUNT]


def load(kind: str, **_metadata: Any) -> dict[str, Any]:
    """The pairs of one kind as lm-eval wants them: split name -> data set."""
    from datasets import Dataset

    text = (HERE / f"{kind}.jsonl").read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}


def write() -> None:
    """Write the files of all kinds."""
    for kind in KINDS:
        lines = [json.dumps({"good": good, "bad": bad}) for good, bad in sentences(kind)]
        (HERE / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
