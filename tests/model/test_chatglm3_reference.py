"""ChatGLM3 against what the vendor's own code computed, where that reference folder stands beside the repository."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.model.chatglm3 import ChatGLMForCausalLM, save_glm

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "chatglm3"
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(),
    reason="no ../shared/chatglm3: reference data of the vendor's code, not part of the repository",
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder as it is released: weights, the real tokenizer.model, and both naming the vendor's remote code."""
    folder = tmp_path_factory.mktemp("released")
    for name in ("tiny_chatglm3/config.json", "tiny_chatglm3/model.safetensors", "tokenizer.model"):
        shutil.copyfile(REFERENCE / name, folder / Path(name).name)
    code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"name_or_path": "THUDM/chatglm3-6b", "tokenizer_class": "ChatGLMTokenizer", "auto_map": code}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(released):
    return AutoTokenizer.from_pretrained(released)


def reference_case(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(REFERENCE / "reference_io.safetensors")
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def inputs_of(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: case[key] for key in ("input_ids", "attention_mask", "position_ids")}


def conversations() -> list[dict]:
    return json.loads((REFERENCE / "chat_golden.json").read_text(encoding="utf-8"))["conversations"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["left_pad", "right_pad", "single_promptmask"])
def test_logits_loss_and_gradients_are_the_vendors(released, name, attention):
    case = reference_case(name)
    model = AutoModelForCausalLM.from_pretrained(released, attn_implementation=attention)
    assert type(model) is ChatGLMForCausalLM
    output = model(**inputs_of(case), labels=case["labels"])
    output.loss.backward()
    real = case["attention_mask"] == 1
    torch.testing.assert_close(output.logits[real], case["logits"][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, case["loss"], rtol=0, atol=1e-5)
    gradients = {key.removeprefix("grad."): tensor for key, tensor in case.items() if key.startswith("grad.")}
    assert len(gradients) == 5
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(parameter).grad, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_are_bit_equal_to_the_vendors(released, dtype):
    case = reference_case("left_pad")
    model = AutoModelForCausalLM.from_pretrained(released, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        logits = model(**inputs_of(case)).logits
    real = case["attention_mask"] == 1
    expected = load_file(REFERENCE / "half_logits_left_pad.safetensors")[dtype]
    assert logits.dtype == expected.dtype
    assert torch.equal(logits[real], expected[real])


def test_the_bin_file_with_inv_freq_loads_like_the_safetensors(released, tmp_path, caplog):
    shutil.copyfile(REFERENCE / "tiny_chatglm3" / "config.json", tmp_path / "config.json")
    shutil.copyfile(REFERENCE / "tiny_chatglm3" / "pytorch_model_with_inv_freq.bin", tmp_path / "pytorch_model.bin")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(released).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert "inv_freq" not in caplog.text


def test_an_adapter_of_the_old_stack_gives_the_old_logits(released):
    from peft import PeftModel

    case = reference_case("left_pad")
    expected = load_file(REFERENCE / "adapter_default_peft0.11" / "expected_left_pad.safetensors")
    base = AutoModelForCausalLM.from_pretrained(released)
    model = PeftModel.from_pretrained(base, REFERENCE / "adapter_default_peft0.11").eval()
    with torch.no_grad():
        output = model(**inputs_of(case), labels=case["labels"])
    real = case["attention_mask"] == 1
    assert (case["logits"] - expected["logits"])[real].abs().max() > 0.1
    torch.testing.assert_close(output.logits[real], expected["logits"][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=1e-5)


def test_the_ids_of_every_string_are_the_vendors(tokenizer):
    strings = json.loads((REFERENCE / "tokenizer_strings.json").read_text(encoding="utf-8"))
    assert len(strings) == 300
    for string in strings:
        assert tokenizer(string["text"], add_special_tokens=False)["input_ids"] == string["ids"], string["text"]
    assert tokenizer.stop_token_ids == [2, 64795, 64797]
    assert tokenizer("\n")["input_ids"] == [64790, 64792, 30910, 13]


def test_ids_and_text_are_sentencepieces_on_random_pieces(tokenizer):
    spm = pytest.importorskip("sentencepiece")
    processor = spm.SentencePieceProcessor(str(REFERENCE / "tokenizer.model"))
    draw = random.Random(0)
    pieces = [processor.id_to_piece(index).replace("\u2581", " ") for index in range(259, 64789)]
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=draw.randrange(12))) + draw.choice(" =-a\n") * draw.randrange(40)
        ids = processor.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == processor.decode(ids), text


@pytest.mark.parametrize("index", range(20))
def test_a_conversation_has_the_vendors_ids_prompt_and_labels(tokenizer, index):
    golden = conversations()[index]
    ids, turns = tokenizer.encode_conversation(golden["messages"])
    assert ids == [*golden["full_ids"], 2]
    assert tokenizer.encode_prompt(golden["messages"][: golden["prompt_upto"] + 1]) == golden["prompt_ids"]
    trained = {position for start, stop in turns for position in range(start, stop)}
    labels = [token if position in trained else -100 for position, token in enumerate(ids)]
    if "train_hf" in golden:  # the vendor's code for plain conversations takes no tools
        assert ids == golden["train_hf"]["input_ids"]
        assert labels == golden["train_hf"]["labels"]


def test_the_template_differs_only_where_content_spells_a_control_token(tokenizer):
    different = [
        golden["name"]
        for golden in conversations()
        if tokenizer.apply_chat_template(golden["messages"])["input_ids"] != [*golden["full_ids"], 2]
    ]
    assert different == ["inject_user_tok", "inject_all", "gmask_text"]


def test_the_glm_export_has_the_vendors_prompts_and_logits(released, tokenizer, tmp_path):
    case = reference_case("left_pad")
    save_glm(AutoModelForCausalLM.from_pretrained(released), tokenizer, tmp_path)
    model, exported = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**inputs_of(case)).logits
    real = case["attention_mask"] == 1
    torch.testing.assert_close(logits[real], case["logits"][real], rtol=0, atol=1e-5)
    assert model.generation_config.eos_token_id == [2, 64795, 64797]
    different = []
    for golden in conversations():
        messages = golden["messages"][: golden["prompt_upto"] + 1]
        ids = exported.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if ids != golden["prompt_ids"]:
            different.append(golden["name"])
    assert different == ["inject_user_tok", "inject_all", "gmask_text"]
