"""Numbers that must be equal: our loss and trl's, packed conversations and the same apart."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from benchmarks.gpu_checks.line import Line, judged, not_here
from benchmarks.gpu_checks.machine import DEVICE, ON_GPU
from benchmarks.gpu_checks.machine import NAME as DEVICE_NAME
from benchmarks.gpu_checks.models import QWEN_TINY, qwen_tokenizer, recipe_for, small_qwen
from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.data.packing import pack
from sft.data.splits import Data
from sft.model.load import load_model
from sft.model.lora import add_lora
from sft.model.tokenizer import load_tokenizer
from sft.training import attention, trainer
from sft.training.attention import attention_per_conversation
from sft.training.trainer import CompletionTrainer
from sft.training.triton_probe import why_triton_fails

Tensors = dict[str, torch.Tensor]


def relative_difference(found: Tensors, expected: Tensors) -> float:
    """|found - expected| / |expected|, of all tensors as one vector."""
    if found.keys() != expected.keys():
        raise ValueError(f"only one of both has {sorted(found.keys() ^ expected.keys())[:8]}")
    apart = sum((found[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    whole = sum(tensor.double().square().sum() for tensor in expected.values())
    return math.sqrt(apart / whole)


def gradients(model: torch.nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------ the loss

LOSSES = {
    "full fine-tuning in bf16": ["quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch"],
    "LoRA over NF4": ["lora_config.lora_dropout=0"],
}

# bfloat16 rounds to 0.4 %; both losses are sums in float32 of many such numbers.
LOSS_LIMIT, GRADIENT_LIMIT = 2e-3, 0.02


def loss(folder: Path) -> Iterator[Line]:
    """Our loss and trl's fused one, of padded and of packed rows: their values and all gradients."""
    model_folder = small_qwen(folder)
    for part, overrides in LOSSES.items():
        recipe = recipe_for(
            model_folder, "dataset.max_length=256", "dataset.validation=null", "training_args.bf16=true", *overrides
        )
        model = add_lora(load_model(recipe), recipe)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zeros at the start, which would hide the gradients of lora_A
                torch.nn.init.normal_(weight, std=0.02)
        rows = _rows()
        made = trainer.make_trainer(recipe, model, load_tokenizer(recipe), Data(None, rows))
        trls = super(CompletionTrainer, made).compute_loss
        differences = []
        for batch in (rows, pack(rows, 256)):
            inputs = made.data_collator([batch[i] for i in range(len(batch))])
            ours_loss, ours = _loss_and_gradients(made, made.compute_loss, inputs)
            trls_loss, expected = _loss_and_gradients(made, trls, inputs)
            differences.append((abs(ours_loss / trls_loss - 1), relative_difference(ours, expected)))
        of_loss, of_gradients = (max(column) for column in zip(*differences, strict=True))
        way = "without Triton" if not ON_GPU or why_triton_fails() else "by Triton"
        figure = f"to trl's {way}: loss {of_loss:.1e}, gradients {of_gradients:.1e}, relative"
        # Of each, since max() lets a NaN go by.
        holds = all(value < LOSS_LIMIT and grads < GRADIENT_LIMIT for value, grads in differences)
        yield judged(part, holds, figure, loss=of_loss, gradients=of_gradients, limits=[LOSS_LIMIT, GRADIENT_LIMIT])


def _rows() -> datasets.Dataset:
    """Eight rows of unequal length; the second half of each carries loss."""
    generator = torch.Generator().manual_seed(0)
    lengths = [50, 170, 90, 240, 120, 70, 210, 30]
    ids = [torch.randint(3, 600, (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "assistant_mask": [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]}
    )


def _loss_and_gradients(
    made: CompletionTrainer, compute: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[float, Tensors]:
    """compute: a compute_loss; ours is kept from handing over to trl's, as it does on a GPU with Triton."""
    made.model.zero_grad()
    batch = made._prepare_inputs(inputs)
    count = (batch["labels"][:, 1:] != -100).sum()
    with mock.patch.object(made, "_takes_trls_loss", lambda device_type: False), made.accelerator.autocast():
        value = compute(made.model, dict(batch), num_items_in_batch=count)
    value.backward()
    return value.item(), gradients(made.model)


# --------------------------------------------------------------------------------------------------- packed rows

LENGTHS = [[700, 30, 1100], [1, 900]] if ON_GPU else [[30, 5, 50], [1, 40]]


def packing_sdpa(folder: Path) -> Iterator[Line]:
    """In float32 our attention is torch's sdpa, conversation by conversation."""
    return _packing("sdpa", torch.float32, attention_per_conversation)


def packing_varlen(folder: Path) -> Iterator[Line]:
    """In bfloat16 on a GPU our attention is torch's varlen_attn."""
    if not ON_GPU:
        yield not_here("", "varlen_attn is for GPUs from Ampere on")
        return
    with mock.patch.object(attention, "varlen_attn", wraps=attention.varlen_attn) as kernel:
        yield from _packing("sdpa", torch.bfloat16, attention_per_conversation)
        yield judged("is what ran", kernel.called, f"{kernel.call_count} calls on {DEVICE_NAME}")


def packing_flex(folder: Path) -> Iterator[Line]:
    if not ON_GPU:
        yield not_here("", "flex attention does not train on a CPU")
    elif not is_torch_flex_attn_available():
        yield not_here("", "this torch has no flex attention")
    else:
        yield from _packing("flex_attention", torch.bfloat16, nullcontext)


def packing_flash(folder: Path) -> Iterator[Line]:
    if not is_flash_attn_2_available():
        yield not_here("", "flash_attn is not installed")
    else:
        yield from _packing("flash_attention_2", torch.bfloat16, nullcontext)


def _packing(implementation: str, dtype: torch.dtype, opened: Callable[[Any], Any]) -> Iterator[Line]:
    """Packed conversations against the same apart in float32, in logits and gradients.

    They may be off by twice as much as the same apart in `dtype` under plain sdpa are: by rounding. Packed rows with a
    mask of ones, which lets them see each other, show that a leak would be seen.
    """
    model = _model_that_shows_a_leak().to(DEVICE, dtype)
    exact_model = copy.deepcopy(model).float()
    for rows in (1, 2):
        conversations = _conversations()[:rows]
        batch = _packed(conversations)
        apart = [{"input_ids": torch.tensor([ids])} for row in conversations for ids in row]
        expected = _logits_and_gradients(exact_model, apart)
        model.set_attn_implementation("sdpa")
        rounding = max(_differences(_logits_and_gradients(model, apart), expected))
        leaking = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        leak = min(_differences(_logits_and_gradients(model, [leaking]), expected))
        model.set_attn_implementation(implementation)
        with opened(model):
            logits, grads = _differences(_logits_and_gradients(model, [batch]), expected)
        limit = max(2 * rounding, 1e-4)
        figure = f"logits {logits:.1e}, gradients {grads:.1e}, relative, of {limit:.1e} allowed; a leak is {leak:.1e}"
        holds = logits < limit and grads < limit and leak > 3 * limit
        yield judged(f"batch {rows}", holds, figure, logits=logits, gradients=grads, leak=leak, limit=limit)


def _model_that_shows_a_leak() -> Qwen2ForCausalLM:
    """Random weights so large that what a token sees changes what it says."""
    sizes = {**QWEN_TINY, "hidden_size": 512, "num_attention_heads": 4, "vocab_size": 1024} if ON_GPU else QWEN_TINY
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 / math.sqrt(weight.shape[1]))
    return model.train()


def _conversations() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, 600, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]


def _packed(conversations: list[list[list[int]]]) -> dict[str, Any]:
    """The collator's batch of packed rows, without labels."""
    collate = DataCollatorForCompletionOnlyLM(tokenizer=qwen_tokenizer())
    rows = [{"input_ids": sum(row, []), "seq_lengths": [len(ids) for ids in row]} for row in conversations]
    batch = collate([row | {"assistant_mask": [1] * len(row["input_ids"])} for row in rows])
    return {key: value for key, value in batch.items() if key != "labels"}


def _logits_and_gradients(model: Qwen2ForCausalLM, batches: list[dict[str, Any]]) -> tuple[Tensors, Tensors]:
    """Logits of some batches one after another, and the gradients of a fixed mixture of them."""
    model.zero_grad()
    moved = [{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in batches]
    logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in moved]).float()
    mixture = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (logits * mixture).mean().backward()
    return {"logits": logits.detach()}, gradients(model)


def _differences(found: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors]) -> tuple[float, float]:
    return relative_difference(found[0], expected[0]), relative_difference(found[1], expected[1])
