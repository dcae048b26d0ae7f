"""Writes the two files that repeat what the dataclasses of keys.py and the pinned libraries say:

    python -m sft.recipe.generate

schema.json, by which recipes are checked, and the list of keys in docs/recipe.md, between its marks. Run it after a
change of a key, and when a pin moves (then read what changed); a test holds both files to what it would write.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from sft.recipe.class_schema import annotation_schema, full_schema, our_keys
from sft.recipe.keys import Recipe, Source, Sources
from sft.recipe.schema import ROOT, SCHEMA_FILE

KEYS_PAGE = ROOT / "docs" / "recipe.md"
BEGIN, END = "<!-- keys:begin -->\n", "<!-- keys:end -->\n"
COMMENT_COLUMN = 36


def schema_text() -> str:
    return pretty(full_schema()) + "\n"


def pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each key, and for each mapping of a list, unless the whole fits on one."""
    line = json.dumps(value)
    if len(indent) + len(line) <= 110 or not (isinstance(value, dict) or isinstance(value[0], dict)):
        return line
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"{indent}  {pretty(child, indent + '  ')}" for child in value) + f"\n{indent}]"
    rows = [f"{indent}  {json.dumps(name)}: {pretty(child, indent + '  ')}" for name, child in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def page_text(text: str) -> str:
    """The page's `text` with the list of keys as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"docs/recipe.md: there is no {BEGIN.strip()} with {END.strip()} after it")
    return f"{before}{BEGIN}```yaml\n{keys_yaml()}```\n{END}{after}"


def keys_yaml() -> str:
    """A recipe that says every key of ours: its default, or an example where it is required, and a comment."""
    return "".join(
        f"{line:<{COMMENT_COLUMN - 1}} # {comment}\n" if comment else f"{line}\n" for line, comment in _lines(Recipe)
    )


def _lines(cls: type, indent: str = "") -> Iterator[tuple[str, str]]:
    """(YAML, comment) of each key of a class; the keys of its sections stand below these."""
    for field, annotation in our_keys(cls):
        if dataclasses.is_dataclass(annotation):
            yield f"{indent}{field.name}:", ""
            yield from _lines(typing.cast(type, annotation), indent + "  ")
        else:
            yield indent + _key_and_value(field), _comment(field, annotation)
        if annotation == Sources:  # the keys that an entry may have, as a comment
            for number, (line, comment) in enumerate(_lines(Source)):
                yield f"{indent}# {'  ' if number else '- '}{line}", comment


def _key_and_value(field: "dataclasses.Field[Any]") -> str:
    """The key as a recipe would set it, e.g. "metrics: [bleu, chrf, rouge]"."""
    if examples := field.metadata["schema"].get("examples"):
        value = examples[0]
    else:
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = list(value) if isinstance(value, tuple) else value
    flow_list = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1000)
    return f"{field.name}: {flow_list.strip()[1:-1]}"  # "[[bleu, chrf]]" -> "[bleu, chrf]", "[null]" -> "null"


def _comment(field: "dataclasses.Field[Any]", annotation: Any) -> str:
    """The description, after the choices if there are any, e.g. "error | skip: rows that ..."."""
    choices = [c if isinstance(c, str) else json.dumps(c) for c in annotation_schema(annotation).get("enum", [])]
    return ": ".join(text for text in (" | ".join(choices), field.metadata["description"]) if text)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8", newline="\n")
    KEYS_PAGE.write_text(page_text(KEYS_PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
