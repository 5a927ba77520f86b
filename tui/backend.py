"""The app's only door to disk and processes. Blocking: call it in thread workers, never on the event loop.

`Backend` is what screens rely on (tests bring a fake one); `LocalBackend` is the engine on this machine.
The engine is imported inside the methods, so that the first paint waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tui import actions
from tui.actions import Action, Mixture
from tui.asking import Asker
from tui.forecaster import Forecaster
from tui.jobwatch import JobWatch, job_row
from tui.snapshots import (
    AdapterDetail,
    DataFile,
    JobFeed,
    JobRow,
    Overview,
    PlanView,
    PreviewView,
    SampleRow,
    SampleSet,
    TaskOffer,
    TrainRun,
    VerdictView,
)

if TYPE_CHECKING:
    from engine.evaluate.summary import MetricRow
    from engine.template_check import Trained
    from tui.chatting import ChatPort
    from tui.reading_runs import RunReader


class Backend(Protocol):
    """What the screens need. Methods raise MedmergeError, which is shown to the person as it is."""

    root: Path

    def overview(self, base: str) -> Overview:
        """What the workspace holds; adapters are judged against the model folder `base`."""
        ...

    def detail(self, path: str) -> AdapterDetail:
        """One adapter's health, norms and training story; reads its weights."""
        ...

    def plan(self, mixture: Mixture) -> PlanView:
        """What merging would cost; reads headers only."""
        ...

    def forecast(self, mixture: Mixture) -> PlanView:
        """The plan with seconds, memory and rounding loss; a child process works a second or two on it.
        Asking anew ends the one that runs, whose caller gets a CancelledError."""
        ...

    def report(self, path: str) -> VerdictView | None:
        """The whole verdict kept beside a merge, None where there is none."""
        ...

    def train_runs(self) -> tuple[TrainRun, ...]:
        """The training runs on disk with their curves, and adapters that carry one; newest first."""
        ...

    def preview(self, config: dict[str, Any]) -> PreviewView:
        """The first samples as a run with these settings would see them; a child process works seconds on it.
        Asking anew ends the one that runs, whose caller gets a CancelledError."""
        ...

    def close(self) -> None:
        """The app ends: give up what only it waits for."""
        ...

    def poll_jobs(self, wanted: frozenset[str]) -> tuple[tuple[JobRow, ...], dict[str, JobFeed]]:
        """All jobs and the feeds that grew (of running jobs, and of the `wanted` ones)."""
        ...

    def start(self, action: Action) -> JobRow:
        """Start a job; it survives the app."""
        ...

    def cancel(self, job_id: str) -> bool:
        """Stop a job and all it started; may take seconds."""
        ...

    def log_tail(self, job_id: str, lines: int = 200) -> str:
        """The end of what the job's process printed."""
        ...

    def read_sweep(self, config: Path) -> Action:
        """The sweep a config file asks for, checked, as a new run."""
        ...

    def write_sweep(self, name: str, config: dict[str, Any]) -> Action:
        """Write a config made here into configs/, and the sweep that it asks for, as `read_sweep`."""
        ...

    def table(self, run: str) -> tuple[MetricRow, ...]:
        """All numbers of an evaluation so far."""
        ...

    def samples(self, run: str, row: MetricRow) -> SampleSet:
        """The samples behind one number."""
        ...

    def scores(self, rows: Sequence[SampleRow], metric: str) -> list[float]:
        """An overlap metric of every answer alone, which takes seconds for thousands."""
        ...

    def labels(self, run: str, rows: Sequence[SampleRow]) -> list[SampleRow]:
        """These answers to probes with their labels."""
        ...

    def correct(self, run: str, sample: SampleRow, label: str | None, note: str) -> None:
        """Keep a label given by hand beside the rows (None: back to the automatic one)."""
        ...

    def export_table(self, name: str, rows: Sequence[MetricRow], suffix: str) -> Path:
        """Write a table into exports/."""
        ...

    def export_samples(self, name: str, sets: Sequence[tuple[str, Sequence[SampleRow]]], suffix: str) -> Path:
        """Write samples of models into exports/."""
        ...

    def measurable(
        self, files: Sequence[DataFile]
    ) -> tuple[tuple[TaskOffer, ...], tuple[tuple[str, str], ...]]:
        """What these files let one measure, and the evaluation configs that are there, as (path, name)."""
        ...

    def template_warnings(
        self, base: str, adapters: Sequence[Trained], templates: Sequence[str]
    ) -> list[str]:
        """Adapters that were trained with another template than these."""
        ...

    def resume_sweep(self, run: str) -> Action:
        """Going on with a run that stopped."""
        ...

    def chat_model(self, path: Path, adapters: Mapping[str, Path]) -> ChatPort:
        """A model file to talk to, not started yet; its methods belong to the event loop."""
        ...


class LocalBackend:
    """The engine on this machine, for one workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._watch = JobWatch(root / "jobs")
        self._forecaster = Forecaster()
        self._previewer = Asker("preview", 120.0, "a smaller data file shows what it waits for")
        self._runs: RunReader | None = None
        self._tables: dict[str, tuple[list[tuple[int, int]], tuple[MetricRow, ...]]] = {}

    def overview(self, base: str) -> Overview:
        from engine.workspace import Workspace
        from tui.reading import read_workspace

        return read_workspace(Workspace(self.root), base)

    def detail(self, path: str) -> AdapterDetail:
        from tui.reading import adapter_detail

        return adapter_detail(Path(path))

    def plan(self, mixture: Mixture) -> PlanView:
        from tui.reading_merges import plan_view

        return plan_view(mixture.recipe())

    def forecast(self, mixture: Mixture) -> PlanView:
        return self._forecaster.forecast(actions.plan(self.root, mixture))

    def report(self, path: str) -> VerdictView | None:
        from tui.reading_merges import report

        return report(Path(path))

    def train_runs(self) -> tuple[TrainRun, ...]:
        from engine.workspace import Workspace
        from tui.reading_runs import RunReader

        self._runs = self._runs or RunReader()
        return self._runs.read(Workspace(self.root))

    def preview(self, config: dict[str, Any]) -> PreviewView:
        from tui.results import preview_view

        return preview_view(self._previewer.ask(actions.preview(config)))

    def close(self) -> None:
        self._forecaster.stop()
        self._previewer.stop()

    def poll_jobs(self, wanted: frozenset[str]) -> tuple[tuple[JobRow, ...], dict[str, JobFeed]]:
        return self._watch.poll(wanted)

    def start(self, action: Action) -> JobRow:
        from engine.jobs import JobSpec, launch
        from engine.workspace import Workspace

        workspace = Workspace(self.root).create()
        spec = JobSpec(action.kind, action.target, action.params, action.title, action.command)
        return job_row(launch(spec, workspace.jobs))

    def cancel(self, job_id: str) -> bool:
        from engine.jobs import JobStore, cancel

        return cancel(JobStore(self.root / "jobs").get(job_id))

    def log_tail(self, job_id: str, lines: int = 200) -> str:
        from engine.jobs import JobStore

        path = JobStore(self.root / "jobs").get(job_id).log_path
        try:
            with path.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 65536))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def read_sweep(self, config: Path) -> Action:
        from engine.evaluate.config import load_config
        from tui.actions import sweep

        checked = load_config(config, self.root, "sweep")
        out, number = self.root / "runs" / config.stem, 2
        while out.exists():
            out, number = out.with_name(f"{config.stem}-{number}"), number + 1
        return sweep(self.root, config, checked.to_dict(), str(out))

    def write_sweep(self, name: str, config: dict[str, Any]) -> Action:
        return self.read_sweep(actions.write_evaluation(self.root, name, config))

    def table(self, run: str) -> tuple[MetricRow, ...]:
        """Kept until a cell or a correction changes: computing one anew takes seconds."""
        from engine.evaluate.summary import load_table

        stamps = [_stamp(Path(run) / name) for name in ("cells.json", "table.json", "corrections.jsonl")]
        kept = self._tables.get(run)
        if kept is None or kept[0] != stamps:
            kept = self._tables[run] = (stamps, tuple(load_table(Path(run))))
        return kept[1]

    def samples(self, run: str, row: MetricRow) -> SampleSet:
        from tui.reading_samples import samples_of

        return samples_of(Path(run), row)

    def scores(self, rows: Sequence[SampleRow], metric: str) -> list[float]:
        from tui.reading_samples import scores_of

        return scores_of([row.text for row in rows], [row.reference for row in rows], metric)

    def labels(self, run: str, rows: Sequence[SampleRow]) -> list[SampleRow]:
        from tui.reading_samples import labelled

        return labelled(Path(run), rows)

    def correct(self, run: str, sample: SampleRow, label: str | None, note: str) -> None:
        from engine.evaluate import corrections

        corrections.write(Path(run), sample.cell, sample.id, label, note)

    def export_table(self, name: str, rows: Sequence[MetricRow], suffix: str) -> Path:
        from tui.exports import export_table

        return export_table(self.root, name, rows, suffix)

    def export_samples(self, name: str, sets: Sequence[tuple[str, Sequence[SampleRow]]], suffix: str) -> Path:
        from tui.exports import export_samples

        return export_samples(self.root, name, sets, suffix)

    def measurable(
        self, files: Sequence[DataFile]
    ) -> tuple[tuple[TaskOffer, ...], tuple[tuple[str, str], ...]]:
        from tui import evaluating

        return evaluating.offers(files, self.root), evaluating.configs(files, self.root / "configs")

    def template_warnings(
        self, base: str, adapters: Sequence[Trained], templates: Sequence[str]
    ) -> list[str]:
        from engine import template_check

        found: list[str] = []
        for name in templates:
            chosen = template_check.choose(name, Path(base) if base else None)
            found += template_check.warnings(adapters, chosen, "templates: [{name}]")
        return list(dict.fromkeys(found))

    def resume_sweep(self, run: str) -> Action:
        from engine.evaluate.config import load_config
        from tui.foreign import read_json_object

        folder = Path(run)
        mode = "eval" if read_json_object(folder / "cells.json").get("mode") == "eval" else "sweep"
        config = load_config(folder / "config.yaml", self.root, mode)
        return actions.resume_sweep(self.root, folder, config.to_dict(), mode)

    def chat_model(self, path: Path, adapters: Mapping[str, Path]) -> ChatPort:
        from engine.chat.client import ChatModel
        from engine.workspace import state_dir

        return ChatModel(path, adapters, state_dir() / f"chat-{path.stem}.log")


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file does; (0, 0) without one."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size
