"""The first samples exactly as the model will see them, with the trained tokens marked: the target of `--preview`.

Loads the tokenizer and no model, reads the first rows only, and encodes them with a run's own encoder.
Called by `tui/commands/train.py` and the app; `tui/commands/train_preview.py` prints the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import templates
from engine.jobs.events import EventWriter
from training import masking
from training.data.sources import Source, read_source
from training.masking import IGNORE

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.data.samples import Sample
    from training.masking import Encoded
    from training.prepare import Encoder

ROWS = 200  # looked at, over all data
MOST_TEXT = 20_000_000  # characters, after which no further row is looked at
SHOWN_TOKENS = 8192  # of one sample


def run(params: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Params {"config": settings of a TrainConfig, "samples": 3}; what the first rows become.

    Returns {"kind", "template": {"name", "stop", "sha256"} or None, "cutoff", "samples": [...], "counted": {"rows",
    "too_long", "untrained"}, "warnings": [...]}. A sample is {"place", "length", "trained", "cut", "pieces",
    "left_out", "note"}; its pieces {"text", "tokens", "trained", "special", "border"} joined are the exact text the
    model sees (but for `left_out` tokens at the end of a very long one). `border` says that a new block begins
    with this piece (pt). Raises what a run would raise for these rows.
    """
    from training.config import from_mapping
    from training.prepare import Encoder, load_tokenizer

    config = from_mapping(dict(params["config"]), "preview")
    tokenizer = load_tokenizer(Path(config.base))
    encoder = Encoder(config, tokenizer)
    wanted = max(int(params.get("samples", 3)), 1)
    look = _Look(config, encoder, wanted)
    each = max(ROWS // len(config.data), 1)
    for number, source in enumerate(config.data):
        events.progress(number, len(config.data), "files", Path(source.path).name, phase="preview")
        look.at(source, each)
    events.progress(len(config.data), len(config.data), "files", phase="preview")
    template = templates.describe(encoder.template) if encoder.template else None
    if template:
        template.pop("text")
    return {
        "kind": config.kind,
        "template": template,
        "cutoff": config.cutoff,
        "samples": look.samples(),
        "counted": look.counted,
        "warnings": look.warnings,
    }


class _Look:
    """Encodes the first rows of each source, counts them, and keeps what is shown."""

    def __init__(self, config: TrainConfig, encoder: Encoder, wanted: int) -> None:
        self.config, self.encoder, self.wanted = config, encoder, wanted
        self.counted = {"rows": 0, "too_long": 0, "untrained": 0}
        self.warnings = [*config.notes]
        if encoder.template is not None:
            self.warnings += masking.check_marks(encoder.template, encoder.tokenizer, config.base)
        self._shown: list[list[dict[str, Any]]] = []
        self._characters = 0
        self._stream = 0  # pt: tokens before this document, for the border of its block
        self._turns_seen = False

    def at(self, source: Source, rows: int) -> None:
        if source.sample:
            self.warnings.append(f"{source.path}: a run draws {source.sample} rows; these are the first ones")
        shown: list[dict[str, Any]] = []
        self._shown.append(shown)
        for sample in islice(read_source(replace(source, sample=0), self.config.kind), rows):
            encoded = self.encoder(sample)
            self.counted["rows"] += 1
            self.counted["too_long"] += self._too_long(encoded)
            self.counted["untrained"] += not encoded.trained
            self._warn_of_turns(sample)
            if len(shown) < self.wanted:
                shown.append(self._show(sample, encoded))
            self._stream += len(encoded.ids)
            self._characters += len(sample.text) + sum(len(turn["content"]) for turn in sample.messages)
            if self._characters > MOST_TEXT and len(shown) == self.wanted:
                break

    def samples(self) -> list[dict[str, Any]]:
        """The first of each source, then the second of each, and so on."""
        turns = zip_longest(*self._shown)
        return [sample for turn in turns for sample in turn if sample is not None][: self.wanted]

    def _too_long(self, encoded: Encoded) -> bool:
        return encoded.cut > 0 if self.config.kind == "sft" else len(encoded.ids) > self.config.cutoff

    def _warn_of_turns(self, sample: Sample) -> None:
        """Say once what several answers in a conversation mean for this template."""
        template, answers = self.encoder.template, sum(t["role"] == "assistant" for t in sample.messages)
        if self._turns_seen or template is None or answers < 2 or self.config.mask_history:
            return
        self._turns_seen = True
        if isinstance(template, templates.ModelTemplate):
            pieces = sum(segment.answer for segment in template.segments(sample.messages))
            if pieces < answers:
                self.warnings.append(
                    f"the model's template rewrites earlier answers: {pieces} of {answers} answers of a conversation "
                    "can be trained on; a built-in template trains all"
                )
        elif template.strip_old_think:
            self.warnings.append(
                f"template {template.name}: every answer of a conversation is trained with its think block, which "
                "inference does not show in earlier turns; mask_history: true trains the last answer, as inference "
                "shows it"
            )

    def _show(self, sample: Sample, encoded: Encoded) -> dict[str, Any]:
        note = ""
        labels, borders = encoded.labels, set[int]()
        if self.config.kind == "pt":
            size = self.config.cutoff
            borders = set(range(size - self._stream % size, len(encoded.ids), size))
            labels = [IGNORE if at in borders else label for at, label in enumerate(labels)]
        trained = sum(label != IGNORE for label in labels)
        if not trained:
            sft = self.config.kind == "sft"
            note = self.encoder.why_untrained(sample) if sft else "the text is a single token"
        return {
            "place": sample.place,
            "length": len(encoded.ids),
            "trained": trained,
            "cut": encoded.cut,
            "pieces": pieces(
                self.encoder.tokenizer, encoded.ids[:SHOWN_TOKENS], labels[:SHOWN_TOKENS], borders
            ),
            "left_out": max(len(encoded.ids) - SHOWN_TOKENS, 0),
            "note": note,
        }


@dataclass(frozen=True)
class _Run:
    start: int
    end: int
    trained: bool
    special: bool


def pieces(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int], borders: set[int] | None = None
) -> list[dict[str, Any]]:
    """Consecutive tokens of one kind as texts, which joined are the decoded whole.

    A character whose bytes lie on both sides of a seam belongs to the piece that completes it: seams are found
    as the common start of the whole text and of the text so far, which ends in U+FFFD inside a character.
    """
    whole = _decoded(tokenizer, ids)
    found, done = [], 0
    for one in _runs(tokenizer, ids, labels, borders or set()):
        reached = len(whole) if one.end == len(ids) else _common(whole, _decoded(tokenizer, ids[: one.end]))
        found.append(
            {
                "text": whole[done : max(reached, done)],
                "tokens": one.end - one.start,
                "trained": one.trained,
                "special": one.special,
                "border": one.start in (borders or ()),
            }
        )
        done = max(reached, done)
    return found


def _runs(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], borders: set[int]) -> Iterator[_Run]:
    control = set(tokenizer.added_tokens_decoder)
    kinds = [(label != IGNORE, token in control) for token, label in zip(ids, labels, strict=True)]
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or kinds[at] != kinds[start] or at in borders:
            yield _Run(start, at, *kinds[start])
            start = at


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _common(whole: str, part: str) -> int:
    """Length of the common start."""
    if whole.startswith(part):
        return len(part)
    differ = (at for at, (one, other) in enumerate(zip(whole, part, strict=False)) if one != other)
    return next(differ, min(len(whole), len(part)))
