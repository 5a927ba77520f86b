"""The two themes, and the colours that mean something: PT and SFT keep theirs on every screen.

`$pt` and `$sft` may be used in any style (TCSS or Content); themes that do not define them get the defaults.
"""

from __future__ import annotations

from textual.theme import Theme

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
VARIABLE_DEFAULTS = {"pt": "#62a8e5", "sft": "#e8955a", "faint": "#858b9d", "rule": "#50556a"}

LABEL_STYLE = {"pt": "$pt", "sft": "$sft"}


def label_style(label: str) -> str:
    """The style of an adapter label: `$pt` and `$sft` for those two, `$foreground` for any other."""
    return LABEL_STYLE.get(label.lower(), "$foreground")
