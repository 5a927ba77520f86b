"""What a chat process runs: `python -P -m engine.chat.child`. JSON lines on stdin and stdout (see protocol).

One model with its adapters, one thread and one llama.cpp context per pane, so that panes stream at once and
share the weights. Ends when stdin ends: a dead app leaves no model behind. llama.cpp's own output goes to
stderr, which the parent sends to a file.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from engine import templates
from engine.chat.protocol import Done, Event, Failed, Loaded, Ok, Sampling, Token, to_line
from engine.chat.runtime import BATCH, Context, Model, Sampler, supports_gpu
from engine.chat.stream import TextStream, opens_thinking
from engine.errors import BadInputError, MedmergeError


class Channel:
    """Writes events to the parent; a line is written whole, whichever thread it comes from."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, request: int, event: Event) -> None:
        line = json.dumps(to_line(request, event))
        with self._lock:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except (OSError, ValueError):  # the parent is gone
                os._exit(0)


class Cores:
    """Divides the cores among the panes that are answering right now."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._active = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Cores:
        with self._lock:
            self._active += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active -= 1

    @property
    def share(self) -> int:
        return max(1, self.total // max(1, self._active))


class Pane:
    """One conversation: a context, a thread, and the requests that wait for it."""

    def __init__(self, name: str, context: Context, cores: Cores, channel: Channel) -> None:
        self.name, self.context = name, context
        self._cores, self._channel = cores, channel
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stopped: set[int] = set()
        self._last_prompt: list[int] = []
        self._threads = 0
        self._thread = threading.Thread(target=self._work, name=f"pane {name}", daemon=True)
        self._thread.start()

    def put(self, request: dict[str, Any]) -> None:
        self._requests.put(request)

    def stop(self, ask: int) -> None:
        """End that answer at the next token, or before it begins."""
        self._stopped.add(ask)

    def close(self) -> None:
        """End the thread and free the context; an answer under way ends with the requests before it."""
        self._requests.put(None)
        self._thread.join()
        self.context.close()

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            number = int(request["id"])
            try:
                if request["op"] == "scales":
                    scales = {str(label): float(scale) for label, scale in dict(request["scales"]).items()}
                    self.context.set_scales(scales)
                    self._channel.send(number, Ok(self.context.size))
                else:
                    self._channel.send(number, self._answer(number, request))
            except MedmergeError as error:
                self._channel.send(number, Failed(error.message, error.hint, error.exit_code))
            except Exception as error:  # noqa: BLE001  the boundary of this pane: others go on
                self._channel.send(number, Failed(f"{type(error).__name__}: {error}"))
            self._stopped.discard(number)

    def _answer(self, number: int, request: dict[str, Any]) -> Done:
        sampling = Sampling(**request["sampling"])
        template = self._template(str(request["template"]))
        prompt = template.prompt(request["messages"])
        tokens = self.context.model.tokenize(prompt)
        if not tokens:
            raise BadInputError("the prompt is empty")
        if len(tokens) >= self.context.size:
            raise BadInputError(
                f"the conversation has {len(tokens)} tokens, and this context holds {self.context.size}",
                "start a new conversation, or a longer context",
            )
        stream = TextStream(template.stop, opens_thinking(prompt))
        with self._cores:
            started = time.monotonic()
            reused = self._recall(tokens)
            reason = self._read(number, tokens[reused:])
            read = time.monotonic()
            count, reason = self._write(number, sampling, stream, reason)
        seconds = time.monotonic() - read
        rest = stream.finish()
        if rest:
            self._channel.send(number, Token(rest))
        return Done(
            reason=reason,
            tokens=count,
            tokens_per_s=round(count / seconds, 2) if count and seconds > 0 else 0.0,
            prompt_tokens=len(tokens),
            think_tokens=stream.think_tokens,
            prompt_s=round(read - started, 4),
            reused_tokens=reused,
        )

    def _template(self, name: str) -> templates.Template:
        if name != "model":
            return templates.load(name)
        text = self.context.model.chat_template
        if not text:
            raise BadInputError(
                f"{self.context.model.path.name} carries no chat template",
                f"choose one: {', '.join(sorted(templates.BUILTIN))}",
            )
        return templates.from_jinja(text, self.context.model.special_tokens())

    def _recall(self, tokens: list[int]) -> int:
        """Keep what the memory holds of an earlier turn of this conversation; returns how many tokens.

        Only a whole earlier prompt is kept, and generated tokens are read again as text: so an answer depends on
        the conversation, and not on how it came about.
        """
        before = self._last_prompt
        held = len(before) if before and len(tokens) > len(before) and tokens[: len(before)] == before else 0
        if held and self.context.tokens[:held] == before:
            self.context.keep(held)
        else:
            held = 0
            self.context.clear()
        self._last_prompt = []
        return held

    def _read(self, number: int, tokens: list[int]) -> str:
        """Read the prompt in batches; returns "stopped" when the user stopped it, else ""."""
        for first in range(0, len(tokens), BATCH):
            if number in self._stopped:
                return "stopped"
            self._use_share()
            self.context.feed(tokens[first : first + BATCH])
        self._last_prompt = list(self.context.tokens)
        return ""

    def _write(self, number: int, sampling: Sampling, stream: TextStream, reason: str) -> tuple[int, str]:
        """Generate and send text; returns the number of tokens and why it ended."""
        count = 0
        sampler = Sampler(sampling)
        try:
            while not reason:
                token = sampler.draw(self.context)
                if self.context.model.ends(token):
                    return count, "end"
                count += 1
                text = stream.push(self.context.model.piece(token))
                if text:
                    self._channel.send(number, Token(text))
                if stream.stopped:
                    reason = "end"
                elif number in self._stopped:
                    reason = "stopped"
                elif count == sampling.max_tokens:
                    reason = "length"
                elif len(self.context.tokens) >= self.context.size:
                    reason = "context"
                else:
                    self._use_share()
                    self.context.feed([token])
        finally:
            sampler.close()
        return count, reason

    def _use_share(self) -> None:
        if self._threads != self._cores.share:
            self._threads = self._cores.share
            self.context.set_threads(self._threads)


class Server:
    """The requests of the parent, one after the other; panes do their work in their own threads."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._panes: dict[str, Pane] = {}
        self._model: Model | None = None
        self._cores = Cores(os.cpu_count() or 1)

    def load(self, request: dict[str, Any]) -> Loaded:
        if self._model is not None:
            raise BadInputError("a model is loaded already")
        started = time.monotonic()
        self._cores = Cores(int(request.get("threads") or 0) or available_cores())
        self._model = model = Model(Path(request["model"]), int(request.get("gpu_layers", -1)))
        for label, path in dict(request.get("adapters") or {}).items():
            model.load_adapter(str(label), Path(path))
        try:
            source = json.loads(model.metadata("medmerge.source") or "{}")
        except ValueError:
            source = {}
        return Loaded(
            name=model.metadata("general.name"),
            description=model.description,
            parameters=model.parameters,
            nbytes=model.nbytes,
            context=model.trained_context,
            adapters=model.adapters,
            has_template=bool(model.chat_template),
            gpu=supports_gpu() and int(request.get("gpu_layers", -1)) != 0,
            seconds=round(time.monotonic() - started, 3),
            source=source if isinstance(source, dict) else {},
        )

    def handle(self, request: dict[str, Any]) -> Event | None:
        """Answer a request, or None when a pane will. Raises MedmergeError for one that cannot be done."""
        if request["op"] == "load":
            return self.load(request)
        if self._model is None:
            raise BadInputError("no model is loaded")
        name = str(request["pane"])
        if request["op"] == "open":
            if name in self._panes:
                raise BadInputError(f"pane {name!r} is open already")
            context = self._model.context(int(request.get("context") or 4096), self._cores.total)
            self._panes[name] = Pane(name, context, self._cores, self._channel)
            return Ok(context.size)
        pane = self._panes.get(name)
        if pane is None:
            raise BadInputError(f"no pane {name!r} is open")
        if request["op"] in ("ask", "scales"):
            pane.put(request)
            return None
        if request["op"] == "stop":
            pane.stop(int(request["ask"]))
        elif request["op"] == "close":
            self._panes.pop(name).close()
        else:
            raise BadInputError(f"unknown request {request['op']!r:.40}")
        return Ok()


def available_cores() -> int:
    """Cores this process may use (respects taskset and containers)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl+c is the app's business; it sends `stop`
    try:
        os.nice(5)
    except OSError:
        pass
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever else prints must not break the lines
    server = Server(channel)
    for line in sys.stdin:
        number = -1
        try:
            request = json.loads(line)
            number = int(request["id"])
            if request["op"] == "quit":
                break
            event = server.handle(request)
            if event is not None:
                channel.send(number, event)
        except MedmergeError as error:
            channel.send(number, Failed(error.message, error.hint, error.exit_code))
        except (ValueError, KeyError, TypeError) as error:
            channel.send(number, Failed(f"malformed request: {error!r}", "", 2))
    sys.stderr.flush()
    os._exit(0)  # no destructors: llama.cpp may be working in another thread


if __name__ == "__main__":
    sys.exit(main())
