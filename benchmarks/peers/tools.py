"""Who trains: how each tool is installed, and what it is asked for, in its own words.

All are asked for the same: LoRA of rank 16 on all linear layers without dropout, or all weights; AdamW at a constant
2e-4; rows in the order of the file; the loss on the assistant's tokens; no activation checkpointing, nothing saved
between. Whatever is not named is the tool's default.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.cases import ROOT, Case, Row, write_rows

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # a CPU build where pip is told of one; see requirements.txt
# SmolLM2's template with the marks by which trl finds the answers; it has none of its own.
MARKED = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Job:
    """A case for a tool: the folder is the tool's own, and empty."""

    case: Case
    model: Path
    rows: list[Row]
    dtype: str  # bfloat16 or float32
    folder: Path

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    def trainer_arguments(self) -> dict[str, Any]:
        """What all tools hand to transformers' Trainer by the same names."""
        return {
            "per_device_train_batch_size": 1 if self.case.accumulated else self.case.rows_a_step,
            "gradient_accumulation_steps": self.case.rows_a_step if self.case.accumulated else 1,
            "max_steps": self.case.steps,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "bf16": self.bf16,
        }

    def write_yaml(self, values: dict[str, Any]) -> str:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return str(path)


def ours(job: Job) -> list[str]:
    write_rows(job.rows, job.folder / "rows.jsonl")
    case = job.case
    recipe: dict[str, Any] = {
        "model_name_or_path": str(job.model),
        "output_dir": str(job.folder / "out"),
        "model_init": {"dtype": job.dtype if case.lora else "float32"},
        "dataset": {
            "train": str(job.folder / "rows.jsonl"),
            "max_length": case.tokens,
            "packing": case.packed,
        },
        "training_args": job.trainer_arguments()
        | {"activation_checkpointing": False, "train_sampling_strategy": "sequential", "use_cpu": True},
        "evaluation": {"general": "off"},
        "export": {"merge": False},
    }
    if case.lora:
        recipe["lora_config"] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    if case.four_bits:
        recipe["quantization_config"] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": job.dtype,
        }
    return [str(ROOT / "run_sft.py"), job.write_yaml(recipe)]


def trl(job: Job) -> list[str]:
    write_rows(job.rows, job.folder / "rows" / "train.jsonl")
    (job.folder / "template.jinja").write_text(MARKED, encoding="utf-8")
    case = job.case
    values: dict[str, Any] = {
        "model_name_or_path": str(job.model),
        "dataset_name": str(job.folder / "rows"),
        "output_dir": str(job.folder / "out"),
        "chat_template_path": str(job.folder / "template.jinja"),
        "assistant_only_loss": True,
        "max_length": case.tokens,
        "packing": case.packed,
        # Its default is float32. All weights are trained in that, by all tools but for what each says itself.
        "dtype": job.dtype if case.lora else "float32",
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        **job.trainer_arguments(),
    }
    if case.lora:
        values |= {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
        values["lora_target_modules"] = "all-linear"
    if case.four_bits:
        values |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return ["trl.scripts.sft", "--config", job.write_yaml(values)]


def llamafactory(job: Job) -> list[str]:
    write_rows(job.rows, job.folder / "rows" / "rows.jsonl")
    names = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": names | {"system_tag": "system"},
    }
    (job.folder / "rows" / "dataset_info.json").write_text(json.dumps({"rows": described}), encoding="utf-8")
    case = job.case
    values: dict[str, Any] = {
        "model_name_or_path": str(job.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if case.lora else "full",
        "dataset": "rows",
        "dataset_dir": str(job.folder / "rows"),
        "template": "smollm2",
        "cutoff_len": case.tokens,
        "output_dir": str(job.folder / "out"),
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "use_cpu": True,
        **job.trainer_arguments(),
    }
    if case.lora:
        values |= {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"}
    if case.four_bits:
        values |= {"quantization_bit": 4, "quantization_method": "bnb"}
    if case.packed:
        values |= {"packing": True, "neat_packing": True}
    return ["llamafactory.cli", "train", job.write_yaml(values)]


def ms_swift(job: Job) -> list[str]:
    write_rows(job.rows, job.folder / "rows.jsonl")
    case = job.case
    values: dict[str, Any] = {
        "model": str(job.model),
        "model_type": "llama",
        "template": "chatml",
        "dataset": str(job.folder / "rows.jsonl"),
        "split_dataset_ratio": 0,
        "max_length": case.tokens,
        "tuner_type": "lora" if case.lora else "full",
        "torch_dtype": job.dtype if case.lora else "float32",
        "output_dir": str(job.folder / "out"),
        "add_version": False,
        "gradient_checkpointing": False,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "packing": case.packed,
        "use_cpu": True,
        **job.trainer_arguments(),
    }
    if case.lora:
        values |= {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    if case.four_bits:
        values |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": job.dtype}
    return ["swift.cli.sft", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


@dataclass(frozen=True)
class Tool:
    """command: writes what the tool is told into the job's folder; gives its program and arguments."""

    label: str
    command: Callable[[Job], list[str]]
    pins: str = ""  # a file of this folder; empty: it runs in our own environment
    empty_modules: tuple[str, ...] = ()  # what it imports, does not need for text, and has no build for a CPU


TOOLS = {
    "ours": Tool("this repository", ours),
    "trl": Tool("trl 1.16.0, its script", trl),
    "ms-swift": Tool("ms-swift 4.6.0", ms_swift, "ms_swift.txt"),
    "llamafactory": Tool("LLaMA-Factory 0.9.5", llamafactory, "llamafactory.txt", ("torchaudio",)),
}


def python_of(name: str, environments: Path) -> Path:
    """The interpreter of a tool; its environment is made when it is first asked for.

    Raises: RuntimeError: pip could not install it; with pip's last line.
    """
    tool = TOOLS[name]
    if not tool.pins:
        return Path(sys.executable)
    folder = environments / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pins = (HERE / tool.pins).read_text(encoding="utf-8")
    done = folder / "installed.txt"
    if done.is_file() and done.read_text(encoding="utf-8") == pins:
        return python
    _run([sys.executable, "-m", "venv", str(folder)])
    # torch with what it needs; the rest as it is pinned, so that nothing can bring another torch.
    _run([str(python), "-m", "pip", "install", "-q", TORCH])
    _run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(HERE / tool.pins)])
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(_run([str(python), "-c", code]).strip())
    for module in tool.empty_modules:
        (packages / f"{module}.py").write_text('"""Empty: see benchmarks/peers/tools.py."""\n', encoding="utf-8")
    done.write_text(pins, encoding="utf-8")
    return python


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"{' '.join(command[1:5])}: {''.join(last)}")
    return done.stdout
