"""Options and answers of multiple choice, in the ways data sets write them. Called by engine/evaluate/data.py.

Options: several columns, a list, a mapping {"A": ...}, or one text with a line "A ..." for each. Their letters are
kept, for some data begin at B; what a model sees is always A, B, C.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LINE_END = re.compile(r"\r?\n|\\n")  # some exports hold a backslash and an n
_WHOLE = re.compile(r"-?[0-9]{1,9}")
_LETTERED = re.compile(r"\s*[(（]?([A-Z])(?:\s*[.．、:：)）]\s*|\s+)(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    texts: tuple[str, ...]
    letters: str  # as the data name them


def read_options(value: Any) -> Options:
    """Raises ValueError saying what is wrong with them."""
    if isinstance(value, str):
        value = _from_text(value)
    if isinstance(value, dict):
        letters = [str(name).strip() for name in value]
        if not all(len(letter) == 1 and letter in LETTERS for letter in letters) or letters != sorted(
            set(letters)
        ):
            raise ValueError(
                f"has the keys {', '.join(letters)}, which should be letters in order (A, B, C, ...)"
            )
        texts = list(value.values())
    elif isinstance(value, list):
        texts = list(value)
        while texts and (texts[-1] is None or texts[-1] == ""):
            texts.pop()  # a column that only longer questions use
        letters = list(LETTERS[: len(texts)])
    else:
        texts, letters = [], []
    if not 2 <= len(texts) <= 26:
        raise ValueError("should be a list of 2 to 26 texts")
    for letter, text in zip(letters, texts, strict=True):
        if isinstance(text, int | float) and not isinstance(text, bool):
            raise ValueError(f"holds {text!r} as option {letter}, which should be text (in quotes)")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"holds {text!r} as option {letter}: every option should be text with something in it"
            )
    return Options(tuple(texts), "".join(letters))


def _from_text(text: str) -> Any:
    if text.lstrip()[:1] in ("[", "{"):  # a list in a CSV field
        try:
            return json.loads(text)
        except ValueError:
            pass
    found: dict[str, str] = {}
    for line in _LINE_END.split(text.strip()):
        lettered = _LETTERED.fullmatch(line)
        if lettered and (not found or lettered.group(1) > list(found)[-1]):
            found[lettered.group(1)] = lettered.group(2).strip()
        elif found and line.strip():  # an option that goes on in the next line
            last = list(found)[-1]
            found[last] = f"{found[last]}\n{line.strip()}"
        elif line.strip():
            raise ValueError(
                f"is one text whose line {line!r:.40} does not begin with a letter (A ..., B ...)"
            )
    return found


def find_way(answers: Sequence[Any], options: Sequence[Options]) -> str:
    """How the answers of a file are written: index, letter or text. Raises ValueError where that is not clear."""
    if all(isinstance(answer, int) for answer in answers):
        return "index"
    odd = [answer for answer in answers if not isinstance(answer, int | str)]
    if odd:
        raise ValueError(f"holds {odd[0]!r:.60}, which is neither a whole number nor text")
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError("is a number in some rows and text in others")
    texts = [answer.strip() for answer in answers]
    if all(len(text) == 1 and text.upper() in LETTERS for text in texts):
        other = "letter"
    elif all(_WHOLE.fullmatch(text) for text in texts):
        other = "index"
    else:
        return "text"
    pairs = list(zip(texts, options, strict=True))
    by_text = [_place(text, own, "text") for text, own in pairs]
    by_other = [_place(text, own, other) for text, own in pairs]
    if None in by_text or by_text == by_other:
        return other
    if None in by_other:
        return "text"
    raise ValueError(f"could be read as {other} and as text")


def read_answer(value: Any, options: Options, way: str) -> int:
    """The place of the right option from 0. Raises ValueError saying what was expected."""
    count = len(options.texts)
    last = count - 1
    if way in ("index", "index1"):
        first = 0 if way == "index" else 1
        number = int(value) if isinstance(value, str) and _WHOLE.fullmatch(value.strip()) else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number - first < count:
            raise ValueError(
                f"should be the index of an option ({first} to {last + first}), and is {value!r:.60}"
                + ("; answers: index1 if they count from 1" if number == count else "")
            )
        return number - first
    if not isinstance(value, str):
        raise ValueError(
            f"should be {'a letter' if way == 'letter' else 'the text of an option'}, and is {value!r}"
        )
    place = _place(value.strip(), options, way)
    if place is None and way == "letter":
        raise ValueError(
            f"is {value!r}, and should be the letter of an option ({', '.join(options.letters)})"
        )
    if place is None:
        many = Counter(text.strip() for text in options.texts)[value.strip()]
        what = f"which is the text of {many} options" if many else "which is not the text of an option"
        raise ValueError(f"is {value!r:.60}, {what} ({', '.join(map(repr, options.texts)):.200})")
    return place


def _place(text: str, options: Options, way: str) -> int | None:
    if way == "letter":
        return (
            options.letters.index(text.upper())
            if len(text) == 1 and text.upper() in options.letters
            else None
        )
    if way == "index":
        return int(text) if 0 <= int(text) < len(options.texts) else None
    fits = [n for n, option in enumerate(options.texts) if option.strip() == text]
    return fits[0] if len(fits) == 1 else None
