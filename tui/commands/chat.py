"""`medmerge chat`: talk to one or more models line by line; each prompt is answered by all of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.chat.client import ChatModel, Done, Failed, Sampling, Token
from engine.errors import BadDataError, BadInputError, BadRecipeError
from engine.jobs import JobSpec, JobStore, launch
from engine.workspace import state_dir
from tui.commands.common import (
    Commands,
    command_line,
    existing_path,
    follow,
    labelled,
    print_error,
    print_json,
    workspace_of,
)
from tui.safe_text import plain

DESCRIPTION = """\
Each MODEL is a GGUF file, or a checkpoint folder, which is converted once into the workspace. --adapter mixes
a LoRA into every model while it runs: an adapter folder (MODEL or --base is then its checkpoint) or a LoRA
GGUF. Such a live mixture is a preview: deltas are not rounded, and the base may be quantised.
Ctrl+c stops an answer, ctrl+d ends. /new starts a new conversation, /scale LABEL=W changes a weight."""

EXAMPLES = """\
  medmerge chat gguf/pt03-sft07-q4_k_m.gguf
  medmerge chat bases/smollm2-135m-instruct --adapter pt=adapters/demo-pt:0.3 --adapter sft=adapters/demo-sft:0.7
  medmerge chat a.gguf b.gguf --prompts questions.txt --temperature 0 --json"""
PANE = "cli"


@dataclass
class Speaker:
    """A model that answers, and its side of the conversation. `warnings`: templates that do not fit what is in it."""

    name: str
    model: ChatModel
    warnings: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "chat", "talk to models line by line, or answer a file of prompts", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a GGUF file or a checkpoint folder")
    parser.add_argument(
        "--adapter",
        metavar="LABEL=PATH:WEIGHT",
        action="append",
        default=[],
        help="mix in a LoRA while it runs",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the checkpoint an adapter folder belongs to, when MODEL is a GGUF"
    )
    parser.add_argument(
        "--type", metavar="T", default="auto", help="GGUF type for a checkpoint; default by its size"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="answer each line of FILE on its own (- is standard input)"
    )
    parser.add_argument(
        "--system", metavar="TEXT", default="", help="a system message before the first prompt"
    )
    parser.add_argument(
        "--template", metavar="NAME", default="model", help="chat template; default the model's own"
    )
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0)
    parser.add_argument("--top-k", metavar="K", type=int, default=0)
    parser.add_argument("--seed", metavar="N", type=int, default=42)
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=512, help="longest answer; 0: no limit"
    )
    parser.add_argument(
        "--context", metavar="N", type=int, default=4096, help="tokens a conversation may have"
    )
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="cores to use; default all")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and not args.prompts:
        raise BadRecipeError(
            "--json needs --prompts", "a conversation on the keyboard is not one JSON document"
        )
    sampling = sampling_of(args)
    prompts = read_prompts(args.prompts) if args.prompts else None
    _known_template(args.template)
    speakers, weights = _prepare(args)
    warnings = list(dict.fromkeys(words for speaker in speakers for words in speaker.warnings))
    for words in warnings:
        print(f"warning: {plain(words)}", file=sys.stderr)
    with asyncio.Runner() as runner:
        try:
            for speaker in speakers:
                runner.run(_open(speaker, weights))
            if prompts is not None:
                return _answer_file(args, runner, speakers, prompts, sampling, warnings)
            return _converse(args, runner, speakers, weights, sampling)
        finally:
            runner.run(_close(speakers))


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The decoding settings of the command, checked."""
    for name, good in (
        ("temperature", 0 <= args.temperature <= 10),
        ("top_p", 0 < args.top_p <= 1),
        ("top_k", args.top_k >= 0),
        ("max_tokens", args.max_tokens >= 0),
        ("context", args.context > 0),
    ):
        if not good:
            raise BadRecipeError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_tokens)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line; empty lines are skipped. Raises BadDataError naming file and line."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror}") from error
    prompts = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            prompts.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise BadDataError(
                f"{path}, line {number} is not UTF-8 text", "save the file as UTF-8"
            ) from error
    found = [prompt for prompt in prompts if prompt]
    if not found:
        raise BadDataError(f"{path} holds no prompts", "one prompt a line")
    return found


def _known_template(name: str) -> None:
    """Raises BadRecipeError for a template that does not exist, before a model is converted or loaded for it."""
    from engine.templates import BUILTIN, load

    if name != "model" and name not in BUILTIN:
        load(name)


def _template_warnings(template: str, model: Path, adapters: dict[str, Path]) -> list[str]:
    """What the template does not fit: adapters mixed in, and those merged into the model (a folder or a GGUF)."""
    from engine import template_check
    from engine.gguf.trained import choose_for, trained_adapter, trained_in

    trained = [trained_adapter(label, path) for label, path in adapters.items()] + trained_in(model)
    return template_check.warnings(trained, choose_for(template, model)) if trained else []


def _prepare(args: argparse.Namespace) -> tuple[list[Speaker], dict[str, float]]:
    """GGUF files for all models and adapters; what is a folder is converted by a job, once."""
    workspace = workspace_of(args)
    adapters: dict[str, Path] = {}
    weights: dict[str, float] = {}
    for text in args.adapter:
        label, place, weight = labelled(text)
        if label in adapters:
            raise BadRecipeError(f"two adapters are labelled {label}", "give each its own label")
        adapters[label] = existing_path(place, workspace, f"adapter {label}")
        weights[label] = 1.0 if weight is None else weight
    folders = {label: path for label, path in adapters.items() if path.is_dir()}
    speakers = []
    for named in args.models:
        path = existing_path(named, workspace, "model")
        if (path / "adapter_config.json").is_file():
            raise BadInputError(
                f"{path} is an adapter, not a model",
                f"talk to its base with it: medmerge chat BASE --adapter {path.name}={path}:1",
            )
        name, base = path.name, path if path.is_dir() else None
        if base is None and folders:
            if not args.base:
                raise BadInputError(
                    f"{path.name} is a GGUF, and adapter {next(iter(folders))} is a folder",
                    "name the checkpoint it belongs to with --base, or give a LoRA GGUF",
                )
            base = existing_path(args.base, workspace, "base")
        warnings = _template_warnings(args.template, path, adapters)
        loras = adapters
        if base is not None:
            made = _convert(args, base, folders)
            path = Path(made["base"]) if path.is_dir() else path
            loras = adapters | {label: Path(file) for label, file in made["adapters"].items()}
        log = state_dir() / f"chat-{path.stem[:60]}.log"
        speakers.append(Speaker(name, ChatModel(path, loras, log, args.context, args.threads), warnings))
    return speakers, weights


def _convert(args: argparse.Namespace, base: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """Run the job that makes the GGUF files of a base and adapters; its result. Quick when they are there."""
    workspace = workspace_of(args).create()
    params = {
        "base": str(base),
        "adapters": {label: str(path) for label, path in adapters.items()},
        "type": args.type,
        "out": str(workspace.gguf),
    }
    spec = JobSpec(
        "live", "engine.gguf.job:run_live", params, f"prepare {base.name}", command_line(args.argv)
    )
    job = follow(launch(spec, workspace.jobs), JobStore(workspace.jobs), cancel_on_interrupt=True)
    if job.state == "cancelled":
        raise KeyboardInterrupt
    if job.state != "done":
        error = BadInputError(job.error or f"converting {base.name} ended as {job.state}", job.hint)
        error.exit_code = job.exit_code or 3
        raise error
    return job.result


async def _open(speaker: Speaker, weights: dict[str, float]) -> None:
    await speaker.model.start()
    await speaker.model.open(PANE)
    if weights:
        await speaker.model.set_scales(PANE, weights)


async def _close(speakers: list[Speaker]) -> None:
    for speaker in speakers:
        await speaker.model.close()


async def _answer(
    speaker: Speaker, template: str, sampling: Sampling, show: bool, interactive: bool
) -> tuple[str, Done | Failed]:
    """One answer, streamed to stdout when `show`. Ctrl+c stops it; when not `interactive` it ends the command."""
    text = ""

    async def listen() -> tuple[str, Done | Failed]:
        nonlocal text
        async for event in speaker.model.ask(PANE, speaker.messages, template, sampling):
            if not isinstance(event, Token):
                return text, event
            text += event.text
            if show:
                sys.stdout.write(plain(event.text, lines=True))
                sys.stdout.flush()
        return text, Failed("the answer ended without a word why")

    task = asyncio.ensure_future(listen())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        speaker.model.stop(PANE)
        end = await task
        if not interactive:
            raise
        return end


def _answer_file(
    args: argparse.Namespace,
    runner: asyncio.Runner,
    speakers: list[Speaker],
    prompts: list[str],
    sampling: Sampling,
    warnings: list[str],
) -> int:
    """Answer every prompt on its own with every model. Exit code 3 when any answer failed."""
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts, 1):
        if not args.json:
            print(f"› {plain(prompt)}")
        for speaker in speakers:
            speaker.messages = [*_system(args), {"role": "user", "content": prompt}]
            if not args.json and len(speakers) > 1:
                print(f"── {plain(speaker.name)}")
            text, end = runner.run(_answer(speaker, args.template, sampling, not args.json, False))
            row: dict[str, Any] = {"prompt": prompt, "model": speaker.name, "text": text}
            if isinstance(end, Done):
                row |= {
                    "finish": end.reason, "tokens": end.tokens, "tokens_per_s": end.tokens_per_s,
                    "prompt_tokens": end.prompt_tokens, "think_tokens": end.think_tokens,
                }  # fmt: skip
            else:
                row |= {"finish": "failed", "error": end.message}
                print_error(f"prompt {number}, {speaker.name}: {end.message}", end.hint)
            rows.append(row)
            if not args.json:
                print("\n")
    if args.json:
        print_json(
            {"template": args.template, "sampling": vars(sampling), "warnings": warnings, "answers": rows}
        )
    return 3 if any(row["finish"] == "failed" for row in rows) else 0


def _converse(
    args: argparse.Namespace,
    runner: asyncio.Runner,
    speakers: list[Speaker],
    weights: dict[str, float],
    sampling: Sampling,
) -> int:
    """Prompt, answer, prompt, until ctrl+d."""
    _introduce(speakers, weights)
    for line in _lines():
        if line.startswith("/"):
            _order(line, runner, speakers, weights)
            continue
        try:
            for speaker in speakers:
                _turn(args, runner, speaker, line, len(speakers) > 1, weights, sampling)
        except KeyboardInterrupt:  # twice, or just before an answer began: the others do not answer this line
            print()
    return 0


def _turn(
    args: argparse.Namespace,
    runner: asyncio.Runner,
    speaker: Speaker,
    line: str,
    named: bool,
    weights: dict[str, float],
    sampling: Sampling,
) -> None:
    """One model's answer to a line. What was not answered is forgotten; a child that died is started again."""
    before = list(speaker.messages)
    speaker.messages = [*(before or _system(args)), {"role": "user", "content": line}]
    if named:
        print(f"── {plain(speaker.name)}")
    answered = False
    try:
        text, end = runner.run(_answer(speaker, args.template, sampling, True, True))
        print()
        if isinstance(end, Done):
            answered = True
            speaker.messages.append({"role": "assistant", "content": text})
            _note(f"{end.reason} · {end.tokens} tokens · {end.tokens_per_s:.0f} tok/s")
            return
        print_error(end.message, end.hint)
        if not speaker.model.alive:
            runner.run(_open(speaker, weights))
            _note(f"{speaker.name} was started again")
    finally:
        if not answered:
            speaker.messages = before


def _introduce(speakers: list[Speaker], weights: dict[str, float]) -> None:
    for speaker in speakers:
        loaded = speaker.model.loaded
        if loaded:
            _note(
                f"{speaker.name}: {plain(loaded.name)}, {plain(loaded.description)}{', GPU' if loaded.gpu else ''}"
            )
    if weights:
        mixture = " + ".join(f"{label} {weight:g}" for label, weight in weights.items())
        _note(f"live mixture {mixture}: a preview, deltas are not rounded")
    _note("ctrl+c stops an answer, ctrl+d ends, /new starts over" + (", /scale LABEL=W" if weights else ""))


def _lines() -> Iterator[str]:
    """Lines typed by the person (or piped in), until the end; ctrl+c throws the line away."""
    while True:
        try:
            line = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("(ctrl+d ends)")
            continue
        if line:
            yield line


def _order(line: str, runner: asyncio.Runner, speakers: list[Speaker], weights: dict[str, float]) -> None:
    """/new and /scale."""
    word, _, rest = line.partition(" ")
    if word == "/new":
        for speaker in speakers:
            speaker.messages = []
    elif word == "/scale":
        label, _, number = rest.partition("=")
        try:
            value = float(number)
            if label.strip() not in weights:
                raise ValueError
        except ValueError:
            print_error("write /scale LABEL=WEIGHT", f"labels: {', '.join(weights) or 'none loaded'}")
            return
        weights[label.strip()] = value
        for speaker in speakers:
            runner.run(speaker.model.set_scales(PANE, weights))
        _note(" + ".join(f"{label} {weight:g}" for label, weight in weights.items()))
    else:
        print_error(f"unknown order {word}", "/new, /scale LABEL=WEIGHT, ctrl+d")


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr)
