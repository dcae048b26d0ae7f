"""What --check says of memory, against numbers made by hand, what the libraries hold and what a real step makes."""

import dataclasses
import gc

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from sft.data.packing import pack
from sft.data.splits import Data
from sft.model.load import load_model, meta_model
from sft.model.lora import add_lora
from sft.training import check
from sft.training.memory import LiveBytes, estimate_memory, kept_bytes, memory_line, needs, scoring_bytes
from sft.training.trainer import make_trainer
from tests.families import FAMILIES, build
from tests.training.sizes import chatglm_6b, qwen_7b, recipe_of, small_model

MIB = 2**20
RECIPES = {"chatglm": "chatglm3_4bit", "qwen": "qwen_qlora", "tied": "qwen_qlora"}
STEPS = [[], ["packed"], ["kept"], ["kept", "packed"], ["full"], ["full", "again"]]
FULL = ["quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch"]


# ----------------------------------------------------------------------------------------- what stays from step to step


def test_bytes_of_chatglm3_6b_in_4_bit(tmp_path):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b(tmp_path))
    model = meta_model(recipe)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    # A layer: query_key_value 4096 x 4608, dense 4096 x 4096, dense_h_to_4h 4096 x 27392, dense_4h_to_h 13696 x 4096.
    linear = 28 * (4096 * 4608 + 4096 * 4096 + 4096 * 27392 + 13696 * 4096)
    assert linear == 5_710_544_896
    lora = 28 * 8 * (8704 + 8192 + 31488 + 17792)
    assert check.trained_weights(recipe, model) == lora == 14_823_424
    assert kept_bytes(recipe, model) == {
        # Half a byte, one for 64 weights, four for 256 of those; the rest in bfloat16: 3826 MiB.
        "weights": linear // 2 + linear // 64 + linear // 4096 + 2 * (6_243_584_000 - linear),
        "adapter": lora * 2,
        "gradients": lora * 2,
        "moments": lora * 4,
    }
    single = recipe_of("chatglm3_4bit", tmp_path, "quantization_config.bnb_4bit_use_double_quant=false")
    assert kept_bytes(single, model)["weights"] == linear // 2 + linear // 16 + 2 * 533_039_104


def test_bytes_of_qwen2_5_7b_in_4_bit(tmp_path):
    recipe = recipe_of("qwen_qlora", qwen_7b(tmp_path))
    model = meta_model(recipe)
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512
    linear = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    assert linear == 6_525_288_448
    weights = linear // 2 + linear // 64 + linear // 4096 + 2 * (7_615_616_512 - linear)
    # r 32 on q_proj and o_proj (3584 + 3584) and on k_proj and v_proj (3584 + 512). Moments of a byte: paged_adamw_8bit
    lora = 28 * 32 * (2 * 7168 + 2 * 4096)
    assert check.trained_weights(recipe, model) == lora == 20_185_088
    assert kept_bytes(recipe, model) == {
        "weights": weights, "adapter": lora * 2, "gradients": lora * 2, "moments": lora * 2,
    }  # fmt: skip
    assert weights == 5_546_851_072


@pytest.mark.parametrize(("dtype", "width"), [("null", 4), ("bfloat16", 2)])
def test_full_fine_tuning_keeps_weights_gradients_and_two_moments_in_float32_or_the_named_dtype(tmp_path, dtype, width):
    recipe = recipe_of("qwen_qlora", qwen_7b(tmp_path), *FULL, f"model_init.dtype={dtype}")
    each = 7_615_616_512 * width
    assert kept_bytes(recipe, meta_model(recipe)) == {"weights": each, "gradients": each, "moments": 2 * each}


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("sgd", 0), ("adafactor", 0), ("lion_8bit", 1), ("lion_32bit", 4), ("adamw_8bit", 2), ("paged_adamw_32bit", 8)],
)
def test_moments_are_those_of_the_optimizer(tmp_path, optim, bytes_each):
    recipe = recipe_of("qwen_qlora", qwen_7b(tmp_path), *FULL, f"training_args.optim={optim}")
    assert kept_bytes(recipe, meta_model(recipe))["moments"] == 7_615_616_512 * bytes_each


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["chatglm", "qwen"])
def test_weights_in_4_bit_are_estimated_to_the_byte(tmp_path, kind, double):
    pytest.importorskip("bitsandbytes")
    small_model(kind).save_pretrained(tmp_path)
    recipe = recipe_of(RECIPES[kind], tmp_path, f"quantization_config.bnb_4bit_use_double_quant={str(double).lower()}")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**recipe.quantization_config)
    )
    held = 0
    for parameter in model.parameters():
        held += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert kept_bytes(recipe, meta_model(recipe))["weights"] == held


# ------------------------------------------------------------------------------------------------------------ a step


def test_bytes_are_counted_as_long_as_their_storage_lives():
    with LiveBytes() as memory:
        kept = torch.zeros(250)
        view = kept.view(25, 10)[3:]
        assert (memory.live, memory.peak) == (1000, 1000)
        (kept + 1).sum()  # 1000 bytes and 4, gone at once
        assert (memory.live, memory.peak) == (1000, 2004)
        del kept
        assert memory.live == 1000, "the view holds it"
        del view
        assert memory.live == 0


class Counted(TrainerCallback):
    """Counts what a real step makes, from its first forward to before the optimizer."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        self.memory = LiveBytes()
        self.memory.__enter__()
        self.seen = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.memory.live = self.memory.peak = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.memory.__exit__(None, None, None)
        self.peak = self.memory.peak


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, step) for kind in ("chatglm", "qwen") for step in STEPS), ("tied", ["full"]), ("tied", [])],
)
def test_a_step_is_estimated_as_the_trainer_makes_it(tmp_path, kind, changes):
    small_model(kind).save_pretrained(tmp_path)
    recipe = recipe_of(
        RECIPES[kind],
        tmp_path,
        "quantization_config=null",
        "dataset.max_length=64",
        "dataset.validation=null",
        "model_init.dtype=null",
        "training_args.bf16=true",
        "training_args.max_steps=1",
        "training_args.save_strategy=no",
        "training_args.per_device_train_batch_size=2",
        f"dataset.packing={str('packed' in changes).lower()}",
        f"training_args.activation_checkpointing={str('kept' not in changes).lower()}",
        f"training_args.gradient_accumulation_steps={2 if 'again' in changes else 1}",
        *(FULL if "full" in changes else ["lora_config.lora_dropout=0"]),
    )
    ids = [list(range(3, 67 - row % 2)) for row in range(8)]  # every second is padded by a token
    rows = datasets.Dataset.from_dict(
        {"input_ids": ids, "assistant_mask": [[0] * 32 + [1] * (len(r) - 32) for r in ids]}
    )
    tokenizer = build(FAMILIES["qwen2_5"], "bytes")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    data = Data(None, pack(rows, 64) if "packed" in changes else rows)
    counted = Counted()
    make_trainer(recipe, add_lora(load_model(recipe), recipe), tokenizer, data, [counted]).train()
    parts = estimate_memory(recipe, meta_model(recipe), own_loss=True)
    assert parts["activations and logits"] + parts["gradients"] == pytest.approx(counted.peak, rel=0.06)


def test_memory_of_chatglm3_6b_in_16_bit_is_about_what_its_vendor_measured(tmp_path):
    """14,082 MiB: for LoRA of rank 8 on query_key_value in fp16, 4 rows of up to 256 + 512 tokens a batch.

    Source: finetune_demo/README.md and finetune_demo/configs/lora.yaml of github.com/THUDM/ChatGLM3.
    """
    recipe = recipe_of(
        "chatglm3_4bit",
        chatglm_6b(tmp_path),
        "model_init.dtype=float16",
        "quantization_config=null",
        "lora_config.target_modules=[query_key_value]",
        "dataset.max_length=768",
        "training_args.per_device_train_batch_size=4",
    )
    parts = estimate_memory(recipe, meta_model(recipe), own_loss=False)
    assert parts["weights"] == 2 * 6_243_584_000
    assert sum(parts.values()) / MIB == pytest.approx(14_082, rel=0.02)


def test_the_loss_of_a_gpu_takes_a_tile_of_logits_and_float32_gradients(tmp_path):
    """Where it is the peak: a layer of hidden size 8, 10,000 entries, 3 rows of 2,000 tokens, all trained."""
    config = Qwen2Config(
        vocab_size=10_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    recipe = recipe_of(
        "qwen_qlora",
        tmp_path,
        *FULL,
        "dataset.max_length=2000",
        "training_args.per_device_train_batch_size=3",
        "training_args.activation_checkpointing=true",
    )
    parts = estimate_memory(recipe, meta_model(recipe), own_loss=False)
    made = parts["activations and logits"] + parts["gradients"]
    # A tile of 3000 labels x 10,000, the head's weights once more, 8 gradients a label, and the head's in float32.
    tile = (3000 + 8) * 10_000 * 2 + 3000 * 8 * 4 + 10_000 * 8 * 4
    assert tile < made < tile * 1.05
    own = estimate_memory(recipe, meta_model(recipe), own_loss=True)["activations and logits"]
    # Logits and their gradients in bfloat16.
    assert 3000 * 10_000 * 4 < own < 3000 * 10_000 * 4 * 1.05


def test_several_processes_hold_the_gradients_once_more_unless_they_share_them(tmp_path, monkeypatch):
    small_model("qwen").save_pretrained(tmp_path)
    recipe = recipe_of("qwen_qlora", tmp_path, "quantization_config=null", "dataset.max_length=64")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = estimate_memory(recipe, meta_model(recipe), own_loss=True)
    assert parts["DDP buckets"] == parts["gradients"] > 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "DDP buckets" not in estimate_memory(recipe, meta_model(recipe), own_loss=True)


# ------------------------------------------------------------------------------------------------------------ scoring


def test_scoring_holds_the_cache_of_a_batch(tmp_path):
    """Of 16 layers, so that it outweighs what one of them computes."""
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    recipe = recipe_of(
        "qwen_qlora",
        tmp_path,
        "quantization_config=null",
        "evaluation={batch_size: 3, generation: {max_new_tokens: 100}}",
    )
    model = meta_model(recipe)
    kept = kept_bytes(recipe, model)
    # 3 answers of 100 tokens to prompts of 900: keys and values of 16 layers, 4 heads of 16, in bfloat16.
    cache = 3 * (900 + 100) * 16 * 2 * 4 * 16 * 2
    assert cache < scoring_bytes(recipe, model, 900) - kept["weights"] - kept["adapter"] < 1.5 * cache


def test_scoring_a_full_fine_tuning_holds_base_and_tuned(tmp_path):
    recipe = recipe_of("qwen_qlora", qwen_7b(tmp_path), *FULL, "model_init.dtype=bfloat16", "evaluation.batch_size=1")
    assert scoring_bytes(recipe, meta_model(recipe), 1) == pytest.approx(2 * 7_615_616_512 * 2, rel=0.01)


# ------------------------------------------------------------------------------------------------------- the terminal


def told(recipe, model, longest):
    return memory_line(recipe, model, True, needs(recipe, model, True, longest))


def test_what_does_not_fit_is_said_with_what_helps(tmp_path):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b(tmp_path), "training_args.per_device_train_batch_size=100000")
    line, fits = told(recipe, meta_model(recipe), longest=1)
    assert not fits
    assert line.splitlines()[1].startswith("it does not fit; what helps: training_args.per_device_train_batch_size: 1")
    small = dataclasses.replace(recipe, training_args={**recipe.training_args, "activation_checkpointing": False})
    line, _ = told(small, meta_model(recipe), longest=1)
    assert "what helps: training_args.activation_checkpointing: true" in line


def test_where_scoring_needs_most_its_batch_is_what_helps(tmp_path):
    recipe = recipe_of("qwen_qlora", qwen_7b(tmp_path), "evaluation.batch_size=100000", "dataset.max_length=64")
    line, fits = told(recipe, meta_model(recipe), longest=64)
    assert not fits and line.endswith("what helps: evaluation.batch_size below 100000")


def test_a_model_that_needs_contents_gets_what_is_known_and_why_it_is_no_more(tmp_path):
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    recipe = recipe_of("qwen_qlora", tmp_path, *FULL, "model_init.dtype=float32")
    line, fits = told(recipe, meta_model(recipe), longest=1)
    assert (
        fits and "GB needed (float32 weights 0.0, gradients 0.0, moments 0.0), and activations, which cannot be" in line
    )
    assert "MixtralForCausalLM needs contents (Expected inputs of BF16 type" in line
