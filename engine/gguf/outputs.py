"""GGUF files as the output of a recipe: written, read back and verified, and only then given their names.

For `engine.merge.execute` (recipes with `output.gguf`) and `engine.gguf.job` (`medmerge gguf`):

    output: {path: merges/m, gguf: [q8_0, q4_k_m]}             the checkpoint, and merges/m-q8_0.gguf, ... beside it
    output: {path: m.gguf, kind: gguf, gguf: [q4_k_m]}         the GGUF alone, without a checkpoint on the way

    files = gguf_paths(recipe.output, types, alone=kind == "gguf")       # also to refuse existing ones early
    write_ggufs(Mixture(base, {label: path}, plan.weights), files, events)    # linear, plain LoRA
    write_ggufs(finished_merge_folder, files, events)                         # any method, after its verification
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.atomic import fsync_path, need_space, refuse_existing
from engine.errors import BadRecipeError, ChildFailedError
from engine.gguf.check import compare_tokens
from engine.gguf.convert import Conversion
from engine.gguf.mixture import Mixture, plan_mixture
from engine.gguf.quantize import DIRECT, file_type, quantise
from engine.gguf.verify import GgufVerdict, verify_gguf
from engine.gguf.writer import bytes_needed, new_file
from engine.jobs.events import EventWriter
from engine.weights.tensorfile import file_sha256


@dataclass(frozen=True)
class GgufResult:
    """One finished file. `path` is its name, or `NAME.rejected` where verification said no (exit code 1)."""

    type: str
    path: Path
    bytes: int
    sha256: str
    verdict: GgufVerdict | None

    @property
    def exit_code(self) -> int:
        """0 done, 1 the verification said no, 4 it could not tell."""
        return self.verdict.exit_code if self.verdict else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "out": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "verdict": self.verdict.to_json() if self.verdict else None,
            "exit_code": self.exit_code,
        }


def gguf_paths(output: Path, types: Sequence[str], alone: bool) -> dict[str, Path]:
    """Where the GGUF of each type goes.

    Beside a checkpoint `merges/m`: `merges/m-TYPE.gguf`. Alone: `output` itself for one type, and
    `STEM-TYPE.gguf` for several.

    Raises BadRecipeError: no type, one named twice, one that does not exist, or an output without `.gguf`.
    """
    names = [kind.lower() for kind in types]
    if not names or len(set(names)) < len(names):
        raise BadRecipeError(
            "output.gguf names no type"
            if not names
            else f"output.gguf names a type twice: {', '.join(names)}",
            "for example: gguf: [q8_0, q4_k_m]",
        )
    for name in names:
        file_type(name)
    if not alone:
        return {name: output.with_name(f"{output.name}-{name}.gguf") for name in names}
    if output.suffix != ".gguf":
        raise BadRecipeError(f"output.path is {output}, and a GGUF's name ends in .gguf")
    if len(names) == 1:
        return {names[0]: output}
    return {name: output.with_name(f"{output.stem}-{name}.gguf") for name in names}


def write_ggufs(
    source: Path | Mixture,
    files: Mapping[str, Path],
    events: EventWriter,
    pre: str = "",
    verify: bool = True,
    threads: int | None = None,
) -> list[GgufResult]:
    """Write one GGUF for each type, from a checkpoint folder or straight from a base and adapters.

    All files are written and verified under their `.partial` names before the first gets its own, so an error,
    a cancel or a full disk leaves none of them. A file that fails its verification is kept as `NAME.rejected`.
    A merge folder's GGUFs are verified against the folder (whose own verification speaks for the merge), a
    mixture's against base and adapters. Types llama.cpp quantises share one exact intermediate file.

    Args:
        source: a checkpoint folder (a base, a finished merge of any method), or a Mixture.
        files: the target of each type, as `gguf_paths` gives them.
        events: progress, in the phases "write", "quantise" and "check".
        pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.
        verify: False skips the verification (token ids are compared all the same).
        threads: of quantising and verifying; by default all processors.

    Raises:
        BadRecipeError, BadModelError, BadAdapterError: what cannot be written, by name, before anything is.
        TargetExistsError, NoSpaceError, BadInputError (another process writes a target), ChildFailedError
        (llama.cpp refuses), CancelledError: nothing is left behind.
    """
    if not files:
        raise BadRecipeError("no GGUF type is named", "for example: gguf: [q8_0, q4_k_m]")
    for kind, target in files.items():
        file_type(kind)  # a type that does not exist is refused before anything is read
        refuse_existing(target)
    conversion = plan_mixture(source, pre) if isinstance(source, Mixture) else Conversion.plan(source, pre)
    searched = [kind for kind in files if kind not in DIRECT]
    exact = conversion.exact_type if searched else ""
    sizes = {kind: bytes_needed(conversion.tensors, kind if kind in DIRECT else "q8_0") for kind in files}
    extra = bytes_needed(conversion.tensors, exact) if searched and exact not in files else 0
    first = next(iter(files.values()))
    need_space(first.parent, sum(sizes.values()) + extra, f"{len(files)} GGUF file(s)")
    with contextlib.ExitStack() as stack:
        partials = {
            kind: stack.enter_context(new_file(target, sizes[kind], f"a {kind} GGUF"))
            for kind, target in files.items()
        }
        for kind in files:
            if kind in DIRECT:
                conversion.write(partials[kind], kind, events)
        if searched:
            _quantise(conversion, partials, searched, exact, events, threads or 0)
        results = []
        for kind, target in files.items():
            compare_tokens(partials[kind], conversion.model.folder)
            verdict = _verify(source, partials[kind], events, threads, pre) if verify else None
            results.append(_finish(kind, target, partials[kind], verdict))
    return results


def _quantise(
    conversion: Conversion,
    partials: Mapping[str, Path],
    kinds: Sequence[str],
    exact: str,
    events: EventWriter,
    threads: int,
) -> None:
    """Quantise `kinds` from one exact file: a partial that is being made anyway, or one removed afterwards."""
    first = partials[kinds[0]]
    whole = partials.get(exact, first.with_name(f"{first.name}.{exact}"))
    try:
        if exact not in partials:
            conversion.write(whole, exact, events)
        for kind in kinds:
            quantise(whole, partials[kind], kind, events, threads)
            if not partials[kind].exists() or partials[kind].stat().st_size == 0:
                raise ChildFailedError(f"llama.cpp wrote nothing to {partials[kind]}")
    finally:
        if exact not in partials:
            whole.unlink(missing_ok=True)


def _verify(
    source: Path | Mixture, partial: Path, events: EventWriter, threads: int | None, pre: str
) -> GgufVerdict:
    if not isinstance(source, Mixture):
        return verify_gguf(partial, source, {}, None, events, threads=threads, pre=pre)
    several = source.by_tensor()
    weights = {k: 0.0 if isinstance(own, Mapping) else float(own) for k, own in source.weights.items()}
    return verify_gguf(
        partial, source.base, source.adapters, weights, events,
        per_tensor_weights=several or None, threads=threads, pre=pre,
    )  # fmt: skip


def _finish(kind: str, target: Path, partial: Path, verdict: GgufVerdict | None) -> GgufResult:
    """Hash the file; one that was refused is moved aside now, and gets no other name."""
    size, sha256 = partial.stat().st_size, file_sha256(partial)
    path = target
    if verdict is not None and verdict.exit_code == 1:
        path = target.with_name(f"{target.name}.rejected")
        number = 1
        while path.exists():
            number += 1
            path = target.with_name(f"{target.name}.rejected-{number}")
        fsync_path(partial)
        partial.rename(path)
    return GgufResult(kind, path, size, sha256, verdict)
