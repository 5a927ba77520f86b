"""A backend without disk or processes, for the app's tests: what it shows is set by the test, what it is asked
to do is kept in `started` and `cancelled`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Static

from engine.chat.protocol import Done, Failed, Loaded, Sampling, Token
from engine.errors import BadInputError
from engine.evaluate.summary import MetricRow
from engine.template_check import Trained
from tui.actions import Action, Mixture
from tui.app import MedmergeApp
from tui.snapshots import (
    AdapterDetail,
    AdapterRow,
    DataFile,
    FindingView,
    GgufRow,
    JobFeed,
    JobRow,
    MergeRow,
    ModelRow,
    Overview,
    PlanView,
    PreviewView,
    RunRow,
    SampleRow,
    SampleSet,
    Selection,
    TaskOffer,
    TrainRun,
    VerdictView,
)

ROOT = Path("/ws")
BASE = ModelRow(
    "/ws/bases/qwen3-14b", "Qwen3-14B", "Qwen3ForCausalLM", "BF16", 14_768_307_200, 40, 29_536_614_400
)
PT = AdapterRow(
    "/ws/adapters/pt-medcorpus", "pt-medcorpus", "pt", 16, (1.0,), 280, ("down_proj", "q_proj", "v_proj"), "F32",
    128_450_560, "Qwen3-14B", "qwen3_nothink",
)  # fmt: skip
SFT = replace(PT, path="/ws/adapters/sft-medinstruct", name="sft-medinstruct", kind="sft")
OLD = replace(
    SFT, path="/ws/adapters/sft-old", name="sft-old", warning="its config names another base: Qwen3-8B"
)
MISFIT = replace(
    PT, path="/ws/adapters/pt-small", name="pt-small", misfit="q_proj is [64, 64], and [5120, 5120] here"
)
PICKLE = AdapterRow(
    "/ws/adapters/pickled", "pickled", error="adapter_model.bin is a pickle file", hint="convert it"
)

GOOD = VerdictView(
    True, "ok", "every element is right: pt / sft merged at 0.300 / 0.700", {"pt": 0.3, "sft": 0.7},
    {"pt": 0.298, "sft": 0.695}, {"pt": 0.298, "sft": 0.695}, 0.057, 0.057, 0.26, 0.0, 280, (FindingView("ok"),),
)  # fmt: skip
SQUARED = VerdictView(
    False, "weight_squared", "the weights were applied twice: found 0.090 / 0.490 where 0.300 / 0.700 was asked",
    {"pt": 0.3, "sft": 0.7}, {"pt": 0.298, "sft": 0.695}, {"pt": 0.09, "sft": 0.49}, 0.116, 0.057, 0.3, 0.9, 280,
    (FindingView("weight_squared", "the weights were applied twice"),),
)  # fmt: skip
MERGE = MergeRow(
    "/ws/merges/pt30-sft70", "pt30-sft70", (("pt", 0.3), ("sft", 0.7)), "linear", "BF16", 29_536_614_400, 2.0, GOOD,
    BASE.path, (("pt", PT.path), ("sft", SFT.path)),
)  # fmt: skip
BAD_MERGE = replace(MERGE, path="/ws/merges/theirs", name="theirs", created=1.0, verdict=SQUARED)

FULL = Overview(
    "/ws",
    models=(BASE,),
    adapters=(PT, SFT, OLD, MISFIT, PICKLE),
    merges=(MERGE, BAD_MERGE),
    ggufs=(GgufRow("/ws/gguf/pt30-sft70-q4_k_m.gguf", "pt30-sft70-q4_k_m.gguf", 9_000_000_000),),
    runs=(RunRow("/ws/runs/demo-sweep", "demo-sweep", "sweep", 1.0, 20, 20),),
    data=(
        DataFile("/ws/data/demo-sweep.yaml", "demo-sweep.yaml", 900),
        DataFile("/ws/data/medquad_short.jsonl", "medquad_short.jsonl", 90_000),
        DataFile("/ws/data/pt_train.jsonl", "pt_train.jsonl", 9_000_000),
        DataFile("/ws/data/sft_train.jsonl", "sft_train.jsonl", 9_000_000),
    ),
    free=412_000_000_000,
)
CHOSEN = Selection(BASE.path, PT.path, SFT.path)
EMPTY = Overview("/ws", free=412_000_000_000)


def job(number: int, kind: str = "merge", state: str = "running", **values: Any) -> JobRow:
    """A job row with an id of its own."""
    values = {"title": f"{kind} {number}", "created": float(number), "started": float(number), **values}
    return JobRow(id=f"{kind}-{number}", kind=kind, state=state, **values)


def metric(pt: float, name: str, value: float, task: str = "medquad_short", **more: Any) -> MetricRow:
    """A number of the mixture (pt, 1 - pt) in a sweep."""
    sft = round(1 - pt, 2)
    model = {0.0: "SFT", 1.0: "PT"}.get(pt, f"PT{pt * 100:.0f} SFT{sft * 100:.0f}")
    template, decoding = ("", "") if "perplexity" in name or name == "accuracy" else ("model", "greedy")
    values = {"low": value - 1, "high": value + 1, "n": 48, **more}
    return MetricRow(
        "demo-sweep", model, {"pt": pt, "sft": sft}, template, decoding, task, name, value, **values
    )


FORECAST: dict[str, Any] = {
    "memory": 190_000_000, "seconds": 38.0, "lost": {"pt": 0.004, "sft": 0.007}, "unchanged_share": 0.26,
    "measured": True,
}  # fmt: skip

SWEEP = ((0.0, 25.1, 8.2, 11.5), (0.3, 14.4, 4.7, 8.6), (0.5, 10.3, 4.0, 7.1), (1.0, 1.0, 1.1, 6.0))
TABLE = tuple(
    row
    for pt, bleu, floor, ppl in SWEEP
    for row in (
        metric(pt, "bleu", bleu, floor=floor, p=None if pt == 0 else 0.01, versus="" if pt == 0 else "SFT"),
        metric(pt, "perplexity", ppl, "medical_text"),
        metric(pt, "accuracy", 26.0 + pt, "medqa", floor=25.0, n=100, low=18.0, high=36.0),
        metric(pt, "refusal_rate", 20.0, "safety/self-harm", n=10, low=2.0, high=55.0),
    )
)  # fmt: skip


ANSWERS = (
    SampleRow("q1", "What is metformin?", "A drug.", "It is a drug.", (("finish", "stop"),), cell="c1"),
)
OFFERS = (
    TaskOffer(
        "medquad_short", "/ws/data/medquad_short.jsonl", "generation", 100,
        {"name": "medquad_short", "kind": "generation", "limit": 48, "data": "/ws/data/medquad_short.jsonl"},
    ),
    TaskOffer(
        "medqa", "/ws/data/medqa.jsonl", "multiple_choice", 200,
        {"name": "medqa", "kind": "multiple_choice", "data": "/ws/data/medqa.jsonl"},
    ),
    TaskOffer(
        "safety", "/ws/data/safety.jsonl", "probes", 20,
        {"name": "safety", "kind": "probes", "data": "/ws/data/safety.jsonl"},
    ),
)  # fmt: skip


class FakeBackend:
    """Answers from memory; `fail` makes the next question of that name raise."""

    def __init__(self, overview: Overview = FULL, jobs: Sequence[JobRow] = ()) -> None:
        self.root = ROOT
        self.view = overview
        self.jobs: list[JobRow] = list(jobs)
        self.feeds: dict[str, JobFeed] = {}
        self.started: list[Action] = []
        self.cancelled: list[str] = []
        self.fail: dict[str, str] = {}
        self.rows: tuple[MetricRow, ...] = TABLE
        self.models: list[FakeChatModel] = []
        self.answers: list[str] = ["Metformin is taken with food."]
        self.forecasts: dict[str, dict[str, Any]] = {}  # by dtype
        self.reports: dict[str, VerdictView] = {}
        self.trained: tuple[TrainRun, ...] = ()
        self.previews: list[dict[str, Any]] = []  # the configs asked with
        self.preview_view = PreviewView(())
        self.closed = False
        self.offers: tuple[TaskOffer, ...] = OFFERS
        self.sets: dict[str, SampleSet] = {}  # by model
        self.written: dict[str, dict[str, Any]] = {}  # configs by name
        self.corrected: list[tuple[str, str | None, str]] = []
        self.exported: list[tuple[str, str, int]] = []

    def _ask(self, name: str) -> None:
        if name in self.fail:
            raise BadInputError(self.fail[name], "do something else")

    def overview(self, base: str) -> Overview:
        self._ask("overview")
        return self.view

    def detail(self, path: str) -> AdapterDetail:
        self._ask("detail")
        norms = tuple(1.0 + layer / 10 for layer in range(40))
        return AdapterDetail(
            path, norms, curve=((0, 2.9), (100, 2.4), (200, 2.12)), facts=(("audit", "clean, 0 leaks"),)
        )

    def plan(self, mixture: Mixture) -> PlanView:
        self._ask("plan")
        return PlanView(29_700_000_000, 29_536_614_400, 0, 412_000_000_000, 280, 163, dtype=mixture.dtype)

    def forecast(self, mixture: Mixture) -> PlanView:
        self._ask("forecast")
        return replace(self.plan(mixture), **self.forecasts.get(mixture.dtype, FORECAST))

    def report(self, path: str) -> VerdictView | None:
        self._ask("report")
        return self.reports.get(path)

    def train_runs(self) -> tuple[TrainRun, ...]:
        self._ask("train_runs")
        return self.trained

    def preview(self, config: dict[str, Any]) -> PreviewView:
        self._ask("preview")
        self.previews.append(config)
        return self.preview_view

    def close(self) -> None:
        self.closed = True

    def poll_jobs(self, wanted: frozenset[str]) -> tuple[tuple[JobRow, ...], dict[str, JobFeed]]:
        feeds, self.feeds = self.feeds, {}
        return tuple(self.jobs), feeds

    def start(self, action: Action) -> JobRow:
        self._ask("start")
        self.started.append(action)
        row = job(
            100 + len(self.started),
            action.kind,
            title=action.title,
            command=action.command,
            params=action.params,
        )
        self.jobs.insert(0, row)
        return row

    def finish(self, job_id: str, state: str = "done", exit_code: int = 0, **values: Any) -> None:
        """Let a job end; the next poll tells."""
        self.jobs = [
            replace(row, state=state, exit_code=exit_code, finished=row.created + 5, **values)
            if row.id == job_id
            else row
            for row in self.jobs
        ]

    def cancel(self, job_id: str) -> bool:
        self.cancelled.append(job_id)
        self.finish(job_id, "cancelled", 130)
        return True

    def log_tail(self, job_id: str, lines: int = 200) -> str:
        return "line one\nline two"

    def read_sweep(self, config: Path) -> Action:
        return Action(
            "sweep", "engine.evaluate.job:run", {"out": "/ws/runs/new", "config": {}}, f"sweep {config.stem}"
        )

    def table(self, run: str) -> tuple[MetricRow, ...]:
        self._ask("table")
        return self.rows

    def write_sweep(self, name: str, config: dict[str, Any]) -> Action:
        self._ask("write_sweep")
        self.written[name] = config
        return Action("sweep", "engine.evaluate.job:run", {"out": f"/ws/runs/{name}"}, f"sweep {name}")

    def samples(self, run: str, row: MetricRow) -> SampleSet:
        self._ask("samples")
        return self.sets.get(row.model, SampleSet(row.model, ANSWERS))

    def scores(self, rows: Sequence[SampleRow], metric: str) -> list[float]:
        return [float(len(row.text)) for row in rows]

    def labels(self, run: str, rows: Sequence[SampleRow]) -> list[SampleRow]:
        return [replace(row, label="refusal", automatic="refusal") for row in rows]

    def correct(self, run: str, sample: SampleRow, label: str | None, note: str) -> None:
        self._ask("correct")
        self.corrected.append((sample.id, label, note))
        for model, found in self.sets.items():
            rows = [
                replace(row, label=label or row.automatic, by_hand=label is not None)
                if row.id == sample.id and row.cell == sample.cell
                else row
                for row in found.rows
            ]
            self.sets[model] = replace(found, rows=tuple(rows))

    def export_table(self, name: str, rows: Sequence[MetricRow], suffix: str) -> Path:
        self.exported.append((name, suffix, len(rows)))
        return self.root / "exports" / f"{name}.{suffix}"

    def export_samples(self, name: str, sets: Sequence[tuple[str, Sequence[SampleRow]]], suffix: str) -> Path:
        self.exported.append((name, suffix, sum(len(rows) for _, rows in sets)))
        return self.root / "exports" / f"{name}.{suffix}"

    def measurable(
        self, files: Sequence[DataFile]
    ) -> tuple[tuple[TaskOffer, ...], tuple[tuple[str, str], ...]]:
        return self.offers, (("/ws/data/demo-sweep.yaml", "demo-sweep.yaml"),)

    def template_warnings(
        self, base: str, adapters: Sequence[Trained], templates: Sequence[str]
    ) -> list[str]:
        return [
            f"adapter pt was trained with model, and {name} is used" for name in templates if name != "model"
        ]

    def resume_sweep(self, run: str) -> Action:
        return Action("sweep", "engine.evaluate.job:run", {"out": run, "resume": True}, "resume")

    def chat_model(self, path: Path, adapters: Mapping[str, Path]) -> FakeChatModel:
        model = FakeChatModel(path, adapters, self.answers)
        self.models.append(model)
        return model


class FakeChatModel:
    """engine.chat.client.ChatModel's shape; answers with `answers`, a word at a time. "wait" in a prompt waits for
    `stop`; "die" makes the child die."""

    def __init__(self, path: Path, adapters: Mapping[str, Path], answers: Sequence[str]) -> None:
        self.path, self.adapters, self.answers = path, dict(adapters), answers
        self.alive = False
        self.scales: dict[str, dict[str, float]] = {}
        self.asked: list[tuple[str, list[Mapping[str, str]], str, Sampling | None]] = []
        self.stopped: dict[str, asyncio.Event] = {}
        self.closed = False

    async def start(self) -> Loaded:
        self.alive = True
        return Loaded("fake", "fake", 1, 1, 4096, tuple(self.adapters), True, False, 0.0)

    async def open(self, pane: str, context: int = 0) -> int:
        self.stopped[pane] = asyncio.Event()
        return 4096

    async def set_scales(self, pane: str, scales: Mapping[str, float]) -> None:
        self.scales[pane] = dict(scales)

    async def ask(
        self,
        pane: str,
        messages: Sequence[Mapping[str, str]],
        template: str = "model",
        sampling: Sampling | None = None,
    ) -> AsyncIterator[Token | Done | Failed]:
        self.asked.append((pane, list(messages), template, sampling))
        prompt = messages[-1]["content"]
        if "die" in prompt:
            self.alive = False
            yield Failed("the chat process was killed by SIGKILL", "start it again")
            return
        words = self.answers[len(messages) // 2 % len(self.answers)].split(" ")
        for number, word in enumerate(words):
            yield Token(word if number == 0 else f" {word}")
            await asyncio.sleep(0)
        if "wait" in prompt:
            await self.stopped[pane].wait()
            yield Done("stopped", len(words), 38.0, 12, 0)
            return
        yield Done("end", len(words), 38.0, 12, 3 if "<think>" in "".join(words) else 0)

    def stop(self, pane: str) -> None:
        self.stopped[pane].set()

    async def close_pane(self, pane: str) -> None:
        self.stopped.pop(pane, None)

    async def close(self) -> None:
        self.alive = False
        self.closed = True


async def until(pilot: Pilot[None], condition: Callable[[], object], tries: int = 500) -> None:
    """Let the app work until the condition holds; fails when it never does."""
    for _ in range(tries):
        if condition():
            return
        await pilot.pause(0.02)
    raise AssertionError("the app never came to that")


def text_of(app: MedmergeApp, selector: str) -> str:
    """The plain text that a Static of the screen shows."""
    return str(app.screen.query_one(selector, Static).content)


async def show(pilot: Pilot[None], name: str) -> None:
    """Go to a screen once the workspace was read."""
    app = pilot.app
    assert isinstance(app, MedmergeApp)
    await until(pilot, lambda: app.overview is not None)
    app.show(name)
    await until(pilot, lambda: getattr(app.screen, "NAME", "") == name and app.screen.is_mounted)
    await pilot.pause()
