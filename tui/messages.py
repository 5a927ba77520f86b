"""Typed messages that workers post to the app. Threads touch nothing else of the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textual.message import Message

from tui.snapshots import AdapterDetail, JobFeed, JobRow, Overview


@dataclass
class WorkspaceRead(Message):
    """The workspace was read anew."""

    overview: Overview


@dataclass
class JobsPolled(Message):
    """Jobs or their events changed. `feeds` holds only those that did."""

    jobs: tuple[JobRow, ...]
    feeds: dict[str, JobFeed]


@dataclass
class JobStarted(Message):
    """A job process was started."""

    job: JobRow


@dataclass
class DetailRead(Message):
    """The weights of one adapter were read."""

    detail: AdapterDetail


@dataclass
class Answer(Message):
    """The result of a question a screen asked through `ask`; `question` names it, stale ones are dropped."""

    question: str
    number: int
    value: Any


@dataclass
class ActionFailed(Message):
    """Something the person asked for did not work; shown, never fatal."""

    what: str
    message: str
    hint: str = ""


@dataclass
class ShowScreen(Message):
    """Go to a screen by name."""

    name: str


@dataclass
class Refusal(Message):
    """An asked question failed; stale ones are dropped."""

    question: str
    number: int
    failure: ActionFailed
