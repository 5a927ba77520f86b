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
from tests.conftest import MakeAdapter, build_model

LONG = 16384  # tokens: an answer that fills it takes seconds, so that it can be stopped or killed on its way


@dataclass(frozen=True)
class Files:
    checkpoint: Path
    base: Path
    loras: dict[str, Path]


@pytest.fixture(scope="session")
def files(make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = build_model("llama", folder / "tiny-llama", max_position_embeddings=LONG)
    convert(Conversion.plan(checkpoint), folder / "base.gguf", "f32", EventWriter())
    loras = {}
    for seed, label in enumerate(("pt", "sft")):
        loras[label] = folder / f"{label}.gguf"
        adapter = make_adapter(checkpoint, b_std=0.3, seed=seed)
        convert_adapter(adapter, checkpoint, loras[label], "f32", EventWriter())
    return Files(checkpoint, folder / "base.gguf", loras)


StartChat = Callable[..., Awaitable[ChatModel]]


@pytest.fixture
async def start_chat(files: Files, tmp_path: Path) -> AsyncIterator[StartChat]:
    """Starts chats on the tiny model (or `path=`); they are closed when the test ends."""
    started: list[ChatModel] = []

    async def start(path: Path | None = None, **options: Any) -> ChatModel:
        options = {
            "adapters": files.loras,
            "context": 256,
            "stderr_path": tmp_path / f"chat{len(started)}.log",
            **options,
        }
        model = ChatModel(path or files.base, **options)
        started.append(model)
        await model.start()
        return model

    yield start
    for model in started:
        await model.close()
