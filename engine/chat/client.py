"""The app's side of a chat child: start it, open panes, ask, stop. Asyncio, and nothing heavy is imported.

    model = ChatModel(path, adapters={"pt": lora}, stderr_path=log)
    await model.start()
    await model.open("left")
    await model.set_scales("left", {"pt": 0.3})
    async for event in model.ask("left", messages, "model", Sampling()):
        ...  # Token, Token, ..., then Done or Failed

A child that dies answers everything that was asked of it with Failed, with its last words; `start` again makes a
new one. Other children are other processes and do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.chat.protocol import Done, Event, Failed, Loaded, Ok, Sampling, Token, from_line
from engine.errors import BadInputError, ChildFailedError, MedmergeError

Message = Mapping[str, str]
DEFAULT_CONTEXT = 4096
_LINE_LIMIT = 1 << 24
_CLOSE_SECONDS = 2.0

__all__ = ["ChatModel", "Done", "Event", "Failed", "Loaded", "Sampling", "Token"]


class ChatModel:
    """One model file in a process of its own. All methods belong to one event loop.

    Args:
        path: the GGUF.
        adapters: LoRA GGUFs by label; they start with scale 0 in every pane.
        stderr_path: where the child's stderr goes (emptied at each start).
        context: tokens of each pane's memory (at most what the model was trained for).
        threads: cores to use in all, 0 for all there are; panes that answer at once share them.
        gpu_layers: layers to offload where the build can, -1 for all.
    """

    def __init__(
        self,
        path: Path,
        adapters: Mapping[str, Path] | None = None,
        stderr_path: Path | None = None,
        context: int = DEFAULT_CONTEXT,
        threads: int = 0,
        gpu_layers: int = -1,
    ) -> None:
        self.path = path
        self.adapters = dict(adapters or {})
        self.loaded: Loaded | None = None
        self._stderr_path = stderr_path
        self._context, self._threads, self._gpu_layers = context, threads, gpu_layers
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Queue[Event]] = {}
        self._asking: dict[str, int] = {}
        self._panes: set[str] = set()
        self._number = 0
        self._death: Failed | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the child runs and the model is loaded."""
        return self._process is not None and self._process.returncode is None and self.loaded is not None

    @property
    def panes(self) -> frozenset[str]:
        return frozenset(self._panes)

    async def start(self) -> Loaded:
        """Start the child and load the model and adapters; a child that runs, or is just starting, is kept.

        Raises BadInputError (the file is no model, an adapter does not fit) or ChildFailedError (it died).
        """
        async with self._starting:
            return self.loaded if self.alive and self.loaded else await self._start()

    async def _start(self) -> Loaded:
        await self.close()
        self._death = None
        root = str(Path(__file__).resolve().parents[2])
        # Waiting threads sleep: spinning ones make two threads five times slower beside a training run.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
        if self._stderr_path:
            self._stderr_path.parent.mkdir(parents=True, exist_ok=True)
        stderr = self._stderr_path.open("wb") if self._stderr_path else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "engine.chat.child",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr or asyncio.subprocess.DEVNULL,
                env=environment,
                limit=_LINE_LIMIT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ChildFailedError(f"cannot start a chat process: {error}") from error
        finally:
            if stderr:
                stderr.close()
        self._reader = asyncio.create_task(self._read(self._process), name=f"chat {self.path.name}")
        try:
            event = await self._request(
                "load",
                model=str(self.path.absolute()),
                adapters={label: str(Path(path).absolute()) for label, path in self.adapters.items()},
                threads=self._threads,
                gpu_layers=self._gpu_layers,
            )
        except BaseException:
            await self.close()
            raise
        assert isinstance(event, Loaded)
        self.loaded = event
        return event

    async def open(self, pane: str, context: int = 0) -> int:
        """Open a pane with a memory of its own; returns its length in tokens."""
        event = await self._request("open", pane=pane, context=context or self._context)
        self._panes.add(pane)
        return event.context if isinstance(event, Ok) else 0

    async def set_scales(self, pane: str, scales: Mapping[str, float]) -> None:
        """Set the adapters' weights of a pane (labels left out are 0); clears its memory if they changed. About 1 ms.

        Waits for an answer that is under way in that pane. Raises BadInputError for an unknown label.
        """
        await self._request("scales", pane=pane, scales={label: float(w) for label, w in scales.items()})

    async def ask(
        self,
        pane: str,
        messages: Sequence[Message],
        template: str = "model",
        sampling: Sampling | None = None,
    ) -> AsyncIterator[Token | Done | Failed]:
        """Stream the answer to a conversation: Token events, then one Done or Failed (also when the child dies).

        `template` is "model" (the file's own) or a name of engine.templates. Leaving the loop early stops the
        answer.
        """
        number, answers = self._next()
        self._asking[pane] = number
        finished = False
        try:
            try:
                await self._send(
                    number,
                    "ask",
                    pane=pane,
                    messages=[dict(message) for message in messages],
                    template=template,
                    sampling=asdict(sampling or Sampling()),
                )
            except ChildFailedError as error:
                finished = True
                yield Failed(error.message, error.hint)
                return
            while not finished:
                event = await answers.get()
                finished = isinstance(event, Done | Failed)
                if isinstance(event, Token | Done | Failed):
                    yield event
        finally:
            self._waiting.pop(number, None)
            if self._asking.get(pane) == number:
                del self._asking[pane]
            if not finished:
                with contextlib.suppress(ChildFailedError):
                    self._post("stop", pane=pane, ask=number)

    def stop(self, pane: str) -> None:
        """Stop the answer under way in a pane, if any; its stream then ends with Done(reason="stopped")."""
        number = self._asking.get(pane)
        if number is not None and self._process and self._process.returncode is None:
            with contextlib.suppress(ChildFailedError):
                self._post("stop", pane=pane, ask=number)

    async def close_pane(self, pane: str) -> None:
        """Close a pane and free its memory; an answer under way is stopped."""
        self.stop(pane)
        await self._request("close", pane=pane)
        self._panes.discard(pane)

    async def close(self) -> None:
        """End the child. Safe to call at any time, more than once."""
        process, self._process, self.loaded = self._process, None, None
        self._panes.clear()
        if process is None:
            return
        if process.stdin:
            process.stdin.close()  # the child ends when its input does
        try:
            await asyncio.wait_for(process.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._reader:
            await self._reader
            self._reader = None

    def _next(self) -> tuple[int, asyncio.Queue[Event]]:
        self._number += 1
        answers: asyncio.Queue[Event] = asyncio.Queue()
        self._waiting[self._number] = answers
        return self._number, answers

    async def _request(self, op: str, **fields: Any) -> Event:
        """Send and wait for the one answer. Raises what Failed stands for."""
        number, answers = self._next()
        try:
            await self._send(number, op, **fields)
            event = await answers.get()
        finally:
            self._waiting.pop(number, None)
        if isinstance(event, Failed):
            kind: type[MedmergeError] = BadInputError if event.exit_code == 2 else ChildFailedError
            raise kind(event.message, event.hint)
        return event

    async def _send(self, number: int, op: str, **fields: Any) -> None:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(_line(number, op, fields))
        with contextlib.suppress(ConnectionError):  # the reader finds out, and answers with the reason
            await process.stdin.drain()

    def _post(self, op: str, **fields: Any) -> None:
        """Send without waiting; the answer is dropped."""
        process = self._running()
        self._number += 1
        assert process.stdin is not None
        process.stdin.write(_line(self._number, op, fields))

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None or self._death:
            message = self._death.message if self._death else f"{self.path.name} is not loaded"
            raise ChildFailedError(message, "start the model again")
        return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand every line to the request it answers, until the child ends; then tell those that still wait."""
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                try:
                    number, event = from_line(json.loads(line))
                except ValueError:
                    continue  # not ours
                if number in self._waiting:
                    self._waiting[number].put_nowait(event)
        except ValueError:  # a line beyond the limit: the protocol is broken
            process.kill()
        code = await process.wait()
        self._death = Failed(
            self._obituary(code), "start it again; if it happens again, try a shorter context"
        )
        self.loaded = None
        self._panes.clear()
        for answers in list(self._waiting.values()):
            answers.put_nowait(self._death)

    def _obituary(self, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        words = last_lines(self._stderr_path) if self._stderr_path else ""
        return f"the chat process of {self.path.name} {how}" + (f"; its last words: {words}" if words else "")


def last_lines(path: Path, count: int = 3, limit: int = 400) -> str:
    """The last lines of a log, as one line of at most `limit` characters ("" when there is none)."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-limit:]


def _line(number: int, op: str, fields: Mapping[str, Any]) -> bytes:
    return (json.dumps({"id": number, "op": op, **fields}) + "\n").encode()
