"""The keys of another tool -> settings of ours, by the table of the tool in tools/NAME.yaml.

A table has
  tool, read     the tool's name, and the release and commit that it was made from
  run            the command of the tool
  extends        another tool, of which it has all that it does not say itself
  passes         true: a key of transformers.TrainingArguments is the same in training_args
  defaults       what the tool takes where a recipe leaves a key out, under its own names, where ours differs;
                 {product: 2, of: KEY}, {quotient: 16, by: KEY}, {same: KEY, else: x},
                 {when: KEY, is: x, then: y, else: z}
  always         settings of ours that the tool has no key for
  keys           what each key is here:
    KEY: our.key                        the same value
    KEY: {to: our.key, values: {...}}   the value by this table (null: nothing is set); with `open: true` another one
                                        stays as it is, else it is an error
    KEY: {values: {x: {our.key: ...}}}  a value that sets several keys
    KEY: {to: our.key, split: ","}      text that is a list here; `one: true`: the first of a list
    KEY: {to: our.key, and: {...}}      sets others besides
    KEY: {absent: why, unless: [...]}       no counterpart, unless it has one of these values
    KEY: {refuse: why}                  an error
    KEY: {read: our.key}                read by migrate.py or data_sets.py
                 `absent` and `refuse` let a key pass that is off or empty (false, null, 0, "", none)
  data_types     of Axolotl: the `type` of a data set -> its format here
  labels         what carries loss there; see tool_labels.py
  differs        what comes out otherwise here, whatever the keys say
Some targets are for this file alone, and end up as others: method (lora or full), share (of validation rows),
per_epoch.eval and per_epoch.save (how often).
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sft.errors import RecipeError
from sft.recipe.reader import Item, plain, spell
from sft.recipe.schema import Schema, problems_of, recipe_schema
from sft.starting.draft import Draft
from sft.starting.tool_files import ToolFile

TOOLS = Path(__file__).with_name("tools")
OF_CODE = ("method", "share", "per_epoch.eval", "per_epoch.save")
OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", [], {})
SHARE_OF_A_COUNT = 0.02  # where the tool holds out a number of rows, and ours takes a share


@cache
def tables() -> dict[str, dict[str, Any]]:
    """The table of each tool by the tool's name."""
    read = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TOOLS.glob("*.yaml"))]
    by_name = {table["tool"]: table for table in read}
    for name, table in by_name.items():
        if "extends" in table:
            base = by_name[table["extends"]]
            by_name[name] = base | table | {"keys": base["keys"] | table["keys"]}
    return by_name


def translate(source: ToolFile, draft: Draft, given: set[str]) -> list[str]:
    """Puts into the draft what the tool's keys say. given: keys and sections of ours that the command line says.

    Returns: for each key without a counterpart its place, name and why.
    Raises: RecipeError: keys or values that ask for what is not done here, each with its place.
    """
    table, unmatched = tables()[source.tool], list[str]()
    problems: list[str] = []
    written = {key: item for key, item in source.keys.items() if item.value is not None}
    values = {key: plain(item) for key, item in written.items()}
    for key, value in table.get("always", {}).items():
        draft.set(key, value, f"as in {source.tool}")
    for key, value in table.get("defaults", {}).items():
        values[key] = default = values[key] if key in values else _default(value, values)
        written.setdefault(key, _item(default, f"{source.tool}'s default", key))
    in_order = {key: written[key] for key in [*table.get("defaults", {}), *written]}
    in_order |= {key: in_order.pop(key) for key in source.keys if key in in_order}  # what is written wins
    for key, item in in_order.items():
        comment = "" if key in source.keys and source.keys[key] is item else f"{source.tool}'s default"
        for target, value in _settings(item, table["keys"].get(key) or _passed(key, table), problems):
            if target is None:
                unmatched.append(f"{item.where}: {key}: {value}")
            elif target in OF_CODE:
                draft.set(target, value, comment)
            elif not {target, target.partition(".")[0]} & given:
                problems += problems_of(_item(value, item.where, key), _schema_of(target))
                draft.set(target, value, comment)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    _settle(draft)
    return [*unmatched, *_upload(written, has_switch="push_to_hub" in table["keys"], draft=draft)]


def _upload(written: dict[str, Item], has_switch: bool, draft: Draft) -> Iterator[str]:
    """Sets the upload at the end where there is one that names a user. has_switch: a name alone uploads nothing there.

    Yields: that an upload names none.
    """
    name, private = written.get("hub_model_id"), written.get("hub_private_repo")
    switch = written.get("push_to_hub") if has_switch else name
    if switch is None or switch.value in OFF:
        return
    if name is None or "/" not in str(name.value):
        yield f"{switch.where}: {switch.key}: set export.push_to_hub to user/name"
        return
    draft.set("export.push_to_hub", name.value, "uploaded there at the end, as by the other recipe")
    if private is not None:
        draft.set("export.private", private.value)


def _default(value: Any, values: dict[str, Any]) -> Any:
    """A default that depends on another key, or is as it is."""
    if not isinstance(value, dict):
        return value
    if "product" in value:
        return value["product"] * values[value["of"]]
    if "quotient" in value:
        return max(1, math.ceil(value["quotient"] / values[value["by"]]))
    if "same" in value:
        return values.get(value["same"], value["else"])
    return value["then"] if values.get(value["when"]) == value["is"] else value["else"]


def _item(value: Any, where: str, key: str) -> Item:
    """A value as an item, at every depth."""
    if isinstance(value, dict):
        return Item({name: _item(child, where, f"{key}.{name}") for name, child in value.items()}, where, key)
    if isinstance(value, list):
        return Item([_item(child, where, f"{key}[{i}]") for i, child in enumerate(value)], where, key)
    return Item(value, where, key)


def _settings(item: Item, rule: Any, problems: list[str]) -> Iterator[tuple[str | None, Any]]:
    """What an item sets by its rule: (key of ours, value); (None, why) where it has no counterpart."""
    value, rule = plain(item), {"to": rule} if isinstance(rule, str) else rule
    if rule is None:
        yield None, "is not known here"
    elif "read" in rule:
        return
    elif "values" in rule and not isinstance(value, list | dict) and value in rule["values"]:
        sets = rule["values"][value]
        yield from sets.items() if isinstance(sets, dict) else [] if sets is None else [(rule["to"], sets)]
    elif "values" in rule and not rule.get("open"):
        known = ", ".join(str(spell(choice)).strip("'") for choice in list(rule["values"])[:8])
        why = f"; {rule['refuse']}" if "refuse" in rule else ""
        problems.append(f"{item.label}: found {spell(value)}, and what can be taken over is {known}{why}")
    elif "to" in rule:
        yield rule["to"], _as_asked(value, rule)
        yield from rule.get("and", {}).items()
    elif value in OFF or value in rule.get("unless", ()):
        return
    elif "refuse" in rule:
        problems.append(f"{item.label}: {rule['refuse']}")
    else:
        yield None, rule["absent"]


def _as_asked(value: Any, rule: dict[str, Any]) -> Any:
    if rule.get("one") and isinstance(value, list) and len(value) == 1:
        return value[0]
    if "split" not in rule:
        return value
    words = [word.strip() for word in value.split(rule["split"])] if isinstance(value, str) else value
    return "all-linear" if words in (["all"], ["all-linear"]) else words


def _passed(key: str, table: dict[str, Any]) -> Any:
    """The rule for a key that the table does not have: by training_args, where the tool takes TrainingArguments."""
    section = recipe_schema()["properties"]["training_args"]
    if table.get("passes") and key in section["properties"]:
        return f"training_args.{key}"
    if table.get("passes") and key in section["x-instead"]:
        return {"absent": section["x-instead"][key]}
    return None


@cache
def _schema_of(key: str) -> Schema:
    schema = recipe_schema()
    for name in key.split("."):
        schema = schema["properties"][name]
    return schema


# ------------------------------------------------------------------------------------- what several keys say together


def _settle(draft: Draft) -> None:
    """Brings the targets of this file to their ends, and takes out what another key makes void."""
    bits = next((b for b in (4, 8) if draft.value(f"quantization_config.load_in_{b}bit")), None)
    for other in {4, 8} - {bits}:
        draft.drop(f"quantization_config.load_in_{other}bit")
    if bits != 4:
        for key in [key for key in draft.settings if key.startswith("quantization_config.bnb_4bit")]:
            draft.drop(key)
    if draft.value("method") == "full" or draft.value("adapter_name_or_path"):  # an adapter brings its own settings
        draft.drop("lora_config.")
    draft.drop("method")
    if (draft.value("training_args.max_steps") or -1) < 0:
        draft.drop("training_args.max_steps")
    if (warmup := draft.value("training_args.warmup_steps")) is not None:
        draft.drop("training_args.warmup_steps")
        if warmup:
            draft.set("training_args.warmup_steps", warmup, "a share of all steps" if warmup < 1 else "")
    _settle_per_epoch(draft)
    share = draft.value("share")
    draft.drop("share")
    if share and draft.value("training_args.eval_strategy") != "no":
        is_share, number = share < 1, f"{share:,}"
        comment = "" if is_share else f"a share of the rows here, and {number} rows there"
        draft.set("dataset.validation", float(share) if is_share else SHARE_OF_A_COUNT, comment)


def _settle_per_epoch(draft: Draft) -> None:
    """So many times an epoch -> a share of all steps, which transformers takes in place of a number of steps."""
    epochs = float(draft.value("training_args.num_train_epochs") or 1)
    for what in ("eval", "save"):
        times = draft.value(f"per_epoch.{what}")
        draft.drop(f"per_epoch.{what}")
        if times == 1:
            draft.set(f"training_args.{what}_strategy", "epoch")
        elif times:
            draft.set(f"training_args.{what}_strategy", "steps")
            share = float(f"{1 / (times * epochs):.4g}")
            draft.set(f"training_args.{what}_steps", share, f"a share of all steps: {times} times an epoch")


def settle_validation(draft: Draft) -> None:
    """Without a validation split nothing is asked of it; with early stopping a run here saves when it validates."""
    eval_strategy = draft.value("training_args.eval_strategy")
    if "dataset.validation" not in draft.settings:
        for key in [k for k in draft.settings if k.startswith("training_args.eval_")]:
            draft.drop(key)
        draft.drop("training_args.load_best_model_at_end")
        draft.drop("early_stopping.")
        if draft.value("training_args.save_strategy") == "best":
            draft.drop("training_args.save_strategy")
    elif draft.value("early_stopping.early_stopping_patience") and eval_strategy:
        if draft.value("training_args.save_strategy") != eval_strategy:
            draft.drop("training_args.save_strategy")
            draft.drop("training_args.save_steps")
