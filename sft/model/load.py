"""The tokenizer and the model of a recipe: full or quantised, with or without LoRA, on a GPU as on a CPU."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import HfHubHTTPError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sft.model.chatglm3  # noqa: F401 - registers ChatGLM3 with the Auto classes
from sft.errors import ModelError
from sft.recipe import Recipe

HUB_TIMEOUT_SECONDS = 10


def find_model(name: str, recipe: Recipe, key: str = "model_name_or_path", file: str = "config.json") -> dict[str, Any]:
    """Sees that a model or adapter is there, before anything slow is begun.

    Returns: keyword arguments for from_pretrained: nothing, or local_files_only where the hub is out of reach.
    Raises: RecipeError: no such folder, or no such repository.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return {}
        raise recipe.error(key, f"the folder {name} holds no {file}; it is not {_what(key)}")
    if folder.exists():
        raise recipe.error(key, f"{name} is a file; give the folder that holds {file}")
    looks_local = name.startswith((".", "/", "~", "models/", "output/")) or name.count("/") > 1 or "\\" in name
    fetch = "; fetch it with: python -m sft.fetch" if "smollm2" in name.lower() else ""
    if looks_local:
        raise recipe.error(key, f"there is no folder {name} (working directory: {Path.cwd()}){fetch}")
    revision, cache = recipe.model_init.get("revision"), recipe.model_init.get("cache_dir")
    if isinstance(try_to_load_from_cache(name, file, cache, revision), str):
        offline = not _hub_answers(name, revision)
        return {"local_files_only": True} if offline else {}
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        gated = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        raise recipe.error(key, f"the model hub answers {status} for {name}{gated}{fetch}") from None
    except Exception as error:  # no network, a proxy, an impossible name: all one to the user
        raise recipe.error(
            key, f"there is no folder {name}, and the model hub cannot be reached ({error}){fetch}"
        ) from None
    return {}


def _what(key: str) -> str:
    return "an adapter" if key == "adapter_name_or_path" else "a model"


def _hub_answers(name: str, revision: str | None) -> bool:
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # the cached copy serves then
        return False
    return True


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer, with the recipe's chat template if it gives one, and with a pad token.

    Raises: RecipeError: it is not there, or it has no chat template.
    """
    reach = find_model(recipe.model_name_or_path, recipe)
    options = {k: v for k, v in recipe.model_init.items() if k in ("revision", "trust_remote_code", "cache_dir")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(_expanded(recipe.model_name_or_path), **options, **reach)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise recipe.error("model_name_or_path", f"its tokenizer does not load: {_first_line(error)}") from None
    if recipe.chat.template is not None:
        try:
            tokenizer.chat_template = Path(recipe.chat.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise recipe.error("chat.template", f"{recipe.chat.template} cannot be read: {error}") from None
    elif recipe.chat.response_template is not None:
        if tokenizer.chat_template:
            raise recipe.error(
                "chat.response_template",
                "this tokenizer has a chat template already; remove the key, or set chat.template",
            )
        tokenizer.chat_template = plain_template(recipe, tokenizer)
    elif not tokenizer.chat_template and not hasattr(tokenizer, "encode_conversation"):
        raise recipe.error(
            "model_name_or_path",
            "its tokenizer has no chat template; give one with chat.template (a .jinja file), or "
            "chat.instruction_template and chat.response_template",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills: labels and attention never look at it
    tokenizer.padding_side = "right"
    return tokenizer


def plain_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template for a model without one, from the recipe's instruction and response templates.

    "### Human:" and "### Assistant:", each with a line break after it, give for one exchange:
    ### Human:\\nHi.\\n### Assistant:\\nHello.</s>\\n
    """

    def text(value: str | list[int] | None) -> str:
        return json.dumps(value if isinstance(value, str) else tokenizer.decode(value or []), ensure_ascii=False)

    human, answer = text(recipe.chat.instruction_template), text(recipe.chat.response_template)
    return (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        f"{{{{ {answer} + message.content + eos_token + '\\n' }}}}"
        "{% elif message.role == 'system' %}{{ message.content + '\\n' }}"
        f"{{% else %}}{{{{ {human} + message.content + '\\n' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )


# -------------------------------------------------------------------------------------------------------- the machine


def has_fast_bf16() -> bool:
    """Whether bfloat16 is worth using here: a GPU that has it, or a CPU with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


def use_cpu(recipe: Recipe) -> bool:
    """Whether the run is on the CPU: there is no GPU, or the recipe says so."""
    return recipe.training_args.get("use_cpu", False) or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )


def check_machine(recipe: Recipe) -> None:
    """Refuses what asks for a GPU where there is none. Raises: RecipeError."""
    if not use_cpu(recipe):
        return
    none = "there is no GPU here" if not recipe.training_args.get("use_cpu") else "training_args.use_cpu is true"
    wants = [
        ("training_args.use_cpu", recipe.training_args.get("use_cpu") is False, "remove the key to train on the CPU"),
        ("training_args.fp16", recipe.training_args.get("fp16"), "use bf16, which a CPU can do"),
        ("training_args.tf32", recipe.training_args.get("tf32"), "remove the key"),
        (
            "model_init.attn_implementation",
            str(recipe.model_init.get("attn_implementation", "")).startswith("flash"),
            "use sdpa, which packs rows as exactly",
        ),
        ("model_init.device_map", "cuda" in str(recipe.model_init.get("device_map", "")), "remove the key"),
    ]
    for key, wanted, advice in wants:
        if wanted:
            raise recipe.error(key, f"needs a GPU, and {none}; {advice}")


def default_dtype(recipe: Recipe) -> torch.dtype:
    """The recipe's model_init.dtype; without one bfloat16 where the machine is fast in it, else float32."""
    named = recipe.model_init.get("dtype")
    if named in (None, "auto"):
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return getattr(torch, named)


# ---------------------------------------------------------------------------------------------------------- the model


def load_config(recipe: Recipe) -> transformers.PretrainedConfig:
    """Raises: RecipeError: the model's configuration is not known to transformers."""
    reach = find_model(recipe.model_name_or_path, recipe)
    options = {k: v for k, v in recipe.model_init.items() if k in ("revision", "trust_remote_code", "cache_dir")}
    try:
        return AutoConfig.from_pretrained(_expanded(recipe.model_name_or_path), **options, **reach)
    except (OSError, ValueError, KeyError) as error:
        raise recipe.error("model_name_or_path", f"its configuration does not load: {_first_line(error)}") from None


def meta_model(recipe: Recipe) -> PreTrainedModel:
    """The model without weights, for checks and estimates in seconds."""
    config = load_config(recipe)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=default_dtype(recipe))
    except (ValueError, KeyError, OSError) as error:
        raise recipe.error("model_name_or_path", f"is no causal language model: {_first_line(error)}") from None


def check_targets(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuses target modules that the model does not have. Raises: RecipeError."""
    config = recipe.lora_config or {}
    for key in ("target_modules", "modules_to_save"):
        wanted = config.get(key)
        if not isinstance(wanted, list):
            continue
        names = [name for name, _ in model.named_modules()]
        missing = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names)]
        if missing:
            linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__}
            raise recipe.error(
                f"lora_config.{key}",
                f"{type(model).__name__} has no module {', '.join(missing)}; its linear modules are "
                f"{', '.join(sorted(linear - {'lm_head'}))}",
            )


def load_model(recipe: Recipe, quantised: bool = True) -> PreTrainedModel:
    """The base model, quantised as the recipe says.

    Args: quantised: False gives the full weights, for merging and export.
    Raises: RecipeError: it does not load, or it asks for what this machine has not.
    """
    check_machine(recipe)
    reach = find_model(recipe.model_name_or_path, recipe)
    options = {**recipe.model_init, "dtype": default_dtype(recipe), **reach}
    if quantised and recipe.quantization_config:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**recipe.quantization_config)
        # Quantised weights are made on the device where they stay; with several processes each takes its own.
        if "device_map" not in options:
            options["device_map"] = {"": "cpu" if use_cpu(recipe) else _local_device()}
    elif not quantised:
        options.pop("device_map", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(_expanded(recipe.model_name_or_path), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise recipe.error("model_name_or_path", f"does not load: {_first_line(error)}") from None
    model.config.use_cache = False
    _keep_4bit_weights_trainable(model)
    return model


def _local_device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "mps"


def _keep_4bit_weights_trainable(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with avx512_bf16.

    The first forward in eval mode repacks them for good, and backward passes after it skip autograd: seen with 0.50.2
    (150 of 210 lora_B gradients exactly 0).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - torch's stubs know no such attribute


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """Puts the recipe's LoRA on the model, or goes on from its adapter; without either all weights train.

    Raises: RecipeError: the adapter is not there, or does not fit.
    """
    if recipe.adapter_name_or_path:
        return load_adapter(model, recipe.adapter_name_or_path, recipe, trainable=True)
    if recipe.lora_config is None:
        return model
    torch.manual_seed(int(recipe.training_args.get("seed", 42)))  # LoRA weights start random
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora_config}))
    except (ValueError, TypeError) as error:
        raise recipe.error("lora_config", _first_line(error)) from None


def load_adapter(
    model: PreTrainedModel, name: str, recipe: Recipe, trainable: bool = False, key: str = "adapter_name_or_path"
) -> PeftModel:
    """A LoRA adapter on its base. Raises: RecipeError: it is not there, or it was made for another model."""
    reach = find_model(name, recipe, key, "adapter_config.json")
    if recipe.lora_config and trainable:
        own = PeftConfig.from_pretrained(name, **reach)
        for option, value in recipe.lora_config.items():
            had = getattr(own, option, value)
            if (set(had) != set(value)) if isinstance(value, list) else had != value:
                raise recipe.error(
                    f"lora_config.{option}",
                    f"is {value}, and the adapter {name} has {had}; make it equal, or remove it",
                )
    try:
        return PeftModel.from_pretrained(model, str(Path(name).expanduser()), is_trainable=trainable, **reach)
    except (RuntimeError, ValueError, OSError) as error:
        raise recipe.error(key, f"{name} does not fit this model: {_first_line(error)}") from None


def _expanded(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def require(model: PreTrainedModel) -> None:
    """Raises: ModelError: nothing in the model is trainable."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("no weight of this model would be trained; give lora_config, or remove quantization_config")
