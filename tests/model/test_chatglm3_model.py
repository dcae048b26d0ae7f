"""ChatGLM3 without any file of the vendor's: transformers' GlmForCausalLM is the oracle."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GlmForCausalLM

from sft.errors import ModelError
from sft.model.chatglm3 import ChatGLMConfig, ChatGLMForCausalLM, to_glm

TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TINY = {
    "padded_vocab_size": 128,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 128,
}


def tiny_model(**changes) -> ChatGLMForCausalLM:
    """Weights large enough that attention and order matter (the usual 0.02 leaves a tiny model nearly linear)."""
    torch.manual_seed(0)
    model = ChatGLMForCausalLM(ChatGLMConfig(**TINY | {"initializer_range": 0.15} | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, TINY["padded_vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def released_folder(path, model: ChatGLMForCausalLM):
    """The layout of the released repository: its config.json and two .bin shards, with the computed inv_freq in one."""
    path.mkdir()
    fields = {name: getattr(model.config, name) for name in TINY}
    code = "modeling_chatglm.ChatGLMForConditionalGeneration"
    auto_map = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModelForCausalLM": code}
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": auto_map,
        "torch_dtype": "float16",
    }
    (path / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    state = model.state_dict()
    names = sorted(state)
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    shards = {first: names[:7], second: names[7:]}
    for shard, held in shards.items():
        extra = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)} if shard == first else {}
        torch.save({name: state[name] for name in held} | extra, path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    weight_map["transformer.rotary_pos_emb.inv_freq"] = first
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "size",
    [
        {},
        {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "kv_channels": 8, "multi_query_group_num": 3},
        {"hidden_size": 40, "ffn_hidden_size": 64, "kv_channels": 32, "multi_query_group_num": 1, "rope_ratio": 50},
        {"num_attention_heads": 2, "add_qkv_bias": False, "layernorm_epsilon": 0.1},
    ],
    ids=["tiny", "three_groups", "rope_ratio", "no_bias"],
)
def test_logits_and_loss_are_those_of_transformers_glm(size, attention):
    ids = random_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model = tiny_model(**size)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, labels=ids)
    glm = to_glm(model)
    glm.set_attn_implementation(attention)
    with torch.no_grad():
        theirs = glm(input_ids=ids, attention_mask=mask, labels=ids)
    assert type(glm) is GlmForCausalLM
    assert ours.logits.std() > 0.3
    torch.testing.assert_close(ours.logits[mask == 1], theirs.logits[mask == 1], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=2e-6)


def test_rope_ratio_multiplies_the_rotary_base_of_half_a_head():
    frequencies = tiny_model(kv_channels=16, rope_ratio=50).transformer.rotary_pos_emb.inv_freq
    expected = [1.0, 500_000**-0.25, 500_000**-0.5, 500_000**-0.75]
    torch.testing.assert_close(frequencies, torch.tensor(expected))


def test_gradients_are_those_of_transformers_glm():
    ids = random_ids(2, 9)
    model = tiny_model()
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.transformer.encoder["layers"][0]
    fused, gate_up = layer.self_attention.query_key_value.weight.grad, layer.mlp.dense_h_to_4h.weight.grad
    model = tiny_model()
    glm = to_glm(model).requires_grad_()
    glm(input_ids=ids, labels=ids).loss.backward()
    attention, mlp = glm.model.layers[0].self_attn, glm.model.layers[0].mlp
    split = torch.cat([attention.q_proj.weight.grad, attention.k_proj.weight.grad, attention.v_proj.weight.grad])
    torch.testing.assert_close(fused, split, rtol=0, atol=1e-6)
    torch.testing.assert_close(gate_up, mlp.gate_up_proj.weight.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_rounds_once_after_its_weight(dtype):
    norm = tiny_model().transformer.encoder["final_layernorm"].to(dtype)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(hidden), (norm.weight.float() * exact).to(dtype))
    assert not torch.equal(norm(hidden), norm.weight * exact.to(dtype))


def test_parameters_keep_their_original_names():
    names = [name for name, _ in tiny_model(num_layers=1).named_parameters()]
    assert names == [
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.layers.0.input_layernorm.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.bias",
        "transformer.encoder.layers.0.self_attention.dense.weight",
        "transformer.encoder.layers.0.post_attention_layernorm.weight",
        "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight",
        "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
    ]


@pytest.mark.parametrize(
    "field, value",
    [
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("original_rope", False),
        ("multi_query_attention", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True),
        ("tie_word_embeddings", True),
        ("hidden_dropout", 0.1),
        ("pre_seq_len", 128),
        ("prefix_projection", True),
        ("quantization_bit", 4),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_theta", 500000.0),
    ],
)
def test_a_configuration_that_is_not_implemented_is_refused_by_name(tmp_path, field, value):
    config = {"model_type": "chatglm", **TINY, field: value}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=field):
        AutoConfig.from_pretrained(tmp_path)


def test_rope_ratio_of_a_chatglm2_is_refused_and_of_a_chatglm3_is_not(tmp_path):
    for name in ("chatglm2-6b-32k", "chatglm3-6b-32k"):
        (tmp_path / name).mkdir()
        config = {"model_type": "chatglm", "_name_or_path": f"THUDM/{name}", "rope_ratio": 50, **TINY}
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="rope_ratio of a ChatGLM2"):
        AutoConfig.from_pretrained(tmp_path / "chatglm2-6b-32k")
    assert AutoConfig.from_pretrained(tmp_path / "chatglm3-6b-32k").rope_ratio == 50


def test_released_bin_shards_load_without_remote_code(tmp_path, caplog):
    model = tiny_model()
    folder = released_folder(tmp_path / "released", model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is ChatGLMForCausalLM
    assert "inv_freq" not in caplog.text
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_the_dtype_is_the_one_asked_for_or_the_one_saved(tmp_path):
    folder = released_folder(tmp_path / "released", tiny_model())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_bin_shard_that_holds_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = released_folder(tmp_path / "released", tiny_model())
    torch.save({"transformer.output_layer.weight": Payload()}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def test_saving_and_loading_changes_nothing(tmp_path):
    model = tiny_model(rope_ratio=50, kv_channels=8)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {name for name, _ in model.named_parameters()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_the_backbone_returns_what_the_head_projects():
    model, ids = tiny_model(), random_ids(2, 7)
    with torch.no_grad():
        hidden = model.transformer(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
        assert hidden.shape == (2, 7, 64)
        assert torch.equal(model.get_output_embeddings()(hidden), logits)
        last = model(input_ids=ids, logits_to_keep=1).logits
        torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=1e-6)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)


def test_embeddings_resize_under_their_original_names():
    model = tiny_model()
    model.resize_token_embeddings(130)
    assert model.transformer.embedding["word_embeddings"].weight.shape == (130, 64)
    assert model.transformer.output_layer.weight.shape == (130, 64)
    assert model.config.padded_vocab_size == 130
    assert len(list(model.parameters())) == len(list(tiny_model().parameters()))


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_stay_apart(rows):
    model = tiny_model()
    first, second = random_ids(rows, 6), random_ids(rows, 9)
    packed = torch.cat([first, second], dim=1)
    position_ids = torch.cat([torch.arange(6), torch.arange(9)]).repeat(rows, 1)
    with torch.no_grad():
        logits = model(input_ids=packed, position_ids=position_ids, use_cache=False).logits
        alone = torch.cat([model(input_ids=row).logits for row in (first, second)], dim=1)
        joined = model(input_ids=packed, use_cache=False).logits
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    assert (joined - alone).abs().max() > 0.1


def test_left_padded_batches_generate_what_single_prompts_generate():
    model = tiny_model()
    prompts = [random_ids(1, length)[0] for length in (3, 8, 5)]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(prompt[None], **options)[0, len(prompt) :] for prompt in prompts]
    batch = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 8 - len(prompt) :], mask[row, 8 - len(prompt) :] = prompt, 1
    together = model.generate(batch, attention_mask=mask, **options)[:, 8:]
    assert together.tolist() == torch.stack(alone).tolist()
    uncached = model.generate(batch, attention_mask=mask, use_cache=False, **options)[:, 8:]
    assert together.tolist() == uncached.tolist()
    assert len(set(together.flatten().tolist())) > 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_keeps_the_gradients(use_reentrant):
    ids = random_ids(2, 9)

    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        model = tiny_model().train()
        model.transformer.encoder["layers"][0].mlp.register_forward_pre_hook(count)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, calls

    plain, once = gradients(False)
    checkpointed, twice = gradients(True)
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_trains_lora_on_all_four_projections(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    tiny_model().save_pretrained(tmp_path)
    quantization = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**quantization)
    )
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes 0.50.2 loses gradients with it
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(TARGETS) * TINY["num_layers"]
    assert all(gradient.abs().max() > 0 for name, gradient in trained.items() if "lora_B" in name)


def test_a_saved_4_bit_base_reloads(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path / "4bit")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    for one in (model, reloaded):
        for module in one.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(model(random_ids(1, 9)).logits, reloaded(random_ids(1, 9)).logits)


def test_trl_trains_lora_and_the_adapter_fits_the_original_names(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in random_ids(8, 9)])
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>", pad_token="<unk>")
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(tiny_model(), args=arguments, train_dataset=rows, processing_class=plain, peft_config=lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value.lora_A.weight" in names


def test_the_6b_configuration_has_the_released_size():
    with torch.device("meta"):
        model = ChatGLMForCausalLM(ChatGLMConfig())
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(parameters.values()) == 6_243_584_000
    quantised = sum(size for name, size in parameters.items() if ".layers." in name and "norm" not in name)
    quantised -= sum(size for name, size in parameters.items() if name.endswith("bias"))
    assert quantised == 5_710_544_896
    # nf4, double quantisation: half a byte a weight, a byte for 64 weights, four for 256 of those; the rest in 16 bits.
    scales = quantised // 64
    four_bit = quantised // 2 + scales + scales // 256 * 4 + 2 * (sum(parameters.values()) - quantised)
    assert four_bit / 2**20 == pytest.approx(3826, abs=1)  # MiB; the vendor's LoRA recipe needs 14,082 MiB in 16 bits
