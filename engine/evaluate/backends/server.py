"""Runs text cells on an OpenAI-compatible server (vLLM, llama.cpp, SGLang, a hosted one). Called by bench.py.

Only texts are taken from a server: likelihoods of given tokens are not part of what such servers agree on.
With `completions` the prompt is our template's text, exactly as a checkpoint gets it; with `chat` the messages are
sent and the server's own template makes the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from engine import templates
from engine.errors import BadRecipeError, ServerError
from engine.evaluate.backends.client import FIRST_WAIT, Client, Refused, key_of
from engine.evaluate.cells import TEXT_KINDS, Cell
from engine.evaluate.config import Decoding, Server
from engine.evaluate.data import Sample
from engine.evaluate.prompts import messages_of, prompt_of
from engine.evaluate.rows import Row, answer_row, finished

_LENGTH = ("length", "max_tokens")
# No part of OpenAI's own API, but of most others', and some have defaults that change texts (llama-cpp-python's server
# punishes repetition, vLLM takes the model's generation_config): sent so that nothing is drawn otherwise than we say.
_EXTRA = ("top_k", "min_p", "repeat_penalty", "repetition_penalty")


class ServerBackend:
    """One server. base: the checkpoint whose template `model` is, where the run has one."""

    def __init__(
        self,
        server: Server,
        base: Path | None = None,
        log: Callable[[str], None] = lambda _: None,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.server, self.base, self.log, self.first_wait = server, base, log, first_wait

    def work(self, cell: Cell, samples: Sequence[Sample]) -> ServerWork:
        """The cell ready to run.

        Raises BadInputError when the key's variable is not set or the address is none, BadRecipeError for a kind
        or template that cannot be asked of a server, ServerError when it does not say which model it has.
        """
        if cell.kind not in TEXT_KINDS:
            raise BadRecipeError(
                f"server {self.server.name} cannot measure {cell.title}: only texts are taken from servers",
                "use the checkpoint or a GGUF file for likelihoods",
            )
        client = Client(
            self.server.url,
            key_of(self.server.key_env),
            self.server.timeout,
            self.server.retries,
            self.first_wait,
        )
        return ServerWork(
            client, self._model(client), self._template(cell), self.server, cell, samples, self.log
        )

    def _template(self, cell: Cell) -> templates.Template | None:
        """None where the server's own is used."""
        if self.server.api == "chat":
            return None
        if cell.template == "model" and self.base is None:
            raise BadRecipeError(
                f"server {self.server.name}: template 'model' is that of a base, and this config has none",
                f"name one (templates: [{next(iter(templates.BUILTIN))}]), or use the server's own: api: chat",
            )
        found = templates.load(cell.template, self.base)
        planned = cell.spec.get("template_sha256")
        if planned and templates.describe(found)["sha256"] != planned:
            raise BadRecipeError(
                f"server {self.server.name}: template {cell.template!r} changed since this run started",
                "start again under another --out",
            )
        return found

    def _model(self, client: Client) -> str:
        """The model's name, or that of the first the server lists."""
        if self.server.model:
            return self.server.model
        listed = client.get("/models").get("data")
        first = listed[0] if isinstance(listed, list) and listed else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str) or not name:
            raise ServerError(
                f"{self.server.url}/models lists no model", "name one in the config: model: NAME"
            )
        return _clean(name)


class ServerWork:
    """One cell on one server. A batch is as many requests as may run at a time; its rows come together.

    A prompt of the chat API is recorded as the JSON of its messages. Rows have `served`: the model that the server
    says answered.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        template: templates.Template | None,
        server: Server,
        cell: Cell,
        samples: Sequence[Sample],
        log: Callable[[str], None],
    ) -> None:
        self.client, self.model, self.server, self.cell, self.samples = client, model, server, cell, samples
        self._template, self._log = template, log
        self._refused: set[str] = set()
        self.prompts = [self._prompt(sample) for sample in samples]
        size = max(1, server.concurrency)
        self.batches = [list(range(n, min(n + size, len(samples)))) for n in range(0, len(samples), size)]

    def run(self, batch: Sequence[int]) -> list[Row]:
        """The rows of these samples. Raises ServerError when one request fails for good; the others are then ended."""
        pool = ThreadPoolExecutor(max_workers=len(batch))
        try:
            futures = [pool.submit(self._row, index) for index in batch]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception()]
            return [future.result() for future in failed or futures]
        except BaseException:  # also when the run is cancelled: nobody waits for answers that are not wanted
            self.client.stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prompt(self, sample: Sample) -> str:
        if self._template is None:
            return json.dumps(messages_of(self.cell, sample), ensure_ascii=False)
        return prompt_of(self.cell, sample, self._template)

    def _row(self, index: int) -> Row:
        sample, prompt = self.samples[index], self.prompts[index]
        answer = self._ask(index)
        raw, finish = _text(answer, self.server)
        raw = _clean(raw)
        usage = answer.get("usage")
        used = usage if isinstance(usage, dict) else {}
        served = answer.get("model")
        row = answer_row(
            self.cell, sample, prompt, raw, finish, _count(used.get("prompt_tokens")),
            _count(used.get("completion_tokens")),
        )  # fmt: skip
        row["served"] = _clean(served) if isinstance(served, str) and served else self.model
        return finished(sample, prompt, row)

    def _ask(self, index: int) -> dict[str, Any]:
        """The server's answer. Fields it says it does not know are left out from then on, if they ask for nothing."""
        body = self._body(index)
        path = "/chat/completions" if self._template is None else "/completions"
        while True:
            sent = {name: value for name, value in body.items() if name not in self._refused}
            try:
                return self.client.post(path, sent)
            except Refused as refused:
                named = [name for name in _EXTRA if name in sent and name in refused.words]
                asked_for = "top_k" in named and body["top_k"]
                if not named or asked_for or refused.status not in (400, 422):
                    raise
            if new := [name for name in named if name not in self._refused]:
                self._refused.update(new)
                self._log(
                    f"server {self.server.name} takes no {', '.join(new)}: its own defaults are in force"
                )

    def _body(self, index: int) -> dict[str, Any]:
        """What is sent. Every setting that draws is sent, so that no default of the server's mixes in silently."""
        decoding, sample = self.cell.decoding or Decoding("greedy"), self.samples[index]
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "stream": False,
            "repeat_penalty": 1.0,
            "repetition_penalty": 1.0,
        }
        if self._template is None:
            body["messages"] = [dict(message) for message in messages_of(self.cell, sample)]
        else:
            body |= {"prompt": self.prompts[index], "stop": list(self._template.stop), "echo": False}
        if not decoding.greedy:
            body |= {"top_p": decoding.top_p, "top_k": decoding.top_k, "min_p": 0.0}
            body["seed"] = seed_of(self.cell.seed or 0, sample.id)
        return body


def seed_of(seed: int, key: str) -> int:
    """The seed sent for one sample: 31 bits of SHA-256 of the run's seed and the sample's id."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _text(answer: dict[str, Any], server: Server) -> tuple[str, str]:
    """(answer as one text, `stop` or `length`).

    Servers that take thoughts out of an answer give them in `reasoning_content` (or `reasoning`): they are put back
    as the think block they were, left open when the answer ended within it.
    """
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict):
        raise ServerError(
            f"{server.url} sent an answer without choices", "is this an OpenAI-compatible address?"
        )
    finish = "length" if first.get("finish_reason") in _LENGTH else "stop"
    if server.api != "chat":
        text = first.get("text")
        if not isinstance(text, str):
            raise ServerError(f"{server.url} sent a completion without text", "try api: chat")
        return text, finish
    message = first.get("message")
    if not isinstance(message, dict):
        raise ServerError(f"{server.url} sent a chat completion without a message", "try api: completions")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise ServerError(f"{server.url} sent a message whose content is no text")
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thought, str):
        return content or "", finish
    if not content and finish == "length":
        return f"<think>{thought}", finish
    return f"<think>{thought}</think>{content or ''}", finish


def _clean(text: str) -> str:
    """What UTF-8 cannot hold (half of a surrogate pair, as a cut answer may end in) becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else -1
