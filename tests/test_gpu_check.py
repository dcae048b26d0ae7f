"""benchmarks/gpu.py on a CPU: every check runs, what is broken is seen to fail, and no check can hold up the rest."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_checks import exact, speed
from benchmarks.gpu_checks.answers import answers
from benchmarks.gpu_checks.line import Line
from benchmarks.gpu_checks.models import recipe_for, small_qwen
from sft.model.load import meta_model
from sft.training.memory import estimate_memory
from sft.training.trainer import CompletionTrainer

ROOT = Path(__file__).resolve().parent.parent
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU run benchmarks/gpu.py itself")


@on_cpu
@pytest.mark.skipif(sys.platform == "win32", reason="whole_run needs SIGTERM")
def test_every_check_runs_on_a_cpu_and_passes_or_names_what_is_missing(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    command += ["--only", *gpu.CHECKS, *gpu.MORE_CHECKS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("This is a CPU: the shapes are tiny, and the figures mean nothing.\n")
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout[done.stdout.index("\n{\n") :]) == report
    assert list(dict.fromkeys(line["check"] for line in report["lines"])) == [*gpu.CHECKS, *gpu.MORE_CHECKS]
    missing = {f"{line['check']} {line['part']}".strip() for line in report["lines"] if line["outcome"] == "not here"}
    assert missing == {
        "machine driver and CUDA",
        "machine Triton",
        "packing_varlen",
        "packing_flex",
        "packing_flash",
        "qwen_qlora 512 tokens, memory",
        "qwen_qlora 1024 tokens, memory",
        "chatglm3_4bit 512 tokens, memory",
        "chatglm3_4bit 1024 tokens, memory",
        "fsdp2",
    }
    assert all(line["outcome"] in ("pass", "not here") and line["figure"] for line in report["lines"])
    assert report["counts"] == {"pass": 30, "not here": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "models were left behind"


def test_limits_of_all_checks_make_no_more_than_is_said():
    assert gpu.START_SECONDS + sum(limit for _, limit in gpu.CHECKS.values()) == 625


# ------------------------------------------------------------------------------------------- what is broken is seen


def outcomes(lines):
    return [line.outcome for line in lines]


@pytest.mark.parametrize("scale", [1.01, 0.99])
def test_loss_of_a_wrong_scale_fails(tmp_path, monkeypatch, scale):
    whole = CompletionTrainer.compute_loss
    monkeypatch.setattr(CompletionTrainer, "compute_loss", lambda *args, **kwargs: whole(*args, **kwargs) * scale)
    assert outcomes(exact.loss(tmp_path)) == ["fail", "fail"]


def test_right_loss_with_a_gradient_of_a_wrong_scale_fails(tmp_path, monkeypatch):
    def compute_loss(*args, **kwargs):
        loss = whole(*args, **kwargs)
        return 1.1 * loss - 0.1 * loss.detach()

    whole = CompletionTrainer.compute_loss
    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    assert outcomes(exact.loss(tmp_path)) == ["fail", "fail"]


def test_loss_that_is_not_a_number_in_packed_rows_only_fails(tmp_path, monkeypatch):
    def compute_loss(trainer, model, inputs, **kwargs):
        return whole(trainer, model, inputs, **kwargs) * (math.nan if "position_ids" in inputs else 1)

    whole = CompletionTrainer.compute_loss
    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    assert outcomes(exact.loss(tmp_path)) == ["fail", "fail"]


def test_packed_rows_that_see_each_other_fail(tmp_path, monkeypatch):
    whole = exact._packed
    monkeypatch.setattr(exact, "_packed", lambda rows: {"input_ids": whole(rows)["input_ids"]})
    assert outcomes(exact.packing_sdpa(tmp_path)) == ["fail", "fail"]


def test_answers_that_see_the_padding_fail(tmp_path, monkeypatch):
    from sft.results import answers as results

    tensor = torch.tensor
    monkeypatch.setattr(results.torch, "tensor", lambda rows, **options: tensor(rows, **options).clamp(min=1))
    *_, padding = answers(tmp_path)
    assert (padding.part, padding.outcome) == ("padding", "fail")


@pytest.mark.parametrize(
    "factor, outcome", [(1.0, "pass"), (1.14, "pass"), (1.2, "fail"), (0.88, "pass"), (0.8, "fail")]
)
def test_memory_that_the_estimate_misses_by_more_than_15_percent_fails(tmp_path, monkeypatch, factor, outcome):
    monkeypatch.setattr(speed, "ON_GPU", True)
    recipe = recipe_for(small_qwen(tmp_path))
    meta = meta_model(recipe)
    estimate = sum(estimate_memory(recipe, meta, own_loss=False).values())
    assert speed._memory(recipe, meta, round(estimate / factor)).outcome == outcome


def test_flops_of_a_token_are_those_counted_by_hand(tmp_path):
    recipe = recipe_for(small_qwen(tmp_path))
    # Two layers of q and o 64 x 64, k and v 64 x 32, three of 64 x 128; LoRA of rank 32 on the first four; half of the
    # tokens go through the head, 640 x 64.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    lora = 2 * 32 * (2 * (64 + 64) + 2 * (64 + 32))
    found = speed.flops_a_token(recipe, meta_model(recipe), [[-100, 5], [6, -100]])
    assert found == 4 * linear + 6 * lora + 4 * 640 * 64 / 2


# ------------------------------------------------------------------------------------------ no check holds up the rest


def test_check_that_raises_or_dies_has_failed_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MODULES", {})  # these need none
    monkeypatch.setattr(gpu, "ON_CPU_SECONDS", 60)
    names = ["raises", "dies", "passes"]
    table = {name: (f"tests.gpu_faults:{name}", 60) for name in names}
    found = list(gpu.run_checks(names, tmp_path, table))
    assert [(line["check"], line["part"], line["outcome"], line["figure"]) for line in found] == [
        ("raises", "first", "pass", "fine"),
        ("raises", "", "fail", "the last line"),
        ("dies", "", "fail", "its process ended with exit code 7"),
        ("passes", "one", "pass", "fine"),
        ("passes", "two", "not here", "no such thing"),
    ]
    assert 'raise ValueError("the first line' in found[1]["numbers"]["traceback"]
    assert "fail      raises" in capsys.readouterr().out


def test_check_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MODULES", {})
    worker = gpu.Worker(tmp_path)
    worker.start(time.monotonic() + 120)
    [line] = worker.run("tests.gpu_faults:hangs", 3)
    assert (line["outcome"], line["figure"]) == ("fail", "ended after 3 s, its limit")
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert [line["part"] for line in worker.run("tests.gpu_faults:passes", 60)] == [
        "one",
        "two",
    ]
    worker.close()


@pytest.mark.parametrize("outcome, code", [("pass", 0), ("not here", 0), ("fail", 1)])
def test_exit_code_says_whether_something_failed(monkeypatch, tmp_path, capsys, outcome, code):
    line = {**vars(Line("", outcome, "")), "check": "machine", "seconds": 0.0}
    monkeypatch.setattr(gpu, "run_checks", lambda names, folder: [line])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--folder", str(tmp_path)])
    monkeypatch.setattr(gpu.os, "environ", dict(os.environ))
    assert gpu.main() == code
    assert f"1 {outcome}" in capsys.readouterr().out
