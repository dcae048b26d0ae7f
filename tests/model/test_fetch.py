"""`python -m sft.fetch`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_fetching_shows_none_of_the_libraries_bars(tmp_path):
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")  # so that nothing is fetched
    code = "from sft.model.fetch import main; main(); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"SmolLM2-135M-Instruct is in {folder.relative_to(tmp_path)}\n", "")
