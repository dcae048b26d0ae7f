"""The cache of token rows: a folder for each tokenised file, the ones used last within `dataset.cache_gb`.

Shown and cleared by `python -m sft.cache`. A folder is made, used and removed under its lock, so that of two runs that
want the same one makes it; and a process that uses it holds a second lock for as long as it lives, for the rows are
mapped into its memory. The system lets go of both when a process is killed.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
from filelock import FileLock, Timeout

from sft.files import damage, seal, whole_folder
from sft.plain_text import plain_text
from sft.processes import say

DONE = "facts.json"  # which is written last; its time is that of the last use
USED = ".used"  # ending of the files whose lock a process holds: KEY.NUMBER.used


class Entry(NamedTuple):
    """A folder of the cache. used_at: seconds since 1970; size: bytes; source: the file whose rows it holds."""

    folder: Path
    used_at: float
    size: int
    source: str


_held: dict[Path, FileLock] = {}  # by this process, until it ends


def cache_folder() -> Path:
    """Where tokenised files are kept: beside the datasets library's own cache."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sft_token_rows"


def use(key: str, source: str, make: Callable[[Path], None]) -> Path:
    """The folder of a key, filled by `make` if it is not there, and kept from being removed while this process lives.

    Args: source: the file whose rows it holds; said where they are damaged, and made again.
    Raises: OSError: it cannot be written.
    """
    folder = cache_folder() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(folder)):
        is_made = folder.is_dir()
        if is_made and (found := damage(folder)):
            say(f"{source} is tokenised again: of the kept rows in {folder} {found}")
            is_made = False
        if not is_made:
            with whole_folder(folder) as partial:
                make(partial)
                seal(partial)
        if folder not in _held:
            _held[folder] = FileLock(folder.with_name(f"{key}.{os.getpid()}-{time.time_ns()}{USED}"))
            _held[folder].acquire()
        os.utime(folder / DONE)
    return folder


def entries() -> list[Entry]:
    """What is whole in the cache, used last first."""
    found = []
    for folder in cache_folder().glob("[!.]*"):
        try:
            facts = json.loads((folder / DONE).read_text(encoding="utf-8"))
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(Entry(folder, (folder / DONE).stat().st_mtime, size, str(facts.get("source", "?"))))
        except (OSError, ValueError):  # no folder of rows, or one that another process is removing
            continue
    return sorted(found, key=lambda entry: entry.used_at, reverse=True)


def shrink(most_bytes: float) -> list[Entry]:
    """Removes what is beyond so many bytes, the folder that was used longest ago first, but none that is in use.

    Also what killed runs left unfinished. Returns: the entries that were removed.
    """
    for left in cache_folder().glob(".*.*"):  # .KEY.partial, .KEY.old, .KEY.removed
        with _unused(left.with_name(left.name.split(".")[1])) as is_free:
            if is_free:
                shutil.rmtree(left, ignore_errors=True)
    found = entries()
    total, removed = sum(entry.size for entry in found), []
    for entry in reversed(found):
        if total > most_bytes and _remove(entry.folder):
            total -= entry.size
            removed.append(entry)
    return removed


def _remove(folder: Path) -> bool:
    """Whether it could be: not if it is in use, or, on Windows, mapped."""
    removed = folder.with_name(f".{folder.name}.removed")
    with _unused(folder) as is_free:
        try:
            if is_free:
                os.replace(folder, removed)
        except OSError:
            return False
        shutil.rmtree(removed, ignore_errors=True)
        return is_free


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether no process makes or uses a folder; if so, none can begin to before the end."""
    try:
        with FileLock(_lock_of(folder), timeout=0):
            yield not any(list(map(_is_held, folder.parent.glob(f"{folder.name}.*{USED}"))))
    except Timeout:
        yield False


def _is_held(mark: Path) -> bool:
    """Whether the process that made it lives; if not, it goes."""
    try:
        with FileLock(mark, timeout=0):
            pass
    except Timeout:
        return True
    mark.unlink(missing_ok=True)
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sft.cache", description="Show the cache of token rows, or clear it"
    )
    parser.add_argument("--clear", action="store_true", help="remove all that no running process uses")
    if parser.parse_args().clear:
        removed = shrink(-1)
        print(f"removed {len(removed):,} tokenised files, {sum(entry.size for entry in removed) / 1e9:.2f} GB")
    found = entries()
    print(f"{cache_folder()}: {len(found):,} tokenised files, {sum(entry.size for entry in found) / 1e9:.2f} GB")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        print(f"{entry.size / 1e9:8.2f} GB  used {used}  {plain_text(entry.source)}")
    return 0
