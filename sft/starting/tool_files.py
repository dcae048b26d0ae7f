"""A recipe of another tool -> its keys, each an item that knows its line: a YAML or JSON file, or a shell script.

Of a script the arguments of one command are read: variables that it sets are filled in, and sums of whole numbers that
`expr` or `$((...))` makes; nothing is run.
"""

import operator
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from sft.errors import RecipeError
from sft.recipe.reader import Item, Reader, plain, read_text, spell_line
from sft.recipe.tools import COMMANDS, tool_of, tool_of_command

SETS = re.compile(r"^\s*(?:export\s+)?(\w+)=(\S*)\s*\\?\s*$")
SUM = re.compile(r"\$\(expr\s+(\d+)\s*\\?([-+*/])\s*(\d+)\)|\$\(\((\d+)\s*([-+*/])\s*(\d+)\)\)")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
HUBS = re.compile(r"\b(USE_MODELSCOPE_HUB|USE_HF)=(\w+)")  # how a script says where names are looked up
# How a script says how many GPUs share a step.
PROCESSES = re.compile(r"\b(?:NPROC_PER_NODE=|nproc_per_node[ =]|num_processes[ =])(\d+)")


class ToolFile(NamedTuple):
    """keys: in the order of the file. processes: how many a script starts."""

    tool: str
    path: Path
    keys: dict[str, Item]
    processes: int = 1


def read_tool_file(path: Path) -> ToolFile:
    """Raises: RecipeError: it cannot be read, or no tool is recognised by what it says."""
    text = read_text(path)
    command_tool = tool_of_command(text)
    if path.suffix in (".yaml", ".yml", ".json") or command_tool is None:
        keys, processes = _yaml_keys(path), 1
    else:
        keys, processes = _command_keys(path, text, command_tool)
    tool = tool_of({key: plain(item) for key, item in keys.items()}) or command_tool
    if tool is None:
        if isinstance(getattr(keys.get("dataset"), "value", None), dict) or "dataset_path" in keys:
            raise RecipeError(f"{path}: is a recipe of ours; run it: python run_sft.py {path}")
        raise RecipeError(
            f"{path}: is of none of the tools that are read: {', '.join(sorted(COMMANDS | {'alignment-handbook': ''}))}"
        )
    return ToolFile(tool, path, keys, processes)


def _yaml_keys(path: Path) -> dict[str, Item]:
    reader = Reader()
    keys = reader.read(path, read_text(path)).value
    if reader.problems:
        raise RecipeError("\n".join(reader.problems))
    return keys


def _command_keys(path: Path, text: str, tool: str) -> tuple[dict[str, Item], int]:
    """The arguments of the script's first command of the tool, and of a file that it names."""
    lines = ["" if line.lstrip().startswith("#") else line.rstrip() for line in text.splitlines()]
    variables: dict[str, str] = {}
    for line in lines:
        if found := SETS.match(line):
            variables.setdefault(found[1], _filled_in(found[2], variables).strip("'\""))
    first = next(i for i, line in enumerate(lines) if re.search(COMMANDS[tool], line))
    keys: dict[str, Item] = {}
    values: list[Any] = []
    processes = PROCESSES.search(_filled_in("\n".join(lines), variables))
    for number, line in enumerate(lines[first:], start=first + 1):
        shown = _filled_in(line, variables)
        if number == first + 1:
            _refuse_other_commands(path, number, shown)
            found = re.search(COMMANDS[tool], shown)
            shown = shown[found.end() :] if found else shown
        for word in _words(path, number, shown.removesuffix("\\")):
            if re.match(r"--[A-Za-z]", word):
                name, equals, value = word[2:].partition("=")
                name = name.replace("-", "_")
                values = [value] if equals else []
                keys[name] = Item(values, f"{path}:{number}", name)
            elif not keys and Path(word).suffix in (".yaml", ".yml", ".json"):
                keys |= _yaml_keys(_found(path, word))
            else:
                values.append(word)
        if not line.endswith("\\"):
            break
    for item in keys.values():
        if isinstance(item.value, list) and all(isinstance(value, str) for value in item.value):
            item.value = _value(item.value, item)
    for name, value in HUBS.findall("\n".join(lines)):
        keys.setdefault(name.lower(), Item(value.lower() in ("1", "true"), f"{path}", name.lower()))
    if "config" in keys and isinstance(keys["config"].value, str):
        keys = _yaml_keys(_found(path, keys.pop("config").value)) | keys
    return keys, int(processes[1]) if processes else 1


def _refuse_other_commands(path: Path, number: int, line: str) -> None:
    """Of the tools' commands only those that fine-tune on given answers are read."""
    other = r"\b(?:trl|axolotl|megatron|swift)\s+(?!sft\b|train\b)([a-z]+)|\bmegatron\s+(sft)|cli/(?!sft)(\w+)\.py"
    if found := re.search(other, line):
        raise RecipeError(f"{path}:{number}: found `{found[0]}`; only supervised fine-tuning is read")


def _found(script: Path, name: str) -> Path:
    """A file that a script names, relative to the working directory or to a folder above the script."""
    folders = [Path(), *script.resolve().parents]
    return next((folder / name for folder in folders if (folder / name).is_file()), Path(name))


def _filled_in(line: str, variables: dict[str, str]) -> str:
    """The line with its variables, and then its sums.

    >>> _filled_in("--steps $(expr 16 / $n) --dir ${out}/x", {"n": "2", "out": "o"})
    '--steps 8 --dir o/x'
    """
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), line)
    return SUM.sub(lambda f: str(OPERATIONS[f[2] or f[5]](int(f[1] or f[4]), int(f[3] or f[6]) or 1)), line)


def _words(path: Path, number: int, line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise RecipeError(f"{path}:{number}: cannot be read as a command: {error}; close the quotes") from None


def _value(words: list[str], item: Item) -> Any:
    """What the words after a `--key` say: true where there are none, a list where there are several."""
    if shell := next((word for word in words if re.search(r"\$[({\w]|`", word)), None):
        raise RecipeError(f"{item.label}: found {spell_line(shell)}, which only a shell knows; write the value")
    read = [_scalar(word, item) for word in words]
    if len(read) > 1:
        return [Item(value, item.where, f"{item.key}[{i}]") for i, value in enumerate(read)]
    return read[0] if read else True


def _scalar(word: str, item: Item) -> Any:
    """A number, a truth value, a JSON object or list (of items), or else the text as it is."""
    if word[:1] in ("{", "["):
        return Reader().parse(word, item.key, lambda line: item.where).value
    if word == "" or word[0] in "#&*!|>'\"%@`-:,?" and not re.match(r"-\d", word):
        return word
    try:
        value = Reader().parse(word, item.key, lambda line: item.where).value
    except RecipeError:
        return word
    return None if word in ("null", "None") else value if isinstance(value, bool | int | float) else word
