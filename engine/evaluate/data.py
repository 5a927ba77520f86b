"""Evaluation data: a task's file in, checked samples out. A broken row is an error with file and line (or row).

generation        {"id", "prompt", "reference", "source"?}
multiple_choice   {"id", "question", "options": [...], "answer": index, "context"?, "source"?}
probes            {"id", "category", "prompt", "kind": "harmful" | "safe" | "advice", "source"?}
perplexity        {"id", "text", "source"?}
instructions      {"id", "prompt", "instructions": [names], "kwargs": [{...}, ...]}

Other names, other formats and prompts made of several columns: a task's `columns` and `prompt` (docs/tasks.md).
Called by the job, the search and `medmerge tasks check`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadDataError
from engine.evaluate.halves import half_of
from engine.evaluate.tasks.options import Options, find_way, read_answer, read_options
from engine.evaluate.tasks.prompt import columns_in, fill
from engine.evaluate.tasks.tables import Row, Table, read_table
from engine.evaluate.tasks.task import FIELDS, Task
from engine.evaluate.values import nearest

PROBE_KINDS = ("harmful", "safe", "advice")
PROMPT_FIELD = {"multiple_choice": "question", "perplexity": "text"}  # the field a task's `prompt` stands for
SHOWN = 5  # rows named in one message


@dataclass(frozen=True)
class Sample:
    """One row of a data set. Fields of other kinds keep their defaults."""

    id: str
    source: str = ""
    prompt: str = ""  # generation, probes; the text itself for perplexity
    reference: str = ""
    options: tuple[str, ...] = ()
    answer: int = -1
    context: str = ""
    category: str = ""
    probe: str = ""  # harmful, safe, advice
    instructions: tuple[dict[str, Any], ...] = ()  # ({"id": "punctuation:no_comma", "kwargs": {...}}, ...)


@dataclass(frozen=True)
class TaskData:
    """What reading a task's file gave. rows: in the file; kept: of them by `where`; skipped: of those, empty."""

    samples: list[Sample]
    rows: int
    kept: int
    skipped: int

    @property
    def notes(self) -> list[str]:
        """What was left out of the file before half and limit, in words."""
        out = []
        if self.kept < self.rows:
            out.append(f"where keeps {self.kept:,} of {self.rows:,} rows")
        if self.skipped:
            out.append(f"{self.skipped:,} rows skipped, because a text in them is empty")
        return out


def read_task(task: Task) -> list[Sample]:
    """The samples a task asks, in file order. Raises BadDataError as `read_data`."""
    return read_data(task).samples


def read_samples(path: Path, kind: str, limit: int | None = None) -> list[Sample]:
    """`limit` samples of a file whose rows have the names above, spread evenly over it (None: all)."""
    return read_task(Task(path.stem, kind, path, limit=limit, mixed_options=True))


def read_data(task: Task) -> TaskData:
    """Read, keep what `where` says, check every row that is kept, take the half, then the limit.

    The limit is spread over the rows, because such files are often sorted by category or source: sample k of n is
    row floor(k * rows / n).

    Raises BadDataError naming file and line or row: what `read_table` refuses, a column that is not there, a value
    that is missing, empty or of the wrong type, an answer outside its options, an id that came before, nothing left.
    """
    table = read_table(task.data, task.header)
    _check_columns(task, table)
    chosen = [n for n, row in enumerate(table.rows) if _kept(row, task.where)]
    if not chosen:
        raise BadDataError(
            f"{table.path}: where leaves none of its {len(table.rows):,} rows", f"where is {task.where}"
        )
    samples, skipped = _Reader(task, table, chosen).read()
    found = TaskData(samples, len(table.rows), len(chosen), skipped)
    if not samples:
        raise BadDataError(f"{table.path}: all {skipped:,} rows are skipped, because a text in them is empty")
    if task.half != "all":
        samples = [sample for sample in samples if half_of(sample.id) == task.half]
        if not samples:
            raise BadDataError(
                f"{table.path}: none of its {len(found.samples)} samples is in the {task.half} half",
                "halves are drawn by id, and are only about equal; use half: all for so few",
            )
    if task.limit is not None and task.limit < len(samples):
        samples = [samples[k * len(samples) // task.limit] for k in range(task.limit)]
    return TaskData(samples, found.rows, found.kept, skipped)


def _check_columns(task: Task, table: Table) -> None:
    """Every column that the task names is in the file."""
    named = [(column, "prompt") for column in columns_in(task.prompt)]
    for name, column in task.columns.items():
        columns = column if isinstance(column, list) else [] if isinstance(column, dict) else [column]
        named += [(item, f"columns.{name}") for item in columns]
    named += [(column, "where") for column in task.where] + [(column, "replace") for column in task.replace]
    for column, key in named:
        if column not in table.columns:
            near = nearest(column, table.columns, "columns")
            there = "" if near.startswith("columns") else f" columns: {', '.join(table.columns)}"
            raise BadDataError(f"{table.path} has no column {column!r}, which {key} names", near + there)


def _kept(row: Row, where: Mapping[str, Any]) -> bool:
    return all(
        any(_equal(row.get(column), item) for item in (wanted if isinstance(wanted, list) else [wanted]))
        for column, wanted in where.items()
    )


def _equal(value: Any, wanted: Any) -> bool:
    """3 is "3", true is "True" (CSV holds text only), and null is an empty field."""
    if wanted is None or value is None:
        return wanted is None and value in (None, "")
    if isinstance(wanted, bool) or isinstance(value, bool):
        return str(value).lower() == str(wanted).lower()
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return value == wanted
    return str(value) == str(wanted)


class _EmptyField(Exception):
    """A text that is needed is empty; its argument is the field."""


class _Reader:
    """Makes the samples of one file."""

    def __init__(self, task: Task, table: Table, chosen: Sequence[int]) -> None:
        self.task, self.table, self.chosen = task, table, chosen
        id_column = task.columns.get("id", "id")
        self._numbered = "id" not in task.columns and id_column not in table.columns
        self._asked = PROMPT_FIELD.get(task.kind, "prompt")
        self._way = task.answers

    def read(self) -> tuple[list[Sample], int]:
        """(samples, how many rows were skipped as empty)"""
        samples: list[Sample] = []
        places: dict[str, str] = {}
        empty: list[tuple[str, str]] = []
        if self.task.kind == "multiple_choice":
            self._way = self._find_way()
        make = getattr(self, f"_{self.task.kind}")
        for n in self.chosen:
            row, place = self.table.rows[n], self.table.places[n]
            name = self._id(row, n)
            if name in places:
                raise self._error(place, f"id {name!r} was used in {places[name]} already")
            places[name] = place
            try:
                samples.append(
                    Sample(id=name, source=self._optional(row, "source", place), **make(row, place))
                )
            except _EmptyField as field:
                empty.append((place, str(field)))
        if empty and self.task.empty == "error":
            more = ", ".join(place for place, _ in empty[1:SHOWN])
            more += f" and {len(empty) - SHOWN:,} more" if len(empty) > SHOWN else ""
            raise self._error(
                empty[0][0],
                f"{empty[0][1]} is empty" + (f" (so are texts in {more})" if more else ""),
                "fill it in, or leave such rows out with empty: skip in the task",
            )
        if self.task.kind == "multiple_choice" and not self.task.mixed_options:
            self._check_counts(samples, places)
        return samples, len(empty)

    # the kinds

    def _generation(self, row: Row, place: str) -> Row:
        return {"prompt": self._prompt(row, place), "reference": self._needed(row, "reference", place)}

    def _probes(self, row: Row, place: str) -> Row:
        kind = self._needed(row, "kind", place)
        if kind not in PROBE_KINDS:
            raise self._error(place, f"kind should be one of {', '.join(PROBE_KINDS)}, and is {kind!r}")
        return {
            "category": self._needed(row, "category", place),
            "prompt": self._prompt(row, place),
            "probe": kind,
        }

    def _perplexity(self, row: Row, place: str) -> Row:
        return {"prompt": self._prompt(row, place)}

    def _multiple_choice(self, row: Row, place: str) -> Row:
        options = self._options(row, place)
        answer = self._value(row, "answer", place)
        if answer is None or answer == "":
            raise _EmptyField("answer")
        try:
            right = read_answer(answer, options, self._way)
        except ValueError as error:
            raise self._error(place, f"answer {error}") from error
        return {
            "prompt": self._prompt(row, place),
            "options": options.texts,
            "answer": right,
            "context": self._optional(row, "context", place),
        }

    def _instructions(self, row: Row, place: str) -> Row:
        names = self._listed(row, "instructions", place)
        if names and all(isinstance(item, dict) for item in names):
            rules = names
        else:
            kwargs = self._listed(row, "kwargs", place)
            if len(kwargs) != len(names):
                raise self._error(place, f"{len(names)} instructions have {len(kwargs)} kwargs")
            rules = [{"id": name, "kwargs": given or {}} for name, given in zip(names, kwargs, strict=True)]
        for rule in rules:
            if (
                set(rule) != {"id", "kwargs"}
                or not isinstance(rule["id"], str)
                or not isinstance(rule["kwargs"], dict)
            ):
                raise self._error(
                    place, f"instruction {rule!r:.60} should have a name and a mapping of kwargs"
                )
        clean = tuple(
            {"id": rule["id"], "kwargs": {k: v for k, v in rule["kwargs"].items() if v is not None}}
            for rule in rules
        )
        if not clean:
            raise _EmptyField("instructions")
        self._validate(clean, place)
        return {"prompt": self._prompt(row, place), "instructions": clean}

    def _validate(self, rules: tuple[dict[str, Any], ...], place: str) -> None:
        from engine.evaluate.instructions import validate

        try:
            validate(rules)
        except BadDataError as error:
            raise self._error(place, error.message, error.hint) from error

    def _options(self, row: Row, place: str) -> Options:
        try:
            return read_options(self._value(row, "options", place))
        except ValueError as error:
            raise self._error(place, f"options {error}") from error

    def _find_way(self) -> str:
        """How the answers are written, where the task does not say."""
        if self.task.answers:
            return self.task.answers
        answers, options = [], []
        for n in self.chosen:
            row, place = self.table.rows[n], self.table.places[n]
            answer = self._value(row, "answer", place)
            if answer is not None and answer != "":
                answers.append(answer)
                options.append(self._options(row, place))
        try:
            return find_way(answers, options)
        except ValueError as error:
            hint = "say which in the task: answers: index, index1, letter or text"
            raise BadDataError(f"{self.table.path}: the answer column {error}", hint) from error

    def _check_counts(self, samples: Sequence[Sample], places: Mapping[str, str]) -> None:
        first: dict[int, str] = {}
        for sample in samples:
            first.setdefault(len(sample.options), places[sample.id])
        if len(first) > 1:
            counts = ", ".join(f"{count} in {place}" for count, place in sorted(first.items()))
            raise BadDataError(
                f"{self.table.path}: rows differ in the number of their options ({counts})",
                "say mixed_options: true in the task if that is right; chance then differs by row",
            )

    # single values

    def _error(self, place: str, message: str, hint: str = "") -> BadDataError:
        return BadDataError(f"{self.table.path} {place}: {message}", hint)

    def _id(self, row: Row, n: int) -> str:
        if self._numbered:
            return str(n + 1)
        place = self.table.places[n]
        value = self._value(row, "id", place)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self._error(place, f"id should be text, and is {value!r:.60}")
        if not value.strip():
            raise self._error(place, "id is empty")
        return self._sound(value, "id", place)

    def _value(self, row: Row, field: str, place: str, needed: bool = True) -> Any:
        """What the row holds for a field, with `replace` applied. A key the row lacks is an error if needed."""
        column = self.task.columns.get(field, field)
        if isinstance(column, dict):
            return column["value"]
        if isinstance(column, list):
            return [self._cell(row, item, place) for item in column]
        if column not in row and not needed:
            return ""
        return self._cell(row, column, place, field)

    def _cell(self, row: Row, column: str, place: str, field: str = "") -> Any:
        if column not in row:
            fields = [f for f in FIELDS[self.task.kind] if f not in ("context", "source")]
            hint = f"columns: {', '.join(self.table.columns)}"
            if field and field == column:
                hint += f"; say which it is, for example columns: {{{field}: NAME}}"
            raise self._error(
                place, f"{column!r} is missing; a {self.task.kind} row has {', '.join(fields)}", hint
            )
        value = row[column]
        words = self.task.replace.get(column)
        return words.get(str(value), value) if words and isinstance(value, str | int) else value

    def _text(self, value: Any, field: str, place: str) -> str:
        """Text as it is; lists of texts one a line."""
        if value is None:
            return ""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise self._error(place, f"{field} should be text, and is {value!r:.60}")
        return self._sound(value, field, place)

    def _sound(self, text: str, field: str, place: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._error(
                place, f"{field} holds half of a surrogate pair, which is no character"
            ) from error
        return text

    def _needed(self, row: Row, field: str, place: str) -> str:
        text = self._text(self._value(row, field, place), field, place)
        if not text.strip():
            raise _EmptyField(field)
        return text

    def _optional(self, row: Row, field: str, place: str) -> str:
        return self._text(self._value(row, field, place, needed=field in self.task.columns), field, place)

    def _prompt(self, row: Row, place: str) -> str:
        """The task's prompt with its columns filled in, or the column as it is."""
        if not self.task.prompt:
            return self._needed(row, self._asked, place)

        def text(column: str) -> str:
            found = self._cell(row, column, place)
            if isinstance(found, int | float) and not isinstance(found, bool):
                found = str(found)
            words = self._text(found, column, place)
            if not words.strip():
                raise _EmptyField(column)
            return words

        return fill(self.task.prompt, text)

    def _listed(self, row: Row, field: str, place: str) -> list[Any]:
        value = self._value(row, field, place)
        if isinstance(value, str):  # a list in a CSV field
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self._error(place, f"{field} should be a list, and is {value!r:.60}") from error
        if not isinstance(value, list):
            raise self._error(place, f"{field} should be a list, and is {value!r:.60}")
        return value
