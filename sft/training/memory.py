"""The memory that a run will ask for, found by doing a training step on tensors that have sizes but no contents.

Model, forward and backward are the real ones on torch's fake tensors, and all storages that are alive are counted: so
the activations of any architecture, the copies that autocast makes and gradients in the making are in. What the step
on a GPU does otherwise is computed: quantised weights, trl's fused loss and the optimizer.

Measured on a CPU: what a process held at most in two steps above what it held before (`python benchmarks/memory.py`; 8
layers, hidden 512, vocabulary 32,000, 4 rows of 512 tokens), beside this estimate, MB; and what the first case and the
fourth held while the loss had float32 copies of the logits:

    case                                  measured   estimate   before
    LoRA, packed                               281   252 -10 %     534
    LoRA, not packed                           291   252 -13 %
    LoRA, not packed, without checkpointing    717   690  -4 %
    LoRA, packed, vocabulary of 151,936        891   866  -3 %    2120
    full fine-tuning, packed                   743   784  +5 %
"""

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sft import processes
from sft.model.lora import base_of, takes_logits_to_keep
from sft.model.machine import autocast_dtype, default_dtype, use_cpu
from sft.model.source import first_line
from sft.recipe import Recipe
from sft.training.arguments import pads_rows
from sft.training.attention import conversation_attention
from sft.training.check import with_lora
from sft.training.lora_sum import lora_in_one_sum
from sft.training.loss import entries_at_a_time
from sft.training.parallel import sharding
from sft.training.triton_probe import why_triton_fails

# Tokens, and entries of the vocabulary, of which trl 1.16 makes logits at a time (trl/kernels/chunked_logprob.py).
TILE = (4096, 32768)
ONE_MOMENT, NO_MOMENT = ("lion", "rmsprop", "adagrad"), ("sgd", "adafactor")


# By is_causal alone: transformers cannot see of fake tensors that they need no mask, and would draw one.
CAUSAL, WITHOUT_PRODUCTS = "causal_without_mask", "causal_without_mask_and_products"
AttentionInterface.register(CAUSAL, conversation_attention)
AttentionInterface.register(WITHOUT_PRODUCTS, partial(conversation_attention, products=False))
AttentionMaskInterface.register(CAUSAL, lambda **_: None)
AttentionMaskInterface.register(WITHOUT_PRODUCTS, lambda **_: None)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive among those made while it is open, and their peak; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def estimate_memory(recipe: Recipe, model: PreTrainedModel, own_loss: bool) -> dict[str, int]:
    """Bytes at the peak of a training step by what they are for; rows are of max_length, half of their tokens labelled.

    Of a sharded run (FSDP, DeepSpeed): what one process would hold that had everything.

    Args:
        model: without weights.
        own_loss: the loss is that of sft/training/trainer.py, as on a CPU, and not trl's fused one.
    Raises: RecipeError: peft refuses lora_config. RuntimeError and others: the model's code asks for contents.
    """
    return _parts(recipe, model, training_step(recipe, model, own_loss))


def _parts(recipe: Recipe, model: PreTrainedModel, step: LiveBytes) -> dict[str, int]:
    parts = kept_bytes(recipe, model)
    if processes.count() > 1 and sharding(recipe) is None:
        parts["DDP buckets"] = parts["gradients"]
    activations = step.peak - parts["gradients"]
    parts["activations and logits"] = activations + _mask_bytes(recipe, model) + _unpacked_bytes(recipe, model)
    return parts


def kept_bytes(recipe: Recipe, model: PreTrainedModel) -> dict[str, int]:
    """Bytes that stay from step to step: weights, the adapter beside them, gradients, the optimizer's moments."""
    trained = [p for p in _as_trained(recipe, model).parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    adapter = {} if recipe.trains_all_weights else {"adapter": gradients}
    moments = _moment_bytes(recipe, trained)
    return {"weights": _weight_bytes(recipe, model), **adapter, "gradients": gradients, "moments": moments}


def _as_trained(recipe: Recipe, model: PreTrainedModel) -> Any:
    """A copy of the model with the weights that train, in the dtypes that sft/training/trainer.py gives them."""
    made = copy.deepcopy(model) if recipe.trains_all_weights else with_lora(recipe, model)
    for parameter in made.parameters():
        if parameter.requires_grad and autocast_dtype(recipe) is torch.float16:
            parameter.data = parameter.data.float()
        elif parameter.requires_grad and recipe.quantization_config:
            parameter.data = parameter.data.bfloat16()
    return made


def _bits(recipe: Recipe) -> int | None:
    quantised = recipe.quantization_config or {}
    return 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else None


def _linear_sizes(model: PreTrainedModel) -> list[int]:
    """Weights of each linear layer that bitsandbytes quantises: all but the head, without biases."""
    head = model.get_output_embeddings()
    return [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def _weight_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """In 4 bits half a byte each, and for every 64 a scale of 4 bytes; with double quantisation of 1, and 4 for 256."""
    total, linear, bits = sum(p.numel() for p in model.parameters()), sum(_linear_sizes(model)), _bits(recipe)
    if bits is None:
        return total * model.dtype.itemsize
    scale = 1 + 4 / 256 if (recipe.quantization_config or {}).get("bnb_4bit_use_double_quant") else 4
    return int(linear * (0.5 + scale / 64 if bits == 4 else 1)) + (total - linear) * model.dtype.itemsize


def _unpacked_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """The largest layer of 4 bits, for as long as it computes."""
    return max(_linear_sizes(model), default=0) * model.dtype.itemsize if _bits(recipe) == 4 else 0


def _moment_bytes(recipe: Recipe, trained: list[torch.nn.Parameter]) -> int:
    """AdamW's two moments in each weight's own dtype; in float32 or of 1 byte where bitsandbytes keeps them."""
    optim = str(recipe.training_args.get("optim", ""))
    count = 0 if optim.startswith(NO_MOMENT) else 1 if any(name in optim for name in ONE_MOMENT) else 2
    width = 1 if "8bit" in optim else 4 if "32bit" in optim else None
    return sum(count * (p.numel() * width if width else p.nbytes) for p in trained)


def _mask_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """Of padded rows: a mask of (rows, tokens, tokens), and sdpa's copy in each layer whose activations are kept.

    Left out: models that would let rows see each other, were these not padded, which only a trial of the model tells.
    """
    args, length = recipe.training_args, recipe.dataset.max_length
    rows = int(args.get("per_device_train_batch_size", 8))
    attention = recipe.model_init.get("attn_implementation", "sdpa")
    if recipe.dataset.packing or rows == 1 or attention != "sdpa" or not pads_rows(recipe):
        return 0
    copies = 1 if args.get("activation_checkpointing", True) else model.config.get_text_config().num_hidden_layers
    width = (autocast_dtype(recipe) or model.dtype).itemsize
    return rows * length**2 * (1 + copies * width)


# ---------------------------------------------------------------------------------------------------- without contents


@contextmanager
def _without_contents(model: Any, products: bool) -> Iterator[LiveBytes]:
    """The model on fake tensors of the CPU; counted is what is made beside its weights.

    products: whether attention may be products of matrices (sft/training/attention.py).
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints the trace of what it also raises
    log.disabled = True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
            model.to_empty(device="cpu")
            base_of(model).tie_weights()
            if base_of(model).config._attn_implementation == "sdpa":
                base_of(model).set_attn_implementation(CAUSAL if products else WITHOUT_PRODUCTS)
            memory.live = memory.peak = 0
            yield memory
    finally:
        log.disabled = False


def _keep(model: Any, count: int) -> dict[str, Any]:
    """The argument by which only so many positions are projected to the vocabulary, where the model's class has it."""
    return {"logits_to_keep": torch.arange(count)} if takes_logits_to_keep(model) else {}


def batch_tokens(recipe: Recipe) -> int:
    """Tokens of the batch of `training_step`."""
    return int(recipe.training_args.get("per_device_train_batch_size", 8)) * recipe.dataset.max_length


def training_step(recipe: Recipe, model: PreTrainedModel, own_loss: bool) -> LiveBytes:
    """Forward and backward of a batch: the peak of what is made beside the weights, gradients included; FLOPs.

    Args and errors: as `estimate_memory`.
    """
    return _step(recipe, _as_trained(recipe, model), own_loss)


def _step(recipe: Recipe, model: Any, own_loss: bool) -> LiveBytes:
    args, autocast = recipe.training_args, autocast_dtype(recipe)
    rows, length = int(args.get("per_device_train_batch_size", 8)), recipe.dataset.max_length
    if recipe.dataset.packing:
        rows, length = 1, rows * length
    model.train()
    if args.get("activation_checkpointing", True):
        base_of(model).activation_checkpointing_enable({"use_reentrant": False})
    if not recipe.trains_all_weights:
        model.enable_input_require_grads()
    # The lengths of packed conversations are not known: the weights that a CPU keeps of their attention are left out.
    products = own_loss and use_cpu(recipe) and not recipe.dataset.packing
    with _without_contents(model, products) as memory, lora_in_one_sum(model):
        if int(args.get("gradient_accumulation_steps", 1)) > 1:  # a batch finds the gradients of the one before
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            keep = _keep(model, max(1, length // 2) if own_loss else 1)
            logits = model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False, **keep).logits
        # Like our loss it keeps the logits, and makes a gradient of their size.
        loss = (logits * logits.detach()).sum()
        if own_loss:
            part = torch.empty(min(logits.numel(), entries_at_a_time(use_cpu(recipe))))  # noqa: F841 - it is counted
        else:
            torch.empty(_fused_loss_bytes(model, rows * length // 2, autocast), dtype=torch.uint8)
        del logits
        loss.backward()
        return memory


def _fused_loss_bytes(model: Any, labels: int, autocast: torch.dtype | None) -> int:
    """A tile of logits, the weights for it, and float32 gradients of the hidden states and of a head that trains."""
    weight = base_of(model).get_output_embeddings().weight
    vocabulary, hidden = weight.shape
    width = (autocast or weight.dtype).itemsize
    tokens, entries = min(labels, TILE[0]), min(vocabulary, TILE[1])
    head = weight.numel() * 4 if weight.requires_grad and weight.dtype is not torch.float32 else 0
    return (tokens + hidden) * entries * width + labels * hidden * 4 + head


def scoring_bytes(recipe: Recipe, model: PreTrainedModel, longest: int) -> int:
    """Bytes while answers are generated after training, for a batch whose longest prompt has so many tokens.

    The optimizer is gone by then; in full fine-tuning the base is beside the tuned model.
    """
    trained_model, options = _as_trained(recipe, model), recipe.evaluation
    weights = _weight_bytes(recipe, model) + sum(p.nbytes for p in trained_model.parameters() if p.requires_grad)
    if recipe.trains_all_weights:
        trained_model.to(default_dtype(recipe, training=False))
        weights = 2 * sum(p.nbytes for p in trained_model.parameters())
    length = longest + int(options.generation.get("max_new_tokens", 0))
    trained_model.eval()
    with _without_contents(trained_model, products=False) as memory, torch.no_grad():
        ids = torch.zeros(options.batch_size, length, dtype=torch.long)
        trained_model(input_ids=ids, use_cache=True, **_keep(trained_model, 1))
        return weights + memory.peak + _unpacked_bytes(recipe, model)


# ------------------------------------------------------------------------------------------------------- the terminal


class Needs(NamedTuple):
    """Bytes of a run. parts: of a training step, by what they are for; scoring: while answers are generated.

    flops: of a training step, a token; None: they cannot be told. unknown: why, and why `parts` lacks the activations.
    """

    parts: dict[str, int]
    scoring: int
    flops: float | None
    unknown: str

    @property
    def most(self) -> int:
        return max(sum(self.parts.values()), self.scoring)


def needs(recipe: Recipe, model: PreTrainedModel, on_cpu: bool, longest: int) -> Needs:
    """What a run will ask for. longest: tokens of the longest row, of which a prompt of the test split may be."""
    own_loss = _is_shared(on_cpu) or why_triton_fails() is not None
    parts: dict[str, int] = {}
    flops, scoring, unknown = None, 0, ""
    try:
        step = training_step(recipe, model, own_loss)
        flops, parts = step.flops / batch_tokens(recipe), _parts(recipe, model, step)
        scoring = scoring_bytes(recipe, model, longest) if recipe.dataset.test is not None else 0
    except Exception as error:  # whatever the code of a model's class says when it is given no contents
        parts = parts or kept_bytes(recipe, model)
        unknown = f"{type(model).__name__} needs contents ({first_line(error)})"
    return Needs(parts, scoring, flops, unknown)


def free_bytes(on_cpu: bool) -> int:
    """Memory that is free where the model will be."""
    return psutil.virtual_memory().available if _is_shared(on_cpu) else torch.cuda.mem_get_info()[0]


def _is_shared(on_cpu: bool) -> bool:
    return on_cpu or not torch.cuda.is_available()  # Apple's GPUs use the machine's own memory


def memory_line(recipe: Recipe, model: PreTrainedModel, on_cpu: bool, needed: Needs) -> tuple[str, bool]:
    """The estimate against what the machine has, with what to change; whether it fits."""
    parts, scoring = needed.parts, needed.scoring
    unknown = f", and activations, which cannot be told: {needed.unknown}" if needed.unknown else ""
    where, need, free = "memory" if on_cpu else "GPU memory", needed.most, free_bytes(on_cpu)
    detail = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    detail += f"; while scoring {scoring / 1e9:.1f}" if scoring else ""
    dtype = str(model.dtype).removeprefix("torch.")
    line = f"{where}: about {need / 1e9:.1f} GB needed ({dtype} {detail}){unknown}, {free / 1e9:.1f} GB free"
    if need <= free:
        return line, True
    return f"{line}\nit does not fit; what helps: {_what_helps(recipe, scoring=need > sum(parts.values()))}", False


def _what_helps(recipe: Recipe, scoring: bool) -> str:
    args, advice = recipe.training_args, []
    if scoring:
        return f"evaluation.batch_size below {recipe.evaluation.batch_size}"
    if not args.get("activation_checkpointing", True):
        advice.append("training_args.activation_checkpointing: true")
    if int(args.get("per_device_train_batch_size", 8)) > 1:
        advice.append("training_args.per_device_train_batch_size: 1 (and gradient_accumulation_steps up)")
    if not recipe.quantization_config:
        advice.append("quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4} with lora_config")
    advice.append(f"dataset.max_length below {recipe.dataset.max_length}")
    return "; ".join(advice)
