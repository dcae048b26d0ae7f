r"""Reads a recipe, one YAML file, into a checked `Recipe`; imports no torch, so a wrong recipe answers at once.

>>> import pathlib, tempfile
>>> file = pathlib.Path(tempfile.mkdtemp(), "recipe.yaml")
>>> _ = file.write_text("model_name_or_path: m\ndataset_path: a.jsonl\noutput_dir: out\n", encoding="utf-8")
>>> load_recipe(file, ["training_args.learning_rate=2e-4"]).training_args
{'learning_rate': 0.0002}
>>> load_recipe(file, ["dataset.max_lenght=5"])
Traceback (most recent call last):
    ...
sft.errors.RecipeError: override dataset.max_lenght=5: unknown key dataset.max_lenght; did you mean 'max_length'?
"""

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sft.errors import RecipeError
from sft.recipe.keys import DatasetOptions, EvaluationOptions, Recipe, Source, Sources, SourcesOrShare
from sft.recipe.layouts import is_nested, layout_schema, to_flat
from sft.recipe.methods import with_what_follows
from sft.recipe.reader import Item, Reader, child_key, plain, read_text
from sft.recipe.rules import LOAD_IN, contradictions
from sft.recipe.schema import point_to_other_sections, problems_of, recipe_schema
from sft.recipe.tools import tool_of, tool_of_command


def load_recipe(path: str | Path, overrides: Sequence[str] = (), text: str | None = None) -> Recipe:
    """The recipe in `path`, after `overrides` ("key.path=value", in the file's own layout, values as in YAML).

    Args: text: what the file will hold that is not there yet.
    Raises: RecipeError: what is wrong with it, one problem a line: first with the keys and values by themselves, all
    of them; where those are right, with how they go together.
    """
    path = Path(path)
    text = read_text(path) if text is None else text
    _refuse_other_tool(path, tool_of_command(text) if path.suffix == ".sh" else None)
    reader = Reader()
    top = reader.read(path, text)
    _refuse_other_tool(path, tool_of({key: plain(item) for key, item in top.value.items()}))
    nested = is_nested(top)
    for override in overrides:
        reader.override(top, override)

    lora = top.value.get("lora" if nested else "lora_config")
    peft_type = lora.value.get("peft_type") if lora and isinstance(lora.value, dict) else None
    schema = layout_schema(recipe_schema(peft_type and peft_type.value), nested)
    point_to_other_sections(schema)
    _raise_if_any([*reader.problems, *problems_of(top, schema)])
    _raise_if_any(to_flat(top, nested))
    recipe = _to_recipe(path, top)
    _raise_if_any(str(recipe.error(key, message)) for key, message in contradictions(recipe))
    return recipe


def _refuse_other_tool(path: Path, tool: str | None) -> None:
    if tool:
        raise RecipeError(
            f"{path}: seems to be a recipe of {tool}; to write ours from it: "
            f"python run_sft.py --from {path} recipes/{path.stem}.yaml"
        )


def _raise_if_any(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise RecipeError("\n".join(lines))


def _to_recipe(path: Path, top: Item) -> Recipe:
    """The recipe of items in the flat layout that the schema has passed."""
    places: dict[str, Item] = {}
    values = _plain_value(top, "", places)
    dataset = values["dataset"]
    for split in _splits() & dataset.keys():
        dataset[split] = _sources(dataset[split], dataset.get("format", "auto"))
    generation = values.get("evaluation", {}).get("generation", {})
    values.setdefault("evaluation", {})["generation"] = EvaluationOptions().generation | generation
    values["quantization_config"] = _quantization_config(values.get("quantization_config"))
    return _to_dataclass(Recipe, with_what_follows(values) | {"path": path, "places": places})


def _plain_value(item: Item, flat_key: str, places: dict[str, Item]) -> Any:
    """The value of an item at every depth; `places` gets the item of each key of the flat layout."""
    places[flat_key] = item
    if isinstance(item.value, dict):
        return {name: _plain_value(child, child_key(flat_key, name), places) for name, child in item.value.items()}
    if isinstance(item.value, list):
        return [_plain_value(child, f"{flat_key}[{index}]", places) for index, child in enumerate(item.value)]
    return item.value


def _to_dataclass(cls: type, values: dict[str, Any]) -> Any:
    """An instance of the class from values of JSON types, with what its annotations ask for beyond these."""
    annotations = typing.get_type_hints(cls)

    def to_annotation(value: Any, annotation: Any) -> Any:
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return _to_dataclass(annotation, value)
        if typing.get_origin(annotation) is tuple:
            return tuple(value)
        return Path(value) if annotation is Path else value

    return cls(**{name: to_annotation(value, annotations[name]) for name, value in values.items()})


def _splits() -> set[str]:
    """The keys of `dataset` that name files."""
    annotations = typing.get_type_hints(DatasetOptions)
    return {name for name, annotation in annotations.items() if annotation in (Sources, SourcesOrShare)}


def _sources(value: Any, default_format: str) -> Sources | float:
    """The entries of a split, or its share; an entry whose format is auto takes that of the section."""
    if isinstance(value, int | float):
        return float(value)
    entries = value if isinstance(value, list) else [value]
    mappings = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
    sources = [Source(**mapping) for mapping in mappings]
    return tuple(
        dataclasses.replace(source, format=default_format) if source.format == "auto" else source for source in sources
    )


def _quantization_config(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The section, or None where it is switched off, e.g. by an override."""
    if config is None or {config.get(flag) for flag in LOAD_IN} in ({False}, {False, None}):
        return None
    if "llm_int8_threshold" in config:
        return config | {"llm_int8_threshold": float(config["llm_int8_threshold"])}  # BitsAndBytesConfig refuses 6
    return config
