"""What a recipe holds: one dataclass for each section of ours, one `Recipe` for the whole.

A key of ours is written here and nowhere else. Its `option` says default, description and range; from these
`python -m sft.recipe.generate` writes schema.json (what a YAML file is checked by) and the keys in docs/recipe.md.
The keys of a library's section are those of its class, which `option(library=...)` names.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft.errors import RecipeError
from sft.recipe.reader import ROOT, Item, elsewhere, nearest_path


def option(default: Any = dataclasses.MISSING, description: str = "", *, library: str = "", **schema: Any) -> Any:
    """A key of a recipe.

    Args:
        default: absent: the key is required.
        description: follows "give ..." in an error and stands as comment in docs/recipe.md; the choices of a Literal
            are put before it there. None as default: it says what null means.
        library: the class or function that takes the whole section as keyword arguments, e.g. trl.SFTConfig.
        schema: JSON Schema keywords that the annotation cannot say, e.g. minimum=1. Of `examples` the first is shown
            there in place of the default.
    """
    metadata = {"description": description, "library": library, "schema": schema}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Source:
    """One entry of dataset.train, validation or test."""

    path: str = option(description="a file, a glob or a hub id", minLength=1, examples=["data/novel/train.jsonl"])
    format: str = option("auto", "the schema of its rows; auto: as dataset.format says")
    weight: float = option(1.0, "how often each of its rows is seen in an epoch", exclusiveMinimum=0)
    subset: str | None = option(None, "of a hub data set", minLength=1)
    split: str | None = option(None, "of a hub data set, or of a folder that holds a copy; null: train", minLength=1)
    columns: dict[str, str] | None = option(None, "renames keys of its rows; null: as dataset.columns says")


# The kinds of adapter that go through a whole run here, the first by default; docs/methods.md says what was tried.
PEFT_TYPES = (
    "LORA",
    "BOFT",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "VERA",
)

Sources = tuple[Source, ...]
SourcesOrShare = Sources | float | None  # a share of the rows of dataset.train, above 0 and below 1


@dataclass(frozen=True)
class DatasetOptions:
    """The section `dataset`."""

    train: Sources = option(
        description="a file, a glob, a hub id, a mapping with `path`, or a list of these",
        examples=["data/novel/train.jsonl"],
    )
    validation: SourcesOrShare = option(None, "files like train's, or a share held out of train, e.g. 0.02")
    test: SourcesOrShare = option(None, "files like train's, or a share held out of train; null: nothing is scored")
    format: str = option("auto", "a file of formats/, or auto: from the first row")
    system: str | None = option(None, "system prompt of rows that bring none")
    max_length: int = option(2048, "tokens of a conversation, and of a packed row", minimum=1)
    overlength: Literal["error", "drop", "trim"] = option("trim", "longer conversations; trim: at a turn's end")
    on_error: Literal["error", "skip"] = option("error", "rows that are not what the format says")
    control_tokens: Literal["error", "skip", "text"] = option(
        "error", "rows that spell a control token, e.g. <|im_end|>"
    )
    max_lost: float = option(0.05, "share of rows that may be skipped, dropped or trimmed", minimum=0, maximum=1)
    packing: Literal["auto", True, False] = option(
        "auto", "conversations share rows; auto: where exact, docs/packing.md"
    )
    columns: dict[str, str] | None = option(None, "renames keys of rows and turns, e.g. {question: human}")
    near_duplicates: Literal["report", "off"] = option("report", "test rows that nearly repeat a training row")
    cache_gb: float = option(20, "tokenised files kept on disk, those used last; see python -m sft.cache", minimum=0)
    num_proc: int | None = option(None, "threads that tokenise; null: one a core", minimum=1)
    streaming: bool = option(False, "tokenise while training; needs training_args.max_steps")

    def columns_of(self, source: Source) -> dict[str, str] | None:
        """How the keys of a source's rows are renamed: {key in the file: key of the format}."""
        return self.columns if source.columns is None else source.columns


@dataclass(frozen=True)
class ChatOptions:
    """The section `chat`."""

    template: str | None = option(None, "a .jinja file instead of the tokenizer's chat template", minLength=1)
    variables: dict[str, Any] = option({}, "what the chat template reads besides, e.g. {enable_thinking: false}")
    date: str | None = option(None, "YYYY-MM-DD, for templates that show today's; null: that of the first start")
    examples: Literal["auto", "whole", "each_answer"] = option("auto", "what a row gives; see docs/reasoning.md")
    loss_on: Literal["all_turns", "last_turn", "after_thinking"] = option(
        "all_turns", "the answers that are trained on"
    )
    response_template: str | list[int] | None = option(None, "what starts an answer", minLength=1, minItems=1)
    instruction_template: str | list[int] | None = option(None, "what starts a user turn", minLength=1, minItems=1)


@dataclass(frozen=True)
class EvaluationOptions:
    """The section `evaluation`."""

    metrics: tuple[str, ...] = option(("bleu", "chrf", "rouge"), "folders of metrics/", uniqueItems=True)
    model: Literal["adapter", "final"] = option("adapter", "what is scored after LoRA; final: final_model/, read again")
    batch_size: int = option(16, "answers generated at a time", minimum=1)
    max_samples: int | None = option(
        None, "rows of the test split, and of general, that are scored; null: all", minimum=1
    )
    every: int | None = option(None, "steps: validates then, and scores answers; null: training_args says", minimum=1)
    during_samples: int = option(64, "rows of dataset.validation that are answered then", minimum=1)
    language: Literal["zh", "ja", "th", "other"] | None = option(None, "decides the tokens of scores; null: by script")
    general: str = option(
        "bundled", "rows whose loss shows what was forgotten: bundled (data/general/), a file, or off", minLength=1
    )
    generation: dict[str, Any] = option(
        {"max_new_tokens": 256}, "transformers.GenerationConfig", library="transformers.GenerationConfig"
    )


@dataclass(frozen=True)
class ExportOptions:
    """The section `export`."""

    merge: bool = option(True, "write final_model/, the adapter merged onto the unquantised base")
    format: Literal["glm", "chatglm"] | None = option(None, "layout of an exported ChatGLM3; null: glm")
    push_to_hub: str | None = option(
        None, "user/name: uploads final_model/ at the end, or lora_adapter/ if unmerged", minLength=1
    )
    private: bool = option(True, "whether a repository that push_to_hub makes is private")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe, defaults filled in. Relative paths are as written: relative to the working directory."""

    path: Path = field(compare=False)
    model_name_or_path: str = option(
        description="a hub id or a local folder", minLength=1, examples=["Qwen/Qwen2.5-7B-Instruct"]
    )
    hub: Literal["huggingface", "modelscope"] = option("huggingface", "where hub ids are looked up; docs/serving.md")
    adapter_name_or_path: str | None = option(None, "go on from an existing LoRA adapter", minLength=1)
    output_dir: Path = option(description="the folder of the run", minLength=1, examples=["output/qwen_qlora"])
    resume_from_checkpoint: bool | str = option(
        True, "true: the newest, else afresh; a path: that one; false: output_dir must be empty", minLength=1
    )
    model_init: dict[str, Any] = option(
        {},
        "from_pretrained, e.g. {dtype: bfloat16}; trust_remote_code only here",
        library="transformers.PreTrainedModel.from_pretrained",
    )
    dataset: DatasetOptions
    chat: ChatOptions = ChatOptions()
    quantization_config: dict[str, Any] | None = option(
        None,
        "transformers.BitsAndBytesConfig, e.g. {load_in_4bit: true}; null: not quantised",
        library="transformers.BitsAndBytesConfig",
    )
    lora_config: dict[str, Any] | None = option(
        None,
        "peft.LoraConfig, e.g. {r: 32, target_modules: [q_proj]}; null: full fine-tuning",
        library="peft.LoraConfig",
    )
    loraplus_lr_ratio: float | None = option(None, "LoRA+: learning rate of B over that of A, e.g. 16", minimum=1)
    training_args: dict[str, Any] = option({}, "trl.SFTConfig, e.g. {learning_rate: 2e-4}", library="trl.SFTConfig")
    early_stopping: dict[str, Any] | None = option(
        None,
        "transformers.EarlyStoppingCallback, e.g. {early_stopping_patience: 3}",
        library="transformers.EarlyStoppingCallback",
    )
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    export: ExportOptions = ExportOptions()
    places: dict[str, Item] = field(default_factory=dict, compare=False, repr=False)  # flat key -> as written

    @property
    def seed(self) -> int:
        return int(self.training_args.get("seed", 42))  # transformers' own default

    @property
    def trains_all_weights(self) -> bool:
        """Full fine-tuning: no LoRA, neither new nor taken up."""
        return self.lora_config is None and self.adapter_name_or_path is None

    def error(self, key: str, message: str) -> RecipeError:
        """The error for a problem found later, e.g. `recipes/x.yaml:7: dataset.train: no such file; ...`.

        Args: key: in the flat layout; the error spells it as the file does. message: settings that it advises to are
        spelled as YAML, and become `key=value` where the key comes from the command line.
        """
        label = self._label(key)
        if label.startswith("override "):
            message = re.sub(rf"\b((?:{'|'.join(_SECTIONS)})\.\w+): (?=\w)", r"\1=", message)
        return RecipeError(f"{label}: {message}")

    def is_elsewhere(self, name: str) -> str:
        """What to say of a path that is not there but is beside the recipe, or in the repository; else nothing."""
        return elsewhere(name, ROOT, self.path.parent.resolve())

    def where_it_is(self, name: str, otherwise: str = "") -> str:
        """The same as the end of a sentence, or which path may be meant; where nothing is found, what to say then."""
        hint = self.is_elsewhere(name) or nearest_path(name) or otherwise
        return f"; {hint}" if hint else ""

    def _label(self, key: str) -> str:
        """Place and spelling of a key, or, where the file does not hold it, of the section around it.

        dataset.train[0].path, where the file says only `dataset_path: a.jsonl` in line 2:
        written_key dataset.train, below "[0].path" (the index says nothing to the user) -> x.yaml:2: dataset_path
        """
        written_key = key
        while written_key and written_key not in self.places:
            written_key = re.sub(r"[.\[]?[^.\[]*$", "", written_key)
        if not written_key:
            return f"{self.path}: {key}"
        item, below = self.places[written_key], key.removeprefix(written_key).partition("[")[0]
        return Item(None, item.where, item.key + below).label

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe in the flat layout, of JSON types; as YAML it loads as an equal recipe."""
        values = dataclasses.asdict(dataclasses.replace(self, places={}))
        del values["path"], values["places"]
        for split in ("train", "validation", "test"):
            sources = values["dataset"][split]
            for source in sources if isinstance(sources, tuple) else ():
                if source["columns"] is None:  # as older runs described themselves, which are gone on from
                    del source["columns"]
        return _with_lists(values | {"output_dir": str(self.output_dir)})


_SECTIONS = tuple(field.name for field in dataclasses.fields(Recipe))


def _with_lists(value: Any) -> Any:
    """The value with lists in place of tuples, at every depth."""
    if isinstance(value, dict):
        return {name: _with_lists(child) for name, child in value.items()}
    return [_with_lists(child) for child in value] if isinstance(value, list | tuple) else value
