"""A row's conversation: from columns (alpaca) or a list of turns (ShareGPT, OpenAI messages), checked.

Called by `training.data.samples`. The rules are LLaMA-Factory's (src/llamafactory/data/converter.py), except that
what it skips with a warning (roles out of turn, no answer at the end) is an error here, naming file and line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import BadDataError
from training.data.json_values import name as kind_of
from training.data.rows import Row

Turns = tuple[dict[str, str], ...]
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
ROLES = ("user", "assistant", "system")


def of_columns(row: Row, columns: Mapping[str, str]) -> Turns:
    """instruction and input joined by a line break, output, and optionally system and history ([[user, answer], …])."""
    if not columns["output"]:
        raise BadDataError(
            f"{row.file}: no column of answers is named", "columns.output (response) is needed for sft"
        )
    turns = _system(_optional(row, columns.get("system", "")))
    for number, pair in enumerate(_history(row, columns.get("history", "")), 1):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise BadDataError(
                f"{row.place}: {columns['history']!r} item {number} should be a pair of texts [question, answer], "
                f"found {pair!r:.60}"
            )
        turns += _exchange(*pair)
    turns += _exchange(question_of(row, columns), text_of(row, columns["output"]))
    return _checked(turns, row)


def question_of(row: Row, columns: Mapping[str, str]) -> str:
    """The parts of a question that are not empty, joined by a line break, as LLaMA-Factory does."""
    names = [name for name in (columns["instruction"], columns["input"]) if name]
    if not names:
        raise BadDataError(
            f"{row.file}: no column of questions is named", "columns.instruction (prompt) is needed"
        )
    main, *more = names
    if main not in row.values:
        raise missing(row, main)
    parts = [text for name in (main, *more) if (text := _optional(row, name))]
    if not any(part.strip() for part in parts):
        raise BadDataError(
            f"{row.place}: {main!r} must be a text that is not empty, found {row.values[main]!r:.60}"
        )
    return "\n".join(parts)


def text_of(row: Row, column: str) -> str:
    """A column's text, which must be there and not empty."""
    if column not in row.values:
        raise missing(row, column)
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise BadDataError(f"{row.place}: {column!r} must be a text that is not empty, found {value!r:.60}")
    return value


def of_turns(row: Row, columns: Mapping[str, str], tags: Mapping[str, str]) -> Turns:
    """A list of turns. A system turn in front wins over the system column."""
    column = columns["messages"]
    if column not in row.values:
        raise missing(row, column)
    value = row.values[column]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"{kind_of(value)} ({value!r:.60})"
        raise BadDataError(f"{row.place}: {column!r} must be a list of turns, found {found}")
    turns = [_turn(turn, number, row, tags) for number, turn in enumerate(value, 1)]
    if turns[0]["role"] == "system":
        turns = _system(turns[0]["content"]) + turns[1:]
    else:
        turns = _system(_optional(row, columns.get("system", ""))) + turns
    return _checked(turns, row)


def _turn(turn: Any, number: int, row: Row, tags: Mapping[str, str]) -> dict[str, str]:
    where = f"{row.place}, turn {number}"
    if not isinstance(turn, dict):
        raise BadDataError(f"{where}: expected an object, found {kind_of(turn)}")
    for key in (tags["role_tag"], tags["content_tag"]):
        if key not in turn:
            raise BadDataError(
                f"{where}: no {key!r}, found {', '.join(map(str, turn))}",
                "turns have from and value, or role and content; others are named with `tags`",
            )
    if turn.get("tool_calls"):
        raise BadDataError(f"{where}: holds tool_calls, which are not trained here", "leave such rows out")
    spelled, content = turn[tags["role_tag"]], turn[tags["content_tag"]]
    roles = {tags[f"{role}_tag"]: role for role in ROLES if tags.get(f"{role}_tag")}
    if spelled not in roles if isinstance(spelled, str) else True:
        known = ", ".join(roles)
        if spelled in TOOL_ROLES:
            raise BadDataError(
                f"{where}: role {spelled!r}: tool turns are not trained here",
                f"leave such rows out; roles: {known}",
            )
        raise BadDataError(f"{where}: role {spelled!r} is not one of {known}", "others are named with `tags`")
    if isinstance(content, list):
        raise BadDataError(
            f"{where}: content is a list of parts, expected a text",
            "write the text alone; images are not trained",
        )
    if not isinstance(content, str):
        raise BadDataError(f"{where}: content must be a text, found {content!r:.60}")
    return {"role": roles[spelled], "content": content}


def _checked(turns: list[dict[str, str]], row: Row) -> Turns:
    """User and assistant in turn after at most one system text, an answer last, none empty."""
    first = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) == first:
        raise BadDataError(f"{row.place}: the conversation has no turns of user and assistant")
    for number, turn in enumerate(turns[first:]):
        wanted = ("user", "assistant")[number % 2]
        if turn["role"] != wanted:
            raise BadDataError(
                f"{row.place}, turn {number + first + 1}: a turn of {turn['role']}, expected {wanted}",
                "after an optional system text, user and assistant take turns",
            )
        if not turn["content"].strip():
            raise BadDataError(f"{row.place}, turn {number + first + 1}: the text of {wanted} is empty")
    if turns[-1]["role"] != "assistant":
        raise BadDataError(
            f"{row.place}: the conversation ends with a turn of {turns[-1]['role']}, expected assistant last"
        )
    return tuple(turns)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _optional(row: Row, column: str) -> str:
    """A column's text, "" where it is not named, not there or null."""
    value = row.values.get(column) if column else ""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadDataError(f"{row.place}: {column!r} must be a text, found {value!r:.60}")
    return value


def _history(row: Row, column: str) -> list[Any]:
    value = row.values.get(column) if column else None
    if not value:  # null, an empty list, an empty field of a CSV
        return []
    if not isinstance(value, list):
        raise BadDataError(
            f"{row.place}: {column!r} must be a list of pairs of texts, found {kind_of(value)}"
        )
    return value


def missing(row: Row, name: str) -> BadDataError:
    return BadDataError(
        f"{row.place}: {name!r} not found among the columns {', '.join(row.values) or '(none)'}",
        "name yours with `columns`",
    )
