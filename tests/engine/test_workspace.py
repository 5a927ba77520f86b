"""Where a workspace is found and what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import BadInputError
from engine.workspace import FOLDERS, Workspace


def test_found_by_argument_then_environment_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDMERGE_WORKSPACE", str(tmp_path / "env"))
    assert Workspace.find(tmp_path / "arg").root == tmp_path / "arg"
    assert Workspace.find().root == tmp_path / "env"
    monkeypatch.delenv("MEDMERGE_WORKSPACE")
    assert Workspace.find().root == tmp_path / "medmerge-workspace"


def test_create_makes_the_folders_and_keeps_what_is_there(tmp_path: Path) -> None:
    workspace = Workspace.find(tmp_path / "w").create()
    assert {p.name for p in workspace.root.iterdir() if p.is_dir()} == set(FOLDERS)
    (workspace.root / "workspace.toml").write_text('[extra]\nbases = ["../models", "/abs"]\n')
    workspace.create()
    assert workspace.places("bases")[1:] == [workspace.root / "../models", Path("/abs")]
    assert workspace.places("adapters") == [workspace.adapters]


@pytest.mark.parametrize("text", ["not toml [", "[extra]\nbases = 3", "[extra]\nbases = [3]"])
def test_a_broken_workspace_file_is_named(tmp_path: Path, text: str) -> None:
    workspace = Workspace.find(tmp_path / "w").create()
    (workspace.root / "workspace.toml").write_text(text)
    with pytest.raises(BadInputError, match=r"workspace\.toml"):
        workspace.places("bases")


def test_a_file_is_no_workspace(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(BadInputError, match="not a folder"):
        Workspace.find(tmp_path / "f")
