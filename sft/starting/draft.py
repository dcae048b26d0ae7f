"""A recipe in the making: settings with comments -> the text of a file, which is read back before it is kept."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import UserError
from sft.plain_text import plain_text
from sft.recipe import Recipe, load_recipe
from sft.recipe.reader import Reader, plain
from sft.recipe.schema import SCHEMA_FILE, Schema, recipe_schema

COMMENT_COLUMN = 44
WIDTH = 110  # a longer value goes over several lines
PLAIN = re.compile(r"[A-Za-z_./~][\w./@+-]*")  # text that needs no quotes in YAML
NO_TEXT = ("true", "false", "null", "~", "yes", "no", "on", "off")  # the last four in YAML 1.1, which tools read
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=.*", re.DOTALL)


class Setting(NamedTuple):
    value: Any
    comment: str = ""


@dataclass
class Draft:
    """settings: flat key -> value and comment. head, tail: comment lines before and after them."""

    settings: dict[str, Setting] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, comment: str = "") -> None:
        self.settings[key] = Setting(value, comment)

    def value(self, key: str) -> Any:
        """None: it is not set."""
        return self.settings[key].value if key in self.settings else None

    def override(self, word: str) -> None:
        """Takes over a key.path=value of the command line; null takes the key, or the section, out."""
        key, _, value = word.partition("=")
        read = plain(Reader().parse(value, key, lambda line: f"override {word}"))
        self.drop(f"{key}.")
        if read is None:
            self.drop(key)
        else:
            self.set(key, read)

    def drop(self, prefix: str) -> None:
        """Takes out a key, or all keys of a section where the prefix ends in a dot."""
        self.settings = {
            key: setting
            for key, setting in self.settings.items()
            if key != prefix and not (prefix.endswith(".") and key.startswith(prefix))
        }

    def text(self, path: Path) -> str:
        """The file that will be `path`: the line for editors, the command, the settings by section, the tail."""
        try:
            schema = Path(os.path.relpath(SCHEMA_FILE, path.absolute().parent)).as_posix()
        except ValueError:  # on Windows, from another drive
            schema = SCHEMA_FILE.as_uri()
        lines = [f"# yaml-language-server: $schema={schema}", f"# python run_sft.py {path.as_posix()}"]
        lines += [f"# {_one_line(line)}" for line in self.head]
        lines += _section_lines(_nested(self.settings), recipe_schema(), "")
        lines += [f"# {_one_line(line)}".rstrip() for line in self.tail]
        return "\n".join(lines) + "\n"

    def recipe(self, path: Path, overrides: Sequence[str] = ()) -> Recipe:
        """What the text says, as if it were in `path`. Raises: RecipeError: it is no recipe."""
        return load_recipe(path, overrides, self.text(path))


def _nested(settings: dict[str, Setting]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}"""
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        *sections, name = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = setting
    return tree


def _section_lines(tree: dict[str, Any], schema: Schema, indent: str) -> list[str]:
    """The lines of a section, its keys in the order of the schema."""
    properties, lines = schema.get("properties", {}), []
    for key in sorted(tree, key=[*properties, *(key for key in tree if key not in properties)].index):
        if isinstance(below := tree[key], Setting):
            lines += _lines(key, below, indent)
        else:
            lines += [f"{indent}{key}:", *_section_lines(below, properties.get(key, {}), indent + "  ")]
    return lines


def _lines(key: str, setting: Setting, indent: str) -> list[str]:
    """The lines of a key; a long list has one for each entry."""
    value, comment = setting.value, f" # {_one_line(setting.comment)}" if setting.comment else ""
    line = f"{indent}{key}: {spelled(value)}"
    if len(line) > WIDTH and isinstance(value, list):
        return [f"{indent}{key}:{comment}", *(f"{indent}  - {spelled(entry)}" for entry in value)]
    return [f"{line:<{COMMENT_COLUMN - 1}}{comment}" if comment else line]


def _one_line(comment: str) -> str:
    """Names of files and keys of others are in comments, and nothing of them may end one."""
    return " ".join(plain_text(comment).split())


def spelled(value: Any) -> str:
    """A value in YAML, on one line.

    >>> spelled({"r": 16, "lr": 2e-4, "names": ["q_proj", "a: b", "2e-4", True, None]})
    '{r: 16, lr: 2e-4, names: [q_proj, "a: b", "2e-4", true, null]}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelled(key)}: {spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(spelled, value)) + "]"
    if isinstance(value, str):
        is_plain = PLAIN.fullmatch(value) and value.lower() not in NO_TEXT and not re.match(r"\.\d|\.(inf|nan)", value)
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        digits, _, exponent = f"{value:.6e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return json.dumps(value)


def without_lines(error: UserError, path: Path) -> str:
    """An error's text without the lines of a file that is not there yet."""
    return re.sub(rf"(?m)^{re.escape(str(path))}(:\d+)?: ", "", str(error))


def refuse_existing(path: Path) -> None:
    """Raises: UserError: the file is there already, or it is none of YAML."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: is no name of a recipe; give one that ends in .yaml, e.g. recipes/mine.yaml")
    if path.exists():
        raise UserError(f"{path}: is there already, and nothing is overwritten; name another file, or move it away")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are no key.path=value, and those that are."""
    return [w for w in words if not OVERRIDE.fullmatch(w)], [w for w in words if OVERRIDE.fullmatch(w)]


def write_new(path: Path, text: str) -> None:
    """Raises: UserError: the file is there by now, or cannot be written."""
    from sft.files import writing

    with writing(path):
        try:
            with open(path, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            refuse_existing(path)
