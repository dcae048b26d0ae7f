"""`python run_sft.py --from OTHER.yaml recipes/mine.yaml`: a recipe of another tool becomes one of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sft.errors import RecipeError, UserError
from sft.plain_text import plain_text
from sft.recipe import Recipe
from sft.recipe.reader import Item, plain
from sft.starting.data_sets import here_or_beside, put_data_sets
from sft.starting.draft import Draft, refuse_existing, split_overrides, without_lines, write_new
from sft.starting.tool_files import ToolFile, read_tool_file
from sft.starting.tool_keys import OFF, settle_validation, tables, translate


class Migrated(NamedTuple):
    source: ToolFile
    recipe: Recipe


def write_from(other: str, path: Path, words: Sequence[str]) -> Migrated:
    """Writes the recipe and tells what became of each key. words: key.path=value, which win over the tool's recipe.

    Raises: UserError: it cannot be read, or asks for what is not done here; nothing is written then.
    """
    refuse_existing(path)
    names, overrides = split_overrides(words)
    if names:
        raise UserError(f"{names[0]}: with --from only key.path=value may follow, e.g. dataset.train=mine.jsonl")
    source = read_tool_file(Path(other))
    draft, unmatched, templates = draft_of(source, path, overrides)
    try:
        recipe = draft.recipe(path)
    except RecipeError as error:
        problems = without_lines(error, path)
        raise RecipeError(f"{other}: what it says makes no recipe of ours:\n{problems}") from None
    for file, text in templates.items():
        refuse_existing_template(file)
        write_new(file, text)
    write_new(path, draft.text(path))
    print(f"{path} is written, from {source.path}, a recipe of {source.tool}")
    for title, lines in (
        (f"of {source.path.name}, without a counterpart here", unmatched),
        ("otherwise here", differences(source)),
    ):
        if lines:
            print(f"\n{title}:", *(f"  {plain_text(line)}" for line in lines), sep="\n")
    return Migrated(source, recipe)


def draft_of(source: ToolFile, path: Path, overrides: Sequence[str]) -> tuple[Draft, list[str], dict[Path, str]]:
    """The recipe in the making, what has no counterpart, and the chat template to be written beside it.

    Raises: RecipeError: the tool's recipe asks for what is not done here.
    """
    given = {override.partition("=")[0] for override in overrides}
    draft, templates = Draft(), dict[Path, str]()
    draft.set("output_dir", f"output/{path.stem}")
    mixture = source.keys.get("dataset_mixture")
    if mixture and isinstance(mixture.value, dict) and "test_split_size" in mixture.value:
        source.keys["test_split_size"] = mixture.value["test_split_size"]
    unmatched = translate(source, draft, given)
    if "dataset.train" not in given:
        put_data_sets(source, draft, unmatched)
    for key in ("chat_template", "chat_template_jinja", "chat_template_path"):
        if key in source.keys and plain(source.keys[key]) is not None and "chat.template" not in given:
            _put_template(source, source.keys[key], path, draft, templates, unmatched)
    for override in overrides:
        draft.override(override)
    settle_validation(draft)
    if draft.value("model_name_or_path") is None:
        raise RecipeError(f"{source.path}: names no model; add model_name_or_path=MODEL to the command")
    unmatched = [line.replace(f"{source.path}:", "line ", 1) for line in unmatched]
    draft.head = [f"Written by --from {source.path.as_posix()}, a recipe of {source.tool}."]
    draft.tail = ["", f"{source.tool} trains on {tables()[source.tool]['labels']['says']}.", *differences(source)]
    draft.tail += ["", f"Of {source.path.name}, without a counterpart here:", *unmatched] if unmatched else []
    return draft, unmatched, templates


def _put_template(
    source: ToolFile, item: Item, path: Path, draft: Draft, templates: dict[Path, str], unmatched: list[str]
) -> None:
    """A chat template that the recipe holds becomes a file beside ours; one that is a file is named."""
    text = str(item.value)
    if "{" in text:
        file = path.with_suffix(".jinja")
        templates[file] = text
        draft.set("chat.template", file.as_posix(), f"from {item.key}")
    elif text.endswith(".jinja"):
        draft.set("chat.template", (here_or_beside(text, source.path) or Path(text)).as_posix())
    elif source.tool != "Axolotl":
        unmatched.append(f"{item.label}: the chat template of the model's own tokenizer is used")


def refuse_existing_template(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file}: is there already, and the chat template would be written to it; move it away")


def differences(source: ToolFile) -> list[str]:
    """What comes out otherwise here: of the tool, and of a script that starts several processes."""
    lines = []
    if "output_dir" in source.keys:
        lines.append("output_dir: a folder of its own, output/NAME of the recipe")
    for entry in tables()[source.tool].get("differs", []):
        entry = {"says": entry} if isinstance(entry, str) else entry
        on = {key for key, item in source.keys.items() if item.value not in OFF}
        if entry.get("with") in (None, *on) and entry.get("without") not in on:
            lines.append(entry["says"])
    if source.processes > 1:
        lines.append(
            f"{source.processes} processes share a step there; here: torchrun --nproc_per_node {source.processes}, "
            f"or {source.processes} times gradient_accumulation_steps"
        )
    return lines


def labels(migrated: Migrated) -> str:
    """What carries loss there and here, in words and on two rows."""
    from sft.model.tokenizer import load_tokenizer
    from sft.starting.tool_labels import labels_shown

    source, recipe = migrated
    says = f"\ntrained on in {source.tool}: {tables()[source.tool]['labels']['says']}"
    try:
        return f"{says}\n{labels_shown(source, recipe, load_tokenizer(recipe))}"
    except UserError as error:
        return f"{says}\n(no rows are shown: {plain_text(error)})"
