"""What can be told before training: the masks as a person sees them, and the memory a run will ask for."""

from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.dataset import Data
from sft.errors import ModelError
from sft.recipe import Recipe

Pieces = list[tuple[str, bool]]  # (text, does it carry loss), in order


def mask_pieces(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], mask: list[int]) -> Pieces:
    """A row as text, split where the loss begins and ends."""
    pieces: Pieces = []
    begin = 0
    for i in range(1, len(input_ids) + 1):
        if i == len(input_ids) or mask[i] != mask[begin]:
            text = tokenizer.decode(input_ids[begin:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((text, bool(mask[begin])))
            begin = i
    return pieces


def render_pieces(pieces: Pieces, colour: bool) -> str:
    """For the terminal: green is trained on; without colour it stands between [[ and ]]."""
    on, off = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    return "".join(f"{on}{text}{off}" if trained else text for text, trained in pieces)


def estimate_memory(recipe: Recipe, model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a training step by what they are for, from the model without weights.

    Activations are those of one layer's inputs for each layer with gradient checkpointing, of about sixteen such
    tensors a layer without; logits are of half the tokens, in 4 bytes and twice. An estimate, not a bound.
    """
    args = recipe.training_args
    width = model.dtype.itemsize
    quantised = recipe.quantization_config or {}
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and module is not model.get_output_embeddings()
    }
    bytes_each = 0.5 + 1 / 16 if quantised.get("load_in_4bit") else 1 if quantised.get("load_in_8bit") else width
    weights = sum(int(p.numel() * (bytes_each if id(p) in linear else width)) for p in model.parameters())
    trained = trained_weights(recipe, model)
    moments = 2 if "8bit" in str(args.get("optim", "")) else 8
    lora = trained * 4 if recipe.lora_config or recipe.adapter_name_or_path else 0  # these stand beside the weights
    train = trained * (moments + 4) + lora
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    tokens = int(args.get("per_device_train_batch_size", 8)) * recipe.dataset.max_length
    kept = 1 if args.get("gradient_checkpointing", True) else 16
    activations = tokens * hidden * width * (layers * kept + 24)
    logits = tokens // 2 * config.vocab_size * 4 * 2
    return {"weights": weights, "gradients and optimizer": train, "activations": activations, "logits": logits}


def memory_line(recipe: Recipe, model: PreTrainedModel, on_cpu: bool) -> tuple[str, bool]:
    """The estimate against what the machine has, with what to change; whether it fits."""
    parts = estimate_memory(recipe, model)
    need = sum(parts.values())
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0]
    where = "memory" if on_cpu else "GPU memory"
    detail = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    line = f"{where}: about {need / 1e9:.1f} GB needed ({detail}), {free / 1e9:.1f} GB free"
    if need <= free:
        return line, True
    args, advice = recipe.training_args, []
    if not args.get("gradient_checkpointing", True):
        advice.append("training_args.gradient_checkpointing: true")
    if int(args.get("per_device_train_batch_size", 8)) > 1:
        advice.append("training_args.per_device_train_batch_size: 1 (and gradient_accumulation_steps up)")
    if not recipe.quantization_config:
        advice.append("quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4} with lora_config")
    advice.append(f"dataset.max_length below {recipe.dataset.max_length}")
    return f"{line}\nit does not fit; what helps: {'; '.join(advice)}", False


def stop_token_line(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Proof that the token at which generation stops is trained on, over the first rows of each file.

    Raises: ModelError: an answer whose last trained token is no stop token.
    """
    stops, counted = data.encoder.stop_ids, 0
    for file in data.files:
        for row in file.rows.select(range(min(200, len(file.rows)))):
            mask = row["assistant_mask"] + [0]
            for i, token in enumerate(row["input_ids"]):
                if mask[i] and not mask[i + 1]:
                    counted += 1
                    if token not in stops:
                        raise ModelError(f"{file.path}:{row['line']}: an answer ends in {token}, which stops nothing")
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in sorted(stops))
    return f"stop token {names}: trained on in each of {counted:,} answers looked at"


def trained_weights(recipe: Recipe, model: PreTrainedModel) -> int:
    """How many weights are trained: LoRA's, by its rank and target modules, or all."""
    if not (recipe.lora_config or recipe.adapter_name_or_path):
        return sum(p.numel() for p in model.parameters())
    config = recipe.lora_config or {}
    targets, rank = config.get("target_modules"), int(config.get("r", 8))
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and module is not model.get_output_embeddings()
        if not isinstance(targets, list) or name.rsplit(".", 1)[-1] in targets
    )


def samples(data: Data, tokenizer: PreTrainedTokenizerBase, count: int = 2) -> list[dict[str, Any]]:
    """The first rows of each file with their masks, for --check and the report."""
    found = []
    for file in data.files:
        for row in file.rows.select(range(min(count, len(file.rows)))):
            pieces = mask_pieces(tokenizer, row["input_ids"], row["assistant_mask"])
            found.append({"place": f"{file.path}:{row['line']}", "pieces": pieces})
    return found
