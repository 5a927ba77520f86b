"""The answer letter in a text a model generated. rows.py and tables.py call `parse_letter`; no torch.

What counts, in this order:
1. the whole text is a letter, or one option's text, or a letter before its option's text;
2. the last conclusion: "the answer is C", "Answer: (c)", \\boxed{C}, "I choose C", "C is the answer", 答案是C, 选C;
3. a label that begins the text: "C) aspirin", "Option C, because ...";
4. "C is correct", and a letter that ends the text: "... so it must be C."

A wrong reading is worse than none: two letters ("A or B"), a denial ("not A"), letters that are no option, and
letters that are something else (the article A, the pronoun I, E. coli, hepatitis B) give None.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_HAN = re.compile(r"[\u4e00-\u9fff]")
_JUDGED = re.compile(r"[错不正项选和或与是为对可也都会能均]")  # "A错误" speaks about A
_SHORT = 80  # characters: a text that is a letter and nothing else
_ARTICLE = re.compile(r"^\s*(?:(?:the|an?)\s+)?[\"'“‘(]*", re.IGNORECASE)
_MARKUP = re.compile(
    r"\*+|`+|~~|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])|\$+|^[ \t]*#+[ \t]*|^[ \t]*>[ \t]+", re.MULTILINE
)
_TEX = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mathbb|bf|rm|textit)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\boxed\s*\{\s*([^{}]*?)\s*\}")
_TAGGED = re.compile(r"<\s*answer\s*>\s*(.*?)\s*<\s*/\s*answer\s*>", re.IGNORECASE | re.DOTALL)
# a base model that goes on writes the next question itself
_NEXT_QUESTION = re.compile(r"\S\s*\n\s*(?:Question|Q|问题|题目)\s*\d*\s*[:.]", re.IGNORECASE)

_ADVERBS = (
    r"(?:(?:most|very|likely|probably|definitely|clearly|therefore|thus|"
    r"actually|certainly|indeed|simply|still|also|obviously|hence)\b[\s,]*){0,3}"
)
_DENIED = r"(?P<no>not\b|never\b|neither\b|unlikely\b|n't\b)?"
_IS = (
    r"(?:\s*(?:\b(?:is|are|was|would\s+be|should\s+be|must\s+be|will\s+be|could\s+be|may\s+be|might\s+be|can\s*be|"
    r"cannot\s+(?P<cannot>be)|has\s+to\s+be|seems\s+to\s+be|appears\s+to\s+be|remains)(?![a-z])|=)|\s*(?=n't))"
)
_NOUN = r"\b(?:answers?|ans|choice|option|response|letter|solution|conclusion)\b"
_CONCLUSIONS = [
    re.compile(_NOUN + r"[^.\n:;?!]{0,80}?(?:" + _IS + r"\s*:?\s*" + _ADVERBS + _DENIED + r")", re.IGNORECASE),
    re.compile(_NOUN + r"(?:\s*\([^()\n]{0,30}\))?"
        r"\s*\.?\s*(?::|=|\s[-–—]|-+>|=+>|→|\n)\s*(?P<no>not\b)?",
        re.IGNORECASE),
    re.compile(r"\b(?:correct|right|best|final|my|the)\s+answer\s+(?=\(?[A-Z]\b)"
        r"|\banswer\s+(?=[A-Z]\W*$)", re.IGNORECASE),
    re.compile(
        r"(?P<no>(?:\bnot|n't|\bnever|\bcannot)\s+)?\b(?:I|we|let'?s|let us|you)(?:'d|'ll|\s+would|\s+will|\s+should|"
        r"\s+must|\s+can)?(?P<no2>\s+not|\s*n't|\s+never)?\s+(?:"
        r"choose|chose|pick|picked|select|selected|recommend|prefer|go\s+with|went\s+with|opt\s+for|"
        r"answer)\s+(?:for\s+)?",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?:答案|正确选项|正确的选项|最佳选项|正确选择|最佳选择|正确的|结论)[^。\n,;A-Za-z不非]{0,16}?"
        r"(?:(?P<no>不会|不应该|不应|不可能|不|并非|非)(?:选择|选|是|为|\s)*|(?:应该|应当|应|就|只能|可能|便)?(?:选择|选|是|为|:|\s)+)"
    ),
    re.compile(r"(?P<no>不能|不应该|不应|不可|不|勿|未|别)?(?:会|要)?(?:选择|选定|选取|挑选|选)(?!项)\s*[:：]?"),
]  # fmt: skip
_ANSWER_AFTER = re.compile(  # "C is the answer"
    r"\s*(?:is|would\s+be|must\s+be|should\s+be|seems|appears|是|为|就是)\s*" + _ADVERBS
    + r"(?:(?:the|my|your|our)\s+)?(?:(?:most|only|single|one|final|overall)\s+)?"
    r"(?:(?:correct|right|best|likely|appropriate|"
    r"accurate|suitable|logical|final)\s+)?(?:answer|choice|option|response)\b",
    re.IGNORECASE,
)  # fmt: skip
_RIGHT_AFTER = re.compile(
    r"\s*(?:is|would\s+be|must\s+be|should\s+be|seems|appears)\s+" + _ADVERBS
    + r"(?:the\s+)?(?:correct|right|best|most\s+(?:appropriate|likely|suitable|accurate))\b"
    r"|\s*(?:选项|项)?\s*(?:是|为|最|才是|才)?(?:正确|对的|最佳|最合适|最恰当)",
    re.IGNORECASE,
)  # fmt: skip
_LEAD = (
    r"(?:\s*(?:(?:definitely|clearly|simply|either|both|with)\s+)?(?:the\s+)?"
    r"(?:(?:option|choice|letter|answer|number|choices|options|选项|选择)\s*:?\s*)?)"
)
_OPEN, _CLOSE = r"[\s\"'“‘(\[{<【《:]*", r"[\"'”’)\]}>】》]*"
_AT = re.compile(_LEAD + _OPEN + r"(?P<letter>[A-Za-z])(?![A-Za-z0-9'’])", re.IGNORECASE)
_ALONE = re.compile(r"(?<![A-Za-z0-9'’.\-])(?P<letter>[A-Z])(?![A-Za-z0-9'’\-])")
_BARE = re.compile(
    r"\W*(?:\d+[.)]\s*)?(?:(?:option|choice|answer|letter|选项|选|答案)\s*[:：]?\s*)?\W*(?P<letter>[A-Za-z])\W*(?:项|选项)?\W*",
    re.IGNORECASE,
)
_ALSO = re.compile(
    r"(?P<how>\s*(?:,\s*)?(?:and/or|and|or|nor|&|/|\+|,|、|和|或者|或|与|及|以及|;)\s*)"
    r"(?:also\s+|maybe\s+|possibly\s+|perhaps\s+|even\s+|then\s+)?"
    r"(?:option\s+|choice\s+|选项)?[\"'“‘(\[]*(?P<letter>[A-Za-z])(?![A-Za-z0-9'’])" + _CLOSE
    + r"(?P<clause>\s*(?:is|are|was|were|would|can|could|may|might|does|do|has|"
    r"describes|refers|applies|错|不|是|项|选项))?",
    re.IGNORECASE,
)  # fmt: skip
_BEFORE = re.compile(
    r"[A-Z][)\].\"']*\s*,?\s*(?:and/or|and|or|nor|&|/|\+|、|和|或者|或|与|及|以及)\s*(?:option\s+|选项)?[(\[\"']*$"
)
_DENIED_BEFORE = re.compile(
    r"\b(?:not|nor|neither|never|than|without|except)\s+(?:option\s+|choice\s+)?[(\[\"']*$", re.IGNORECASE
)
_CLAUSE = re.compile(  # what may follow a letter that is an answer and not a word of the sentence
    r"\s*(?:$|[.,;:!?)\]}>\"'”’】》\n/&+=、。，；：！？(\[-]|[–—→]|[\u4e00-\u9fff]|(?:because|since|as|which|and|or|for|in|due|given|"
    r"based|here|that|but|with|by|is|would|from|not|due|rather|on|so|if|when|among|option|choice|nor|of)\b)"
)
_SPECIES = re.compile(r"\.\s?(?P<word>[a-z]+)")
_STARTERS = frozenset(
    ["because", "since", "as", "the", "this", "it", "in", "and", "however", "for", "due", "given", "based", "which",
     "that", "so", "these", "they", "if", "when", "a", "an"]
)  # fmt: skip
_ENDS = re.compile(
    r"(?:^|\b(?:is|be|it's|choose|pick|select|get|gets|receive|give|given|with|therefore|thus|so|hence|option|choice|letter|"
    r"probably|likely|definitely|say|prefer|recommend|answered|for|conclusion)|选择|选|是|为|[:：,])\s*[,:：]?\s*"
    r"[\"'“‘(\[]*(?P<letter>[A-Z])" + _CLOSE + r"\s*[.!。]*\s*$",
    re.IGNORECASE,
)  # fmt: skip
_WRONG = re.compile(r"\b(?:incorrect|wrong|false)\s*$|(?:错误|不正确)的?$", re.IGNORECASE)
_TURN = re.compile(r"\b(?:but|so|therefore|thus|hence)\b|,\s*it(?:'s|\s+is)\b|但|因此|所以", re.IGNORECASE)
_NEGATIVE = re.compile(
    r"\b(?:not|never|avoid|except|without|neither|nor|cannot|incorrect|wrong)\b|n't\b|不|非|除", re.IGNORECASE
)
_SENTENCE = re.compile(r"\n+|(?<=[.!?;。])\s*(?=\S{2})")


@dataclass(frozen=True)
class _Read:
    """A letter found where an answer is expected; choice None: several letters, a denial, or no option."""

    place: int
    choice: int | None


def parse_letter(text: str, options: Sequence[str], language: str = "en") -> int | None:
    """Index of the option the text answers with, or None where it cannot be told.

    text: without its think block. language: `zh` reads a letter directly before Chinese words as a label ("B阿司匹林")
    even where the text has no mark after it. English and Chinese conclusions are known in both.
    """
    reader = _Reader(_clean(text), [_plain(_clean(option)) for option in options], language)
    return reader.whole() if reader.is_whole else reader.choose()


class _Reader:
    def __init__(self, text: str, options: list[str], language: str) -> None:
        self.text, self.options, self.language = text, options, language
        self.reach = 40 + 2 * max(map(len, options), default=0)
        self.named = [k for k, option in enumerate(options) if option and option == _plain(text)]
        bare = _BARE.fullmatch(text) if len(text) <= _SHORT else None
        self.bare = bare["letter"] if bare else ""
        words = re.findall(r"\w+", text) if len(text) <= _SHORT else []
        if len(set(words)) == 1 and re.fullmatch(r"[A-Za-z]", words[0]):  # "B B B"
            self.bare = words[0]
        self.is_whole = len(self.named) == 1 or bool(self.bare)

    def whole(self) -> int | None:
        """The text is one option's text, or a letter and nothing else."""
        return self.named[0] if len(self.named) == 1 else self._index(self.bare)

    def choose(self) -> int | None:
        concluded = self._conclusions()
        if concluded:
            return concluded[-1].choice
        label = self._label()
        if label:
            return self._ending() if label.choice is None else label.choice
        stated = self._stated(_RIGHT_AFTER)
        if stated:
            first = stated[0].choice
            return first if all(read.choice == first for read in stated) else None
        return self._ending()

    # conclusions

    def _conclusions(self) -> list[_Read]:
        """What is stated as the answer, in the order of the text; a bare denial states nothing."""
        found: dict[int, _Read] = {}
        for pattern in _CONCLUSIONS:
            for match in pattern.finditer(self.text):
                before = self.text[max(0, match.start() - 20) : match.start()]
                if _WRONG.search(before):
                    continue  # of a question for the wrong one this may be the answer, of others not
                denied = any(match.groupdict().get(name) for name in ("no", "no2", "cannot"))
                read = self._read_at(match.end(), denied)
                if read:
                    found.setdefault(read.place, read)
        for read in self._stated(_ANSWER_AFTER):
            found.setdefault(read.place, read)
        return [found[place] for place in sorted(found)]

    def _read_at(self, place: int, denied: bool) -> _Read | None:
        """The letter or the option text that stands at `place`."""
        match = _AT.match(self.text, place)
        if denied:  # "not A but B"
            but = re.compile(
                r"[^.\n;]{0,40}?\bbut\b(?:\s+rather)?\s*(?:rather\s+)?|[^。\n;A-Za-z]{0,3}[A-Za-z]\W{0,3}而是"
            ).match(self.text, place)
            return self._read_at(but.end(), False) if but else None
        if match and self._is_answer(match):
            return self._one_of(match)
        return self._option_at(place)

    def _option_at(self, place: int) -> _Read | None:
        """One option's text, after "the answer is (the)"."""
        rest = _ARTICLE.sub("", self.text[place : place + self.reach].casefold())
        fits = [k for k, option in enumerate(self.options) if _begins(rest, _ARTICLE.sub("", option))]
        longest = [k for k in fits if len(self.options[k]) == max(len(self.options[j]) for j in fits)]
        return _Read(place, longest[0]) if len(longest) == 1 else None

    def _stated(self, after: re.Pattern[str]) -> list[_Read]:
        """Letters followed by words that call them right, in the order of the text."""
        found = []
        for match in _ALONE.finditer(self.text):
            close = re.compile(_CLOSE + r"(?:\s*(?:选项|项))?").match(self.text, match.end())
            if not after.match(self.text, close.end() if close else match.end()):
                continue
            before = self.text[max(0, match.start() - 40) : match.start()]
            if _DENIED_BEFORE.search(before):
                continue
            joined = _BEFORE.search(before)
            found.append(_Read(match.start(), None if joined else self._index(match["letter"])))
        return found

    # labels and ends

    def _label(self) -> _Read | None:
        """A letter that begins the text as a label. A repeated list of all options is none."""
        first = self._label_of(self.text)
        if first is None:
            return None
        inline = re.findall(r"(?<![A-Za-z])([A-Z])[).:]\s", self.text.strip().partition("\n")[0])
        if inline[:2] == ["A", "B"]:
            return _Read(0, None)
        letters = [read.choice for line in self.text.splitlines() if (read := self._label_of(line))]
        if len(set(letters)) > 1 and letters[0] == 0 and letters[1] == 1:
            return _Read(0, None)
        paragraph = re.split(r"\n\s*\n", self.text.strip(), maxsplit=1)[0]
        here = {read.choice for line in paragraph.splitlines() if (read := self._label_of(line))}
        return first if len(here) == 1 else _Read(0, None)

    def _label_of(self, line: str) -> _Read | None:
        match = re.compile(
            r"\s*(?:(?:option|choice|answer|选项)\s*[:：]?\s*)?(?P<open>[(\[\"'“【]*)\s*(?P<letter>[A-Za-z])(?![A-Za-z0-9'’])"
            r"(?P<mark>\s*[).\]】\"':：,,、;]+|\s+[-–—]+(?=\s)|\s*\n|\s*$)?",
            re.IGNORECASE,
        ).match(line)  # fmt: skip
        if not match:
            return None
        index, rest = self._index(match["letter"]), line[match.end() :].strip()
        if index is None:
            return None
        if self.options[index] and _plain(rest) == self.options[index]:
            return _Read(0, index)
        if match["mark"] is None:
            reason = re.match(r"(?:because|since|as|due to)\b", rest, re.IGNORECASE)
            han = (
                _HAN.match(rest)
                and not _JUDGED.match(rest)
                and (self.language == "zh" or not match["letter"].islower())
            )
            if not (match["letter"].isupper() and (reason or han)):
                return None
        elif match["letter"].islower() and not re.search(r"[)\].】\n]", match["mark"]) and rest:
            return None
        also = _ALSO.match(line, match.end("letter"))
        second = re.compile(r"[^\w\n]+(?P<letter>[A-Z])(?![A-Za-z0-9'’])").match(line, match.end("letter"))
        if (also and not also["clause"]) or (second and _CLAUSE.match(line, second.end())):
            return _Read(0, None)
        word = re.match(r"[a-z]+", rest)
        if (
            "." in (match["mark"] or "")
            and word
            and word[0] not in _STARTERS
            and not _begins(rest, self.options[index])
        ):
            return None  # E. coli
        other = [
            k for k, option in enumerate(self.options) if option and option == _plain(rest.split("\n")[0])
        ]
        return _Read(0, None if other and index not in other else index)

    def _ending(self) -> int | None:
        """A letter that ends the last sentence, or stands alone on the last line."""
        sentences = [part for part in _SENTENCE.split(self.text.strip()) if part.strip()]
        last = sentences[-1] if sentences else ""
        match = _ENDS.search(last)
        if not match or not match["letter"].isupper() or _NEGATIVE.search(_TURN.split(last)[-1]):
            return None
        if re.search(
            r"(?<![A-Za-z])[A-Z]\W*(?:(?:and|or|nor|和|或|与|及)\s*)?(?:option\s+)?\W*$",
            last[: match.start("letter")],
        ):
            return None
        return self._index(match["letter"])

    # single letters

    def _is_answer(self, match: re.Match[str]) -> bool:
        """Whether the letter is meant as one: no article, no pronoun, no genus."""
        letter, end = match["letter"], match.end()
        marked = self.text[: match.start("letter")][-3:].rstrip()[-1:] in tuple("([\"'“‘{")
        if (
            letter.islower()
            and not marked
            and not re.compile(r"\s*(?:$|[.,;:!?)\]\n。，]|[\u4e00-\u9fff])").match(self.text, end)
        ):
            return False
        if not _CLAUSE.match(self.text, end):
            index = self._index(letter)
            return index is not None and bool(self.options[index]) and _begins(
                self.text[end:].strip().casefold(), self.options[index]
            )  # fmt: skip
        species = _SPECIES.match(self.text, end)
        if species and species["word"] not in _STARTERS:
            index = self._index(letter)
            rest = self.text[end + 1 :].strip().casefold()
            return index is not None and _begins(rest, self.options[index])
        return True

    def _one_of(self, match: re.Match[str]) -> _Read:
        """The letter, or None where another one is joined to it."""
        place, end = match.start("letter"), match.end()
        close = re.compile(r"[.:]?" + _CLOSE).match(self.text, end)
        also = _ALSO.match(self.text, close.end() if close else end)
        if also and self._joins(also, match["letter"]):
            return _Read(place, None)
        return _Read(place, self._index(match["letter"]))

    def _joins(self, also: re.Match[str], first: str) -> bool:
        letter, how = also["letter"], also["how"].strip(" ,") or ","
        if letter.upper() == first.upper() or self._index(letter) is None:
            return False
        if letter.islower() and self.text[also.start("letter") - 1] not in "([\"'":
            return False
        if also["clause"]:
            return how == "or"
        return bool(_CLAUSE.match(self.text, also.end("letter")))

    def _index(self, letter: str) -> int | None:
        place = ord(letter.upper()) - ord("A")
        return place if 0 <= place < len(self.options) else None


def _clean(text: str) -> str:
    """Full-width forms as ASCII, markup gone, boxes and tags as "Answer: X"; cut before a next question."""
    plain = unicodedata.normalize("NFKC", text).replace("’", "'")
    for _ in range(3):
        plain = _TEX.sub(r"\1", plain)
    plain = _BOXED.sub(r"\nAnswer: \1\n", plain)
    plain = _TAGGED.sub(r"\nAnswer: \1\n", plain)
    plain = _MARKUP.sub("", plain).strip()
    further = _NEXT_QUESTION.search(plain)
    return plain[: further.start() + 1] if further else plain


def _plain(text: str) -> str:
    """Lower case, single spaces, no punctuation around."""
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'“”‘()[]。，；：！？").casefold()


def _begins(text: str, option: str) -> bool:
    """Whether the text begins with the whole option (both in lower case)."""
    text = re.sub(r"\s+", " ", text.lstrip(" .:)-\"'").casefold())
    return bool(option) and text.startswith(option) and not text[len(option) : len(option) + 1].isalnum()
