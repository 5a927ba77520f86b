"""Writes a GGUF file tensor by tensor, block by block: memory does not grow with the model.

The header is gguf.GGUFWriter's; the data goes straight to the file. The file is written as `NAME.partial` and
renamed once, so a GGUF at its own name is always whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import NO_SPACE, fsync_path, need_space, partial_path, refuse_existing
from engine.claim import claim
from engine.errors import BadInputError, BadModelError, NoSpaceError
from engine.gguf.tensors import PlannedTensor
from engine.jobs.events import EventWriter
from engine.weights.tensorfile import Float32Array

F16_MAX = 65504.0
_HEADER_SPACE = 64 << 20  # generous: tokenizer and metadata


@contextlib.contextmanager
def new_file(target: Path, needed: int, what: str) -> Iterator[Path]:
    """A `.partial` path beside `target` that becomes it when the block ends well, and is removed when not.

    One process at a time writes a target (`engine.claim`); what a dead one left is removed. The block may rename
    the file away itself (one that failed its verification); then nothing more happens.

    Raises TargetExistsError, NoSpaceError (checked before, and found while writing), BadInputError when another
    process writes the same target now, or a `.partial` lies there that is not known to be ours.
    """
    refuse_existing(target)
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        need_space(target.parent, needed, what)
    except OSError as error:
        raise BadInputError(
            f"cannot write {target}: {error.strerror}", "choose a place you can write to"
        ) from error
    with claim(partial) as left_over:
        refuse_existing(target)
        _remove_left_over(partial, left_over)
        try:
            yield partial
            if partial.exists():
                fsync_path(partial)
                refuse_existing(target)
                partial.rename(target)
            fsync_path(target.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno in NO_SPACE:
                raise NoSpaceError(
                    f"the disk filled up while writing {target}; nothing was kept",
                    "free some space and run again",
                ) from error
            raise
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _remove_left_over(partial: Path, left_over: bool) -> None:
    """Remove what a dead holder of the claim left. Anything else is not known to be ours and is never touched."""
    if not partial.exists() and not partial.is_symlink():
        return
    if not left_over or partial.is_symlink() or not partial.is_file():
        raise BadInputError(
            f"{partial} is there, and nothing says that this program left it",
            "look into it, then remove it yourself or choose another name",
        )
    partial.unlink()


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Callable[[Any], None],
    tensors: list[PlannedTensor],
    kind: str,
    events: EventWriter,
    phase: str = "write",
) -> None:
    """Write header and tensors to `path` (a file of ours there is overwritten).

    `metadata` adds keys to the GGUFWriter. `kind` is f32, f16, bf16 or q8_0: the type of matrices; vectors are
    always f32, and a matrix whose rows are no whole blocks of 32 is f16 where q8_0 was asked, as in llama.cpp.

    Raises BadModelError for NaN, infinity, or a value too large for f16.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer)
    kinds = [storage_type(tensor, kind) for tensor in tensors]
    for tensor, stored in zip(tensors, kinds, strict=True):
        quantised = _quant_type(stored)
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.elements // block * size, quantised
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        _pad(file, writer.data_alignment)
        total, done = sum(tensor.elements for tensor in tensors), 0
        for tensor, stored in zip(tensors, kinds, strict=True):
            for block_rows in tensor.blocks():
                file.write(encode(block_rows, stored, tensor.source))
                done += block_rows.size
                events.progress(done, total, "weights", tensor.name, phase=phase)
            _pad(file, writer.data_alignment)
        file.flush()
    finally:
        for open_file in writer.fout or []:
            open_file.close()


def storage_type(tensor: PlannedTensor, kind: str) -> str:
    """How this tensor is stored when matrices are asked as `kind`."""
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and tensor.columns % 32 else kind


def bytes_needed(tensors: list[PlannedTensor], kind: str) -> int:
    """Bytes of a file with these tensors, within the header's allowance."""
    return _HEADER_SPACE + tensor_bytes(tensors, kind)


def tensor_bytes(tensors: list[PlannedTensor], kind: str) -> int:
    """Bytes of the tensors alone, stored as `kind`."""
    size = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
    return sum(math.ceil(t.elements * size[storage_type(t, kind)]) for t in tensors)


def encode(rows: Float32Array, kind: str, source: str) -> bytes:
    """float32 rows as the bytes of one type, rounded to nearest even (f16, bf16) or by llama.cpp's q8_0 rule."""
    import gguf

    largest = float(np.max(np.abs(rows))) if rows.size else 0.0  # NaN propagates
    if not math.isfinite(largest):
        raise BadModelError(
            f"{source} holds NaN or infinity", "the checkpoint is damaged or training diverged"
        )
    if kind == "f32":
        return rows.astype("<f4", copy=False).tobytes()
    if kind == "f16":
        if largest >= F16_MAX + 16:  # half of the last step: rounds to infinity
            raise BadModelError(f"{source} holds {largest:.4g}, too large for f16", "use --type bf16 or f32")
        return rows.astype("<f2").tobytes()
    return gguf.quants.quantize(rows, _quant_type(kind)).tobytes()


def _quant_type(kind: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
