"""Packed conversations never see each other: logits and gradients are those of the same conversations apart.

The batches are the collator's; the models are random and have weights large enough that a leak is seen.
"""

import copy
import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.model.chatglm3 import ChatGLMConfig, ChatGLMForCausalLM
from sft.training import attention
from sft.training.attention import (
    NAME,
    Conversations,
    attention_per_conversation,
    conversation_attention,
    leak_of_packed_rows,
)

VOCABULARY = 97
LENGTHS = [[7, 3, 11], [1, 9]]  # two rows; the windows below are shorter than most of these conversations
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = ["sliding_attention", "full_attention"]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GLM3 = {"num_layers": 2, "ffn_hidden_size": 48, "kv_channels": 8, "seq_length": 128, "padded_vocab_size": VOCABULARY}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GEMMA = {"sliding_window": 4, "layer_types": BOTH, "query_pre_attn_scalar": 8}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=5)),
    "gemma2, window and soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, **GEMMA, attn_logit_softcapping=2.0)),
    "gemma3, window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**TINY, **GEMMA)),
    "gpt_oss, window and sinks": lambda: GptOssForCausalLM(GptOssConfig(**TINY, **MOE, sliding_window=4)),
    "llama4, chunks": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**TINY, **MOE | {"num_experts_per_tok": 1}, attention_chunk_size=4, intermediate_size_mlp=48)
    ),
    "glm": lambda: GlmForCausalLM(GlmConfig(**TINY)),
    "chatglm3": lambda: ChatGLMForCausalLM(ChatGLMConfig(hidden_size=32, num_attention_heads=4, **GLM3)),
    "opt, no positions in its mask": lambda: OPTForCausalLM(
        OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    ),
}
# What transformers itself chooses for a model that sdpa cannot serve.
EAGER = {"gemma2, window and soft cap", "gpt_oss, window and sinks"}


def built(make):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else None
    return model.train()


def conversations(rows=2):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS][
        :rows
    ]


def collator(**options):
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
    return DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **options)


def packed(rows=2, **options):
    """The collator's batch of packed rows, without labels."""
    made = [
        {
            "input_ids": sum(row, []),
            "assistant_mask": [1] * sum(map(len, row)),
            "seq_lengths": [len(ids) for ids in row],
        }
        for row in conversations(rows)
    ]
    return {key: value for key, value in collator(**options)(made).items() if key != "labels"}


def results(model, batches):
    """Logits (tokens, vocabulary) of some batches, and the gradients of a fixed mixture of them."""
    model.zero_grad()
    logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in batches])
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(model, rows=2):
    return results(model, [{"input_ids": torch.tensor([ids])} for row in conversations(rows) for ids in row])


def distance(found, expected):
    """The largest difference of logits, and of gradients."""
    assert found[1].keys() == expected[1].keys()
    steps = [(found[1][name] - expected[1][name]).abs().max().item() for name in expected[1]]
    return (found[0] - expected[0]).abs().max().item(), max(steps)


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_packed_conversations_get_the_logits_and_gradients_they_get_apart(name, rows, checkpointing):
    model = built(MODELS[name])
    expected = apart(model, rows)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with attention_per_conversation(model) as used:
        found = results(model, [packed(rows)])
    assert used
    assert max(distance(found, expected)) < 1e-5
    leaking = {"input_ids": packed(rows)["input_ids"], "position_ids": packed(rows)["position_ids"]}
    leaking["attention_mask"] = torch.ones_like(leaking["input_ids"])
    assert min(distance(results(model, [leaking]), expected)) > 1e-3, "this test would see a leak"


def test_padding_of_a_packed_batch_changes_nothing():
    model = built(MODELS["gemma3, window"])
    with attention_per_conversation(model):
        bare, padded = (model(**packed(pad_to_multiple_of=n), use_cache=False).logits for n in (None, 16))
    assert (bare.shape[1], padded.shape[1]) == (31, 32)
    assert (padded[:, :31] - bare).abs().max() < 1e-5


def states_and_gradients(attend, tokens, dtype=torch.bfloat16, seen=None):
    """Output of an attention and the gradients of query, key and value, of the same numbers in every dtype."""
    torch.manual_seed(0)
    shapes = [(1, heads, length, 16) for heads, length in ((4, tokens), (2, seen or tokens), (2, seen or tokens))]
    states = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    module = LlamaForCausalLM(LlamaConfig(**TINY)).model.layers[0].self_attn
    out = attend(module, *states, None)[0]
    return [found.float() for found in (out, *torch.autograd.grad(out.float().square().sum(), states))]


@pytest.mark.parametrize("tokens", [2, 40, 256, 257, 700, 1024])
def test_in_bfloat16_on_a_cpu_attention_is_products_of_matrices_exact_to_a_rounding(tokens):
    exact = states_and_gradients(attention.SDPA, tokens, torch.float32)
    sdpa = states_and_gradients(attention.SDPA, tokens)
    plain = states_and_gradients(attention.conversation_attention, tokens)
    assert tokens == 2 or not torch.equal(plain[0], sdpa[0]), "it is another way of computing"
    for ours, theirs, right in zip(plain, sdpa, exact, strict=True):
        assert (ours - right).norm() <= torch.finfo(torch.bfloat16).eps * right.norm()
        assert (ours - right).norm() <= 3 * (theirs - right).norm()


@pytest.mark.parametrize(
    ("tokens", "seen", "dtype"),
    [(1025, None, torch.bfloat16), (1, 40, torch.bfloat16), (5, 40, torch.bfloat16), (40, None, torch.float32)],
)
def test_long_conversations_a_cache_and_float32_are_left_to_sdpa(tokens, seen, dtype):
    found = states_and_gradients(attention.conversation_attention, tokens, dtype, seen)
    assert all(map(torch.equal, found, states_and_gradients(attention.SDPA, tokens, dtype, seen)))


@pytest.mark.parametrize("said_by", ["module", "argument"])
def test_a_model_that_looks_ahead_is_left_to_sdpa(said_by):
    def looking_ahead(attend):
        def attend_ahead(module, *args):
            module.is_causal = said_by != "module"
            return attend(module, *args, **({} if said_by == "module" else {"is_causal": False}))

        return states_and_gradients(attend_ahead, 40)

    assert all(map(torch.equal, looking_ahead(attention.conversation_attention), looking_ahead(attention.SDPA)))


def test_each_conversation_is_attended_to_in_the_way_that_is_faster_for_it(monkeypatch):
    lengths = []
    plain = attention._plain_attention
    monkeypatch.setattr(attention, "_plain_attention", lambda *a, **k: lengths.append(a[1].shape[2]) or plain(*a, **k))
    packed_row = attention.Conversations([40, 1025, 1, 700], None, "cpu")
    states_and_gradients(lambda module, q, k, v, _: attention.conversation_attention(module, q, k, v, packed_row), 1766)
    assert lengths == [40, 700]


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"s_aux": torch.tensor([0.1, 2.0, -1.0, 0.5])}, {}])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_change_nothing(options, masked, monkeypatch):
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**TINY)).model.layers[0].self_attn
    shapes = [(2, 4, 20, 16), (2, 2, 20, 16), (2, 2, 20, 24)]  # values may have a width of their own
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    mask = (torch.rand(2, 1, 20, 20) > 0.3).tril() | torch.eye(20, dtype=torch.bool) if masked else None
    found = []
    for block in (3, 256):
        monkeypatch.setattr(attention, "BLOCK", block)
        out = attention._plain_attention(module, *states, mask, 0.0, None, **options)[0]
        found.append([out, *torch.autograd.grad(out.square().sum(), states)])
    for few, all_at_once in zip(*found, strict=True):
        assert torch.allclose(few, all_at_once, atol=1e-5)
    if not options:
        expected = attention.SDPA(module, *states, mask, is_causal=mask is None)[0]
        assert torch.allclose(found[0][0], expected, atol=1e-5)


def test_a_soft_cap_over_an_empty_static_cache_sees_no_empty_places():
    module = LlamaForCausalLM(LlamaConfig(**TINY)).model.layers[0].self_attn
    query, key, value = (torch.randn(1, heads, tokens, 16) for heads, tokens in ((4, 5), (2, 9), (2, 9)))
    found = attention.conversation_attention(module, query, key, value, None, softcap=50.0)[0]
    expected = attention.conversation_attention(module, query, key[:, :, :5], value[:, :, :5], None, softcap=50.0)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen2", "gemma2, window and soft cap"])
def test_conversations_in_bfloat16_under_autocast_stay_apart(name):
    model = built(MODELS[name])
    with torch.autocast("cpu", torch.bfloat16), attention_per_conversation(model):
        found = results(model, [packed()])
        expected = apart(model)
    assert distance(found, expected)[0] < 0.05  # bfloat16 has 8 bits; a leak is above 0.5
    assert expected[0].abs().max() > 1


def test_lora_and_trls_fused_head_still_tell_the_attention_of_the_batch():
    """Both call an inner module: gpt-oss, whose mask is told no position ids, would leak if the note got lost."""
    from trl.trainer.utils import add_fused_lm_head

    model = get_peft_model(
        built(MODELS["gpt_oss, window and sinks"]), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    batch = packed()
    labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    with attention_per_conversation(model) as used, torch.no_grad():
        together = model(**batch, labels=labels, fused_lm_head=True).log_probs.sum()
        single = [torch.tensor([ids]) for row in conversations() for ids in row if len(ids) > 1]
        alone = sum(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum() for ids in single)
    assert used
    assert (together - alone).abs() < 1e-3 < alone.abs()


class Shapes(TorchDispatchMode):
    """Notes the last two dimensions of all that torch computes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape[-2:]) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_tokens_by_tokens_is_made(name):
    model, batch = built(MODELS[name]), packed()
    assert batch["input_ids"].shape == (1, 31)
    with Shapes() as dense:
        model(**batch, use_cache=False).logits.mean().backward()
    with attention_per_conversation(model), Shapes() as ours:
        model(**batch, use_cache=False).logits.mean().backward()
    assert (31, 31) not in ours.seen
    assert (31, 31) in dense.seen or name.startswith("opt"), "this test would see a dense mask"


# ----------------------------------------------------------------------------------------------------------- otherwise


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_get_what_they_get_without_it(name):
    model = built(MODELS[name]).eval()
    rows = [{"input_ids": ids, "assistant_mask": [1] * len(ids)} for row in conversations() for ids in row]
    batch = collator()(rows)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch, use_cache=False)
        with attention_per_conversation(model) as used:
            found = model(**batch, use_cache=False)
    assert used and real.shape == (5, 11)
    assert (found.logits - expected.logits)[real].abs().max() < (1e-5 if name in EAGER else 1e-12)


def test_packed_batch_leaves_no_trace_in_the_next_one():
    model = built(MODELS["gpt_oss, window and sinks"])
    one = {"input_ids": packed()["input_ids"]}  # as many tokens, in one conversation
    expected = results(model, [one])
    with attention_per_conversation(model):
        model(**packed(), use_cache=False)
        with pytest.raises(IndexError):
            model(**packed() | {"input_ids": one["input_ids"] + VOCABULARY}, use_cache=False)
        found = results(model, [one])
    assert max(distance(found, expected)) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_gives_the_same_tokens(name, rows):
    model = built(MODELS[name]).eval()
    prompts = [ids for row in conversations() for ids in row][:rows]
    batch = collator()([{"input_ids": ids, "assistant_mask": [0] * len(ids)} for ids in prompts])
    batch.pop("labels")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    expected = model.generate(**batch, **options)
    with attention_per_conversation(model):
        found = model.generate(**batch, **options)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] == batch["input_ids"].shape[1] + 12


def test_dropout_reaches_the_attention_weights():
    states = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    module = torch.nn.Module().train()
    rows = Conversations([3, 2], None, "cpu")
    for options in ({}, {"softcap": 5.0}):
        out, _ = conversation_attention(module, *states, rows, dropout=1.0, **options)
        assert out.shape == (1, 5, 2, 8) and not out.any()
        out, _ = conversation_attention(module, *states, rows, dropout=0.0, **options)
        assert out.all()


# ----------------------------------------------------------------------------------------------- where it stays outside


def test_afterwards_the_model_is_as_it_was_even_after_an_error(tmp_path):
    model = built(MODELS["qwen2"])
    with pytest.raises(KeyboardInterrupt), attention_per_conversation(model):
        assert model.config._attn_implementation == NAME
        model.save_pretrained(tmp_path / "model")
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
    assert not [part for part in model.modules() if part._forward_pre_hooks or part._forward_hooks]
    assert NAME not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")


def test_it_may_be_opened_twice():
    model = built(MODELS["gpt_oss, window and sinks"])
    expected = apart(model)
    with attention_per_conversation(model):
        with attention_per_conversation(model) as used:
            assert used
        assert max(distance(results(model, [packed()]), expected)) < 1e-5
    assert model.config._attn_implementation == "eager"


def test_adapter_of_a_model_that_uses_it_does_not_name_it(tmp_path):
    model = get_peft_model(built(MODELS["qwen2"]), LoraConfig(target_modules=["q_proj"]))
    with attention_per_conversation(model) as used:
        model.save_pretrained(tmp_path)
    assert used
    assert NAME not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_an_attention_that_the_user_chose_stays(chosen):
    config = LlamaConfig(**TINY)
    config._attn_implementation = chosen
    model = built(lambda: LlamaForCausalLM(config))
    with attention_per_conversation(model) as used:
        assert model.config._attn_implementation == chosen
    assert not used


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTNeoXJapaneseForCausalLM(
            GPTNeoXJapaneseConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
        ),
        lambda: DogeForCausalLM(DogeConfig(**TINY, keep_window_size=64)),
    ],
    ids=["gpt-neox-japanese, an attention of its own", "doge, which adds to its mask"],
)
def test_where_it_cannot_be_exact_the_dense_mask_stays_and_is(make):
    model = built(make).eval()
    chosen, expected = model.config._attn_implementation, apart(model)
    with attention_per_conversation(model) as used:
        found = results(model, [packed()])
    assert not used and model.config._attn_implementation == chosen
    assert max(distance(found, expected)) < 1e-5


def test_a_model_without_any_of_this_is_left_alone():
    model = built(lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=1)))
    with attention_per_conversation(model) as used:
        assert not used
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is not None, reason="the kernels keep rows apart")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TINY, **LINEAR)),
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(**TINY, **LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
    ],
    ids=["qwen3_5_text", "qwen3_next"],
)
def test_linear_attention_without_its_kernels_refuses_packed_rows_and_does_not_leak(make):
    model = built(make)
    with attention_per_conversation(model), pytest.raises(ValueError, match="can't keep packed sequences apart"):
        model(**packed(), use_cache=False)
    assert "can't keep packed sequences apart" in leak_of_packed_rows(model, collator())
    apart(model)  # single conversations train


# ------------------------------------------------------------------------------------------------- a leak is found


def test_dropout_is_no_leak():
    model = built(lambda: LlamaForCausalLM(LlamaConfig(**TINY, attention_dropout=0.5)))
    assert leak_of_packed_rows(model, collator()) is None
    assert model.training


@pytest.mark.parametrize("name", MODELS)
def test_no_leak_is_found_where_conversations_stay_apart(name):
    model = built(MODELS[name])
    assert leak_of_packed_rows(model, collator()) is None
    assert model.training and model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "make",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=1)),
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**TINY, lru_width=32, attention_window_size=16)),
    ],
    ids=["bloom, no positions in its mask", "recurrent_gemma, no kernel that keeps apart"],
)
def test_leak_is_found_in_a_model_as_it_is_at_the_start(make):
    torch.manual_seed(0)
    model = make()
    message = f"{type(model).__name__} lets the conversations of a packed row see each other"
    assert leak_of_packed_rows(model, collator()) == message


def test_eager_gpt_oss_of_the_users_choice_leaks_and_so_does_not_pass(monkeypatch):
    model = built(MODELS["gpt_oss, window and sinks"])
    assert leak_of_packed_rows(model, collator()) is None
    monkeypatch.setattr(attention, "_is_eager_for_want_of_sdpa", lambda decoder: False)
    assert "see each other" in leak_of_packed_rows(model, collator())


def test_gpt_oss_leaks_where_the_own_attention_is_left_out_as_for_a_compiled_model():
    model = built(MODELS["gpt_oss, window and sinks"])
    assert leak_of_packed_rows(model, collator()) is None
    assert leak_of_packed_rows(model, collator(), own_attention=False)


def test_class_that_does_not_know_the_keys_of_packed_rows_does_not_pass():
    model = built(MODELS["qwen2"])
    model.forward = lambda input_ids, position_ids, use_cache: None
    assert "unexpected keyword argument" in leak_of_packed_rows(model, collator())


# ------------------------------------------------------------------------------------------------ the mask and its rule


def rule_of(lengths, window=None, chunk=None):
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])

    def rule(row, head, query, key):
        seen = (number[query] == number[key]) & (key <= query)
        seen = seen & (query - key < window) if window else seen
        return seen & (position[query] // chunk == position[key] // chunk) if chunk else seen

    return rule


def read(rule, tokens, window=None):
    return attention._conversations(rule, torch.arange(tokens), window)


def test_conversations_are_read_out_of_the_rule():
    found = read(rule_of([3, 2, 4]), 9)
    assert (found.lengths, found.longest, found.window) == ([3, 2, 4], 4, None)
    assert found.cu_seq_lens.tolist() == [0, 3, 5, 9] and found.cu_seq_lens.dtype == torch.int32
    assert read(rule_of([1, 1, 1]), 3).lengths == [1, 1, 1]
    assert read(rule_of([4]), 4).lengths == [4]


def test_window_shorter_than_a_conversation_gives_it_a_band():
    found = read(rule_of([3, 2, 4], window=2), 9, window=2)
    assert (found.lengths, found.window) == ([3, 2, 4], 2)
    assert found.band(2) is None
    assert found.band(3).tolist() == [[[[True, False, False], [True, True, False], [False, True, True]]]]
    assert read(rule_of([3, 2, 4], window=4), 9, window=4).window is None


def test_chunks_come_out_as_conversations():
    assert read(rule_of([5, 3], chunk=2), 8, window=2).lengths == [2, 2, 1, 2, 1]


@pytest.mark.parametrize(
    "other",
    [
        lambda row, head, query, key: torch.ones_like(query, dtype=torch.bool),  # both ways
        lambda row, head, query, key: (key <= query) | (key // 3 == query // 3),  # both ways in an image of 3 tokens
        lambda row, head, query, key: (key <= query) & ((query // 3 == key // 3) | (key == 2)),  # sees a prefix
        lambda row, head, query, key: (key <= query) & (query - key < 3),  # in a window that nobody told
    ],
)
def test_rule_of_another_attention_is_not_taken_for_conversations(other):
    assert read(other, 9) is None


def test_rule_that_sees_further_than_the_window_is_not_taken_for_it():
    assert read(rule_of([9]), 9, window=3) is None


def test_a_rule_of_another_attention_is_drawn_and_still_keeps_the_conversations_apart():
    """Two images of 3 tokens, which see both ways within: the first lies in two conversations."""
    attention._note_batch(None, (), {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)})
    try:
        mask = attention.conversation_mask(
            batch_size=1,
            q_length=6,
            kv_length=6,
            attention_mask=None,
            mask_function=lambda row, head, query, key: (key <= query) | (key // 3 == query // 3),
        )
    finally:
        attention._forget_batch(None, (), {"cu_seq_lens_q": True}, None)
    drawn = ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]
    assert drawn == ["xx....", "xx....", "..x...", "..xxxx", "..xxxx", "..xxxx"]


# ---------------------------------------------------------------------------------------------------------------- CUDA


def by_its_documentation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn on (tokens, heads, head_dim), as its docstring tells it, in plain torch."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q.tolist() == cu_seq_k.tolist()
    assert max_q == max_k == cu_seq_q.diff().max() and type(max_q) is int
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    parts = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), dim=0) for states in (k, v))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (back > left if left >= 0 else torch.zeros_like(back, dtype=torch.bool)) | (-back > right)
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["qwen2", "mistral, window", "gemma3, window", "glm", "llama4, chunks"])
def test_varlen_attn_is_asked_for_the_same_attention(name, monkeypatch):
    model = built(MODELS[name])
    expected = apart(model)
    asked = []
    monkeypatch.setattr(attention, "_varlen_takes", lambda *states: asked.append(1) or True)
    monkeypatch.setattr(attention, "varlen_attn", by_its_documentation)
    with attention_per_conversation(model):
        found = results(model, [packed()])
    assert len(asked) == 2, "once a layer"
    assert max(distance(found, expected)) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["qwen2", "mistral, window", "gemma3, window", "glm", "gemma2, window and soft cap"])
def test_packed_conversations_on_a_gpu_in_bfloat16_are_as_near_to_float32_as_the_same_apart(name):
    model = built(MODELS[name])
    exact = apart(model)
    on_gpu = copy.deepcopy(model).to("cuda", torch.bfloat16)
    together = {key: v.cuda() if isinstance(v, torch.Tensor) else v for key, v in packed().items()}
    single = [torch.tensor([ids]).cuda() for row in conversations() for ids in row]
    with attention_per_conversation(on_gpu), torch.no_grad():
        found = on_gpu(**together, use_cache=False).logits[0].float().cpu()
        alone = torch.cat([on_gpu(input_ids=ids, use_cache=False).logits[0] for ids in single]).float().cpu()
    rounding = (alone - exact[0]).abs().max()
    assert (found - exact[0]).abs().max() < 2 * rounding
