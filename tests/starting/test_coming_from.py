"""docs/coming_from.md has the tables that `--from` reads. After a change: python -m tests.starting.test_coming_from"""

import json
from pathlib import Path

from sft.recipe.schema import recipe_schema
from sft.starting.tool_keys import OF_CODE, tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming_from.md"
BEGIN, END = "<!-- tables:begin -->\n", "<!-- tables:end -->\n"
NAMES = ("LLaMA-Factory", "Axolotl", "ms-swift", "trl", "alignment-handbook")
IN_WORDS = {
    "method": "with or without `lora_config`",
    "share": "`dataset.validation`, a share",
    "per_epoch.eval": "`training_args.eval_steps`, a share of all steps",
    "per_epoch.save": "`training_args.save_steps`, a share of all steps",
}


def yaml_word(value):
    return value if isinstance(value, str) else json.dumps(value)


def settings(values):
    return ", ".join(f"`{key}: {yaml_word(value)}`" for key, value in values.items())


def here(rule):
    """What a key is here, in Markdown; None: it is left out, or an error."""
    if isinstance(rule, str):
        return IN_WORDS.get(rule, f"`{rule}`")
    target = rule.get("to") or rule.get("read")
    parts = [IN_WORDS.get(target, f"`{target}`")] if target else []
    if "and" in rule:
        parts.append(settings(rule["and"]))
    for value, sets in rule.get("values", {}).items():
        if isinstance(sets, dict):
            parts.append(f"{yaml_word(value)}: {settings(sets)}")
        elif sets is not None and sets != value and value != "":
            parts.append(f"{yaml_word(value)} is {yaml_word(sets)}")
    return "; ".join(parts) or None


def defaulted(value):
    if not isinstance(value, dict):
        return f"`{yaml_word(value)}`"
    if "product" in value:
        return f"{value['product']} times `{value['of']}`"
    if "quotient" in value:
        return f"{value['quotient']} / `{value['by']}`"
    if "same" in value:
        return f"as `{value['same']}`, else `{value['else']}`"
    return f"`{yaml_word(value['then'])}` where `{value['when']}` is {value['is']}, else `{yaml_word(value['else'])}`"


def tool_tables():
    text = ""
    for name in NAMES:
        table = tables()[name]
        keys, extends = table["keys"], table.get("extends")
        shared = tables()[extends]["keys"] if extends else {}
        own = {key: rule for key, rule in keys.items() if shared.get(key) != rule}
        text += f"## {name}\n\nOf {table['read']}: `{table['run']}`."
        text += f" It takes all keys of {extends} besides.\n\n" if extends else "\n\n"
        text += "| there | where it is left out | here |\n|---|---|---|\n"
        defaults = {} if extends else table["defaults"]
        own |= {key: f"training_args.{key}" for key in defaults if key not in keys}
        for key, rule in own.items():
            if words := here(rule):
                text += f"| `{key}` | {defaulted(defaults[key]) if key in defaults else ''} | {words} |\n"
        for title, kind in (("No counterpart", "absent"), ("An error, where it is on", "refuse")):
            of_kind = (key for key, rule in own.items() if isinstance(rule, dict) and kind in rule and not here(rule))
            names = [f"`{key}`" for key in of_kind]
            text += f"\n{title}: {', '.join(names)}.\n" if names else ""
        text += "\n"
    return text


def page_text(text):
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tool_tables() + END + rest.partition(END)[2]


def test_the_page_has_the_tables_that_are_read():
    text = PAGE.read_text(encoding="utf-8")
    assert page_text(text) == text, "python -m tests.starting.test_coming_from"


def targets(rule):
    yield from [rule] if isinstance(rule, str) else [rule[word] for word in ("to", "read") if word in rule]
    if isinstance(rule, dict):
        yield from rule.get("and", {})
        for sets in rule.get("values", {}).values():
            yield from sets if isinstance(sets, dict) else ()


def test_every_target_of_the_tables_is_a_key_of_ours_and_every_default_one_of_the_tool():
    assert set(tables()) == set(NAMES)
    for name, table in tables().items():
        for rule in [*table["keys"].values(), *map(str, table.get("always", {}))]:
            for target in set(targets(rule)) - set(OF_CODE):
                schema = recipe_schema()
                for part in target.split("."):
                    assert part in schema["properties"], (name, target)
                    schema = schema["properties"][part]
        passed = recipe_schema()["properties"]["training_args"]["properties"] if table["passes"] else {}
        assert table["defaults"].keys() <= table["keys"].keys() | passed.keys()


if __name__ == "__main__":
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
