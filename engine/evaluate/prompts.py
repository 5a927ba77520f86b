"""A sample of a cell as the exact text a model gets. Every backend builds its prompts here."""

from __future__ import annotations

from engine import templates
from engine.evaluate import choice
from engine.evaluate.cells import Cell
from engine.evaluate.data import Sample


def messages_of(cell: Cell, sample: Sample) -> list[templates.Message]:
    """The conversation a chat model is asked: the task's system text, then the sample as the user's turn."""
    content = sample.prompt
    if cell.kind == "generated_choice":
        content = choice.generated_prompt(sample, cell.task.language, cell.task.instruction)
    messages: list[templates.Message] = [{"role": "user", "content": content}]
    if cell.task.system:
        messages.insert(0, {"role": "system", "content": cell.task.system})
    return messages


def prompt_of(cell: Cell, sample: Sample, template: templates.Template | None) -> str:
    """The text before any token is made: held-out text as it is, a harness prompt, or a rendered conversation.

    template: None where the kind knows none (perplexity, multiple choice by log-likelihood).
    """
    if cell.kind == "perplexity":
        return sample.prompt
    if cell.kind == "multiple_choice":
        task = cell.task
        return choice.choice_prompt(sample, task.scoring, task.style, task.description)
    if template is None:
        raise ValueError(f"a {cell.kind} cell needs a template")
    return template.prompt(messages_of(cell, sample))
