"""What a task is: one data set, how its rows become samples, and what is measured on them. Read by everyone.

The words under the fields are what docs/schemas/*.json and docs/tasks.md say about them (engine/evaluate/schema.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from engine.evaluate.values import Limits

KINDS = ("generation", "multiple_choice", "probes", "perplexity", "instructions")
SCORINGS = ("letters", "options", "generated")
STYLES = ("", "medqa", "medmcqa", "mmlu", "pubmedqa")
LANGUAGES = ("en", "zh")
HALVES = ("all", "dev", "test")
ANSWERS = ("", "index", "index1", "letter", "text")
EMPTY = ("error", "skip")

# What a row of each kind holds: the fields that `columns` maps.
FIELDS = {
    "generation": ("id", "prompt", "reference", "source"),
    "multiple_choice": ("id", "question", "options", "answer", "context", "source"),
    "probes": ("id", "category", "prompt", "kind", "source"),
    "perplexity": ("id", "text", "source"),
    "instructions": ("id", "prompt", "instructions", "kwargs", "source"),
}


@dataclass(frozen=True)
class Task:
    """One data set and what is measured on it.

    name: what tables call it; unique in a config.
    kind: `generation` (overlap with references, think rate), `multiple_choice` (accuracy), `probes` (refusals),
        `perplexity` (held-out text) or `instructions` (IFEval's checks).
    data: the file with the rows: .jsonl, .json, .csv, .tsv, .parquet or .xlsx. Relative paths are looked up in the
        workspace, then beside the file that names them; `probes/NAME` is a probe set that comes with the program.
    limit: at most so many rows, spread evenly over those that `where` and `half` leave (null: all).
    half: `dev` or `test` takes one half of the rows, by a hash of their id; choose weights on dev, report test.
    scoring: multiple_choice only. `letters`: which of " A", " B", ... is likeliest after the options were
        listed; `options`: which whole option text is likeliest after the question alone; `generated`: the chat
        model writes an answer, and the letter in it is read.
    shuffle: multiple_choice only. A seed: the order of the options is drawn anew for every sample from it and its id.
    language: the language of the built-in words around a question, and of the letters' reader.
    references: generation only. Also score the reference answers (log-likelihood, perplexity).
    max_tokens: perplexity only. Longer passages are cut there.
    system: a system message before each prompt (where text is generated).
    max_new_tokens: the longest answer in tokens, in place of the decoding's (null: the decoding's).
    prompt: the text that is asked, with {column} where a column's text goes and {{ }} for braces. Empty: the
        column that `columns` names for it, as it is.
    columns: which column of the data holds what: field (id, prompt, reference, question, options, answer, context,
        text, category, kind, instructions, kwargs, source) to column name. Fields that are not named are looked for
        under their own name; a file without ids gets row numbers. `options` may be a list of columns; `{value: ...}`
        is the same value for every row.
    where: column to value, or list of values: only such rows are kept.
    replace: column to {value: words}: what stands in place of a value when prompts and samples are made.
    answers: multiple_choice only. How the right answer is written: `index` (from 0), `index1` (from 1), `letter` or
        `text` (the option itself). Empty: found from the data, an error where that is not clear.
    instruction: multiple_choice by `generated` only. The words after the options in place of the built-in ones;
        {letters} becomes A/B/C/D.
    style: multiple_choice by log-likelihood only. The task of lm-evaluation-harness whose prompt is used.
    description: multiple_choice by log-likelihood only. Words before everything, as MMLU's subjects have them.
    mixed_options: multiple_choice only. Rows may differ in the number of their options (else that is an error).
    empty: what is done with a row whose reference, question or answer is empty: `error`, or `skip` (and counted).
    header: whether the first line of a CSV or TSV holds names; if not they are column_1, column_2, ...
    about: one line on what this is. For people; not measured.
    origin: where the data come from. For people.
    licence: what the data may be used for. For people.
    """

    name: str
    kind: Annotated[str, Limits(choices=KINDS)]
    data: Path
    limit: Annotated[int | None, Limits(least=1)] = None
    half: Annotated[str, Limits(choices=HALVES)] = "all"
    scoring: Annotated[str, Limits(choices=SCORINGS)] = "letters"
    shuffle: Annotated[int | None, Limits(least=0)] = None
    language: Annotated[str, Limits(choices=LANGUAGES)] = "en"
    references: bool = True
    max_tokens: Annotated[int, Limits(least=2)] = 1024
    system: str = ""
    max_new_tokens: Annotated[int | None, Limits(least=1)] = None
    prompt: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    replace: dict[str, Any] = field(default_factory=dict)
    answers: Annotated[str, Limits(choices=ANSWERS)] = ""
    instruction: str = ""
    style: Annotated[str, Limits(choices=STYLES)] = ""
    description: str = ""
    mixed_options: bool = False
    empty: Annotated[str, Limits(choices=EMPTY)] = "error"
    header: bool = True
    about: str = ""
    origin: str = ""
    licence: str = ""
