"""What --check says of memory, against numbers made by hand and against what the libraries hold."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from sft.errors import RecipeError
from sft.model.chatglm3 import ChatGLMConfig, ChatGLMForCausalLM
from sft.model.load import meta_model
from sft.recipe import load_recipe
from sft.training import check

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def recipe_of(name: str, folder: Path, *overrides: str):
    return load_recipe(
        ROOT / f"recipes/{name}.yaml",
        [f"model_name_or_path={folder}", f"output_dir={folder}/out", "model_init.dtype=bfloat16", *overrides],
    )


@pytest.fixture
def chatglm_6b(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chatglm", "torch_dtype": "float16"}', encoding="utf-8")
    return tmp_path


@pytest.fixture
def qwen_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **QWEN_7B}), encoding="utf-8")
    return tmp_path


def test_memory_of_chatglm3_6b_in_4_bit(chatglm_6b):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b)
    model = meta_model(recipe)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    # A layer: query_key_value 4096 x 4608, dense 4096 x 4096, dense_h_to_4h 4096 x 27392, dense_4h_to_h 13696 x 4096.
    linear = 28 * (4096 * 4608 + 4096 * 4096 + 4096 * 27392 + 13696 * 4096)
    assert linear == 5_710_544_896
    assert check.trained_weights(recipe, model) == 28 * 8 * (8704 + 8192 + 31488 + 17792) == 14_823_424
    assert check.estimate_memory(recipe, model) == {
        # Half a byte, one for 64 weights, four for 256 of those; the rest in bfloat16: 3826 MiB.
        "weights": linear // 2 + linear // 64 + linear // 4096 + 2 * (6_243_584_000 - linear),
        "gradients and optimizer": 14_823_424 * (2 + 2 + 2 + 2),
        # 2 x 2048 tokens: 28 inputs of 4096, twice 16 x 4096 + 4 x 13696, and dense_h_to_4h unpacked.
        "activations": 4096 * 2 * (28 * 4096 + 2 * 120_320) + 2 * 4096 * 27392,
        "logits": 2048 * 32768 * 2,
    }
    assert check.estimate_memory(recipe, model)["weights"] == 4_011_972_096
    assert round(sum(check.estimate_memory(recipe, model).values()) / MIB) == 7057
    on_cpu = check.estimate_memory(recipe, model, on_cpu=True)
    assert on_cpu["logits"] == 2048 * 65024 * 14


def test_memory_of_chatglm3_6b_in_16_bit_is_about_what_its_vendor_measured(chatglm_6b):
    """14,082 MiB: for LoRA of rank 8 on query_key_value in fp16, 4 rows of up to 256 + 512 tokens a batch.

    Source: finetune_demo/README.md and finetune_demo/configs/lora.yaml of github.com/THUDM/ChatGLM3.
    """
    recipe = recipe_of(
        "chatglm3_4bit",
        chatglm_6b,
        "model_init.dtype=float16",
        "quantization_config=null",
        "lora_config.target_modules=[query_key_value]",
        "dataset.max_length=768",
        "training_args.per_device_train_batch_size=4",
    )
    assert check.estimate_memory(recipe, meta_model(recipe)) == {
        "weights": 2 * 6_243_584_000,
        "gradients and optimizer": 28 * 8 * 8704 * (4 + 4 + 8),
        "activations": 3072 * 2 * (28 * 4096 + 2 * 120_320),
        "logits": 1536 * 32768 * 2,
    }
    assert round(sum(check.estimate_memory(recipe, meta_model(recipe)).values()) / MIB) == 14_116
    own = recipe_of("chatglm3_4bit", chatglm_6b, "quantization_config=null")
    assert round(sum(check.estimate_memory(own, meta_model(own)).values()) / MIB) == 15_039


def test_memory_of_qwen2_5_7b_in_4_bit(qwen_7b):
    recipe = recipe_of("qwen_qlora", qwen_7b)
    model = meta_model(recipe)
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512
    linear = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    assert linear == 6_525_288_448
    parts = check.estimate_memory(recipe, model)
    assert parts["weights"] == linear // 2 + linear // 64 + linear // 4096 + 2 * (7_615_616_512 - linear)
    assert parts["weights"] == 5_546_851_072
    # r 32 on q_proj and o_proj (3584 + 3584) and on k_proj and v_proj (3584 + 512).
    assert check.trained_weights(recipe, model) == 28 * 32 * (2 * 7168 + 2 * 4096) == 20_185_088


def test_without_double_quantisation_the_scales_take_four_bytes_for_64_weights(chatglm_6b):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b, "quantization_config.bnb_4bit_use_double_quant=false")
    weights = check.estimate_memory(recipe, meta_model(recipe))["weights"]
    assert weights == 5_710_544_896 // 2 + 5_710_544_896 // 16 + 2 * 533_039_104


def test_full_fine_tuning_holds_a_gradient_and_two_moments_in_the_weights_own_dtype(qwen_7b):
    recipe = recipe_of(
        "qwen_qlora", qwen_7b, "quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch"
    )
    parts = check.estimate_memory(recipe, meta_model(recipe))
    assert parts["weights"] == 7_615_616_512 * 2
    assert parts["gradients and optimizer"] == 7_615_616_512 * 6


def small_model(kind: str):
    """Sizes whose weights fill whole blocks of 64 x 256."""
    torch.manual_seed(0)
    if kind == "chatglm":
        config = ChatGLMConfig(
            padded_vocab_size=128, hidden_size=256, ffn_hidden_size=512, num_layers=4, num_attention_heads=4,
            kv_channels=64,
        )  # fmt: skip
        return ChatGLMForCausalLM(config).bfloat16()
    config = Qwen2Config(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).bfloat16()


RECIPES = {"chatglm": "chatglm3_4bit", "qwen": "qwen_qlora"}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
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
    assert check.estimate_memory(recipe, meta_model(recipe))["weights"] == held


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
def test_activations_are_of_the_order_that_autograd_keeps(tmp_path, kind, checkpointing):
    from peft import LoraConfig, get_peft_model

    small_model(kind).save_pretrained(tmp_path)
    recipe = recipe_of(
        RECIPES[kind],
        tmp_path,
        "quantization_config=null",
        "dataset.max_length=64",
        "training_args.per_device_train_batch_size=2",
        f"training_args.gradient_checkpointing={str(checkpointing).lower()}",
    )
    model = get_peft_model(small_model(kind), LoraConfig(**{**recipe.lora_config, "lora_dropout": 0.0}))
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 100, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([0]))
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    del output
    estimated = check.estimate_memory(recipe, meta_model(recipe))["activations"]
    # Without the layer whose turn it is to go backward (with checkpointing, what it keeps and as much again).
    estimated -= (2 if checkpointing else 1) * 128 * 2 * (16 * 256 + 4 * 512)
    # The norm after the last layer is not estimated; beside the mere inputs of four layers it shows.
    assert 0.6 < measured / estimated < (2 if checkpointing else 1.2)


def test_trained_weights_are_peft_s_own_count(chatglm_6b):
    def count(*overrides: str) -> int:
        recipe = recipe_of("chatglm3_4bit", chatglm_6b, *overrides)
        return check.trained_weights(recipe, meta_model(recipe))

    assert count(r"lora_config.target_modules='.*\.3\.self_attention\.dense'") == 8 * 8192
    assert count("lora_config.target_modules=all-linear") == 14_823_424
    saved = count("lora_config.target_modules=[dense]", "lora_config.modules_to_save=[output_layer]")
    assert saved == 28 * 8 * 8192 + 65024 * 4096
    with pytest.raises(RecipeError, match="lora_config.*not found"):
        count("lora_config.target_modules='.*nothing'")


def test_an_adapter_to_go_on_from_says_itself_how_many_weights_it_has(tmp_path):
    from peft import LoraConfig, get_peft_model

    small_model("qwen").save_pretrained(tmp_path)
    get_peft_model(small_model("qwen"), LoraConfig(r=5, target_modules=["q_proj"])).save_pretrained(tmp_path / "own")
    recipe = recipe_of("qwen_qlora", tmp_path, "lora_config=null", f"adapter_name_or_path={tmp_path / 'own'}")
    assert check.trained_weights(recipe, meta_model(recipe)) == 4 * 5 * (256 + 256)


def test_counting_changes_nothing_in_the_model(chatglm_6b):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b)
    model = meta_model(recipe)
    names = [name for name, _ in model.named_parameters()]
    check.trained_weights(recipe, model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_does_not_fit_is_said_with_what_helps(chatglm_6b):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b, "training_args.per_device_train_batch_size=100000")
    line, fits = check.memory_line(recipe, meta_model(recipe), on_cpu=True)
    assert not fits
    assert line.splitlines()[1].startswith("it does not fit; what helps: training_args.per_device_train_batch_size: 1")
    small = dataclasses.replace(recipe, training_args={**recipe.training_args, "activation_checkpointing": False})
    line, _ = check.memory_line(small, meta_model(recipe), on_cpu=True)
    assert "what helps: training_args.activation_checkpointing: true" in line
