"""schema.json says what the pinned libraries take."""

import dataclasses
import json

import pytest

import sft.recipe.recipe
from sft.recipe import schema as recipe_schema
from sft.recipe.schema import FILE, INSTEAD, MORE

SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
SECTIONS = SCHEMA["properties"] | {
    "generation": SCHEMA["properties"]["evaluation"]["properties"]["generation"],
    "recipe": SCHEMA,
}


def test_the_file_is_what_the_pinned_classes_give() -> None:
    assert recipe_schema.pretty(recipe_schema.recipe_schema()) + "\n" == FILE.read_text(encoding="utf-8"), (
        "run `python -m sft.recipe.schema`"
    )


def test_every_sft_config_field_is_a_key_or_answered() -> None:
    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    keys = set(SECTIONS["training_args"]["properties"])
    assert fields - keys - set(INSTEAD["training_args"]) == {"hub_token"}
    assert keys <= fields


def test_keys_said_to_be_gone_are_gone() -> None:
    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    gone = {key for key, words in INSTEAD["training_args"].items() if words.startswith(("is now", "is gone"))}
    assert {"warmup_ratio", "group_by_length", "no_cuda", "evaluation_strategy"} <= gone
    assert gone & fields == set()


def test_what_replaces_a_gone_key_is_a_key() -> None:
    keys = SECTIONS["training_args"]["properties"]
    for words in INSTEAD["training_args"].values():
        if words.startswith("is now ") and "a key of" not in words:
            assert words.removeprefix("is now ").split(",")[0].split(":")[0] in keys


@pytest.mark.parametrize("section", sorted(MORE))
def test_every_range_and_choice_is_of_a_key_that_exists(section: str) -> None:
    assert set(MORE[section]) <= set(SECTIONS[section]["properties"])


def test_every_section_has_typed_keys_only() -> None:
    untyped = [
        (name, key)
        for name, section in SECTIONS.items()
        for key, schema in section.get("properties", {}).items()
        if not {"type", "enum", "anyOf", "$ref"} & schema.keys()
    ]
    assert untyped == []


def test_types_are_read_from_annotations_and_docstrings() -> None:
    assert SECTIONS["training_args"]["properties"]["learning_rate"] == {"type": "number", "minimum": 0}
    assert SECTIONS["training_args"]["properties"]["eval_strategy"] == {"enum": ["no", "steps", "epoch"]}
    assert SECTIONS["lora_config"]["properties"]["target_modules"] == {
        "type": ["array", "string"],
        "items": {"type": "string"},
        "minItems": 1,
        "minLength": 1,
    }
    assert SECTIONS["generation"]["properties"]["stop_strings"] == {"type": ["string", "array"]}
    assert SECTIONS["model_init"]["properties"]["device_map"] == {"type": ["integer", "string", "object"]}


def test_formats_and_metrics_are_those_in_their_folders(tmp_path, monkeypatch) -> None:
    for name in ("formats/mine.py", "formats/__init__.py", "metrics/ours/ours.py", "metrics/ours/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sft.recipe.recipe, "ROOT", tmp_path)
    properties = sft.recipe.recipe.recipe_schema()["properties"]
    assert properties["dataset"]["properties"]["format"]["enum"] == ["auto", "mine"]
    assert properties["dataset"]["properties"]["test"]["items"]["properties"]["format"]["enum"] == ["auto", "mine"]
    assert properties["evaluation"]["properties"]["metrics"]["items"]["enum"] == ["ours"]
