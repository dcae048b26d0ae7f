"""Whether conversations may share a row: a small random model of the recipe's own make says it, before data is read.

Each class of transformers has code of its own for what keeps packed conversations apart, and some have none. So two of
them go through a model of the recipe's class, configuration and attention, on the device of the run, and must come out
as they do apart. What decides that stays as it is (kinds of layers, windows, experts, heads); layers that only repeat
others are left out, and widths and the vocabulary are divided, so that it takes a second and no weights.

Equal logits are enough. Both ways compute the same function of the weights, made of analytic pieces, or they do not;
functions that agree at random weights agree everywhere, and so do their gradients. (The tests of
sft/training/attention.py compare gradients too.)
"""

import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.model.load import load_config
from sft.model.machine import local_device
from sft.model.source import first_line
from sft.recipe import Recipe
from sft.training import parallel
from sft.training.attention import attention_per_conversation

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
VOCABULARY = 128
TOKENS = 10  # of a conversation; more than a short convolution spans
WIDTH = 128  # what hidden_size is brought to, or below
MAX_WEIGHTS = 100e6
# Of exact classes packed and apart differ by 2e-6 of what they differ by as one conversation, in float32; TF32 and
# float16 round a thousand times as much. The least that any class leaks is 1e-1 (docs/packing.md).
TOLERANCE = 1e-2
# Keys of a configuration that say how wide something is. Ratios stay, and so do counts (heads, experts, layers).
_IS_WIDTH = re.compile(
    r"(size|dims?|rank|width|channels|headdim|d_(model|ff|kv|head|state|ssm|inner)|dff|n_embd|n_inner)$"
)
_IS_NO_WIDTH = re.compile(r"window|attention_chunk|block|patch|image|crop|group|kernel|position|codebook|feat")


@dataclass(frozen=True)
class Finding:
    """What a probe found.

    exact: packed conversations come out as they do apart; None: the probe does not show it.
    text: the same for a person.
    off: how far packed logits are from the same apart, as a share of how far other tokens in the first conversation
        move the second's where both are taken for one; None: nothing came out.
    """

    exact: bool | None
    text: str
    off: float | None = None
    seconds: float = 0.0


def decide(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Whether the rows are packed, and a line that says why; it is empty where there is nothing to say.

    Raises: RecipeError: dataset.packing is true, and packed conversations would not be what they are apart.
    """
    asked = recipe.dataset.packing
    if asked is False:
        return False, ""
    if gpus := parallel.context_parallel_gpus():  # true is refused with it: parallel.refuse_layouts
        return False, f"rows are not packed: context parallelism over {gpus} GPUs lets conversations see each other"
    config = load_config(recipe)
    collate = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer)
    found = probe(config, collate, local_device(recipe), _how_to_build(recipe))
    if found.exact:
        return True, f"rows are packed: {found.text}"
    if asked == "auto":
        return False, f"rows are not packed: {found.text}"
    if found.exact is None:  # what decides then is leak_of_packed_rows, of the model itself
        return True, f"rows are packed if the model itself lets them, which is tried before it trains: {found.text}"
    raise recipe.error("dataset.packing", f"is true, but {found.text}; set it to auto or false")


def _how_to_build(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of AutoModelForCausalLM.from_config."""
    return {
        key: recipe.model_init[key] for key in ("attn_implementation", "trust_remote_code") if key in recipe.model_init
    }


def probe(
    config: PretrainedConfig, collate: Collate, device: str = "cpu", options: dict[str, Any] | None = None
) -> Finding:
    """Compares packed with apart in a small random model.

    Args:
        config: of the model itself.
        collate: makes the batch, as of the rows that will be trained on.
        options: as AutoModelForCausalLM.from_config takes them.
    """
    begun = time.perf_counter()
    made = _runnable(config, device, options or {})
    found = Finding(None, made) if isinstance(made, str) else _compare(*made, collate)
    return Finding(found.exact, found.text, found.off, time.perf_counter() - begun)


def _runnable(
    config: PretrainedConfig, device: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, torch.Tensor] | str:
    """The narrowest small model that is built and runs, and its logits of the conversations apart; else why not.

    A width may not be divided at will: rotary positions ask for an even one, kernels for a multiple of 8.
    """
    width = getattr(config.get_text_config(decoder=True), "hidden_size", None) or WIDTH
    by = 1 << max(0, (int(width) - 1) // WIDTH).bit_length()
    first = ""
    for divisor, cut in ((divisor, cut) for divisor in (by, by // 2, by // 4) if divisor for cut in (True, False)):
        try:
            model: Any = small_model(config, divisor, cut, options)
            model.to(device)
            logits = _logits(model, input_ids=_conversations())
        except Exception as error:  # whatever the class says of widths or layers that it was not made for
            first = first or first_line(error)
            continue
        if torch.isfinite(logits).all():
            return model, logits
        first = first or "its logits are no numbers"
    return f"no small model of type {config.model_type} could be made to try it ({first})"


def small_model(config: PretrainedConfig, by: int, cut: bool, options: dict[str, Any]) -> PreTrainedModel:
    """A random model of the configuration's class, on the CPU, in training without dropout.

    Weights are so large that attention mixes what it sees, whatever initializer_range says.

    Args: by: what widths are divided by. cut: leave out layers that only repeat others.
    Raises: ValueError: it would still be large; what else the class raises.
    """
    dtype = torch.float16 if "flash" in str(options.get("attn_implementation")) else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(narrowed(config, by), dtype=dtype, **options)
    if cut:
        _cut_layers(model)
    if (weights := sum(p.numel() for p in model.parameters())) > MAX_WEIGHTS:
        raise ValueError(f"it would have {weights:,} weights")
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()  # a few classes leave a bias or a buffer as it is
        model.init_weights()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model.train()


def narrowed(config: PretrainedConfig, by: int) -> PretrainedConfig:
    """A copy with widths divided, a small vocabulary and no dropout; the parts of a model of several are done too."""
    config = copy.deepcopy(config)
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            value = narrowed(value, by)
        elif isinstance(value, float) and ("drop" in key or "jitter" in key):
            value = 0.0
        elif "vocab" in key and type(value) is int:
            value = min(value, VOCABULARY)
        elif key.endswith(("token_id", "token_index")):
            value = None if value is None else 0
        elif key in ("rope_parameters", "rope_scaling"):
            value = _with_fewer_frequencies(value, by)
        elif _IS_WIDTH.search(key) and not _IS_NO_WIDTH.search(key):
            value = [_divided(each, by) for each in value] if isinstance(value, list) else _divided(value, by)
        else:
            continue
        setattr(config, key, value)
    return config


def _with_fewer_frequencies(rope: Any, by: int) -> Any:
    """Of the lists that have a factor for each frequency (Phi-3's longrope) every by-th; mrope_section stays."""
    if isinstance(rope, dict):
        return {key: _with_fewer_frequencies(value, by) for key, value in rope.items()}
    return rope[::by] if isinstance(rope, list) and len(rope) > 4 else rope


def _divided(value: Any, by: int) -> Any:
    return max(1, value // by) if type(value) is int and value > 16 else value


def _cut_layers(model: PreTrainedModel) -> None:
    """Keeps of each stack as many layers as it takes to have all their kinds, and two at least."""
    configs = [part for part in [model.config, *vars(model.config).values()] if isinstance(part, PretrainedConfig)]
    for layers in _stacks(model):
        lists = [
            value
            for config in configs
            for value in vars(config).values()
            if isinstance(value, list) and len(value) == len(layers) and len({*map(str, value)}) < len(value)
        ]
        kinds = [(_kind(layer), *(str(each[at]) for each in lists)) for at, layer in enumerate(layers)]
        del layers[max(2, max(map(kinds.index, kinds), default=0) + 1) :]


def _stacks(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """The outermost lists of modules; what lies inside of one, such as experts, is a layer's own."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)


def _kind(layer: torch.nn.Module) -> Any:
    """What layers of a kind have in common: the classes of their parts, and what these were told but for numbers."""
    return tuple(
        (
            name,
            type(part).__name__,
            *(v if isinstance(v, str | bool) else type(v).__name__ for v in vars(part).values()),
        )
        for name, part in layer.named_modules()
    )


def _conversations() -> torch.Tensor:
    """Three conversations, (3, TOKENS)."""
    return torch.randint(3, VOCABULARY // 2, (3, TOKENS), generator=torch.Generator().manual_seed(1))


def _compare(model: PreTrainedModel, apart: torch.Tensor, collate: Collate) -> Finding:
    """Two conversations packed against the same apart; a third in the place of the first shows what a leak would be."""
    name = type(model).__name__
    first, second, other = _conversations().tolist()
    alone = _logits(model, input_ids=torch.tensor([first + second, other + second]))[:, TOKENS:]
    moved = (alone[0] - alone[1]).abs().max()
    if not moved > TOLERANCE * apart.abs().max():
        return Finding(None, f"a small {name} that is to show it does not look at earlier tokens")

    def packed(*conversations: list[int]) -> torch.Tensor:
        row = {"input_ids": sum(conversations, []), "seq_lengths": [TOKENS] * 2, "assistant_mask": [1] * 2 * TOKENS}
        batch = collate([row])
        del batch["labels"]
        with attention_per_conversation(model):
            return _logits(model, **batch).view(2, TOKENS, -1)

    try:
        together = packed(first, second)
    except Exception as error:  # transformers refuses it, the class does not know these keys, a kernel does not run
        return Finding(False, f"{name} takes no packed rows here: {first_line(error)}")
    off = float((together - apart[:2]).abs().max() / moved)
    if off < TOLERANCE:
        return Finding(True, f"conversations share a row, which changes no result (tried in a small {name})", off)
    if (together[1] - packed(other, second)[1]).abs().max() > TOLERANCE * moved:
        return Finding(False, f"{name} lets the conversations of a packed row see each other", off)
    return Finding(False, f"{name} does not count the positions of each packed conversation as it does apart", off)


@torch.no_grad()
def _logits(model: PreTrainedModel, **batch: Any) -> torch.Tensor:
    """float32, (rows, tokens, VOCABULARY)."""
    batch = {key: v.to(model.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    with torch.compiler.set_stance("force_eager"):  # flex attention would be compiled for minutes
        return model(**batch, use_cache=False).logits.float()
