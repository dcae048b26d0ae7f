"""`--score`: the run's own model or another, on any file."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import run_sft
from sft.recipe import load_recipe
from sft.results.evaluation import models_on_disk
from tests.results.chatters import count_generated, predictions, random_chatter, with_lora
from tests.test_run import ROOT, run_process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved: two models and an adapter of each."""
    root = tmp_path_factory.mktemp("saved")
    chatter = random_chatter("smollm2")
    for name, seed in (("model", 0), ("other", 5)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(chatter.model.config)
        model.save_pretrained(root / name)
        chatter.encoder.tokenizer.save_pretrained(root / name)
        with_lora(model, seed + 1).save_pretrained(root / f"{name}_adapter")
    row = {"conversation": [{"human": "Hello there", "assistant": "Fair and dry."}]}
    (root / "short.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    return root


def score_command(folders, output, *overrides):
    return [
        str(ROOT / "recipes/smollm2_cpu.yaml"),
        f"model_name_or_path={folders}/model",
        f"output_dir={output}",
        f"dataset.train={ROOT}/data/demo/train.jsonl",
        f"dataset.validation={ROOT}/data/demo/validation.jsonl",
        f"dataset.test={ROOT}/data/demo/test.jsonl",
        "dataset.max_length=4096",
        "model_init.dtype=float32",
        "evaluation.metrics=[chrf]",
        "evaluation.generation.max_new_tokens=6",
        "evaluation.max_samples=4",
        "--score",
        *overrides,
    ]


def answers_in(folder: Path, name: str) -> list[str | None]:
    return [row[name] for row in predictions(folder)]


def test_score_takes_the_runs_own_adapter_or_another_by_override(folders, tmp_path):
    shutil.copytree(folders / "model_adapter", tmp_path / "lora_adapter")
    assert run_sft.main(score_command(folders, tmp_path)) == 0
    own = answers_in(tmp_path, "tuned")
    assert None not in own and own != answers_in(tmp_path, "base")
    another = score_command(folders, tmp_path, f"adapter_name_or_path={folders}/other_adapter")
    assert run_sft.main(another) == 0
    assert answers_in(tmp_path, "tuned") != own


def test_score_of_a_folder_without_a_run_scores_the_model_alone_and_any_file(folders, tmp_path, capfd):
    output = tmp_path / "nothing"
    assert run_sft.main(score_command(folders, output, f"dataset.test={folders}/short.jsonl")) == 0
    printed = capfd.readouterr().out
    assert "holds no run: scoring" in printed and "  chrf  " in printed and "  95 %: " in printed
    assert [row["reference"] for row in predictions(output)] == ["Fair and dry."] * 3
    assert answers_in(output, "tuned") == [None] * 3
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert "tuned" not in scores and scores["rows"] == 3


def test_score_takes_another_model_by_override(folders, tmp_path):
    assert run_sft.main(score_command(folders, tmp_path / "one")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "two", f"model_name_or_path={folders}/other")) == 0
    assert answers_in(tmp_path / "one", "base") != answers_in(tmp_path / "two", "base")


def test_score_of_a_full_fine_tuning_takes_its_final_model(folders, tmp_path):
    shutil.copytree(folders / "other", tmp_path / "run/final_model")
    assert run_sft.main(score_command(folders, tmp_path / "run", "lora_config=null")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "two", f"model_name_or_path={folders}/other")) == 0
    assert run_sft.main(score_command(folders, tmp_path / "one")) == 0
    assert answers_in(tmp_path / "run", "tuned") == answers_in(tmp_path / "two", "base")
    assert answers_in(tmp_path / "run", "base") == answers_in(tmp_path / "one", "base")


def test_score_of_the_final_model_takes_it_and_no_adapter(folders, tmp_path, capfd):
    final = ["evaluation.model=final"]
    assert run_sft.main(score_command(folders, tmp_path, *final)) == 2
    assert f"evaluation.model=final: there is no {tmp_path}/final_model; set" in capfd.readouterr().err
    shutil.copytree(folders / "other", tmp_path / "final_model")
    shutil.copytree(folders / "model_adapter", tmp_path / "lora_adapter")
    assert run_sft.main(score_command(folders, tmp_path, *final)) == 0
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["model"] == "final"
    assert run_sft.main(score_command(folders, tmp_path / "two", f"model_name_or_path={folders}/other")) == 0
    assert answers_in(tmp_path, "tuned") == answers_in(tmp_path / "two", "base")
    overrides = [*score_command(folders, tmp_path, *final)[1:], "quantization_config={load_in_4bit: true}"]
    recipe = load_recipe(ROOT / "recipes/smollm2_cpu.yaml", [each for each in overrides if each != "--score"])
    base, _ = models_on_disk(recipe)
    assert not getattr(base.model, "is_quantized", False), "what is shipped is compared with what it began from"
    another = f"adapter_name_or_path={folders}/other_adapter"
    assert run_sft.main(score_command(folders, tmp_path, *final, another)) == 2
    assert f"final_model is not of the adapter {folders}/other_adapter; set evaluation.model" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_ends_as_if_nothing_had_happened_when_it_is_started_again(folders, tmp_path, monkeypatch):
    slow = ["evaluation.generation.max_new_tokens=60", "evaluation.batch_size=1", "evaluation.max_samples=16"]
    killed, straight = (score_command(folders, tmp_path / name, *slow) for name in ("killed", "straight"))
    process = run_process(killed, tmp_path / "cache")
    working, until = tmp_path / "killed/predictions.partial.jsonl", time.monotonic() + 60
    while not working.is_file() or working.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.communicate()
    kept = working.read_bytes().count(b"\n") - 1
    generated = count_generated(monkeypatch)
    assert run_sft.main(killed) == 0
    assert 3 <= kept == 16 - sum(generated) < 16
    assert run_sft.main(straight) == 0
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
