"""recipes/chatglm3_4bit.yaml from a released folder to an export, on the CPU, with tiny random weights."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_sft
import sft.model.chatglm3
from sft.recipe import load_recipe
from tests.seeds import NESTED_SEED

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/chatglm3_4bit.yaml"
VENDOR_TOKENIZER = ROOT.parent / "shared/chatglm3/tokenizer.model"  # not part of the repository
CODE = "modeling_chatglm.ChatGLMForConditionalGeneration"
CONVERSATIONS = [
    [{"role": "user", "content": "Who are the philosophers among these people?"}],
    [
        {"role": "system", "content": "You are Maren, keeper of the lighthouse on Skerry Rock."},
        {"role": "user", "content": "  你好，今天的天气怎么样？\n"},
        {"role": "assistant", "content": "Aye, friend."},
        {"role": "user", "content": "15°C <b>&\n\n```python\nprint(1)\n```"},
    ],
    [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "metadata": "get_weather", "content": "tool_call(city='Paris')"},
        {"role": "observation", "content": "15"},
    ],
]


def train_tokenizer(folder: Path) -> None:
    """A tokenizer.model of the released kind, from the demo data with the words left out that hold "sop" or "eop"."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece (requirements-dev) trains the tokenizer")
    rows = (ROOT / "data/demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    words = [[word for word in row.split(" ") if "sop" not in word and "eop" not in word] for row in rows]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(row) for row in words]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The layout of the released repository: fp16 shards, config.json and tokenizer_config.json naming remote code."""
    folder = tmp_path_factory.mktemp("released")
    if VENDOR_TOKENIZER.is_file():
        shutil.copyfile(VENDOR_TOKENIZER, folder / "tokenizer.model")
    else:
        train_tokenizer(folder)
    tokenizer_code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    named = {"name_or_path": "THUDM/chatglm3-6b", "tokenizer_class": "ChatGLMTokenizer", "auto_map": tokenizer_code}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    sizes = {
        "padded_vocab_size": 65024,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_group_num": 2,
        "seq_length": 8192,
    }
    torch.manual_seed(0)
    model = sft.model.chatglm3.ChatGLMForCausalLM(sft.model.chatglm3.ChatGLMConfig(**sizes, initializer_range=0.1))
    config = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "torch_dtype": "float16"}
    code = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": CODE, "AutoModelForCausalLM": CODE}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code} | sizes), encoding="utf-8")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def command(released, tmp_path_factory):
    """The recipe with this model and the demo data; the rest as it stands, but two steps and short answers."""
    return [
        str(RECIPE),
        f"model_name_or_path={released}",
        f"output_dir={tmp_path_factory.mktemp('chatglm3') / 'out'}",
        f"dataset.train={ROOT}/data/demo/train.jsonl",
        f"dataset.validation={ROOT}/data/demo/validation.jsonl",
        f"dataset.test={ROOT}/data/demo/test.jsonl",
        "dataset.max_length=256",
        "training_args.max_steps=2",
        "training_args.gradient_accumulation_steps=1",
        "training_args.learning_rate=1e-2",
        "training_args.save_steps=1",
        "training_args.logging_steps=1",
        "training_args.per_device_eval_batch_size=8",
        "evaluation.generation.max_new_tokens=4",
        "evaluation.max_samples=2",
    ]


def run_command(arguments: list[str]) -> str:
    """run_sft.py in this process; returns what it printed. No loader is ever asked to trust remote code."""
    printed, trusted = io.StringIO(), []
    loaders = [transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM]

    def watched(load):
        def call(*args, **kwargs):
            trusted.append(kwargs.get("trust_remote_code"))
            return load(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for loader in loaders:
            patch.setattr(loader, "from_pretrained", watched(loader.from_pretrained))
        assert run_sft.main(arguments) == 0, printed.getvalue()
    assert trusted and not any(trusted)
    return printed.getvalue()


@pytest.fixture(scope="module")
def output(command):
    run_command(command)
    return Path(command[2].removeprefix("output_dir="))


def exported_as(command, output, name: str) -> Path:
    """final_model/ written again in a format, from the adapter that `output` holds."""
    folder = output.parent / name
    folder.mkdir()
    for left in ("lora_adapter", "training_config.json"):
        copy = shutil.copytree if (output / left).is_dir() else shutil.copyfile
        copy(output / left, folder / left)
    run_command([*command, "--export", f"output_dir={folder}", f"export.format={name}", "model_init.dtype=float32"])
    return folder / "final_model"


def tuned_model(released, output):
    """The released base in float32 with the run's adapter on it."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    return PeftModel.from_pretrained(base, output / "lora_adapter").eval()


def parameter_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_the_run_leaves_adapter_model_scores_and_report(output):
    written = {path.name for path in output.iterdir()}
    assert written >= {"checkpoint-1", "checkpoint-2", "lora_adapter", "final_model", "scores.json", "report.html"}
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert scores["rows"] == 2 and {"base", "tuned"} <= scores.keys()
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert evaluated[-1] < evaluated[0]


def test_a_rerun_goes_on_from_a_checkpoint_and_ends_in_the_same_adapter(command, output, tmp_path):
    before = load_file(output / "lora_adapter/adapter_model.safetensors")
    cut = tmp_path / "out"
    cut.mkdir()
    shutil.copytree(output / "checkpoint-1", cut / "checkpoint-1")
    arguments = [*command, f"output_dir={cut}", "dataset.test=null", "export.merge=false"]
    assert f"going on from {cut / 'checkpoint-1'}" in run_command(arguments)
    after = load_file(cut / "lora_adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert "training is finished" in run_command(arguments)


def test_the_adapter_keeps_the_original_names_and_changes_the_released_base(released, output):
    with safe_open(output / "lora_adapter/adapter_model.safetensors", "pt") as adapter:
        names = set(adapter.keys())
    modules = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    assert names == {
        f"base_model.model.transformer.encoder.layers.{layer}.{module}.lora_{side}.weight"
        for layer in (0, 1)
        for module in modules
        for side in "AB"
    }
    ids = torch.tensor([[64790, 64792, 64795, 30910, 13, 300, 64796]])
    tuned = tuned_model(released, output)
    with torch.no_grad():
        logits = tuned(ids).logits
        with tuned.disable_adapter():
            assert (tuned(ids).logits - logits).abs().max() > 1e-3


# Runs in a process of its own, isolated, in a folder from where our code cannot be imported.
PLAIN_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, seen = sys.argv[1:], []
folder, chats = folder[0], json.load(open(folder[1], encoding="utf-8"))
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
for chat in chats:
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        seen.append({"ids": inputs["input_ids"][0].tolist(), "logits": model(**inputs).logits[0, -1].tolist()})
assert not [name for name in sys.modules if name.split(".")[0] == "sft"]
generation = model.generation_config
print(json.dumps({
    "model": type(model).__name__,
    "stops": generation.eos_token_id,
    "pad": generation.pad_token_id,
    "chats": seen,
}))
"""


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.json"
    path.write_text(json.dumps(CONVERSATIONS), encoding="utf-8")
    return path


def test_plain_transformers_runs_the_glm_export_as_base_and_adapter(command, released, output, chats):
    tokenizer = AutoTokenizer.from_pretrained(released)
    prompts = [tokenizer.encode_prompt(chat) for chat in CONVERSATIONS]
    tuned = tuned_model(released, output)
    with torch.no_grad():
        logits = [tuned(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]

    folder = exported_as(command, output, "glm")
    process = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, str(folder), str(chats)],
        cwd=chats.parent,
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen["model"] == "GlmForCausalLM"
    assert [chat["ids"] for chat in seen["chats"]] == prompts
    for chat, expected in zip(seen["chats"], logits, strict=True):
        torch.testing.assert_close(torch.tensor(chat["logits"]), expected, rtol=0, atol=1e-5)
    assert seen["stops"] == tokenizer.stop_token_ids
    assert seen["pad"] == 0
    if VENDOR_TOKENIZER.is_file():
        assert seen["stops"] == [2, 64795, 64797]


def test_the_run_itself_writes_the_glm_format(output):
    config = json.loads((output / "final_model/config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], "auto_map" in config) == ("glm", False)
    assert {path.name for path in (output / "final_model").iterdir()} == {
        "Modelfile",
        "README.md",
        "chat_template.jinja",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",  # the base's shards
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_config.json",
    }


def test_the_chatglm_export_has_the_original_names_and_loads_back(command, released, output):
    folder = exported_as(command, output, "chatglm")
    with safe_open(released / "model-00001-of-00002.safetensors", "pt") as first:
        with safe_open(released / "model-00002-of-00002.safetensors", "pt") as second:
            assert parameter_names(folder) == {*first.keys(), *second.keys()}
    assert (folder / "tokenizer.model").read_bytes() == (released / "tokenizer.model").read_bytes()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCausalLM"] == f"THUDM/chatglm3-6b--{CODE}"

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is sft.model.chatglm3.ChatGLMForCausalLM
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids
    tuned = tuned_model(released, output)
    ids = torch.tensor([tokenizer.encode_prompt(CONVERSATIONS[1])])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=0, atol=1e-5)


def test_full_fine_tuning_of_a_model_in_the_home_folder_is_exported_and_scored(
    command, released, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(released.parent))
    output = tmp_path / "out"
    arguments = [
        *command,
        f"model_name_or_path='~/{released.name}'",
        f"output_dir={output}",
        "quantization_config=null",
        "lora_config=null",
        "dataset.validation=null",
        "training_args.max_steps=1",
        "training_args.save_strategy=no",
        "export.format=chatglm",
    ]
    run_command(arguments)
    assert (output / "final_model/tokenizer.model").is_file()
    assert "transformer.output_layer.weight" in parameter_names(output / "final_model")
    first = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    run_command([*arguments, "--score"])
    again = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    for name in ("base", "tuned", "difference"):  # a model that has trained computes in other roundings
        assert again["general"].pop(name) == pytest.approx(first["general"].pop(name), abs=0.01)
    assert again == first


def test_answers_hold_no_metadata_line_and_no_control_token(output):
    for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        for text in (answer["base"], answer["tuned"]):
            assert not any(token in text for token in ("<|user|>", "<|assistant|>", "[gMASK]", "</s>"))


def test_check_shows_ledger_masks_stop_tokens_and_memory(command, released, tmp_path):
    output = tmp_path / "out"
    said = run_command([*command, f"output_dir={output}", "--check"])
    assert not output.exists(), "--check writes nothing"
    assert "train.jsonl" in said
    # The first row; each message is two texts, the line of its role and what it says, each with SentencePiece's space.
    prompt = (
        "[gMASK]sop<|system|> \n You are Maren, keeper of the lighthouse on Skerry Rock."
        "<|user|> \n Hello there!<|assistant|>"
    )
    answer = (
        "\n Ahoy, friend. Come in out of the spray, the kettle's on and the stairs are only ninety-six. "
        "What brings you to my rock? The lamp's lit for you.</s>"
    )
    assert f"{prompt}[[{answer}]]\n" in said
    stops = AutoTokenizer.from_pretrained(released).stop_token_ids
    names = ("</s>", "<|user|>", "<|observation|>")
    listed = ", ".join(f"{name} ({token})" for name, token in zip(names, stops, strict=True))
    assert f"stop token {listed}: trained on in each of 225 answers looked at" in said
    assert "memory: about" in said and "the recipe can be run" in said


def test_the_nested_seed_trains_as_printed_on_its_own_model(released, tmp_path):
    seed = tmp_path / "config.yaml"
    seed.write_text(NESTED_SEED, encoding="utf-8")
    overrides = [
        f"model.base_model_path={released}",
        f"model.output_dir={tmp_path / 'out'}",
        f"dataset.train_path={ROOT}/data/demo/validation.jsonl",
        f"dataset.val_path={ROOT}/data/demo/test.jsonl",
        "training.max_steps=1",
        "training.gradient_accumulation_steps=1",
        "training.per_device_eval_batch_size=8",
    ]
    run_command([str(seed), *overrides])
    adapter = json.loads((tmp_path / "out/lora_adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert set(adapter["target_modules"]) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert (tmp_path / "out/final_model/model.safetensors.index.json").is_file()


def test_the_recipe_has_the_seeds_values(tmp_path):
    seed = tmp_path / "config.yaml"
    seed.write_text(NESTED_SEED, encoding="utf-8")
    nested, flat = load_recipe(seed), load_recipe(RECIPE)
    assert flat.model_name_or_path == nested.model_name_or_path
    assert flat.quantization_config == nested.quantization_config
    assert flat.lora_config == nested.lora_config
    assert flat.dataset.max_length == nested.dataset.max_length
    assert nested.training_args.items() <= flat.training_args.items()
