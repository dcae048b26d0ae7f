"""Files and folders that are whole or not there: written beside their place, then moved into it, or sealed.

All text is UTF-8 with "\\n" at the end of a line, on every system.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from safetensors import SafetensorError, safe_open

from sft.errors import UserError

CHECKSUMS = "checksums.json"

_WRITABLE = "make it writable, or name another folder"
_LOOK = "look at the disk, or at the network that it hangs on"
# What only the user can mend. With it goes: the same command again, since what was saved before is kept.
MACHINE_ERRORS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "your quota there is used up: remove something of yours",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EIO: _LOOK,
    errno.ESTALE: _LOOK,
    errno.ENOTCONN: _LOOK,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or name another folder",
}


def write_failure(error: BaseException, path: Path) -> UserError | None:
    """Why `path` cannot be written and what to do, of an error of any library; None: it is another kind of error."""
    number = _error_number(error, path)
    if number is None:
        return None
    found = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT):
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        found += f", {shutil.disk_usage(folder).free / 1e9:.3f} GB are free"
    told = f"{path} cannot be written: {found}"
    if advice := MACHINE_ERRORS.get(number):
        told += f"; {advice}, and run the same command again: what was saved before is kept"
    return UserError(told)


def _error_number(error: BaseException, path: Path) -> int | None:
    """The system's number for what went wrong; of torch, which keeps it to itself, from writing there once more."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors and tokenizers, which are Rust
        return int(found[1])
    if not isinstance(error, RuntimeError) or not re.search("inline_container|Parent directory", str(error)):
        return None
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent) as probe:
            probe.write(bytes(2**20))
    except OSError as told:
        return told.errno
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes a file or a folder. Raises: UserError: it cannot be written, and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (told := write_failure(error, path)) is None:
            raise
        raise told from None


def require_space(folder: Path, needed: int) -> None:
    """Raises: UserError: fewer than `needed` bytes are free there, before they are half-written."""
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.is_dir())).free
    if needed > free:
        raise UserError(
            f"{folder} takes {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free; free some space there, and run "
            "the same command again: what was saved before is kept"
        )


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write a file to, which takes its place at the end; until then `path` stays as it was.

    Raises: UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            with open(partial, "wb") as stream:
                yield stream
            os.replace(partial, path)
    finally:
        with suppress(OSError):  # on a disk that cannot be written there is nothing to remove either
            partial.unlink(missing_ok=True)


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
    folder = folder.resolve() if folder.is_symlink() else folder  # a link says which disk
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
