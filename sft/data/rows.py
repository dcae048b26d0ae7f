"""Files -> rows: JSON lines, JSON arrays and tables, packed or not; Parquet and hub data sets.

Each is read piece by piece, so that a file may be larger than memory.
"""

import csv
import glob
import hashlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from sft.data.file_bytes import BOM, MAX_ROW, UNPACKERS, bounded_lines, open_bytes, zstd
from sft.errors import DataError, FormatError
from sft.recipe import Recipe, Source

HUB_TIMEOUT_SECONDS = 10
ARROW_BATCH = 1000  # rows of an Arrow table that are Python objects at once
PARQUET_BUFFER = 2**16  # bytes of a column read at once
ARRAY_CHUNK = 2**20  # characters of a JSON array read at once
SPACE = re.compile(r"[ \t\r\n]*")
NEWLINE = "\n"
TOO_MANY_DIGITS = f"holds a number of more than {sys.get_int_max_str_digits():,} digits; write it as text in quotes"
EMPTY = {  # what a file without rows needs, by its type
    ".jsonl": "rows are needed, e.g. one JSON object a line",
    ".json": "rows are needed, e.g. one JSON object a line",
    ".csv": "rows are needed below its header",
    ".tsv": "rows are needed below its header",
    ".parquet": "rows are needed",
}
Rows = Iterator[tuple[int, Any]]  # (line or row, from 1; the row, or a FormatError where it cannot be read)


class HubDataset(NamedTuple):
    """A split of a data set that `datasets.load_dataset` knows: of the hub, or a local folder."""

    path: str
    subset: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        if self.subset is None and self.split == "train":
            return self.path
        return f"{self.path} ({self.subset}, {self.split})" if self.subset else f"{self.path} ({self.split})"


DataFile = Path | HubDataset


def expand(source: Source, recipe: Recipe, key: str) -> list[DataFile]:
    """The files of a source, or the data set it is. Raises: RecipeError: neither, or no type of file that is read."""
    path, dataset = Path(source.path), HubDataset(source.path, source.subset, source.split or "train")
    has_split = source.subset is not None or source.split is not None
    if path.is_dir():
        if has_split:
            return [dataset]
        pattern = f"{source.path.rstrip('/')}/*.jsonl"
        raise recipe.error(
            key, f"{source.path} is a directory; name its files, e.g. {pattern}, or, of a hub data set's copy, a split"
        )
    files: list[Path] = [path] if path.is_file() else []
    if not files and any(c in source.path for c in "*?["):
        files = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
        if not files:
            raise recipe.error(key, f"no file matches {source.path} (working directory: {Path.cwd()})")
    if path.exists() and not files:
        raise recipe.error(key, f"{source.path} is no file but a device or the like; give a file")
    for file in files:
        if any("\ud800" <= character <= "\udfff" for character in str(file)):
            raise recipe.error(key, f"the name of {file} is not UTF-8; rename it")
        if has_split:
            raise recipe.error(key, f"{file} is a file: it has no subset and no split; take these out")
        if file_type(file) is None:
            known = f"{', '.join(READERS)}, and each but .parquet with .gz or .zst after it"
            raise recipe.error(key, f"{file} has no ending of a file that can be read: {known}")
    if files:
        return list(files)
    is_hub_id = source.path.count("/") <= 1 if has_split else source.path.count("/") == 1 and not path.suffix
    if not is_hub_id or source.path.startswith((".", "/", "~")) or recipe.is_elsewhere(source.path):
        where = f"(working directory: {Path.cwd()}){recipe.where_it_is(source.path)}"
        raise recipe.error(key, f"there is no file {source.path} {where}")
    return [
        dataset if recipe.hub == "huggingface" else dataset._replace(path=_from_modelscope(source.path, recipe, key))
    ]


def _from_modelscope(name: str, recipe: Recipe, key: str) -> str:
    """The folder of a data set that ModelScope's library has fetched. Raises: RecipeError: it cannot."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download

        return str(dataset_snapshot_download(name))
    except ImportError:
        raise recipe.error("hub", "modelscope is fetched by its own library: pip install modelscope") from None
    except Exception as error:  # whatever it raises, it is about this name or the network
        what = f"there is no file {name}, and ModelScope does not give it: {str(error).splitlines()[0][:300]}"
        raise recipe.error(key, what) from None


def read_rows(file: DataFile) -> Rows:
    """The rows of a file, each with its line (JSON lines) or row (the others), both counted from 1.

    Raises: DataError: the file as a whole cannot be read, or not to its end.
    """
    if isinstance(file, HubDataset):
        yield from _dataset_rows(file)
        return
    last = 0
    try:
        for last, row in READERS[file_type(file) or ""](file):
            yield last, row
    except OSError as error:
        reason = error.strerror or str(error)  # gzip's own has no strerror
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); if it is GBK or the like, save it as UTF-8"
    except (EOFError, zlib.error, zstd.ZstdError, pa.ArrowException) as error:
        reason = str(error) or type(error).__name__
    except csv.Error as error:
        reason = _table_reason(str(error))
    else:
        if not last:
            raise DataError(f"{file}: is empty; {EMPTY[file_type(file) or '']}")
        return
    beyond = f" beyond row {last}" if last else ""
    raise DataError(f"{file}: cannot be read{beyond}: {reason.splitlines()[0]}")


def count_rows(file: DataFile) -> int | None:
    """How many rows a file has, where that is told in a moment: about, of JSON lines. None: it is not."""
    if isinstance(file, Path):
        with suppress(OSError, pa.ArrowException):  # `read_rows` tells what is wrong
            if file.suffix.lower() == ".jsonl":
                with open(file, "rb") as stream:
                    return sum(piece.count(b"\n") for piece in iter(partial(stream.read, ARRAY_CHUNK), b"")) or None
            if file.suffix.lower() == ".parquet":
                return pq.read_metadata(file).num_rows
    return None


def file_type(file: DataFile) -> str | None:
    """The ending that says how a file is read, in lower case, without that of a compression; None: no known one."""
    if isinstance(file, HubDataset):
        return None
    name = file.name.lower()
    unpacked = next((name.removesuffix(ending) for ending in UNPACKERS if name.endswith(ending)), name)
    ending = Path(unpacked).suffix
    return ending if ending in READERS and (ending != ".parquet" or unpacked == name) else None


# --------------------------------------------------------------------------------------------------------------- JSON


def _json_rows(file: Path) -> Rows:
    """JSON lines, or the elements of an array."""
    with open_bytes(file) as stream:
        piece = stream.read(ARRAY_CHUNK).removeprefix(BOM)
        while piece.isspace():
            piece = stream.read(ARRAY_CHUNK)
    with open_bytes(file) as stream:
        if piece.lstrip()[:1] == b"[":
            yield from enumerate(_array_elements(file, io.TextIOWrapper(stream, encoding="utf-8-sig")), start=1)
            return
        for number, line in enumerate(bounded_lines(file, stream), start=1):
            content = line.removeprefix(BOM) if number == 1 else line
            if content and not content.isspace():
                yield number, _parsed(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must differ: Python would keep the last of two in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r:.60} twice; keep one")
    return found


def _no_number(name: str) -> Any:
    raise FormatError(f"holds {name}, which is no number of JSON; write null, or text in quotes")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def _parsed(line: bytes) -> Any:
    try:
        row = _decoder.decode(line.rstrip().decode("utf-8"))  # json.loads would take half a surrogate pair of bytes
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return FormatError(f"is not UTF-8 ({byte}); if the file is GBK or the like, save it as UTF-8")
    except json.JSONDecodeError as error:
        hint = "; write each row in one line" if line.strip() == b"{" else ""
        if not hint and error.pos >= len(error.doc):
            hint = ", the row's end; is its last } or ] missing?"
        return FormatError(f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{hint}")
    except ValueError:
        return FormatError(TOO_MANY_DIGITS)
    except FormatError as error:
        return error
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


def _array_elements(file: Path, text: io.TextIOWrapper) -> Iterator[Any]:
    """The elements of a JSON array, one by one: `[{"a": 1}, {"a": 2}]` as {"a": 1}, then {"a": 2}."""
    decode = _decoder.raw_decode
    buffer, line, number = text.read(ARRAY_CHUNK), 1, 0
    while "[" not in buffer:  # only space so far
        buffer = text.read(ARRAY_CHUNK)
    at = buffer.index("[") + 1  # where the next element may begin
    while True:
        try:
            begin = _after_space(buffer, at)
            if number == 0 and buffer[begin : begin + 1] == "]":
                end_of_element = begin
            else:
                element, end = decode(buffer, begin)
                end_of_element = _after_space(buffer, end)
                if buffer[end_of_element : end_of_element + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", buffer, end_of_element)
                number += 1
                has_surrogate = any(buffer.find(half, begin, end) >= 0 for half in ("\\ud", "\\uD"))
                yield _whole(element) if has_surrogate else element
        except json.JSONDecodeError as error:
            # The buffer may end within the element: then the error is at its end, or where an open text begins.
            is_cut = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated")
            more = text.read(max(ARRAY_CHUNK, len(buffer))) if is_cut else ""
            if more and len(buffer) - at > MAX_ROW:
                raise DataError(f"{file}: row {number + 1} is longer than {MAX_ROW >> 20} MiB; cut it") from None
            if not more:
                place = f"row {number + 1}, line {line + buffer.count(NEWLINE, 0, error.pos)}"
                raise DataError(f"{file}: begins as a JSON array and is not one: {error.msg} ({place})") from None
            line += buffer.count(NEWLINE, 0, at)
            buffer, at = buffer[at:] + more, 0
            continue
        except RecursionError:
            raise DataError(f"{file}: row {number + 1} is JSON nested too deep to read") from None
        except (FormatError, ValueError) as error:
            what = error if isinstance(error, FormatError) else TOO_MANY_DIGITS
            raise DataError(f"{file}: row {number + 1} {what}") from None
        at = end_of_element + 1
        if buffer[end_of_element] == "]":
            break
    rest = buffer[at:]
    while rest.isspace() or not rest:
        if not (rest := text.read(ARRAY_CHUNK)):
            return
    raise DataError(f"{file}: has more text after the end of its JSON array, after row {number}")


def _after_space(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no white space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


# -------------------------------------------------------------------------------------------------------------- tables


def _table_rows(file: Path, delimiter: str) -> Rows:
    """Rows below the header, all cells text; an empty cell is an absent key. Quoted cells may hold line breaks."""
    csv.field_size_limit(MAX_ROW)  # of the whole process; Python's own limit is 131,072
    with open_bytes(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        table = csv.reader(bounded_lines(file, lines), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next((cells for cells in table if cells), [])]
        _refuse_twice(file, header)
        if len(header) == 1 and (found := [other for other in ",;\t|" if other in header[0]]):
            wanted = "tabs" if delimiter == "\t" else "commas"
            raise DataError(
                f"{file}: the header is one column, with {found[0]!r} in it; separate columns with {wanted}"
            )
        for number, cells in enumerate((cells for cells in table if cells), start=1):
            if len(cells) == len(header):
                yield number, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            else:
                yield number, FormatError(f"has {len(cells)} cells, and the header has {len(header)}")


def _table_reason(error: str) -> str:
    if "unexpected end of data" in error:
        return "a quoted cell has no end; close the quote"
    if "field limit" in error:
        return f"a cell is longer than {MAX_ROW >> 20} MiB; is a quote not closed?"
    return f"{error}; put a cell in quotes as a whole, and write a quote within it twice"


def _refuse_twice(file: Path, names: list[str]) -> None:
    """Raises: DataError: two columns of one name, of which one would be lost."""
    if twice := next((name for name, count in Counter(names).items() if name and count > 1), None):
        raise DataError(f"{file}: two columns are called {twice!r:.60}; rename one")


# --------------------------------------------------------------------------------------------------------------- Arrow


def _parquet_rows(file: Path) -> Rows:
    # Not by datasets.load_dataset, which holds a row group several times: 726 MiB for a file of 155, this 64.
    with pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False) as parquet:
        schema = parquet.schema_arrow
        _refuse_twice(file, schema.names)
        written_by_datasets = b"huggingface" in (schema.metadata or {})
        features = datasets.Features.from_arrow_schema(schema) if written_by_datasets else {}
        yield from _arrow_rows(parquet.iter_batches(ARROW_BATCH), features)


def _arrow_rows(tables: Iterable[pa.Table | pa.RecordBatch], features: dict[str, Any]) -> Rows:
    batches = (table.to_pylist() for table in tables)
    yield from enumerate((_without_padding(row, features) for batch in batches for row in batch), start=1)


def _without_padding(value: Any, feature: Any) -> Any:
    """The value without the keys that Arrow adds, with null, where other rows have them.

    A null in a list stays, and any null within JSON (text, or a feature `Json`), for Arrow pads neither.
    """
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        kinds = feature if isinstance(feature, dict) else {}
        return {k: _without_padding(item, kinds.get(k)) for k, item in value.items() if item is not None}
    if isinstance(value, list):
        kind = getattr(feature, "feature", None)
        return [_without_padding(item, kind) for item in value]
    return value


def dataset_digest(dataset: HubDataset) -> str:
    """The commit of a hub data set, or the digest of a local folder's files.

    Raises: DataError: the hub does not know it, or does not answer.
    """
    folder = Path(dataset.path)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with open(path, "rb") as stream:
                digest.update(f"{path}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
        return digest.hexdigest()
    try:
        return str(HfApi().dataset_info(dataset.path, timeout=HUB_TIMEOUT_SECONDS).sha)
    except Exception as error:  # whatever the hub client raises, it is about this name or the network
        raise DataError(_not_given(dataset, error)) from None


def _dataset_rows(dataset: HubDataset) -> Rows:
    path, subset, split = dataset
    try:
        rows = datasets.load_dataset(path, subset, split=split, streaming=True)
        tables = rows.with_format("arrow").iter(ARROW_BATCH)  # 40 times as fast as the library's own decoding
        yield from _arrow_rows(tables, rows.features or {})
    except Exception as error:
        raise DataError(_not_given(dataset, error)) from None


def _not_given(dataset: HubDataset, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if Path(dataset.path).is_dir():
        return f"{dataset}: datasets.load_dataset cannot read this folder: {reason}"
    return f"{dataset}: is no file here, and {HfApi().endpoint} does not give it: {reason}"


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
}
