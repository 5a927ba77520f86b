"""Text from models, adapters and files is data: nothing in it may reach the terminal as a command.

`plain` for anything printed or shown; Textual widgets get the result with markup off.
"""

from __future__ import annotations

import unicodedata

_KEPT = {"\n", "\t"}
# Direction overrides and isolates can make a file name read as another one.
_BIDI = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: str, lines: bool = False) -> str:
    """`text` without control characters (escape sequences, C1, bidi controls), which show as "�".

    Newlines and tabs become spaces unless `lines` is true. Printable text of any script is kept.
    """
    out = []
    for char in text:
        if char in _KEPT:
            out.append(char if lines else " ")
        elif char in _BIDI or unicodedata.category(char) in ("Cc", "Cs") or char in "\u2028\u2029":
            out.append("\ufffd")
        else:
            out.append(char)
    return "".join(out)
