"""A run on disk: one row per sample, and nothing that is not derived from rows. One process writes.

WORKSPACE/runs/NAME/
  config.yaml            the resolved config
  cells.json             the cells: hash, what each is, done or not
  cells/HASH.jsonl       rows of a cell while it runs (first line: the cell itself)
  cells/HASH.parquet     the same rows when it is done, with what they depend on in columns
  prompts.jsonl          every prompt once: {"sha256", "text"}
  table.json             the tables, computed from the rows (a copy for quick reading)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.atomic import fsync_path, write_json, write_text
from engine.errors import BadInputError, TargetExistsError
from engine.evaluate.cells import FORMAT, READABLE, Cell

CONFIG, CELLS, PROMPTS, TABLE, LOCK = "config.yaml", "cells.json", "prompts.jsonl", "table.json", ".lock"


class RunStore:
    """The rows of one run folder. Reading needs no lock; writing goes through `writing()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prompts: set[str] = set()

    # writing: only the job's own process

    @contextlib.contextmanager
    def writing(self, config: Mapping[str, Any], resume: bool) -> Iterator[None]:
        """Make the folder (or continue one) and hold its lock.

        Raises:
            TargetExistsError: it is there and `resume` is false.
            BadInputError: it is another config's, is no run, or another process is writing it.
        """
        import yaml

        text = yaml.safe_dump(dict(config), sort_keys=False)
        path = self.folder / CONFIG
        if self.folder.exists():
            if not resume:
                raise TargetExistsError(
                    f"{self.folder} is already there", "choose another name, or continue it (--resume)"
                )
            if not path.is_file() and any(self.folder.iterdir()):
                raise BadInputError(f"{self.folder} is not an evaluation run: it has no {CONFIG}")
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                raise BadInputError(
                    f"{path} differs from the config given now",
                    "a run is continued with its own config; give a changed one another name (done cells are reused)",
                )
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInputError(
                    f"{self.folder} is being written by another process", "see medmerge jobs"
                ) from error
            if not path.is_file():
                write_text(path, text)
            self._prompts = set(self.prompts())
            yield

    def write_cells(
        self, mode: str, cells: Sequence[Cell], failed: Mapping[str, str] | None = None, warnings: Sequence[str] = (),
        doubts: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Replace cells.json. failed: why a cell could not be measured, by its hash; doubts: why a model may not be
        what it claims, by its label ("" for all mixtures)."""
        failed = failed or {}
        entries = [
            {"hash": c.hash, "done": self.is_done(c.hash), "failed": failed.get(c.hash, ""), "spec": c.spec}
            for c in cells
        ]
        value = {"format": FORMAT, "mode": mode, "written": time.time(), "warnings": list(warnings),
                 "doubts": dict(doubts or {}), "cells": entries}  # fmt: skip
        write_json(self.folder / CELLS, value)

    def append(self, cell: Cell, rows: Sequence[Mapping[str, Any]], prompts: Mapping[str, str]) -> None:
        """Add finished rows (one write, fsynced) and the prompts not seen before."""
        fresh = {key: text for key, text in prompts.items() if key not in self._prompts}
        _append_lines(self.folder / PROMPTS, [{"sha256": key, "text": text} for key, text in fresh.items()])
        self._prompts |= set(fresh)
        path = self._jsonl(cell.hash)
        head = [] if path.is_file() and path.stat().st_size else [{"cell": cell.spec}]
        _append_lines(path, [*head, *rows])

    def kept_rows(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows a stopped process left of a cell; a torn last line is cut off the file first."""
        path = self._jsonl(cell.hash)
        if not path.is_file():
            return []
        lines, good = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            good += len(line)
        with path.open("rb+") as file:
            file.truncate(good)
        return lines[1:]

    def seal(self, cell: Cell, order: Sequence[str]) -> None:
        """The cell is done: its rows as Parquet in the order of the data file, and the JSONL goes."""
        import polars as pl

        place = {sample: n for n, sample in enumerate(order)}
        rows = sorted(self.kept_rows(cell), key=lambda row: place[row["id"]])
        spec = cell.spec
        constant = {
            "cell": cell.hash, "kind": cell.kind, "task": cell.task.name, "template": cell.template,
            "weights": json.dumps(cell.weights), "decoding": json.dumps(spec["decoding"]), "seed": cell.seed,
            "base_sha256": spec["base"]["sha256"], "adapters_sha256": json.dumps(spec["adapters"]),
            "data_sha256": spec["task"]["sha256"], "dtype": spec["dtype"], "compute": spec["compute"],
        }  # fmt: skip
        frame = pl.DataFrame([{**row, **constant} for row in rows], infer_schema_length=None)
        target = self._parquet(cell.hash)
        temporary = target.with_suffix(".tmp")
        frame.write_parquet(temporary)
        _settle(temporary, target)
        self._jsonl(cell.hash).unlink(missing_ok=True)

    def take_from_siblings(self, cell: Cell) -> Path | None:
        """Copy this cell from another run beside this one that has it done; returns that run, or None."""
        import polars as pl

        for other in sorted(self.folder.parent.glob(f"*/cells/{cell.hash}.parquet")):
            run = other.parent.parent
            if run == self.folder:
                continue
            try:
                wanted = set(pl.read_parquet(other, columns=["prompt_sha256"])["prompt_sha256"].to_list())
            except (OSError, pl.exceptions.PolarsError):  # damaged: it is measured here
                continue
            known = RunStore(run).prompts()
            if not wanted <= known.keys():
                continue
            fresh = [{"sha256": key, "text": known[key]} for key in sorted(wanted - self._prompts)]
            _append_lines(self.folder / PROMPTS, fresh)
            self._prompts |= wanted
            temporary = self._parquet(cell.hash).with_suffix(".tmp")
            shutil.copyfile(other, temporary)
            _settle(temporary, self._parquet(cell.hash))
            return run
        return None

    # reading

    def is_done(self, cell_hash: str) -> bool:
        return self._parquet(cell_hash).is_file()

    def cells(self) -> dict[str, Any]:
        """cells.json. Raises BadInputError when the folder is no run."""
        path = self.folder / CELLS
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] not in READABLE or not isinstance(raw["cells"], list):
                raise ValueError(f"its format is {raw['format']!r}, expected {FORMAT!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{self.folder} is not an evaluation run: {path.name}: {error}") from error
        return raw

    def frame(self, cell_hash: str) -> Any:
        """The rows of a done cell as a polars DataFrame. Raises BadInputError when the file is damaged."""
        import polars as pl

        path = self._parquet(cell_hash)
        try:
            return pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise BadInputError(
                f"{path} cannot be read: {error}", "delete it and run again with --resume"
            ) from error

    def prompts(self) -> dict[str, str]:
        """Prompt texts by SHA-256; a torn or damaged line is skipped."""
        found: dict[str, str] = {}
        try:
            data = (self.folder / PROMPTS).read_bytes()
        except FileNotFoundError:
            return found
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                found[entry["sha256"]] = entry["text"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def _jsonl(self, cell_hash: str) -> Path:
        return self.folder / "cells" / f"{cell_hash}.jsonl"

    def _parquet(self, cell_hash: str) -> Path:
        return self.folder / "cells" / f"{cell_hash}.parquet"


def _append_lines(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines with one write and fsync; a torn line left by a killed process is ended first."""
    if not values:
        return
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _settle(temporary: Path, target: Path) -> None:
    fsync_path(temporary)
    temporary.replace(target)
    fsync_path(target.parent)
