"""Answers for the demo test split, in batches as sft/results/answers.py makes them beside one prompt at a time.

    python benchmarks/generation.py MODEL_FOLDER [--max_new_tokens 32] [--batch_size 16] [--dtype float32]

Both write the same tokens where the arithmetic is exact enough (float32), and the share of equal answers is printed.
Tokens are those that are kept: up to an answer's stop token, without padding. Each way first answers one batch untimed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.data.splits import prepare  # noqa: E402
from sft.model.load import load_model  # noqa: E402
from sft.model.machine import default_dtype  # noqa: E402
from sft.model.tokenizer import load_tokenizer  # noqa: E402
from sft.recipe import load_recipe  # noqa: E402
from sft.results import answers  # noqa: E402 - the path above comes first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_samples", type=int, default=32)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; auto: what a run takes on this machine")
    options = parser.parse_args()
    recipe = load_recipe(
        ROOT / "recipes/smollm2_cpu.yaml",
        [
            f"model_name_or_path={options.model}",
            f"model_init.dtype={options.dtype}",
            f"dataset.test={ROOT}/data/demo/test.jsonl",
            "dataset.max_length=4096",
            f"evaluation.generation.max_new_tokens={options.max_new_tokens}",
        ],
    )
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer, scoring_only=True)
    model = load_model(recipe)
    turns = answers.list_turns(data.test_conversations[: options.max_samples], data.encoder)
    stops = answers.stop_ids(model, data.encoder)
    config = answers.generation_config(recipe, tokenizer, stops)
    print(
        f"{len(turns)} answers, {torch.get_num_threads()} threads, {default_dtype(recipe)}, batch {options.batch_size}"
    )

    def generate(size: int, chosen: list[answers.Turn]) -> tuple[float, list[list[int]]]:
        rows: dict[str, list[int]] = {}
        ordered = sorted(chosen, key=lambda turn: -len(turn.prompt))
        begun = time.perf_counter()
        for i in range(0, len(ordered), size):
            batch = ordered[i : i + size]
            made = answers.generate(model, data.encoder, [turn.prompt for turn in batch], config)
            for turn, row in zip(batch, made, strict=True):
                end = next((k + 1 for k, token in enumerate(row) if token in stops), len(row))
                rows[turn.key] = row[:end]
        return time.perf_counter() - begun, [rows[turn.key] for turn in chosen]

    speeds, token_rows = {}, {}
    with answers.generation_mode(model, adapter_on=True):
        for size in (options.batch_size, 1):
            generate(size, turns[: min(size, 2)])
            seconds, token_rows[size] = generate(size, turns)
            tokens = sum(map(len, token_rows[size]))
            speeds[size] = tokens / seconds
            print(f"batch {size:>3}: {tokens:,} tokens in {seconds:.1f} s, {speeds[size]:.1f} tokens/s", flush=True)
    equal = sum(a == b for a, b in zip(token_rows[options.batch_size], token_rows[1], strict=True))
    print(f"{speeds[options.batch_size] / speeds[1]:.1f} times as fast; {equal} of {len(turns)} answers are the same")


if __name__ == "__main__":
    main()
