"""Whole runs through run_sft.py on a tiny random model with the real Qwen2.5 tokenizer."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import run_sft
from tests import forked
from tests.seeds import FLAT_SEED, NESTED_SEED

ROOT = Path(__file__).resolve().parent.parent
DEMO = [
    f"dataset.train=[{ROOT}/data/demo/train.jsonl, {ROOT}/data/demo/train_instruction.jsonl]",
    f"dataset.validation={ROOT}/data/demo/validation.jsonl",
    f"dataset.test={ROOT}/data/demo/test.jsonl",
    "dataset.max_length=640",
    "training_args.logging_steps=1",
    "training_args.per_device_eval_batch_size=8",
    "evaluation.generation.max_new_tokens=4",
    "evaluation.max_samples=2",
]


def command(recipe, output, model, *overrides):
    return [str(recipe), f"model_name_or_path={model}", f"output_dir={output}", *DEMO, *overrides]


def run_process(arguments, cache, stdout=subprocess.PIPE):
    """run_sft.py in a process of its own."""
    return forked.Popen(
        [sys.executable, str(ROOT / "run_sft.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(output):
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.fixture(scope="module")
def qlora_run(tiny_qwen, tmp_path_factory):
    """recipes/qwen_qlora.yaml, four steps in 4 bits, everything after it."""
    output = tmp_path_factory.mktemp("qlora") / "out"
    arguments = command(
        ROOT / "recipes/qwen_qlora.yaml", output, tiny_qwen, "training_args.max_steps=4", "training_args.save_steps=2"
    )
    assert run_sft.main(arguments) == 0
    return output, arguments


def test_qlora_recipe_leaves_everything_that_the_design_lists(qlora_run):
    output, _ = qlora_run
    for name in (
        "checkpoint-2",
        "checkpoint-4",
        "lora_adapter",
        "final_model",
        "training_config.json",
        "data_ledger.json",
        "scores.json",
        "predictions.jsonl",
        "report.html",
        "loss.png",
    ):
        assert (output / name).exists(), name
    assert not list(output.glob(".*")), "something was left half-written"
    config = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    assert config["recipe"]["lora_config"]["r"] == 32
    assert config["versions"]["trl"] == "1.16.0"
    assert all(len(value) == 64 for value in config["data"].values())
    copy = json.loads((output / "final_model/training_config.json").read_text(encoding="utf-8"))
    assert copy["recipe"] == config["recipe"]
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert scores["rows"] == 2
    assert set(scores["base"]["bleu"]) == {"score", "low", "high", "signature"}
    prediction = json.loads((output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(prediction) == {"row", "turn", "messages", "reference", "base", "tuned"}
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert history[0]["step"] == 0 and "eval_loss" in history[0], "validation before the first step"


def test_no_pickle_is_left_beside_the_weights_that_are_given_away(qlora_run):
    output, _ = qlora_run
    for folder in ("lora_adapter", "final_model"):
        kinds = {path.suffix or path.name for path in (output / folder).iterdir()}
        assert kinds <= {".safetensors", ".json", ".jinja", ".md", "Modelfile"}


def test_final_model_is_base_and_adapter_in_plain_transformers_and_peft(qlora_run, tiny_qwen):
    output, _ = qlora_run
    code = f"""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        ids = torch.tensor([[151644, 872, 198, 6023, 151645]])
        final = AutoModelForCausalLM.from_pretrained({str(output / "final_model")!r}, dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained({str(tiny_qwen)!r}, dtype=torch.float32)
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, {str(output / "lora_adapter")!r})(ids).logits
        tokenizer = AutoTokenizer.from_pretrained({str(output / "final_model")!r})
        assert (tuned - plain).abs().max() > 1e-4, "training changed nothing"
        assert (final(ids).logits - tuned).abs().max() < 0.02, "bfloat16 rounding of the merged weights at most"
        assert 151645 in final.generation_config.eos_token_id
        assert "<|im_start|>" in tokenizer.chat_template
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=output)


def test_a_server_renders_the_final_model_as_it_was_trained(qlora_run):
    output, _ = qlora_run
    for folder in (output, output / "final_model"):
        parity = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))["parity"]
        assert (parity["prompts"], parity["spelled_control_tokens"]) == (38, 0)
        assert parity["trained_stops"] == {"<|im_end|>": 151645}
        assert parity["stops"]["<|im_end|>"] == 151645
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "turns 38 prompts into the tokens of training, and answers end at" in page


def test_the_final_model_is_certified_and_told_apart_from_the_4_bit_model_that_was_trained(qlora_run):
    output, _ = qlora_run
    for folder in (output, output / "final_model"):
        merge = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))["merge"]
        assert (merge["prompts"], merge["positions"], merge["dtype"]) == (8, 8 * 32, "bfloat16")
        assert merge["merge_error"] < 1e-5 < 1e-4 <= merge["bound"] < 1e-3
        assert merge["float32"]["logits"] < merge["export"]["logits"] < merge["quantised"]["logits"]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Merge: on 256 tokens of 8 prompts final_model/ is base and adapter to" in page


def test_same_command_again_trains_nothing_and_changes_nothing(qlora_run, capfd):
    output, arguments = qlora_run
    before, log = digest(output / "lora_adapter"), losses(output)
    assert run_sft.main(arguments) == 0
    assert digest(output / "lora_adapter") == before
    assert losses(output) == log
    assert "training is finished" in capfd.readouterr().out


def test_score_and_export_verbs_redo_their_part_of_a_run(qlora_run):
    output, arguments = qlora_run
    before = (output / "scores.json").read_text(encoding="utf-8")
    (output / "scores.json").unlink()
    assert run_sft.main([*arguments, "--score"]) == 0
    again, first = (json.loads(text) for text in ((output / "scores.json").read_text(encoding="utf-8"), before))
    for name in ("base", "tuned", "difference"):  # a 4-bit model that has trained computes in other roundings
        assert again["general"].pop(name) == pytest.approx(first["general"].pop(name), abs=0.01)
    assert again == first
    weights = (output / "final_model/model.safetensors").read_bytes()
    (output / "final_model/model.safetensors").unlink()
    (output / "report.html").unlink()
    assert run_sft.main([*arguments, "--export"]) == 0
    assert (output / "final_model/model.safetensors").read_bytes() == weights
    assert "final_model/ is base and adapter to " in (output / "report.html").read_text(encoding="utf-8")
    assert json.loads(before)["model"] == "adapter"
    assert run_sft.main([*arguments, "--score", "evaluation.model=final"]) == 0
    assert json.loads((output / "scores.json").read_text(encoding="utf-8"))["model"] == "final"
    assert "final_model/, as shipped" in (output / "report.html").read_text(encoding="utf-8")


def test_checkpoint_of_another_recipe_is_not_resumed(qlora_run, capfd):
    _, arguments = qlora_run
    assert run_sft.main([*arguments, "training_args.learning_rate=1e-3"]) == 2
    assert "training_args.learning_rate: 0.0002 then, 0.001 now" in capfd.readouterr().err


def test_a_second_run_in_the_same_output_dir_is_refused_and_leaves_the_first_alone(qlora_run, capfd):
    output, arguments = qlora_run
    before = digest(output / "lora_adapter")
    with FileLock(output / ".lock"):  # as a run holds it
        assert run_sft.main(arguments) == 2
    assert f"another run is writing to {output}; wait until it ends" in capfd.readouterr().err
    (output / ".lock").unlink(missing_ok=True)
    assert digest(output / "lora_adapter") == before


def test_false_resume_refuses_an_output_dir_that_is_not_empty(qlora_run, capfd):
    _, arguments = qlora_run
    assert run_sft.main([*arguments, "resume_from_checkpoint=false"]) == 2
    assert "output_dir must be empty" in capfd.readouterr().err


LORA = ["quantization_config=null", "training_args.optim=adamw_torch", "training_args.bf16=false"]
LORA += ["model_init.dtype=float32", "dataset.test=null", "export.merge=false", "training_args.eval_on_start=false"]


def test_ctrl_c_saves_and_the_same_command_ends_as_if_it_never_came(small_qwen, tmp_path):
    recipe = ROOT / "recipes/qwen_qlora.yaml"
    overrides = [*LORA, "training_args.max_steps=12", "training_args.save_steps=1000"]
    straight = command(recipe, tmp_path / "straight", small_qwen, *overrides)
    stopped = command(recipe, tmp_path / "stopped", small_qwen, *overrides)
    process = run_process(stopped, tmp_path / "cache")
    seen = ""
    while "  loss " not in seen:
        seen += process.stdout.readline()
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 130, seen + rest
    assert "the same command goes on from there" in rest
    assert not (tmp_path / "stopped/lora_adapter").exists()
    assert run_sft.main(stopped) == 0
    assert run_sft.main(straight) == 0
    assert digest(tmp_path / "stopped/lora_adapter") == digest(tmp_path / "straight/lora_adapter")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
def test_killed_run_goes_on_from_its_newest_whole_checkpoint(small_qwen, tmp_path, capfd):
    """Begun at a terminal, where it shows one live line; ended in a pipe, where it shows plain ones."""
    recipe = ROOT / "recipes/qwen_qlora.yaml"
    arguments = command(
        recipe, tmp_path / "out", small_qwen, *LORA, "training_args.max_steps=12", "training_args.save_steps=2"
    )
    from tests.terminals import Terminal  # which Windows has none of

    terminal = Terminal()
    process = run_process(arguments, tmp_path / "cache", stdout=terminal.outside)
    until = time.monotonic() + 300
    while not (tmp_path / "out/checkpoint-4/trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < until, terminal.text
        time.sleep(0.02)
    process.kill()
    process.communicate()
    lines = terminal.shown()
    live = r"step ━+[╸╺━ ]* \d+/12 .*loss \d+\.?\d* .*lr \S+ [\d,]+ tok/s \d+\.\d GB"
    assert any(re.match(live, line) for line in lines), lines
    assert not [line for line in lines if re.match("step|validating|tokenising", line) and len(line) > 80]
    assert not any("{" in line for line in lines), lines
    half = tmp_path / "out/checkpoint-99"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"cut off")
    assert run_sft.main(arguments) == 0
    said = capfd.readouterr().out
    assert "going on from" in said and "checkpoint-99" not in said
    assert re.search(r"^step 12 of 12  loss .* tok/s .* GB  0:00:00 left$", said, re.M) and "\x1b" not in said
    assert json.loads((tmp_path / "out/trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 12
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert re.search(r"training, since checkpoint-\d+", page), "its time is that of the last start"


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_stream_goes_on_where_it_was(small_qwen, tmp_path, packing):
    stream = ["dataset.streaming=true", f"dataset.packing={packing}", "dataset.test=null", "export.merge=false"]
    steps = ["training_args.max_steps=6", "training_args.save_steps=4", "training_args.eval_strategy=no"]
    arguments = command(ROOT / "recipes/qwen_qlora.yaml", tmp_path / "out", small_qwen, *LORA, *stream, *steps)
    assert run_sft.main(arguments) == 0
    whole = digest(tmp_path / "out/lora_adapter"), losses(tmp_path / "out")
    for left in ("lora_adapter", "checkpoint-6"):
        shutil.rmtree(tmp_path / "out" / left)
    assert run_sft.main(arguments) == 0
    assert (digest(tmp_path / "out/lora_adapter"), losses(tmp_path / "out")) == whole


def test_same_recipe_data_and_seed_give_the_same_adapter(small_qwen, tmp_path):
    made = []
    for name in ("one", "two"):
        arguments = command(
            ROOT / "recipes/qwen_qlora.yaml", tmp_path / name, small_qwen, *LORA, "training_args.max_steps=3"
        )
        assert run_sft.main(arguments) == 0
        made.append(digest(tmp_path / name / "lora_adapter"))
    assert made[0] == made[1]


@pytest.mark.parametrize(("named", "saved"), [("null", torch.bfloat16), ("float32", torch.float32)])
def test_full_fine_tuning_writes_a_model_in_the_bases_dtype_or_the_named_and_scores_it(
    small_qwen, tmp_path, named, saved
):
    shutil.copytree(small_qwen, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(small_qwen, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    arguments = command(
        ROOT / "recipes/qwen_qlora.yaml",
        tmp_path / "out",
        tmp_path / "base",
        f"model_init.dtype={named}",
        "quantization_config=null",
        "lora_config=null",
        "training_args.optim=adamw_torch",
        "training_args.max_steps=2",
        "training_args.save_strategy=no",
        "dataset.packing=false",
    )
    assert run_sft.main(arguments) == 0
    weights = load_file(tmp_path / "out/final_model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {saved}
    held = 4 * sum(tensor.numel() for tensor in weights.values())  # float32, named or not
    ledger = json.loads((tmp_path / "out/data_ledger.json").read_text(encoding="utf-8"))
    assert ledger["memory"] == {"weights": held, "gradients": held, "moments": 2 * held}
    assert not (tmp_path / "out/lora_adapter").exists()
    assert set(json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))) >= {"base", "tuned"}


def test_training_in_8_bit_goes_on_from_an_adapter(small_qwen, tmp_path):
    recipe = ROOT / "recipes/qwen_qlora.yaml"
    first = command(recipe, tmp_path / "first", small_qwen, *LORA, "training_args.max_steps=1")
    assert run_sft.main(first) == 0
    adapter = tmp_path / "first/lora_adapter"
    arguments = command(
        recipe,
        tmp_path / "second",
        small_qwen,
        f"adapter_name_or_path={adapter}",
        "quantization_config={load_in_8bit: true}",
        "training_args.max_steps=1",
        "dataset.test=null",
        "export.merge=false",
    )
    assert run_sft.main(arguments) == 0
    assert digest(tmp_path / "second/lora_adapter") != digest(adapter)


def test_flat_seed_trains_as_printed(small_qwen, tmp_path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(FLAT_SEED, encoding="utf-8")
    data = tmp_path / "novel.jsonl"
    row = {"instruction": "请写一个关于春天的短诗", "input": "", "output": "春风轻拂柳絮飞，\n桃花满树映朝晖。"}
    data.write_text(
        "".join(json.dumps({**row, "system": f"你是第{i}位小说家"}) + "\n" for i in range(9)), encoding="utf-8"
    )
    overrides = [f"model_name_or_path={small_qwen}", f"dataset_path={data}", f"output_dir={tmp_path / 'out'}"]
    assert run_sft.main([str(recipe), *overrides, "training_args.max_steps=1"]) == 0
    assert (tmp_path / "out/lora_adapter/adapter_config.json").is_file()


def test_nested_seed_trains_as_printed(small_qwen, tmp_path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(NESTED_SEED, encoding="utf-8")
    overrides = [
        f"model.base_model_path={small_qwen}",
        f"model.output_dir={tmp_path / 'out'}",
        f"dataset.train_path={ROOT}/data/demo/train.jsonl",
        f"dataset.val_path={ROOT}/data/demo/validation.jsonl",
        "dataset.max_length=640",
        "training.max_steps=1",
        "lora.target_modules=[q_proj, v_proj]",
    ]
    assert run_sft.main([str(recipe), *overrides]) == 0
    assert (tmp_path / "out/lora_adapter/adapter_config.json").is_file()


def test_check_shows_masks_stop_token_and_memory_and_writes_nothing(tiny_qwen, tmp_path, capfd):
    arguments = command(ROOT / "recipes/qwen_qlora.yaml", tmp_path / "out", tiny_qwen, "--check")
    assert run_sft.main(arguments) == 0
    said = capfd.readouterr().out
    answer = "Aye, friend. I'm Maren, keeper of the light on Skerry Rock."
    assert f"<|im_start|>assistant\n[[{answer}" in said
    assert "Keep your lamp lit.<|im_end|>]]" in said
    assert "stop token <|im_end|> (151645): trained on in each of 285 answers" in said
    assert "memory: about" in said and "disk: about" in said and "time: " in said
    assert not (tmp_path / "out").exists()


def test_two_templates_in_the_recipe_serve_a_model_without_a_chat_template(small_qwen, tmp_path, capfd):
    bare = tmp_path / "bare"
    shutil.copytree(small_qwen, bare)
    (bare / "chat_template.jinja").unlink()
    templates = ['chat.response_template="### Answer:\\n"', 'chat.instruction_template="### Question:\\n"']
    arguments = command(ROOT / "recipes/qwen_qlora.yaml", tmp_path / "out", bare)
    assert run_sft.main([*arguments, "--check"]) == 2
    assert "chat.instruction_template and chat.response_template" in capfd.readouterr().err
    assert run_sft.main([*arguments, *templates, "--check"]) == 0
    assert "### Question:\nWho are you?\n### Answer:\n[[Aye, friend. I'm Maren" in capfd.readouterr().out
