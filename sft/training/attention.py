"""Attention within each conversation of a packed batch, without a (tokens x tokens) mask.

A packed batch is one row: conversations of 3, 2 and 4 tokens lie one after another in (1, 9). Under sdpa transformers
keeps them apart by a mask that is drawn in full, 9 x 9 here, while all that is needed is where each begins and ends:

    tokens         a a a b b c c c c
    position_ids   0 1 2 0 1 0 1 2 3
    cu_seq_lens_q  0     3   5       9     # tokens before each conversation, and their sum: int32, (4,)
    scores         3 x 3, 2 x 2 and 4 x 4: 29 of the 81

`attention_per_conversation` puts such an attention into a model while it trains. In everything else it is the sdpa of
transformers (padded batches, generation with a cache, images), or on a CPU in bfloat16 what is faster than it.

Flash attention reads cu_seq_lens_q and flex attention the position ids; a model that uses one of them stays as it is.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sft.model.lora import base_of

# The name in `config._attn_implementation`. Models look for "flash", "sdpa", "flex" and "eager" in it: it has none.
NAME = "per_conversation"
SDPA, SDPA_MASK = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]

# On a CPU torch's kernel for bfloat16 takes twice as long as plain products of matrices. These keep the weights of all
# pairs of tokens for the backward pass, as the kernel does not, and so are taken up to this many tokens only.
SHORT = 1024
BLOCK = 256  # queries at a time: what lies ahead of all of them is not computed

# cu_seq_lens_q of the batch that is in the model. A mask function is not told it, and the position ids, of which
# transformers makes its dense mask, are not told by every model: gpt-oss does not, and its packed rows leak.
_cu_seq_lens: ContextVar[torch.Tensor | None] = ContextVar("cu_seq_lens", default=None)

Rule = Callable[..., torch.Tensor]  # indexes of row, head, query and key -> bool: whether that query sees that key


@contextmanager
def attention_per_conversation(model: Any) -> Iterator[bool]:
    """While it is open, packed rows cost a language model no dense mask; afterwards the model is as it was.

    It keeps out where it could not be exact: another attention than sdpa was chosen, or the class has an attention of
    its own. There transformers draws its dense mask from the position ids.

    Args: model: a transformers model, with or without peft's adapters on it.
    Yields: whether the model uses it.
    """
    whole = base_of(model)
    decoder = _decoder(whole)
    before = decoder.config._attn_implementation
    if before == "sdpa" and not _works_on_masks(decoder) or before == "eager" and _is_eager_for_want_of_sdpa(decoder):
        decoder.set_attn_implementation(NAME)  # only warns where the class has an attention of its own
    used = decoder.config._attn_implementation == NAME
    # All parts, since peft, trl's fused head and some classes (OPT) call an inner one and not the whole.
    parts = [part for part in whole.modules() if isinstance(part, PreTrainedModel)] if used else []
    hooks = [part.register_forward_pre_hook(_note_batch, with_kwargs=True) for part in parts]
    hooks += [part.register_forward_hook(_forget_batch, with_kwargs=True, always_call=True) for part in parts]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()
        if used:
            decoder.set_attn_implementation(before)


def _decoder(whole: PreTrainedModel) -> PreTrainedModel:
    """The outermost module that the language model's configuration belongs to; an image encoder has its own."""
    config = whole.config.get_text_config(decoder=True)
    owners = (part for part in whole.modules() if isinstance(part, PreTrainedModel) and part.config is config)
    return next(owners, whole)


def _is_eager_for_want_of_sdpa(decoder: PreTrainedModel) -> bool:
    """Whether sdpa lacks only a soft cap or sinks, as for Gemma 2 and gpt-oss; flash attention has both."""
    return decoder._supports_flash_attn and not decoder._supports_sdpa


def _works_on_masks(decoder: PreTrainedModel) -> bool:
    """Whether the model's code adds to its masks (Doge, Inkling) and so needs them drawn.

    Read from the source, as transformers reads there whether a class takes attention functions at all.
    """
    try:
        source = inspect.getsource(sys.modules[type(decoder).__module__])
    except (OSError, TypeError, KeyError):  # a class that was made in a notebook
        return True
    return any(word in source for word in ("allow_is_causal_skip", "position_bias", "attention_mask.dtype"))


def _note_batch(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("cu_seq_lens_q") is not None:
        _cu_seq_lens.set(kwargs["cu_seq_lens_q"])


def _forget_batch(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if kwargs.get("cu_seq_lens_q") is not None:
        _cu_seq_lens.set(None)


def leak_of_packed_rows(
    model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], own_attention: bool = True
) -> str | None:
    """Tries on the model itself, as it will train, whether packed conversations see each other.

    The logits of the second of two conversations must not change with the tokens of the first. They do in recurrent
    layers that lack their kernels (Qwen3.5, where transformers says so) or have none for this (Jamba, RecurrentGemma),
    and in Bloom and MPT, whose masks are told no positions.

    Args:
        collate: makes the batch, as of the rows that will be trained on.
        own_attention: whether it trains in `attention_per_conversation`.
    Returns: what is wrong; None where they stay apart.
    """
    logits = []
    for first in ([3, 4, 5, 6], [7, 8, 9, 10]):
        batch = collate([{"input_ids": [*first, 11, 12, 13, 14], "assistant_mask": [1] * 8, "seq_lengths": [4, 4]}])
        del batch["labels"]
        try:
            with attention_per_conversation(model) if own_attention else nullcontext():
                logits.append(_logits(model, batch)[0, 4:8])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers refuses it, the class does not know these keys, a kernel does not run
            return str(error)
    change = (logits[0] - logits[1]).abs().max()
    # Equal but for rounding, since experts (MoE) get other tokens beside these; a trained model leaks more.
    if change > torch.finfo(change.dtype).eps ** 0.5 * logits[0].abs().max():
        return f"{type(model).__name__} lets the conversations of a packed row see each other"
    return None


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    training = model.training
    batch = {key: v.to(model.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    model.eval()  # without dropout
    try:
        return model(**batch, use_cache=False).logits
    finally:
        model.train(training)


# ------------------------------------------------------------------------------------------------------------ the mask


class Conversations:
    """Where the conversations of a packed row lie; it goes to the attention in the place of a mask.

    Args:
        lengths: tokens of each conversation.
        window: how many tokens a token sees, itself included; None: all before it.
        device: of the row.
    """

    def __init__(self, lengths: list[int], window: int | None, device: torch.device | str):
        self.lengths = lengths
        self.longest = max(lengths)
        self.window = window if window is not None and window < self.longest else None
        self.device = device
        self._bands: dict[int, torch.Tensor] = {}

    @cached_property
    def cu_seq_lens(self) -> torch.Tensor:
        """int32, (conversations + 1,)."""
        return torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(self.device)

    def band(self, length: int) -> torch.Tensor | None:
        """The mask of a conversation that is longer than the window, bool, (1, 1, length, length); else None."""
        if self.window is None or length <= self.window:
            return None
        if length not in self._bands:
            causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            self._bands[length] = causal.triu(1 - self.window)[None, None]
        return self._bands[length]


def conversation_mask(**asked: Any) -> torch.Tensor | Conversations | None:
    """The mask function: `Conversations` for a packed row, else sdpa's mask.

    Args: what transformers.masking_utils asks of a mask function; `mask_function` is the rule.
    """
    rule, tokens, ends = asked["mask_function"], asked["q_length"], _cu_seq_lens.get()
    if asked["batch_size"] != 1 or asked["kv_length"] != tokens or torch.compiler.is_compiling():
        return SDPA_MASK(**asked)
    at = torch.arange(tokens, device=asked.get("device", "cpu"))
    if ends is not None and ends[-1] == tokens:
        number = torch.searchsorted(ends.to(at), at, right=True)  # of the conversation that a token is in
        asked["mask_function"] = lambda row, head, query, key: (
            rule(row, head, query, key) & (number[query] == number[key])
        )
        asked["allow_is_causal_skip"] = asked.get("allow_is_causal_skip", True) and len(ends) == 2
        if asked["attention_mask"] is not None and asked["attention_mask"].all():
            asked["attention_mask"] = None  # of ones, which some models (BioGPT) make themselves
    if asked["attention_mask"] is not None:
        return SDPA_MASK(**asked)
    if asked.get("local_size") == 0:
        return None  # nothing could be seen: Qwen2-MoE asks for this mask too, for none of its layers
    if asked.get("use_vmap"):  # the model has a rule of its own, which need not take many indexes at once
        return SDPA_MASK(**asked)
    found = _conversations(asked["mask_function"], at, asked.get("local_size"))
    if found is None or len(found.lengths) == 1 and found.window is None:
        return SDPA_MASK(**asked)
    return found


def _conversations(rule: Rule, at: torch.Tensor, window: int | None) -> Conversations | None:
    """Reads the conversations out of the rule by which the dense mask would be drawn.

    One begins where a token does not see the token before it:

        token     0 1 2 3 4 5 6 7 8
        begins    x     x   x         -> lengths 3, 2, 4

    So the rule is asked for 9 pairs and not for 81. Then it is asked at the edges of what it should allow: that token 7
    sees 5, the first of its conversation, and neither 4 nor 8. Chunks of attention (Llama 4) come out as conversations.

    Args:
        at: (tokens,), 0 and on: the indexes to ask for.
        window: as the model tells it.
    Returns: None where the rule is not that of causal attention in a window.
    """

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(query)
        return rule(zero, zero, query, key)

    begins = torch.cat([at[:1] == 0, ~sees(at[1:], at[:-1])])
    first = torch.where(begins, at, 0).cummax(0).values  # of the conversation that a token is in
    furthest = first if window is None else first.maximum(at - window + 1)
    beyond = (furthest - 1).clamp(min=0)
    too_little = ~sees(at, furthest)
    too_much = sees(at, beyond) & (beyond < furthest)
    ahead = sees(at[:-1], at[1:])
    if torch.cat([too_little, too_much, ahead]).any():
        return None
    edges = [*begins.nonzero().squeeze(1).tolist(), len(at)]
    lengths = [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return Conversations(lengths, window, at.device)


# ------------------------------------------------------------------------------------------------------- the attention


def conversation_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Conversations | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    products: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: of a packed row torch's varlen_attn where it can, else attention of each conversation.

    Args:
        query: (rows, heads, tokens, head_dim); key, value: of as many heads, or of fewer, each for a group of queries.
        attention_mask: what `conversation_mask` gave.
        scaling: of the scores; None: 1 / sqrt(head_dim).
        softcap: scores come no higher, by tanh (Gemma 2).
        s_aux: (heads,); a score beside those of the tokens, from which nothing is read (the sinks of gpt-oss).
        products: False: never as plain products of matrices because these are faster.
        kwargs: is_causal, and what sdpa has no use for, as sliding_window: the mask tells it.
    Returns: (rows, tokens, heads, head_dim), and no weights.
    """
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    query, key, value = _as_autocast(query, key, value)
    must_be_plain = softcap is not None or s_aux is not None
    if must_be_plain:
        options |= {"softcap": softcap, "s_aux": s_aux}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        is_plain = must_be_plain or products and dropout == 0 and _plain_is_faster(module, q, k, mask, **options)
        attention: Callable[..., tuple[torch.Tensor, None]] = _plain_attention if is_plain else SDPA
        return attention(module, q, k, v, mask, **options)[0]

    if not isinstance(attention_mask, Conversations):
        return attend(query, key, value, attention_mask), None
    if not must_be_plain and dropout == 0 and _varlen_takes(query, key, value):
        return _varlen(query, key, value, attention_mask, scaling), None
    options["is_causal"] = True
    apart = zip(*(states.split(attention_mask.lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v, attention_mask.band(q.shape[2])) for q, k, v in apart], dim=1), None


def _plain_is_faster(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **_: Any,
) -> bool:
    """On a CPU in bfloat16, without a cache: where attention is causal, or a short row has a mask of its own."""
    tokens = query.shape[2]
    if query.device.type != "cpu" or query.dtype is not torch.bfloat16 or tokens == 1 or tokens != key.shape[2]:
        return False
    if mask is not None:
        return mask.dtype is torch.bool and tokens <= BLOCK
    return tokens <= SHORT and (getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as products of matrices; arguments and result are those above. mask: bool; None: causal."""
    rows, heads, tokens, width = query.shape
    groups, seen = key.shape[1:3]
    query = query * (width**-0.5 if scaling is None else scaling)
    query = query.view(rows, groups, heads // groups, tokens, width)
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, tokens, BLOCK):
            block = query[:, :, :, start : start + BLOCK]
            length = block.shape[3]
            # Without a mask a single token sees the cache, and more see no key after themselves: an empty cache's.
            last = start + length if mask is None and tokens > 1 else seen
            scores = block.flatten(2, 3) @ key[:, :, :last].transpose(2, 3)  # (rows, groups, heads x queries, keys)
            scores = scores.view(rows, groups, -1, length, last)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if mask is not None:
                scores = scores.masked_fill(~mask[:, :, None, start : start + length], torch.finfo(scores.dtype).min)
            else:  # added, since the gradient of a sum costs nothing
                scores = scores + scores.new_full((length, last), -torch.inf).triu(last - length + 1)
            if s_aux is not None:
                sinks = s_aux.to(scores.dtype).view(1, groups, -1, 1, 1).expand(*scores.shape[:4], 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(-1)[..., :last]
            weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
            parts.append((weights.flatten(2, 3) @ value[:, :, :last]).unflatten(2, (-1, length)))
    return torch.cat(parts, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None


def _as_autocast(*states: torch.Tensor) -> Iterator[torch.Tensor]:
    """In the dtype that autocast gives sdpa; it does not know varlen_attn."""
    kind = states[0].device.type
    return (s.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else s for s in states)


def _varlen_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash kernel runs here: half precision, a head_dim of 8, 16, ... 256, a GPU from Ampere on."""
    if not query.is_cuda or query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        return False
    grouped = query.shape[1] != key.shape[1]
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)
    return torch.backends.cuda.can_use_flash_attention(asked)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Conversations, scaling: float | None
) -> torch.Tensor:
    ends = rows.cu_seq_lens.to(query.device)  # with a device_map a later layer may be on another GPU than the mask
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, head_dim)
    grouped = query.shape[1] != key.shape[1]
    # Tokens to be seen before the token itself and after it; -1: all.
    window = (-1 if rows.window is None else rows.window - 1, 0)
    longest = rows.longest
    out: Any = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
    return out[None]


AttentionInterface.register(NAME, conversation_attention)
AttentionMaskInterface.register(NAME, conversation_mask)
