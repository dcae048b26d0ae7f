"""What a training step really holds at most beside what `--check` says of it, on the CPU; Linux only.

    python benchmarks/memory.py [--folder FOLDER]

Each case is trained for two steps in a process of its own. Measured is the most memory that it held during them (VmHWM
of /proc/self/status) above what it held before it loaded the model; a very small model is trained before that, since
the first step loads libraries. glibc is told to give each larger block pages of its own and to give them back when it
is freed, so that what is counted is alive.
"""

import argparse
import ctypes
import dataclasses
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.data.packing import pack  # noqa: E402
from sft.data.splits import Data  # noqa: E402
from sft.model.load import load_model, meta_model  # noqa: E402
from sft.model.lora import add_lora  # noqa: E402
from sft.recipe import Recipe, load_recipe  # noqa: E402
from sft.training.memory import estimate_memory  # noqa: E402
from sft.training.trainer import make_trainer  # noqa: E402
from tests.families import FAMILIES, build  # noqa: E402 - the path above comes first

WARM_UP = 100  # entries of the vocabulary of the very small model
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RESET = Path("/proc/self/clear_refs")
RECIPE = """
model_name_or_path: {folder}/model{vocabulary}
output_dir: {folder}/out
dataset: {{train: unused.jsonl, max_length: 512}}
model_init: {{dtype: {dtype}}}
training_args: {{max_steps: 2, per_device_train_batch_size: 4, bf16: true, save_strategy: "no", disable_tqdm: true}}
"""
LORA = "lora_config={r: 16, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}"
NOT_PACKED = "dataset.packing=false"
# name: entries of the vocabulary, dtype of the weights, overrides
CASES = {
    "LoRA, packed": (32000, "bfloat16", [LORA]),
    "LoRA, not packed": (32000, "bfloat16", [LORA, NOT_PACKED]),
    "LoRA, not packed, without checkpointing": (
        32000,
        "bfloat16",
        [LORA, NOT_PACKED, "training_args.activation_checkpointing=false"],
    ),
    "LoRA, packed, vocabulary of 151,936": (151936, "bfloat16", [LORA]),
    "full fine-tuning, packed": (32000, "float32", []),
}


def recipe_of(folder: Path, name: str) -> Recipe:
    vocabulary, dtype, overrides = CASES[name]
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, vocabulary=vocabulary, dtype=dtype), encoding="utf-8")
    return load_recipe(path, overrides)


def save_models(folder: Path) -> None:
    for vocabulary, hidden in [(WARM_UP, 16), *((case[0], 512) for case in CASES.values())]:
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder / f"model{vocabulary}")


def token_rows(length: int) -> datasets.Dataset:
    """32 rows, half of each labelled; every second is a token shorter, so that rows differ in length."""
    ids = [[5 + i % 90 for i in range(length - row % 2)] for row in range(32)]
    masks = [[0] * (length // 2) + [1] * (len(row) - length // 2) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "assistant_mask": masks})


def high_water() -> int:
    """The most memory of this process since its mark was reset, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(folder: Path, name: str) -> int:
    """Two real steps; bytes."""
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 65536)
    recipe = recipe_of(folder, name)
    train(dataclasses.replace(recipe, model_name_or_path=f"{folder}/model{WARM_UP}"))
    gc.collect()
    RESET.write_text("5", encoding="utf-8")  # the mark falls to what is held now
    before = high_water()
    train(recipe)
    return high_water() - before


def train(recipe: Recipe) -> None:
    tokenizer, length = build(FAMILIES["qwen2_5"], "bytes"), recipe.dataset.max_length
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)  # an id that the small vocabularies have too
    rows = pack(token_rows(length // 4), length) if recipe.dataset.packing else token_rows(length)
    trainer = make_trainer(recipe, add_lora(load_model(recipe), recipe), tokenizer, Data(None, rows))
    gc.collect()
    RESET.write_text("5", encoding="utf-8")  # what loading took is no part of it
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "memory")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.folder, options.measure))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_models(options.folder)
    print(f"{'MB':<41}measured  estimate")
    for name in CASES:
        recipe = recipe_of(options.folder, name)
        estimate = sum(estimate_memory(recipe, meta_model(recipe), own_loss=True).values())
        command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        measured = int(done.stdout.split()[-1])
        print(f"{name:<41}{measured / 1e6:8.0f}{estimate / 1e6:10.0f} ({estimate / measured - 1:+.0%})", flush=True)


if __name__ == "__main__":
    main()
