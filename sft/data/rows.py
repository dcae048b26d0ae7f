"""Files -> rows: the readers of JSON lines, JSON arrays and hub data sets."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from sft.errors import DataError, FormatError
from sft.recipe import Recipe, Source

HUB_TIMEOUT_SECONDS = 10


def expand(source: Source, recipe: Recipe, key: str) -> list[Path | str]:
    """The files of a source, or the hub id it is. Raises: RecipeError: neither."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise recipe.error(key, f"{source.path} is a directory; name its files, e.g. {source.path.rstrip('/')}/*.jsonl")
    if any(c in source.path for c in "*?["):
        files = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
        if files:
            return list(files)
        raise recipe.error(key, f"no file matches {source.path} (working directory: {Path.cwd()})")
    beside = recipe.path.parent / source.path
    hint = f"; {beside} exists: paths are relative to the working directory" if beside.exists() else ""
    if hint or path.suffix or source.path.count("/") != 1 or source.path.startswith((".", "/", "~")):
        raise recipe.error(key, f"there is no file {source.path} (working directory: {Path.cwd()}){hint}")
    return [source.path]


def read_rows(file: Path | str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a JSON lines file, a JSON array or a hub data set; a row that cannot be read is a FormatError.

    Raises: DataError: the file as a whole cannot be read.
    """
    if isinstance(file, str):
        yield from _hub_rows(file)
        return
    try:
        with open(file, "rb") as stream:
            head = stream.read(4)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[1:2] == b"\0":
                raise DataError(f"{file}: is UTF-16, not UTF-8; save it as UTF-8")
            stream.seek(3 if head[:3] == b"\xef\xbb\xbf" else 0)
            empty = True
            for number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                if empty and line.lstrip()[:1] == b"[":
                    yield from _array_rows(file)
                    return
                empty = False
                yield number, _parsed(line)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if empty:
        raise DataError(f"{file}: is empty; one JSON object a line is needed")


def _parsed(line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))  # of bytes it would take half a surrogate pair
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return FormatError(f"is not UTF-8 ({byte}); if the file is GBK or the like, save it as UTF-8")
    except ValueError as error:
        what = getattr(error, "msg", str(error))
        return FormatError(f"is not JSON: {what} at column {getattr(error, 'colno', 1)}")
    except RecursionError:
        return FormatError("is JSON nested too deep to read")
    if b"\\ud" in line or b"\\uD" in line:  # an escaped surrogate: alone, no tokenizer can take it
        return _whole(row)
    return row


def _whole(row: Any) -> Any:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return FormatError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return row


def _array_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: begins as a JSON array and is not one: {error}") from None
    if not rows:
        raise DataError(f"{file}: is an empty array")
    yield from enumerate(map(_whole, rows), start=1)


def hub_revision(name: str) -> str:
    """The commit of a hub data set. Raises: DataError: the hub does not know it, or does not answer."""
    try:
        return str(HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS).sha)
    except Exception as error:  # whatever the hub client raises, it is about this name or the network
        raise DataError(_not_given(name, error)) from None


def _hub_rows(name: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(datasets.load_dataset(name, split="train", streaming=True), start=1)
    except Exception as error:
        raise DataError(_not_given(name, error)) from None


def _not_given(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{name}: is no file here, and the hub does not give it: {reason}"
