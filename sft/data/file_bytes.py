"""The bytes of a data file, unpacked, as long as they can be text; what is plainly something else is refused."""

import gzip
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sft.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_ROW = 2**24  # bytes of a line, characters of an element or a cell: three times what a million tokens take
MAX_RATIO, FREE_BYTES = 300, 2**26  # what bytes may unpack to: so many times more, and so much in any case
MAGIC = {  # first bytes of files that are named as text: what they are, and what to do
    b"\x1f\x8b": "is packed with gzip; give its name the ending .gz, or unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with Zstandard; give its name the ending .zst, or unpack it",
    b"PK\x03\x04": "is a zip file, as .xlsx and .docx are; save it as CSV, or unpack it",
    b"PAR1": "is a Parquet file; give its name the ending .parquet",
    b"\xff\xfe\0\0": "is UTF-32, not UTF-8; save it as UTF-8",
    b"\0\0\xfe\xff": "is UTF-32, not UTF-8; save it as UTF-8",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\0\0": "holds NUL bytes and is no text; is it the right file?",
}
BOM = b"\xef\xbb\xbf"
PIECE = 2**20  # bytes unpacked at once
UNPACKERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".zst": zstd.open}


def open_bytes(file: Path) -> BinaryIO:
    """The file as bytes, unpacked. Raises: DataError: by its first bytes it is no UTF-8, or packed once more."""
    unpack, packed = UNPACKERS.get(file.suffix.lower()), open(file, "rb")
    stream: BinaryIO = unpack(packed) if unpack else packed
    head = stream.read(4)
    what = next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)
    if what is None and b"\0" in head:
        what = MAGIC[b"\xff\xfe"]
    if what:
        packed.close()
        raise DataError(f"{file}: {what}")
    stream.seek(0)
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, packed, stream), PIECE)) if unpack else stream


class _Unpacked(io.RawIOBase):
    """The stream of a packed file, which stops one that unpacks to far more than texts do: a bomb."""

    def __init__(self, file: Path, packed: BinaryIO, stream: BinaryIO):
        self._file, self._packed, self._stream, self._bytes = file, packed, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer))
        self._bytes += len(piece)
        if self._bytes > max(FREE_BYTES, MAX_RATIO * self._packed.tell()):
            raise DataError(
                f"{self._file}: unpacks to more than {MAX_RATIO} times as much; if that is right, unpack it yourself"
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        self._packed.close()
        super().close()


def bounded_lines(file: Path, stream: Any) -> Iterator[Any]:
    """The lines of a stream, of bytes or of text.

    Raises: DataError: one is longer than MAX_ROW, which is then not read to its end.
    """
    number = 0
    while line := stream.readline(MAX_ROW):
        number += 1
        if len(line) == MAX_ROW:
            raise DataError(f"{file}:{number}: is longer than {MAX_ROW >> 20} MiB; no conversation is, so cut it")
        yield line
