"""The two layouts of a recipe, and the way from each to the flat one.

The flat layout is that of `Recipe`, with a section for each library class. The nested one (a top-level mapping
`model`) has model, dataset, training and lora: `NESTED` says what its keys mean; the rest stands as in the flat one.
"""

from collections.abc import Iterator
from typing import Any

from sft.recipe.reader import Item
from sft.recipe.schema import Schema

# Keys of the nested layout -> those of the flat one, moved in this order.
NESTED = {
    "model.base_model_path": "model_name_or_path",
    "model.output_dir": "output_dir",
    "dataset.train_path": "dataset.train",
    "dataset.val_path": "dataset.validation",
    "training.num_epochs": "training.num_train_epochs",
    "training": "training_args",
    "lora": "lora_config",
}
# model.use_8bit and model.use_4bit -> quantization_config.
NESTED_FLAGS: dict[str, dict[str, Any]] = {
    "use_8bit": {"load_in_8bit": True},
    "use_4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}
# What only one layout says, and how the other one says it.
NESTED_ONLY = {"model": "model_name_or_path", "training": "training_args", "lora": "lora_config"}
FLAT_ONLY = {
    "model_name_or_path": "model.base_model_path",
    "output_dir": "model.output_dir",
    "dataset_path": "dataset.train_path",
    "quantization_config": "model.use_4bit or model.use_8bit",
    "lora_config": "lora",
    "training_args": "training",
}
# Other names of flat keys. transformers deprecates those of checkpointing, but the recipes in the world say them: they
# stay, without a warning, and a run resumes under either.
ALIASES = {
    "dataset_path": "dataset.train",
    "training_args.gradient_checkpointing": "training_args.activation_checkpointing",
    "training_args.gradient_checkpointing_kwargs": "training_args.activation_checkpointing_kwargs",
}


def is_nested(top: Item) -> bool:
    return "model" in top.value and isinstance(top.value["model"].value, dict)


def layout_schema(flat: Schema, nested: bool) -> Schema:
    """The schema of a layout, made from that of the flat one as schema.json has it."""
    if nested:
        return _nested_schema(flat)
    instead = {name: f"is a section of the nested layout; write {key}" for name, key in NESTED_ONLY.items()}
    return flat | {"x-instead": instead}


def _nested_schema(flat: Schema) -> Schema:
    properties, boolean = flat["properties"], {"type": "boolean"}

    def extended(section: Schema, **more: Schema) -> Schema:
        return section | {"properties": section["properties"] | more}

    model = {"base_model_path": properties["model_name_or_path"], "output_dir": properties["output_dir"]}
    dataset, training, lora = (properties[name] for name in ("dataset", "training_args", "lora_config"))
    splits = {"train_path": dataset["properties"]["train"], "val_path": dataset["properties"]["validation"]}
    return {
        "type": "object",
        "properties": {name: schema for name, schema in properties.items() if name not in FLAT_ONLY}
        | {
            "model": {
                "type": "object",
                "properties": model | dict.fromkeys(NESTED_FLAGS, boolean),
                "required": list(model),
            },
            "dataset": extended(dataset, **splits),
            "training": extended(training, num_epochs=training["properties"]["num_train_epochs"]),
            "lora": extended(lora, use_lora=boolean),
        },
        "x-instead": {name: f"a file with a section `model` says {key} instead" for name, key in FLAT_ONLY.items()},
    }


def to_flat(top: Item, nested: bool) -> Iterator[str]:
    """Moves the items of the nested layout, and of other spellings, to their places in the flat one; yields problems.

    The items keep the key that they were written with, so that a later error spells it as the file does.
    """
    if nested:
        _expand_flags(top)
    for key, flat_key in [*(NESTED if nested else {}).items(), *ALIASES.items()]:
        yield from _move(top, key, flat_key)
    top.value.pop("model", None)
    dataset = top.value.setdefault("dataset", Item({}, top.where, "dataset"))
    if "train" not in dataset.value:
        key = "dataset.train_path" if nested else "dataset.train"
        yield f"{dataset.label_of(key)}: is missing; give a file, a glob or a hub id"


def _expand_flags(top: Item) -> None:
    """Turns model.use_4bit, model.use_8bit and lora.use_lora into what they stand for."""
    model, lora = top.value["model"].value, top.value.get("lora")
    for flag, settings in NESTED_FLAGS.items():
        item = model.pop(flag, None)
        if item and item.value:
            quantization = top.value.setdefault("quantization_config", Item({}, item.where, item.key))
            quantization.value |= {name: Item(value, item.where, item.key) for name, value in settings.items()}
    if lora and (use_lora := lora.value.pop("use_lora", None)) and not use_lora.value:
        del top.value["lora"]


def _move(top: Item, key: str, flat_key: str) -> Iterator[str]:
    """Moves the item of a key to another one; an override wins over what the file says there, and two equals clash."""
    section, name = _section_of(top, key)
    item = section.pop(name, None)
    if item is None:
        return
    flat_section, flat_name = _section_of(top, flat_key)
    present = flat_section.get(flat_name)
    if present is None or (item.is_overridden and not present.is_overridden):
        flat_section[flat_name] = item
    elif item.is_overridden == present.is_overridden:
        yield f"{item.label}: says the same as {present.key} ({present.where}); keep one"


def _section_of(top: Item, key: str) -> tuple[dict[str, Item], str]:
    """The section that holds a key, made if there is none, and the key's name in it."""
    section, dot, name = key.rpartition(".")
    if not dot:
        return top.value, name
    return top.value.setdefault(section, Item({}, top.where, section)).value, name
