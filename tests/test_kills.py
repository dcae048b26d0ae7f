"""The short form of benchmarks/faults.py: a run that is killed for good, again and again, is as if it never was."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_four_killed_runs_leave_the_files_of_an_undisturbed_one(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--kills", "4", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0 and "\n4 of 4 equal" in done.stdout, done.stdout + done.stderr
