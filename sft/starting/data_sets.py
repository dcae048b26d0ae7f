"""What another tool calls its data sets -> entries of dataset.train and dataset.validation."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import RecipeError
from sft.recipe.reader import Item, plain, spell
from sft.starting.draft import Draft
from sft.starting.tool_files import ToolFile
from sft.starting.tool_keys import tables

MULTIMODAL = ("images", "videos", "audios")


@dataclass
class DataSet:
    """An entry; columns: {key in the file: key of the format}."""

    path: str
    format: str = "auto"
    weight: float = 1.0
    subset: str | None = None
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        is_file = Path(self.path).is_file()
        split = None if is_file or self.split == "train" else self.split
        values = {
            "path": self.path,
            "format": self.format,
            "columns": self.columns,
            "weight": self.weight,
            "subset": self.subset,
            "split": split,
        }
        defaults = {"format": "auto", "columns": {}, "weight": 1.0, "subset": None, "split": None}
        return {key: value for key, value in values.items() if key == "path" or value != defaults[key]}


def put_data_sets(source: ToolFile, draft: Draft, unmatched: list[str]) -> None:
    """Raises: RecipeError: a data set that cannot be read here, with the key that names it."""
    train, validation = READERS[source.tool](source, unmatched)
    if not train:
        names = ", ".join(
            key for key, rule in tables()[source.tool]["keys"].items() if rule == {"read": "dataset.train"}
        )
        raise RecipeError(f"{source.path}: names no data ({names}); add dataset.train=FILE to the command")
    columns = [data_set.columns for data_set in [*train, *validation]]
    if all(each == columns[0] for each in columns):  # said once
        for data_set in [*train, *validation]:
            data_set.columns = {}
        if columns[0]:
            draft.set("dataset.columns", columns[0])
    formats = {data_set.format for data_set in [*train, *validation]}
    if len(formats) == 1:
        for data_set in [*train, *validation]:
            data_set.format = "auto"
    draft.set("dataset.train", _entries(train))
    if validation and draft.value("training_args.eval_strategy") != "no":
        draft.set("dataset.validation", _entries(validation))
    if len(formats) == 1 and formats != {"auto"}:
        draft.set("dataset.format", formats.pop())


def _entries(data_sets: Sequence[DataSet]) -> Any:
    entries = [data_set.entry() for data_set in data_sets]
    simple = [entry["path"] if entry.keys() == {"path"} else entry for entry in entries]
    return simple[0] if len(simple) == 1 else simple


Splits = tuple[list[DataSet], list[DataSet]]


def _value(source: ToolFile, key: str, default: Any = None) -> Any:
    item = source.keys.get(key)
    return default if item is None or item.value is None else plain(item)


def _list(value: Any, separator: str | None = None) -> list[Any]:
    if isinstance(value, str) and separator:
        return [word.strip() for word in value.split(separator) if word.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _renamed(columns: Iterable[tuple[str | None, str]]) -> dict[str, str]:
    return {there: here for there, here in columns if there and there != here}


def here_or_beside(name: str, file: Path) -> Path | None:
    """A relative path, from the working directory or from a folder above the recipe: the tools run from their own."""
    folders = [Path(), *file.resolve().parents]
    return next((folder / name for folder in folders if (folder / name).exists()), None)


# --------------------------------------------------------------------------------------------------- LLaMA-Factory


def _llamafactory(source: ToolFile, unmatched: list[str]) -> Splits:
    found: list[list[DataSet]] = []
    for key in ("dataset", "eval_dataset"):
        names = [str(name) for name in _list(_value(source, key), ",")]
        found.append([_registered(source, source.keys[key], name, unmatched) for name in names])
    return found[0], found[1]


def _registered(source: ToolFile, item: Item, name: str, unmatched: list[str]) -> DataSet:
    """A data set by its name in dataset_info.json."""
    folder = str(_value(source, "dataset_dir", "data"))
    info_file = here_or_beside(f"{folder}/dataset_info.json", source.path)
    if info_file is None:
        raise RecipeError(
            f"{item.label}: {name!r} is a name in {folder}/dataset_info.json, which is not here; run this where "
            "it is, or add dataset.train=FILE to the command"
        )
    try:
        info = json.loads(info_file.read_text(encoding="utf-8")).get(name)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"{info_file}: cannot be read: {error}") from None
    if not isinstance(info, dict):
        raise RecipeError(f"{item.label}: {info_file} has no {name!r}; add dataset.train=FILE to the command")
    columns, tags, place = info.get("columns") or {}, info.get("tags") or {}, f"{item.label}: {name}"
    if info.get("ranking"):
        raise RecipeError(f"{place}: is of preferences (ranking); only answers are trained on here")
    if other := next((key for key in (*MULTIMODAL, "kto_tag") if key in columns), None):
        raise RecipeError(f"{place}: has {other}; only text is trained on here")
    if "script_url" in info:
        raise RecipeError(f"{place}: is made by a script; write its rows to a file")
    for key in ("num_samples", "folder"):
        if info.get(key) is not None:
            unmatched.append(f"{info_file}: {name}.{key}: all rows are used")
    if "file_name" in info:
        data_set = DataSet((info_file.parent / info["file_name"]).as_posix())
    else:
        path = info.get("hf_hub_url") or info.get("ms_hub_url") or info.get("om_hub_url")
        data_set = DataSet(str(path), subset=info.get("subset"), split=info.get("split"))
    data_set.format, data_set.columns = _llamafactory_format(info.get("formatting", "alpaca"), columns, tags, place)
    return data_set


ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}


def _llamafactory_format(
    formatting: str, columns: dict[str, str], tags: dict[str, str], place: str
) -> tuple[str, dict[str, str]]:
    if formatting == "alpaca":
        return "instruction", _renamed((columns.get(there), here) for there, here in ALPACA.items())
    named = {"user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system",)}
    for tag, known in named.items():
        if tags.get(tag, known[0]) not in known:
            raise RecipeError(f"{place}: the speaker {tags[tag]!r} ({tag}) is not known here; rename it in the file")
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    rows = columns.get("messages", "conversations")
    others = [(columns[key], key) for key in ("system", "tools") if key in columns]
    if formatting == "openai" or role == "role":
        role, content = tags.get("role_tag", "role"), tags.get("content_tag", "content")
        return "messages", _renamed([(rows, "messages"), (role, "role"), (content, "content"), *others])
    return "sharegpt", _renamed([(rows, "conversations"), (role, "from"), (content, "value"), *others])


# -------------------------------------------------------------------------------------------------------- Axolotl


AXOLOTL_KEYS = {  # of a data set; those that are read, and those that change nothing
    "path",
    "type",
    "split",
    "name",
    "data_files",
    "ds_type",
    "field_messages",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "preprocess_shards",
    "trust_remote_code",
}


def _axolotl(source: ToolFile, unmatched: list[str]) -> Splits:
    found: list[list[DataSet]] = []
    for key in ("datasets", "test_datasets"):
        items = source.keys[key].value if isinstance(_value(source, key), list) else []
        found.append([each for item in items for each in _axolotl_entry(item, source, unmatched)])
    return found[0], found[1]


def _axolotl_entry(item: Item, source: ToolFile, unmatched: list[str]) -> list[DataSet]:
    entry = {key: value for key, value in plain(item).items() if value is not None}
    fmt, columns = _axolotl_type(item, entry)
    trained = {"roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]), "train_on_eos": ("turn", "all")}
    for key, value in entry.items():
        if key in trained and value not in trained[key]:
            unmatched.append(
                f"{item.value[key].where}: {item.key}.{key}: answers are trained on, each to its stop token"
            )
        elif key not in AXOLOTL_KEYS and key not in trained and value is not False:
            unmatched.append(f"{item.value[key].where}: {item.key}.{key}: is not known here")
    path, files = str(entry.get("path", "")), _list(entry.get("data_files"))
    subset, split = entry.get("name"), entry.get("split")
    if files:
        folder = Path() if path in ("json", "csv", "parquet", "arrow", "text") else Path(path)
        return [DataSet((folder / str(file)).as_posix(), fmt, columns=columns) for file in files]
    return [DataSet(path, fmt, subset=subset, split=split, columns=columns)]


def _axolotl_type(item: Item, entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The format of a data set, and the new names of its columns."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
        renamed = _renamed((str(kind.get(f, here)), here) for f, here in {**fields, "field_system": "system"}.items())
        return "instruction", renamed
    types = tables()["Axolotl"]["data_types"]
    if kind == "chat_template" or kind is None and "field_messages" in entry:
        names = entry.get("message_property_mappings") or {}
        role = str(names.get("role", entry.get("message_field_role", "role")))
        content = str(names.get("content", entry.get("message_field_content", "content")))
        rows = str(entry.get("field_messages", "messages"))
        if role == "from":
            return "sharegpt", _renamed([(rows, "conversations"), (content, "value")])
        others = [(str(there), here) for here, there in names.items() if here not in ("role", "content")]
        return "messages", _renamed([(rows, "messages"), (role, "role"), (content, "content"), *others])
    if kind not in types:
        place = item.value["type"].label if "type" in item.value else item.label_of(f"{item.key}.type")
        raise RecipeError(f"{place}: found {spell(kind)}; what can be taken over is {', '.join(list(types)[:7])}")
    return types[kind]["format"], dict(types[kind].get("columns", {}))


# -------------------------------------------------------------------------------------------------------- ms-swift

# [HF:: or MS::]user/name[:subset/subset][#rows], or a file
SWIFT = re.compile(r"(?:(?:HF|MS)::)?(?P<path>[^#:]+)(?::(?P<subset>[^#:]+))?(?:#(?P<rows>\d+))?")


def _swift(source: ToolFile, unmatched: list[str]) -> Splits:
    found: list[list[DataSet]] = []
    for key in ("dataset", "val_dataset"):
        data_sets = []
        for name in map(str, _list(_value(source, key))):
            if Path(name).exists() or not (read := SWIFT.fullmatch(name)):
                data_sets.append(DataSet(name))
                continue
            if read["rows"]:
                unmatched.append(f"{source.keys[key].where}: {key}: {name}: all rows are used, not {read['rows']}")
            subset = None if read["subset"] in (None, "default", "all") else read["subset"]
            data_sets.append(DataSet(read["path"], subset=subset))
        found.append(data_sets)
    return found[0], found[1]


# ---------------------------------------------------------------------------------------- trl and alignment-handbook


def _trl(source: ToolFile, unmatched: list[str]) -> Splits:
    if isinstance(_value(source, "datasets"), list):
        return [_mixed(item, source, unmatched) for item in source.keys["datasets"].value], []
    name = _value(source, "dataset_name")
    if name is None:
        return [], []
    subset = _value(source, "dataset_config")
    train = DataSet(str(name), subset=subset, split=_value(source, "dataset_train_split"))
    test = DataSet(str(name), subset=subset, split=_value(source, "dataset_test_split", "test"))
    return [train], [test] if _value(source, "eval_strategy", "no") != "no" else []


def _mixed(item: Item, source: ToolFile, unmatched: list[str]) -> DataSet:
    """An entry of a mixture of trl (path, name) or alignment-handbook (id, config)."""
    entry = plain(item)
    for key in entry.keys() - {"path", "id", "name", "config", "split", "weight", "fraction", "columns"}:
        unmatched.append(f"{item.value[key].where}: {item.key}.{key}: is not known here")
    if more := [name for name in _list(entry.get("columns")) if name not in ("messages", "prompt", "completion")]:
        unmatched.append(f"{item.value['columns'].where}: {item.key}.columns: a row's {', '.join(more)} is not read")
    weight = entry.get("weight", entry.get("fraction"))
    path, subset = entry.get("path", entry.get("id")), entry.get("name", entry.get("config"))
    return DataSet(str(path), "auto", 1.0 if weight is None else weight, subset, entry.get("split"))


def _handbook(source: ToolFile, unmatched: list[str]) -> Splits:
    if isinstance(mixture := source.keys.get("dataset_mixture"), Item) and isinstance(mixture.value, dict):
        items = mixture.value["datasets"].value if "datasets" in mixture.value else []
        return [_mixed(item, source, unmatched) for item in items], []
    mixer = _value(source, "dataset_mixer")
    if not isinstance(mixer, dict):
        return _trl(source, unmatched)
    splits = _list(_value(source, "dataset_splits", ["train", "test"]))
    subsets = _list(_value(source, "dataset_configs"))

    def of(word: str) -> list[DataSet]:
        return [
            DataSet(str(name), "auto", weight if word == "train" else 1.0, dict(enumerate(subsets)).get(i), split)
            for i, (name, weight) in enumerate(mixer.items())
            for split in splits
            if str(split).startswith(word)
        ]

    return of("train"), of("test") if _value(source, "eval_strategy", "no") != "no" else []


READERS = {
    "LLaMA-Factory": _llamafactory,
    "Axolotl": _axolotl,
    "ms-swift": _swift,
    "trl": _trl,
    "alignment-handbook": _handbook,
}
