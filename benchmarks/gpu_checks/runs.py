"""Whole runs by run_sft.py in processes of their own: stopped and resumed, and started by torchrun and accelerate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.gpu_checks.line import Line, judged, not_here
from benchmarks.gpu_checks.machine import DEVICE, ON_GPU
from benchmarks.gpu_checks.models import ROOT, full_size, overrides_for, small_qwen

RECIPE = str(ROOT / "recipes/qwen_qlora.yaml")
SHORT = [
    "dataset.max_length=512",
    "training_args.gradient_accumulation_steps=1",
    "training_args.logging_steps=1",
    "training_args.disable_tqdm=true",
    "training_args.eval_strategy=no",
    "training_args.eval_on_start=false",
    "evaluation.generation.max_new_tokens=8",
    "evaluation.max_samples=4",
]
SHORT_WHOLE = [
    "training_args.max_steps=3",
    "training_args.logging_steps=1",
    "evaluation.generation.max_new_tokens=32",
    "evaluation.max_samples=4",
]
WHOLE_RECIPE_SECONDS = 190
WHOLE_RECIPE_BYTES = 40e9 if ON_GPU else 1e8  # the base and its merged copy
FULL = ["quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch"]
# Keys as accelerate documents them, and as trl/accelerate_configs/fsdp2.yaml has them for eight processes.
FSDP2 = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
mixed_precision: "no" # the recipe decides
num_machines: 1
num_processes: 1
"""


def whole_run(folder: Path) -> Iterator[Line]:
    """SIGTERM after a step, the same command again, and what it leaves."""
    if sys.platform == "win32":
        yield not_here("", "Windows has no SIGTERM to catch")
        return
    model, output = small_qwen(folder), folder / "run"
    command = [RECIPE, *overrides_for(model, *SHORT, f"output_dir={output}")]
    process, log = _start([str(ROOT / "run_sft.py"), *command, "training_args.max_steps=5000"], folder / "stopped.log")
    while "  loss " not in _read(log):
        if process.poll() is not None:
            raise RuntimeError(f"run_sft.py ended before its first step: {_last_line(log)}")
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))
    stopped = code == 143 and len(steps) == 1
    yield judged("stop", stopped, f"SIGTERM: exit code {code}, checkpoints {steps}; {_last_line(log)}")

    last = max(steps) + 2
    process, log = _start(
        [str(ROOT / "run_sft.py"), *command, f"training_args.max_steps={last}"], folder / "resumed.log"
    )
    code = process.wait()
    done = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] if code == 0 else None
    went_on = f"going on from {output / f'checkpoint-{max(steps)}'}" in _read(log)
    yield judged(
        "resume", went_on and done == last, f"exit code {code}, from step {max(steps)} to {done}; {_last_line(log)}"
    )

    difference = _difference_of_merged_model(model, output)
    yield judged(
        "merge", difference < 0.02, f"final_model's logits are those of base and adapter to {difference:.1e}, relative"
    )
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    held = {"base", "tuned"} <= scores.keys() and (output / "report.html").is_file()
    yield judged(
        "score", held and scores["rows"] == 4, f"{scores['rows']} answers scored, before and after, and a page"
    )


def whole_qwen_qlora(folder: Path) -> Iterator[Line]:
    return _whole_recipe(folder, "qwen_qlora")


def whole_chatglm3_4bit(folder: Path) -> Iterator[Line]:
    return _whole_recipe(folder, "chatglm3_4bit")


def _whole_recipe(folder: Path, name: str) -> Iterator[Line]:
    """recipes/NAME.yaml with random weights of the released size, from the command to the page; three steps."""
    if (free := shutil.disk_usage(folder).free) < WHOLE_RECIPE_BYTES:
        yield not_here("", f"{folder} has {free / 1e9:.0f} GB free, and it takes {WHOLE_RECIPE_BYTES / 1e9:.0f}")
        return
    try:
        output = folder / name / "run"
        overrides = overrides_for(full_size(name, folder / name / "base"), *SHORT_WHOLE, f"output_dir={output}")
        begun = time.perf_counter()
        recipe = str(ROOT / f"recipes/{name}.yaml")
        process, log = _start([str(ROOT / "run_sft.py"), recipe, *overrides], folder / f"{name}.log")
        try:
            code: int | str = process.wait(WHOLE_RECIPE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"none in {WHOLE_RECIPE_SECONDS} s"
        seconds = time.perf_counter() - begun
        holds = code == 0 and (output / "report.html").is_file() and (output / "final_model").is_dir()
        if not holds:
            yield judged("", False, f"exit code {code}: {_last_line(log)}", log=_read(log)[-6000:])
            return
        used = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
        parts = ", ".join(f"{part} {taken:.0f} s" for part, taken in used["resources"]["seconds"].items())
        peak = used["resources"]["peak_gpu_memory_bytes"] or 0
        figure = f"{seconds:.0f} s ({parts}), {peak / 1e9:.1f} GB of the GPU"
        yield judged("", True, figure, log=_read(log)[-6000:], **used["resources"])
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)


def _difference_of_merged_model(base: Path, output: Path) -> float:
    """bfloat16 rounding of the merged weights at most."""
    ids = torch.arange(3, 60, device=DEVICE)[None]

    @torch.no_grad()
    def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        return (PeftModel.from_pretrained(model, adapter) if adapter else model)(ids).logits

    apart, merged = logits(base, output / "lora_adapter"), logits(output / "final_model")
    return ((merged - apart).norm() / apart.norm()).item()


def torchrun(folder: Path) -> Iterator[Line]:
    """One process of torchrun: a process group, and a device by its rank. accelerate wraps in DDP from two on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    yield _launched(folder, "ddp", launcher, [], "MULTI_GPU" if ON_GPU else "MULTI_CPU")


def fsdp2(folder: Path) -> Iterator[Line]:
    """One process of accelerate with FSDP2: full fine-tuning, the weights in DTensors."""
    if not ON_GPU:
        yield not_here("", "accelerate runs FSDP on a CPU as DDP, and says nothing")
        return
    config = folder / "fsdp2.yaml"
    config.write_text(FSDP2, encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    yield _launched(folder, "fsdp2", launcher, FULL, "FSDP")


def _launched(folder: Path, name: str, launcher: list[str], overrides: list[str], expected: str) -> Line:
    output, report = folder / name, folder / f"{name}.json"
    command = [RECIPE, *overrides_for(small_qwen(folder), *SHORT, *overrides, f"output_dir={output}")]
    command += ["training_args.max_steps=2", "dataset.test=null"]
    script = str(Path(__file__).with_name("launched.py"))
    process, log = _start([*launcher, script, str(report), *command], folder / f"{name}.log")
    if code := process.wait():
        return judged("", False, f"exit code {code}: {_last_line(log)}", log=_read(log)[-4000:])
    found = json.loads(report.read_text(encoding="utf-8"))
    weights = "final_model/model.safetensors" if overrides else "lora_adapter/adapter_model.safetensors"
    holds = (
        found["distributed_type"] == expected and found["fsdp_version"] in (None, 2) and (output / weights).is_file()
    )
    return judged(
        "",
        holds,
        f"{found['distributed_type']} of {found['processes']} process on {found['device']}; {weights} is there",
        **found,
    )


def _start(arguments: list[str], log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A Python process that writes all it says to a file."""
    with open(log, "wb") as stream:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=stream, stderr=stream
        )
    return process, log


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _last_line(log: Path) -> str:
    return next((line for line in reversed(_read(log).splitlines()) if line.strip()), "it said nothing")
