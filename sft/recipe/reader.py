"""YAML text -> items that know their place, and what a JSON Schema finds wrong with them; the half of reading a recipe
that knows no recipe.

Scalars follow the YAML 1.2 core schema: `2e-4` is a number and `no` is text.
"""

import difflib
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft.errors import RecipeError

MAX_BYTES, MAX_VALUES = 256 * 1024, 100_000  # a recipe is far below; a model file or a YAML alias bomb is above
SECRET_KEY = re.compile(r"(token|api_?key|secret|password|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?<![\w-])(hf_|gh[pousr]_|sk-(proj-|ant-)?)[A-Za-z0-9]{30,}")
NO_SECRETS = "a secret has no place in a recipe; set HF_TOKEN or WANDB_API_KEY, or run `hf auth login`"


@dataclass
class Item:
    """A value as written (a scalar, a list of items, a dict of items) and the place it came from."""

    value: Any
    where: str  # "recipes/x.yaml:7" or "override dataset.train=x"
    key: str  # "dataset.train[0].path"; "" is the whole recipe

    @property
    def label(self) -> str:
        return self.where if not self.key or self.where.startswith(f"override {self.key}=") else self.at(self.key)

    def at(self, key: str) -> str:
        return f"{self.where}: {key}"


class _Loader(yaml.SafeLoader):
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
for _name, (_pattern, _first, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [*_first, ""])


class Reader:
    """Builds items from YAML; `problems` collects what is wrong with the text itself."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.values_left = MAX_VALUES

    def read(self, path: Path) -> Item:
        top = self._parse(_text(path), "", lambda line: f"{path}:{line}")
        if top.value is None:
            raise RecipeError(
                f"{path}: is empty; a recipe has at least model_name_or_path, output_dir and dataset_path"
            )
        if not isinstance(top.value, dict):
            raise RecipeError(f"{path}: found {show(top.value)}; a recipe is lines of `key: value`")
        top.where = str(path)
        return top

    def override(self, top: Item, text: str) -> None:
        key, equals, value = text.partition("=")
        *sections, name = key.split(".")
        if not (equals and name and all(sections)):
            self.problems.append(f"override {text}: write key.path=value, e.g. training_args.max_steps=10")
            return
        where = f"override {key}={'...' if SECRET_KEY.search(key) or SECRET_VALUE.search(value) else value}"
        parent = top
        for section in sections:
            child = parent.value.get(section)
            if child is None or child.value is None:
                child = parent.value[section] = Item({}, where, join(parent.key, section))
            if not isinstance(child.value, dict):
                self.problems.append(f"{where}: {child.key} is {show(child.value)}; override {child.key} as a whole")
                return
            parent = child
        parent.value[name] = self._parse(value, key, lambda line: where)

    def _parse(self, text: str, key: str, where: Callable[[int], str]) -> Item:
        try:
            node = yaml.compose(text, _Loader)
            return Item(None, where(1), key) if node is None else self._item(node, key, where, 1)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where_ = f"{where(mark.line + 1)}:{mark.column + 1}" if mark and not key else where(1)
            context = f"{error.context}, " if error.context else ""
            problem = f"{where_}: not YAML: {context}{error.problem}; quote text with special characters"
        except yaml.reader.ReaderError as error:
            line = where(text.count("\n", 0, error.position) + 1)
            problem = f"{line}: not YAML: the character U+{error.character:04X} is not allowed; remove it"
        except RecursionError:
            problem = f"{where(1)}: is nested too deeply, or an alias holds itself; write the values out"
        raise RecipeError(problem)

    def _item(self, node: yaml.Node, key: str, where: Callable[[int], str], line: int) -> Item:
        self.values_left -= 1
        if self.values_left < 0:
            raise RecipeError(f"{where(line)}: more than {MAX_VALUES} values; write aliases of aliases out")
        item = Item(None, where(line), key)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            item.value = self._mapping(node, key, where)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            item.value = [
                self._item(child, f"{key}[{index}]", where, child.start_mark.line + 1)
                for index, child in enumerate(node.value)
            ]
        elif isinstance(node, yaml.ScalarNode):
            item.value = self._scalar(node, item.label)
        else:
            self.problems.append(f"{item.label}: found the YAML tag {node.tag}; write plain YAML")
        return item

    def _mapping(self, node: yaml.MappingNode, key: str, where: Callable[[int], str]) -> dict[Any, Item]:
        items: dict[Any, Item] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            name = self._scalar(key_node, where(line)) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(name, str | int) or isinstance(name, bool):  # a whole number: a device of max_memory
                self.problems.append(f"{where(line)}: a key of {key or 'the recipe'} is not text; put it in quotes")
            elif name in items:
                first = items[name].where.rpartition(":")[2]
                given = f"given in line {first} already" if first.isdigit() else "given twice"
                self.problems.append(f"{where(line)}: duplicate key {join(key, name)}, {given}; keep one")
            else:
                items[name] = self._item(child, join(key, name), where, line)
        return items

    def _scalar(self, node: yaml.ScalarNode, label: str) -> Any:
        if node.tag == _TAG + "str":
            return node.value
        try:
            value = _SCALARS[node.tag.removeprefix(_TAG)][2](node.value)
        except (KeyError, ValueError):
            self.problems.append(f"{label}: found the YAML tag {node.tag}; write plain YAML")
            return None
        if isinstance(value, int | float) and not abs(value) < 2**63:  # nan and inf too: JSON has no word for them
            self.problems.append(f"{label}: found {node.value:.30}; give a finite number")
            return None
        return value


def _text(path: Path) -> str:
    """The recipe's text. Raises: RecipeError: no such file, not a file, too large, or not UTF-8."""
    try:
        if not path.exists():
            raise RecipeError(f"{path}: no such file; recipes/ holds ready ones")
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


def join(key: str, name: str | int) -> str:
    text = str(name) if str(name).isprintable() else repr(name)
    return f"{key}.{text}" if key else text


# Items -> problems, by the schema

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping (key: value)",
}
_RANGES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "exclusiveMinimum": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "exclusiveMaximum": ("below", operator.lt),
}


def problems_of(item: Item, schema: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an item, by the few keywords of JSON Schema that schema.json uses."""
    value = item.value
    kind = _KINDS.get(type(value), "null")
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    choices = schema.get("enum")
    if kind == "string" and SECRET_VALUE.search(value):
        yield f"{item.label}: this looks like an access token; {NO_SECRETS}"
    elif "anyOf" in schema:
        tries = [[*problems_of(item, choice)] for choice in schema["anyOf"]]
        yield from () if [] in tries else tries[0]
    elif types and kind not in types and not (kind == "integer" and "number" in types):
        yield f"{item.label}: found {show(value)}; give {' or '.join(_WORDS[name] for name in types)}"
    elif choices and not any(type(value) is type(choice) and value == choice for choice in choices):
        yield f"{item.label}: found {show(value)}; {_nearest(value, choices) or _list('choose from', choices)}"
    elif kind == "object":
        yield from _mapping_problems(item, schema)
    elif kind == "array":
        if len(value) < schema.get("minItems", 0):
            yield f"{item.label}: is an empty list; give at least one"
        if schema.get("uniqueItems") and len({repr(child.value) for child in value}) < len(value):
            yield f"{item.label}: names one twice; keep one"
        for child in value:
            yield from problems_of(child, schema.get("items", {}))
    elif kind == "string" and (
        len(value) < schema.get("minLength", 0) or not re.search(schema.get("pattern", ""), value)
    ):
        yield f"{item.label}: found {show(value)}; give {schema.get('description', 'another')}"
    elif kind in ("integer", "number"):
        limits = {name: schema[name] for name in _RANGES if name in schema}
        if not all(_RANGES[name][1](value, limit) for name, limit in limits.items()):
            wanted = " and ".join(f"{_RANGES[name][0]} {limit}" for name, limit in limits.items())
            yield f"{item.label}: found {show(value)}; give a number {wanted}"


def _mapping_problems(item: Item, schema: dict[str, Any]) -> Iterator[str]:
    known = schema.get("properties")
    instead = schema.get("x-instead", {})
    for name, child in list(item.value.items()):
        if known is not None and name in known:
            if child.value is None:
                del item.value[name]  # a null means the default
            else:
                yield from problems_of(child, known[name])
        elif name in instead:
            yield f"{child.label}: {instead[name]}"
        elif SECRET_KEY.search(str(name)):
            yield f"{child.label}: {NO_SECRETS}"
        elif known is not None:
            section, dot, key = str(name).partition(".")
            nest = f"nest it: `{key}` below `{section}:`" if dot and section in known else ""
            hint = nest or _nearest(name, known) or _list("the keys here are", known)
            yield f"{child.where}: unknown key {child.key}; {hint}"
        else:
            yield from problems_of(child, schema.get("additionalProperties", {}))
    for name in schema.get("required", []):
        if name not in item.value:
            yield f"{item.at(join(item.key, name))}: is missing; give {schema['properties'][name]['description']}"


def _nearest(name: Any, names: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(name), [text for text in names if isinstance(text, str)], 1)
    return f"did you mean '{near[0]}'?" if near else ""


def _list(words: str, names: Iterable[Any], most: int = 15) -> str:
    texts = [name if isinstance(name, str) else show(name) for name in names]
    return f"{words} {', '.join(texts[:most])}{', ...' if len(texts) > most else ''}"


def show(value: Any) -> str:
    """A value for an error: YAML's spelling of it, on one line and short."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def raise_all(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise RecipeError("\n".join(lines))
