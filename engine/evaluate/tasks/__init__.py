"""Tasks: what is asked of a model, on which data. One YAML file a task; presets for well-known data sets.

`task` is what a task says, `parse` reads it, `tables` reads the data file, engine/evaluate/data.py makes samples.
"""

from engine.evaluate.tasks.parse import PRESETS, load_task, parse_task, preset_path
from engine.evaluate.tasks.task import KINDS, SCORINGS, Task

__all__ = ["KINDS", "PRESETS", "SCORINGS", "Task", "load_task", "parse_task", "preset_path"]
