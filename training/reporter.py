"""What a run says while it trains: events, its curve on disk, and the held-out loss. Used by `training.fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.jobs.events import EventWriter
from training.curve import CurveFile
from training.packing import Block
from training.trainer import LoraTrainer, held_out_loss

if TYPE_CHECKING:
    from pathlib import Path


def memory_in_use() -> int:
    """Bytes: the most that tensors took on the GPU so far, or this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


class Reporter(TrainerCallback):
    """Writes events while training and measures the held-out loss every `eval_every` steps and at the end.

    Evaluations stand in the trainer's log history beside the losses, so that a checkpoint carries them.
    """

    def __init__(
        self,
        events: EventWriter,
        curve: Path,
        held_out: Sequence[Block],
        pad: int,
        eval_every: int,
        batch_size: int,
    ) -> None:
        self.events, self.curve = events, CurveFile(curve)
        self.held_out, self.pad, self.eval_every, self.batch_size = held_out, pad, eval_every, batch_size
        self.trainer: LoraTrainer | None = None
        self._mark = (0.0, 0)  # time and tokens when the last rate was taken
        self._latest: dict[str, float] = {}  # loss, held-out loss and speed, for the progress line

    def _trainer(self) -> LoraTrainer:
        assert self.trainer is not None
        return self.trainer

    @property
    def _main(self) -> bool:
        return bool(self._trainer().is_world_process_zero())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer()
        trainer.recall(state.log_history, state.global_step)
        self.rewind(state)
        self._mark = (time.monotonic(), int(trainer.counts[0]))
        self._progress(state)
        self.after_step(state.global_step)

    def rewind(self, state: TrainerState) -> None:
        """Take the points after the checkpoint's step off the curve on disk."""
        if self._main:
            self.curve.rewind(state.global_step, _is_measured(state, state.global_step))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer().order.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer().stopper.enter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not self._main:
            return
        now, tokens = time.monotonic(), int(logs["tokens"])
        seconds, made = now - self._mark[0], tokens - self._mark[1]
        self._mark = (now, tokens)
        padding = int(logs["padding_tokens"])
        values = {
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tok_s": made / seconds if seconds > 0 else None,
            "tokens": tokens,
            "padding": padding / max(tokens + padding, 1),
            "memory": memory_in_use(),
        }
        self.events.metric(state.global_step, **values)
        self.curve.append({"step": state.global_step, **values})
        self._latest |= {"loss": logs["loss"], "tok_s": values["tok_s"] or 0.0}
        self._progress(state)

    def _progress(self, state: TrainerState) -> None:
        forms = {"loss": "loss {:.3f}", "eval_loss": "held out {:.3f}", "tok_s": "{:,.0f} tok/s"}
        said = [form.format(self._latest[key]) for key, form in forms.items() if key in self._latest]
        self.events.progress(state.global_step, state.max_steps, "steps", ", ".join(said), phase="train")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.events.log(f"checkpoint at step {state.global_step}")

    def after_step(self, step: int) -> None:
        """Measure the held-out loss where it is due and not in the history yet.

        Due are step 0, every `eval_every`-th and the last one.
        """
        trainer = self._trainer()
        state = trainer.state
        due = step % self.eval_every == 0 or step >= state.max_steps
        if not self.held_out or not due or _is_measured(state, step):
            return
        started = time.monotonic()
        self.events.progress(step, state.max_steps, "steps", "measuring the held-out loss", phase="train")
        part = (trainer.args.process_index, trainer.args.world_size)
        loss, count = held_out_loss(trainer.model, self.held_out, self.pad, self.batch_size, part)
        trainer.must_be_finite(loss, "held-out loss", step)
        # Straight into the history: Trainer.log here would cancel the log of this step's training loss.
        state.log_history.append({"step": step, "eval_loss": loss, "eval_tokens": count})
        values = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50.0))}
        self._latest["eval_loss"] = loss
        if self._main:
            self.events.metric(step, **values)
            self.curve.append({"step": step, **values})
        self._mark = (self._mark[0] + time.monotonic() - started, self._mark[1])


def _is_measured(state: TrainerState, step: int) -> bool:
    return any(entry["step"] == step and "eval_loss" in entry for entry in state.log_history)
