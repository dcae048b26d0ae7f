"""docs/first_run.md shows what a run leaves on a terminal; here a tiny model makes the same run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first_run.md"
# What begins the lines that do not hang on the model and its answers.
HEADS = (
    r"split|train|validation|test|rows are|disk|training|step|saved|as served|score|  bleu|  chrf|  rouge|  exact|"
    r"  stop|loss|  training|  validation|  after|  asked|  wanted|  before|in output|next: python -m webbrowser"
)


def heads(lines):
    """The beginnings of the lines, in order, each said once where several follow each other."""
    found = [match[0] for line in lines if (match := re.match(HEADS, line))]
    return [head for head, before in zip(found, ["", *found], strict=False) if head != before]


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
def test_the_page_shows_what_a_run_leaves_on_a_terminal_of_80_columns(small_qwen, tmp_path):
    from tests.terminals import Terminal

    terminal = Terminal()
    command = [sys.executable, str(ROOT / "run_sft.py"), "recipes/smollm2_cpu.yaml", f"model_name_or_path={small_qwen}"]
    command += ["lora_config.layers_to_transform=null", "dataset.max_length=1024", "training_args.logging_steps=1"]
    command += ["output_dir=output/tiny", "training_args.max_steps=2", "training_args.eval_strategy=steps"]
    command += ["training_args.eval_steps=1", "evaluation.generation.max_new_tokens=3"]
    for name in ("recipes", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"cwd": tmp_path, "env": environment, "stdout": terminal.outside, "stderr": subprocess.STDOUT}
    code = forked.Popen(command, **options).wait(timeout=300)
    lines = [line.rstrip() for line in terminal.left()]
    assert code == 0, lines
    page = PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```\n")[0].splitlines()
    assert heads(lines) == heads(page), "run `python benchmarks/first_run.py`, and read what changed"
    assert [line for line in lines if "WARNING" in line or "Traceback" in line] == []
