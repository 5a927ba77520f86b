"""Small state that is not a result, under XDG state: the last selection of each workspace, the theme, the last
copied command. Losing it loses nothing, so a file that cannot be read or written is passed over.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.atomic import write_json
from engine.workspace import state_dir
from tui.snapshots import Selection


def _file(root: Path) -> Path:
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return state_dir() / f"selection-{name}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        write_json(path, value)
    except OSError:
        pass


def selection(root: Path) -> Selection:
    """What was chosen here last time; folders that are gone count as not chosen."""
    try:
        raw = _read(_file(root))
    except OSError:
        return Selection()
    paths = {
        key: raw[key]
        for key in ("base", "pt", "sft")
        if isinstance(raw.get(key), str) and raw[key] and Path(raw[key]).is_dir()
    }
    return Selection(**paths)


def save_selection(root: Path, chosen: Selection) -> None:
    try:
        _write(_file(root), {"workspace": str(root), "base": chosen.base, "pt": chosen.pt, "sft": chosen.sft})
    except OSError:
        pass


def notes(root: Path, name: str) -> dict[str, Any]:
    """What a screen (`name`) left here for its next time in this workspace; {} when nothing."""
    try:
        return _read(_file(root).with_name(f"{name}-{_file(root).stem.partition('-')[2]}.json"))
    except OSError:
        return {}


def save_notes(root: Path, name: str, values: dict[str, Any]) -> None:
    """Leave values for the next time; they are all replaced."""
    try:
        _write(_file(root).with_name(f"{name}-{_file(root).stem.partition('-')[2]}.json"), values)
    except OSError:
        pass


def theme(default: str) -> str:
    try:
        return str(_read(state_dir() / "theme.json").get("theme") or default)
    except OSError:
        return default


def save_theme(name: str) -> None:
    try:
        _write(state_dir() / "theme.json", {"theme": name})
    except OSError:
        pass


def save_command(line: str) -> Path | None:
    """Write the command line where a person can pick it up; None when that was not possible."""
    try:
        path = state_dir() / "command.sh"
        path.write_text(line + "\n", encoding="utf-8")
        return path
    except OSError:
        return None
