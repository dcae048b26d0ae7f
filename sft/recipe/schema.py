"""Writes schema.json: the keys, types, choices and ranges of a recipe, as JSON Schema (draft 2020-12).

    python -m sft.recipe.schema

Our sections come from the dataclasses of sft/recipe/recipe.py, the libraries' from the pinned classes, which take 4 s
to import: reading a recipe reads the file. Run it again when a pin moves; a test holds the file to the classes.
Source: trl.SFTConfig, peft.LoraConfig, transformers.BitsAndBytesConfig, and, where the library has no
annotations, the docstrings of transformers' GenerationConfig and PreTrainedModel.from_pretrained.
"""

import dataclasses
import enum
import inspect
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from sft.recipe.reader import NO_SECRETS, SECRET_KEY
from sft.recipe.recipe import ChatOptions, DatasetOptions, EvaluationOptions, ExportOptions, Recipe, Source

FILE = Path(__file__).with_name("schema.json")

# What the annotations do not say.
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "training_args": {
        "adam_beta1": {"minimum": 0, "exclusiveMaximum": 1},
        "adam_beta2": {"minimum": 0, "exclusiveMaximum": 1},
        "adam_epsilon": {"exclusiveMinimum": 0},
        "dataloader_num_workers": {"minimum": 0},
        "eval_accumulation_steps": {"minimum": 1},
        "eval_delay": {"minimum": 0},
        "eval_steps": {"exclusiveMinimum": 0},
        "gradient_accumulation_steps": {"minimum": 1},
        "label_smoothing_factor": {"minimum": 0, "exclusiveMaximum": 1},
        "learning_rate": {"minimum": 0},
        "logging_steps": {"exclusiveMinimum": 0},
        "max_grad_norm": {"minimum": 0},
        "max_steps": {"minimum": -1},
        "neftune_noise_alpha": {"minimum": 0},
        "num_train_epochs": {"exclusiveMinimum": 0},
        "per_device_eval_batch_size": {"minimum": 1},
        "per_device_train_batch_size": {"minimum": 1},
        "save_steps": {"exclusiveMinimum": 0},
        "save_total_limit": {"minimum": 1},
        "seed": {"minimum": 0},
        "torch_empty_cache_steps": {"minimum": 1},
        "warmup_steps": {"minimum": 0},
        "weight_decay": {"minimum": 0},
    },
    "lora_config": {
        "task_type": {"enum": ["CAUSAL_LM"]},
        "r": {"minimum": 1},
        "lora_alpha": {"minimum": 1},
        "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
        "target_modules": {"minItems": 1, "minLength": 1},
    },
    "quantization_config": {
        "llm_int8_threshold": {"minimum": 0},
        "llm_int8_skip_modules": {"type": "array", "items": {"type": "string"}},
        "bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]},
        "bnb_4bit_compute_dtype": {"enum": ["bfloat16", "float16", "float32"]},
        "bnb_4bit_quant_storage": {"enum": ["uint8", "int8", "bfloat16", "float16", "float32", "float64"]},
    },
    "generation": {
        "early_stopping": {"enum": [True, False, "never"]},
        "max_new_tokens": {"minimum": 1},
        "max_time": {"exclusiveMinimum": 0},
        "min_new_tokens": {"minimum": 0},
        "num_beams": {"minimum": 1},
        "no_repeat_ngram_size": {"minimum": 0},
        "repetition_penalty": {"exclusiveMinimum": 0},
        "temperature": {"exclusiveMinimum": 0},
        "top_k": {"minimum": 0},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
    },
    "model_init": {
        "dtype": {"enum": ["auto", "bfloat16", "float16", "float32"]},
        "trust_remote_code": {"type": "boolean"},  # AutoModel's, so not in the docstring of PreTrainedModel
        "code_revision": {"type": "string"},  # the same
    },
}

# Keyword arguments of from_pretrained that suit a recipe; the rest are Python objects, or would break training.
MODEL_INIT = """dtype attn_implementation experts_implementation trust_remote_code revision code_revision subfolder
    variant use_safetensors cache_dir local_files_only force_download device_map max_memory offload_folder
    offload_buffers disable_mmap key_mapping""".split()

# Attributes of GenerationConfig that suit scoring: one answer a prompt, as text, by the model alone.
GENERATION = """max_new_tokens min_new_tokens early_stopping max_time stop_strings do_sample num_beams use_cache
    cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids renormalize_logits
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens guidance_scale
    prompt_lookup_num_tokens max_matching_ngram_size disable_compile""".split()

# Keys that are ours, or gone from the pinned libraries, and what to write instead.
_PACKED = "rows are packed without padding, or not at all: set dataset.packing"
_BY_THE_RUN = "is set by the run; remove it"
_GONE = "is gone from transformers; remove it"
INSTEAD: dict[str, dict[str, str]] = {
    "recipe": {
        "model": "is a section of the nested layout; write model_name_or_path",
        "training": "is a section of the nested layout; write training_args",
        "lora": "is a section of the nested layout; write lora_config",
    },
    "training_args": {
        "output_dir": "set output_dir at the top of the recipe",
        "resume_from_checkpoint": "set resume_from_checkpoint at the top of the recipe",
        "overwrite_output_dir": "set resume_from_checkpoint at the top of the recipe; false wants an empty output_dir",
        "max_length": "set dataset.max_length",
        "max_seq_length": "set dataset.max_length",
        "truncation_mode": "set dataset.overlength",
        "packing": _PACKED,
        "packing_strategy": _PACKED,
        "eval_packing": _PACKED,
        "padding_free": _PACKED,
        "shuffle_dataset": "rows are drawn in random order already; see train_sampling_strategy",
        "assistant_only_loss": "only assistant turns are trained on; choose them with chat.loss_on",
        "completion_only_loss": "only assistant turns are trained on; choose them with chat.loss_on",
        "dataset_text_field": "set dataset.format",
        "dataset_kwargs": "set the keys of the section dataset",
        "dataset_batch_size": "rows are read one by one; remove it",
        "dataset_num_proc": "set dataset.num_proc",
        "chat_template_path": "set chat.template",
        "eos_token": "the tokenizer's own is used; remove it",
        "pad_token": "the tokenizer's own is used; remove it",
        "model_init_kwargs": "set the keys of the section model_init",
        "trust_remote_code": "set model_init.trust_remote_code",
        "use_cache": "packed rows stay apart only without a cache; remove it",
        "remove_unused_columns": _BY_THE_RUN,
        "label_names": _BY_THE_RUN,
        "do_train": _BY_THE_RUN,
        "do_eval": "set eval_strategy",
        "do_predict": "set dataset.test",
        "local_rank": "the launcher sets it; remove it",
        "parallelism_config": "the launcher sets it; remove it",
        "evaluation_strategy": "is now eval_strategy",
        "evaluate_during_training": "is now eval_strategy: steps",
        "warmup_ratio": "is now warmup_steps, which takes a share of all steps where it is below 1",
        "group_by_length": "is now train_sampling_strategy: group_by_length",
        "no_cuda": "is now use_cpu",
        "use_mps_device": "is found by itself; remove it",
        "per_gpu_train_batch_size": "is now per_device_train_batch_size",
        "per_gpu_eval_batch_size": "is now per_device_eval_batch_size",
        "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
        "adafactor": "is now optim: adafactor",
        "fp16_backend": _GONE,
        "fp16_opt_level": _GONE,
        "half_precision_backend": _GONE,
        "use_ipex": _GONE,
        "jit_mode_eval": _GONE,
        "past_index": _GONE,
        "mp_parameters": _GONE,
        "ray_scope": _GONE,
        "tpu_num_cores": _GONE,
        "use_legacy_prediction_loop": _GONE,
        "include_tokens_per_second": "is now include_num_input_tokens_seen",
        "include_inputs_for_metrics": "is now include_for_metrics",
        "save_safetensors": "is always so now; remove it",
        "dispatch_batches": "is now a key of accelerator_config",
        "split_batches": "is now a key of accelerator_config",
        "tpu_metrics_debug": "is now debug: [tpu_metrics_debug]",
        "sharded_ddp": "is now fsdp",
        "fsdp_min_num_params": "is now a key of fsdp_config",
        "fsdp_transformer_layer_cls_to_wrap": "is now a key of fsdp_config",
        "xpu_backend": "is now ddp_backend",
        "torchdynamo": "is now torch_compile_backend",
        "push_to_hub_model_id": "is now hub_model_id",
        "push_to_hub_organization": "is now hub_model_id: organization/name",
    },
    "model_init": {
        "torch_dtype": "is now dtype",
        "low_cpu_mem_usage": "is always so now; remove it",
        "use_flash_attention_2": "is now attn_implementation: flash_attention_2",
        "quantization_config": "set quantization_config at the top of the recipe",
        "load_in_4bit": "set quantization_config.load_in_4bit",
        "load_in_8bit": "set quantization_config.load_in_8bit",
        "gguf_file": "GGUF weights cannot be trained; convert them to safetensors",
        "use_auth_token": NO_SECRETS,
    },
    "lora_config": {
        "peft_type": _BY_THE_RUN,
        "auto_mapping": _BY_THE_RUN,
        "peft_version": _BY_THE_RUN,
        "base_model_name_or_path": "set model_name_or_path at the top of the recipe",
        "revision": "set model_init.revision",
        "inference_mode": "would freeze the adapter; remove it",
        "megatron_config": "is for Megatron models; remove it",
        "megatron_core": "is for Megatron models; remove it",
        "runtime_config": "is not part of an adapter; remove it",
    },
    "quantization_config": {"quant_method": "is bitsandbytes; remove it"},
    "generation": {"max_length": "set max_new_tokens"},
}

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", dict: "object"}
_KINDS_BY_NAME = {kind.__name__: name for kind, name in _KINDS.items()} | {"list": "array", "tuple": "array"}


_DEFINED = {tuple[Source, ...]: "sources", tuple[Source, ...] | float | None: "sources_or_share"}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe in the flat layout."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
    from trl import SFTConfig

    evaluation = dataclass_schema(EvaluationOptions)
    evaluation["properties"]["generation"] = _documented_schema(GenerationConfig, GENERATION, "generation")
    source = dataclass_schema(Source) | {"type": ["string", "object"], "minLength": 1}
    sources = source | {
        "type": ["string", "object", "array"],
        "items": {"$ref": "#/$defs/source"},
        "minItems": 1,
    }
    share = {"type": [*sources["type"], "number"], "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    top = dataclass_schema(Recipe, "recipe")
    top["properties"] |= {
        "dataset_path": annotation_schema(tuple[Source, ...]) | {"description": "the same as dataset.train"},
        "model_init": _documented_schema(PreTrainedModel.from_pretrained, MODEL_INIT, "model_init"),
        "dataset": dataclass_schema(DatasetOptions),
        "chat": dataclass_schema(ChatOptions),
        "quantization_config": _signature_schema(BitsAndBytesConfig, "quantization_config"),
        "lora_config": dataclass_schema(LoraConfig, "lora_config"),
        "training_args": dataclass_schema(SFTConfig, "training_args"),
        "evaluation": evaluation,
        "export": dataclass_schema(ExportOptions),
    }
    definitions = {"source": source, "sources": sources, "sources_or_share": sources | share}
    del top["properties"]["dataset"]["required"]  # dataset_path may stand for dataset.train
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe", **top, "$defs": definitions}


def dataclass_schema(cls: type, section: str = "") -> dict[str, Any]:
    """The section that a dataclass describes; of our own classes, the fields that are an `option`."""
    hints = typing.get_type_hints(cls)
    properties: dict[str, dict[str, Any]] = {}
    required = []
    for field in dataclasses.fields(cls):
        schema = annotation_schema(hints[field.name])
        if "description" in field.metadata:
            schema |= field.metadata
            if field.default is dataclasses.MISSING:
                required.append(field.name)
        elif cls.__module__ == Recipe.__module__:
            continue
        elif choices := field.metadata.get("choices"):
            schema = {"enum": list(choices)}
        properties[field.name] = schema
    return _section(properties, section, required)


def annotation_schema(annotation: Any) -> dict[str, Any]:
    """The JSON Schema of an annotation; None is left out, since a null means the default."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return {}
    if annotation in _KINDS:
        return {"type": _KINDS[annotation]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"enum": [member.value for member in annotation]}
    if annotation in _DEFINED:
        return {"$ref": f"#/$defs/{_DEFINED[annotation]}"}
    if origin in (typing.Union, UnionType):
        return _union([annotation_schema(arg) for arg in args if arg is not NoneType])
    if (origin or annotation) in (list, tuple):
        return {"type": "array"} | ({"items": annotation_schema(args[0])} if args else {})
    values = annotation_schema(args[1]) if args else {}
    return {"type": "object"} | ({"additionalProperties": values} if values else {})


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for several. Most keywords speak of one type only, so they can stand side by side."""
    if len(schemas) == 1:
        return schemas[0]
    enums = [schema for schema in schemas if "enum" in schema]
    if enums and {"type": "string"} in schemas and len(enums[0]["enum"]) > 1:
        return enums[0]  # `SchedulerType | str`: the text of a choice
    schemas = sorted(schemas, key=_types)  # typing.Union's own order depends on what was imported before
    types = [kind for schema in schemas for kind in _types(schema)]
    merged = {name: value for schema in schemas for name, value in schema.items() if name != "enum"}
    return merged | {"type": list(dict.fromkeys(types))}


def _types(schema: dict[str, Any]) -> list[str]:
    if "enum" in schema:
        return [_KINDS[type(choice)] for choice in schema["enum"]]
    return schema["type"] if isinstance(schema["type"], list) else [schema["type"]]


def _signature_schema(cls: type, section: str) -> dict[str, Any]:
    """The section of a class whose __init__ has defaults but no annotations."""
    parameters = inspect.signature(cls).parameters.values()
    return _section(
        {p.name: annotation_schema(type(p.default)) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}, section
    )


def _documented_schema(thing: Any, names: list[str], section: str) -> dict[str, Any]:
    """The section of keys whose types stand in a docstring only, as in "max_time (`float`, *optional*):"."""
    properties = {}
    for name in names:
        text = re.search(rf"^ +{name}:? *\((.+)\):", thing.__doc__, re.MULTILINE)
        words = text[1].partition("*optional*")[0].lower().replace("union[", "") if text else ""
        while words != (words := re.sub(r"[\[(][^\[\]()]*[\])]", "", words)):  # of list[list[int]], list
            pass
        kinds = [kind for word, kind in _KINDS_BY_NAME.items() if re.search(rf"\b{word}\b", words)]
        properties[name] = {"type": kinds[0] if len(kinds) == 1 else kinds} if kinds else {}
    return _section(properties, section)


def _section(properties: dict[str, Any], name: str, required: Sequence[str] = ()) -> dict[str, Any]:
    more, instead = MORE.get(name, {}) | _choices().get(name, {}), INSTEAD.get(name, {})
    keys = {key for key in properties if key not in instead and not SECRET_KEY.search(key)}
    section: dict[str, Any] = {"type": "object", "additionalProperties": False}
    if required:
        section["required"] = list(required)
    section["properties"] = {
        key: more.get(key, {}) if {"type", "enum", "anyOf"} & more.get(key, {}).keys() else schema | more.get(key, {})
        for key, schema in properties.items()
        if key in keys
    }
    return section | ({"x-instead": instead} if instead else {})


def _choices() -> dict[str, dict[str, dict[str, Any]]]:
    """Choices that the libraries hold elsewhere than in the classes."""
    from peft import LoraConfig
    from transformers.debug_utils import DebugOption
    from transformers.generation import configuration_utils as generation
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def one_or_list(names: list[str]) -> dict[str, Any]:
        return {"anyOf": [{"enum": names}, {"type": "array", "items": {"enum": names}}]}

    attention = ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    inits = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])[1]
    return {
        "training_args": {
            "debug": one_or_list([option.value for option in DebugOption]),
            "report_to": one_or_list(["none", "all", *INTEGRATION_TO_CALLBACK]),
        },
        "lora_config": {
            "init_lora_weights": {
                "anyOf": [
                    {"enum": [True, False, *(init for init in typing.get_args(inits) if "[" not in init)]},
                    {"type": "string", "pattern": "^pissa_niter_[0-9]+$"},
                ]
            }
        },
        "model_init": {
            "attn_implementation": {"anyOf": [{"enum": attention}, {"type": "string", "pattern": "/"}]}  # a hub kernel
        },
        "generation": {
            "cache_implementation": {
                "enum": [*generation.DYNAMIC_CACHE_IMPLEMENTATIONS, *generation.STATIC_CACHE_IMPLEMENTATIONS]
            }
        },
    }


def pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each key, unless its value is itself a long mapping."""
    line = json.dumps(value)
    if not isinstance(value, dict) or len(indent) + len(line) <= 110:
        return line
    rows = [f"{indent}  {json.dumps(name)}: {pretty(child, indent + '  ')}" for name, child in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


if __name__ == "__main__":
    FILE.write_text(pretty(recipe_schema()) + "\n", encoding="utf-8")
