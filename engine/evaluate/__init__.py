"""Evaluation: what a mixture of adapters does, one row per sample, every number with its n and interval.

`config` reads the YAML, `job.run` does the work in its own process (the model loaded once, mixtures written
in place by `live`), `store` keeps the rows, `tables` computes every number from rows, `summary` is the light
door for the app. Nothing heavy is imported here.
"""

from engine.evaluate.config import Decoding, EvalConfig, Task, load_config, parse_config

__all__ = ["Decoding", "EvalConfig", "Task", "load_config", "parse_config"]
