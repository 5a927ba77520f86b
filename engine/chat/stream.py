"""From the bytes of tokens to text that may be shown: whole characters, cut at stop strings, think spans counted."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

OPEN, CLOSE = "<think>", "</think>"


class TextStream:
    """Puts an answer together. `push` each token's bytes, then `finish`; both return the text to show now.

    A character's bytes may come in several tokens; bytes that are no UTF-8 become "\ufffd". Text that may be the
    beginning of a stop string waits until that is decided; the stop string itself is never shown.
    """

    def __init__(self, stop: Sequence[str] = (), thinking: bool = False) -> None:
        self.stopped = False
        self.think_tokens = 0
        self._stop = tuple(mark for mark in stop if mark)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._thinking = thinking
        self._tail = ""

    @property
    def thinking(self) -> bool:
        """Whether a think block is open."""
        return self._thinking

    def push(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        self._count(text)
        return self._release(text)

    def finish(self) -> str:
        """The rest: text that only looked like a stop string, and a torn last character."""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(mark) for mark in self._stop) if at >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        keep = max((_overlap(self._held, mark) for mark in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _count(self, text: str) -> None:
        """Count this token when a think block is open before and after it; the tags themselves do not count."""
        before = self._thinking
        self._tail += text
        while (at := self._tail.find(CLOSE if self._thinking else OPEN)) >= 0:
            self._tail = self._tail[at + len(CLOSE if self._thinking else OPEN) :]
            self._thinking = not self._thinking
        self._tail = self._tail[-(len(CLOSE) - 1) :]
        self.think_tokens += before and self._thinking


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt itself ends inside a think block (some templates prefill the opening tag)."""
    return prompt.rstrip().endswith(OPEN)
