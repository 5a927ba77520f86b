"""No text of a model or file can command the terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tui.safe_text import plain


def test_escape_sequences_lose_their_escape() -> None:
    assert plain("a\x1b[31mb\x9b2Jc\x07") == "a�[31mb�2Jc�"
    assert plain("one\ntwo\tx") == "one two x"
    assert plain("one\ntwo", lines=True) == "one\ntwo"
    assert plain("abc\u202egnp.exe") == "abc�gnp.exe"
    assert plain("心肌梗死 é 👩‍⚕️") == "心肌梗死 é 👩‍⚕️"


@given(st.text())
def test_what_remains_is_printable(text: str) -> None:
    shown = plain(text)
    assert len(shown) == len(text)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
