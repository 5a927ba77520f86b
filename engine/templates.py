"""Chat templates as text: messages in, the exact prompt string out. Used by training, chat and evaluation.

Built-in templates are plain formats (the texts LLaMA-Factory and the models' own templates produce); `model`
is the Jinja template that comes with a model, run in Jinja's sandbox. No transformers here, so that the chat
child can render too. Everything rendered already holds its special tokens: tokenise with
`add_special_tokens=False`.

Three ways to deal with Qwen3's thinking, and none of them is "thinking disabled":
- `qwen3`: the prompt ends after `assistant\\n`; the model writes its own `<think>` block if it wants to.
- `qwen3_empty_think`: the prompt prefills `<think>\\n\\n</think>\\n\\n` (what Qwen's `enable_thinking=False` does).
- `qwen3_nothink`: the block is merely left out everywhere (LLaMA-Factory's template of that name).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadInputError, BadModelError, BadRecipeError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
EMPTY_THINK = "<think>\n\n</think>\n\n"
THINK, END_THINK = "<think>", "</think>"
_MARK = re.compile(r"<\|[^|<>\s]+\|>|</?think>|<(?:start|end)_of_turn>")
_EXAMPLE = (
    {"role": "system", "content": "(system)"},
    {"role": "user", "content": "(question 1)"},
    {"role": "assistant", "content": "(answer 1)"},
    {"role": "user", "content": "(question 2)"},
    {"role": "assistant", "content": "(answer 2)"},
)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation; `answer` says that an assistant's turn wrote it (the rest is prompt)."""

    text: str
    answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A built-in format. `{content}` stands for the text of a turn, which is never interpreted.

    begin: once before everything. opening: starts an assistant's turn. closing: ends it (part of the answer).
    prefill: put into the prompt after `opening`. answer_prefix: what an answer without a think block starts with.
    stop: strings that end generation; the first one also takes the place of EOS.
    """

    name: str
    stop: tuple[str, ...]
    begin: str = ""
    system: str = "<|im_start|>system\n{content}<|im_end|>\n"
    user: str = "<|im_start|>user\n{content}<|im_end|>\n"
    opening: str = "<|im_start|>assistant\n"
    closing: str = "<|im_end|>\n"
    prefill: str = ""
    answer_prefix: str = ""
    strip_old_think: bool = False
    says: str = ""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text to generate from: all turns, then an opened assistant's turn."""
        return self._turns(check(messages)) + self.opening + self.prefill

    def segments(self, messages: Sequence[Message], *, last_only: bool = False) -> list[Segment]:
        """The conversation as prompt and answer pieces; it must end with an assistant's turn.

        Joined, the pieces are the text a model is trained on; an answer holds its closing mark. Every answer keeps
        its think block, whichever turn it belongs to; with `last_only` the earlier turns stand as they do at
        inference (`qwen3`: without their blocks). An empty think block put before an answer is a piece of its
        own, since it is tokenised apart.
        """
        turns = _to_train_on(messages)
        found: list[Segment] = []
        waiting = self.begin
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                waiting += self._asked(turn)
                continue
            if last_only and index < len(turns) - 1:
                prefill, prefix, content = "", "", self._old(turn["content"])
            else:
                prefill, prefix, content = self.prefill, *self._answer(turn["content"])
            found.append(Segment(waiting + self.opening + prefill, False))
            if prefix:
                found.append(Segment(prefix, True))
            found.append(Segment(content + self.closing, True))
            waiting = ""
        return found

    def _answer(self, content: str) -> tuple[str, str]:
        """(what is put before an answer that is trained on, the answer)."""
        if self.prefill:
            return "", _without_think(content).lstrip("\n")
        thinks = THINK in content or END_THINK in content
        return "" if thinks else self.answer_prefix, content

    def _old(self, content: str) -> str:
        return _without_think(content) if self.strip_old_think else content

    def _asked(self, turn: Message) -> str:
        before, after = (self.system if turn["role"] == "system" else self.user).split("{content}")
        return before + turn["content"] + after

    def _turns(self, turns: Sequence[Message]) -> str:
        parts = [self.begin]
        last_user = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                content = self._old(turn["content"]) if index < last_user else turn["content"]
                parts += [self.opening, content, self.closing]
            else:
                parts.append(self._asked(turn))
        return "".join(parts)

    def marks(self) -> tuple[str, ...]:
        """The control marks it writes (`<|im_start|>`, `<think>`, ...), each once."""
        pieces = (
            self.begin,
            self.system,
            self.user,
            self.opening,
            self.prefill,
            self.answer_prefix,
            self.closing,
        )
        return tuple(dict.fromkeys(mark for piece in pieces for mark in _MARK.findall(piece)))


@dataclass(frozen=True)
class ModelTemplate:
    """The Jinja template of a model, rendered as transformers does (same environment, same variables).

    `special` are the tokenizer's named tokens ("bos_token", "eos_token", ...), `options` extra variables such as
    `enable_thinking`.
    """

    jinja: str
    stop: tuple[str, ...]
    special: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "model"
    says: str = "the model's own chat template"

    def _render(self, messages: Sequence[Message], *, open_answer: bool) -> str:
        import jinja2

        template = _compile(self.jinja)
        try:
            return template.render(
                messages=[dict(turn) for turn in check(messages)],
                add_generation_prompt=open_answer,
                **self.special,
                **self.options,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadInputError(
                f"the model's chat template refuses this conversation: {error}",
                "many templates want user and assistant turns in alternation; or choose a built-in template",
            ) from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text to generate from."""
        return self._render(messages, open_answer=True)

    def segments(self, messages: Sequence[Message], *, last_only: bool = False) -> list[Segment]:
        """As ChatTemplate.segments. Found by rendering with and without each answer and taking the difference.

        Where the template rewrites earlier answers (takes their think blocks away), those become part of the
        prompt: only what stands unchanged at the end can be trained on. `last_only` changes nothing: a model's
        template always writes earlier turns as at inference. Raises BadInputError when the template rewrites
        what came before an answer once it is there, so that no clean border exists.
        """
        turns = _to_train_on(messages)
        found: list[Segment] = []
        done = ""
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self.prompt(turns[:index])
            after = self._render(turns[: index + 1], open_answer=False)
            if not after.startswith(before):
                raise BadInputError(
                    "the model's chat template changes the prompt once the answer is there; it cannot be trained on",
                    "choose a built-in template, for example qwen3_nothink",
                )
            if not before.startswith(done):
                found, done = [], ""
            found += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
            done = after
        return found

    def marks(self) -> tuple[str, ...]:
        """The control marks it writes in a plain conversation, and its end of turn; each once."""
        try:
            text = self._render(_EXAMPLE, open_answer=False)
        except BadInputError:  # one that takes no system turn
            text = self._render(_EXAMPLE[1:], open_answer=False)
        ends = [mark for mark in self.stop if mark in text]
        return tuple(dict.fromkeys([*_MARK.findall(text), *ends]))


Template = ChatTemplate | ModelTemplate

BUILTIN: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("chatml", ("<|im_end|>",), says="ChatML, no default system text"),
        ChatTemplate("qwen3_nothink", ("<|im_end|>",), says="Qwen3 with the think block left out"),
        ChatTemplate(
            "qwen3",
            ("<|im_end|>",),
            answer_prefix=EMPTY_THINK,
            strip_old_think=True,
            says="Qwen3, the model may think",
        ),
        ChatTemplate(
            "qwen3_empty_think",
            ("<|im_end|>",),
            prefill=EMPTY_THINK,
            strip_old_think=True,
            says="Qwen3 with an empty think block prefilled (enable_thinking=False)",
        ),
        ChatTemplate(
            "llama3",
            ("<|eot_id|>",),
            begin="<|begin_of_text|>",
            system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
            opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
            closing="<|eot_id|>",
            says="Llama 3",
        ),
    )
}


def check(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, if each has a known role and a text. Raises BadInputError naming the message."""
    for number, turn in enumerate(messages, 1):
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise BadInputError(
                f"message {number} must have a role ({', '.join(ROLES)}) and a text content, not {dict(turn)!r:.120}"
            )
    return messages


def load(name: str, model: Path | None = None) -> Template:
    """The template of that name; `model` needs the model's folder.

    Raises BadRecipeError for an unknown name, BadModelError when the folder holds no chat template.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if name != "model":
        raise BadRecipeError(f"unknown template {name!r}", f"known: model, {', '.join(sorted(BUILTIN))}")
    if model is None:
        raise BadRecipeError(
            "template 'model' needs a model folder", f"or one of {', '.join(sorted(BUILTIN))}"
        )
    return from_folder(model)


def from_folder(folder: Path, **options: Any) -> ModelTemplate:
    """The template in a model folder: chat_template.jinja, else `chat_template` in tokenizer_config.json."""
    config = _json(folder / "tokenizer_config.json")
    text = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(text, list):  # several named templates: transformers uses the one called default
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        raise BadModelError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
            f"choose a built-in one: {', '.join(sorted(BUILTIN))}",
        )
    special = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    return from_jinja(text, special, **options)


def from_jinja(text: str, special: Mapping[str, str], **options: Any) -> ModelTemplate:
    """A template from its text (for example GGUF metadata) and the tokenizer's named tokens.

    Stop strings are EOS and the end-of-turn marks the template itself writes.
    """
    _compile(text)
    stop = [special["eos_token"]] if special.get("eos_token") else []
    stop += [
        mark for mark in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if mark in text and mark not in stop
    ]
    return ModelTemplate(text, tuple(stop), dict(special), options)


def render(
    template: str | Template,
    messages: Sequence[Message],
    *,
    model: Path | None = None,
    answer_open: bool = True,
) -> str:
    """The text of a conversation; with `answer_open` it ends in an opened assistant's turn, ready to generate."""
    chosen = load(template, model) if isinstance(template, str) else template
    if answer_open:
        return chosen.prompt(messages)
    return "".join(segment.text for segment in chosen.segments(messages))


def describe(template: Template) -> dict[str, Any]:
    """{"name", "text", "stop", "sha256"} for a manifest; two templates with the same hash write the same texts.

    `text` is the Jinja text of a model's own template (with "options", such as enable_thinking, where it has any),
    or the pieces of a built-in one and the example conversation they make.
    """
    if isinstance(template, ModelTemplate):
        text, options = template.jinja, dict(template.options)
    else:
        keys = (
            "begin",
            "system",
            "user",
            "opening",
            "prefill",
            "answer_prefix",
            "closing",
            "strip_old_think",
        )
        pieces = [f"{key} = {json.dumps(getattr(template, key), ensure_ascii=False)}" for key in keys]
        text, options = "\n".join([*pieces, "", render(template, _EXAMPLE, answer_open=False)]), {}
    hashed = json.dumps([text, options, template.stop], ensure_ascii=False, sort_keys=True)
    found: dict[str, Any] = {"name": template.name, "text": text, "stop": list(template.stop)}
    if options:
        found["options"] = options
    return {**found, "sha256": hashlib.sha256(hashed.encode()).hexdigest()}


def _without_think(content: str) -> str:
    """An answer as Qwen3's template shows it later: what follows the last think block, else all of it."""
    return content.split(END_THINK)[-1].lstrip("\n") if END_THINK in content else content


def _to_train_on(messages: Sequence[Message]) -> Sequence[Message]:
    turns = check(messages)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadInputError("a conversation to train on must end with an assistant's turn")
    return turns


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadModelError(f"{path} is not readable JSON: {error}") from error
    return value if isinstance(value, dict) else {}


@functools.lru_cache(maxsize=16)
def _compile(text: str) -> Any:
    """The compiled template in the sandbox transformers uses (trim_blocks, lstrip_blocks, loop controls)."""
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise BadModelError(f"the model's chat template does not compile: {error}") from error
