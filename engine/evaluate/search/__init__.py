"""Layer-wise weights: fitted on a dev half by a derivative-free search, judged on the held-out half.

`config` reads the YAML, `space` turns a point into weights per tensor, `points` says what to try (grid and
CMA-ES), `log` keeps every evaluation, `objective` measures one mixture on the loaded model, `report` compares on the
held-out half, `job.run` does the work in its own process. Nothing heavy is imported here.
"""

from engine.evaluate.search.config import SearchConfig, load_search, parse_search

__all__ = ["SearchConfig", "load_search", "parse_search"]
