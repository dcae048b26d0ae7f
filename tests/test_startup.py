"""What a command imports, which is most of the seconds before its first word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "torch._inductor.compile_fx"
SCRIPT = """
import gc, json, sys
import run_sft
try:
    code = run_sft.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print()
packages = {name.partition(".")[0] for name in sys.modules} | {COMPILER} & set(sys.modules)
print(json.dumps([code, gc.isenabled(), sorted(packages)]))
"""


def after(*arguments):
    """Exit code, whether garbage is collected, and the names of all packages that were imported."""
    command = [sys.executable, "-c", f"COMPILER = {COMPILER!r}\n{SCRIPT}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    code, collects, packages = json.loads(done.stdout.splitlines()[-1])
    return code, collects, set(packages)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["missing.yaml"], 2),
        (["recipes/qwen_qlora.yaml", "dataset.max_lenght=5"], 2),
        (["recipes/qwen_qlora.yaml", "dataset.streaming=true", "dataset.validation=0.1"], 2),
        (["--from", "missing.yaml", "recipes/none.yaml"], 2),
    ],
    ids=["help", "no such recipe", "unknown key", "keys that do not go together", "no recipe of another tool"],
)
def test_help_and_a_wrong_recipe_wait_for_no_library(arguments, code):
    found, _, packages = after(*arguments)
    assert found == code
    assert not packages & {"torch", "transformers", "datasets", "numpy", "pyarrow", "tokenizers", "jinja2"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_characters_of_the_data_is_no_error(encoding):
    command = [sys.executable, "run_sft.py", "recipes/灯塔.yaml"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"error: recipes/\u706f\u5854.yaml")
    printed = "import run_sft\nrun_sft.main(['recipes/none.yaml'])\nprint('灯塔')"
    done = subprocess.run([sys.executable, "-c", printed], cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.stdout.rstrip().endswith(rb"\u706f\u5854")


def test_a_comparison_of_what_are_no_runs_waits_for_no_library():
    code, _, packages = after("--compare", "nowhere", "neither")
    assert code == 2 and "numpy" in packages
    assert not packages & {"torch", "transformers", "datasets", "evaluate", "matplotlib"}


def test_a_check_waits_for_no_scores_and_no_plots_and_collects_garbage_again(small_qwen, tmp_path):
    overrides = [f"model_name_or_path={small_qwen}", f"output_dir={tmp_path}/out", "quantization_config=null"]
    overrides += ["dataset.train=data/demo/validation.jsonl", "dataset.validation=null", "dataset.max_length=640"]
    overrides += ["dataset.test=data/demo/validation.jsonl", "model_init.dtype=float32", "training_args.bf16=false"]
    code, collects, packages = after(
        "recipes/qwen_qlora.yaml", *overrides, "training_args.optim=adamw_torch", "--check"
    )
    assert (code, collects) == (0, True) and "torch" in packages
    assert not packages & {
        "matplotlib",
        "evaluate",
        "sacrebleu",
        "rouge_score",
        "nltk",
        "scipy",
        "sklearn",
        "deepspeed",
        COMPILER,
    }


def test_what_is_decorated_while_libraries_are_imported_is_compiled_when_it_is_called(monkeypatch):
    import torch

    from sft.model.late_compile import compiled_when_called

    asked = []

    def compile_now(function, **options):
        asked.append(options)
        return lambda *args: -function(*args)

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():

        @torch.compile
        def one(x):
            return x

        @torch.compile(dynamic=True)
        def two(x):
            """Twice."""
            return 2 * x

    assert torch.compile is compile_now and asked == []
    assert (one(3), two(3), two(4), two.__doc__) == (-3, -6, -8, "Twice.")
    assert asked == [{}, {"dynamic": True}]
