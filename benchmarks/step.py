"""Where the time of a training step goes: tokens a second, share of the matmul rate, and shares by kind of work.

    python benchmarks/step.py recipes/smollm2_cpu.yaml [key=value ...]

Six steps of the recipe, each of one batch, with nothing saved or validated between: the first compiles kernels, the
next four are timed, the last is profiled. On the CPU or the GPU, as a run would choose.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_checks import speed  # noqa: E402 - the path above comes first
from sft.data.splits import Data, prepare  # noqa: E402
from sft.model.allocator import keep_freed_memory  # noqa: E402
from sft.model.load import load_model, meta_model  # noqa: E402
from sft.model.lora import add_lora  # noqa: E402
from sft.model.machine import autocast_dtype  # noqa: E402
from sft.model.tokenizer import load_tokenizer  # noqa: E402
from sft.recipe import load_recipe  # noqa: E402
from sft.training import trainer  # noqa: E402
from sft.training.duration import matmul_rate  # noqa: E402


def main(recipe_file: str, *overrides: str) -> None:
    keep_freed_memory()  # as run_sft.py does
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(recipe_file, [*overrides, *speed.ALONE, f"output_dir={scratch}"])
        tokenizer, model = load_tokenizer(recipe), add_lora(load_model(recipe), recipe)
        rows = prepare(recipe, tokenizer).train
        count = min(len(rows), speed.STEPS * int(recipe.training_args["per_device_train_batch_size"]))
        rows = rows.select(range(count))
        labels = [speed.labels_of(row) for row in rows]
        steps = speed.timed(trainer.make_trainer(recipe, model, tokenizer, Data(None, rows)))
    dtype = autocast_dtype(recipe) or model.dtype
    rate = matmul_rate(model.device.type, dtype)
    share = steps.tokens_a_second * speed.flops_a_token(recipe, meta_model(recipe), labels) / rate
    print(
        f"{steps.tokens_a_second:,.0f} tokens/s in {str(dtype).removeprefix('torch.')}, {share:.0%} of the "
        f"{rate / 1e9:,.0f} GFLOP/s of a matrix product; {median(steps.tokens):,.0f} tokens in a step"
    )
    wall = steps.seconds[-1]
    print(", ".join(f"{kind} {seconds / wall:.0%}" for kind, seconds in steps.work.kinds.most_common()))
    for name, seconds in steps.work.names.most_common(12):
        print(f"  {seconds / wall:6.1%}  {name[:100]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
