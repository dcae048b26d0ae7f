"""Answers: how many a second, and that padding on the left changes none."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_checks.line import Line, judged
from benchmarks.gpu_checks.machine import DEVICE, ON_GPU, sync
from benchmarks.gpu_checks.models import recipe_for, small_qwen
from sft.data.chat import ChatEncoder
from sft.data.splits import prepare
from sft.model.load import load_model
from sft.model.tokenizer import load_tokenizer
from sft.recipe import Recipe
from sft.results import answers as results

SIZES = (1, 16, 64)
NEW_TOKENS = 64 if ON_GPU else 4


def answers(folder: Path) -> Iterator[Line]:
    """Prompts of the demo data's test split, each answered with the same number of tokens."""
    recipe = recipe_for(
        small_qwen(folder),
        "quantization_config=null",
        "dataset.max_length=4096",
        f"evaluation.generation={{max_new_tokens: {NEW_TOKENS}, min_new_tokens: {NEW_TOKENS}}}",
    )
    data = prepare(recipe, load_tokenizer(recipe), scoring_only=True)
    turns = results.list_turns(data.test_conversations, data.encoder)
    prompts = [turn.prompt for turn in turns]
    prompts = sorted((prompts * 2)[: max(SIZES)], key=len)
    model = load_model(recipe, training=False).to(DEVICE)
    rates: dict[int, float] = {}
    for size in SIZES:
        chosen = prompts[:: len(prompts) // 4] if size == 1 else prompts
        _generate(recipe, model, data.encoder, chosen[:size], size)
        sync()
        begun = time.perf_counter()
        made = _generate(recipe, model, data.encoder, chosen, size)
        sync()
        rates[size] = len(made) / (time.perf_counter() - begun)
        whole = all(len(row) == NEW_TOKENS for row in made)
        faster = not ON_GPU or size == 1 or rates[size] > rates[1]
        figure = f"{rates[size]:,.1f} answers of {NEW_TOKENS} tokens a second"
        yield judged(f"batch {size}", whole and faster, figure, answers_a_second=rates[size])

    # Where rounding is small enough that the best token is the same one.
    model.float()
    few = prompts[:: len(prompts) // 8]
    recipe.evaluation.generation.update(max_new_tokens=4, min_new_tokens=4)
    together = _generate(recipe, model, data.encoder, few, len(few))
    equal = sum(a == b for a, b in zip(together, _generate(recipe, model, data.encoder, few, 1), strict=True))
    yield judged("padding", equal == len(few), f"{equal} of {len(few)} answers in float32 are the same one by one")


def _generate(
    recipe: Recipe, model: torch.nn.Module, encoder: ChatEncoder, prompts: list[list[int]], size: int
) -> list[list[int]]:
    config = results.generation_config(recipe, encoder.tokenizer, results.stop_ids(model, encoder))
    made = []
    with results.generation_mode(model, adapter_on=True):
        for i in range(0, len(prompts), size):
            made += results.generate(model, encoder, prompts[i : i + size], config)
    return made
