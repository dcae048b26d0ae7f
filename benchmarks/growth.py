"""How time and memory grow: of preparation and packing with the rows, of a step with the tokens a row.

    python benchmarks/growth.py MODEL_FOLDER [--rows 10000 100000 1000000] [--lengths 512 1024 2048 4096 8192]

Draws benchmarks/growth.png and prints the tables. The dialogues are those of benchmarks/preparation.py, made here with
a seed. A measurement is a process of its own; its memory is the most that it holds, less what it held before the first
row, without pages of mapped files (on Linux). A step is one row of chats of 128 tokens, or of one chat of the whole
length, through the model in MODEL_FOLDER with LoRA and activation checkpointing, by this repository's trainer and by
trl's own on the same rows (padding-free, sdpa), on rows of --trls-longest (2,048) tokens at most; the faster of two,
after one that is not timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.preparation import write_rows  # noqa: E402 - the path above comes first

CHAT = 128  # tokens
STEPS = 3
Figures = dict[str, float]


class Peak:
    """The most memory that this process holds while it is open, in bytes, above what it held before.

    On Linux without the pages of mapped files, which the system takes back when it needs them: where a page of one is
    read it maps those around it too, and a gigabyte of rows looks like half a gigabyte of memory.
    """

    def __enter__(self) -> "Peak":
        self._process, self._is_open = psutil.Process(), True
        self._before = self.bytes = self._held()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while self._is_open:
            self.bytes = max(self.bytes, self._held())
            time.sleep(0.1)

    def _held(self) -> int:
        memory: Any = self._process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._watcher.join()
        self.bytes -= self._before


# ---------------------------------------------------------------------------------------------- what a process measures


def prepared(folder: str, count: str) -> Figures:
    """Seconds to tokenise and to pack so many rows of a file, and the memory of each."""
    import datasets
    from transformers import AutoTokenizer

    from sft.data.chat import ChatEncoder
    from sft.data.packing import pack
    from sft.data.token_cache import tokenise_file
    from sft.recipe import load_recipe

    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = scratch
        data, recipe_file = Path(scratch) / "rows.jsonl", Path(scratch) / "recipe.yaml"
        write_rows(data, int(count))
        text = f"model_name_or_path: {folder}\noutput_dir: {scratch}/out\ndataset: {{train: {data}}}\n"
        recipe_file.write_text(text, encoding="utf-8")
        recipe, encoder = load_recipe(recipe_file), ChatEncoder(AutoTokenizer.from_pretrained(folder))
        begun = time.perf_counter()
        with Peak() as tokenising:
            rows = tokenise_file(data, recipe.dataset.train[0], encoder, recipe).rows
        tokenised = time.perf_counter()
        with Peak() as packing:
            pack(rows, 2048)
        packed = time.perf_counter()
    return {
        "tokenise": tokenised - begun,
        "pack": packed - tokenised,
        "memory": tokenising.bytes,
        "packing_memory": packing.bytes,
    }


def step(folder: str, length: str, chat: str, whose: str) -> Figures:
    """Seconds of a training step of one row of `length` tokens in chats of `chat` tokens. whose: ours or trl."""
    import datasets
    import torch
    from trl import SFTTrainer

    from benchmarks.gpu_checks import speed
    from sft.data.splits import Data
    from sft.model.allocator import keep_freed_memory
    from sft.model.load import load_model
    from sft.model.lora import add_lora
    from sft.model.tokenizer import load_tokenizer
    from sft.recipe import load_recipe
    from sft.training import arguments, trainer

    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(
            ROOT / "recipes/smollm2_cpu.yaml",
            [*speed.ALONE, f"training_args.max_steps={STEPS}", "training_args.activation_checkpointing=true"]
            + [f"model_name_or_path={folder}", f"output_dir={scratch}", f"dataset.max_length={length}"]
            + ["lora_config.layers_to_transform=null"],
        )
        tokenizer, model = load_tokenizer(recipe), add_lora(load_model(recipe), recipe)
        ids = torch.randint(3, 1000, (STEPS, int(length)), generator=torch.Generator().manual_seed(0)).tolist()
        row: dict[str, Any] = {"input_ids": ids, "seq_lengths": [[int(chat)] * (int(length) // int(chat))] * STEPS}
        if whose == "ours":
            keep_freed_memory()  # as run_sft.py does
            rows = datasets.Dataset.from_dict({**row, "assistant_mask": [[1] * int(length)] * STEPS})
            made = trainer.make_trainer(recipe, model, tokenizer, Data(None, rows))
        else:
            args = arguments.training_config(recipe)
            args.padding_free, args.max_length = True, None
            rows = datasets.Dataset.from_dict({**row, "labels": ids})
            made = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        return {"seconds": min(speed.timed(made).seconds[1:])}


MEASURES = {"prepared": prepared, "step": step}


def measure(*arguments: str) -> Figures:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--only", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    print(*arguments[2:], {key: round(value, 4) for key, value in found.items()}, file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------------- tables and pictures


def of_rows(folder: str, counts: list[int]) -> dict[int, Figures]:
    found = {count: measure("prepared", folder, str(count)) for count in counts}
    print("| rows | tokenised, s | a second | memory | packed, s | memory |\n|---|---|---|---|---|---|")
    for count, figures in found.items():
        seconds, memory, packing = figures["tokenise"], figures["memory"] / 1e6, figures["packing_memory"] / 1e6
        rate = f"{count / seconds:,.0f}"
        print(f"| {count:,} | {seconds:.1f} | {rate} | {memory:,.0f} MB | {figures['pack']:.2f} | {packing:,.0f} MB |")
    return found


WAYS = {
    "chats of 128 tokens": ("chat", "ours"),
    "one chat a row": ("row", "ours"),
    "chats of 128 tokens, trl's trainer": ("chat", "trl"),
}


def of_lengths(folder: str, lengths: list[int], trls_longest: int) -> dict[str, list[float]]:
    """Milliseconds a token, by the way and the length; fewer where trl's trainer is not run on the longest."""
    found: dict[str, list[float]] = {}
    for name, (kind, whose) in WAYS.items():
        found[name] = []
        for length in lengths:
            if whose == "ours" or length <= trls_longest:
                chat = CHAT if kind == "chat" else length
                seconds = measure("step", folder, str(length), str(chat), whose)["seconds"]
                found[name].append(seconds / length * 1e3)
    print("\n| milliseconds a token | " + " | ".join(f"{length:,} a row" for length in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for name, values in found.items():
        cells = [f"{value:.2f}" for value in values] + [""] * (len(lengths) - len(values))
        print(f"| {name} | " + " | ".join(cells) + " |")
    return found


def draw(rows: dict[int, Figures], lengths: list[int], steps: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for key, label in (("tokenise", "tokenising"), ("pack", "packing")):
        left.loglog(list(rows), [figures[key] for figures in rows.values()], "o-", label=label)
    left.set(xlabel="rows", ylabel="seconds", title="time")
    for key, label in (("memory", "tokenising"), ("packing_memory", "packing")):
        middle.semilogx(list(rows), [figures[key] / 1e6 for figures in rows.values()], "o-", label=label)
    middle.set(xlabel="rows", ylabel="MB", title="memory, mapped files left out", ylim=(0, None))
    for name, values in steps.items():
        right.semilogx(lengths[: len(values)], values, "o-", base=2, label=name)
    right.set(xlabel="tokens a row", ylabel="milliseconds a token", title="a training step", ylim=(0, None))
    for axes in (left, middle, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder", nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--trls-longest", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--picture", type=Path, default=ROOT / "benchmarks/growth.png")
    parser.add_argument("--only", nargs="+", metavar="MEASURE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, *arguments = options.only
        print(json.dumps(MEASURES[name](*arguments)))
        return
    rows = of_rows(options.model_folder, options.rows)
    options.lengths.sort()
    steps = of_lengths(options.model_folder, options.lengths, options.trls_longest)
    draw(rows, options.lengths, steps, options.picture)


if __name__ == "__main__":
    main()
