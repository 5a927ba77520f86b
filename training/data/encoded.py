"""UTF-8 text from files and .gz files, line by line or in chunks; every other encoding is named with its place.

Called by the readers of training/data only.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from engine.errors import BadDataError

LARGEST = 64 << 20  # bytes: one line, paragraph, document or JSON value may be this large
CHUNK = 1 << 20
BOM = codecs.BOM_UTF8
OTHER_BOMS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it ends in .gz. Raises BadDataError for what cannot be read."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast(IO[bytes], packed)
        else:
            with path.open("rb") as plain:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"{path}: not a whole gzip file ({error})", "download or pack it again") from error
    except OSError as error:
        raise BadDataError(f"cannot read {path}: {error.strerror or error}") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of every line. Lines end with \\n; a BOM at the start is dropped."""
    with opened(path) as file:
        number = 0
        while line := file.readline(LARGEST):
            number += 1
            if number == 1:
                line = _without_bom(line, path)
            if len(line) == LARGEST and not line.endswith(b"\n"):
                raise BadDataError(
                    f"{path}, line {number}: longer than {LARGEST >> 20} MB", "one row a line was expected"
                )
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(
                    path, number, file.tell() - len(line) + error.start, line[error.start]
                ) from error
            yield number, text


def chunks(path: Path) -> Iterator[str]:
    """The text in pieces of about 1 MB, cut anywhere between characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        line, start = 1, 0
        while True:
            data = file.read(CHUNK)
            offset = start
            start += len(data)
            if not offset:
                data = _without_bom(data, path)
                offset = start - len(data)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                before = bytes(error.object[: error.start])
                raise not_utf8(
                    path,
                    line + before.count(b"\n"),
                    offset - pending + error.start,
                    error.object[error.start],
                ) from error
            if not data:
                return
            line += text.count("\n")
            if text:  # none yet of a character that the chunk's end cuts
                yield text


def not_utf8(path: Path, line: int, offset: int, byte: int) -> BadDataError:
    return BadDataError(
        f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x} at byte offset {offset})",
        f"convert it first, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new-{path.name} "
        "(Chinese text: -f GB18030); a file of mixed encodings must be split",
    )


def _without_bom(start: bytes, path: Path) -> bytes:
    for bom, name in OTHER_BOMS.items():
        if start.startswith(bom):
            raise BadDataError(
                f"{path}, line 1: {name} (byte offset 0), expected UTF-8",
                f"convert it first: iconv -f {name} -t UTF-8 {path.name} > new-{path.name}",
            )
    return start.removeprefix(BOM)
