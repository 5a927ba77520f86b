"""Files held open while a merge reads them, and whole reads and writes at an offset."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from engine.errors import BadTensorFileError
from engine.merge.kernel.plain import Buffer
from engine.weights.stacked import StackedColumns
from engine.weights.tensorfile import TensorInfo


class OpenFiles:
    """Descriptors of input files, opened when first read; a context manager. Safe for several threads.

    `stacked` keeps the B that several experts are cut from, for as long as these files are open.
    """

    def __init__(self) -> None:
        self.stacked = StackedColumns()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def read(self, tensor: TensorInfo, offset: int, into: Buffer) -> None:
        """Fill `into` with the tensor's bytes from byte `offset` of it.

        Raises BadTensorFileError when the file became shorter since its header was read.
        """
        read_all(self.descriptor(tensor.file), into.data, tensor.start + offset, tensor.file)


def read_all(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise BadTensorFileError(
                f"{path} became shorter while it was read", "is something writing to it?"
            )
        done += count


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
