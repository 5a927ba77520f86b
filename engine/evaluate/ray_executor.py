"""Measures cells on a Ray cluster: the same cells, the same rows as on this machine. Called by the job.

Workers (`ray_worker`) measure whole cells and send rows back batch by batch; here they are written, by the one
process that writes. A worker that dies is replaced, and its cell goes on after the rows that were kept. Cells of
servers are measured by this process itself: `concurrency` is a limit of the server, and its key stays here.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import BadInputError, CancelledError, ChildFailedError, MedmergeError, NotFiniteError
from engine.evaluate import local
from engine.evaluate.bench import Bench
from engine.evaluate.cells import Cell
from engine.evaluate.config import EvalConfig, GgufFile, Server
from engine.evaluate.ray_cluster import Crew, cluster, held_sigterm, plan_crew
from engine.evaluate.ray_worker import Wanted, Worker
from engine.evaluate.recorder import Recorder
from engine.weights import Checkpoint

DEATHS = 3  # of workers on one cell, before it is given up
PATIENCE = 30.0  # seconds without any worker before the log says what is waited for
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}  # as jobs are started with


def measure(
    config: EvalConfig, recorder: Recorder, cells: Sequence[Cell], address: str = "", workers: int = 0
) -> None:
    """Measure all cells on the cluster at `address` ("" starts one on this machine), with so many workers
    (0: one per GPU, or one per 8 cores).

    Raises:
        BadInputError: no ray, no such cluster, too few CPUs or GPUs for `workers`, or every worker differs from
            this process in versions or files.
        ChildFailedError: workers die before they measure anything.
        MedmergeError: what a mixture's cell raised, as on this machine.
    """
    mine = [cell for cell in cells if isinstance(cell.model, Server)]
    theirs = [cell for cell in cells if not isinstance(cell.model, Server)]
    if theirs:
        from engine.evaluate.live import pick_compute, pick_device

        device = pick_device(config.device)
        compute = pick_compute(config.compute, config.dtype, device)
        told = replace(config, device=device.type, compute="float32" if compute == "float32" else "model")
        wanted = Wanted.of(config, theirs)
        with cluster(address, workers, device.type == "cuda") as nodes:
            crew = plan_crew(nodes, workers, device.type == "cuda", _nbytes(told, theirs), len(theirs))
            with held_sigterm() as check:
                _Dispatch(told, recorder, theirs, crew, wanted).run(check)
    if mine:
        local.measure(Bench(config, recorder.events.log), recorder, mine)


def _nbytes(config: EvalConfig, cells: Sequence[Cell]) -> int:
    """About the memory a worker's model takes: weights as they are computed with, and half as much for its work."""
    found = [cell.model.path.stat().st_size for cell in cells if isinstance(cell.model, GgufFile)]
    if config.base is not None and any(cell.model is None for cell in cells):
        wider = 2 if config.compute == "float32" and config.dtype != "float32" else 1
        found.append(wider * Checkpoint.open(config.base).nbytes)
    return int(1.5 * max(found))


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it. model: what it has in memory (`_model_of` of its last cell)."""

    name: str
    actor: Any
    cell: Cell | None = None
    model: str = ""


def _model_of(cell: Cell) -> str:
    return cell.label if isinstance(cell.model, GgufFile) else str(sorted(cell.weights.items()))


class _Dispatch:
    """Hands cells to workers until all are done or failed."""

    def __init__(
        self, config: EvalConfig, recorder: Recorder, cells: Sequence[Cell], crew: Crew, wanted: Wanted
    ) -> None:
        import ray

        self.ray: Any = ray
        self.config, self.recorder, self.crew = config, recorder, crew
        self.open = list(cells)
        self.deaths: dict[str, int] = {}  # by hash of a cell
        self.in_vain = 0  # deaths since a worker gave rows
        self.waiting: dict[Any, _Hand] = {}  # what ray.wait is called with: a check, or the rows of a cell
        self.idle: list[_Hand] = []
        self.refused: list[str] = []
        self._numbers = 0
        self._wanted = ray.put(wanted)
        self._actor = ray.remote(Worker).options(
            num_cpus=crew.cpus,
            num_gpus=crew.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )

    def run(self, check: Callable[[], None]) -> None:
        """Raises as `measure` does; the cluster's end stops the workers. check: raises when the job is cancelled."""
        last = time.monotonic()
        told = False
        for _ in range(self.crew.workers):
            self._start()
        while self.open or any(hand.cell for hand in self.waiting.values()):
            if not self.waiting and not self.idle:
                raise BadInputError(
                    f"no worker of the Ray cluster can measure this run: {self.refused[-1]}",
                    "install the same medmerge and libraries there, and give it the same files at the same paths",
                )
            ready, _ = self.ray.wait(list(self.waiting), num_returns=1, timeout=0.5)
            check()
            for reference in ready:
                last = time.monotonic()
                self._take(reference, self.waiting.pop(reference))
            if not told and not self.idle and time.monotonic() - last > PATIENCE and not self._anyone_works():
                told = True
                self.recorder.events.log(
                    f"waiting for the Ray cluster: no worker with {self.crew.cpus} CPUs and {self.crew.gpus} GPUs "
                    "has started yet"
                )

    def _anyone_works(self) -> bool:
        return any(hand.cell for hand in self.waiting.values())

    def _start(self) -> None:
        """One more worker; its answer to `check` is awaited like rows."""
        self._numbers += 1
        actor = self._actor.remote(self.config, self._wanted, self.crew.cpus, ENVIRONMENT)
        self.waiting[actor.check.remote()] = _Hand(f"worker {self._numbers}", actor)

    def _take(self, reference: Any, hand: _Hand) -> None:
        """What a worker gave: that it is ready, rows, the end of a cell, an error, or its death."""
        errors = self.ray.exceptions
        try:
            if hand.cell is None:
                self._welcome(hand, self.ray.get(reference))
            else:
                self._keep(hand, hand.cell, reference)
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            self._bury(hand, error)
        except errors.RayTaskError:
            raise  # a defect, with the worker's traceback
        except errors.RayError as error:
            raise ChildFailedError(
                f"the Ray cluster failed: {_line(error)}", "continue with --resume"
            ) from error

    def _refuse(self, hand: _Hand, why: str) -> None:
        """A worker that must not, or cannot, measure: another like it would not help."""
        self.refused.append(why)
        self.recorder.events.warning(f"{hand.name} is not used. {why}")
        self.ray.kill(hand.actor)

    def _welcome(self, hand: _Hand, ready: Any) -> None:
        if ready.differences:
            self._refuse(hand, f"{ready.host}: " + "; ".join(ready.differences))
            return
        threads = f"{self.crew.cpus} thread{'s' * (self.crew.cpus > 1)}"
        self.recorder.events.log(f"{hand.name}: process {ready.pid} on {ready.host}, {threads}")
        self._next(hand)

    def _keep(self, hand: _Hand, cell: Cell, rows: Any) -> None:
        try:
            piece = self.ray.get(next(rows))
        except StopIteration:
            try:
                self.recorder.finish(cell)
            except MedmergeError as error:
                self._give_up(cell, error)
            self._next(hand)
            return
        if isinstance(piece, MedmergeError):
            self._give_up(cell, piece)
            self._next(hand)
            return
        self.waiting[rows] = hand
        self.in_vain = 0
        for words in piece.said:
            self.recorder.events.log(f"{hand.name}: {words}")
        self.recorder.add(cell, piece.rows, piece.prompts)
        self.recorder.advance(cell, piece.done)

    def _give_up(self, cell: Cell, error: MedmergeError) -> None:
        """As on this machine: an error of a file's cell fails that cell, one of a mixture's ends the run, unless it is
        that the mixture gives values that are not numbers."""
        broken = isinstance(error, NotFiniteError)
        if isinstance(error, CancelledError) or (cell.model is None and not broken):
            raise error
        self.recorder.fail(cell, str(error))

    def _next(self, hand: _Hand) -> None:
        """Give a free worker its next cell, or let it wait for one that another leaves."""
        hand.cell = None
        while self.open:
            cell = self._choose(hand)
            try:
                self.recorder.begin(cell)
            except MedmergeError as error:
                self._give_up(cell, error)
                continue
            hand.cell, hand.model = cell, _model_of(cell)
            self.recorder.events.log(f"{hand.name}: {cell.title}")
            measured = hand.actor.measure.options(num_returns="streaming").remote(
                cell, list(self.recorder.samples_of(cell)), self.recorder.kept(cell)
            )
            self.waiting[measured] = hand
            return
        self.idle.append(hand)

    def _choose(self, hand: _Hand) -> Cell:
        """A cell of the model it holds; else the first of a model nobody holds; else the last of all."""
        held = {other.model for other in self.waiting.values()}
        mine = [cell for cell in self.open if _model_of(cell) == hand.model]
        free = [cell for cell in self.open if _model_of(cell) not in held]
        cell = (mine or free or self.open[-1:])[0]
        self.open.remove(cell)
        return cell

    def _bury(self, hand: _Hand, error: Exception) -> None:
        """A worker died: its cell is open again, and another worker takes its place."""
        if getattr(error, "actor_init_failed", False):  # medmerge, or what it imports, is not there
            self._refuse(hand, f"it cannot start: {_line(error)}")
            return
        with contextlib.suppress(Exception):  # it may be gone, or cut off and still alive
            self.ray.kill(hand.actor)
        why = _line(error)
        self.in_vain += 1
        cell = hand.cell
        self.recorder.events.warning(f"{hand.name} died{f' in {cell.title}' if cell else ''}: {why}")
        if cell is not None:
            self.deaths[cell.hash] = self.deaths.get(cell.hash, 0) + 1
            if self.deaths[cell.hash] < DEATHS:
                self.open.insert(0, cell)
            else:
                self.recorder.fail(
                    cell, f"{DEATHS} workers died while they measured it (out of memory?): {why}"
                )
        if self.in_vain > DEATHS * self.crew.workers:
            raise ChildFailedError(
                f"{self.in_vain} workers of the Ray cluster died and measured nothing; the last: {why}",
                "too little memory for their models? try fewer (--workers), then --resume",
            )
        if self.open and self.idle:
            self._next(self.idle.pop())
        if self.open:
            self._start()


def _line(error: BaseException) -> str:
    """What Ray says of a death in one line: the last of a traceback, else all but its table of ids."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    if getattr(error, "actor_init_failed", False):
        lines = lines[-1:]
    text = " ".join(line.strip() for line in lines if line.strip() and not line.startswith(("\t", " ")))
    text = text.partition(" Some common causes")[0].removeprefix(
        "The actor died unexpectedly before finishing this task. "
    )
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
