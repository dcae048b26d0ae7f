"""Rows -> conversations: the formats of formats/, which of them a row is, and what it says."""

import importlib
import json
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sft.data.conversation import Conversation, Message
from sft.errors import DataError, FormatError

LOSS_KEYS = frozenset({"train", "loss", "weight"})  # of a message: ours, ms-swift's, OpenAI's
NAMED = 8  # keys in a message; a longer list is not read
FORMATS = Path(__file__).resolve().parents[2] / "formats"


class Format(NamedTuple):
    name: str
    fields: dict[str, dict[str, Any]]
    to_messages: Callable[..., list[dict[str, Any]]]


def load_formats() -> dict[str, Format]:
    """Every file of formats/ by its name."""
    root = str(FORMATS.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    found = {}
    for path in sorted(FORMATS.glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"formats.{path.stem}")
            found[path.stem] = Format(path.stem, module.FIELDS, module.to_messages)
    return found


def detect_format(row: Any) -> Format:
    """The format whose required fields a row has; of several, the one that asks for the most.

    Raises: FormatError: no format fits, or two that ask for as much.
    """
    formats = load_formats()
    fits = [f for f in formats.values() if isinstance(row, dict) and all(key in row for key in f.fields["required"])]
    if not fits:
        raise FormatError(_no_format(row, formats))
    most = max(len(f.fields["required"]) for f in fits)
    best = [f for f in fits if len(f.fields["required"]) == most]
    if len(best) > 1:
        raise FormatError(f"fits the formats {' and '.join(f.name for f in best)}; say which with dataset.format")
    return best[0]


OTHER_WORDS = {  # for the keys of formats and of their turns
    "human": ("user", "question", "问题", "问"),
    "assistant": ("bot", "gpt", "model", "answer", "答案", "回答", "答"),
    "output": ("response", "answer", "target"),
    "completion": ("response", "answer", "target"),
    "conversation": ("dialog", "dialogue", "turns"),
    "from": ("role", "speaker"),
    "value": ("content", "text"),
    "role": ("from", "speaker"),
    "content": ("value", "text"),
}


def _no_format(row: Any, formats: dict[str, Format]) -> str:
    """What a row has that no format takes, and what to rename for the format that is nearest to it."""
    if not isinstance(row, dict) or not row:
        return f"no format fits {_json_type(row) if row != {} else 'an empty object'}; a row is an object with fields"
    renamings, lacking = [], []
    for fmt in formats.values():
        missing = [key for key in fmt.fields["required"] if key not in row]
        if len(missing) < len(fmt.fields["required"]):
            lacking.append(f"of {fmt.name} {' and '.join(missing)} is missing")
        found = [_alike(key, row) for key in missing]
        if None not in found:
            renamings.append((len(missing), ", ".join(f"{a}: {b}" for a, b in zip(found, missing, strict=True)), fmt))
    if renamings:
        _, columns, fmt = min(renamings, key=lambda renaming: renaming[0])
        hint = f"if it is meant to be {fmt.name}, set dataset.columns: {{{columns}}}"
    elif lacking:
        hint = lacking[0]
    else:
        hint = f"docs/formats.md shows a row of each: {', '.join(formats)}"
    return f"no format fits the fields {some(row)}; {hint}"


def _alike(wanted: str, row: dict[str, Any]) -> str | None:
    """The row's key that may mean a format's: another word for it, or nearly the same letters."""
    keys = [key for key in row if isinstance(key, str)]
    others = [key for key in keys if key.lower() in OTHER_WORDS.get(wanted, ())]
    return next(iter(others or get_close_matches(wanted, keys, 1, 0.8)), None)


def _turn_hint(row: dict[str, Any], fmt: Format) -> str:
    """Which keys of a turn may be meant where it lacks those of its format; nothing where none is like them."""
    lists = [row[key] for key, types in fmt.fields["required"].items() if types is list]
    for turn in (turn for turns in lists for turn in turns if isinstance(turn, dict)):
        found = {key: _alike(key, turn) for key in fmt.fields.get("turns", ()) if key not in turn}
        if columns := ", ".join(f"{like}: {key}" for key, like in found.items() if like):
            return f"; if these are other names, set dataset.columns: {{{columns}}}"
    return ""


def some(names: Iterable[Any]) -> str:
    """The first NAMED of the names, e.g. "a, b, ..."."""
    texts = [name if len(name) <= 60 else name[:57] + "..." for name in map(str, islice(names, NAMED + 1))]
    return ", ".join(texts[:NAMED]) + (", ..." if len(texts) > NAMED else "")


def to_conversation(row: Any, fmt: Format, system: str | None) -> Conversation:
    """Checks a row's fields and reads it; text where a list belongs is read as JSON, for a table has only text.

    Raises: FormatError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise FormatError(f"the row is {_json_type(row)}, not an object")
    for kind in ("required", "optional"):
        for key, types in fmt.fields[kind].items():
            value = row.get(key)
            if value is None:
                if kind == "required":
                    raise FormatError(f"the field {key!r} is {'null' if key in row else 'missing'} (format {fmt.name})")
            elif not isinstance(value, types):
                if not isinstance(value, str) or not isinstance(read := _from_json(value), types):
                    raise FormatError(f"the field {key!r} is {_json_type(value)}, not {_type_names(types)}")
                row = {**row, key: read}
    tools = row.get("tools") if "tools" in fmt.fields["optional"] else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise FormatError(f"the field 'tools' is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FormatError("the field 'tools' must be a list of JSON schemas")
    try:
        made = fmt.to_messages(row, system)
    except FormatError as error:
        raise FormatError(f"{error}{_turn_hint(row, fmt)}") from None
    messages, untrained = _take_out_loss_keys(made)
    return Conversation(messages, tools or None, untrained)


def _take_out_loss_keys(messages: list[Message]) -> tuple[list[Message], frozenset[int]]:
    """The messages without the keys that say whether they carry loss, and the indexes of the answers that do not."""
    if all(map(LOSS_KEYS.isdisjoint, messages)):
        return messages, frozenset()
    untrained = []
    for index, message in enumerate(messages):
        marks = {key: message[key] for key in sorted(LOSS_KEYS) if message.get(key) is not None}
        for key, value in marks.items():
            if value not in (0, 1):  # which false and true equal
                raise FormatError(f"a message has {key}: {json.dumps(value)}; give true or false")
        if len(set(marks.values())) > 1:
            raise FormatError(f"a message has {' and '.join(marks)}, which disagree; keep one")
        if message["role"] == "assistant" and not all(marks.values()):
            untrained.append(index)
        elif message["role"] != "assistant" and any(marks.values()):
            raise FormatError(
                f"a message of role {message['role']} has {next(iter(marks))}: true; only answers carry loss"
            )
    plain = [{key: value for key, value in message.items() if key not in LOSS_KEYS} for message in messages]
    return plain, frozenset(untrained)


def _from_json(text: str) -> Any:
    """None: it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    if isinstance(value, int | float):
        return "a number"
    return names.get(type(value), type(value).__name__)  # a table may hold bytes or dates


def _type_names(types: type | tuple[type, ...]) -> str:
    names = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "a boolean"}
    return " or ".join(names.get(t, t.__name__) for t in (types if isinstance(types, tuple) else (types,)))


# ------------------------------------------------------------------------------------------------------- a file's rows


class RowReader:
    """Reads the rows of one file: renames their keys, finds the format by the first, and makes conversations of all.

    format_name: a file of formats/, or "auto". columns: {key in the file: key of the format}.
    """

    def __init__(self, format_name: str, columns: dict[str, str] | None, system: str | None):
        self.format = None if format_name == "auto" else load_formats()[format_name]
        self._columns, self._system = columns or {}, system
        self._unused = set(self._columns)
        self._found: dict[str, None] = {}  # the keys of the first row

    def read(self, row: Any) -> Conversation:
        """Raises: FormatError: what is wrong with the row."""
        if self._columns and isinstance(row, dict):
            row = self._with_new_names(row)
        if self.format is None:
            self.format = detect_format(row)
        return to_conversation(row, self.format, self._system)

    def refuse_unused_columns(self, file: Any) -> None:
        """After the last row. Raises: DataError: `columns` names a column that no row had."""
        if self._unused and self._found:
            columns = some(sorted(self._unused))
            raise DataError(f"{file}: no row has {columns}, which `columns` renames; it has {some(self._found)}")

    def _with_new_names(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its keys renamed, and those of the objects in its lists: its turns. Tools stay as they are."""
        self._found = self._found or dict.fromkeys(row)
        row = self._renamed(row)
        for key, value in row.items():
            if isinstance(value, list) and key != "tools":
                row[key] = [self._renamed(item) if isinstance(item, dict) else item for item in value]
        return row

    def _renamed(self, item: dict[str, Any]) -> dict[str, Any]:
        self._unused -= item.keys()
        renamed = {self._columns.get(key, key): value for key, value in item.items()}
        if len(renamed) < len(item):
            twice = next(key for key in item if key in self._columns and self._columns[key] in item)
            raise FormatError(f"has {twice!r} and {self._columns[twice]!r}, which `columns` makes one")
        return renamed
