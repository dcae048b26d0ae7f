"""LoRA, or another kind of adapter: put on a model, or taken up from a folder."""

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from sft.errors import ModelError
from sft.model.lora_init import WEIGHTS, changes_base, note_start, start_from_quantisation_error
from sft.model.source import find_model, first_line, local_or_hub, refuse_damaged
from sft.recipe import PEFT_TYPES, Recipe

PICKLE = "adapter_model.bin"


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """Puts the recipe's LoRA on the model, or goes on from its adapter; without either all weights train.

    Raises: RecipeError: the adapter is not there, or does not fit.
    """
    if recipe.adapter_name_or_path:
        return load_adapter(model, recipe.adapter_name_or_path, recipe, trainable=True)
    if recipe.lora_config is None:
        return model
    torch.manual_seed(recipe.seed)  # LoRA weights start random
    try:
        config = adapter_config(recipe.lora_config)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=_lora_is_float32(recipe))
    except (ValueError, TypeError) as error:
        raise recipe.error("lora_config", first_line(error)) from None
    if recipe.lora_config.get("init_lora_weights") == "loftq":
        start_from_quantisation_error(adapted, recipe)
    if changes_base(config):
        note_start(adapted)
    for name, value in vars(config).items():
        if isinstance(value, set):  # peft would write it in an order that each process has anew
            setattr(config, name, sorted(value))
    return adapted


def adapter_config(options: dict[str, Any]) -> PeftConfig:
    """lora_config as the class of its peft_type. Raises: ValueError, TypeError: what that class refuses."""
    kind = options.get("peft_type", PEFT_TYPES[0])
    given = {name: value for name, value in options.items() if name != "peft_type"}
    if given.get("init_lora_weights") == "loftq":  # peft's own would put other weights into the base
        given["init_lora_weights"] = True
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"task_type": "CAUSAL_LM", **given})


def load_adapter(
    model: PreTrainedModel,
    name: str,
    recipe: Recipe,
    trainable: bool = False,
    key: str = "adapter_name_or_path",
    assign: bool = False,
) -> PeftModel:
    """An adapter on its base.

    Args: assign: the adapter's tensors take the places of the model's, whose memory is not written to.
    Raises: RecipeError: it is not there, or it was made for another model.
    """
    reach = find_model(name, recipe, key, "adapter_config.json")
    config = read_adapter_config(name, recipe, key, **reach)
    if recipe.lora_config and trainable:
        for option, value in {"peft_type": PEFT_TYPES[0], **recipe.lora_config}.items():
            adapter_value = getattr(config, option, value)
            adapter_value = getattr(adapter_value, "value", adapter_value)  # of an enum
            if (set(adapter_value) != set(value)) if isinstance(value, list) else adapter_value != value:
                raise recipe.error(
                    f"lora_config.{option}",
                    f"is {value}, and the adapter {name} has {adapter_value}; make it equal, or remove it",
                )
    folder = Path(local_or_hub(name, recipe, key))
    if folder.is_dir() and not (folder / WEIGHTS).is_file():
        if not (folder / PICKLE).is_file():
            raise recipe.error(key, f"the folder {name} holds no {WEIGHTS}; fetch the whole adapter again")
        if recipe.model_init.get("use_safetensors") is not False:
            what = "its weights are a pickle; to read it, as weights only, set model_init.use_safetensors: false"
            raise recipe.error(key, f"{name}: {what}")
    refuse_damaged(name, recipe, key)
    try:
        reach |= {"autocast_adapter_dtype": _lora_is_float32(recipe), "low_cpu_mem_usage": assign}
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, **reach)
        missing = missing_weights(adapted, folder)
    except Exception as error:  # whatever the libraries make of files that are not what they should be
        raise recipe.error(key, f"{name} does not fit this model: {first_line(error)}") from None
    if missing:
        raise recipe.error(key, f"{name} does not fit this model: its file lacks {missing}")
    return adapted


def read_adapter_config(name: str, recipe: Recipe, key: str = "adapter_name_or_path", **reach: Any) -> PeftConfig:
    """Raises: RecipeError: it cannot be read, or it is of a kind that is not taken up."""
    try:
        config = PeftConfig.from_pretrained(local_or_hub(name, recipe, key), **reach)
    except Exception as error:  # whatever peft makes of a file that is not what it should be
        what = f"{name}: its adapter_config.json does not load: {first_line(error)}"
        raise recipe.error(key, what) from None
    if config.peft_type not in PEFT_TYPES:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise recipe.error(key, f"{name} is an adapter of the kind {kind}, which is not taken up; see docs/methods.md")
    if changes_base(config):
        raise recipe.error(
            key,
            f"{name} is of a training that had changed its base ({config.init_lora_weights}), and wrong on this one; "
            "name the lora_adapter/ of the run, which is plain LoRA",
        )
    return config


def missing_weights(model: PeftModel, folder: Path) -> str:
    """Weights of the adapter that are in no file of a folder, in words: peft would leave them as they are, untold."""
    if not (folder / WEIGHTS).is_file():
        return ""
    with safe_open(folder / WEIGHTS, "pt") as file:
        missing = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - set(file.keys()))
    return f"{len(missing)} weights, e.g. {missing[0]}" if missing else ""


def _lora_is_float32(recipe: Recipe) -> bool:
    """As peft makes LoRA weights beside a model of half precision, except under DeepSpeed's ZeRO-3.

    It gathers weights of several dtypes in a buffer of one (deepspeed 0.19.2, issue 8072). Its optimizer has float32
    copies of what trains, so LoRA weights may be of the model's dtype, as trl has them there. Of a quantised model
    trl casts them later.
    """
    return bool(recipe.quantization_config) or not is_deepspeed_zero3_enabled()


def base_of(model: Any) -> Any:
    """The transformers model inside peft's wrapper; the model itself where it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model's class can project chosen positions only to the vocabulary."""
    return "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters


def require_trainable(model: PreTrainedModel | PeftModel) -> None:
    """Raises: ModelError: nothing in the model is trainable."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("no weight of this model would be trained; give lora_config, or remove quantization_config")
