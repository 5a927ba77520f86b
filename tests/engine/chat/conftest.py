"""A small random model and two adapters as GGUF, for chats that need no sense, only speed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.chat.client import ChatModel
from engine.gguf.convert import Conversion, convert
from engine.gguf.lora import convert_adapter
from engine.jobs.events import EventWriter
from tests.conftest import MakeAdapter


@dataclass(frozen=True)
class Files:
    base: Path
    loras: dict[str, Path]


@pytest.fixture(scope="session")
def files(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("chat")
    convert(Conversion.plan(tiny_llama), folder / "base.gguf", "f32", EventWriter())
    loras = {}
    for seed, label in enumerate(("pt", "sft")):
        loras[label] = folder / f"{label}.gguf"
        adapter = make_adapter(tiny_llama, b_std=0.3, seed=seed)
        convert_adapter(adapter, tiny_llama, loras[label], "f32", EventWriter())
    return Files(folder / "base.gguf", loras)


StartChat = Callable[..., Awaitable[ChatModel]]


@pytest.fixture
async def start_chat(files: Files, tmp_path: Path) -> AsyncIterator[StartChat]:
    """Starts chats on the tiny model (or `path=`); they are closed when the test ends."""
    started: list[ChatModel] = []

    async def start(path: Path | None = None, **options: Any) -> ChatModel:
        options = {"adapters": files.loras, "stderr_path": tmp_path / f"chat{len(started)}.log", **options}
        model = ChatModel(path or files.base, **options)
        started.append(model)
        await model.start()
        return model

    yield start
    for model in started:
        await model.close()
