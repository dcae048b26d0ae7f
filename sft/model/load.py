"""The model of a recipe: full or quantised, on a GPU as on a CPU, or without weights."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

import sft.model.chatglm3  # noqa: F401 - registers ChatGLM3 with the Auto classes
from sft.errors import UserError
from sft.model.machine import check_machine, default_dtype, local_device, named_dtype
from sft.model.source import find_model, first_line, local_or_hub, refuse_damaged, source_options
from sft.recipe import Recipe


def load_config(recipe: Recipe) -> transformers.PretrainedConfig:
    """Raises: RecipeError: the model's configuration is not known to transformers."""
    options = source_options(recipe)
    source = local_or_hub(recipe.model_name_or_path, recipe, weights=False)
    generation = Path(source) / "generation_config.json"
    try:
        if generation.is_file():  # of one that is no JSON from_pretrained says nothing, and makes its own
            json.loads(generation.read_text(encoding="utf-8"))
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # whatever the library makes of a file that is not what it should be
        if "trust_remote_code" in str(error):
            what = "needs code of its own to load; if you trust it, set model_init.trust_remote_code: true"
            raise recipe.error("model_name_or_path", what) from None
        what = f"its configuration (config.json) does not load: {first_line(error)}"
        raise recipe.error("model_name_or_path", what) from None


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
    except Exception as error:  # sizes that make no model, above all
        raise recipe.error("model_name_or_path", f"is no causal language model: {first_line(error)}") from None


# Bases whose files are quantised in what nothing can train: transformers widens them as it reads them.
WIDENED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def stored_in(recipe: Recipe) -> str | None:
    """How the base's own files are quantised, e.g. mxfp4; None: they are not."""
    stored = getattr(load_config(recipe), "quantization_config", None) or {}
    return dict(stored).get("quant_method")


def check_quantisation(recipe: Recipe) -> None:
    """Raises: RecipeError: the base's files are quantised, and the recipe would quantise them otherwise."""
    method = stored_in(recipe)
    if recipe.quantization_config and method not in (None, "bitsandbytes"):
        what = f"the files of {recipe.model_name_or_path} are quantised already ({method}); take this section out"
        raise recipe.error("quantization_config", f"{what}, or name an unquantised copy of the model")


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


# By these transformers' from_pretrained leaves a process of FSDP without weights: the first one hands them out.
READ_BY_FIRST = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


@contextmanager
def _read_by_first(is_wanted: bool) -> Iterator[None]:
    """Whether weights are read by the first process of a machine alone.

    accelerate leaves its variables set for the rest of the run, and a model that is merged or scored must be whole.
    """
    before = {name: os.environ.get(name) for name in READ_BY_FIRST}
    os.environ.update(dict.fromkeys(READ_BY_FIRST, str(is_wanted).lower()))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_model(
    recipe: Recipe, quantised: bool = True, training: bool = True, read_by_first: bool = False
) -> PreTrainedModel:
    """The base model, quantised as the recipe says.

    Args: quantised: False gives the full weights, for merging and export. training: False where no weight will train.
        read_by_first: for training by FSDP, which hands the weights out; the model of any other process has none yet.
    Raises: RecipeError: it does not load, or it asks for what this machine has not.
    """
    check_machine(recipe)
    options = _options(recipe, training)
    if (method := stored_in(recipe)) in WIDENED:
        options["quantization_config"] = WIDENED[method](dequantize=True)
    elif quantised and recipe.quantization_config:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**recipe.quantization_config)
        # Quantised weights are made on the device where they stay.
        options.setdefault("device_map", {"": local_device(recipe)})
    elif not quantised:
        options.pop("device_map", None)
    with _load_errors(recipe):
        if read_by_first and "quantization_config" not in options and os.environ.get("LOCAL_RANK", "0") != "0":
            model = _without_weights(recipe, options)
        else:
            with _read_by_first(False):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    local_or_hub(recipe.model_name_or_path, recipe), output_loading_info=True, **options
                )
            model = loaded[0]
            _refuse_random_weights(recipe, model, loaded[1]["missing_keys"])
    model.config.use_cache = False
    _keep_4bit_weights_trainable(model)
    return model


def _options(recipe: Recipe, training: bool = True) -> dict[str, Any]:
    """Keyword arguments of from_pretrained for the base. Raises: RecipeError: it is not there, or it is damaged."""
    reach = find_model(recipe.model_name_or_path, recipe)
    refuse_damaged(recipe.model_name_or_path, recipe)
    # No pickle unless the recipe names it, which transformers then reads as weights only.
    return {"use_safetensors": True, **recipe.model_init, "dtype": default_dtype(recipe, training), **reach}


def _refuse_random_weights(recipe: Recipe, model: PreTrainedModel, missing: set[str]) -> None:
    """transformers fills up weights that are in no file with random numbers. Raises: RecipeError."""
    if missing:
        some = f"{', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}"
        raise recipe.error(
            "model_name_or_path",
            f"does not load: its files lack {len(missing)} of the weights of {type(model).__name__}: {some}; "
            "fetch the whole model again",
        )


def _why_not(recipe: Recipe, error: Exception) -> str:
    """Why a model does not load, where its folder tells better than the libraries."""
    folder = Path(local_or_hub(recipe.model_name_or_path, recipe))
    weights = list(folder.glob("*.safetensors"))
    if not weights and list(folder.glob("*.bin")) and recipe.model_init.get("use_safetensors") is not False:
        return "its weights are a pickle; to read it, as weights only, set model_init.use_safetensors: false"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says; fetch both again"
    return first_line(error)


def load_on_meta(recipe: Recipe) -> tuple[PreTrainedModel, set[str]]:
    """The base as from_pretrained makes it of its files, but with its weights on the meta device.

    Returns: the model, and the names of weights that are in no file.
    Raises: RecipeError: it does not load.
    """
    options = _options(recipe)
    options |= {"device_map": "meta", "output_loading_info": True}
    with _load_errors(recipe), _read_by_first(False):
        loaded: Any = AutoModelForCausalLM.from_pretrained(local_or_hub(recipe.model_name_or_path, recipe), **options)
    model, info = loaded
    return model, info["missing_keys"]


@contextmanager
def _load_errors(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the libraries make of files that are not what they should be
        raise recipe.error("model_name_or_path", f"does not load: {_why_not(recipe, error)}") from None


def _without_weights(recipe: Recipe, options: dict[str, Any]) -> PreTrainedModel:
    """The model with its buffers but with memory that nobody has written to for weights: FSDP brings them.

    transformers 5.24 reads the files in every process, whatever these variables say; given no file, it leaves weights
    on the meta device by them. There they have no address, by which accelerate finds them for the optimizer.
    """
    meta: Any = meta_model(recipe)
    with _read_by_first(True):  # the class itself: its Auto class takes no model without a name
        model = type(meta).from_pretrained(None, config=meta.config, state_dict={}, **options)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad))
    model.tie_weights()
    return model


def load_trained(recipe: Recipe, folder: Path) -> PreTrainedModel:
    """A model that full fine-tuning left in a folder, in the dtype that its base is scored in.

    Raises: RecipeError: it is damaged.
    """
    refuse_damaged(str(folder), recipe, "output_dir")
    with _read_by_first(False):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=default_dtype(recipe, training=False),
            trust_remote_code=recipe.model_init.get("trust_remote_code", False),
        )


def _keep_4bit_weights_trainable(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with avx512_bf16.

    The first forward in eval mode repacks them for good, and backward passes after it skip autograd: seen with 0.50.2
    (150 of 210 lora_B gradients exactly 0).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - torch's stubs know no such attribute
