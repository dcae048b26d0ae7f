"""Files and folders that are whole or not there: written beside their place, then moved into it.

All text is UTF-8 with "\\n" at the end of a line, on every system.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sft.errors import UserError


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
