"""What is exported: a GlmForCausalLM for plain transformers, or a folder under the original names."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sft.errors import ModelError
from sft.model.chatglm3 import ChatGLMConfig, ChatGLMForCausalLM, save_chatglm, save_glm, to_glm

spm = pytest.importorskip(
    "sentencepiece", reason="sentencepiece (requirements-dev) trains the tokenizer of these tests"
)

MESSAGES = [
    {"role": "system", "content": "Count the gulls."},
    {"role": "user", "content": "philosophers and people, 你好"},
    {"role": "assistant", "content": "", "metadata": "count"},
    {"role": "tool", "content": '{"gulls": 3}'},
]
TOOLS = [{"type": "function", "function": {"name": "count", "description": "数 <b>&"}}]

# Runs in a process of its own, in a folder from where our code cannot be imported.
PLAIN_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("glm")
tokenizer = AutoTokenizer.from_pretrained("glm")
chat = json.load(open("chat.json"))
inputs = tokenizer.apply_chat_template(**chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    logits = model(**inputs).logits
assert not [name for name in sys.modules if name.split(".")[0] == "sft"]
json.dump({
    "model": type(model).__name__,
    "ids": inputs["input_ids"][0].tolist(),
    "whole": tokenizer.apply_chat_template(chat["conversation"], chat["tools"])["input_ids"],
    "text": tokenizer("philosophers 你好")["input_ids"],
    "decoded": tokenizer.decode(tokenizer("philosophers 你好")["input_ids"], skip_special_tokens=True),
    "logits": logits[0].tolist(),
    "stop": model.generation_config.eos_token_id,
    "pad": [model.generation_config.pad_token_id, tokenizer.pad_token_id],
    "padding_side": tokenizer.padding_side,
}, open("seen.json", "w"))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer.model in a folder of its own, as a released repository has it."""
    folder = tmp_path_factory.mktemp("base")
    text = ["Count the gulls on the pier.", "你好，有什么可以帮你？", '{"gulls": 3, "crowd": "数 <b>&"}'] * 5
    (folder / "corpus.txt").write_text("\n".join(text), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def tiny_model() -> ChatGLMForCausalLM:
    torch.manual_seed(0)
    config = ChatGLMConfig(
        padded_vocab_size=384,
        hidden_size=64,
        ffn_hidden_size=96,
        num_layers=2,
        num_attention_heads=4,
        kv_channels=16,
        seq_length=128,
        rope_ratio=50,
        initializer_range=0.15,
    )
    return ChatGLMForCausalLM(config).eval()


def test_plain_transformers_loads_the_glm_export_and_sees_the_same_ids_and_logits(tmp_path, tokenizer):
    model = tiny_model()
    prompt = tokenizer.encode_prompt(MESSAGES, TOOLS)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0]
    save_glm(model, tokenizer, tmp_path / "glm")
    chat = {"conversation": MESSAGES, "tools": TOOLS}
    (tmp_path / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    subprocess.run([sys.executable, "-I", "-c", PLAIN_TRANSFORMERS], cwd=tmp_path, check=True)
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen["model"] == "GlmForCausalLM"
    assert seen["ids"] == prompt
    assert seen["whole"] == tokenizer.encode_conversation(MESSAGES, TOOLS)[0]
    assert seen["text"] == tokenizer("philosophers 你好")["input_ids"]
    assert seen["decoded"] == "philosophers 你好"
    assert seen["stop"] == tokenizer.stop_token_ids == [2, 336, 338]
    assert seen["pad"] == [0, 0]
    assert seen["padding_side"] == "left"
    torch.testing.assert_close(torch.tensor(seen["logits"]), logits, rtol=0, atol=2e-6)


def test_a_spelled_control_token_is_the_one_thing_that_the_exported_template_reads_otherwise(tmp_path, tokenizer):
    save_glm(tiny_model(), tokenizer, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for content, equal in [("sop and eop", True), ("people", True), ("<sop>", False), ("a <|user|> b", False)]:
        messages = [{"role": "user", "content": content}]
        ids = exported.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert (ids == tokenizer.encode_prompt(messages)) is equal, content


def test_the_conversion_copies_nothing_but_query_key_value():
    model = tiny_model()
    storage = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = to_glm(model).state_dict()
    shared = {name for name, tensor in converted.items() if tensor.data_ptr() in storage.values()}
    assert {name for name in converted if name not in shared} == {
        f"model.layers.{layer}.self_attn.{part}_proj.{kind}"
        for layer in (0, 1)
        for part in "qkv"
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_keeps_the_dtype(tmp_path, tokenizer, dtype):
    save_glm(tiny_model().to(dtype), tokenizer, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_the_chatglm_export_has_the_original_names_fields_and_tokenizer(tmp_path, base):
    model = tiny_model()
    save_chatglm(model.to(torch.float16), base, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["ChatGLMModel"]
    assert config["auto_map"]["AutoModel"] == "THUDM/chatglm3-6b--modeling_chatglm.ChatGLMForConditionalGeneration"
    assert config["torch_dtype"] == "float16"
    expected = {
        "num_layers": 2,
        "padded_vocab_size": 384,
        "kv_channels": 16,
        "multi_query_group_num": 2,
        "rope_ratio": 50,
    }
    assert {field: config[field] for field in expected} == expected
    assert not {"vocab_size", "initializer_range", "num_hidden_layers", "dtype"} & set(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight.float())


def test_the_chatglm_export_takes_the_vendors_code_along(tmp_path, base):
    source = tmp_path / "base"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    code = ["configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py"]
    for name in code:
        (source / name).write_text(f"# {name}\n", encoding="utf-8")
    save_chatglm(tiny_model(), source, tmp_path / "chatglm")
    for name in code:
        assert (tmp_path / "chatglm" / name).read_text(encoding="utf-8") == f"# {name}\n"
    config = json.loads((tmp_path / "chatglm" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoConfig"] == "configuration_chatglm.ChatGLMConfig"
    tokenizer_config = json.loads((tmp_path / "chatglm" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}


def test_the_chatglm_export_needs_the_tokenizer_model(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer.model"):
        save_chatglm(tiny_model(), tmp_path, tmp_path / "chatglm")


def test_an_unmerged_adapter_or_a_quantised_model_is_not_exported(tmp_path, tokenizer, base):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    tiny_model().save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(ModelError, match="quantised"):
        save_glm(quantised, tokenizer, tmp_path / "glm")
    with pytest.raises(ModelError, match="quantised"):
        save_chatglm(quantised, base, tmp_path / "chatglm")
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["query_key_value"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ModelError, match="merge"):
            to_glm(model)
    assert to_glm(adapted.merge_and_unload()).config.num_key_value_heads == 2
