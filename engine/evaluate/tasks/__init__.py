"""Tasks: what is asked of a model, on which data. One YAML file a task; presets for well-known data sets."""

from engine.evaluate.tasks.task import KINDS, SCORINGS, Task

__all__ = ["KINDS", "SCORINGS", "Task"]
