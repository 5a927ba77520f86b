"""The training loop: transformers' Trainer with an exact loss, live events and a held-out loss.

Only `training.run` imports this (torch and transformers are loaded here). What is changed against the stock
Trainer, and why:
- the loss is the sum over trained positions divided by their number in the whole accumulated step, and logits
  are computed for those positions only (a prompt's logits cost as much as an answer's and are thrown away);
- the held-out loss is weighted by tokens, so that exp(loss) is a perplexity;
- a loss that is not a number stops the run at once, naming the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from engine.errors import MedmergeError
from engine.jobs.events import EventWriter
from training.masking import IGNORE
from training.packing import Block, collate


def token_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum of -log p(token) over trained tokens in nats, number of trained tokens).

    batch: input_ids, labels, position_ids, each int64 (batch, length), no attention mask (see `packing`).
    Position t predicts the label at t + 1. `logits_to_keep` restricts the output layer to positions that any row
    trains. The cache is off: with one, transformers does not look for packed documents.
    """
    targets = batch["labels"][:, 1:]
    keep = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=keep
    )
    chosen = targets[:, keep]
    loss = F.cross_entropy(
        output.logits.float().flatten(0, 1), chosen.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss, int((chosen != IGNORE).sum())


@torch.no_grad()
def held_out_loss(model: Any, blocks: Sequence[Block], pad: int, batch_size: int = 1) -> tuple[float, int]:
    """(mean -log p per trained token in nats, number of tokens) over all blocks, dropout off."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(blocks), batch_size):
        batch = {
            key: value.to(device) for key, value in collate(blocks[start : start + batch_size], pad).items()
        }
        loss, tokens = token_loss(model, batch)
        total += float(loss)
        count += tokens
    model.train(was_training)
    return (total / count if count else math.nan), count


class LoraTrainer(Trainer):
    """Trainer over blocks; counts processed and trained tokens and puts the counts into every log line."""

    def __init__(self, *, pad: int, **kwargs: Any) -> None:
        super().__init__(data_collator=lambda blocks: collate(blocks, pad), **kwargs)
        self.remove_callback(PrinterCallback)  # the events say it already
        self.model_accepts_loss_kwargs = True  # the step's token count comes in, the loss is divided by it
        self.tokens = 0
        self.trained_tokens = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss, count = token_loss(model, inputs)
        if not math.isfinite(float(loss.detach())):
            raise MedmergeError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}; training stopped",
                "lower learning_rate, or look for broken rows in the data; earlier checkpoints are kept",
            )
        self.tokens += int(inputs["input_ids"].numel())
        self.trained_tokens += count
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else max(count, 1))
        if self.accelerator.num_processes > 1:  # gradients are averaged over processes; the divisor is global
            loss = loss * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, "tokens": self.tokens, "trained_tokens": self.trained_tokens}
        super().log(logs, start_time)

    def recall_tokens(self, history: Sequence[dict[str, Any]]) -> None:
        """Token counts as a checkpoint's log history left them (resume)."""
        for entry in history:
            self.tokens = int(entry.get("tokens", self.tokens))
            self.trained_tokens = int(entry.get("trained_tokens", self.trained_tokens))


class Reporter(TrainerCallback):
    """Writes events while training and measures the held-out loss every `eval_every` steps and at the end."""

    def __init__(self, events: EventWriter, held_out: Sequence[Block], pad: int, eval_every: int) -> None:
        self.events, self.held_out, self.pad, self.eval_every = events, held_out, pad, eval_every
        self.trainer: LoraTrainer | None = None
        self._mark = (0.0, 0)

    def _trainer(self) -> LoraTrainer:
        assert self.trainer is not None
        return self.trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer()
        trainer.recall_tokens(state.log_history)
        self._mark = (time.monotonic(), trainer.tokens)
        if state.global_step == 0:
            self._evaluate(state)
        self.events.progress(state.global_step, state.max_steps, "steps", phase="train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        seconds, tokens = time.monotonic() - self._mark[0], self._trainer().tokens - self._mark[1]
        self._mark = (time.monotonic(), self._trainer().tokens)
        rate = tokens / seconds if seconds > 0 else math.nan
        values = {name: logs[key] for name, key in (("loss", "loss"), ("lr", "learning_rate")) if key in logs}
        self.events.metric(
            state.global_step,
            **values,
            grad_norm=logs.get("grad_norm"),
            tok_s=rate,
            tokens=logs.get("tokens"),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.events.progress(state.global_step, state.max_steps, "steps", phase="train")
        if state.global_step % self.eval_every == 0 and state.global_step < state.max_steps:
            self._evaluate(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.events.log(f"checkpoint at step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluate(state)

    def _evaluate(self, state: TrainerState) -> None:
        if not self.held_out:
            return
        trainer = self._trainer()
        started = time.monotonic()
        loss, count = held_out_loss(
            trainer.model, self.held_out, self.pad, trainer.args.per_device_eval_batch_size
        )
        # Straight into the history: Trainer.log here would cancel the log of this step's training loss.
        perplexity = math.exp(min(loss, 50.0))
        state.log_history.append({"step": state.global_step, "eval_loss": loss, "eval_tokens": count})
        self.events.metric(state.global_step, eval_loss=loss, eval_perplexity=perplexity)
        self._mark = (self._mark[0] + time.monotonic() - started, self._mark[1])
