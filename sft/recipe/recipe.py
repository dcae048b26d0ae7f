r"""Reads a recipe, one YAML file, into a checked `Recipe`; imports no torch, so a wrong recipe answers at once.

Two layouts are read. The flat one gives each library class a section of its own (the classes below describe the rest):

    model_name_or_path, adapter_name_or_path, output_dir, resume_from_checkpoint
    model_init           keyword arguments of transformers' from_pretrained
    dataset, chat        DatasetOptions, ChatOptions; `dataset_path: X` at the top means `dataset: {train: X}`
    quantization_config  transformers.BitsAndBytesConfig; absent: not quantised
    lora_config          peft.LoraConfig; absent: full fine-tuning
    training_args        trl.SFTConfig
    evaluation, export   EvaluationOptions (its `generation` is transformers.GenerationConfig), ExportOptions

The nested one (a top-level `model` mapping) has model, dataset, training and lora; NESTED says what its keys mean.
Keys, types, choices and ranges are those of schema.json, which `python -m sft.recipe.schema` writes.
Scalars follow YAML 1.2: `2e-4` is a number and `no` is text. A null means the default.

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
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft.errors import RecipeError
from sft.recipe.reader import Item, Reader, join, problems_of, raise_all, show

ROOT = Path(__file__).resolve().parents[2]


def option(default: Any = dataclasses.MISSING, description: str = "", **schema: Any) -> Any:
    """A key of a recipe; `schema` holds the JSON Schema keywords that its annotation cannot say."""
    return field(default=default, metadata={"description": description, **schema})


@dataclass(frozen=True)
class Source:
    """One entry of dataset.train, validation or test."""

    path: str = option(description="a file, a glob or a hub id", minLength=1)
    format: str = option("auto", "the schema of its rows; auto: dataset.format")
    weight: float = option(1.0, "how often each of its rows is seen in an epoch", exclusiveMinimum=0)


@dataclass(frozen=True)
class DatasetOptions:
    """The section `dataset`."""

    train: tuple[Source, ...] = option(
        description="a file, a glob, a hub id, {path, format, weight}, or a list of them"
    )
    validation: tuple[Source, ...] | float | None = option(None, "the same, or a share held out of train")
    test: tuple[Source, ...] | float | None = option(None, "the same; absent: no scores")
    format: str = option("auto", "auto (from the first row) or a file of formats/")
    system: str | None = option(None, "system prompt of rows that bring none")
    max_length: int = option(2048, "tokens of a conversation", minimum=1)
    overlength: Literal["error", "drop", "trim"] = option("trim", "what happens to longer ones; trim: at a turn's end")
    on_error: Literal["error", "skip"] = option("error", "what happens to bad rows")
    control_tokens: Literal["error", "skip", "text"] = option("error", "rows whose text spells a control token")
    max_lost: float = option(0.05, "share of rows that may be skipped, dropped or trimmed", minimum=0, maximum=1)
    packing: bool = option(True, "several conversations in a row of max_length tokens")
    num_proc: int | None = option(None, "threads that tokenise; null: one a core", minimum=1)
    streaming: bool = option(False, "read while training")


@dataclass(frozen=True)
class ChatOptions:
    """The section `chat`."""

    template: str | None = option(None, "a .jinja file instead of the tokenizer's chat template", minLength=1)
    loss_on: Literal["all_turns", "last_turn"] = option("all_turns", "the assistant turns that are trained on")
    response_template: str | list[int] | None = option(None, "what starts an answer", minLength=1, minItems=1)
    instruction_template: str | list[int] | None = option(None, "what starts a user turn", minLength=1, minItems=1)


@dataclass(frozen=True)
class EvaluationOptions:
    """The section `evaluation`."""

    metrics: tuple[str, ...] = option(("bleu", "chrf", "rouge"), "folders of metrics/", uniqueItems=True)
    batch_size: int = option(16, "answers generated at a time", minimum=1)
    max_samples: int | None = option(None, "rows of the test split that are scored; null: all", minimum=1)
    language: Literal["zh", "ja", "th", "other"] | None = option(None, "decides the tokens of scores; null: by script")
    generation: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 256})


@dataclass(frozen=True)
class ExportOptions:
    """The section `export`."""

    merge: bool = option(True, "write final_model/, the adapter merged onto the unquantised base")
    format: Literal["glm", "chatglm"] | None = option(None, "layout of an exported ChatGLM3")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe, defaults filled in. Relative paths are as written: relative to the working directory."""

    path: Path = field(compare=False)
    model_name_or_path: str = option(description="a hub id or a local folder", minLength=1)
    adapter_name_or_path: str | None = option(None, "go on from an existing LoRA adapter", minLength=1)
    output_dir: Path = option(description="the folder of the run", minLength=1)
    resume_from_checkpoint: bool | str = option(
        True, "true: the newest, else afresh; a path: that one; false: output_dir must be empty", minLength=1
    )
    model_init: dict[str, Any] = field(default_factory=dict)
    dataset: DatasetOptions
    chat: ChatOptions = ChatOptions()
    quantization_config: dict[str, Any] | None = None
    lora_config: dict[str, Any] | None = None
    training_args: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    export: ExportOptions = ExportOptions()
    places: dict[str, "Item"] = field(default_factory=dict, compare=False, repr=False)  # flat key -> as written

    def error(self, key: str, message: str) -> RecipeError:
        """The error for a problem found later, e.g. `recipes/x.yaml:7: dataset.train: no such file; ...`.

        Args: key: in the flat layout; the error spells it as the file does.
        """
        return RecipeError(f"{self._label(key)}: {message}")

    def _label(self, key: str) -> str:
        known = key
        while known and known not in self.places:
            known = re.sub(r"[.\[]?[^.\[]*$", "", known)
        if not known:
            return f"{self.path}: {key}"
        place, rest = self.places[known], key[len(known) :].partition("[")[0]
        return Item(None, place.where, place.key + rest).label

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe in the flat layout, of JSON types; as YAML it loads as an equal recipe."""
        values = dataclasses.asdict(dataclasses.replace(self, places={}))
        del values["path"], values["places"]
        return _with_lists(values | {"output_dir": str(self.output_dir)})


# The nested layout: what its keys mean in the flat one, and what it must not mix with.
NESTED = {
    "model.base_model_path": "model_name_or_path",
    "model.output_dir": "output_dir",
    "dataset.train_path": "dataset.train",
    "dataset.val_path": "dataset.validation",
    "training.num_epochs": "training.num_train_epochs",
    "training": "training_args",
    "lora": "lora_config",
}
NESTED_FLAGS: dict[str, dict[str, Any]] = {
    "use_8bit": {"load_in_8bit": True},
    "use_4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}
FLAT_ONLY = {
    "model_name_or_path": "model.base_model_path",
    "output_dir": "model.output_dir",
    "dataset_path": "dataset.train_path",
    "quantization_config": "model.use_4bit or model.use_8bit",
    "lora_config": "lora",
    "training_args": "training",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path`, after `overrides` ("key.path=value", in the file's own layout, values as in YAML).

    Raises: RecipeError: what is wrong with it, one problem a line: first with the keys and values by themselves, all
    of them; where those are right, with how they go together.
    """
    path = Path(path)
    reader = Reader()
    top = reader.read(path)
    nested = "model" in top.value and isinstance(top.value["model"].value, dict)
    for override in overrides:
        reader.override(top, override)

    schema = _nested_schema(recipe_schema()) if nested else recipe_schema()
    _add_homes(schema)
    raise_all([*reader.problems, *problems_of(top, schema)])
    raise_all(_to_flat(top, nested))
    recipe = _to_recipe(path, top)
    raise_all(str(recipe.error(key, message)) for key, message in _contradictions(recipe))
    return recipe


def recipe_schema() -> dict[str, Any]:
    """schema.json, with the formats and metrics that exist now as choices."""
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    dataset, evaluation = (schema["properties"][name]["properties"] for name in ("dataset", "evaluation"))
    formats = ["auto", *sorted(file.stem for file in ROOT.glob("formats/[!_]*.py"))]
    for section in (dataset, *(source["properties"] for source in schema["$defs"].values())):
        section["format"]["enum"] = formats
    evaluation["metrics"]["items"]["enum"] = sorted(
        file.stem for file in ROOT.glob("metrics/*/*.py") if file.stem == file.parent.name
    )
    return _resolved(schema, schema["$defs"])


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with each {"$ref": "#/$defs/NAME", ...} replaced by what it names."""
    if isinstance(schema, list):
        return [_resolved(child, definitions) for child in schema]
    if not isinstance(schema, dict):
        return schema
    children = {name: _resolved(child, definitions) for name, child in schema.items() if name != "$defs"}
    name = str(children.pop("$ref", "")).rpartition("/")[2]
    return _resolved(definitions[name], definitions) | children if name else children


# The two layouts


def _nested_schema(flat: dict[str, Any]) -> dict[str, Any]:
    """The schema of the nested layout, made from that of the flat one."""
    keys, flag = flat["properties"], {"type": "boolean"}

    def extended(section: dict[str, Any], **more: Any) -> dict[str, Any]:
        return section | {"properties": section["properties"] | more}

    model = {"base_model_path": keys["model_name_or_path"], "output_dir": keys["output_dir"]}
    dataset = keys["dataset"]["properties"]
    training = keys["training_args"]
    return {
        "type": "object",
        "properties": {name: schema for name, schema in keys.items() if name not in FLAT_ONLY}
        | {
            "model": {
                "type": "object",
                "properties": model | dict.fromkeys(NESTED_FLAGS, flag),
                "required": list(model),
            },
            "dataset": extended(keys["dataset"], train_path=dataset["train"], val_path=dataset["validation"]),
            "training": extended(training, num_epochs=training["properties"]["num_train_epochs"]),
            "lora": extended(keys["lora_config"], use_lora=flag),
        },
        "x-instead": {name: f"a file with a section `model` says {key} instead" for name, key in FLAT_ONLY.items()},
    }


def _add_homes(schema: dict[str, Any]) -> None:
    """Gives each section a word on the keys that belong in another one."""
    sections = {name: section for name, section in schema["properties"].items() if section.get("type") == "object"}
    sections["evaluation.generation"] = sections["evaluation"]["properties"]["generation"]
    for home in [schema, *sections.values()]:
        for name, section in sections.items():
            for key in section["properties"].keys() - home["properties"].keys():
                home.setdefault("x-instead", {}).setdefault(key, f"belongs in {name}")


# Items -> Recipe


def _to_flat(top: Item, nested: bool) -> Iterator[str]:
    """Moves the items of the nested layout, and `dataset_path`, to their places in the flat one; yields problems."""
    if nested:
        model, lora = top.value["model"].value, top.value.get("lora")
        for flag, settings in NESTED_FLAGS.items():
            item = model.pop(flag, None)
            if item and item.value:
                config = top.value.setdefault("quantization_config", Item({}, item.where, item.key))
                config.value |= {name: Item(value, item.where, item.key) for name, value in settings.items()}
        if lora and (use_lora := lora.value.pop("use_lora", None)) and not use_lora.value:
            del top.value["lora"]
    for old, new in (NESTED if nested else {"dataset_path": "dataset.train"}).items():
        old_section, old_name = _section(top, old)
        if item := old_section.pop(old_name, None):
            section, name = _section(top, new)
            other = section.setdefault(name, item)
            if other.where.startswith("override ") == item.where.startswith("override "):
                if other is not item:
                    yield f"{item.label}: says the same as {other.key} ({other.where}); keep one"
            elif item.where.startswith("override "):
                section[name] = item
    top.value.pop("model", None)
    if "train" not in _section(top, "dataset.train")[0]:
        key = "dataset.train_path" if nested else "dataset.train"
        yield f"{top.value['dataset'].at(key)}: is missing; give a file, a glob or a hub id"


def _section(top: Item, key: str) -> tuple[dict[str, Item], str]:
    section, dot, name = key.rpartition(".")
    if not dot:
        return top.value, name
    return top.value.setdefault(section, Item({}, top.where, section)).value, name


def _plain(item: Item, key: str, places: dict[str, Item]) -> Any:
    places[key] = item
    if isinstance(item.value, dict):
        return {name: _plain(child, join(key, name), places) for name, child in item.value.items()}
    if isinstance(item.value, list):
        return [_plain(child, f"{key}[{index}]", places) for index, child in enumerate(item.value)]
    return item.value


def _to_recipe(path: Path, top: Item) -> Recipe:
    places: dict[str, Item] = {}
    values = _plain(top, "", places)
    dataset = values["dataset"]
    for split in {"train", "validation", "test"} & dataset.keys():
        dataset[split] = _sources(dataset[split], dataset.get("format", "auto"))
    evaluation = values.get("evaluation", {})
    evaluation["generation"] = EvaluationOptions().generation | evaluation.get("generation", {})
    if "metrics" in evaluation:
        evaluation["metrics"] = tuple(evaluation["metrics"])
    quantization = values.get("quantization_config")
    if quantization is not None:
        if "llm_int8_threshold" in quantization:
            quantization["llm_int8_threshold"] = float(quantization["llm_int8_threshold"])  # its class refuses 6
        if {quantization.get(flag) for flag in _LOAD_IN} in ({False}, {False, None}):
            quantization = None  # switched off, e.g. by an override
    return Recipe(
        **values
        | {
            "path": path,
            "output_dir": Path(values["output_dir"]),
            "dataset": DatasetOptions(**dataset),
            "chat": ChatOptions(**values.get("chat", {})),
            "evaluation": EvaluationOptions(**evaluation),
            "export": ExportOptions(**values.get("export", {})),
            "quantization_config": quantization,
            "places": places,
        }
    )


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_lists(child) for name, child in value.items()}
    return [_with_lists(child) for child in value] if isinstance(value, list | tuple) else value


def _sources(value: Any, default_format: str) -> tuple[Source, ...] | float:
    if isinstance(value, int | float):
        return float(value)
    entries = [
        {"path": entry} if isinstance(entry, str) else entry
        for entry in (value if isinstance(value, list) else [value])
    ]
    return tuple(
        Source(**entry | {"format": default_format if entry.get("format", "auto") == "auto" else entry["format"]})
        for entry in entries
    )


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Settings that are right each by itself but not together: (key, what is wrong; what to do)."""
    training, dataset, quantization = recipe.training_args, recipe.dataset, recipe.quantization_config

    if quantization is not None:
        if all(quantization.get(flag) for flag in _LOAD_IN):
            yield "quantization_config", "asks for 4 bits and for 8 bits; choose one"
        if not any(quantization.get(flag) for flag in _LOAD_IN):
            yield "quantization_config", "quantises nothing; add load_in_4bit: true or load_in_8bit: true"
        if recipe.lora_config is None and recipe.adapter_name_or_path is None:
            yield (
                "quantization_config",
                "quantised weights cannot be trained, only LoRA weights beside them; turn LoRA on, or quantisation off",
            )

    targets = (recipe.lora_config or {}).get("target_modules", [])
    heads = [head for head in ("lm_head", "output_layer", "embed_out") if _targeted(head, targets)]
    if isinstance(targets, str) and not _is_pattern(targets):
        yield (
            "lora_config.target_modules",
            f"found {show(targets)}, a pattern that whole module paths must match; write a list, [{targets}]",
        )
    elif heads:
        yield (
            "lora_config.target_modules",
            f"a LoRA on {heads[0]} would never be trained: the loss reads its weight directly; take it out, "
            "or train it whole with modules_to_save",
        )

    if dataset.validation is None:
        for key, values in _NEEDS_VALIDATION.items():
            if training.get(key) in values:
                yield (
                    f"training_args.{key}",
                    f"{show(training[key])} needs dataset.validation; give a file, or a share held out of train",
                )
    elif training.get("load_best_model_at_end"):
        evaluates, saves = training.get("eval_strategy"), training.get("save_strategy", "steps")
        if evaluates is not None and saves not in (evaluates, "best"):
            yield (
                "training_args.load_best_model_at_end",
                f"needs eval_strategy ({evaluates}) and save_strategy ({saves}) to be equal; change one",
            )

    if training.get("save_strategy") == "best" and not {"metric_for_best_model", "load_best_model_at_end"} & set(
        training
    ):
        yield "training_args.save_strategy", "'best' needs training_args.metric_for_best_model; give eval_loss"

    shares = [share for share in (dataset.validation, dataset.test) if isinstance(share, float)]
    if sum(shares) >= 1:
        yield "dataset.test", "and dataset.validation are shares that leave nothing to train on; give smaller ones"
    if dataset.streaming:
        if training.get("max_steps", -1) < 1:
            yield "dataset.streaming", "a stream has no known length; set training_args.max_steps"
        if dataset.packing:
            yield "dataset.streaming", "a stream is not packed; set dataset.packing: false"
        for split in ("validation", "test"):
            if isinstance(getattr(dataset, split), float):
                yield f"dataset.{split}", "a share cannot be held out of a stream; give a file"

    if recipe.chat.instruction_template is not None and recipe.chat.response_template is None:
        yield "chat.instruction_template", "needs chat.response_template, which starts the answers; give both"
    if recipe.output_dir == Path(recipe.model_name_or_path):
        yield "output_dir", "is the model's own folder, which the run would overwrite; give another"


_LOAD_IN = ("load_in_4bit", "load_in_8bit")
_NEEDS_VALIDATION = {
    "eval_strategy": ("steps", "epoch"),
    "eval_on_start": (True,),
    "load_best_model_at_end": (True,),
    "save_strategy": ("best",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
}


def _targeted(module: str, targets: str | list[str]) -> bool:
    """Whether peft would put a LoRA on an output layer of this name."""
    if isinstance(targets, list):
        return module in targets
    return _is_pattern(targets) and targets != "all-linear" and re.fullmatch(targets, module) is not None


def _is_pattern(targets: str) -> bool:
    """peft reads a text as a pattern over module paths; a bare word can match none."""
    try:
        re.compile(targets)
    except re.error:
        return False
    return targets == "all-linear" or re.fullmatch(r"\w+", targets) is None
