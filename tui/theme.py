"""The two themes, and the colours that mean something: PT and SFT keep theirs on every screen.

`$pt` and `$sft` may be used in any style (TCSS or Content); themes that do not define them get the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping

from textual.theme import Theme

# Several runs of one kind in one plot: shades of the kind's colour, as $pt-2, $pt-3, ...; `other` is of unknown kind.
DARK_SHADES = {
    "pt": ("#62a8e5", "#aed6f5", "#3f74c9", "#55c7cf"),
    "sft": ("#e8955a", "#f5cda8", "#bd6633", "#e6b84d"),
    "other": ("#a99fd6", "#d6cff0", "#7e70b8", "#c58fd0"),
}
LIGHT_SHADES = {
    "pt": ("#1f6fb2", "#6aaede", "#123f6b", "#12868f"),
    "sft": ("#b4541a", "#e0935f", "#6e300c", "#96740a"),
    "other": ("#6a5bb0", "#a398d6", "#3d3275", "#8d4a9b"),
}


def _shades(of: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """{"pt-2": ..., "pt-3": ..., "other": ...}: all but the first of PT and SFT, which have names of their own."""
    return {
        kind if number == 1 else f"{kind}-{number}": colour
        for kind, colours in of.items()
        for number, colour in enumerate(colours, 1)
        if number > 1 or kind == "other"
    }


DARK = Theme(
    name="medmerge-dark",
    primary="#a99fd6",
    secondary="#7f86a0",
    accent="#a99fd6",
    warning="#d8bd5a",
    error="#e5677d",
    success="#7fbf7f",
    foreground="#d5d8e0",
    background="#14161c",
    surface="#14161c",
    panel="#1d2028",
    dark=True,
    variables={
        "pt": "#62a8e5",
        "sft": "#e8955a",
        **_shades(DARK_SHADES),
        "faint": "#878ea3",
        "rule": "#2c303b",
        "block-cursor-foreground": "#f2f3f7",
        "block-cursor-background": "#343148",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#23242f",
        "block-hover-background": "#1d2028",
        "input-selection-background": "#a99fd6 30%",
        "scrollbar": "#3a3f4d",
        "scrollbar-hover": "#565c6e",
        "scrollbar-active": "#a99fd6",
        "scrollbar-background": "#14161c",
        "scrollbar-background-hover": "#14161c",
        "scrollbar-background-active": "#14161c",
        "scrollbar-corner-color": "#14161c",
    },
)

LIGHT = Theme(
    name="medmerge-light",
    primary="#6a5bb0",
    secondary="#6b7183",
    accent="#6a5bb0",
    warning="#8a6d00",
    error="#b3243f",
    success="#2f7d3a",
    foreground="#22252d",
    background="#fafaf7",
    surface="#fafaf7",
    panel="#efefea",
    dark=False,
    variables={
        "pt": "#1f6fb2",
        "sft": "#b4541a",
        **_shades(LIGHT_SHADES),
        "faint": "#6b7183",
        "rule": "#d9d9d2",
        "block-cursor-foreground": "#14161c",
        "block-cursor-background": "#dcd6f2",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#e9e7f1",
        "block-hover-background": "#efefea",
        "input-selection-background": "#6a5bb0 25%",
        "scrollbar": "#cfcfc8",
        "scrollbar-hover": "#b5b5ae",
        "scrollbar-active": "#6a5bb0",
        "scrollbar-background": "#fafaf7",
        "scrollbar-background-hover": "#fafaf7",
        "scrollbar-background-active": "#fafaf7",
        "scrollbar-corner-color": "#fafaf7",
    },
)

THEMES = (DARK, LIGHT)

# For themes of others (the palette offers Textual's own): meaning keeps a colour there too.
VARIABLE_DEFAULTS = {
    "pt": "#62a8e5", "sft": "#e8955a", "faint": "#858b9d", "rule": "#50556a", **_shades(DARK_SHADES),
}  # fmt: skip

LABEL_STYLE = {"pt": "$pt", "sft": "$sft"}


def label_style(label: str) -> str:
    """The style of an adapter label: `$pt` and `$sft` for those two, `$foreground` for any other."""
    return LABEL_STYLE.get(label.lower(), "$foreground")
