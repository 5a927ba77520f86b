"""OpenAI-compatible servers as a backend: llama-cpp-python's own, and one in the test that misbehaves."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BadInputError, BadRecipeError, ServerError
from engine.evaluate import job, parse_config
from engine.evaluate.backends import client as http_client
from engine.evaluate.backends.client import Client, Refused
from engine.evaluate.backends.server import ServerBackend, seed_of
from engine.evaluate.cells import Cell, Identity, plan_cells
from engine.evaluate.config import Server
from engine.evaluate.data import Sample
from engine.evaluate.rows import Row
from engine.gguf.convert import Conversion, convert
from engine.jobs.events import EventWriter
from tests.conftest import build_model, build_tokenizer
from tests.engine.evaluate.test_job import params, rows_on_disk

KEY = "sk-very-secret-0123"


# llama-cpp-python's own server


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """A random model whose greedy text is no close call (its last norm is large), and of ASCII letters: where bytes
    are no text, llama-cpp-python's server drops them and goes past the limit.
    """
    from safetensors.torch import load_file, save_file

    folder = build_model("llama", tmp_path_factory.mktemp("model") / "m", 5, "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 12
    tokenizer = build_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(384)]
    odd = [
        n for n, text in enumerate(texts) if n != 2 and not (text.isascii() and text.isprintable() and n > 2)
    ]
    tensors["lm_head.weight"][odd] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = folder.parent / "m.gguf"
    convert(Conversion.plan(folder), out, "f32", EventWriter())
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LlamaServer:
    """`python -m llama_cpp.server` on a port of its own."""

    def __init__(self, file: Path, log: Path) -> None:
        self.file, self.port, self.log = file, free_port(), log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "llama_cpp.server",
            "--model",
            str(self.file),
            "--port",
            str(self.port),
        ]
        command += ["--host", "127.0.0.1", "--n_ctx", "256", "--n_threads", "1", "--n_threads_batch", "1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def llama(gguf, tmp_path) -> Iterator[LlamaServer]:
    pytest.importorskip("starlette_context", reason="needs llama-cpp-python[server]")
    server = LlamaServer(gguf, tmp_path / "server.log")
    server.start()
    yield server
    server.kill()


def config_for(data: dict[str, Path], *servers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "servers": list(servers),
        "templates": ["qwen3_nothink"],
        "decoding": [{"name": "greedy", "max_new_tokens": 10}],
        "device": "cpu",
        "tasks": [
            {"name": "qa", "kind": "generation", "data": str(data["generation"]), "system": "Be brief."},
            {"name": "mc", "kind": "multiple_choice", "data": str(data["multiple_choice"])},
            {"name": "safety", "kind": "probes", "data": str(data["probes"])},
        ],
        **more,
    }


def test_greedy_texts_are_those_of_the_file(llama, gguf, data, tmp_path):
    """The same file asked through the server and in this process, with a named template and with its own."""
    servers = [
        {"name": "completions", "url": llama.url, "concurrency": 2},
        {"name": "chat", "url": llama.url, "api": "chat", "concurrency": 2},
    ]
    config = config_for(data, *servers, gguf=[{"name": "file", "path": str(gguf)}])
    config["templates"].append("chatml")
    result = job.run(params(config, tmp_path / "runs" / "a"), EventWriter())
    assert result["exit_code"] == 0 and not result["failed"]
    cells = json.loads((tmp_path / "runs" / "a" / "cells.json").read_text())["cells"]
    rows = rows_on_disk(tmp_path / "runs" / "a")
    templates = {(c["spec"]["model"]["name"], c["spec"]["template"]) for c in cells if c["spec"]["template"]}
    assert {name for model, name in templates if model == "chat"} == {"server"}  # asked once
    assert len(templates) == 5
    found = {
        (c["spec"]["model"]["name"], c["spec"]["task"]["name"], c["spec"]["kind"]): rows[c["hash"]]
        for c in cells
        if c["spec"]["template"] != "chatml"
    }
    assert {key[1:] for key in found if key[0] != "file"} == {("qa", "generation"), ("safety", "probes")}
    for (model, task, kind), theirs in found.items():
        if model == "file":
            continue
        ours = {row["id"]: row for row in found["file", task, kind]}
        for row in theirs:
            mine = ours[row["id"]]
            for name in ("raw", "finish", "prompt_tokens"):
                assert row[name] == mine[name]
            assert row["served"] == str(gguf)
            assert (row["prompt_sha256"] == mine["prompt_sha256"]) == (model == "completions")
    assert len({row["raw"] for row in found["completions", "qa", "generation"]}) > 4


class KillAfter(EventWriter):
    """Kills the server as soon as the first rows of a cell are kept."""

    def __init__(self, server: LlamaServer) -> None:
        super().__init__()
        self.server = server

    def progress(self, done: float, *args: Any, **kwargs: Any) -> None:
        if done >= 2:
            self.server.kill()
        super().progress(done, *args, **kwargs)


def test_a_server_that_dies_and_comes_back(llama, data, tmp_path):
    decoding = [{"name": "warm", "temperature": 0.8, "max_new_tokens": 8}]
    server = {"name": "llama", "url": llama.url, "concurrency": 2, "retries": 1, "timeout": 10}
    config = config_for(data, server, decoding=decoding)
    whole, broken = tmp_path / "one" / "whole", tmp_path / "two" / "broken"
    assert job.run(params(config, whole), EventWriter())["exit_code"] == 0
    events = KillAfter(llama)
    result = job.run(params(config, broken), events)
    assert result["exit_code"] == 3
    assert list(result["failed"]) == ["llama · qa · warm · seed 42", "llama · safety · warm · seed 42"]
    for reason in result["failed"].values():
        assert "gave no usable answer in 2 tries: ConnectionRefusedError" in reason and "are kept" in reason
    assert any("failed" in event.data.get("message", "") for event in events.kept if event.type == "warning")
    kept = (broken / "cells").glob("*.jsonl")
    assert sum(len(file.read_text().splitlines()) - 1 for file in kept) == 2
    llama.start()
    again = job.run(params(config, broken, resume=True), EventWriter())
    assert again["exit_code"] == 0 and not again["failed"]
    assert rows_on_disk(broken) == rows_on_disk(whole)


# a server that misbehaves


Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers with the next scripted reply, then with good ones; keeps what was asked."""

    protocol_version = "HTTP/1.1"
    server: BadServer

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            reply = self.server.script.pop(0) if self.server.script else good
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        try:
            reply(self)
        except OSError:
            pass  # the client has gone
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class BadServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock, self.busy, self.most = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


def completion(text: str = "Rest.", finish: str = "stop", **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {
        "choices": [{"text": text, "finish_reason": finish}],
        "usage": usage,
        "model": "real-name",
        **more,
    }


def message(content: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **more}, "finish_reason": finish}]}


def good(handler: Handler) -> None:
    handler.answer(message("Rest.") if "chat" in handler.path else completion())


def says(value: Any, status: int = 200, **headers: str) -> Reply:
    return lambda handler: handler.answer(value, status, **headers)


fine = says(completion(), Connection="close")


def half(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def drips(handler: Handler) -> None:
    """Never stops and never ends: a timeout per read would wait for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.send_header("Connection", "close")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@contextmanager
def serving() -> Iterator[BadServer]:
    server = BadServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bad() -> Iterator[BadServer]:
    with serving() as server:
        yield server


SAMPLES = [Sample(id=f"q{n}", prompt=f"What is {n}?", reference="It is rest.") for n in range(3)]


def cell_for(server: Server, data: dict[str, Path], warm: bool = False, top_k: int = 0) -> Cell:
    decoding = {"name": "d", "temperature": 0.6 if warm else 0, "top_p": 0.9 if warm else 1, "top_k": top_k}
    parsed = parse_config(config_for(data, {"name": "s", "url": server.url}, decoding=[decoding]))
    cells = plan_cells(replace(parsed, servers=(server,)), Identity("", "", {}, "", "", ""))
    return next(cell for cell in cells if cell.kind == "generation")


def ask(
    bad: BadServer, data: dict[str, Path], warm: bool = False, top_k: int = 0, **settings: Any
) -> list[Row]:
    """All rows of SAMPLES from the misbehaving server, in few and quick tries."""
    server = Server("s", bad.url, **{"model": "m", "retries": 3, "timeout": 5, **settings})
    backend = ServerBackend(server, log=bad.__dict__.setdefault("said", []).append, first_wait=0.01)
    work = backend.work(cell_for(server, data, warm, top_k), SAMPLES)
    return [row for batch in work.batches for row in work.run(batch)]


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ([says({"error": "slow down"}, 429, Retry_After="0.1")], {}),
        ([says(b"oops", 500), says(b"", 503)], {}),
        ([says(b"<html>not JSON"), says([1, 2])], {}),
        ([half], {}),
        ([half, fine, half], {}),
        ([drips], {"timeout": 0.5}),
        ([says(b"[" * 100_000)], {}),
        ([says(b" " * (http_client.MOST_BYTES + 2))], {}),
    ],
    ids=["429", "5xx", "garbage", "half", "closing", "drips", "deep", "huge"],
)
def test_what_is_tried_again(bad, data, script, settings):
    bad.script = list(script)
    started = time.monotonic()
    rows = ask(bad, data, concurrency=1, **settings)
    assert [row["raw"] for row in rows] == ["Rest."] * 3
    assert len(bad.asked) == 3 + sum(reply is not fine for reply in script) and time.monotonic() - started < 4
    assert bad.asked[0][2] == bad.asked[1][2]  # the very same request again
    first = rows[0]
    assert (first["finish"], first["prompt_tokens"], first["new_tokens"]) == ("stop", 7, 2)
    assert first["served"] == "real-name" and first["id"] == "q0"


def test_retry_after_is_waited_for(bad, data):
    bad.script = [says({}, 429, Retry_After="0.6")]
    started = time.monotonic()
    ask(bad, data, concurrency=1)
    assert 0.6 <= time.monotonic() - started < 3


def test_when_nothing_helps(bad, data):
    bad.script = [says({"error": {"message": "out of\x1b[31m memory\n" + "x" * 5000}}, 500)] * 3
    with pytest.raises(ServerError) as caught:
        ask(bad, data, concurrency=1, retries=2)
    said = str(caught.value)
    assert "in 3 tries: status 500: out of [31m memory xxx" in said and len(said) < 800
    assert said.isprintable() or set(said) - set("\n") == {c for c in said if c.isprintable()}
    assert caught.value.exit_code == 3 and len(bad.asked) == 3


def test_what_is_not_tried_again(bad, data, monkeypatch):
    """A no is a no; the server's words are shown, without the key it repeats."""
    monkeypatch.setenv("TEST_SERVER_KEY", KEY)
    bad.script = [says({"error": {"message": f"Incorrect API key provided: {KEY}\r\n"}}, 401)]
    with pytest.raises(Refused, match=r"status 401\): Incorrect API key provided: \(key\)") as caught:
        ask(bad, data, concurrency=1, key_env="TEST_SERVER_KEY")
    assert KEY not in str(caught.value) and KEY not in repr(caught.value)
    assert len(bad.asked) == 1 and bad.asked[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(Client(bad.url, KEY))
    monkeypatch.delenv("TEST_SERVER_KEY")
    with pytest.raises(BadInputError, match="TEST_SERVER_KEY"):
        ask(bad, data, key_env="TEST_SERVER_KEY")


def test_no_redirect_and_no_proxy(bad, data, monkeypatch):
    """The key goes to the address in the config and nowhere else."""
    with serving() as other:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, other.url)
        bad.script = [says({}, 307, Location=f"{other.url}/completions")]
        with pytest.raises(Refused, match="redirects"):
            ask(bad, data, concurrency=1)
        assert len(ask(bad, data)) == 3 and not other.asked


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host:8000", "http://", "http://u:p@host/v1", "http://h:x/v1", "http://h/v1?k=1"]
)
def test_addresses_that_are_none(url, data, bad):
    with pytest.raises(BadInputError, match="address"):
        Client(url)


def test_answers_that_are_of_no_use(bad, data):
    for reply, words in (
        ({"error": "no"}, "without choices"),
        ({"choices": []}, "without choices"),
        ({"choices": [{"text": 5}]}, "without text"),
    ):
        bad.script = [says(reply)]
        with pytest.raises(ServerError, match=words):
            ask(bad, data, concurrency=1)
    bad.script = [says(completion("Re\x00st \x1b[2J", "length", model=7, usage={"prompt_tokens": "many"}))]
    first = ask(bad, data, concurrency=1)[0]
    assert first["raw"] == "Re\x00st \x1b[2J"  # text as it came: whoever shows it takes care
    assert (first["finish"], first["prompt_tokens"], first["new_tokens"], first["served"]) == (
        "length",
        -1,
        -1,
        "m",
    )


def test_completions_get_our_text_and_every_setting(bad, data):
    greedy, warm = ask(bad, data, model=""), ask(bad, data, warm=True, top_k=20)
    assert [row["id"] for row in greedy] == [row["id"] for row in warm] == ["q0", "q1", "q2"]
    path, headers, body = next(entry for entry in bad.asked if "What is 1?" in entry[2]["prompt"])
    assert path == "/v1/completions" and "Authorization" not in headers
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"
    assert body == {
        "model": "first", "prompt": text, "max_tokens": 256, "temperature": 0, "stop": ["<|im_end|>"],
        "echo": False, "stream": False, "repeat_penalty": 1, "repetition_penalty": 1,
    }  # fmt: skip
    sampled = {entry[2]["prompt"]: entry[2] for entry in bad.asked[3:]}
    assert sampled[text] == {
        **body, "model": "m", "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0, "seed": seed_of(42, "q1"),
    }  # fmt: skip
    assert len({body["seed"] for body in sampled.values()}) == 3


def test_a_server_that_knows_no_top_k(bad, data):
    refusal = says({"error": {"message": "Unrecognized request argument supplied: top_k"}}, 400)
    bad.script = [refusal]
    assert len(ask(bad, data, warm=True, concurrency=1)) == 3
    assert ["top_k" in body for _, _, body in bad.asked] == [True, False, False, False]
    assert all("min_p" in body for _, _, body in bad.asked)
    assert len(bad.__dict__["said"]) == 1 and "takes no top_k:" in bad.__dict__["said"][0]
    bad.script = [refusal]
    with pytest.raises(Refused, match="top_k"):  # asked for, so not left out
        ask(bad, data, warm=True, top_k=20, concurrency=1)


def test_chat_sends_messages_and_puts_thoughts_back(bad, data):
    bad.script = [
        says(message("Rest.", reasoning_content="Hm.")),
        says(message(None, "length", reasoning="Hm, hm")),
        says(message(None)),
    ]
    rows = ask(bad, data, api="chat", concurrency=1)
    assert [row["raw"] for row in rows] == ["<think>Hm.</think>Rest.", "<think>Hm, hm", ""]
    assert [row["think"] for row in rows] == ["closed", "unclosed", "none"]
    assert rows[0]["text"] == "Rest."
    path, _, body = bad.asked[0]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 0?"}]
    assert path == "/v1/chat/completions" and body["messages"] == messages and "prompt" not in body
    server = Server("s", bad.url, model="m", api="chat")
    work = ServerBackend(server).work(cell_for(server, data), SAMPLES)
    assert json.loads(work.prompts[0]) == messages


def test_requests_run_side_by_side(bad, data):
    def slow(handler: Handler) -> None:
        time.sleep(0.3)
        good(handler)

    bad.script = [slow] * 3
    started = time.monotonic()
    ask(bad, data, concurrency=3)
    assert bad.most == 3 and time.monotonic() - started < 0.8
    bad.script, bad.most = [slow] * 3, 0
    ask(bad, data, concurrency=2)
    assert bad.most == 2


def test_one_failure_ends_the_others_at_once(bad, data):
    def never(handler: Handler) -> None:
        time.sleep(20)

    bad.script = [never, says({"error": "no"}, 400), never]
    started = time.monotonic()
    with pytest.raises(Refused):
        ask(bad, data, concurrency=3, timeout=30)
    assert time.monotonic() - started < 3


def test_what_a_server_cannot_be_asked(bad, data):
    server = Server("s", bad.url, model="m")
    cell = cell_for(server, data)
    with pytest.raises(BadRecipeError, match=r"template 'model'[\s\S]*api: chat"):
        ServerBackend(server).work(replace(cell, template="model"), SAMPLES)
    with pytest.raises(BadRecipeError, match="only texts"):
        ServerBackend(server).work(replace(cell, kind="references"), SAMPLES)


def test_the_key_is_nowhere_in_a_run(bad, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_SERVER_KEY", KEY)
    events = EventWriter()
    good_one = {"name": "s", "url": bad.url, "key_env": "TEST_SERVER_KEY"}
    result = job.run(params(config_for(data, good_one), tmp_path / "runs" / "a"), events)
    assert result["exit_code"] == 0 and all(h["Authorization"] == f"Bearer {KEY}" for _, h, _ in bad.asked)
    bad.script = [says({"error": f"who is {KEY}?"}, 403)] * 20
    again = job.run(params(config_for(data, good_one), tmp_path / "runs" / "b"), events)
    assert again["exit_code"] == 3 and "(key)" in str(again["failed"])
    everything = json.dumps([result, again]) + str([event.data for event in events.kept])
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 5 and KEY not in everything
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_half_of_a_surrogate_pair_can_be_kept(bad, data):
    bad.script = [says(completion("Rest \ud83d", model="m\udc00"))]
    row = ask(bad, data)[0]
    assert row["raw"] == row["text"] == "Rest ?" and row["served"] == "m?"
    json.dumps(row, ensure_ascii=False).encode()
