"""Where everything lives on disk: one plain folder a person can read.

    WORKSPACE/
      bases/ adapters/ merges/ gguf/ runs/ jobs/ data/     results and inputs
      workspace.toml                                        marks the folder; may name folders outside it

Found through `--workspace`, then `MEDMERGE_WORKSPACE`, then `./medmerge-workspace`. Small state that is
not a result (last screen, history) goes under XDG state, never here.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BadInputError

ENV_VAR = "MEDMERGE_WORKSPACE"
DEFAULT_NAME = "medmerge-workspace"
FOLDERS = ("bases", "adapters", "merges", "gguf", "runs", "jobs", "data")
MARKER = "workspace.toml"

_MARKER_TEXT = """\
# A medmerge workspace. Folders outside it can be named here; they are read, never copied or changed.
# [extra]
# bases = ["/models/qwen3-14b"]
# adapters = ["~/lora-out"]
# merges = []
# gguf = []
# data = []
"""


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace. Passed in everywhere; there is no global one."""

    root: Path

    @property
    def bases(self) -> Path:
        return self.root / "bases"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def merges(self) -> Path:
        return self.root / "merges"

    @property
    def gguf(self) -> Path:
        return self.root / "gguf"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @classmethod
    def find(cls, explicit: str | os.PathLike[str] | None = None) -> Workspace:
        """The workspace asked for, else `$MEDMERGE_WORKSPACE`, else `./medmerge-workspace`.

        The folder need not exist yet; `create()` makes it. Raises BadInputError if the path is a file.
        """
        chosen = explicit or os.environ.get(ENV_VAR) or DEFAULT_NAME
        root = Path(chosen).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise BadInputError(f"workspace {root} is a file, not a folder", "give a folder with --workspace")
        return cls(root)

    def create(self) -> Workspace:
        """Make the folders that are missing. Never touches what is there."""
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            marker = self.root / MARKER
            if not marker.exists():
                marker.write_text(_MARKER_TEXT, encoding="utf-8")
        except OSError as error:
            raise BadInputError(
                f"cannot make the workspace {self.root}: {error.strerror}",
                "choose a folder you can write to with --workspace",
            ) from error
        return self

    def places(self, kind: str) -> list[Path]:
        """The folder of this kind ("bases", "adapters", ...) and those workspace.toml adds, in that order."""
        found = [self.root / kind]
        marker = self.root / MARKER
        if marker.is_file():
            try:
                settings = tomllib.loads(marker.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise BadInputError(f"{marker} is not valid TOML: {error}", "correct or delete it") from error
            extra = settings.get("extra", {}).get(kind, [])
            if not isinstance(extra, list) or not all(isinstance(item, str) for item in extra):
                raise BadInputError(f"{marker}: extra.{kind} must be a list of paths")
            found += [(self.root / Path(item).expanduser()).absolute() for item in extra]
        return found


def state_dir() -> Path:
    """Where state that is not a result lives: $XDG_STATE_HOME/medmerge, made 0700 on first use."""
    base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    folder = Path(base) / "medmerge"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
