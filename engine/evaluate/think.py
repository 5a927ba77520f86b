"""`<think>` traces: what a model wrote inside them, what is left outside, and whether they were closed.

Called for every generated answer. Metrics and refusal rules look at the answer (outside); both it and the raw text
are stored. Labelled outputs with the rates at which each kind is found: tests/engine/evaluate/test_think.py.

What counts as a tag: `<think>` and `</think>`, in any case and with blanks inside the brackets (small models spell
them out of characters). Qwen3, its merges and the R1 distillations write no other. `<thinking>`, `<reasoning>` and
their like are not taken out; an answer that begins with one is `untagged`.

A tag that is only talked about is text: in a code fence or in `inline code`, in quotation marks or brackets of its
own, "<think> and </think>", "the <think> tag". (In a thought, fences do not count: a balanced example there is nested,
and a fence that never ends must not hide the real end.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.evaluate.reasoning import reasons_openly

OPEN = "<think>"
KINDS = ("none", "closed", "empty", "unclosed", "untagged")

_BLANK = r"[ \t]*"
_CLOSE = rf"<{_BLANK}/{_BLANK}think{_BLANK}>"
_TAG = re.compile(rf"<{_BLANK}(?P<close>/?){_BLANK}think{_BLANK}>", re.IGNORECASE)
_TORN = re.compile(r"<(?P<close>/?)thi(?:nk?)?\Z", re.IGNORECASE)
_TORN_IN_THOUGHT = re.compile(r"</?(?:t(?:h(?:i(?:nk?)?)?)?)?\Z", re.IGNORECASE)
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)[^\n]+?(?<!`)\1(?!`)")
_QUOTES = dict(zip("\"'“‘「『《〈（([【«", "\"'”’」』》〉）)]】»", strict=True))
_JOIN = rf"{_BLANK}(?P<word>and|or|to|/|,|\.\.\.|…|(?:\\n)+|[和与或及到、，])?{_BLANK}"
_PAIR = re.compile(rf"{_JOIN}{_CLOSE}", re.IGNORECASE)
_QUOTED_PAIR = re.compile(rf"[^\n]{{0,60}}?{_CLOSE}", re.IGNORECASE)
_CALLED = re.compile(
    rf"[ \t]+(?:tags?|tokens?|markers?|blocks?)\b|{_BLANK}(?:标签|标记|符号|字样)", re.IGNORECASE
)


@dataclass(frozen=True)
class Thought:
    """kind: `none` (no trace), `closed`, `empty` (closed with nothing inside), `unclosed` (never ended), `untagged`
    (no trace, but the answer itself begins like one: "Okay, so the user is asking ...", see reasoning.py).

    thought: the text inside, blocks joined by newlines, without the tags of nested blocks; "" for `none`, `empty`
    and `untagged`. answer: the text outside, stripped of outer space; nothing is taken from an `untagged` one.
    """

    kind: str
    thought: str
    answer: str

    @property
    def share(self) -> float:
        """The thought's part of all characters, 0 to 1: times the new tokens it is about the tokens thought."""
        total = len(self.thought) + len(self.answer)
        return len(self.thought) / total if total else 0.0


@dataclass(frozen=True)
class _Tag:
    start: int
    end: int
    closes: bool


def split_think(text: str, opened: bool = False) -> Thought:
    """Split generated text. `opened`: the prompt itself ended in an open `<think>`.

    - A block ends where its tags are balanced, else at the first `</think>` (a second `<think>` that has no end
      of its own is noise: models repeat the one a template prefilled); without any it swallows the rest.
    - A `</think>` outside a block ends a thought that began at the end of the block before, or at the start of the
      text (some servers cut the opening off). With nothing after it and a block before, it is dropped.
    - A tag torn off by the end of the text (from `<thi` on) is a tag, and what it opens or should have closed is
      unclosed.
    - Of several blocks the worst kind is reported: unclosed, then closed, then empty.

    Splitting an answer again changes nothing, unless taking a block out joined text into a new tag or fence.
    """
    tags = _tags(text)
    inside: list[str] = []
    outside: list[str] = []
    kinds: set[str] = set()
    at, next_tag = 0, 0  # where the text and the tags begin that are not dealt with yet

    def block(end: int, last: int, kind: str = "") -> None:
        body = _without(text, at, end, tags[next_tag:last])
        if kind == "unclosed":
            body = _TORN_IN_THOUGHT.sub("", body)
        inside.append(body.strip())
        kinds.add(kind or ("closed" if body.strip() else "empty"))

    while opened or next_tag < len(tags):
        if not opened:
            tag = tags[next_tag]
            if _fenced(text, at, tag.start):
                next_tag += 1
                continue
            if tag.closes and kinds and not text[tag.end :].strip():
                outside.append(text[at : tag.start])
            elif tag.closes:
                block(tag.start, next_tag)
            else:
                outside.append(text[at : tag.start])
                opened = True
            at, next_tag = tag.end, next_tag + 1
            continue
        opened = False
        last = _end_of_block(tags, next_tag)
        if last is None:
            block(len(text), len(tags), "unclosed")
            at, next_tag = len(text), len(tags)
        else:
            block(tags[last].start, last)
            at, next_tag = tags[last].end, last + 1

    rest = text[at:]
    torn = _TORN.search(rest)
    if torn and not _fenced(text, at, at + torn.start()):
        if torn["close"] and not kinds:
            block(len(text), next_tag, "unclosed")
            rest = ""
        else:
            rest = rest[: torn.start()]
            if not torn["close"]:
                kinds.add("unclosed")
    outside.append(rest)
    answer = "".join(outside).strip()
    kind = next((kind for kind in ("unclosed", "closed", "empty") if kind in kinds), "")
    if not kind:
        kind = "untagged" if reasons_openly(answer) else "none"
    return Thought(kind, "\n".join(part for part in inside if part), answer)


def ends_open(prompt: str) -> bool:
    """Whether a prompt leaves a think block open for the model to go on in: it ends in the tag (a question may talk
    about `<think>` as well)."""
    return prompt.rstrip().endswith(OPEN)


def _tags(text: str) -> list[_Tag]:
    """Tags that are not merely mentioned."""
    code = [match.span() for match in _INLINE_CODE.finditer(text)] if "`" in text else []
    found: list[_Tag] = []
    after = 0  # the end of a mention that holds several tags
    for match in _TAG.finditer(text):
        start, end = match.span()
        mentioned = _mention(text, start, end, bool(match["close"]))
        after = max(after, mentioned)
        if start >= after and not any(a < start and end < b for a, b in code):
            found.append(_Tag(start, end, bool(match["close"])))
    return found


def _mention(text: str, start: int, end: int, closes: bool) -> int:
    """Where the mention ends that this tag is or begins; 0 if it is none."""
    quote = _QUOTES.get(text[start - 1]) if start else None
    if quote and text.startswith(quote, end):
        return end
    if _CALLED.match(text, end) and (not closes or _in_line(text, start)):
        return end
    if closes:
        return 0
    pair = _PAIR.match(text, end)
    if pair and (pair["word"] in ("and", "or", "to", *"和与或及到、") or _CALLED.match(text, pair.end())):
        return pair.end()
    quoted = _QUOTED_PAIR.match(text, end) if quote else None
    if quoted and text.startswith(str(quote), quoted.end()):
        return quoted.end()
    return 0


def _in_line(text: str, start: int) -> bool:
    """Whether a word and a blank, or a Chinese character, stand before it in its line."""
    before = text[text.rfind("\n", 0, start) + 1 : start]
    return bool(re.search(r"\w[ \t]$|[\u4e00-\u9fff]$", before))


def _fenced(text: str, begin: int, at: int) -> bool:
    """Whether a code fence that opened at or after `begin` is open at `at`."""
    fence = ""
    for match in _FENCE.finditer(text, begin, at):
        mark = match[1]
        if not fence:
            fence = mark
        elif mark[0] == fence[0] and len(mark) >= len(fence):
            fence = ""
    return bool(fence)


def _end_of_block(tags: list[_Tag], first: int) -> int | None:
    """The index of the tag that closes the block which tags[first:] follow."""
    depth = 1
    for index in range(first, len(tags)):
        depth += -1 if tags[index].closes else 1
        if depth == 0:
            return index
    return next((index for index in range(first, len(tags)) if tags[index].closes), None)


def _without(text: str, start: int, end: int, tags: list[_Tag]) -> str:
    """text[start:end] without these tags, which lie in it."""
    parts = []
    for tag in tags:
        parts.append(text[start : tag.start])
        start = tag.end
    return "".join([*parts, text[start:end]])
