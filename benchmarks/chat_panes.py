"""Two panes at once against llama.cpp alone, and what a second and third pane cost in memory.

    python benchmarks/chat_panes.py MODEL.gguf [--tokens 64]

Floor: one context in this process through the same llama.cpp, no child and no JSON. Rows:
tokens per second of one pane, of two panes together (each, and their sum), and the child's memory
(RSS) with 1, 2 and 3 panes: the weights are there once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import psutil

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the app sets it for its child

from engine.chat.client import ChatModel, Done, Sampling

QUESTION = [{"role": "user", "content": "What are the symptoms of asthma, and how is it treated?"}]


def alone(path: Path, tokens: int) -> float:
    """Greedy tokens per second of one context in this process."""
    from engine.chat.runtime import Model

    with Model(path) as model, model.context(1024) as context:
        context.feed(model.tokenize("What are the symptoms of asthma, and how is it treated?"))
        started = time.perf_counter()
        for _ in range(tokens):
            context.feed([int(context.logits().argmax())])
        return tokens / (time.perf_counter() - started)


async def rate(model: ChatModel, pane: str, tokens: int) -> float:
    async for event in model.ask(pane, QUESTION, "model", Sampling(temperature=1.0, max_tokens=tokens)):
        if isinstance(event, Done):
            return event.tokens_per_s
    raise SystemExit("no answer")


def memory(pid: int) -> float:
    """RSS in MB; it holds the mapped file's pages once."""
    return psutil.Process(pid).memory_info().rss / 1e6


async def panes(path: Path, tokens: int) -> None:
    model = ChatModel(path, context=1024)
    await model.start()
    assert model.pid
    sizes = []
    for pane in ("one", "two", "three"):
        await model.open(pane)
        await rate(model, pane, 8)
        sizes.append(memory(model.pid))
    one = await rate(model, "one", tokens)
    both = await asyncio.gather(rate(model, "one", tokens), rate(model, "two", tokens))
    await model.close()
    floor = alone(path, tokens)
    print(f"{'':34}{'tok/s':>8}{'x alone':>9}")
    print(f"{'llama.cpp alone, in one process':34}{floor:8.1f}{1:9.2f}")
    print(f"{'one pane':34}{one:8.1f}{one / floor:9.2f}")
    for name, value in zip(("left", "right"), both, strict=True):
        print(f"{'two panes at once: ' + name:34}{value:8.1f}{value / floor:9.2f}")
    print(f"{'two panes at once: sum':34}{sum(both):8.1f}{sum(both) / floor:9.2f}")
    print(f"\n{'':34}{'RSS MB':>8}   (the file: {path.stat().st_size / 1e6:.0f} MB)")
    for count, size in enumerate(sizes, 1):
        print(f"{f'{count} pane(s) of 1,024 tokens':34}{size:8.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    asyncio.run(panes(arguments.model, arguments.tokens))
