"""Files and folders that are whole or not there: written beside their place, then moved into it, or sealed.

All text is UTF-8 with "\\n" at the end of a line, on every system.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from safetensors import SafetensorError, safe_open

from sft.errors import UserError

CHECKSUMS = "checksums.json"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write a file to, which takes its place at the end; until then `path` stays as it was.

    Raises: UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Raises: UserError: it cannot be written."""
    with whole_file(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Raises: UserError: it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """What JSON does not know is written as its str(). Raises: UserError: it cannot be written."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Raises: UserError: it cannot be written."""
    with whole_file(path) as stream:
        stream.writelines(json_line(value).encode("utf-8") for value in values)


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end; until then an older one stays as it was.

    What a killed run left beside it is removed, so no two processes may write the same folder at once; the older folder
    is put back where it was killed between the two moves at the end.

    Raises: OSError: it cannot be written; the caller knows what the user can do about it.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    _put_back(old, folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        _put_back(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def open_seal(folder: Path) -> None:
    """Marks a folder as not whole, until it is sealed."""
    (folder / CHECKSUMS).write_bytes(b"")


def is_open(folder: Path) -> bool:
    """Whether the folder was marked as not whole and never sealed."""
    return (folder / CHECKSUMS).is_file() and not (folder / CHECKSUMS).stat().st_size


def seal(folder: Path, pattern: str = "*") -> None:
    """Writes the checksum of each file of a folder into it. Raises: UserError: it cannot be written."""
    files = [file for file in sorted(folder.rglob(pattern)) if file.is_file() and file.name != CHECKSUMS]
    write_json(folder / CHECKSUMS, {file.relative_to(folder).as_posix(): _checksum(file) for file in files})


def damage(folder: Path) -> str | None:
    """What is not as it was when the folder was sealed; of one without a seal, what the formats of its files tell."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return next((f"{file.name} is damaged" for file in sorted(folder.iterdir()) if not _is_readable(file)), None)
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != checksum:
            return f"{name} is damaged"
    return None


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # seven times as fast as sha256


def _is_readable(file: Path) -> bool:
    """Whether a file of weights is whole as far as its format says: a zip's checksums, the length of a safetensors."""
    try:
        if file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        if file.suffix == ".safetensors":
            with safe_open(file, "np"):
                return True
    except (OSError, zipfile.BadZipFile, SafetensorError):
        return False
    return True
