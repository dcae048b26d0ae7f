"""YAML text -> items that know their place; the part of reading a recipe that knows no recipe.

Scalars follow the YAML 1.2 core schema: `2e-4` is a number and `no` is text.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft.errors import RecipeError
from sft.plain_text import SECRET_KEY, SECRET_VALUE
from sft.recipe.yaml_errors import explain

ROOT = Path(__file__).resolve().parents[2]  # of the repository
MAX_BYTES, MAX_VALUES = 256 * 1024, 100_000  # a recipe is far below; a model file or a YAML alias bomb is above
MAX_SHOWN = 100  # characters of an override in an error
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
WITHOUT_SPACE = re.compile(r"([\w.-]+):(\S+)")  # `key:value`, which is one word of YAML


@dataclass
class Item:
    """A value as written (a scalar, a list of items, a dict of items) and the place it came from."""

    value: Any
    where: str  # "recipes/x.yaml:7" or "override dataset.train=x"
    key: str  # "dataset.train[0].path"; "" is the whole recipe

    @property
    def label(self) -> str:
        """Place and key, as an error begins; an override names its key already."""
        return self.where if not self.key or self.where.startswith(f"override {self.key}=") else self.label_of(self.key)

    def label_of(self, key: str) -> str:
        return f"{self.where}: {key}"

    @property
    def is_overridden(self) -> bool:
        return self.where.startswith("override ")


def plain(item: Item) -> Any:
    """The value of an item without the places, at every depth."""
    if isinstance(item.value, dict):
        return {name: plain(child) for name, child in item.value.items()}
    return [plain(child) for child in item.value] if isinstance(item.value, list) else item.value


class _CoreSchemaLoader(yaml.SafeLoader):
    """The YAML 1.2 core schema; PyYAML's own is 1.1, where 2e-4 is text, `no` is false and 010 is 8."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {  # tag: pattern, first characters, how it is read
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[a-z])", "", text.lower())),
    ),
}
for _name, (_pattern, _first_characters, _) in _SCALARS.items():
    _CoreSchemaLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [*_first_characters, ""])


class Reader:
    """Builds items from YAML; `problems` collects what is wrong with the text itself."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.values_left = MAX_VALUES

    def read(self, path: Path, text: str) -> Item:
        """The whole recipe of this text.

        Raises: RecipeError: it is no YAML, or none of a recipe.
        """
        top = self.parse(text, "", lambda line: f"{path}:{line}")
        if top.value is None:
            raise RecipeError(
                f"{path}: is empty; a recipe has at least model_name_or_path, output_dir and dataset_path"
            )
        if not isinstance(top.value, dict):
            raise RecipeError(f"{path}: found {spell(top.value)}; a recipe is lines of `key: value`")
        top.where = str(path)
        return top

    def override(self, top: Item, text: str) -> None:
        """Puts the value of "key.path=value" into the recipe `top`.

        Raises: RecipeError: the value is not YAML.
        """
        key, equals, value = text.partition("=")
        *sections, name = key.split(".")
        if not (equals and name and all(sections)):
            self.problems.append(f"override {text}: write key.path=value, e.g. training_args.max_steps=10")
            return
        shown = spell_line(value)
        if SECRET_KEY.search(key) or SECRET_VALUE.search(value):
            shown = "..."
        where = f"override {spell_line(key)}={shown}"
        parent = top
        for section in sections:
            child = parent.value.get(section)
            if child is None or child.value is None:
                child = parent.value[section] = Item({}, where, child_key(parent.key, section))
            if not isinstance(child.value, dict):
                self.problems.append(f"{where}: {child.key} is {spell(child.value)}; override {child.key} as a whole")
                return
            parent = child
        parent.value[name] = self.parse(value, child_key(parent.key, name), lambda line: where)

    def parse(self, text: str, key: str, place_of: Callable[[int], str]) -> Item:
        """The item of a YAML text; `place_of` gives the place of a line, counted from 1."""
        try:
            node = yaml.compose(text, _CoreSchemaLoader)
            return Item(None, place_of(1), key) if node is None else self._item(node, key, place_of, 1)
        except yaml.MarkedYAMLError as error:
            line, column, found = explain(text, error)
            where = place_of(1) if key else f"{place_of(line)}:{column}"  # of an override there is one place
            problem = f"{where}: not YAML: {found}"
        except yaml.reader.ReaderError as error:
            where = place_of(text.count("\n", 0, error.position) + 1)
            problem = f"{where}: not YAML: the character U+{error.character:04X} is not allowed; remove it"
        except RecursionError:
            problem = f"{place_of(1)}: is nested too deeply, or an alias holds itself; write the values out"
        raise RecipeError(problem)

    def _item(self, node: yaml.Node, key: str, place_of: Callable[[int], str], line: int) -> Item:
        self.values_left -= 1
        if self.values_left < 0:
            raise RecipeError(f"{place_of(line)}: more than {MAX_VALUES} values; write aliases of aliases out")
        item = Item(None, place_of(line), key)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            item.value = self._mapping(node, key, place_of)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            item.value = [
                self._item(child, f"{key}[{index}]", place_of, child.start_mark.line + 1)
                for index, child in enumerate(node.value)
            ]
        elif isinstance(node, yaml.ScalarNode):
            item.value = self._scalar(node, item.label)
        else:
            self.problems.append(f"{item.label}: found the YAML tag {node.tag}; write plain YAML")
        return item

    def _mapping(self, node: yaml.MappingNode, key: str, place_of: Callable[[int], str]) -> dict[Any, Item]:
        items: dict[Any, Item] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            where = place_of(line)
            name = self._scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(name, str | int) or isinstance(name, bool):  # a whole number: a device of max_memory
                self.problems.append(f"{where}: a key of {key or 'the recipe'} is not text; put it in quotes")
            elif (
                isinstance(child, yaml.ScalarNode)
                and not child.value
                and not child.style
                and (hint := space_hint(name))
            ):
                self.problems.append(f"{where}: {key or 'the recipe'}: found {spell(name)} without a value; {hint}")
            elif name in items:
                first_line = items[name].where.rpartition(":")[2]
                given = f"given in line {first_line} already" if first_line.isdigit() else "given twice"
                self.problems.append(f"{where}: duplicate key {child_key(key, name)}, {given}; keep one")
            else:
                items[name] = self._item(child, child_key(key, name), place_of, line)
        return items

    def _scalar(self, node: yaml.ScalarNode, label: str) -> Any:
        if node.tag == _TAG + "str":
            if found := NO_TEXT.search(node.value):
                what = "half of a surrogate pair," if found[0] >= "\ud800" else "the control character"
                self.problems.append(f"{label}: holds {what} U+{ord(found[0]):04X}; remove it")
            return node.value
        try:
            value = _SCALARS[node.tag.removeprefix(_TAG)][2](node.value)
        except KeyError:
            self.problems.append(f"{label}: found the YAML tag {node.tag}; write plain YAML")
            return None
        except ValueError:  # a tag that lies, or more digits than Python reads
            self.problems.append(f"{label}: found {node.value:.30} as a number; give a finite number")
            return None
        if isinstance(value, int | float) and not abs(value) < 2**63:  # nan and inf too: JSON has no word for them
            self.problems.append(f"{label}: found {node.value:.30}; give a finite number")
            return None
        return value


def read_text(path: Path) -> str:
    """The recipe's text.

    Raises: RecipeError: no such file, not a file, too large, or not UTF-8.
    """
    try:
        if not path.exists():
            hint = elsewhere(path, ROOT) or nearest_path(path) or "recipes/ holds ready ones"
            raise RecipeError(f"{path}: no such file; {hint}")
        if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
            raise RecipeError(f"{path}: is data; give a recipe, and the data as dataset.train={path}")
        if not path.is_file():
            raise RecipeError(f"{path}: is not a file; give the recipe's YAML file")
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: has {path.stat().st_size} bytes; a recipe is a short YAML file")
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise RecipeError(f"{path}: is UTF-16, or not text at all; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 (GBK, or another encoding?); save it as UTF-8") from None


def elsewhere(path: str | Path, *folders: Path) -> str:
    """What to say of a path that is not in the working directory but in one of these folders; else nothing."""
    here = Path.cwd()
    found = next((folder for folder in folders if (folder / path).exists()), here)
    return "" if found == here else f"it is in {found}: run the command from there"


def nearest_path(path: str | Path) -> str:
    """A path that is there and is spelled nearly like this one, as a question; nothing where there is none."""
    found = Path()
    for part in Path(path).expanduser().parts:
        if not (found / part).exists():
            names = os.listdir(found) if found.is_dir() and os.access(found, os.R_OK) else []
            alike = difflib.get_close_matches(_stem(part), map(_stem, names), 8)  # for an ending alone is not alike
            part = _nearest(part, [name for name in names if _stem(name) in alike])
            if not part:
                return ""
        found /= part
    return f"did you mean '{found}'?"


def did_you_mean(value: Any, names: Iterable[Any]) -> str:
    """The name that is spelled nearly like the value, as a question; nothing where there is none."""
    name = _nearest(value, names)
    return f"did you mean '{name}'?" if name else ""


def _stem(name: str) -> str:
    """
    >>> _stem("Train.jsonl.gz"), _stem("Qwen2.5-7B")
    ('train', 'qwen2.5-7b')
    """
    return re.sub(r"(\.[a-z]+)+$", "", name.lower())


def _nearest(value: Any, names: Iterable[Any]) -> str:
    spelled = {name.lower(): name for name in names if isinstance(name, str)}
    return next((spelled[match] for match in difflib.get_close_matches(str(value).lower(), spelled, 1)), "")


def child_key(key: str, name: str | int) -> str:
    """The key of what stands in the section `key` under `name`, e.g. dataset.train."""
    text = str(name) if str(name).isprintable() else repr(name)
    return f"{key}.{text}" if key else text


def spell_line(text: str) -> str:
    """What was written on the command line, for an error: on one line and short."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 3] + "..."


def space_hint(text: Any) -> str:
    """What to do about `key:value`; nothing where the text is not that."""
    found = WITHOUT_SPACE.fullmatch(text) if isinstance(text, str) else None
    return f"write a space after the colon: `{found[1]}: {found[2]}`" if found else ""


def spell(value: Any) -> str:
    """A value for an error: as YAML spells it, on one line and short."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
