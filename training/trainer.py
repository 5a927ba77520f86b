"""The training loop: transformers' Trainer with an exact loss, checkpoints that survive anything, and live events.

Only `training.fit` imports this (torch and transformers are loaded here). What is changed against the stock
Trainer, and why:
- the loss is the sum over trained positions divided by their number in the whole accumulated step (of all
  processes), and logits are computed for those positions only (a prompt's cost as much and are thrown away);
- a loss or gradient that is not a number stops the run at once, naming the step, before it reaches a checkpoint;
- a checkpoint counts once a mark with the sizes of its files stands in it (`training.checkpoints`); a disk that
  fills up leaves the one before;
- cancelling saves a checkpoint of the last whole step, whatever the moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainerState

from engine.errors import MedmergeError
from training import checkpoints
from training.masking import IGNORE
from training.packing import Block, collate
from training.stopping import Stopper


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
def held_out_loss(
    model: Any, blocks: Sequence[Block], pad: int, batch_size: int = 1, part: tuple[int, int] = (0, 1)
) -> tuple[float, int]:
    """(mean -log p per trained token in nats, number of tokens) over all blocks, dropout off.

    part: (process, processes); each process takes every so-manieth block and the sums are added up. A batch that
    does not fit into memory is halved, down to one block. nan where nothing is trained.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    mine = range(part[0], len(blocks), part[1])
    start = 0
    while start < len(mine):
        chosen = [blocks[number] for number in mine[start : start + batch_size]]
        try:
            batch = {key: value.to(device) for key, value in collate(chosen, pad).items()}
            loss, tokens = token_loss(model, batch)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size = max(1, batch_size // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        sums += torch.tensor([float(loss), tokens], dtype=torch.float64, device=device)
        start += len(chosen)
    model.train(was_training)
    if part[1] > 1:
        torch.distributed.all_reduce(sums)
    total, count = float(sums[0]), int(sums[1])
    return (total / count if count else math.nan), count


def out_of_memory(error: BaseException) -> bool:
    """Whether torch (on either device) or Python says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def token_counts(history: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Processed, trained and padding tokens as the last log line counts them; zeros before the first."""
    for entry in reversed(history):
        if "tokens" in entry:
            return int(entry["tokens"]), int(entry["trained_tokens"]), int(entry["padding_tokens"])
    return 0, 0, 0


class TrainSet(torch.utils.data.Dataset[Block]):
    """The run's blocks, filled up with empty ones so that every process gets as many batches."""

    def __init__(self, blocks: Sequence[Block], multiple: int) -> None:
        self.blocks = blocks
        self.size = math.ceil(len(blocks) / multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index] if index < len(self.blocks) else Block([], [], [])


class EpochOrder(torch.utils.data.Sampler[int]):
    """A new permutation of the blocks for every epoch, from (seed, epoch) alone; the empty ones stand last.

    The global random generators are not touched, so that the order is the same however many processes share it.
    """

    def __init__(self, data: TrainSet, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        count = len(self.data.blocks)
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(count).tolist()
        yield from range(count, len(self.data))


class LoraTrainer(Trainer):
    """Trainer over blocks; counts processed, trained and padding tokens and puts the counts into every log line.

    `after_step` is called after every step and its checkpoint, with the step: the place for evaluations, which may
    be interrupted. `rewind`: takes the curve on disk back to a checkpoint. `keep`: how many checkpoints stay.
    """

    def __init__(
        self,
        *,
        pad: int,
        stopper: Stopper,
        order: EpochOrder,
        keep: int,
        after_step: Callable[[int], None],
        rewind: Callable[[TrainerState], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_collator=lambda blocks: collate(blocks, pad), train_dataset=order.data, **kwargs
        )
        self.remove_callback(PrinterCallback)  # the events say it already
        self.model_accepts_loss_kwargs = True  # the step's token count comes in, the loss is divided by it
        self.counts = torch.zeros(
            3, dtype=torch.int64
        )  # processed without padding, trained, padding; this process
        self.stopper, self.order, self.keep = stopper, order, keep
        self.after_step, self.rewind = after_step, rewind
        self._rng: dict[str, Any] = {}  # of the random generators, after the step `_whole_step`
        self._whole_step = self._saved_step = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    # ---- the loss ------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss, count = token_loss(model, inputs)
        self.must_be_finite(float(loss.detach()), "loss", self.state.global_step + 1)
        padding = int(inputs["padding"])
        self.counts += torch.tensor([inputs["input_ids"].numel() - padding, count, padding])
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else max(count, 1))
        if self.accelerator.num_processes > 1:  # gradients are averaged over processes; the divisor is global
            loss = loss * self.accelerator.num_processes
        return loss

    def must_be_finite(self, value: float, what: str, step: int) -> None:
        """Raise MedmergeError for a value that is not a number."""
        if not math.isfinite(value):
            raise MedmergeError(
                f"the {what} is {value} at step {step}; training stopped",
                "lower learning_rate, or look for broken rows in the data; the last good checkpoint is kept",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            counts = self.counts.to(self.args.device)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(counts)
            tokens, trained, padding = counts.tolist()
            logs = {**logs, "tokens": tokens, "trained_tokens": trained, "padding_tokens": padding}
        super().log(logs, start_time)

    def recall(self, history: Sequence[dict[str, Any]], step: int) -> None:
        """Go on counting where a checkpoint's log history ends (resume). The counts are of all processes: the first
        one takes them over."""
        self._saved_step = step
        self.counts = torch.tensor(token_counts(history)) * int(self.args.process_index == 0)

    # ---- stopping and saving -------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each step: nothing that is not a number is saved; a stop that was asked meanwhile happens here."""
        step = self.state.global_step
        if grad_norm is not None:
            self.must_be_finite(float(grad_norm), "gradient norm", step)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._anyone_stops():
            self.control.should_training_stop = True
            if step != self._saved_step:
                self._save_checkpoint(self.model, None)
        self._rng, self._whole_step = checkpoints.random_states(), step
        self.stopper.leave()
        if not self.stopper.asked:
            self.after_step(step)

    def _anyone_stops(self) -> bool:
        """Whether any process was asked to stop; all learn it at the same step."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(self.stopper.asked), device=self.args.device)
            torch.distributed.all_reduce(asked)
            if asked > 0:
                self.stopper.ask()
        return self.stopper.asked

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        with checkpoints.writing(folder):
            super()._save_checkpoint(model, trial)
            if self.accelerator.num_processes > 1:
                torch.distributed.barrier()  # every process's random states are there
            if self.args.should_save:
                checkpoints.mark(folder, self.keep)
        self._saved_step = step

    def save_last_step(self) -> bool:
        """A checkpoint of the last whole step, after an interruption within the next one.

        Weights and optimizer have not moved since then; what the interrupted step drew from the random generators
        is taken back. Returns whether there is anything to resume from.
        """
        step = self.state.global_step
        whole = step == self._whole_step and self.accelerator.num_processes == 1
        if step and step != self._saved_step and whole:
            checkpoints.restore_random_states(self._rng)
            self._save_checkpoint(self.model, None)
        return bool(self._saved_step)

    def load_finished(self, checkpoint: Path) -> None:
        """The weights and the story of a run that had made its last step already."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.recall(self.state.log_history, self.state.global_step)
        self.rewind(self.state)
        self.after_step(self.state.global_step)
