"""Classes -> JSON Schema: our sections from their dataclasses, the libraries' from the pinned classes.

Where a library has no annotations, types come from docstrings (GenerationConfig, from_pretrained) or from defaults
(BitsAndBytesConfig); what the classes do not say at all stands in library_keys.yaml.
"""

import dataclasses
import enum
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml

from sft.plain_text import SECRET_KEY
from sft.recipe.keys import PEFT_TYPES, Recipe, Source, Sources, SourcesOrShare
from sft.recipe.schema import Schema

LIBRARY_KEYS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("library_keys.yaml").read_text(encoding="utf-8")
)
_JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    Path: "string",
    dict: "object",
}
_JSON_TYPES_BY_NAME = {cls.__name__: name for cls, name in _JSON_TYPES.items()} | {"list": "array", "tuple": "array"}
_DEFINITIONS: dict[Any, str] = {Sources: "sources", SourcesOrShare: "sources_or_share"}


def full_schema() -> Schema:
    """The JSON Schema of a recipe in the flat layout."""
    source = our_schema(Source) | {"type": ["string", "object"], "minLength": 1}
    sources = source | {
        "type": ["string", "object", "array"],
        "items": {"$ref": "#/$defs/source"},
        "minItems": 1,
    }
    share = {"type": [*sources["type"], "number"], "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    top = our_schema(Recipe)
    del top["properties"]["dataset"]["required"]  # dataset_path may stand for dataset.train
    top["properties"]["dataset_path"] = annotation_schema(Sources) | {"description": "the same as dataset.train"}
    lora = top["properties"]["lora_config"]
    top["properties"]["lora_config"] = {"description": lora["description"], "anyOf": list(_by_peft_type())}
    definitions = {"source": source, "sources": sources, "sources_or_share": sources | share}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe", **top, "$defs": definitions}


def our_keys(cls: type) -> Iterator[tuple["dataclasses.Field[Any]", Any]]:
    """The fields of one of our dataclasses that are keys or sections of a recipe, each with its annotation."""
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata or dataclasses.is_dataclass(annotations[field.name]):
            yield field, annotations[field.name]


def our_schema(cls: type) -> Schema:
    """The section that one of our dataclasses describes."""
    properties: dict[str, Schema] = {}
    required = []
    for field, annotation in our_keys(cls):
        if dataclasses.is_dataclass(annotation):
            properties[field.name] = our_schema(typing.cast(type, annotation))
            continue
        library = field.metadata["library"]
        schema = library_schema(library, field.name) if library else annotation_schema(annotation)
        properties[field.name] = {"description": field.metadata["description"], **schema, **field.metadata["schema"]}
        if field.default is field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    return _section(properties, required)


def _by_peft_type() -> Iterator[Schema]:
    """The section lora_config for each peft_type: its class has the keys."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    for kind in PEFT_TYPES:
        section = library_schema(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], "lora_config")
        section["properties"]["peft_type"] = {"enum": [kind]}
        yield section | ({"required": ["peft_type"]} if kind != PEFT_TYPES[0] else {})


def library_schema(name: Any, section: str) -> Schema:
    """The section that goes to a library's class or function, or to the one of a name, e.g. trl.SFTConfig."""
    takes = pkgutil.resolve_name(name) if isinstance(name, str) else name
    keys, is_dataclass = LIBRARY_KEYS[section], dataclasses.is_dataclass(takes)
    if "keys" in keys:
        properties = _documented_properties(takes, keys["keys"])
    elif is_dataclass and any(p.annotation is not p.empty for p in inspect.signature(takes).parameters.values()):
        properties = _dataclass_properties(takes)
    else:
        properties = _default_properties(takes)
    additions, instead = keys["schema"] | _choices().get(section, {}), keys["instead"]
    schemas: dict[str, Schema] = {}
    for key, schema in properties.items():
        if key not in instead and not SECRET_KEY.search(key):
            addition = additions.get(key, {})
            replaces = {"type", "enum", "anyOf"} & addition.keys()
            schemas[key] = addition if replaces else schema | addition
    return _section(schemas) | {"x-instead": instead}


def _section(properties: dict[str, Schema], required: Sequence[str] = ()) -> Schema:
    section: Schema = {"type": "object", "additionalProperties": False}
    return section | ({"required": list(required)} if required else {}) | {"properties": properties}


def _dataclass_properties(cls: type) -> dict[str, Schema]:
    annotations = typing.get_type_hints(cls)
    return {
        field.name: {"enum": list(choices)}
        if (choices := field.metadata.get("choices"))
        else annotation_schema(annotations[field.name])
        for field in dataclasses.fields(cls)
    }


def _default_properties(cls: type) -> dict[str, Schema]:
    """The keys of a class whose __init__ has defaults but no annotations."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: annotation_schema(type(p.default)) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def _documented_properties(takes: Any, keys: list[str]) -> dict[str, Schema]:
    """The keys whose types stand in a docstring only, as in "max_time (`float`, *optional*):"."""
    properties: dict[str, Schema] = {}
    for key in keys:
        entry = re.search(rf"^ +{key}:? *\((.+)\):", takes.__doc__, re.MULTILINE)
        type_words = entry[1].partition("*optional*")[0].lower().replace("union[", "") if entry else ""
        while type_words != (type_words := re.sub(r"[\[(][^\[\]()]*[\])]", "", type_words)):  # of list[list[int]], list
            pass
        types = [name for word, name in _JSON_TYPES_BY_NAME.items() if re.search(rf"\b{word}\b", type_words)]
        properties[key] = {"type": types[0] if len(types) == 1 else types} if types else {}
    return properties


def annotation_schema(annotation: Any) -> Schema:
    """The JSON Schema of an annotation; None is left out, since a null means the default."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return {}
    if annotation in _JSON_TYPES:
        return {"type": _JSON_TYPES[annotation]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"enum": [member.value for member in annotation]}
    if annotation in _DEFINITIONS:
        return {"$ref": f"#/$defs/{_DEFINITIONS[annotation]}"}
    if origin in (typing.Union, UnionType):
        return _union([annotation_schema(arg) for arg in args if arg is not NoneType])
    if (origin or annotation) in (list, tuple):
        return {"type": "array"} | ({"items": annotation_schema(args[0])} if args else {})
    values = annotation_schema(args[1]) if args else {}
    return {"type": "object"} | ({"additionalProperties": values} if values else {})


def _union(schemas: list[Schema]) -> Schema:
    """One schema for several. Most keywords speak of one type only, so they can stand side by side."""
    if len(schemas) == 1:
        return schemas[0]
    enums = [schema for schema in schemas if "enum" in schema]
    if enums and {"type": "string"} in schemas and len(enums[0]["enum"]) > 1:
        return enums[0]  # `SchedulerType | str`: the text of a choice
    schemas = sorted(schemas, key=_types)  # typing.Union's own order depends on what was imported before
    types = [name for schema in schemas for name in _types(schema)]
    merged = {keyword: value for schema in schemas for keyword, value in schema.items() if keyword != "enum"}
    return merged | {"type": list(dict.fromkeys(types))}


def _types(schema: Schema) -> list[str]:
    if "enum" in schema:
        return [_JSON_TYPES[type(choice)] for choice in schema["enum"]]
    return schema["type"] if isinstance(schema["type"], list) else [schema["type"]]


def _choices() -> dict[str, dict[str, Schema]]:
    """Choices that the libraries hold elsewhere than in the classes."""
    from peft import LoraConfig
    from transformers.debug_utils import DebugOption
    from transformers.generation import configuration_utils as generation
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def one_or_list(names: list[str]) -> Schema:
        return {"anyOf": [{"enum": names}, {"type": "array", "items": {"enum": names}}]}

    own = [
        name for name, function in ALL_ATTENTION_FUNCTIONS.items() if function.__module__.startswith("transformers.")
    ]
    attention = ["eager", *(name for name in own if "|" not in name)]  # and not what sft/training/attention.py adds
    inits = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])[1]
    return {
        "training_args": {
            "debug": one_or_list([option.value for option in DebugOption]),
            "report_to": one_or_list(["none", "all", *INTEGRATION_TO_CALLBACK]),
        },
        "lora_config": {
            "init_lora_weights": {
                "anyOf": [
                    {"enum": [True, False, *(init for init in typing.get_args(inits) if "[" not in init)]},
                    {"type": "string", "pattern": "^pissa_niter_[0-9]+$"},
                ]
            }
        },
        "model_init": {
            "attn_implementation": {"anyOf": [{"enum": attention}, {"type": "string", "pattern": "/"}]}  # a hub kernel
        },
        "generation": {
            "cache_implementation": {
                "enum": [*generation.DYNAMIC_CACHE_IMPLEMENTATIONS, *generation.STATIC_CACHE_IMPLEMENTATIONS]
            }
        },
    }
