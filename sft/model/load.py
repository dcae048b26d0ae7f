"""The model of a recipe: full or quantised, on a GPU as on a CPU, or without weights."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sft.model.chatglm3  # noqa: F401 - registers ChatGLM3 with the Auto classes
from sft.model.machine import check_machine, default_dtype, local_device, named_dtype
from sft.model.source import find_model, first_line, local_or_hub, source_options
from sft.recipe import Recipe


def load_config(recipe: Recipe) -> transformers.PretrainedConfig:
    """Raises: RecipeError: the model's configuration is not known to transformers."""
    options = source_options(recipe)
    try:
        return AutoConfig.from_pretrained(local_or_hub(recipe.model_name_or_path), **options)
    except (OSError, ValueError, KeyError) as error:
        raise recipe.error("model_name_or_path", f"its configuration does not load: {first_line(error)}") from None


def checkpoint_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that a full fine-tuning is saved in: the recipe's model_init.dtype, or that of the base's own files."""
    if (named := named_dtype(recipe)) is not None:
        return named
    dtype = load_config(recipe).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def meta_model(recipe: Recipe) -> PreTrainedModel:
    """The model without weights, for checks and estimates in seconds."""
    config = load_config(recipe)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=default_dtype(recipe))
    except (ValueError, KeyError, OSError) as error:
        raise recipe.error("model_name_or_path", f"is no causal language model: {first_line(error)}") from None


def check_targets(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuses target modules that the model does not have. Raises: RecipeError."""
    config = recipe.lora_config or {}
    for key in ("target_modules", "modules_to_save"):
        targets = config.get(key)
        if not isinstance(targets, list):
            continue
        names = [name for name, _ in model.named_modules()]
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if missing:
            linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__}
            raise recipe.error(
                f"lora_config.{key}",
                f"{type(model).__name__} has no module {', '.join(missing)}; its linear modules are "
                f"{', '.join(sorted(linear - {'lm_head'}))}",
            )
        if key == "modules_to_save" and recipe.quantization_config:
            _refuse_quantised(recipe, model, targets)


def _refuse_quantised(recipe: Recipe, model: PreTrainedModel, modules_to_save: list[str]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            if found := [saved for saved in modules_to_save if name.endswith(f".{saved}")]:
                raise recipe.error(
                    "lora_config.modules_to_save",
                    f"{found[0]} is quantised, and quantised weights cannot be trained; name it in target_modules",
                )


def load_model(recipe: Recipe, quantised: bool = True, training: bool = True) -> PreTrainedModel:
    """The base model, quantised as the recipe says.

    Args: quantised: False gives the full weights, for merging and export. training: False where no weight will train.
    Raises: RecipeError: it does not load, or it asks for what this machine has not.
    """
    check_machine(recipe)
    reach = find_model(recipe.model_name_or_path, recipe)
    options = {**recipe.model_init, "dtype": default_dtype(recipe, training), **reach}
    if quantised and recipe.quantization_config:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**recipe.quantization_config)
        # Quantised weights are made on the device where they stay.
        options.setdefault("device_map", {"": local_device(recipe)})
    elif not quantised:
        options.pop("device_map", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(local_or_hub(recipe.model_name_or_path), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise recipe.error("model_name_or_path", f"does not load: {first_line(error)}") from None
    model.config.use_cache = False
    _keep_4bit_weights_trainable(model)
    return model


def _keep_4bit_weights_trainable(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with avx512_bf16.

    The first forward in eval mode repacks them for good, and backward passes after it skip autograd: seen with 0.50.2
    (150 of 210 lora_B gradients exactly 0).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - torch's stubs know no such attribute
