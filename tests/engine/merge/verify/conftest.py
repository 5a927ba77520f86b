"""Fixtures for the verifier: a base, two adapters, and merges of them (see scenes.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.merge.verify import quick
from tests.engine.merge.verify.scenes import MakeScene, Scene, make_base, make_lora, save_model


@pytest.fixture
def make_scene(tmp_path: Path) -> MakeScene:
    """`make_scene(b_std=.02, base_dtype=..., pt={...}, sft={...})`: base and adapters in a temporary folder."""

    def make(
        b_std: float = 0.02,
        base_dtype: torch.dtype = torch.bfloat16,
        pt: dict[str, Any] | None = None,
        sft: dict[str, Any] | None = None,
        seed: int = 0,
        folder: str = "scene",
        drop: tuple[str, ...] = (),
        **config: Any,
    ) -> Scene:
        root = tmp_path / folder
        if root.exists():  # hypothesis may come back to the same numbers
            root = Path(tempfile.mkdtemp(dir=tmp_path))
        base = {name: tensor for name, tensor in make_base(seed, base_dtype).items() if name not in drop}
        loras = {
            "pt": make_lora(root / "pt", seed + 1, **{"b_std": b_std, **(pt or {})}),
            "sft": make_lora(root / "sft", seed + 2, **{"b_std": b_std, **(sft or {})}),
        }
        return Scene(root, base, loras, save_model(root / "base", base, **config))

    return make


@pytest.fixture
def scene(make_scene: MakeScene) -> Scene:
    """The usual one: bfloat16, B std .02, rank 8, both adapters on every linear layer."""
    return make_scene()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`use("plain")` takes numpy from here on, `use("")` the compiled loops, or skips where there are none."""

    def choose(kind: str) -> None:
        monkeypatch.setenv("MEDMERGE_KERNEL", kind)
        quick.compiled.cache_clear()
        if not kind and quick.compiled() is None:
            pytest.skip("not compiled here")

    yield choose
    monkeypatch.undo()
    quick.compiled.cache_clear()
