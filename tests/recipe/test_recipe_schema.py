"""schema.json and docs/recipe.md say what the dataclasses and the pinned libraries take."""

import dataclasses
import json
from typing import Literal

import pytest

import sft.recipe.generate
import sft.recipe.schema
from sft.recipe import Recipe, load_recipe
from sft.recipe.class_schema import LIBRARY_KEYS, our_schema
from sft.recipe.generate import BEGIN, END, KEYS_PAGE, keys_yaml, page_text, schema_text
from sft.recipe.keys import Source, option
from sft.recipe.schema import SCHEMA_FILE

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
INSTEAD = {section: keys["instead"] for section, keys in LIBRARY_KEYS.items()}
SECTIONS = SCHEMA["properties"] | {
    "generation": SCHEMA["properties"]["evaluation"]["properties"]["generation"],
    "lora_config": SCHEMA["properties"]["lora_config"]["anyOf"][0],  # of LoRA, the first peft_type
    "recipe": SCHEMA,
}


def test_the_file_is_what_the_pinned_classes_give() -> None:
    assert schema_text() == SCHEMA_FILE.read_text(encoding="utf-8"), "run `python -m sft.recipe.generate`"


def test_the_page_lists_the_keys_of_the_dataclasses() -> None:
    text = KEYS_PAGE.read_text(encoding="utf-8")
    assert page_text(text) == text, "run `python -m sft.recipe.generate`"
    assert max(map(len, keys_yaml().splitlines())) <= 120


def test_the_list_of_keys_is_a_recipe_of_defaults(tmp_path) -> None:
    (tmp_path / "all.yaml").write_text(keys_yaml(), encoding="utf-8")
    (tmp_path / "least.yaml").write_text(
        "model_name_or_path: Qwen/Qwen2.5-7B-Instruct\n"
        "output_dir: output/qwen_qlora\n"
        "dataset_path: data/novel/train.jsonl\n",
        encoding="utf-8",
    )
    assert load_recipe(tmp_path / "all.yaml") == load_recipe(tmp_path / "least.yaml")


def test_a_key_is_added_in_its_dataclass_only(monkeypatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        volume: int = option(description="decibels", minimum=1, examples=[60])
        loud: Literal["yes", "no"] | None = option(None, "how it speaks; null: as it likes")

    assert our_schema(Options) == {
        "type": "object",
        "additionalProperties": False,
        "required": ["volume"],
        "properties": {
            "volume": {"description": "decibels", "type": "integer", "minimum": 1, "examples": [60]},
            "loud": {"description": "how it speaks; null: as it likes", "enum": ["yes", "no"]},
        },
    }
    monkeypatch.setattr(sft.recipe.generate, "Recipe", Options)
    assert page_text(f"before\n{BEGIN}old\n{END}after\n") == (
        "before\n"
        "<!-- keys:begin -->\n"
        "```yaml\n"
        "volume: 60                          # decibels\n"
        "loud: null                          # yes | no: how it speaks; null: as it likes\n"
        "```\n"
        "<!-- keys:end -->\n"
        "after\n"
    )


def test_a_readme_without_its_marks_is_not_rewritten() -> None:
    with pytest.raises(ValueError, match="there is no <!-- keys:begin --> with <!-- keys:end --> after it"):
        page_text(f"{END}{BEGIN}")


def test_every_key_of_ours_says_what_it_is() -> None:
    ours = [our_schema(cls) for cls in (Recipe, Source)]
    ours += [SECTIONS[name] for name in ("dataset", "chat", "evaluation", "export")]
    described = [(key, schema) for section in ours for key, schema in section["properties"].items()]
    sections = {"dataset", "chat", "evaluation", "export"}  # their keys are described one by one
    assert {key for key, schema in described if not schema.get("description")} == sections


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


@pytest.mark.parametrize("section", sorted(LIBRARY_KEYS))
def test_every_range_and_choice_is_of_a_key_that_exists(section: str) -> None:
    assert set(LIBRARY_KEYS[section]["schema"]) <= set(SECTIONS[section]["properties"])


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
    monkeypatch.setattr(sft.recipe.schema, "ROOT", tmp_path)
    properties = sft.recipe.schema.recipe_schema()["properties"]
    assert properties["dataset"]["properties"]["format"]["enum"] == ["auto", "mine"]
    assert properties["dataset"]["properties"]["test"]["items"]["properties"]["format"]["enum"] == ["auto", "mine"]
    assert properties["evaluation"]["properties"]["metrics"]["items"]["enum"] == ["ours"]
