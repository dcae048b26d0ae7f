"""The table of a recipe's keys, schema.json, and what it finds wrong with the items of a recipe.

schema.json is JSON Schema (draft 2020-12) with one keyword more: `x-instead` names keys that a section does not take,
and what to write instead. `python -m sft.recipe.generate` writes it from the dataclasses and the pinned libraries;
these take 4 s to import, so that reading a recipe reads the file.
"""

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sft.plain_text import SECRET_KEY, SECRET_VALUE
from sft.recipe.reader import ROOT, Item, child_key, did_you_mean, space_hint, spell

Schema = dict[str, Any]

SCHEMA_FILE = Path(__file__).with_name("schema.json")
MAX_NAMES = 8  # a longer list of keys or choices is not read
NO_SECRETS = "a secret has no place in a recipe; set HF_TOKEN or WANDB_API_KEY, or run `hf auth login`"

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_TYPE_WORDS = {
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


def recipe_schema(peft_type: Any = None) -> Schema:
    """schema.json, with the formats and metrics that exist now as choices.

    Args: peft_type: whose keys lora_config has; of one that there is not, and by default, LoRA's.
    """
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    tuners = {s["properties"]["peft_type"]["enum"][0]: s for s in schema["properties"]["lora_config"]["anyOf"]}
    lora_config = tuners.get(peft_type, tuners["LORA"]) if isinstance(peft_type, str) else tuners["LORA"]
    lora_config["properties"]["peft_type"]["enum"] = list(tuners)
    schema["properties"]["lora_config"] = lora_config
    dataset, evaluation = (schema["properties"][name]["properties"] for name in ("dataset", "evaluation"))
    formats = ["auto", *sorted(file.stem for file in ROOT.glob("formats/[!_]*.py"))]
    for section in (dataset, *(source["properties"] for source in schema["$defs"].values())):
        section["format"]["enum"] = formats
    evaluation["metrics"]["items"]["enum"] = sorted(
        file.stem for file in ROOT.glob("metrics/*/*.py") if file.stem == file.parent.name
    )
    return _resolved(schema, schema["$defs"])


def _resolved(schema: Any, definitions: dict[str, Schema]) -> Any:
    """The schema with each {"$ref": "#/$defs/NAME", ...} replaced by what it names."""
    if isinstance(schema, list):
        return [_resolved(child, definitions) for child in schema]
    if not isinstance(schema, dict):
        return schema
    children = {keyword: _resolved(child, definitions) for keyword, child in schema.items() if keyword != "$defs"}
    name = str(children.pop("$ref", "")).rpartition("/")[2]
    return _resolved(definitions[name], definitions) | children if name else children


def point_to_other_sections(schema: Schema) -> None:
    """Gives each section a word on the keys that belong in another one."""
    sections = {name: section for name, section in schema["properties"].items() if section.get("type") == "object"}
    sections["evaluation.generation"] = sections["evaluation"]["properties"]["generation"]
    for section in [schema, *sections.values()]:
        for other_name, other in sections.items():
            for key in other["properties"].keys() - section["properties"].keys():
                section.setdefault("x-instead", {}).setdefault(key, f"belongs in {other_name}")


def problems_of(item: Item, schema: Schema) -> Iterator[str]:
    """What is wrong with an item, by the few keywords of JSON Schema that schema.json uses."""
    value = item.value
    json_type = _JSON_TYPES.get(type(value), "null")
    choices = schema.get("enum")
    if isinstance(value, str) and SECRET_VALUE.search(value):
        what = "is an address with a password" if "://" in value else "this looks like an access token"
        yield f"{item.label}: {what}; {NO_SECRETS}"
    elif "anyOf" in schema:
        problems_by_choice = [[*problems_of(item, choice)] for choice in schema["anyOf"]]
        yield from () if [] in problems_by_choice else problems_by_choice[0]
    elif (types := _types(schema)) and json_type not in types and not (json_type == "integer" and "number" in types):
        hint = space_hint(value) if "object" in types else ""
        hint = f"write [{value}]" if isinstance(value, str) and types == ["array"] else hint
        hint = hint or f"give {' or '.join(_TYPE_WORDS[n] for n in types)}"
        yield f"{item.label}: found {spell(value)}; {hint}"
    elif choices and not any(type(value) is type(choice) and value == choice for choice in choices):
        yield f"{item.label}: found {spell(value)}; {did_you_mean(value, choices) or _some('choose from', choices)}"
    elif json_type == "object":
        yield from _mapping_problems(item, schema)
    elif json_type == "array":
        yield from _list_problems(item, schema)
    elif json_type == "string":
        if len(value) < schema.get("minLength", 0) or not re.search(schema.get("pattern", ""), value):
            yield f"{item.label}: found {spell(value)}; give {schema.get('description', 'another')}"
    elif json_type in ("integer", "number"):
        limits = {keyword: schema[keyword] for keyword in _RANGES if keyword in schema}
        if not all(_RANGES[keyword][1](value, limit) for keyword, limit in limits.items()):
            range_words = " and ".join(f"{_RANGES[keyword][0]} {limit}" for keyword, limit in limits.items())
            yield f"{item.label}: found {spell(value)}; give a number {range_words}"


def _types(schema: Schema) -> list[str]:
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else types


def _list_problems(item: Item, schema: Schema) -> Iterator[str]:
    if len(item.value) < schema.get("minItems", 0):
        yield f"{item.label}: is an empty list; give at least one"
    if schema.get("uniqueItems") and len({repr(child.value) for child in item.value}) < len(item.value):
        yield f"{item.label}: names one twice; keep one"
    for child in item.value:
        yield from problems_of(child, schema.get("items", {}))


def _mapping_problems(item: Item, schema: Schema) -> Iterator[str]:
    properties = schema.get("properties")  # None: a mapping whose keys are free
    instead = schema.get("x-instead", {})
    for name, child in list(item.value.items()):
        if properties is not None and name in properties:
            if child.value is None:
                del item.value[name]  # a null means the default
            else:
                yield from problems_of(child, properties[name])
        elif name in instead:
            yield f"{child.label}: {instead[name]}"
        elif SECRET_KEY.search(str(name)):
            yield f"{child.label}: {NO_SECRETS}"
        elif properties is not None:
            yield f"{child.where}: unknown key {child.key}; {_key_hint(name, properties)}"
        else:
            yield from problems_of(child, schema.get("additionalProperties", {}))
    for name in schema.get("required", []):
        if name not in item.value:
            label = item.label_of(child_key(item.key, name))
            yield f"{label}: is missing; give {schema['properties'][name]['description']}"


def _key_hint(name: str | int, properties: dict[str, Schema]) -> str:
    """What may be meant by an unknown key."""
    section, dot, key = str(name).partition(".")
    if dot and section in properties:
        return f"nest it: `{key}` below `{section}:`"
    return did_you_mean(name, properties) or _some("the keys here are", properties)


def _some(words: str, names: Iterable[Any]) -> str:
    """The first names after the words, e.g. "choose from error, drop, trim"."""
    texts = [name if isinstance(name, str) else spell(name) for name in names]
    return f"{words} {', '.join(texts[:MAX_NAMES])}{', ...' if len(texts) > MAX_NAMES else ''}"
